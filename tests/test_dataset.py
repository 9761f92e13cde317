"""The token store of a corpus, and the batches of its rows."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import inspect
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stores import (
    Bytes,
    Hooked,
    Lossy,
    OutOfRange,
    Ranges,
    Startless,
    all_targets,
    check_rows,
    files_of,
    range_store,
    same,
    settings_for,
    targets,
)

from config import DataConfig
from config.files import REPOSITORY
from data import prepare, tokenstore
from data.bijection import KEYS, Bijection
from data.corpus import split_documents, split_of
from data.documents import Document
from data.tokenstore import TokenStore, build_store, open_store
from dataset import (
    IGNORE_INDEX,
    Batch,
    Batches,
    micro_batches_of,
    next_token_labels,
    prepare_data,
    validation_batches,
)
from reference.rows import passes_of_rank, shuffled_rows

# Store


def test_the_store_holds_every_document_byte_for_byte(folder: Path):
    prepared = prepare_data(settings_for(folder), Bytes())
    seen = []
    for split in (prepared.train, prepared.validation, prepared.test):
        for n, name in enumerate(split.names):
            data = (folder / name).read_bytes()
            assert split.document(n).tolist() == [256, *data, 257]
            assert split.byte_lengths[n] == len(data) and split_of(name, 4, 4) == split.split
        assert split.n_bytes == sum((folder / name).stat().st_size for name in split.names)
        assert split.n_tokens == split.n_bytes + 2 * split.n_documents and split.pad_id == 258
        assert prepared.report.kept[split.split] == split.n_documents > 0
        assert prepared.report.kept_bytes[split.split] == split.n_bytes
        assert split.fingerprint == prepared.fingerprint and split.tokenizer_fingerprint == "bytes"
        seen += split.names
    assert sorted(seen) == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.py"))


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
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
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
    assert stores_in(config) == []


def stores_in(config: DataConfig) -> list[Path]:
    """What is in the cache of whole stores and of parts of some."""
    return [path for path in Path(config.cache).iterdir() if "tokens-" in path.name]


def forbidden() -> None:
    raise AssertionError("the tokenizer was called, so the store was not reused")


def test_the_store_is_reused_only_for_the_same_data_tokenizer_and_settings(folder: Path):
    config = settings_for(folder)
    first = prepare_data(config, Bytes())
    for equal in (config, dataclasses.replace(config, workers=2)):
        assert prepare_data(equal, Hooked(forbidden)).folder == first.folder
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
    assert stores_in(config) == [second.folder]
    assert (second.train.document(0) == first[0].train.document(0)).all()


def test_a_store_is_of_the_files_as_they_were_read(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A file that changes while the documents are tokenised changes nothing of them."""
    monkeypatch.setattr(tokenstore, "CHUNK_CHARACTERS", 1)
    config = settings_for(folder)
    read = prepare_data(config, Bytes())
    tokens = files_of(read.folder)
    shutil.rmtree(config.cache)
    path = folder / "sub" / "file9.py"
    again = prepare_data(config, Hooked(lambda: path.write_text("new")))
    assert (again.folder, files_of(again.folder)) == (read.folder, tokens)
    assert prepare_data(config, Bytes()).folder != read.folder


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
    assert stores_in(config) == []


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


