"""ROUGE-1, 2 and L as F1 (Lin 2004), over the tokens of the rouge-score package or over those of code.

rouge-score keeps letters and digits of ASCII alone, in lower case: `a + b` against `a - b` has 100 there.
Its tokens are for numbers beside published ones; for code, `texts.code_tokens`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from rapidfuzz.distance import LCSseq

from metrics.texts import ngrams, shared_ngrams

_WORD = re.compile(r"[a-z0-9]+")


def rouge_tokens(text: str, stem: Callable[[str], str] | None = None) -> list[str]:
    """Split a text into the tokens of rouge-score 0.1: lower case, ASCII letters and digits.

    Args:
        text: Any text.
        stem: Stems words longer than three letters; `nltk.stem.porter.PorterStemmer().stem` is what the
            package uses with `use_stemmer=True`.
    """
    words = _WORD.findall(text.lower())
    if stem is None:
        return words
    stemmed = (stem(word) if len(word) > 3 else word for word in words)
    return [word for word in stemmed if _WORD.fullmatch(word)]


def rouge_n(prediction: Sequence[str], reference: Sequence[str], n: int) -> float:
    """Return 100 times the F1 of n-grams, counted with repetition; 0 where either side has none of them."""
    shared = shared_ngrams(ngrams(prediction, n), ngrams(reference, n))
    return _f1(shared, max(0, len(prediction) - n + 1), max(0, len(reference) - n + 1))


def rouge_l(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """Return 100 times the F1 of the longest common subsequence of tokens; 0 where either side has none."""
    return _f1(LCSseq.similarity(prediction, reference), len(prediction), len(reference))


def _f1(shared: int, found: int, wanted: int) -> float:
    return 200.0 * shared / (found + wanted) if shared else 0.0
