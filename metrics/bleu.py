"""BLEU in the forms that are published for code, and chrF: statistics of each pair, and scores of their sums.

A score of a corpus is not the mean of its samples' scores. So each function of pairs gives a row of counts
for each pair, and each `..._of_sums` the scores of summed rows, of which an interval needs thousands.

sacrebleu (Post 2018) gives its own numbers, by its own functions, with one exception: where neither side of
the whole corpus has any unit, it says 0 and this says 100.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from metrics.texts import Pair, code_tokens

ORDERS = 4  # of n-grams: each BLEU here is BLEU-4
_CHAR_ORDERS = 6

# --- sacrebleu -----------------------------------------------------------------------------------------


@lru_cache
def _sacrebleu(name: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # With `effective_order` a corpus without a single n-gram of some length is scored on the shorter ones;
    # else three tokens against themselves have 0. It changes nothing where there is one.
    # `force` drops the warning that code "looks tokenized": it often ends in " .".
    if name in ("13a", "none"):
        return BLEU(tokenize=name, effective_order=True, force=True)
    return CHRF(word_order={"chrf": 0, "chrf++": 2}[name])


def sacrebleu_signature(name: str) -> str:
    """sacrebleu's own, of `13a`, `none`, `chrf` or `chrf++`; without a corpus it cannot say `nrefs`: 1."""
    scorer = _sacrebleu(name)
    scorer.num_refs = 1
    return str(scorer.get_signature())


def _rows(name: str, predictions: list[str], references: list[str]) -> np.ndarray:
    # What sacrebleu's own bootstrap resamples; a public function would give the corpus' score alone.
    return np.array(_sacrebleu(name)._extract_corpus_statistics(predictions, [references]), np.float64)


def _scores(name: str, sums: np.ndarray) -> np.ndarray:
    scorer = _sacrebleu(name)
    flat = sums.reshape(-1, sums.shape[-1]).tolist()
    scores = np.array([scorer._compute_score_from_stats(row).score for row in flat])
    return scores.reshape(sums.shape[:-1])


def bleu_13a(pairs: Sequence[Pair]) -> np.ndarray:
    """(pairs, 10): length of the prediction, of the reference, shared n-grams, n-grams; for running text."""
    return _rows("13a", [p for p, _ in pairs], [r for _, r in pairs])


def bleu_code(pairs: Sequence[Pair]) -> np.ndarray:
    """The same of code tokens, which sacrebleu takes as they are (`tokenize="none"`)."""
    return _rows(
        "none", [" ".join(code_tokens(p)) for p, _ in pairs], [" ".join(code_tokens(r)) for _, r in pairs]
    )


def bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    """(..., 10) -> (...): sacrebleu's score, smoothed by `exp`."""
    return _full_if_empty(_scores("none", sums), sums[..., 0] + sums[..., 1])


def chrf(pairs: Sequence[Pair]) -> np.ndarray:
    """(pairs, 24): for each of six character and two word orders the n-grams of the prediction, those of the
    reference, and the shared ones. chrF (Popović 2015) reads the first 18, chrF++ (2017) all."""
    return _rows("chrf++", [p for p, _ in pairs], [r for _, r in pairs])


def chrf_of_sums(sums: np.ndarray) -> np.ndarray:
    """(..., 24) -> (...)."""
    return _full_if_empty(_scores("chrf", sums[..., : 3 * _CHAR_ORDERS]), sums[..., 0] + sums[..., 1])


def chrf_plus_of_sums(sums: np.ndarray) -> np.ndarray:
    """(..., 24) -> (...)."""
    return _full_if_empty(_scores("chrf++", sums), sums[..., 0] + sums[..., 1])


def _full_if_empty(scores: np.ndarray, units: np.ndarray) -> np.ndarray:
    return np.where(units == 0, 100.0, scores)


# --- CodeXGLUE -----------------------------------------------------------------------------------------


def ngrams(tokens: Sequence[Any], order: int) -> Counter[tuple[Any, ...]]:
    """The n-grams of one order, and how often each occurs."""
    return Counter(zip(*(tokens[i:] for i in range(order)), strict=False))


