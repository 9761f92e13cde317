"""Stored weights decoded: 4-bit NormalFloat with double quantisation, and the published files' own numbers.

    packed  two codes a byte, the first in the upper half
    value = NF4[code] * absmax of its block of 64
    absmax = DYNAMIC[code of the absmax] * absmax of its block of 256 absmaxes + offset

That is QLoRA's format (arXiv:2305.14314), as bitsandbytes stores it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 64  # Values that share one absmax.
NESTED_BLOCK = 256  # Absmaxes that share one of their own.


def nf4_values() -> Tensor:
    """Return the 16 values of NF4, (16) (arXiv:2305.14314, appendix E).

    They are quantiles of the normal distribution, scaled to [-1, 1]: eight of its upper half, seven of its
    lower half, and 0. The outermost quantile leaves out half a step at the end of each half.
    """
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    upper = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1])
    lower = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((lower, torch.zeros(1, dtype=torch.float64), upper)).sort().values
    return values / values.max()


def dynamic_values() -> Tensor:
    """Return the 256 values of the 8-bit dynamic format, (256), ascending (arXiv:1511.04561).

    Decade e, up to 10^-e, has 2^(6 - e) values of each sign, in the middles of equal steps; 0 and 1 are
    added.
    """
    decades = []
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (6 - decade) + 1, dtype=torch.float64)
        decades.append((bounds[1:] + bounds[:-1]) / 2 / 10**decade)
    positive = torch.cat(decades)
    return torch.cat((-positive, positive, torch.tensor([0.0, 1.0], dtype=torch.float64))).sort().values


def nf4_decoded(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor, shape: tuple[int, ...]
) -> Tensor:
    """Return the values of a stored tensor in fp64, in row-major order.

    Args:
        packed: uint8, two codes each.
        absmax: (n / 64) uint8, codes of the blocks' absmaxes.
        nested_absmax: (n / 64 / 256).
        offset: (), added to every absmax.
    """
    n = math.prod(shape)
    packed = packed.flatten()
    codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[:n]
    scale = absmaxes(absmax, nested_absmax, offset)
    values = nf4_values().to(packed.device)[codes.long()]
    return (values * scale.repeat_interleave(BLOCK)[:n]).view(shape)


def absmaxes(absmax: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """Return the decoded absmax of each block of 64, (n / 64)."""
    nested = nested_absmax.double().repeat_interleave(NESTED_BLOCK)[: len(absmax)]
    return dynamic_values().to(absmax.device)[absmax.long()] * nested + offset.double()


def nf4_rounding(weight: Tensor, nested_absmax: Tensor) -> Tensor:
    """Return how far each value of a weight may be from what NF4 stores of it, in the weight's shape.

    Half the widest gap between two of the 16 values, times the block's largest magnitude; and the error of
    that magnitude itself: one step of its 8 bits, since codes are rounded on a grid and may be off by one.
    """
    flat = weight.double().abs().flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    half_gap = float(nf4_values().diff().max()) / 2
    nested = nested_absmax.double().repeat_interleave(NESTED_BLOCK)[: len(padded)]
    step = float(dynamic_values().diff().max()) * nested
    bound = half_gap * padded.amax(dim=1) + step
    return bound.repeat_interleave(BLOCK)[: len(flat)].view(weight.shape)
