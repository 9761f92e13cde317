"""The ledger of mutants: a line for each that was tried, and the tables that are made of them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from metrics.intervals import share_interval

OUTCOMES = ("named", "silent", "crash", "rounding", "equal")  # From the one that says most of the guards.
CHANGED = OUTCOMES[:3]


@dataclass(frozen=True)
class Outcome:
    """A line of the ledger.

    Attributes:
        before, after: The source of what was changed.
        run: The run that decided, or the last that was tried.
        by: The name of the fault, the error, or the first thing that differed.
        seconds: Processor time of all its runs.
        code: The beginning of the fingerprint of the unmutated code.
    """

    seed: int
    room: str
    file: str
    line: int
    operator: str
    before: str
    after: str
    run: str
    tried: list[str]
    outcome: str
    by: str
    difference: str
    seconds: float
    code: str

    @property
    def is_changed(self) -> bool:
        return self.outcome in CHANGED


def read_ledger(path: Path) -> list[Outcome]:
    """Return the outcomes of a ledger; a last line that was cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text("utf-8").splitlines(keepends=True)
    return [Outcome(**json.loads(line)) for line in lines if line.endswith("\n")]


def cut_to_whole_lines(path: Path) -> None:
    """Remove a last line that was cut short when a call was killed, so that others can be added."""
    if path.is_file():
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)


def table(outcomes: list[Outcome]) -> str:
    """Return the counts by room, the guards' score of each with its interval, and who named how many."""
    lines = ["| room | mutants | named | silent | crash | rounding | equal | named / (named + silent) |"]
    lines.append("|---" * 8 + "|")
    rooms = dict.fromkeys(o.room for o in outcomes)
    for room in [*rooms, "all"]:
        counts = Counter(o.outcome for o in outcomes if room in (o.room, "all"))
        judged = counts["named"] + counts["silent"]
        score = "-"
        if judged:
            share = share_interval(counts["named"], judged)
            score = f"{share.mean:.0f}% [{share.low:.0f}, {share.high:.0f}]"
        cells = [room, counts.total(), *(counts[outcome] for outcome in OUTCOMES), score]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    named = Counter(o.by for o in outcomes if o.outcome == "named")
    lines += ["", "named by: " + ", ".join(f"{name} {n}" for name, n in named.most_common())]
    seconds = sum(o.seconds for o in outcomes) / max(1, len(outcomes))
    lines.append(f"{seconds:.1f} s of processor time a mutant")
    return "\n".join(lines)


def survivors(outcomes: Iterable[Outcome]) -> str:
    """Return the silent mutants: where, the change as a diff of one line, and what differed."""
    return "\n".join(
        f"{o.file}:{o.line} ({o.operator}, run {o.run})\n  - {o.before}\n  + {o.after}\n  {o.difference}"
        for o in sorted(outcomes, key=lambda o: (o.file, o.line))
        if o.outcome == "silent"
    )
