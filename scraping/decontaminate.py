"""Decontamination: find documents that hold an example of a benchmark, by the overlap of runs of units.

    benchmarks = Benchmarks(["HumanEval.jsonl.gz"])
    drop = benchmarks.found_in(document)

Each field of an example that holds text is a piece of its own, so that a solution is found without its
prompt. The measure is that of PaLM (arXiv:2204.02311, section 8): the share of a piece's runs that stand in
one document. Units here are words and punctuation marks, so a run is longer than PaLM's 8 words.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from config import bounded_lines, parse_line
from data.shingles import Batch, Units, Words
from scraping.documents import Drop, ScrapedDocument

RUN = 13  # units of a run
SHARE = 0.7  # a document that holds this share of a piece's runs is dropped
LEAST = 2 * RUN  # fewest units of a piece that is looked for; shorter pieces are anyone's code


class Benchmarks:
    """The pieces of benchmark files, JSONL or JSONL.gz, whatever their fields.

    Args:
        pieces: Number of texts that are looked for.
        too_short: Number of texts that are not, since they have fewer than LEAST units.

    Raises:
        ValueError: a file is missing, is no JSONL, or holds no text that is long enough.
    """

    def __init__(self, files: list[str]) -> None:
        self._words = Words()
        self._names: list[str] = []
        self.too_short = 0
        hashes, owners, counts = [], [], []
        for file in files:
            before = len(self._names)
            for name, text in _texts(Path(file)):
                units = self._words.ids(text)
                if len(units) < LEAST:
                    self.too_short += 1
                    continue
                runs = np.unique(Batch([Units("", "", units, 0)]).windows(RUN)[1])
                owners.append(np.full(len(runs), len(self._names)))
                hashes.append(runs)
                counts.append(len(runs))
                self._names.append(name)
            if len(self._names) == before:
                raise ValueError(f"{file} holds no text of {LEAST} words and marks: nothing to look for")
        every = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
        order = np.argsort(every, kind="stable")
        self._hashes = every[order]
        self._owners = np.concatenate(owners)[order] if owners else np.empty(0, np.int64)
        self._counts = np.array(counts, np.int64)

    @property
    def pieces(self) -> int:
        return len(self._names)

    def found_in(self, document: ScrapedDocument) -> Drop | None:
        """Return why the document is dropped, with the example that it holds most of; None where it stays."""
        if not self.pieces:
            return None
        runs = np.unique(Batch([Units("", "", self._words.ids(document.text), 0)]).windows(RUN)[1])
        first, last = (np.searchsorted(self._hashes, runs, side) for side in ("left", "right"))
        hits = np.flatnonzero(first < last)
        if not len(hits):
            return None
        owners = np.concatenate([self._owners[first[i] : last[i]] for i in hits])
        shares = np.bincount(owners, minlength=self.pieces) / self._counts
        most = int(shares.argmax())
        if shares[most] < SHARE:
            return None
        return Drop("benchmark", f"{shares[most]:.0%} of {self._names[most]}")


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (file, line and field; text) for every field of a file's rows that holds text."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as lines:
            for number, line in enumerate(bounded_lines(lines, path), 1):
                if not line.strip():
                    continue
                try:
                    text = line.decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{path} line {number} is not UTF-8: byte {error.start} cannot be read"
                    ) from None
                row = parse_line(text, f"{path} line {number}")
                if not isinstance(row, dict):
                    raise ValueError(f"{path} line {number} is a JSON {type(row).__name__}, not an object")
                for field, value in row.items():
                    yield from ((f"{path.name} line {number} {field}", text) for text in _strings(value))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):  # A list of strings is one text, such as MBPP's tests.
        return ["\n".join(item for item in value if isinstance(item, str))]
    return []
