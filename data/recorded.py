"""What is recorded of a source that was read, so that the next start need not read it.

    record = recorded(config)          # None: the source has to be read
    write_record(config, record)       # after it was

A record is trusted if the names, sizes, times and inodes of all files are as recorded, and if a few files,
chosen anew at every start, have the bytes that they had. A write sets the time of change (ctime), which
programs cannot set back. But its clock ticks every few milliseconds, or seconds on some file systems: a file
that had just been changed when it was recorded could be changed once more without a trace, as in git's index
(its documentation calls that "racy"). So such a file is not trusted, and nor is any on a file system that is
not known to keep that time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import random
import re
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import DataConfig, say
from data import leaks
from data.cache import file_sha256, read_sealed, write_sealed
from data.corpus import refuse_unreadable
from data.documents import Document, FileState, ReadFile, Report
from data.sourcefiles import source_files
from tokenization.chat import Message

# Part of a record's key: raise it when the same files would be read or split as other documents.
VERSION = 1
HASHED = 16  # files that are read again at every start
SETTLED_NS = 2 * 10**9  # The coarsest clock of a file system that is known here ticks once a second.
# On Linux these set the time of change at every write. Others, such as FAT and shares of a network, have no
# such time, derive it from another one, or show it late.
WITH_CTIME = ("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs")
MOUNTS = Path("/proc/self/mountinfo")
# Settings that decide nothing of what is read and how it is split.
NOT_READ_BY = ("source", "store", "cache", "cache_gb", "workers", "heal", "fim_order", "order", "difficulty")
NOT_READ_BY += ("verify",)


@dataclass
class SourceRecord:
    """What is known of a source's documents without reading them.

    Args:
        time_ns: When reading began.
        report: The counts, the fingerprint, and the files.
        holds_examples: Whether the documents are examples.
        first_gap: Where the first example stands that fills a gap; "" without one.
        first_chat: Where the first conversation stands; "" without one.
        first_documents: The first documents for training, for the guard of prompts.
        tokenizers: Names in the cache of tokenizers that were trained on them, by settings.
    """

    time_ns: int
    report: Report
    holds_examples: bool = False
    first_gap: str = ""
    first_chat: str = ""
    first_documents: list[Document] = field(default_factory=list)
    tokenizers: dict[str, str] = field(default_factory=dict)


def recorded(config: DataConfig) -> SourceRecord | None:
    """Return the record of a source, and print one line on it; None without one that can be trusted.

    Raises:
        ValueError: as `refuse_unreadable`.
    """
    refuse_unreadable(config)
    saved = read_sealed(_path(config))
    if saved is None:
        return None
    record = from_plain(saved)
    files, (folder, names) = record.report.files, source_files(config)
    difference = "--data.verify" if config.verify else _difference(record, folder, names)
    if difference:
        say(f"source: read as a whole, and not taken as recorded: {difference}")
        return None
    # Not by the run's seed: every start is to look elsewhere.
    chosen = random.SystemRandom().sample(names, min(HASHED, len(names)))
    for name in chosen:
        if file_sha256(folder / name) != files[name].sha256:
            print(
                f"warning: {folder / name} has the size, times and inode that are recorded of it, and other "
                "bytes: the source is read as a whole; check the disk, and what writes there",
                file=sys.stderr,
            )
            return None
    count = f"{len(names):,} file{'s' if len(names) > 1 else ''}"
    say(f"source: {count} as recorded (names, sizes, times), {len(chosen)} of them hashed again")
    return record


def write_record(config: DataConfig, record: SourceRecord) -> None:
    """Write the record of a source into the cache; do nothing if the cache cannot be written."""
    write_sealed(_path(config), as_plain(record))


def as_plain(record: SourceRecord) -> dict[str, Any]:
    """Return a record as plain values."""
    files = [[name, *file.state, file.sha256] for name, file in record.report.files.items()]
    return vars(record) | {
        "report": vars(record.report) | {"files": files},
        "first_documents": [vars(document) | {"prompts": None} for document in record.first_documents],
    }


def from_plain(saved: dict[str, Any]) -> SourceRecord:
    """Return the record of values by `as_plain`, which may have been JSON."""
    files = {name: ReadFile(FileState(*state), sha256) for name, *state, sha256 in saved["report"]["files"]}
    documents = [_document(**values) for values in saved["first_documents"]]
    report = Report(**saved["report"] | {"files": files})
    return SourceRecord(**saved | {"report": report, "first_documents": documents})


def _document(gap: list[int] | None, messages: list[list[str]] | None = None, **values: Any) -> Document:
    """Return a document of its JSON, which has lists for tuples; older records have no messages."""
    said = None if messages is None else tuple(Message(role, content) for role, content in messages)
    return Document(**values, gap=None if gap is None else (gap[0], gap[1]), messages=said)


def _path(config: DataConfig) -> Path:
    """Name a record by the place of the source, and by all that decides how it is read and split."""
    is_library = config.source == "stdlib"
    place = sysconfig.get_path("stdlib") if is_library else config.source
    settings = dataclasses.asdict(config)
    for name in NOT_READ_BY:
        del settings[name]
    # Comments are dropped by the interpreter's own parser.
    versions = [VERSION, leaks.VERSION, platform.python_version()]
    key = json.dumps([versions, is_library, os.path.realpath(place), settings], sort_keys=True)
    return Path(config.cache) / f"source-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _difference(record: SourceRecord, folder: Path, names: list[str]) -> str:
    """Say what of a source's files is not as recorded, or cannot be known; "" where all is."""
    files = record.report.files
    if (system := file_system(folder)) not in WITH_CTIME:
        return f"its file system ({system}) is not known to say when a file was changed"
    if unequal := sorted(files.keys() ^ set(names)):
        return f"{unequal[0]} is {'gone' if unequal[0] in files else 'new'}"
    device = os.stat(folder).st_dev
    for name, file in files.items():
        found = os.stat(folder / name)
        if FileState.of(found) != file.state:
            return f"{name} has another size, time or inode"
        if found.st_dev != device:
            return f"{name} is on another file system than its folder"
        if file.state.ctime_ns >= record.time_ns - SETTLED_NS:
            return f"{name} had just been changed when it was recorded"
    return ""


def file_system(folder: Path) -> str:
    """Return the kind of file system that a folder is on, as Linux names it, or `unknown`."""
    place, longest, kind = os.path.realpath(folder) + "/", "", "unknown"
    with contextlib.suppress(OSError):
        for line in MOUNTS.read_text("utf-8", "surrogateescape").splitlines():
            fields, _, described = line.partition(" - ")
            # Spaces and the like are written as octal numbers.
            point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields.split(" ")[4])
            if place.startswith(point.rstrip("/") + "/") and len(point) >= len(longest):
                longest, kind = point, described.split(" ")[0]
    return kind
