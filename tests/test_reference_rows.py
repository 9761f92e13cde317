"""The second opinion on text and rows: it agrees with healthy runs, and names faults that nobody planted."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
from data import corpus, packing, rows as data_rows, tokenstore
from dataset import Batches
from guards.reference import rows as rows_guard
from guards.reference import text as text_guard
from guards.reference.comparison import Comparison, Differs
from guards.subject import GuardSubject
from reference.tokens import read_tokenizer, words_of
from recipes.small_base import with_gaps
from selftest.data import function, write_data
from selftest.run import small_config
from tokenization.code import CodeTokenizer
from tokenizer import BPETokenizer
from training import begin


class Begun(Exception):
    """A run has come to its guards."""


def subject_of(config: Any) -> GuardSubject:
    """Return what the guards of a run look at, which does not train."""
    found: list[GuardSubject] = []

    def captured(subject: GuardSubject, allowed: object) -> None:
        found.append(subject)
        raise Begun

    with patch.object(begin, "preflight", captured), contextlib.suppress(Begun):
        begin.train(config)
    return found[0]


def compared(config: Any) -> Comparison:
    subject, comparison = subject_of(config), Comparison()
    for part in (text_guard, rows_guard):
        comparison.begin(part.__name__)
        part.compare(subject, comparison)
    return comparison


def named(config: Any) -> str:
    """Return the stage that differs, and "" where all agree."""
    try:
        compared(config)
    except Differs as difference:
        return str(difference)
    return ""


def write_sources(folder: Path) -> None:
    """Write sources of every kind, with what is easily lost: line ends, marks, characters, copies."""
    write_data(folder)
    texts = [function(random.Random(i)) for i in range(40)]
    odd = ["\ufeffa = 1\r\nb = 2\r\n", "x\x00y\x0c\n", "caf\u00e9 = '\u4e00\U00013000'\n\n", "  \n", "a", "\tb\n\tc  "]
    odd += ["", texts[0], texts[0]]
    (folder / "odd").mkdir()
    for i, text in enumerate([*texts[:20], *odd]):
        path = folder / "odd" / f"{'abc'[i % 3]}" / f"{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    (folder / "odd" / "bad.py").write_bytes(b"\xff\xfe = 1")
    (folder / "odd" / ".hidden").mkdir()
    (folder / "odd" / ".hidden" / "no.py").write_text("no = 1\n")
    plain = [{"text": text, "path": f"f{i}.py", "repository": f"r{i % 5}", "o": str(i % 9)} for i, text in enumerate(texts)]
    plain += [{"content": text, "o": "odd"} for text in odd if text] + [{"text": "\ud800 half", "o": "half"}] + plain[:3]
    lines = "".join(json.dumps(row) + "\n" for row in plain)
    (folder / "plain.jsonl").write_text(lines)
    with gzip.open(folder / "plain.jsonl.gz", "wt") as file:
        file.write(lines)
    pq.write_table(pa.Table.from_pylist([row for row in plain if row.get("path")]), folder / "plain.parquet")
    alpaca = [{"instruction": text.split("\n")[0], "input": "x" * (i % 3), "output": text} for i, text in enumerate(texts)]
    (folder / "alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alpaca))
    gaps = [{"prefix": t[: 20 + i], "suffix": t[40 + i :], "middle": t[20 + i : 40 + i]} for i, t in enumerate(texts)]
    (folder / "gaps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in gaps))
    (folder / "given").mkdir()
    for name, part in {"train": plain[:30], "test": plain[25:40]}.items():
        (folder / "given" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    commented = [f'"""Doc {i}."""\n# {i}\n{text}    """{i}"""  # "#{i}"\n' for i, text in enumerate(texts)]
    (folder / "commented").mkdir()
    for i, text in enumerate([*commented, "def broken(:\n"]):
        (folder / "commented" / f"{i}.py").write_text(text)
    with_gaps(BPETokenizer.train(texts, 330), folder / "markers")
    CodeTokenizer.train(texts, 400, 2).save(folder / "code")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sources")
    write_sources(path)
    return path


BPE = {"kind": "bpe", "vocab_size": 320, "min_count": 0}
MARKED = {"kind": "pretrained", "path": "markers"}
HEALTHY: dict[str, dict[str, dict[str, Any]]] = {
    "files": {},
    "files of every kind": {"data": {"source": "odd", "skip_undecodable": True}},
    "bpe": {"data": {"source": "odd", "skip_undecodable": True}, "tokenizer": BPE},
    "pretrained": {"data": {"source": "long"}, "tokenizer": MARKED},
    "regrouped": {"data": {"source": "long", "regroup": True}},
    "no validation": {"data": {"source": "long", "validation_one_in": 0, "test_one_in": 0}, "train": {"overfit": True}},
    "no test": {"data": {"source": "long", "test_one_in": 0}},
    "comments": {"data": {"source": "commented", "drop_comments": True}},
    "comments, bpe": {"data": {"source": "commented", "drop_comments": True}, "tokenizer": BPE},
    "rows": {"data": {"source": "plain.jsonl"}},
    "rows by group": {"data": {"source": "plain.jsonl", "group_field": "o"}},
    "rows, regrouped": {"data": {"source": "plain.jsonl", "regroup": True}},
    "compressed rows": {"data": {"source": "plain.jsonl.gz"}},
    "parquet": {"data": {"source": "plain.parquet", "text_field": "text"}, "tokenizer": BPE},
    "one field": {"data": {"source": "examples.jsonl", "text_field": "completion"}},
    "given splits": {"data": {"source": "given"}},
    "gaps by rate": {"data": {"source": "long", "fim_rate": 0.5}, "tokenizer": MARKED},
    "gaps": {"data": {"source": "gaps.jsonl"}, "tokenizer": MARKED},
    "trimmed gaps": {"data": {"source": "gaps.jsonl"}, "tokenizer": MARKED, "train": {"row_length": 30}},
    "examples": {"data": {"source": "examples.jsonl"}},
    "examples, all": {"data": {"source": "examples.jsonl", "loss_on": "all"}},
    "examples apart": {"data": {"source": "examples.jsonl", "heal": False}},
    "examples, bpe": {"data": {"source": "examples.jsonl"}, "tokenizer": BPE},
    "examples, sequential": {"data": {"source": "examples.jsonl", "order": "sequential"}},
    "examples, graded": {"data": {"source": "examples.jsonl", "order": "hard-first"}},
    "trimmed examples": {"data": {"source": "prompts.jsonl"}},
    "alpaca": {"data": {"source": "alpaca.jsonl"}, "tokenizer": BPE, "model": {"block_size": 256}},
    "sequential": {"data": {"source": "long", "order": "sequential"}},
    "easy first": {"data": {"source": "graded", "order": "easy-first", "difficulty": "entropy"}},
    "hard first": {"data": {"source": "graded", "order": "hard-first"}},
    "hybrid": {"data": {"source": "graded", "order": "hybrid"}},
    "seed": {"train": {"seed": 7, "batch_size": 3, "accumulation": 2}},
    "few rows": {"data": {"source": "long"}, "train": {"batch_size": 64}},
    "many validation rows": {"train": {"validation_rows": 5}},
}


def small(folder: Path, change: dict[str, dict[str, Any]]) -> Any:
    return small_config(folder, change)


@pytest.mark.parametrize("name", HEALTHY)
def test_it_agrees_with_a_healthy_run(folder: Path, name: str) -> None:
    comparison = compared(small(folder, HEALTHY[name]))
    assert comparison.stages
    assert bool(comparison.left_out) == (name == "hybrid"), comparison.left_out
