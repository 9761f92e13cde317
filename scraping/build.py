"""python -m scraping build: select the corpus's documents, and write it with its counts and its card.

Of documents with equal text the one with the least name stays; of a cluster of near duplicates too, or all of
them with `--near keep`. A document that holds an example of a benchmark is dropped. The command writes

    corpus/data/part-*.parquet      text, repository, path, commit, licence, cluster, sha256
    corpus/corpus.json              counts by stage and reason, licences, settings, fingerprint
    corpus/README.md, pictures/     the dataset card
    corpus/records/                 each dropped document, and why

`--shard i/n` writes one part, `--finish true` the files that describe all parts; without either, both happen.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from config import write_atomically
from scraping.counts import lines, size, stages, summed
from scraping.decontaminate import Benchmarks
from scraping.documents import Drop, ScrapedDocument, read_shard, write_shard
from scraping.frequencies import Frequencies
from scraping.pool import each
from scraping.shards import alone, file_sha256, parse_shard, parts_of, read_record

VERSION = 1  # version of the selection below: raise it when equal input gives another corpus


@dataclass(frozen=True)
class BuildSettings:
    """Settings of the command build.

    Args:
        folder: The corpus's folder: `folder/clean` and `folder/dedup` are read, `folder/corpus` is written.
        near: `drop` all but one document of a cluster, or `keep` them for a split by cluster.
        benchmarks: JSONL(.gz) files whose examples no document may hold, such as HumanEval and MBPP.
        form: `parquet`, or `jsonl` for JSONL.gz.
        title: The title of the dataset card.
        shard: `i/n`: write only part i, counted from 0, of the n parts that clean made.
        finish: Write only the files that describe all parts.
        workers: Number of processes; 0 means one for each core.
    """

    folder: str = "corpus"
    near: Literal["drop", "keep"] = "drop"
    benchmarks: tuple[str, ...] = ()
    form: Literal["parquet", "jsonl"] = "parquet"
    title: str = "A corpus of source code"
    shard: str = ""
    finish: bool = False
    workers: int = 0


# --- one part ----------------------------------------------------------------------------------------


def build_part(settings: BuildSettings, part: Path) -> None:
    """Write one part of the corpus and its record, unless both are there and were made of the same input."""
    root = Path(settings.folder)
    clusters = root / "dedup" / f"clusters-{part.stem}.json"
    if not clusters.is_file():
        raise ValueError(f"{clusters} is not there: run dedup first")
    output = root / "corpus" / "data" / f"{part.stem}.{_ENDINGS[settings.form]}"
    record_path = root / "corpus" / "records" / f"{part.stem}.json"
    with alone(record_path):
        inputs = {
            "version": VERSION,
            "clean": (clean := file_sha256(part)),
            "clusters": file_sha256(clusters),
            "near": settings.near,
            "form": settings.form,
            "benchmarks": [file_sha256(Path(file)) for file in settings.benchmarks],
        }
        found = read_record(clusters, "clean", "rows")
        if found["clean"] != clean:  # clusters name rows by number, which would now be other documents
            raise ValueError(f"{part} changed since {clusters} was made: run dedup again")
        try:
            record = json.loads(record_path.read_text("utf-8"))
            if record["inputs"] == inputs and record["sha256"] == file_sha256(output):
                return
        except (OSError, ValueError, KeyError):
            pass
        output.parent.mkdir(exist_ok=True)
        selection = _Selection(settings, found["rows"])
        count = write_shard(output, selection.of(read_shard(part)))
        dropped = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in selection.dropped).encode()
        (record_path.parent / f"{part.stem}.dropped.jsonl.gz").write_bytes(gzip.compress(dropped, mtime=0))
        record = {"inputs": inputs, "documents": count, "sha256": file_sha256(output)}
        write_atomically(record_path, json.dumps(record | selection.counts(), indent=1))


_ENDINGS = {"parquet": "parquet", "jsonl": "jsonl.gz"}


class _Selection:
    """The choice of a part's documents, with its counts."""

    def __init__(self, settings: BuildSettings, clusters: dict[str, list[str]]) -> None:
        self.dropped: list[dict[str, str]] = []
        self._near = settings.near
        self._clusters = clusters
        self._benchmarks = Benchmarks(list(settings.benchmarks))
        self._reasons: Counter[str] = Counter()
        self._licences: Counter[str] = Counter()
        self._sizes: Counter[int] = Counter()
        self._frequencies = Frequencies()
        self._bytes = {"in": 0, "out": 0}
        self._read = 0

    def of(self, documents: Iterator[ScrapedDocument]) -> Iterator[ScrapedDocument]:
        for row, document in enumerate(documents):
            size = len(document.text.encode())
            self._read += 1
            self._bytes["in"] += size
            cluster, twin = self._clusters.get(str(row), (document.name, ""))
            drop = self._drop(document, cluster, twin)
            if drop is not None:
                self._reasons[drop.reason] += 1
                self.dropped.append({"name": document.name, "reason": drop.reason, "evidence": drop.evidence})
                continue
            self._bytes["out"] += size
            self._licences[document.licence or "unknown"] += 1
            self._sizes[size.bit_length()] += 1
            self._frequencies.add(document.text)
            yield dataclasses.replace(document, cluster=cluster)

    def _drop(self, document: ScrapedDocument, cluster: str, twin: str) -> Drop | None:
        if twin:
            return Drop("exact duplicate", f"of {twin}")
        if self._near == "drop" and cluster != document.name:
            return Drop("near duplicate", f"in the cluster of {cluster}")
        return self._benchmarks.found_in(document)

    def counts(self) -> dict[str, Any]:
        return {
            "read": self._read,
            "bytes": self._bytes,
            "dropped": dict(sorted(self._reasons.items())),
            "licences": dict(sorted(self._licences.items())),
            "sizes": {str(bits): count for bits, count in sorted(self._sizes.items())},
            "benchmark pieces": self._benchmarks.pieces,
            "benchmark pieces too short": self._benchmarks.too_short,
            "frequencies": self._frequencies.to_dict(),
        }


