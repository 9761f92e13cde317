"""Every metric by its name: the maximum for a reference against itself, ends of the scale, intervals."""

import math

import numpy as np
import pytest

from metrics.intervals import mean_rows, share_interval
from metrics.registry import METRICS, Scored, metric, score
from metrics.semantic import inverse_frequencies, token_similarity
from metrics.texts import CLEANERS, cleaned
from metrics.trees import LANGUAGES

REFERENCES = [
    "",
    "x",
    "a b",
    "return a + b",
    "def f(x):\n    return x  # y\n",
    "日本 😀",
    " \n",
    "class A { }",
    "fun f() {}",
]
PAIRS = cleaned(
    ["return a", "", "x = 1", "def f(x):\n    return x"],
    ["return a + b", "x", "x = 1", "def g(y): pass"],
    "plain",
)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("how", CLEANERS)
def test_a_reference_against_itself_has_the_maximum(language, how):
    pairs = cleaned(REFERENCES, REFERENCES, how)
    metrics = [name for name in METRICS if name != "parses"]  # judges the text, whatever the reference
    for name, scored in score(metrics, pairs, language).items():
        assert scored.value == pytest.approx(scored.metric.maximum), name
        assert scored.samples == pytest.approx(scored.metric.maximum), name


def test_an_empty_prediction_has_0():
    # Nearly: CodeXGLUE's summaries, exp(-n) of n tokens.
    for name, scored in score(list(METRICS), [("", "def f(x):\n    return x")]).items():
        assert scored.value == pytest.approx(0, abs=0.1), name
    assert score(["parses"], [("", "")])["parses"].value == 100  # It was requested by name.
    assert score(["parses"], [(" \n", "x")])["parses"].value == 0


def test_means_are_means_and_corpus_scores_are_not():
    for name, scored in score(list(METRICS), PAIRS).items():
        assert 0 <= scored.value <= 100
        if not scored.metric.corpus:
            assert scored.value == pytest.approx(scored.samples.mean()), name
        low, high = scored.interval().low, scored.interval().high
        assert low <= scored.value <= high, name
        assert not np.isnan([low, high]).any()


@pytest.mark.parametrize("name", ["edit_similarity", "exact_match"])
def test_intervals_of_lines_of_files_cover_as_often_as_they_say(name):
    """Lines of one file score alike: as if they were independent, 95% intervals hold 3 of 4 true scores."""
    draw, held = np.random.default_rng(5), {"files": 0, "lines": 0}
    trials = 300
    for trial in range(trials):
        sizes = draw.integers(1, 9, 50)
        origins = np.repeat(np.arange(50), sizes)
        chance = draw.beta(0.5, 0.5, 50)[origins]  # One a file; the mean is a half.
        if name == "exact_match":
            scores = 100.0 * (draw.random(len(origins)) < chance)
        else:
            scores = 100 * np.clip(chance + draw.normal(0, 0.05, len(origins)), 0, 1)
        for kind, by in (("files", origins), ("lines", None)):
            found = Scored(METRICS[name], mean_rows(scores), by).interval(trial)
            held[kind] += found.low <= 50 <= found.high
            assert found.n == len(scores)
            assert found.mean == pytest.approx(scores.mean())
    assert 0.92 < held["files"] / trials < 0.98
    assert held["lines"] / trials < 0.85


def test_differences_of_lines_of_files_are_told_apart_no_more_often_than_promised():
    draw, wrong, alone = np.random.default_rng(6), 0, 0
    trials = 200
    for trial in range(trials):
        origins = np.repeat(np.arange(30), 6)
        gaps = draw.normal(0, 10, 30)[origins] + draw.normal(0, 2, len(origins))
        one, other = mean_rows(50 + gaps), mean_rows(np.full(len(origins), 50.0))
        metric = METRICS["edit_similarity"]
        found = Scored(metric, one, origins).compare(Scored(metric, other, origins), trial)
        wrong += found.distinguishable
        alone += Scored(metric, one).compare(Scored(metric, other), trial).distinguishable
        assert found.units == 30 and found.difference.n == 180
        if not found.distinguishable:
            assert found.needed is not None and found.needed > 180
    assert wrong / trials <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)
    assert alone / trials > 0.3


def test_a_file_of_many_hits_is_one_file():
    """Rows of unequal size tell less than as many alike: 100 hits of one file, and 59 files of one miss."""
    scores, origins = [100.0] * 100 + [0.0] * 59, np.array([0] * 100 + list(range(1, 60)))
    found = Scored(METRICS["exact_match"], mean_rows(scores), origins).interval()
    assert found.mean == pytest.approx(100 * 100 / 159)
    assert found.low < 20 and found.high > 90
    alike = Scored(
        METRICS["exact_match"], mean_rows([100.0] * 4 + [0.0] * 116), np.arange(120) // 2
    ).interval()
    assert alike[1:3] == pytest.approx(share_interval(2, 60)[1:3])


