"""Checkpoints: safetensors and JSON in a folder that exists whole or not at all.

    RUN/config.yaml                      the resolved settings
    RUN/fingerprints.json                SHA-256 of data, tokenizer and code
    RUN/tokenizer/                       the tokenizer of this model's ids
    RUN/checkpoints/step-00000600/
        model.safetensors                parameters
        state.safetensors, state.json    optimizers, random states, counters: all that a resumed run needs
        manifest.json                    step, validation loss, a SHA-256 for each file and for itself; last

A checkpoint is written under a temporary name, flushed to the disk and renamed, once: a name that a whole
checkpoint has is never taken again. What begins with a dot is no checkpoint. The best one is the one with the
lowest validation loss among the manifests: no pointer can go stale. Every SHA-256 is compared before a tensor
or a state is parsed, and nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from config import write_atomically
from modules.tensorfiles import flush, save_tensors

T = TypeVar("T")
FILES = ("model.safetensors", "state.safetensors", "state.json")


@dataclass(frozen=True)
class Manifest:
    """The facts of a checkpoint that are known without opening its tensors."""

    folder: Path
    step: int
    loss: float | None  # The validation loss in nats a token; None without a validation.
    keep: bool  # Whether it is one of those that --save_every asks for.
    files: dict[str, str]  # By name the SHA-256.


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, state: dict[str, Any], loss: float | None, keep: bool
) -> Manifest:
    """Write `folder/step-N` and return its manifest; an older checkpoint of that step is removed afterwards.

    Killed at any instant, it leaves the new one whole or not there at all, and the older one untouched until
    the new one is there: if `step-N` is whole, the new one is `step-N.1`.

    Args:
        folder: RUN/checkpoints.
        model: Its parameters and persistent buffers go to model.safetensors; tied ones once.
        state: Nested dicts and lists of tensors and plain values.

    Raises:
        OSError: The disk is full or read-only. The temporary folder is removed; older checkpoints stay.
    """
    temporary = folder / f".step-{step:08d}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(folder)
        temporary.mkdir()
        tensors: dict[str, Tensor] = {}
        plain = _take_tensors(state, "", tensors)
        save_tensors(kept_tensors(model), temporary / "model.safetensors")
        save_tensors(tensors, temporary / "state.safetensors")
        write_atomically(temporary / "state.json", json.dumps(plain))
        files = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
        values = {"step": step, "loss": loss, "keep": keep, "files": files}
        write_atomically(temporary / "manifest.json", _with_own_sha256(values))
        flush(temporary)
        final, older = folder / f"step-{step:08d}", []
        for path in step_folders(folder):
            if _number(path)[0] != step:
                continue
            try:
                verify(read_manifest(path))
                final = folder / f"step-{step:08d}.{_number(path)[1] + 1}"
                older.append(path)
            except ValueError:  # It is damaged: nothing is lost with it.
                _remove(path)
        os.replace(temporary, final)
        for path in (folder, folder.parent, folder.parent.parent):  # RUN and RUN/checkpoints may be new.
            flush(path)
        for path in older:
            with suppress(OSError):
                _remove(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            _clear_leftovers(folder)
        raise OSError(
            f"the checkpoint of step {step} could not be written to {folder} ({error}); "
            "older checkpoints are untouched: free some space and go on with --resume"
        ) from error
    return Manifest(final, step, loss, keep, files)


def checkpoints(folder: Path) -> list[Manifest]:
    """Return the manifests in `folder`, oldest first; folders without a readable one do not count."""
    found = []
    for path in step_folders(folder):
        with suppress(ValueError):
            found.append(read_manifest(path))
    return found


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of one checkpoint; ValueError if it is missing, damaged, or names another step."""
    return read_run_file(folder / "manifest.json", _manifest)


def best_of(manifests: list[Manifest]) -> Manifest | None:
    """Return the manifest with the lowest validation loss; the later of two equals."""
    scored = [m for m in manifests if m.loss is not None]
    return min(scored, key=lambda m: (m.loss, -m.step)) if scored else None


def newest_whole(folder: Path) -> Manifest:
    """Return the newest checkpoint in `folder` that is whole; name on stderr those that it passes over.

    Raises:
        ValueError: There is none.
    """
    return first_whole(step_folders(folder)[::-1], folder.parent)


