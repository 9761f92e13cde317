"""The n-gram baseline that stands beside every score of a model: interpolated modified Kneser-Ney.

    baseline = NGramModel(train_documents, vocab_size)
    baseline.log_probs(validation_documents)  # nats, one for each token after a document's first

A token is predicted from the `order - 1` before it in its document. With c the count of an n-gram, h its
history and h' the history without its oldest token (Chen and Goodman 1999, doi:10.1006/csla.1999.0128):

    p(w | h) = (c(hw) - D(c)) / c(h) + g(h) p(w | h'),   g(h) = sum of the discounts D taken from h / c(h)

Below the highest order, c counts the different tokens seen before the n-gram, not its occurrences; below the
unigrams stands the uniform distribution, so no probability is 0 and every distribution sums to 1. The
discounts D1, D2, D3+ of an order come from its numbers of n-grams with count 1, 2, 3 and 4.

The model is sorted arrays, one row for each n-gram seen. A history is numbered by (its number without the
oldest token, the oldest token), so that an n-gram is one integer and backing off is one lookup.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

# Measured on the standard library (2.9 M training tokens of a 4,096-word BPE, 306 k validation, one core):
#     order          3      4      5      6      8      10
#     bits per byte  1.653  1.593  1.567  1.554  1.540  1.533
#     fit, s         0.7    1.5    2.0    2.5    4.3    5.1
# At order 6, absolute discounting of plain counts has 1.694 and Witten-Bell 1.779.
ORDER = 6
# The discounts of an order with too few n-grams for an estimate.
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)


def discounts(counts: np.ndarray) -> np.ndarray:
    """Estimate D1, D2, D3+ of n-grams with these counts (N,), as Chen and Goodman 1999 do.

    0 < D <= count holds for each; where the counts give no such numbers (a small or artificial corpus) all
    three are FALLBACK_DISCOUNTS. A discount of 0 would leave nothing for tokens that were not seen.
    """
    n1, n2, n3, n4 = (int((counts == count).sum()) for count in (1, 2, 3, 4))
    if not (n1 and n2 and n3):
        return np.array(FALLBACK_DISCOUNTS)
    y = n1 / (n1 + 2 * n2)
    found = np.array([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return found if ((found > 0) & (found <= (1, 2, 3))).all() else np.array(FALLBACK_DISCOUNTS)


def _find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the index of each wanted number in sorted keys, -1 where it is not among them."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, at, -1)


@dataclass(frozen=True)
class _Level:
    """The n-grams with histories of one length. R = vocab_size + 1; arrays are sorted by key."""

    histories: np.ndarray  # (H,) number in the level below * R + oldest token
    backoff: np.ndarray  # (H,) g(h)
    first: np.ndarray  # (H + 1,) where the n-grams of a history begin
    keys: np.ndarray  # (N,) number of the history * R + predicted token
    p: np.ndarray  # (N,) p(w | h), interpolated


class NGramModel:
    """Interpolated modified Kneser-Ney over token ids.

    Args:
        documents: Token ids, each (length,). Nothing crosses from one to the next, and the first token of
            each is a history and never predicted, as in training.
        vocab_size: Ids are 0 to vocab_size - 1.
        order: Tokens in an n-gram: the predicted one and its history.

    Raises:
        ValueError: an order below 1, an id outside the vocabulary, or nothing to predict in any document.
    """

    def __init__(self, documents: Iterable[np.ndarray], vocab_size: int, order: int = ORDER):
        if order < 1:
            raise ValueError(f"n-grams of order {order}: it must be at least 1")
        self.vocab_size, self.order, self._radix = vocab_size, order, vocab_size + 1
        stream, targets = self._stream(documents)
        if not len(targets):
            raise ValueError("no document has two tokens: an n-gram model needs something to predict")

        histories = [np.zeros(1, np.int64)]
        number = np.zeros(len(targets), np.int64)
        for length in range(1, order):
            found, number = np.unique(number * self._radix + stream[targets - length], return_inverse=True)
            histories.append(found)
        keys, counts = np.unique(number * self._radix + stream[targets], return_counts=True)
        counted = [(keys, counts, np.zeros(0, np.int64))]
        for length in range(order - 1, 0, -1):  # An n-gram counts once for the one without its oldest token.
            shorter = histories[length][keys // self._radix] // self._radix * self._radix + keys % self._radix
            keys, parents, counts = np.unique(shorter, return_inverse=True, return_counts=True)
            counted[-1] = (*counted[-1][:2], parents)
            counted.append((keys, counts, np.zeros(0, np.int64)))

        self._levels: list[_Level] = []
        p = np.array([1 / vocab_size])
        for found, (keys, counts, parents) in zip(histories, reversed(counted), strict=True):
            history = keys // self._radix
            total = np.bincount(history, counts, len(found))
            taken = discounts(counts)[np.minimum(counts, 3) - 1]
            backoff = np.bincount(history, taken, len(found)) / total
            below = p[parents] if self._levels else p
            p = (counts - taken) / total[history] + backoff[history] * below
            first = np.searchsorted(history, np.arange(len(found) + 1))
            self._levels.append(_Level(found, backoff, first, keys, p))
        unigrams = self._levels[0]
        self._unigram = np.full(vocab_size, unigrams.backoff[0] / vocab_size)
        self._unigram[unigrams.keys] = unigrams.p

    def _stream(self, documents: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return all tokens, with vocab_size for "before the document", and the places of the targets."""
        before = np.full(max(self.order - 2, 0), self.vocab_size, np.int64)
        pieces, places, end = [before], [np.zeros(0, np.int64)], len(before)
        for document in documents:
            if len(document) and not 0 <= document.min() <= document.max() < self.vocab_size:
                raise ValueError(
                    f"a document has token ids from {document.min()} to {document.max()}, which do not fit "
                    f"the vocabulary of {self.vocab_size}: use the tokenizer's own vocab_size"
                )
            pieces += [np.asarray(document, np.int64), before]
            places.append(np.arange(end + 1, end + len(document)))
            end += len(document) + len(before)
        return np.concatenate(pieces), np.concatenate(places)

    def _numbers(self, stream: np.ndarray, targets: np.ndarray) -> list[np.ndarray]:
        """Return by history length the number of each target's history, -1 where it was never seen."""
        number = np.zeros(len(targets), np.int64)
        numbers = [number]
        for length in range(1, self.order):
            oldest = stream[targets - length]
            number = _find(self._levels[length].histories, number * self._radix + oldest)  # -1 stays -1
            numbers.append(number)
        return numbers

    def log_probs(self, documents: Iterable[np.ndarray]) -> np.ndarray:
        """Return ln p, in nats, of each token after the first of its document, in order: (targets,)."""
        stream, targets = self._stream(documents)
        tokens = stream[targets]
        p = self._unigram[tokens]
        for level, number in zip(self._levels[1:], self._numbers(stream, targets)[1:], strict=True):
            at = _find(level.keys, number * self._radix + tokens)
            p = np.where(at >= 0, level.p[at], np.where(number >= 0, level.backoff[number], 1) * p)
        return np.log(p)

    def top(self, documents: Iterable[np.ndarray], k: int) -> np.ndarray:
        """Return the k likeliest tokens, best first, at each place that `log_probs` scores: (targets, k).

        The order is that of the whole vocabulary, exactly, with the lower id first among equals.
        """
        return self._top(*self._stream(documents), k)

    def predict(self, context: np.ndarray, k: int) -> np.ndarray:
        """Return the k likeliest tokens after a context (length,) at a document's start, best first: (k,)."""
        return self.top([np.append(context, 0)], k)[-1]

    def _top(self, stream: np.ndarray, targets: np.ndarray, k: int) -> np.ndarray:
        k = min(k, self.vocab_size)
        numbers = np.stack(self._numbers(stream, targets))
        longest = (numbers >= 0).sum(0) - 1
        best = np.empty((len(targets), k), np.int64)
        for length in range(self.order):
            chosen = longest == length
            found, inverse = np.unique(numbers[length, chosen], return_inverse=True)
            best[chosen] = self._best(length, found, k)[0][inverse]
        return best

    def _best(self, length: int, numbers: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the k likeliest tokens of each history by number (H,), and their probabilities, each (H, k).

        A token not seen after a history keeps its rank among those not seen. So only the tokens seen there,
        and the k best of the shorter history, can be among the k best.
        """
        if length == 0:
            order = np.lexsort((np.arange(self.vocab_size), -self._unigram))[:k]
            return np.tile(order, (len(numbers), 1)), np.tile(self._unigram[order], (len(numbers), 1))
        level = self._levels[length]
        shorter, inverse = np.unique(level.histories[numbers] // self._radix, return_inverse=True)
        tokens, p = self._best(length - 1, shorter, k)
        tokens, p = tokens[inverse], p[inverse] * level.backoff[numbers, None]
        unseen = _find(level.keys, numbers[:, None] * self._radix + tokens) < 0

        count = level.first[numbers + 1] - level.first[numbers]
        row = np.repeat(np.arange(len(numbers)), count)
        seen = np.arange(count.sum()) + np.repeat(level.first[numbers] - (np.cumsum(count) - count), count)
        row = np.concatenate((row, np.nonzero(unseen)[0]))
        tokens = np.concatenate((level.keys[seen] % self._radix, tokens[unseen]))
        p = np.concatenate((level.p[seen], p[unseen]))
        order = np.lexsort((tokens, -p, row))
        # Every row has at least k candidates: the k of the shorter history, seen after this one or not.
        start = np.searchsorted(row[order], np.arange(len(numbers)))
        kept = order[start[:, None] + np.arange(k)]
        return tokens[kept], p[kept]

    def complete(self, contexts: Sequence[np.ndarray], n_tokens: int) -> np.ndarray:
        """Continue each context by its likeliest token, n_tokens times: (len(contexts), n_tokens)."""
        width = max(self.order - 1, 1)
        rows = np.full((len(contexts), width + n_tokens), self.vocab_size, np.int64)
        for row, context in zip(rows, contexts, strict=True):
            tail = context[-width:]
            row[width - len(tail) : width] = tail
        stream = rows.reshape(-1)
        for step in range(n_tokens):
            places = np.arange(len(contexts)) * rows.shape[1] + width + step
            stream[places] = self._top(stream, places, 1)[:, 0]
        return rows[:, width:]
