"""The folder `cache`: entries that can be rebuilt, each with a checksum, bounded in size.

    CACHE/tokens-KEY/            token stores (data/tokenstore.py), and the results of comparing them
    CACHE/tokenizers/KEY/        trained tokenizers
    CACHE/source-KEY.json        what a source was like when it was read (data/recorded.py)
    CACHE/store-KEY.json         a prepared store that was hashed (data/storefolder.py)
    CACHE/groups-KEY.json        documents that belong together by their text (data/corpus.py)
    CACHE/products-KEY.json      the fastest products of a machine (modules/products.py)
    CACHE/predictions/           predictions of interrupted evaluations (suites/kept.py)
    CACHE/bases/                 bases that a recipe trained: runs need them, so they are never removed

A key is a hash of all that decides an entry's content. A reader compares the checksum, and rebuilds a damaged
entry, or one from before checksums, with one line of warning. An entry is locked as long as a process has it
open, and the modification time of its folder or file is the time of its last use.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from config import write_atomically

SUMS = "sha256.json"  # the file of checksums in a sealed folder
GB = 10**9
# Nothing else is ever removed: --data.cache may name a folder that holds other things.
ENTRIES = {
    "": r"\.?(tokens-[0-9a-f]{24}(-[0-9a-f]{32})?"
    r"|(groups|source|store|products)-[0-9a-f]{32}\.json(\.([0-9a-f]{16}\.)?tmp)?)"
    r"(\.gone-[0-9a-f]{32})*",
    "tokenizers": r"\.?[0-9a-f]{32}(\.\d+)?(\.gone-[0-9a-f]{32})*",
    "predictions": r"\.?eval-.+-[0-9a-f]{32}\.jsonl(\.gone-[0-9a-f]{32})*",
}
STARTED = time.time()  # when this process began


# --- checksums ---------------------------------------------------------------------------------------


def sealed(value: Any) -> str:
    """Return a value and its SHA-256 as JSON."""
    return json.dumps({"sha256": _digest(value), "value": value})


def unsealed(text: str) -> Any:
    """Return the value of a text by `sealed`; ValueError if it is not whole."""
    try:
        found = json.loads(text)
        if found["sha256"] == _digest(found["value"]):
            return found["value"]
    except (KeyError, TypeError, RecursionError):
        pass
    raise ValueError("its checksum is another one, or missing")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def write_sealed(path: Path, value: Any) -> None:
    """Write plain values to a file for `read_sealed`; do nothing if the cache cannot be written."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, sealed(value))


def read_sealed(path: Path) -> Any:
    """Return the values in a file of the cache; None without one, or with a warning if it is damaged."""
    try:
        value = unsealed(path.read_text("utf-8"))
    except OSError:
        return None
    except ValueError as error:
        say_damaged(path, error)
        return None
    touch(path)
    return value


def seal_folder(folder: Path) -> None:
    """Write down the SHA-256 of every file in a folder, to be compared by `verify_folder`."""
    sums = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
    write_atomically(folder / SUMS, sealed(sums))


def verify_folder(folder: Path) -> None:
    """Compare the files of a folder with the checksums of `seal_folder`.

    Raises:
        ValueError: A file is missing or was changed, or there are no checksums.
    """
    try:
        sums = unsealed((folder / SUMS).read_text("utf-8"))
        # The checksums may be a stranger's: no device is read, and no file of another folder.
        there = {path.name for path in folder.iterdir() if path.is_file()}
        changed = [
            name for name, sum in sums.items() if name not in there or file_sha256(folder / name) != sum
        ]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder} cannot be verified ({error})") from None
    if changed:
        raise ValueError(f"{folder / changed[0]} is not what was written there")