# --- all of it ---------------------------------------------------------------------------------------


def finish(settings: BuildSettings) -> dict[str, Any]:
    """Write corpus.json, the card and its pictures; return what corpus.json holds."""
    from scraping.card import write_card

    root = Path(settings.folder)
    folder = root / "corpus"
    parts = parts_of(root / "clean")
    outputs = _outputs(settings, folder, len(parts))
    records = _selection_records(folder, parts, outputs)
    cleaned = _cleaning_records(parts)
    frequencies = Frequencies()
    for record in records:
        frequencies.merge(Frequencies.from_dict(record["frequencies"]))
    selected = {
        "stage": "select",
        "in": sum(record["read"] for record in records),
        "out": sum(record["documents"] for record in records),
        "dropped": summed(record["dropped"] for record in records),
    }
    corpus = {
        "documents": selected["out"],
        "bytes": sum(record["bytes"]["out"] for record in records),
        "fingerprint": fingerprint(outputs),
        "stages": [*stages(cleaned), selected],
        "licences": summed(record["licences"] for record in records),
        "sizes": summed(record["sizes"] for record in records),
        "words": {"occurrences": frequencies.total, "different words by occurrences": frequencies.curve()},
        "clusters": read_record(root / "dedup" / "clusters.json", "settings", "counts"),
        "settings": {
            "build": {
                "near": settings.near,
                "benchmarks": [Path(file).name for file in settings.benchmarks],
                "form": settings.form,
            },
            "clean": cleaned[0]["settings"],
        },
        "versions": cleaned[0]["stages"] | {"select": VERSION},
        "parts": [
            {"file": f"data/{output.name}", "documents": record["documents"], "sha256": record["sha256"]}
            for output, record in zip(outputs, records, strict=True)
        ],
    }
    write_card(folder, settings.title, corpus)
    write_atomically(folder / "corpus.json", json.dumps(corpus, indent=1, ensure_ascii=False))
    return corpus


def _outputs(settings: BuildSettings, folder: Path, n_parts: int) -> list[Path]:
    """Return the corpus's parts; raise a ValueError if their form or number is wrong."""
    outputs = parts_of(folder / "data", ending=f".{_ENDINGS[settings.form]}")
    for form, ending in _ENDINGS.items():
        others = sorted(path.name for path in (folder / "data").glob(f"*.{ending}"))
        if form != settings.form and others:
            raise ValueError(
                f"{folder / 'data'} holds {others[0]} of --form {form} too: remove those of one form"
            )
    if len(outputs) != n_parts:
        clean = folder.parent / "clean"
        raise ValueError(f"{folder} has {len(outputs)} parts and {clean} {n_parts}: build again")
    return outputs


def _selection_records(folder: Path, parts: list[Path], outputs: list[Path]) -> list[dict[str, Any]]:
    """Return the records of `build_part`; raise a ValueError if a part was not made of its clean part."""
    records = []
    for part, output in zip(parts, outputs, strict=True):
        record = read_record(folder / "records" / f"{part.stem}.json", "inputs", "sha256", "frequencies")
        if record["inputs"]["clean"] != file_sha256(part) or record["sha256"] != file_sha256(output):
            raise ValueError(f"{output} is not what {part} would give: run build again")
        records.append(record)
    return records


def _cleaning_records(parts: list[Path]) -> list[dict[str, Any]]:
    """Return the records of `clean_shard`; raise a ValueError if their settings or versions differ."""
    keys = ("settings", "stages", "not stored", "input", "dropped")
    records = [read_record(part.with_suffix(".json"), *keys) for part in parts]
    for part, record in zip(parts, records, strict=True):
        if any(
            record.get(key) != records[0].get(key) for key in ("settings", "stages", "python", "packages")
        ):
            raise ValueError(
                f"{part} was cleaned by other settings or versions than {parts[0]}: clean one again"
            )
    return records


def fingerprint(parts: list[Path]) -> str:
    """Return the SHA-256 of the sorted digests of all rows, which no division into parts changes."""
    digests = []
    for part in parts:
        for document in read_shard(part):
            row = [document.name, document.commit, document.licence, document.cluster, document.sha256]
            digests.append(hashlib.sha256(json.dumps(row).encode()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def run(settings: BuildSettings) -> None:
    """Build the requested parts of the corpus, and print the counts."""
    parts = parts_of(Path(settings.folder, "clean"))
    Benchmarks(list(settings.benchmarks))  # A missing or wrong file is reported before anything is written.
    if settings.shard:
        number, shards = parse_shard(settings.shard)
        if shards != len(parts):
            raise ValueError(f"--shard {settings.shard} is of {shards}, and clean made {len(parts)} parts")
        return build_part(settings, parts[number])
    if not settings.finish:
        each(partial(build_part, settings), parts, settings.workers)
    with alone(Path(settings.folder, "corpus", "corpus.json")):
        corpus = finish(settings)
    print("\n".join(lines(corpus["stages"], size(corpus))))
    if not corpus["documents"]:
        raise ValueError(
            f"the corpus in {Path(settings.folder, 'corpus')} has no document: loosen what took the most of "
            "what is counted above, and clean again"
        )
    return None
