"""The data of a corpus: files as they were fetched, documents as they are cleaned, and shards of documents.

A `RawFile` is bytes from a stranger. A `ScrapedDocument` is text. A stage is a function from a
`ScrapedDocument` to a `ScrapedDocument`, or to a `Drop`, which says why the document leaves the corpus.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROW_GROUP_BYTES = 32 * 2**20  # text of a row group: it bounds the memory to read or write any corpus
UNKNOWN = ""  # the licence of a file that names none, or one that cannot be identified


@dataclass(frozen=True)
class RawFile:
    """A file as it was fetched.

    Args:
        repository: `owner/name`, or the name of a folder, site or package.
        path: Path inside the repository, with `/`, as `path_text` spells it.
        commit: The commit at which it was read, or a version; "" where there is none.
        licence: SPDX expression that the repository claims; UNKNOWN where it does not.
        data: The file's bytes.
    """

    repository: str
    path: str
    commit: str
    licence: str
    data: bytes


@dataclass(frozen=True)
class ScrapedDocument:
    """A text on its way through the stages; the fields are those of `RawFile`.

    Args:
        cluster: The group of near duplicates it belongs to: the least `name` among them; "" before clusters
            are known. A cluster never crosses a split.
    """

    text: str
    repository: str
    path: str
    commit: str
    licence: str
    cluster: str = ""

    @property
    def name(self) -> str:
        return f"{self.repository}/{self.path}"

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of the text in UTF-8, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Drop:
    """The reason why a document is dropped.

    Args:
        reason: One of the stage's few reasons, by which drops are counted, as in `too short`.
        evidence: What was found, for a reader; it never holds a secret.
    """

    reason: str
    evidence: str = ""


FIELDS = [field.name for field in dataclasses.fields(ScrapedDocument)]


def path_text(path: bytes) -> str:
    """Return a path of any bytes as text that can be stored and shown; different paths have different texts.

    Printable UTF-8 stays as it is; the bytes of anything else, and of a backslash, are written as `\\x0a`.
    """
    text = path.decode("utf-8", "surrogateescape")
    if "\\" not in text and text.isprintable():
        return text
    return "".join(
        c
        if c.isprintable() and c != "\\"
        else "".join(f"\\x{byte:02x}" for byte in c.encode("utf-8", "surrogateescape"))
        for c in text
    )


# ---------------------------------------------------------------------------------------------
# Shards


def shard_path(folder: Path, number: int, shards: int) -> Path:
    """Return a path such as `folder/part-00003-of-00016.parquet`."""
    return folder / f"part-{number:05}-of-{shards:05}.parquet"


def write_shard(path: Path, documents: Iterable[ScrapedDocument]) -> int:
    """Write documents as Parquet with zstd, or as JSONL.gz by the path's ending; return their number.

    The same documents give the same bytes. The file appears whole or not at all.
    """
    partial = path.with_name(f".{path.name}.partial")
    count = 0
    try:
        write = _write_jsonl if path.name.endswith(".jsonl.gz") else _write_parquet
        count = write(partial, documents)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _row(document: ScrapedDocument) -> dict[str, str]:
    return dataclasses.asdict(document) | {"sha256": document.sha256}


def _groups(documents: Iterable[ScrapedDocument]) -> Iterator[list[dict[str, str]]]:
    rows: list[dict[str, str]] = []
    size = 0
    for document in documents:
        rows.append(_row(document))
        size += len(document.text)
        if size >= ROW_GROUP_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _write_parquet(path: Path, documents: Iterable[ScrapedDocument]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"text": pa.large_string()}
    schema = pa.schema([(field, kinds.get(field, pa.string())) for field in (*FIELDS, "sha256")])
    count = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for rows in _groups(documents):
            writer.write_table(pa.Table.from_pylist(rows, schema))
            count += len(rows)
    return count


def _write_jsonl(path: Path, documents: Iterable[ScrapedDocument]) -> int:
    count = 0
    # A gzip header without a name and a time makes equal rows equal bytes.
    with open(path, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as lines:
        for document in documents:
            lines.write(json.dumps(_row(document), ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


def read_shard(path: Path) -> Iterator[ScrapedDocument]:
    """Yield the documents of a shard that `write_shard` wrote, in order, with a bounded number in memory.

    Raises:
        ValueError: the file is not a whole shard.
    """
    try:
        rows = _jsonl_rows(path) if path.name.endswith(".jsonl.gz") else _parquet_rows(path)
        for row in rows:
            yield ScrapedDocument(**{name: row[name] for name in FIELDS})
    except (OSError, EOFError, zlib.error, KeyError, TypeError, ValueError) as error:
        line = (str(error).splitlines() or ["it ends early"])[0]
        raise ValueError(f"{path} is not a whole shard of documents: {line}") from error


def _parquet_rows(path: Path) -> Iterator[dict[str, str]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:  # Pyarrow's errors are ValueErrors and OSErrors.
        for batch in file.iter_batches(batch_size=64, columns=FIELDS):
            yield from batch.to_pylist()


def _jsonl_rows(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path) as lines:
        for line in lines:
            yield json.loads(line)
