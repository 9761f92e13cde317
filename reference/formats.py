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


# --- GGUF -------------------------------------------------------------------------------------------

GGUF_BLOCK = 32  # Values that share one scale.
FP16_STEP, FP16_SMALLEST = 2.0**-11, 2.0**-25  # Relative error of rounding to 16 bits, and the absolute one.


def q8_0_decoded(blocks: Tensor) -> Tensor:
    """Return the values of blocks of GGUF's Q8_0 in fp64, (n, 32).

    Args:
        blocks: uint8, (n, 34): a scale in fp16, then 32 codes, the value of each being code * scale.
    """
    scale = blocks[:, :2].contiguous().view(torch.float16).double()
    return blocks[:, 2:].contiguous().view(torch.int8).double() * scale


def q4_0_decoded(blocks: Tensor) -> Tensor:
    """Return the values of blocks of GGUF's Q4_0 in fp64, (n, 32).

    Args:
        blocks: uint8, (n, 18): a scale in fp16, then 16 bytes. The lower halves are the codes of the first 16
            values, the upper ones those of the rest; a value is (code - 8) * scale.
    """
    scale, codes = blocks[:, :2].contiguous().view(torch.float16).double(), blocks[:, 2:]
    return (torch.cat((codes & 15, codes >> 4), dim=1).double() - 8) * scale


def gguf_rounding(values: Tensor, kind: str) -> Tensor:
    """Return by how much each number may change when it is stored in a type of GGUF; of the same shape.

    The scale of a block of Q8_0 is its largest magnitude / 127, that of Q4_0 its number of largest magnitude
    / -8, and each is rounded to fp16. A number is rounded to the nearest step. In Q4_0 the side away from the
    largest number has seven steps, so that a number beyond them is off by more.
    """
    if kind == "F32":
        return torch.zeros_like(values)
    if kind == "F16":
        return (values.abs() * FP16_STEP).clamp(min=FP16_SMALLEST)
    blocks = values.unflatten(-1, (-1, GGUF_BLOCK))
    where = blocks.abs().argmax(dim=-1, keepdim=True)
    most = 127 if kind == "Q8_0" else 8
    scale = blocks.gather(-1, where) / (127 if kind == "Q8_0" else -8)
    of_scale = (scale.abs() * FP16_STEP).clamp(min=FP16_SMALLEST)
    steps = torch.full_like(blocks, 0.5)
    if kind == "Q4_0":
        steps = torch.where(scale == 0, 0.5, blocks / torch.where(scale == 0, 1.0, scale) - 7).clamp(min=0.5)
    return (steps * scale.abs() + most * of_scale).flatten(-2)
