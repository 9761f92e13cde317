"""Adapters put into the weights and taken out again, judged by the logits of real prompts.

report = merge_checked(model, prompts)       # or merge(model), unmerge(model)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from adapters.layers import LowRank, TrainableRows, as_linear, is_plain, weight_of
from lora import Adapted, adapters_of, base_of, held_modules, refuse_merged, wrappers
from modules.frozen_linear import FrozenLinear


@torch.no_grad()
def merge(model: nn.Module, keep: bool = True, requantise: bool = False) -> None:
    """Put the active adapters into the weights: every wrapper gives way to a plain module.

    What is added to is the weight that the adapter was trained on; where that is stored in fewer bits it is
    dequantised, and a linear of the dequantised dtype takes its place. An embedding that shared its weight
    with the head does so no longer, unless all that changed are rows of new tokens; `model.config` then says
    so.

    Args:
        model: Changed in place.
        keep: Keep the wrappers, and with them the old weights beside the new ones, for `unmerge`.
        requantise: What is stored in fewer bits is quantised again after the addition, as PEFT's `merge` does
            to a 4-bit layer. The old weights lie on the grid, and a change smaller than half a step of it is
            rounded away: judge the result, for it may be nearly the base.
    """
    refuse_merged(model)
    found = wrappers(model)
    if not any(module.active() for module in found.values()):
        raise ValueError("no adapter is active, so that there is nothing to merge; call use_adapters first")
    for name, module in found.items():
        for layer, _ in module.active():
            if not all(torch.isfinite(tensor).all() for tensor in layer.state_dict().values()):
                raise ValueError(
                    f"what changes {name} is not finite; the adapter is broken and was not merged"
                )
    was_tied = _is_tied(model)
    made: dict[tuple[Any, ...], nn.Parameter] = {}
    if keep:  # All are made before the first is put in place: if memory ends here, nothing was merged.
        merged = {name: _merged(module, made, requantise) for name, module in found.items()}
        for name, plain in merged.items():
            model.set_submodule(name, plain.train(found[name].training))
    else:
        for name in list(found):  # Each old weight goes before the next new one is made.
            module = found.pop(name)
            model.set_submodule(name, _merged(module, made, requantise).train(module.training))
    config = getattr(model, "config", None)
    if was_tied and not _is_tied(model) and is_dataclass(config) and hasattr(config, "tie_embeddings"):
        changed: Any = config
        model.config = replace(changed, tie_embeddings=False)
    if keep:
        model.__dict__["_merged"] = (found, config, _form(model))
    else:
        adapters_of(model).clear()


def _form(model: nn.Module) -> dict[str, tuple[torch.dtype, torch.device]]:
    return {name: (p.dtype, p.device) for name, p in model.named_parameters()}


def _is_tied(model: nn.Module) -> bool:
    modules = held_modules(model)
    both = [weight_of(base_of(modules[name])) for name in ("embed", "head") if name in modules]
    return len(both) == 2 and both[0] is both[1]


def _merged(module: Adapted, made: dict[tuple[Any, ...], nn.Parameter], requantise: bool) -> nn.Module:
    base = module.base
    if not module.active():
        return base
    plain = _merged_plain(module, made)
    if requantise and isinstance(base, FrozenLinear):
        return base.from_weight(weight_of(plain), plain.bias)
    return plain


def _merged_plain(module: Adapted, made: dict[tuple[Any, ...], nn.Parameter]) -> Any:
    """Return a copy of the wrapped module, plain, with what its active adapters add to its weight and bias.

    Args:
        made: The merged weights so far: modules that share a weight and its trainable rows, as a tied head
            and embedding do, share the merged one.
    """
    base, layers, whole = module.base, module.active(), module.whole()
    weight = weight_of(base)
    dtype = weight.dtype
    if whole is not None:
        return copy.deepcopy(whole).requires_grad_(False).to(dtype)
    plain = as_linear(base, weight.detach()) if not is_plain(base) else copy.copy(base)
    plain._parameters = dict(plain._parameters)  # A shallow copy shares its parameters.
    bias = module.trained_bias()
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(dtype).clone(), requires_grad=False)
    terms = [
        (layer, adapter_weight)
        for layer, adapter_weight in layers
        if isinstance(layer, LowRank | TrainableRows)
    ]
    if not terms:
        return plain
    rows_only = all(isinstance(layer, TrainableRows) for layer, _ in terms)
    key = (
        (id(weight), *((id(layer.rows), adapter_weight) for layer, adapter_weight in terms))
        if rows_only
        else (object(),)
    )
    if key not in made:
        merged = weight.detach().float().clone()
        for layer, adapter_weight in terms:
            layer.merge_into(merged, base, adapter_weight)
        made[key] = nn.Parameter(merged.to(dtype), requires_grad=False)
    plain.weight = made[key]
    return plain


def unmerge(model: nn.Module) -> None:
    """Undo `merge`, bit for bit: the wrappers with the old weights are put back.

    Raises:
        ValueError: The model is not merged, or was cast or moved since, as the old weights were not.
    """
    if "_merged" not in model.__dict__:
        raise ValueError("the model is not merged, or was merged with keep=False; there is nothing to undo")
    found, config, was = model.__dict__["_merged"]
    for name, form in _form(model).items():
        if was.get(name, form) != form:
            old, now = (
                f"{str(dtype).removeprefix('torch.')} on {device}" for dtype, device in (was[name], form)
            )
            raise ValueError(
                f"{name} was {old} when the adapters were merged and is {now} now; cast or move it back first"
            )
    del model.__dict__["_merged"]
    for name, module in found.items():
        model.set_submodule(name, module.train(model.training))
    if config is not None:
        model.config = config


@dataclass(frozen=True)
class MergeReport:
    """How far merged weights are from the adapter beside its base, over the prompts' tokens."""

    gap: float  # the largest difference of two logits
    agreement: float  # fraction of tokens after which both choose the same next token
    tokens: int

    def __str__(self) -> str:
        return (
            f"merged: largest logit gap {self.gap:.2e}, greedy agreement {self.agreement:.2%} "
            f"over {self.tokens} tokens"
        )


