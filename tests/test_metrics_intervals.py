"""Intervals hold the truth as often as they say, and a comparison says no more than its samples do."""

import math

import numpy as np
import pytest

from metrics.bleu import bleu_codexglue, bleu_codexglue_of_sums
from metrics.intervals import (
    compare,
    interval,
    mean_interval,
    mean_of_sums,
    mean_rows,
    share_interval,
)
from metrics.registry import score

SCORES = {
    "uniform": (lambda draw, n: draw.random(n), 0.5),
    "at both ends": (lambda draw, n: draw.beta(0.4, 0.6, n), 0.4),
    "some perfect": (lambda draw, n: np.where(draw.random(n) < 0.15, 1, draw.beta(2, 3, n)), 0.49),
    "most perfect": (
        lambda draw, n: np.where(draw.random(n) < 0.7, 1, draw.beta(5, 2, n)),
        0.7 + 0.3 * 5 / 7,
    ),
    "share": (lambda draw, n: draw.random(n) < 0.4, 0.4),
}


def coverage(sampler, truth: float, n: int, trials: int, resamples: int) -> float:
    draw = np.random.default_rng(n)
    covered = 0
    for seed in range(trials):
        found = mean_interval(100.0 * sampler(draw, n), seed, resamples=resamples)
        assert found.low <= found.mean <= found.high
        covered += found.low <= 100 * truth + 1e-9 and 100 * truth - 1e-9 <= found.high
    return covered / trials


@pytest.mark.parametrize("name", SCORES)
def test_intervals_cover_the_mean_as_often_as_they_say(name):
    # The standard error of a share of 0.95 over 400 trials is 0.011; three of them to each side.
    assert 0.917 <= coverage(*SCORES[name], n=50, trials=400, resamples=400) <= 0.983


@pytest.mark.slow
@pytest.mark.parametrize("n", [25, 50, 100, 400])
@pytest.mark.parametrize("name", SCORES)
def test_intervals_cover_the_mean_93_to_97_percent_of_the_time(name, n):
    # Of 4,000 trials the standard error is 0.0035. A share on few samples is lumpy: 0.92 to 0.98.
    slack = 0.007 + 0.01 * (name == "share")
    assert 0.93 - slack <= coverage(*SCORES[name], n=n, trials=4000, resamples=1000) <= 0.97 + slack


def bleu_population() -> np.ndarray:
    """Statistics of 3,000 pairs of lines of made-up words, more and less alike."""
    draw = np.random.default_rng(7)
    words = np.array([f"w{i}" for i in range(60)])
    pairs = []
    for _ in range(3000):
        reference = draw.choice(words, draw.integers(5, 40))
        kept = draw.random(len(reference)) < draw.beta(4, 1)
        prediction = np.where(kept, reference, draw.choice(words, len(reference)))
        pairs.append((" ".join(prediction[: draw.integers(1, 60)]), " ".join(reference)))
    return bleu_codexglue(pairs)


@pytest.mark.parametrize(
    ("n", "trials"),
    [(100, 300), *(pytest.param(n, 3000, marks=pytest.mark.slow) for n in (25, 50, 100, 400))],
)
def test_intervals_cover_the_bleu_of_the_population(n, trials):
    population = bleu_population()
    truth = float(bleu_codexglue_of_sums(population.sum(0)))
    assert 20 < truth < 80
    draw = np.random.default_rng(n)
    covered = 0
    for seed in range(trials):
        rows = population[draw.integers(0, len(population), n)]
        found = interval(rows, bleu_codexglue_of_sums, seed, resamples=400)
        covered += found.low <= truth <= found.high
    slack = 3 * math.sqrt(0.05 * 0.95 / trials)
    assert 0.93 - slack <= covered / trials <= 0.97 + slack


def test_wilson_intervals_cover_shares_on_average_over_all_of_them():
    for n in (25, 50, 100, 400):
        bounds = [share_interval(k, n) for k in range(n + 1)]
        covered = []
        for share in np.linspace(0.01, 0.99, 99):
            chance = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
            held = [low <= 100 * share <= high for _, low, high, _ in bounds]
            covered.append(sum(c for c, h in zip(chance, held, strict=True) if h))
        assert 0.93 < np.mean(covered) < 0.97
        assert min(covered) > 0.83  # the known dips beside 0 and 1


