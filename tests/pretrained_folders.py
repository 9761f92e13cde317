"""A small Llama in a folder, and what tests of such folders share."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may reach for the network

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from architecture import Decoder
from config import ModelConfig
from pretrained import load_pretrained, save_pretrained
from tokenizer import STARTS_GAPS, BPETokenizer

transformers.logging.set_verbosity_error()

LLAMA = ModelConfig(
    vocab_size=300,
    block_size=32,
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    n_embd=16,
    n_inner=24,
    norm="rms",
    norm_weight=True,
    mlp="swiglu",
    qk_norm=False,
    init="normal",
)
TOKENS = torch.arange(20)[None]


def llama_folder(folder: Path, **settings: Any) -> Path:
    """Save a small Llama of fixed weights; the settings are those of `save_pretrained`."""
    torch.manual_seed(0)
    save_pretrained(Decoder(LLAMA), None, folder, **settings)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def same(a: Decoder, b: Decoder) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


def tokenizer_with_gaps(texts: list[str], size: int, folder: Path) -> None:
    """A tokenizer that has tokens for gaps, in a folder of the published kind."""
    BPETokenizer.train(texts, size).save(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8")) | {STARTS_GAPS: True}
    path.write_text(json.dumps({key: config[key] for key in config if key != "plumb_kind"}), "utf-8")


def to_bin(folder: Path, extra: dict[str, Any]) -> None:
    torch.save(tensors_of(folder) | extra, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def refused(folder: Path, match: str) -> None:
    """One sentence, at once: by the processor's clock, since other work may run beside."""
    start = time.process_time()
    with pytest.raises(ValueError, match=match) as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 4000
    assert time.process_time() - start < 5
