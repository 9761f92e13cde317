"""Fetch one repository of a crawl: its commit, its tree, and its files by the cheapest way (`route`).

Every file's bytes are checked against the git id that the tree gives them, so it does not matter where they
came from, or in which order. Facts about answers are from docs.github.com/en/rest, pages git/trees,
git/blobs, commits/commits and repos/contents.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from scraping.archive import ArchiveLimits, ArchiveMember, BrokenArchive, read_archive
from scraping.documents import path_text
from scraping.github import (
    JSON,
    RAW,
    SHA,
    GitHub,
    GitHubAnswer,
    GitHubRefused,
    GitHubTooLarge,
    Malformed,
    Unanswered,
)
from scraping.gitrepo import blob_id, fetched
from scraping.ledger import Ledger, ListedFile
from scraping.wanted import SUBMODULE, SYMBOLIC_LINK, Wanted, data_reason

# The price of a request in bytes: at 5,000 an hour each takes 0.7 s, in which a line of 3 MB/s brings 2 MB.
REQUEST = 2 * 2**20
CLONE = 30 * REQUEST
MAX_TARBALL = 2**30  # Bytes, unpacked; a larger repository comes file by file.
TARBALL_TRIES = 3
MAX_ENTRIES = 2_000_000  # Most files of a repository: ten objects can make a tree of 10^10.
MAX_TREES = 5_000  # most requests for one tree
BATCH_BYTES = 4 * 2**20  # Files of about this size are stored in one transaction.

GONE = {
    404: "not found",
    409: "empty repository",
    410: "gone",
    451: "unavailable for legal reasons",
}


@dataclass(frozen=True)
class HostedRepository:
    """A row of the ledger, as a worker needs it. `pinned` is "" before its files are listed."""

    id: int
    name: str
    branch: str
    clone_url: str
    bytes: int
    state: str
    pinned: str

    @property
    def root(self) -> str:
        """The repository's path in the API by its id, which names the same repository for ever.

        A name may be given up and taken by another repository; GitHub answers the old name of a renamed one
        with status 301 and this path.
        """
        return f"/repositories/{self.id}"


def fetch(client: GitHub, ledger: Ledger, wanted: Wanted, repository: HostedRepository, folder: Path) -> None:
    """List a repository's files if they are not listed yet, and fetch those that wait."""
    try:
        if repository.state == "found":
            repository = list_files(client, ledger, wanted, repository)
        fetch_files(client, ledger, repository, folder)
    except GitHubRefused as refusal:
        _give_up(ledger, repository.name, refusal)
    except GitHubTooLarge:
        ledger.done(repository.name, "tree too large")
    else:
        ledger.done(repository.name)


def recheck(
    client: GitHub, ledger: Ledger, wanted: Wanted, repository: HostedRepository, folder: Path
) -> None:
    """Remove a repository that may not be kept. While its branch stands still (304), this costs no limit."""
    del wanted, folder
    try:
        head(client, repository)
    except GitHubRefused as refusal:
        if refusal.status == 451:
            _give_up(ledger, repository.name, refusal)


def _give_up(ledger: Ledger, name: str, refusal: GitHubRefused) -> None:
    reason = GONE.get(refusal.status, f"refused with {refusal.status}")
    if refusal.status == 451:
        ledger.removed(name, reason)
        return
    with ledger.transaction():
        for entry in ledger.waiting(name):
            ledger.dropped(name, entry.path, reason)
        stored = ledger.rows("SELECT 1 FROM files WHERE repository = ? AND state = 'stored' LIMIT 1", name)
        ledger.done(name, "" if stored else reason)


def head(client: GitHub, repository: HostedRepository, branch: str = "") -> str:
    """Return the commit of a branch, by default the repository's default branch."""

    def read(answer: GitHubAnswer) -> str:
        return _git_id(answer.body.decode("ascii", "replace").strip())

    # The prefix tells the branch from a tag of its name; %2F within a parameter is as "Troubleshooting" asks.
    reference = quote(f"heads/{branch or repository.branch}", safe="")
    return client.get(f"{repository.root}/commits/{reference}", read, SHA, keep=True)


