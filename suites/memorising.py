"""Text that a model repeats: the longest run of tokens of every prediction that stands in a training file.

    found = longest_runs([tokenizer.encode(text) for text in texts], data.train)
    print(memory_table(memorisation(record, data.train, tokenizer, source)))

Any text shares runs with a large corpus, so the references' own runs stand beside: a model repeats what
exceeds those. Two passes over the training tokens find runs of any length; memory holds the predictions and
one batch of training documents. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import parse_line
from data.shingles import Batch, Units, batches, mixed
from data.sourcefiles import CORPUS
from data.tokenstore import TokenStore
from suites.records import texts_of
from suites.tables import aligned
from tokenizer import Tokenizer

LEAST = 8  # Tokens of the shortest run; shorter ones are found in any text.
LISTED = 10
LONG = 50  # Tokens of a run that Carlini et al. 2022 (arXiv:2202.07646) call extracted.
_ROWS = 2**16  # Pairs of places that are compared at a time.
LICENCE_FIELDS = "licence", "license"


class RepeatedRun(NamedTuple):
    """The longest run of a text that stands in training.

    Args:
        length: Its tokens; 0 if there are fewer than `LEAST`.
        start: The place of its first token in the text.
        document: The number of the first training document that holds it; -1 for none.
        times: How often training holds runs of this text that are as long.
    """

    length: int
    start: int
    document: int
    times: int


def longest_runs(texts: Sequence[Sequence[int]], train: TokenStore, least: int = LEAST) -> list[RepeatedRun]:
    """Return for each text its longest run of at least `least` token ids inside one training document.

    First the runs of `least`, 2 `least`, 4 `least`, ... tokens that stand in training are found by hash. A
    text's longest run begins with one of the largest of these lengths that it has, and is less than twice as
    long: so only those places are looked at again, token by token, which also settles equal hashes.
    """
    values = mixed(
        np.arange(max(train.vocab_size, 1 + max((max(t) for t in texts if t), default=0)), dtype=np.uint64)
    )
    ours = Batch([Units("", "", values[np.asarray(text, np.int64)], 0) for text in texts])
    search = _Search(train, values, ours, [(0, 0, -1, 0)] * len(texts))
    lengths = []
    while (length := least << len(lengths)) <= max(map(len, texts), default=0):
        lengths.append(length)
    windows = {length: ours.windows(length) for length in lengths}
    found = search.found_in_training(windows)
    # The largest length of which a text has a run in training, (texts,).
    largest = np.zeros(len(texts), np.int64)
    for length in lengths:
        largest[ours.of[windows[length][0][found[length]]]] = length
    for length in lengths:
        places, hashes = windows[length]
        chosen = found[length] & (largest[ours.of[places]] == length)
        if chosen.any():
            search.extend(places[chosen], hashes[chosen], length)
    return [RepeatedRun(*one) for one in search.best]


@dataclass(frozen=True)
class _Search:
    """A search for the texts' runs in the training documents.

    Args:
        train: The training documents.
        values: (words,) uint64, the hash of each token id.
        ours: The texts.
        best: The longest run of each text so far, by the fields of `RepeatedRun`.
    """

    train: TokenStore
    values: np.ndarray
    ours: Batch
    best: list[tuple[int, int, int, int]]

    def stream(self) -> Iterator[tuple[int, Batch]]:
        """Yield all training documents in batches, in order, each with the number of its first document."""
        train = self.train
        units = (Units("", "", self.values[train.document(i)], 0) for i in range(train.n_documents))
        first = 0
        for batch in batches(units):
            yield first, batch
            first += len(batch.documents)

    def found_in_training(self, windows: dict[int, tuple[np.ndarray, np.ndarray]]) -> dict[int, np.ndarray]:
        """Return, for each length, which of our windows of that length have a hash that training has too.

        Args:
            windows: Our windows' places and hashes, by length, the shortest first.
        """
        found = {length: np.zeros(len(places), bool) for length, (places, _) in windows.items()}
        for _, batch in self.stream():
            for length, (_, hashes) in windows.items():
                hit = np.isin(hashes, batch.windows(length)[1])
                found[length] |= hit
                if not hit.any():
                    break
        return found

    def extend(self, places: np.ndarray, hashes: np.ndarray, length: int) -> None:
        """Make the runs that begin at these places of ours as long as they go; keep each text's longest."""
        order = np.argsort(hashes, kind="stable")
        places, hashes = places[order], hashes[order]
        for first, batch in self.stream():
            theirs, found = batch.windows(length)
            left = np.searchsorted(hashes, found, "left")
            times = np.searchsorted(hashes, found, "right") - left
            at = np.flatnonzero(times)
            # One entry for each pair of a place there and a place here.
            there = np.repeat(theirs[at], times[at])
            within = np.arange(len(there)) - np.repeat(np.cumsum(times[at]) - times[at], times[at])
            here = places[np.repeat(left[at], times[at]) + within]
            for start in range(0, len(there), _ROWS):
                rows = slice(start, start + _ROWS)
                self.keep_longest(batch, first, here[rows], there[rows], length)

    def keep_longest(
        self, batch: Batch, first: int, here: np.ndarray, there: np.ndarray, length: int
    ) -> None:
        """Compare our places with theirs, pair by pair, token by token, and keep each text's longest run.

        Args:
            batch: Training documents.
            first: The number of the first of them.
            here: (pairs,) places in `ours`.
            there: (pairs,) places in `batch`.
            length: Tokens that a run has at least; it has less than twice as many.
        """
        ours = self.ours
        text, document = ours.of[here], batch.of[there]
        room = np.minimum(ours.ends[text] - here, batch.ends[document] - there)
        run = np.zeros(len(here), np.int64)
        going = np.arange(len(here))
        for step in range(2 * length):
            going = going[room[going] > step]
            going = going[ours.ids[here[going] + step] == batch.ids[there[going] + step]]
            if not len(going):
                break
            run[going] = step + 1
        # Only the longest runs of each text are looked at one by one; of equal ones the first in order stays.
        top = np.zeros(len(ours.documents), np.int64)
        np.maximum.at(top, text, run)
        for i in np.flatnonzero((run == top[text]) & (run >= length)).tolist():
            number, size = int(text[i]), int(run[i])
            longest, start, source, times = self.best[number]
            if size > longest:
                self.best[number] = size, int(here[i] - ours.starts[number]), first + int(document[i]), 1
            elif size == longest:
                self.best[number] = longest, start, source, times + 1


