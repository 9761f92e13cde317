"""Scores of a suite: every system's predictions by the same metrics, with intervals, and verdicts in words.

    record = scored(SUITES["pairs"], examples, {"model": ..., "copy": ..., "nearest": ...})
    print(suite_table(record))  # suites/tables.py

A record is plain data and stores every prediction, so that each number in it can be computed again
(`rescoring`). `suites_of` returns the records of an eval.json. No torch.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from config import parse_line
from metrics.registry import Metric, Scored, metric, score
from metrics.texts import CLEANERS, plain


@dataclass(frozen=True)
class Example:
    """A prompt and the text that follows it, which is to be predicted.

    Args:
        name: The name of the file or row that it is from.
        where: Its line in the file, from 1; or its number among the held-out examples, from 0.
        prompt: The text that the model is shown.
        reference: The text that stands there.
        suffix: The text after the reference, if the model is shown that too.
        start: The character of the prompt where the function begins; 0 for other examples.
        ids: The ids of the prompt, where a chat template wrote them; the prompt is then their text.
    """

    name: str
    where: int
    prompt: str
    reference: str
    suffix: str | None = None
    start: int = 0
    ids: tuple[int, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.name}:{self.where}"

    @property
    def origin(self) -> str:
        """The file that it is from; examples of one file are not independent of each other."""
        return origin_of(self.name)


def origin_of(name: str) -> str:
    """Return the file of a document by its name: `FILE:PART`, such as a line or a class, is from FILE.

    A task of HumanEval's infilling, `KindInfilling/HumanEval/N/...`, is from its problem.
    """
    if infilling := re.match(r"\w+Infilling/\w+/\d+(?=/)", name):
        return infilling[0]
    file, _, part = name.rpartition(":")
    # The colon of an address or a drive stands before a slash, and separates no part.
    return name if "/" in part or "\\" in part else file or name


@dataclass(frozen=True)
class Predictions:
    """The answers of one system.

    Args:
        texts: One text for each example, without its prompt.
        ran_long: How many texts ran into the length limit; None where there is no limit.
        more: Further draws of a system that samples, each like `texts`.
        trimmed: How many prompts were longer than there was room for, and lost what is farthest from the
            completion; None where nothing is cut.
    """

    texts: list[str]
    ran_long: int | None = None
    more: list[list[str]] = field(default_factory=list)
    trimmed: int | None = None

    @property
    def draws(self) -> list[list[str]]:
        """All texts, (draws, examples)."""
        return [self.texts, *self.more]

    @property
    def empty(self) -> float:
        """The share of answers that are empty or white space."""
        return empty_share([text for texts in self.draws for text in texts])


@dataclass(frozen=True)
class Suite:
    """How a kind of example is scored.

    Args:
        name: Its key in the table `SUITES`.
        title: The predicted texts, in words.
        counted: The number of samples, in words, with places for `n` and `files`.
        metrics: Names of `metrics.registry` that are computed by default; none for programs, which are run.
        clean: The function that cleans both predictions and references before they are compared.
    """

    name: str
    title: str
    counted: str
    metrics: tuple[str, ...]
    clean: Callable[[str], str]

    @property
    def runs(self) -> bool:
        """Whether predictions are judged by running them."""
        return not self.metrics


TOKENS = "next_token"  # The token scores, which --suite names like a suite.
TOGETHER = {"fim": ("fim_line", "fim_lines", "fim_span")}  # Suites that one name stands for.
GAP_METRICS = ("exact_match", "edit_similarity", "chrf")
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
        Suite(
            "examples",
            "completions",
            "{n} examples of a file",
            ("exact_match", "edit_similarity", "chrf", "bleu_code"),
            plain,
        ),
        Suite("fim_line", "gaps of a line", "{n} gaps in {files} files", GAP_METRICS, plain),
        Suite("fim_lines", "gaps of several lines", "{n} gaps in {files} files", GAP_METRICS, plain),
        Suite("fim_span", "gaps anywhere", "{n} gaps in {files} files", GAP_METRICS, plain),
        Suite(
            "codexglue_method",
            "CodeXGLUE method generation",
            "{n} methods",
            ("edit_similarity_rounded", "bleu_codexglue"),
            CLEANERS["codexglue-method"],
        ),
        Suite(
            "codexglue_line",
            "CodeXGLUE line completion",
            "{n} lines",
            ("exact_match_words", "edit_similarity_rounded"),
            CLEANERS["codexglue-line"],
        ),
        Suite("humaneval", "HumanEval", "{n} problems", (), plain),
        Suite("mbpp", "MBPP", "{n} problems", (), plain),
        Suite("humaneval_infilling", "HumanEval infilling", "{n} problems", (), plain),
    )
}
# The words of a verdict for the system that it compares with.
NAMED = {
    "base": "the base model",
    "copy": "copying",
    "nearest": "the nearest training example",
    "n-gram": "the n-gram model",
    "empty": "an empty text",
    "stub": "a stub",
}


MOST_EMPTY = 0.5  # The share of empty answers of a model beyond which there is no verdict.


def empty_share(texts: Sequence[str]) -> float:
    """Return the share of texts that are empty or white space; 0 where there are none."""
    return sum(not text.strip() for text in texts) / max(1, len(texts))


def no_verdict(shares: dict[str, float]) -> str | None:
    """Return a sentence in place of a verdict where most answers of a model are empty; else None.

    Args:
        shares: The share of empty answers of each model, by its name in the sentence.
    """
    name, share = max(shares.items(), key=lambda one: one[1])
    if share <= MOST_EMPTY:
        return None
    return f"no verdict: {share:.1%} of the answers of {name} are empty, so that a score says little of it"


def metric_names(requested: str) -> tuple[str, ...]:
    """Return the names in `requested`, between commas; ValueError for one that no metric has."""
    return tuple(metric(name.strip()).name for name in requested.split(",") if name.strip())


def suites_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records of an eval.json: the first suite's, then those of the others."""
    return [result["suite"], *result.get("more_suites", [])] if "suite" in result else []


