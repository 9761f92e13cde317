"""Comparison of a model that a command opens with its files, and of how it generates, at its first use.

    consult(Opened(place, model, tokenizer), prompts, allowed, cache)

The weights must be those of the files, as the reference's own reader finds them, and the engine must generate
what the reference does without a cache. That both agree is remembered in the cache by the names,
sizes and times of the model's files and by the code, so that a second use costs nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from architecture import Decoder
from config import LoraConfig, write_atomically
from config.files import code_fingerprint
from generation.settings import ExaminedConfig, OpeningConfig
from guards.faults import Fault, refuse_unknown_faults
from guards.reference import generation
from guards.reference.comparison import Comparison, Differs
from guards.reference.effective import config_of, weights_of
from guards.reference.exported import OpenedModel, compare_weights
from guards.reference.observed import RunWeights
from guards.reference.weights import compare_settings
from lora import adapters_of
from modules.frozen_linear import FrozenLinear
from reference import checkpoints, scores
from reference.published import PUBLISHED
from reference.published_settings import settings_of
from tokenizer import Tokenizer
from training.checkpoint import read_manifest, verify

REMEDY = "look at how the files are read"
FOLDER = "second-opinions"  # Of the cache: a file for each model that agreed.


@dataclass(frozen=True)
class Opened:
    """A model that a command has opened.

    Args:
        place: The run, checkpoint or folder of a published model; a hub id has no files to compare.
        which: The checkpoint of a run: `best` or `last`.
        adapter: The folder of an adapter on a published model; "" for none.
    """

    place: Path
    model: Decoder
    tokenizer: Tokenizer
    which: str = "best"
    adapter: str = ""

    @property
    def files(self) -> list[Path]:
        place = self.place.parent.parent if self.place.parent.name == "checkpoints" else self.place
        folders = [place / name for name in OF_A_RUN] if (place / "config.yaml").is_file() else [place]
        folders += [Path(self.adapter)] if self.adapter else []
        found = (path for folder in folders for path in (folder, *folder.rglob("*")))
        return sorted(path for path in found if path.suffix in SUFFIXES)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the code, of the names, sizes and times of the files, and of how the model is held."""
        first = next(self.model.parameters())
        held = sorted({type(module).__name__ for module in self.model.modules()})
        known: list[Any] = [code_fingerprint(), str(self.place.resolve()), self.which, self.adapter]
        known += [str(first.dtype), first.device.type, torch.__version__, held]
        for path in self.files:
            found = path.stat()
            known.append((str(path), found.st_size, found.st_mtime_ns))
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()


OF_A_RUN = ("config.yaml", "tokenizer", "checkpoints")  # Scores may be added beside them.
SUFFIXES = {".safetensors", ".json", ".yaml", ".model", ".txt", ".bin"}


def consult(opened: Opened, prompts: Sequence[str], allowed: Collection[str], cache: str) -> None:
    """Compare a model at its first use, and print that both agree.

    Args:
        prompts: Texts whose ends are tried.
        allowed: Names of faults that may pass.
        cache: The folder in which agreement is remembered; one that cannot be written remembers nothing.

    Raises:
        Fault: They differ.
    """
    refuse_unknown_faults(allowed)
    known = Path(cache) / FOLDER / f"{opened.fingerprint}.json"
    if known.is_file():
        return
    comparison, started = Comparison(), time.perf_counter()
    try:
        with torch.random.fork_rng([]), torch.no_grad():
            compare_opened(opened, prompts, comparison)
    except Differs as difference:
        evidence = comparison.evidence(difference)
        fault = Fault("differs-from-reference", evidence, difference.remedy, "use it")
        if fault.name not in allowed:
            raise fault from None
        print(f"ALLOWED {fault.name}: {fault.evidence}", file=sys.stderr)
        return
    agrees = [f"a second opinion agrees: {comparison.summary()}"] if comparison.stages else []
    said = "; ".join([*comparison.left_out, *agrees])
    seconds = time.perf_counter() - started
    print(f"preflight, first use: {said} ({seconds:.1f} s)", file=sys.stderr)
    with contextlib.suppress(OSError):
        known.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(known, json.dumps({"model": str(opened.place), "said": said}, indent=1))


