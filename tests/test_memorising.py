"""Longest runs against a search by brute force, sources and licences, and canaries of known frequency."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_eval import BYTES
from test_overlaps import prepared, sample, words

from data import shingles
from suites.memorising import LEAST, RepeatedRun, licences_of, longest_runs, memorisation, memory_table
from tokenizer import CodeTokenizer


def store_of(documents: list[list[int]]) -> Any:
    return SimpleNamespace(
        n_documents=len(documents),
        vocab_size=1 + max(max(d) for d in documents if d),
        document=lambda number: np.array(documents[number], np.int64),
    )


def brute(text: list[int], documents: list[list[int]], least: int) -> tuple[int, int, int]:
    """(length, document, times) of the longest run, and where it stands first."""
    for length in range(len(text), least - 1, -1):
        pieces = {tuple(text[i : i + length]) for i in range(len(text) - length + 1)}
        places = [
            number
            for number, d in enumerate(documents)
            for i in range(len(d) - length + 1)
            if tuple(d[i : i + length]) in pieces
        ]
        if places:
            return length, places[0], len(places)
    return 0, -1, 0


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("batch", [1, 40, 2**19])
def test_runs_equal_a_search_by_brute_force(seed, batch, monkeypatch):
    monkeypatch.setattr(shingles, "BATCH_UNITS", batch)
    draw = np.random.default_rng(seed)
    letters = int(draw.integers(2, 6))
    documents = [draw.integers(0, letters, draw.integers(0, 60)).tolist() for _ in range(8)]
    texts = [draw.integers(0, letters, draw.integers(0, 40)).tolist() for _ in range(10)]
    source = documents[3]
    texts += [source, source[2:-3], [*source[:11], 99, *source[11:]], [], documents[0] + documents[1]]
    found = longest_runs(texts, store_of(documents), 3)
    for text, run in zip(texts, found, strict=True):
        length, document, _ = brute(text, documents, 3)
        assert (run.length, run.document) == (length, document)
        piece = text[run.start : run.start + run.length]
        if length:
            held = documents[document]
            assert any(held[i : i + length] == piece for i in range(len(held)))
            # A piece that the text holds twice is counted for each.
            assert run.times >= brute(piece, documents, 3)[2]


def test_no_text_no_document_and_shorter_than_asked():
    store = store_of([[1, 2, 3, 4], []])
    assert longest_runs([], store) == []
    assert longest_runs([[1, 2, 3]], store, 4) == [RepeatedRun(0, 0, -1, 0)]
    assert longest_runs([[0, 1, 2, 3, 4]], store, 4) == [RepeatedRun(4, 1, 0, 1)]


def test_equal_hashes_are_no_run(monkeypatch):
    """Tokens decide: with every window's hash the same, the runs are the same."""
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 3, 20).tolist() for _ in range(4)]
    texts = [draw.integers(0, 3, 15).tolist() for _ in range(4)]
    wanted = longest_runs(texts, store_of(documents), 3)
    real = shingles.Batch.windows

    def all_alike(self, length):
        places, hashes = real(self, length)
        return places, hashes * np.uint64(0)

    # With them a text may only be thought to have a longer run than it has.
    monkeypatch.setattr(shingles.Batch, "windows", all_alike)
    for run, right in zip(longest_runs(texts, store_of(documents), 3), wanted, strict=True):
        assert run.length <= right.length


@pytest.fixture
def record_and_data(tmp_path):
    rows = [
        {"text": f"{words(i, 60)}\n", "path": f"src/f{i}.py", "repository": "a/b", "license": f"L-{i}"}
        for i in range(30)
    ]
    data = prepared(tmp_path, rows)
    name = data.train.names[4]
    number = int(name.split("/f")[1].removesuffix(".py"))
    known = words(number, 60)
    samples = [
        {**sample(0, "p", words(900, 8)), "predictions": {"model": known[3:83], "copy": ""}},
        {**sample(1, "p", words(901, 8)), "predictions": {"model": words(950, 8), "copy": ""}},
        {**sample(2, "p", known[:40]), "predictions": {"model": "", "copy": known}},
    ]
    record = {"suite": "pairs", "scores": {"model": {}, "copy": {}}, "samples": samples}
    return record, data, tmp_path / "rows.jsonl", name, f"L-{number}", known


def test_a_repeated_passage_is_named_with_its_file_and_licence(record_and_data):
    record, data, source, name, licence, known = record_and_data
    found = memorisation(record, data.train, BYTES, str(source))
    top = found["longest"][0]
    assert (top["sample"], top["file"], top["licence"], top["times"]) == (1, name, licence, 1)
    assert top["text"] == known[3:83]
    assert top["tokens"] == top["of"]
    assert list(found["systems"]) == ["model", "reference"]
    assert found["systems"]["model"]["whole"] == 1
    assert found["systems"]["reference"]["longest"] == len(BYTES.encode(known[:40]))
    assert "copy" not in {row["system"] for row in found["longest"]}
    table = memory_table(found)
    assert licence in table
    assert name in table
    assert f"below {LEAST} tokens" in table


def test_a_line_stands_whole_though_its_ends_are_parts_of_other_tokens_there(tmp_path):
    lines = [f"    result_{i} = call(other_{i}, flag=True)" for i in range(40)]
    rows = [{"text": "\n".join([f"def f{n}():", *lines, ""]), "path": f"f{n}.py"} for n in range(90)]
    code = CodeTokenizer.train([row["text"] for row in rows], 600)
    data = prepared(tmp_path, rows, code)
    own, there = code.encode(lines[7]), data.train.document(0).tolist()
    assert all(there[i : i + len(own)] != own for i in range(len(there)))  # The tokens differ.
    said = lines[7], lines[7].replace("True", "None")
    samples = [{**sample(i, "p", "y"), "predictions": {"model": one}} for i, one in enumerate(said)]
    record = {"suite": "pairs", "scores": {"model": {}}, "samples": samples}
    found = memorisation(record, data.train, code, str(tmp_path / "rows.jsonl"))
    assert found["systems"]["model"]["whole"] == 1


def test_a_corpus_without_licences_says_unknown(record_and_data, tmp_path):
    record, data, *_ = record_and_data
    found = memorisation(record, data.train, BYTES, str(tmp_path / "nowhere"))
    assert found["longest"][0]["licence"] is None
    assert "unknown" in memory_table(found)


def test_licences_are_read_from_rows_of_one_reading(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"path": "a", "text": "x", "licence": "MIT"}\n\n[1]\n')
    assert licences_of(str(file), {"a"}) == {"a": "MIT"}
    file.write_text('{"path": "a", "text": "x", "licence": "MIT", "licence": "GPL-3.0-only"}\n')
    with pytest.raises(ValueError, match="line 1 has two readings: the key 'licence' stands twice in it"):
        licences_of(str(file), {"a"})


def test_licences_of_parquet_and_of_a_scraped_corpus(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"text": "x", "path": f"f{i}.py", "repository": "a/b", "licence": "MIT" if i else None}
        for i in range(3)
    ]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "part-0.parquet")
    names = {f"a/b/f{i}.py" for i in range(3)}
    wanted = {"a/b/f1.py": "MIT", "a/b/f2.py": "MIT"}
    assert licences_of(str(tmp_path / "data" / "part-0.parquet"), names) == wanted
    (tmp_path / "corpus.json").write_text(json.dumps({"parts": [{"file": "data/part-0.parquet"}]}), "utf-8")
    assert licences_of(str(tmp_path), names) == wanted
    assert licences_of("stdlib", names) == {}
    assert Path("stdlib").exists() is False
