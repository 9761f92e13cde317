"""Scores of a suite: every system's predictions by the same metrics, with intervals, and verdicts in words.

    record = scored(SUITES["pairs"], examples, {"model": ..., "copy": ..., "nearest": ...})
    print(suite_table(record))

A record is plain data and holds every prediction, so that each number in it can be had again
(`rescoring`). `suites_of` has the records of an eval.json. No torch.
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

    @property
    def origin(self) -> str:
        """The file that it is from: other examples of that one are not independent of it."""
        return origin_of(self.name)


def origin_of(name: str) -> str:
    """The file of a document: one that is called `FILE:PART`, as a line or a class of it, is from FILE.

    Of a task of HumanEval's infilling, `KindInfilling/HumanEval/N/...`, it is the problem.
    """
    if infilling := re.match(r"\w+Infilling/\w+/\d+(?=/)", name):
        return infilling[0]
    file, _, part = name.rpartition(":")
    return name if "/" in part or "\\" in part else file or name  # of an address, or of a drive


@dataclass(frozen=True)
class Predictions:
    """What one system answers.

    Args:
        texts: One for each example, without its prompt.
        ran_long: How many ran into the length limit; None where there is no limit.
        more: Further draws of a system that samples, each as `texts`.
        trimmed: How many prompts were longer than there was room for, and lost what is farthest from the
            completion; None where nothing is cut.
    """

    texts: list[str]
    ran_long: int | None = None
    more: list[list[str]] = field(default_factory=list)
    trimmed: int | None = None

    @property
    def draws(self) -> list[list[str]]:
        """All of them: (draws, examples)."""
        return [self.texts, *self.more]

    @property
    def empty(self) -> float:
        """Share of answers that say nothing, white space being nothing."""
        return empty_share([text for texts in self.draws for text in texts])


@dataclass(frozen=True)
class Suite:
    """How a kind of example is scored.

    Args:
        name: In the table `SUITES`.
        title: What is predicted, in words.
        counted: How many samples there are, in words, of `n` and `files`.
        metrics: Names of `metrics.registry`, where none are asked for; none of programs, which are run.
        clean: What predictions and references both go through before they are compared.
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


TOKENS = "next_token"  # the token scores, which are of no suite
MUCH_CUT = 0.25  # of the prompts; from this share on it is a warning
TOGETHER = {"fim": ("fim_line", "fim_lines", "fim_span")}  # suites that one name asks for
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
# How a verdict calls what it compares with.
NAMED = {
    "base": "the base model",
    "copy": "copying",
    "nearest": "the nearest training example",
    "n-gram": "the n-gram model",
    "empty": "an empty text",
    "stub": "a stub",
}


MOST_EMPTY = 0.5  # share of a model's answers beyond which there is no verdict


def empty_share(texts: Sequence[str]) -> float:
    """Share of texts that are empty or white space; 0 of none."""
    return sum(not text.strip() for text in texts) / max(1, len(texts))


def no_verdict(shares: dict[str, float]) -> str | None:
    """The sentence in place of a verdict where most answers of a model are empty, by the share of each."""
    name, share = max(shares.items(), key=lambda one: one[1])
    if share <= MOST_EMPTY:
        return None
    return f"no verdict: {share:.1%} of the answers of {name} are empty, so that a score says little of it"


def metric_names(requested: str) -> tuple[str, ...]:
    """The names in `requested`, between commas; ValueError for one that no metric has."""
    return tuple(metric(name.strip()).name for name in requested.split(",") if name.strip())


def suites_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of an eval.json: the first suite's, then those of the others."""
    return [result["suite"], *result.get("more_suites", [])] if "suite" in result else []


