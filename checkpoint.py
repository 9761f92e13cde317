"""Checkpoints: safetensors and JSON in a folder that exists whole or not at all.

    RUN/config.yaml                      the resolved settings
    RUN/fingerprints.json                SHA-256 of data, tokenizer and code
    RUN/tokenizer/                       what turns text into this model's ids
    RUN/checkpoints/step-00000600/
        model.safetensors                parameters
        state.safetensors, state.json    optimizers, random states, counters: all that a resumed run needs
        manifest.json                    step, validation loss, and a SHA-256 for each file; written last

A checkpoint is written under a temporary name, flushed to the disk and renamed; only its manifest makes it
exist. The best one is the one with the lowest validation loss among the manifests: no pointer can go stale.
Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from architecture import Decoder
from config import Config, ModelConfig, write_atomically
from tokenizer import Tokenizer, load_tokenizer

T = TypeVar("T")
LONGEST_BLOCK = 2**20  # tokens; of a run to open, since a table of positions is not among the weights


@dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint without opening its tensors."""

    folder: Path
    step: int
    loss: float | None  # of its validation, nats a token; None when none was run
    keep: bool  # one of the every-N checkpoints
    files: dict[str, str]  # name -> SHA-256


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, state: dict[str, Any], loss: float | None, keep: bool
) -> Manifest:
    """Write `folder/step-N` and return its manifest; an older folder of that step is replaced.

    The older one is moved aside to `.step-N.old` until the new one is in its place. If the process is killed
    between the two renames, only that hidden name is left: the next save puts it back, nothing else does.

    Args:
        folder: RUN/checkpoints.
        model: Its parameters and persistent buffers go to model.safetensors; tied ones once.
        state: Nested dicts and lists of tensors and plain values.

    Raises:
        OSError: The disk is full or read-only. The temporary folder is removed; older checkpoints stay.
    """
    final = folder / f"step-{step:08d}"
    temporary, old = folder / f".{final.name}.tmp", folder / f".{final.name}.old"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _clear_leftovers(folder)
        temporary.mkdir()
        tensors: dict[str, Tensor] = {}
        plain = _take_tensors(state, "", tensors)
        _save_tensors(_untied(model), temporary / "model.safetensors")
        _save_tensors(tensors, temporary / "state.safetensors")
        write_atomically(temporary / "state.json", json.dumps(plain))
        files = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
        manifest = {"step": step, "loss": loss, "keep": keep, "files": files}
        write_atomically(temporary / "manifest.json", json.dumps(manifest, indent=1))
        _flush(temporary)
        if final.exists():
            os.replace(final, old)
        os.replace(temporary, final)
        _flush(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            _clear_leftovers(folder)
        raise OSError(
            f"the checkpoint of step {step} could not be written to {folder} ({error}); "
            "older checkpoints are untouched: free some space and go on with --resume"
        ) from error
    return Manifest(final, step, loss, keep, files)


def checkpoints(folder: Path) -> list[Manifest]:
    """The manifests in `folder` by step; folders without a readable one do not count."""
    found = []
    for path in sorted(folder.glob("step-*/manifest.json")):
        with suppress(ValueError):
            found.append(_read_run_file(path, _manifest))
    return sorted(found, key=lambda manifest: manifest.step)


def best_of(manifests: list[Manifest]) -> Manifest | None:
    """The one with the lowest validation loss; the later of two equals."""
    scored = [m for m in manifests if m.loss is not None]
    return min(scored, key=lambda m: (m.loss, -m.step)) if scored else None


def remove_superseded(folder: Path, keep: int) -> None:
    """Delete all but the best, the last, and the `keep` newest of those to be kept (0: all of those)."""
    manifests = checkpoints(folder)
    kept = [m for m in manifests if m.keep]
    stay = {m.step for m in (kept[-keep:] if keep else kept)} | {m.step for m in manifests[-1:]}
    best = best_of(manifests)
    if best:
        stay.add(best.step)
    for manifest in manifests:
        if manifest.step not in stay:
            shutil.rmtree(manifest.folder, ignore_errors=True)


def verify(manifest: Manifest) -> None:
    """ValueError that names the first file that is missing or whose SHA-256 is not the manifest's."""
    for name in ("model.safetensors", "state.safetensors", "state.json"):
        path = manifest.folder / name
        if name not in manifest.files or not path.is_file():
            raise ValueError(f"{path} is missing; the checkpoint is damaged, use another one")
        digest = _sha256(path)
        if digest != manifest.files[name]:
            raise ValueError(
                f"{path} has SHA-256 {digest[:12]}, the manifest says {manifest.files[name][:12]}; "
                "the checkpoint is damaged, use another one"
            )


def load_state(manifest: Manifest) -> dict[str, Any]:
    """The `state` that `save_checkpoint` was given."""
    tensors = load_file(manifest.folder / "state.safetensors")
    return _put_tensors(json.loads((manifest.folder / "state.json").read_text("utf-8")), tensors)


def load_weights(model: nn.Module, manifest: Manifest) -> None:
    """Copy the parameters into `model`; ValueError lists what is missing, left over or of another shape."""
    path, own = manifest.folder / "model.safetensors", _untied(model)
    _refuse_other_shapes(own, _read_run_file(path, _shapes), manifest.folder)

    def copy(path: Path) -> None:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(file.get_tensor(key))

    _read_run_file(path, copy)


@dataclass(frozen=True)
class Run:
    """A trained model with what belongs to it."""

    model: Decoder
    tokenizer: Tokenizer
    config: Config
    step: int
    fingerprints: dict[str, str]
    folder: Path  # of the run


def load_run(path: str | Path, which: Literal["best", "last"] = "best") -> Run:
    """Open a run folder, or one checkpoint inside it, for evaluation; the model is in eval mode, on the CPU.

    Raises:
        ValueError: There is no run or no checkpoint, a file is damaged, or weights and config disagree.
    """
    path = Path(path)
    one = path.name if path.parent.name == "checkpoints" else None
    folder = path.parent.parent if one else path
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{path} holds no run (no config.yaml); give the folder that training wrote")
    config = _read_run_file(folder / "config.yaml", _config)
    fingerprints = _read_run_file(folder / "fingerprints.json", _fingerprints)
    manifests = checkpoints(folder / "checkpoints")
    if one:
        manifest = next((m for m in manifests if m.folder.name == one), None)
    else:
        manifest = (best_of(manifests) if which == "best" else None) or (manifests[-1] if manifests else None)
    if manifest is None:
        raise ValueError(f"{path} holds no finished checkpoint; train for longer, or look in another run")
    verify(manifest)
    tokenizer = _read_run_file(folder / "tokenizer", load_tokenizer)
    if tokenizer.fingerprint != fingerprints["tokenizer"]:
        raise ValueError(f"{folder / 'tokenizer'} is not the tokenizer that the run was trained with")
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"{folder / 'tokenizer'} has {tokenizer.vocab_size} ids, and the model of config.yaml beside it "
            f"{config.model.vocab_size}; restore both from a copy"
        )
    _refuse_giant(config.model, manifest)
    model = Decoder(config.model)
    load_weights(model, manifest)
    return Run(model.eval(), tokenizer, config, manifest.step, fingerprints, folder)


