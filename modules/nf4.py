"""4-bit NormalFloat with double quantisation (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

    stored = quantize_nf4(weight)                  a tensor in 4.127 bits a value
    weight = dequantize_nf4(stored, shape)         its values again; nf4_decoder gives some rows at a time

It follows bitsandbytes bit for bit, so that a base quantised here is the base that was quantised there. The
one exception is decoding to bf16 below 2**-126, the smallest normal number: ours rounds such a value to the
nearest, bitsandbytes takes it for 0 where the CPU has AVX512-BF16 and a row a multiple of 16 values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

BLOCK = 64  # weights that share one absmax
NESTED_BLOCK = 256  # absmax values that share one absmax of their own

# Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero (arXiv:2305.14314, appendix E).
NF4_CODE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)

# Weights decoded at a time. With 512 tokens a CPU's time changes by less than 10% from 2**20 to 2**24, so
# memory decides. A GPU wants large products.
DECODE_ELEMENTS = {"cpu": 2**21, "cuda": 2**24}
QUANTIZE_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Tables get this dtype and device whatever the defaults are: loaders of models change both.
PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


class NF4(NamedTuple):
    """A tensor of n values in 4-bit NormalFloat, in row-major order."""

    packed: Tensor  # (ceil(n / 2)) uint8, the first of two values in the high four bits
    absmax: Tensor  # (ceil(n / 64)) uint8, codes of absmax - offset on the dynamic map
    nested_absmax: Tensor  # (ceil(n / 64 / 256)) fp32, the scale of each 256 of them
    offset: Tensor  # () fp32, the mean absmax


def dynamic_map() -> Tensor:
    """Return the 256 values of the 8-bit dynamic format, ascending (Dettmers 2015, arXiv:1511.04561).

    Seven decades of both signs, the uppermost of 64 values and each below of half as many, and 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, **PLAIN)
        magnitudes = (10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += magnitudes + [-m for m in magnitudes]
    return torch.tensor(sorted(values), **PLAIN)


def nf4_code() -> Tensor:
    """Return the 16 values of NF4_CODE, (16) fp32."""
    return torch.tensor(NF4_CODE, **PLAIN)


class _Tables(NamedTuple):
    pairs: Tensor  # (256) float64, whose bytes are the two fp32 values of a packed byte
    codes_below: Tensor  # (CELLS + 2) uint8, the code at the lower edge of each cell of [-1, 1]
    bound: Tensor  # (CELLS + 2) fp32, the bound between two codes inside the cell, or infinity
    dynamic: Tensor  # (256) fp32
    dynamic_codes: Tensor  # (65,536) uint8, the nearest code of each point of an even grid over [-1, 1]


CELLS = 128  # [-1, 1] is cut into so many, narrow enough that none holds two bounds


def _cells(x: Tensor, out: Tensor) -> Tensor:
    """Return the cell of each value of [-1, 1]; any monotonic function will do, if bounds get it too."""
    return torch.add(x.new_tensor(CELLS / 2), x, alpha=CELLS / 2, out=out)


_TABLES: dict[torch.device, _Tables] = {}  # functools.cache will not do: torch.compile sees through it


def _tables(device: torch.device) -> _Tables:
    if device not in _TABLES:
        _TABLES[device] = _make_tables(device)
    return _TABLES[device]


def _make_tables(device: torch.device) -> _Tables:
    code = nf4_code()
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1).view(torch.float64).squeeze(1)
    bounds = ((code[:-1] + code[1:]) / 2).to(device)
    cell = _cells(bounds, torch.empty_like(bounds)).int()
    cells = torch.arange(CELLS + 2, dtype=torch.int32, device=device)
    bound = bounds.new_full((CELLS + 2,), math.inf).scatter_(0, cell.long(), bounds)
    dynamic = dynamic_map()
    grid = -1 + 2 * torch.arange(65_536, **PLAIN) / 65_535
    dynamic_codes = torch.searchsorted((dynamic[:-1] + dynamic[1:]) / 2, grid).to(torch.uint8)
    return _Tables(
        pairs.to(device),
        (cells[:, None] > cell).sum(1).to(torch.uint8),
        bound,
        dynamic.to(device),
        dynamic_codes.to(device),
    )


