"""Experts at the width of Qwen3-Coder-30B-A3B: loaded in 4 bits, tensor by tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import save_file

from config.files import REPOSITORY
from pretrained import FAMILIES, load
from pretrained.family import to_model
from pretrained.load import without_memory

LAYERS = 2  # of 48
CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": LAYERS,
    "head_dim": 128,
    "norm_topk_prob": True,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}
CHILD = """
import json, pathlib, sys, torch
from pretrained import load_pretrained

def memory(kind):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))

pathlib.Path("/proc/self/clear_refs").write_text("5")  # The peak of the parent does not count.
before = memory("VmRSS")
model = load_pretrained(sys.argv[1], torch.bfloat16, weight_format="nf4").model
rose = memory("VmHWM") - before
held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
with torch.inference_mode():
    logits = model(torch.arange(24)[None])
print(json.dumps([rose, held, bool(logits.isfinite().all()), logits.float().std().item()]))
"""


def write(folder: Path) -> int:
    """Write drawn weights, a file for each layer, and return their number."""
    (folder / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    family, files, n = FAMILIES["qwen3_moe"], {}, 0
    shapes = {name: p.shape for name, p in without_memory(to_model(family, CONFIG)).named_parameters()}
    parts = ("embed", "norm", "head", *(f"blocks.{layer}." for layer in range(LAYERS)))
    for number, part in enumerate(parts, 1):
        tensors = {
            family.key(name): torch.ones(shape) if len(shape) == 1 else torch.randn(shape).mul_(0.02)
            for name, shape in shapes.items()
            if name.startswith(part)
        }
        tensors = {key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
        n += sum(tensor.numel() for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}), "utf-8")
    return n


@pytest.mark.slow
def test_experts_at_full_width_load_in_the_memory_of_their_four_bits(tmp_path: Path) -> None:
    n = write(tmp_path)
    assert n > 1.25e9
    made = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert not made.returncode, made.stderr
    rose, held, finite, spread = json.loads(made.stdout)
    # All but norms, routers and tables are in 4.127 bits; some tensors stand in full while they are read.
    assert held < 4.3 / 8 * n and finite and spread > 0.01
    assert held < rose < 1.15 * held + 100e6, (rose, held)
    print(f"{n / 1e9:.2f} billion weights: {held / 1e9:.2f} GB held, {rose / 1e9:.2f} GB at the most")


def write_sparse(folder: Path, layers: int) -> None:
    """Write a folder whose files have headers, and holes in the place of weights."""
    values = CONFIG | {"num_hidden_layers": layers, "vocab_size": 151936}
    (folder / "config.json").write_text(json.dumps(values), "utf-8")
    family, files = FAMILIES["qwen3_moe"], {}
    shapes = {name: p.shape for name, p in without_memory(to_model(family, values)).named_parameters()}
    for layer in range(-1, layers):  # First all that is in no layer.
        header, end, file = {}, 0, f"model-{layer + 2:05}-of-{layers + 1:05}.safetensors"
        for name, shape in shapes.items():
            if name.startswith(f"blocks.{layer}.") if layer >= 0 else not name.startswith("blocks."):
                start, end = end, end + 2 * shape.numel()
                header[family.key(name)] = {
                    "dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]
                }  # fmt: skip
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as written:
            written.write(len(text).to_bytes(8, "little") + text)
            written.truncate(8 + len(text) + end)
        files |= dict.fromkeys(header, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}), "utf-8")


@pytest.mark.slow
def test_the_whole_shape_fits_24_gb_in_nf4_and_is_refused_in_8_bits_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its 18,867 tensors are 61 GB of holes: they are counted, and nothing of them is read."""
    write_sparse(tmp_path, 48)
    memory = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 24 * 10**9 // 4096}
    monkeypatch.setattr(load.os, "sysconf", memory.__getitem__)

    def begun(entries: dict[str, object], *_: object) -> NoReturn:
        raise RuntimeError(f"{len(entries):,} tensors are read")

    monkeypatch.setattr(load, "_read_all", begun)
    for weight_format, needed in (("int8", 31), ("bf16", 61)):
        with pytest.raises(ValueError, match=f"needs {needed} GB of memory in {weight_format} .* has 24 GB"):
            load.load_pretrained(tmp_path, torch.bfloat16, weight_format=weight_format)
    with pytest.raises(RuntimeError, match="18,867 tensors are read"):
        load.load_pretrained(tmp_path, torch.bfloat16, weight_format="nf4")
