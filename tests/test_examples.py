"""Examples, a prompt and its completion: what is read and stored, and that only completions bear loss."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dataset import (
    Bytes,
    Lossy,
    all_targets,
    files_of,
    range_store,
    same,
    settings_for,
    targets,
    write_rows,
)
from test_generate_command import STARCODER

import dataset
import guards.same_path
from config import Config, TokenizerConfig
from data import corpus, tokenstore
from data.corpus import read_documents, split_documents, training_texts
from data.documents import SPLITS, Document, Report
from data.fim import (
    fewest_gap_ids,
    fim_markers,
    fim_prompt_ids,
    gap_of,
    gap_start,
    in_text_order,
    trim_fim_prompt,
)
from data.rows import alpaca_prompt
from data.tokenstore import TokenStore, build_store, open_store
from dataset import (
    IGNORE_INDEX,
    ROW_STEP,
    Batch,
    Batches,
    best_fit,
    fitting_row,
    gaps_in_sight,
    is_trimmed,
    next_token_labels,
    prepare_data,
    refuse_long_answers,
    validation_batches,
)
from generation.text import trim_prompt
from guards.labels import prompt_errors
from selftest import data
from selftest.prove_resume import run_difference
from selftest.run import small_config
from suites.stored import text_of_example
from suites.tokens import ngram_scores, train_ngram
from tokenization.healing import healed
from tokenizer import BPETokenizer, CodeTokenizer, Tokenizer
from training.begin import train
from trainingmanager import main

ROWS = [
    {"prompt": f"def f{n}(x):\n    ", "completion": "return x\n" * (n % 5 + 1) + f"# é{n}"} for n in range(60)
]


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


def slow_pass(sizes: list[tuple[int, int]], T: int, everywhere: bool) -> list[list[tuple[int, int]]]:
    """(token, label) at each place of the examples of `example_store`, trimmed as evaluation does."""
    examples, start = [], 0
    for n_prompt, n_completion in sizes:
        prompt = [Characters.bos_id, *range(start, start + n_prompt)]
        completion = [*range(start + n_prompt, start + n_prompt + n_completion), EOS]
        start += n_prompt + n_completion
        prompt = trim_prompt(prompt, T + 1 - len(completion), Characters.bos_id)
        labels = (prompt[1:] if everywhere else [IGNORE_INDEX] * (len(prompt) - 1)) + completion
        examples.append(list(zip(prompt + completion[:-1], labels, strict=True)))
    return examples


def examples_of(batch: Batch, T: int) -> list[list[tuple[int, int]]]:
    """The (token, label) pairs of each example of a batch; checks what holds in every row."""
    found = []
    for tokens, labels, ids, positions in zip(*(part.tolist() for part in batch), strict=True):
        assert len(tokens) == T
        known = [id for id in ids if id >= 0]
        assert ids == known + [-1] * (T - len(known)) and known == sorted(known)
        assert sorted(set(known)) == list(range(len(set(known))))
        for id in sorted(set(known)):
            places = [place for place in range(T) if ids[place] == id]
            assert [positions[place] for place in places] == list(range(len(places)))
            found.append([(tokens[place], labels[place]) for place in places])
        for place in range(len(known), T):
            assert (tokens[place], labels[place], positions[place]) == (PAD, IGNORE_INDEX, 0)
    return found


def without_eos(examples: list[list[tuple[int, int]]]) -> list[tuple[tuple[int, int], ...]]:
    """Sorted, and without eos as a token: it predicts nothing, and in a full row it is a target only."""
    assert all((EOS, label) not in example for example in examples for label in [EOS, *range(300)])
    return sorted(tuple(pair for pair in example if pair[0] != EOS) for example in examples)


# Reading


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
@pytest.mark.parametrize("fields", [("prompt", "completion"), ("input", "output")])
def test_examples_are_read_alike_from_every_kind_of_file(tmp_path: Path, name: str, fields: tuple[str, str]):
    rows = [dict(zip(fields, row.values(), strict=True)) | {"path": f"p{n}"} for n, row in enumerate(ROWS)]
    documents = list(read_documents(settings_for(write_rows(tmp_path / name, rows))))
    assert documents == [
        Document(f"p{n}", row["completion"], f"p{n}", row["prompt"]) for n, row in enumerate(ROWS)
    ]


ALPACA_WITHOUT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Sort it.

### Response:"""
ALPACA_WITH = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Sort it.

### Input:
3 1 2

### Response:"""


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_alpaca_rows_get_the_published_prompt(tmp_path: Path, name: str):
    rows = [
        {"instruction": "Sort it.", "input": "3 1 2", "output": "1 2 3"},
        {"instruction": "Sort it.", "input": "", "output": "What?"},
        {"instruction": "Sort it.", "input": None, "output": "Sort what?"},
    ]
    documents = list(read_documents(settings_for(write_rows(tmp_path / name, rows))))
    assert [d.prompt for d in documents] == [ALPACA_WITH, ALPACA_WITHOUT, ALPACA_WITHOUT]
    assert [d.text for d in documents] == [row["output"] for row in rows]
    (bare,) = one_row(tmp_path, {"instruction": "Sort it.", "output": "What?"})
    assert bare.prompt == ALPACA_WITHOUT == alpaca_prompt("Sort it.")