def remove_superseded(folder: Path, keep: int) -> None:
    """Delete all but the best, the last, and the `keep` newest of those to be kept (0: all of those).

    Before anything is deleted the last one is read again: a damaged one does not count, and the newest whole
    one stays too.
    """
    manifests = checkpoints(folder)
    kept = [m for m in manifests if m.keep]
    stay = {m.folder for m in (kept[-keep:] if keep else kept)}
    best = best_of(manifests)
    if best:
        stay.add(best.folder)
    superseded = [m for m in manifests[:-1] if m.folder not in stay]
    if not superseded:
        return
    for manifest in reversed(manifests):
        stay.add(manifest.folder)
        with suppress(ValueError):
            verify(manifest)
            break
    for manifest in superseded:
        if manifest.folder not in stay:
            with suppress(OSError):
                _remove(manifest.folder)


def verify(manifest: Manifest) -> None:
    """Raise a ValueError that names the first file that is missing or whose SHA-256 is not the manifest's."""
    for name in FILES:
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
    """Return the `state` that `save_checkpoint` was given."""
    tensors = load_file(manifest.folder / "state.safetensors")
    return _put_tensors(json.loads((manifest.folder / "state.json").read_text("utf-8")), tensors)


def load_counters(manifest: Manifest) -> dict[str, Any]:
    """Return what `load_state` does, with None for each tensor: tensors are not read."""
    plain = json.loads((manifest.folder / "state.json").read_text("utf-8"))
    return _put_tensors(plain, defaultdict(lambda: None))


def load_weights(model: nn.Module, manifest: Manifest) -> None:
    """Copy the parameters into `model`; ValueError lists what is missing, left over or of another shape."""
    path, own = manifest.folder / "model.safetensors", kept_tensors(model)
    refuse_other_shapes(own, read_run_file(path, shapes_in), manifest.folder)

    def copy(path: Path) -> None:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(file.get_tensor(key))

    read_run_file(path, copy)


def changed_weight(model: nn.Module, manifest: Manifest) -> str | None:
    """Return the name of the first parameter or buffer that is not, bit for bit, the checkpoint's."""
    with safe_open(manifest.folder / "model.safetensors", framework="pt") as file:
        for key, tensor in kept_tensors(model).items():
            if first_difference(file.get_tensor(key), tensor) is not None:
                return key
    return None