def list_files(
    client: GitHub, ledger: Ledger, wanted: Wanted, repository: HostedRepository
) -> HostedRepository:
    """Enter the files of a repository's branch into the ledger; count those of other extensions.

    Raises:
        GitHubRefused: it is gone, or has no commit.
        GitHubTooLarge: its tree is past MAX_ENTRIES.
    """
    try:
        commit = head(client, repository)
    except GitHubRefused as refusal:
        if refusal.status != 422:  # 422 means "No commit found": the default branch has changed
            raise
        branch = client.get(repository.root, lambda answer: str(answer.json()["default_branch"]))
        commit = head(client, repository, branch)
    entries: dict[str, ListedFile] = {}
    size = others = 0
    for mode, path, address, bytes_ in walk(client, repository.root, commit):
        size += bytes_
        reason = wanted.reason(path.encode("utf-8", "surrogatepass"), bytes_)
        if reason == "other extension":
            others += 1
            continue
        kind = {"120000": SYMBOLIC_LINK, "160000": SUBMODULE}.get(mode, "")
        spelled = path_text(path.encode("utf-8", "surrogatepass"))
        if spelled in entries:  # the API shows each byte that is not UTF-8 by one and the same sign
            spelled = f"{spelled}\\{len(entries)}"
        entries[spelled] = ListedFile(spelled, address, bytes_, kind or reason)
    with ledger.transaction() as db:
        db.execute("UPDATE hosted SET bytes = ?, others = ? WHERE id = ?", (size, others, repository.id))
        ledger.listed(repository.name, commit, entries.values())
        ledger.forget(f"{JSON} {client.api}{repository.root}/git/trees/")
    return dataclasses.replace(repository, state="listed", pinned=commit, bytes=size)


def walk(client: GitHub, root: str, commit: str) -> Iterator[tuple[str, str, str, int]]:
    """Yield (mode, path, id, size) of every file of a commit.

    One request lists a tree with all below it, but at most 100,000 entries and 7 MB (docs.github.com/en/rest/
    git/trees). A truncated tree is listed folder by folder instead, each again with all below it.
    """
    folders = [("", commit)]
    trees = entries = 0
    while folders:
        prefix, tree = folders.pop()
        rows, cut = client.get(f"{root}/git/trees/{tree}?recursive=1", read_tree, keep=True)
        if cut:
            rows, cut = client.get(f"{root}/git/trees/{tree}", read_tree, keep=True)
            if cut:
                raise GitHubTooLarge("a folder has more entries than the API lists")
            folders += [(f"{prefix}{path}/", address) for mode, path, address, _ in rows if mode == "040000"]
        trees += 1
        entries += len(rows)
        if trees > MAX_TREES or entries > MAX_ENTRIES:
            raise GitHubTooLarge("the tree has too many entries")
        for mode, path, address, size in rows:
            if mode != "040000":
                yield mode, prefix + path, address, size


def read_tree(answer: GitHubAnswer) -> tuple[list[tuple[str, str, str, int]], bool]:
    """Return (mode, path, id, size) of each entry of a tree, and whether the list is truncated."""
    body = answer.json()
    rows = [
        (str(row["mode"]), str(row["path"]), _git_id(row["sha"]), int(row.get("size") or 0))
        for row in body["tree"]
    ]
    return rows, bool(body["truncated"])


def route(files: int, wanted_bytes: int, tree_bytes: int, tried: Iterable[str] = ()) -> str:
    """Return the cheapest way to fetch files that was not tried yet: `tarball`, `git` or `blobs`.

    A tarball is one request for everything. It is assumed to be as large as its content: it compresses source
    code four times, but pictures and data not at all. A blob is one request for one file. A partial clone
    brings the wanted files alone and costs no request of the API, but it starts git and reads the tree again.

    Args:
        files: Number of wanted files.
        wanted_bytes: Their size.
        tree_bytes: Size of all files of the repository.
        tried: Ways that were tried already.
    """
    costs = {
        "tarball": REQUEST + tree_bytes,
        "git": CLONE + wanted_bytes,
        "blobs": files * REQUEST + wanted_bytes,
    }
    if tree_bytes > MAX_TARBALL:
        del costs["tarball"]
    return min((way for way in costs if way not in tried), key=lambda way: costs[way])


def fetch_files(client: GitHub, ledger: Ledger, repository: HostedRepository, folder: Path) -> None:
    """Fetch every file that waits."""
    name = repository.name
    for entry in ledger.waiting(name):
        reuse(ledger, name, entry)
    tried: list[str] = []
    while waiting := ledger.waiting(name):
        way = route(len(waiting), sum(entry.size for entry in waiting), repository.bytes, tried)
        if way == "blobs":
            for entry in waiting:
                if not reuse(ledger, name, entry):
                    fetch_blob(client, ledger, repository, entry)
            return
        # A way may be closed, or leave files for the next: `.gitattributes` keeps files out of an archive, or
        # changes them.
        tried.append(way)
        try:
            if way == "tarball":
                fetch_tarball(client, ledger, repository, waiting, folder)
            else:
                fetch_git(ledger, repository, waiting, folder)
        except GitHubRefused as refusal:
            if refusal.status == 451:
                raise
        except (Unanswered, GitHubTooLarge, Unfetched):
            pass


