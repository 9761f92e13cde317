"""A tokenizer's files: written whole or not at all, and never trusted when they are read."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from config import write_atomically

MOST_BYTES = 2**26  # the largest file that is read; published vocabularies have up to 35 million bytes


def write_file(path: Path, text: str) -> None:
    """Write a text as `write_atomically` does, and make its folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def read_file(path: Path) -> str:
    """Return a file's text; ValueError if it is missing, no regular file, too large or not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read the tokenizer file {path}: {error}") from error


def read_bytes(path: Path) -> bytes:
    """Return what a file holds; ValueError if it is missing, no regular file or too large."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"the tokenizer file {path} is no regular file; put the file itself there")
        if found.st_size > MOST_BYTES:
            raise ValueError(
                f"the tokenizer file {path} has {found.st_size} bytes; at most {MOST_BYTES} are read"
            )
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the tokenizer file {path}: {error}") from error


def parse_json(text: str, name: str) -> dict[str, Any]:
    """Return the JSON object of a file's text; ValueError, which names the file, for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the tokenizer file {name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"the tokenizer file {name} holds a {type(value).__name__} where an object is expected"
        )
    return value


def read_json(path: Path) -> dict[str, Any]:
    return parse_json(read_file(path), str(path))
