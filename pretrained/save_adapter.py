"""An adapter of a model as a folder that Hugging Face PEFT opens: the inverse of `load_adapter.py`.

    save_adapter(model, family, "out/adapter", base="bigcode/starcoderbase-1b")

The tensors are written in fp32.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters.layers import AdapterLayer, FullCopy, LowRank, TrainableRows, is_embedding, is_linear
from adapters.targets import as_peft_pattern
from config import LoraConfig, write_atomically
from lora import adapter_layers, adapters_of, held_modules, wrappers
from modules.tensorfiles import save_tensors
from pretrained.family import Family
from pretrained.load_adapter import ADAPTER_CONFIG, PREFIX, WEIGHTS, pair_suffixes
from pretrained.save import _json, refuse_full

# PEFT saves the weights of these two beside their adapters, where they are targets by this very name.
EMBEDDING_NAMES = ("embed_tokens", "lm_head")


def save_adapter(
    model: nn.Module,
    family: Family,
    folder: str | Path,
    base: str | None,
    revision: str | None = None,
    name: str = "default",
    complete: Callable[[Path], object] | None = None,
) -> None:
    """Write one adapter of the model; the folder appears whole.

    A PiSSA start is written as part of the adapter, of twice the rank, so that it is an ordinary one on the
    base as published. Rows of new tokens are written as `trainable_token_indices`, but as pairs of their own
    rank where those mean something else in PEFT: under a head with a bias, which it then leaves out, and
    beside a tied head that is a target, whose rows it then replaces.

    A pair is a change of a weight that whoever opens the folder has. Where the model's vocabulary was grown,
    nobody has the rows that were added; so embedding and head are then written whole beside their pairs,
    where PEFT looks for them (in StarCoderBase-1B 400 MB, twice where both are targets). PEFT wants its base
    resized beforehand, to any values. It writes both by itself where it knows them by name.

    Args:
        model: With the adapter added, and not merged.
        family: Whose names the adapter is written in.
        folder: A new or empty one.
        base: Folder or hub id that the adapter belongs to.
        revision: Its commit, where it has one.
        name: The adapter's name.
        complete: Called with the folder before it gets its name, to write more into it or to refuse it: an
            error that it raises leaves nothing.

    Raises:
        ValueError: There is no such adapter, or the folder is not empty.
    """
    folder = Path(folder)
    if name not in adapters_of(model):
        known = ", ".join(adapters_of(model)) or "none"
        raise ValueError(f"there is no adapter {name!r} to save; the model has {known}")
    layers = adapter_layers(model, name)
    if not layers:
        raise ValueError("the model's adapters are merged into its weights; call unmerge before saving one")
    refuse_full(folder)
    values, tensors = _written(model, family, name, layers)
    values |= {"base_model_name_or_path": base, "revision": revision}
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_tensors({key: tensor.float().clone() for key, tensor in tensors.items()}, temporary / WEIGHTS)
        write_atomically(temporary / ADAPTER_CONFIG, _json(values))
        if complete is not None:
            complete(temporary)
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _written(
    model: nn.Module, family: Family, name: str, layers: Mapping[str, AdapterLayer]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the values of adapter_config.json, without the base, and the tensors."""
    config, modules = adapters_of(model)[name].config, held_modules(model)
    names = {our: family.key(our) for our in modules}
    bases: dict[str, Any] = {our: wrapper.base for our, wrapper in wrappers(model).items()}
    doubled = any(isinstance(c, LowRank) and c.start_a is not None for c in layers.values())
    tied = "embed" in bases and "head" in bases and bases["embed"].weight is bases["head"].weight
    as_pairs = "head" in bases and bases["head"].bias is not None
    as_pairs = as_pairs or (tied and isinstance(layers.get("head"), LowRank))
    tied_rows = getattr(layers.get("embed"), "rows", None)

    tensors: dict[str, Tensor] = {}
    targets, whole, rows = [], [], {}
    for our, layer in layers.items():
        full, key = names[our], PREFIX + names[our]
        bias = getattr(layer, "bias", None)
        if isinstance(layer, FullCopy):
            whole.append(full)
            tensors |= {f"{key}.{part}": tensor for part, tensor in layer.copy.state_dict().items()}
        elif isinstance(layer, LowRank):
            targets.append(full)
            a, b = layer.factors()
            if doubled and layer.start_a is None:  # An embedding has no such start.
                a, b = torch.cat((a, torch.zeros_like(a))), torch.cat((b, torch.zeros_like(b)), dim=1)
            tensors |= _pair(key, a, b, layer.magnitude, layer.of_embedding)
        elif isinstance(layer, TrainableRows) and as_pairs:
            targets.append(full)
            tensors |= _row_pair(key, layer, bases[our], config.dora)
            if config.bias != "none" and bias is None:
                bias = getattr(bases[our], "bias", None)
        elif isinstance(layer, TrainableRows) and (
            our == "embed" or layer.rows is not tied_rows
        ):  # tied, once
            rows[full.rsplit(".", 1)[-1]] = layer.ids.tolist()
            tensors[f"{key}.token_adapter.trainable_tokens_delta"] = layer.rows
        if bias is not None:
            bias_key = f"{key}.base_layer.bias" if full in targets else f"{key}.bias"
            tensors[bias_key] = bias
    row_pairs = {
        names[our]: len(c.ids) for our, c in layers.items() if as_pairs and isinstance(c, TrainableRows)
    }
    patterns = _patterns(config, doubled, [full for full in targets if full not in row_pairs], row_pairs)

    able = [names[our] for our, m in modules.items() if is_linear(m) or is_embedding(m)]
    chosen = _leaves([full for full in able if full not in whole], targets)
    if getattr(model, "grown", False) or (not rows and any(leaf in chosen for leaf in EMBEDDING_NAMES)):
        for our in ("embed", "head"):
            if names[our] in targets:
                for part, tensor in bases[our].state_dict().items():
                    tensors.setdefault(f"{PREFIX}{names[our]}.base_layer.{part}", tensor)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        **patterns,
        "lora_dropout": config.dropout,
        "target_modules": chosen,
        "bias": config.bias,
        "modules_to_save": [_suffix(full, list(names.values())) for full in whole] or None,
        "trainable_token_indices": rows or None,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }, tensors


