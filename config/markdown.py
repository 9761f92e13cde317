"""Markdown of untrusted text, for the cards of corpora and of models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def plain(text: str, most: int | None = None) -> str:
    """Return a stranger's text, escaped so that neither Markdown nor HTML interprets it.

    Args:
        most: The characters that are kept of it.
    """
    cut = text if most is None or len(text) <= most else f"{text[: most - 3]}..."
    return "".join(c if c.isalnum() or c in " .,:;+-_/()'" else f"&#{ord(c)};" for c in cut)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
