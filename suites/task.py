"""The interface of a suite: its examples, where their answers end, and baselines that need no model.

    task = TASKS["fim_line"](Given(tokenizer, 512, 200, 0, 0, data))
    complete(model, tokenizer, task.examples, task.cut, settings)
    scored(task.suite, task.examples, {"model": ..., **answers(task.baselines(task.examples))})

`suites/tasks.py` has the suites by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset import PreparedData
from sandbox.problems import Problem, field_of, read_rows
from suites.baselines import Spans, nearest_place, places_of
from suites.completing import Cut, uncut
from suites.scoring import Example, Predictions, Suite
from tokenizer import Tokenizer

HELD_OUT = 200  # Examples of held-out files by default; a suite's own file is evaluated whole.


@dataclass(frozen=True)
class Given:
    """The input from which a suite makes its examples.

    Args:
        tokenizer: The model's tokenizer; None where predictions were made elsewhere.
        length: Tokens of a row: of a prompt and its completion together.
        n: Most examples; None for as many as the suite has by itself.
        seed: The seed of their choice.
        max_new_tokens: Most tokens of a completion; 0 for the suite's own number.
        data: The data of a run; None for a published model.
        file: The suite's own file.
    """

    tokenizer: Tokenizer | None
    length: int
    n: int | None
    seed: int
    max_new_tokens: int
    data: PreparedData | None = None
    file: str | None = None


@dataclass(frozen=True)
class Task:
    """The task that a suite gives every system.

    Args:
        suite: How it is scored.
        examples: The examples, in the order of the predictions.
        max_new_tokens: Most tokens of a completion.
        wanted: The word for its examples.
        baselines: Returns the answers of systems that need no model, one for each of the examples, or of
            these in other words.
        cut: Returns the part of a text that is the prediction.
        stop: Strings that end a text and are no part of it.
        problems: The problems of a suite of programs by their id, which is their example's name.
    """

    suite: Suite
    examples: list[Example]
    max_new_tokens: int
    wanted: str
    baselines: Callable[[Sequence[Example]], dict[str, list[str]]]
    cut: Cut = uncut
    stop: tuple[str, ...] = ()
    problems: dict[str, Problem] | None = None


def held_out(given: Given, name: str) -> tuple[PreparedData, Tokenizer, int]:
    """Return the run's data, its tokenizer, and how many examples to sample.

    Raises:
        ValueError: There is no run.
    """
    if given.data is None or given.tokenizer is None:
        raise ValueError(
            f"the suite {name} is of a run's held-out files, and this model has none; give --run RUN, "
            "or a suite with a file of its own"
        )
    return given.data, given.tokenizer, HELD_OUT if given.n is None else given.n


def rows_of(given: Given, name: str) -> list[tuple[str, dict[str, Any]]]:
    """Read the rows of the suite's file with their places for messages: all, or `n` sampled, in order.

    Raises:
        ValueError: No file is given, it cannot be read, or it is empty.
    """
    if given.file is None:
        raise ValueError(f"the suite {name} takes its examples from a file; name it with --suite_file")
    rows = list(read_rows(Path(given.file)))
    if not rows:
        raise ValueError(f"{given.file} has no rows; give the published file of the suite {name}")
    return sampled(rows, given)


def sampled(rows: list[Any], given: Given) -> list[Any]:
    """Sample `n` of the rows by the seed, in their order; all where there are no more."""
    if given.n is None or given.n >= len(rows):
        return rows
    draw = np.random.Generator(np.random.PCG64(given.seed))
    return [rows[i] for i in sorted(draw.permutation(len(rows))[: given.n])]


def texts_of(where: str, row: dict[str, Any], *names: str) -> Iterator[str]:
    """Return the fields of a row that must be text; ValueError for one that is not."""
    return (field_of(where, row, name, str) for name in names)


def nearest_in_training(given: Given, examples: Sequence[Example], spans: Spans) -> dict[str, list[str]]:
    """Answer examples of a suite's own file with the nearest training text of a run.

    The result is empty for a published model, whose training text is not at hand.
    """
    if given.data is None or given.tokenizer is None:
        return {}
    return {"nearest": nearest_place(examples, places_of(given.data.train, given.tokenizer, spans))}


def answers(systems: dict[str, list[str]]) -> dict[str, Predictions]:
    """Return the texts of baselines as predictions, by system."""
    return {system: Predictions(texts) for system, texts in systems.items()}