GOOD = {"prompt": "a", "completion": "b"}
BAD = {
    "text after examples": (
        [GOOD, {"text": "c"}],
        {},
        r"line 2 holds plain text, and .* line 1 an example: put",
    ),
    "examples after text": (
        [{"text": "c"}, GOOD],
        {},
        r"line 2 holds an example, and .* line 1 plain text: put",
    ),
    "empty completion": (
        [GOOD, {"input": "a", "output": ""}],
        {},
        r"line 2 holds nothing in the field output, and so nothing to learn: remove the row",
    ),
    "no completion": (
        [{"prompt": "a"}],
        {},
        r"line 1 has no field completion but prompt: give prompt and completion, remove the row, or set",
    ),
    "null": (
        [{"prompt": None, "completion": "b"}],
        {},
        r"line 1 holds null in the field prompt, not text: write text there, or remove the row",
    ),
    "a number": (
        [GOOD, {"prompt": "a", "completion": 3}],
        {},
        r"line 2 holds the int 3 in the field completion, not text: write text there, or remove the row",
    ),
    "a misspelt field": (
        [GOOD, {"prompt": "a", "completions": "b"}],
        {},
        r"line 2 has no field completion but completions, prompt \(is completions meant for it\?\): give",
    ),
    "a stray field": (
        [{"suffix": ".py", "code": "b"}],
        {},
        r"line 1 has no field text or content but code, suffix: set --data.text_field, or give prompt and",
    ),
    "two of three": (
        [{"suffix": "c", "prefix": "a", "hole": "b"}],
        {},
        r"line 1 has no field middle but hole, prefix, suffix: give prefix and suffix and middle, remove",
    ),
    "chat": (
        [{"prompt": "a", "completion": [{}]}],
        {},
        r"holds the list \[\{\}\] in the field completion, not",
    ),
    "text field": (
        [GOOD],
        {"text_field": "text"},
        r"no field text but .*: leave --data.text_field out to read",
    ),
    "both kinds": (
        [{**GOOD, "content": "c"}],
        {},
        r"holds content, and also prompt and completion: take one",
    ),
    "two examples": (
        [{**GOOD, "input": "c", "output": "d"}],
        {},
        r"and completion, and also input and output",
    ),
    "empty middle": (
        [GOOD, {"prefix": "a", "suffix": "c", "middle": ""}],
        {},
        r"line 2 holds nothing in the field middle, and so nothing to learn",
    ),
    "suffix not text": (
        [{"prefix": "a", "suffix": 3, "middle": "b"}],
        {},
        r"line 1 holds the int 3 in the field suffix, not text",
    ),
    "middle and text": (
        [{"prefix": "a", "suffix": "c", "middle": "b", "text": "abc"}],
        {},
        r"line 1 holds text, and also prefix and suffix and middle: take one",
    ),
    "middle without tokens": (
        [{**GOOD, "path": f"{n}"} for n in range(9)] + [{"prefix": "a", "suffix": "c", "middle": "b"}],
        {},
        r"no fill-in-the-middle tokens such as <fim_prefix>, so .*line 10 cannot be learned; give prompt and",
    ),
    "comments": (
        [{**GOOD, "path": "a.py"}],
        {"drop_comments": True},
        r"drop_comments is set, and .* examples",
    ),
}


@pytest.mark.parametrize("rows, changes, message", BAD.values(), ids=BAD.keys())
def test_bad_examples_are_refused_in_one_sentence(tmp_path: Path, rows, changes, message):
    config = settings_for(write_rows(tmp_path / "rows.jsonl", rows), **changes)
    with pytest.raises(ValueError, match=message) as error:
        prepare_data(config, Bytes())
    assert "\n" not in str(error.value) and not Path(config.cache).exists()


def test_parquet_refuses_by_its_columns(tmp_path: Path):
    for row, message in (
        ({**GOOD, "text": "c"}, "parquet holds text, and also"),
        ({"prompt": "a"}, "no field completion but prompt: give prompt and completion, or set"),
        ({"prompt": "a", "response": "b"}, "no field text or content but prompt, response: set"),
    ):
        with pytest.raises(ValueError, match=message):
            list(read_documents(settings_for(write_rows(tmp_path / "r.parquet", [row]))))
    columns = [pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["text", "text"]), tmp_path / "r.parquet")
    with pytest.raises(ValueError, match=r"r\.parquet has two columns text; leave one out"):
        list(read_documents(settings_for(tmp_path / "r.parquet")))


@pytest.mark.parametrize(("letters", "row"), [(1, 64), (60, 64), (61, 128), (400, 256)])
def test_a_row_that_fits_holds_the_longest_example_of_any_side_whole(tmp_path: Path, letters: int, row: int):
    rows = [{"prompt": f"{n:03}", "completion": "b"} for n in range(40)]
    rows[7]["completion"] = "b" * letters
    sides = prepare_data(settings_for(write_rows(tmp_path / "rows.jsonl", rows)), Bytes())
    stores = (sides.train, sides.validation, sides.test)
    longest = max(int(np.diff(store.offsets).max()) for store in stores)
    assert longest == letters + 3 + 2  # a start and an end
    assert fitting_row(stores, 256) == row
    assert row == 256 or not any(is_trimmed(store, row).any() for store in stores)
    assert row == 64 or any(is_trimmed(store, row - ROW_STEP).any() for store in stores)


def test_a_named_text_field_is_plain_text_even_in_a_row_that_could_be_an_example(tmp_path: Path):
    (document,) = one_row(tmp_path, {**GOOD, "code": "c"}, text_field="code")
    assert (document.text, document.prompt) == ("c", None)


# Split


def test_the_fingerprint_of_a_plain_corpus_is_what_it_always_was(tmp_path: Path):
    """Planted: rows of examples with the same texts, which must not share it."""
    rows = [{"text": f"text {n % 7}", "path": f"p{n}"} for n in range(10)]
    formula = hashlib.sha256()
    for n in range(7):
        digest = hashlib.sha256(f"text {n}".encode()).hexdigest()
        formula.update(f'["p{n}", "p{n}", "{digest}"]'.encode())
    report = Report()
    list(split_documents(settings_for(write_rows(tmp_path / "a.jsonl", rows), validation_one_in=0), report))
    assert report.fingerprint == formula.hexdigest() and report.duplicates == 3
    prints = {report.fingerprint}
    for prompt in ("", "p", "q"):
        examples = [{"prompt": prompt, "completion": r["text"], "path": r["path"]} for r in rows]
        config = settings_for(write_rows(tmp_path / "b.jsonl", examples), validation_one_in=0)
        list(split_documents(config, report := Report()))
        prints.add(report.fingerprint)
    assert len(prints) == 4