def _patterns(
    config: LoraConfig, doubled: bool, chosen: list[str], row_pairs: Mapping[str, int]
) -> dict[str, Any]:
    """Return rank and alpha, and those of single modules; a pair of n rows has rank n and scale 1."""
    times = 2 if doubled else 1
    alpha_times = math.sqrt(times) if config.rslora else times
    ranks = {key: r * times for key, r in config.rank_pattern.items()}
    alphas = {key: _number(alpha * alpha_times) for key, alpha in config.alpha_pattern.items()}
    row_alphas = {full: _number(math.sqrt(n) if config.rslora else n) for full, n in row_pairs.items()}
    return {
        "r": config.r * times,
        "lora_alpha": _number(config.alpha * alpha_times),
        "rank_pattern": as_peft_pattern(ranks, chosen, row_pairs),
        "alpha_pattern": as_peft_pattern(alphas, chosen, row_alphas),
    }


def _pair(key: str, a: Tensor, b: Tensor, magnitude: Tensor | None, of_embedding: bool) -> dict[str, Tensor]:
    suffixes = pair_suffixes(of_embedding)
    pair = {f"{key}.{suffixes[0]}": a, f"{key}.{suffixes[1]}": b}
    return pair if magnitude is None else pair | {f"{key}.lora_magnitude_vector": magnitude}


def _row_pair(key: str, layer: TrainableRows, base: Any, dora: bool) -> dict[str, Tensor]:
    """Return n rows as a low-rank pair of rank n, one factor of which picks them."""
    ids, of_embedding = layer.ids.cpu(), is_embedding(base)
    picks = torch.zeros(len(ids), len(layer.slots))
    picks[torch.arange(len(ids)), ids] = 1
    delta = layer.delta().detach().cpu()
    a, b = (picks, delta.t()) if of_embedding else (delta, picks.t())
    magnitude = None
    if dora:
        weight = base.weight.detach().float().cpu() + ((b @ a).t() if of_embedding else b @ a)
        magnitude = torch.linalg.vector_norm(weight, dim=0 if of_embedding else 1)
    return _pair(key, a, b, magnitude, of_embedding)


def _number(value: float) -> float:
    return int(value) if value == int(value) else value


def _leaves(able: list[str], chosen: list[str]) -> list[str]:
    """Return the last parts of the names, where they mean exactly these modules; else the whole names."""
    leaves = list(dict.fromkeys(full.rsplit(".", 1)[-1] for full in chosen))
    meant = {full for full in able if full.rsplit(".", 1)[-1] in leaves}
    return leaves if meant == set(chosen) else chosen


def _suffix(full: str, names: list[str]) -> str:
    """Return the last part, if no other name ends in it: PEFT compares ends of names, not parts."""
    leaf = full.rsplit(".", 1)[-1]
    return leaf if [other for other in names if other.endswith(leaf)] == [full] else full
