"""scraping/documents.py: names of any bytes, and shards that come back as they were."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scraping.documents import ScrapedDocument, path_text, read_shard, shard_path, write_shard


def documents(n: int) -> list[ScrapedDocument]:
    return [
        ScrapedDocument(f"x = {i}\r\n\0é\U0001f40d" * i, f"o/r{i % 3}", f"{i}.py", "c", "MIT")
        for i in range(n)
    ]


@example("\xad".encode(), b"\xad")
@given(st.binary(max_size=20), st.binary(max_size=20))
def test_different_paths_have_different_printable_texts(one: bytes, other: bytes) -> None:
    assert (path_text(one) == path_text(other)) == (one == other)
    assert path_text(one).isprintable()
    path_text(one).encode()


def test_a_plain_path_stays_and_a_strange_one_is_escaped() -> None:
    assert path_text("src/é.py".encode()) == "src/é.py"
    assert path_text(b"a\nb\xff\\.py") == r"a\x0ab\xff\x5c.py"


@pytest.mark.parametrize("ending", [".parquet", ".jsonl.gz"])
@pytest.mark.parametrize("n", [0, 1, 200])
def test_a_shard_comes_back_as_it_was_and_equal_documents_give_equal_bytes(
    tmp_path: Path, n: int, ending: str
) -> None:
    assert shard_path(tmp_path, 3, 16).name == "part-00003-of-00016.parquet"
    path = tmp_path / f"part{ending}"
    assert write_shard(path, documents(n)) == n
    assert list(read_shard(path)) == documents(n)
    before = path.read_bytes()
    write_shard(path, documents(n))
    assert path.read_bytes() == before


def test_rows_of_jsonl_hold_the_same_fields(tmp_path: Path) -> None:
    path = tmp_path / "part.jsonl.gz"
    write_shard(path, documents(3))
    with gzip.open(path) as lines:
        rows = [json.loads(line) for line in lines]
    assert [ScrapedDocument(**{k: v for k, v in row.items() if k != "sha256"}) for row in rows] == documents(
        3
    )
    assert [row["sha256"] for row in rows] == [d.sha256 for d in documents(3)]


def test_an_interrupted_write_leaves_the_shard_that_was_there(tmp_path: Path) -> None:
    path = shard_path(tmp_path, 0, 1)
    write_shard(path, documents(2))

    def broken():
        yield documents(1)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(path, broken())
    assert list(read_shard(path)) == documents(2)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ending", [".parquet", ".jsonl.gz"])
def test_a_cut_shard_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"part{ending}"
    write_shard(path, documents(9))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"part\{ending} is not a whole shard"):
        list(read_shard(path))
