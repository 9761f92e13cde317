"""Retrieval without a model: find the texts that share rare words with a text (BM25; Robertson 1994)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

K1, B = 1.2, 0.75  # the usual saturation of repeated words, and the weight of a text's length


def words_of(code: str) -> list[str]:
    """Return the parts of a code's names, in lower case."""
    return [part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", code) if len(part) > 2]


def nearest_of(queries: Sequence[str], texts: Sequence[str], n: int) -> list[list[int]]:
    """Return for each query the indices of the `n` texts with the best scores; among equals the first."""
    counts = [Counter(words_of(text)) for text in texts]
    lengths = [sum(count.values()) for count in counts]
    mean = sum(lengths) / max(1, len(lengths)) or 1.0
    documents = Counter(word for count in counts for word in count)
    weight = {word: math.log(1 + (len(texts) - df + 0.5) / (df + 0.5)) for word, df in documents.items()}
    found = []
    for query in queries:
        scores = [0.0] * len(texts)
        for word in sorted(set(words_of(query)) & weight.keys()):
            for i, count in enumerate(counts):
                if times := count[word]:
                    scores[i] += (
                        weight[word] * times * (K1 + 1) / (times + K1 * (1 - B + B * lengths[i] / mean))
                    )
        found.append(sorted(range(len(texts)), key=lambda i: (-scores[i], i))[:n])
    return found