# --- of an evaluation ----------------------------------------------------------------------------------


def memorisation(
    record: dict[str, Any], train: TokenStore, tokenizer: Tokenizer, source: str
) -> dict[str, Any]:
    """Return what the models of a suite's record repeat, with the references beside; plain data.

    Args:
        source: The corpus, for the licences of its files.
    """
    systems = [system for system in ("model", "given", "base") if system in record["scores"]]
    texts: list[tuple[str, int, str]] = []
    for number, sample in enumerate(record["samples"], 1):
        texts += [(system, number, text) for system in systems for text in texts_of(sample, system)]
        texts.append(("reference", number, sample["reference"]))
    ids = [tokenizer.encode(text) for _, _, text in texts]
    runs = longest_runs(ids, train)
    of_text = [system for system, _, _ in texts]
    wholes = [
        _stands_whole(text, run, len(of_ids), train, tokenizer)
        for (_, _, text), run, of_ids in zip(texts, runs, ids, strict=True)
    ]
    by_system: dict[str, Any] = {}
    for system in [*systems, "reference"]:
        own = [(run, len(i)) for (of, _, _), run, i in zip(texts, runs, ids, strict=True) if of == system]
        sizes = np.array([run.length for run, _ in own])
        by_system[system] = {
            "texts": len(own),
            "median": float(np.median(sizes)),
            "longest": int(sizes.max()),
            "whole": sum(whole for of, whole in zip(of_text, wholes, strict=True) if of == system),
            "long": int((sizes >= LONG).sum()),
        }
    order = sorted(range(len(runs)), key=lambda i: -runs[i].length)
    listed = [i for i in order if texts[i][0] != "reference" and runs[i].length][:LISTED]
    names = {train.names[runs[i].document] for i in listed}
    licences = licences_of(source, names)
    rows = []
    for i in listed:
        (system, number, _), run = texts[i], runs[i]
        name = train.names[run.document]
        rows.append(
            {
                "system": system,
                "sample": number,
                "tokens": run.length,
                "of": len(ids[i]),
                "times": run.times,
                "file": name,
                "licence": licences.get(name),
                "text": tokenizer.decode(ids[i][run.start : run.start + run.length]),
            }
        )
    return {"least": LEAST, "systems": by_system, "longest": rows}


