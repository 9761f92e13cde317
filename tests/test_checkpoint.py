"""Checkpoints: exact both ways, whole or not at all, damage noticed before it is parsed."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import checkpoint
from architecture import Decoder
from checkpoint import (
    best_of,
    checkpoints,
    load_run,
    load_state,
    load_weights,
    remove_superseded,
    save_checkpoint,
    verify,
)
from config import Config, ModelConfig
from tokenizer import CodeTokenizer

CONFIG = ModelConfig(vocab_size=17, block_size=8, n_layer=1, n_head=2, n_embd=8)
STATE: dict[str, Any] = {
    "run": {"step": 3, "loss": 0.1, "name": "x", "none": None, "flag": True},
    "optimizers": [
        {"state": {0: {"m": torch.arange(3.0)}, 7: {"m": torch.ones(2, 2)}}, "groups": [{"lr": 0.5}]}
    ],
    "random": torch.get_rng_state(),
}


def model(**settings: Any) -> Decoder:
    built = Decoder(replace(CONFIG, **settings))
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter)
    return built


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("tied", [False, True])
def test_weights_and_state_come_back_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    saved, other = model(tie_embeddings=tied), model(tie_embeddings=tied)
    manifest = save_checkpoint(tmp_path, 3, saved, STATE, 1.5, keep=False)
    verify(manifest)
    load_weights(other, manifest)
    assert same(dict(saved.state_dict()), dict(other.state_dict()))
    assert same(STATE, load_state(manifest))
    assert checkpoints(tmp_path) == [manifest]
    assert (other.head.weight is other.embed.weight) == tied


def test_the_best_the_last_and_the_kept_ones_stay(tmp_path: Path) -> None:
    for step, loss, keep in [
        (1, 3.0, False),
        (2, 1.0, False),
        (3, 2.0, True),
        (4, 2.0, True),
        (5, 4.0, False),
        (6, 5.0, False),
    ]:
        save_checkpoint(tmp_path, step, model(), {}, loss, keep)
    remove_superseded(tmp_path, keep=1)
    assert [m.step for m in checkpoints(tmp_path)] == [2, 4, 6]
    best = best_of(checkpoints(tmp_path))
    assert best is not None and best.step == 2
    remove_superseded(tmp_path, keep=0)
    assert [m.step for m in checkpoints(tmp_path)] == [2, 4, 6]


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damage_is_named_before_anything_is_parsed(tmp_path: Path, name: str, damage: str) -> None:
    manifest = save_checkpoint(tmp_path, 1, model(), STATE, None, keep=False)
    file = manifest.folder / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-1])
    else:
        file.unlink()
    with pytest.raises(ValueError, match=name):
        verify(manifest)


def test_a_folder_without_a_readable_manifest_does_not_exist(tmp_path: Path) -> None:
    for content in (
        None,
        "",
        "{",
        "[]",
        '{"step": 1}',
        '{"step": 1, "loss": null, "keep": false, "files": 3}',
        '{"step": 1, "loss": NaN, "keep": false, "files": {}}',
        '{"step": 1, "loss": -Infinity, "keep": false, "files": {}}',
        '{"step": Infinity, "loss": null, "keep": false, "files": {}}',
        "[" * 100_000,
    ):
        folder = tmp_path / "step-00000009"
        folder.mkdir(exist_ok=True)
        if content is not None:
            (folder / "manifest.json").write_text(content)
        assert checkpoints(tmp_path) == []


def test_weights_of_another_config_are_listed(tmp_path: Path) -> None:
    manifest = save_checkpoint(tmp_path, 1, model(), {}, None, keep=False)
    with pytest.raises(ValueError, match=r"another config: .*blocks\.1\..* is missing"):
        load_weights(model(n_layer=2), manifest)
    with pytest.raises(ValueError, match=r"embed\.weight is \(17, 8\), the model's is \(18, 8\)"):
        load_weights(model(vocab_size=18), manifest)
    with pytest.raises(ValueError, match=r"head\.weight is left over"):
        load_weights(model(tie_embeddings=True), manifest)


def test_a_full_disk_costs_the_new_checkpoint_only(tmp_path: Path) -> None:
    """The child may write files of 8 KB at most: its checkpoint fails in the middle of a tensor file."""
    save_checkpoint(tmp_path, 1, model(), STATE, 1.0, keep=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        try:
            save_checkpoint(tmp_path, 2, model(n_embd=64), STATE, 0.5, keep=False)
        except OSError as error:
            os._exit(0 if "older checkpoints are untouched" in str(error) else 3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before == after


def test_a_manifest_names_its_files_and_their_sha256(tmp_path: Path) -> None:
    manifest = save_checkpoint(tmp_path, 12, model(), STATE, 2.0, keep=True)
    values = json.loads((tmp_path / "step-00000012" / "manifest.json").read_text())
    assert values["step"] == 12 and values["loss"] == 2.0 and values["keep"] is True
    assert set(manifest.files) == {"model.safetensors", "state.safetensors", "state.json"}


def kill(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """Let the process, as it were, die where a checkpoint of step 3 is renamed from or to `at`."""

    def replace_or_die(source: Path, target: Path) -> None:
        if at in (source.name, target.name):
            raise KeyboardInterrupt
        os.rename(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", replace_or_die)


def test_a_kill_between_the_renames_loses_no_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    first = save_checkpoint(tmp_path, 3, model(), STATE, 1.0, keep=False)
    kill(monkeypatch, ".step-00000003.tmp")
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 3, model(), STATE, 2.0, keep=False)
    monkeypatch.undo()
    verify(replace(first, folder=tmp_path / ".step-00000003.old"))
    assert checkpoints(tmp_path) == []  # a hidden name does not count, until the next save puts it back
    second = save_checkpoint(tmp_path, 4, model(), STATE, 2.0, keep=False)
    assert checkpoints(tmp_path) == [first, second]
    verify(first)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_rename_puts_the_older_checkpoint_back(tmp_path: Path, monkeypatch: Any) -> None:
    first = save_checkpoint(tmp_path, 3, model(), STATE, 1.0, keep=False)

    def refuse(source: Path, target: Path) -> None:
        if source.name == ".step-00000003.tmp":
            raise OSError("no")
        os.rename(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", refuse)
    with pytest.raises(OSError, match="older checkpoints are untouched"):
        save_checkpoint(tmp_path, 3, model(), STATE, 2.0, keep=False)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    assert checkpoints(tmp_path) == [first]
    verify(first)


def test_leftovers_of_killed_saves_are_removed_by_the_next_one(tmp_path: Path) -> None:
    first = save_checkpoint(tmp_path, 1, model(), STATE, 1.0, keep=False)
    shutil.copytree(first.folder, tmp_path / ".step-00000001.old")  # the new one is there
    shutil.copytree(first.folder, tmp_path / ".step-00000002.old")  # not whole
    (tmp_path / ".step-00000002.old" / "state.json").unlink()
    shutil.copytree(first.folder, tmp_path / ".step-00000007.tmp")
    assert checkpoints(tmp_path) == [first]
    second = save_checkpoint(tmp_path, 3, model(), STATE, 1.0, keep=False)
    assert checkpoints(tmp_path) == [first, second]
    assert len(list(tmp_path.iterdir())) == 2


# --- run folders of strangers ------------------------------------------------------------------------

BYTES = CodeTokenizer([], [], [])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    decoder = model(vocab_size=BYTES.vocab_size)
    BYTES.save(tmp_path / "tokenizer")
    config = replace(Config(), model=decoder.config)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()), "utf-8")
    fingerprints = {"data": "0", "tokenizer": BYTES.fingerprint, "code": "0"}
    (tmp_path / "fingerprints.json").write_text(json.dumps(fingerprints), "utf-8")
    save_checkpoint(tmp_path / "checkpoints", 1, decoder, {}, 2.5, keep=False)
    load_run(tmp_path)
    return tmp_path


def refused(run: Path, name: str) -> None:
    """`load_run` says in one line what is wrong with `name`, and what to do."""
    with pytest.raises(ValueError, match=name) as caught:
        load_run(run)
    assert len(str(caught.value).splitlines()) == 1
    assert any(remedy in str(caught.value) for remedy in ("restore", "use "))


DEEP = b"[" * 5_000


@pytest.mark.parametrize(
    "content", [b"a: [", b"\x00\xff\xfe", b"- 1", b"", b"a: !!python/name:os.system", DEEP]
)
def test_a_damaged_config_is_named(run: Path, content: bytes) -> None:
    (run / "config.yaml").write_bytes(content)
    refused(run, r"config\.yaml")


@pytest.mark.parametrize(
    "content", [None, b"[]", b"{}", b"\xff", b'{"data": 1, "tokenizer": [], "code": 2}', DEEP]
)
def test_damaged_fingerprints_are_named(run: Path, content: bytes | None) -> None:
    (run / "fingerprints.json").unlink()
    if content is not None:
        (run / "fingerprints.json").write_bytes(content)
    refused(run, r"fingerprints\.json")


def test_a_missing_or_damaged_tokenizer_is_named(run: Path) -> None:
    for path in (run / "tokenizer").iterdir():
        path.write_bytes(DEEP)
    refused(run, "tokenizer is damaged")
    shutil.rmtree(run / "tokenizer")
    refused(run, "tokenizer is missing")


def test_garbage_weights_with_the_right_sha256_are_named(run: Path) -> None:
    folder = run / "checkpoints" / "step-00000001"
    for garbage in (b"", b"garbage" * 9, b"\xff" * 64):
        (folder / "model.safetensors").write_bytes(garbage)
        values = json.loads((folder / "manifest.json").read_text("utf-8"))
        values["files"]["model.safetensors"] = hashlib.sha256(garbage).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(values), "utf-8")
        refused(run, r"model\.safetensors is damaged")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"n_embd": 10**8}, r"config\.yaml"),
        ({"n_layer": 10**9}, r"config\.yaml"),
        ({"vocab_size": 10**12}, r"config\.yaml"),
        ({"n_embd": 2**20}, "another config"),
        ({"n_layer": 10**4}, "another config"),
        ({"vocab_size": 2**24}, "another config"),
        ({"n_inner": 2**22}, "another config"),
        ({"head_dim": 2**20, "rotary_dim": 2}, "another config"),
        ({"position": "learned", "block_size": 2**20}, "another config"),
        ({"position": "sinusoidal", "block_size": 10**12}, "config.yaml"),
        ({"vocab_size": 5}, "tokenizer"),
        ({"n_head": 3, "head_dim": 0}, "config.yaml"),
    ],
)
def test_a_giant_or_impossible_model_is_refused_before_it_takes_memory(
    run: Path, monkeypatch: Any, values: dict[str, Any], named: str
) -> None:
    saved = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    saved["model"] |= values
    (run / "config.yaml").write_text(yaml.safe_dump(saved), "utf-8")

    def build(config: ModelConfig) -> Decoder:
        assert torch.empty(0).is_meta and config.n_layer < 100
        return Decoder(config)

    monkeypatch.setattr(checkpoint, "Decoder", build)
    refused(run, named)
