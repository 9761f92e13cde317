"""Comparison of dropout with the reference: its masks, their scale, and the same masks in the backward pass.

What a place of dropout does to its input is seen in its results, since they are linear in the mask: each part
of them is what evaluation gives, times 0 or 1 / (1 - p).
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapters.layers import LowRank, weight_of
from guards.reference.comparison import Comparison
from guards.reference.effective import adapted
from guards.reference.rounding import STEP32
from guards.subject import GuardSubject, is_large
from lora import LoraLinear
from modules.dropout import Dropout
from reference import dropout
from training.random_state import seed_torch

SHAPE = (128, 256)  # Of what a dropout is given.
ROWS, TEXT = 64, 16  # Rows, and tokens of each, of what attention is given.
INPUTS = 48  # Rows that an adapter is given.
LEAST = 0.05  # Of the largest part: a smaller one is too near rounding to tell 0 from 1 / (1 - p).
REMEDY = "compare the masks and their scale with reference/dropout.py"


def compare(subject: GuardSubject, comparison: Comparison) -> None:
    """Compare each kind of dropout that the settings ask for, in the model's own modules."""
    model, config = subject.model, subject.model.config
    modes = {module: module.training for module in model.modules()}
    last, device = len(model.blocks) - 1, subject.precision.device
    try:
        model.train()
        with torch.enable_grad():
            compare_none(comparison, model, device)
            places = {"the embedding": (config.embed_dropout, "dropout")}
            places |= {f"block {i}": (config.dropout, f"blocks.{i}.dropout") for i in {0, last}}
            for place, (p, name) in places.items():
                if p:
                    compare_module(comparison, f"dropout of {place}", model.get_submodule(name), p, device)
            for layer in {0, last} if config.attention_dropout else ():
                attention = model.blocks[layer].get_submodule("attention")
                compare_attention(comparison, f"block {layer}, attention dropout", attention, device)
            if subject.config.lora.dropout and is_large(model):
                comparison.leave_out("the dropout of adapters", "the model is large")
            elif subject.config.lora.dropout:
                for name, module in model.named_modules():
                    if isinstance(module, LoraLinear) and name.startswith((f"blocks.{last}.", "blocks.0.")):
                        stage = f"dropout of the adapter of {name}"
                        compare_adapter(comparison, stage, module, subject.config.lora.dropout)
    finally:
        for module, training in modes.items():
            module.training = training


def compare_none(comparison: Comparison, model: nn.Module, device: torch.device) -> None:
    """See that a dropout of probability 0, or in evaluation, neither changes its input nor draws a number."""
    x = torch.ones(2, 3, device=device)
    for name, module in model.named_modules():
        if not isinstance(module, Dropout):
            continue
        for training in [False] if module.p else [False, True]:
            module.train(training)
            before = torch.get_rng_state()
            same = torch.equal(module(x), x) and torch.equal(torch.get_rng_state(), before)
            stage = f"{name} of {module.p} in {'training' if training else 'evaluation'}, nothing happens"
            comparison.exact(stage, same, True, REMEDY)
        module.train()


# --- masks --------------------------------------------------------------------------------------------


def compare_masks(comparison: Comparison, stage: str, factors: list[Tensor], p: float) -> None:
    """Compare what elements were multiplied by in several draws: their values, shares and independence.

    Args:
        factors: By draw what each element was multiplied by, (rows, columns); NaN where that is not seen.
    """
    kept = 1 / (1 - dropout.share(p))
    dropped = [(factor.abs() < kept / 2) | factor.isnan() for factor in factors]
    for factor, zero in zip(factors, dropped, strict=True):
        seen = ~factor.isnan()
        expected = torch.where(zero, 0.0, kept).double()[seen]
        comparison.close(f"{stage}, its factors", factor[seen], expected, LEAST / 2, REMEDY)
        _share(comparison, f"{stage}, share of zeros", zero[seen], p, factor.size(1))
    twice = 2 * p * (1 - p)  # The share in which two independent masks differ.
    pairs = {"two draws": (dropped[0], dropped[1], ~(factors[0].isnan() | factors[1].isnan()))}
    seen = ~factors[0].isnan()
    pairs["neighbouring rows"] = (dropped[0][1:], dropped[0][:-1], seen[1:] & seen[:-1])
    half = len(factors[0]) // 2
    pairs["rows far apart"] = (
        dropped[0][:half],
        dropped[0][half : 2 * half],
        seen[:half] & seen[half : 2 * half],
    )
    pairs["neighbouring columns"] = (dropped[0][:, 1:], dropped[0][:, :-1], seen[:, 1:] & seen[:, :-1])
    for what, (one, other, both) in pairs.items():
        _share(comparison, f"{stage}, difference of {what}", (one != other)[both], twice, factors[0].size(1))


