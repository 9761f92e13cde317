"""The stages of `clean`, one file each: what they look for, what they change, and what they drop.

A stage is a function from a `ScrapedDocument` to a `ScrapedDocument` or a `Drop`; the first, `encoding`,
starts from a `RawFile`. Each file has a `VERSION`, which is written beside every shard and goes up when equal
input may give another output, and a `build`, which makes the stage from its settings. A stage reports by
`note` what it changes in a document that it keeps, and the shard's record counts these notes. No reason,
evidence or note holds a secret.
"""

from __future__ import annotations

from collections.abc import Callable

from scraping.documents import Drop, ScrapedDocument

Stage = Callable[[ScrapedDocument], ScrapedDocument | Drop]
Note = Callable[[str], None]  # gets the name of a change, one of the stage's few
Finding = tuple[int, int, str]  # start and end in a text, and the kind of what stands there


def suffix(path: str) -> str:
    """Return the ending of a path in lower case, without its dot; "" where there is none."""
    name = path.rpartition("/")[2]
    return name.rpartition(".")[2].lower() if "." in name else ""
