"""Documents of a source: reading and splitting."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import sysconfig
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import AWKWARD
from stores import Bytes, settings_for, write_rows

from config import DataConfig
from config.files import REPOSITORY
from data import corpus, leaks
from data.corpus import read_documents, split_documents, split_of, training_texts
from data.documents import Document, Report
from dataset import (
    prepare_data,
)


def test_importing_does_not_import_torch():
    code = "from data import tokenstore; import sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


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
    splits: dict[str, list[str]] = {split: [] for split in corpus.SPLITS}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if left_out & set(path.relative_to(root).parts):
            continue
        if not path.is_symlink() or path.resolve().is_relative_to(root.resolve()):  # Debian has one to /etc
            scored = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0
            chosen_by = int(hashlib.sha1(name.encode()).hexdigest(), 16) % 10 == 0
            splits["test" if scored else "validation" if chosen_by else "train"].append(name)
    report = Report()
    got: dict[str, list[str]] = {split: [] for split in corpus.SPLITS}
    for split, document in split_documents(DataConfig(regroup=False), report):
        got[split].append(document.name)
    assert report.groups == 0
    for split in splits:
        assert set(got[split]) <= set(splits[split])
        assert report.kept[split] == len(got[split]) > 20
    assert report.documents == sum(map(len, splits.values()))
    assert report.documents == report.duplicates + sum(report.kept.values())
    for split in ("validation", "test"):
        assert report.kept_bytes[split] == sum((root / n).stat().st_size for n in got[split])


def leaked(config: DataConfig) -> list[leaks.Overlap]:
    """Overlaps of the two held-out splits with training, and of test with validation."""
    splits: dict[str, list[Document]] = {split: [] for split in corpus.SPLITS}
    for split, document in split_documents(config):
        splits[split].append(document)
    train, validation, test = splits.values()
    return [leaks.overlap(train, validation + test), leaks.overlap(validation, test)]


def test_the_default_passes_the_guard_against_leaks_with_room(tmp_path: Path):
    """On whatever build of the library this interpreter has; the guard refuses above a quarter."""
    for found in leaked(DataConfig(cache=str(tmp_path))):
        assert max(found.leaked_share, found.duplicate_share) < 0.1 and found.groups == 0, found


def test_near_copies_of_the_library_stay_in_one_split_by_default(library: Path, tmp_path: Path):
    def sides_of_pages(config: DataConfig) -> set[str]:
        found = list(split_documents(dataclasses.replace(config, cache=str(tmp_path / "cache"))))
        assert len(found) == 64
        return {split for split, document in found if document.name.startswith("encodings/")}

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
    "one split": (
        lambda p: bad_folder(p, b"x"),
        {"validation_one_in": 1, "test_one_in": 0},
        r"leaves 0 train, 2 validation, 0 test documents, and text for train in none: .*_one_in 1, or",
    ),
    "no test": (
        lambda p: bad_folder(p, b"x"),
        {"validation_one_in": 0, "test_one_in": 10**6},
        r", 0 test documents, and text for test in none: lower --data.test_one_in 1000000, or",
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
        list(training_texts(split_documents(config)))


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


def test_no_group_stands_in_two_splits_and_no_text_does(tmp_path: Path):
    """Planted: every text of one split's group stands in a group of each other split too, in every order."""
    owners = [next(g for g in map(str, range(99)) if split_of(g, 4, 4) == split) for split in corpus.SPLITS]
    rows = [
        {"text": f"text {n} {order}", "repo": group}
        for order in itertools.permutations(owners)
        for n in range(5)
        for group in order
    ]
    report = Report()
    source = write_rows(tmp_path / "rows.jsonl", rows)
    texts: dict[str, set[str]] = {split: set() for split in corpus.SPLITS}
    groups: dict[str, set[str]] = {split: set() for split in corpus.SPLITS}
    for split, document in split_documents(settings_for(source, group_field="repo"), report):
        texts[split].add(document.text)
        groups[split].add(document.group)
    assert sum(map(len, texts.values())) == len(set().union(*texts.values())) == 30
    assert groups == {split: {owner} for split, owner in zip(corpus.SPLITS, owners, strict=True)}
    assert (report.documents, report.duplicates) == (90, 60)
    assert report.kept == dict.fromkeys(corpus.SPLITS, 10)


