"""The weights of the run's model as the reference takes them: in fp64, by name, adapters included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from adapters.layers import FullCopy, TrainableRows, weight_of
from architecture import Decoder
from config import ModelConfig
from lora import Adapted
from modules.frozen_linear import FrozenLinear
from reference.adapters import effective, with_rows


def config_of(model: Decoder, config: ModelConfig) -> ModelConfig:
    """Return the settings of the blocks that the model has now, with the head's weight under its own name.

    A large model may have lent some of its blocks (`guards.subject.shortened`).
    """
    windows = tuple(i for i, block in enumerate(model.blocks) if block.get_submodule("attention").has_window)
    still = tuple(i for i, b in enumerate(model.blocks) if not b.get_submodule("attention").is_rotated)
    if len(model.blocks) < config.n_layer:
        window = config.sliding_window if windows else 0
        config = replace(config, sliding_window=window, window_layers=windows if window else ())
        config = replace(config, unrotated_layers=still)
    return replace(config, n_layer=len(model.blocks), tie_embeddings=False)


def weights_of(model: Decoder, leaves: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Return every weight by the name that it has in a model without adapters.

    Args:
        leaves: By the id of a parameter the fp64 tensor that stands for it; others are taken as they are.
    """

    def leaf(p: Tensor) -> Tensor:
        return leaves.get(id(p), p.detach().double().cpu())

    found: dict[str, Tensor] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, Adapted):
            inside += (f"{name}.",)
            found |= {f"{name}.{part}": value for part, value in adapted(module, leaf).items()}
            continue
        for part, p in module.named_parameters(recurse=False):
            found[f"{name}.{part}"] = leaf(p)
        if isinstance(module, FrozenLinear):
            found[f"{name}.weight"] = weight_of(module).detach().double().cpu()
    return found


def adapted(module: Any, leaf: Any) -> dict[str, Tensor]:
    """Return weight and bias of a module with an adapter."""
    base = module.base
    found = {name: leaf(p) for name, p in base.named_parameters(recurse=False)}
    if isinstance(base, FrozenLinear):
        found["weight"] = weight_of(base).detach().double().cpu()
    for layer, _ in module.active():
        bias = getattr(layer, "bias", None)
        if isinstance(layer, FullCopy):
            found = {name: leaf(p) for name, p in layer.copy.named_parameters(recurse=False)}
        elif isinstance(layer, TrainableRows):
            found["weight"] = with_rows(found["weight"], layer.ids.cpu(), leaf(layer.rows))
        elif hasattr(layer, "a"):
            found["weight"] = _low_rank(found["weight"], layer, leaf)
        if bias is not None:
            found["bias"] = leaf(bias)
    return found


def _low_rank(weight: Tensor, layer: Any, leaf: Any) -> Tensor:
    """Return what a low-rank term makes of a weight (O, I), or of an embedding's (V, C)."""
    start = None if layer.start_a is None else (leaf(layer.start_a), leaf(layer.start_b))
    magnitude = None if layer.magnitude is None else leaf(layer.magnitude)
    whole = weight.T if layer.of_embedding else weight
    changed = effective(whole, leaf(layer.a), leaf(layer.b), layer.scale, start, magnitude)
    return changed.T if layer.of_embedding else changed