def test_what_is_from_one_file_is_told_by_its_name():
    pairs = [("a", "a"), ("b", "c"), ("d", "d")]
    assert score(["chrf"], pairs, origins=["f", "g", "h"])["chrf"].origins is None
    assert score(["chrf"], pairs, origins=["f", "f", "f"])["chrf"].origins is None  # nothing of other files
    found = score(["exact_match"], pairs, origins=["f", "g", "f"])["exact_match"]
    assert found.units.tolist() == [[200, 2], [0, 1]]
    said = found.compare(Scored(found.metric, mean_rows([0.0, 0, 0]), found.origins)).verdict("B")
    assert said == "not distinguishable from B on 3 samples of 2 files, where fewer than 6 can show nothing"


def test_few_draws_that_succeed_are_no_surer_than_none():
    """One of 30 draws of one of 10 samples: most resamples of the ten hold no success at all."""
    one = Scored(METRICS["exact_match"], mean_rows([100 / 30] + [0.0] * 9)).interval()
    none = Scored(METRICS["exact_match"], mean_rows([0.0] * 10)).interval()
    assert one.mean == pytest.approx(1 / 3)
    assert one.high > none.high
    assert one.low <= one.mean
    # Of many that passed in some draws the draws say more than a share of so many samples would.
    often = Scored(METRICS["exact_match"], mean_rows([40.0, 50.0, 60.0] * 10)).interval()
    assert often.high - often.low < 10


def test_shares_have_an_interval_even_if_none_succeeds():
    scored = score(["exact_match"], [("a", "b")] * 25)["exact_match"]
    assert scored.interval()[:2] == (0, 0)
    assert scored.interval().high == pytest.approx(13.3, abs=0.05)


def test_copying_is_not_distinguishable_from_copying():
    for name, scored in score(list(METRICS), PAIRS).items():
        again = score([name], PAIRS)[name]
        assert (
            scored.compare(again).verdict("copying").startswith("not distinguishable from copying: the same")
        )


def test_signatures_say_language_and_kind():
    assert METRICS["codebleu"].signature("kotlin").endswith("|language:kotlin|corpus")
    assert "tok:none" in METRICS["bleu_code"].signature("java")
    assert len({one.signature("java") for one in METRICS.values()}) == len(METRICS)


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(
        ValueError, match=r"no metric is called 'codeblue', did you mean codebleu; there are exact_match, "
    ):
        metric("codeblue")
    with pytest.raises(ValueError, match="0 pairs"):
        score(["chrf"], [])
    with pytest.raises(ValueError, match="'cobol'"):
        score(["chrf"], PAIRS, "cobol")
    first, second = score(["bleu", "chrf"], PAIRS).values()
    with pytest.raises(ValueError, match="bleu is compared with chrf"):
        first.compare(second)


# --- semantic similarity -------------------------------------------------------------------------------


def test_token_similarity_by_hand():
    prediction, reference = np.array([[2.0, 0], [0, 3]]), np.array([[1.0, 0], [1, 1]])
    half = 0.5**0.5
    found = token_similarity(prediction, reference)
    assert found[:2] == (pytest.approx((1 + half) / 2), pytest.approx((1 + half) / 2))
    weighted = token_similarity(prediction, reference, [1, 3], [1, 0])
    p, r = (1 + 3 * half) / 4, 1.0
    assert weighted == pytest.approx((p, r, 2 * p * r / (p + r), 10 * p * r / (9 * p + r)))


def test_tokens_against_themselves_and_against_nothing():
    vectors = np.random.default_rng(0).normal(size=(7, 5)) * 1e-200
    assert token_similarity(vectors, vectors) == pytest.approx((1, 1, 1, 1))
    assert token_similarity(vectors[:0], vectors[:0]) == (1, 1, 1, 1)
    assert token_similarity(vectors[:0], vectors) == token_similarity(vectors, vectors[:0]) == (0, 0, 0, 0)
    assert token_similarity(vectors, -vectors[:1] * 0) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((np.ones((2, 3)), np.ones((2, 4))), r"\(2, 3\) and \(2, 4\)"),
        ((np.ones((2, 3)), np.full((2, 3), np.nan)), "not finite"),
        ((np.ones((2, 3)), np.ones((2, 3)), [1.0]), "1 weights for the 2 tokens of the prediction"),
        ((np.ones((2, 3)), np.ones((2, 3)), None, [1.0, -1]), "weights of the reference"),
    ],
)
def test_vectors_that_cannot_be_compared_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        token_similarity(*arguments)


def test_inverse_frequencies():
    known, unknown = inverse_frequencies([["a", "b", "a"], ["a"]])
    assert known == {"a": 0.0, "b": pytest.approx(np.log(3 / 2))}
    assert unknown == pytest.approx(np.log(3))
