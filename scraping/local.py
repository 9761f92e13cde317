"""python -m scraping local: take in the files of a folder or an archive.

In a folder no link is followed and only plain files are opened. Its own `.git` is passed over, and a folder
below it with a `.git` counts as a submodule. archive.py reads archives.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from config import option
from scraping.archive import commit_of, read_archive
from scraping.documents import path_text
from scraping.gitrepo import blob_id
from scraping.ledger import Ledger, ListedFile
from scraping.source import Origin, Selection, finished, known, list_files, open_ledger, report, store_files
from scraping.wanted import NO_FILE, SUBMODULE, SYMBOLIC_LINK, Wanted

UNREADABLE = "cannot be read"
CHANGED = "changed since it was listed"
ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip", ".whl")


@dataclass(frozen=True)
class LocalSettings(Selection):
    """Settings of the command local: a folder or an archive, and which of its files are wanted.

    Args:
        path: The folder, or the archive: .tar, .tar.gz, .tgz, .tar.bz2, .tar.xz, .zip, .whl
        repository: Its name in the corpus; by default its own name.
        revision: Its version; by default, for an archive, the commit that git wrote into it.
        licence: Its SPDX expression, as in Apache-2.0; empty means unknown, which `clean` drops.
        strip: Leading folders to take off the names in an archive; 1 for GitHub's and for a package's source.
    """

    path: str = ""
    repository: str = ""
    revision: str = ""
    licence: str = ""
    strip: int = option(0, alone="1")


def run(settings: LocalSettings) -> None:
    """Take in the files; a mistake of the user or a broken archive raises ValueError, without effect."""
    path = Path(settings.path)
    if not settings.path or not path.exists():
        missing = f"{settings.path} is not there: " if settings.path else ""
        raise ValueError(f"{missing}name a folder or an archive with --path")
    if settings.strip < 0 or (settings.strip and path.is_dir()):
        raise ValueError(f"--strip is {settings.strip}: it takes leading folders off the names in an archive")
    name = path.resolve().name
    ending = next((end for end in sorted(ENDINGS, key=len, reverse=True) if name.endswith(end)), "")
    name = settings.repository or path_text(
        os.fsencode(name.removesuffix(ending) if path.is_file() else name)
    )
    wanted = settings.wanted()
    origin = Origin(name, "local", settings.revision, settings.licence)
    ledger = open_ledger(settings.folder)
    if path.is_dir():
        take_folder(ledger, origin, path, wanted)
    else:
        take_archive(ledger, origin, path, wanted, settings.strip)
    report(ledger, origin.name)


# ---------------------------------------------------------------------------------------------
# A folder


def walk(root: bytes, left_out: frozenset[bytes] = frozenset()) -> Iterator[tuple[bytes, int, str]]:
    """Yield (path from the root, size, reason) of all below it that is no folder, in git's order.

    A folder that cannot be read, or that is a repository of its own, is one entry, with its reason.

    Args:
        root: The folder.
        left_out: Names of folders that do not belong to it.
    """
    places = [b""]
    while places:
        place = places.pop()
        if place and not place.endswith(b"/"):
            full = os.path.join(root, place)
            try:
                found = os.lstat(full)
            except OSError:
                yield place, 0, UNREADABLE
                continue
            kinds = {stat.S_IFREG: "", stat.S_IFLNK: SYMBOLIC_LINK}
            plain = stat.S_ISREG(found.st_mode)
            yield place, found.st_size if plain else 0, kinds.get(stat.S_IFMT(found.st_mode), NO_FILE)
            continue
        try:
            with os.scandir(os.path.join(root, place)) as entries:
                below = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        except OSError:
            yield place or b".", 0, UNREADABLE
            continue
        if place and any(name == b".git" for name, _ in below):
            yield place.rstrip(b"/"), 0, SUBMODULE
            continue
        names = (
            place + name + (b"/" if folder else b"")
            for name, folder in below
            if name != b".git" and not (folder and name in left_out)
        )
        places += sorted(names, reverse=True)


def read_plain(root: bytes, path: bytes, size: int) -> bytes | str:
    """Return the bytes of a plain file of this size, or why not; no link, pipe or device is opened."""
    try:
        handle = os.open(os.path.join(root, path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return UNREADABLE
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return CHANGED
        try:
            data = file.read(size + 1)
        except OSError:
            return UNREADABLE
    return data if len(data) == size else CHANGED


def take_folder(
    ledger: Ledger, origin: Origin, folder: Path, wanted: Wanted, left_out: frozenset[bytes] = frozenset()
) -> None:
    """Enter a folder into the ledger; files that it already has stay."""
    state, _ = known(ledger, origin)
    root = os.fsencode(folder.resolve())

    if finished(ledger, origin.name, state):
        return

    def found() -> Iterator[ListedFile]:
        for path, size, reason in walk(root, left_out):
            reason = reason or wanted.reason(path, size)
            data = reason or read_plain(root, path, size)
            if isinstance(data, str):
                yield ListedFile(path_text(path), "", size, data)
            else:
                yield ListedFile(path_text(path), blob_id(data), size)

    def read(waiting: list[ListedFile]) -> Iterator[tuple[ListedFile, bytes | str]]:
        asked = {entry.path: entry for entry in waiting}
        for path, _, _ in walk(root, left_out):
            entry = asked.get(path_text(path))
            if entry:
                yield entry, _unchanged(entry, read_plain(root, path, entry.size))

    if state != "listed":
        list_files(ledger, origin, origin.revision, found())
    store_files(ledger, origin.name, read)


def _unchanged(entry: ListedFile, data: bytes | str) -> bytes | str:
    return data if isinstance(data, str) or blob_id(data) == entry.address else CHANGED


# ---------------------------------------------------------------------------------------------
# An archive


def take_archive(ledger: Ledger, origin: Origin, path: Path, wanted: Wanted, strip: int) -> None:
    """Enter an archive into the ledger; files that it already has stay."""
    state, _ = known(ledger, origin)
    if finished(ledger, origin.name, state):
        return

    def read(waiting: list[ListedFile]) -> Iterator[tuple[ListedFile, bytes | str]]:
        asked = {entry.path: entry for entry in waiting}
        for member in read_archive(file, wanted.reason, strip):
            entry = asked.get(path_text(member.path))
            if entry:
                yield entry, _unchanged(entry, member.reason if member.data is None else member.data)

    with open(path, "rb") as file:
        try:
            if state != "listed":
                # The archive is read to its end first, so that nothing is stored of a broken one.
                entries = [
                    ListedFile(
                        path_text(member.path),
                        "" if member.data is None else blob_id(member.data),
                        member.size,
                        member.reason,
                    )
                    for member in read_archive(file, wanted.reason, strip)
                ]
                list_files(ledger, origin, origin.revision or commit_of(file), entries)
            store_files(ledger, origin.name, read)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
