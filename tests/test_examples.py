"""Examples, a prompt and its completion: reading, storing, and that only completions are targets."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import (
    EOS,
    PAD,
    Bytes,
    Characters,
    Lossy,
    example_store,
    files_of,
    one_row,
    range_store,
    same,
    settings_for,
    stored_parts,
    targets,
    write_rows,
)
from test_generate_command import STARCODER

import dataset
from data import prepare, tokenstore
from data.corpus import read_documents, split_documents, training_texts
from data.documents import SPLITS, Document, Report
from data.rows import alpaca_prompt
from data.tokenstore import TokenStore, open_store
from dataset import (
    IGNORE_INDEX,
    ROW_STEP,
    Batch,
    Batches,
    best_fit,
    fitting_row,
    is_trimmed,
    next_token_labels,
    prepare_data,
    refuse_long_answers,
    validation_batches,
)
from generation.text import trim_prompt
from guards.labels import prompt_errors
from selftest.run import small_config
from suites.stored import text_of_example
from tokenization.healing import healed
from tokenizer import BPETokenizer, CodeTokenizer, Tokenizer
from trainingmanager import main

ROWS = [
    {"prompt": f"def f{n}(x):\n    ", "completion": "return x\n" * (n % 5 + 1) + f"# é{n}"} for n in range(60)
]


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
        {"test_one_in": 0},  # Of the equal rows one stays.
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
    assert "\n" not in str(error.value)
    assert not [path for path in Path(config.cache).glob("*") if path.is_dir()]


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
def test_a_row_that_fits_holds_the_longest_example_of_any_split_whole(tmp_path: Path, letters: int, row: int):
    rows = [{"prompt": f"{n:03}", "completion": "b"} for n in range(40)]
    rows[7]["completion"] = "b" * letters
    splits = prepare_data(settings_for(write_rows(tmp_path / "rows.jsonl", rows)), Bytes())
    stores = (splits.train, splits.validation, splits.test)
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


def test_completions_of_one_prompt_stay_in_one_split(tmp_path: Path):
    """Planted: rows without a name, ten completions to a prompt. The row's number would deal them out."""
    rows = [{"prompt": f"p{n % 20}", "completion": f"c{n}"} for n in range(200)]
    splits: dict[str, set[str]] = {split: set() for split in SPLITS}
    for split, document in split_documents(settings_for(write_rows(tmp_path / "rows.jsonl", rows))):
        assert document.prompt
        splits[split].add(document.prompt)
    assert sum(map(len, splits.values())) == 20 and all(splits.values())
    rows = [{"prompt": "", "completion": f"c{n}"} for n in range(200)]  # no prompt at all keeps none together
    reports = Report()
    list(split_documents(settings_for(write_rows(tmp_path / "rows.jsonl", rows)), reports))
    assert all(reports.kept.values())


def test_the_tokenizer_learns_both_parts_of_train_only(tmp_path: Path):
    config = settings_for(write_rows(tmp_path / "rows.jsonl", ROWS))
    expected = []
    for split, document in split_documents(config):
        expected += [document.prompt, document.text] if split == "train" else []
    assert list(training_texts(split_documents(config))) == expected and len(expected) < 2 * len(ROWS)


# Store


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
    wanted: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for split, document in split_documents(config):
        wanted[split].append(document)
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
    tables = {f"{split}-{name}" for split in SPLITS for name in ("bytes.npy", "names.jsonl", "offsets.npy")}
    assert set(files_of(tmp_path / "plain")) == {"index.json", "train-00000.bin", *tables}
    store = example_store(tmp_path / "examples", [(3, 2), (0, 1)])
    assert store.holds_examples and store.prompt_lengths.tolist() == [4, 1] and store.n_targets == 5
    (tmp_path / "examples" / "train-prompts.npy").unlink()
    with pytest.raises(ValueError, match="not a whole token store"):  # It is never taken for plain text.
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
    monkeypatch.setattr(prepare, "POOL_PAYS_BYTES", 0)
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
    ranks = [Batches(store, 8, 32, 3, rank, world_size) for rank in range(world_size)]
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
        if kind == "plain":  # Rows of plain text all differ.
            steps = np.diff([*places, len(whole)])
            assert places[0] == 0 and (steps.max() - steps.min() <= 1 and steps.min() >= 1)
        for rows in (2, 3, 64):  # rows of a batch
            batches = list(validation_batches(store, rows, 8, limit))
            assert [len(batch.tokens) for batch in batches] == [rows] * -(-len(shown) // rows)
            assert [list(targets(batch)) for batch in batches] == [
                [t for one in shown[start : start + rows] for t in targets(one)]
                for start in range(0, len(shown), rows)
            ]
    with pytest.raises(ValueError, match="a validation of -1 rows"):
        next(validation_batches(store, 2, 8, -1))


# Training


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
