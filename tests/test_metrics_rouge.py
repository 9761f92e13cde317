"""ROUGE against the rouge-score package, stemmed and not, and on the tokens of code."""

import json
import random
from pathlib import Path

import pytest
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer

from benchmarks.metrics_speed import realistic_pairs
from metrics.rouge import rouge_l, rouge_n, rouge_tokens
from metrics.texts import code_tokens

PIECES = [
    "a",
    "b",
    "running",
    "runner",
    "ponies",
    "+",
    "-",
    "(",
    " ",
    "  ",
    "\n",
    "é",
    "日",
    "İ",
    "K",
    "7",
    "_",
    "'s",
]


def pairs(n: int) -> list[tuple[str, str]]:
    draw = random.Random(0)
    made = ["".join(draw.choices(PIECES, k=draw.choice([0, 1, 3, 8, 30]))) for _ in range(n)]
    folder = Path(json.__file__).parent
    return realistic_pairs(n // 2, 2, folder if n < 1000 else None) + list(
        zip(made[::2], made[1::2], strict=True)
    )


@pytest.mark.parametrize("n", [120, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stem", [False, True])
def test_equals_rouge_score(n, stem):
    oracle = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stem)
    stemmer = PorterStemmer().stem if stem else None
    for prediction, reference in pairs(n):
        expected = oracle.score(reference, prediction)
        found, wanted = rouge_tokens(prediction, stemmer), rouge_tokens(reference, stemmer)
        assert rouge_n(found, wanted, 1) == pytest.approx(100 * expected["rouge1"].fmeasure, abs=1e-9)
        assert rouge_n(found, wanted, 2) == pytest.approx(100 * expected["rouge2"].fmeasure, abs=1e-9)
        assert rouge_l(found, wanted) == pytest.approx(100 * expected["rougeL"].fmeasure, abs=1e-9)


def test_code_tokens_see_what_words_do_not():
    a, b = "return a + b", "return a - b"
    assert rouge_l(rouge_tokens(a), rouge_tokens(b)) == 100
    assert rouge_l(code_tokens(a), code_tokens(b)) == 75


def test_nothing_is_shared_with_nothing():
    assert rouge_l([], []) == rouge_n([], [], 1) == rouge_n(["a"], ["a"], 2) == rouge_l(["a"], []) == 0
