"""What was written next, as an editor meets it: the file as it was, with what a commit added taken out.

    before:  a b c d          the hunk        prefix: a b x      (x was added before y, and is typed already)
    after:   a b x y d   ->   + x y, - c  ->  middle: y
                                              suffix: d

A case is a line, the rest of a line, or a block of lines. Its prefix and suffix are the file at the parent
commit around the hunk, with those added lines that precede the cursor: what is typed later is not there yet,
neither in this hunk nor in the others of the commit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rapidfuzz.distance import LCSseq

from recipes.building import Counts
from recipes.history import Step, bare

KINDS = ("line", "rest", "block")
MOST_BLOCK = 8  # lines
LIMIT_TOKENS = 96  # of what is written; longer ones are left out
MOST_LINES = 10_000  # of a file; the comparison takes the product of two files' lines in bits
LETTERS = 3  # A line with fewer letters and digits is no line to foretell.
MOVED = 3  # Lines in a row that stand in the learned tree too, from which on an added piece counts as moved.


class Written(NamedTuple):
    """A case: what was written at a place, and the file around it as it was then.

    Args:
        path: The file.
        commit: The commit that wrote it.
        line: The number of its first line in the file after the commit, from 1.
        kind: One of KINDS.
        prefix: All of the file before the cursor.
        middle: What was written.
        suffix: All of the file after it.
    """

    path: str
    commit: str
    line: int
    kind: str
    prefix: str
    middle: str
    suffix: str

    @property
    def name(self) -> str:
        """The case's name, whose part before the colon is its file."""
        return f"{self.path}:{self.commit[:10]}.{self.line}.{self.kind}"


class Hunk(NamedTuple):
    """Lines that a commit added at one place, with the lines of the old file on both sides."""

    before: list[str]
    added: list[str]
    after: list[str]
    line: int


def hunks(before: Sequence[str], after: Sequence[str], counts: Counts) -> Iterator[Hunk]:
    """Yield the places at which lines were added or replaced; formatting alone is left out, and counted."""
    if max(len(before), len(after)) > MOST_LINES:
        counts.found += 1
        counts.drop("hunk: of a file with more than 10,000 lines")
        return
    changed: list[tuple[int, int, int, int]] = []
    for code in LCSseq.opcodes(before, after):
        i1, i2, j1, j2 = code.src_start, code.src_end, code.dest_start, code.dest_end
        if code.tag == "equal":
            continue
        if changed and changed[-1][1] == i1 and changed[-1][3] == j1:
            changed[-1] = (changed[-1][0], i2, changed[-1][2], j2)
        else:
            changed.append((i1, i2, j1, j2))
    for i1, i2, j1, j2 in changed:
        added = [*after[j1:j2]]
        if not any(line.strip() for line in added):
            continue
        counts.found += 1
        if bare("".join(before[i1:i2])) == bare("".join(added)):
            counts.drop("hunk: formatting alone")
            continue
        yield Hunk([*before[:i1]], added, [*before[i2:]], j1 + 1)


class Known:
    """The runs of MOVED lines that a tree has, by which a piece that was moved or copied is told."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._runs = {run for text in texts for run in _runs(text.split("\n"))}

    def holds(self, added: Sequence[str]) -> bool:
        """Return whether all runs of the added lines stand in the tree; False for fewer than MOVED lines."""
        runs = [*_runs(added)]
        return bool(runs) and all(run in self._runs for run in runs)


def _runs(lines: Sequence[str]) -> Iterator[bytes]:
    own = [line.strip() for line in lines if line.strip()]
    for start in range(len(own) - MOVED + 1):
        yield hashlib.sha256("\n".join(own[start : start + MOVED]).encode("utf-8", "replace")).digest()[:8]


def tells(line: str) -> bool:
    """Return whether a line has enough letters and digits to be foretold."""
    return sum(letter.isalnum() for letter in line) >= LETTERS


def cut_in_line(line: str, key: str) -> int | None:
    """Return a place inside a line where a name or a mark ends, which a hash of `key` chooses; None without.

    At least LETTERS letters or digits follow it, and something precedes it.
    """
    places = [match.end() for match in re.finditer(r"\w+|[^\w\s]", line)]
    places = [place for place in places if tells(line[place:])]
    if not places:
        return None
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return places[int.from_bytes(digest[:4]) % len(places)]


def joined(lines: Sequence[str], more: str = "") -> str:
    """Return the lines before a cursor, each with its line break, and what the cursor's own line has."""
    return "".join(line + "\n" for line in lines) + more


