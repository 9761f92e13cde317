"""Work on shards: their names, locks, and folders that are written once, whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from config import write_atomically


def parse_shard(text: str) -> tuple[int, int]:
    """Return (i, n) of `i/n`, i from 0; raise a ValueError for anything else."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not int(match[1]) < int(match[2]):
        raise ValueError(f"--shard is {text!r}; it must be i/n, with i from 0 to n - 1, as 0/4")
    return int(match[1]), int(match[2])


def read_record(path: Path, *keys: str) -> dict[str, Any]:
    """Return the JSON object that a step wrote; raise a ValueError if it lacks one of these keys."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not all(key in record for key in keys):
        raise ValueError(f"{path} is damaged: remove it, and run again the step that makes it")
    return record


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parts_of(folder: Path, kind: str = "part", ending: str = ".parquet") -> list[Path]:
    """Return all parts of a folder, in order.

    Raises:
        ValueError: there is none, one is missing, or there are parts of two divisions.
    """
    found = {path.name: path for path in folder.glob(f"{kind}-*-of-*{ending}")}
    counts = {int(match[1]) for name in found if (match := re.search(r"-of-(\d+)", name))}
    if not counts:
        raise ValueError(f"{folder} holds no {kind}: run the step before this one first")
    if len(counts) > 1:
        few, many = min(counts), max(counts)
        raise ValueError(f"{folder} holds parts of {few} and of {many}: remove those of one division")
    (count,) = counts
    names = [f"{kind}-{number:05}-of-{count:05}{ending}" for number in range(count)]
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of {count} parts, {missing[0]} first: make them")
    return [found[name] for name in names]


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Let one process at a time write `output`; another one waits, and may then find it written.

    The kernel frees the lock after a kill. Its file is gone when the block ends.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(f".{output.name}.lock")
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another process makes {output}: waiting for it", file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                there = os.path.samestat(os.fstat(lock), os.stat(path))
            except FileNotFoundError:
                there = False
            # Else its last owner has removed it, and a third process may have created another.
            if there:
                try:
                    yield
                finally:
                    path.unlink()
                return
        finally:
            os.close(lock)


def make_once(folder: Path, inputs: dict[str, Any], write: Callable[[Path], dict[str, Any]]) -> None:
    """Have `write` fill a folder, unless one made of the same inputs stands there.

    The folder is filled under another name and then renamed; `done.json` in it has the inputs and what
    `write` returned. A kill leaves the old folder, the new one, or none; the next call removes other remains.
    """
    with alone(folder):
        try:
            if json.loads((folder / "done.json").read_text("utf-8"))["inputs"] == inputs:
                return
        except (OSError, ValueError, KeyError):
            pass
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            record = {"inputs": inputs} | write(partial)
            write_atomically(partial / "done.json", json.dumps(record, indent=1))
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
