"""Untrusted files and folders that are written to: bounded lines, JSON with one reading, whole files."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import reprlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

REPOSITORY = Path(__file__).resolve().parents[1]  # the only place that knows where this program is

MOST_BYTES = 2**28  # the largest document or row, which is tokenised as a whole


def bounded_lines(lines: io.BufferedIOBase, path: Path) -> Iterator[bytes]:
    """Yield the lines of an open file; ValueError for one of more than MOST_BYTES.

    Without a bound a gz of a megabyte, or a sparse file, may be one line that fits no memory.
    """
    for number, line in enumerate(iter(lambda: lines.readline(MOST_BYTES + 1), b""), 1):
        if len(line) > MOST_BYTES:
            raise ValueError(
                f"{path} line {number} has more than {MOST_BYTES:,} bytes, the most of a row: check that it "
                "is the file you mean, or write its text in several rows"
            )
        yield line


class RepeatedKey(ValueError):
    """An object of JSON has a key twice, of which a parser silently takes the later one."""


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs, for json's `object_pairs_hook`; RepeatedKey if a key is in two."""
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise RepeatedKey(f"the key {reprlib.repr(twice)} stands twice in it")
    return values


def parse_line(line: str, where: str) -> Any:
    """Return the value of a line of JSONL; ValueError names `where`, the file and line, and the column."""
    at = ""
    try:
        # With its line end the line would have its errors at line 2 column 1.
        return json.loads(line.rstrip("\r\n"), object_pairs_hook=unrepeated)
    except RepeatedKey as error:
        raise ValueError(f"{where} has two readings: {error}; leave one out") from None
    except json.JSONDecodeError as error:
        at, reason = f" at column {error.colno}", error.msg.split(" (")[0]
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:  # A number has thousands of digits.
        reason = str(error).split(";")[0]
    raise ValueError(f"{where} is not JSON{at}: {reason}; write the row as one object in one line")


def refuse_unwritable(folder: str | Path, setting: str, unless: str | None = None) -> None:
    """Raise ValueError for a folder that can neither be written to nor made; the attempt leaves nothing.

    Args:
        setting: The flag that names the folder, for the sentence.
        unless: A pattern of files with which it is useful without writing, such as a cache that is read.
    """
    whole = Path(os.path.abspath(folder))
    there = next(path for path in (whole, *whole.parents) if os.path.exists(path))
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".plumb-"):
            return
    except OSError as error:
        if unless is not None and there == whole and next(whole.glob(unless), None) is not None:
            return
        raise ValueError(
            f"{setting} {folder} cannot be written to ({there}: {error.strerror}); name a folder that you "
            "may write to"
        ) from None


def write_atomically(path: Path, text: str) -> None:
    """Write under a temporary name in the same folder, flush to the disk, rename.

    Several may write one path at once, as the first trials of a sweep do: they take turns, and the last one
    counts. All use one temporary name, so that what a killed process left there goes with the next writing.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with _locked(temporary) as file:
        try:
            file.truncate(0)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    """Open a file that may be there already, once nobody else writes it; it is not truncated yet."""
    while True:
        # Appending opens without truncating, since another process or thread may be at its text.
        with open(path, "a", encoding="utf-8", newline="\n", opener=_no_link) as file:
            with contextlib.suppress(OSError):  # Not every file system has locks to keep writers apart.
                fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held the lock has renamed or removed the file: its name is free for another one.
            try:
                is_current = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                is_current = False
            if is_current:
                yield file
                return


def _no_link(path: str, flags: int) -> int:
    """Open a file for `open`, unless it is a symbolic link, which anybody may leave in a shared folder."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def program_files(folder: Path = REPOSITORY) -> list[Path]:
    """Return the project's own Python files: those at the top level, and those of its packages."""
    packages = [path.parent for path in folder.glob("*/__init__.py")]
    return sorted([*folder.glob("*.py"), *(p for package in packages for p in package.rglob("*.py"))])


def code_fingerprint(folder: Path = REPOSITORY) -> str:
    """Return the SHA-256 of the project's own Python files, by name and content."""
    digest = hashlib.sha256()
    for path in program_files(folder):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def own_module(name: str) -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment that run a module of this program as a process of its own.

    The working directory stays the user's, for relative paths, and no module is imported from it (-P): a file
    config.py there is not the program's.
    """
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return [sys.executable, "-P", "-m", name], os.environ | {"PYTHONPATH": path}