@torch.no_grad()
def merge_report(
    adapted: Callable[[Tensor], Tensor],
    merged: Callable[[Tensor], Tensor],
    prompts: Sequence[Sequence[int]],
    tolerance: float = 0.01,
    device: torch.device | str = "cpu",
) -> MergeReport:
    """Compare an adapter beside the base it was trained on with merged weights, by real prompts.

    Args:
        adapted: ids (1, T) -> logits (1, T, V); asked for all prompts before `merged` is asked for any.
        merged: The same of the merged weights.
        prompts: Token ids.
        tolerance: The largest logit gap that passes. In fp32 a right merge stays below 1e-3; bf16 weights
            are rounded when they are merged, which takes about 0.1.
        device: Where the ids are put.

    Raises:
        ValueError: `merged-differs`, the gap is larger or not a number.
    """
    if not any(len(prompt) for prompt in prompts):
        raise ValueError("a merge is judged by prompts, and none was given")
    ids = [torch.tensor([list(prompt)], device=device) for prompt in prompts if len(prompt)]
    before = [adapted(tokens).float() for tokens in ids]
    after = [merged(tokens).float() for tokens in ids]
    gap, same, tokens = 0.0, 0, 0
    for old, new in zip(before, after, strict=True):
        gap = max(gap, float((old - new).abs().max().nan_to_num(nan=math.inf)))
        same += int((old.argmax(-1) == new.argmax(-1)).sum())
        tokens += old.size(1)
    report = MergeReport(gap, same / tokens, tokens)
    if not gap <= tolerance:
        raise ValueError(
            f"merged-differs: the largest logit gap is {gap:.3g}, at most {tolerance:g} is allowed, and the "
            f"greedy choice agrees after {report.agreement:.1%} of {tokens} tokens; merge into the weights "
            "that the adapter was trained on, in the format they had then"
        )
    return report


def merge_checked(
    model: nn.Module, prompts: Sequence[Sequence[int]], tolerance: float = 0.01, keep: bool = True
) -> MergeReport:
    """Merge, and judge it by `merge_report`; above the tolerance it is undone and a ValueError raised."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()

    def merged(tokens: Tensor) -> Tensor:
        if wrappers(model):
            merge(model)
        return model(tokens)

    try:
        report = merge_report(model, merged, prompts, tolerance, device)
    except ValueError:
        if "_merged" in model.__dict__:
            unmerge(model)
        raise
    finally:
        model.train(was_training)
    if not keep:
        del model.__dict__["_merged"]
        adapters_of(model).clear()
    return report
