"""A source is read once; a later start trusts what is recorded of it, and nothing that may have changed."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stores import Bytes, files_of, settings_for, write_rows

from config import DataConfig, TokenizerConfig
from data import corpus, recorded, run_documents
from data.documents import FileState, ReadFile
from data.run_documents import RunDocuments
from dataset import PreparedData, prepare_data, prepare_tokenizer
from guards.reference import PARTS
from selftest.data import write_corpus
from selftest.run import small_config
from training.command import run_to_its_end

opened: Counter[str] | None = None  # the files that were opened, by path, while a test counts them
AS_RECORDED = "source: 40 files as recorded (names, sizes, times), 16 of them hashed again\n"


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if opened is not None and event == "open" and isinstance(arguments[0], str):
        opened[arguments[0]] += 1


sys.addaudithook(_note)


@pytest.fixture
def opens() -> Iterator[Callable[[Path], Counter[str]]]:
    """A function: how often each file below a folder was opened since the test began or asked last."""
    global opened
    opened = Counter()

    def below(folder: Path) -> Counter[str]:
        assert opened is not None
        found = Counter({path: n for path, n in opened.items() if path.startswith(f"{folder}/")})
        opened.clear()
        return found

    yield below
    opened = None


@pytest.fixture(autouse=True)
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading begins ten seconds after the files were last changed, by the clock of the record."""
    monkeypatch.setattr(run_documents.time, "time_ns", lambda: int(time.time() * 10**9) + 10 * 10**9)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """40 files."""
    for n in range(40):
        path = tmp_path / "corpus" / ("sub" if n % 3 else "") / f"file{n}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def f{n}(x):\n    return x + {n}\n" * (n + 1), "utf-8")
    return settings_for(tmp_path / "corpus")


def start(config: DataConfig) -> PreparedData:
    documents = RunDocuments(config)
    return prepare_data(documents, prepare_tokenizer(documents, TokenizerConfig(vocab_size=300)))


def afresh(config: DataConfig) -> str:
    """The fingerprint of the data by reading all of them."""
    return RunDocuments(dataclasses.replace(config, cache="/dev/null")).fingerprint


