"""Measure which faults the guards name, on faults that nobody chose: `python benchmarks/mutants.py`.

Mutants are small mechanical changes (benchmarks/mutant_operators.py) of one place of the code between the
disk and the score. Each is tried in up to three small runs that execute that place
(benchmarks/mutant_runs.py), with the guards on, until one is not as it was without the change. That run
decides:

    named     a guard refused it; with every fault allowed it would have ended, and left something else
    crash     it ended in an error, with guards or without: loud, whatever guards do
    silent    it ended, left other numbers or files, and nothing was said
    rounding  what it left differs by less than other orders of sums explain
    equal     no run left anything else

The guards' score is named / (named + silent). Results go to a ledger, one line a mutant, which a later call
goes on with. It takes about 4 s of processor time a mutant. With --again the mutants of a ledger that were
named are tried once more, with the guards only.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy
import safetensors.torch
import tokenizers
import torch
import tqdm

from benchmarks.mutant_bench import Bench, Candidate, shortened
from benchmarks.mutant_children import Child, result_of
from benchmarks.mutant_ledger import Outcome, cut_to_whole_lines, read_ledger, survivors, table
from benchmarks.mutant_operators import mutants
from config import REPOSITORY
from config.files import code_fingerprint

HEAVY = (numpy, safetensors, tokenizers, torch, tqdm)  # Imported before the forks, for all children.
platform.platform()  # It starts a process, which no child may, and remembers what that said.
ROOMS = {
    "data": ("data/*.py", "dataset.py"),
    "tokenization": ("tokenization/*.py",),
    "model": ("modules/*.py", "architecture.py"),
    "adapters": ("adapters/*.py", "lora.py"),
    "pretrained": ("pretrained/*.py",),
    "training": tuple(f"training/{name}.py" for name in ("loss", "optim", "loop", "checkpoint", "run")),
    "generation": ("generation/*.py",),
}
GUARDING = ("data/store_leaks.py", "generation/settings.py")  # A guard's own, and a check of settings.
RUNS_OF_ONE = 3


def files_of(room: str) -> list[str]:
    found = (path for pattern in ROOMS[room] for path in sorted(REPOSITORY.glob(pattern)))
    return [name for path in found if (name := str(path.relative_to(REPOSITORY))) not in GUARDING]


def candidates(room: str, seed: int, reached: dict[str, dict[str, list[int]]]) -> list[Candidate]:
    """Return the mutants of a room that a run reaches, in the order in which they are drawn.

    Args:
        reached: By run and file the lines that it executes.
    """
    draw = random.Random(f"{seed} {room}")
    found = []
    for file in files_of(room):
        tree = ast.parse((REPOSITORY / file).read_text("utf-8"))
        lines = {run: set(files.get(file, ())) for run, files in reached.items()}
        for mutant in mutants(tree):
            own = {*mutant.lines}
            runs = [run for run in reached if lines[run] & own or (mutant.is_of_module and lines[run])]
            if runs:
                chosen = draw.sample(runs, min(len(runs), RUNS_OF_ONE))
                found.append(Candidate(room, file, tree, mutant, chosen))
    draw.shuffle(found)
    return found


class Pass:
    """One call: which mutants are left to try, and how many each room has that are not equal.

    Args:
        drawn: The candidates of each room, in their order.
        per_room: How many of a room that are not equal are enough.
        known: The outcomes of earlier calls.
    """

    def __init__(self, drawn: dict[str, list[Candidate]], per_room: int, known: list[Outcome]):
        self.per_room = per_room
        tried = {(o.file, str(o.line), o.operator, o.before, o.after) for o in known}
        self.waiting = {room: [one for one in found if one.key not in tried] for room, found in drawn.items()}
        self.changed = Counter(o.room for o in known if o.is_changed)

    def next(self) -> Candidate | None:
        """Return a mutant of the room that has the fewest that are not equal."""
        left = [r for r in self.waiting if self.waiting[r] and self.changed[r] < self.per_room]
        if not left:
            return None
        return self.waiting[min(left, key=lambda room: self.changed[room])].pop(0)

    def outcomes(self, bench: Bench, seed: int, until: float, jobs: int) -> Iterator[Outcome]:
        """Yield outcomes as they come, until a time on the clock."""
        under_way: dict[int, Iterator[Outcome | None]] = {}
        while True:
            for number in range(jobs):
                if number not in under_way and time.monotonic() < until:
                    candidate = self.next()
                    if candidate is not None:
                        under_way[number] = bench.judged(candidate, number, seed)
            if not under_way:
                return
            for number, judged in [*under_way.items()]:
                outcome = next(judged)
                if outcome is not None:
                    del under_way[number]
                    self.changed[outcome.room] += outcome.is_changed
                    yield outcome
            time.sleep(0.01)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--rooms", default=",".join(ROOMS), help="names between commas")
    parser.add_argument("--per_room", type=int, default=180, help="mutants that are not equal; 0 tries none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=4 * 3600, help="time after which none is begun")
    parser.add_argument("--jobs", type=int, default=2, help="children at a time")
    parser.add_argument("--ledger", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument(
        "--again", action="store_true", help="try the named ones again; 1 if one is not named"
    )
    parser.add_argument("--list_survivors", action="store_true", help="print the silent ones")
    asked = parser.parse_args()
    rooms = asked.rooms.split(",")
    if unknown := {*rooms} - ROOMS.keys():
        parser.error(f"{min(unknown)} is no room; there are {', '.join(ROOMS)}")
    known = read_ledger(asked.ledger)
    if asked.again:
        named = [o for o in known if o.outcome == "named" and o.room in rooms]
        raise SystemExit(tried_again(named, asked.jobs))
    if asked.per_room:
        if other := {o.code for o in known} - {code_fingerprint()[:12]}:
            parser.error(f"{asked.ledger} is of other code ({min(other)}); name another --ledger")
        known += tried_now(asked, rooms, known)
    known = [o for o in known if o.room in rooms]
    if asked.list_survivors:
        print(survivors(known), end="\n\n")
    print(table(known))


def tried_now(asked: argparse.Namespace, rooms: list[str], known: list[Outcome]) -> list[Outcome]:
    """Try mutants, add each to the ledger, and return their outcomes."""
    until, found = time.monotonic() + asked.seconds, []
    torch.set_num_threads(1)
    cut_to_whole_lines(asked.ledger)
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as name,
        open(asked.ledger, "a", encoding="utf-8") as file,
    ):
        bench = Bench(Path(name))
        reached = bench.reached(asked.ledger.with_suffix(".lines.json"))
        drawn = {room: candidates(room, asked.seed, reached) for room in rooms}
        print("mutants that a run reaches:", ", ".join(f"{len(drawn[room])} {room}" for room in rooms))
        a_pass = Pass(drawn, asked.per_room, known)
        for outcome in a_pass.outcomes(bench, asked.seed, until, asked.jobs):
            file.write(json.dumps(asdict(outcome)) + "\n")
            file.flush()
            found.append(outcome)
            said = f"{outcome.outcome} {outcome.by or outcome.difference:.80}"
            print(f"{outcome.file}:{outcome.line} {outcome.operator}: {said}", flush=True)
    return found


def tried_again(named: list[Outcome], jobs: int) -> int:
    """Try named mutants once more, with the guards on only, and print those that are not named now.

    Returns:
        1 if there is one, or if more than a tenth of the mutants are gone from the code; else 0.
    """
    torch.set_num_threads(1)
    places = {file: ast.parse((REPOSITORY / file).read_text("utf-8")) for file in {o.file for o in named}}
    found = {
        (file, mutant.operator, *map(shortened, mutant.shown())): (tree, mutant)
        for file, tree in places.items()
        for mutant in mutants(tree)
    }
    gone = [o for o in named if (o.file, o.operator, o.before, o.after) not in found]
    there, missed, under_way = [o for o in named if o not in gone], 0, dict[int, tuple[Outcome, Child]]()
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        bench = Bench(Path(name))
        while there or under_way:
            for number in {*range(jobs)} - under_way.keys():
                if there:
                    one = there.pop()
                    tree, mutant = found[one.file, one.operator, one.before, one.after]
                    candidate = Candidate(one.room, one.file, tree, mutant, [one.run])
                    under_way[number] = (one, bench.start_guarded(candidate, one.run, number))
            for number, (one, child) in [*under_way.items()]:
                if (result := result_of(child)) is not None:
                    del under_way[number]
                    if result["ended"] != "named":
                        missed += 1
                        said = f"{result['ended']} {result.get('by', '')}"
                        print(f"{one.file} in {one.run}: {one.before} -> {one.after}: {said}", flush=True)
            time.sleep(0.01)
    for one in gone:
        print(f"gone: {one.file}: {one.before} -> {one.after}")
    print(f"{len(named) - len(gone) - missed} of {len(named)} are named, {len(gone)} are gone")
    return int(missed > 0 or len(gone) > len(named) / 10)


if __name__ == "__main__":
    main()
