"""The n-gram model that stands beside a model's scores: interpolated Kneser-Ney, by counting.

Chen and Goodman 1999 (doi:10.1006/csla.1999.0128): the probability of a token is what its n-gram was seen,
less a discount, and what was taken off is handed to the model of one token less,

    p(w | h) = (c(hw) - D) / c(h) + (all D taken after h) / c(h) * p(w | h without its oldest token)

In the longest n-grams c counts how often they were seen; in shorter ones, how many different tokens were seen
before them. Below the single tokens stand all ids, equally likely.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

BEFORE = -1  # Stands before a document, so that its first tokens too have a whole history.
FALLBACK = (0.5, 1.0, 1.5)  # The discounts where the counts give none between 0 and the count.

History = tuple[int, ...]


class NGrams:
    """The model of some documents.

    Args:
        documents: Their ids. The first token of each is seen and not predicted.
        vocab_size: The number of ids.
        order: Tokens of the longest n-gram, with the predicted one.
    """

    def __init__(self, documents: Sequence[Sequence[int]], vocab_size: int, order: int):
        self.vocab_size, self.order = vocab_size, order
        seen = Counter((*h, w) for ids in documents for h, w in self.predicted(ids))
        # By length of the history: history -> how often each token counts after it.
        self.after: list[dict[History, dict[int, int]]] = [{} for _ in range(order)]
        self.discounts = [FALLBACK] * order
        for length in range(order - 1, -1, -1):
            for ngram, count in seen.items():
                self.after[length].setdefault(ngram[:-1], {})[ngram[-1]] = count
            self.discounts[length] = discounts(Counter(seen.values()))
            seen = Counter(ngram[1:] for ngram in seen)

    def predicted(self, ids: Sequence[int]) -> Iterator[tuple[History, int]]:
        """Yield each token but the first, and the `order - 1` tokens before it."""
        marked = [BEFORE] * (self.order - 2) + list(ids)
        first = max(self.order - 1, 1)
        for place in range(first, len(marked)):
            yield tuple(marked[place - self.order + 1 : place]), marked[place]

    def distribution(self, history: History) -> np.ndarray:
        """Return the probability of every id after a history of `order - 1` tokens, (vocab_size,)."""
        p = np.full(self.vocab_size, 1 / self.vocab_size)
        for length in range(self.order):
            counts = self.after[length].get(history[len(history) - length :])
            if counts is None:  # No longer history was seen either.
                break
            total = sum(counts.values())
            taken = {w: self.discounts[length][min(count, 3) - 1] for w, count in counts.items()}
            p = p * sum(taken.values()) / total
            for w, count in counts.items():
                p[w] += (count - taken[w]) / total
        return p


def discounts(numbers: Counter[int]) -> tuple[float, float, float]:
    """Return what is taken off a count of 1, of 2, and of 3 or more.

    Args:
        numbers: How many n-grams have each count.
    """
    n1, n2, n3, n4 = (numbers[count] for count in (1, 2, 3, 4))
    if not n1 or not n2 or not n3:
        return FALLBACK
    y = n1 / (n1 + 2 * n2)
    found = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
    return found if all(0 < d <= count for count, d in enumerate(found, 1)) else FALLBACK
