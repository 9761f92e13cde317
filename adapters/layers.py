"""Adapter layers, one a module: a low-rank term, rows of new tokens, a trained bias or a full copy.

Each knows its base by size and weight, and no model. The base is only ever asked for its weight, so that it
may be stored in 4 bits, and never written to. Where the meaning has a choice it is that of Hugging Face PEFT.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapters.products import DropMask
from config import LoraConfig

LENGTH_ELEMENTS = 2**20  # elements of a changed weight that DoRA computes at a time

# All singular parts of an 8192 x 2048 weight take 20 times as long as the largest 16 by power iteration.
FULL_SVD = 256  # All are computed where the smaller side is at most this.
SPARE_PARTS, POWER_ITERATIONS = 16, 16


class LowRank(nn.Module):
    """weight + scale * b a, for a linear's weight (O, I).

    An embedding's weight (V, C) gets the transpose: I = V, O = C.

    With DoRA (arXiv:2402.09353) the sum is rescaled to the learned length `magnitude` of each output; the
    length it is divided by is a constant to backward.

    A PiSSA start (arXiv:2404.02948) is a frozen second pair that is taken off: b a - start_b start_a is zero
    at first. To subtract it from the base, as PEFT does, is the same sum, but rounds the base, cannot be
    undone bit for bit, and takes a base of its own for each adapter.
    """

    start_a: Tensor | None
    start_b: Tensor | None

    def __init__(self, base: nn.Module, config: LoraConfig, r: int, alpha: float, bias: nn.Parameter | None):
        super().__init__()
        self.r, self.alpha, self.p = r, alpha, config.dropout
        self.scale = alpha / (math.sqrt(r) if config.rslora else r)
        self.of_embedding = is_embedding(base)
        size_out, size_in = sizes(base)
        device = next(itertools.chain(base.parameters(), base.buffers())).device
        self.a = nn.Parameter(torch.zeros(r, size_in, device=device))
        self.b = nn.Parameter(torch.zeros(size_out, r, device=device))
        self.register_parameter("magnitude", None)
        self.register_parameter("bias", bias)
        self.register_buffer("start_a", None)
        self.register_buffer("start_b", None)
        if self.of_embedding:
            nn.init.normal_(self.b)
        elif config.init == "pissa":
            self._start_at_largest(weight_of(base))
        else:
            nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        if config.dora:
            self.magnitude = nn.Parameter(self._length(weight_of(base)))

    @torch.no_grad()
    def _start_at_largest(self, weight: Tensor) -> None:
        if self.r > min(weight.shape):
            raise ValueError(
                f"a PiSSA start of rank {self.r} was asked for, but a weight of {list(weight.shape)} has "
                f"rank {min(weight.shape)} at most; lower r"
            )
        u, s, v = largest_parts(weight.detach().float(), self.r)
        root = (s / self.scale).sqrt()
        self.a.copy_((v * root).t())
        self.b.copy_(u * root)
        self.start_a, self.start_b = self.a.detach().clone(), self.b.detach().clone()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return a and b, with the start that is taken off as further ranks."""
        if self.start_a is None or self.start_b is None:
            return self.a, self.b
        return torch.cat((self.a, self.start_a)), torch.cat((self.b, -self.start_b), dim=1)

    def delta(self) -> Tensor:
        """Return what is added to the weight, in its shape; without the rescaling of DoRA."""
        a, b = self.factors()
        delta = self.scale * (b @ a)
        return delta.t() if self.of_embedding else delta

    @torch.no_grad()
    def _length(self, weight: Tensor) -> Tensor:
        """Return the length of each output's changed weights, (O); a head has V x C, so some at a time.

        From products of r columns it would be |w|^2 + 2 s w a^T b + s^2 |b a|^2, which cancels where the
        change nearly undoes w.
        """
        weight = weight.detach().t() if self.of_embedding else weight.detach()
        a, b = self.factors()
        length = torch.empty(len(b), device=b.device)
        n = max(1, LENGTH_ELEMENTS // a.size(1))
        for start in range(0, len(b), n):
            rows = slice(start, start + n)
            total = torch.addmm(weight[rows].float(), b[rows].float(), a.float(), alpha=self.scale)
            length[rows] = torch.linalg.vector_norm(total, dim=1)
        return length

    def gain(self, base: nn.Module) -> Tensor | None:
        """Return what DoRA multiplies each output of its base by, (O); None without DoRA.

        An output whose weights are all zero has no direction, and gives NaN as in PEFT.
        """
        if self.magnitude is None:  # Asked first, since weight_of decodes a weight in 4 bits.
            return None
        return self.magnitude / self._length(weight_of(base))

    def change(self, base: nn.Module) -> Tensor:
        """Return the whole change of the base's weight, in its shape and fp32."""
        delta, gain = self.delta(), self.gain(base)
        if gain is None:
            return delta
        gain = gain if self.of_embedding else gain[:, None]
        return (gain - 1) * weight_of(base).float() + gain * delta

    def sample_mask(self) -> DropMask | None:
        """Return a new dropout mask for x; None in evaluation or without dropout."""
        return DropMask.sample(self.p) if self.training else None

    def merge_into(self, merged: Tensor, base: nn.Module, adapter_weight: float) -> None:
        """Add the change of `base`, times the adapter's weight, to a copy of its weight."""
        merged.add_(self.change(base), alpha=adapter_weight)


def largest_parts(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the r largest singular parts of a weight (O, I): u (O, r), s (r), v (I, r).

    Those of a large weight are found by power iteration from random vectors (Halko et al. 2011,
    arXiv:0909.4061), drawn from torch's generator. The product is then nearly the best of its rank: what it
    leaves of the weight is at most 1.001 times the least that can be left, even where the spectrum is flat
    and the parts themselves are not unique.
    """
    parts = min(weight.shape)
    if parts <= FULL_SVD or 4 * (r + SPARE_PARTS) > parts:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        v = vh.t()
    else:
        u, s, v = torch.svd_lowrank(weight, r + SPARE_PARTS, POWER_ITERATIONS)
    return u[:, :r], s[:r], v[:, :r]


class TrainableRows(nn.Module):
    """Rows of a weight (V, C) that train while the rest is frozen, such as those of new tokens."""

    ids: Tensor
    original: Tensor
    slots: Tensor

    def __init__(
        self, base: nn.Module, ids: Sequence[int], bias: nn.Parameter | None, rows: nn.Parameter | None = None
    ):
        super().__init__()
        weight: Any = base.weight
        index = torch.tensor(ids, device=weight.device)
        original = weight.detach()[index].float()
        self.rows = nn.Parameter(original.clone()) if rows is None else rows
        self.register_parameter("bias", bias)
        self.register_buffer("ids", index, persistent=False)
        self.register_buffer("original", original, persistent=False)
        slots = torch.full((weight.size(0),), -1, device=weight.device)
        slots[index] = torch.arange(len(ids), device=weight.device)
        self.register_buffer("slots", slots, persistent=False)

    def delta(self) -> Tensor:
        return self.rows - self.original

    def merge_into(self, merged: Tensor, base: nn.Module, adapter_weight: float) -> None:
        before = merged[self.ids]
        alone = adapter_weight == 1 and torch.equal(
            before, self.original.to(merged.dtype)
        )  # then without rounding
        merged[self.ids] = self.rows.to(merged.dtype) if alone else before + adapter_weight * self.delta()


class FullCopy(nn.Module):
    """A trained copy that stands in for the module."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.copy = copy.deepcopy(base) if is_plain(base) else as_linear(base, weight_of(base).detach())
        self.copy.float()  # A bf16 weight would lose steps below 1 / 256 of itself.

    def forward(self, x: Tensor) -> Tensor:
        return self.copy(x.to(weight_of(self.copy).dtype) if x.is_floating_point() else x)


class Bias(nn.Module):
    """A trained bias and nothing else."""

    def __init__(self, bias: nn.Parameter):
        super().__init__()
        self.bias = bias


AdapterLayer = LowRank | TrainableRows | FullCopy | Bias


# Duck typing: a 4-bit linear is no nn.Linear, and its `weight` is decoded at each access.
def is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def is_embedding(module: nn.Module) -> bool:
    return hasattr(module, "num_embeddings") and hasattr(module, "embedding_dim")


def sizes(base: Any) -> tuple[int, int]:
    """Return the outputs and inputs of a linear, or of an embedding, whose inputs are the vocabulary."""
    if is_embedding(base):
        return base.embedding_dim, base.num_embeddings
    return base.out_features, base.in_features


def weight_of(module: nn.Module) -> Any:
    """Return `module.weight`, which nn.Module does not declare."""
    return module.weight


def is_plain(module: nn.Module) -> bool:
    """Say whether the weight is a floating-point parameter; else it is decoded from something smaller."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.is_floating_point()


def as_linear(base: Any, weight: Tensor) -> nn.Linear:
    """Return a frozen nn.Linear of the base's sizes and bias, with a copy of `weight`."""
    linear = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if base.bias is not None:
        linear.bias = nn.Parameter(base.bias.detach().clone(), requires_grad=False)
    return linear
