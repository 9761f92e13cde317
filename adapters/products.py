"""Products with a low-rank term, forward and backward, that keep each activation once.

    add_term(out, x, a, b, scale, drop)                        out += scale * drop(x) a^T b^T, in place
    linear_with_term(x, weight, bias, a, b, scale, drop)       the same on x weight^T + bias, weight frozen

Shapes: x (N, I), a (r, I), b (O, r), out (N, O). Kept for backward are x itself, x a^T (N, r) and the seed of
dropout's mask. Written out by autograd the same takes the dropped x, the term and its scaled copy besides.
Masks are made and used for some rows at a time, while these are in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from modules.dropout import kept, steps

MASK_ELEMENTS = 2**20  # elements of a mask at a time


class DropMask(NamedTuple):
    """A dropout mask as a seed: sampled in forward and again, the same, in backward; never stored between."""

    p: float
    seed: int

    @classmethod
    def sample(cls, p: float) -> DropMask | None:
        """Return a new mask, None for p = 0; its seed is from torch's generator, which runs save anyway."""
        return cls(p, int(torch.randint(2**62, ()))) if p else None

    @property
    def factor(self) -> float:
        """1 / (1 - p), for the p that the mask really has."""
        return 2**16 / (2**16 - steps(self.p))

    def masks(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, 0 or 1 for each of their elements in x's dtype), for all rows of x (N, I)."""
        if x.device.type != "cpu":
            generator = torch.Generator(x.device).manual_seed(self.seed)
            yield slice(0, len(x)), torch.empty_like(x).bernoulli_(1 / self.factor, generator=generator)
            return
        n = max(1, MASK_ELEMENTS // x.size(1))
        for part, start in enumerate(range(0, len(x), n)):
            rows = slice(start, min(start + n, len(x)))
            shape = torch.Size((rows.stop - start, x.size(1)))
            yield rows, kept(self.seed, part, shape, steps(self.p), x.dtype)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, drop: DropMask) -> Tensor:
        ctx.drop = drop
        return _masked(x, drop)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return _masked(grads[0], ctx.drop), None


def _masked(x: Tensor, drop: DropMask) -> Tensor:
    y = torch.empty_like(x)
    for rows, mask in drop.masks(x):
        torch.mul(x[rows], mask.mul_(drop.factor), out=y[rows])
    return y


def dropped(x: Tensor, drop: DropMask | None) -> Tensor:
    """Return x (N, I) with its mask and the factor applied."""
    if drop is None:
        return x
    y = _Dropout.apply(x, drop)
    assert isinstance(y, Tensor)
    return y


def _inner(x: Tensor, a: Tensor, drop: DropMask | None) -> Tensor:
    """Return mask(x) a^T, (N, r), without the factor."""
    if drop is None:
        return torch.mm(x, a.t())
    u = torch.empty(len(x), len(a), dtype=x.dtype, device=x.device)
    for rows, mask in drop.masks(x):
        torch.mm(mask.mul_(x[rows]), a.t(), out=u[rows])
    return u


def _inner_gradients(
    grad_u: Tensor, x: Tensor, a: Tensor, drop: DropMask | None, grad_x: Tensor | None, needs_a: bool
) -> Tensor | None:
    """Add the gradient of x to `grad_x` (N, I), if given; return that of a (r, I), if needed."""
    if drop is None:
        if grad_x is not None:
            grad_x.addmm_(grad_u, a)
        return torch.mm(grad_u.t(), x) if needs_a else None
    summed = torch.promote_types(a.dtype, torch.float32)
    grad_a = torch.zeros(a.shape, dtype=summed, device=a.device) if needs_a else None
    for rows, mask in drop.masks(x):
        if grad_x is not None:
            grad_x[rows].addcmul_(torch.mm(grad_u[rows], a), mask)
        if grad_a is not None:
            grad_a += torch.mm(grad_u[rows].t(), mask.mul_(x[rows]))
    return grad_a


class _AddTerm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, drop: DropMask | None
    ) -> Tensor:
        dtype = out.dtype  # Autocast decides it, where it is on.
        with torch.autocast(x.device.type, enabled=False):
            u = _inner(x.to(dtype), a.to(dtype), drop)
            scale *= 1 if drop is None else drop.factor
            out.addmm_(u, b.to(dtype).t(), alpha=scale)
        ctx.save_for_backward(x, u, a, b)
        ctx.scale, ctx.drop, ctx.dtype = scale, drop, dtype
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        grad = grads[0]
        x, u, a, b = ctx.saved_tensors
        grad_x = torch.zeros(x.shape, dtype=ctx.dtype, device=x.device) if ctx.needs_input_grad[1] else None
        grad_a, grad_b = _factor_gradients(ctx, grad, x, u, a, b, grad_x)
        return grad, None if grad_x is None else grad_x.to(x.dtype), grad_a, grad_b, None, None


class _LinearWithTerm(torch.autograd.Function):
    """The frozen linear and its term in one function, so that the two gradients of x are added in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        scale: float,
        drop: DropMask | None,
    ) -> Tensor:
        """Take eight parameters, as autograd wants each tensor as an argument of its own."""
        out = F.linear(x, weight, bias)
        dtype = out.dtype  # Autocast decides it, where it is on.
        with torch.autocast(x.device.type, enabled=False):
            u = _inner(x.to(dtype), a.to(dtype), drop)
            scale *= 1 if drop is None else drop.factor
            out.addmm_(u, b.to(dtype).t(), alpha=scale)
        ctx.save_for_backward(x, u, a, b, weight)
        ctx.scale, ctx.drop, ctx.dtype = scale, drop, dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        grad = grads[0]
        x, u, a, b, weight = ctx.saved_tensors
        grad_x = torch.mm(grad, weight.to(ctx.dtype)) if ctx.needs_input_grad[0] else None
        grad_a, grad_b = _factor_gradients(ctx, grad, x, u, a, b, grad_x)
        grad_x = None if grad_x is None else grad_x.to(x.dtype)
        return grad_x, None, grad_a, grad_b, None, None, None


def _factor_gradients(
    ctx: Any, grad: Tensor, x: Tensor, u: Tensor, a: Tensor, b: Tensor, grad_x: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of a and b; that of x is added to `grad_x`."""
    _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
    dtype = ctx.dtype
    grad_b = torch.mm(grad.t(), u).to(b.dtype).mul_(ctx.scale) if needs_b else None
    if not needs_a and grad_x is None:
        return None, grad_b
    grad_u = torch.mm(grad, b.to(dtype)).mul_(ctx.scale)
    grad_a = _inner_gradients(grad_u, x.to(dtype), a.to(dtype), ctx.drop, grad_x, needs_a)
    return None if grad_a is None else grad_a.to(a.dtype), grad_b


def add_term(out: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, drop: DropMask | None) -> Tensor:
    """Add scale * drop(x) a^T b^T to out, in place: nothing keeps a frozen linear's output."""
    y = _AddTerm.apply(out, x, a, b, scale, drop)
    assert isinstance(y, Tensor)
    return y


def linear_with_term(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, drop: DropMask | None
) -> Tensor:
    """Return x weight^T + bias + scale * drop(x) a^T b^T; weight and bias are frozen."""
    y = _LinearWithTerm.apply(x, weight, a, b, bias, scale, drop)
    assert isinstance(y, Tensor)
    return y
