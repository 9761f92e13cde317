"""What a run leaves behind, by name, and the first thing in which two runs differ.

Everything counts but times, paths, digests (what they are of is compared itself), what guards print and keep,
that something stored is made again, and the settings `allow` and `run`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

Trace = dict[str, Tensor | float | str]
TIMED = {
    "seconds",
    "allow",
    "run",
    "code",
    "time",
    "made",
    "created",
    "sha256",
    "files",
    "fingerprint",
    "version",
}
TIMED |= {"train/tokens_per_second", "data", "tokenizer", "base", "corpus", "config"}
# Where the first difference is looked for: data first, since all else follows from them.
STAGES = (
    "run/tokenizer",
    "cache/tokenizers",
    "cache",
    "printed",
    "run/config.yaml",
    "run/metrics.jsonl",
    "run/checkpoints",
)
LEFT_OUT = re.compile(
    r"cache/source-|cache/second-opinions|leaks-|overlap-|overrides\.json|sha256\.json|eval\.html|fingerprints\.json|base\.json|outputs\.json|/tmp"
)
GUARDS_SAY = ("preflight, ", "ALLOWED ")
OPINION = "a second opinion agrees"  # A line of a guard too, wherever in it this stands.
# That something stored is made again costs time, as a line of seconds says, and changes no result.
MADE_AGAIN = ("training a code tokenizer", "training a bpe tokenizer")
TIMES = re.compile(r"\d[\d,.]* ?(s|ms|min|tokens/s|MB/s|GB)\b")
DIGEST = re.compile(r"[0-9a-f]{12,}")
# Python and libraries warn so, and show the line: that alone is no other result, and it is said.
WARNING = re.compile(r"\S+\.py:\d+: \w*Warning: ")
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
PRINTED = 1e-5  # A printed number below it, such as the gap of a merge, is itself one of rounding.
CLOSE_NUMBER, CLOSE_TENSOR = 1e-4, 1e-3  # What other orders of sums leave after six updates in fp32.


class Difference(NamedTuple):
    """The first thing in which two runs differ, and whether rounding explains all in which they do."""

    what: str
    is_rounding: bool


def trace(folder: Path, printed: str) -> Trace:
    """Return all that a run left in a folder, and what it printed."""
    found: Trace = {}
    for number, line in enumerate(_spoken(printed)):
        found[f"printed/{number}"] = line
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not LEFT_OUT.search(name):
            for key, value in _values(path):
                place = DIGEST.sub("#", f"{name}{key}")
                while place in found:
                    place += "+"
                found[place] = value
    return found


def difference(found: Trace, expected: Trace) -> Difference | None:
    """Return the first difference of a run from another; of those that rounding explains only if all are."""
    rounded = None
    for name in sorted({*found, *expected}, key=_stage):
        if name not in found or name not in expected:
            return Difference(f"{name}: {'missing' if name in expected else 'not there before'}", False)
        one = _compared(name, found[name], expected[name])
        if one is not None and not one.is_rounding:
            return one
        rounded = rounded or one
    return rounded


def _stage(name: str) -> tuple[int, str]:
    number = next((i for i, stage in enumerate(STAGES) if name.startswith(stage)), len(STAGES))
    return number, re.sub(r"\d+", lambda digits: digits[0].zfill(8), name)


def _compared(name: str, found: Any, expected: Any) -> Difference | None:
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        return _tensors_compared(name, found, expected)
    if type(found) is type(expected) and found == expected:
        return None
    if isinstance(found, float) and isinstance(expected, float):
        if found != found and expected != expected:
            return None
        return Difference(f"{name}: {expected:.7g} -> {found:.7g}", _is_close(found, expected))
    if isinstance(found, str) and isinstance(expected, str):
        same_words = NUMBER.sub("", found) == NUMBER.sub("", expected)
        pairs = zip(NUMBER.findall(found), NUMBER.findall(expected), strict=same_words)
        close = same_words and all(_is_close(float(a), float(b), PRINTED) for a, b in pairs)
        start = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), 0)
        before, after = (repr(text[max(0, start - 30) : start + 50]) for text in (expected, found))
        return Difference(f"{name}: {before} -> {after}", close)
    return Difference(f"{name}: {expected!r:.80} -> {found!r:.80}", False)


def _is_close(found: float, expected: float, smallest: float = 0.0) -> bool:
    return abs(found - expected) <= max(smallest, CLOSE_NUMBER * max(abs(found), abs(expected)))


def _tensors_compared(name: str, found: Tensor, expected: Tensor) -> Difference | None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        shapes = f"{expected.dtype} {tuple(expected.shape)} -> {found.dtype} {tuple(found.shape)}"
        return Difference(f"{name}: {shapes}", False)
    if torch.equal(found, expected):
        return None
    apart = (found.double() - expected.double()).abs()
    size = float(apart.max() / expected.double().abs().max().clamp(min=1e-30))
    share = float((apart > 0).double().mean())
    is_rounding = found.is_floating_point() and size <= CLOSE_TENSOR
    return Difference(f"{name}: {share:.0%} of it, by up to {size:.1e} of the largest", is_rounding)


def _spoken(printed: str) -> Iterator[str]:
    """Yield the lines that a run printed, without those of guards, warnings, progress, times and digests."""
    lines = printed.splitlines()
    for line, before in zip(lines, ["", *lines], strict=False):
        if WARNING.match(line) or (WARNING.match(before) and line.startswith("  ")):
            continue
        if not line.startswith(GUARDS_SAY + MADE_AGAIN) and OPINION not in line:
            yield DIGEST.sub("#", TIMES.sub("TIME", line))


def _values(path: Path) -> Iterator[tuple[str, Tensor | float | str]]:
    """Yield the parts of a file: tensors, numbers, texts. A file that cannot be read is its bytes."""
    data = path.read_bytes()
    try:
        if path.suffix == ".safetensors":
            yield from ((f"/{name}", tensor) for name, tensor in sorted(load_file(path).items()))
        elif path.suffix == ".npy":
            array = np.atleast_1d(np.load(path, allow_pickle=False))
            yield "", torch.from_numpy(array.astype(np.float64 if array.dtype.kind == "f" else np.int64))
        elif path.suffix == ".json":
            yield from _flat("", json.loads(data))
        elif path.suffix == ".yaml":
            yield from _flat("", yaml.safe_load(data))
        elif path.suffix == ".jsonl":
            for number, line in enumerate(data.decode().splitlines()):
                yield from _flat(f"/{number}", json.loads(line))
        else:
            yield "", repr(data) if b"\0" in data else DIGEST.sub("#", TIMES.sub("TIME", data.decode()))
    except Exception:  # A mutant may have written anything.
        yield "", repr(data)


def _flat(name: str, value: Any) -> Iterator[tuple[str, float | str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            is_group = isinstance(inner, dict | list) and key not in ("files", "allow")
            if is_group or key not in TIMED:
                yield from _flat(f"{name}/{key}", inner)
    elif isinstance(value, list) and value[:1] == ["seconds"]:  # A pair of a saved state.
        return
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _flat(f"{name}/{number}", inner)
    elif isinstance(value, float):
        yield name, value
    else:  # A whole number too: rounding changes none.
        yield name, DIGEST.sub("#", str(value))
