"""python -m scraping clone: the files of one git repository at a revision, by way of gitrepo.py."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scraping.documents import path_text
from scraping.gitrepo import GitLimits, check_revision, check_url, fetched, refuse_without_git
from scraping.ledger import Ledger, ListedFile
from scraping.source import Origin, Selection, finished, known, list_files, open_ledger, report, store_files
from scraping.wanted import Wanted


@dataclass(frozen=True)
class CloneSettings(Selection):
    """Settings of the command clone: a repository, and which of its files are wanted.

    Args:
        url: Address of the repository, as in https://github.com/JetBrains/kotlin
        revision: A branch, a tag, or all digits of a commit.
        repository: Its name in the corpus; by default the path in its address, as in JetBrains/kotlin
        licence: Its SPDX expression, as in Apache-2.0; empty means unknown, which `clean` drops.
        insecure: Let http:// and git:// go to other machines than this one.
        seconds: Time limit of each of git's steps.
        pack_bytes: The most that git may fetch in one step.
    """

    url: str = ""
    revision: str = "HEAD"
    repository: str = ""
    licence: str = ""
    insecure: bool = False
    seconds: float = GitLimits.seconds
    pack_bytes: int = GitLimits.bytes


def name_of(url: str) -> str:
    """Return the `owner/name` of an address."""
    return url.split("://", 1)[-1].split("/", 1)[-1].strip("/").removesuffix(".git")


def run(settings: CloneSettings) -> None:
    """Fetch the repository's files; a mistake of the user or the server raises ValueError, without effect."""
    if not settings.url:
        raise ValueError("name the repository with --url, as in --url https://github.com/JetBrains/kotlin")
    check_url(settings.url, settings.insecure)
    check_revision(settings.revision)
    name = settings.repository or name_of(settings.url)
    if not name:
        raise ValueError(f"{settings.url} names no repository: give one with --repository")
    wanted = settings.wanted()
    refuse_without_git()
    origin = Origin(name, "clone", settings.revision, settings.licence)
    ledger = open_ledger(settings.folder)
    clone(ledger, origin, settings, wanted)
    report(ledger, origin.name)


def clone(ledger: Ledger, origin: Origin, settings: CloneSettings, wanted: Wanted) -> None:
    """Enter one repository into the ledger; files that it already has stay."""
    state, pinned = known(ledger, origin)
    if finished(ledger, origin.name, state):
        return
    place = Path(settings.folder) / f"clone-{hashlib.sha256(origin.name.encode()).hexdigest()[:16]}"
    limits = GitLimits(seconds=settings.seconds, bytes=settings.pack_bytes)
    with fetched(settings.url, pinned or origin.revision, place, limits, settings.insecure) as repository:
        if state != "listed":
            # The server does not tell sizes: files whose names are not wanted are listed with the size 0.
            files = [
                (file, file.reason or wanted.reason(file.path, wanted.max_bytes))
                for file in repository.tree()
            ]
            repository.fetch(file.id for file, reason in files if not reason)
            sizes = repository.sizes()
            entries = []
            for file, reason in files:
                size = sizes.get(file.id, 0)
                if not reason:
                    reason = wanted.reason(file.path, size) if file.id in sizes else "not on the server"
                entries.append(ListedFile(path_text(file.path), file.id, size, reason))
            list_files(ledger, origin, repository.commit, entries)

        def read(waiting: list[ListedFile]) -> Iterator[tuple[ListedFile, bytes | str]]:
            repository.fetch(entry.address for entry in waiting)
            sizes = repository.sizes()
            here = [entry for entry in waiting if entry.address in sizes]
            for entry, (_, data) in zip(here, repository.blobs(e.address for e in here), strict=True):
                yield entry, "damaged" if data is None else data

        store_files(ledger, origin.name, read)
