"""A bench for mutants: the traces of unmutated runs, which lines they execute, and mutants tried in them."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import mutant_children, mutant_runs
from benchmarks.mutant_ledger import CHANGED, OUTCOMES, Outcome
from benchmarks.mutant_operators import Mutant
from config import REPOSITORY
from config.files import code_fingerprint


@dataclass(frozen=True, eq=False)
class Candidate:
    """A mutant that runs reach, and those in which it is tried."""

    room: str
    file: str
    tree: ast.Module
    mutant: Mutant
    runs: list[str]

    @property
    def key(self) -> tuple[str, ...]:
        return self.file, str(self.mutant.line), self.mutant.operator, *map(shortened, self.mutant.shown())


def shortened(text: str, length: int = 400) -> str:
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


class Verdict(NamedTuple):
    """How a mutant ended in one run; the attributes are those of `Outcome`."""

    outcome: str
    by: str
    difference: str
    seconds: float


class Bench:
    """The unmutated runs, and children in which mutants run.

    Args:
        folder: A folder for all files, which may be removed afterwards.
    """

    def __init__(self, folder: Path):
        self.folder, self.code = folder, code_fingerprint()[:12]
        self.traces = folder / "traces"
        self.traces.mkdir(parents=True)
        made = self._done("assets", mutant_runs.write_assets)
        assert made["ended"] == "same", made
        (folder / "assets-child" / "work" / "assets").rename(folder / "assets")

    def _done(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return mutant_children.finished(mutant_children.start(self.folder / f"{name}-child", work))

    def reached(self, kept: Path) -> dict[str, dict[str, list[int]]]:
        """Return by run and file the lines that it executes.

        Args:
            kept: A file that has them, or will have them, with the code that they are of.
        """
        code = f"{self.code} {hashlib.sha256(Path(mutant_runs.__file__).read_bytes()).hexdigest()[:12]}"
        if kept.is_file() and (known := json.loads(kept.read_text("utf-8")))["code"] == code:
            return known["lines"]
        found = {}
        for run in mutant_runs.RUNS:
            result = self._done("lines", lambda run=run: {"lines": mutant_children.covered(run)})
            assert "lines" in result, (run, result)
            found[run] = result["lines"]
        kept.write_text(json.dumps({"code": code, "lines": found}), "utf-8")
        return found

    def trace(self, run: str) -> Path:
        """Return the trace of an unmutated run, which must repeat itself; made at its first use."""
        path = self.traces / run
        if not path.exists():
            first = self._done("trace", lambda: mutant_children.run_once(run, False, None))
            assert first["ended"] == "same", (run, first)
            (self.folder / "trace-child" / "trace").rename(path)
            again = self._done("trace", lambda: mutant_children.run_once(run, True, path))
            assert again["ended"] == "same", f"{run} does not repeat itself, or guards leave a trace: {again}"
        return path

    def start(self, candidate: Candidate, run: str, guarded: bool, number: int) -> mutant_children.Child:
        """Begin one run of a mutant."""
        expected = self.trace(run)
        work = lambda: mutant_children.run_once(run, guarded, expected)  # noqa: E731
        return mutant_children.start(self.folder / f"child-{number}", work, self._mutated(candidate))

    def start_guarded(self, candidate: Candidate, run: str, number: int) -> mutant_children.Child:
        """Begin one run of a mutant with the guards, of which only matters whether they name it."""
        work = lambda: mutant_children.run_once(run, True, None)  # noqa: E731
        return mutant_children.start(self.folder / f"child-{number}", work, self._mutated(candidate))

    def _mutated(self, candidate: Candidate) -> mutant_children.MutatedModule:
        file = REPOSITORY / candidate.file
        code = candidate.mutant.compiled(candidate.tree, str(file))
        return mutant_children.MutatedModule(mutant_children.dotted(file), code)

    def judged(self, candidate: Candidate, number: int, seed: int) -> Iterator[Outcome | None]:
        """Try a mutant in its runs; yield None while a child is under way, and at last its outcome."""
        tried: dict[str, Verdict] = {}
        for run in candidate.runs:
            tried[run] = yield from self._verdict(candidate, run, number)
            if tried[run].outcome in CHANGED:
                break
        run, verdict = min(tried.items(), key=lambda item: OUTCOMES.index(item[1].outcome))
        before, after = map(shortened, candidate.mutant.shown())
        yield Outcome(
            seed=seed,
            room=candidate.room,
            file=candidate.file,
            line=candidate.mutant.line,
            operator=candidate.mutant.operator,
            before=before,
            after=after,
            run=run,
            tried=[*tried],
            outcome=verdict.outcome,
            by=verdict.by,
            difference=verdict.difference,
            seconds=round(sum(one.seconds for one in tried.values()), 2),
            code=self.code,
        )

    def _verdict(self, candidate: Candidate, run: str, number: int) -> Generator[None, None, Verdict]:
        """Try a mutant in one run; where it would be silent, once more with the guards."""
        seconds, difference, ended, by = 0.0, "", "", ""
        for guarded in (False, True):
            child = self.start(candidate, run, guarded, number)
            while (result := mutant_children.result_of(child)) is None:
                yield
            seconds += result["seconds"]
            ended, by = result["ended"], result.get("by", "")
            if guarded and ended == "named":
                return Verdict("named", by, difference, seconds)
            if ended != "differs":
                break
            difference = by
        if ended in ("same", "rounding", "differs"):
            outcome = "silent" if difference else "equal" if ended == "same" else ended
            return Verdict(outcome, "", difference or by, seconds)
        return Verdict("crash", f"a guard: {by}" if difference else by, difference, seconds)
