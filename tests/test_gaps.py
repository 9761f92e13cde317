"""Filling in the middle: how gaps are made, stored, trimmed and trained."""

from __future__ import annotations

import dataclasses
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import (
    Bytes,
    all_targets,
    files_of,
    one_row,
    same,
    settings_for,
    stored_parts,
    targets,
    write_rows,
)
from test_generate_command import STARCODER

import guards.same_path
from config import Config, TokenizerConfig
from data import corpus, prepare, tokenstore
from data.corpus import split_documents, training_texts
from data.documents import SPLITS, Document, Report
from data.fim import (
    fewest_gap_ids,
    fim_markers,
    fim_prompt_ids,
    gap_of,
    gap_start,
    in_text_order,
    text_of_document,
    trim_fim_prompt,
)
from data.tokenstore import TokenStore, build_store
from dataset import (
    Batches,
    gaps_in_sight,
    is_trimmed,
    prepare_data,
    validation_batches,
)
from generation.text import trim_prompt
from guards.labels import prompt_errors
from selftest import data
from selftest.prove_resume import run_difference
from selftest.run import small_config
from suites.tokens import ngram_scores, train_ngram
from tokenizer import CodeTokenizer
from training.begin import train

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
    for split, document in split_documents(config):
        store, n = getattr(prepared, split), numbers[split]
        numbers[split] += 1
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
            if len(kept) < len(prompt):  # Each loses only while it is the longer one.
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
    # The hash is the same on every machine, in every version.
    assert gap_of("def f(x):\n    return x\n", 1.0) == (13, 17)


def test_the_text_of_a_document_with_a_gap_inside_a_word_is_its_own(tmp_path: Path) -> None:
    """All ids at once gave `cla ss`, of which the second opinion learned another tokenizer."""
    texts = [
        f'def f{n}(x):\n    """Doc {n}."""\n    return x\n\n\nclass C{n}:\n    a = {n}\n' for n in range(60)
    ]
    rows = [{"text": text, "path": f"p{n}"} for n, text in enumerate(texts)]
    config = settings_for(write_rows(tmp_path / "rows.jsonl", rows), fim_rate=1.0)
    tokenizer = CodeTokenizer.train(texts, 600)
    store, markers = prepare_data(config, tokenizer).train, fim_markers(tokenizer)
    stored = [store.document(n) for n in range(store.n_documents)]
    written = [document.text for split, document in split_documents(config) if split == "train"]
    assert [text_of_document(tokenizer, ids) for ids in stored] == written
    assert [tokenizer.decode(in_text_order(ids, markers).tolist()) for ids in stored] != written


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
    documents = [document for split, document in split_documents(config) if split == "train"]
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

    # Planted: gaps in both splits.
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
                row_starts = (targets - 1) // T * T
                seen += int((start + lead >= row_starts).sum())
                filled += len(targets)
            start += len(ids)
    assert gaps_in_sight(store, markers, T) == pytest.approx(seen / filled, abs=0.03)


class Side(str):
    """The name of a split that passes for training where it is compared."""

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
    with pytest.raises(ValueError, match="line 1 cannot be tokenised"):
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
        one_row(tmp_path, {"prompt": "a", "completion": "b"}, fim_rate=0.5)


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
    monkeypatch.setattr(prepare, "POOL_PAYS_BYTES", 0)
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
    assert list(training_texts(split_documents(config))) == ["a", "c", "b", "a", "d", "b", "a", "b"]


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
