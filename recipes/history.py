"""A repository's history, cut by time: what stood there is learned, and what was written next is the test.

    ------ V ------------ T ------------ HEAD
    the tree at V trains; lines added after V and up to T validate; lines added after T are the test

Lines that validate must be unseen, or the best checkpoint is chosen blindly: so the tree of V trains, a
little older than that of T. A commit belongs to a part by what T and V can reach, and not by its date: a
branch that began before T and was merged after it was not there yet.

    Checkout -> scraping.history -> Reader.text (the scraper's stages) -> History.tree, History.steps

Whatever is left out is counted with its reason. Nothing leaves the machine, and the checkout is not changed.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from recipes.building import Counts
from scraping import history as git
from scraping.clean import CleanSettings
from scraping.documents import Drop, RawFile, ScrapedDocument, path_text
from scraping.stages import encoding, origin, secrets, shape
from scraping.stages.headers import without_header
from scraping.wanted import Wanted, data_reason

CODE = (
    *(".py", ".pyi", ".kt", ".kts", ".java", ".scala", ".groovy", ".js", ".jsx", ".mjs", ".ts", ".tsx"),
    *(".vue", ".svelte", ".c", ".h", ".cc", ".cpp", ".hpp", ".cs", ".go", ".rs", ".swift", ".m", ".rb"),
    *(".php", ".pl", ".lua", ".r", ".jl", ".hs", ".ml", ".ex", ".exs", ".erl", ".clj", ".el", ".lisp"),
    *(".dart", ".sh", ".sql", ".proto", ".zig"),
)
MOST_BYTES = 2**18  # of a file
LOCKS = re.compile(
    r"(?:^|/)(?:[\w.-]*[-.]lock(?:\.(?:json|ya?ml|toml|hcl))?|package-lock\.json|npm-shrinkwrap\.json|pnpm-lock\.yaml|go\.sum|gradle\.lockfile)$",
    re.IGNORECASE,
)
REVERT = re.compile(
    r"^(?:revert\b|reapply\b)|^this reverts commit [0-9a-f]{7,}", re.IGNORECASE | re.MULTILINE
)
MASS_FILES = (
    50  # A commit that changes more files of code is a move or a formatter's, not somebody's writing.
)
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1  # of the commits on the main line; the second of those before T
FEWEST_COMMITS = 10  # Before T and after it; of a shorter history files are split.
MOST_STEPS = 600  # Of more commits after V, this many are read, evenly spread.
TOGETHER_FILES = 12  # A commit of more files says little about which of them belong together.
EMPTY = "0" * 40


class Edit(NamedTuple):
    """A file before and after one commit, as lines, cleaned; before a file was added it has none."""

    path: str
    before: list[str]
    after: list[str]


class Step(NamedTuple):
    """A commit after V: its id, its parent ("" of the first), the split that it is in, and its edits."""

    id: str
    parent: str
    split: str
    edits: list[Edit]


@dataclass
class Cut:
    """What a recipe needs of a history.

    Args:
        known: The commit V, whose tree is learned.
        since: The commit T.
        head: The newest commit that was read.
        by_files: Whether the history is too short to be cut by time, so that files were split instead.
        tree: The files at V as (path, text).
        recent: The files of `tree` that one of the last commits before V changed.
        together: How often two files were changed by one commit before V.
        steps: The commits after V that are validation and test; none where files are split.
        counts: What was found, and what was left out.
    """

    known: str
    since: str
    head: str
    by_files: bool
    tree: dict[str, str]
    recent: set[str]
    together: dict[str, Counter[str]]
    steps: list[Step]
    counts: Counts = field(default_factory=lambda: Counts("commits, files and changes of files"))


class Cleaner:
    """Cleans files of code to texts: no secret, no name or address of a committer, no licence header.

    Args:
        people: Names and addresses of those who commit.
        extensions: Endings of the names of files that are read.
    """

    def __init__(self, people: Iterable[str] = (), extensions: Sequence[str] = CODE) -> None:
        # A single word, such as a nick, may be a word of the code too.
        self.people = sorted({one for one in people if " " in one or "@" in one}, key=len, reverse=True)
        self.wanted = Wanted(tuple(extensions), 0, MOST_BYTES)
        s = CleanSettings()
        self._decoded = encoding.build(latin1=False, line_ends="lf", note=lambda what: None)
        self._stages = (
            origin.build(),
            lambda one: ScrapedDocument(without_header(one.text, one.path), "", one.path, "", ""),
            shape.build(0, s.max_line, s.max_mean_line, s.min_alnum, s.max_escapes, s.max_numbers),
            secrets.build(personal=True, note=lambda what: None),
        )

    def reason(self, path: bytes, size: int) -> str:
        """Return why a file of this name and size is left out unread; "" where it is to be read."""
        return "lock file" if LOCKS.search(path_text(path)) else self.wanted.reason(path, size)

    def cleaned(self, path: bytes, data: bytes) -> str | Drop:
        """Return the text of a file, or why it is left out."""
        if why := data_reason(data):
            return Drop(why)
        found = self._decoded(RawFile("", path_text(path), "", "", data))
        for stage in self._stages:
            if isinstance(found, Drop):
                return found
            found = stage(found)
        return found if isinstance(found, Drop) else self._nameless(found.text)

    def _nameless(self, text: str) -> str:
        for name in self.people:
            if name in text:
                text = text.replace(name, "<AUTHOR>")
        return text


class Reader(Cleaner):
    """Reads blobs of a history as cleaned texts.

    Args:
        history: Where they are.
        people: Names and addresses of those who commit.
        extensions: Endings of the names of files that are read.
    """

    def __init__(self, history: git.History, people: Iterable[str], extensions: Sequence[str] = CODE) -> None:
        super().__init__(people, extensions)
        self.history = history
        self._sizes: dict[str, int] = {}
        self._raw: dict[str, bytes] = {}
        self._texts: dict[tuple[str, str], str | Drop] = {}

    def need(self, files: Iterable[tuple[bytes, str]]) -> None:
        """Fetch the blobs of (path, id) that `text` will be asked for, all at once."""
        ids = {id for path, id in files if id.strip("0") and not self.wanted.reason(path, 0)}
        self._sizes |= self.history.present(ids - self._sizes.keys())
        ids = {id for id in ids if id not in self._raw and self._sizes.get(id, MOST_BYTES + 1) <= MOST_BYTES}
        self._raw |= {id: data for id, data in self.history.blobs(sorted(ids)) if data is not None}

    def text(self, path: bytes, id: str, reason: str = "") -> str | Drop:
        """Return the cleaned text of a blob that was needed, or why it is left out."""
        key = path_text(path), id
        if key not in self._texts:
            self._texts[key] = self._read(path, id, reason)
        return self._texts[key]

    def _read(self, path: bytes, id: str, reason: str) -> str | Drop:
        if why := reason or self.reason(path, self._sizes.get(id, 0)):
            return Drop(why)
        if id not in self._raw:
            return Drop("not here, or damaged: a partial clone has not fetched it")
        return self.cleaned(path, self._raw[id])


def cut(history: git.History, since: str = "", extensions: Sequence[str] = CODE) -> Cut:
    """Cut a history at a date, a commit, a branch or a tag; by default so that a fifth of it is the test.

    Raises:
        ValueError: `since` names no commit of this history, or one with nothing before or after it.
    """
    everything = history.ids(history.commit)
    commits = {one.id: one for one in history.commits(everything)}
    mainline = [id for id in history.ids(history.commit, mainline=True) if id in commits]
    test_from = _since(history, since, commits, mainline)
    before = (
        mainline[: mainline.index(test_from) + 1]
        if test_from in mainline
        else history.ids(test_from, mainline=True)
    )
    known = before[max(0, len(before) - 1 - max(1, round(VALIDATION_SHARE * len(before))))]
    after = history.ids(history.commit, f"^{test_from}")
    by_files = not since and min(len(before), len(after)) < FEWEST_COMMITS
    if by_files:
        known = test_from = history.commit
    elif not after or known == test_from:
        raise ValueError(
            f"--since {since} leaves {len(before)} commits of the main line before it and {len(after)} after "
            "it, and both parts need some; name another moment, or leave it out"
        )
    reader = Reader(history, {one for commit in commits.values() for one in commit.people}, extensions)
    made = Cut(known, test_from, history.commit, by_files, {}, set(), {}, [])
    _read_tree(history, reader, made)
    reached = set(history.ids(known))
    _read_past(history, made, [id for id in everything if id in reached], commits)
    if not by_files:
        test = set(after)
        made.steps = _read_steps(
            history, reader, made, [commits[id] for id in everything if id not in reached], test
        )
    return made


def _since(
    history: git.History, since: str, commits: Mapping[str, git.Commit], mainline: Sequence[str]
) -> str:
    """Return the commit T."""
    if not since:
        return mainline[max(0, len(mainline) - 1 - max(1, round(TEST_SHARE * len(mainline))))]
    if re.fullmatch(r"\d{4}-\d\d-\d\d(?:[T ].*)?", since):
        try:
            moment = datetime.datetime.fromisoformat(since)
        except ValueError:
            raise ValueError(f"--since {since} is no date: write it as 2024-05-31") from None
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
        earlier = [id for id in mainline if commits[id].time < seconds]
        if not earlier:
            first = datetime.datetime.fromtimestamp(commits[mainline[0]].time, datetime.UTC).date()
            raise ValueError(f"--since {since} is before the first commit, of {first}; name a later moment")
        return earlier[-1]
    found = history.named(since)
    if not found:
        raise ValueError(f"--since {since} is no commit, branch or tag here, nor a date as 2024-05-31")
    if found not in commits:
        raise ValueError(f"--since {since} is not in the history of HEAD; name a commit that is")
    return found


def _read_tree(history: git.History, reader: Reader, made: Cut) -> None:
    files = list(history.at(made.known))
    reader.need((file.path, file.id) for file in files if not file.reason)
    for file in files:
        made.counts.found += 1
        found = reader.text(file.path, file.id, file.reason)
        if isinstance(found, Drop):
            made.counts.drop(f"file of the tree: {found.reason}")
        elif not found.strip():
            made.counts.drop("file of the tree: empty")
        else:
            made.tree[path_text(file.path)] = found


def _read_past(
    history: git.History, made: Cut, ids: Sequence[str], commits: Mapping[str, git.Commit]
) -> None:
    """Fill in which files were changed lately, and which together, under the names that they have at V."""
    own = [id for id in ids if not left_out(commits[id])]
    together: dict[str, Counter[str]] = defaultdict(Counter)
    latest: dict[str, int] = {}
    for number, (_, changes) in enumerate(history.changes(own)):
        for change in changes:
            old, new = path_text(change.before), path_text(change.path)
            if old != new and change.kind == "R":
                _rename(together, latest, old, new)
        paths = sorted({path_text(change.path) for change in changes if change.kind != "D"})
        if len(paths) <= MASS_FILES:
            latest |= dict.fromkeys(paths, number)
        if 2 <= len(paths) <= TOGETHER_FILES:
            for path in paths:
                together[path].update(other for other in paths if other != path)
    made.recent = {path for path, number in latest.items() if path in made.tree and number >= 0.8 * len(own)}
    made.together = {
        path: Counter({other: n for other, n in found.items() if other in made.tree})
        for path, found in together.items()
    }


def _rename(together: dict[str, Counter[str]], latest: dict[str, int], old: str, new: str) -> None:
    """Give what is known of a file to the name that it has now."""
    if old in latest:
        latest[new] = latest.pop(old)
    if old in together:
        together[new] += together.pop(old)
        for other in together[new]:
            together[other][new] += together[other].pop(old, 0)


def left_out(commit: git.Commit) -> str:
    """Return why nothing of a commit is taken by its kind; "" where it may be."""
    if len(commit.parents) > 1:
        return "merge"
    return "revert" if REVERT.search(commit.message) else ""


def _read_steps(
    history: git.History, reader: Reader, made: Cut, commits: Sequence[git.Commit], test: set[str]
) -> list[Step]:
    kept = []
    for commit in commits:
        made.counts.found += 1
        if why := left_out(commit):
            made.counts.drop(f"commit: {why}")
        else:
            kept.append(commit)
    stride = -(-len(kept) // MOST_STEPS)
    if stride > 1:
        made.counts.drop(f"commit: one of {stride} was read", len(kept) - len(kept[::stride]))
    changes = dict(history.changes(commit.id for commit in kept[::stride]))
    steps = []
    for commit in kept[::stride]:
        code = [one for one in changes[commit.id] if not reader.wanted.reason(one.path, 0)]
        if len(code) > MASS_FILES:
            made.counts.drop("commit: changes more than 50 files of code")
            continue
        reader.need([(one.path, one.id) for one in code] + [(one.before, one.before_id) for one in code])
        edits = []
        for change in changes[commit.id]:
            made.counts.found += 1
            found = _edit(reader, change)
            if isinstance(found, Drop):
                made.counts.drop(f"change: {found.reason}")
            else:
                edits.append(found)
        parent = commit.parents[0] if commit.parents else ""
        steps.append(Step(commit.id, parent, "test" if commit.id in test else "validation", edits))
    return steps


def _edit(reader: Reader, change: git.Change) -> Edit | Drop:
    """Return a file before and after a commit, or why the change is left out."""
    if change.kind == "D":
        return Drop("deletes")
    after = reader.text(change.path, change.id, change.reason)
    before: str | Drop = ""
    if change.before_id.strip("0"):
        before = reader.text(change.before, change.before_id)
    if isinstance(after, Drop):
        return after
    if isinstance(before, Drop):
        return Drop(f"was {before.reason}")
    if before == after:
        return Drop("of a name or mode alone" if change.kind == "R" else "of no text that is left")
    if bare(before) == bare(after):
        return Drop("formatting alone")
    return Edit(path_text(change.path), before.split("\n") if before else [], after.split("\n"))


def bare(text: str) -> str:
    """Return a text without what formatters change: blanks, quotes, commas and brackets' line breaks."""
    return re.sub(r"[\s'\",;]+", "", text)


def split_of_file(path: str) -> str:
    """Return the split of a file where a history is too short: a fifth is test, and a tenth validates."""
    share = hashlib.sha256(path.encode("utf-8", "surrogatepass")).digest()[0] / 256
    return "test" if share < 0.2 else "validation" if share < 0.3 else "train"


class Snapshots:
    """The cleaned files of commits one after another, each as what differs from the one before."""

    def __init__(self, history: git.History, reader: Reader) -> None:
        self.history, self.reader = history, reader
        self._now: dict[bytes, str] = {}

    def move_to(self, commit: str) -> Iterator[tuple[str, str | None]]:
        """Yield (path, text) of what is new or other at a commit, and (path, None) of what is gone."""
        files = {file.path: file.id for file in self.history.at(commit) if not file.reason} if commit else {}
        changed = {path: id for path, id in files.items() if self._now.get(path) != id}
        gone = self._now.keys() - files.keys()
        self.reader.need(changed.items())
        self._now = files
        for path in gone:
            yield path_text(path), None
        for path, id in changed.items():
            found = self.reader.text(path, id)
            yield path_text(path), None if isinstance(found, Drop) else found
