"""Find values that a name such as `password` calls secret."""

from __future__ import annotations

import re
from collections.abc import Iterator

from scraping.stages import Finding
from scraping.stages.randomness import looks_random

HINTS = ("pass", "pwd", "secret", "token", "credential", "key", "auth")
_SET = r"(?=[\"'\])]*\s*[:=])"  # short words count only where a value follows
NAMES = re.compile(
    rf"pass(?:w(?:or)?d|wort|phrase|code)|pass{_SET}|pwd|secret|token(?!i[sz])|credentials?|auth{_SET}|key"
)
KEY_OF = re.compile(
    r"(?:api|access|auth|private|sign(?:ing)?|encrypt(?:ion)?|account|secret|shared|master|service)[_-]?$"
)
# After the name: its rest, quotes and brackets, a type, an operator, a bracket, the kind of literal.
QUOTED = re.compile(
    r"(?P<rest>[\w-]{0,30})[\"'\]\)]{0,3}\s*(?::\s*[\w.\[\]| ?]{1,40}?)?\s*(?:=>|[=!]==?|:=|[=:,(])\s*\(?\s*"
    r"[rRbBuUfF]{0,2}(?P<q>\"\"\"|'''|[\"'`])(?P<s>[^\s\"'`]{8,512})(?P=q)"
)
PLAIN = re.compile(
    r"(?P<rest>[\w-]{0,30})(?:=|: ?| = |>)(?P<s>[A-Za-z0-9+/_.~!@#$%^*-]{8,512}=*)(?=[\s\"'&;,<)\\]|$)"
)
REST_NOT_SECRET = re.compile(
    r"(?:ur[il]|path|file|dir|type|len|length|size|re|regex|pattern|endpoint|algorithm|ttl)s?$", re.I
)
# Where values stand without quotes: settings, not code. Elsewhere such a value must be longer.
_PLAIN_FILES = """
    env ini cfg conf properties yaml yml sh bash toml txt md rst
"""
PLAIN_FILES = frozenset(_PLAIN_FILES.split())


def assigned(text: str, kind: str) -> Iterator[Finding]:
    """Yield values that a name calls secret and that look random; `kind` is the file's ending."""
    lower = text.lower()
    if len(lower) != len(text):  # A few letters have a longer lower case.
        lower = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    for name in _secret_names(lower):
        if match := QUOTED.match(text, name.end()):
            least = 8
        elif match := PLAIN.match(text, name.end()):
            least = 8 if kind in PLAIN_FILES else 16
        else:
            continue
        if (
            REST_NOT_SECRET.search(match["rest"])
            or "public" in lower[max(0, name.start() - 12) : name.start()]
        ):
            continue
        if looks_random(match["s"], least):
            yield *match.span("s"), "SECRET"


def _secret_names(lower: str) -> Iterator[re.Match[str]]:
    for hint in HINTS:
        at = lower.find(hint)
        while at >= 0:
            name = NAMES.match(lower, at)
            if name and (hint != "key" or KEY_OF.search(lower, max(0, at - 12), at)):
                yield name
            at = lower.find(hint, at + len(hint))
