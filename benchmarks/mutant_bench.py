"""A bench for mutants: the traces of unmutated runs, which lines they execute, and mutants tried in them."""

from __future__ import annotations

import ast
import json
from collections.abc import Generator, Iterator
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
        cached: A file that keeps which lines each run executes, for this code.
    """

    def __init__(self, folder: Path, cached: Path | None = None):
        self.folder, self.code = folder, code_fingerprint()[:12]
        self.traces = folder / "traces"
        self.traces.mkdir(parents=True)
        made = self._done("assets", lambda: mutant_runs.write_assets(Path("assets")) or {"ended": "same"})
        assert made["ended"] == "same", made
        (folder / "assets-child" / "work" / "assets").rename(folder / "assets")
        self.reached = self._coverage(cached)

    def _done(self, name: str, work: Any) -> dict[str, Any]:
        return mutant_children.finished(mutant_children.start(self.folder / f"{name}-child", work))

    def _coverage(self, cached: Path | None) -> dict[str, dict[str, list[int]]]:
        own = f"{self.code} {Path(mutant_runs.__file__).stat().st_mtime_ns}"
        if cached is not None and cached.is_file():
            kept = json.loads(cached.read_text("utf-8"))
            if kept["code"] == own:
                return kept["lines"]
        found = {}
        for run in mutant_runs.RUNS:
            result = self._done("coverage", lambda run=run: {"lines": mutant_children.covered(run)})
            assert "lines" in result, (run, result)
            found[run] = result["lines"]
        if cached is not None:
            cached.write_text(json.dumps({"code": own, "lines": found}), "utf-8")
        return found

    def trace(self, run: str) -> Path:
        """Return the trace of an unmutated run, which must repeat itself; made at its first use."""
        path = self.traces / run
        if not path.exists():
            first = self._done("trace", lambda: mutant_children.run_once(run, False, None))
            assert first["ended"] == "same", (run, first)
            (self.folder / "trace-child" / "trace").rename(path)
            for allow in (False, True):
                again = self._done("trace", lambda allow=allow: mutant_children.run_once(run, allow, path))
                assert again["ended"] == "same", f"{run} does not repeat itself: {again}"
        return path

    def start(self, candidate: Candidate, run: str, allow: bool, number: int) -> mutant_children.Child:
        """Begin one run of a mutant."""
        expected = self.trace(run)
        file = REPOSITORY / candidate.file
        code = candidate.mutant.compiled(candidate.tree, str(file))
        module = mutant_children.MutatedModule(mutant_children.dotted(file), code)
        work = lambda: mutant_children.run_once(run, allow, expected)  # noqa: E731
        return mutant_children.start(self.folder / f"child-{number}", work, module)

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
            **verdict._asdict() | {"seconds": round(sum(one.seconds for one in tried.values()), 2)},
            code=self.code,
        )

    def _verdict(self, candidate: Candidate, run: str, number: int) -> Generator[None, None, Verdict]:
        """Try a mutant in one run; where a guard refuses it, once more with every fault allowed."""
        seconds, fault, ended, by = 0.0, "", "", ""
        for allow in (False, True):
            child = self.start(candidate, run, allow, number)
            while (result := mutant_children.result_of(child)) is None:
                yield
            seconds += result["seconds"]
            ended, by = result["ended"], result.get("by", "")
            if ended != "named":
                break
            fault = by
        if ended == "differs":
            return Verdict("named" if fault else "silent", fault, by, seconds)
        if ended in ("same", "rounding"):
            return Verdict("equal" if ended == "same" else ended, fault, by, seconds)
        return Verdict("crash", fault or by, "", seconds)
