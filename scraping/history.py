"""The history of a git checkout on this machine: its commits, what they changed, and the files of any.

    with opened("~/code/mine") as history:
        for commit in history.commits():
            commit.id, commit.parents, commit.time, commit.message
        for id, changes in history.changes(ids):
            ...
        history.tree(id), history.blobs(ids)

The checkout is a stranger's. Its objects are read through a bare repository of our own in a temporary
folder, whose `objects/info/alternates` names them: no setting, hook, filter, attribute driver, replacement
or signature program of the checkout is ever looked at, nothing in it is written or locked, and git may use
no protocol, so that it reaches no network. Of the checkout itself git is asked where its objects are and
which commits its names stand for, by `rev-parse`, which runs no program. What is written there meanwhile is
not seen.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from scraping.documents import path_text
from scraping.gitrepo import (
    ID,
    KINDS,
    GitLimits,
    GitRepository,
    TreeFile,
    _split,
    check_revision,
    refuse_without_git,
)

MOST_COMMITS = 50_000  # Of a longer history the newest are read.
SIMILAR = 50  # Per cent of a file that a rename keeps, as for git itself.
RENAMES = 400  # Files of one commit beyond which renames are not looked for: the search is quadratic.


class Commit(NamedTuple):
    """A commit: `time` is its committer's, in seconds; `people` are the names and addresses that it gives."""

    id: str
    parents: tuple[str, ...]
    time: int
    message: str
    people: frozenset[str]


@dataclass(frozen=True)
class Change:
    """What a commit did to a file.

    Args:
        kind: git's letter: A added, D deleted, M modified, R renamed, C copied, T of another type.
        path: The file's path after it.
        before: Its path before it; another one where it was renamed.
        id: Its blob after it; zeros where it was deleted.
        before_id: Its blob before it; zeros where it was added.
        reason: Why what stands there now is no file; "" if it is one.
    """

    kind: str
    path: bytes
    before: bytes
    id: str
    before_id: str
    reason: str = ""


