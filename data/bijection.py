"""A shuffled order of n numbers that is computed a number at a time, and never held in memory.

    order = Bijection(n, keys)     # keys: KEYS random words
    order[np.array([0, 1, 2])]     # the first three numbers of the order

Four rounds of a Feistel network permute the numbers below the least power of 4 that is not below n (Luby and
Rackoff 1988, "How to construct pseudorandom permutations from pseudorandom functions"). A result that is not
below n is permuted again until one is, which leaves a bijection of the numbers below n ("cycle walking";
Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Whoever knows n and the keys knows the place
of each number: processes that share the numbers need to tell each other nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KEYS = 4  # One for each round.


@dataclass(frozen=True)
class Bijection:
    """A pseudorandom order of the numbers 0 to n - 1.

    Args:
        n: How many there are, at most 2**62.
        keys: (KEYS,) uint64.
    """

    n: int
    keys: np.ndarray

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """Return the numbers at places of the order, each below n; int64 of the shape of `places`."""
        found = self._permuted(places.astype(np.uint64))
        while (outside := found >= self.n).any():
            found[outside] = self._permuted(found[outside])
        return found.astype(np.int64)

    def _permuted(self, numbers: np.ndarray) -> np.ndarray:
        """Permute numbers of 2 * half bits."""
        half = np.uint64(max(1, ((self.n - 1).bit_length() + 1) // 2))
        low = (np.uint64(1) << half) - np.uint64(1)
        left, right = numbers >> half, numbers & low
        for key in self.keys:
            left, right = right, left ^ (mixed(right + key) & low)
        return left << half | right


def mixed(words: np.ndarray) -> np.ndarray:
    """Mix the bits of 64-bit words: the last step of SplitMix64 (Steele, Lea and Flood 2014)."""
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)
