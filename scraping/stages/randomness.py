"""Tell random text, such as keys and generated passwords, from text that somebody wrote."""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import pairwise

PLACEHOLDER = re.compile(
    r"example|x{4}|placeholder|your|changeme|change[-_]me|dummy|fake|redacted|insert|sample|replace|todo|\*{3}|\.{3}"
    r"|<\w|\$\{|\$\(|\{\w*\}|%\(|%[sdr]\b|\{\{",
    re.IGNORECASE,
)
# Words of names and of manuals; a value that is little more than these is no secret.
WORDS = re.compile(
    r"access|account|admin|api|app|auth|authorization|basic|base|bearer|cert|client|code|config|cookie|credential|csrf"
    r"|data|db|default|demo|dev|digest|encoded|encrypt(?:ed|ion)?|env|field|file|foo|bar|baz|google|hash|header|hello"
    r"|hidden|http|id|input|invalid|jwt|key|local|login|mock|my|name|new|oauth|old|param|pass|passphrase|passwd|password"
    r"|private|prod|public|pwd|qwerty|refresh|request|reset|response|rsa|secret|security|service|session|sha|sign(?:ed"
    r"|ature)?|some|spec|string|super|test(?:ing)?|the|this|token|type|unknown|url|user(?:name)?|valid|value|very|with"
    r"|word|world|wrong",
    re.IGNORECASE,
)
COMMON = re.compile(
    r"(?:pass(?:word|wd)?|pwd|secret|token|user|admin|root|guest|test|postgres|mysql|foo|bar)\d{0,4}", re.I
)
PIECES = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
CONSONANTS = re.compile(r"[bcdfghj-np-tv-xz]{5}")  # Five in a row; words have at most four.
WORDISH = re.compile(r"[A-Za-z][a-z]+\d{0,3}|[A-Z]+\d{0,3}|[a-z]?\d{1,4}|[A-Za-z]|")


def entropy(text: str) -> float:
    """Return Shannon's entropy of the characters' frequencies, in bits a character."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def _counts_up(text: str) -> bool:
    """Return whether a text holds a run of eight like `12345678` or `abcdefgh`."""
    run = 1
    for before, after in pairwise(text):
        run = run + 1 if ord(after) - ord(before) == 1 else 1
        if run == 8:
            return True
    return False


def made_up(text: str) -> bool:
    """Return whether a secret is made by hand: an example, a template, or one character repeated."""
    return bool(PLACEHOLDER.search(text)) or len(set(text)) < min(8, len(text) // 2) or _counts_up(text)


def looks_random(text: str, least: int) -> bool:
    """Return whether a text of at least `least` characters could come from a generator of keys."""
    if len(text) < least or made_up(text) or entropy(text) < 3:
        return False
    if text.isdigit() or "\\" in text or "://" in text or re.search(r"\(\?|\[\^?\w-\w|\.[a-z]{2,4}$", text):
        return False
    if all(WORDISH.fullmatch(part) for part in re.split(r"[-_./:,;=+@#&$!?*| ]", text)):
        return _letters_look_random(text)
    if len(WORDS.sub("", text)) < 6:
        return False
    if len(text) >= 16 and CONSONANTS.search(text) and any(c.isdigit() for c in text):
        return True
    pieces = PIECES.findall(text)
    return not pieces or sum(map(len, pieces)) / len(pieces) <= 3.6


def _letters_look_random(text: str) -> bool:
    """Return whether letters alone look random: their case changes more often than in words."""
    pieces = PIECES.findall(text)
    return len(text) >= 16 and text.isalpha() and len(text) / len(pieces) < 2.6
