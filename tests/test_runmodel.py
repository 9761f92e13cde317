"""The model of a run: opened again as it was, or refused in one sentence that names the file."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from architecture import Decoder
from config import Config, ModelConfig
from tokenizer import CodeTokenizer
from training import checkpoint
from training.checkpoint import save_checkpoint
from training.run import load_run

CONFIG = ModelConfig(vocab_size=17, block_size=8, n_layer=1, n_head=2, n_embd=8)


def model(**settings: Any) -> Decoder:
    built = Decoder(replace(CONFIG, **settings))
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter)
    return built


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
        del values["sha256"]
        values["files"]["model.safetensors"] = hashlib.sha256(garbage).hexdigest()
        (folder / "manifest.json").write_text(checkpoint._with_own_sha256(values), "utf-8")
        refused(run, r"model\.safetensors is damaged")


def test_a_damaged_best_checkpoint_is_passed_over_and_named(run: Path, capsys: Any) -> None:
    for step, loss in ((2, 1.0), (3, 2.0), (4, 3.0)):
        save_checkpoint(run / "checkpoints", step, model(vocab_size=BYTES.vocab_size), {}, loss, keep=False)
    assert load_run(run).step == 2 and load_run(run, "last").step == 4 and not capsys.readouterr().err
    best, last = run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000004"
    weights, manifest = (best / "model.safetensors").read_bytes(), (best / "manifest.json").read_bytes()
    (best / "model.safetensors").write_bytes(b"")
    assert load_run(run).step == 3 and "passed over: " in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"step-00000002/model\.safetensors has SHA-256"):
        load_run(best)
    (best / "model.safetensors").write_bytes(weights)
    (best / "manifest.json").write_bytes(manifest[:-1])  # With its loss unknown, it is named.
    assert load_run(run).step == 3 and "step-00000002" in capsys.readouterr().err
    (last / "state.json").unlink()
    assert load_run(run, "last").step == 3 and "step-00000004" in capsys.readouterr().err


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

    monkeypatch.setattr("training.run.Decoder", build)
    refused(run, named)