def test_examples_are_duplicates_if_both_parts_are(tmp_path: Path):
    """Planted: pairs whose parts are equal when run together."""
    pairs = [("a", "b"), ("a", "b"), ("a", "c"), ("b", "a"), ("", "ab"), ("a", "bc"), ("ab", "c")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    config = settings_for(write_rows(tmp_path / "rows.jsonl", rows), validation_one_in=0)
    report = Report()
    kept = [(document.prompt, document.text) for _, document in split_documents(config, report)]
    assert kept == [pairs[0], *pairs[2:]] and (report.documents, report.duplicates) == (7, 1)


def test_completions_of_one_prompt_stay_on_one_side(tmp_path: Path):
    """Planted: rows without a name, ten completions to a prompt. The row's number would deal them out."""
    rows = [{"prompt": f"p{n % 20}", "completion": f"c{n}"} for n in range(200)]
    sides: dict[str, set[str]] = {side: set() for side in SPLITS}
    for side, document in split_documents(settings_for(write_rows(tmp_path / "rows.jsonl", rows))):
        assert document.prompt
        sides[side].add(document.prompt)
    assert sum(map(len, sides.values())) == 20 and all(sides.values())
    rows = [{"prompt": "", "completion": f"c{n}"} for n in range(200)]  # no prompt at all keeps none together
    reports = Report()
    list(split_documents(settings_for(write_rows(tmp_path / "rows.jsonl", rows)), reports))
    assert all(reports.kept.values())


def test_the_tokenizer_learns_both_parts_of_train_only(tmp_path: Path):
    config = settings_for(write_rows(tmp_path / "rows.jsonl", ROWS))
    expected = []
    for side, document in split_documents(config):
        expected += [document.prompt, document.text] if side == "train" else []
    assert list(training_texts(config)) == expected and len(expected) < 2 * len(ROWS)


# Store


def stored_parts(store: TokenStore, n: int) -> tuple[list[int], list[int]]:
    ids, length = store.document(n).tolist(), int(store.prompt_lengths[n])
    return ids[:length], ids[length:]


@pytest.mark.parametrize("heal", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "code", "bpe"])
def test_both_parts_come_back_and_start_as_generation_does(tmp_path: Path, kind: str, heal: bool):
    """Planted: prompts that end, and completions that start, with letters, spaces, line breaks and bytes."""
    ends = ["x =", "x = ", "x\n", "(", "\n    ", "naïve 日本", ".", "", "\r"]
    starts = [" y", "\ny", "y()", "    return", "é", "\n", "_a", "🙂", "1"]
    pairs = [(f"{i}{end}", start) for i in (1, 2) for end in ends for start in starts]
    pairs = [(a, b) for a, b in pairs if kind != "code" or not (a[-1:].isalnum() and b[0] in "y_1")]
    texts = [text for pair in pairs for text in pair]
    tokenizer: Tokenizer = {
        "bytes": Bytes,
        "code": lambda: CodeTokenizer.train(texts, 400, 0),
        "bpe": lambda: BPETokenizer.train(texts, 400),
    }[kind]()
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    config = settings_for(write_rows(tmp_path / "rows.jsonl", rows), heal=heal)
    prepared = prepare_data(config, tokenizer)
    wanted: dict[str, list[Document]] = {side: [] for side in SPLITS}
    for side, document in split_documents(config):
        wanted[side].append(document)
    crossing = 0
    for store in (prepared.train, prepared.validation, prepared.test):
        assert store.holds_examples and store.n_documents == len(wanted[store.split]) > 0
        for n, document in enumerate(wanted[store.split]):
            prompt, completion = stored_parts(store, n)
            assert document.prompt is not None
            if store.cuts[n] >= 0:
                asked = healed(tokenizer, tokenizer.prompt_ids(document.prompt))
                assert heal and store.cuts[n] == len(document.prompt) and prompt == asked.ids
                assert prompt + completion == [
                    *tokenizer.prompt_ids(document.prompt + document.text),
                    tokenizer.eos_id,
                ]
                own = document.prompt + document.text
                kept = tokenizer.bytes_of(prompt[1:]) if asked.dropped else document.prompt.encode()
                assert kept is not None and store.byte_lengths[n] == len(own.encode()) - len(kept)
                example = text_of_example(store, tokenizer, n)
                assert (example.prompt, example.reference) == (document.prompt, document.text)
                first = [(*branch.ids, id) for branch in asked.branches for id in branch.allowed.tolist()]
                assert not asked.branches or any(tuple(completion[: len(ids)]) == ids for ids in first)
                crossing += prompt + completion[:-1] != [
                    *tokenizer.prompt_ids(document.prompt),
                    *tokenizer.encode(document.text),
                ]
                continue
            assert prompt == tokenizer.prompt_ids(document.prompt)
            assert completion == [*tokenizer.encode(document.text), tokenizer.eos_id]
            assert tokenizer.decode(prompt) == document.prompt
            assert tokenizer.decode(completion) == document.text
            assert tokenizer.decode(prompt + completion) == document.prompt + document.text
            assert store.byte_lengths[n] == len(document.text.encode())
        assert store.n_targets == sum(len(stored_parts(store, n)[1]) for n in range(store.n_documents))
    assert bool(crossing) == (heal and kind != "bytes")


def test_parts_that_a_tokenizer_does_not_keep_together_are_refused():
    """`code` implies a space between two words: the completion would come back as " b". As one text it does
    not, so this is of rows whose two parts are apart.
    """
    tokenizer = CodeTokenizer.train(["a b"], 400, 0)
    (one_text,) = tokenstore._encode(tokenizer, [Document("x", "b", "x", "a")], np.dtype("<u2"))
    assert one_text.cut == 1 and tokenizer.decode(one_text.ids.tolist()) == "ab"
    tokenizer.heals = False
    with pytest.raises(
        ValueError, match=r"the prompt of x ends with 'a' .* with 'b', .* put a space or a line"
    ):
        tokenstore._encode(tokenizer, [Document("x", "b", "x", "a")], np.dtype("<u2"))
    for prompt, completion in (("a ", "b"), ("a", " b"), ("a\n", "b")):
        tokenstore._encode(tokenizer, [Document("x", completion, "x", prompt)], np.dtype("<u2"))


@pytest.mark.parametrize("prompt, text, what", [("A", "b", "the prompt of x"), ("a", "B", "text: x")])
def test_the_losslessness_of_both_parts_is_checked(prompt: str, text: str, what: str):
    with pytest.raises(ValueError, match=f"{what} comes back different from character 0 on"):
        tokenstore._encode(Lossy(), [Document("x", text, "x", prompt)], np.dtype("<u2"))


def test_a_plain_store_has_no_table_of_prompts_and_an_example_store_needs_its_own(tmp_path: Path):
    plain = range_store(tmp_path / "plain", [3, 0, 5])
    assert not plain.holds_examples and plain.prompt_lengths.tolist() == [0, 0, 0] and plain.n_targets == 6
    tables = {f"{side}-{name}" for side in SPLITS for name in ("bytes.npy", "names.jsonl", "offsets.npy")}
    assert set(files_of(tmp_path / "plain")) == {"index.json", "train-00000.bin", *tables}
    store = example_store(tmp_path / "examples", [(3, 2), (0, 1)])
    assert store.holds_examples and store.prompt_lengths.tolist() == [4, 1] and store.n_targets == 5
    (tmp_path / "examples" / "train-prompts.npy").unlink()
    with pytest.raises(ValueError, match="not a whole token store"):  # and never plain text
        open_store(tmp_path / "examples")


