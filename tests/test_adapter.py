"""Adapters against PEFT: forward, loss and every gradient, and folders exchanged both ways.

Everything is scrambled, the base and all that trains: at their start A or B is zero, and most faults pass.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_pretrained import TOKENS, make_oracle
from torch import Tensor, nn

import lora
from architecture import Decoder
from config import LoraConfig
from dataset import Batch
from lora import LowRank, Rows, Whole, adapters_of, add_adapter, changes_of
from loss import token_loss
from pretrained import Family, load_pretrained
from pretrained.adapter import load_adapter, save_adapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

REFACTORING = {"r": 16, "alpha": 32.0, "targets": ("c_attn", "c_proj")}
FASTAPI = {"r": 8, "alpha": 32.0, "targets": ("wte", "qkv_proj", "out_proj", "fc_in", "fc_out")}
KOTLIN = {"r": 16, "alpha": 32.0, "targets": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")}
SUMMARIES = {"r": 16, "alpha": 32.0, "targets": ("q_proj", "k_proj", "v_proj", "o_proj")}
ALL = {"r": 3, "alpha": 7.0}

# A base of test_pretrained, and what is trained of it.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "refactoring mqa": ("bigcode mqa", REFACTORING),
    "refactoring mha": ("bigcode mha", REFACTORING),
    "refactoring untied head": ("bigcode mha untied", REFACTORING | {"targets": ("c_attn", "lm_head", "wte")}),
    "fastapi": ("codegen", FASTAPI),
    "fastapi biased head": ("codegen", FASTAPI | {"targets": ("qkv_proj", "lm_head")}),
    "kotlin": ("phi", KOTLIN),
    "summaries": ("llama gqa", SUMMARIES),
    "starcoder2": ("starcoder2", ALL),
    "qwen2": ("qwen2", ALL),
    "mlp role": ("llama gqa", ALL | {"targets": ("mlp",)}),
    "attention role": ("bigcode mqa", ALL | {"targets": ("attention",)}),
    "pattern": ("llama gqa", ALL | {"targets": ("model.layers.1.*",)}),
    "rslora": ("codegen", FASTAPI | {"rslora": True}),
    "dora": ("bigcode mqa", REFACTORING | {"dora": True}),
    "dora all": ("phi", KOTLIN | {"targets": ("all-linear", "embedding", "lm_head"), "dora": True}),
    "dora rslora bias": ("qwen2", ALL | {"dora": True, "rslora": True, "bias": "all"}),
    "rank and alpha": ("bigcode mqa", REFACTORING | {
        "rank_pattern": {"mlp.c_proj": 2, "c_proj": 5}, "alpha_pattern": {"h.1.attn.c_proj": 64, "c_attn": 3.5}}),
    "bias all": ("bigcode mqa", REFACTORING | {"bias": "all"}),
    "bias lora_only": ("phi", KOTLIN | {"bias": "lora_only"}),
    "bias all with a head": ("codegen", FASTAPI | {"bias": "all", "train_modules": ("lm_head",)}),
    "whole": ("llama gqa", SUMMARIES | {"train_modules": ("lm_head", "embed_tokens", "model.norm")}),
    "whole tied": ("bigcode mqa", REFACTORING | {"train_modules": ("wte", "ln_f")}),
    "whole tied head": ("bigcode mqa", REFACTORING | {"train_modules": ("lm_head",)}),
    "embedding tied": ("llama mha tied", SUMMARIES | {"targets": ("q_proj", "embed_tokens")}),
    "rows tied": ("bigcode mqa", REFACTORING | {"new_tokens": ("50", "3", "52")}),
    "rows untied": ("llama gqa", SUMMARIES | {"new_tokens": ("51", "7")}),
}  # fmt: skip


class Pair(NamedTuple):
    oracle: Any  # without an adapter
    ours: Decoder
    family: Family


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """A base as transformers has it, and as it is here, from one folder."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Pair:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("base")
            make_oracle(name).save_pretrained(folders[name])
        found = load_pretrained(folders[name])
        return Pair(make_oracle(name), found.model, found.family)

    return make


