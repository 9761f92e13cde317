"""Checkpoints as files: what a folder `step-N` holds (docs/file-formats.md).

model.safetensors      the parameters that train, tied ones once
state.safetensors      the tensors of optimizers and random states, each under its path
state.json             the rest of the state, with `{"tensor": path}` where a tensor belongs, and
                       `order_version`, how rows are dealt to updates
manifest.json          step and validation loss
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from reference.scores import best_of


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Return every tensor of a safetensors file by its name."""
    with safe_open(path, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def state_of(folder: Path) -> Any:
    """Return the state of a checkpoint: counters, optimizers and random states, as nested dicts and lists."""
    tensors = tensors_of(folder / "state.safetensors")
    return _nested(json.loads((folder / "state.json").read_text("utf-8")), tensors)


def order_version_of(folder: Path) -> int:
    """Return the version of the order of rows that a checkpoint's run has; the first one is not written."""
    return dict(json.loads((folder / "state.json").read_text("utf-8"))["dict"]).get("order_version", 1)


def _nested(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return a value of state.json: `{"dict": [[key, value], ...]}`, a list, a tensor or a scalar."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "list" in value:
        return [_nested(item, tensors) for item in value["list"]]
    return {key: _nested(item, tensors) for key, item in value["dict"]}


def manifest_of(folder: Path) -> dict[str, Any]:
    """Return what manifest.json says of a checkpoint."""
    return json.loads((folder / "manifest.json").read_text("utf-8"))


def kept(there: Mapping[int, dict[str, Any]], keep: int) -> set[int]:
    """Return the steps that stay of those that are there: the last, the best, and those to be kept.

    Args:
        there: The manifest of each step.
        keep: How many of those to be kept stay, the newest ones; 0 keeps all.
    """
    marked = sorted(step for step, manifest in there.items() if manifest["keep"])
    best = best_of((step, manifest["loss"]) for step, manifest in there.items())
    return {max(there), *marked[-keep:], *([] if best is None else [best])}


def folder_of(checkpoints: Path, step: int) -> Path | None:
    """Return the newest folder of a step: `step-N`, or the `step-N.G` with the largest number behind it."""
    found = {
        int(path.name.partition(".")[2] or 0): path
        for path in checkpoints.glob("step-*")
        if int(path.name.removeprefix("step-").partition(".")[0]) == step
    }
    return found[max(found)] if found else None
