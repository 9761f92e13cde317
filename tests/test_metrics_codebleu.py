"""CodeBLEU of known pairs, the same whatever the hash seed; parsers that hostile texts do not kill."""

import ast
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.metrics_speed import realistic_pairs
from metrics import trees
from metrics.codebleu import KINDS, PARTS, _flows, codebleu, codebleu_of_sums, codebleu_parts
from metrics.trees import LANGUAGES, LONGEST, LONGEST_TREE, parse, parses

PROGRAMS = {
    "python": "def f(a, b=2):\n    x = a + b  # sum\n    for i in x:\n        a += i\n"
    "    return a if x else b\n",
    "java": "class A { int f(int a) { int x = a; while (x > 1) { x--; } /* c */ return x; } }",
    "kotlin": "fun f(a: Int): Int {\n    val x = a + 1 // c\n    var y = x\n    for (i in 0..x) { y += i }\n"
    "    return y\n}",
}


def parts(prediction: str, reference: str, language: str = "python") -> dict[str, float]:
    rows = codebleu([(prediction, reference)], language)
    return dict(zip(PARTS, codebleu_parts(rows.sum(0)).tolist(), strict=True))


def flows(text: str, language: str = "python"):
    tree = parse(text, language)
    assert tree is not None
    return _flows(tree, language)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("text", ["", "x", "a b", "x = = (", "日本 😀 \ud800", "\x00", "PROGRAM"])
def test_a_text_against_itself(text, language):
    text = PROGRAMS[language] if text == "PROGRAM" else text
    assert codebleu_of_sums(codebleu([(text, text)], language).sum(0)) == pytest.approx(100)


def test_realistic_texts_against_themselves():
    pairs = realistic_pairs(40, 3, Path(json.__file__).parent)
    rows = codebleu([(reference, reference) for _, reference in pairs], "python")
    assert codebleu_of_sums(rows) == pytest.approx(100)
    assert codebleu_of_sums(rows.sum(0)) == pytest.approx(100)


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_empty_prediction_has_nothing(language):
    assert codebleu_of_sums(codebleu([("", PROGRAMS[language])], language).sum(0)) == 0
    assert codebleu_of_sums(codebleu([(PROGRAMS[language], "")], language).sum(0)) == 0


def test_ngrams_by_hand():
    # a = b against a = c: two of three words, one of two pairs, no three (which counts 0.1); no fours.
    found = parts("a = b", "a = c")
    assert found["ngram"] == pytest.approx((2 / 3 * 1 / 2 * 0.1) ** (1 / 3))
    # Shorter by one of four: exp(1 - 4 / 3).
    assert parts("a = b", "a = b c")["ngram"] == pytest.approx(np.exp(-1 / 3))
    # A recall: `return` weighs 1 and x 0.2.
    assert parts("return", "return x")["weighted"] == pytest.approx((1 / 1.2 * 0.1) ** 0.5)
    assert parts("x", "return x")["weighted"] == pytest.approx((0.2 / 1.2 * 0.1) ** 0.5)


def test_syntax_by_hand():
    # module > expression_statement > call > argument_list: in `f(x)` these four have children.
    assert parts("g(y)", "f(x)")["syntax"] == 1
    assert parts("g(1)", "f(x)")["syntax"] == 0
    # In `f(x); 1`: module, statement, call, arguments, statement; the prediction has all but the first.
    assert parts("f(x)", "f(x); 1")["syntax"] == pytest.approx(3 / 5)
    assert parts("1; f(x)", "f(x); 1")["syntax"] == pytest.approx(4 / 5)


def test_roles_are_part_of_a_shape():
    assert parts("f(a=b)", "f(b=a)")["syntax"] == 1
    assert parts("if a:\n    b\nelse:\n    c", "if a:\n    b\nelif c:\n    d")["syntax"] < 1


def test_flow_by_hand():
    found = flows("x = 1\ny = x\ny")
    # 1, then x from 1, x from itself, y from x, and y from itself.
    assert found == {
        (0, "comesFrom", ()): 1,
        (1, "computedFrom", (0,)): 1,
        (1, "comesFrom", (1,)): 1,
        (2, "computedFrom", (1,)): 1,
        (2, "comesFrom", (2,)): 1,
    }


@pytest.mark.parametrize(
    ("language", "one", "same", "other"),
    [
        ("python", "x = f(a)\nreturn x", "y = f(b)\nreturn y", "x = f(a)\nreturn a"),
        ("python", "a, b = c, d", "x, y = z, w", "a, b = d, d"),
        ("python", "for i in xs:\n    t = t + i", "for j in ys:\n    s = s + j", "for i in xs:\n    t = i"),
        ("python", "[a for a in b]", "[x for x in y]", "[b for a in b]"),
        ("java", "class A{int f(int a){int x=a;return x;}}", "class A{int f(int b){int y=b;return y;}}",
         "class A{int f(int a){int x=a;return a;}}"),
        ("kotlin", "fun f(a: Int) { val x = a\n g(x) }", "fun f(b: Int) { val y = b\n g(y) }",
         "fun f(a: Int) { val x = a\n g(a) }"),
    ],
)  # fmt: skip
def test_flow_reads_where_values_come_from_and_not_names(language, one, same, other):
    assert flows(one, language) == flows(same, language)
    assert flows(one, language) != flows(other, language)


def test_both_branches_reach_what_follows_and_neither_reaches_the_other():
    origins = flows("if c:\n    x = a\nelse:\n    x = b\ny = x")
    last = [edge for edge in origins if edge[1] == "computedFrom"]
    assert len(last) == 3
    # Without a value from before, the x of the second branch is its first mention: no edge to the first's.
    assert flows("if c:\n    x = 1\nelse:\n    x") != flows("x = 1\nx")
    assert sum(flows("if c:\n    x = 1\nelse:\n    x").values()) < sum(flows("c\nx = 1\nx").values())


