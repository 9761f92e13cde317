"""The cache: what was changed on the disk is seen and made again; what was not used for long makes room."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from commands import exit_code, forked

from config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
    one_sentence,
)
from data import cache
from data.cache import (
    GB,
    InUse,
    make_room,
    read_sealed,
    refuse_changed,
    sealed,
    verify_folder,
    write_sealed,
)
from data.store_leaks import store_overlap
from data.tokenstore import TokenStore, open_store
from dataset import prepare_data, prepare_tokenizer, stored_data
from suites.kept import Kept
from suites.overlaps import training_overlap
from tokenizer import BPETokenizer, Tokenizer
from training.begin import train
from training.loop import Observer, TrainingManager

TRAINED = TokenizerConfig(vocab_size=304, min_count=2)


@pytest.fixture
def data(corpus: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(
        str(corpus), validation_one_in=4, test_one_in=4, cache=str(tmp_path / "cache"), workers=1
    )


@pytest.fixture
def tokenizer(data: DataConfig) -> Tokenizer:
    return prepare_tokenizer(data, TRAINED)


def flipped(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


# --- what is damaged ---------------------------------------------------------------------------------


def test_a_cached_tokenizer_with_another_piece_is_trained_again(
    data: DataConfig, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = Path(data.cache).glob("tokenizers/*/code_tokenizer.json")
    text = path.read_text("utf-8")
    path.write_text(text.replace('"total"', '"tatol"'), "utf-8")
    assert path.read_text("utf-8") != text
    capsys.readouterr()
    assert prepare_tokenizer(data, TRAINED).fingerprint == tokenizer.fingerprint
    told = f"warning: {path} is not what was written there; it is made again\n"
    assert capsys.readouterr().err == told
    assert path.read_text("utf-8") == text
    # One of before there were checksums, too.
    (path.parent / cache.SUMS).unlink()
    assert prepare_tokenizer(data, TRAINED).fingerprint == tokenizer.fingerprint
    assert "cannot be verified" in capsys.readouterr().err
    verify_folder(path.parent)
    prepare_tokenizer(data, TRAINED)
    assert capsys.readouterr().err == ""


def test_where_the_cache_may_only_be_read_a_damaged_tokenizer_is_made_again_in_memory(
    data: DataConfig,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (path,) = Path(data.cache).glob("tokenizers/*")
    (path / cache.SUMS).unlink()
    before = {file: file.read_bytes() for file in path.iterdir()}

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refused)
        patch.setattr(Path, "mkdir", refused)
        assert prepare_tokenizer(data, TRAINED).fingerprint == tokenizer.fingerprint
    assert "the tokenizer is kept in memory" in "".join(capsys.readouterr())
    assert {file: file.read_bytes() for file in path.iterdir()} == before


def older(folder: Path) -> None:
    """Make the store as one of before its index had a checksum."""
    index = json.loads((folder / "index.json").read_text("utf-8"))
    del index["sha256"]
    (folder / "index.json").write_text(json.dumps(index, indent=1), "utf-8")


@pytest.mark.parametrize("is_older", [False, True])
@pytest.mark.parametrize(
    ("key", "value"), [("pad_id", 7), ("vocab_size", 90), ("dtype", "<u4"), ("tokenizer", "x"), ("data", "y")]
)
def test_a_changed_value_of_a_store_s_index_is_seen(
    data: DataConfig,
    tokenizer: Tokenizer,
    key: str,
    value: object,
    is_older: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepared = prepare_data(data, tokenizer)
    if is_older:
        older(prepared.folder)
        prepare_data(data, tokenizer)
        assert capsys.readouterr().err == "", "an older store that is whole is taken as it is"
    path = prepared.folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {key: value}), "utf-8")
    again = prepare_data(data, tokenizer)
    assert capsys.readouterr().err.endswith("; it is made again\n")
    assert again.train.pad_id == prepared.train.pad_id
    assert again.train.vocab_size == prepared.train.vocab_size


def test_an_index_that_was_changed_where_nothing_reads_it_is_seen_too(
    data: DataConfig, tokenizer: Tokenizer
) -> None:
    path = prepare_data(data, tokenizer).folder / "index.json"
    index = json.loads(path.read_text("utf-8"))
    misspelled = {key.replace("sha256", "sha257"): value for key, value in index.items()}
    index["splits"]["train"]["documents"] += 1
    for changed in (index, misspelled):
        path.write_text(json.dumps(changed), "utf-8")
        with pytest.raises(ValueError, match=r"index\.json was changed on the disk"):
            TokenStore(path.parent, "train")


@pytest.mark.parametrize("is_older", [False, True])
def test_no_flipped_bit_of_an_index_is_silent(data: DataConfig, tokenizer: Tokenizer, is_older: bool) -> None:
    prepared = prepare_data(data, tokenizer)
    if is_older:
        older(prepared.folder)
    path = prepared.folder / "index.json"
    whole = path.read_bytes()
    same = 0
    for bit in random.sample(range(8 * len(whole)), 150):
        path.write_bytes(flipped(whole, bit))
        try:
            stores = open_store(prepared.folder)
            for store in stores:
                store.refuse_other_index(tokenizer, prepared.fingerprint)
                store.verify()
        except ValueError:
            continue
        # White space, or what nothing reads.
        assert all(
            (one.pad_id, one.vocab_size, one.n_targets) == (other.pad_id, other.vocab_size, other.n_targets)
            for one, other in zip(stores, (prepared.train, prepared.validation, prepared.test), strict=True)
        )
        same += 1
    assert same < 50  # most of an index is read


@pytest.mark.parametrize("name", ["train-offsets.npy", "train-bytes.npy"])
def test_a_changed_table_is_seen_when_a_store_is_opened(
    data: DataConfig, tokenizer: Tokenizer, name: str
) -> None:
    folder = prepare_data(data, tokenizer).folder
    path = folder / name
    path.write_bytes(flipped(path.read_bytes(), 8 * path.stat().st_size - 60))
    with pytest.raises(ValueError, match=f"{name} was changed on the disk"):
        TokenStore(folder, "train")


def test_what_is_cached_of_comparing_stores_is_verified(
    data: DataConfig, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = prepare_data(data, tokenizer)
    found = store_overlap(prepared.train, prepared.test, tokenizer)
    path = prepared.folder / "leaks-train-test.json"
    saved = json.loads(path.read_text("utf-8"))
    saved["value"]["near"] += 1
    path.write_text(json.dumps(saved), "utf-8")
    capsys.readouterr()
    assert store_overlap(prepared.train, prepared.test, tokenizer) == found
    assert str(path) in capsys.readouterr().err
    assert store_overlap(prepared.train, prepared.test, tokenizer) == found
    assert capsys.readouterr().err == ""


def test_what_is_cached_of_a_suite_s_examples_is_verified(data: DataConfig, tokenizer: Tokenizer) -> None:
    prepared = prepare_data(data, tokenizer)
    sample = {"id": "1", "name": "a", "where": 1, "prompt": "def f0(x, y=0):\n", "reference": "return total"}
    record = {"suite": "next_line", "samples": [sample, sample]}
    found = training_overlap(record, prepared.train, tokenizer)
    (path,) = prepared.folder.glob("overlap-*.json")
    saved = json.loads(path.read_text("utf-8"))
    saved["value"]["read"] += 1
    path.write_text(json.dumps(saved), "utf-8")
    assert training_overlap(record, prepared.train, tokenizer) == found


def test_a_kept_prediction_that_was_changed_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = Kept(tmp_path, "humaneval", {"weights": "1"})
    kept.add({(0, 0): ("return x", "eos"), (1, 0): ("return y", "eos"), (2, 0): ("pass", "length")})
    text = kept.path.read_text("utf-8")
    kept.path.write_text(text.replace("return y", "return z"), "utf-8")
    assert kept.read(3, 1) == {(0, 0): ("return x", "eos"), (2, 0): ("pass", "length")}
    told = f"warning: {kept.path}: 1 of its predictions cannot be read; it is made again\n"
    assert capsys.readouterr().err == told


def test_a_base_that_was_changed_since_it_was_trained_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(100))
    remedy = "remove it to train another"
    refuse_changed(folder, remedy)  # An older base has no checksums.
    cache.seal_folder(folder)
    refuse_changed(folder, remedy)
    (folder / "model.safetensors").write_bytes(flipped(bytes(100), 300))
    with pytest.raises(ValueError, match=rf"model\.safetensors is not what was written there.* or {remedy}"):
        refuse_changed(folder, remedy)


def test_a_sealed_value_comes_back_and_no_flipped_bit_of_it_does(tmp_path: Path) -> None:
    path, value = tmp_path / "x.json", {"a": [1, 0.1, None, "ä"], "b": {"c": "d"}}
    assert read_sealed(path) is None
    write_sealed(path, value)
    assert read_sealed(path) == value
    text = sealed(value).encode()
    for bit in range(8 * len(text)):
        path.write_bytes(flipped(text, bit))
        assert read_sealed(path) in (None, value)


# --- a store that is cut while a run reads it ----------------------------------------------------------


def test_a_store_that_is_cut_while_a_run_reads_it_ends_the_run_in_a_sentence(
    data: DataConfig, tmp_path: Path
) -> None:
    config = Config(
        data=data,
        tokenizer=TRAINED,
        model=ModelConfig(block_size=32, n_layer=1, n_head=2, n_embd=8),
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(run=str(tmp_path / "run"), max_steps=400, batch_size=4, device="cpu"),
    )

    def cut(manager: TrainingManager, values: dict[str, float]) -> bool:
        if manager.state.step == 3:
            os.truncate(manager.data.folder / "train-00000.bin", 10)
        return False

    def work() -> None:
        with one_sentence():
            train(config, Observer(on_step=cut))

    assert exit_code(forked(work, tmp_path / "out", tmp_path / "err")) == 2
    last = (tmp_path / "err").read_text("utf-8").splitlines()[-1]
    assert re.fullmatch(
        r"error: .*/train-00000\.bin was cut while it was in use: it has 10 bytes of [\d,]+; start again, or "
        r"go on with a run by --resume: the store is built again",
        last,
    )


# --- room --------------------------------------------------------------------------------------------

KEY, LONG = "0123456789abcdef" * 2, "fedcba9876543210" * 2


def entry(path: Path, days: float, size: int = 1000) -> Path:
    """A file, or a folder with one, that was used so many days ago."""
    file = path if path.suffix in (".json", ".jsonl") else path / "data.bin"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bytes(size))
    then = time.time() - 86400 * days
    for changed in (file, path):
        os.utime(changed, (then, then))
    return path


def filled(folder: Path) -> dict[str, Path]:
    return {
        "store": entry(folder / f"tokens-{KEY[:24]}", 5, 10_000),
        "killed builder's": entry(folder / f".tokens-{KEY[:24]}-{LONG}", 6, 10_000),
        "tokenizer": entry(folder / "tokenizers" / KEY, 4, 10_000),
        "groups": entry(folder / f"groups-{KEY}.json", 3, 10_000),
        "predictions": entry(folder / "predictions" / f"eval-next_line-model-{KEY}.jsonl", 2, 10_000),
        "base": entry(folder / "bases" / "llama-0123456789ab", 9, 10_000),
        "somebody's": entry(folder / "photographs", 9, 10_000),
        "his file": entry(folder / "tokens.json", 9, 10_000),
        "of this run": entry(folder / f"tokens-{LONG[:24]}", -1, 10_000),
    }


def left(entries: dict[str, Path]) -> set[str]:
    return {name for name, path in entries.items() if path.exists()}


ALWAYS = {"base", "somebody's", "his file", "of this run"}


@pytest.mark.parametrize(
    ("gigabytes", "more"),
    [
        (0.0, {"store", "killed builder's", "tokenizer", "groups", "predictions"}),
        (1.0, {"store", "killed builder's", "tokenizer", "groups", "predictions"}),
        (6e-5, {"tokenizer", "groups", "predictions"}),
        (3e-5, {"predictions"}),
        (1e-9, set()),
    ],
)
def test_what_was_used_longest_ago_makes_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gigabytes: float, more: set[str]
) -> None:
    entries = filled(tmp_path / "cache")
    make_room(tmp_path / "cache", gigabytes)
    assert left(entries) == ALWAYS | more
    said = capsys.readouterr().err.splitlines()
    removed = [line for line in said if line.startswith("cache: ")]
    assert len(removed) == 5 - len(more) and all(f"--data.cache_gb {gigabytes:g}" in line for line in removed)
    assert [line for line in said if line.startswith("warning: ")] == said[len(removed) :]
    assert len(said) - len(removed) == (gigabytes == 1e-9)
    assert not [*(tmp_path / "cache").rglob("*.gone-*")]


def test_nothing_that_a_process_has_open_is_removed(tmp_path: Path) -> None:
    entries = filled(tmp_path / "cache")
    told, tell = os.pipe()

    def hold() -> None:
        held = [InUse(entries[name]) for name in ("store", "groups")]
        for path in (entries["store"], entries["groups"]):
            os.utime(path, (0, 0))
        os.write(tell, b"x")
        time.sleep(30)
        held.clear()

    child = forked(hold, tmp_path / "out")
    os.read(told, 1)
    make_room(tmp_path / "cache", 1e-9)
    assert left(entries) == ALWAYS | {"store", "groups"}
    os.kill(child, 9)
    assert exit_code(child) == -9
    make_room(tmp_path / "cache", 1e-9)
    assert left(entries) == ALWAYS


def test_a_store_is_removed_only_when_nobody_has_it(
    data: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_data(data, tokenizer)
    folder = first.folder
    monkeypatch.setattr(cache, "STARTED", time.time() + 60)  # So begins a later run.
    small = replace(data, cache_gb=1e-9)
    second = prepare_data(replace(small, validation_one_in=3), tokenizer)
    assert folder.is_dir() and second.folder.is_dir()
    assert first.train.document(0).tolist() == TokenStore(folder, "train").document(0).tolist()
    del first
    prepare_data(replace(small, validation_one_in=3), tokenizer)
    assert not folder.exists() and second.folder.is_dir()


def test_a_store_that_is_read_counts_as_used(data: DataConfig, tokenizer: Tokenizer) -> None:
    folder = prepare_data(data, tokenizer).folder
    os.utime(folder, (0, 0))
    prepare_data(data, tokenizer)
    assert folder.stat().st_mtime > time.time() - 60


def test_a_removed_entry_is_not_in_use(tmp_path: Path) -> None:
    path = entry(tmp_path / f"tokens-{KEY[:24]}", 1)
    with InUse(path):
        assert not cache._removed(path)
    assert cache._removed(path) and not path.exists()
    with pytest.raises(OSError):
        InUse(path)
    shutil.rmtree(tmp_path)
    make_room(tmp_path, 1 / GB)


def test_the_stored_examples_of_a_healed_run_are_not_those_of_an_unhealed_one(tmp_path: Path) -> None:
    """Both have the key of a store that has no examples, for which the setting does nothing."""
    rows = [{"prompt": f"def f{i}(x):\n", "completion": f"    return x + {i}\n"} for i in range(40)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    healed = DataConfig(str(source), cache=str(tmp_path / "cache"), workers=1)
    tokenizer = BPETokenizer.train([row["prompt"] + row["completion"] for row in rows], 300)
    unhealed = prepare_data(replace(healed, heal=False), tokenizer)
    assert tokenizer.heals  # the caller's own stays as it was
    assert stored_data(healed, tokenizer, unhealed.fingerprint) is None
    assert tokenizer.heals
    made = prepare_data(healed, tokenizer)
    for config, folder in ((healed, made.folder), (replace(healed, heal=False), unhealed.folder)):
        found = stored_data(config, tokenizer, made.fingerprint)
        assert found is not None and found.folder == folder
