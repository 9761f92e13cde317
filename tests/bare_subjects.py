"""The subject of a guard without a run: a model, and the functions by which a run would call it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from architecture import Decoder
from config import Config, LoraConfig, ModelConfig, OptimizerConfig
from modules.precision import Precision
from training.loss import score, token_loss


def bare_subject(
    model: Decoder,
    lora: LoraConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    dtype: torch.dtype = torch.float32,
    eval_dtype: torch.dtype | None = None,
    **changes: Any,
) -> Any:
    """Return what `guards.reference` reads of a `GuardSubject`, for a model that no run has made."""
    precision = Precision(torch.device("cpu"), dtype, "a test")
    eval_precision = Precision(torch.device("cpu"), eval_dtype or dtype, "a test")
    config = Config(model=model.config, lora=lora or LoraConfig(), optimizer=optimizer or OptimizerConfig())

    def loss(batch: Any) -> Any:
        with precision.autocast():
            own = config.optimizer
            return token_loss(model, batch, own.label_smoothing, own.z_loss)

    return SimpleNamespace(
        config=config,
        model=model,
        precision=precision,
        eval_precision=eval_precision,
        loss=loss,
        score=lambda batches: score(model, batches, eval_precision),
        **({"start": "fresh", "base_folder": None, "checkpoint": None, "tokenizer": None} | changes),
    )


def decoder(**settings: Any) -> Decoder:
    """Return a small model; the settings are those of `ModelConfig`."""
    small: dict[str, Any] = {"vocab_size": 61, "block_size": 64, "n_layer": 2}
    small |= {"n_head": 4, "n_embd": 32, "n_inner": 48}
    return Decoder(ModelConfig(**(small | settings)))