def _share(comparison: Comparison, stage: str, events: Tensor, p: float, columns: int) -> None:
    """Compare how many of some events happened with how many should."""
    n, found = events.numel(), int(events.sum())
    off = 2 * dropout.most_off(n, p, columns)  # Pairs that share an element are not independent.
    if abs(found - n * p) > off:
        comparison.exact(stage, f"{found / max(1, n):.2%}", f"{p:.2%}", REMEDY)
    comparison.exact(stage, True, True, REMEDY)


def compare_module(
    comparison: Comparison, stage: str, module: nn.Module, p: float, device: torch.device
) -> None:
    """Compare a dropout of the residual stream: what it does to ones, forward and backward."""
    comparison.exact(f"{stage}, its probability", cast(Any, module).p, p, "hand the setting to every part")
    factors = []
    for number in torch.randint(2**31, (2,)).tolist():
        seed_torch(number, device)
        x = torch.ones(SHAPE, requires_grad=True, device=device)
        out = module(x)
        out.backward(torch.ones_like(out))
        assert x.grad is not None
        factors.append(out.detach().double().cpu())
        comparison.close(f"{stage}, its gradient", x.grad, factors[-1], 1e-6, REMEDY)
        if isinstance(module, Dropout) and x.device.type == "cpu":
            seed_torch(number, device)
            kept = dropout.mask(int(torch.randint(2**62, ())), 0, SHAPE, p)
            expected = torch.from_numpy(kept).double() / (1 - dropout.share(p))
            comparison.close(f"{stage}, its mask", factors[-1], expected, 1e-6, REMEDY)
    compare_masks(comparison, stage, factors, p)


# --- attention ----------------------------------------------------------------------------------------


