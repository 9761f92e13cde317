"""Word frequencies of a corpus in bounded memory: how many words occur once, twice, more than ten times.

    counted = Frequencies()
    counted.add(text)
    counted.merge(other)
    counted.curve()   # {"1": 51200, "2": 9100, ...}: how many different words occur so often

Up to WORDS different words, the counts are exact. Beyond, only words whose hash ends in enough zero bits are
counted, the same ones in every shard, and stand for the rest (distinct sampling, Gibbons 2001).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from data.shingles import Words, mixed

WORDS = 2**18
UP_TO = {"1": 1, "2": 2, "3 to 10": 10, "11 to 100": 100, "101 to 1,000": 1000}
MORE = "more than 1,000"


class Frequencies:
    """Counts of the words, by hash, whose hash ends in `zeros` zero bits."""

    def __init__(self) -> None:
        self.total = 0
        self._zeros = 0
        self._counts: Counter[int] = Counter()
        self._words = Words()

    def add(self, text: str) -> None:
        ids, counts = np.unique(mixed(self._words.ids(text)), return_counts=True)
        self.total += int(counts.sum())
        here = ids & np.uint64(2**self._zeros - 1) == 0
        self._counts.update(dict(zip(ids[here].tolist(), counts[here].tolist(), strict=True)))
        if len(self._counts) > WORDS:
            self._thin(self._zeros + 1)

    def merge(self, other: Frequencies) -> None:
        self.total += other.total
        self._counts.update(other._counts)
        self._thin(max(self._zeros, other._zeros))

    def _thin(self, zeros: int) -> None:
        """Drop words whose hash ends in fewer zero bits; raise the number until at most WORDS are left."""
        while True:
            self._zeros, mask = zeros, 2**zeros - 1
            self._counts = Counter({word: n for word, n in self._counts.items() if not word & mask})
            if len(self._counts) <= WORDS:
                return
            zeros += 1

    def curve(self) -> dict[str, int]:
        """Return the number of different words by how often they occur."""
        counts = np.fromiter(self._counts.values(), np.int64, len(self._counts))
        least = 0
        curve = {}
        for name, most in UP_TO.items():
            curve[name] = int(((counts > least) & (counts <= most)).sum()) << self._zeros
            least = most
        return curve | {MORE: int((counts > least).sum()) << self._zeros}

    def to_dict(self) -> dict[str, Any]:
        return {"total": self.total, "zeros": self._zeros, "counts": dict(sorted(self._counts.items()))}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Frequencies:
        counted = cls()
        counted.total, counted._zeros = values["total"], values["zeros"]
        counted._counts = Counter({int(word): n for word, n in values["counts"].items()})
        return counted
