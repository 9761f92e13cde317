"""The generators of random numbers that a run uses: seeded, saved and restored."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, numpy's global generator, which takes 32 bits, and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_torch(number: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of the run's device.

    `torch.manual_seed` formats the stack for each kind of device that is not there: up to 0.7 ms a call.
    """
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def seed_pass(seed: int, update: int, row: int, device: torch.device) -> None:
    """Seed a training pass, whose dropout is then the same wherever and after whatever it is made.

    Args:
        seed: The run's.
        update: The updates before this one.
        row: The place, among the rows of the update, of the first row of the pass.
    """
    words = np.random.SeedSequence([seed, update, row]).generate_state(1, np.uint64)
    seed_torch(int(words[0]), device)


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the states of all that `seed_everything` seeds, as tensors and plain values."""
    version, words, gauss = random.getstate()
    numpy_state = dict(np.random.get_state(legacy=False))
    inner = dict(numpy_state["state"])
    return {
        "python": [version, torch.tensor(words), gauss],
        "numpy": numpy_state | {"state": inner | {"key": torch.from_numpy(inner["key"].astype(np.int64))}},
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
    }


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Restore what `random_states` returned, as far as it is of the CPU and of this device."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    inner = states["numpy"]["state"]
    key = inner["key"].numpy().astype(np.uint32)
    np.random.set_state(states["numpy"] | {"state": inner | {"key": key}})
    torch.set_rng_state(states["torch"])
    gpu = gpu_state(states, device)
    if gpu is not None:
        torch.cuda.set_rng_state(gpu, device)


def gpu_state(states: dict[str, Any], device: torch.device) -> torch.Tensor | None:
    """Return the GPU's state of what `random_states` returned; None where the device or the run had none.

    Older checkpoints hold the state of every GPU that was visible, in their order, and not that of the run's
    own alone. How many are visible now does not matter.
    """
    found, index = states["cuda"], device.index or 0
    if device.type != "cuda" or not found:
        return None
    return found[index if index < len(found) else 0]