def test_a_store_of_another_format_or_with_a_changed_table_is_built_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = settings_for(write_rows(tmp_path / "rows.jsonl", ROWS))
    folder = prepare_data(config, Bytes()).folder
    files = files_of(folder)
    index = json.loads(files["index.json"])
    (folder / "index.json").write_text(json.dumps(index | {"format": 0}))
    assert prepare_data(config, Bytes()).folder == folder
    assert "the store has format 0, and this program reads 2" in capsys.readouterr().err
    assert files_of(folder) == files
    table = bytearray(files["train-prompts.npy"])
    table[-8] ^= 1  # one token more or less of the last prompt
    (folder / "train-prompts.npy").write_bytes(table)
    prepare_data(config, Bytes())
    assert "train-prompts.npy was changed on the disk" in capsys.readouterr().err
    assert files_of(folder) == files


def test_processes_write_the_same_bytes_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    imports = "from __future__ import annotations\nfrom tokenizer import Tokenizer\n"
    (tmp_path / "light_bytes.py").write_text(imports + inspect.getsource(Bytes))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tokenstore, "CHUNK_CHARACTERS", 100)
    config = settings_for(write_rows(tmp_path / "rows.jsonl", ROWS))
    one = prepare_data(config, Bytes())
    monkeypatch.setattr(dataset, "POOL_PAYS_BYTES", 0)
    config = dataclasses.replace(config, workers=2, cache=str(tmp_path / "other"))
    two = prepare_data(config, importlib.import_module("light_bytes").Bytes())
    assert one.folder.name == two.folder.name and files_of(one.folder) == files_of(two.folder)


# Batches


def test_labels_are_completions_only():
    tokens = np.array([[5, 6, 7, 8, 9, 1, 0]])
    ids = np.array([[0, 0, 0, 0, 1, 1, -1]])
    is_prompt = np.array([[True, True, False, False, True, False, False]])
    x = IGNORE_INDEX
    assert next_token_labels(tokens, ids, is_prompt).tolist() == [[x, 7, 8, x, 1, x]]


SIZES = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12)), min_size=1, max_size=25)


@settings(max_examples=80, deadline=None)
@given(
    sizes=SIZES,
    T=st.integers(3, 40),
    B=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    everywhere=st.booleans(),
)
def test_any_examples_are_packed_trimmed_and_bear_loss_where_they_should(
    sizes, T: int, B: int, seed: int, everywhere: bool
):
    """The ids of each are those of `trim_prompt` and of its whole completion."""
    with tempfile.TemporaryDirectory() as root:
        store = example_store(Path(root) / "s", sizes, shard_tokens=50)
        long = [n for n, (_, completion) in enumerate(sizes) if completion + 1 > T]
        if long:
            n = sizes[long[0]][1] + 1
            with pytest.raises(ValueError, match=rf"'d{long[0]}' has a completion of {n} .* row of {T} has"):
                Batches(store, B, T, seed)
            return
        trimmed = [prompt + completion + 2 > T + 1 for prompt, completion in sizes]
        assert is_trimmed(store, T).tolist() == trimmed
        shown = [example for batch in validation_batches(store, B, T) for example in examples_of(batch, T)]
        assert without_eos(shown) == sorted(map(tuple, slow_pass(sizes, T, everywhere=False)))

        wanted = sorted(map(tuple, slow_pass(sizes, T, everywhere)))
        batches = Batches(store, B, T, seed, loss_on_prompts=everywhere)
        steps = batches.steps_per_epoch
        rows = sum(int((b.document_ids[:, 0] >= 0).sum()) for b in validation_batches(store, B, T))
        for epoch in range(3):
            dealt = [batches.batch(epoch * steps + step) for step in range(steps)]
            got = without_eos([example for batch in dealt for example in examples_of(batch, T)])
            if rows % B == 0:
                assert got == wanted
            elif rows > B:  # the rows of the incomplete last batch are missing
                assert not Counter(got) - Counter(wanted) and steps == rows // B
            else:  # fewer rows than a batch repeat
                assert set(got) == set(wanted)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60), extra=st.integers(0, 30))
def test_rows_are_never_overfull_and_rarely_more_than_needed(lengths: list[int], extra: int):
    size = max(lengths) + extra
    row, start = best_fit(np.array(sorted(lengths, reverse=True)), size)
    pieces = zip(row, start, sorted(lengths, reverse=True), strict=True)
    taken = {(number, place) for number, begin, n in pieces for place in range(begin, begin + n)}
    assert len(taken) == sum(lengths) and max(p for _, p in taken) < size  # no overlap, nothing outside
    assert sorted(set(row)) == list(range(row.max() + 1))
    # Best fit opens a row only if the piece fits none: no two rows could be made one.
    used = np.bincount(row, sorted(lengths, reverse=True))
    assert len(used) == 1 or np.sort(used)[:2].sum() > size


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return example_store(tmp_path / "store", [(n * 7 % 11, n * 5 % 13 + 1) for n in range(150)])


def test_resuming_is_one_integer(store: TokenStore):
    straight = Batches(store, 4, 32, seed=1)
    n = straight.steps_per_epoch
    steps = [straight.batch(step) for step in range(3 * n)]
    for step in (0, n - 1, n, 2 * n + 1):
        assert same(Batches(store, 4, 32, seed=1).batch(step), steps[step])
    assert all(same(straight.batch(step), steps[step]) for step in reversed(range(len(steps))))


