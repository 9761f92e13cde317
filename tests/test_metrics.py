"""Scores of strings and nats, and the coverage of the intervals."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics import bits_per_byte, edit_similarity, exact_match, mean_interval, perplexity

texts = st.text(alphabet=st.sampled_from("ab \n\tß€😀\x00\ud800"), max_size=12)


def longest_common_subsequence(a: str, b: str) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        last = row
        row = [0]
        for j, y in enumerate(b):
            row.append(last[j] + 1 if x == y else max(last[j + 1], row[j]))
    return row[-1]


@given(texts, texts)
@settings(max_examples=300, deadline=None)
def test_edit_similarity_equals_its_definition(a, b):
    distance = len(a) + len(b) - 2 * longest_common_subsequence(a, b)
    expected = 100 * (1 - distance / (len(a) + len(b))) if a or b else 100
    assert edit_similarity(a, b) == pytest.approx(expected, abs=1e-9)
    assert edit_similarity(a, b) == edit_similarity(b, a)
    assert exact_match(a, b) == (100 if a == b else 0)


@given(texts)
def test_a_reference_against_itself_has_the_maximum(text):
    assert edit_similarity(text, text) == exact_match(text, text) == 100


def test_empty_texts():
    assert edit_similarity("", "") == exact_match("", "") == 100
    assert edit_similarity("", "x") == edit_similarity("x", "") == exact_match("", "x") == 0


def test_a_prompt_left_in_the_prediction_shows():
    reference, prompt = "return a + b", "def add(a, b):\n    "
    assert exact_match(prompt + reference, reference) == 0
    assert edit_similarity(prompt + reference, reference) < 70


@pytest.mark.parametrize(
    ("sampler", "mean"),
    [
        (lambda draw: 100 * (draw.random(150) < 0.3), 30),
        (lambda draw: 100 * draw.beta(0.4, 0.6, size=150), 40),
    ],
)
def test_intervals_cover_the_mean_as_often_as_they_say(sampler, mean):
    draw = np.random.default_rng(0)
    covered = 0
    for seed in range(400):
        interval = mean_interval(sampler(draw), seed, resamples=400)
        assert interval.low <= interval.mean <= interval.high
        covered += interval.low <= mean <= interval.high
    # The standard error of a share of 0.95 over 400 trials is 0.011; three of them to each side.
    assert 0.915 <= covered / 400 <= 0.985


def test_intervals_are_repeatable_and_narrow_with_more_scores():
    scores = np.random.default_rng(1).normal(50, 10, size=4000)
    assert mean_interval(scores[:100], 7) == mean_interval(list(scores[:100]), 7)
    assert mean_interval(scores[:100], 7) != mean_interval(scores[:100], 8)
    few, many = mean_interval(scores[:100]), mean_interval(scores)
    # 40 times as many: the root of that narrower, and 1.96 standard errors to each side.
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(math.sqrt(40), rel=0.2)
    assert many.high - many.low == pytest.approx(2 * 1.96 * scores.std() / math.sqrt(4000), rel=0.1)
    assert many.n == 4000


def test_wider_confidence_contains_narrower():
    scores = np.random.default_rng(2).random(60)
    wide, narrow = mean_interval(scores, confidence=0.99), mean_interval(scores, confidence=0.8)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_equal_scores_have_no_width_and_one_has_no_interval():
    assert mean_interval([100.0] * 9)[:3] == (100, 100, 100)
    for scores in ([], [3.0]):
        with pytest.raises(ValueError, match=f"got {len(scores)}"):
            mean_interval(scores)


def test_uniform_guesses():
    assert bits_per_byte(1000 * math.log(256), 1000) == pytest.approx(8)
    assert perplexity(70 * math.log(4096), 70) == pytest.approx(4096)
    assert perplexity(0.0, 5) == 1
    assert perplexity(1e6, 1) == math.inf


def test_nothing_to_divide_by():
    with pytest.raises(ValueError, match="0 bytes"):
        bits_per_byte(1.0, 0)
    with pytest.raises(ValueError, match="0 tokens"):
        perplexity(1.0, 0)
