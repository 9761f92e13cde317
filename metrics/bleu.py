"""BLEU in the forms that are published for code, and chrF: statistics of each pair, and scores of their sums.

A score of a corpus is not the mean of its samples' scores. So each function of pairs returns a row of counts
for each pair, and each `..._of_sums` the scores of summed rows, of which an interval needs thousands.

The scores that are named after sacrebleu (Post 2018) are its own, by its own functions, with one exception:
where neither side of the whole corpus has any unit, sacrebleu gives 0 and this gives 100.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from metrics.texts import Pair, code_tokens, ngrams, shared_ngrams

ORDERS = 4  # Orders of n-grams: each BLEU here is BLEU-4.
_CHAR_ORDERS, _WORD_ORDERS = 6, 2  # Orders of n-grams of chrF++.

# --- sacrebleu -----------------------------------------------------------------------------------------


@lru_cache
def _sacrebleu(name: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # With `effective_order` a corpus without a single n-gram of some length is scored on the shorter ones;
    # without it three tokens against themselves have 0. Where there is such an n-gram it changes nothing.
    # `force` drops the warning that code "looks tokenized": it often ends in " .".
    if name in ("13a", "none"):
        return BLEU(tokenize=name, effective_order=True, force=True)
    return CHRF(word_order={"chrf": 0, "chrf++": 2}[name])


def sacrebleu_signature(name: str) -> str:
    """Return sacrebleu's own signature of `13a`, `none`, `chrf` or `chrf++`, with one reference."""
    scorer = _sacrebleu(name)
    scorer.num_refs = 1  # Without a corpus sacrebleu does not know it.
    return str(scorer.get_signature())


def _scores(name: str, sums: np.ndarray) -> np.ndarray:
    scorer = _sacrebleu(name)
    flat = sums.reshape(-1, sums.shape[-1]).tolist()
    scores = np.array([scorer._compute_score_from_stats(row).score for row in flat])
    return scores.reshape(sums.shape[:-1])


