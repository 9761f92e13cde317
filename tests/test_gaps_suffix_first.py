"""Gaps with the suffix first: trained, trimmed, put together again and asked for in that order."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import settings_for, stored_parts, write_rows
from test_generate_command import STARCODER

from config import Config, TokenizerConfig
from data.documents import Document
from data.fim import fim_kept, fim_markers, fim_prompt_ids, in_text_order, trim_fim_prompt
from data.packing import as_shown, shown
from data.tokenstore import TokenStore, build_store
from dataset import is_trimmed, prepare_data, validation_batches
from guards import same_path
from guards.labels import prompt_errors
from reference.rows import trimmed
from reference.stored import Stored
from selftest import data
from selftest.run import small_config
from suites.stored import text_of_example
from tokenizer import load_tokenizer
from training.begin import train
from training.run import load_run

SPM = copy.copy(STARCODER)
SPM.suffix_first = True
PREFIX, SUFFIX, MIDDLE = fim_markers(SPM)


def test_the_suffix_comes_first_and_the_prefix_last():
    start, *ids = fim_prompt_ids(SPM, "<fim_middle>ab", "cd")
    assert start == SPM.start_id
    assert ids == [PREFIX, SUFFIX, *SPM.encode("cd"), MIDDLE, *SPM.encode("<fim_middle>ab")]
    assert fim_prompt_ids(SPM, "", "cd") == fim_prompt_ids(STARCODER, "", "cd")
    longer = fim_prompt_ids(SPM, "<fim_middle>ab\nline\n", "cd")
    assert longer[: len(ids)] == [start, *ids][: len(ids)]  # All that was read before stays.


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(*[st.integers(0, 9)] * 2, st.integers(1, 9)), min_size=1, max_size=12),
    T=st.integers(13, 30),
)
def test_a_trimmed_prompt_keeps_what_is_near_the_gap(sizes: list[tuple[int, int, int]], T: int):
    with tempfile.TemporaryDirectory() as root:
        documents = [Document("d", "M" * m, "d", "ABCDEFGHI"[9 - p :], "RSTUVWXYZ"[:s]) for p, s, m in sizes]
        build_store(Path(root) / "s", [("train", d) for d in documents], SPM)
        store, derived = TokenStore(Path(root) / "s", "train"), Stored(Path(root) / "s", "train")
        for batch in validation_batches(store, 2, T):
            assert prompt_errors(store, batch, SPM) == (0, 0, 0)
        rows = shown(store, T)
        for n, document in enumerate(documents):
            prompt, completion = stored_parts(store, n)
            kept = trim_fim_prompt(SPM, prompt, T + 1 - len(completion))
            assert as_shown(store, n, rows).tolist() == kept + completion == trimmed(derived, n, T + 1)[0]
            assert rows.prompt_length[n] == len(kept) == trimmed(derived, n, T + 1)[1]
            suffix, prefix = SPM.decode(kept).removeprefix("<fim_prefix><fim_suffix>").split("<fim_middle>")
            own = document.prompt or "", document.suffix or ""
            room = min(len(own[0]) + len(own[1]), len(kept) - 4)
            n_prefix, n_suffix = fim_kept(len(own[0]), len(own[1]), room)
            assert prefix == own[0][len(own[0]) - n_prefix :] and suffix == own[1][:n_suffix]
            example = text_of_example(store, SPM, n)
            assert (example.prompt, example.suffix, example.reference) == (*own, document.text)


def test_stores_of_both_orders_stand_apart_and_hold_the_same_texts(tmp_path: Path):
    texts = [{"text": "".join(data.function(random.Random(n))), "path": f"p{n}"} for n in range(40)]
    path = write_rows(tmp_path / "rows.jsonl", texts)
    config = settings_for(path, fim_rate=0.7)
    one = prepare_data(config, STARCODER)
    other = prepare_data(dataclasses.replace(config, fim_order="spm"), STARCODER)
    assert one.folder != other.folder and not STARCODER.suffix_first
    assert other.train.suffix_first and not one.train.suffix_first
    differ = 0
    for n in range(one.train.n_documents):
        pair = [prepared.train.document(n) for prepared in (one, other)]
        texts_of = [SPM.decode(in_text_order(ids, fim_markers(SPM)).tolist()) for ids in pair]
        assert texts_of[0] == texts_of[1]
        differ += pair[0].tolist() != pair[1].tolist()
    assert differ > 5


def run_config(folder: Path, **data_settings: Any) -> Config:
    STARCODER.save(folder)
    config = small_config(folder, {"data": {"fim_rate": 0.5}, "model": {"block_size": 100}})
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, fim_order="spm", **data_settings),
        tokenizer=TokenizerConfig("pretrained", path=str(folder)),
    )


def test_a_run_passes_every_guard_and_keeps_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data.write_corpus(tmp_path / "long")
    config = run_config(tmp_path)
    # Planted: generation that asks in the other order.
    with monkeypatch.context() as patch:
        right = same_path.fim_prompt_ids
        patch.setattr(same_path, "fim_prompt_ids", lambda _, *parts: right(STARCODER, *parts))
        with pytest.raises(ValueError, match="prompt-differs"):
            train(config)
    manager = train(config)
    store = manager.data.train
    assert any(SUFFIX in store.document(n)[:3] for n in range(store.n_documents))
    found = load_run(manager.folder).tokenizer
    assert found.suffix_first and pickle.loads(pickle.dumps(found)).suffix_first
    found.save(tmp_path / "exported")
    assert load_tokenizer(tmp_path / "exported").suffix_first
    STARCODER.save(tmp_path / "exported")
    assert not load_tokenizer(tmp_path / "exported").suffix_first


def test_rows_with_a_gap_are_trained_in_that_order(tmp_path: Path):
    texts = ["".join(data.function(random.Random(n))) * 2 for n in range(60)]
    rows = [{"prefix": text[:60], "suffix": text[90:], "middle": text[60:90]} for text in texts]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    manager = train(run_config(tmp_path, source=str(source), fim_rate=0.0))
    store = manager.data.train
    assert store.suffix_first and store.suffix_places.all() and is_trimmed(store, 100).any()
