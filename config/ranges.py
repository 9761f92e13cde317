"""The range of each number among the settings."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Literal

_LARGEST = {int: 2**63 - 1, float: sys.float_info.max}
# Key: least, most, and which of the two is itself refused. None is no bound but the type's own. Bounds that
# depend on several keys are in ModelConfig.resolved. The model's upper bounds refuse what fits no machine.
RANGES: dict[str, tuple[float | None, float | None, Literal["", "above", "below"]]] = {
    "seed": (0, None, ""),
    "row_length": (0, 2**24, ""),
    "batch_size": (1, None, ""),
    "accumulation": (1, None, ""),
    "max_seconds": (0, None, ""),
    "max_steps": (0, None, ""),
    "max_epochs": (0, None, ""),
    "validate_every": (0, None, ""),
    "validation_rows": (1, None, ""),
    "patience": (0, None, ""),
    "save_every": (0, None, ""),
    "keep": (0, None, ""),
    "log_every": (1, None, ""),
    "samples": (0, None, ""),
    "data.validation_one_in": (0, None, ""),
    "data.test_one_in": (0, None, ""),
    "data.fim_rate": (0, 1, ""),
    "data.cache_gb": (0, None, ""),
    "data.workers": (0, None, ""),
    "tokenizer.vocab_size": (1, 2**24, ""),
    "tokenizer.min_count": (0, None, ""),
    "model.vocab_size": (0, 2**24, ""),
    "model.block_size": (2, 2**24, ""),
    "model.n_layer": (1, 10_000, ""),
    "model.n_head": (1, 2**20, ""),
    "model.n_embd": (1, 2**20, ""),
    "model.head_dim": (0, 2**20, ""),
    "model.n_inner": (0, 2**22, ""),
    "model.rope_theta": (0, None, "above"),
    "model.rope_context": (0, 2**32, ""),
    "model.sliding_window": (0, 2**32, ""),
    "lora.r": (0, 2**16, ""),
    "lora.alpha": (0, None, "above"),
    "lora.dropout": (0, 1, "below"),
    "lora.lr_ratio": (0, None, "above"),
    "optimizer.lr": (0, None, ""),
    "optimizer.muon_lr": (0, None, ""),
    "optimizer.embedding_lr": (0, None, ""),
    "optimizer.head_lr": (0, None, ""),
    "optimizer.weight_decay": (0, None, ""),
    "optimizer.beta1": (0, 1, "below"),
    "optimizer.beta2": (0, 1, "below"),
    "optimizer.eps": (0, None, "above"),
    "optimizer.grad_clip": (0, None, ""),
    "optimizer.warmup_steps": (0, None, ""),
    "optimizer.cooldown": (0, 1, ""),
    "optimizer.min_lr_factor": (0, 1, ""),
    "optimizer.label_smoothing": (0, 1, "below"),
    "optimizer.z_loss": (0, None, ""),
}


def refuse_out_of_range(values: Mapping[str, Any]) -> None:
    """Raise ValueError, in one sentence, for a number outside RANGES; `values` by full key."""
    for key, value in values.items():
        if type(value) not in _LARGEST:
            continue
        largest = _LARGEST[type(value)]
        least, most, refused = RANGES.get(key, (None, None, ""))
        if not abs(value) <= largest:  # NaN too
            bound = "finite" if isinstance(value, float) else f"at most {largest}"
        elif least is not None and (value < least or (refused == "above" and value == least)):
            bound = f"{'above' if refused == 'above' else 'at least'} {least}"
        elif most is not None and (value > most or (refused == "below" and value == most)):
            bound = f"{'below' if refused == 'below' else 'at most'} {most}"
        else:
            continue
        raise ValueError(f"{key} is {value}; it must be {bound}")
