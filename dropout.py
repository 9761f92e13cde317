"""Dropout by random bits: its numbers come from a seed, so that backward may draw them again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def steps(p: float) -> int:
    """The share p in steps of 1 / 65,536, the nearest below 1."""
    return min(round(p * 2**16), 2**16 - 1)


def kept(seed: int, part: int, shape: torch.Size, dropped: int, dtype: torch.dtype) -> Tensor:
    """0 with probability dropped / 65,536, else 1: the same for the same arguments.

    Four elements share a random number of 64 bits: torch draws one for each, on one thread.
    """
    n = shape.numel()
    bits = torch.from_numpy(np.random.SFC64([seed, part]).random_raw(-(-n // 4)).view(np.int16))
    # As numbers, not booleans, which take 3 times as long; every step is exact in fp32.
    keep = bits[:n].view(shape).to(torch.float32).add_(2**15 + 1 - dropped).clamp_(0, 1)
    return keep.to(dtype)


class _DropoutByBits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int, thin: bool) -> Tensor:
        # Seeded by torch's generator, so that its state is all there is to save.
        ctx.drawn = int(torch.randint(2**62, ())), x.shape, dropped, x.dtype
        factor = dropout_factor(*ctx.drawn)
        if not thin:
            ctx.save_for_backward(factor)  # not as an attribute, which a block that is made again would keep
        return x * factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors or (dropout_factor(*ctx.drawn),)
        return grads[0] * factor, None, None


def dropout_factor(seed: int, shape: torch.Size, dropped: int, dtype: torch.dtype) -> Tensor:
    return kept(seed, 0, shape, dropped, dtype).mul_(2**16 / (2**16 - dropped))


class Dropout(nn.Module):
    """Zero each element with probability p in training and scale the rest by 1 / (1 - p).

    On a CPU p is taken to the nearest 1 / 65,536, and four elements share a random number of 64 bits: torch
    draws a number for each element, on one thread, which takes 3 times as long and was 17% of a step.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.thin = False  # draw the numbers again in backward instead of keeping them

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        return _DropoutByBits.apply(x, steps(self.p), self.thin)
