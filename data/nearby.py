"""Retrieval without a model: find the texts that share rare words with a text (BM25; Robertson 1994)."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

K1, B = 1.2, 0.75  # the usual saturation of repeated words, and the weight of a text's length

Key = TypeVar("Key", bound=Hashable)


def words_of(code: str) -> list[str]:
    """Return the parts of a code's names, in lower case."""
    return [part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", code) if len(part) > 2]


class Nearby(Generic[Key]):
    """Texts by their keys, which may be put in, replaced and taken out, and are found by their words."""

    def __init__(self) -> None:
        self._counts: dict[Key, Counter[str]] = {}
        self._holders: dict[str, dict[Key, int]] = defaultdict(dict)  # word -> by text how often it has it
        self._words = 0

    def __len__(self) -> int:
        return len(self._counts)

    def put(self, key: Key, text: str) -> None:
        self.drop(key)
        self._counts[key] = count = Counter(words_of(text))
        self._words += count.total()
        for word, times in count.items():
            self._holders[word][key] = times

    def drop(self, key: Key) -> None:
        """Take a text out; nothing happens where there is none of that key."""
        for word in (count := self._counts.pop(key, Counter())):
            del self._holders[word][key]
        self._words -= count.total()

    def scores(self, query: str, most_words: int = 0) -> dict[Key, float]:
        """Return the score of each text that shares a word with the query.

        Args:
            most_words: The number of the query's rarest words that are looked for; 0 takes all.
        """
        n, mean = len(self), self._words / max(1, len(self)) or 1.0
        holders = {word: self._holders[word] for word in sorted({*words_of(query)} & self._holders.keys())}
        words = [word for word in holders if holders[word]]
        if most_words:
            words = sorted(sorted(words, key=lambda word: len(holders[word]))[:most_words])
        found: dict[Key, float] = {}
        for word in words:
            df = len(holders[word])
            weight = math.log(1 + (n - df + 0.5) / (df + 0.5)) * (K1 + 1)
            for key, times in holders[word].items():
                bound = K1 * (1 - B + B * self._counts[key].total() / mean)
                found[key] = found.get(key, 0.0) + weight * times / (times + bound)
        return found


def nearest_of(queries: Sequence[str], texts: Sequence[str], n: int) -> list[list[int]]:
    """Return for each query the indices of the `n` texts with the best scores; among equals the first."""
    nearby = Nearby[int]()
    for i, text in enumerate(texts):
        nearby.put(i, text)
    scores = [nearby.scores(query) for query in queries]
    return [sorted(range(len(texts)), key=lambda i: (-of.get(i, 0.0), i))[:n] for of in scores]