def test_each_file_is_opened_once_and_by_a_second_start_sixteen_are(
    config: DataConfig, opens: Callable[[Path], Counter[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(config.source)
    first = start(dataclasses.replace(config, regroup=True))
    assert sorted(opens(source)) == sorted(str(path) for path in source.rglob("*.py"))
    assert "source:" not in capsys.readouterr().out
    chosen = set()
    for _ in range(8):
        second = start(dataclasses.replace(config, regroup=True))
        found = opens(source)
        assert len(found) == 16 and set(found.values()) == {1}
        assert (second.folder, second.report) == (first.folder, first.report)
        assert second.first_documents == first.first_documents and len(first.first_documents) == 4
        assert capsys.readouterr().out == AS_RECORDED
        chosen.update(found)
    assert len(chosen) > 16, "each start looks at other files"


def test_a_run_to_its_final_scores_opens_each_file_once_and_the_next_run_sixteen(
    tmp_path: Path, opens: Callable[[Path], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What trains does; the second opinion reads documents of its own."""
    monkeypatch.delitem(PARTS, "text")
    source = tmp_path / "long"
    write_corpus(source)
    n_files = len([*source.rglob("*.py")])
    assert n_files > 16
    for expected in (n_files, 16):
        opens(source)
        assert run_to_its_end(small_config(tmp_path, {"data": {"regroup": True}})).code == 0
        found = opens(source)
        assert len(found) == expected and set(found.values()) == {1}


def written_and_put_back(path: Path) -> None:
    """D5 of what happened: the same size, and the time of the last write put back."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size == before.st_size


def other_bytes_of(path: Path) -> Path:
    """Another file of the same size and time of the last write."""
    other = path.parents[2] / "other.py"
    other.write_bytes(path.read_bytes().replace(b"x", b"y"))
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    return other


def copied_over(path: Path) -> None:
    shutil.copy2(other_bytes_of(path), path)  # cp -p


def renamed_over(path: Path) -> None:
    os.rename(other_bytes_of(path), path)


def linked(path: Path) -> None:
    """A link to another file of the folder, in place of the file."""
    path.unlink()
    path.symlink_to(path.with_name("file5.py"))


@pytest.mark.parametrize(
    "change",
    [
        written_and_put_back,
        copied_over,
        renamed_over,
        linked,
        lambda path: path.unlink(),
        lambda path: path.rename(path.with_name("file7b.py")),
        lambda path: path.with_name("new.py").write_text("new = 1\n"),
    ],
    ids=["put back", "cp -p", "rename", "link", "gone", "renamed", "new"],
)
def test_a_file_that_is_not_as_recorded_has_the_source_read(
    config: DataConfig, change: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    first = start(config)
    change(Path(config.source, "sub", "file7.py"))
    capsys.readouterr()
    second = start(config)
    assert "source: read as a whole, and not taken as recorded: sub/" in capsys.readouterr().out
    assert second.fingerprint == afresh(config) != first.fingerprint
    assert start(config).folder == second.folder
    assert capsys.readouterr().out == AS_RECORDED.replace("40", str(len(second.report.files)))


def test_a_file_that_was_only_touched_has_the_source_read_to_the_same_data(
    config: DataConfig, opens: Callable[[Path], Counter[str]]
) -> None:
    first = start(config)
    os.utime(Path(config.source, "file0.py"))
    opens(Path(config.source))
    assert start(config).folder == first.folder
    assert len(opens(Path(config.source))) == 40


@pytest.mark.parametrize(("seconds", "is_trusted"), [(-3600, False), (1.9, False), (2.1, True)])
def test_a_file_that_had_just_been_changed_is_not_trusted(
    config: DataConfig,
    seconds: float,
    is_trusted: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its clock may not tell one more change apart. A clock that was set back is no other case."""
    last = max(path.stat().st_ctime_ns for path in Path(config.source).rglob("*.py"))
    monkeypatch.setattr(run_documents.time, "time_ns", lambda: last + int(seconds * 10**9))
    start(config)
    capsys.readouterr()
    start(config)
    out = capsys.readouterr().out
    assert (out == AS_RECORDED) == is_trusted
    assert is_trusted or "had just been changed when it was recorded" in out


def test_all_files_are_read_where_the_time_of_change_means_nothing(
    config: DataConfig,
    opens: Callable[[Path], Counter[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(recorded, "file_system", lambda folder: "vfat")
    first = start(config)
    written_and_put_back(Path(config.source, "file0.py"))
    opens(Path(config.source))
    assert start(config).fingerprint == afresh(config) != first.fingerprint
    assert "its file system (vfat) is not known to say when" in capsys.readouterr().out


def test_a_file_system_is_that_of_the_longest_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mountinfo"
    lines = [
        "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw",
        "23 22 8:2 / /data rw - xfs /dev/sdb rw",
        r"24 23 0:40 / /data/my\040share rw master:2 propagate_from:1 - cifs //server/share rw",
    ]
    mounts.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(recorded, "MOUNTS", mounts)
    found = {name: recorded.file_system(Path(name)) for name in ("/", "/data", "/data2", "/data/my share/x")}
    assert found == {"/": "ext4", "/data": "xfs", "/data2": "ext4", "/data/my share/x": "cifs"}
    mounts.unlink()
    assert recorded.file_system(tmp_path) == "unknown"


def test_verify_reads_all(
    config: DataConfig, opens: Callable[[Path], Counter[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    first = start(config)
    opens(Path(config.source))
    capsys.readouterr()
    assert start(dataclasses.replace(config, verify=True)).folder == first.folder
    assert len(opens(Path(config.source))) == 40
    out = capsys.readouterr().out
    assert out == "source: read as a whole, and not taken as recorded: --data.verify\n"


def test_other_bytes_under_the_recorded_times_are_told_and_the_source_is_read(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fault of the disk is simulated; with all files hashed again it is certain to be found."""
    monkeypatch.setattr(recorded, "HASHED", 40)
    documents = RunDocuments(config)
    record, path = documents.record, Path(config.source, "sub", "file7.py")
    written_and_put_back(path)
    kept = record.report.files["sub/file7.py"]
    record.report.files["sub/file7.py"] = ReadFile(FileState.of(path.stat()), kept.sha256)
    recorded.write_record(config.resolved(), record)
    assert RunDocuments(config).fingerprint == afresh(config) != documents.fingerprint
    assert f"warning: {path} has the size, times and inode that are recorded" in capsys.readouterr().err


def test_a_file_that_changes_while_it_is_read_is_refused(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(config.source, "sub", "file7.py")

    class Written(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            path.write_bytes(data[::-1])
            return data

    def opened_and_written(name: Path, mode: str) -> Any:
        return Written(name) if name == path else open(name, mode)

    monkeypatch.setattr(corpus, "open", opened_and_written, raising=False)
    with pytest.raises(ValueError, match=r"file7\.py changed while it was read: start again"):
        RunDocuments(config).fingerprint  # noqa: B018


def test_a_trusted_source_that_changes_before_it_is_read_leaves_nothing_of_what_it_was(
    config: DataConfig,
) -> None:
    """The next start takes the tokenizer of the new texts. A base may be loaded between the two."""
    start(config)
    documents = RunDocuments(config)
    assert documents.fingerprint  # As recorded.
    for n, path in enumerate(Path(config.source).rglob("*.py")):
        path.write_text(f"class C{n}:\n    value = {n}\n" * (n + 1), "utf-8")
    with pytest.raises(ValueError, match="changed while it was read: start again"):
        list(documents)
    elsewhere = dataclasses.replace(config, cache=f"{config.cache}/afresh")
    assert start(config).train.tokenizer_fingerprint == start(elsewhere).train.tokenizer_fingerprint


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_rows_that_change_while_they_are_read_are_refused(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"text {n}", "name": f"{n}.py"} for n in range(30)]
    path = write_rows(tmp_path / name, rows)
    documents = corpus.read_documents(DataConfig(str(path)))
    next(documents)
    os.utime(path)
    with pytest.raises(ValueError, match=f"{name} changed while it was read: start again"):
        list(documents)


def test_a_store_of_before_there_were_records_opens_and_gets_one(
    config: DataConfig, opens: Callable[[Path], Counter[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    first = start(config)
    (record,) = Path(config.cache).glob("source-*.json")
    record.unlink()
    before = {path: path.stat().st_ino for path in first.folder.iterdir()}
    capsys.readouterr()
    opens(Path(config.source))
    assert start(config).folder == first.folder
    assert len(opens(Path(config.source))) == 40 and capsys.readouterr().out == ""
    assert {path: path.stat().st_ino for path in first.folder.iterdir()} == before
    assert start(config).folder == first.folder and capsys.readouterr().out == AS_RECORDED


def test_a_damaged_record_is_told_and_made_again(
    config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    first = start(config)
    (record,) = Path(config.cache).glob("source-*.json")
    whole = record.read_text("utf-8")
    record.write_text(whole.replace(first.fingerprint, "0" * 64), "utf-8")
    assert start(config).fingerprint == first.fingerprint
    assert f"{record}: its checksum is another one" in capsys.readouterr().err
    assert start(config).folder == first.folder and capsys.readouterr().out == AS_RECORDED


def test_other_settings_have_records_of_their_own(config: DataConfig) -> None:
    whole = start(config)
    for changes in ({"validation_one_in": 3}, {"drop_comments": True}, {"suffixes": ("3.py",)}):
        other = dataclasses.replace(config, **changes)
        assert start(other).fingerprint == afresh(other)
    assert start(config).fingerprint == whole.fingerprint


def test_a_trusted_source_is_read_once_for_a_new_tokenizer_and_its_store(
    config: DataConfig, opens: Callable[[Path], Counter[str]]
) -> None:
    first = start(config)
    opens(Path(config.source))
    documents = RunDocuments(config)
    tokenizer = prepare_tokenizer(documents, TokenizerConfig(vocab_size=310))
    second = prepare_data(documents, tokenizer)
    found = opens(Path(config.source))
    assert len(found) == 40 and sum(found.values()) == 40 + 16
    assert second.fingerprint == first.fingerprint and second.folder != first.folder
    start(config)
    documents = RunDocuments(config)
    opens(Path(config.source))
    prepare_data(documents, prepare_tokenizer(documents, TokenizerConfig(vocab_size=310)))
    assert len(opens(Path(config.source))) == 16


def test_a_source_too_large_for_the_memory_is_read_again_to_the_same_store(
    config: DataConfig, opens: Callable[[Path], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = start(config)
    files = files_of(kept.folder)
    shutil.rmtree(config.cache)
    opens(Path(config.source))
    monkeypatch.setattr(run_documents, "KEPT_BYTES", 5000)
    streamed = start(config)
    assert (streamed.folder, files_of(streamed.folder)) == (kept.folder, files)
    # Each file was opened for the record, for the tokenizer and for the store.
    assert set(opens(Path(config.source)).values()) == {3}
    documents = RunDocuments(config)
    pairs = iter(documents)
    next(pairs)
    Path(config.source, "sub", "file7.py").write_text("new = 1\n")
    with pytest.raises(ValueError, match="changed while it was read: start again"):
        list(pairs)


def scraped(folder: Path) -> Path:
    part = write_rows(folder / "data" / "part.parquet", TEXTS)
    about = {"fingerprint": "f" * 64, "parts": [{"file": "data/part.parquet", "sha256": "?"}]}
    about["parts"][0]["sha256"] = corpus.file_sha256(part)
    (folder / "corpus.json").write_text(json.dumps(about))
    return folder


def given(folder: Path) -> Path:
    for n, split in enumerate(("train", "validation", "test")):
        write_rows(folder / f"{split}.jsonl", EXAMPLES[10 * n : 10 * n + 10])
    return folder


TEXTS = [{"text": f"text of {n}\n" * 9, "path": f"{n}.py", "cluster": str(n // 2)} for n in range(30)]
EXAMPLES = [{"prompt": f"add {n}: \ud800", "completion": f"x + {n}"} for n in range(30)]
SOURCES: dict[str, Callable[[Path], Path]] = {
    "jsonl": lambda folder: write_rows(folder / "rows.jsonl", EXAMPLES),
    "gz": lambda folder: write_rows(folder / "rows.jsonl.gz", EXAMPLES),
    "parquet": lambda folder: write_rows(folder / "rows.parquet", TEXTS),
    "splits": given,
    "corpus": scraped,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_record_says_of_any_source_what_reading_says(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("source", "source/data"):
        (tmp_path / folder).mkdir()
    config = settings_for(SOURCES[kind](tmp_path / "source"), fim_rate=0.5 if kind == "parquet" else 0.0)
    read = RunDocuments(config).record
    assert capsys.readouterr().out == ""
    known = RunDocuments(config).record
    assert "as recorded (names, sizes, times)" in capsys.readouterr().out
    assert known == read and known.report.files and known.report.fingerprint
    for name in known.report.files:
        os.utime(next(tmp_path.rglob(name)))
        assert RunDocuments(config).record.report.fingerprint == read.report.fingerprint
        assert f"{name} has another size, time or inode" in capsys.readouterr().out


def test_gaps_without_markers_are_refused_by_the_record_too(tmp_path: Path) -> None:
    rows = [{"prefix": f"a{n}", "suffix": "c", "middle": "b"} for n in range(30)]
    config = settings_for(write_rows(tmp_path / "rows.jsonl", rows))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"rows\.jsonl line 1 cannot be learned; give prompt"):
            prepare_data(config, Bytes())
