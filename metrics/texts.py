"""Texts against each other, a pair at a time: cleaning, tokens, exact match, edit similarity, identifiers.

Every score goes from 0 to 100. Two equal texts have 100, the empty ones too; an empty prediction of a
reference that is not empty has 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

from rapidfuzz import fuzz
from rapidfuzz.distance import Indel

Pair = tuple[str, str]  # prediction, reference

# --- cleaning, the same for both sides ---------------------------------------------------------------

_LITERAL = re.compile(r"<(STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)


def plain(text: str) -> str:
    """Return the text with "\\n" for line breaks, without white space at line ends or blank lines around it.

    Indentation stays: in Python it is code.
    """
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return "\n".join(lines).strip("\n")


def codexglue_line(text: str) -> str:
    """Return the text as CodeXGLUE's line completion cleans it: with literals in place of their markers.

    Its evaluator strips the prediction only, so that a reference with outer white space is not equal to
    itself; here both are stripped. Its own references have none.
    """
    text = text.strip().replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    # Without a closing mark after it no marker ends; the search for one would be quadratic.
    for kind, literal in _LITERAL.findall(text, 0, text.rfind(">") + 1):
        text = text.replace(f"<{kind}_LIT:{literal}>", literal)
    return text


def codexglue_method(text: str) -> str:
    """Return the text as CodeXGLUE's method generation cleans it.

    It is one line, with literals in place of their markers.
    """
    text = text.strip().replace("<EOL>", "\n").replace("<INDENT>", " ").replace("<DEDENT>", " ")
    # In CodeXGLUE a line is stripped after its markers are read. That removes white space only, which the
    # split drops as well.
    return " ".join(codexglue_line(text).split())


CLEANERS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "plain": plain,
    "codexglue-line": codexglue_line,
    "codexglue-method": codexglue_method,
}


def cleaned(predictions: Sequence[str], references: Sequence[str], how: str) -> list[Pair]:
    """Return the pairs that metrics read.

    Both sides go through the same function, so that a reference scored against itself has the maximum.

    Args:
        how: The name of a function in CLEANERS.

    Raises:
        ValueError: The numbers of predictions and references differ or are 0, or `how` is unknown.
    """
    if how not in CLEANERS:
        raise ValueError(f"no way of cleaning is called {how!r}; there are {', '.join(CLEANERS)}")
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references: there must be one for each, "
            "in the same order"
        )
    if not references:
        raise ValueError("0 predictions and 0 references: a score needs at least 1 of each")
    clean = CLEANERS[how]
    return [(clean(p), clean(r)) for p, r in zip(predictions, references, strict=True)]


# --- tokens --------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\w+|[^\w\s]")


def code_tokens(text: str) -> list[str]:
    """Split a text into words (names, keywords, numbers) and single punctuation marks, without white space.

    The tokens are the same in every language: an operator of two marks is two tokens, and a string is its
    words.
    """
    return _TOKEN.findall(text)


Ngrams = Counter[tuple[str, ...]]


def ngrams(tokens: Sequence[str], order: int) -> Ngrams:
    """Count the n-grams of one order."""
    return Counter(zip(*(tokens[i:] for i in range(order)), strict=False))


def shared_ngrams(found: Ngrams, wanted: Ngrams) -> int:
    """Count the n-grams that both sides have, each as often as it occurs on the side that has fewer of it."""
    return sum(min(count, wanted[gram]) for gram, count in found.items() if gram in wanted)


# --- scores --------------------------------------------------------------------------------------------


def exact_match(prediction: str, reference: str) -> float:
    """Return 100 if both strings are equal, else 0; nothing is cleaned here."""
    return 100.0 if prediction == reference else 0.0


def exact_match_words(prediction: str, reference: str) -> float:
    """Return 100 if both are equal but for the amount of white space, else 0: CodeXGLUE's line completion."""
    return 100.0 if prediction.split() == reference.split() else 0.0