def test_wilson_interval_of_none_and_all():
    # 1 / (1 + n / z**2), z = 1.959964.
    assert share_interval(0, 25) == (0.0, 0.0, pytest.approx(100 / (1 + 25 / 1.959964**2), abs=1e-4), 25)
    assert share_interval(25, 25)[:3] == (100.0, pytest.approx(100 - share_interval(0, 25).high), 100.0)
    for successes, n in ((0, 0), (3, 2), (-1, 5)):
        with pytest.raises(ValueError, match=f"{successes} successes of {n}"):
            share_interval(successes, n)


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


def test_alike_samples_leave_room_for_those_that_nobody_has_seen():
    assert mean_interval([100.0] * 9)[:3] == (100, 100, 100)  # Scores may be any number here.
    # Clopper and Pearson at 0 of n: by (1 - share)**n = 2.5% none of n is seen.
    for n in (2, 9, 200):
        unseen = 1 - 0.025 ** (1 / n)
        for value in (0.0, 50.0, 100.0):
            found = mean_interval([value] * n, bounds=(0, 100))
            assert found.low == pytest.approx(value * (1 - unseen))
            assert found.high == pytest.approx(value + (100 - value) * unseen)
        assert (1 - unseen) ** n == pytest.approx(0.025)
    scores = np.random.default_rng(4).uniform(0, 100, 30)
    assert mean_interval(scores, bounds=(0, 100)) == mean_interval(scores)
    # Every score of a suite has its bounds, also one of the corpus.
    for name in ("edit_similarity", "bleu_code"):
        found = score([name], [("abcde", "vwxyz")] * 9)[name].interval()
        assert found.low == 0
        assert found.high == pytest.approx(100 * (1 - 0.025 ** (1 / 9)))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_very_few_scores_have_wide_intervals_that_hold(n):
    draw = np.random.default_rng(n)
    found = [mean_interval(draw.uniform(0, 100, n), bounds=(0, 100), resamples=200) for _ in range(300)]
    assert sum(one.low <= 50 <= one.high for one in found) / 300 > 0.95
    assert all(0 <= one.low <= one.mean <= one.high <= 100 for one in found)


def test_a_small_difference_that_is_sure_is_not_0():
    scores = np.random.default_rng(0).uniform(0, 100, 2000)
    found = compare(mean_rows(scores + 0.031), mean_rows(scores), mean_of_sums)
    assert found.verdict("B") == "better than B by 0.03 on 2000 samples"


def test_one_score_has_no_interval():
    for scores in ([], [3.0]):
        with pytest.raises(ValueError, match=f"got {len(scores)}"):
            mean_interval(scores)


# --- comparisons ---------------------------------------------------------------------------------------


def paired(gap: float, n: int, seed: int = 0, spread: float = 10.0):
    draw = np.random.default_rng(seed)
    scores = draw.uniform(20, 80, n)
    return mean_rows(scores + gap + draw.normal(0, spread, n)), mean_rows(scores)


def test_few_samples_are_not_enough_and_the_verdict_says_how_many_are():
    scores = np.linspace(0, 100, 25)
    gaps = 1.6 + 8.5 * np.tile([1, -1, 0, 1, -1], 5)  # spread 7.6, so that (2.80 * 7.76 / 1.6)**2 are needed
    found = compare(mean_rows(scores + gaps), mean_rows(scores), mean_of_sums)
    assert found.difference.low < 0 < found.difference.high
    assert found.needed is not None
    assert found.needed == pytest.approx(184, rel=0.1)
    said = f"about {-(-found.needed // 10) * 10} would be needed"
    assert found.verdict("the base model") == f"not distinguishable from the base model on 25 samples; {said}"


def test_enough_samples_show_the_same_gap():
    # (1.96 + 0.84)**2 spreads over gaps squared.
    found = compare(*paired(1.6, 2000), mean_of_sums)
    assert found.distinguishable
    assert (
        found.verdict("the base model")
        == f"better than the base model by {found.difference.mean:.1f} on 2000 samples"
    )
    assert (
        compare(*reversed(paired(1.6, 2000)), of_sums=mean_of_sums)
        .verdict("B")
        .startswith("worse than B by ")
    )
    assert compare(*paired(1.6, 2000), mean_of_sums).verdict("B", higher_is_better=False).startswith("worse")
    assert found.needed == pytest.approx((2.8016 * 10 / found.difference.mean) ** 2, rel=0.15)