def quantize_nf4(weight: Tensor) -> NF4:
    """Quantise fp32, bf16 or fp16 `weight`, of any shape, to 4-bit NormalFloat.

    Beside the result it takes some 20 bytes for each of QUANTIZE_ELEMENTS values; a `weight` that is not
    contiguous is copied.

    Raises:
        ValueError: Another dtype, no values, NaN or infinity among them, or values whose mean overflows.
    """
    flat = checked_weight(weight).reshape(-1)
    n, device = flat.numel(), flat.device
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(n // -BLOCK), dtype=torch.float32, device=device)
    chunk = min(QUANTIZE_ELEMENTS[device.type], -(n // -BLOCK) * BLOCK)
    scaled = absmax.new_empty(chunk)
    floats, cells = torch.empty_like(scaled), torch.empty(chunk, dtype=torch.int32, device=device)
    codes, above = (torch.empty(chunk, dtype=dtype, device=device) for dtype in (torch.uint8, torch.bool))
    tables = _tables(device)
    for start in range(0, n, chunk):
        x = flat[start : start + chunk]
        end, m = start + x.numel(), x.numel()
        values = scaled[:m].copy_(x)
        _scale_down(values, absmax[start // BLOCK : -(end // -BLOCK)])
        if m % 2:  # the last byte's low half is the code of zero
            m += 1
            scaled[m - 1] = 0
        values, f, cell, code, over = (t[:m] for t in (scaled, floats, cells, codes, above))
        # The code is the number of bounds below a value: those below its cell, and perhaps the one inside.
        cell.copy_(_cells(values, f))
        torch.index_select(tables.codes_below, 0, cell, out=code)
        torch.index_select(tables.bound, 0, cell, out=f)
        code += torch.gt(values, f, out=over).view(torch.uint8)
        two = code.view(torch.int16)  # the first code in the low byte
        packed[start // 2 : (end + 1) // 2] = (two << 4).bitwise_or_(two >> 8)
    offset = absmax.mean()
    if not torch.isfinite(offset):
        raise ValueError(
            "the weight's values are so large that the mean of their blocks overflows fp32; scale it"
        )
    return NF4(packed, *_quantize_dynamic(absmax.sub_(offset)), offset)


def _scale_down(values: Tensor, absmax: Tensor) -> None:
    """Divide each block of `values` (m) by its largest magnitude, kept in `absmax` (ceil(m / 64))."""
    full = values.numel() // BLOCK
    if full:
        blocks = values[: full * BLOCK].view(full, BLOCK)
        torch.maximum(blocks.amax(1), blocks.amin(1).neg_(), out=absmax[:full]).abs_()
        # The bound on absmax, the reciprocal here and the quotient below round as bitsandbytes rounds.
        blocks *= (1.0 / absmax[:full].clamp(min=1e-38)).unsqueeze(1)
    if values.numel() % BLOCK:
        rest = values[full * BLOCK :]
        absmax[full] = rest.abs().max().clamp(min=1e-38)
        rest /= absmax[full]


def _quantize_dynamic(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (n) uint8 on the dynamic map and scales (ceil(n / 256)) fp32 of fp32 `x` (n).

    On a CPU, bitsandbytes 0.50 rounds a value to an even grid of 65,536 points and takes the code nearest to
    that point: one code in 700 is a neighbour of the nearest. A block of zeros is all code 0.
    """
    n, chunk = x.numel(), QUANTIZE_ELEMENTS[x.device.type] // NESTED_BLOCK * NESTED_BLOCK
    codes = torch.empty(n, dtype=torch.uint8, device=x.device)
    absmax = x.new_empty(-(n // -NESTED_BLOCK))
    for start in range(0, n, chunk):
        some = x[start : start + chunk]
        end = start + some.numel()
        scaled = nn.functional.pad(some, (0, -some.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
        largest = absmax[start // NESTED_BLOCK : -(end // -NESTED_BLOCK)].copy_(scaled.abs().amax(1))
        scaled = scaled * (1.0 / largest).unsqueeze(1)
        # Below 2**-128 the reciprocal is infinite, and its product with 0 is NaN.
        scaled.nan_to_num_(nan=-1.0, posinf=1.0, neginf=-1.0).clamp_(-1, 1)
        point = scaled.add_(1).mul_(0.5).mul_(65_535).add_(0.5).int().view(-1)
        code = _tables(x.device).dynamic_codes.index_select(0, point).view_as(scaled)
        codes[start:end] = code.masked_fill_(largest.eq(0).unsqueeze(1), 0).view(-1)[: end - start]
    return codes, absmax


def nf4_absmax(stored: NF4) -> Tensor:
    """Return the largest magnitude of each block as decoding sees it, (ceil(n / 64)) fp32."""
    values = _tables(stored.absmax.device).dynamic.index_select(0, stored.absmax.int())
    return _scale_up(values, stored.nested_absmax, NESTED_BLOCK).add_(stored.offset)


def _scale_up(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """Multiply each block of `values` (n) by its scale, in place; the last block may be short."""
    full = values.numel() // block
    values[: full * block].view(full, block).mul_(scales[:full].unsqueeze(1))
    if values.numel() % block:
        values[full * block :].mul_(scales[full])
    return values


def dequantize_nf4(stored: NF4, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values of `stored` as a tensor of `shape`: products in fp32, rounded once to `dtype`."""
    weight = torch.empty(tuple(shape), dtype=dtype, device=stored.packed.device)
    n = weight.numel()
    if (n + 1) // 2 != stored.packed.numel():
        raise ValueError(f"{stored.packed.numel():,} bytes of NF4 do not hold a tensor of shape {(*shape,)}")
    rows = min(n, DECODE_ELEMENTS[weight.device.type])
    decode = nf4_decoder(stored, rows, 1, dtype)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        weight.view(-1, 1)[start:stop] = decode(start, stop)
    return weight


DecodeRows = Callable[[int, int], Tensor]  # (start, stop) -> these rows; the next call may overwrite them


def nf4_decoder(stored: NF4, rows: int, columns: int, dtype: torch.dtype) -> DecodeRows:
    """Return a function that decodes rows [start, stop) of a matrix, at most `rows` of them.

    start x columns has to be a multiple of 64, so that the rows begin with a block.

    One lookup a byte gives both of its values; two lookups a byte take twice as long.
    """
    device, n = stored.packed.device, rows * columns
    packed, pairs, scales = stored.packed.view(-1), _tables(device).pairs, nf4_absmax(stored)
    index = torch.empty((n + 1) // 2, dtype=torch.int32, device=device)
    values = torch.empty_like(index, dtype=torch.float64)
    rounded = None if dtype == torch.float32 else torch.empty(n, dtype=dtype, device=device)

    def decode(start: int, stop: int) -> Tensor:
        first, last = start * columns, stop * columns
        some = packed[first // 2 : (last + 1) // 2]
        size = some.numel()
        torch.index_select(pairs, 0, index[:size].copy_(some), out=values[:size])
        weight = values.view(torch.float32)[: last - first]
        _scale_up(weight, scales[first // BLOCK :], BLOCK)
        if rounded is not None:
            weight = rounded[: last - first].copy_(weight)
        return weight.view(-1, columns)

    return decode


def checked_weight(weight: Tensor) -> Tensor:
    """Return the weight without its graph; ValueError for one that cannot be quantised."""
    if weight.dtype not in FLOATS:
        raise ValueError(f"a weight of {weight.dtype} cannot be quantised; convert it to torch.float32 first")
    if weight.is_meta:
        raise ValueError("a weight on the meta device holds no values to quantise; load it first")
    if weight.numel() == 0:
        raise ValueError(f"a weight of shape {(*weight.shape,)} holds no values to quantise")
    weight = weight.detach()
    if not torch.isfinite(torch.stack(weight.aminmax())).all():
        bad = weight.numel() - int(weight.isfinite().sum())
        raise ValueError(
            f"{bad:,} of the weight's {weight.numel():,} values are NaN or infinite; mend it first"
        )
    return weight