def ids_of(settings: dict[str, Any]) -> list[int]:
    return [int(token) for token in settings.get("new_tokens", ())]


def peft_config(pair: Pair, settings: dict[str, Any]) -> peft.LoraConfig:
    """The same in PEFT's words, with the targets named one by one."""
    config, key = LoraConfig(**settings), pair.family.key
    able = {our: key(our) for our, m in lora.held_modules(pair.ours).items() if hasattr(m, "weight")}
    able = {our: full for our, full in able.items() if not full.endswith(config.train_modules or "no")}
    kinds = (nn.Linear, nn.Embedding)
    able = {our: full for our, full in able.items() if isinstance(pair.ours.get_submodule(our), kinds)}
    targets = [able[our] for our in lora.select_targets(able, config.targets)]
    ids = ids_of(settings)
    rows: Any = None
    if ids:
        names = ["embed"] if pair.ours.config.tie_embeddings else ["embed", "head"]
        rows = {key(name).rsplit(".", 1)[-1]: ids for name in names}
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        target_modules=targets,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        use_rslora=config.rslora,
        use_dora=config.dora,
        bias=config.bias,
        modules_to_save=list(config.train_modules) or None,
        trainable_token_indices=rows,
    )


def scramble_adapters(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3, generator=generator)


def peft_key(our: str, part: str, change: Any, family: Family) -> str:
    """A trainable tensor's name in a PEFT model."""
    key = f"base_model.model.{family.key(our)}"
    if isinstance(change, Whole):
        return f"{key}.modules_to_save.default.{part.removeprefix('copy.')}"
    if isinstance(change, Rows) and part == "rows":
        return f"{key}.token_adapter.trainable_tokens_delta.default"
    if part == "bias":
        return f"{key}.base_layer.bias" if isinstance(change, LowRank) else f"{key}.bias"
    if part == "magnitude":
        return f"{key}.lora_magnitude_vector.default.weight"
    letter = part.upper()
    return (
        f"{key}.lora_embedding_{letter}.default"
        if change.of_embedding
        else f"{key}.lora_{letter}.default.weight"
    )


def gradients(pair: Pair) -> dict[str, Tensor]:
    """By PEFT's names."""
    found, seen = {}, set()
    for our, change in changes_of(pair.ours, "default").items():
        for part, p in change.named_parameters():
            if id(p) not in seen:
                seen.add(id(p))
                assert p.grad is not None, f"{our}.{part} got no gradient"
                found[peft_key(our, part, change, pair.family)] = p.grad
    return found


def assert_near(ours: Tensor, theirs: Tensor, what: str) -> None:
    gap = (ours - theirs).abs().max().item()
    assert gap <= 1e-5 * max(1.0, theirs.abs().max().item()), f"{what}: {gap}"


BATCH = Batch(
    TOKENS,
    TOKENS.roll(-1, 1),
    torch.zeros_like(TOKENS),
    torch.arange(TOKENS.size(1)).expand_as(TOKENS).contiguous(),
)


def compare(pair: Pair, theirs: Any, gradient: bool = True) -> None:
    """Logits, loss and every gradient of the two."""
    assert_near(pair.ours(TOKENS), theirs(TOKENS).logits, "logits")
    if not gradient:
        return
    loss = token_loss(pair.ours, BATCH)
    (loss.objective / loss.tokens).backward()
    other = F.cross_entropy(theirs(TOKENS).logits.flatten(0, 1), BATCH.labels.flatten())
    other.backward()
    assert_near(loss.objective / loss.tokens, other, "loss")
    found = gradients(pair)
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad and p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert_near(found[name], grad, name)
    frozen = [name for name, p in pair.ours.named_parameters() if not p.requires_grad and p.grad is not None]
    assert not frozen


