"""The stages of `clean`, one file each: what they look for, what they change, and what they drop.

A stage is a function from a `Document` to a `Document` or a `Drop`; the first, `encoding`, starts from a
`RawFile`. Each file has a `VERSION`, which is written beside every shard and goes up when equal input may
give another output, and a `build`, which makes the stage from its settings. What a stage changes without
dropping it says by `note`, and the shard's record counts it. No reason, evidence or note holds a secret.
"""

from __future__ import annotations

from collections.abc import Callable

from scraping.documents import Document, Drop

Stage = Callable[[Document], Document | Drop]
Note = Callable[[str], None]  # what was changed, by one of a stage's few names
Finding = tuple[int, int, str]  # from where to where in a text, and of what kind


def suffix(path: str) -> str:
    """The ending of a path in lower case, without its dot; "" where there is none."""
    name = path.rpartition("/")[2]
    return name.rpartition(".")[2].lower() if "." in name else ""
