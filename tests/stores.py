"""Tokenizers, stores and batches that several files of tests make."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from config import DataConfig
from data.corpus import read_documents
from data.documents import Document
from data.tokenstore import TokenStore, build_store
from dataset import (
    IGNORE_INDEX,
    Batch,
)
from tokenizer import Tokenizer


class Bytes(Tokenizer):
    kind = "bytes"
    vocab_size: int = 259
    bos_id: int | None = 256
    eos_id: int | None = 257
    pad_id: int | None = 258
    fingerprint: str = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogatepass"))

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", "surrogatepass")

    def save(self, folder: Path) -> None: ...

    @classmethod
    def load(cls, folder: Path, as_saved: bool = False) -> Bytes:
        return cls()


class Ranges(Bytes):
    """The text "3 7" becomes [3, 4, 5, 6]; no special tokens, ids too large for 16 bits."""

    vocab_size = 2**20
    bos_id = eos_id = pad_id = None
    fingerprint = "ranges"

    def encode(self, text: str) -> list[int]:
        return list(range(*map(int, text.split())))

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        return f"{ids[0]} {ids[-1] + 1}" if ids else "0 0"


class Lossy(Bytes):
    """Forgets case, as a tokenizer with a lower-casing normaliser does."""

    fingerprint = "lossy"

    def encode(self, text: str) -> list[int]:
        return super().encode(text.lower())


class Startless(Bytes):
    bos_id = eos_id = None


class OutOfRange(Bytes):
    def __init__(self, wrong: int):
        self.wrong = wrong

    def encode(self, text: str) -> list[int]:
        return [1, self.wrong, 2]


class Hooked(Bytes):
    """Calls `hook` before it encodes its first document; otherwise, and by fingerprint, `Bytes`."""

    def __init__(self, hook):
        self.hook = hook

    def encode(self, text: str) -> list[int]:
        hook, self.hook = self.hook, None
        if hook:
            hook()
        return super().encode(text)


def settings_for(source: Path, **changes) -> DataConfig:
    changes = {"validation_one_in": 4, "workers": 1, **changes}
    changes.setdefault("test_one_in", changes["validation_one_in"] and 4)
    return DataConfig(source=str(source), cache=str(source.parent / "cache"), **changes)


def range_store(
    root: Path, lengths: list[int], split: str = "train", shard_tokens: int = 2**20
) -> TokenStore:
    """A store whose documents have these lengths, and whose tokens are 0, 1, 2, ... with gaps between."""
    documents, start = [], 0
    for n, length in enumerate(lengths):
        text = f"{start} {start + length}" if length else "0 0"
        documents.append((split, Document(f"d{n}", text, f"d{n}")))
        start += length + 1
    build_store(root, documents, Ranges(), shard_tokens=shard_tokens)
    return TokenStore(root, split)


def all_targets(store: TokenStore) -> list[int]:
    return sorted(int(t) for n in range(store.n_documents) for t in store.document(n)[1:])


def targets(batch: Batch) -> list[int]:
    return batch.labels[batch.labels != IGNORE_INDEX].tolist()


def check_rows(batch: Batch, B: int, T: int, padding: int = 0) -> None:
    """Check every row of consecutive integers, without the code under test."""
    for part in batch:
        assert part.shape == (B, T) and part.dtype == torch.int64 and part.is_contiguous()
    for tokens, labels, ids, positions in zip(*(part.tolist() for part in batch), strict=True):
        position = 0
        for i in range(T):
            if ids[i] == -1:
                assert (tokens[i], labels[i], positions[i]) == (padding, IGNORE_INDEX, 0)
                assert set(ids[i:]) == {-1}
                continue
            goes_on = i > 0 and tokens[i] == tokens[i - 1] + 1
            position = position + 1 if goes_on else 0
            assert positions[i] == position
            assert i == 0 or (ids[i] == ids[i - 1] if goes_on else ids[i] > ids[i - 1])
            assert labels[i] in (tokens[i] + 1, IGNORE_INDEX)
            if i + 1 < T:
                assert (labels[i] == tokens[i + 1]) == (ids[i] == ids[i + 1])


def write_rows(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode() + b"\n \n"
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def files_of(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def one_row(folder: Path, *rows: dict, **changes) -> list[Document]:
    return list(read_documents(settings_for(write_rows(folder / "rows.jsonl", list(rows)), **changes)))


class Characters(Bytes):
    """A character is its code point."""

    vocab_size = 2**20
    bos_id, eos_id, pad_id = 2**20 - 3, 2**20 - 2, 2**20 - 1
    fingerprint = "characters"

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(chr(id) for id in ids if id < 2**20 - 3)


EOS, PAD = 2**20 - 2, 2**20 - 1


def example_store(root: Path, sizes: list[tuple[int, int]], **options) -> TokenStore:
    """A store of examples with these numbers of prompt and completion tokens, each token another number."""
    documents, start = [], 0
    for n, (prompt, completion) in enumerate(sizes):
        text = "".join(map(chr, range(start, start + prompt + completion)))
        documents.append(("train", Document(f"d{n}", text[prompt:], f"d{n}", text[:prompt])))
        start += len(text)
    build_store(root, documents, Characters(), **options)
    return TokenStore(root, "train")


def stored_parts(store: TokenStore, n: int) -> tuple[list[int], list[int]]:
    ids, length = store.document(n).tolist(), int(store.prompt_lengths[n])
    return ids[:length], ids[length:]
