"""Folders of published models that a stranger broke on purpose: refused in one sentence, or harmless."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may reach for the network

import pytest
import torch
import transformers
from pretrained_folders import LLAMA, change_json, llama_folder, refused, same, tensors_of, to_bin
from safetensors import deserialize
from safetensors.torch import save_file

from architecture import Decoder
from config.files import REPOSITORY
from modules.shapes import shapes_only
from pretrained import FAMILIES, load_pretrained, save_pretrained
from pretrained.family import from_model, to_model
from pretrained.folder import parse_header, parse_json, read_tensors

transformers.logging.set_verbosity_error()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return llama_folder(tmp_path / "model")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return llama_folder(tmp_path / "shards", max_shard_bytes=20_000)


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
    "SantaCoder's own class": (
        {"model_type": "gpt2", "auto_map": {"AutoModelForCausalLM": "modeling_gpt2_mq.OtherModel"}},
        "has model_type 'gpt2'; known are gpt_bigcode, codegen",
    ),
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
    "proportional": ({"rope_scaling": {"rope_type": "proportional"}}, "rope_type is 'proportional'; known"),
    "a key of another scaling": ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 8}},
                                 "rope_type linear has no beta_fast, which is 8"),
    "a number too few": ({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1, 2]}},
                         "model.rope_short has 1 numbers; with 4 rotated dimensions it must have 2"),
    "no list": ({"rope_scaling": {"type": "longrope", "short_factor": 1}}, "short_factor of .* is 1; a list"),
    "turns the wrong way": ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_slow": 40}},
                            "a model.rope_beta_slow below model.rope_beta_fast, not 40.0 and 32.0"),
    "no attention": ({"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 0}},
                     "rope_attention of rope_type yarn is 0; it must be a number above 0"),
    "a factor below one": ({"rope_scaling": {"type": "linear", "factor": 0.1}}, "model.rope_factor is 0.1"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "rope_factor of rope_type linear is None"),
    "a multiplier of another family": ({"residual_multiplier": 0.22},
                                       "residual_multiplier is 0.22, which changes what is computed, and a"),
    "windows of another family": ({"sliding_window": 8}, "sliding_window is 8, which changes what is"),
    "experts": ({"num_experts": 8}, "num_experts is 8, which changes what is computed"),
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
    keys = [*range(60_000), 59_999]  # Counting one by one would take a minute.
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
    with shapes_only():
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
    ended = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
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
