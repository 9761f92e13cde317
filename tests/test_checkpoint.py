"""Checkpoints: exact both ways, whole or not at all, damage noticed before it is parsed."""

from __future__ import annotations

import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from architecture import Decoder
from checkpoint import (
    best_of,
    checkpoints,
    load_state,
    load_weights,
    remove_superseded,
    save_checkpoint,
    verify,
)
from config import ModelConfig

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
