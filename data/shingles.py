"""Texts as rows of hashed units, with their runs, MinHash signatures and bands.

A unit is a word or a punctuation mark, without white space, so that a function moved into a class is the same
function. MinHash is Broder 1997; bands of a signature as in Lee et al. 2022 (arXiv:2107.06499).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]  # it has no stubs

UNIT = re.compile(r"\w+|[^\w\s]")
BATCH_UNITS = 2**19
WORDS = 2**20  # words whose hashes are kept at a time


class Units(NamedTuple):
    """A document as a row of units, words or tokens, each of them a 64-bit hash."""

    name: str
    group: str  # "" for none
    ids: np.ndarray  # (n,) uint64, prompt and text
    start: int  # the first scored unit


class Words(dict[str, int]):
    """A 64-bit hash for each word; Python's own would change from process to process."""

    def __missing__(self, word: str) -> int:
        if len(self) >= WORDS:  # A corpus has more words than fit in memory.
            self.clear()
        self[word] = value = int.from_bytes(
            hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
        )
        return value

    def ids(self, text: str) -> np.ndarray:
        words = UNIT.findall(text)
        return np.fromiter(map(self.__getitem__, words), np.uint64, len(words))


def mixed(values: np.ndarray) -> np.ndarray:
    """Scramble 64-bit numbers one to one, by the finaliser of SplitMix64 (Steele et al. 2014)."""
    values = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Batch:
    """Documents laid end to end. `of` is the document of each unit."""

    def __init__(self, documents: list[Units]):
        self.documents = documents
        self.ids = np.concatenate([d.ids for d in documents]) if documents else np.empty(0, np.uint64)
        self.lengths = np.array([len(d.ids) for d in documents], np.int64)
        self.ends = np.cumsum(self.lengths)
        self.starts = self.ends - self.lengths
        self.scored_from = self.starts + np.array([d.start for d in documents], np.int64)
        self.of = np.repeat(np.arange(len(documents)), self.lengths)
        sums = np.cumsum(self.ids * powers(len(self.ids))[0], dtype=np.uint64)
        self._sums = np.concatenate((np.zeros(1, np.uint64), sums))

    def windows(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (places, hashes) of all runs of `length` units inside one document.

        The hash is the sum of unit times B**place modulo 2**64, from sums over the whole batch.
        """
        places = np.arange(len(self.ids) - length + 1)
        if not len(places):
            return places[:0], self.ids[:0]
        hashes = (self._sums[length:] - self._sums[:-length]) * powers(len(self.ids))[1][: len(places)]
        inside = self.of[: len(places)] == self.of[length - 1 :]
        return places[inside], hashes[inside]

    def signatures(self, shingle: int, least: int, permutations: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (documents, MinHash signatures (n, permutations)) of texts with `least` scored units."""
        places, hashes = self.windows(shingle)
        scored = places >= self.scored_from[self.of[places]]
        rows = np.bincount(self.of[places[scored]], minlength=len(self.documents))
        long = self.ends - self.scored_from >= least
        keep = long[self.of[places[scored]]]
        offsets = np.concatenate(([0], np.cumsum(rows[long]))).astype(np.uint64)
        flat = np.ascontiguousarray(mixed(hashes[scored][keep]))
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, permutations, 1)
        return np.flatnonzero(long), np.array(matrix.to_rows(), np.uint32).reshape(-1, permutations)


@lru_cache(maxsize=4)
def powers(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return B**0, B**1, ... modulo 2**64, and their inverses."""
    base = 0x9E3779B97F4A7C15
    both = []
    for factor in (base, pow(base, -1, 2**64)):
        powers = np.full(length, factor, np.uint64)
        powers[:1] = 1
        both.append(np.cumprod(powers, dtype=np.uint64))
    return both[0], both[1]


def batches(documents: Iterable[Units]) -> Iterator[Batch]:
    """Yield documents in batches of at least BATCH_UNITS units; the last one may be smaller."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.ids)
        if size >= BATCH_UNITS:
            yield Batch(batch)
            batch, size = [], 0
    if batch:
        yield Batch(batch)


def bands(signatures: np.ndarray, n_bands: int) -> np.ndarray:
    """Return (n, n_bands) uint64, equal where two signatures agree in a whole band."""
    rows = signatures.shape[1] // n_bands
    cut = signatures[:, : n_bands * rows].reshape(len(signatures), n_bands, rows).astype(np.uint64)
    factors = mixed(np.arange(rows, dtype=np.uint64)) | np.uint64(1)
    return mixed((cut * factors).sum(2, dtype=np.uint64) + mixed(np.arange(n_bands, dtype=np.uint64)))
