"""Frozen linears whose weights are whole numbers with scales: 8 bits by rows, 4 bits by groups of a row.

kind   bits a weight    a weight is
int8   8 + 32 / in      quantized * scale, one scale an output row
int4   4.5              (code - 8) * scale + zero, both of the GROUP weights of a row that stand together

Scales and zeros are numbers of bf16, so that torch's weight-only kernels, which take them in bf16, compute
what is stored. These read the weights as they are and never decode them to memory (int4 in an order of their
own, a second copy). Each rounds its sum, which is in fp32, once, and once more with a bias. They take inputs
in bf16, and where they do not fit a product decodes the weight, some rows at a time or once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modules.frozen_linear import FrozenLinear
from modules.nf4 import QUANTIZE_ELEMENTS, DecodeRows
from modules.products import Product, Way

GROUP = 64  # weights of a row that share a scale and a zero; the last group of a row may be short
FEW_ROWS, MOST_ROWS = 4, 64  # For up to FEW_ROWS a kernel is always the fastest, for above MOST_ROWS never.
ALIGNED = 32  # torch's int8 kernel reads past the end of rows whose length is no multiple of 16
PACKED_ROWS = 2**10  # rows that are ordered for the int4 kernel at a time, from 32 bits a code


class IntegerLinear(FrozenLinear):
    """A linear with a kernel of torch's for inputs in bf16."""

    def kernel(self) -> Way | None:
        """Return the product by the kernel; None if the weight's shape does not fit it."""
        raise NotImplementedError

    def ways(self, rows: int, dtype: torch.dtype) -> dict[str, Way]:
        way = self.kernel() if dtype == torch.bfloat16 and rows <= MOST_ROWS else None
        found = {} if way is not None and rows <= FEW_ROWS else super().ways(rows, dtype)
        return found if way is None else {f"{type(self).__name__}'s kernel": way} | found

    def _product(self, multiply: Callable[[Tensor], Tensor]) -> Product:
        """Return the product of x (..., in) by a kernel that takes (n, in), contiguous, and adds no bias."""

        def product(x: Tensor) -> Tensor:
            y = multiply(x.reshape(-1, self.in_features).contiguous())
            y = y if self.bias is None else y.add_(self.bias)
            return y.view(*x.shape[:-1], self.out_features)

        return product


class Int8Linear(IntegerLinear):
    """Weights as whole numbers from -127 to 127, times a scale an output row: its largest magnitude / 127."""

    names = ("quantized", "scale")
    quantized: Tensor
    scale: Tensor

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
        scale = bf16_above(scale.clamp_(min=torch.finfo(torch.float32).tiny)).float()
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
        """Return the scale: cheaper in the outputs than in the rows, but unscaled sums overflow fp16."""
        return None if dtype == torch.float16 else stored[1]

    def weight_rows(self, index: Tensor) -> Tensor:
        return self.quantized[index].double() * self.scale[index].double().unsqueeze(1)

    def kernel(self) -> Way | None:
        return None if self.in_features % ALIGNED else Way(self._by_kernel)

    def _by_kernel(self) -> Product:
        scale = self.scale.bfloat16()
        return self._product(lambda x: torch.ops.aten._weight_int8pack_mm(x, self.quantized, scale))


class Int4Linear(IntegerLinear):
    """Weights as codes from 0 to 15: (code - 8) * scale + zero, for GROUP weights of a row at a time."""

    names = ("codes", "scale", "zero")
    codes: Tensor
    scale: Tensor
    zero: Tensor

    @staticmethod
    def layout(in_features: int, out_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        groups = -(in_features // -GROUP), out_features
        return {
            "codes": ((out_features, (in_features + 1) // 2), torch.uint8),
            "scale": (groups, torch.bfloat16),
            "zero": (groups, torch.bfloat16),
        }

    @staticmethod
    def encode(weight: Tensor) -> tuple[Tensor, ...]:
        n_out, n_in = weight.shape
        groups = -(n_in // -GROUP)
        codes = torch.empty(n_out, (n_in + 1) // 2, dtype=torch.uint8, device=weight.device)
        scale = torch.empty(groups, n_out, dtype=torch.bfloat16, device=weight.device)
        zero = torch.empty_like(scale)
        rows = max(1, QUANTIZE_ELEMENTS[weight.device.type] // n_in)
        for start in range(0, n_out, rows):
            some = slice(start, start + rows)
            values = weight[some].float()
            # A short last group is filled up with its own last value, which changes no extreme.
            last = values[:, -1:].expand(-1, groups * GROUP - n_in)
            values = torch.cat((values, last), dim=1).view(len(values), groups, GROUP)
            least, most = values.aminmax(dim=2)
            step = bf16_above(((most - least) / 15).clamp_(min=2.0**-100))
            middle = (least + 8 * step.float()).bfloat16()
            code = (
                ((values - middle.float()[..., None]) / step.float()[..., None])
                .round_()
                .add_(8)
                .clamp_(0, 15)
            )
            flat = code.to(torch.uint8).view(len(values), -1)[:, : n_in + n_in % 2]
            codes[some] = flat[:, 0::2] | flat[:, 1::2] << 4
            scale[:, some], zero[:, some] = step.t(), middle.t()
        return codes, scale, zero

    @staticmethod
    def decoder(stored: tuple[Tensor, ...], rows: int, columns: int, dtype: torch.dtype) -> DecodeRows:
        def decode(start: int, stop: int) -> Tensor:
            codes, scale, zero = stored[0][start:stop], stored[1][:, start:stop], stored[2][:, start:stop]
            return _values(_unpacked(codes), scale, zero)[:, :columns].to(dtype)

        return decode

    def weight_rows(self, index: Tensor) -> Tensor:
        codes = _unpacked(self.codes[index])
        return _values(codes, self.scale[:, index], self.zero[:, index])[:, : self.in_features].double()

    def kernel(self) -> Way | None:
        if self.out_features % 16 or self.in_features % GROUP:
            return None
        return Way(self._by_kernel, self.extra("kernel", self.codes.nbytes))

    def _by_kernel(self) -> Product:
        copy = self.copied("kernel", self._in_kernels_order)
        scales = torch.stack((self.scale, self.zero), dim=-1)
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return self._product(lambda x: multiply(x, copy, GROUP, scales))

    def _in_kernels_order(self) -> Tensor:
        order = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        return torch.cat([order(_unpacked(part).int(), 1) for part in self.codes.split(PACKED_ROWS)])


def bf16_above(x: Tensor) -> Tensor:
    """Return the least numbers of bf16 that are not below positive `x` in fp32."""
    nearest = x.bfloat16()
    return torch.where(nearest.float() < x, (nearest.view(torch.int16) + 1).view(torch.bfloat16), nearest)


def _unpacked(codes: Tensor) -> Tensor:
    """Return codes (n, ceil(in / 2)) one a byte, (n, in rounded up to even) uint8."""
    return torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)


def _values(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return what codes (n, columns) stand for, (n, groups x GROUP) in fp32; scale and zero (groups, n)."""
    padding = len(scale) * GROUP - codes.size(1)
    grouped = torch.nn.functional.pad(codes, (0, padding)).view(len(codes), -1, GROUP).float()
    step, middle = scale.t().float().unsqueeze(2), zero.t().float().unsqueeze(2)
    return torch.addcmul(middle, grouped.sub_(8), step).flatten(1)