# --- helpers -----------------------------------------------------------------------------------------


def _read_run_file(path: Path, parse: Callable[[Path], T]) -> T:
    """`parse(path)`; ValueError in one sentence if the file, or folder, is missing or `parse` raises."""
    if not path.exists():
        raise ValueError(f"{path} is missing; restore it from a copy, or use another run or checkpoint")
    try:
        return parse(path)
    except Exception as error:  # anyone may have written the file, and each parser has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path} is damaged ({reason}); restore it from a copy, or use another run or checkpoint"
        ) from error


def _config(path: Path) -> Config:
    config = Config.from_dict(yaml.safe_load(path.read_text("utf-8")))
    if config.model.block_size > LONGEST_BLOCK:
        raise ValueError(f"model.block_size is {config.model.block_size}, and {LONGEST_BLOCK} is the most")
    return replace(config, model=config.model.resolved())


def _fingerprints(path: Path) -> dict[str, str]:
    values = json.loads(path.read_text("utf-8"))
    names = ("data", "tokenizer", "code")
    if not isinstance(values, dict) or not all(isinstance(values.get(name), str) for name in names):
        raise ValueError(f"it must hold a string for each of {', '.join(names)}")
    return {name: values[name] for name in names}


def _manifest(path: Path) -> Manifest:
    values = json.loads(path.read_text("utf-8"))
    loss = None if values["loss"] is None else float(values["loss"])
    if loss is not None and not math.isfinite(loss):  # JSON of Python's knows NaN and Infinity
        raise ValueError(f"its loss is {loss}")
    files = {str(name): str(digest) for name, digest in values["files"].items()}
    return Manifest(path.parent, int(values["step"]), loss, bool(values["keep"]), files)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Of the tensors in a safetensors file, whose header alone is read."""
    with safe_open(path, framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def _refuse_other_shapes(own: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    wrong = [f"{key} is missing" for key in own if key not in shapes]
    wrong += [f"{key} is left over" for key in shapes if key not in own]
    wrong += [
        f"{key} is {shapes[key]}, the model's is {tuple(own[key].shape)}"
        for key in own
        if key in shapes and shapes[key] != tuple(own[key].shape)
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(
            f"{folder} was made by another config: {'; '.join(wrong[:4])}{more}; "
            "use the settings in its run's config.yaml"
        )


def _refuse_giant(config: ModelConfig, manifest: Manifest) -> None:
    """ValueError if `config` is not that of the manifest's weights, before memory is taken for its model."""
    shapes = _read_run_file(manifest.folder / "model.safetensors", _shapes)
    elements = sum(math.prod(shape) for shape in shapes.values())
    try:
        # Even without memory a model takes time for each of its layers, and sizes may overflow.
        if config.n_layer > len(shapes) or config.vocab_size * config.n_embd > elements:
            raise ValueError(f"{len(shapes)} tensors of {elements} elements in all are not enough for it")
        with torch.device("meta"):
            own = _untied(Decoder(config))
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{manifest.folder} was made by another config ({reason}); "
            "use the settings in its run's config.yaml"
        ) from error
    _refuse_other_shapes(own, shapes, manifest.folder)


