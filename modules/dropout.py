"""Dropout by random bits, whose numbers come from a seed, so that backward may draw them again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def steps(p: float) -> int:
    """Return the probability p in steps of 1 / 65,536, the nearest below 1."""
    return min(round(p * 2**16), 2**16 - 1)


def kept(seed: int, part: int, shape: torch.Size, dropped: int, dtype: torch.dtype) -> Tensor:
    """Return 0 with probability dropped / 65,536, else 1, for each element; the same for the same arguments.

    An element is judged by 8 random bits, and eight of them share a number of 64: torch draws one for each,
    on one thread. The finer half of the probability is left to chance a column at a time: its limit is one
    higher in as many of 256 cases. So the columns of a call differ more than by chance where p is small: at
    0.1 their shares spread 1.1 times as far, at 0.001 3.6 times.
    """
    generator = np.random.SFC64([seed, part])
    columns = shape[-1] if shape else 1
    rarer = min(dropped, 2**16 - dropped)  # No limit may be above what 8 bits hold.
    whole, rest = divmod(rarer, 2**8)
    limits = (_random_bytes(generator, columns) < rest).view(np.uint8) + np.uint8(whole)
    found = np.greater_equal if rarer == dropped else np.less
    keep = found(_random_bytes(generator, shape.numel()).reshape(shape), limits)
    return torch.from_numpy(keep.view(np.int8)).view(shape).to(dtype)


def _random_bytes(generator: np.random.SFC64, n: int) -> np.ndarray:
    # torch.compile leaves frombuffer to Python; a view of the array it would trace, and cannot widen one.
    return np.frombuffer(generator.random_raw(-(-n // 8)).data, np.uint8)[:n]


class _DropoutByBits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int, recompute: bool) -> Tensor:
        # Seeded by torch's generator, so that its state is all there is to save.
        ctx.arguments = int(torch.randint(2**62, ())), x.shape, dropped, x.dtype
        factor = dropout_factor(*ctx.arguments)
        if not recompute:
            # As an attribute, a block that is recomputed would keep it.
            ctx.save_for_backward(factor)
        return x * factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors or (dropout_factor(*ctx.arguments),)
        return grads[0] * factor, None, None


def dropout_factor(seed: int, shape: torch.Size, dropped: int, dtype: torch.dtype) -> Tensor:
    """Return what dropout multiplies each element by: 0, or 1 / (1 - p)."""
    return kept(seed, 0, shape, dropped, dtype).mul_(2**16 / (2**16 - dropped))


class Dropout(nn.Module):
    """Zero each element with probability p in training and scale the rest by 1 / (1 - p).

    On a CPU p is taken to the nearest 1 / 65,536, and the random bits are those of `kept`.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.recompute = False  # backward draws the random numbers again instead of keeping them

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        return _DropoutByBits.apply(x, steps(self.p), self.recompute)