def cases_of(step: Step, known: Known, counts: Counts) -> Iterator[Written]:
    """Yield the cases of a commit."""
    for edit in step.edits:
        for hunk in hunks(edit.before, edit.after, counts):
            if known.holds(hunk.added):
                counts.drop("hunk: moved or copied from what is learned")
                continue
            if not any(map(tells, hunk.added)):
                counts.drop("hunk: no line with three letters")
                continue
            yield from _of_hunk(edit.path, step.id, hunk)


def _of_hunk(path: str, commit: str, hunk: Hunk) -> Iterator[Written]:
    for k, line in enumerate(hunk.added):
        if not tells(line):
            continue
        before, number = [*hunk.before, *hunk.added[:k]], hunk.line + k
        after = "".join("\n" + other for other in hunk.after)
        yield Written(path, commit, number, "line", joined(before), line, after)
        cut = cut_in_line(line, f"{path}\0{commit}\0{number}")
        if cut is not None:
            yield Written(path, commit, number, "rest", joined(before, line[:cut]), line[cut:], after)
    first = next(k for k, line in enumerate(hunk.added) if line.strip())
    last = max(k for k, line in enumerate(hunk.added) if line.strip())
    if 1 <= last - first < MOST_BLOCK:
        yield Written(
            path,
            commit,
            hunk.line + first,
            "block",
            joined([*hunk.before, *hunk.added[:first]]),
            "\n".join(hunk.added[first : last + 1]),
            "".join("\n" + other for other in [*hunk.added[last + 1 :], *hunk.after]),
        )


def chosen(cases: Sequence[Written], most: int) -> list[Written]:
    """Return up to `most` cases, spread over kinds and commits: each gives one in turn, chosen by a hash.

    Two cases that show the same lines around the same text are one; a cherry-picked commit has such.
    """
    alone: dict[tuple[str, str, str, str], Written] = {}
    for case in cases:
        alone.setdefault((case.path, case.prefix[-200:], case.middle, case.suffix[:100]), case)
    waiting: dict[tuple[str, str], list[Written]] = {}
    for case in sorted(alone.values(), key=lambda one: hashlib.sha256(repr(one.name).encode()).digest()):
        waiting.setdefault((case.commit, case.kind), []).append(case)
    queues = sorted(waiting.items(), key=lambda one: hashlib.sha256(repr(one[0]).encode()).digest())
    by_kind = {kind: [queue for (_, of), queue in queues if of == kind] for kind in KINDS}
    found: list[Written] = []
    while len(found) < most and any(by_kind.values()):
        for kind in KINDS:
            if by_kind[kind] and len(found) < most:
                queue = by_kind[kind].pop(0)
                found.append(queue.pop(0))
                if queue:
                    by_kind[kind].append(queue)
    return sorted(found, key=lambda one: one.name)


# --- the same, of files that nobody has changed ------------------------------------------------------


def gaps_of(path: str, text: str, commit: str = "") -> Iterator[Written]:
    """Yield all lines, rests of lines and blocks of a file as gaps, with the whole file around them.

    A block is what is deeper than the line before it, as the body of a function is: its indentation tells it
    in any language.
    """
    lines = text.rstrip("\n").split("\n")
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        after = "".join("\n" + other for other in lines[i + 1 :])
        if tells(line):
            yield Written(path, commit, i + 1, "line", joined(lines[:i]), line, after)
            cut = cut_in_line(line, f"{path}\0{i}\0{line}")
            if cut is not None:
                yield Written(path, commit, i + 1, "rest", joined(lines[:i], line[:cut]), line[cut:], after)
        if (end := _block_end(lines, i)) - i - 1 >= 1 and any(map(tells, lines[i + 1 : end])):
            rest = "".join("\n" + other for other in lines[end:])
            middle = "\n".join(lines[i + 1 : end])
            yield Written(path, commit, i + 2, "block", joined(lines[: i + 1]), middle, rest)


def _block_end(lines: Sequence[str], i: int) -> int:
    """Return the number after the last line of the block that line `i` opens; i + 1 without one."""
    outer, end = depth(lines[i]), i + 1
    for j in range(i + 1, min(len(lines), i + 2 + MOST_BLOCK)):
        if not lines[j].strip():
            continue
        if depth(lines[j]) <= outer:
            return end
        end = j + 1
    return end if end == len(lines) and end - i - 1 <= MOST_BLOCK else i + 1


def depth(line: str) -> int:
    """Return the blanks that a line begins with."""
    return len(line) - len(line.lstrip())