def _stands_whole(text: str, run: RepeatedRun, size: int, train: TokenStore, tokenizer: Tokenizer) -> bool:
    """Return whether all of a text stands where its longest run does.

    The text's first and last characters may be parts of other tokens there, by what is around them.
    """
    if run.length == 0:
        return False
    ids = train.document(run.document)
    return run.length == size or text.strip() in tokenizer.decode(ids.tolist())


def memory_table(found: dict[str, Any]) -> str:
    """Return a table of how long the runs are, beside the references', and where the longest stand."""
    systems = found["systems"]
    rows = [["longest run in training", *systems]]
    for key, name in (
        ("median", "tokens, median"),
        ("longest", "tokens, longest"),
        ("long", f"texts with {LONG} tokens or more"),
        ("whole", f"whole texts, from {found['least']} tokens on"),
    ):
        of = " of {texts}" if key in ("long", "whole") else ""
        rows.append([name, *(f"{one[key]:g}{of.format(**one)}" for one in systems.values())])
    lines = aligned(rows)
    lines.append(
        f"runs below {found['least']} tokens count as 0; a reference's are what any text of this kind has"
    )
    if found["longest"]:
        head = ["system", "sample", "tokens", "of", "times", "licence", "file", "text"]
        rows = [head]
        for row in found["longest"]:
            licence = row["licence"] or "unknown"
            text = " ".join(row["text"].split())
            text = text if len(text) <= 48 else text[:45] + "..."
            rows.append([*(str(row[key]) for key in head[:5]), licence, row["file"], text])
        lines += ["", *aligned(rows)]
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


def licences_of(source: str, names: set[str]) -> dict[str, str]:
    """Return the licence of each of these documents by name, where the corpus records it.

    A scraped corpus records it in its parts, others in rows with a field `licence` or `license`. Documents
    without a record are left out.
    """
    path = Path(source)
    if (path / CORPUS).is_file():
        parts = json.loads((path / CORPUS).read_text("utf-8"))["parts"]
        files = [path / part["file"] for part in parts]
    elif path.is_dir():
        files = sorted(one for one in path.iterdir() if one.name.endswith((".jsonl", ".parquet")))
    else:
        files = [path] if path.is_file() and path.name.endswith((".jsonl", ".parquet")) else []
    found: dict[str, str] = {}
    for file in files:
        rows = _parquet_rows(file) if file.suffix == ".parquet" else _jsonl_rows(file)
        for number, row in enumerate(rows, 1):
            name = row.get("path") or row.get("name") or str(number)
            name = f"{row['repository']}/{name}" if row.get("repository") else name
            licence = next((row[field] for field in LICENCE_FIELDS if row.get(field)), None)
            if name in names and licence is not None:
                found.setdefault(name, str(licence))
    return found


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            row = parse_line(line, f"{path} line {number}") if line.strip() else None
            if isinstance(row, dict):
                yield row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        wanted = {"path", "name", "repository", *LICENCE_FIELDS} & set(file.schema_arrow.names)
        for batch in file.iter_batches(columns=sorted(wanted)):
            yield from batch.to_pylist()