def rows_by_update(store: TokenStore, batch_size: int, accumulation: int, world_size: int) -> list[Batch]:
    """Return the rows of each update of two epochs, as ranks read them, in the order of ranks and batches."""
    ranks = [
        Batches(store, batch_size, 32, 3, rank, world_size, accumulation=accumulation)
        for rank in range(world_size)
    ]
    n, passes = 2 * ranks[0].steps_per_epoch, ranks[0].per_update
    assert {(batches.steps_per_epoch, batches.per_update) for batches in ranks} == {(n // 2, passes)}
    parts = [
        [batches.batch(update + i) for batches in ranks for i in range(passes)]
        for update in range(0, n, passes)
    ]
    assert all(len(part.tokens) <= batch_size for part in parts[0])
    return [Batch(*(torch.cat(fields) for fields in zip(*part, strict=True))) for part in parts]


@pytest.mark.parametrize("batch_size, accumulation, world_size", [(8, 1, 2), (8, 1, 4), (2, 4, 1), (3, 8, 4)])
def test_an_update_has_the_same_rows_however_they_are_shared(
    store: TokenStore, batch_size: int, accumulation: int, world_size: int
):
    one = rows_by_update(store, batch_size * accumulation, 1, 1)
    many = rows_by_update(store, batch_size, accumulation, world_size)
    assert len(one) == len(many) > 2 and all(same(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize(
    "batch_size, accumulation, world_size, n",
    [(8, 3, 1, 3), (8, 4, 2, 2), (8, 1, 4, 1), (8, 2, 4, 1), (8, 3, 2, 2), (1, 6, 2, 3), (5, 2, 2, 1)],
)
def test_the_rows_of_a_rank_are_read_in_as_few_batches_as_the_batch_size_allows(
    batch_size: int, accumulation: int, world_size: int, n: int
):
    assert micro_batches_of(batch_size, accumulation, world_size) == n
    assert passes_of_rank(batch_size * accumulation, world_size, batch_size) == n


def test_rows_that_ranks_cannot_share_evenly_are_refused(store: TokenStore):
    with pytest.raises(ValueError, match=r"has 6 rows \(batch_size 3 x accumulation 2\), which 4 processes"):
        Batches(store, 3, 32, 0, 0, 4, accumulation=2)


def test_a_run_that_was_begun_before_keeps_its_order(store: TokenStore):
    """By version 1 the rows of an epoch are a permutation, dealt by micro-batch."""
    older = Batches(store, 4, 32, 3, accumulation=2).altered(version=1)
    assert older.steps_per_epoch % 2, "an update goes on in the next epoch"
    for epoch in (0, 1):
        draw = np.random.Generator(np.random.PCG64([3, epoch]))
        draw.permutation(store.n_documents)
        expected = draw.permutation(-(-(store.n_tokens - 1) // 32))
        for step in range(older.steps_per_epoch):
            found = older.rows_of(epoch * older.steps_per_epoch + step)
            assert found.tolist() == expected[4 * step : 4 * step + 4].tolist()
    with pytest.raises(ValueError, match="one process read all rows of an update, and is to go on with 2"):
        Batches(store, 4, 32, 3, 0, 2).altered(version=1)


@pytest.mark.parametrize("n", [*range(1, 40), 64, 65, 1000, 2**16 + 1])
def test_an_order_without_a_permutation_in_memory_has_each_number_once(n: int):
    order = Bijection(n, np.random.Generator(np.random.PCG64(n)).bit_generator.random_raw(KEYS))
    found = order[np.arange(n)]
    assert sorted(found.tolist()) == list(range(n))
    assert order[np.array([n - 1])] == found[-1], "a place does not depend on which others are asked for"
    derived = shuffled_rows(n, 2, np.random.Generator(np.random.PCG64(n)))
    assert found.tolist() == derived.tolist()


def test_such_an_order_is_shuffled():
    """Of n numbers in random order one stays in its place, and one follows its neighbour, on average."""
    n, draws = 500, 200
    orders = [
        Bijection(n, np.random.Generator(np.random.PCG64(seed)).bit_generator.random_raw(KEYS))[np.arange(n)]
        for seed in range(draws)
    ]
    stay = sum(int((order == np.arange(n)).sum()) for order in orders)
    follow = sum(int((np.diff(order) == 1).sum()) for order in orders)
    assert abs(stay - draws) < 5 * draws**0.5 and abs(follow - draws) < 5 * draws**0.5
    firsts = [int(order[0]) for order in orders]
    assert len(set(firsts)) > draws / 2


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