def reuse(ledger: Ledger, name: str, entry: ListedFile) -> bool:
    """Store a file by the bytes of a stored one of the same id, in any repository; False if none has them."""
    known = ledger.by_address(entry.address)
    if known is None or blob_id(known) != entry.address:  # Addresses of other sources are no git ids.
        return False
    ledger.stored(name, [(entry.path, known)])
    return True


class _Store:
    """A writer of files into the ledger, many in one transaction; it skips bytes that do not fit their id."""

    def __init__(self, ledger: Ledger, name: str) -> None:
        self._ledger = ledger
        self._name = name
        self._batch: list[tuple[str, bytes]] = []
        self._size = 0

    def add(self, entry: ListedFile, data: bytes) -> None:
        if why := data_reason(data):
            self._ledger.dropped(self._name, entry.path, why)
            return
        self._batch.append((entry.path, data))
        self._size += len(data)
        if self._size > BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        self._ledger.stored(self._name, self._batch)
        self._batch, self._size = [], 0


def fetch_tarball(
    client: GitHub, ledger: Ledger, repository: HostedRepository, waiting: list[ListedFile], folder: Path
) -> None:
    """Store the files that a tarball of the commit has unchanged."""
    by_path = {entry.path: entry for entry in waiting}

    def reason(path: bytes, size: int) -> str:
        entry = by_path.get(path_text(path))
        return "" if entry and entry.size == size else "not asked for"

    def members() -> Iterator[ArchiveMember]:
        try:
            yield from read_archive(file, reason, 1, ArchiveLimits(total_bytes=2 * MAX_TARBALL))
        except BrokenArchive as error:
            raise Malformed(str(error)) from error
        except ValueError as error:  # The archive is past a limit.
            raise GitHubTooLarge(str(error)) from error

    def read(answer: GitHubAnswer) -> None:
        del answer
        store = _Store(ledger, repository.name)
        try:
            for member in members():
                entry = by_path.get(path_text(member.path))
                if entry and member.data is not None and blob_id(member.data) == entry.address:
                    del by_path[entry.path]
                    store.add(entry, member.data)
        finally:  # files that came before the damage are whole, as their ids show
            store.flush()

    # A file without a name is gone when the process is.
    with tempfile.TemporaryFile(dir=folder) as file:
        client.get(
            f"{repository.root}/tarball/{repository.pinned}",
            read,
            cap=MAX_TARBALL,
            tries=TARBALL_TRIES,
            into=file,
        )


class Unfetched(Exception):
    """Failure of git to fetch, after which the other ways remain."""


def fetch_git(ledger: Ledger, repository: HostedRepository, waiting: list[ListedFile], folder: Path) -> None:
    """Store the files that a partial clone brings."""
    store = _Store(ledger, repository.name)
    try:
        with fetched(repository.clone_url, repository.pinned, folder / f"git-{repository.id}") as clone:
            clone.fetch(entry.address for entry in waiting)
            here = clone.sizes()
            entries = [entry for entry in waiting if here.get(entry.address) == entry.size]
            for entry, (_, data) in zip(entries, clone.blobs(e.address for e in entries), strict=True):
                if data is not None:
                    store.add(entry, data)
    except ValueError as error:
        raise Unfetched(str(error)) from error
    finally:
        store.flush()


def fetch_blob(client: GitHub, ledger: Ledger, repository: HostedRepository, entry: ListedFile) -> None:
    """Store one file by a request of its own."""

    def read(answer: GitHubAnswer) -> bytes:
        if blob_id(answer.body) != entry.address:
            raise Malformed("the bytes are not those that the id names")
        return answer.body

    try:
        url = f"{repository.root}/git/blobs/{entry.address}"
        data = client.get(url, read, RAW, cap=entry.size + 2**16)
    except GitHubRefused as refusal:
        if refusal.status == 451:
            raise
        head(client, repository)  # refused too if the whole repository is gone
        ledger.dropped(
            repository.name, entry.path, GONE.get(refusal.status, f"refused with {refusal.status}")
        )
        return
    except GitHubTooLarge:
        ledger.dropped(repository.name, entry.path, "larger than the tree says")
        return
    store = _Store(ledger, repository.name)
    store.add(entry, data)
    store.flush()


def _git_id(text: Any) -> str:
    if not isinstance(text, str) or len(text) != 40 or set(text) - set("0123456789abcdef"):
        raise Malformed("an id is none of git's")
    return text
