"""Every score of texts by its name: how it is computed, its signature, and how sure it is.

    pairs = cleaned(predictions, references, "plain")
    for name, scored in score(["codebleu", "chrf"], pairs, "python").items():
        print(name, scored.value, scored.interval(), scored.metric.signature("python"))

A metric makes one row of statistics for each pair, and computes the score from a sum of rows. Everything else
follows: the score of the corpus is that of all rows, the score of a sample is that of its row, and intervals
resample rows.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version

import numpy as np

from metrics import bleu, codebleu, rouge, texts
from metrics.intervals import Comparison, Interval, OfSums, chances_interval, compare, interval
from metrics.texts import Pair, code_tokens
from metrics.trees import check_language, parses

Rows = Callable[[Sequence[Pair], str], np.ndarray]  # (pairs, language) -> (pairs, k) statistics


@dataclass(frozen=True)
class Metric:
    """A score from 0 to `maximum`, which a reference has against itself. Higher is better in all of them.

    Args:
        name: Its key in the table `METRICS`.
        rows: One row of statistics for each pair. Metrics that share this function share its work.
        of_sums: The scores, (...), from sums of rows, (..., k).
        equals: The published score that it is equal to, and how that is set up.
        corpus: Whether the score of a corpus is one of its sums; else it is the mean of the samples' scores.
        by_language: Whether it reads the text as code of one language.
        all_or_nothing: Whether a sample has 0 or the maximum, so that a score is a share of successes.
    """

    name: str
    rows: Rows
    of_sums: OfSums
    equals: str
    corpus: bool = False
    by_language: bool = False
    all_or_nothing: bool = False
    maximum: float = 100.0

    def signature(self, language: str) -> str:
        """Return the text that a number needs beside it to be compared with others."""
        parts = [self.name, self.equals or bleu.sacrebleu_signature(SACREBLEU[self.name])]
        if self.by_language:
            parts.append(f"language:{language}")
        return "|".join([*parts, "corpus" if self.corpus else "mean of samples"])


@dataclass(frozen=True)
class Scored:
    """The score of a list of pairs by one metric.

    Args:
        metric: The metric.
        rows: (pairs, k), its statistics.
        origins: (pairs,), the number of the file that each pair is from. Pairs of one file are not
            independent, so that files are resampled. None where each pair is from a file of its own.
    """

    metric: Metric
    rows: np.ndarray
    origins: np.ndarray | None = None

    @property
    def value(self) -> float:
        """The score of all pairs."""
        return float(self.metric.of_sums(self.rows.sum(0)))

    @property
    def samples(self) -> np.ndarray:
        """The score of each pair, (pairs,); their mean is `value` unless the metric is one of the corpus."""
        return self.metric.of_sums(self.rows)

    @property
    def units(self) -> np.ndarray:
        """The rows, those of one file summed, (files, k)."""
        if self.origins is None:
            return self.rows
        sums = np.zeros((int(self.origins.max()) + 1, self.rows.shape[1]))
        np.add.at(sums, self.origins, self.rows)
        return sums

    def interval(self, seed: int = 0, confidence: float = 0.95) -> Interval:
        """Return the score with its interval: `chances_interval` of shares of successes, or the bootstrap's.

        Raises:
            ValueError: There are fewer than two pairs.
        """
        units = self.units
        if self.metric.all_or_nothing and len(units) > 1:
            found = chances_interval(units, seed, confidence)
        else:
            bounds = 0.0, self.metric.maximum
            found = interval(units, self.metric.of_sums, seed, confidence, bounds=bounds)
        return found._replace(n=len(self.rows))

    def compare(self, other: Scored, seed: int = 0, confidence: float = 0.95) -> Comparison:
        """Compare this score with that of another system on the same pairs.

        Raises:
            ValueError: The metrics or the numbers of pairs differ, or there are fewer than two pairs.
        """
        if self.metric.name != other.metric.name:
            raise ValueError(
                f"{self.metric.name} is compared with {other.metric.name}: they must be the same"
            )
        if len(self.rows) != len(other.rows):  # The sums by file would hide the difference: this raises.
            return compare(self.rows, other.rows, self.metric.of_sums)
        found = compare(self.units, other.units, self.metric.of_sums, seed, confidence)
        n = len(self.rows)
        needed = None if found.needed is None else math.ceil(found.needed * n / found.units)
        return replace(found, difference=found.difference._replace(n=n), needed=needed)


def metric(name: str) -> Metric:
    """Return the metric of that name.

    Raises:
        ValueError: No metric has it.
    """
    known = METRICS | BY_MODEL
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        meant = f", did you mean {near[0]}" if near else ""
        raise ValueError(f"no metric is called {name!r}{meant}; there are {', '.join(known)}")
    return known[name]


def of_means(name: str, rows: Rows, equals: str) -> Metric:
    """Return a metric whose rows, (pairs, 2), are the score of a sample and a 1."""
    return Metric(name, rows, _first, equals)


def of_values(name: str, equals: str, values: Mapping[Pair, float]) -> Metric:
    """Return a metric whose samples' scores were computed before, by a model that need not be here.

    Args:
        values: The score of each pair, cleaned.
    """

    def rows(pairs: Sequence[Pair], language: str) -> np.ndarray:
        missing = sum(pair not in values for pair in pairs)
        if missing:
            raise ValueError(f"{missing} of {len(pairs)} pairs have no score by {name}; evaluate again")
        return np.array([[values[pair], 1.0] for pair in pairs])

    return of_means(name, rows, equals)


def score(
    names: Sequence[str],
    pairs: Sequence[Pair],
    language: str = "python",
    models: Mapping[str, Metric] | None = None,
    origins: Sequence[str] | None = None,
) -> dict[str, Scored]:
    """Score pairs that `texts.cleaned` made by the metrics of these names.

    Args:
        names: Keys of `METRICS` or `models`.
        pairs: Predictions and references.
        language: The language of the code: `python`, `kotlin` or `java`. Only some metrics read it.
        models: Metrics that a model computes, which take precedence over those of `METRICS`.
        origins: The file that each pair is from. Pairs of one file are not independent of each other.

    Raises:
        ValueError: A name or the language is unknown, or there are no pairs.
    """
    wanted = [(models or {}).get(name) or metric(name) for name in names]
    if not pairs:
        raise ValueError("0 pairs to score: a score needs at least 1")
    check_language(language)
    made: dict[Rows, np.ndarray] = {}
    for one in wanted:
        if one.rows not in made:
            made[one.rows] = one.rows(pairs, language)
    numbers = None if origins is None else numbers_of(origins)
    return {one.name: Scored(one, made[one.rows], numbers) for one in wanted}


def numbers_of(origins: Sequence[str]) -> np.ndarray | None:
    """Return the number of each pair's file, (pairs,).

    It is None where each pair has a file of its own. It is None too where all are of one file, which alone
    says nothing of others.
    """
    if not 1 < len(set(origins)) < len(origins):
        return None
    return np.unique(np.array(origins, object), return_inverse=True)[1]


# --- the table -----------------------------------------------------------------------------------------


def _with_ones(*columns: Sequence[float] | np.ndarray) -> np.ndarray:
    return np.column_stack([*(np.asarray(c, np.float64) for c in columns), np.ones(len(columns[0]))])


def _mean_of(column: int, sums: np.ndarray) -> np.ndarray:
    return sums[..., column] / sums[..., -1]


_first = partial(_mean_of, 0)


def _each(one: Callable[[str, str], float]) -> Rows:
    return lambda pairs, _: _with_ones([one(*pair) for pair in pairs])


def _each_in(one: Callable[[str, str, str], float]) -> Rows:
    return lambda pairs, language: _with_ones([one(*pair, language) for pair in pairs])


def _of_pairs(rows: Callable[[Sequence[Pair]], np.ndarray]) -> Rows:
    return lambda pairs, _: rows(pairs)


def _rouge(tokens: Callable[[str], list[str]]) -> Rows:
    def one(prediction: str, reference: str) -> tuple[float, float, float]:
        if prediction == reference:  # rouge-score gives 0 where there is no token, or no pair of tokens.
            return 100.0, 100.0, 100.0
        found, wanted = tokens(prediction), tokens(reference)
        return rouge.rouge_n(found, wanted, 1), rouge.rouge_n(found, wanted, 2), rouge.rouge_l(found, wanted)

    return lambda pairs, _: _with_ones(*zip(*(one(*pair) for pair in pairs), strict=True))


def _parses_rows(pairs: Sequence[Pair], language: str) -> np.ndarray:
    # The empty text is a program, but no answer: a system that says nothing must not be the best here.
    return _with_ones(
        [
            100.0 * (parses(prediction, language) if prediction.strip() else not reference.strip())
            for prediction, reference in pairs
        ]
    )


def _no_model(pairs: Sequence[Pair], language: str) -> np.ndarray:
    raise ValueError(
        "semantic is had from the hidden states of a model, and none is here; evaluate a checkpoint"
    )


def _codebleu_part(part: int, sums: np.ndarray) -> np.ndarray:
    scores = codebleu.codebleu_parts(sums)[..., part]
    return np.where(np.isnan(scores), 100.0, 100 * scores)


_chrf, _rouge_words, _rouge_code = _of_pairs(bleu.chrf), _rouge(rouge.rouge_tokens), _rouge(code_tokens)
_RAPIDFUZZ = f"rapidfuzz {version('rapidfuzz')}"
# The settings of sacrebleu's scores; its own signature, which imports it, names them in full.
SACREBLEU = {"bleu": "13a", "bleu_code": "none", "chrf": "chrf", "chrf++": "chrf++"}

_TABLE = [
    Metric("exact_match", _each(texts.exact_match), _first, "equal strings", all_or_nothing=True),
    Metric(
        "exact_match_words",
        _each(texts.exact_match_words),
        _first,
        "CodeXGLUE line completion: equal but for white space",
        all_or_nothing=True,
    ),
    Metric("edit_similarity", _each(texts.edit_similarity), _first, f"Indel ratio, {_RAPIDFUZZ}"),
    Metric(
        "edit_similarity_rounded",
        _each(texts.edit_similarity_rounded),
        _first,
        f"CodeXGLUE: Indel ratio rounded a sample, {_RAPIDFUZZ}",
    ),
    Metric(
        "identifier_f1",
        _each_in(texts.identifier_f1),
        _first,
        "F1 of the set of names outside strings and comments",
        by_language=True,
    ),
    Metric(
        "parses",
        _parses_rows,
        _first,
        "the prediction alone, unless it is empty: ast for Python, tree-sitter for others",
        by_language=True,
        all_or_nothing=True,
    ),
    Metric("bleu", _of_pairs(bleu.bleu_13a), bleu.bleu_of_sums, "", corpus=True),
    Metric("bleu_code", _of_pairs(bleu.bleu_code), bleu.bleu_of_sums, "", corpus=True),
    Metric(
        "bleu_codexglue",
        _of_pairs(bleu.bleu_codexglue),
        bleu.bleu_codexglue_of_sums,
        "CodeXGLUE method generation: BLEU-4, +1 on all orders, split at white space",
        corpus=True,
    ),
    Metric(
        "bleu_summary",
        lambda pairs, _: _with_ones(bleu.bleu_codexglue_summary(pairs)),
        _first,
        "CodeXGLUE code-to-text: BLEU-4 of each sample, +1 from bigrams on",
    ),
    Metric("chrf", _chrf, bleu.chrf_of_sums, "", corpus=True),
    Metric("chrf++", _chrf, bleu.chrf_plus_of_sums, "", corpus=True),
    *(
        Metric(f"rouge{kind}{suffix}", rows, partial(_mean_of, column), f"F1, {says}")
        for suffix, rows, says in (
            ("", _rouge_words, "rouge-score's tokens, no stemming"),
            ("_code", _rouge_code, "words and marks"),
        )
        for column, kind in enumerate("12L")
    ),
    Metric(
        "codebleu",
        codebleu.codebleu,
        codebleu.codebleu_of_sums,
        "arXiv:2009.10297, 0.25 each, words and marks",
        corpus=True,
        by_language=True,
    ),
    *(
        Metric(
            f"codebleu_{part}",
            codebleu.codebleu,
            partial(_codebleu_part, column),
            "a part of codebleu",
            corpus=True,
            by_language=True,
        )
        for column, part in enumerate(codebleu.PARTS)
    ),
]
METRICS = {one.name: one for one in _TABLE}
# Metrics that only a model can compute; `score` is given theirs by `models`.
BY_MODEL = {"semantic": Metric("semantic", _no_model, _first, "hidden states of a model")}