def opened_here(pair: Pair, settings: dict[str, Any], folder: Path) -> Any:
    """A scrambled adapter that PEFT wrote to the folder and that was loaded from it here."""
    theirs = peft.get_peft_model(pair.oracle, peft_config(pair, settings)).eval()
    scramble_adapters(theirs)
    theirs.save_pretrained(str(folder))
    load_adapter(pair.ours, pair.family, folder, trainable=True)
    return theirs


def written_here(pair: Pair, settings: dict[str, Any], folder: Path) -> Any:
    """A scrambled adapter that was added and saved here and that PEFT opened."""
    add_adapter(pair.ours, LoraConfig(**settings), pair.family.key, new_rows=ids_of(settings))
    scramble_adapters(pair.ours)
    save_adapter(pair.ours, pair.family, folder, base="some/base")
    return peft.PeftModel.from_pretrained(pair.oracle, str(folder), is_trainable=True).eval()


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_is_the_same_here(bases: Callable[[str], Pair], tmp_path: Path, case: str) -> None:
    name, settings = CASES[case]
    pair = bases(name)
    compare(pair, opened_here(pair, settings, tmp_path))


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_ours_is_the_same_in_peft(
    bases: Callable[[str], Pair], tmp_path: Path, case: str
) -> None:
    name, settings = CASES[case]
    pair = bases(name)
    with warnings.catch_warnings():
        # PEFT says so when a key of its model is not in the file, or one of the file not in its model.
        warnings.filterwarnings("error", message=".*(issing|nexpected).*keys")
        theirs = written_here(pair, settings, tmp_path / "out")
    compare(pair, theirs)


@pytest.mark.parametrize("case", CASES)
def test_the_files_are_those_of_peft(bases: Callable[[str], Pair], tmp_path: Path, case: str) -> None:
    """The same keys and shapes as PEFT's own file, and settings with the same values."""
    name, settings = CASES[case]
    pair = bases(name)
    theirs = opened_here(pair, settings, tmp_path / "theirs")
    del theirs
    adapters_of(pair.ours)
    save_adapter(pair.ours, pair.family, tmp_path / "ours", base=None)
    ours, other = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    extra = [key for key in other if key.endswith(("modules_to_save.bias", "original_module.bias"))]
    wanted = {key: tuple(t.shape) for key, t in other.items() if key not in extra}
    found = {key: tuple(t.shape) for key, t in ours.items()}
    # Whether the base's own weights lie beside their adapter depends on how PEFT was given the name.
    assert {k: s for k, s in found.items() if ".base_layer.weight" not in k and ".lm_head.base" not in k} == {
        k: s for k, s in wanted.items() if ".base_layer.weight" not in k and ".lm_head.base" not in k
    }
    for key in found.keys() & wanted.keys():
        assert torch.equal(ours[key], other[key]), key
    values, said = (
        json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs")
    )
    assert values.keys() <= said.keys()
    for key in (
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "bias",
        "use_dora",
        "use_rslora",
        "fan_in_fan_out",
    ):
        assert values[key] == said[key], key
    assert values["inference_mode"] is True and values["revision"] is None


def test_embeddings_are_saved_with_their_base_where_peft_does(
    bases: Callable[[str], Pair], tmp_path: Path
) -> None:
    for name, targets in (("llama gqa", ["q_proj", "embed_tokens", "lm_head"]), ("codegen", ["wte", "lm_head"]),
                          ("codegen", ["wte"]), ("llama mha tied", ["embed_tokens"])):  # fmt: skip
        pair = bases(name)
        folder = tmp_path / f"{name} {len(targets)}"
        theirs = peft.get_peft_model(
            pair.oracle, peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=targets)
        )
        theirs.save_pretrained(str(folder / "theirs"))
        load_adapter(pair.ours, pair.family, folder / "theirs")
        save_adapter(pair.ours, pair.family, folder / "ours", base=None)
        ours, other = (load_file(folder / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
        assert ours.keys() == other.keys()
        assert all(torch.equal(ours[key], other[key]) for key in ours)