def test_every_epoch_and_seed_has_its_own_order_and_as_many_rows(store: TokenStore):
    batches = Batches(store, 4, 32, seed=1)
    n = batches.steps_per_epoch
    firsts = [batches.batch(0), batches.batch(n), Batches(store, 4, 32, seed=2).batch(0)]
    assert len({first.tokens.numpy().tobytes() for first in firsts}) == 3
    orders = [np.random.default_rng(seed).permutation(store.n_documents) for seed in range(20)]
    assert len({dataset._ExampleRows(store, order, 32).n_rows for order in orders}) == 1
    packed = [dataset._ExampleRows(store, order, 32) for order in orders]
    assert len({rows.documents.tobytes() for rows in packed}) > 1  # equal lengths change their places


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_hold_what_one_rank_holds(store: TokenStore, world_size: int):
    one = Batches(store, 8, 32, seed=3)
    ranks = [Batches(store, 8 // world_size, 32, 3, rank, world_size) for rank in range(world_size)]
    for step in range(2 * one.steps_per_epoch):
        parts = [batches.batch(step) for batches in ranks]
        assert same(one.batch(step), Batch(*(torch.cat(fields) for fields in zip(*parts, strict=True))))
    assert {batches.steps_per_epoch for batches in ranks} == {one.steps_per_epoch}


def test_an_example_as_long_as_a_row_fits_and_one_token_more_is_trimmed(tmp_path: Path):
    """Planted: 16 and 17 tokens, start and eos included; a row has 15 and the last target."""
    store = example_store(tmp_path / "store", [(5, 9), (5, 10)])
    assert is_trimmed(store, 15).tolist() == [False, True] and not is_trimmed(store, 16).any()
    rows = list(validation_batches(store, 1, 15))
    assert all(batch.labels.tolist()[0][-1] == EOS and (batch.document_ids == 0).all() for batch in rows)
    assert [batch.tokens.tolist()[0][:6] for batch in rows] == [
        [Characters.bos_id, 0, 1, 2, 3, 4],
        [Characters.bos_id, 15, 16, 17, 18, 19],
    ]
    assert not is_trimmed(range_store(tmp_path / "plain", [99, 1]), 4).any()  # plain text is cut


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_an_answer_that_cannot_fit_is_refused_with_file_and_line(tmp_path: Path, name: str):
    """Planted: a duplicate before it, so that it is not the document of that number."""
    rows = [{"prompt": f"p{n}", "completion": "x" * (40 if n in (7, 9) else 10)} for n in range(12)]
    path = write_rows(tmp_path / name, [rows[0], *rows])
    config = settings_for(path, validation_one_in=0)
    store = prepare_data(config, Bytes()).train
    refuse_long_answers(config, store, 41)
    with pytest.raises(ValueError) as error:
        refuse_long_answers(config, store, 40)
    assert str(error.value) == (
        f"{path} {'row' if name.endswith('parquet') else 'line'} 9 has a completion of 41 tokens with its "
        "end, the first of 2, and a row of 40 has room for 40: set --row_length to 41 or more (and "
        "--model.block_size, where no base brings its own), or make it shorter"
    )
    with pytest.raises(ValueError, match="'9' has a completion of 41 tokens"):
        next(validation_batches(store, 1, 40))


def test_truncation_on_the_right_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Planted: what most collators do. Neither the labels' guard nor the slow pass lets it through."""
    store = example_store(tmp_path / "store", [(12, 5), (3, 4)])
    right = dataset.shown

    def wrong(store: TokenStore, block_size: int) -> dataset.Shown:
        rows = right(store, block_size)
        return rows._replace(left=np.zeros_like(rows.left), prompt_length=store.prompt_lengths)

    def errors() -> tuple[int, int, int]:
        (batch,) = validation_batches(store, 3, 10)
        return prompt_errors(store, batch, Characters())

    assert errors() == (0, 0, 0)
    monkeypatch.setattr(dataset, "shown", wrong)
    assert errors() == (0, 1, 0)


def test_the_guard_of_labels_follows_the_setting(tmp_path: Path):
    store = example_store(tmp_path / "store", [(12, 5), (3, 4)])
    for everywhere in (False, True):
        batch = Batches(store, 3, 10, 0, loss_on_prompts=everywhere).batch(0)
        assert prompt_errors(store, batch, Characters(), everywhere) == (0, 0, 0)
        other = prompt_errors(store, batch, Characters(), not everywhere)
        assert other == ((3, 0, 0) if everywhere else (0, 0, 3))  # one row repeats
        batch.labels[:] = IGNORE_INDEX
        assert prompt_errors(store, batch, Characters(), everywhere)[1] > 0


# Filling in the middle

GAPS = [
    {
        "prefix": f"def f{n}(x):\n    ",
        "suffix": "\n    return y\n" * (n % 4),
        "middle": f"y = {n}" * (n % 3 + 1),
    }
    for n in range(60)
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_rows_with_a_gap_are_stored_as_generation_asks(tmp_path: Path, name: str):
    """Planted: texts that spell the markers, which must stay text."""
    rows = [
        *GAPS,
        {"prefix": "a<fim_middle>", "suffix": "<fim_prefix><fim_suffix>", "middle": "<fim_middle>b"},
    ]
    config = settings_for(write_rows(tmp_path / name, rows))
    prepared = prepare_data(config, STARCODER)
    markers = fim_markers(STARCODER)
    seen = 0
    numbers = dict.fromkeys(SPLITS, 0)
    for side, document in split_documents(config):
        store, n = getattr(prepared, side), numbers[side]
        numbers[side] += 1
        prompt, completion = stored_parts(store, n)
        assert document.prompt is not None and document.suffix is not None
        assert prompt == fim_prompt_ids(STARCODER, document.prompt, document.suffix)
        assert [id for id in prompt + completion if id in markers] == list(markers)
        assert completion == [*STARCODER.encode(document.text), STARCODER.eos_id]
        assert prompt[store.suffix_places[n]] == markers[1]
        assert store.byte_lengths[n] == len(document.text.encode())
        seen += "<fim_middle>" in document.prompt
    assert seen == 1 and sum(numbers.values()) == len(rows)
    assert all(
        store.n_documents == numbers[store.split] > 0
        for store in (prepared.train, prepared.validation, prepared.test)
    )


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(*[st.integers(0, 9)] * 2, st.integers(1, 9)), min_size=1, max_size=12),
    T=st.integers(13, 30),
)
def test_a_prompt_with_a_gap_keeps_what_is_near_the_gap(sizes: list[tuple[int, int, int]], T: int):
    with tempfile.TemporaryDirectory() as root:
        documents = [Document("d", "M" * m, "d", "ABCDEFGHI"[9 - p :], "RSTUVWXYZ"[:s]) for p, s, m in sizes]
        build_store(Path(root) / "s", [("train", d) for d in documents], STARCODER)
        store = TokenStore(Path(root) / "s", "train")
        shown = []
        for batch in validation_batches(store, 2, T):
            assert prompt_errors(store, batch, STARCODER) == (0, 0, 0)
            for tokens, labels, ids in zip(*(t.tolist() for t in batch[:3]), strict=True):
                for id in set(ids) - {-1}:
                    places = [place for place in range(T) if ids[place] == id]
                    shown.append([tokens[place] for place in places])
                    if labels[places[-1]] >= 0:
                        shown[-1].append(labels[places[-1]])
        wanted = []
        for n in range(store.n_documents):
            prompt, completion = stored_parts(store, n)
            kept = trim_fim_prompt(STARCODER, prompt, T + 1 - len(completion))
            wanted.append(kept + completion)
            prefix, suffix = STARCODER.decode(kept).removeprefix("<fim_prefix>").split("<fim_suffix>")
            suffix, end = suffix.split("<fim_middle>")
            document = documents[n]
            assert end == "" and (document.prompt or "").endswith(prefix)
            assert (document.suffix or "").startswith(suffix)
            if len(kept) < len(prompt):  # and each loses only while it is the longer one
                assert len(kept) + len(completion) == T + 1
                lost = len(prefix) < len(document.prompt or ""), len(suffix) < len(document.suffix or "")
                assert abs(len(prefix) - len(suffix)) <= 1 or lost == (
                    len(prefix) > len(suffix),
                    len(prefix) < len(suffix),
                )
        assert sorted(shown) == sorted(wanted)


def test_a_prompt_with_a_long_prefix_is_trimmed_as_any_other():
    start, *ids = fim_prompt_ids(STARCODER, "0123456789", "xy")
    assert start == STARCODER.start_id
    for length in range(7, len(ids) + 3):
        assert trim_fim_prompt(STARCODER, ids, length) == trim_prompt(ids, length, ids[0])
        kept = trim_fim_prompt(STARCODER, [start, *ids], length + 1)
        assert kept == [start, *trim_prompt(ids, length, ids[0])]
    assert len(trim_fim_prompt(STARCODER, [start, *ids], 4)) == 4 == fewest_gap_ids(STARCODER)
    with pytest.raises(ValueError, match=r"cannot be trimmed to 2 tokens; it has three markers$"):
        trim_fim_prompt(STARCODER, ids, 2)
    with pytest.raises(ValueError, match="cannot be trimmed to 3 tokens; it has three markers and a start"):
        trim_fim_prompt(STARCODER, [start, *ids], 3)


TEXTS = ["", "x", "\r\n", "a\r\n" * 30, "naïve 日本 🙂\n" * 9, "\ud83d\ude42" * 40, "<fim_middle>" * 5] + [
    f"def f{n}(x):\n    return x + {n}\n" for n in range(200)
]


@given(text=st.text(st.sampled_from("a\r\n\ud83d\ude42日🙂")), rate=st.floats(0, 1))
def test_a_gap_cuts_no_character_and_grows_with_the_rate(text: str, rate: float):
    gap = gap_of(text, 1.0)
    assert (gap is None) == (text == "") and gap_of(text, 0.0) is None and gap_of(text, rate) in (None, gap)
    if gap is not None:
        start, end = gap
        assert 0 <= start <= end <= len(text)
        for place in gap:
            assert text[place - 1 : place + 1] not in ("\r\n", "\ud83d\ude42") or not 0 < place < len(text)


def test_a_share_of_the_documents_has_a_gap_anywhere():
    gaps = [gap for n in range(4000) if (gap := gap_of(f"{n:0100}", 0.3)) is not None]
    assert abs(len(gaps) - 1200) < 120  # four standard deviations
    starts, ends = np.array(gaps).T
    assert abs(starts.mean() - 100 / 3) < 3 and abs(ends.mean() - 200 / 3) < 3
    assert starts.min() <= 2 and ends.max() >= 98
    assert gap_of("def f(x):\n    return x\n", 1.0) == (13, 17)  # on every machine, in every version


def test_plain_documents_get_gaps_and_stay_what_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [{"text": text, "path": f"p{n}"} for n, text in enumerate(TEXTS) if "\ud83d" not in text]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    config = settings_for(path, fim_rate=0.5)
    plain = prepare_data(settings_for(path), STARCODER)
    prepared = prepare_data(config, STARCODER)
    assert prepared.folder != plain.folder and prepared.fingerprint == plain.fingerprint
    assert files_of(prepared.folder)["validation-00000.bin"] == files_of(plain.folder)["validation-00000.bin"]
    assert prepared.train.byte_lengths.tolist() == plain.train.byte_lengths.tolist()
    assert not prepared.train.holds_examples and not prepared.train.prompt_lengths.any()
    markers = fim_markers(STARCODER)
    documents = [document for side, document in split_documents(config) if side == "train"]
    gaps = 0
    for n, document in enumerate(documents):
        ids = prepared.train.document(n)
        together = in_text_order(ids, markers)
        assert STARCODER.decode(together.tolist()) == document.text
        if document.gap is None:
            assert ids.tolist() == plain.train.document(n).tolist()
            continue
        gaps += 1
        start, end = document.gap
        asked = fim_prompt_ids(STARCODER, document.text[:start], document.text[end:])
        assert ids.tolist() == [*asked, *STARCODER.encode(document.text[start:end]), STARCODER.eos_id]
        assert [id for id in ids.tolist() if id in markers] == list(markers)
    assert prepared.report.gaps == gaps and len(documents) / 3 < gaps < len(documents) * 2 / 3
    every = [label for batch in validation_batches(prepared.train, 4, 16) for label in targets(batch)]
    assert sorted(every) == all_targets(prepared.train)  # loss everywhere, as plain text bears it
    whole = prepare_data(dataclasses.replace(config, fim_rate=1.0), STARCODER).folder
    for name in ("validation-00000.bin", "test-00000.bin"):
        assert files_of(whole)[name] == files_of(plain.folder)[name]

    # Planted: gaps on both sides.
    right = corpus.split_of
    monkeypatch.setattr(corpus, "split_of", lambda *args: Side(right(*args)))
    planted = prepare_data(dataclasses.replace(config, cache=str(tmp_path / "planted")), STARCODER)
    monkeypatch.undo()
    held_out = [planted.validation.document(n) for n in range(planted.validation.n_documents)]
    assert 1 in [gap_start(ids, markers) for ids in held_out]


@pytest.mark.parametrize("T", [8, 40, 400])
def test_gaps_in_sight_are_those_that_rows_show(tmp_path: Path, T: int):
    rows = [{"text": f"def f{n}(x):\n" + "    x += 1\n" * (n % 7), "path": f"p{n}"} for n in range(300)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    store = prepare_data(settings_for(path, fim_rate=0.7), STARCODER).train
    markers, seen, filled = fim_markers(STARCODER), 0, 0
    for seed in range(20):
        start = 0
        for number in np.random.default_rng(seed).permutation(store.n_documents).tolist():
            ids = store.document(number).tolist()
            if (lead := gap_start(ids, markers)) is not None:
                targets = start + np.arange(ids.index(markers[2]) + 1, len(ids))
                seen += int((start + lead >= (targets - 1) // T * T).sum())  # its row's first token
                filled += len(targets)
            start += len(ids)
    assert gaps_in_sight(store, markers, T) == pytest.approx(seen / filled, abs=0.03)


class Side(str):
    """A side of the split that passes for training where it is asked."""

    def __eq__(self, other: object) -> bool:
        return other == "train" or str.__eq__(self, other)

    __hash__ = str.__hash__


def test_markers_that_are_encoded_as_text_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Planted: the prompt as one string, which a tokenizer that keeps text text does not take for markers."""
    monkeypatch.setattr(
        tokenstore,
        "fim_prompt_ids",
        lambda tokenizer, prefix, suffix: tokenizer.encode(
            f"<fim_prefix>{prefix}<fim_suffix>{suffix}<fim_middle>"
        ),
    )
    with pytest.raises(ValueError):
        prepare_data(settings_for(write_rows(tmp_path / "rows.jsonl", GAPS)), STARCODER)


def test_gaps_without_tokens_are_refused_before_anything_is_read(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"tokens .*, so --data.fim_rate 0.5 cannot be had; leave it out, or u"
    ):
        prepare_data(settings_for(tmp_path / "no such file", fim_rate=0.5), Bytes())


def test_gaps_in_examples_are_refused(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"fim_rate is 0.5, and .*rows.jsonl holds examples, .* leave it out"
    ):
        one_row(tmp_path, GOOD, fim_rate=0.5)


def test_gaps_without_held_out_files_are_refused(tmp_path: Path):
    config = settings_for(
        write_rows(tmp_path / "rows.jsonl", [{"text": "a"}]), fim_rate=0.5, validation_one_in=0
    )
    with pytest.raises(ValueError, match=r"fim_rate is 0.5, and --data.validation_one_in 0 validates on the"):
        prepare_data(config, STARCODER)


@pytest.mark.parametrize("rows, changes", [(GAPS, {}), ([{"text": t} for t in TEXTS[7:]], {"fim_rate": 0.7})])
def test_processes_cut_the_same_gaps_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows, changes):
    monkeypatch.setattr(tokenstore, "CHUNK_CHARACTERS", 1000)
    config = settings_for(write_rows(tmp_path / "rows.jsonl", rows), **changes)
    one = prepare_data(config, STARCODER)
    monkeypatch.setattr(dataset, "POOL_PAYS_BYTES", 0)
    two = prepare_data(dataclasses.replace(config, workers=2, cache=str(tmp_path / "other")), STARCODER)
    assert one.folder.name == two.folder.name and files_of(one.folder) == files_of(two.folder)
    steps = [Batches(one.train, 2, 32, 1).batch(step) for step in range(6)]
    assert all(same(Batches(two.train, 2, 32, 1).batch(step), steps[step]) for step in (5, 0, 3))


def test_rows_with_equal_parts_but_another_suffix_are_no_duplicates(tmp_path: Path):
    rows = [{"prefix": "a", "suffix": s, "middle": "b"} for s in ("c", "c", "d")] + [
        {"prompt": "a", "completion": "b"}
    ]
    config = settings_for(write_rows(tmp_path / "rows.jsonl", rows), validation_one_in=0)
    report = Report()
    kept = [(d.prompt, d.suffix, d.text) for _, d in split_documents(config, report)]
    assert kept == [("a", "c", "b"), ("a", "d", "b"), ("a", None, "b")] and report.duplicates == 1
    assert list(training_texts(config)) == ["a", "c", "b", "a", "d", "b", "a", "b"]


@pytest.mark.parametrize("kind", ["examples", "plain"])
def test_a_limited_validation_makes_no_row_it_does_not_show(tmp_path: Path, monkeypatch, kind: str):
    make = {
        "examples": lambda: example_store(tmp_path / "s", [(3, 4)] * 100),
        "plain": lambda: range_store(tmp_path / "s", [90] * 10),
    }[kind]
    store = make()
    whole = list(validation_batches(store, 1, 8))
    made = []
    filled = dataset._filled
    monkeypatch.setattr(dataset, "_filled", lambda *args: made.append(1) or filled(*args))
    for limit in (1, 3, 7, len(whole) * 2 // 3, len(whole) - 1, len(whole), len(whole) + 5):
        made.clear()
        shown = list(validation_batches(store, 1, 8, limit))
        assert len(made) == len(shown) == min(limit, len(whole))
        places = [next(i for i, batch in enumerate(whole) if same(batch, one)) for one in shown]
        if kind == "plain":  # whose rows all differ
            steps = np.diff([*places, len(whole)])
            assert places[0] == 0 and (steps.max() - steps.min() <= 1 and steps.min() >= 1)
        for rows in (2, 3, 64):  # to a batch
            batches = list(validation_batches(store, rows, 8, limit))
            assert [len(batch.tokens) for batch in batches] == [rows] * -(-len(shown) // rows)
            assert [list(targets(batch)) for batch in batches] == [
                [t for one in shown[start : start + rows] for t in targets(one)]
                for start in range(0, len(shown), rows)
            ]
    with pytest.raises(ValueError, match="a validation of -1 rows"):
        next(validation_batches(store, 2, 8, -1))


# Training


@pytest.fixture
def gap_config(tmp_path: Path) -> Config:
    data.write_corpus(tmp_path / "long")
    STARCODER.save(tmp_path)
    config = small_config(tmp_path, {"data": {"fim_rate": 0.5}})
    return dataclasses.replace(config, tokenizer=TokenizerConfig("pretrained", path=str(tmp_path)))


def test_a_run_with_gaps_passes_every_guard(gap_config: Config, capsys: pytest.CaptureFixture[str]):
    manager = train(gap_config)
    store = manager.data.train
    markers = fim_markers(STARCODER)
    gaps = sum(gap_start(store.document(n), markers) is not None for n in range(store.n_documents))
    assert gaps and f"tokens; {gaps} with a gap to fill\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "owner, name, planted, fault",
    [
        (corpus, "split_of", lambda right: lambda *args: Side(right(*args)), "validation-differs: .* a gap"),
        (
            guards.same_path,
            "fim_prompt_ids",
            lambda right: lambda tokenizer, *parts: [tokenizer.start_id, *right(tokenizer, *parts)],
            "prompt-differs",
        ),
    ],
    ids=["held out", "start token"],
)
def test_a_fault_of_gaps_stops_the_run_by_name(
    gap_config: Config, monkeypatch: pytest.MonkeyPatch, owner, name: str, planted, fault: str
):
    """Planted: gaps in held-out files, and generation that puts a second start before the first marker."""
    monkeypatch.setattr(owner, name, planted(getattr(owner, name)))
    with pytest.raises(ValueError, match=fault):
        train(gap_config)


def test_rows_with_a_gap_train_are_trimmed_and_are_scored_where_they_bear_loss(tmp_path: Path):
    STARCODER.save(tmp_path)
    texts = [data.function(random.Random(n)) * 2 for n in range(60)]
    rows = [{"prefix": text[:60], "suffix": text[90:], "middle": text[60:90]} for text in texts]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    config = small_config(tmp_path, {"data": {"source": "rows.jsonl"}, "model": {"block_size": 100}})
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source=str(source)),
        tokenizer=TokenizerConfig("pretrained", path=str(tmp_path)),
    )
    manager = train(config)
    held_out = manager.data.validation
    assert is_trimmed(held_out, 100).any() and is_trimmed(manager.data.train, 100).any()
    scores = manager.validate()
    assert scores.tokens == held_out.n_targets
    assert ngram_scores(train_ngram(manager.data.train), held_out, 100)[0].tokens == scores.tokens


def test_a_resumed_run_with_gaps_equals_one_that_was_never_stopped(gap_config: Config, tmp_path: Path):
    config = dataclasses.replace(
        gap_config, optimizer=dataclasses.replace(gap_config.optimizer, schedule="constant")
    )

    def run(name: str, **changes: Any) -> Path:
        changed = dataclasses.replace(config.train, run=str(tmp_path / name), **changes)
        return train(dataclasses.replace(config, train=changed)).folder

    whole = run("whole", max_steps=6, validate_every=3)
    run("halves", max_steps=3, validate_every=3)
    assert run_difference(whole, run("halves", max_steps=6, validate_every=3, resume=True)) is None
    data = dataclasses.replace(config.data, fim_rate=0.4)
    other = dataclasses.replace(config.train, run=str(whole), resume=True, max_steps=7)
    with pytest.raises(ValueError, match=r"data.fim_rate was 0.5 when .* and is 0.4 now; set it back"):
        train(dataclasses.replace(config, data=data, train=other))


def test_labels_are_no_part_of_a_store(tmp_path: Path):
    config = settings_for(write_rows(tmp_path / "rows.jsonl", ROWS))
    everywhere = dataclasses.replace(config, loss_on="all")
    assert prepare_data(everywhere, Bytes()).folder == prepare_data(config, Bytes()).folder


def test_text_that_a_tokenizer_refuses_is_named_by_its_line(tmp_path: Path):
    rows = [GOOD, {"prompt": "a", "completion": "\ud800"}]
    config = settings_for(write_rows(tmp_path / "rows.jsonl", rows), validation_one_in=0)
    with pytest.raises(ValueError, match=r"rows.jsonl line 2 cannot be tokenised: .*surrogate"):
        prepare_data(config, STARCODER)


@pytest.mark.parametrize(
    "line, sentence",
    [
        (
            '{"prompt": "a", "completion": ',
            "line 3 is not JSON at column 31: Expecting value; write the row as one object in one line\n",
        ),
        (
            '{"prompt": "a"',
            "line 3 is not JSON at column 15: Expecting ',' delimiter; write the row as one object in one",
        ),
        ("[" * 100_000, "line 3 is not JSON: it is nested too deeply; write"),
        ('["a", "b"]', "line 3 is a JSON list, not an object"),
        ('{"prompt": "a"}', "line 3 has no field completion but prompt: "),
        ('{"prompt": "a", "completion": null}', "line 3 holds null in the field completion, not text"),
        ('{"prompt": "a", "completion": ""}', "line 3 holds nothing in the field completion, "),
        ('\n{"prompt": "a", "completion": "b"}', "line 3 is empty: remove it, "),
        ('{"prompt": "a", "completion": " b b b b b b b b b b"}', "line 3 has a completion of "),
    ],
)
def test_a_bad_line_ends_the_command_with_one_sentence_and_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, sentence: str
):
    path = tmp_path / "rows.jsonl"
    good = [f'{{"prompt": "a {n}", "completion": " b"}}\n' for n in range(40)]
    path.write_text("".join([*good[:2], line + "\n", *good[2:]]))
    config = small_config(tmp_path, {"data": {"source": "rows.jsonl"}, "model": {"block_size": 8}})
    shutil.rmtree(config.train.run)
    with pytest.raises(SystemExit) as stop:
        main(config)
    printed = capsys.readouterr().err
    assert (
        stop.value.code == 2 and printed.startswith(f"error: {path} {sentence}") and printed.count("\n") == 1
    )
    assert not Path(config.train.run).exists()


@pytest.mark.parametrize(("content", "lines"), [("", 0), ("\n  \n\n", 3)])
def test_a_file_without_a_row_is_one_sentence(tmp_path: Path, content: str, lines: int):
    path, one = tmp_path / "rows.jsonl", f"{json.dumps(GOOD)}\n"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        prepare_data(settings_for(path), Bytes())
    said = f"{path} has {lines} lines and no row in them"
    assert str(error.value) == (
        f"the corpus {path} holds no document: {said}: write some there, or name another --data.source"
    )
    path.rename(tmp_path / "train.jsonl")
    (tmp_path / "validation.jsonl").write_text(one)
    with pytest.raises(ValueError) as error:
        prepare_data(settings_for(tmp_path), Bytes())
    said = said.replace("rows.jsonl", "train.jsonl")
    assert f"text for train in none; {said}: add documents" in str(error.value)
