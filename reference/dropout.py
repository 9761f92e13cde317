"""Dropout (Srivastava et al. 2014): some numbers become zero, and the others grow so that the mean stays.

In training each element is dropped with probability p, and what is kept is multiplied by 1 / (1 - p). Which
elements these are follows on a CPU from a seed alone, so that the backward pass can draw them again.
"""

from __future__ import annotations

import numpy as np

STEPS = 2**16  # p is taken in steps of 1 / 65,536.
UNLIKELY = 28.0  # -ln of the probability that a healthy sample is out of bounds.


def share(p: float) -> float:
    """Return p in whole steps, below 1."""
    return min(round(p * STEPS), STEPS - 1) / STEPS


def mask(seed: int, part: int, shape: tuple[int, int], p: float) -> np.ndarray:
    """Return which elements (rows, columns) are kept: True, or False where one is dropped.

    SFC64 of (seed, part) gives random bytes, first one for each column, then one for each element. The rarer
    of the two events, dropped or kept, has the probability r / 65,536. It happens to an element whose byte is
    below floor(r / 256), or one more in the columns whose own byte is below the rest r mod 256.
    """
    draw = np.random.SFC64([seed, part])
    dropped = round(share(p) * STEPS)
    whole, rest = divmod(min(dropped, STEPS - dropped), 256)
    limits = whole + (_bytes(draw, shape[1]) < rest)
    happens = _bytes(draw, shape[0] * shape[1]).reshape(shape) < limits
    return ~happens if dropped <= STEPS - dropped else happens


def _bytes(draw: np.random.SFC64, n: int) -> np.ndarray:
    """Return n random bytes: eight of each number of 64 bits, the lowest first."""
    numbers = draw.random_raw(-(-n // 8)).astype(np.uint64)
    shifts = np.arange(0, 64, 8, dtype=np.uint64)
    return ((numbers[:, None] >> shifts) & np.uint64(255)).flatten()[:n].astype(np.int64)


def most_off(n: int, p: float, columns: int) -> float:
    """Return how far the number of events among n may be from n p: Bernstein's inequality.

    The finer half of the probability is left to chance a column at a time: by 1 / 256 all of its elements
    are dropped more often, or not.
    """
    of_column = n / max(1, columns) / 256
    variance = n * p * (1 - p) + columns * of_column**2 / 4
    return (2 * UNLIKELY * variance) ** 0.5 + 2 / 3 * UNLIKELY * max(1.0, of_column)