def refuse_changed(folder: Path, remedy: str) -> None:
    """Compare the files of a folder as `verify_folder` does; one without checksums passes.

    Args:
        folder: A published model, or a base that was trained here: only those of today have checksums.
        remedy: What helps besides a copy, for the sentence.

    Raises:
        ValueError: A file is missing or was changed.
    """
    if not (folder / SUMS).is_file():
        return
    try:
        verify_folder(folder)
    except ValueError as error:
        raise ValueError(f"{error}; restore it from a copy, or {remedy}") from None


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def say_damaged(path: Path, why: object) -> None:
    """Warn in one line that an entry is damaged and is made again."""
    told = " ".join(str(why).split()).removesuffix(": build it again")
    where = "" if str(path) in told else f"{path}: "
    print(f"warning: {where}{told}; it is made again", file=sys.stderr)


def discard(path: Path) -> None:
    """Remove an entry under a hidden name first, so that a kill leaves no part of it under its own."""
    hidden = path.with_name(f".{path.name.lstrip('.')}.gone-{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):  # Another process may be first.
        os.rename(path, hidden)
        shutil.rmtree(hidden) if hidden.is_dir() else hidden.unlink()


# --- use, and room -----------------------------------------------------------------------------------


class InUse:
    """A lock on an entry, which no process removes as long as this object lives or until `close`.

    Raises:
        OSError: There is no such entry.
    """

    def __init__(self, path: Path):
        descriptor = os.open(path, os.O_RDONLY)
        self.close = weakref.finalize(self, os.close, descriptor)
        with contextlib.suppress(OSError):  # On a file system without locks nothing is removed either.
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):  # It was removed first.
            raise FileNotFoundError(f"{path} was removed")
        touch(path)

    def __enter__(self) -> InUse:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def touch(path: Path) -> None:
    """Record that an entry is used now."""
    with contextlib.suppress(OSError):  # A cache may be read-only.
        os.utime(path)


class _Entry(NamedTuple):
    used: float  # time of the last use, in seconds since the epoch
    size: int  # bytes
    path: Path


def make_room(cache: Path, gigabytes: float) -> None:
    """Remove the entries that were used longest ago until the others fit, and print a line for each.

    Entries that a process has open stay, and so do those that were used since this process began.

    Args:
        cache: The folder.
        gigabytes: Its bound, in 10**9 bytes; 0 is no bound.
    """
    if not gigabytes:
        return
    entries = sorted(_entries(cache))
    total = sum(entry.size for entry in entries)
    for entry in entries:
        if total <= gigabytes * GB or entry.used >= STARTED:
            break
        if _removed(entry.path):
            total -= entry.size
            day = time.strftime("%Y-%m-%d", time.gmtime(entry.used))
            print(
                f"cache: {entry.path} was removed ({_in_gb(entry.size)}, last used on {day}), to stay below "
                f"--data.cache_gb {gigabytes:g}",
                file=sys.stderr,
            )
    if total > gigabytes * GB:
        print(
            f"warning: {cache} holds {_in_gb(total)}, which is in use, and --data.cache_gb is {gigabytes:g}",
            file=sys.stderr,
        )


def _in_gb(size: int) -> str:
    return f"{size / GB:.3g} GB"


def _entries(cache: Path) -> Iterator[_Entry]:
    for inner, pattern in ENTRIES.items():
        with contextlib.suppress(OSError):
            for path in (cache / inner).iterdir():
                if re.fullmatch(pattern, path.name) and not path.is_symlink():
                    with contextlib.suppress(OSError):  # It may have been removed meanwhile.
                        yield _entry(path)


def _entry(path: Path) -> _Entry:
    inner = [*path.rglob("*")] if path.is_dir() else []
    stats = [found.lstat() for found in (path, *inner)]
    # A store that is being built is as recent as its file that grows.
    return _Entry(max(stat.st_mtime for stat in stats), sum(stat.st_size for stat in stats), path)


def _removed(path: Path) -> bool:
    """Remove an entry that no process has open; return whether it was removed."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        discard(path)
    except OSError:  # It is locked, cannot be locked, or may not be removed.
        return False
    finally:
        os.close(descriptor)
    return True
