"""The model that is evaluated: that of a run, with the data it was trained on, or a published one."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from architecture import Decoder
from config import DataConfig
from dataset import PreparedData, prepare_data
from modules.precision import Precision
from pretrained import load_pretrained
from suites.settings import EvalConfig
from tokenizer import Tokenizer
from training.run import TrainedRun, open_adapted

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class EvaluatedModel:
    """The model that is evaluated.

    Args:
        length: Tokens of a row of held-out files, as in training.
        adapted: Whether it has adapters, so that its base is scored too.
        weights: The fingerprint of all of its weights.
    """

    model: Decoder
    tokenizer: Tokenizer
    length: int
    adapted: bool
    weights: str
    precision: Precision


def data_of(run: TrainedRun, settings: EvalConfig) -> PreparedData:
    """Open the run's data; ValueError if they are not those that it was trained on."""
    config = data_config(run, settings)
    data = prepare_data(config, run.tokenizer)
    if data.fingerprint != run.fingerprints["data"]:
        raise ValueError(
            f"the data of {config.source} have fingerprint {data.fingerprint[:12]}, and those of "
            f"{run.folder} had {run.fingerprints['data'][:12]}, so files held out now may have been trained "
            "on: restore the files (for stdlib, use the same Python), say with --source where they are now, "
            "or train a new run"
        )
    return data


def data_config(run: TrainedRun, settings: EvalConfig) -> DataConfig:
    """Return the settings of the run's data: where they are read now, and this machine's cache."""
    source = run.config.data.source if settings.source is None else settings.source
    # The run may be a stranger's: its config does not say where this machine writes, what it removes there,
    # nor how busy it gets.
    return dataclasses.replace(
        run.config.data, source=source, cache=settings.cache, cache_gb=0.0, workers=DataConfig.workers
    )


def open_published(source: str, adapter: str | None, precision: Precision) -> EvaluatedModel:
    """Open a model of a folder or the hub, with an adapter if one is named.

    Raises:
        ValueError: It cannot be opened, or has no tokenizer, or that of another model.
    """
    if (Path(source) / "config.yaml").is_file():
        raise ValueError(f"{source} is a run; give it as --run")
    if adapter is not None:
        found = open_adapted(source, adapter, device=precision.device)
        files = [Path(adapter) / name for name in ADAPTER_FILES]
        weights = (
            hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest() + found.fingerprint
        )
    else:
        dtype = torch.bfloat16 if precision.dtype == torch.bfloat16 else torch.float32
        found = load_pretrained(source, dtype, precision.device)
        weights = found.fingerprint
    if found.tokenizer is None:
        raise ValueError(f"{source} has no tokenizer; put the tokenizer.json of the model beside its weights")
    model = found.model.to(precision.device)
    return EvaluatedModel(
        model, found.tokenizer, model.config.block_size, adapter is not None, weights, precision
    )


def published_name(source: str, adapter: str | None) -> str:
    """Return the name of the folder for a published model's scores."""
    named = source if not Path(source).exists() else Path(source).resolve().name
    name = named.strip("/").replace("/", "--")
    return name if adapter is None else f"{name}+{Path(adapter).resolve().name}"
