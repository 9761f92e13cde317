"""The second opinion on text and rows: it agrees with healthy runs, and names faults that nobody planted."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretrained_folders import tokenizer_with_gaps

import dataset
import tokenization.healing
from data import comments, corpus, packing, prepare, tokenstore
from data import rows as data_rows
from dataset import Batches
from guards.reference import learning
from guards.reference import rows as rows_guard
from guards.reference import text as text_guard
from guards.reference.comparison import Comparison, Differs
from guards.subject import GuardSubject
from reference.library import ByteLevelTokens
from reference.stored import Stored
from reference.tokens import read_tokenizer
from selftest.data import function, write_data
from selftest.run import small_config
from tokenization import code
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
    odd = [
        "\ufeffa = 1\r\nb = 2\r\n",
        "x\x00y\x0c\n",
        "caf\u00e9 = '\u4e00\U00013000'\n\n",
        "  \n",
        "a",
        "\tb\n\tc  ",
    ]
    odd += ["", texts[0], texts[0]]
    (folder / "odd").mkdir()
    for i, text in enumerate([*texts[:20], *odd]):
        path = folder / "odd" / f"{'abc'[i % 3]}" / f"{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    (folder / "odd" / "bad.py").write_bytes(b"\xff\xfe = 1")
    (folder / "odd" / ".hidden").mkdir()
    (folder / "odd" / ".hidden" / "no.py").write_text("no = 1\n")
    plain = [
        {"text": text, "path": f"f{i}.py", "repository": f"r{i % 5}", "o": str(i % 9)}
        for i, text in enumerate(texts)
    ]
    plain += (
        [{"content": text, "o": "odd"} for text in odd if text]
        + [{"text": "\ud800 half", "o": "half"}]
        + plain[:3]
    )
    lines = "".join(json.dumps(row) + "\n" for row in plain)
    (folder / "plain.jsonl").write_text(lines)
    with gzip.open(folder / "plain.jsonl.gz", "wt") as file:
        file.write(lines)
    pq.write_table(pa.Table.from_pylist([row for row in plain if row.get("path")]), folder / "plain.parquet")
    alpaca = [
        {"instruction": text.split("\n")[0], "input": "x" * (i % 3), "output": text}
        for i, text in enumerate(texts)
    ]
    (folder / "alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alpaca))
    gaps = [
        {"prefix": t[: 20 + i], "suffix": t[40 + i :], "middle": t[20 + i : 40 + i]}
        for i, t in enumerate(texts)
    ]
    (folder / "gaps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in gaps))
    (folder / "given").mkdir()
    for name, part in {"train": plain[:30], "test": plain[25:40]}.items():
        (folder / "given" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    commented = [f'"""Doc {i}."""\n# {i}\n{text}    """{i}"""  # "#{i}"\n' for i, text in enumerate(texts)]
    (folder / "commented").mkdir()
    for i, text in enumerate([*commented, "def broken(:\n"]):
        (folder / "commented" / f"{i}.py").write_text(text)
    tokenizer_with_gaps(texts, 330, folder / "markers")
    CodeTokenizer.train(texts, 400, 2).save(folder / "code")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sources")
    write_sources(path)
    return path


BPE = {"kind": "bpe", "vocab_size": 320}
MARKED = {"kind": "pretrained", "path": "markers"}
HEALTHY: dict[str, dict[str, dict[str, Any]]] = {
    "files": {},
    "files of every kind": {"data": {"source": "odd", "skip_undecodable": True}},
    "bpe": {"data": {"source": "odd", "skip_undecodable": True}, "tokenizer": BPE},
    "pretrained": {"data": {"source": "long"}, "tokenizer": MARKED},
    "regrouped": {"data": {"source": "long", "regroup": True}},
    "no validation": {
        "data": {"source": "long", "validation_one_in": 0, "test_one_in": 0},
        "train": {"overfit": True},
    },
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


@pytest.mark.parametrize("kind", ["code", "bpe"])
def test_of_long_texts_the_trainer_is_compared_on_a_sample(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    subject = subject_of(small(folder, {"tokenizer": BPE} if kind == "bpe" else {}))
    monkeypatch.setattr(learning, "CHARACTERS", {"code": 99, "bpe": 99})
    text_guard.compare(subject, Comparison())
    kinds: dict[str, Any] = {"code": CodeTokenizer, "bpe": BPETokenizer}
    original = kinds[kind].train
    monkeypatch.setattr(kinds[kind], "train", lambda texts, *sizes: original([*texts][:-1], *sizes))
    with pytest.raises(Differs, match=r"(merge|heads|tails|plain) .*of the tokenizer"):
        text_guard.compare(subject, Comparison())


@pytest.mark.parametrize("kind", ["code", "bpe"])
def test_the_naive_tokenizers_write_any_text_as_the_tokenizers_do(folder: Path, kind: str) -> None:
    texts = [function(random.Random(i)) for i in range(40)]
    to = folder / f"naive {kind}"
    tokenizer = (CodeTokenizer if kind == "code" else BPETokenizer).train(texts, 330, 1)
    tokenizer.save(to)
    naive = read_tokenizer(to)
    assert naive is not None and (kind == "code" or isinstance(naive, ByteLevelTokens))

    alphabet = st.sampled_from(" \n\r\t_aAbBzZ09'.(=-\x00\x1c\x85é一½٣\u2003\U00013000") | st.characters(
        exclude_categories=("Cs", "Cn")  # Half a pair is no UTF-8; versions differ in what is assigned.
    )

    @settings(max_examples=300, deadline=None)
    @given(st.text(alphabet, max_size=80) | st.sampled_from(texts))
    def same(text: str) -> None:
        assert naive.encode(text) == tokenizer.encode(text)

    same()


def test_how_often_new_tokens_occur_is_counted_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of(small(folder, {}))
    first = subject.train.document(0).tolist()[3]
    config = SimpleNamespace(lora=SimpleNamespace(new_tokens=("return",)))
    tokenizer = SimpleNamespace(token_id=lambda token: first)
    adapted: Any = SimpleNamespace(config=config, tokenizer=tokenizer, train=subject.train)
    stored = Stored(subject.train.folder, "train")
    rows_guard._new_tokens(adapted, stored, Comparison())
    monkeypatch.setattr(tokenstore.TokenStore, "occurrences", lambda self, ids: [0 for _ in ids])
    with pytest.raises(Differs, match="new tokens in training"):
        rows_guard._new_tokens(adapted, stored, Comparison())


def test_counts_of_the_index_are_those_of_the_tables(folder: Path) -> None:
    subject = subject_of(small(folder, {}))
    stored = Stored(subject.train.folder, "train")
    rows_guard._same_tables(subject.train, stored, Comparison())
    stored.counted["tokens"] -= 1
    with pytest.raises(Differs, match="index of train: "):
        rows_guard._same_tables(subject.train, stored, Comparison())


def test_it_leaves_no_trace(folder: Path) -> None:
    subject = subject_of(small(folder, HEALTHY["examples"]))
    before = [subject.micro_batch(n) for n in range(4)]
    weights = {name: p.clone() for name, p in subject.model.named_parameters()}
    random.seed(3)
    torch.manual_seed(3)
    states = (random.getstate(), str(np.random.get_state()), torch.get_rng_state())
    for part in (text_guard, rows_guard):
        part.compare(subject, Comparison())
    assert random.getstate() == states[0] and str(np.random.get_state()) == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    for n, batch in enumerate(before):
        assert all(torch.equal(one, other) for one, other in zip(batch, subject.micro_batch(n), strict=True))
    assert all(torch.equal(p, weights[name]) for name, p in subject.model.named_parameters())
    assert subject.model.training


def test_a_trusted_store_is_compared_with_the_source_too(folder: Path, tmp_path: Path) -> None:
    """The second start does not read the source, and the reference does."""
    config = small(folder, HEALTHY["files of every kind"])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache=str(tmp_path)))
    subject = subject_of(config)
    other = (
        folder / "odd" / next(name for name in subject.train.names if (folder / "odd" / name).read_bytes())
    )
    before = other.read_bytes()
    other.write_bytes(before[:-1] + b"?")
    try:
        with pytest.raises(Differs, match=rf"\({other.relative_to(folder / 'odd')}\): ids"):
            text_guard.compare(subject, Comparison())
    finally:
        other.write_bytes(before)
    text_guard.compare(subject, Comparison())


# --- faults that nobody planted ----------------------------------------------------------------------


def changed(owner: Any, name: str, change: Callable[..., Any]) -> Callable[[], Any]:
    """Return a patch of a function, by a function of the original and its arguments."""
    original = getattr(owner, name)
    return lambda: patch.object(owner, name, lambda *args, **options: change(original, *args, **options))


def stripped(original: Any, *args: Any) -> str | None:
    text = original(*args)
    return None if text is None else text.strip()


def one_less(original: Any, *args: Any, **options: Any) -> Iterator[Any]:
    documents = list(original(*args, **options))
    return iter(documents[:3] + documents[4:])


def every_other(original: Any, *args: Any) -> Iterator[str]:
    return iter([*original(*args)][::2])


def labels_of_prompts(original: Any, tokens: Any, ids: Any, is_prompt: Any = None) -> Any:
    return original(tokens, ids, None)


def by_another_hash(original: Any, group: str, validation: int, test: int = 0) -> str:
    return original(group[::-1], validation, test)


def without_last_row(original: Any, self: Batches, step: int) -> Any:
    rows = original(self, step)
    rows[-1] = rows[0]
    return rows


def without_gaps(tokenizer: CodeTokenizer) -> CodeTokenizer:
    return CodeTokenizer(tokenizer.heads, tokenizer.tails, tokenizer.plain)


FAULTS: dict[str, tuple[str, Callable[[], Any], str]] = {
    "white space is cut off": (
        "files",
        changed(corpus, "decoded", stripped),
        "ids.*white space .* cut off",
    ),
    "a document is lost": ("rows", changed(corpus, "_without_duplicates", one_less), "documents? .*of"),
    "a file is lost": ("files", changed(corpus, "_without_duplicates", one_less), "copy of an earlier file"),
    "a tokenizer of half the texts": ("bpe", changed(prepare, "training_texts", every_other), "merge"),
    "pieces of half the texts": (
        "examples",
        changed(prepare, "training_texts", every_other),
        "(heads|tails|plain) of the tokenizer",
    ),
    "rarer pieces first": (
        "files of every kind",
        changed(CodeTokenizer, "_of", lambda true, pieces, usual: true(pieces[::-1], usual)),
        "(heads|tails|plain) of the tokenizer",
    ),
    "a line end is lost with comments": (
        "comments",
        changed(comments, "_between", lambda true, *places: true(*places)[:-1]),
        "the program without comments",
    ),
    "an index of other ids": (
        "files",
        changed(tokenstore, "dtype_of", lambda true, size: np.dtype("<u4")),
        "of the token store",
    ),
    "another usual case": (
        "files",
        changed(
            CodeTokenizer, "_of", lambda true, pieces, usual: true(pieces, dict.fromkeys(usual, code.UP))
        ),
        "usual cases of heads",
    ),
    "gaps are not saved": (
        "files",
        changed(CodeTokenizer, "_save", lambda true, self, to: true(without_gaps(self), to)),
        "its tokens for gaps",
    ),
    "a tokenizer of another kind": (
        "files",
        changed(CodeTokenizer, "train", lambda true, texts, size, least: BPETokenizer.train(texts, size)),
        "kind of the tokenizer",
    ),
    "another hash": ("files of every kind", changed(corpus, "split_of", by_another_hash), "of another split"),
    "prompts are targets": ("examples", changed(dataset, "next_token_labels", labels_of_prompts), "labels"),
    "a row twice": ("files", changed(Batches, "rows_of", without_last_row), "row 3: tokens"),
    "input is lost": (
        "alpaca",
        changed(data_rows, "alpaca_prompt", lambda f, one, two="": f(one)),
        "document",
    ),
    "cut elsewhere": (
        "gaps by rate",
        changed(corpus, "gap_of", lambda f, text, rate: (gap := f(text, rate)) and (0, gap[1])),
        "ids",
    ),
    "long prompts keep their beginning": (
        "trimmed gaps",
        changed(packing, "fim_kept", lambda f, p, s, room: f(p, s, room)[::-1]),
        "tokens",
    ),
    "validation from the beginning": (
        "many validation rows",
        lambda: patch.object(dataset, "numbered_batches", first_rows(dataset.numbered_batches)),
        "validation, batch",
    ),
    "prompts are not healed": (
        "examples, bpe",
        changed(tokenstore, "healed", lambda f, tokenizer, ids: tokenization.healing.Prompt(ids)),
        "as one text|where its prompt ends",
    ),
}


def first_rows(original: Any) -> Any:
    def wrong(store: Any, batch_size: int, block_size: int, limit: int = 0, *ranks: int) -> Iterator[Any]:
        n_rows = limit and -(-limit // batch_size)
        return (
            batch
            for i, batch in enumerate(original(store, batch_size, block_size, 0, *ranks))
            if not limit or i < n_rows
        )

    return wrong


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_nobody_planted_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    healthy, fault, stage = FAULTS[name]
    config = small(folder, HEALTHY[healthy])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache=str(tmp_path)))
    with fault():
        assert re.search(stage, named(config))
