"""Frozen linears whose weights are stored in 4, 8 or 16 bits and multiplied in the input's precision.

    quantize_linears(model, "nf4", names)                  every named nn.Linear, in place, one by one
    replace_linear(model, name, "nf4", weight)             one, from a tensor just read: a loader's way in

    kind   class         bits a weight   for
    nf4    Linear4bit    4.127           QLoRA: 4-bit NormalFloat with double quantisation (arXiv:2305.14314)
    int8   Int8Linear    8 + 32 / in     decoding: one scale an output row
    bf16   StoredLinear  16              a frozen base on hardware that multiplies only in fp32

A product decodes some rows of the weight at a time into memory that stays in the cache, multiplies, and
decodes the next into the same memory. Neither the decoded weight nor the input is kept for the backward pass,
which decodes once more. Weights get no gradient; inputs and biases do.

NF4 follows bitsandbytes bit for bit, so that a base quantised here is the base that was quantised there. The
one exception is decoding to bf16 below 2**-126, the smallest normal number: ours rounds such a value to the
nearest, bitsandbytes takes it for 0 where the CPU has AVX512-BF16 and a row a multiple of 16 values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, ClassVar, NamedTuple, Self

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
# memory decides. With one token 2**18, which stays in the core's own cache, takes 0.7 of the time of 2**20.
# A GPU wants large products.
DECODE_ELEMENTS = {"cpu": 2**21, "cuda": 2**24}
FEW_TOKENS, FEW_TOKENS_SHARE = 16, 8
QUANTIZE_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Tables are made so whatever the default dtype and device are: loaders of models change both.
PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


class NF4(NamedTuple):
    """A tensor of n values in 4-bit NormalFloat, in row-major order."""

    packed: Tensor  # (ceil(n / 2)) uint8, the first of two values in the high four bits
    absmax: Tensor  # (ceil(n / 64)) uint8, codes of absmax - offset on the dynamic map
    nested_absmax: Tensor  # (ceil(n / 64 / 256)) fp32, the scale of each 256 of them
    offset: Tensor  # () fp32, the mean absmax


# --- NF4 ------------------------------------------------------------------------------------------


def dynamic_map() -> Tensor:
    """The 256 values of the 8-bit dynamic format, ascending (Dettmers 2015, arXiv:1511.04561).

    Seven decades of both signs, the uppermost of 64 values and each below of half as many, and 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, **PLAIN)
        magnitudes = (10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += magnitudes + [-m for m in magnitudes]
    return torch.tensor(sorted(values), **PLAIN)


def _nf4_code() -> Tensor:
    return torch.tensor(NF4_CODE, **PLAIN)


class _Tables(NamedTuple):
    pairs: Tensor  # (256) float64, whose bytes are the two fp32 values of a packed byte
    codes_below: Tensor  # (CELLS + 2) uint8, the code at the lower edge of each cell of [-1, 1]
    bound: Tensor  # (CELLS + 2) fp32, the bound between two codes inside the cell, or infinity
    dynamic: Tensor  # (256) fp32
    dynamic_codes: Tensor  # (65,536) uint8, the nearest code of each point of an even grid over [-1, 1]


CELLS = 128  # of [-1, 1]; narrow enough that none holds two bounds


def _cells(x: Tensor, out: Tensor) -> Tensor:
    """The cell of each value of [-1, 1]; any monotonic function will do that is the same for bounds."""
    return torch.add(x.new_tensor(CELLS / 2), x, alpha=CELLS / 2, out=out)


_TABLES: dict[torch.device, _Tables] = {}  # not functools.cache, which torch.compile sees through


def _tables(device: torch.device) -> _Tables:
    if device not in _TABLES:
        _TABLES[device] = _make_tables(device)
    return _TABLES[device]


def _make_tables(device: torch.device) -> _Tables:
    code = _nf4_code()
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
    """The values of fp32, bf16 or fp16 `weight`, of any shape, in 4-bit NormalFloat.

    Beside the result it takes some 20 bytes for each of QUANTIZE_ELEMENTS values; a `weight` that is not
    contiguous is copied.

    Raises:
        ValueError: Another dtype, no values, NaN or infinity among them, or values whose mean overflows.
    """
    flat = _checked(weight).reshape(-1)
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
    """Divides each block of `values` (m) by its largest magnitude, kept in `absmax` (ceil(m / 64))."""
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
    """Codes (n) uint8 on the dynamic map and scales (ceil(n / 256)) fp32 of fp32 `x` (n).

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
    """The largest magnitude of each block as decoding sees it, (ceil(n / 64)) fp32."""
    values = _tables(stored.absmax.device).dynamic.index_select(0, stored.absmax.int())
    return _scale_up(values, stored.nested_absmax, NESTED_BLOCK).add_(stored.offset)


def _scale_up(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """Multiplies each block of `values` (n) by its scale, in place; the last block may be short."""
    full = values.numel() // block
    values[: full * block].view(full, block).mul_(scales[:full].unsqueeze(1))
    if values.numel() % block:
        values[full * block :].mul_(scales[full])
    return values


def dequantize_nf4(stored: NF4, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of `stored` as a tensor of `shape`: products in fp32, rounded once to `dtype`."""
    weight = torch.empty(tuple(shape), dtype=dtype, device=stored.packed.device)
    n = weight.numel()
    if (n + 1) // 2 != stored.packed.numel():
        raise ValueError(f"{stored.packed.numel():,} bytes of NF4 do not hold a tensor of shape {(*shape,)}")
    rows = min(n, DECODE_ELEMENTS[weight.device.type])
    decode = _nf4_decoder(stored, rows, 1, dtype)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        weight.view(-1, 1)[start:stop] = decode(start, stop)
    return weight


DecodeRows = Callable[[int, int], Tensor]  # of (start, stop)


def _nf4_decoder(stored: NF4, rows: int, columns: int, dtype: torch.dtype) -> DecodeRows:
    """Decodes rows [start, stop), at most `rows`, of a matrix; start x columns is a multiple of 64.

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


def _checked(weight: Tensor) -> Tensor:
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


# --- the product ----------------------------------------------------------------------------------


def _chunks(
    kind: type[FrozenLinear],
    shape: tuple[int, int],
    stored: tuple[Tensor, ...],
    dtype: torch.dtype,
    tokens: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of the weight at a time, decoded; the next chunk may overwrite the last."""
    out_features, in_features = shape
    device = stored[0].device.type
    elements = DECODE_ELEMENTS[device]
    if device == "cpu" and tokens < FEW_TOKENS:
        elements //= FEW_TOKENS_SHARE
    align = BLOCK // math.gcd(in_features, BLOCK)  # rows whose end is the end of a block
    rows = elements // in_features // align * align
    rows = min(max(rows, align), out_features)
    decode = kind.decoder(stored, rows, in_features, dtype)
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        yield slice(start, stop), decode(start, stop)


class _Product(torch.autograd.Function):
    """x @ weight^T + bias; what is saved for backward is the weight as it is stored, and nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        kind: type[FrozenLinear],
        shape: tuple[int, int],
        *stored: Tensor,
    ) -> Tensor:
        ctx.kind, ctx.shape = kind, shape
        ctx.save_for_backward(*stored)
        y = x.new_empty(*x.shape[:-1], shape[0])
        scale = kind.row_scale(stored, x.dtype)
        # In bf16 a product that is scaled after it was rounded would be rounded twice.
        dtype = x.dtype if scale is None else torch.promote_types(x.dtype, torch.float32)
        x, rows_of_y = x.reshape(-1, shape[1]).to(dtype), y.view(-1, shape[0])
        with torch.autocast(x.device.type, enabled=False):
            for rows, weight in _chunks(kind, shape, stored, dtype, x.size(0)):
                out = rows_of_y[:, rows]
                if scale is None and bias is not None:
                    torch.addmm(bias[rows], x, weight.t(), out=out)
                    continue
                product = out if out.dtype == dtype else torch.empty(out.shape, dtype=dtype, device=x.device)
                torch.mm(x, weight.t(), out=product)
                if scale is not None:
                    product *= scale[rows]
                if bias is not None:
                    product += bias[rows]
                if product is not out:
                    out.copy_(product)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (out_features, in_features), dtype = ctx.shape, grads[0].dtype
        grad = grads[0].reshape(-1, out_features)
        grad_bias = grad.sum(0) if ctx.needs_input_grad[1] else None
        stored = ctx.saved_tensors  # once: a block that is made again gives them a single time
        others = None, None, *(None for _ in stored)
        if not ctx.needs_input_grad[0]:
            return None, grad_bias, *others
        scale = ctx.kind.row_scale(stored, dtype)
        # The sum over chunks is kept in fp32, so that they leave no trace in bf16.
        wide = torch.promote_types(dtype, torch.float32)
        if scale is not None:
            grad = grad * scale  # wide, and rounded once, at the end
        total = torch.zeros(grad.size(0), in_features, dtype=wide, device=grad.device)
        with torch.autocast(grad.device.type, enabled=False):
            for rows, weight in _chunks(ctx.kind, ctx.shape, stored, grad.dtype, grad.size(0)):
                if grad.dtype == wide:
                    total.addmm_(grad[:, rows], weight)
                else:
                    total += grad[:, rows] @ weight
        return total.to(dtype).view(*grads[0].shape[:-1], in_features), grad_bias, *others


# --- the modules ----------------------------------------------------------------------------------


class FrozenLinear(nn.Module):
    """y = x @ weight^T + bias with a stored weight (out, in) that is not trained.

    The stored tensors are buffers under the names of `layout`, so `state_dict` holds them as they are. They
    keep their dtypes whatever the module is cast to: `.to(torch.bfloat16)` changes the bias only. The bias is
    a parameter, frozen at first.
    """

    names: ClassVar[tuple[str, ...]]  # of the buffers, in the order that decoder() takes them
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
    ):
        """Zeros, to load a state into; `from_linear` and `from_weight` quantise."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        for name, (shape, dtype) in self.layout(in_features, out_features).items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))
        zeros = nn.Parameter(torch.zeros(out_features, device=device), requires_grad=False) if bias else None
        self.register_parameter("bias", zeros)

    @staticmethod
    def layout(in_features: int, out_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of each buffer."""
        raise NotImplementedError

    @staticmethod
    def encode(weight: Tensor) -> tuple[Tensor, ...]:
        """The buffers that stand for `weight` (out, in)."""
        raise NotImplementedError

    @staticmethod
    def decoder(stored: tuple[Tensor, ...], rows: int, columns: int, dtype: torch.dtype) -> DecodeRows:
        """A function of (start, stop) that gives these rows of the weight, at most `rows`, in `dtype`."""
        raise NotImplementedError

    @staticmethod
    def row_scale(stored: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor | None:
        """A factor (out) that the decoder leaves out of the rows, for the product to put into the outputs."""
        return None

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """Quantises `weight` (out, in) where it lies; `bias` (out) is kept as it is, frozen.

        Raises:
            ValueError: The weight is no matrix, or holds NaN or infinity; or the bias has another length.
        """
        if weight.dim() != 2:
            raise ValueError(f"a linear's weight has two dimensions, but this has shape {(*weight.shape,)}")
        out_features, in_features = weight.shape
        module = cls(in_features, out_features, bias=False, device="meta")
        with torch.no_grad():
            for name, stored in zip(cls.names, cls.encode(_checked(weight)), strict=True):
                setattr(module, name, stored.view(getattr(module, name).shape))
        module._set_bias(bias)
        return module

    def _set_bias(self, bias: Tensor | None) -> None:
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(
                f"a bias of shape {(*bias.shape,)} does not fit a weight of {self.out_features:,} rows"
            )
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """`from_weight` of a linear, which is left as it is."""
        return cls.from_weight(linear.weight, linear.bias)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.names)

    @property
    def weight(self) -> Tensor:
        """The weight that the products use, (out, in) in fp32, decoded anew at each access."""
        shape, dtype = (self.out_features, self.in_features), torch.float32
        weight = torch.empty(shape, dtype=dtype, device=self.stored[0].device)
        scale = self.row_scale(self.stored, dtype)
        with torch.no_grad():
            for rows, values in _chunks(type(self), shape, self.stored, dtype, shape[0]):
                weight[rows] = values
        return weight if scale is None else weight.mul_(scale.unsqueeze(1))

    @property
    def bits_per_weight(self) -> float:
        """From the bytes held, without the bias."""
        return 8 * sum(t.nbytes for t in self.stored) / (self.in_features * self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        if x.size(-1) != self.in_features:
            raise ValueError(
                f"the input has {x.size(-1):,} features, but this linear takes {self.in_features:,}"
            )
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _Product.apply(x, bias, type(self), (self.out_features, self.in_features), *self.stored)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """A cast would round scales and change every weight: buffers are moved, never cast."""
        before = self.stored
        super()._apply(fn, recurse)
        for name, held in zip(self.names, before, strict=True):
            moved = getattr(self, name)
            if moved.dtype != held.dtype:
                setattr(self, name, held.to(moved.device))
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """torch would cast what it copies: an absmax in fp32 would become whole numbers."""
        for name, held in zip(self.names, self.stored, strict=True):
            given = state_dict.get(prefix + name)
            if given is not None and (given.dtype, given.shape) != (held.dtype, held.shape):
                raise ValueError(
                    f"{prefix}{name} is {given.dtype} {(*given.shape,)} in the file, but this "
                    f"{type(self).__name__} stores {held.dtype} {(*held.shape,)}; quantise the base again"
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


BITSANDBYTES_STATE = "weight.quant_state.bitsandbytes__nf4"  # JSON in bytes
BITSANDBYTES = (
    *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
    BITSANDBYTES_STATE,
)


class Linear4bit(FrozenLinear):
    """4-bit NormalFloat with double quantisation (QLoRA, Dettmers et al. 2023, arXiv:2305.14314)."""

    names = NF4._fields

    @staticmethod
    def layout(in_features: int, out_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n = in_features * out_features
        # By rows where rows are whole bytes, so that a transposed weight's state is seen to be another.
        packed = (out_features, in_features // 2) if in_features % 2 == 0 else ((n + 1) // 2,)
        return {
            "packed": (packed, torch.uint8),
            "absmax": ((-(n // -BLOCK),), torch.uint8),
            "nested_absmax": ((-(n // -(BLOCK * NESTED_BLOCK)),), torch.float32),
            "offset": ((), torch.float32),
        }

    @staticmethod
    def encode(weight: Tensor) -> tuple[Tensor, ...]:
        return quantize_nf4(weight)

    @staticmethod
    def decoder(stored: tuple[Tensor, ...], rows: int, columns: int, dtype: torch.dtype) -> DecodeRows:
        return _nf4_decoder(NF4(*stored), rows, columns, dtype)

    def to_bitsandbytes(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """`weight`, `weight.absmax` and so on, as bitsandbytes and transformers save a linear in safetensors.

        `dtype` is the one that bitsandbytes then decodes to. The bias is not among them.
        """
        stored = NF4(*self.stored)
        tables = _tables(stored.packed.device)
        values = {
            "quant_type": "nf4",
            "blocksize": BLOCK,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": [self.out_features, self.in_features],
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": stored.offset.item(),
        }
        return {
            "weight": stored.packed.reshape(-1, 1),
            "weight.absmax": stored.absmax,
            "weight.quant_map": _nf4_code().to(stored.packed.device),
            "weight.nested_absmax": stored.nested_absmax,
            "weight.nested_quant_map": tables.dynamic.clone(),
            BITSANDBYTES_STATE: stored.packed.new_tensor(list(json.dumps(values).encode())),
        }

    @classmethod
    def from_bitsandbytes(cls, tensors: Mapping[str, Tensor], bias: Tensor | None = None) -> Self:
        """The linear that `to_bitsandbytes` describes, bit for bit.

        Raises:
            ValueError: Tensors are missing or do not fit together, or it is not NF4 with double quantisation
                in blocks of 64 and 256.
        """
        missing = [name for name in BITSANDBYTES if name not in tensors]
        if missing:
            raise ValueError(
                f"{', '.join(missing)} missing; only bitsandbytes' NF4 with double quantisation is read"
            )
        try:
            values = json.loads(bytes(tensors[BITSANDBYTES_STATE][:4096].tolist()))
            out_features, in_features = (int(size) for size in values["shape"])
            offset = float(values["nested_offset"])
            kind = values["quant_type"], values["blocksize"], values["nested_blocksize"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"{BITSANDBYTES_STATE} is not a description that bitsandbytes writes") from None
        if kind != ("nf4", BLOCK, NESTED_BLOCK) or min(out_features, in_features) < 1:
            raise ValueError(
                f"only nf4 in blocks of 64 and 256 is read, but this is {kind} of {values['shape']}"
            )
        maps = _nf4_code(), dynamic_map()
        for name, expected in zip(("weight.quant_map", "weight.nested_quant_map"), maps, strict=True):
            if not torch.equal(tensors[name].cpu(), expected):
                raise ValueError(f"{name} is another than that of NF4; quantise the base again")
        module = cls(in_features, out_features, bias=False, device="meta")
        stored = NF4(
            tensors["weight"],
            tensors["weight.absmax"],
            tensors["weight.nested_absmax"],
            tensors["weight"].new_tensor(offset, dtype=torch.float32),
        )
        for name, given in zip(cls.names, stored, strict=True):
            held = module.get_buffer(name)
            if (given.dtype, given.numel()) != (held.dtype, held.numel()):
                raise ValueError(
                    f"{name} holds {given.numel():,} values of {given.dtype}, but a weight of shape "
                    f"{(out_features, in_features)} has {held.numel():,} of {held.dtype}"
                )
            if given.is_floating_point() and not given.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity; quantise the base again")
            setattr(module, name, given.detach().reshape(held.shape))
        module._set_bias(bias)
        return module


class Int8Linear(FrozenLinear):
    """Whole numbers from -127 to 127, times one scale an output row, its largest magnitude / 127."""

    names = ("quantized", "scale")

    @staticmethod
    def layout(in_features: int, out_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            "quantized": ((out_features, in_features), torch.int8),
            "scale": ((out_features,), torch.float32),
        }

    @staticmethod
    def encode(weight: Tensor) -> tuple[Tensor, ...]:
        # A normal number at least: the reciprocal of a smaller one may be infinite.
        scale = torch.maximum(weight.amax(1), weight.amin(1).neg()).float().div_(127)
        scale.clamp_(min=torch.finfo(torch.float32).tiny)
        quantized = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        rows = max(1, QUANTIZE_ELEMENTS[weight.device.type] // weight.size(1))
        for start in range(0, weight.size(0), rows):
            some = slice(start, start + rows)
            quantized[some] = (weight[some].float() / scale[some, None]).round_().clamp_(-127, 127)
        return quantized, scale

    @staticmethod
    def decoder(stored: tuple[Tensor, ...], rows: int, columns: int, dtype: torch.dtype) -> DecodeRows:
        quantized, scale = stored
        values = torch.empty(rows, columns, dtype=dtype, device=scale.device)

        def decode(start: int, stop: int) -> Tensor:
            weight = values[: stop - start].copy_(quantized[start:stop])
            return weight if dtype != torch.float16 else weight.mul_(scale[start:stop, None])

        return decode

    @staticmethod
    def row_scale(stored: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor | None:
        """Scaling the outputs is cheaper than scaling the rows, but unscaled sums would overflow fp16."""
        return None if dtype == torch.float16 else stored[1]


class StoredLinear(FrozenLinear):
    """The weight in 16 bits: fp16 where it comes in fp16, which bf16 would round, or else bf16."""

    names = ("stored_weight",)
    stored_weight: Tensor

    @staticmethod
    def layout(in_features: int, out_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"stored_weight": ((out_features, in_features), torch.bfloat16)}

    @staticmethod
    def encode(weight: Tensor) -> tuple[Tensor, ...]:
        if weight.dtype == torch.float16:
            return (weight,)
        return (_checked(weight.to(torch.bfloat16)),)  # fp32 goes a little further than bf16

    @staticmethod
    def decoder(stored: tuple[Tensor, ...], rows: int, columns: int, dtype: torch.dtype) -> DecodeRows:
        (weight,) = stored
        if weight.dtype == dtype:
            return lambda start, stop: weight[start:stop]
        values = torch.empty(rows, columns, dtype=dtype, device=weight.device)
        return lambda start, stop: values[: stop - start].copy_(weight[start:stop])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Either dtype of 16 bits is taken as it comes."""
        held, given = self.stored_weight, state_dict.get(prefix + "stored_weight")
        if given is not None and given.shape == held.shape and given.dtype in (torch.float16, torch.bfloat16):
            self.stored_weight = held.to(given.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


KINDS: dict[str, type[FrozenLinear]] = {"nf4": Linear4bit, "int8": Int8Linear, "bf16": StoredLinear}


# --- models ---------------------------------------------------------------------------------------


def quantize_linears(model: nn.Module, kind: str, names: Iterable[str]) -> None:
    """Replaces the named nn.Linear modules of `model` in place, freeing each full weight before the next.

    Raises:
        ValueError: A name is unknown, is quantised already, is no nn.Linear, or shares its weight with
            another module, which would keep it in full; nothing is replaced then. Or a weight holds NaN.
    """
    names = list(dict.fromkeys(names))
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in names:
        linear = _linear(model, name)
        shared = [owner for owner in owners[id(linear.weight)] if owner != f"{name}.weight"]
        if shared:
            raise ValueError(
                f"{name}.weight is also {shared[0]}, which would keep it in full; leave {name} as it is"
            )
    for name in names:
        replace_linear(model, name, kind, _linear(model, name).weight)


def n_weights(model: nn.Module) -> int:
    """Parameters, and the weights that quantised linears stand for."""
    held = (m.in_features * m.out_features for m in model.modules() if isinstance(m, FrozenLinear))
    return sum(p.numel() for p in model.parameters()) + sum(held)


def dequantize_linears(model: nn.Module) -> None:
    """Replaces every quantised linear of `model` in place by an nn.Linear of what it stands for, in fp32."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FrozenLinear):
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, "meta")
            linear.weight = nn.Parameter(module.weight, requires_grad=False)
            linear.register_parameter("bias", module.bias)
            model.set_submodule(name, linear.train(module.training))


def replace_linear(
    model: nn.Module, name: str, kind: str, weight: Tensor, bias: Tensor | None = None
) -> FrozenLinear:
    """Puts `weight` (out, in), quantised, in the place of the nn.Linear called `name`; returns the module.

    The nn.Linear may be on the meta device: a model that is loaded so, tensor by tensor, never stands in full
    precision. Without `bias` the linear's own parameter is kept, to be loaded like any other.

    Raises:
        ValueError: As quantize_linears, or the shapes differ.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r} of quantised linear; use one of {', '.join(KINDS)}")
    linear = _linear(model, name)
    if weight.shape != linear.weight.shape:
        raise ValueError(
            f"the weight of {name} has shape {(*weight.shape,)}, but the model's is {(*linear.weight.shape,)}"
        )
    try:
        module = KINDS[kind].from_weight(weight, linear.bias if bias is None else bias)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    module.train(linear.training)
    model.set_submodule(name, module)
    return module


def _linear(model: nn.Module, name: str) -> nn.Linear:
    modules = dict(model.named_modules())
    module = modules.get(name)
    if module is None:
        linears = [known for known, m in modules.items() if isinstance(m, nn.Linear)]
        close = get_close_matches(name, linears, 3, 0.4) or linears[:3]
        raise ValueError(f"the model has no module {name!r}; did you mean {' or '.join(close) or 'another'}?")
    if isinstance(module, FrozenLinear):
        raise ValueError(
            f"{name} is quantised already, as {type(module).__name__}; quantise a base in full precision"
        )
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{name} is {type(module).__name__}, which cannot be quantised; name an nn.Linear")
    return module
