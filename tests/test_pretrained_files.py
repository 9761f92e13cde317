"""Folders of published models: what is read and written, and those that a stranger broke on purpose."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.parse import urlsplit

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may reach for the network

import pytest
import torch
import transformers
from safetensors import deserialize
from safetensors.torch import load_file, save_file
from torch import Tensor

from architecture import Decoder
from config import ModelConfig
from data.cache import SUMS, seal_folder, sealed
from generation.settings import GenerationConfig
from generation.text import generate
from pretrained import FAMILIES, choose_family, load_pretrained, save_pretrained
from pretrained.family import from_model, lacks, to_model
from pretrained.folder import inner_path, parse_header, parse_json, read_tensors
from pretrained.load import StoredWeights, _NoInit
from tokenizer import BPETokenizer, CodeTokenizer, PretrainedTokenizer, load_tokenizer

transformers.logging.set_verbosity_error()

HOUSE = Path(__file__).parents[1]
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama."""
    torch.manual_seed(0)
    save_pretrained(Decoder(LLAMA), None, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The same in several files."""
    torch.manual_seed(0)
    save_pretrained(Decoder(LLAMA), None, tmp_path / "shards", max_shard_bytes=20_000)
    return tmp_path / "shards"


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


# --- loading ----------------------------------------------------------------------------------------


def test_shards_are_read_as_one_file_is(folder, shards):
    names = sorted(path.name for path in shards.glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert all(sum(t.nbytes for t in load_file(shards / name).values()) <= 20_000 for name in names)
    index = json.loads((shards / "model.safetensors.index.json").read_text("utf-8"))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(folder).values())
    assert same(load_pretrained(folder).model, load_pretrained(shards).model)
    opened = transformers.AutoModelForCausalLM.from_pretrained(shards).eval()
    torch.testing.assert_close(
        opened(TOKENS).logits, load_pretrained(folder).model(TOKENS), atol=1e-6, rtol=1e-6
    )


def test_shards_of_transformers_are_read(folder, tmp_path):
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder)
    opened.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    assert same(load_pretrained(folder).model, load_pretrained(tmp_path / "theirs").model)


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "llama3"])
@pytest.mark.parametrize("family", ["llama", "phi", "starcoder2", "qwen2"])
def test_the_config_of_transformers_4_means_the_same(family, kind):
    more = {} if kind == "default" else {"factor": 2.0}
    if kind == "llama3":
        more |= {"low_freq_factor": 1.0, "high_freq_factor": 3.0, "original_max_position_embeddings": 64}
    new = {"rope_parameters": {"rope_type": kind, "rope_theta": 5e5} | more}
    old: dict[str, Any] = {"rope_theta": 5e5, "rope_scaling": {"type": kind} | more if more else None}
    if family == "phi":
        new["rope_parameters"]["partial_rotary_factor"] = old["partial_rotary_factor"] = 0.25
    config = to_model(FAMILIES[family], new)
    assert config == to_model(FAMILIES[family], old)
    assert config.rope_scaling == ("none" if kind == "default" else kind) and config.rope_theta == 5e5
    assert config.rotary_dim == config.head_dim // (4 if family == "phi" else 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family):
    """transformers leaves out what is default, so that a config.json may hold hardly anything."""
    theirs = transformers.CONFIG_MAPPING[family]().to_dict()
    assert to_model(FAMILIES[family], {}) == to_model(FAMILIES[family], theirs)
    for key, value in FAMILIES[family].defaults.items():
        if value is not None and key in theirs and key != "sliding_window":
            assert theirs[key] == value, key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_that_of_the_file_or_the_one_asked_for(dtype, folder, tmp_path):
    save_pretrained(load_pretrained(folder, dtype).model, None, tmp_path / "cast")
    assert json.loads((tmp_path / "cast" / "config.json").read_text("utf-8"))["dtype"] == str(dtype)[6:]
    found = load_pretrained(tmp_path / "cast").model
    assert {p.dtype for p in found.parameters()} == {dtype}
    assert torch.equal(found.embed.weight, tensors_of(folder)["model.embed_tokens.weight"].to(dtype))
    back = load_pretrained(tmp_path / "cast", torch.float32).model
    assert {p.dtype for p in back.parameters()} == {torch.float32} and back.embed.weight.requires_grad


def test_loading_draws_nothing_and_imports_no_algebra(folder):
    before = torch.get_rng_state()
    load_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)
    program = "import sys; from pretrained import load_pretrained; load_pretrained(sys.argv[1]); "
    program += "print('sympy' in sys.modules)"  # 1.6 s, for the meta tensors' first random numbers
    command = [sys.executable, "-c", program, str(folder)]
    assert subprocess.run(command, stdout=subprocess.PIPE, cwd=HOUSE).stdout == b"False\n"


def test_the_fingerprint_is_of_the_content_alone(folder, shards, tmp_path):
    found = load_pretrained(folder)
    first = found.fingerprint
    assert len(first) == 64 and load_pretrained(shards).fingerprint == first
    with torch.no_grad():
        found.model.embed.weight.add_(1)  # what training does to the model is not the folder's
    assert found.fingerprint == first and load_pretrained(folder, torch.bfloat16).fingerprint == first
    config = json.loads((folder / "config.json").read_text("utf-8"))
    rope = config.pop("rope_parameters")
    older = config | {"rope_theta": rope["rope_theta"], "torch_dtype": config.pop("dtype"), "new": 1}
    (folder / "config.json").write_text(json.dumps(older), "utf-8")
    assert load_pretrained(folder).fingerprint == first
    change_tensors(
        folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    )
    assert load_pretrained(folder).fingerprint == first
    to_bin(folder, {})
    assert load_pretrained(folder).fingerprint == first


@pytest.mark.parametrize("change", ["a bit", "two tensors", "a dtype", "a setting"])
def test_the_fingerprint_sees(change, folder):
    first = load_pretrained(folder).fingerprint

    def swap(t: dict[str, Tensor]) -> None:
        q, o = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"
        t[q], t[o] = t[o], t[q]

    if change == "a setting":
        change_json(folder / "config.json", rms_norm_eps=2e-5)
    elif change == "a bit":
        change_tensors(folder, lambda t: t["model.norm.weight"].view(torch.int32)[3:4].bitwise_xor_(1))
    elif change == "a dtype":
        change_tensors(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].bfloat16()}))
    else:
        change_tensors(folder, swap)
    assert load_pretrained(folder, torch.float32).fingerprint != first


def test_a_fingerprint_of_other_files_than_were_read_is_refused(folder):
    found = load_pretrained(folder)
    change_tensors(folder, lambda t: t["model.norm.weight"].add_(1))
    with pytest.raises(ValueError, match="was changed while or after the model was loaded"):
        _ = found.fingerprint
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        _ = found.fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_cut_while_it_is_read_is_refused(dtype, folder, monkeypatch):
    import pretrained.load

    def cut(*arguments: Any) -> StoredWeights:
        os.truncate(folder / "model.safetensors", 9000)
        return StoredWeights.of(*arguments)

    monkeypatch.setattr(pretrained.load, "StoredWeights", SimpleNamespace(of=cut))
    with pytest.raises(ValueError, match="ends early; it was cut while it was read"):
        load_pretrained(folder, dtype)


def test_a_base_with_checksums_is_opened_as_it_was_written_alone(folder):
    BPETokenizer.train(["aa bb"], 300).save(folder)
    seal_folder(folder)
    load_pretrained(folder)
    BPETokenizer.train(["cc dd"], 300).save(folder)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not what was written there; restore it"):
        load_pretrained(folder)
    (folder / SUMS).unlink()
    load_pretrained(folder)
    for name in ("../model", "/dev/zero"):  # a stranger's checksums read no other file
        (folder / SUMS).write_text(sealed({name: "0"}), "utf-8")
        with pytest.raises(ValueError, match="is not what was written there"):
            load_pretrained(folder)


def test_two_dtypes_need_one_asked_for(folder):
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].half()}))
    with pytest.raises(ValueError, match="holds tensors of F16 and F32; say which dtype"):
        load_pretrained(folder)
    assert load_pretrained(folder, torch.float32).model.head.weight.dtype == torch.float32


def test_a_tied_head_is_one_parameter_and_is_left_out(tmp_path):
    torch.manual_seed(0)
    model = Decoder(replace(LLAMA, tie_embeddings=True))
    save_pretrained(model, None, tmp_path / "tied")
    assert "lm_head.weight" not in tensors_of(tmp_path / "tied")
    found = load_pretrained(tmp_path / "tied").model
    assert found.head.weight is found.embed.weight and same(found, model)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    assert opened.lm_head.weight is opened.model.embed_tokens.weight

    embedding = tensors_of(tmp_path / "tied")["model.embed_tokens.weight"]
    change_tensors(tmp_path / "tied", lambda t: t.update({"lm_head.weight": embedding.clone()}))
    assert same(load_pretrained(tmp_path / "tied").model, model)
    change_tensors(tmp_path / "tied", lambda t: t.pop("model.embed_tokens.weight"))
    assert same(load_pretrained(tmp_path / "tied").model, model)
    change_tensors(tmp_path / "tied", lambda t: t.update({"model.embed_tokens.weight": embedding + 1}))
    with pytest.raises(ValueError, match=r"has a lm_head\.weight that is not its model.embed_tokens.weight"):
        load_pretrained(tmp_path / "tied")


def test_every_wrong_key_is_in_one_error(folder):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 3)
        tensors["lm_head.bias"] = torch.zeros(300)
        del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.k_proj.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(24, 17)
        tensors["lm_head.weight"] = torch.zeros(300, 16, dtype=torch.int64)

    change_tensors(folder, change)
    with pytest.raises(ValueError, match=r"does not hold the model of its config\.json") as error:
        load_pretrained(folder)
    for part in (
        "model.norm.weight is missing",
        "model.layers.1.self_attn.k_proj.weight is missing",
        "layers.9.mlp.up_proj.weight' is unexpected",
        "'lm_head.bias' is unexpected",
        "model.layers.0.mlp.up_proj.weight is F32[24, 17], [24, 16] of floats is expected",
        "lm_head.weight is I64[300, 16]",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_buffers_of_old_files_are_passed_over(folder, tmp_path):
    change_tensors(
        folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    )
    load_pretrained(folder)
    for family, keys in {
        "gpt_bigcode": ["transformer.h.1.attn.bias", "transformer.h.1.attn.masked_bias", "transformer.bias"],
        "codegen": ["transformer.h.0.attn.causal_mask", "transformer.h.0.attn.masked_bias"],
    }.items():
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 300}
        config = to_model(FAMILIES[family], sizes | ({"rotary_dim": 4} if family == "codegen" else {}))
        save_pretrained(Decoder(config), None, tmp_path / family)
        buffers = {key: torch.ones(1, 1, 4, 4, dtype=torch.bool) for key in keys}
        change_tensors(tmp_path / family, lambda t, buffers=buffers: t.update(buffers))
        load_pretrained(tmp_path / family)


# Not getrusage's: what the process that started it once held counts there.
PEAK = """
def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
"""


def test_memory_holds_the_weights_once(tmp_path):
    """The peak of another process that loads 55 MB, over what it held before: at most 1.1 times that."""
    config = replace(LLAMA, vocab_size=20_000, n_embd=256, n_inner=2048)
    with torch.device("meta"):
        model = Decoder(config)
    for dtype, name in ((torch.float32, "pickle"), (torch.float32, "whole"), (torch.bfloat16, "half")):
        save_pretrained(model.to_empty(device="cpu").to(dtype), None, tmp_path / name)
    to_bin(tmp_path / "pickle", {})
    size = sum(p.numel() for p in model.parameters()) * 4
    for dtype, name in (
        (torch.float32, "small"),
        (torch.float32, "small-pickle"),
        (torch.bfloat16, "small-half"),
    ):
        save_pretrained(Decoder(LLAMA).to(dtype), None, tmp_path / name)
    to_bin(tmp_path / "small-pickle", {})
    program = (
        "import os, sys, torch; from pretrained import load_pretrained\n"
        f"{PEAK}\n"
        "def first(): return [load_pretrained(folder, torch.float32) for folder in sys.argv[1:4]]\n"
        "first()\n"
        "for folder in sys.argv[4:]:\n"
        "    if os.fork() == 0:\n"
        # The pages of libraries count in each process that reads them, and what converts bf16 to fp32 has
        # 6 MB of them in torch's build for CUDA. So each way of loading is gone through once before.
        "        first()\n"
        "        before = peak(); kept = load_pretrained(folder, torch.float32)\n"
        "        print(peak() - before, flush=True); os._exit(0)\n"
        "    assert os.wait()[1] == 0"
    )
    cases = {"whole": 1.1, "half": 1.1, "pickle": 1.1 + 2**25 / size}  # mapped 32 MB at a time
    folders = [str(tmp_path / name) for name in ("small", "small-pickle", "small-half", *cases)]
    command = [sys.executable, "-c", program, *folders]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HOUSE).stdout
    for peak, (name, most) in zip(out.split(), cases.items(), strict=True):
        assert 0.5 * size < int(peak) < most * size, (name, int(peak) / size)


@pytest.mark.slow
@pytest.mark.parametrize("max_shard_bytes", [2**40, 2**29])
def test_a_model_of_a_billion_parameters_loads_in_its_own_size_and_decodes(max_shard_bytes, tmp_path):
    """The shape of StarCoderBase-1B, random weights, bf16: 2.3 GB."""
    sizes = {
        "vocab_size": 49152,
        "n_positions": 8192,
        "n_embd": 2048,
        "n_layer": 24,
        "n_head": 16,
        "n_inner": 8192,
    }
    with torch.device("meta"):
        model = Decoder(to_model(FAMILIES["gpt_bigcode"], sizes))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.head.weight = model.embed.weight
    size = sum(p.nbytes for p in model.parameters())
    assert size > 2.2e9
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    save_pretrained(model, None, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    del model
    program = (
        "import sys, torch\n"
        f"{PEAK}\n"
        "before = peak()\n"
        "from pretrained import load_pretrained\n"
        "found = load_pretrained(sys.argv[1], torch.bfloat16)\n"
        "print(peak() - before)\n"
        "from generate import GenerationConfig, generate_ids\n"
        "print(generate_ids(found.model, [[1, 2, 3]], GenerationConfig(max_new_tokens=4))[0].ids)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model")]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=HOUSE).stdout
    peak, ids = out.splitlines()
    assert size < int(peak) < 1.1 * size, int(peak) / size
    assert len(json.loads(ids)) == 4


# --- saving -----------------------------------------------------------------------------------------


def test_a_model_from_scratch_is_written_in_the_family_that_has_its_parts():
    assert choose_family(LLAMA.resolved()).model_type == "llama"
    assert choose_family(replace(LLAMA, qkv_bias=True).resolved()).model_type == "qwen2"
    layer = {"norm": "layer", "norm_bias": True, "mlp": "gelu_tanh"}
    assert choose_family(replace(LLAMA, **layer).resolved()).model_type == "starcoder2"


def test_what_no_family_has_is_named():
    with pytest.raises(ValueError, match=r"no published family can express this model.*model\.qk_norm True"):
        choose_family(ModelConfig(vocab_size=300).resolved())
    with pytest.raises(ValueError, match=r"llama can express|llama.*has no model\.qkv_bias True"):
        choose_family(replace(LLAMA, qkv_bias=True).resolved(), "llama")
    with pytest.raises(ValueError, match="the family 'gpt9' is not known; known are gpt_bigcode, codegen"):
        choose_family(LLAMA.resolved(), "gpt9")


@pytest.mark.parametrize(
    "change",
    [
        {"position": "sinusoidal"}, {"position": "none"}, {"mlp": "relu2"}, {"fused_qkv": True},
        {"head_bias": True}, {"rotary_layout": "interleaved"}, {"rotary_dim": 2}, {"norm_weight": False},
        {"block": "parallel"}, {"sliding_window": 4}, {"dropout": 0.1}, {"qk_norm": True}, {"norm": "layer"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_no_part_is_dropped_in_silence(change):
    config = replace(LLAMA, **change).resolved()
    lacking = lacks(FAMILIES["llama"], config)
    assert lacking and (
        next(iter(change)) in " ".join(lacking) or "activation" in lacking[0] or "hidden_act" in lacking[0]
    )


def test_a_folder_with_something_in_it_is_left_alone(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="is not empty; give a new folder"):
        save_pretrained(Decoder(LLAMA), None, folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    import pretrained.save

    monkeypatch.setattr(pretrained.save, "write_atomically", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_pretrained(Decoder(LLAMA), None, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


# --- hostile folders --------------------------------------------------------------------------------


def write_safetensors(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def as_json(**entries: Any) -> bytes:
    return json.dumps(entries).encode()


HEADERS: dict[str, tuple[bytes, int, str]] = {
    "empty": (b"", 0, "is no sound"),
    "no JSON": (b"{'a': 1}", 0, "is no sound"),
    "no object": (b"[1, 2]", 0, "must be an object"),
    "no UTF-8": (b'{"\xff": 1}', 0, "is no sound"),
    "deep": (b"[" * 100_000, 0, "is no sound|nested too deeply"),
    "twice": (as_json(a=entry())[:-1] + b"," + as_json(a=entry())[1:], 8, "'a' stands twice"),
    "not a number": (b'{"a": {"shape": [NaN]}}', 8, "NaN is no JSON number"),
    "many digits": (b'{"a": {"shape": [' + b"9" * 9999 + b"]}}", 8, "is no sound"),
    "no offsets": (
        as_json(a={"dtype": "F32", "shape": [2]}),
        8,
        "must have a dtype, a shape and data_offsets",
    ),
    "overlap": (as_json(a=entry(), b=entry(offsets=(4, 12))), 12, "starts at byte 4 .* where 8"),
    "gap": (as_json(a=entry(), b=entry(offsets=(12, 20))), 20, "starts at byte 12 .* where 8"),
    "past the end": (as_json(a=entry()), 4, "fill 8 bytes, and 4 follow"),
    "more behind": (as_json(a=entry()), 9, "fill 8 bytes, and 9 follow"),
    "absurd": (as_json(a=entry(shape=(2**40, 2**40))), 8, "needs .* bytes, its data_offsets hold 8"),
    "overflowing": (as_json(a=entry(shape=(2**32, 2**32, 4), offsets=(0, 0))), 0, "needs .* bytes"),
    "negative": (as_json(a=entry(shape=(-2,), offsets=(8, 0))), 8, "has the shape"),
    "no whole number": (as_json(a=entry(shape=(2.0,))), 8, "has the shape"),
    "a truth": (as_json(a=entry(shape=(True, 2))), 8, "has the shape"),
    "many sizes": (as_json(a=entry(shape=[2**62] * 1000)), 8, "has the shape"),
    "three offsets": (as_json(a=entry(offsets=(0, 4, 8))), 8, "two are needed"),
    "unknown dtype": (as_json(a=entry(dtype="F128")), 8, "unknown dtype 'F128'"),
    "no dtype": (as_json(a=entry(dtype=["F32"])), 8, "unknown dtype"),
    "metadata": (as_json(__metadata__={"format": 1}), 0, "must hold texts only"),
}


def refused(folder: Path, match: str) -> None:
    """One sentence, at once: by the processor's clock, since other work may run beside."""
    start = time.process_time()
    with pytest.raises(ValueError, match=match) as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 4000
    assert time.process_time() - start < 5


@pytest.mark.parametrize("name", HEADERS)
def test_an_unsound_header_is_refused(name, folder):
    header, n_data, match = HEADERS[name]
    write_safetensors(folder / "model.safetensors", header, bytes(n_data))
    refused(folder, match)


@pytest.mark.parametrize("length", [0, 7, 9, 2**40, 2**63 - 1, 2**64 - 1])
def test_a_header_longer_than_its_file_is_refused(length, folder):
    write_safetensors(folder / "model.safetensors", b"{}", length=length)
    refused(folder, "says that its header has|is no sound")


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 50, 2000, 30_000])
def test_a_cut_file_is_refused(kept, folder):
    whole = (folder / "model.safetensors").read_bytes()
    assert kept < len(whole)
    (folder / "model.safetensors").write_bytes(whole[:kept])
    refused(folder, "says that its header has|is no sound")


