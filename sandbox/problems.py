"""Files of problems and samples in the form in which HumanEval and MBPP publish them; untrusted input."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from config import RepeatedKey, parse_line, unrepeated

# Characters of the longest file. It is read whole, and a gz of a megabyte may unpack to any number.
MOST_CHARACTERS = 2**28
TESTS_OF_MBPP = ("test_imports", "test_setup_code", "test_list")


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


def read_problems(path: str | Path) -> dict[str, Problem]:
    """Read the problems of a published file by their id.

    Raises:
        ValueError: The file cannot be read, is empty or has an id twice, or a row lacks a field.
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
    """Read a problem from its row, MBPP's or HumanEval's.

    Args:
        where: The place of the row, for messages.
        row: An object of a published file.

    Raises:
        ValueError: The row lacks a field, or one is of another type.
    """
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
    """Return the lines of a field of MBPP that is a text or a list of texts."""
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
    if not task_id.isprintable():  # It is printed, and a terminal obeys some characters.
        raise ValueError(f"{where} has task_id {task_id[:80]!r}; it must be of printable characters")
    return task_id


def field_of(where: str, row: dict[str, Any], name: str, kind: Any) -> Any:
    """Return a field of a row; ValueError, with its place, where it is missing or of another type."""
    if name not in row:
        raise ValueError(f"{where} has no field {name} but {', '.join(row) or 'none'}")
    if not isinstance(row[name], kind) or isinstance(row[name], bool):
        raise ValueError(f"{where} has {name} of type {type(row[name]).__name__}; it must be text")
    return row[name]


def read_samples(path: str | Path, problems: dict[str, Problem]) -> list[Sample]:
    """Read the samples of a file, in its order.

    Raises:
        ValueError: The file cannot be read, a row lacks a field or has an id that is no problem's, or a
            problem has no samples.
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
    """Yield the objects of a JSONL file, or of a JSON file that is one list, with their places for messages.

    Whether a .json file is one list is read from its text: CodeXGLUE's test.json has a row on each line.

    Raises:
        ValueError: The file cannot be read, is too long, or holds something else.
    """
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8")
            if path.suffix == ".gz"
            else open(path, encoding="utf-8") as f
        ):
            text = f.read(MOST_CHARACTERS + 1)  # It is read once, since it may be a pipe.
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
