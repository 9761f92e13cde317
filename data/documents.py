"""A document of a corpus, the names of the splits, and the report on all documents and files."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tokenization.chat import Conversation

# Training learns from the first, the second chooses checkpoints and settings, the third is scored at the end.
SPLITS: tuple[str, ...] = ("train", "validation", "test")


def utf8(text: str) -> bytes:
    """Encode any string: JSON may hold lone surrogates, and so may file names that are not UTF-8."""
    return text.encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Document:
    """A plain text, or an example: `text` is then the completion of `prompt`, which may be "".

    Where `messages` is given the text is the assistant's answer to them. The ids of both are then those of
    the tokenizer's chat template, and the prompt is the text of the messages without their roles.
    `group` decides its split. Without a group field it equals `name`, or the prompt of an example whose row
    has no name: the completions of one prompt stay in one split. `prompts` are never trained on, and no part
    of the data's fingerprint: only an evaluation that requests them by name reads them.
    """

    name: str
    text: str
    group: str
    prompt: str | None = None  # None for plain text
    suffix: str | None = None  # the text after the gap of an example that fills one
    gap: tuple[int, int] | None = None  # characters of a plain text that are stored last, as a middle
    where: str = dataclasses.field(default="", compare=False)  # the file, and the line or row
    split: str | None = None  # one of SPLITS, where the source gives the split itself
    prompts: dict[str, str] | None = dataclasses.field(default=None, compare=False)  # other wordings, by name
    messages: Conversation | None = None  # what is said before the text, in a conversation

    @property
    def fim_parts(self) -> tuple[str, str, str] | None:
        """(prefix, suffix, middle) of a document that is stored so, else None."""
        if self.suffix is not None:
            return self.prompt or "", self.suffix, self.text
        if self.gap is not None:
            start, end = self.gap
            return self.text[:start], self.text[end:], self.text[start:end]
        return None


class FileState(NamedTuple):
    """What the file system says of a file; it differs after the file was written, replaced or touched."""

    size: int
    mtime_ns: int
    ctime_ns: int  # Unlike mtime, programs cannot set it.
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileState:
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


class ReadFile(NamedTuple):
    """A file as it was when it was read."""

    state: FileState
    sha256: str


@dataclass
class Report:
    """The counts of a corpus as it was read. `documents == duplicates + sum(kept.values())`.

    Args:
        documents: Documents that were read.
        undecodable: Files or rows left out because they are not UTF-8 (not part of `documents`).
        unparsed: Python documents kept with their comments because they do not parse (`drop_comments`).
        duplicates: Documents dropped because an earlier one has the same text, and the same prompt.
        kept: Documents in each split.
        kept_bytes: UTF-8 bytes in each split, prompts included.
        groups: Groups that `regroup` found among the documents kept; 0 without it.
        gaps: Plain documents for training that `fim_rate` cuts.
        fingerprint: SHA-256 over name, group, text and prompt of every document kept, in order, and over
            which are test; set at the end.
        corpus: Fingerprint in the corpus.json of a corpus that `scraping` built; "" for other sources.
        without_rows: A sentence for each JSONL file without a row.
        files: The files that were read, by their names in the source.
    """

    documents: int = 0
    undecodable: int = 0
    unparsed: int = 0
    duplicates: int = 0
    kept: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    kept_bytes: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    groups: int = 0
    gaps: int = 0
    fingerprint: str = ""
    corpus: str = ""
    without_rows: list[str] = dataclasses.field(default_factory=list)
    files: dict[str, ReadFile] = dataclasses.field(default_factory=dict, repr=False)
