"""The token store of one split as its files say (docs/file-formats.md), read without its writer's code."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import numpy as np

FORMAT = 2  # of a store as it is read here


class Stored:
    """The documents of a split: one stream of ids in shards, and tables with an entry for each document.

    Attributes:
        offsets: (documents + 1,) where each document starts in the stream, and the end.
        byte_lengths: (documents,) UTF-8 bytes of the text whose tokens are targets.
        prompts: (documents,) leading tokens that are prompt; 0 for plain text.
        suffixes: (documents,) the place of the marker between prefix and suffix; 0 without one.
        cuts: (documents,) characters of a prompt that is one text with its completion; else -1.
        pad: The id of padding.
        gap_lead: How many tokens stand before the first marker of a gap.
        suffix_first: Whether the suffix of a gap stands before its prefix.
        index: What index.json says.
        counted: The `tokens`, `documents` and `bytes` that the index says.
    """

    def __init__(self, folder: Path, split: str):
        index = json.loads((folder / "index.json").read_text("utf-8"))
        self.folder, self.split, self.index = folder, split, index
        files = {file["name"]: file["size"] for file in index["splits"][split]["files"]}
        self.dtype = np.dtype(index["dtype"])
        self.shards = {
            name: size // self.dtype.itemsize for name, size in files.items() if name[-4:] == ".bin"
        }
        self.pad, self.gap_lead = index["pad_id"] or 0, index.get("gap_lead", 0)
        self.suffix_first = index.get("suffix_first", False)
        own = index["splits"][split]
        self.counted = {key: own[key] for key in ("tokens", "documents", "bytes") if key in own}
        self.offsets = np.load(folder / f"{split}-offsets.npy")
        self.byte_lengths = np.load(folder / f"{split}-bytes.npy")
        self.holds_examples = f"{split}-prompts.npy" in files
        self.prompts = self._of_examples("prompts", 0)
        self.suffixes = self._of_examples("suffixes", 0)
        self.cuts = self._of_examples("cuts", -1)

    def _of_examples(self, table: str, absent: int) -> np.ndarray:
        path = self.folder / f"{self.split}-{table}.npy"
        return np.load(path) if path.is_file() else np.full(len(self), absent)

    def __len__(self) -> int:
        return len(self.byte_lengths)

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each document, (documents,)."""
        return np.diff(self.offsets)

    @cached_property
    def names(self) -> list[str]:
        """The name of each document."""
        lines = (self.folder / f"{self.split}-names.jsonl").read_text("utf-8").split("\n")
        return [json.loads(line) for line in lines if line]

    def document(self, number: int, begin: int = 0, end: int | None = None) -> list[int]:
        """Return the ids of a document, or those from `begin` to `end`; it lies in one shard."""
        first, last = int(self.offsets[number]), int(self.offsets[number + 1])
        place, stop = first + begin, last if end is None else first + end
        for name, size in self.shards.items():
            if place < size or (place == size == stop):
                ids = np.fromfile(
                    self.folder / name, self.dtype, stop - place, offset=place * self.dtype.itemsize
                )
                return ids.tolist()
            place, stop = place - size, stop - size
        return []