def test_a_loop_reads_what_it_wrote():
    # In the second pass `total` inside f() comes from the assignment behind it.
    looped = flows("while c:\n    f(total)\n    total = 1")
    straight = flows("c\nf(total)\ntotal = 1")
    assert sum(looped.values()) > sum(straight.values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_comments_are_no_code(language):
    mark = "#" if language == "python" else "//"
    text = PROGRAMS[language]
    noted = f"{mark} x = y\n{text}"
    found = parts(noted, text, language)
    assert found["syntax"] == found["dataflow"] == 1
    assert found["ngram"] < 1


def test_division_is_no_comment_and_docstrings_are_no_code():
    assert parts("x = a", "x = a // b")["syntax"] < 1
    assert parts('def f():\n    """Says."""\n    return 1', "def f():\n    return 1")["syntax"] == 1


def test_without_any_flow_the_other_parts_count():
    assert np.isnan(parts("f()", "1")["dataflow"])
    assert codebleu_of_sums(codebleu([("1", "1")], "python").sum(0)) == 100


def test_an_unknown_language_is_refused():
    with pytest.raises(ValueError, match=r"'cobol'.*python, kotlin, java"):
        codebleu([("a", "b")], "cobol")
    assert set(KINDS) == set(LANGUAGES)


def test_the_hash_seed_changes_nothing():
    program = (
        "import json, pathlib; from benchmarks.metrics_speed import realistic_pairs;"
        "from metrics.codebleu import codebleu;"
        "pairs = realistic_pairs(30, 4, pathlib.Path(json.__file__).parent);"
        "print(codebleu(pairs, 'python').tolist())"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(said) == 1


# --- parsers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_programs_parse_and_broken_ones_do_not(language):
    assert parses(PROGRAMS[language], language)
    assert parses("", language)
    assert not parses(PROGRAMS[language] + "\n)", language)
    assert not parses("x = = (", language)


def test_python_parses_as_the_interpreter_does():
    for text in ("return 1", "x = '\\d'", "  x = 1", "\ud800", "x\x00", "match x:\n    case 1: pass"):
        try:
            ast.parse(text)
            expected = True
        except (SyntaxError, ValueError):
            expected = False
        assert parses(text, "python") == expected


def test_a_missing_mark_is_an_error():
    assert not parses("class A { void f() { x() } }", "java")
    assert not parses("fun f() { g( }", "kotlin")


HOSTILE = {
    "brackets": "(" * 2**20,
    "five megabytes": "[" * 5_000_000,
    "closed": "(" * 50_000 + ")" * 50_000,
    "braces": "{" * 100_000,
    "sum": "1" + "+1" * 400_000,
    "attributes": "a" + ".b" * 400_000,
    "minus": "-" * 500_000 + "1",
    "nots": "not " * 200_000 + "x",
    "calls": "f" + "()" * 300_000,
    "ifs": "".join(" " * i + "if x:\n" for i in range(600)),
    "elifs": "if a: b\n" + "elif a: b\n" * 60_000,
    "else ifs": "if (a) b; " + "else if (a) b; " * 8_000,
    "lambdas": "lambda: " * 100_000 + "1",
    "generics": "A<" * 100_000,
    "strings": '"' * 500_001,
    "loops": "".join(" " * i + "for x in y:\n" for i in range(60)) + " " * 60 + "x = x + y",
}


IN_SUITE = ("five megabytes", "loops")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in IN_SUITE else pytest.mark.slow) for name in HOSTILE]
)
def test_hostile_texts_cost_bounded_time_and_never_the_process(name):
    """A child has 8 MB of stack, 4 GB of memory and 60 s of CPU time for each text in all languages."""
    program = (
        "import sys; from metrics.trees import parses, LANGUAGES; from metrics.codebleu import codebleu;"
        "text = sys.stdin.read();"
        "piece = text[:100_000];"
        "[(parses(text, l), codebleu([(piece, piece)], l)) for l in LANGUAGES]; print('alive')"
    )

    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_STACK, (2**23, 2**23))
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))

    child = subprocess.run(
        [sys.executable, "-c", program],
        input=HOSTILE[name],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        preexec_fn=limits,
        timeout=600,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
    assert child.stdout == "alive\n", child.stderr[-2000:]


def test_the_parser_is_stopped_and_works_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trees, "PATIENCE", 0.01)
    slow = ("A<" * 150 + ";") * 60
    assert not parses(slow, "java")
    assert parse(slow, "java") is None
    monkeypatch.undo()
    assert parses(PROGRAMS["java"], "java")


def test_angles_that_nothing_closes_are_not_tried():
    """40,000 of them take 16 GB."""
    for text in ("A<" * 40_000, "A<\n" * 40_000, "f(" + "A<(" * 40_000):
        assert not parses(text, "java") and parse(text, "java") is None
    assert parses("class A { boolean f(int i) { " + "if (i < 3) return i > 2; " * 500 + "} }", "java")


def test_too_long_texts_are_not_parsed():
    assert parses("#" * (LONGEST - 1), "python")
    assert not parses("#" * (LONGEST + 1), "python")
    assert parse("#" * (LONGEST_TREE + 1), "python") is None
    long = "x = 1\n" * (LONGEST_TREE // 6 + 1)
    assert codebleu_of_sums(codebleu([(long, long)], "python").sum(0)) == 100
    assert codebleu([("x = 1", long)], "python")[0, -4:].tolist() == [0, 0, 0, 0]
    assert codebleu([(long, "x = 1")], "python")[0, -4] == 0