def compare_opened(opened: Opened, prompts: Sequence[str], comparison: Comparison) -> None:
    """Compare the weights with the files, and then what the engine generates."""
    model = opened.model
    if not all(bool(p.sum().isfinite()) for p in model.parameters() if p.is_floating_point()):
        comparison.leave_out("the model", "its weights are not all finite")
        return
    compare_files(opened, comparison)
    comparison.begin("generation")
    texts = [SimpleNamespace(text=text) for text in prompts]
    config = config_of(model, model.config)
    generating = generation.Generating(model, config, opened.tokenizer if texts else None, texts, True)
    generation.compare_model(generating, comparison, lambda: weights_of(model, {}))


def examine(settings: ExaminedConfig, model: Decoder, tokenizer: Tokenizer, prompts: list[str]) -> None:
    """Consult the reference as a command line says."""
    adapter = settings.adapter if isinstance(settings, OpeningConfig) else ""
    opened = Opened(Path(settings.model), model, tokenizer, settings.which, adapter)
    consult(opened, prompts, settings.allow, settings.cache)


# --- weights ------------------------------------------------------------------------------------------


def compare_files(opened: Opened, comparison: Comparison) -> None:
    """Compare the weights with those of the model's files."""
    comparison.begin("weights")
    if not opened.place.is_dir():
        comparison.leave_out("the weights", f"{opened.place} is no folder here")
    elif (opened.place / "config.json").is_file():
        compare_published(opened, comparison)
    else:
        compare_run(opened, comparison)


def compare_published(opened: Opened, comparison: Comparison) -> None:
    """Compare a published model with its folder: the settings, and each weight or a sample of it."""
    model, folder = opened.model, opened.place
    if opened.adapter or any(isinstance(m, FrozenLinear) for m in model.modules()):
        comparison.leave_out("the weights", "an adapter or another weight format changes them")
        return
    try:
        settings, files = settings_of(folder), PublishedModel(folder, model)
    except FileNotFoundError:
        comparison.leave_out("the weights", "the files are not safetensors")
        return
    except (KeyError, ValueError) as error:
        raise Differs("config.json", f"it cannot be read ({error})", REMEDY) from None
    if files.published.family not in PUBLISHED:
        comparison.leave_out("the weights", f"the reference does not know {files.published.family}")
        return
    compare_settings(comparison, "config.json", model.config, settings, "compare what is read of it")
    compare_weights(comparison, RunWeights(model, model.config, LoraConfig()), files)


class PublishedModel(OpenedModel):
    """The weights of a folder in the number format in which the model holds them."""

    def __init__(self, folder: Path, model: Decoder):
        names = list(RunWeights(model, model.config, LoraConfig()))
        super().__init__(folder, names, model.config.tie_embeddings)
        self.parameters = dict(model.named_parameters())

    def part(self, name: str, rows: slice) -> Tensor:
        return super().part(name, rows).to(self.parameters[name].dtype).double()


def compare_run(opened: Opened, comparison: Comparison) -> None:
    """Compare what a checkpoint holds with the model, bit for bit in the model's number format."""
    is_one = opened.place.parent.name == "checkpoints"
    folder = opened.place if is_one else chosen(opened.place / "checkpoints", opened.which)
    parameters = dict(opened.model.named_parameters())
    modules = opened.model.named_modules()
    held = {f"{name}.weight" for name, module in modules if isinstance(module, FrozenLinear)}
    for name, stored in checkpoints.tensors_of(folder / "model.safetensors").items():
        if name in held:
            continue
        if name not in parameters:
            raise Differs(name, f"{folder.name} has it, and the model does not", REMEDY)
        found = parameters[name]
        comparison.close(f"{name} as stored in {folder.name}", found, stored.to(found.dtype), 0.0, REMEDY)
    if held and not adapters_of(opened.model):
        comparison.leave_out("the matrices", "another weight format changes them")
    if adapters_of(opened.model):
        comparison.leave_out("the base's weights", "they were compared when the run began")


def chosen(folder: Path, which: str) -> Path:
    """Return the folder of the best or the last checkpoint of those that are whole."""
    manifests: dict[tuple[int, str], Path] = {}
    losses: dict[int, float | None] = {}
    for path in folder.glob("step-*"):
        with contextlib.suppress(OSError, ValueError):
            verify(read_manifest(path))
            found = checkpoints.manifest_of(path)
            manifests[found["step"], path.name] = path
            losses[found["step"]] = found["loss"]
    step = scores.best_of(losses.items()) if which == "best" else None
    step = max(losses) if step is None else step
    return manifests[max(key for key in manifests if key[0] == step)]
