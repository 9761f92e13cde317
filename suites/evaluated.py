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
from modules.products import speed_up
from modules.quantized_linear import INTEGERS, hold
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
    data = run.config.data
    source = data.source if settings.source is None else settings.source
    # The run may be a stranger's: its config does not say where this machine writes, what it removes there,
    # nor how busy it gets.
    store = data.store if source == data.source else None
    return dataclasses.replace(
        data, source=source, store=store, cache=settings.cache, cache_gb=0.0, workers=DataConfig.workers
    )


def made_fast(model: Decoder, held: str, precision: Precision) -> Decoder:
    """Return the model with the fastest products, in bf16 where it is held as integers and computed so."""
    if held in INTEGERS and precision.dtype == torch.bfloat16:
        model.bfloat16()
    if precision.device.type == "cpu":
        speed_up(model)
    return model


def weights_held(fingerprint: str, held: str) -> str:
    """Return the fingerprint of weights as they are held."""
    return fingerprint if held == "full" else hashlib.sha256(f"{fingerprint} {held}".encode()).hexdigest()


def open_published(settings: EvalConfig, precision: Precision) -> EvaluatedModel:
    """Open a model of a folder or the hub, with an adapter if one is named.

    Raises:
        ValueError: It cannot be opened, or has no tokenizer, or that of another model.
    """
    source, adapter = settings.model, settings.adapter
    assert source is not None
    if (Path(source) / "config.yaml").is_file():
        raise ValueError(f"{source} is a run; give it as --run")
    if adapter is not None:
        found = open_adapted(source, adapter, device=precision.device)
        files = [Path(adapter) / name for name in ADAPTER_FILES]
        weights = (
            hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest() + found.fingerprint
        )
    else:
        is_bf16 = precision.dtype == torch.bfloat16 and settings.held not in INTEGERS
        dtype = torch.bfloat16 if is_bf16 else torch.float32
        weight_format = None if settings.held == "full" else settings.held
        found = load_pretrained(source, dtype, precision.device, weight_format=weight_format)
        hold(found.model, weight_format)
        weights = weights_held(found.fingerprint, settings.held)
    if found.tokenizer is None:
        raise ValueError(f"{source} has no tokenizer; put the tokenizer.json of the model beside its weights")
    model = made_fast(found.model.to(precision.device), settings.held, precision)
    return EvaluatedModel(
        model, found.tokenizer, model.config.block_size, adapter is not None, weights, precision
    )


def published_name(settings: EvalConfig) -> str:
    """Return the name of the folder for a published model's scores."""
    source, adapter = settings.model or "", settings.adapter
    named = source if not Path(source).exists() else Path(source).resolve().name
    name = named.strip("/").replace("/", "--")
    name += "" if settings.held == "full" else f"-{settings.held}"
    return name if adapter is None else f"{name}+{Path(adapter).resolve().name}"