def _clear_leftovers(folder: Path) -> None:
    """Remove what killed saves left under hidden names; the only whole checkpoint of a step is put back."""
    for old in folder.glob(".step-*.old"):
        final = folder / old.name.removeprefix(".").removesuffix(".old")
        if not final.exists():
            with suppress(ValueError):
                verify(_read_run_file(old / "manifest.json", _manifest))
                os.replace(old, final)
        shutil.rmtree(old, ignore_errors=True)
    for temporary in folder.glob(".step-*.tmp"):
        shutil.rmtree(temporary, ignore_errors=True)


def _untied(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each shared tensor once, under its first name."""
    tensors, seen = {}, set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            tensors[key] = tensor
            seen.add(id(tensor))
    return tensors


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(
        {key: t.detach().cpu().contiguous() for key, t in tensors.items()}, path, metadata={"format": "pt"}
    )
    _flush(path)


def _take_tensors(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """JSON with tensors replaced by their key in `tensors`; dicts become pairs: integer keys survive."""
    if isinstance(value, Tensor):
        tensors[key] = value.detach().clone()  # clones: safetensors refuses tensors that share memory
        return {"tensor": key}
    if isinstance(value, dict):
        return {"dict": [[k, _take_tensors(v, f"{key}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_take_tensors(v, f"{key}/{i}", tensors) for i, v in enumerate(value)]}
    assert value is None or isinstance(value, bool | int | float | str), f"{key} is a {type(value).__name__}"
    return value


def _put_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    make: dict[str, Callable[[Any], Any]] = {
        "tensor": lambda key: tensors[key],
        "dict": lambda pairs: {k: _put_tensors(v, tensors) for k, v in pairs},
        "list": lambda items: [_put_tensors(v, tensors) for v in items],
    }
    return make[kind](inner)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Ask the system to put a file, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def code_fingerprint(folder: Path) -> str:
    """SHA-256 of the project's own Python files, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()
