"""Folders of published models: what is read and written, and a model that comes from the hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
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
from pretrained_folders import (
    LLAMA,
    TOKENS,
    change_json,
    change_tensors,
    llama_folder,
    refused,
    same,
    tensors_of,
    to_bin,
)
from safetensors.torch import load_file
from torch import Tensor

from architecture import Decoder
from config import ModelConfig
from config.files import REPOSITORY
from data.cache import SUMS, seal_folder, sealed
from pretrained import FAMILIES, choose_family, load_pretrained, save_pretrained
from pretrained.family import from_model, lacks, to_model
from pretrained.folder import inner_path
from pretrained.load import StoredWeights
from tokenizer import BPETokenizer

transformers.logging.set_verbosity_error()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return llama_folder(tmp_path / "model")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return llama_folder(tmp_path / "shards", max_shard_bytes=20_000)


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


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "llama3", "yarn"])
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


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "codegen2"])  # It has none.
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
    assert subprocess.run(command, stdout=subprocess.PIPE, cwd=REPOSITORY).stdout == b"False\n"


def test_the_fingerprint_is_of_the_content_alone(folder, shards, tmp_path):
    found = load_pretrained(folder)
    first = found.fingerprint
    assert len(first) == 64 and load_pretrained(shards).fingerprint == first
    with torch.no_grad():
        found.model.embed.weight.add_(1)  # Training changes the model, and not its folder.
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
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout
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
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=REPOSITORY).stdout
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


# --- the hub ----------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """A server with as much of the hub as a download needs: a revision's commit, its files, and each file."""

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
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY)

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


# --- memory and names ---------------------------------------------------------------------------------


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
