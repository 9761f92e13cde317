"""The part of a suite that stands in training: planted lines, completions and runs count, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_eval import BYTES

import suites.overlaps as overlaps
from config import DataConfig
from data.corpus import split_documents
from dataset import PreparedData, prepare_data
from suites.overlaps import overlap_line, training_overlap
from tokenizer import Tokenizer


def words(seed: int, n: int) -> str:
    draw = np.random.default_rng(seed)
    return " ".join(f"w{i}" for i in draw.integers(0, 10**6, n))


def prepared(folder: Path, rows: list[dict[str, str]], tokenizer: Tokenizer = BYTES) -> PreparedData:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    config = DataConfig(str(folder / "rows.jsonl"), cache=str(folder / "cache"), workers=1)
    return prepare_data(config, tokenizer)


def trained_on(data: PreparedData, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of the training split, in order."""
    names = set(data.train.names)
    return [row for number, row in enumerate(rows, 1) if row.get("name", str(number)) in names]


def sample(number: int, prompt: str, reference: str) -> dict:
    return {"id": str(number), "name": "f", "where": number, "prompt": prompt, "reference": reference}


def test_lines_and_runs_of_plain_files(tmp_path):
    rows = [{"text": f"{words(i, 80)}\nline_{i} = {i}\n{words(100 + i, 80)}\n"} for i in range(30)]
    data = prepared(tmp_path, rows)
    text = trained_on(data, rows)[0]["text"]
    line = text.split("\n")[1]
    many = text.split()
    samples = [
        sample(0, "before", f"   {line}  "),  # a whole line, its context another
        sample(1, " ".join(many[5:17]), many[17]),  # 13 words that end in the reference
        sample(2, " ".join(many[5:17]), "other"),  # those 13 words without the last
        sample(3, "\n\t".join(many[3:54]), many[54]),  # 52 words, with other white space
        sample(4, words(1000, 60), words(2000, 5)),  # nothing
        sample(5, " ".join(many[5:18]), "other"),  # a run of the prompt alone
    ]
    found = training_overlap({"samples": samples}, data.train, BYTES)
    assert found["exact"] == [1]
    assert found["runs"] == {"13": [2, 4], "50": [4]}
    assert found["near"] is None
    assert overlap_line(found) == (
        "in training: 1 of 6 references are lines of training files; 2 of 6 samples share a run of 13 words "
        "that ends in the reference, 1 one of 50"
    )


def test_completions_of_examples(tmp_path):
    rows = [{"prompt": f"do {words(i, 4)} ", "completion": words(50 + i, 40)} for i in range(40)]
    data = prepared(tmp_path, rows)
    seen = trained_on(data, rows)
    near = seen[1]["completion"].split()
    near[20] = "changed"
    samples = [
        sample(0, "asked otherwise ", seen[0]["completion"]),
        sample(1, "asked otherwise ", " ".join(near)),
        sample(2, "asked otherwise ", words(3000, 40)),
        sample(3, seen[2]["prompt"], words(3001, 40)),
    ]
    found = training_overlap({"samples": samples}, data.train, BYTES)
    assert found["exact"] == [1]
    assert found["near"] == 1
    assert found["runs"]["13"] == [1, 2]
    assert "1 of 4 references are completions of training, 1 near duplicates" in overlap_line(found)


def test_it_is_kept_beside_the_store_and_of_other_samples_made_again(tmp_path, monkeypatch):
    rows = [{"text": f"line_{i} = {i}\n{words(i, 30)}\n"} for i in range(20)]
    data = prepared(tmp_path, rows)
    record = {"samples": [sample(0, "p", trained_on(data, rows)[0]["text"].split("\n")[0])]}
    first = training_overlap(record, data.train, BYTES)
    monkeypatch.setattr(overlaps, "_overlap", lambda *_: pytest.fail("it was there"))
    assert training_overlap(record, data.train, BYTES) == first
    monkeypatch.undo()
    assert training_overlap({"samples": [sample(0, "p", "x")]}, data.train, BYTES)["exact"] == []


def test_of_very_much_text_spread_documents_are_read_and_it_says_so(tmp_path, monkeypatch):
    rows = [{"text": f"line_{i} = {i}\n{words(i, 30)}\n"} for i in range(40)]
    data = prepared(tmp_path, rows)
    monkeypatch.setattr(overlaps, "READ_BYTES", data.train.n_bytes // 3)
    lines = [row["text"].split("\n")[0] for row in trained_on(data, rows)]
    samples = [sample(i, "p", line) for i, line in enumerate(lines)]
    found = training_overlap({"samples": samples}, data.train, BYTES)
    assert 0 < len(found["exact"]) < len(lines) / 2
    assert f"of {found['read']} of {data.train.n_documents} documents" in overlap_line(found)


def test_the_training_side_alone_is_read(tmp_path):
    rows = [{"text": f"line_{i} = {i}\n{words(i, 30)}\n"} for i in range(120)]
    data = prepared(tmp_path, rows)
    config = DataConfig(str(tmp_path / "rows.jsonl"))
    held_out = [
        document.text.split("\n")[0] for split, document in split_documents(config) if split != "train"
    ]
    samples = [sample(i, "p", line) for i, line in enumerate(held_out)]
    assert len(samples) > 3
    assert training_overlap({"samples": samples}, data.train, BYTES)["exact"] == []
