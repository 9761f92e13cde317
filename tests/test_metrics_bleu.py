"""BLEU and chrF against sacrebleu, and CodeXGLUE's BLEUs against their definitions and their own numbers."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from benchmarks.metrics_speed import realistic_pairs
from metrics.bleu import (
    bleu_13a,
    bleu_code,
    bleu_codexglue,
    bleu_codexglue_of_sums,
    bleu_codexglue_summary,
    bleu_of_sums,
    chrf,
    chrf_of_sums,
    chrf_plus_of_sums,
    sacrebleu_signature,
    summary_tokens,
    tokens_13a,
)
from metrics.texts import code_tokens

PIECES = [*"ab_ \n\t.,-'\"&;<>/\\{}()09", "ß", "日", "😀", "\x00", "\u0301", "\u00a0", "\x1c", "\u2028", "٣"]
PIECES += ["<skipped>", "&quot;", "&amp;", "-\n", "3.14", "5-3", "the ", "return ", "x ", "İ", "\ud800"]


def hostile_texts(n: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(PIECES, k=draw.choice([0, 1, 2, 4, 8, 40]))) for _ in range(n)]


def hostile_pairs(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """Some are alike, some are equal, some are empty."""
    draw = random.Random(seed)
    texts = hostile_texts(n, seed)
    return [
        (draw.choice([text, text[1:], draw.choice(texts), text + draw.choice(PIECES)]), text)
        for text in texts
    ]


@pytest.fixture(scope="module", params=[200, pytest.param(2000, marks=pytest.mark.slow)])
def pairs(request):
    """Half of them functions, half of them hostile."""
    half, folder = request.param // 2, Path(json.__file__).parent
    return realistic_pairs(half, 1, folder if half < 1000 else None) + hostile_pairs(half)


def test_13a_and_code_equal_sacrebleu(pairs):
    for rows, oracle, tokenize in (
        (bleu_13a(pairs), BLEU(effective_order=True, force=True), str),
        (bleu_code(pairs), BLEU(tokenize="none", effective_order=True), lambda t: " ".join(code_tokens(t))),
    ):
        sides = [[tokenize(pair[side]) for pair in pairs] for side in (0, 1)]
        assert float(bleu_of_sums(rows.sum(0))) == pytest.approx(
            oracle.corpus_score(sides[0], [sides[1]]).score, abs=1e-9
        )
        for score, row, prediction, reference in zip(bleu_of_sums(rows), rows, *sides, strict=True):
            expected = oracle.sentence_score(prediction, [reference]).score
            assert score == pytest.approx(expected if row[0] + row[1] else 100, abs=1e-9)


def test_without_effective_order_nothing_changes_where_there_are_4_grams(pairs):
    long = [pair for pair in pairs if len(tokens_13a(pair[0])) >= 4]
    expected = BLEU(force=True).corpus_score([p for p, _ in long], [[r for _, r in long]]).score
    assert float(bleu_of_sums(bleu_13a(long).sum(0))) == pytest.approx(expected, abs=1e-9)


def test_tokens_equal_sacrebleus():
    oracle = BLEU(force=True)
    for text in hostile_texts(3000, 5):
        assert tokens_13a(text) == oracle._preprocess_segment(text).split()


def test_chrf_equals_sacrebleu(pairs):
    rows = chrf(pairs)
    predictions, references = zip(*pairs, strict=True)
    for of_sums, oracle in ((chrf_of_sums, CHRF()), (chrf_plus_of_sums, CHRF(word_order=2))):
        assert float(of_sums(rows.sum(0))) == pytest.approx(
            oracle.corpus_score(predictions, [references]).score, abs=1e-9
        )
        for score, (prediction, reference) in zip(of_sums(rows), pairs, strict=True):
            empty = not prediction.split() and not reference.split()
            expected = 100 if empty else oracle.sentence_score(prediction, [reference]).score
            assert score == pytest.approx(expected, abs=1e-9)


def test_signatures_are_sacrebleus():
    scorer = BLEU(effective_order=True, force=True)
    scorer.corpus_score(["a b"], [["a b"]])
    assert sacrebleu_signature("13a") == str(scorer.get_signature())
    for name, part in (("none", "tok:none"), ("chrf", "nw:0"), ("chrf++", "nw:2")):
        assert part in sacrebleu_signature(name)
        assert "nrefs:1" in sacrebleu_signature(name)


# --- CodeXGLUE -----------------------------------------------------------------------------------------


def count(sequence: list[str], part: list[str]) -> int:
    return sum(sequence[i : i + len(part)] == part for i in range(len(sequence) - len(part) + 1))


def shared_and_all(found: list[str], wanted: list[str], order: int) -> tuple[int, int]:
    parts = [found[i : i + order] for i in range(len(found) - order + 1)]
    unique = [part for i, part in enumerate(parts) if part not in parts[:i]]
    return sum(min(count(found, part), count(wanted, part)) for part in unique), len(parts)


def by_definition(pairs: list[tuple[list[str], list[str]]], smoothed_from: int, added: int) -> float:
    """Lin and Och 2004: the geometric mean of (shared + 1) / (all + 1), times the penalty for brevity."""
    product = 1.0
    for order in range(1, 5):
        counts = [shared_and_all(found, wanted, order) for found, wanted in pairs]
        shared, of = (sum(column) for column in zip(*counts, strict=True))
        one = int(order >= smoothed_from)
        if of + one == 0 or shared + one == 0:
            return 0.0
        product *= ((shared + one) / (of + one)) ** 0.25
    found, wanted = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    return 100 * product * math.exp(min(0, 1 - (wanted + added) / (found + added)))


def some_words(n: int, seed: int) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    words = ["a", "b", "c", "(", ")", "foo_bar", "x.y", "3.14", "5-3", "Return", "İx"]

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randrange(1, 14)))

    return [(text(), text()) for _ in range(n)]


def test_method_generation_bleu_equals_its_definition():
    pairs = some_words(150, 0)
    rows = bleu_codexglue(pairs)
    tokens = [(p.split(), r.split()) for p, r in pairs]
    for pair, score in zip(tokens, bleu_codexglue_of_sums(rows), strict=True):
        assert score == pytest.approx(by_definition([pair], 1, 0), abs=1e-9)
    assert float(bleu_codexglue_of_sums(rows.sum(0))) == pytest.approx(by_definition(tokens, 1, 0), abs=1e-9)


def test_summary_bleu_equals_its_definition():
    pairs = some_words(150, 1)
    for (prediction, reference), score in zip(pairs, bleu_codexglue_summary(pairs), strict=True):
        pair = summary_tokens(prediction), summary_tokens(reference)
        assert score == pytest.approx(by_definition([pair], 2, 1), abs=1e-9)


def test_summary_tokens():
    assert summary_tokens(" Get_the FOO's x.y\n") == ["get", "_", "the", "foo", "'", "s", "x", ".", "y"]


# Read from compute_bleu (smoothed) and bleuFromMaps of github.com/microsoft/CodeXGLUE.
CODEXGLUE = [
    ("return a + b", "return a + b", 100.0, 100.0),
    ("return a", "return a + b", 36.787944117144235, 51.3417119032592),
    ("return a + b ;", "return a + b", 75.98356856515926, 75.21206186172788),
    ("a b c d e f g", "a b c x e f g h i", 37.573864653764296, 38.73982666401503),
    ("the the the the", "the cat is on the mat", 24.117803988461297, 25.466654589274857),
    ("x", "y", 84.08964152537145, 1.2213386697554703e-75),
    ("self . x = foo_bar ( 1 )", "self . x = foo_baz ( 1 , 2 )", 41.33650395148845, 53.92583506906533),
    ("Get the FOO's value.", "gets the foo value", 35.93041119630843, 25.276007695044328),
    ("日本 語 é", "日本 語 è", 70.71067811865474, 68.65890479690393),
]


@pytest.mark.parametrize(("prediction", "reference", "method", "summary"), CODEXGLUE)
def test_numbers_of_codexglues_own_evaluators(prediction, reference, method, summary):
    assert float(bleu_codexglue_of_sums(bleu_codexglue([(prediction, reference)])[0])) == pytest.approx(
        method, abs=1e-9
    )
    assert bleu_codexglue_summary([(prediction, reference)])[0] == pytest.approx(summary, abs=1e-9)


# --- ends of the scale ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "x", "a b", "def f(x):\n    return x", "日本", "\n"])
def test_a_text_against_itself(text):
    pair = [(text, text)]
    assert float(bleu_of_sums(bleu_13a(pair)[0])) == pytest.approx(100)
    assert float(bleu_of_sums(bleu_code(pair)[0])) == pytest.approx(100)
    assert float(bleu_codexglue_of_sums(bleu_codexglue(pair)[0])) == pytest.approx(100)
    assert bleu_codexglue_summary(pair)[0] == pytest.approx(100)
    assert float(chrf_of_sums(chrf(pair)[0])) == pytest.approx(100)
    assert float(chrf_plus_of_sums(chrf(pair)[0])) == pytest.approx(100)


def test_an_empty_prediction_and_an_empty_reference():
    for pair in ([("", "a b")], [("a b", "")]):
        assert float(bleu_of_sums(bleu_13a(pair)[0])) == float(chrf_of_sums(chrf(pair)[0])) == 0
        assert float(bleu_codexglue_of_sums(bleu_codexglue(pair)[0])) == 0
    # As CodeXGLUE has it.
    assert bleu_codexglue_summary([("", "a b")])[0] == pytest.approx(100 * math.exp(-2))
    assert bleu_codexglue_summary([("a b", "")])[0] == pytest.approx(0)


def test_many_sums_at_once_are_the_sums_one_by_one():
    rows = bleu_codexglue(some_words(40, 2))
    many = rows.reshape(4, 10, -1).sum(1)
    assert np.allclose(bleu_codexglue_of_sums(many), [float(bleu_codexglue_of_sums(sums)) for sums in many])
    assert np.allclose(bleu_of_sums(many), [float(bleu_of_sums(sums)) for sums in many])
