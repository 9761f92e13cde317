"""The data path: what is stored is what was read, and each token is a target where it should be, once.

Documents of `Ranges` are runs of consecutive integers, all different within a corpus: so `label == token + 1`
holds exactly where a label is the next token of the same document, and the labels of an epoch can be counted.
"""

from __future__ import annotations

import dataclasses
import errno
import gzip
import hashlib
import importlib
import inspect
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import sysconfig
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from config import DataConfig
from data import corpus, leaks, prepare, tokenstore
from data.corpus import read_documents, split_documents, split_of, training_texts
from data.documents import Document, Report
from data.tokenstore import TokenStore, build_store, open_store
from dataset import (
    IGNORE_INDEX,
    Batch,
    Batches,
    next_token_labels,
    prepare_data,
    validation_batches,
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


AWKWARD = ["", "a\r\nb\rc\n", "\ufefftext", "tab\t\f\x00nul", "naïve 日本 🙂", "no newline", "x = 1\n" * 300]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty files with unlike texts, some awkward, in two folders."""
    root = tmp_path / "corpus"
    (root / "sub").mkdir(parents=True)
    for n in range(40):
        text = AWKWARD[n] if n < len(AWKWARD) else f"def f{n}():\n    return {n}\n" * (n % 7 + 1)
        (root / ("sub" if n % 2 else ".") / f"file{n}.py").write_bytes(text.encode())
    return root


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
    """What holds in every row of consecutive integers, written without the code under test."""
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


# Reading


def test_importing_does_not_import_torch():
    code = "from data import tokenstore; import sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)


def test_a_folder_is_read_byte_exact_and_in_order(folder: Path):
    documents = list(read_documents(settings_for(folder)))
    names = [document.name for document in documents]
    assert names == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.py"))
    assert all(d.text.encode() == (folder / d.name).read_bytes() and d.group == d.name for d in documents)


def test_hidden_folders_other_suffixes_and_links_that_leave_are_skipped(folder: Path):
    names = [document.name for document in read_documents(settings_for(folder))]
    (folder / ".git").mkdir()
    (folder / ".git" / "hidden.py").write_text("hidden")
    (folder / "notes.txt").write_text("notes")
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "secret.py").write_text("secret")
    (folder / "left.py").symlink_to(outside / "secret.py")
    (folder / "left").symlink_to(outside)
    (folder / "round").symlink_to(folder)
    (folder / "broken.py").symlink_to(folder / "nothing.py")
    os.mkfifo(folder / "pipe.py")
    assert [document.name for document in read_documents(settings_for(folder))] == names
    (folder / "within.py").symlink_to(folder / "sub" / "file7.py")
    both = settings_for(folder, suffixes=(".py", ".txt"))
    added = ["notes.txt", "within.py"]
    assert [document.name for document in read_documents(both)] == sorted(names + added)


def test_the_standard_library_is_split_by_the_published_rule():
    """Without groups by text. Of a build that names one file twice, by a link, the first name stands."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "__pycache__"}
    sides: dict[str, list[str]] = {side: [] for side in corpus.SPLITS}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if left_out & set(path.relative_to(root).parts):
            continue
        if not path.is_symlink() or path.resolve().is_relative_to(root.resolve()):  # Debian has one to /etc
            scored = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0
            chosen_by = int(hashlib.sha1(name.encode()).hexdigest(), 16) % 10 == 0
            sides["test" if scored else "validation" if chosen_by else "train"].append(name)
    report = Report()
    got: dict[str, list[str]] = {side: [] for side in corpus.SPLITS}
    for side, document in split_documents(DataConfig(regroup=False), report):
        got[side].append(document.name)
    assert report.groups == 0
    for side in sides:
        assert set(got[side]) <= set(sides[side])
        assert report.kept[side] == len(got[side]) > 20
    assert report.documents == sum(map(len, sides.values()))
    assert report.documents == report.duplicates + sum(report.kept.values())
    for side in ("validation", "test"):
        assert report.kept_bytes[side] == sum((root / n).stat().st_size for n in got[side])


def leaked(config: DataConfig) -> list[leaks.Overlap]:
    """What the two held-out sides have of training, and test of validation."""
    sides: dict[str, list[Document]] = {side: [] for side in corpus.SPLITS}
    for side, document in split_documents(config):
        sides[side].append(document)
    train, validation, test = sides.values()
    return [leaks.overlap(train, validation + test), leaks.overlap(validation, test)]


def test_the_default_passes_the_guard_against_leaks_with_room(tmp_path: Path):
    """On whatever build of the library this interpreter has; the guard refuses above a quarter."""
    for found in leaked(DataConfig(cache=str(tmp_path))):
        assert max(found.leaked_share, found.duplicate_share) < 0.1 and found.groups == 0, found


def test_near_copies_of_the_library_stay_on_one_side_by_default(library: Path, tmp_path: Path):
    def sides_of_pages(config: DataConfig) -> set[str]:
        found = list(split_documents(dataclasses.replace(config, cache=str(tmp_path / "cache"))))
        assert len(found) == 64
        return {side for side, document in found if document.name.startswith("encodings/")}

    assert len(sides_of_pages(DataConfig())) == 1
    assert not any(found.refused for found in leaked(DataConfig(cache=str(tmp_path / "cache"))))
    # Without groups the guard refuses it, as it does a folder of one's own, whose default is the name.
    assert sides_of_pages(DataConfig(regroup=False)) == set(corpus.SPLITS)
    assert any(found.refused for found in leaked(DataConfig(regroup=False)))
    assert sides_of_pages(DataConfig(source=str(library))) == set(corpus.SPLITS)
    assert sides_of_pages(DataConfig(source=str(library), regroup=True)) == sides_of_pages(DataConfig())


def test_stores_of_the_library_differ_by_how_it_is_split(library: Path, tmp_path: Path):
    """An unset `regroup` is the same store as the value that it means, and another than the other one."""
    folders = {
        regroup: prepare_data(DataConfig(regroup=regroup, cache=str(tmp_path)), Bytes())
        for regroup in (None, True, False)
    }
    assert folders[None].folder == folders[True].folder != folders[False].folder
    assert folders[None].report.groups == 41 and folders[False].report.groups == 0


def write_rows(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode() + b"\n \n"
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_rows_are_read_alike_from_every_kind_of_file(tmp_path: Path, name: str):
    rows = [{"content": text + "!", "path": f"p{n}", "repo": n % 3} for n, text in enumerate(AWKWARD * 20)]
    source = write_rows(tmp_path / name, rows)
    documents = list(read_documents(settings_for(source, group_field="repo")))
    assert documents == [Document(row["path"], row["content"], str(row["repo"])) for row in rows]
    bare = [{"code": row["content"]} for row in rows]
    documents = list(read_documents(settings_for(write_rows(tmp_path / name, bare), text_field="code")))
    assert [d.text for d in documents] == [row["code"] for row in bare]
    if name.endswith(".parquet"):
        assert [d.name for d in documents] == [str(n + 1) for n in range(len(bare))]


def test_lone_surrogates_from_json_reach_the_store(tmp_path: Path):
    rows = [{"text": f"\ud800 {n}", "path": f"\udfff{n}"} for n in range(40)]
    prepared = prepare_data(settings_for(write_rows(tmp_path / "rows.jsonl", rows)), Bytes())
    assert Bytes().decode(prepared.train.document(0)).startswith("\ud800")
    assert prepared.train.names[0].startswith("\udfff")


def bad_folder(tmp_path: Path, text: bytes) -> Path:
    root = tmp_path / "bad"
    root.mkdir()
    (root / "good.py").write_text("good")
    (root / "ugly.py").write_bytes(text)
    return root


def folder_of(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).write_text("{}")
    return tmp_path


def sparse(path: Path) -> Path:
    """A file of a terabyte that takes no room."""
    with open(path, "wb") as file:
        file.truncate(2**40)
    return path


def bad_lines(tmp_path: Path, *lines: bytes) -> Path:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-20])
    return path