def first_difference(a: Any, b: Any, name: str = "") -> str | None:
    """Return where two nested states differ first, as in `optimizers/0/state/3/exp_avg`; None if nowhere.

    Tensors are compared bit for bit, wherever they lie, and so are numbers: 1 is not 1.0, and NaN is NaN.
    Tuples and lists are the same, as they are in a checkpoint.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return name
        return None if torch.equal(_bytes_of(a), _bytes_of(b)) else name
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            inner = f"{name}/{key}" if name else str(key)
            if key not in a or key not in b:
                return inner
            found = first_difference(a[key], b[key], inner)
            if found is not None:
                return found
        return None
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return name
        return first_difference(dict(enumerate(a)), dict(enumerate(b)), name)
    return None if type(a) is type(b) and repr(a) == repr(b) else name


def not_finite(model: nn.Module, state: dict[str, Any]) -> str | None:
    """Return the name of the first tensor, of weights or state, with a value that is not finite."""
    tensors: dict[str, Tensor] = {}
    _collect_tensors(state, "", tensors)
    for key, tensor in (kept_tensors(model) | tensors).items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return key
    return None


# --- helpers -----------------------------------------------------------------------------------------


def _number(path: Path) -> tuple[int, int]:
    """Return step and generation of `step-00000600.1`; the generation is 0 where none is written."""
    match = re.fullmatch(r"step-(\d{8,})(?:\.(\d+))?", path.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def step_folders(folder: Path) -> list[Path]:
    """Return the folders of checkpoints, oldest first, whether whole or not."""
    return sorted((path for path in folder.glob("step-*") if _number(path)[0] >= 0), key=_number)


def first_whole(folders: list[Path], run: Path) -> Manifest:
    """Return the first checkpoint that is whole; name on stderr those before it.

    Raises:
        ValueError: None is; the message names the run.
    """
    reasons = []
    for folder in folders:
        try:
            manifest = read_manifest(folder)
            verify(manifest)
        except ValueError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            print(f"passed over: {reason}", file=sys.stderr)
        return manifest
    first = f" ({reasons[0]})" if reasons else ""
    raise ValueError(
        f"{run} has {len(folders)} checkpoints and none is whole{first}; start again in another --run"
    )


def read_run_file(path: Path, parse: Callable[[Path], T]) -> T:
    """Return `parse(path)`; ValueError in one sentence if the path is missing or `parse` raises."""
    if not path.exists():
        raise ValueError(f"{path} is missing; restore it from a copy, or use another run or checkpoint")
    try:
        return parse(path)
    except Exception as error:  # Anyone may have written the file, and each parser has errors of its own.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path} is damaged ({reason}); restore it from a copy, or use another run or checkpoint"
        ) from error


def _with_own_sha256(values: dict[str, Any]) -> str:
    """Return the text of a manifest; its last entry is the SHA-256 of the text without that entry."""
    own = hashlib.sha256(json.dumps(values, indent=1).encode()).hexdigest()
    return json.dumps(values | {"sha256": own}, indent=1)


def _manifest(path: Path) -> Manifest:
    text = path.read_text("utf-8")
    values = json.loads(text)
    if text != _with_own_sha256({key: value for key, value in values.items() if key != "sha256"}):
        raise ValueError("it is not what its own SHA-256 says")
    if _number(path.parent)[0] != values["step"]:
        raise ValueError(f"it is that of step {values['step']}")
    loss = None if values["loss"] is None else float(values["loss"])
    if loss is not None and not math.isfinite(loss):  # Python's JSON knows NaN and Infinity.
        raise ValueError(f"its loss is {loss}")
    files = {str(name): str(digest) for name, digest in values["files"].items()}
    return Manifest(path.parent, int(values["step"]), loss, bool(values["keep"]), files)


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a safetensors file, whose header alone is read."""
    with safe_open(path, framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def refuse_other_shapes(own: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Raise a ValueError if the tensors stored in a checkpoint are not those of the model, by name and shape.

    Args:
        own: The tensors of the model.
        shapes: The shapes of those in the checkpoint's folder.
    """
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


def _clear_leftovers(folder: Path) -> None:
    """Remove what killed saves and removals left under hidden names."""
    for hidden in folder.glob(".step-*"):
        shutil.rmtree(hidden, ignore_errors=True)


def _remove(path: Path) -> None:
    """Delete a checkpoint, under a hidden name: a kill on the way leaves nothing that looks like one."""
    hidden = path.with_name(f".{path.name}.gone")
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def kept_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint: the model's, or if some are frozen, what trains and the adapters.

    What is frozen is the base that the run was started from; an adapter's start is, and is no base's. A
    shared tensor stands under its first name.
    """
    frozen = any(not p.requires_grad for p in model.parameters())
    tensors, seen = {}, set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and (tensor.requires_grad or ".adapters." in key or not frozen):
            tensors[key] = tensor
            seen.add(id(tensor))
    return tensors


def _take_tensors(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Return JSON with tensors replaced by their key in `tensors`; dicts become pairs, for integer keys."""
    if isinstance(value, Tensor):
        tensors[key] = value.detach().clone()  # A clone: safetensors refuses tensors that share memory.
        return {"tensor": key}
    if isinstance(value, dict):
        return {"dict": [[k, _take_tensors(v, f"{key}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_take_tensors(v, f"{key}/{i}", tensors) for i, v in enumerate(value)]}
    assert value is None or isinstance(value, bool | int | float | str), f"{key} is a {type(value).__name__}"
    return value


def _collect_tensors(value: Any, key: str, tensors: dict[str, Tensor]) -> None:
    """Collect the tensors of nested dicts and lists under names like `optimizers/0/state/3/exp_avg`."""
    if isinstance(value, Tensor):
        tensors[key] = value
    elif isinstance(value, dict | list | tuple):
        for k, v in value.items() if isinstance(value, dict) else enumerate(value):
            _collect_tensors(v, f"{key}/{k}" if key else str(k), tensors)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _put_tensors(value: Any, tensors: Mapping[str, Tensor | None]) -> Any:
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
