"""A store that is prepared once: the run from it is that from the corpus, and what is wrong is told."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ranks import changed, last_weights, on_ranks, shared, small_run
from safetensors.torch import load_file

import trainingmanager
from config import Config, parse_config
from data import storefolder
from data.storefolder import MANIFEST, TOKENIZER, TOKENS
from data.tokenstore import TokenStore
from dataset import prepare_data
from suites.evaluate import evaluate
from suites.settings import EvalConfig
from tokenizer import CodeTokenizer
from training.beforehand import refuse_mistakes
from training.begin import train
from training.prepare import prepare

pytestmark = pytest.mark.usefixtures("unguarded")


def of_data(config: Config, **values: Any) -> Config:
    return replace(config, data=replace(config.data, **values))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    made = of_data(small_run(tmp_path), heal=False)
    return replace(made, optimizer=replace(made.optimizer, schedule="constant"))


@pytest.fixture
def store(config: Config, tmp_path: Path) -> Path:
    """A store of the run's data, whose source is gone."""
    said = prepare(of_data(config, store=str(tmp_path / "store")))
    assert said.endswith(f"the tokens are in {tmp_path / 'store'}")
    return tmp_path / "store"


def from_store(config: Config, store: Path, **train: Any) -> Config:
    """The same run of another user, who has the store alone and says nothing of how it was made."""
    data = replace(Config().data, store=str(store), cache=config.data.cache + "-other", workers=1)
    return changed(replace(config, data=data), **train)


def test_a_run_from_a_store_is_that_from_the_corpus(config: Config, store: Path, tmp_path: Path) -> None:
    """Trained, resumed and scored, by one process and by two, when the corpus is gone."""
    one = train(config)
    scores = evaluate(EvalConfig(str(one.folder), device="cpu", precision="fp32", cache=config.data.cache))
    os.rename(config.data.source, tmp_path / "gone")
    run, shared_run = tmp_path / "from-store", tmp_path / "of-two"
    own = from_store(config, store, run=str(run))
    train(changed(own, max_steps=3))
    os.rename(store, tmp_path / "moved")
    own = from_store(config, tmp_path / "moved", run=str(run))
    train(changed(own, resume=True))
    ended = on_ranks(2, shared(lambda world: train(changed(own, run=str(shared_run)), world=world)), tmp_path)
    assert [end.code for end in ended] == [0, 0], ended
    expected = last_weights(one.folder)
    for key, values in last_weights(run).items():
        assert values.equal(expected[key]), key
    for key, values in last_weights(shared_run).items():
        assert (values - expected[key]).abs().max() < 1e-4, key
    again = evaluate(EvalConfig(str(run), device="cpu", precision="fp32", cache=own.data.cache))
    for key in ("model", "n-gram", "suite"):
        assert again[key] == scores[key]
    assert (run / "tokenizer").is_dir() and load_file(next(run.glob("checkpoints/*/model.safetensors")))


def test_a_store_is_hashed_once_a_machine_and_again_when_a_file_changes(
    config: Config, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    verify = TokenStore.verify
    monkeypatch.setattr(TokenStore, "verify", lambda own: hashed.append(own.split) or verify(own))
    monkeypatch.setattr(storefolder, "file_system", lambda folder: "ext4")
    monkeypatch.setattr(storefolder, "SETTLED_NS", -(10**18))  # A file may just have been written.

    def opened(number: int, **data: Any) -> int:
        del hashed[:]
        train(changed(of_data(from_store(config, store), **data), run=f"{store}-run-{number}", max_steps=1))
        return len(hashed)

    assert opened(1) == 3
    assert opened(2) == 0
    assert opened(3, verify=True) == 3
    os.utime(store / TOKENS / "train-00000.bin")
    assert opened(4) == 3
    monkeypatch.setattr(storefolder, "file_system", lambda folder: "nfs")
    assert opened(5) == 3


def damage(path: Path, at: int = 10) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


BROKEN = {
    "a bit of the tokens": (
        lambda store: damage(store / TOKENS / "train-00000.bin"),
        "was changed on the disk",
    ),
    "tokens that are cut": (
        lambda store: os.truncate(store / TOKENS / "train-00000.bin", 8),
        "train-00000.bin",
    ),
    "no tokens": (lambda store: shutil.rmtree(store / TOKENS), "tokens"),
    "a bit of the tokenizer": (
        lambda store: damage(store / TOKENIZER / "code_tokenizer.json"),
        "is not what",
    ),
    "a bit of the settings": (lambda store: damage(store / MANIFEST, 200), r"store\.json cannot be used"),
    "another version": (
        lambda store: (store / MANIFEST).write_text(storefolder.sealed({"version": 9})),
        "it is of another version than 1",
    ),
    "settings of nobody": (
        lambda store: (store / MANIFEST).write_text(storefolder.sealed({"version": 1, "data": {"x": 1}})),
        r"store\.json cannot be used",
    ),
    "no JSON": (lambda store: (store / MANIFEST).write_text("x"), r"store\.json cannot be used"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_store_that_is_not_whole_is_refused_and_never_made_again(
    config: Config, store: Path, broken: str
) -> None:
    harm, said = BROKEN[broken]
    harm(store)
    with pytest.raises(ValueError, match=rf"(?s){said}.*make it again with ./plumb prepare"):
        train(from_store(config, store, run=f"{store}-run"))
    assert not Path(f"{store}-run").exists()


def test_a_mistake_is_told_before_the_tokens_are_opened(
    config: Config, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.prepare._opened", None)
    other = from_store(config, store)
    for values, said in (
        ({"fim_rate": 0.5}, "--data.fim_rate is 0.5, and .*store was made with 0.0; leave it out"),
        ({"source": str(tmp_path)}, "--data.source is .*, and .*store was made with .*rows.jsonl"),
        (
            {"store": str(tmp_path / "nope")},
            r"holds no store.json; make it with ./plumb prepare --data.store",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            refuse_mistakes(of_data(other, **values))
    refuse_mistakes(of_data(other, source=config.data.source))
    making = changed(config, prepare=True)
    (tmp_path / "file").touch()
    for place, said in (
        (store, "is there already, and is not written over"),
        (tmp_path / "file", "is there already"),
        (tmp_path / "file" / "below", "file/below"),
    ):
        with pytest.raises(ValueError, match=said):
            refuse_mistakes(of_data(making, store=str(place)))


def test_another_tokenizer_than_the_stores_is_refused(config: Config, store: Path) -> None:
    other = CodeTokenizer.train(["def other(y):\n    return other\n"] * 20, 290)
    with pytest.raises(ValueError, match=r"tokens of the tokenizer .*, and this run's is .* its base"):
        prepare_data(from_store(config, store).data, other)


def test_the_flag_has_a_short_name(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prepare", "--data.source", str(corpus), "--data.cache", str(tmp_path / "cache")]
    words += [
        "--data.validation_one_in",
        "4",
        "--tokenizer.vocab_size",
        "300",
        "--out",
        str(tmp_path / "store"),
    ]
    trainingmanager.main(parse_config(trainingmanager.command_line(words)))
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"the tokens are in {tmp_path / 'store'}")
    saved = json.loads((tmp_path / "store" / MANIFEST).read_text())["value"]
    assert saved["data"]["source"] == str(corpus) and not saved["record"]["report"]["files"]