def ngram_rows(pairs: Sequence[Pair], tokenize: Callable[[str], list[str]]) -> np.ndarray:
    """(pairs, 10): as `bleu_13a`, of whatever tokens."""
    rows = np.zeros((len(pairs), 2 + 2 * ORDERS))
    for row, (prediction, reference) in zip(rows, pairs, strict=True):
        found, wanted = tokenize(prediction), tokenize(reference)
        row[:2] = len(found), len(wanted)
        for order in range(1, ORDERS + 1):
            known = ngrams(wanted, order)
            row[1 + order] = sum(min(n, known[g]) for g, n in ngrams(found, order).items() if g in known)
            row[1 + ORDERS + order] = max(0, len(found) - order + 1)
    return rows


def bleu_codexglue(pairs: Sequence[Pair]) -> np.ndarray:
    """(pairs, 10), of the tokens between white space: CodeXGLUE's method generation reads cleaned lines."""
    return ngram_rows(pairs, str.split)


def bleu_codexglue_of_sums(sums: np.ndarray) -> np.ndarray:
    """(..., 10) -> (...): BLEU-4 of a corpus with 1 added to each precision's both counts (Lin and Och 2004).

    CodeXGLUE's `bleu.py` of method generation, which rounds to two places. It divides by zero where all
    predictions, or all references, are empty; here these score 0, or 100 where both are.
    """
    lengths, shared, of = sums[..., :2], sums[..., 2 : 2 + ORDERS], sums[..., 2 + ORDERS :]
    found, wanted = lengths[..., 0], lengths[..., 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        penalty = np.where(found > wanted, 1.0, np.exp(1 - wanted / found))
    mean = np.exp(np.log((shared + 1) / (of + 1)).mean(-1))
    scores = np.where((found == 0) | (wanted == 0), 0.0, 100 * mean * penalty)
    return _full_if_empty(scores, found + wanted)


# What the evaluator's two passes of tokenisation come to: the second adds only that `_` stands alone.
_SUMMARY_TOKEN = re.compile(r"[^\W_]+|_|[^\w\s]")
_TINY = sys.float_info.min


def summary_tokens(text: str) -> list[str]:
    """The tokens of CodeXGLUE's code-to-text: lower case, words, single punctuation marks."""
    return _SUMMARY_TOKEN.findall(text.strip().lower())


def bleu_codexglue_summary(pairs: Sequence[Pair]) -> np.ndarray:
    """(pairs,): BLEU-4 of each pair with 1 added to the counts of bigrams and longer ones (Lin and Och 2004),
    as CodeXGLUE's code-to-text, whose score is the mean.

    An empty prediction of a reference of n tokens has 100 exp(-n), as it has there, and not 0.
    """
    rows = ngram_rows(pairs, summary_tokens)
    shared, of = rows[:, 2 : 2 + ORDERS], rows[:, 2 + ORDERS :]
    added = np.array([0.0] + [1.0] * (ORDERS - 1)) + _TINY
    precision = (np.log(shared + added) - np.log(of + added)).mean(1)
    penalty = np.minimum(0.0, 1 - (rows[:, 1] + 1) / (rows[:, 0] + 1))
    return 100 * np.exp(precision + penalty)


# --- of code, weighted ---------------------------------------------------------------------------------


def precision_of_sums(lengths: np.ndarray, shared: np.ndarray, of: np.ndarray) -> np.ndarray:
    """(..., 2), (..., orders), (..., orders) -> (...) in 0 to 1: the geometric mean of shared / of, times
    exp(1 - wanted / found) where less was found than wanted.

    An order that has nothing to share is left out, and one that shares nothing counts 0.1 (Chen and Cherry
    2014, method 1).
    """
    has = of > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(has, np.log(np.where(shared > 0, shared, 0.1) / of), 0.0)
        mean = np.exp(logs.sum(-1) / has.sum(-1))
        found, wanted = lengths[..., 0], lengths[..., 1]
        penalty = np.where(found >= wanted, 1.0, np.exp(1 - wanted / found))
    return np.where(shared[..., 0] > 0, mean * penalty, 0.0)

