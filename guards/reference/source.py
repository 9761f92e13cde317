"""Guard of what is read of the source: which documents there are, in which order and in which split."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from config import DataConfig
from guards.reference.comparison import Comparison
from reference.stored import Stored
from reference.text import (
    SPLITS,
    SourceDocument,
    decoded,
    documents_of_rows,
    file_names,
    root_of,
    row_files,
    split_of,
)

SAMPLES = 64  # Documents, sampled anew at each start.
MOST_BYTES = 10**7  # Of the source that are read.
MOST_ROWS = 20_000


class Sample:
    """A stored document and what the source has for it."""

    def __init__(self, stored: Stored, number: int, document: SourceDocument):
        self.stored, self.number, self.document = stored, number, document
        self.stage = f"document {number} of {stored.split} ({document.name})"


# --- a folder of files -----------------------------------------------------------------------------


class Files:
    """The files of a folder, and the stored document of each that is in a split."""

    def __init__(self, data: DataConfig, stores: dict[str, Stored], comparison: Comparison):
        self.data, self.root, self.comparison = data, root_of(data), comparison
        names = file_names(data)
        known = set(names)
        self.where: dict[str, tuple[Stored, int]] = {}
        for split, stored in stores.items():
            self._same_names(split, stored, known)
            self.where |= {name: (stored, number) for number, name in enumerate(stored.names)}
        self.missing = [name for name in names if name not in self.where]

    def _same_names(self, split: str, stored: Stored, known: set[str]) -> None:
        """Compare the names of a split with those of the files, their order, and the rule of the splits."""
        exact = self.comparison.exact
        strange = [name for name in stored.names if name not in known]
        exact(f"names in {split} that no file has", strange, [], "look at what names a document")
        doubled = [name for name in stored.names if name in self.where]
        exact(f"files of {split} in two splits", doubled, [], "put each file into one split")
        late = [name for last, name in pairwise(stored.names) if name <= last]
        exact(f"files of {split} out of order", late, [], "files come once, sorted by their paths")
        if not self.data.regroup:
            moved = [name for name in stored.names if split_of(name, self.data, set()) != split]
            exact(f"files of {split} that are of another split", moved, [], "look at the hash of a name")

    def samples(self, draw: np.random.Generator) -> list[Sample]:
        """Return sampled documents; first those whose bytes are not as many as the file has."""
        names = [*self.where]
        chosen = [names[place] for place in draw.permutation(len(names))]
        other = self.other_sizes(chosen)
        samples, room = [], MOST_BYTES
        for name in [*other, *chosen][:SAMPLES]:
            room -= (self.root / name).stat().st_size
            if samples and room < 0:
                break
            text = decoded((self.root / name).read_bytes())
            self.comparison.exact(f"{name} is UTF-8", text is not None, True, "decode strictly")
            samples.append(Sample(*self.where[name], SourceDocument(name, text or "", name)))
        return samples

    def other_sizes(self, names: list[str]) -> list[str]:
        """Return the files whose stored document counts other bytes; bits per byte are divided by them."""
        if self.data.drop_comments:
            return []
        counted = ((name, *self.where[name]) for name in names[:MOST_ROWS])
        return [n for n, s, number in counted if s.byte_lengths[number] != (self.root / n).stat().st_size]

    def compare_bytes(self) -> None:
        """Compare the bytes of every stored text with the size of its file."""
        remedy = "count the bytes of UTF-8"
        self.comparison.exact("files with other bytes", self.other_sizes([*self.where]), [], remedy)

    def compare_missing(self) -> None:
        """See that each file that is in no split is not UTF-8, or has the text of an earlier one."""
        if self.data.drop_comments and self.missing:
            which = f"{len(self.missing)} files in no split"
            self.comparison.leave_out(which, "they may be equal without their comments")
            return
        by_size: dict[int, list[str]] = {}
        for name, (stored, number) in self.where.items():
            by_size.setdefault(int(stored.byte_lengths[number]), []).append(name)
        room = MOST_BYTES
        for name in self.missing:
            content = (self.root / name).read_bytes()
            room -= len(content)
            if room < 0:
                break
            if decoded(content) is None and self.data.skip_undecodable:
                continue
            earlier = (other for other in by_size.get(len(content), ()) if other < name)
            has_twin = any((self.root / other).read_bytes() == content for other in earlier)
            remedy = "look for documents that are lost between the source and the store"
            stage = f"{name}, which is in no split, is a copy of an earlier file"
            self.comparison.exact(stage, has_twin, True, remedy)


# --- files of rows ---------------------------------------------------------------------------------


def of_rows(
    data: DataConfig, stores: dict[str, Stored], comparison: Comparison, draw: np.random.Generator
) -> list[Sample]:
    """Compare the documents of the source's first rows with the stores, in order; return a sample of them.

    Equal documents after the first are left out, and each split has its documents in the source's order.
    """
    given = {split for split, _ in row_files(data)}
    ahead = dict.fromkeys(SPLITS, 0)
    seen: set[bytes] = set()
    samples: list[Sample] = []
    room = MOST_BYTES
    for number, document in enumerate(documents_of_rows(data)):
        room -= len(document.text) + len(document.prompt or "") + len(document.suffix or "")
        if room < 0 or number >= MOST_ROWS:
            comparison.leave_out("documents of later rows", f"the first {number:,} rows were compared")
            break
        if document.name.endswith(".py") and data.drop_comments:
            comparison.leave_out("documents of rows", "they are compared without their comments only")
            return []
        if document.content in seen:
            continue
        seen.add(document.content)
        split = _split_of_row(document, data, given, stores, ahead)
        if split == "":
            comparison.leave_out(
                f"rows from {number + 1} on", "their names do not tell which split they are in"
            )
            break
        there = (
            stores[split].names[ahead[split]]
            if split in stores and ahead[split] < len(stores[split])
            else None
        )
        stage = f"document {ahead[split]} of {split}"
        comparison.exact(stage, there, document.name, "look for documents that are lost, doubled or moved")
        samples.append(Sample(stores[split], ahead[split], document))
        ahead[split] += 1
    else:
        for split, stored in stores.items():
            comparison.exact(
                f"documents in {split}", len(stored), ahead[split], "look for documents that are added"
            )
    return [samples[place] for place in draw.permutation(len(samples))[:SAMPLES]]


def _split_of_row(
    document: SourceDocument,
    data: DataConfig,
    given: set[str],
    stores: dict[str, Stored],
    ahead: dict[str, int],
) -> str:
    """Return the split of a row's document: by the rule, or, where texts decide it, as it is stored.

    It is "" where the next document of more than one split has this name.
    """
    if document.given not in ("", "train"):
        return document.given
    if not data.regroup:
        return split_of(document.group, data, given)
    found = [s for s, stored in stores.items() if stored.names[ahead[s] : ahead[s] + 1] == [document.name]]
    return found[0] if len(found) == 1 else "" if found else "train"