def records_of(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every record of an eval.json, also those of prompts in other words, each with what is to be said behind
    its suite's name: nothing, or ", verbose prompts".
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
    """The record of a suite: scores with 95% intervals, verdicts, and every prediction.

    Examples of one file are not independent of each other, so that intervals and verdicts resample files. Of
    several draws an example counts with the mean of its statistics, and `spread` is the standard deviation
    of the draws' own scores.

    Args:
        predictions: The system that is judged comes first; the others are its baselines.
        metrics: Names of metrics in the place of the suite's own.
        language: Of the code, for metrics that read it.
        seed: Of the resampling.
        models: Metrics that a model computes, by name. The score of each sample by these is in the record.

    Raises:
        ValueError: no baseline, fewer than two examples, another number of predictions, or an unknown metric.
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
    """Of each metric, the mean of what each sample's draws have."""
    return {
        name: replace(one, rows=np.mean([draw[name].rows for draw in draws], axis=0))
        for name, one in draws[0].items()
    }


def check_systems(suite: Suite, examples: Sequence[Example], predictions: dict[str, Predictions]) -> None:
    """ValueError unless there are baselines, and a prediction of each system for each example."""
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


def suite_table(record: dict[str, Any]) -> str:
    """A row for each metric, a column for each system; below it the verdicts.

    Raises:
        ValueError: the record has no baseline.
    """
    suite, systems = SUITES[record["suite"]], list(record["scores"])
    if len(systems) < 2:
        raise ValueError(f"the suite {suite.name} has no baseline, so its scores are not shown")
    files = len({origin_of(sample["name"]) for sample in record["samples"]})
    head = f"{suite.title}: {suite.counted.format(n=len(record['samples']), files=files)}"
    rows = [["metric", *systems]]
    for name in record["signatures"]:
        intervals = (record["scores"][system][name] for system in systems)
        rows.append([name, *map(_shown, intervals)])
    lines = aligned(rows + shares_told([(record, system) for system in systems]))
    cut = max(record.get("trimmed", {}).values(), default=0)
    if cut >= MUCH_CUT:
        lines.append(
            f"warning: {cut:.1%} of the prompts were cut, so that these scores are of prompts without their "
            "beginning: a row has no room for them; train with a longer --row_length, or ask for less with "
            "--max_new_tokens"
        )
    for name, verdict in record["verdicts"].items():
        against = [verdict["best"], *(["base"] if "base" in verdict["against"] else [])]
        said = dict.fromkeys(verdict["against"][one] for one in against)  # one may say the same of both
        lines.append(f"{name}: {'; '.join(said)}")
    if "without" in record:
        lines.append(f"beside these: {record['without']}")
    if "sandbox" in record:
        lines.append(f"sandbox: {record['sandbox']}")
    left_out = record.get("left_out", {})
    if left_out:
        lines.append(
            f"{len(left_out)} problems cannot be judged here and are left out: {', '.join(left_out)}"
        )
    draws = record.get("draws", 1)
    each = f", {draws} draws each" if draws > 1 else ""
    over = " over files" if 1 < files < len(record["samples"]) else ""
    return "\n".join([f"{head}{each}, with 95% intervals{over}", *lines])


def shares_told(systems: Sequence[tuple[dict[str, Any], str]]) -> list[list[str]]:
    """Rows of a table: what share of texts ran into the limit, is empty, and of prompts was cut, if any was.

    Args:
        systems: A record and the name of one of its systems, for each column.
    """
    rows = []
    for key, name in (
        ("ran_long", "ran into the limit"),
        ("empty", "empty answers"),
        ("trimmed", "prompts cut to fit"),
    ):
        shares = [record.get(key, {}).get(system) for record, system in systems]
        if any(share is not None and (share or key != "trimmed") for share in shares):
            rows.append([name, *("" if share is None else f"{share:.1%}" for share in shares)])
    return rows


def _shown(interval: dict[str, Any]) -> str:
    spread = f" ±{interval['spread']:.1f}" if "spread" in interval else ""
    return "{mean:.1f}{spread} [{low:.1f}, {high:.1f}]".format(**interval | {"spread": spread})


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
    """(place, row, text) of each line of a file of predictions; ValueError if it cannot be read as such."""
    try:
        held = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    try:
        lines = held.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        line = held.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} line {line} is no UTF-8 (byte 0x{held[error.start]:02x}): write the file in UTF-8"
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
