"""Comparison of what is in memory with a checkpoint's files, as the reference reads them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guards.reference.comparison import Comparison
from guards.reference.rehearsal import trainable
from guards.subject import GuardSubject
from reference import checkpoints

REMEDY = "what saving and loading do with a checkpoint"


def compare_stored(subject: GuardSubject, comparison: Comparison, folder: Path) -> Any:
    """Compare weights, moments and counters with the files of a checkpoint, bit for bit; return its state.

    The state of an optimizer is stored by the place of each parameter in its groups, one after another.
    """
    stored = checkpoints.tensors_of(folder / "model.safetensors")
    names = {id(p): name for name, p in trainable(subject.model).items()}
    for name, p in trainable(subject.model).items():
        exact(comparison, f"{name} as stored in {folder.name}", p, stored.get(name))
    state = checkpoints.state_of(folder)
    for optimizer, own in zip(subject.optimizers, state["optimizers"], strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for place, p in enumerate(parameters):
            kept, known = own["state"].get(place, {}), optimizer.state.get(p, {})
            for key in sorted({*kept, *known}):
                stage = f"{key} of {names[id(p)]} as stored in {folder.name}"
                exact(comparison, stage, known.get(key), kept.get(key))
    expected = state["run"] | {"best_loss": float(state["run"]["best_loss"])}
    stage = f"counters as stored in {folder.name}"
    comparison.exact(stage, dataclasses.asdict(subject.state), expected, REMEDY)
    return state


def exact(comparison: Comparison, stage: str, found: Tensor | None, expected: Tensor | None) -> None:
    """Compare two tensors bit for bit; None is one that is not there."""
    if found is None or expected is None:
        comparison.exact(stage, found is not None, expected is not None, REMEDY)
        return
    comparison.close(stage, torch.as_tensor(found), torch.as_tensor(expected), 0.0, REMEDY)
