"""Scores of a suite: every system's predictions by the same metrics, with intervals, and verdicts in words.

    record = scored(SUITES["pairs"], examples, {"model": ..., "copy": ..., "nearest": ...})
    print(suite_table(record))

A record is plain data and holds every prediction, so that each number in it can be had again
(`rescoring`). No torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metrics.registry import METRICS, metric, score
from metrics.texts import plain


@dataclass(frozen=True)
class Example:
    """Something to predict.

    Args:
        name: Of the file or row that it is from.
        where: Its line in the file, from 1; or its number among the held-out examples, from 0.
        prompt: What the model is shown.
        reference: What stands there.
        suffix: What follows the reference, if the model is shown that too.
        start: Where in the prompt the function begins; 0 for others.
    """

    name: str
    where: int
    prompt: str
    reference: str
    suffix: str | None = None
    start: int = 0

    @property
    def id(self) -> str:
        return f"{self.name}:{self.where}"


@dataclass(frozen=True)
class Predictions:
    """What one system answers.

    Args:
        texts: One for each example, without its prompt.
        ran_long: How many ran into the length limit; None where there is no limit.
    """

    texts: list[str]
    ran_long: int | None = None


@dataclass(frozen=True)
class Suite:
    """How a kind of example is scored.

    Args:
        name: In the table `SUITES`.
        title: What is predicted, in words.
        counted: How many samples there are, in words, of `n` and `files`.
        metrics: Names of `metrics.registry`, where none are asked for.
        clean: What predictions and references both go through before they are compared.
    """

    name: str
    title: str
    counted: str
    metrics: tuple[str, ...]
    clean: Callable[[str], str]


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "next_line",
            "next line",
            "{n} lines of {files} files",
            ("exact_match", "edit_similarity"),
            str.strip,
        ),
        Suite(
            "pairs",
            "completions",
            "{n} held-out examples",
            ("exact_match", "edit_similarity", "chrf", "bleu_code"),
            plain,
        ),
    )
}
# How a verdict calls what it compares with.
NAMED = {
    "base": "the base model",
    "copy": "copying",
    "nearest": "the nearest training example",
    "n-gram": "the n-gram model",
    "empty": "an empty text",
}


def metric_names(asked: str) -> tuple[str, ...]:
    """The names in `asked`, between commas; ValueError for one that no metric has."""
    return tuple(metric(name.strip()).name for name in asked.split(",") if name.strip())


def scored(
    suite: Suite,
    examples: Sequence[Example],
    predictions: dict[str, Predictions],
    metrics: Sequence[str] = (),
    language: str = "python",
    seed: int = 0,
) -> dict[str, Any]:
    """The record of a suite: scores with 95% intervals, verdicts, and every prediction.

    Intervals and verdicts take the examples for independent; several of one file are a little less than that.

    Args:
        predictions: The system that is judged comes first; the others are its baselines.
        metrics: Names of metrics in the place of the suite's own.
        language: Of the code, for metrics that read it.
        seed: Of the resampling.

    Raises:
        ValueError: no baseline, fewer than two examples, another number of predictions, or an unknown metric.
    """
    subject, *baselines = predictions
    if not baselines:
        raise ValueError(
            f"the suite {suite.name} has no baseline to stand beside {subject}: a score alone says nothing"
        )
    for system, made in predictions.items():
        if len(made.texts) != len(examples):
            raise ValueError(
                f"{system} has {len(made.texts)} predictions for {len(examples)} examples: there must be one "
                "for each, in the same order"
            )
    names = list(metrics or suite.metrics)
    references = [suite.clean(example.reference) for example in examples]
    found = {
        system: score(
            names,
            [(suite.clean(text), wanted) for text, wanted in zip(made.texts, references, strict=True)],
            language,
        )
        for system, made in predictions.items()
    }
    verdicts: dict[str, Any] = {}
    for name in names:
        own = found[subject][name]
        # Among equals copying: that is what a score near it means.
        best = max(baselines, key=lambda system: (found[system][name].value, system == "copy"))
        compared = {system: own.compare(found[system][name], seed) for system in baselines}
        verdicts[name] = {
            "best": best,
            "against": {
                system: comparison.verdict(NAMED.get(system, system))
                for system, comparison in compared.items()
            },
        }
    return {
        "suite": suite.name,
        "language": language,
        "seed": seed,
        "signatures": {name: METRICS[name].signature(language) for name in names},
        "scores": {
            system: {name: by_name[name].interval(seed)._asdict() for name in names}
            for system, by_name in found.items()
        },
        "verdicts": verdicts,
        "ran_long": {
            system: made.ran_long / len(examples)
            for system, made in predictions.items()
            if made.ran_long is not None
        },
        "samples": [
            {
                "id": example.id,
                "name": example.name,
                "where": example.where,
                "prompt": example.prompt,
                **({"suffix": example.suffix} if example.suffix is not None else {}),
                "reference": example.reference,
                "predictions": {system: made.texts[i] for system, made in predictions.items()},
            }
            for i, example in enumerate(examples)
        ],
    }


def suite_table(record: dict[str, Any]) -> str:
    """A row for each metric, a column for each system; below it the verdicts.

    Raises:
        ValueError: the record has no baseline.
    """
    suite, systems = SUITES[record["suite"]], list(record["scores"])
    if len(systems) < 2:
        raise ValueError(f"the suite {suite.name} has no baseline, so its scores are not shown")
    files = len({sample["name"] for sample in record["samples"]})
    head = f"{suite.title}: {suite.counted.format(n=len(record['samples']), files=files)}"
    rows = [["metric", *systems]]
    for name in record["signatures"]:
        intervals = (record["scores"][system][name] for system in systems)
        rows.append([name, *("{mean:.1f} [{low:.1f}, {high:.1f}]".format(**i) for i in intervals)])
    if record["ran_long"]:
        shares = (record["ran_long"].get(system) for system in systems)
        rows.append(["ran into the limit", *("" if share is None else f"{share:.1%}" for share in shares)])
    lines = aligned(rows)
    for name, verdict in record["verdicts"].items():
        said = [verdict["best"], *(["base"] if "base" in verdict["against"] else [])]
        lines.append(f"{name}: {'; '.join(verdict['against'][one] for one in dict.fromkeys(said))}")
    return "\n".join([f"{head}, with 95% intervals", *lines])


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right, a rule below the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [f"{value:>{width}}" for value, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return lines


# --- predictions made elsewhere ----------------------------------------------------------------------


def read_predictions(path: str | Path, examples: Sequence[Example]) -> list[str]:
    """The predictions of a JSONL file, one a line in the order of the examples.

    A line is an object with a `prediction` or a `completion`, and may name the `id` of its example.

    Raises:
        ValueError: it cannot be read, a line is something else, or there are more or fewer than examples.
    """
    try:
        lines = Path(path).read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if len(numbered) != len(examples):
        raise ValueError(
            f"{path} holds {len(numbered)} predictions, and the suite has {len(examples)} examples: "
            "give one a line, in the order of the samples in eval.json"
        )
    texts = []
    for (number, line), example in zip(numbered, examples, strict=True):
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        text = row.get("prediction", row.get("completion")) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise ValueError(f"{where} has no text in a field prediction or completion: give one")
        if row.get("id", example.id) != example.id:
            raise ValueError(
                f"{where} is for {row['id']!r}, and that example is {example.id!r}: the order must be "
                "that of the samples in eval.json, of the same --seed and --samples"
            )
        texts.append(text)
    return texts