def edit_similarity(prediction: str, reference: str) -> float:
    """Return 100 (1 - d / (len(prediction) + len(reference))), the Indel similarity.

    d counts insertions and deletions. It is `fuzz.ratio`, by which CodeXGLUE's code completion scores edit
    similarity (arXiv:2102.04664); there each sample is rounded to a whole number, here it is not. Two empty
    strings have 100.
    """
    return fuzz.ratio(prediction, reference)


def edit_similarity_rounded(prediction: str, reference: str) -> float:
    """Return the edit similarity rounded to a whole number, halves to the even one.

    It is fuzzywuzzy's `ratio` over python-Levenshtein, which CodeXGLUE calls.
    """
    return float(round(100 * Indel.normalized_similarity(prediction, reference)))


# --- identifiers ---------------------------------------------------------------------------------------

# fmt: off
# ruff: noqa: SIM905
KEYWORDS = {
    "python": frozenset(
        "False None True and as assert async await break class continue def del elif else except finally for "
        "from global if import in is lambda nonlocal not or pass raise return try while with yield".split()
    ),
    "java": frozenset(
        "abstract assert boolean break byte case catch char class const continue default do double else enum "
        "extends final finally float for goto if implements import instanceof int interface long native new "
        "package private protected public return short static strictfp super switch synchronized this throw "
        "throws transient try void volatile while".split()
    ),
    # The hard keywords of the Kotlin reference, and the soft and modifier ones that declare or control.
    "kotlin": frozenset(
        "as break class continue do else false for fun if in interface is null object package return super "
        "this throw true try typealias typeof val var when while by catch constructor finally get import "
        "init set where abstract companion const data enum external final infix inline inner internal "
        "lateinit open operator out override private protected public reified sealed suspend tailrec "
        "vararg".split()
    ),
}
# fmt: on
_NO_NAMES = {"java": {"true", "false", "null"}}  # Literals are not in Java's list of keywords.
# Strings, comments and words are found in one pass from the left, so that a quote in a comment opens nothing.
# All quantifiers that could backtrack are possessive, so that a text of one line is passed once.
_NAME = r"(?P<name>[^\W\d]\w*+)|\d[\w.]*+"
_SHORT = r"\"(?:[^\"\\\n]|\\.)*+\"?|'(?:[^'\\\n]|\\.)*+'?"
_CURLY = (
    rf"//[^\n]*+|/\*(?s:.*?)(?:\*/|\Z)|\"\"\"(?s:.*?)(?:\"\"\"|\Z)|{_SHORT}|`(?P<quoted>[^`\n]++)`|{_NAME}"
)
_WORDS = {
    "python": re.compile(
        rf"\#[^\n]*+|(?i:[bfru]{{0,2}})(?:\"\"\"(?s:.*?)(?:\"\"\"|\Z)|'''(?s:.*?)(?:'''|\Z)|{_SHORT})|{_NAME}"
    ),
    "java": re.compile(_CURLY),
    "kotlin": re.compile(_CURLY),
}


@lru_cache(maxsize=1024)
def identifiers(text: str, language: str) -> frozenset[str]:
    """Return the names in a text, or a piece of one: no keywords, nothing inside strings or comments."""
    found: set[str | None] = set()
    for match in _WORDS[language].finditer(text):
        groups = match.groupdict()
        found.add(groups["name"] or groups.get("quoted"))
    return frozenset(name for name in found if name) - KEYWORDS[language] - _NO_NAMES.get(language, set())


def identifier_f1(prediction: str, reference: str, language: str) -> float:
    """Return 100 times the F1 of the sets of names, as CrossCodeEval's identifier match (arXiv:2310.11248).

    Two texts without a name have 100: there was none to find, and none was made up.
    """
    found, wanted = identifiers(prediction, language), identifiers(reference, language)
    if not found and not wanted:
        return 100.0
    return 200.0 * len(found & wanted) / (len(found) + len(wanted))