def test_the_test_split_does_not_depend_on_the_validation_split():
    names = [f"file{n}.py" for n in range(2000)]

    def split(test_one_in: int, validation_one_in: int, name: str) -> set[str]:
        return {n for n in names if split_of(n, validation_one_in, test_one_in) == name}

    tested = split(10, 10, "test")
    assert 140 < len(tested) < 260  # four standard deviations
    assert tested == split(10, 2, "test") == split(10, 0, "test") and split(20, 10, "test") < tested
    # What a run without the test split validated on or trained on stays so, but for what is test.
    for name in ("train", "validation"):
        assert split(10, 10, name) == split(0, 10, name) - tested
    # Independent of each other: a tenth of the validation files are test, not all of them and not none.
    assert 4 < len(split(0, 10, "validation") & tested) < 40


def test_files_named_by_their_split_give_it(tmp_path: Path):
    """Planted: a text of the test file stands in training too, which loses it."""
    source = tmp_path / "rows"
    source.mkdir()
    write_rows(source / "train-00000-of-00002.jsonl", [{"text": f"train {n}"} for n in range(20)])
    write_rows(source / "train-00001-of-00002.jsonl.gz", [{"text": "test 3"}, {"text": "train too"}])
    write_rows(source / "test.parquet", [{"text": f"test {n}"} for n in range(9)])
    (source / "README.md").write_text("text")

    def splits(report: Report | None = None, **changes) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {split: [] for split in corpus.SPLITS}
        for split, document in split_documents(settings_for(source, **changes), report):
            found[split].append(document.text)
        return found

    found, report = splits(), Report()
    assert found["test"] == [f"test {n}" for n in range(9)]
    assert len(found["validation"]) > 1 and sorted(found["train"] + found["validation"]) == sorted(
        [f"train {n}" for n in range(20)] + ["train too"]
    )
    write_rows(source / "validation.jsonl", [{"text": f"validation {n}"} for n in range(4)])
    found = splits(report)
    assert found["validation"] == [f"validation {n}" for n in range(4)] and len(found["train"]) == 21
    assert (report.documents, report.duplicates, report.kept["test"]) == (35, 1, 9)
    # The same rows on another split are other data.
    (source / "validation.jsonl").rename(source / "train-00002.jsonl")
    splits(again := Report())
    (source / "train-00002.jsonl").rename(source / "train-00002-of-00003.jsonl")
    splits(moved := Report())
    assert len({report.fingerprint, again.fingerprint, moved.fingerprint}) == 3
    with pytest.raises(ValueError, match=r"--data.regroup is set, and .*rows gives the split itself"):
        splits(regroup=True)
    (source / "test.parquet").unlink()  # training files alone are no split
    with pytest.raises(ValueError, match=r"holds no document with a name ending in \.py"):
        splits()


def test_the_tokenizer_never_sees_validation(folder: Path):
    config = settings_for(folder)
    prepared = prepare_data(config, Bytes())
    assert list(training_texts(split_documents(config))) == [
        Bytes().decode(prepared.train.document(n)) for n in range(prepared.train.n_documents)
    ]


def test_regrouped_documents_that_belong_together_stay_in_one_split(tmp_path: Path):
    """Twelve texts, each in four variants that differ by a word; by name they stand in both splits."""
    rows = []
    for i in range(12):
        words = [f"w{(i * 37 + j * j * (i + 3)) % 1009}" for j in range(80)]
        rows += [{"text": " ".join([*words, f"variant{v}"]), "name": f"{i}-{v}.py"} for v in range(4)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    splits: dict[bool, list[set[str]]] = {}
    for regroup in (False, True):
        cache = str(tmp_path / "cache")
        config = DataConfig(str(path), validation_one_in=3, test_one_in=3, regroup=regroup, cache=cache)
        found: dict[str, set[str]] = {}
        for split, document in split_documents(config):
            found.setdefault(document.name.split("-")[0], set()).add(split)
        splits[regroup] = list(found.values())
    assert any(len(both) == 3 for both in splits[False])
    assert all(len(both) == 1 for both in splits[True])


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