def compare_attention(comparison: Comparison, stage: str, attention: Any, device: torch.device) -> None:
    """Compare what attention drops of its weights: values that are one for one key show each weight."""
    width, p = attention.head_dim, attention.dropout.p
    length = min(TEXT, width)
    heads, kv_heads = (ROWS, attention.n_head), (ROWS, attention.n_kv_head)
    factors = []
    for _ in range(2):
        q, k = torch.randn(*heads, length, width), torch.randn(*kv_heads, length, width)
        v = torch.eye(length, width).expand(*kv_heads, length, width).contiguous()
        given = [x.to(device).requires_grad_() for x in (q, k, v)]
        out = attention.attend(*given, None, True, attention.dropout)
        chosen = torch.randn(out.shape, device=device)
        found = torch.autograd.grad((out * chosen).sum(), given)
        exact = [x.detach().double().cpu().requires_grad_() for x in given]
        with torch.enable_grad():
            weights = weights_of_attention(exact[0], exact[1])
            factor = out.detach().double().cpu()[..., :length] / weights.detach()  # NaN where all is hidden.
            kept = torch.where(factor > 0.5, 1 / (1 - dropout.share(p)), 0.0)
            values = exact[2].repeat_interleave(q.size(1) // k.size(1), dim=1)
            expected = torch.autograd.grad((weights * kept @ values * chosen.double().cpu()).sum(), exact)
        # About twelve roundings, of sums of as many numbers as there are tokens; scores become factors.
        scores = float(
            exact[0].detach().norm(dim=-1).amax() * exact[1].detach().norm(dim=-1).amax()
        ) / math.sqrt(width)
        tolerance = 2 * STEP32 * (math.sqrt(12) + scores) * math.sqrt(length)
        for name, ours, theirs in zip(("queries", "keys", "values"), found, expected, strict=True):
            comparison.close(f"{stage}, gradient of {name}", ours, theirs, tolerance, REMEDY)
        factors.append(factor.flatten(0, 2))
    compare_masks(comparison, stage, factors, p)


def weights_of_attention(q: Tensor, k: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) of each query over itself and what is before it."""
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1)


# --- adapters -----------------------------------------------------------------------------------------


def compare_adapter(comparison: Comparison, stage: str, module: LoraLinear, p: float) -> None:
    """Compare what an adapter drops of its input x: out = x W^T + (M x) T^T, with T its change of W.

    The gradient of x, g W + M (g T), shows the mask M. The same seed gives the same mask again, so that
    outputs and the gradients of both matrices can be compared with it.
    """
    layers = [layer for layer, _ in module.active() if isinstance(layer, LowRank)]
    if len(layers) != 1:
        return
    layer, base = layers[0], cast(Any, module.base)
    dtype = weight_of(base).dtype
    before = layer.b.detach().clone()
    factors = []
    with torch.no_grad():
        layer.b.normal_(std=layer.r**-0.5 / max(1.0, abs(layer.scale)))
    try:
        for number in torch.randint(2**31, (2,)).tolist():
            derived = DerivedAdapter(module, layer)
            x = torch.randn(INPUTS, base.in_features, dtype=dtype, device=before.device, requires_grad=True)
            g = torch.randn(INPUTS, base.out_features, dtype=dtype, device=before.device)
            seed_torch(number, before.device)
            (found,) = torch.autograd.grad((module(x) * g).sum(), x)
            factor, clear = derived.factor(found, g)
            factors.append(factor.where(clear, math.nan))
            with torch.no_grad():
                x *= clear.to(x.device)  # What is not seen of the mask then decides nothing.
            kept = torch.where(factor > 0.5, 1 / (1 - dropout.share(p)), 0.0)
            seed_torch(number, before.device)
            out = module(x)
            found = [out, *torch.autograd.grad((out * g).sum(), (layer.a, layer.b))]
            for name, ours, (theirs, tolerance) in zip(
                ("output", "gradient of a", "gradient of b"), found, derived.results(x, g, kept), strict=True
            ):
                comparison.close(f"{stage}, {name}", ours, theirs, tolerance, REMEDY)
            if before.device.type == "cpu":
                seed_torch(number, before.device)
                mask = dropout.mask(int(torch.randint(2**62, ())), 0, (INPUTS, base.in_features), p)
                same = bool((torch.from_numpy(mask) == (factor > 0.5))[clear].all())
                comparison.exact(f"{stage}, its mask", same, True, REMEDY)
        compare_masks(comparison, stage, factors, p)
    finally:
        with torch.no_grad():
            layer.b.copy_(before)


class DerivedAdapter:
    """What the reference makes of a linear with one low-rank adapter.

    Attributes:
        base: Its weight without the adapter, (O, I).
        change: What the adapter adds to it, by its matrices, through which gradients go.
    """

    def __init__(self, module: LoraLinear, layer: LowRank):
        self.leaves = {id(p): p.detach().double().cpu().requires_grad_() for p in (layer.a, layer.b)}
        self.trained = [self.leaves[id(p)] for p in (layer.a, layer.b)]

        def leaf(p: Tensor) -> Tensor:
            return self.leaves.get(id(p), p.detach().double().cpu())

        module.enabled = False
        try:
            self.base = adapted(module, leaf)["weight"]
        finally:
            module.enabled = True
        whole = adapted(module, leaf)
        self.change, self.bias = whole["weight"] - self.base, whole.get("bias")
        self.step = torch.finfo(weight_of(module.base).dtype).eps

    def factor(self, found: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mask with its scale, (N, I), and where it stands out from rounding."""
        g = g.double().cpu()
        change, plain = g @ self.change.detach(), g @ self.base
        least = max(LEAST, 64 * self.step) * float(change.abs().amax() + plain.abs().amax())
        clear = change.abs() > least
        return torch.where(clear, (found.double().cpu() - plain) / change, 0.0), clear

    def results(self, x: Tensor, g: Tensor, kept: Tensor) -> list[tuple[Tensor, float]]:
        """Return the outputs, and the gradients of a and b, each with its tolerance."""
        x, g = x.detach().double().cpu(), g.double().cpu()
        out = x @ self.base.T + (kept * x) @ self.change.T
        out = out if self.bias is None else out + self.bias
        gradients = torch.autograd.grad((out * g).sum(), self.trained)
        n = max(self.base.shape)
        tolerance = 2 * (self.step + STEP32 * math.sqrt(n) / 4) * math.sqrt(12)
        return [(part.detach(), tolerance) for part in (out, *gradients)]