class History(GitRepository):
    """The history of a checkout, which `opened` opens; `commit` is its HEAD."""

    failed = "cannot be read"

    def at(self, commit: str) -> Iterator[TreeFile]:
        """Yield every name of a commit's tree, as `tree` does of HEAD's."""
        of = History(self.url, self.folder, self.limits)
        of.commit = commit
        return of.tree()

    def ids(self, *of: str, mainline: bool = False) -> list[str]:
        """Return the ids of commits, parents first, of the newest MOST_COMMITS that `of` reaches.

        Args:
            of: Commits, and after `^` commits whose own history is left out.
            mainline: Follow first parents only.
        """
        assert all(ID.fullmatch(one.removeprefix("^")) for one in of)
        flags = ["--topo-order", f"--max-count={MOST_COMMITS}", *(["--first-parent"] if mainline else [])]
        with self._git("rev-list", *flags, *of, "--") as out:
            return [line.decode() for line in _split(out, b"\n")][::-1]

    def commits(self, ids: Iterable[str]) -> Iterator[Commit]:
        """Yield commits by their ids, in this order.

        Raises:
            ValueError: One of them is damaged.
        """
        lines = "".join(f"{id}\n" for id in ids)
        with self._git("cat-file", "--batch", lines=lines) as out:
            for id in lines.split():
                head = out.readline(200).split()
                if not head:
                    return
                if len(head) != 3 or head[1] != b"commit":
                    raise ValueError(f"{self.url} has a damaged commit {id}")
                data = out.read(int(head[2]))
                out.read(1)
                yield _commit(id, data)

    def changes(self, ids: Iterable[str]) -> Iterator[tuple[str, list[Change]]]:
        """Yield (commit, its changes against its parent) in this order; a merge has none, and a root all.

        A rename is one change, if the file keeps half of its text.
        """
        lines = "".join(f"{id}\n" for id in ids)
        flags = ("--stdin", "-r", "-z", "--raw", "--root", f"-M{SIMILAR}%", f"-l{RENAMES}", "--no-abbrev")
        found: dict[str, list[Change]] = {}
        with self._git("diff-tree", *flags, "--no-ext-diff", "--no-textconv", lines=lines) as out:
            fields, now = _split(out, b"\0"), ""
            for field in fields:
                if not field.startswith(b":"):
                    now = field.strip().decode()
                    found[now] = []
                    continue
                _, mode, before_id, id, kind = field[1:].decode().split(" ")
                before = next(fields)
                path = next(fields) if kind[0] in "RC" else before
                reason = "" if kind[0] == "D" else KINDS.get(mode[:2].encode(), "no file")
                found[now].append(Change(kind[0], path, before, id, before_id, reason))
        for id in lines.split():
            yield id, found.get(id, [])

    def present(self, ids: Iterable[str]) -> dict[str, int]:
        """Return the sizes in bytes of those blobs that are here; a partial clone lacks some."""
        lines, found = "".join(f"{id}\n" for id in sorted(set(ids))), {}
        with self._git("cat-file", "--batch-check", lines=lines) as out:
            for line in _split(out, b"\n"):
                id, *rest = line.decode().split()
                if len(rest) == 2 and rest[0] == "blob":
                    found[id] = int(rest[1])
        return found

    def named(self, revision: str) -> str:
        """Return the commit that a branch, tag, id or HEAD~3 names in the checkout; "" where none does."""
        check_revision(re.sub(r"(?:[~^][0-9]*)+$", "", revision))
        words = ("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
        with contextlib.suppress(ValueError), self._git(self._theirs, *words, inside=False) as out:
            return out.read(200).decode().strip()
        return ""

    def open(self, git_dir: Path, given: str) -> None:
        """Ask the checkout for its objects and its HEAD, and make the repository that reads them.

        Raises:
            ValueError: It is shallow, has no commit, or cannot be read.
        """
        self._theirs = f"--git-dir={git_dir}"
        words = ("rev-parse", "--is-shallow-repository", "--show-object-format", "--git-path", "objects")
        with self._git(self._theirs, *words, inside=False) as out:
            shallow, kind, objects = out.read(2**16).decode("utf-8", "surrogateescape").splitlines()
        if shallow == "true":
            raise ValueError(
                f"{given} is a shallow clone, whose history is cut off: run git fetch --unshallow in it, and "
                "the rest of its commits is there"
            )
        head = self._head()
        if not head:
            raise ValueError(f"{given} has no commit yet, and so no history to learn from: commit something")
        words = ("init", "--quiet", "--bare", "--template=", f"--object-format={kind}", str(self.folder))
        with self._git(*words, inside=False):
            pass
        place = self.folder / "objects" / "info" / "alternates"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(os.fsencode(str(git_dir / objects)) + b"\n")
        self.commit = head

    def _head(self) -> str:
        words = ("rev-parse", "--verify", "--quiet", "HEAD^{commit}")
        with contextlib.suppress(ValueError), self._git(self._theirs, *words, inside=False) as out:
            return out.read(200).decode().strip()
        return ""

    def _environment(self, network: bool) -> dict[str, str]:
        more = {"GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1", "GIT_NO_REPLACE_OBJECTS": "1"}
        return super()._environment(network=False) | more


def _commit(id: str, data: bytes) -> Commit:
    """Read a commit's own bytes, which may be of any encoding and form."""
    head, _, message = data.decode("utf-8", "replace").partition("\n\n")
    parents, time, people = [], 0, set()
    for line in head.split("\n"):
        what, _, rest = line.partition(" ")
        if what == "parent":
            parents.append(rest)
        if what in ("author", "committer") and (found := re.fullmatch(r"(.*?) ?<(.*)> (-?\d+) .*", rest)):
            people |= {found[1].strip(), found[2].strip()}
            time = int(found[3])
    return Commit(id, tuple(parents), time, message, frozenset(people - {""}))


@contextlib.contextmanager
def opened(source: str | Path, limits: GitLimits | None = None) -> Iterator[History]:
    """Open the history of a checkout, or of a bare repository, in a folder; it is closed with the block.

    Raises:
        ValueError: There is no git, the folder is no repository, or its history cannot be read.
    """
    refuse_without_git()
    folder = Path(source).expanduser()
    git_dir = next((place for place in (folder / ".git", folder) if _is_repository(place)), None)
    if git_dir is None:
        raise ValueError(
            f"{path_text(os.fsencode(folder))} holds no git repository: give the top folder of a checkout, "
            "the one that has .git"
        )
    if "\n" in str(git_dir.resolve()):
        raise ValueError("the checkout's path has a line break, which git cannot be told: rename the folder")
    with tempfile.TemporaryDirectory() as scratch:
        history = History(str(folder), Path(scratch).resolve() / "bare", limits or GitLimits())
        history.open(git_dir.resolve(), str(folder))
        yield history


def _is_repository(place: Path) -> bool:
    """Return whether a folder has the parts of a git repository, or a file names one, as in a work tree."""
    if place.is_file():
        with place.open("rb") as file:
            return file.read(8) == b"gitdir: "
    return (place / "HEAD").exists() and (place / "objects").is_dir()