def records_of(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return every record of an eval.json, those of prompts in other words too.

    Each comes with the words behind its suite's name: "", or ", verbose prompts".
    """
    worded = result.get("prompts", {}).items()
    return [
        *(("", record) for record in suites_of(result)),
        *((f", {name} prompts", record) for name, record in worded),
    ]


def scored(
    suite: Suite,
    examples: Sequence[Example],
    predictions: dict[str, Predictions],
    metrics: Sequence[str] = (),
    language: str = "python",
    seed: int = 0,
    models: Mapping[str, Metric] | None = None,
) -> dict[str, Any]:
    """Return the record of a suite: scores with 95% intervals, verdicts, and every prediction.

    Examples of one file are not independent of each other, so that intervals and verdicts resample files. An
    example with several draws counts with the mean of its statistics, and `spread` is the standard deviation
    of the draws' own scores.

    Args:
        predictions: The predictions of each system; the judged one comes first, its baselines follow.
        metrics: Names of metrics in the place of the suite's own.
        language: The language of the code, for metrics that read it.
        seed: The seed of the resampling.
        models: Metrics that a model computes, by name. The record stores each sample's score by these.

    Raises:
        ValueError: There is no baseline, there are fewer than two examples, the numbers of predictions and
            examples differ, or a metric is unknown.
    """
    check_systems(suite, examples, predictions)
    names = list(metrics or suite.metrics)
    if not names:
        raise ValueError(f"the suite {suite.name} runs what is predicted, and has no metric of texts")
    references = [suite.clean(example.reference) for example in examples]
    files = [example.origin for example in examples]
    found, spreads, measured = {}, {}, {name: {} for name in models or {} if name in names}
    for system, made in predictions.items():
        draws = [
            score(names, list(zip(map(suite.clean, texts), references, strict=True)), language, models, files)
            for texts in made.draws
        ]
        found[system] = mean_of_draws(draws)
        for name, by_system in measured.items():
            by_system[system] = np.transpose([draw[name].samples for draw in draws]).tolist()
        if made.more:
            spreads[system] = {name: statistics.stdev(draw[name].value for draw in draws) for name in names}
    record = record_of(suite, examples, predictions, found, language, seed, spreads)
    return record | ({"measured": measured} if measured else {})


def mean_of_draws(draws: Sequence[dict[str, Scored]]) -> dict[str, Scored]:
    """Average each sample's statistics over the draws, for each metric."""
    return {
        name: replace(one, rows=np.mean([draw[name].rows for draw in draws], axis=0))
        for name, one in draws[0].items()
    }


def check_systems(suite: Suite, examples: Sequence[Example], predictions: dict[str, Predictions]) -> None:
    """Raise ValueError unless there are baselines, and a prediction of each system for each example."""
    subject, *baselines = predictions
    if not baselines:
        raise ValueError(
            f"the suite {suite.name} has no baseline to stand beside {subject}: a score alone says nothing"
        )
    for system, made in predictions.items():
        for texts in made.draws:
            if len(texts) != len(examples):
                raise ValueError(
                    f"{system} has {len(texts)} predictions for {len(examples)} examples: there must be one "
                    "for each, in the same order"
                )


def record_of(
    suite: Suite,
    examples: Sequence[Example],
    predictions: dict[str, Predictions],
    found: dict[str, dict[str, Scored]],
    language: str,
    seed: int,
    spreads: dict[str, dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Return the record of scores that were computed before, each system's by the same metrics.

    Args:
        found: The scores of each system by the name of the metric; the system that is judged comes first.
        spreads: Standard deviations of the draws' own scores, of each system that has several draws.

    Other arguments and the record are those of `scored`.
    """
    judged = next(iter(found))
    metrics = {name: one.metric for name, one in found[judged].items()}
    scores: dict[str, Any] = {
        system: {name: by_name[name].interval(seed)._asdict() for name in metrics}
        for system, by_name in found.items()
    }
    for system, by_name in (spreads or {}).items():
        for name, spread in by_name.items():
            scores[system][name]["spread"] = spread
    return {
        "suite": suite.name,
        "language": language,
        "seed": seed,
        "signatures": {name: one.signature(language) for name, one in metrics.items()},
        "scores": scores,
        "verdicts": _verdicts(predictions, found, seed),
        **_shares(predictions, len(examples), judged),
        "samples": [_sample(example, predictions, i) for i, example in enumerate(examples)],
    }


def _verdicts(
    predictions: dict[str, Predictions], found: dict[str, dict[str, Scored]], seed: int
) -> dict[str, Any]:
    """Compare the first system with each of the others by each metric, unless most answers are empty."""
    judged, *baselines = found
    models = {NAMED.get(one, one): predictions[one].empty for one in (judged, "base") if one in found}
    refused = no_verdict(models)
    verdicts: dict[str, Any] = {}
    for name, own in found[judged].items():
        # Among equals copying is the best baseline: that is what a score near it means.
        best = max(baselines, key=lambda system: (found[system][name].value, system == "copy"))
        compared = {system: own.compare(found[system][name], seed) for system in baselines}
        verdicts[name] = {
            "best": best,
            "against": {
                system: refused or comparison.verdict(NAMED.get(system, system))
                for system, comparison in compared.items()
            },
            "differences": {
                system: {
                    **comparison.difference._asdict(),
                    "distinguishable": comparison.distinguishable,
                    "needed": comparison.needed,
                }
                for system, comparison in compared.items()
            },
        }
    return verdicts


def _shares(predictions: dict[str, Predictions], n: int, judged: str) -> dict[str, dict[str, float]]:
    """Return what share of each system's texts ran into the limit or is empty, and of its prompts was cut.

    Empty answers are counted of systems that write; among the others an empty answer may be the point.
    """
    return {
        "ran_long": {
            system: made.ran_long / n / len(made.draws)
            for system, made in predictions.items()
            if made.ran_long is not None
        },
        "empty": {
            system: made.empty
            for system, made in predictions.items()
            if made.ran_long is not None or system == judged
        },
        "trimmed": {
            system: made.trimmed / n for system, made in predictions.items() if made.trimmed is not None
        },
    }


def _sample(example: Example, predictions: dict[str, Predictions], i: int) -> dict[str, Any]:
    """Return an example with what each system predicted for it, its i-th texts."""
    return {
        "id": example.id,
        "name": example.name,
        "where": example.where,
        "prompt": example.prompt,
        **({"suffix": example.suffix} if example.suffix is not None else {}),
        "reference": example.reference,
        "predictions": {system: made.texts[i] for system, made in predictions.items()},
        **_further_draws(predictions, i),
    }


def _further_draws(predictions: dict[str, Predictions], i: int) -> dict[str, Any]:
    more = {system: [texts[i] for texts in made.more] for system, made in predictions.items() if made.more}
    return {"more": more} if more else {}


# --- predictions made elsewhere ----------------------------------------------------------------------


def read_predictions(path: str | Path, examples: Sequence[Example]) -> list[str]:
    """Read the predictions of a JSONL file, one on each line, in the order of the examples.

    A line is an object with a `prediction` or a `completion`, and may name the `id` of its example.

    Raises:
        ValueError: It cannot be read, a line is something else, or there are more or fewer than examples.
    """
    rows = prediction_rows(path)
    if len(rows) != len(examples):
        raise ValueError(
            f"{path} holds {len(rows)} predictions, and the suite has {len(examples)} examples: "
            "give one a line, in the order of the samples in eval.json"
        )
    for (where, row, _), example in zip(rows, examples, strict=True):
        if row.get("id", example.id) != example.id:
            raise ValueError(
                f"{where} is for {row['id']!r}, and that example is {example.id!r}: the order must be "
                "that of the samples in eval.json, of the same --seed and --samples"
            )
        if str(row.get("task_id", example.name)) != example.name:
            raise ValueError(
                f"{where} is for task_id {row['task_id']!r}, and that example is {example.name!r}: the order "
                "must be that of the suite's file"
            )
    return [text for _, _, text in rows]


def prediction_rows(path: str | Path) -> list[tuple[str, dict[str, Any], str]]:
    """Return (place, row, text) of each line of a file of predictions; ValueError if it cannot be read so."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} line {line} is no UTF-8 (byte 0x{content[error.start]:02x}): write the file in UTF-8"
        ) from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    rows = []
    for number, line in numbered:
        where = f"{path} line {number}"
        row = parse_line(line, where)
        text = row.get("prediction", row.get("completion")) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise ValueError(f"{where} has no text in a field prediction or completion: give one")
        rows.append((where, row, text))
    return rows