GOOD = b'{"text": "one"}'
BAD = {
    "missing": (lambda p: p / "none", {}, r"none does not exist: set --data.source"),
    "unknown kind": (
        lambda p: write_rows(p / "rows.txt", []),
        {},
        r"rows.txt is not a kind that can be read",
    ),
    "empty folder": (lambda p: p, {}, r"holds no document with a name ending in \.py"),
    "other files": (
        lambda p: folder_of(p, "a.js"),
        {},
        r"no document with a name ending in \.py but 1 with \.js: set --data\.suffixes \.js, or name another",
    ),
    "rows in files of no split": (
        lambda p: folder_of(p, "a.jsonl"),
        {},
        r"but 1 with \.jsonl: name one file of rows itself, or name another --data\.source",
    ),
    "empty file": (bad_lines, {}, r"holds no document: .*bad.jsonl has 0 lines and no row in them: write"),
    "latin-1": (
        lambda p: bad_folder(p, b"ab\xe9"),
        {},
        r"ugly.py is not UTF-8 at byte 2: .*skip_undecodable",
    ),
    "latin-1 line": (lambda p: bad_lines(p, GOOD, b"a\xff"), {}, r"line 2 is not UTF-8 at byte 17"),
    "broken JSON": (lambda p: bad_lines(p, GOOD, b'{"text'), {}, r"bad.jsonl line 2 is not JSON"),
    "two objects": (lambda p: bad_lines(p, GOOD + GOOD), {}, r"line 1 is not JSON at column 16: Extra"),
    "byte order mark": (lambda p: bad_lines(p, b"\xef\xbb\xbf" + GOOD), {}, r"line 1 is not JSON at .*BOM"),
    "deep JSON": (lambda p: bad_lines(p, GOOD, b"[" * 99_999), {}, r"bad.jsonl line 2 is not JSON"),
    "key twice": (
        lambda p: bad_lines(p, GOOD, b'{"text": "a", "meta": {"b": 1, "b": 2}}'),
        {},
        r"bad.jsonl line 2 has two readings: the key 'b' stands twice in it; leave one out",
    ),
    "empty line": (lambda p: bad_lines(p, GOOD, b"", b" ", GOOD), {}, r"line 2 is empty: remove it, or"),
    "not an object": (lambda p: bad_lines(p, b"[1]"), {}, r"line 1 is a JSON list, not an object"),
    "no text": (lambda p: bad_lines(p, b'{"b":1,"a":2}'), {}, r"no field text or content but a, b: set"),
    "text not text": (
        lambda p: bad_lines(p, b'{"text":null}'),
        {},
        r"line 1 holds null in the field text",
    ),
    "number": (
        lambda p: bad_lines(p, b'{"text":3}'),
        {},
        r"line 1 holds the int 3 in the field text, not text",
    ),
    "no fields": (lambda p: bad_lines(p, GOOD, b"{}"), {}, r"line 2 has no field text or content but no fi"),
    "loss on prompts": (
        lambda p: bad_lines(p, GOOD),
        {"loss_on": "all"},
        r"loss_on is all, and .* holds plain text, .* leave it out",
    ),
    "no such field": (lambda p: bad_lines(p, GOOD), {"text_field": "body"}, r"no field body but text: set"),
    "no group": (
        lambda p: bad_lines(p, GOOD),
        {"group_field": "repo"},
        r"nothing in the field repo .* text$",
    ),
    "group of files": (
        lambda p: bad_folder(p, b""),
        {"group_field": "repo"},
        r"group_field repo names a field",
    ),
    "cut gzip": (lambda p: cut(write_rows(p / "r.jsonl.gz", [{"text": "a"}])), {}, r"not a whole gzip file"),
    "cut Parquet": (lambda p: cut(write_rows(p / "r.parquet", [{"text": "a"}])), {}, r"not a whole Parquet"),
    "Parquet field": (
        lambda p: write_rows(p / "r.parquet", [{"b": "a"}]),
        {},
        r"r.parquet has no field text or",
    ),
    "one side": (
        lambda p: bad_folder(p, b"x"),
        {"validation_one_in": 1, "test_one_in": 0},
        r"leaves 0 train, 2 validation, 0 test documents, and text for train in none: .*_one_in 1, or",
    ),
    "no test": (
        lambda p: bad_folder(p, b"x"),
        {"validation_one_in": 0, "test_one_in": 10**6},
        r", 0 test documents, and text for test in none: change --data.test_one_in 1000000, or",
    ),
    "split in -1": (
        lambda p: bad_folder(p, b"x"),
        {"validation_one_in": -1},
        r"one_in is -1, and must be at",
    ),
    "no Python": (
        lambda p: bad_lines(p, GOOD),
        {"drop_comments": True},
        r"none of the 1 documents .* \*\.py",
    ),
}