def mutated_values(values: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A header's values with one of them changed; most of the others remain sound."""
    odd = [-1, 0, 1, 2, 4, 8, 2**31, 2**62, 2**64, 1.0, True, None, "F32", "BF16", "F64", "U8", "F1", [], {}]
    values = deepcopy(values)
    first, second = (draw.choice([key for key in values if key != "__metadata__"]) for _ in range(2))
    one, other = values[first], values[second]
    kind = draw.randrange(8)
    if kind == 0:
        values[first] = draw.choice(odd)
    elif kind == 1:
        one[draw.choice((*one, "more"))] = draw.choice(odd)
    elif kind == 2:
        del one[draw.choice(list(one))]
    elif kind == 3:
        one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    elif kind == 4:
        numbers = one[draw.choice(("shape", "data_offsets"))]
        at = draw.randrange(len(numbers) + 1)
        numbers[at : at + draw.randrange(2)] = [draw.choice((*odd, *numbers))]
    elif kind == 5:
        by = draw.choice((-8, -1, 1, 4, 8))
        one["data_offsets"] = [n + by for n in one["data_offsets"]]
    elif kind == 6:
        del values[first]
    else:
        values["__metadata__"] = draw.choice((*odd, {"format": draw.choice(odd)}, {"format": "pt"}))
    return values


def mutated_text(text: bytes, draw: random.Random) -> bytes:
    """A header with some bytes changed, lost, put in or repeated."""
    words = [
        b"9" * 30,
        b"-1",
        b"null",
        b"[]",
        b"{}",
        b'"',
        b"\x00",
        b"\xff",
        b"1e999",
        b"NaN",
        b"[" * 50,
        b",",
    ]
    changed = bytearray(text)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        at, kind = draw.randrange(len(changed)), draw.randrange(5)
        if kind == 0:
            changed[at] = draw.randrange(256)
        elif kind == 1:
            del changed[at : at + draw.randrange(1, 20)]
        elif kind == 2:
            changed[at:at] = draw.choice(words)
        elif kind == 3:
            changed[at:at] = changed[at : at + draw.randrange(1, 90)]
        else:
            number = draw.choice((0, 1, 2**31, 2**63, 2**64 - 1))
            changed[at : at + draw.randrange(1, 9)] = str(number).encode()
        changed = changed or bytearray(b" ")
    return bytes(changed)


def test_ten_thousand_mutated_headers():
    """Each is refused by ValueError, or means the same to the reference reader, over the same bytes.

    The reference takes more: a key that stands twice, for one.
    """
    values = {
        "a": entry("F32", (2, 3), (0, 24)),
        "b": entry("BF16", (4,), (24, 32)),
        "empty": entry("F32", (0, 7), (32, 32)),
        "c": entry("F32", (2,), (32, 40)),
        "d": entry("U8", (2, 2, 2), (40, 48)),
        "__metadata__": {"format": "pt"},
    }
    header, data = as_json(**values), bytes(range(48))
    draw = random.Random(0)
    accepted = 0
    for i in range(10_000):
        text = mutated_text(header, draw) if i % 2 else as_json(**mutated_values(values, draw))
        try:
            entries = parse_header(text, len(data))
        except ValueError:
            continue
        accepted += 1
        whole = struct.pack("<Q", len(text)) + text + data
        expected = dict(deserialize(whole))
        assert entries.keys() == expected.keys()
        for key, found in entries.items():
            there = expected[key]
            assert (found.dtype, list(found.shape)) == (there["dtype"], there["shape"])
            assert whole[found.start :][: len(there["data"])] == bytes(there["data"])
    assert 200 < accepted < 5000


def test_every_family_refuses_absurd_configs_by_value_error():
    draw = random.Random(0)
    absurd = [None, True, -1, 0, 1, 2**31, 2**62, 2**70, 1e300, float("nan"), float("inf"), "", "x", [], {},
              [[]], {"rope_type": "yarn"}, {"rope_type": []}, {"rope_theta": "x"}, {"type": "linear"},
              {"type": "linear", "factor": -1}, ["sliding_attention"] * 32, 0.5]  # fmt: skip
    for family in FAMILIES.values():
        keys = list(family.defaults)
        for _ in range(500):
            values = {key: draw.choice(absurd) for key in draw.sample(keys, draw.choice((1, 1, 2, 3)))}
            try:
                config = to_model(family, values)
            except ValueError as error:
                assert len(str(error)) < 500
            else:
                assert 1 <= config.n_layer <= 10_000 and 1 <= config.vocab_size <= 2**24


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown family": ({"model_type": "mamba"}, "has model_type 'mamba'; known are gpt_bigcode, codegen"),
    "family of another type": ({"model_type": ["llama"]}, "has model_type"),
    "wide": ({"hidden_size": 2**40}, "model.n_embd is 1099511627776; it must be at most"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it must"),
    "more layers than tensors": ({"num_hidden_layers": 9999}, "has 21 tensors, too few for the 9999 layers"),
    "a large vocabulary": ({"vocab_size": 2**24}, "does not hold the model"),
    "everything large": ({"hidden_size": 2**20, "intermediate_size": 2**22, "num_attention_heads": 2**20,
                          "num_key_value_heads": 2**20, "head_dim": 2**20}, "does not hold|asks for tensors"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be at least 1"),
    "a text": ({"hidden_size": "16"}, "hidden_size is '16'; it must be int"),
    "a truth": ({"hidden_size": True}, "hidden_size is True; it must be int"),
    "negative eps": ({"rms_norm_eps": -1.0}, "model.norm_eps is -1.0; it must be above 0"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'; known are"),
    "a factor below one": ({"rope_scaling": {"type": "linear", "factor": 0.1}}, "model.rope_factor is 0.1"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "rope_factor of rope_type linear is None"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; known are silu"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "it is quantised"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_an_absurd_config_is_refused(name, folder):
    values, match = CONFIGS[name]
    if "rope_scaling" not in values:
        change_json(folder / "config.json", **values)
    else:
        kept = json.loads((folder / "config.json").read_text("utf-8"))
        del kept["rope_parameters"]
        (folder / "config.json").write_text(json.dumps(kept | values), "utf-8")
    refused(folder, match)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 10_000, '{"a": "\\ud800']
)
def test_a_config_that_is_no_json_object_is_refused(text, folder):
    (folder / "config.json").write_text(text, "utf-8")
    refused(folder, "config.json")


def test_a_key_that_stands_twice_behind_many_costs_no_time():
    keys = [*range(60_000), 59_999]  # to count each would take a minute
    text = "{" + ",".join(f'"{key}":0' for key in keys) + "}"
    start = time.perf_counter()
    with pytest.raises(ValueError, match="the key '59999' stands twice"):
        parse_json(text.encode())
    assert time.perf_counter() - start < 5


def test_layers_of_empty_tensors_are_refused_before_they_are_made(folder):
    """They fill no byte, so that a small file can hold as many tensors as config.json asks for layers."""
    keys, n = tensors_of(folder), 3_000
    header = {f"t{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(n)}
    write_safetensors(folder / "model.safetensors", json.dumps(header).encode())
    change_json(folder / "config.json", num_hidden_layers=n)
    refused(folder, "model.layers.0.input_layernorm.weight is missing")
    keys = {key.replace("layers.0.", f"layers.{i}.") for key in keys for i in range(n)}
    header = {key: entry(shape=(0,), offsets=(0, 0)) for key in keys}
    write_safetensors(folder / "model.safetensors", json.dumps(header).encode())
    refused(folder, r"is F32\[0\], \[.*\] of floats is expected")  # the keys are right


@pytest.mark.parametrize("key", ["AutoModelForCausalLM", "AutoModel", "AutoConfig", "AutoTokenizer", None])
def test_code_of_a_folder_is_never_run(key, folder, tmp_path):
    """Where it is the model's, the folder is refused: CodeGen2 says `codegen` and has 8 shards, not 4."""
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (folder / "modeling_evil.py").write_text(code)
    (folder / "__init__.py").write_text(code)
    change_json(folder / "config.json", auto_map={key: "modeling_evil.Evil"} if key else None)
    if key in ("AutoTokenizer", None):
        load_pretrained(folder)
    else:
        refused(folder, "config.json does not describe a model known here: auto_map names code of its own")
    change_json(folder / "config.json", auto_map="modeling_evil.Evil")
    refused(folder, "auto_map names code of its own, 'modeling_evil.Evil'")
    assert not (tmp_path / "ran").exists()


def break_index(shards: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = shards / "model.safetensors.index.json"
    values = json.loads(path.read_text("utf-8"))
    change(values)
    path.write_text(json.dumps(values), "utf-8")


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "x/../model-00001-of-00003.safetensors", "", ".", "..", None, 3,
     "model-00001-of-00003.safetensors/", "model\x00.safetensors", "..\\model-00001-of-00003.safetensors",
     ["a"], "pytorch_model.bin", "config.json"],
)  # fmt: skip
def test_an_index_that_leads_elsewhere_is_refused(name, shards):
    save_file(tensors_of(shards), shards.parent / "model.safetensors")
    break_index(shards, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    refused(shards, "names the file|a shard is called|disagree|no weight_map")


def test_missing_extra_and_disagreeing_shards_are_refused(shards):
    names = sorted(path.name for path in shards.glob("*.safetensors"))
    kept = (shards / names[0]).read_bytes()
    (shards / names[0]).unlink()
    refused(shards, f"{names[0]} is missing; fetch the whole folder again")
    (shards / names[0]).write_bytes(kept)
    (shards / "model-00009-of-00009.safetensors").write_bytes(kept)
    refused(shards, "does not name 'model-00009-of-00009.safetensors', which lies beside it")
    (shards / "model-00009-of-00009.safetensors").unlink()
    load_pretrained(shards)
    (shards / names[0]).write_bytes((shards / names[1]).read_bytes())
    refused(shards, "disagree about")
    (shards / names[0]).write_bytes(kept)
    (shards / "model.safetensors").write_bytes(kept)
    refused(shards, "holds both model.safetensors and model.safetensors.index.json")


def test_an_index_of_no_map_is_refused(shards):
    for value in ({}, [], None, "x", {"a": {}}):
        break_index(shards, lambda index, value=value: index.update(weight_map=value))
        refused(shards, "weight_map|a shard is called")


def test_links_and_pipes_are_refused(folder, tmp_path):
    weights = folder / "model.safetensors"
    outside = tmp_path / "outside.safetensors"
    weights.rename(outside)
    weights.symlink_to(outside)
    refused(folder, "is a link out of its folder")
    weights.unlink()
    weights.symlink_to("/dev/zero")
    refused(folder, "is a link out of its folder")
    weights.unlink()
    os.mkfifo(weights)
    refused(folder, "is no regular file")
    weights.unlink()
    refused(folder, "holds neither model.safetensors nor")
    outside.rename(folder / "real.safetensors")
    weights.symlink_to("real.safetensors")
    load_pretrained(folder)
    (folder / "tokenizer.json").symlink_to("/dev/zero")
    refused(folder, "is a link out of its folder")


class Payload:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def to_bin(folder: Path, extra: dict[str, Any]) -> None:
    torch.save(tensors_of(folder) | extra, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_a_pickle_of_tensors_is_read(folder, tmp_path):
    before = load_pretrained(folder).model
    to_bin(folder, {})
    found = load_pretrained(folder)
    assert same(found.model, before)
    save_pretrained(found.model, None, tmp_path / "again")
    assert same(load_pretrained(tmp_path / "again").model, before)


def test_views_in_a_pickle_are_read_as_what_they_show(folder):
    before = load_pretrained(folder)
    fingerprint = before.fingerprint
    tensors = tensors_of(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    for key in (name, "model.norm.weight"):  # transposed, and each other element from the fifth on
        wide = torch.randn(5 + 2 * tensors[key].numel())
        part = wide[5::2].view(*reversed(tensors[key].shape)).t() if key == name else wide[5::2]
        tensors[key] = part.copy_(tensors[key])
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = load_pretrained(folder)
    assert same(found.model, before.model) and found.fingerprint == fingerprint
    low = load_pretrained(folder, torch.bfloat16).model
    assert same(low, before.model.bfloat16())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_pickle_cut_while_it_is_read_is_refused(dtype, folder):
    """Mapped, it would end the process with SIGBUS, which no `except` sees."""
    to_bin(folder, {})
    entries = read_tensors(folder, False)
    path = folder / "pytorch_model.bin"
    os.truncate(path, 4096)
    for found in entries.values():
        if found.start > 4096:
            with pytest.raises(ValueError, match="ends early; it was cut while it was read"):
                found.read(dtype or torch.float32, "cpu")


def test_a_pickle_that_claims_more_than_its_file_holds_is_refused(folder):
    to_bin(folder, {})
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    # The embedding's 4,800 elements become 65,535, and its 300 rows 4,095, in 16 bits each.
    for small, large in ((b"M\xc0\x12", b"M\xff\xff"), (b"M\x2c\x01", b"M\xff\x0f")):
        assert parts["pytorch_model/data.pkl"].count(small) >= 1
        parts["pytorch_model/data.pkl"] = parts["pytorch_model/data.pkl"].replace(small, large)
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    refused(folder, "holds '.*' of 262080 bytes, more than it has; fetch it again")


def test_a_pickle_of_more_is_refused_and_not_run(folder, tmp_path):
    to_bin(folder, {"evil": Payload(str(tmp_path / "ran"))})
    refused(folder, "holds more than tensors, or is damaged; nothing in it was run")
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump({"a": Payload(str(tmp_path / "ran"))}, file)
    refused(folder, "is no zip file as torch.save writes it")
    for value in ([torch.ones(2)], {"a": 1}, torch.ones(2)):
        torch.save(value, folder / "pytorch_model.bin")
        refused(folder, "it must be a dict of tensors")
    assert not (tmp_path / "ran").exists()


def test_a_compressed_pickle_is_refused(folder):
    to_bin(folder, {})
    bomb = folder / "pytorch_model.bin"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    refused(folder, "is compressed, which torch.save never does")


def test_mutated_pickles_are_read_or_refused(folder):
    to_bin(folder, {})
    path = folder / "pytorch_model.bin"
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(300):
        text = bytearray(whole)
        for _ in range(draw.choice((1, 3, 20))):
            text[
                draw.choice((draw.randrange(len(text)), draw.randrange(3000), -1 - draw.randrange(3000)))
            ] ^= 255
        path.write_bytes(text[: draw.choice((len(text), draw.randrange(len(text))))])
        with contextlib.suppress(ValueError):
            load_pretrained(folder)


CHILD = """
import os, resource, sys, time
from pathlib import Path
import torch
from config import one_sentence
from pretrained import load_pretrained
load_pretrained(sys.argv[1])  # what is imported late counts for no case
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 300_000_000,) * 2)
for folder in sorted(Path(sys.argv[2]).iterdir()):
    start = time.process_time()
    try:
        with one_sentence():
            load_pretrained(folder)
    except SystemExit as end:
        print(folder.name, end.code, time.process_time() - start < 5)
    else:
        print(folder.name, "loaded")
"""


def sparse(path: Path, size: int, start: bytes = b"") -> None:
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)


def make_giant(case: Path) -> None:
    """A sound folder in which no claim is false, and whose file is empty space."""
    config = replace(LLAMA, vocab_size=2**22, n_embd=2**14).resolved()
    with torch.device("meta"), _NoInit():
        tensors = Decoder(config).state_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[FAMILIES["llama"].key(name)] = entry(shape=tensor.shape, offsets=(start, end))
    text = json.dumps(header).encode()
    sparse(case / "model.safetensors", 8 + len(text) + end, struct.pack("<Q", len(text)) + text)
    change_json(case / "config.json", **from_model(FAMILIES["llama"], config))


def link_out(path: Path, target: Path) -> None:
    path.rename(target)
    path.symlink_to(target)


def test_no_hostile_folder_costs_memory_or_time(folder, shards, tmp_path):
    """Each ends a command with one sentence and exit code 2, where 300 MB more than before are to be had.

    Seconds are those of the processor, since other work may run beside.
    """
    cases: dict[str, Callable[[Path], Any]] = {
        name.replace(" ", "-"): lambda case, changes=changes: change_json(case / "config.json", **changes)
        for name, (changes, _) in CONFIGS.items()
        if "rope_scaling" not in changes
    }
    cases |= {
        "vocabulary": lambda case: change_json(case / "config.json", vocab_size=10**12),
        "layers": lambda case: change_json(case / "config.json", num_hidden_layers=10**6),
        "nan": lambda case: (case / "config.json").write_text('{"model_type": "llama", "rms_norm_eps": NaN}'),
        "deep-config": lambda case: (case / "config.json").write_text('{"a":' * 10_000),
        "long-config": lambda case: sparse(case / "config.json", 2**40),
        "long-tokenizer": lambda case: sparse(case / "tokenizer.json", 10**9),
        "deep-tokenizer": lambda case: (case / "tokenizer.json").write_text('{"a":' * 10_000),
        "long-merges": lambda case: [sparse(case / name, 10**9) for name in ("vocab.json", "merges.txt")],
        "long-header": lambda case: sparse(case / "model.safetensors", 2**40, struct.pack("<Q", 2**39)),
        "giant": lambda case: make_giant(case),
        "pickle": lambda case: to_bin(case, {"evil": Payload(str(tmp_path / "ran"))}),
        "long-pickle": lambda case: (to_bin(case, {}), sparse(case / "pytorch_model.bin", 2**40)),
        "pipe": lambda case: ((case / "config.json").unlink(), os.mkfifo(case / "config.json")),
        "zero": lambda case: ((case / "merges.txt").symlink_to("/dev/zero"),
                              (case / "vocab.json").symlink_to("/dev/zero")),
    }  # fmt: skip
    sharded: dict[str, Callable[[Path], Any]] = {
        "index": lambda case: break_index(case, lambda index: index["weight_map"].update({"a": "../x"})),
        "absolute": lambda case: break_index(case, lambda index: index["weight_map"].update({"a": "/etc/x"})),
        "long-index": lambda case: sparse(case / "model.safetensors.index.json", 2**40),
        "missing": lambda case: next(case.glob("model-00001*")).unlink(),
        "link": lambda case: link_out(next(case.glob("model-00001*")), tmp_path / "outside"),
    }  # fmt: skip
    root = tmp_path / "cases"
    for name, change in (cases | sharded).items():
        shutil.copytree(shards if name in sharded else folder, root / name)
        change(root / name)
    command = [sys.executable, "-c", CHILD, str(folder), str(root)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=HOUSE)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert set(ended.stdout.splitlines()) == {f"{name} 2 True" for name in cases | sharded}, ended.stdout
    sentences = ended.stderr.splitlines()
    assert len(sentences) == len(cases | sharded) and all(line.startswith("error: ") for line in sentences)
    assert not any("memory is full" in line or "\x1b" in line for line in sentences), ended.stderr
    for part in (
        "giant needs 556 GB of memory in float32 and this machine has",
        "is a link out of its folder",
    ):
        assert part in ended.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("source", ["", "no/such/folder", "nowhere", "a b/c", "../up", "-x/y"])
def test_what_is_neither_folder_nor_hub_id_is_refused(source):
    with pytest.raises(ValueError, match="is neither a folder nor a hub id"):
        load_pretrained(source or "no such folder")


def test_a_folder_without_config_and_a_folder_with_a_revision_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="which has no revision main"):
        load_pretrained(folder, revision="main")
    (folder / "config.json").unlink()
    refused(folder, "config.json is missing")


# --- the hub ----------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for: what a revision means, its files, and each file."""

    folder: Path
    commit = "0123456789abcdef0123456789abcdef01234567"
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.asked.append(path)
        if path.startswith("/api/models/us/tiny/revision/"):
            self.answer(json.dumps({"id": "us/tiny", "sha": self.commit, "siblings": []}).encode())
        elif path == f"/api/models/us/tiny/tree/{self.commit}":
            files = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": self.tag(file)}
                for file in self.folder.iterdir()
            ]
            self.answer(json.dumps(files).encode())
        elif path.startswith(f"/us/tiny/resolve/{self.commit}/"):
            file = self.folder / path.rsplit("/", 1)[1]
            self.answer(file.read_bytes(), {"ETag": f'"{self.tag(file)}"', "X-Repo-Commit": self.commit})
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def tag(self, file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def answer(self, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize(
    "pickled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["safetensors", "pickle"]
)
def test_a_model_of_the_hub_is_fetched_once_and_its_commit_recorded(pickled, folder, tmp_path, monkeypatch):
    if pickled:
        to_bin(folder, {})
    else:
        torch.save({"a": 1}, folder / "pytorch_model.bin")  # beside safetensors it is not even fetched
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    monkeypatch.setattr(Hub, "folder", folder, raising=False)
    monkeypatch.setattr(Hub, "asked", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = (
        "from pretrained import load_pretrained as load; f = load('us/tiny'); print(f.source, f.revision)"
    )

    def ran(code: str, **more: str) -> subprocess.CompletedProcess[str]:
        own = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        environment = os.environ | own | {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"} | more
        house = Path(__file__).parents[1]
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=house)

    online = ran(program)
    assert online.stdout.split() == ["us/tiny", Hub.commit], online.stderr
    fetched = {path.rsplit("/", 1)[1] for path in Hub.asked if "/resolve/" in path}
    weights = "pytorch_model.bin" if pickled else "model.safetensors"
    assert fetched == {"config.json", "generation_config.json", weights}
    server.shutdown()
    server.server_close()
    offline = ran(f"{program}; load('us/huge')", HF_HUB_OFFLINE="1")
    assert offline.stdout.split() == ["us/tiny", Hub.commit]
    assert "ValueError: us/huge could not be fetched" in offline.stderr


# --- tokenizers -------------------------------------------------------------------------------------

TEXTS = [
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n",
    "  \t\r\n\n  x = 'é — 日本語 🙂'",
    "<|endoftext|>", "a<|endoftext|>b <|fim_prefix|> c", "", " ", "\x00\x7f",
    "don't we'll HTTPServer2 0xFF00AA",
    "\n" * 30 + " " * 30, "ﬁ Å Å",
]  # fmt: skip


def published_tokenizer(folder: Path) -> Path:
    """A byte-level BPE folder as published ones are: specials in the config, added tokens of many spaces."""
    ours = BPETokenizer.train([text * 20 for text in TEXTS], vocab_size=300)
    ours.save(folder)
    state = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    n = ours.vocab_size
    specials = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "  ", "        "]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    state["added_tokens"] += [
        {"id": n + i, "content": text, "special": text.strip() != ""} | flags
        for i, text in enumerate(specials)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(state), "utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def saved(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save(folder)
    return folder


def same_ids(ours: Any, theirs: Any, text: str) -> None:
    """Special tokens as text, which is how a corpus is read, and as commands."""
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True), text
    assert ours.encode(text, specials=True) == theirs.encode(text, add_special_tokens=False), text


def test_tokenizer_ids_are_those_of_transformers(tmp_path):
    folder = published_tokenizer(tmp_path / "tokenizer")
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(ours, PretrainedTokenizer) and (ours.eos_id, ours.bos_id) == (theirs.eos_token_id,) * 2
    for text in TEXTS:
        same_ids(ours, theirs, text)
    assert ours.vocab_size == len(theirs)


POOL = ["<|end|>", "<|x|>", "  ", "    ", "tab", "<fim>", "RET", "\t\t", "日"]


def random_folder(draw: random.Random, base: dict[str, Any], n: int, folder: Path) -> None:
    """Added tokens with rules drawn at random, spread over the files that may hold them."""

    def rules(token: str) -> dict[str, Any]:
        likely = {"single_word": 0.2, "lstrip": 0.3, "rstrip": 0.3, "normalized": 0.4}
        return {"content": token, "special": token in specials} | {
            name: draw.random() < chance for name, chance in likely.items()
        }

    tokens = ["<end>", *draw.sample(POOL, draw.randrange(1, 7))]
    draw.shuffle(tokens)
    specials = {token for token in tokens if token.startswith("<")}
    ids = {token: n + i for i, token in enumerate(tokens)}
    kept = draw.randrange(len(tokens) + 1)  # of which tokenizer.json knows
    state = base | {"added_tokens": [{"id": ids[token]} | rules(token) for token in tokens[:kept]]}
    own_class = draw.random() < 0.4  # one that takes only vocabulary and merges from tokenizer.json
    if not own_class and draw.random() < 0.5:
        state["normalizer"] = draw.choice([{"type": "Lowercase"}, {"type": "NFKC"}])
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    if own_class:
        config = dict.fromkeys(("eos_token", "bos_token", "unk_token"), "<end>")
        config["tokenizer_class"] = draw.choice(["CodeGenTokenizer", "GPT2Tokenizer"])
    rest = {t for i, t in enumerate(tokens) if i >= kept or own_class or draw.random() < 0.5}
    files = {"tokenizer.json": state, "tokenizer_config.json": config}
    if draw.random() < 0.5:
        config["added_tokens_decoder"] = {str(ids[t]): rules(t) for t in tokens if t in rest}
    else:
        files["added_tokens.json"] = {t: ids[t] for t in tokens if t in rest}
        files["special_tokens_map.json"] = {
            "pad_token": "<end>",
            "extra_special_tokens": sorted(specials),
        }
    folder.mkdir()
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values), "utf-8")


def test_rules_of_added_tokens_are_those_of_transformers(tmp_path):
    base = BPETokenizer.train(TEXTS * 20, vocab_size=290)
    base.save(tmp_path / "base")
    state = json.loads((tmp_path / "base" / "tokenizer.json").read_text("utf-8"))
    compared = panics = 0
    for seed in range(60):
        draw = random.Random(seed)
        random_folder(draw, state, base.vocab_size, tmp_path / str(seed))
        ours = PretrainedTokenizer.load(tmp_path / str(seed))
        theirs: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / str(seed))
        assert (ours.eos_id, ours.bos_id, ours.pad_id) == (
            theirs.eos_token_id,
            theirs.bos_token_id,
            theirs.pad_token_id,
        )
        words = [*POOL, *POOL, " ", "  ", "\n", "a", "Tab", "return", "def f", "HTTP", "x"]
        for _ in range(15):
            text = "".join(draw.choices(words, k=draw.randrange(1, 14)))
            try:
                ours.encode(text, specials=True)
            except ValueError as error:  # a fault of the library, which it reports as a panic
                assert "added tokens fail on the text" in str(error)
                panics += 1
                continue
            same_ids(ours, theirs, text)
            compared += 1
    assert compared > 800 and panics < 50


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_refuses_the_code_tokenizer_and_opens_the_model(family, tmp_path):
    """Without a tokenizer.json it would make one for itself that gives no ids for any text."""
    tokenizer = CodeTokenizer.train([TEXTS[0]] * 20, vocab_size=300)
    sizes = {"vocab_size": tokenizer.vocab_size, "n_layer": 1, "n_head": 4, "n_embd": 16, "block_size": 32}
    values = {key: sizes[field] for field, key in FAMILIES[family].names.items() if field in sizes}
    more = {"rotary_dim": 4, "intermediate_size": 16, "num_key_value_heads": 4}
    values |= {key: value for key, value in more.items() if key in FAMILIES[family].defaults}
    model = Decoder(to_model(FAMILIES[family], values)).eval()
    save_pretrained(model, tokenizer, tmp_path / "saved", family)
    with pytest.raises(Exception, match="this model has Plumb's code tokenizer; open it with"):
        transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([tokenizer.encode(TEXTS[0])[:16]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-5, rtol=1e-5)
    found = load_pretrained(tmp_path / "saved")
    assert found.tokenizer is not None and found.tokenizer.fingerprint == tokenizer.fingerprint


def test_a_tokenizer_goes_with_its_model(tmp_path):
    tokenizer = load_tokenizer(published_tokenizer(tmp_path / "tokenizer"))
    model = Decoder(replace(LLAMA, vocab_size=tokenizer.vocab_size))
    save_pretrained(model, tokenizer, tmp_path / "model")
    found = load_pretrained(tmp_path / "model")
    assert found.tokenizer is not None and found.tokenizer.fingerprint == tokenizer.fingerprint
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert config.eos_token_id == theirs.eos_token_id == tokenizer.eos_id
    for text in TEXTS:
        same_ids(tokenizer, theirs, text)


def test_every_end_of_a_text_goes_with_its_model(tmp_path):
    """As in Llama 3 Instruct, whose texts end at one of three ids, and not at its tokenizer's eos alone."""
    tokenizer = load_tokenizer(published_tokenizer(tmp_path / "tokenizer"))
    one, other = tokenizer.encode("a") + tokenizer.encode("b")
    save_pretrained(Decoder(replace(LLAMA, vocab_size=tokenizer.vocab_size)), tokenizer, tmp_path / "model")
    config, generation = (tmp_path / "model" / name for name in ("config.json", "generation_config.json"))
    assert load_pretrained(tmp_path / "model").eos_ids == (tokenizer.eos_id,)
    change_json(config, eos_token_id=[7, 8])
    change_json(generation, eos_token_id=[one, other])
    found = load_pretrained(tmp_path / "model")
    assert found.eos_ids == (one, other) and found.tokenizer is not None
    with torch.no_grad():  # whatever the last token was, `other` comes next
        found.model.embed.weight.fill_(1)
        found.model.head.weight.fill_(0)
        found.model.head.weight[other] = 1
        for name, parameter in found.model.named_parameters():
            if "blocks" in name:
                parameter.fill_(0)
    copied = pickle.loads(pickle.dumps(found.tokenizer))
    for ends in (found.tokenizer, copied, copied.with_tokens([])):
        (text,) = generate(found.model, ends, ["x"], GenerationConfig(max_new_tokens=4))
        assert (text.text, text.ids, text.finish_reason) == ("", [other], "eos")
    save_pretrained(found.model, found.tokenizer, tmp_path / "again")
    assert load_pretrained(tmp_path / "again").eos_ids == (one, other)
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["eos_token_id"] == [
        one,
        other,
    ]
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "again").eos_token_id == [one, other]
    generation.unlink()
    assert load_pretrained(tmp_path / "model").eos_ids == (7, 8)
    for beyond in (306, -1, [306, -1]):  # opened by transformers with a warning, and given by no model
        change_json(config, eos_token_id=beyond)
        assert load_pretrained(tmp_path / "model").eos_ids == ()
        change_json(config, eos_token_id=[beyond, 7] if isinstance(beyond, int) else [*beyond, 7])
        found = load_pretrained(tmp_path / "model")
        assert found.tokenizer is not None and found.eos_ids == found.tokenizer.eos_ids == (7,)
    shutil.copy(config, generation)
    assert load_tokenizer(tmp_path / "model").eos_ids == (7,)
    for wrong in ("x", [1, True], [[1]], {"a": 1}, 1.0):
        change_json(config, eos_token_id=wrong)
        change_json(generation, eos_token_id=wrong)
        refused(tmp_path / "model", "has eos_token_id .*; it must be an id, or a list of such ids")


@pytest.mark.parametrize("where", ["extra_special_tokens", "pad_token", "added", "decoder", "json"])
def test_tokens_that_were_added_beyond_the_model_are_left_out(where, tmp_path, capsys):
    """As fine-tunes that added a pad token and left the model as it was."""
    folder = published_tokenizer(tmp_path / "tokenizer")
    size = load_tokenizer(folder).vocab_size
    token = {"content": "<|new|>", "special": where != "added"}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    config, state = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if where == "added":
        (folder / "added_tokens.json").write_text(json.dumps({"<|new|>": size}))
    elif where == "json":
        added = json.loads(state.read_text("utf-8"))["added_tokens"]
        change_json(state, added_tokens=[*added, {"id": size} | token | flags])
    elif where == "decoder":
        change_json(config, added_tokens_decoder={str(size): token | flags}, pad_token="<|new|>")
    else:
        change_json(config, **{where: ["<|new|>"] if where.startswith("extra") else "<|new|>"})
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert load_tokenizer(folder).vocab_size == len(theirs) == size + 1
    model = Decoder(replace(LLAMA, vocab_size=size))
    save_pretrained(model, None, tmp_path / "model")
    shutil.copytree(folder, tmp_path / "model", dirs_exist_ok=True)
    tokenizer = load_pretrained(tmp_path / "model").tokenizer
    assert f"has {size + 1} ids and the model {size} rows" in capsys.readouterr().err
    assert tokenizer is not None and tokenizer.vocab_size == size and tokenizer.token_id("<|new|>") is None
    assert tokenizer.pad_id is None and max(tokenizer.encode("a <|new|> b")) < size
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs.encode(
            text, add_special_tokens=False, split_special_tokens=True
        )
    generate(model, tokenizer, ["x"], GenerationConfig(max_new_tokens=2))
    assert load_tokenizer(saved(tokenizer, tmp_path / "again")).fingerprint == tokenizer.fingerprint


def test_a_tokenizer_of_another_model_is_refused(tmp_path, monkeypatch):
    """Where pieces of text lie beyond the model's rows, and not tokens that were added."""
    for make in (published_tokenizer, lambda at: saved(BPETokenizer.train(TEXTS * 20, vocab_size=300), at)):
        folder = make(tmp_path / make.__name__.strip("<>"))
        save_pretrained(Decoder(replace(LLAMA, vocab_size=290)), None, tmp_path / f"{folder.name} model")
        shutil.copytree(folder, tmp_path / f"{folder.name} model", dirs_exist_ok=True)
        refused(tmp_path / f"{folder.name} model", "and the model has 290.*belongs to another model")


@pytest.mark.parametrize("weight_format", [None, "int8", "nf4"])
def test_memory_is_asked_for_as_the_weights_are_stored(weight_format, folder, monkeypatch):
    """A model that fits a machine in 4 bits was refused for its size in the files."""
    whole = sum(tensor.nbytes for tensor in tensors_of(folder).values())
    memory = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": whole - 1}
    monkeypatch.setattr(os, "sysconf", lambda name: memory[name])
    if weight_format is None:
        refused(folder, "GB of memory in float32 and this machine has")
        return
    found = load_pretrained(folder, weight_format=weight_format).model
    monkeypatch.setitem(memory, "SC_PHYS_PAGES", sum(t.nbytes for t in found.state_dict().values()))
    load_pretrained(folder, weight_format=weight_format)
    monkeypatch.setitem(memory, "SC_PHYS_PAGES", memory["SC_PHYS_PAGES"] - 1)
    with pytest.raises(ValueError, match=f"GB of memory in {weight_format} and this machine has"):
        load_pretrained(folder, weight_format=weight_format)


def test_modules_have_the_names_that_adapters_use():
    llama, bigcode = FAMILIES["llama"], FAMILIES["gpt_bigcode"]
    assert llama.key("blocks.11.attention.q") == "model.layers.11.self_attn.q_proj"
    assert bigcode.key("blocks.0.attention.qkv") == "transformer.h.0.attn.c_attn"
    assert llama.key("head") == "lm_head" and llama.key("embed.weight") == "model.embed_tokens.weight"


def test_from_model_and_to_model_are_inverse():
    for family in FAMILIES.values():
        config = to_model(family, {})
        assert to_model(family, from_model(family, config)) == config and not lacks(family, config)


def test_a_folder_that_is_not_there_and_a_run_are_told_from_a_broken_one(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}", "utf-8")
    for name, sentence in ("nothing", "does not exist"), ("run", "is a run; export it first"):
        with pytest.raises(ValueError, match=sentence):
            inner_path(tmp_path / name, "model.safetensors", linked=False)
