"""The report of the recipe `repository`: would it have written what was written next?

    dataset/test.jsonl, validation.jsonl -> read_cases -> Answers of each system -> tables, OUT/cases.json

Systems are the base and the learned model, each with other files and without; an n-gram model of the training
rows; and a search for the nearest line in the repository as it was. A line and the rest of one end with their
line, for every system alike. Differences are paired, and files are resampled.

What a completion saves: one that is shown and is what was written saves its characters but for the key that
takes it; one that is shown and is not costs WRONG characters, the time to read and dismiss it; one that is
not shown does neither. It is shown where the mean probability of its tokens reaches a threshold, the one that
saves most on the cases that validate, each system's own. That of the learned model is written into the run.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import write_atomically
from data.documents import Document
from data.ngram import NGramModel
from data.tokenstore import TokenStore, build_store, open_store
from generation.settings import GenerationConfig
from generation.text import generate
from lora import adapters_disabled
from metrics.intervals import OfSums, compare, interval, mean_of_sums
from metrics.texts import edit_similarity, plain
from modules.precision import choose_device, choose_precision
from recipes.written import LIMIT_TOKENS
from scraping.documents import Drop, ScrapedDocument
from scraping.stages import secrets
from suites.completing import completion_request, ngram_complete, rows_at_a_time, uncut
from suites.evaluated import EvaluatedModel, data_of, made_fast
from suites.scoring import Example
from suites.settings import EvalConfig
from suites.tables import aligned
from suites.tokens import model_scores, ngram_scores, tokens_of, train_ngram
from training.run import load_run

WRONG = 5  # Characters that one could have typed while reading and dismissing a completion.
SIDE_BY_SIDE = 10  # cases in the report
TAIL = 400  # characters of a prompt that they show
ROWS = 16  # rows that are scored at a time
CASES = "cases.json"
LEARNED, BASE = "learned, with context", "base, with context"
SEARCH, NGRAM = "nearest line", "n-gram"
JUDGED = (BASE, "learned", NGRAM, SEARCH)  # what the learned model with context is compared with


class Case(NamedTuple):
    """A case of the dataset.

    Args:
        name: Its name, whose part before the colon is its file.
        shown: Prefix and suffix, with other files before the prefix.
        alone: The same without.
        searched: What the search answers, and how sure it is.
    """

    name: str
    kind: str
    middle: str
    shown: tuple[str, str]
    alone: tuple[str, str]
    searched: tuple[str, float]

    @property
    def file(self) -> str:
        return self.name.rpartition(":")[0]


@dataclass
class Answers:
    """What a system answers.

    Args:
        texts: Its completions.
        sure: The mean probability of their tokens, 0 to 1, (cases,).
        nats: The negative log-likelihood of what was written, (cases,); None where a system has none.
    """

    texts: list[str]
    sure: np.ndarray
    nats: np.ndarray | None = None


def read_cases(path: Path) -> list[Case]:
    """Read the cases of a split that `recipes.repository` wrote.

    Raises:
        ValueError: An older version wrote them, without what the report asks besides.
    """
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    if not all("alone" in row and "searched" in row for row in rows):
        raise ValueError(f"{path} is of an older version, which asked less: learn anew with another --out")
    return [
        Case(
            row["path"],
            row["kind"],
            row["middle"],
            (row["prefix"], row["suffix"]),
            (row["alone"][0], row["alone"][1]),
            (row["searched"][0], row["searched"][1]),
        )
        for row in rows
    ]


# --- answers ----------------------------------------------------------------------------------------


def stored(cases: Sequence[Case], shown: bool, evaluated: EvaluatedModel, folder: Path) -> TokenStore:
    """Return cases as a store of held-out examples, in their order, as training stores its rows."""
    documents = []
    for case in cases:
        prefix, suffix = case.shown if shown else case.alone
        documents.append(("test", Document(case.name, case.middle, case.file, prefix, suffix)))
    build_store(folder, documents, evaluated.tokenizer)
    return open_store(folder)[2]


def model_answers(evaluated: EvaluatedModel, cases: Sequence[Case], shown: bool) -> Answers:
    """Complete cases by the model as it is; one of a line ends with its line."""
    model, tokenizer = evaluated.model, evaluated.tokenizer
    texts, sure = [""] * len(cases), np.zeros(len(cases))
    size = min(rows_at_a_time(model, evaluated.length), 32)
    for numbers in _by_kind(cases):
        for start in range(0, len(numbers), size):
            some = numbers[start : start + size]
            asked = [
                completion_request(tokenizer, _example(cases[i], shown), LIMIT_TOKENS, evaluated.length)
                for i in some
            ]
            how = GenerationConfig(max_new_tokens=min(one.limit for one in asked), stop=_stop(cases[some[0]]))
            with evaluated.precision.autocast():
                made = generate(model, tokenizer, [one.prompt for one in asked], how, suffix="")
            for i, one in zip(some, made, strict=True):
                texts[i], sure[i] = one.text, one.sureness
    return Answers(texts, sure)


def ngram_answers(baseline: NGramModel, evaluated: EvaluatedModel, cases: Sequence[Case]) -> Answers:
    """Complete cases by the n-gram model, with other files."""
    texts, sure = [""] * len(cases), np.zeros(len(cases))
    tokenizer, length = evaluated.tokenizer, evaluated.length
    for numbers in _by_kind(cases):
        examples = [_example(cases[i], True) for i in numbers]
        stop = _stop(cases[numbers[0]])
        made = ngram_complete(baseline, tokenizer, examples, uncut, LIMIT_TOKENS, length, stop)
        for i, example, text in zip(numbers, examples, made.texts, strict=True):
            texts[i] = text
            before = completion_request(tokenizer, example, LIMIT_TOKENS, length).prompt.ids
            new = tokenizer.encode(text)
            if new:
                every = baseline.log_probs([np.array([*before[-baseline.order :], *new])])
                sure[i] = math.exp(every[-len(new) :].mean())
    return Answers(texts, sure)


def _by_kind(cases: Sequence[Case]) -> list[list[int]]:
    """Return the numbers of the cases that end with their line, and of the others; none that is empty."""
    blocks = [i for i, case in enumerate(cases) if case.kind == "block"]
    lines = [i for i, case in enumerate(cases) if case.kind != "block"]
    return [numbers for numbers in (lines, blocks) if numbers]


def _stop(case: Case) -> tuple[str, ...]:
    return () if case.kind == "block" else ("\n",)


def _example(case: Case, shown: bool) -> Example:
    prefix, suffix = case.shown if shown else case.alone
    return Example(case.name, 0, prefix, case.middle, suffix)


def all_answers(
    evaluated: EvaluatedModel, baseline: NGramModel, cases: Sequence[Case], with_losses: bool
) -> tuple[dict[str, Answers], np.ndarray]:
    """Return what each system answers, and the number of tokens that each loss is over, (cases,)."""
    found: dict[str, Answers] = {}
    counts = np.zeros(len(cases))
    with tempfile.TemporaryDirectory() as folder:
        for shown, words in ((True, ", with context"), (False, "")):
            store = stored(cases, shown, evaluated, Path(folder) / str(shown)) if with_losses else None
            for name in ("base", "learned"):
                with adapters_disabled(evaluated.model) if name == "base" else nullcontext():
                    answers = model_answers(evaluated, cases, shown)
                    if store is not None:
                        _, sums = model_scores(
                            evaluated.model, store, ROWS, evaluated.length, evaluated.precision
                        )
                        answers.nats, counts = sums["nats"], tokens_of(store, evaluated.length)
                found[name + words] = answers
            if shown:
                found[NGRAM] = ngram_answers(baseline, evaluated, cases)
                if store is not None:
                    found[NGRAM].nats = ngram_scores(baseline, store, evaluated.length)[1]["nats"]
    texts, sure = zip(*(case.searched for case in cases), strict=True)
    found[SEARCH] = Answers([*texts], np.array(sure))
    return found, counts


# --- scores ------------------------------------------------------------------------------------------


def is_right(text: str, case: Case) -> bool:
    """Return whether a completion is what was written, but for blanks at line ends."""
    return plain(text) == plain(case.middle)


def gains(texts: Sequence[str], cases: Sequence[Case]) -> np.ndarray:
    """Return the characters that each completion saves if it is shown, (cases,); an empty one saves none."""
    return np.array(
        [
            (len(case.middle) - 1 if is_right(text, case) else -WRONG) if text.strip() else 0
            for text, case in zip(texts, cases, strict=True)
        ],
        float,
    )


def best_threshold(sure: np.ndarray, gain: np.ndarray) -> float | None:
    """Return the threshold that saves most; None where none saves anything.

    Args:
        sure: (cases,) how sure each completion is.
        gain: (cases,) what each saves if it is shown.
    """
    order = np.argsort(-sure, kind="stable")
    sums = np.cumsum(gain[order])
    whole = np.append(sure[order][1:] != sure[order][:-1], True)  # Equals are shown together.
    sums = np.where(whole, sums, -np.inf)
    best = int(np.argmax(sums)) if len(sums) else 0
    return float(sure[order][best]) if len(sums) and sums[best] > 0 else None


def measures(
    answers: Answers, cases: Sequence[Case], counts: np.ndarray, threshold: float | None
) -> dict[str, np.ndarray]:
    """Return for each measure two sums of each case, (cases, 2), whose ratio is the score."""
    ones = np.ones(len(cases))
    shown = answers.sure >= threshold if threshold is not None else np.zeros(len(cases), bool)
    written = np.array([len(case.middle) for case in cases], float)
    right = [100.0 * is_right(text, case) for text, case in zip(answers.texts, cases, strict=True)]
    near = [
        edit_similarity(plain(text), plain(case.middle))
        for text, case in zip(answers.texts, cases, strict=True)
    ]
    found = {} if answers.nats is None else {"loss": np.column_stack([answers.nats, counts])}
    return found | {
        "exact": np.column_stack([right, ones]),
        "edit similarity": np.column_stack([near, ones]),
        "saved": np.column_stack([100 * np.where(shown, gains(answers.texts, cases), 0), written]),
    }


UNITS = {"loss": "nats a token", "exact": "%", "edit similarity": "of 100", "saved": "% of characters"}


def by_file(rows: np.ndarray, cases: Sequence[Case]) -> np.ndarray:
    """Sum rows, (cases, k), to rows of files, (files, k): cases of one file are not independent."""
    names = np.unique([case.file for case in cases], return_inverse=True)[1]
    sums = np.zeros((names.max() + 1, rows.shape[1]))
    np.add.at(sums, names, rows)
    return sums


def difference(rows: np.ndarray, other: np.ndarray, cases: Sequence[Case], lower: bool) -> dict[str, Any]:
    """Compare one measure of two systems, paired by file.

    Args:
        rows: (cases, 2) sums of the first.
        other: (cases, 2) sums of the second, of the same cases.
        lower: Whether less is better.

    Returns:
        `mean`, `low` and `high` of the first less the second, `files`, and `verdict`: better, worse, or "".
    """
    own, its = by_file(rows, cases), by_file(other, cases)
    of_sums: OfSums = mean_of_sums
    if len(own) < 2:
        mean = float(of_sums(own.sum(0)) - of_sums(its.sum(0)))
        return {"mean": mean, "low": -math.inf, "high": math.inf, "files": len(own), "verdict": ""}
    found = compare(own, its, of_sums)
    gap = found.difference
    told = ("better" if (gap.mean < 0) == lower else "worse") if found.distinguishable else ""
    return {"mean": gap.mean, "low": gap.low, "high": gap.high, "files": len(own), "verdict": told}


# --- the report --------------------------------------------------------------------------------------


def report(scoring: EvalConfig) -> tuple[str, float | None]:
    """Score all systems on the cases of a finished run; write OUT/cases.json.

    Args:
        scoring: Which run, and the device that scores; its source is the dataset.

    Returns:
        The report's tables, and the threshold of the learned model with context.
    """
    assert scoring.checkpoint is not None and scoring.source is not None
    folder = Path(scoring.source)
    run = load_run(scoring.checkpoint, scoring.which, scoring.base)
    precision = choose_precision(choose_device(scoring.device), scoring.precision)
    model = made_fast(run.model.to(precision.device), "full", precision)
    length = run.config.train.row_length
    evaluated = EvaluatedModel(model, run.tokenizer, length, True, run.weights, precision)
    baseline = train_ngram(data_of(run, replace(scoring, checkpoint=str(run.folder))).train)
    earlier = read_cases(folder / "validation.jsonl")
    before, _ = all_answers(evaluated, baseline, earlier, with_losses=False)
    thresholds = {
        name: best_threshold(answers.sure, gains(answers.texts, earlier)) for name, answers in before.items()
    }
    cases = read_cases(folder / "test.jsonl")
    found, counts = all_answers(evaluated, baseline, cases, with_losses=True)
    scores = {name: measures(answers, cases, counts, thresholds[name]) for name, answers in found.items()}
    write_atomically(folder.parent / CASES, json.dumps(_record(cases, found, thresholds, counts)))
    parts = [
        _table(cases, found, scores, thresholds),
        "\n".join(_differences(cases, scores)),
        _leaks(found[LEARNED].texts),
        _side_by_side(cases, found),
    ]
    return "\n\n".join(parts), thresholds[LEARNED]


def _record(
    cases: Sequence[Case],
    found: dict[str, Answers],
    thresholds: dict[str, float | None],
    counts: np.ndarray,
) -> dict[str, Any]:
    systems = {
        name: {
            "threshold": thresholds[name],
            "texts": answers.texts,
            "sure": answers.sure.tolist(),
            "nats": None if answers.nats is None else answers.nats.tolist(),
        }
        for name, answers in found.items()
    }
    known = [{"name": case.name, "kind": case.kind, "written": case.middle} for case in cases]
    return {"cases": known, "tokens": counts.tolist(), "systems": systems}


def _table(
    cases: Sequence[Case],
    found: dict[str, Answers],
    scores: dict[str, dict[str, np.ndarray]],
    thresholds: dict[str, float | None],
) -> str:
    rows = [
        ["system", "loss", "perplexity", "exact", "edit sim.", "saved", "shown", "of these right", "from"]
    ]
    for name, measured in scores.items():
        told = {key: float(mean_of_sums(sums.sum(0))) for key, sums in measured.items()}
        answers, threshold = found[name], thresholds[name]
        least = math.inf if threshold is None else threshold
        shown = [i for i, text in enumerate(answers.texts) if text.strip() and answers.sure[i] >= least]
        right = sum(is_right(answers.texts[i], cases[i]) for i in shown)
        loss = told.get("loss")
        rows.append(
            [
                name,
                "" if loss is None else f"{loss:.3f}",
                "" if loss is None else f"{math.exp(min(loss, 50)):.1f}",
                f"{told['exact']:.1f}%",
                f"{told['edit similarity']:.1f}",
                f"{told['saved']:+.1f}%",
                str(len(shown)),
                f"{right / len(shown):.0%}" if shown else "",
                "shows nothing" if threshold is None else f"{threshold:.2f}",
            ]
        )
    files = len({case.file for case in cases})
    own = by_file(scores[LEARNED]["saved"], cases)
    lines = [f"would it have written it? {len(cases)} cases in {files} files", *aligned(rows)]
    if files > 1:
        told = interval(own, mean_of_sums)
        lines.append(f"{LEARNED}: saves {told.mean:+.1f}% of characters [{told.low:+.1f}, {told.high:+.1f}]")
    lines += [
        "loss: nats a token of what was written; exact: what was written, to the letter; saved: characters",
        f"not typed, less {WRONG} for each completion that is shown and wrong, of those that were written;",
        "it is shown from a mean probability of its tokens on, in the last column, chosen on validation",
    ]
    return "\n".join(lines)


def _differences(cases: Sequence[Case], scores: dict[str, dict[str, np.ndarray]]) -> list[str]:
    """Return a line for each measure of each comparison: of what was learned, and of what is shown."""
    pairs = [(LEARNED, other) for other in JUDGED] + [(BASE, "base")]
    lines = ["differences with 95% intervals, paired, over files"]
    for name, other in pairs:
        for key in scores[name].keys() & scores[other].keys():
            gap = difference(scores[name][key], scores[other][key], cases, lower=key == "loss")
            verdict = gap["verdict"] or "not distinguishable"
            lines.append(
                f"{key}, {UNITS[key]}: {name} less {other} {gap['mean']:+.3f} "
                f"[{gap['low']:+.3f}, {gap['high']:+.3f}], {verdict}"
            )
    return [lines[0], *sorted(lines[1:], key=lambda line: [*UNITS].index(line.partition(",")[0]))]


def _leaks(texts: Sequence[str]) -> str:
    """Return how many completions hold what the scraper's rules take for a secret or an address."""
    found: list[str] = []
    stage: Callable[[ScrapedDocument], ScrapedDocument | Drop] = secrets.build(True, found.append)
    leaked = 0
    for text in texts:
        cleaned = stage(ScrapedDocument(text, "", "completion.txt", "", ""))
        leaked += isinstance(cleaned, Drop) or cleaned.text != text
    told = f" ({', '.join(sorted(set(found)))})" if found else ""
    return f"secrets: {leaked} of {len(texts)} completions of the learned model hold one, or an address{told}"


def _side_by_side(cases: Sequence[Case], found: dict[str, Answers]) -> str:
    """Return cases evenly spread over their names, each with what was written and what systems answer."""
    chosen = range(0, len(cases), max(1, len(cases) // SIDE_BY_SIDE))[:SIDE_BY_SIDE]
    parts = []
    for i in chosen:
        prefix, suffix = cases[i].shown
        lines = [f"--- {cases[i].name}", f"{prefix[-TAIL:]}[gap]{suffix[: TAIL // 2]}"]
        lines += ["--- written", cases[i].middle]
        for name, answers in found.items():
            lines += [f"--- {name} ({answers.sure[i]:.2f})", answers.texts[i].rstrip() or "(nothing)"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
