"""Linears whose weights are stored in fewer bits, frozen, and multiplied in the input's precision.

A product decodes some rows of the weight at a time into memory that stays in the cache, multiplies, and
decodes the next into the same memory. Neither the decoded weight nor the input is kept for the backward pass,
which decodes once more. Weights get no gradient; inputs and biases do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from modules.nf4 import BLOCK, DECODE_ELEMENTS, DecodeRows, checked_weight
from modules.products import MeasuredProducts, Product, Way, in_onednns_order, onednn_product

# With fewer than 16 tokens on a CPU an eighth of DECODE_ELEMENTS, which stays in the core's own cache, takes
# 0.7 of the time of 2**20.
FEW_TOKENS, FEW_TOKENS_SHARE = 16, 8


def decoded_chunks(
    kind: type[FrozenLinear],
    shape: tuple[int, int],
    stored: tuple[Tensor, ...],
    dtype: torch.dtype,
    tokens: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield some decoded rows of the weight at a time; the next chunk may overwrite the last."""
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
    """x @ weight^T + bias, which saves for backward the weight as it is stored, and nothing else."""

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
            for rows, weight in decoded_chunks(kind, shape, stored, dtype, x.size(0)):
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
        stored = ctx.saved_tensors  # Read once: a recomputed block gives them a single time.
        others = None, None, *(None for _ in stored)
        if not ctx.needs_input_grad[0]:
            return None, grad_bias, *others
        scale = ctx.kind.row_scale(stored, dtype)
        # The sum over chunks is kept in fp32, so that they leave no trace in bf16.
        wide = torch.promote_types(dtype, torch.float32)
        if scale is not None:
            grad = grad * scale  # In fp32, and rounded once, at the end.
        total = torch.zeros(grad.size(0), in_features, dtype=wide, device=grad.device)
        with torch.autocast(grad.device.type, enabled=False):
            for rows, weight in decoded_chunks(ctx.kind, ctx.shape, stored, grad.dtype, grad.size(0)):
                if grad.dtype == wide:
                    total.addmm_(grad[:, rows], weight)
                else:
                    total += grad[:, rows] @ weight
        return total.to(dtype).view(*grads[0].shape[:-1], in_features), grad_bias, *others


class FrozenLinear(MeasuredProducts):
    """y = x @ weight^T + bias with a stored weight (out, in) that is not trained.

    The stored tensors are buffers under the names of `layout`, so `state_dict` holds them as they are. They
    keep their dtypes whatever the module is cast to: `.to(torch.bfloat16)` changes the bias only. The bias is
    a parameter, frozen at first.
    """

    names: ClassVar[tuple[str, ...]]  # The buffers, in the order that decoder() takes them.
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
    ):
        """Make a linear of zeros, to load a state into; `from_linear` and `from_weight` quantise."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        for name, (shape, dtype) in self.layout(in_features, out_features).items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))
        zeros = nn.Parameter(torch.zeros(out_features, device=device), requires_grad=False) if bias else None
        self.register_parameter("bias", zeros)

    @staticmethod
    def layout(in_features: int, out_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the name, shape and dtype of each buffer."""
        raise NotImplementedError

    @staticmethod
    def encode(weight: Tensor) -> tuple[Tensor, ...]:
        """Return the buffers that stand for `weight` (out, in)."""
        raise NotImplementedError

    @staticmethod
    def decoder(stored: tuple[Tensor, ...], rows: int, columns: int, dtype: torch.dtype) -> DecodeRows:
        """Return a function of (start, stop) that decodes these rows, at most `rows`, to `dtype`."""
        raise NotImplementedError

    @staticmethod
    def row_scale(stored: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor | None:
        """Return a factor (out) that the decoder leaves out and the product puts into the outputs."""
        return None

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """Quantise `weight` (out, in) where it lies; `bias` (out) is kept as it is, frozen.

        Raises:
            ValueError: The weight is no matrix, or holds NaN or infinity; or the bias has another length.
        """
        if weight.dim() != 2:
            raise ValueError(f"a linear's weight has two dimensions, but this has shape {(*weight.shape,)}")
        out_features, in_features = weight.shape
        module = cls(in_features, out_features, bias=False, device="meta")
        with torch.no_grad():
            for name, stored in zip(cls.names, cls.encode(checked_weight(weight)), strict=True):
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
        """Quantise the weight of a linear, which is left as it is."""
        return cls.from_weight(linear.weight, linear.bias)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The buffers, in the order of `names`."""
        return tuple(getattr(self, name) for name in self.names)

    @property
    def weight(self) -> Tensor:
        """The weight that the products use, (out, in) in fp32, decoded anew at each access."""
        return self.decoded(torch.float32)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, (out, in), decoded in fp32 and rounded once."""
        shape = self.out_features, self.in_features
        weight = torch.empty(shape, dtype=dtype, device=self.stored[0].device)
        scale = self.row_scale(self.stored, torch.float32)
        with torch.no_grad():
            for rows, values in decoded_chunks(type(self), shape, self.stored, torch.float32, shape[0]):
                weight[rows] = values if scale is None else values * scale[rows, None]
        return weight

    @property
    def bits_per_weight(self) -> float:
        """Bits for each weight, by the bytes that are stored; without the bias."""
        return 8 * sum(t.nbytes for t in self.stored) / (self.in_features * self.out_features)

    def ways(self, rows: int, dtype: torch.dtype) -> dict[str, Way]:
        if dtype not in (torch.float32, torch.bfloat16):
            return {}
        size = self.out_features * self.in_features * dtype.itemsize
        return {"decoded": Way(lambda: self._by_decoded(dtype), self.extra(f"decoded {dtype}", size))}

    def _by_decoded(self, dtype: torch.dtype) -> Product:
        """Return the product of a copy that is decoded once, for memory that is free."""
        copy = self.copied(f"decoded {dtype}", lambda: in_onednns_order(self.decoded(dtype)))
        multiply = onednn_product(copy)
        return lambda x: multiply(x, self.bias)

    def weight_rows(self, index: Tensor) -> Tensor:
        return self.weight[index].double()

    def forward(self, x: Tensor) -> Tensor:
        product = self.measured(x)
        return self.plain(x) if product is None else product(x)

    def plain(self, x: Tensor) -> Tensor:
        """Multiply x (..., in) by the weight, decoded some rows at a time."""
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
        """Move buffers, and never cast them: a cast would round scales and change every weight."""
        before = self.stored
        super()._apply(fn, recurse)
        for name, own in zip(self.names, before, strict=True):
            moved = getattr(self, name)
            if moved.dtype != own.dtype:
                setattr(self, name, own.to(moved.device))
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
        """Refuse other dtypes and shapes: torch would cast an absmax in fp32 to whole numbers."""
        self.forget()
        for name, own in zip(self.names, self.stored, strict=True):
            given = state_dict.get(prefix + name)
            if given is not None and (given.dtype, given.shape) != (own.dtype, own.shape):
                raise ValueError(
                    f"{prefix}{name} is {given.dtype} {(*given.shape,)} in the file, but this "
                    f"{type(self).__name__} stores {own.dtype} {(*own.shape,)}; quantise the base again"
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