# A mark that stands alone, or a word. The quote ' is no such mark; of . , and - it depends on what is beside.
_PIECE = re.compile(r"[!-&(-+/:-@\[-`{-~]|[^\s!-&(-+/:-@\[-`{-~]+")
_PERIODS = (
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


def tokens_13a(text: str) -> list[str]:
    """Split a text into sacrebleu's default tokens, those of mteval-v13a.

    sacrebleu's own function goes through the text four times and took half the time of all metrics together.
    Its passes over periods, commas and dashes look at one mark beyond a white space at most, so that here
    each word is passed once, and cached.
    """
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    if "&" in text:
        for entity, mark in _ENTITIES:
            text = text.replace(entity, mark)
    tokens = []
    for word in _PIECE.findall(text):
        if "." in word or "," in word or "-" in word:
            tokens += _by_periods(word)
        else:
            tokens.append(word)
    return tokens


@lru_cache(maxsize=2**16)
def _by_periods(word: str) -> tuple[str, ...]:
    word = f" {word} "
    for pattern, apart in _PERIODS:
        word = pattern.sub(apart, word)
    return tuple(word.split())


def bleu_13a(pairs: Sequence[Pair]) -> np.ndarray:
    """Return rows for running text, (pairs, 10).

    The columns are the length of the prediction, that of the reference, the shared n-grams of each order, and
    the prediction's n-grams of each order.
    """
    return ngram_rows(pairs, tokens_13a)


def bleu_code(pairs: Sequence[Pair]) -> np.ndarray:
    """Return the rows of `bleu_13a` for code tokens, as sacrebleu reads them with `tokenize="none"`."""
    return ngram_rows(pairs, code_tokens)


def bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    """Return sacrebleu's score, smoothed by `exp`, (...), from sums of rows, (..., 10)."""
    return _full_if_empty(_scores("none", sums), sums[..., 0] + sums[..., 1])


def chrf(pairs: Sequence[Pair]) -> np.ndarray:
    """Return rows of chrF and chrF++, (pairs, 25).

    For each of six character orders and two word orders the columns are the n-grams of the prediction, those
    of the reference, and the shared ones; the last is the characters of both. chrF (Popović 2015) reads the
    first 18, chrF++ (2017) 24. As in sacrebleu, the n-grams of a prediction whose reference has none of that
    order are not counted.
    """
    words = _sacrebleu("chrf++")._remove_punctuation
    rows = np.zeros((len(pairs), 3 * (_CHAR_ORDERS + _WORD_ORDERS) + 1))
    for row, pair in zip(rows, pairs, strict=True):
        found, wanted = ("".join(text.split()) for text in pair)
        _count_into(row[: 3 * _CHAR_ORDERS], len(found), len(wanted), _shared_characters(found, wanted))
        has, needs = map(words, pair)
        shared = [shared_ngrams(ngrams(has, n), ngrams(needs, n)) for n in range(1, _WORD_ORDERS + 1)]
        _count_into(row[3 * _CHAR_ORDERS : -1], len(has), len(needs), shared)
        row[-1] = len(found) + len(wanted)
    return rows


def _count_into(row: np.ndarray, found: int, wanted: int, shared: list[int]) -> None:
    """Write three counts for each order into a row: n-grams found, wanted, and shared.

    `found` and `wanted` are the units of the two texts. A text has one n-gram fewer with each order.
    """
    for less, both in enumerate(shared):
        needed = max(0, wanted - less)
        row[3 * less : 3 * less + 3] = max(0, found - less) if needed else 0, needed, both


def _shared_characters(found: str, wanted: str) -> list[int]:
    """Count, for each order, the n-grams of characters that both texts have.

    n-grams are numbered, those of an order by the numbers of their first n - 1 characters and of their last
    one: as strings they took a quarter of the time of all metrics together.
    """
    if not found or not wanted:
        return [0] * _CHAR_ORDERS
    text = (found + wanted).encode("utf-32-le", "surrogatepass")
    characters = np.unique(np.frombuffer(text, np.uint32), return_inverse=True)[1].astype(np.int64)
    size, split = int(characters.max()) + 1, len(found)
    numbers, shared = characters, []
    for order in range(1, _CHAR_ORDERS + 1):
        if order > 1:
            keys = numbers[:-1] * size + characters[order - 1 :]
            numbers = np.unique(keys, return_inverse=True)[1]
        # N-grams that begin in one text and end in the other belong to neither.
        here, there = numbers[: max(0, split - order + 1)], numbers[split:]
        both = np.minimum(*(np.bincount(text, minlength=len(numbers)) for text in (here, there)))
        shared.append(int(both.sum()))
    return shared


def chrf_of_sums(sums: np.ndarray) -> np.ndarray:
    """Return sacrebleu's chrF, (...), from sums of rows, (..., 25)."""
    return _full_if_empty(_scores("chrf", sums[..., : 3 * _CHAR_ORDERS]), sums[..., -1])


def chrf_plus_of_sums(sums: np.ndarray) -> np.ndarray:
    """Return sacrebleu's chrF++, (...), from sums of rows, (..., 25)."""
    return _full_if_empty(_scores("chrf++", sums[..., :-1]), sums[..., -1])


def _full_if_empty(scores: np.ndarray, units: np.ndarray) -> np.ndarray:
    return np.where(units == 0, 100.0, scores)


# --- CodeXGLUE -----------------------------------------------------------------------------------------


def ngram_rows(pairs: Sequence[Pair], tokenize: Callable[[str], list[str]]) -> np.ndarray:
    """Return the rows of `bleu_13a`, (pairs, 10), for any tokens."""
    rows = np.zeros((len(pairs), 2 + 2 * ORDERS))
    for row, (prediction, reference) in zip(rows, pairs, strict=True):
        found, wanted = tokenize(prediction), tokenize(reference)
        row[:2] = len(found), len(wanted)
        for order in range(1, ORDERS + 1):
            row[1 + order] = shared_ngrams(ngrams(found, order), ngrams(wanted, order))
            row[1 + ORDERS + order] = max(0, len(found) - order + 1)
    return rows


def bleu_codexglue(pairs: Sequence[Pair]) -> np.ndarray:
    """Return the rows of `bleu_13a`, (pairs, 10), for tokens between white space.

    CodeXGLUE's method generation reads cleaned lines in this way.
    """
    return ngram_rows(pairs, str.split)


def bleu_codexglue_of_sums(sums: np.ndarray) -> np.ndarray:
    """Return BLEU-4 of a corpus, (...), from sums of rows, (..., 10).

    1 is added to both counts of each precision (Lin and Och 2004). It is CodeXGLUE's `bleu.py` of method
    generation, which rounds to two places and divides by zero where all predictions, or all references, are
    empty; here these score 0, or 100 where both are.
    """
    lengths, shared, of = sums[..., :2], sums[..., 2 : 2 + ORDERS], sums[..., 2 + ORDERS :]
    found, wanted = lengths[..., 0], lengths[..., 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        penalty = np.where(found > wanted, 1.0, np.exp(1 - wanted / found))
    mean = np.exp(np.log((shared + 1) / (of + 1)).mean(-1))
    scores = np.where((found == 0) | (wanted == 0), 0.0, 100 * mean * penalty)
    return _full_if_empty(scores, found + wanted)


# The evaluator tokenises in two passes, of which the second adds only that `_` stands alone.
_SUMMARY_TOKEN = re.compile(r"[^\W_]+|_|[^\w\s]")
_TINY = sys.float_info.min


def summary_tokens(text: str) -> list[str]:
    """Split a text into the tokens of CodeXGLUE's code-to-text: lower-case words, and single marks."""
    return _SUMMARY_TOKEN.findall(text.strip().lower())


def bleu_codexglue_summary(pairs: Sequence[Pair]) -> np.ndarray:
    """Return the BLEU-4 of each pair, (pairs,), by CodeXGLUE's code-to-text, whose score is the mean.

    1 is added to the counts of bigrams and longer n-grams (Lin and Och 2004). An empty prediction of a
    reference of n tokens has 100 exp(-n), as in CodeXGLUE, and not 0.
    """
    rows = ngram_rows(pairs, summary_tokens)
    shared, of = rows[:, 2 : 2 + ORDERS], rows[:, 2 + ORDERS :]
    added = np.array([0.0] + [1.0] * (ORDERS - 1)) + _TINY
    precision = (np.log(shared + added) - np.log(of + added)).mean(1)
    penalty = np.minimum(0.0, 1 - (rows[:, 1] + 1) / (rows[:, 0] + 1))
    return 100 * np.exp(precision + penalty)


# --- of code, weighted ---------------------------------------------------------------------------------


def precision_of_sums(lengths: np.ndarray, shared: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Return the geometric mean of shared / of, times the brevity penalty: 0 to 1, (...).

    The penalty is exp(1 - wanted / found) where less was found than wanted. An order that has nothing to
    share is left out, and one that shares nothing counts as 0.1 shared (Chen and Cherry 2014, method 1).

    Args:
        lengths: (..., 2), tokens found and tokens wanted.
        shared: (..., orders), n-grams that both have.
        of: (..., orders), all n-grams.
    """
    has = of > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(has, np.log(np.where(shared > 0, shared, 0.1) / of), 0.0)
        mean = np.exp(logs.sum(-1) / has.sum(-1))
        found, wanted = lengths[..., 0], lengths[..., 1]
        penalty = np.where(found >= wanted, 1.0, np.exp(1 - wanted / found))
    return np.where(shared[..., 0] > 0, mean * penalty, 0.0)
