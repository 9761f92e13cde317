"""Untrusted text as HTML: escaped, with what a reader cannot see made visible, and differences marked.

A prediction may hold anything: tags, marks that turn the direction of a line, halves of characters, a
megabyte. No torch.
"""

from __future__ import annotations

import html
import re

from rapidfuzz.distance import Indel

SHOWN = 20_000  # Characters of a text that are shown; eval.json has the rest.
_UNIT = re.compile(r"\w+|\s|[^\w\s]")
# Characters between line breaks and tabs, which stay as they are.
_LINE = re.compile(r"[^\n\t]+")


def escaped(text: str) -> str:
    """Return a text as HTML in which every invisible character is named, as in <u>U+202E</u>.

    The result holds neither a lone surrogate nor a control character but line break and tab, so it can be
    written as UTF-8, and nothing in it is markup.
    """
    if text.isprintable():
        return html.escape(text)
    return _LINE.sub(lambda found: _line(found[0]), text)


def _line(text: str) -> str:
    if text.isprintable():
        return html.escape(text)
    return "".join(html.escape(c) if c.isprintable() else f"<u>U+{ord(c):04X}</u>" for c in text)


def shortened(text: str, limit: int = SHOWN) -> tuple[str, str]:
    """Return the beginning of a text, and a note on the rest of it, or ""."""
    if len(text) <= limit:
        return text, ""
    return text[:limit], f"{len(text) - limit:,} more characters are in eval.json"


def tail(text: str, lines: int, limit: int = 2_000) -> str:
    """Return the last lines of a text, and of those the last `limit` characters."""
    return "\n".join(text[-limit:].split("\n")[-lines:])


def marked(text: str, other: str, tag: str) -> str:
    """Return a text as HTML in which words that `other` lacks, in order, stand in a tag.

    Words, marks and white space are compared (Indel, the least insertions and deletions).
    """
    units, wanted = _UNIT.findall(text), _UNIT.findall(other)
    parts = []
    for step in Indel.opcodes(units, wanted):
        piece = escaped("".join(units[step.src_start : step.src_end]))
        if piece:
            parts.append(piece if step.tag == "equal" else f"<{tag}>{piece}</{tag}>")
    return "".join(parts)
