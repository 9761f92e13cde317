"""What stood at the nearest place of a repository: a search without a model, which a model has to beat.

    text, score = searched(files, case)

The place is the one whose last lines are most like those before the cursor, among the pieces of all files,
the cursor's own as it was before too, that share rare words with them.
"""

from __future__ import annotations

from typing import NamedTuple

from rapidfuzz import fuzz

from data.context import PIECE, RepositoryFiles
from recipes.written import MOST_BLOCK, Written, depth

LEAD = 3  # lines before a place that are compared
PIECES = 64  # pieces that are looked through


class Found(NamedTuple):
    """What stands at the nearest place, and how like its lines before are, 0 to 1; ("", 0.0) without one."""

    text: str
    score: float


def searched(files: RepositoryFiles, case: Written) -> Found:
    """Answer a case with a line, the rest of one, or a block, as the case asks.

    Args:
        files: The repository as it is at that moment.
        case: The place; its middle plays no part.
    """
    lines = case.prefix.split("\n")
    own = lines.pop()  # what stands on the cursor's line already
    lead = [line.strip() for line in lines if line.strip()][-LEAD:]
    query = "\n".join([*lead, own.strip()])
    best = Found("", 0.0)
    for path, start in files.places(query, PIECES):
        there = files.texts[path].split("\n")
        for i in range(start, min(start + PIECE + 1, len(there))):
            line = there[i]
            if not line.strip() or not line.lstrip().startswith(own.lstrip()):
                continue
            before = [one.strip() for one in there[max(0, i - 2 * LEAD) : i] if one.strip()][-LEAD:]
            score = fuzz.ratio("\n".join([*before, own.strip()]), query) / 100
            if score > best.score:
                best = Found(_answer(there, i, own, case.kind), score)
    return best


def _answer(lines: list[str], i: int, own: str, kind: str) -> str:
    if kind != "block":
        return lines[i].lstrip()[len(own.lstrip()) :] if own.strip() else lines[i]
    end = i + 1
    while end < min(len(lines), i + MOST_BLOCK) and (
        not lines[end].strip() or depth(lines[end]) >= depth(lines[i])
    ):
        end += 1
    return "\n".join(lines[i:end]).rstrip()