@pytest.mark.parametrize("make, changes, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_in_one_sentence(tmp_path: Path, make, changes, message):
    config = settings_for(make(tmp_path), **changes)
    with pytest.raises(ValueError, match=message) as error:
        prepare_data(config, Bytes())
    assert "\n" not in str(error.value)
    assert not Path(config.cache).exists()
    with pytest.raises(ValueError, match=message):
        list(training_texts(config))


def test_undecodable_documents_are_skipped_and_counted_when_asked(tmp_path: Path):
    report = Report()
    config = settings_for(bad_folder(tmp_path, b"ab\xe9"), skip_undecodable=True)
    assert [d.name for d in read_documents(config, report)] == ["good.py"]
    assert (report.documents, report.undecodable) == (1, 1)
    values = pa.array([b"good", b"\xff", b"fine"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": values}), tmp_path / "rows.parquet")
    report = Report()
    config = settings_for(tmp_path / "rows.parquet", skip_undecodable=True)
    assert [(d.name, d.text) for d in read_documents(config, report)] == [("1", "good"), ("3", "fine")]
    assert (report.documents, report.undecodable) == (2, 1)


def test_comments_are_dropped_before_anything_else(tmp_path: Path):
    for name, text in {
        "a": "x = '#FF00AA'  # one\n",
        "b": "x = '#FF00AA'  # two\n",
        "c": "(# open\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    config = DataConfig(source=str(tmp_path), drop_comments=True)
    report = Report()
    a, b, c = read_documents(config, report)
    assert a.text == b.text and "#FF00AA" in a.text and "one" not in a.text
    assert c.text == "(# open\n" and report.unparsed == 1


# Split


def test_no_group_stands_on_both_sides_and_no_text_does(tmp_path: Path):
    """Planted: every text of a group of one side stands in a group of each other side too, in every order."""
    owners = [next(g for g in map(str, range(99)) if split_of(g, 4, 4) == side) for side in corpus.SPLITS]
    rows = [
        {"text": f"text {n} {order}", "repo": group}
        for order in itertools.permutations(owners)
        for n in range(5)
        for group in order
    ]
    report = Report()
    source = write_rows(tmp_path / "rows.jsonl", rows)
    texts: dict[str, set[str]] = {side: set() for side in corpus.SPLITS}
    groups: dict[str, set[str]] = {side: set() for side in corpus.SPLITS}
    for side, document in split_documents(settings_for(source, group_field="repo"), report):
        texts[side].add(document.text)
        groups[side].add(document.group)
    assert sum(map(len, texts.values())) == len(set().union(*texts.values())) == 30
    assert groups == {side: {owner} for side, owner in zip(corpus.SPLITS, owners, strict=True)}
    assert (report.documents, report.duplicates) == (90, 60)
    assert report.kept == dict.fromkeys(corpus.SPLITS, 10)


def test_the_test_side_does_not_depend_on_the_validation_side():
    names = [f"file{n}.py" for n in range(2000)]

    def side(test_one_in: int, validation_one_in: int, name: str) -> set[str]:
        return {n for n in names if split_of(n, validation_one_in, test_one_in) == name}

    tested = side(10, 10, "test")
    assert 140 < len(tested) < 260  # four standard deviations
    assert tested == side(10, 2, "test") == side(10, 0, "test") and side(20, 10, "test") < tested
    # What a run without the test side validated on or trained on stays so, but for what is test.
    for name in ("train", "validation"):
        assert side(10, 10, name) == side(0, 10, name) - tested
    # Independent of each other: a tenth of the validation files are test, not all of them and not none.
    assert 4 < len(side(0, 10, "validation") & tested) < 40


def test_files_named_by_their_side_give_the_split(tmp_path: Path):
    """Planted: a text of the test file stands in training too, which loses it."""
    source = tmp_path / "rows"
    source.mkdir()
    write_rows(source / "train-00000-of-00002.jsonl", [{"text": f"train {n}"} for n in range(20)])
    write_rows(source / "train-00001-of-00002.jsonl.gz", [{"text": "test 3"}, {"text": "train too"}])
    write_rows(source / "test.parquet", [{"text": f"test {n}"} for n in range(9)])
    (source / "README.md").write_text("text")

    def sides(report: Report | None = None, **changes) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {side: [] for side in corpus.SPLITS}
        for side, document in split_documents(settings_for(source, **changes), report):
            found[side].append(document.text)
        return found

    found, report = sides(), Report()
    assert found["test"] == [f"test {n}" for n in range(9)]
    assert len(found["validation"]) > 1 and sorted(found["train"] + found["validation"]) == sorted(
        [f"train {n}" for n in range(20)] + ["train too"]
    )
    write_rows(source / "validation.jsonl", [{"text": f"validation {n}"} for n in range(4)])
    found = sides(report)
    assert found["validation"] == [f"validation {n}" for n in range(4)] and len(found["train"]) == 21
    assert (report.documents, report.duplicates, report.kept["test"]) == (35, 1, 9)
    # The same rows on another side are other data.
    (source / "validation.jsonl").rename(source / "train-00002.jsonl")
    sides(again := Report())
    (source / "train-00002.jsonl").rename(source / "train-00002-of-00003.jsonl")
    sides(moved := Report())
    assert len({report.fingerprint, again.fingerprint, moved.fingerprint}) == 3
    with pytest.raises(ValueError, match=r"--data.regroup is set, and .*rows gives the split itself"):
        sides(regroup=True)
    (source / "test.parquet").unlink()  # training files alone are no split
    with pytest.raises(ValueError, match=r"holds no document with a name ending in \.py"):
        sides()


def test_the_tokenizer_never_sees_validation(folder: Path):
    config = settings_for(folder)
    prepared = prepare_data(config, Bytes())
    assert list(training_texts(config)) == [
        Bytes().decode(prepared.train.document(n)) for n in range(prepared.train.n_documents)
    ]


# Store


def test_the_store_holds_every_document_byte_for_byte(folder: Path):
    prepared = prepare_data(settings_for(folder), Bytes())
    seen = []
    for side in (prepared.train, prepared.validation, prepared.test):
        for n, name in enumerate(side.names):
            data = (folder / name).read_bytes()
            assert side.document(n).tolist() == [256, *data, 257]
            assert side.byte_lengths[n] == len(data) and split_of(name, 4, 4) == side.split
        assert side.n_bytes == sum((folder / name).stat().st_size for name in side.names)
        assert side.n_tokens == side.n_bytes + 2 * side.n_documents and side.pad_id == 258
        assert prepared.report.kept[side.split] == side.n_documents > 0
        assert prepared.report.kept_bytes[side.split] == side.n_bytes
        assert side.fingerprint == prepared.fingerprint and side.tokenizer_fingerprint == "bytes"
        seen += side.names
    assert sorted(seen) == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.py"))


def files_of(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


def test_processes_write_the_same_bytes_as_one(folder: Path, monkeypatch: pytest.MonkeyPatch):
    # Workers import the tokenizer's module; this one would make each of them import torch.
    imports = "from __future__ import annotations\nfrom tokenizer import Tokenizer\n"
    (folder / "light.py").write_text(imports + inspect.getsource(Bytes) + inspect.getsource(OutOfRange))
    monkeypatch.syspath_prepend(folder)
    light = importlib.import_module("light")
    monkeypatch.setattr(tokenstore, "CHUNK_CHARACTERS", 100)
    one = prepare_data(settings_for(folder), Bytes())
    monkeypatch.setattr(prepare, "POOL_PAYS_BYTES", 0)
    elsewhere = dataclasses.replace(settings_for(folder, workers=2), cache=str(folder / "cache"))
    two = prepare_data(elsewhere, light.Bytes())
    assert one.folder.name == two.folder.name and one.folder != two.folder
    assert files_of(one.folder) == files_of(two.folder)
    with pytest.raises(ValueError, match="gave the id 259"):
        build_store(folder / "d", split_documents(settings_for(folder)), light.OutOfRange(259), workers=2)


def test_workers_do_not_run_the_caller_s_script_again(folder: Path):
    """The script has no `if __name__ == "__main__":`, and its tokenizer comes from a module."""
    imports = "from __future__ import annotations\nfrom tokenizer import Tokenizer\n"
    (folder / "light.py").write_text(imports + inspect.getsource(Bytes))
    (folder / "script.py").write_text(
        "import light; from data.corpus import *; from data.tokenstore import *; print('once')\n"
        "documents = (('train', d) for d in read_documents(DataConfig(source='sub')))\n"
        "build_store('store', documents, light.Bytes(), workers=2)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "once\n" and open_store(folder / "store")[0].n_documents == 20


def test_shards_hold_the_same_stream(tmp_path: Path):
    lengths = [5, 3, 9, 2, 40, 1, 7, 7]
    whole, parts = range_store(tmp_path / "a", lengths), range_store(tmp_path / "b", lengths, shard_tokens=10)
    sizes = [p.stat().st_size // 4 for p in sorted((tmp_path / "b").glob("train-0*.bin"))]
    assert sizes == [
        8,
        9,
        2,
        40,
        8,
        7,
    ]  # closed before a document that does not fit; one is larger than a shard
    everything = np.arange(whole.n_tokens)
    np.random.default_rng(0).shuffle(everything)
    assert (whole.gather(everything) == parts.gather(everything)).all()
    for a, b in zip(validation_batches(whole, 2, 8), validation_batches(parts, 2, 8), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_ids_take_two_bytes_while_they_fit(tmp_path: Path, vocab_size: int, dtype: str):
    tokenizer = Ranges()
    tokenizer.vocab_size = vocab_size
    last = f"{vocab_size - 3} {vocab_size}"
    build_store(tmp_path / "s", [("train", Document("d", last, "d"))], tokenizer)
    store, empty, _ = open_store(tmp_path / "s")
    assert store.dtype.str == dtype and store.document(0).tolist() == list(range(*map(int, last.split())))
    assert empty.n_documents == empty.n_tokens == 0


@pytest.mark.parametrize("wrong", [-1, 259, 65536, 2**40])
def test_an_id_outside_the_vocabulary_is_refused(folder: Path, wrong: int):
    config = settings_for(folder)
    with pytest.raises(ValueError, match=rf"the id {wrong} in .*/file\d+.py, outside its vocabulary of 259"):
        prepare_data(config, OutOfRange(wrong))
    assert list(Path(config.cache).iterdir()) == []


def forbidden() -> None:
    raise AssertionError("the tokenizer was called, so the store was not reused")


def test_the_store_is_reused_only_for_the_same_data_tokenizer_and_settings(folder: Path):
    config = settings_for(folder)
    first = prepare_data(config, Bytes())
    for same in (config, dataclasses.replace(config, workers=2)):
        assert prepare_data(same, Hooked(forbidden)).folder == first.folder
    moved = folder.rename(folder.parent / "moved")
    config = dataclasses.replace(config, source=str(moved))
    assert prepare_data(config, Hooked(forbidden)).folder == first.folder

    changed = Bytes()
    changed.fingerprint = "other"
    folders = [first.folder, prepare_data(config, changed).folder]
    folders.append(prepare_data(dataclasses.replace(config, validation_one_in=3), Bytes()).folder)

    # D5 of the seeds: same name, same length, same time, one other byte.
    path = moved / "sub" / "file39.py"
    before, data = path.stat(), bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    new = prepare_data(config, Bytes())
    assert new.fingerprint != first.fingerprint
    assert new.train.names == first.train.names and new.test.names == first.test.names
    folders.append(new.folder)
    (moved / "file0.py").rename(moved / "file00.py")  # the same texts in the same order, by another name
    folders.append(prepare_data(config, Bytes()).folder)
    assert len(set(folders)) == len(folders)


def cut_shard(store: Path) -> None:
    os.truncate(store / "train-00000.bin", 100)


def flip_train(store: Path, name: str = "train-00000.bin") -> None:
    data = bytearray((store / name).read_bytes())
    data[7] ^= 1
    (store / name).write_bytes(data)


def flip_validation(store: Path) -> None:
    flip_train(store, "validation-00000.bin")


def remove(name: str):
    return lambda store: (store / name).unlink()


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut_shard, r"train-00000.bin has 100 bytes of \d+"),
        (flip_train, "train-00000.bin was changed on the disk"),
        (flip_validation, "validation-00000.bin was changed on the disk"),
        (remove("train-offsets.npy"), "No such file"),
        (remove("index.json"), "No such file"),
        (lambda store: (store / "index.json").write_text("{}"), "it lacks 'format'"),
        (lambda store: (store / "index.json").write_text("{"), "Expecting property name"),
    ],
)
def test_a_damaged_store_is_refused_and_built_again(
    folder: Path, damage, message: str, capsys: pytest.CaptureFixture[str]
):
    config = settings_for(folder)
    store = prepare_data(config, Bytes()).folder
    files = files_of(store)
    damage(store)
    if damage not in (flip_train, flip_validation):  # a full check would read every byte of a large store
        with pytest.raises(ValueError, match=f"is not a whole token store .*{message}"):
            open_store(store)
    capsys.readouterr()
    assert prepare_data(config, Bytes()).folder == store
    assert re.fullmatch(f"warning: .*{message}.*; it is made again\n", capsys.readouterr().err)
    assert files_of(store) == files


def test_a_builder_that_comes_second_uses_the_first_one_s_store(folder: Path):
    config = settings_for(folder)
    first = []
    second = prepare_data(config, Hooked(lambda: first.append(prepare_data(config, Bytes()))))
    assert second.folder == first[0].folder
    assert list(Path(config.cache).iterdir()) == [second.folder]
    assert (second.train.document(0) == first[0].train.document(0)).all()


def test_a_corpus_that_changes_while_it_is_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenstore, "CHUNK_CHARACTERS", 1)
    config = settings_for(folder)
    with pytest.raises(ValueError, match="changed while it was read"):
        prepare_data(config, Hooked(lambda: (folder / "sub" / "file9.py").write_text("new")))
    assert list(Path(config.cache).iterdir()) == []


def test_a_full_disk_is_said_in_one_sentence_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    config = settings_for(folder)
    with pytest.raises(
        OSError, match=r"^no space left for the token store in .*: free some, or set --data.cache"
    ):
        prepare_data(config, Bytes())
    assert list(Path(config.cache).iterdir()) == []


# Batches


def test_labels_stop_at_the_ends_of_documents_and_at_padding():
    tokens = np.array([[5, 6, 7, 8, 9, 0, 0]])
    ids = np.array([[0, 0, 1, 1, 2, -1, -1]])
    x = IGNORE_INDEX
    assert next_token_labels(tokens, ids).tolist() == [[6, x, 8, x, x, x]]


def test_tokens_are_gathered_from_any_places(tmp_path: Path):
    """Places that come twice do not make up for those between two that are not asked for."""
    store = range_store(tmp_path / "s", [9, 700], shard_tokens=50)
    tokens = store.gather(np.arange(store.n_tokens))
    draw = np.random.default_rng(0)
    for most in (3, 9, 600):
        for _ in range(200):
            where = np.cumsum(draw.integers(0, most, 8)) % store.n_tokens
            where = where[draw.permutation(8)] if most == 9 else where
            assert store.gather(where).tolist() == tokens[where].tolist()
    where = np.array([0, 1, 3, 4, 1, 2, 2, 3])
    assert store.gather(where).tolist() == tokens[where].tolist()


@settings(max_examples=60, deadline=None)
@example(lengths=[5], T=1, B=4, seed=6)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) > 1),
    T=st.integers(1, 40),
    B=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_any_documents_are_packed_right(lengths: list[int], T: int, B: int, seed: int):
    with tempfile.TemporaryDirectory() as root:
        store = range_store(Path(root) / "s", lengths, shard_tokens=50)
        wanted = all_targets(store)
        got = []
        for batch in validation_batches(store, B, T):
            check_rows(batch, B, T)
            got += targets(batch)
        assert got == wanted  # once each, and in order

        batches = Batches(store, B, T, seed)
        rows = -(-(store.n_tokens - 1) // T)
        assert batches.steps_per_epoch == max(1, rows // B)
        counts = Counter()
        for step in range(batches.steps_per_epoch):
            batch = batches.batch(step)
            check_rows(batch, B, T)
            counts.update(targets(batch))
        if rows % B == 0:
            assert sorted(counts.elements()) == wanted
        elif rows > B:
            assert set(counts) <= set(wanted) and max(counts.values(), default=1) == 1
            assert len(wanted) - len(counts) <= rows % B * T
        else:
            assert sorted(counts) == wanted


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return range_store(tmp_path / "store", [n * 37 % 101 + 1 for n in range(64)])


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_resuming_is_one_integer(store: TokenStore):
    straight = Batches(store, 4, 32, seed=1)
    steps = [straight.batch(step) for step in range(3 * straight.steps_per_epoch)]
    for step in (0, 1, straight.steps_per_epoch, 2 * straight.steps_per_epoch + 3):
        assert same(Batches(store, 4, 32, seed=1).batch(step), steps[step])
    backwards = Batches(store, 4, 32, seed=1)
    assert all(same(backwards.batch(step), steps[step]) for step in reversed(range(len(steps))))
    assert same(pickle.loads(pickle.dumps(straight)).batch(5), steps[5])
    assert len(pickle.dumps(store)) < 1000


def test_every_epoch_and_seed_has_its_own_order(store: TokenStore):
    batches = Batches(store, 4, 32, seed=1)
    n = batches.steps_per_epoch
    firsts = [batches.batch(0), batches.batch(n), Batches(store, 4, 32, seed=2).batch(0)]
    assert len({first.tokens.numpy().tobytes() for first in firsts}) == 3


def test_the_rows_of_one_large_document_are_dealt_out_of_order(tmp_path: Path):
    batch = Batches(range_store(tmp_path / "store", [10_000]), 16, 32, seed=0).batch(0)
    assert (batch.tokens[1:, 0] != batch.tokens[:-1, 0] + 32).any()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_hold_what_one_rank_holds(store: TokenStore, world_size: int):
    one = Batches(store, 8, 32, seed=3)
    ranks = [Batches(store, 8 // world_size, 32, 3, rank, world_size) for rank in range(world_size)]
    for step in range(2 * one.steps_per_epoch):
        parts = [batches.batch(step) for batches in ranks]
        together = Batch(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
        assert same(one.batch(step), together)
    assert {batches.steps_per_epoch for batches in ranks} == {one.steps_per_epoch}


def test_a_corpus_smaller_than_a_batch_repeats_to_fill_it(tmp_path: Path):
    store = range_store(tmp_path / "store", [20, 21])
    batches = Batches(store, 8, 16, seed=0)
    assert batches.steps_per_epoch == 1
    for step in range(3):
        batch = batches.batch(step)
        check_rows(batch, 8, 16)
        assert sorted(set(targets(batch))) == all_targets(store)
        assert {-1, 0, 1} >= set(batch.document_ids.unique().tolist())


def test_padding_is_the_tokenizer_s_and_bears_no_loss(folder: Path):
    validation = prepare_data(settings_for(folder), Bytes()).validation
    *_, last = validation_batches(validation, 4, 64)
    padded = last.document_ids == -1
    assert padded.any() and (last.tokens[padded] == 258).all() and (last.labels[padded] == IGNORE_INDEX).all()
    ends = last.tokens == 257  # the end of a document is learned, and predicts nothing
    assert (last.labels == 257).any() and (last.labels[ends] == IGNORE_INDEX).all()


@pytest.mark.parametrize("B, T", [(1, 1), (3, 7), (4, 64), (16, 256), (2, 100_000)])
def test_validation_scores_every_byte_once(folder: Path, B: int, T: int):
    validation = prepare_data(settings_for(folder), Bytes()).validation
    scored = [t for batch in validation_batches(validation, B, T) for t in targets(batch)]
    files = b"".join((folder / name).read_bytes() for name in validation.names)
    assert bytes(t for t in scored if t < 256) == files
    assert scored.count(257) == validation.n_documents and scored.count(256) == 0


def test_bad_sizes_are_refused(store: TokenStore, tmp_path: Path):
    for changes in ({"batch_size": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}, {"block_size": 0}):
        with pytest.raises(ValueError, match=r"needs? a"):
            Batches(**{"store": store, "batch_size": 2, "block_size": 8, "seed": 0, **changes})
    with pytest.raises(ValueError, match="rows of 8 tokens cannot be cut from the 1 of the train store"):
        Batches(range_store(tmp_path / "one", [1]), 2, 8, 0)
    with pytest.raises(ValueError, match="at least 1"):
        next(validation_batches(store, 0, 8))


def test_a_tokenizer_that_loses_text_is_refused_by_name(tmp_path: Path):
    documents = [("train", Document("a.py", "x = 1\n", "a")), ("train", Document("b.py", "y = None\n", "b"))]
    with pytest.raises(
        ValueError, match=r"b\.py comes back different from character 4 on, 'none.*' instead of 'None"
    ):
        build_store(tmp_path / "store", documents, Lossy(), workers=1)


def test_a_tokenizer_without_bos_starts_documents_with_eos(tmp_path: Path):
    tokenizer = Bytes()
    tokenizer.bos_id = None
    build_store(tmp_path / "store", [("train", Document("a", "hi", "a"))], tokenizer, workers=1)
    assert open_store(tmp_path / "store")[0].document(0).tolist() == [257, *b"hi", 257]
    with pytest.raises(ValueError, match="neither bos nor eos"):
        prepare_data(DataConfig(source=str(tmp_path)), Startless())


def test_a_cache_keyed_too_loosely_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The fault of a cache keyed by folder and size: the store is compared with the data, and built again."""
    monkeypatch.setattr(prepare, "_store_key", lambda *args: "0" * 64)
    source = tmp_path / "corpus"
    source.mkdir()
    config = DataConfig(
        str(source), (".txt",), validation_one_in=2, test_one_in=0, cache=str(tmp_path / "cache")
    )
    for i in range(8):
        (source / f"{i}.txt").write_text(f"text {i}")
    prepare_data(config, Bytes())
    for i in range(8):
        (source / f"{i}.txt").write_text(f"data {i}")
    again = prepare_data(config, Bytes())
    assert "index.json says that data is " in capsys.readouterr().err
    assert Bytes().decode(again.train.document(0).tolist()).startswith("data ")


def test_regrouped_documents_that_belong_together_stay_on_one_side(tmp_path: Path):
    """Twelve texts, each in four variants that differ by a word; by name they stand in both splits."""
    rows = []
    for i in range(12):
        words = [f"w{(i * 37 + j * j * (i + 3)) % 1009}" for j in range(80)]
        rows += [{"text": " ".join([*words, f"variant{v}"]), "name": f"{i}-{v}.py"} for v in range(4)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    sides: dict[bool, list[set[str]]] = {}
    for regroup in (False, True):
        cache = str(tmp_path / "cache")
        config = DataConfig(str(path), validation_one_in=3, test_one_in=3, regroup=regroup, cache=cache)
        found: dict[str, set[str]] = {}
        for side, document in split_documents(config):
            found.setdefault(document.name.split("-")[0], set()).add(side)
        sides[regroup] = list(found.values())
    assert any(len(both) == 3 for both in sides[False])
    assert all(len(both) == 1 for both in sides[True])


def test_groups_are_found_once_for_the_same_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    right, calls = leaks.regroup, []

    def counted(documents: list[Document]) -> list[str]:
        calls.append(len(documents))
        return right(documents)

    monkeypatch.setattr(leaks, "regroup", counted)
    rows = [{"text": f"text of document {n} " * 9, "path": f"p{n}"} for n in range(40)]
    config = settings_for(write_rows(tmp_path / "rows.jsonl", rows), regroup=True)
    first = list(split_documents(config))
    assert list(split_documents(config)) == first and calls == [40]
    prepare_data(config, Bytes())
    assert calls == [40]
    # A damaged file is made again, and other documents have groups of their own.
    (file,) = Path(config.cache).glob("groups-*.json")
    for damaged in (b"[", json.dumps(["p0"] * 39).encode(), json.dumps([0] * 40).encode(), b"\xff"):
        file.write_bytes(damaged)
        assert list(split_documents(config)) == first
    assert calls == [40] * 5
    write_rows(tmp_path / "rows.jsonl", [rows[0] | {"text": "other"}, *rows[1:]])
    assert next(d.text for _, d in split_documents(config)) == "other" and len(calls) == 6


@pytest.mark.parametrize("kind", ["gz", "sparse rows", "sparse file"])
def test_what_no_memory_holds_is_told_by_name_with_both_numbers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("config.files.MOST_BYTES", 2**20)
    monkeypatch.setattr(corpus, "MOST_BYTES", 2**20)
    if kind == "gz":
        path = tmp_path / "bomb.jsonl.gz"
        path.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "' + b"a" * 2**24))
        said = f"{path} line 2 has more than 1,048,576 bytes, the most of a row: check"
    elif kind == "sparse rows":
        path = sparse(tmp_path / "rows.jsonl")
        said = f"{path} line 1 has more than 1,048,576 bytes, the most of a row: check"
    else:
        path = tmp_path
        said = (
            f"{sparse(tmp_path / 'a.py')} has 1,099,511,627,776 bytes, and a document may have 1,048,576: cut"
        )
    tracemalloc.start()
    with pytest.raises(ValueError, match=re.escape(said)):
        list(corpus.read_documents(DataConfig(source=str(path))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24, "no more is read than it takes to know"