@pytest.mark.parametrize("n", [80, pytest.param(400, marks=pytest.mark.slow)])
def test_the_number_needed_finds_the_gap_four_times_in_five(n):
    gap = 2.8016 * 10 / math.sqrt(n)  # The gap for which n samples are needed.
    trials = 150
    seen = sum(
        compare(*paired(gap, n, seed), mean_of_sums, resamples=400).distinguishable for seed in range(trials)
    )
    assert seen / trials == pytest.approx(0.8, abs=3 * math.sqrt(0.16 / trials))


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("n", [25, 100])
def test_equal_systems_are_told_apart_as_rarely_as_promised(n, binary):
    draw = np.random.default_rng(n)
    wrong, trials = 0, 300
    for seed in range(trials):
        if binary:
            a, b = 100.0 * (draw.random((2, n)) < 0.1)
        else:
            a, b = draw.beta(0.5, 1, (2, n))
        wrong += compare(mean_rows(a), mean_rows(b), mean_of_sums, seed, resamples=400).distinguishable
    assert wrong / trials <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


def test_a_copy_is_not_distinguishable_from_copying():
    rows, _ = paired(0, 30)
    found = compare(rows, rows.copy(), mean_of_sums)
    assert found.difference[:3] == (0, 0, 0)
    assert found.needed is None
    assert found.verdict("copying") == "not distinguishable from copying: the same on each of 30 samples"


def test_a_handful_of_changes_is_no_evidence():
    a, b = np.zeros(25), np.zeros(25)
    a[:5] = 100  # five hits that the other lacks: a sign test gives 6%
    found = compare(mean_rows(a), mean_rows(b), mean_of_sums)
    assert found.difference.low > 0
    assert not found.distinguishable
    assert found.needed is not None
    assert found.needed >= 30
    a[5] = 100
    assert compare(mean_rows(a), mean_rows(b), mean_of_sums).distinguishable


def test_a_plan_ends_at_a_million_samples():
    a, b = np.array([1.0, 0, 1, 0] * 500), np.array([0.0, 1, 0, 1] * 500)
    a[0] += 0.5  # a difference of 1/4000, and differences of 1
    found = compare(mean_rows(a), mean_rows(b), mean_of_sums)
    assert found.verdict("B") == "not distinguishable from B on 2000 samples; over 1,000,000 would be needed"


def test_so_few_samples_that_nothing_can_be_shown_are_no_ground_for_a_plan():
    found = compare(mean_rows([3.0, 1, 4, 1, 5]), mean_rows([2.0, 1, 1, 1, 3]), mean_of_sums)
    assert (
        found.verdict("B") == "not distinguishable from B on 5 samples, where fewer than 6 can show nothing"
    )


def test_equal_scores_of_unlike_samples_ask_for_no_number():
    a, b = np.array([1.0, 0, 1, 0] * 5), np.array([0.0, 1, 0, 1] * 5)
    found = compare(mean_rows(a), mean_rows(b), mean_of_sums)
    assert found.verdict("B") == "not distinguishable from B on 20 samples: the scores are equal"


def test_pairs_are_resampled_together():
    # The samples differ wildly and the gap never: apart, the interval would be as wide as the samples'.
    scores = np.random.default_rng(0).uniform(0, 100, 50)
    found = compare(mean_rows(scores + 1), mean_rows(scores), mean_of_sums)
    assert found.difference[:3] == (pytest.approx(1), pytest.approx(1), pytest.approx(1))


def test_corpus_scores_are_compared_too():
    rows = bleu_population()[:200]
    worse = rows.copy()
    worse[:, 2:6] = np.floor(0.8 * worse[:, 2:6])  # a fifth fewer shared n-grams
    found = compare(rows, worse, bleu_codexglue_of_sums)
    alone = float(bleu_codexglue_of_sums(rows.sum(0)) - bleu_codexglue_of_sums(worse.sum(0)))
    assert found.difference.mean == pytest.approx(alone)
    assert found.distinguishable


def test_other_samples_cannot_be_compared():
    with pytest.raises(ValueError, match="30 samples against 29"):
        compare(mean_rows(np.zeros(30)), mean_rows(np.zeros(29)), mean_of_sums)
    with pytest.raises(ValueError, match="got 1"):
        compare(mean_rows([1.0]), mean_rows([2.0]), mean_of_sums)
