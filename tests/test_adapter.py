"""Adapters against PEFT: forward, loss and every gradient, and folders exchanged both ways.

Everything is scrambled, the base and all that trains: at their start A or B is zero, and most faults pass.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import torch.nn.functional as F
import transformers
from lazily import peft
from safetensors.torch import load_file
from test_pretrained import GPT, TOKENS, make_oracle
from torch import Tensor, nn

import lora
from adapters import products
from adapters.layers import FullCopy, LowRank, TrainableRows
from adapters.targets import as_peft_pattern, pattern_value, peft_key
from architecture import Decoder
from config import LoraConfig
from dataset import Batch
from lora import adapter_layers, add_adapter, use_adapters
from pretrained import Family, load_pretrained
from pretrained.load_adapter import load_adapter
from pretrained.save_adapter import save_adapter
from training.loss import token_loss

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

REFACTORING = {"r": 16, "alpha": 32.0, "dropout": 0.08, "targets": ("c_attn", "c_proj")}
FASTAPI = {"r": 8, "alpha": 32.0, "targets": ("wte", "qkv_proj", "out_proj", "fc_in", "fc_out")}
KOTLIN = {"r": 16, "alpha": 32.0, "targets": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")}
SUMMARIES = {"r": 16, "alpha": 32.0, "dropout": 0.05, "targets": ("q_proj", "k_proj", "v_proj", "o_proj")}
ALL = {"r": 3, "alpha": 7.0}

# A base of test_pretrained, and what is trained of it.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "refactoring mqa": ("bigcode mqa", REFACTORING),
    "refactoring mha": ("bigcode mha", REFACTORING),
    "refactoring untied head": (
        "bigcode mha untied", REFACTORING | {"targets": ("c_attn", "lm_head", "wte")}),
    "fastapi": ("codegen", FASTAPI),
    "fastapi biased head": ("codegen", FASTAPI | {"targets": ("qkv_proj", "lm_head")}),
    "kotlin": ("phi", KOTLIN),
    "summaries": ("llama gqa", SUMMARIES),
    "starcoder2": ("starcoder2", ALL),
    "qwen2": ("qwen2", ALL),
    "qwen3": ("qwen3", ALL),
    "qwen3_moe": ("qwen3_moe", ALL),
    "mistral": ("mistral window", ALL),
    "phi3": ("phi3", ALL | {"targets": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}),
    "stablelm": ("stablelm", ALL | {"targets": ("all-linear", "lm_head")}),
    "gemma": ("gemma", ALL | {"targets": ("all-linear", "embed_tokens")}),
    "smollm3": ("smollm3", ALL | {"dora": True}),
    "granite": ("granite", ALL | {"targets": ("all-linear", "lm_head")}),
    "gpt_neox": ("gpt_neox", ALL | {"targets": ("all-linear", "lm_head"), "bias": "lora_only"}),
    "mlp role": ("llama gqa", ALL | {"targets": ("mlp",)}),
    "attention role": ("bigcode mqa", ALL | {"targets": ("attention",)}),
    "pattern": ("llama gqa", ALL | {"targets": ("model.layers.1.*",)}),
    "rslora": ("codegen", FASTAPI | {"rslora": True}),
    "dora": ("bigcode mqa", REFACTORING | {"dora": True}),
    "dora all": ("phi", KOTLIN | {"targets": ("all-linear", "embedding", "lm_head"), "dora": True}),
    "dora rslora bias": ("qwen2", ALL | {"dora": True, "rslora": True, "bias": "all"}),
    "rank and alpha": ("bigcode mqa", REFACTORING | {
        "rank_pattern": {"mlp.c_proj": 2, "c_proj": 5},
        "alpha_pattern": {"h.1.attn.c_proj": 64, "c_attn": 3.5}}),
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


def peft_config(pair: Pair, settings: dict[str, Any]) -> Any:
    """Return the settings as PEFT's, with the targets named one by one."""
    config, key = LoraConfig(**settings), pair.family.key
    able = {our: key(our) for our, m in lora.held_modules(pair.ours).items() if hasattr(m, "weight")}
    able = {our: full for our, full in able.items() if not full.endswith(config.train_modules or "no")}
    kinds = (nn.Linear, nn.Embedding)
    able = {our: full for our, full in able.items() if isinstance(pair.ours.get_submodule(our), kinds)}
    able = {our: full for our, full in able.items() if ".experts." not in our}
    targets = [able[our] for our in lora.select_targets(able, config.targets)]
    ids = ids_of(settings)
    rows: Any = None
    if ids:
        names = ["embed"] if pair.ours.config.tie_embeddings else ["embed", "head"]
        rows = {key(name).rsplit(".", 1)[-1]: ids for name in names}
    return peft().LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
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
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "original_module" not in name:  # That module stands for the base.
                parameter.normal_(std=0.3, generator=generator)


def oracle_key(our: str, part: str, layer: Any, family: Family) -> str:
    """A trainable tensor's name in a PEFT model."""
    key = f"base_model.model.{family.key(our)}"
    if isinstance(layer, FullCopy):
        return f"{key}.modules_to_save.default.{part.removeprefix('copy.')}"
    if isinstance(layer, TrainableRows) and part == "rows":
        return f"{key}.token_adapter.trainable_tokens_delta.default"
    if part == "bias":
        return f"{key}.base_layer.bias" if isinstance(layer, LowRank) else f"{key}.bias"
    if part == "magnitude":
        return f"{key}.lora_magnitude_vector.default.weight"
    letter = part.upper()
    return (
        f"{key}.lora_embedding_{letter}.default"
        if layer.of_embedding
        else f"{key}.lora_{letter}.default.weight"
    )


def gradients(pair: Pair) -> dict[str, Tensor]:
    """Return the gradients of our adapter by PEFT's names."""
    found, seen = {}, set()
    for our, layer in adapter_layers(pair.ours, "default").items():
        for part, p in layer.named_parameters():
            if id(p) not in seen:
                seen.add(id(p))
                assert p.grad is not None, f"{our}.{part} got no gradient"
                found[oracle_key(our, part, layer, pair.family)] = p.grad
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
    theirs = peft().get_peft_model(pair.oracle, peft_config(pair, settings)).eval()
    scramble_adapters(theirs)
    theirs.save_pretrained(str(folder))
    load_adapter(pair.ours, pair.family, folder, trainable=True)
    return theirs


def written_here(pair: Pair, settings: dict[str, Any], folder: Path) -> Any:
    """A scrambled adapter that was added and saved here and that PEFT opened."""
    add_adapter(pair.ours, LoraConfig(**settings), pair.family.key, new_rows=ids_of(settings))
    scramble_adapters(pair.ours)
    save_adapter(pair.ours, pair.family, folder, base="some/base")
    return peft().PeftModel.from_pretrained(pair.oracle, str(folder), is_trainable=True).eval()


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


EMBEDDINGS = ("base_model.model.model.embed_tokens", "base_model.model.lm_head")


@pytest.mark.parametrize("case", CASES)
def test_the_files_are_those_of_peft(bases: Callable[[str], Pair], tmp_path: Path, case: str) -> None:
    """They have the keys and shapes of PEFT's own file, and settings with the same values."""
    name, settings = CASES[case]
    pair = bases(name)
    opened_here(pair, settings, tmp_path / "theirs")
    save_adapter(pair.ours, pair.family, tmp_path / "ours", base=None)
    ours, other = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    extra = [key for key in other if key.endswith(("modules_to_save.bias", "original_module.bias"))]
    wanted = {key: tuple(t.shape) for key, t in other.items() if key not in extra}
    found = {key: tuple(t.shape) for key, t in ours.items()}
    assert {key: found.get(key) for key in wanted} == wanted
    # PEFT writes the base's own beside a pair that is named by its last part, as ours are and theirs are not.
    beside = {f"{key}.base_layer.{part}" for key in EMBEDDINGS for part in ("weight", "bias")}
    assert found.keys() - wanted.keys() <= beside
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


def test_embeddings_have_their_base_beside_them(bases: Callable[[str], Pair], tmp_path: Path) -> None:
    for name, targets in (
        ("llama gqa", ["q_proj", "embed_tokens", "lm_head"]),
        ("codegen", ["wte", "lm_head"]),
        ("codegen", ["wte"]),
        ("llama mha tied", ["embed_tokens"]),
    ):
        pair = bases(name)
        folder = tmp_path / f"{name} {len(targets)}"
        theirs = peft().get_peft_model(
            pair.oracle, peft().LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=targets)
        )
        theirs.save_pretrained(str(folder / "theirs"))
        load_adapter(pair.ours, pair.family, folder / "theirs")
        save_adapter(pair.ours, pair.family, folder / "ours", base=None)
        ours, other = (load_file(folder / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
        assert ours.keys() == other.keys()
        assert all(torch.equal(ours[key], other[key]) for key in ours)


@pytest.mark.parametrize("settings", [{}, {"rslora": True}, {"dora": True, "targets": ("wte", "c_attn")}])
def test_a_pissa_start_is_that_of_peft_and_leaves_as_plain_lora(
    bases: Callable[[str], Pair], tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = REFACTORING | {"r": 3, "init": "pissa"} | settings
    pair, base = bases("bigcode mqa"), bases("bigcode mqa").ours(TOKENS)
    config = peft_config(pair, {k: v for k, v in settings.items() if k != "init"})
    config.init_lora_weights = "pissa"
    theirs = peft().get_peft_model(pair.oracle, config)
    model: Any = theirs.base_model.model
    weights = {name: p.clone() for name, p in pair.ours.named_parameters()}
    add_adapter(pair.ours, LoraConfig(**settings), pair.family.key)
    assert_near(pair.ours(TOKENS), base, "the start changes nothing")
    for our, layer in adapter_layers(pair.ours, "default").items():
        if not isinstance(layer, LowRank) or layer.of_embedding:
            continue
        theirs: Any = model.get_submodule(pair.family.key(our))
        product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
        assert_near(layer.b @ layer.a, product, our)
        wrapper: Any = pair.ours.get_submodule(our)
        assert torch.equal(wrapper.base.weight, weights[f"{our}.weight"])  # It was not written to.
    scramble_adapters(pair.ours)
    save_adapter(pair.ours, pair.family, tmp_path / "out", base=None)
    opened = peft().PeftModel.from_pretrained(bases("bigcode mqa").oracle, str(tmp_path / "out"))
    assert_near(pair.ours(TOKENS), opened(TOKENS).logits, "as plain LoRA")


def test_a_pissa_adapter_of_peft_is_the_same_in_a_weight_of_any_size(tmp_path: Path) -> None:
    """A fresh start of a large weight is an approximation by random vectors; one that is read must not be."""
    wide = GPT | {"n_embd": 320, "n_layer": 1, "n_inner": 40, "bos_token_id": None, "eos_token_id": None}
    config = transformers.CONFIG_MAPPING["gpt_bigcode"](**wide)
    oracle: Any = transformers.AutoModelForCausalLM.from_config(config)
    oracle.save_pretrained(tmp_path / "base")
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"]}
    settings = peft().LoraConfig(task_type="CAUSAL_LM", init_lora_weights="pissa", **settings)
    theirs = peft().get_peft_model(oracle, settings).eval()
    scramble_adapters(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    for seed in (1, 2):
        torch.manual_seed(seed)
        found = load_pretrained(tmp_path / "base")
        load_adapter(found.model, found.family, tmp_path / "adapter")
        assert_near(found.model(TOKENS), theirs(TOKENS).logits, f"seed {seed}")


# Of a Llama with 3 layers, what the key of an alpha_pattern means in PEFT.
@pytest.mark.parametrize(
    "key",
    ["q_proj", "^q_proj", "^model.*q_proj", "self_attn.*_proj", r"layers\.1\..*", "layers.1..*",
     "1.self_attn.q_proj$", ".*", ".*.*_proj", "el.*q_proj", "q.proj", ".*attn.*v.*"],
)  # fmt: skip
def test_a_key_of_a_pattern_means_what_it_means_in_peft(key: str) -> None:
    from peft.utils.other import get_pattern_key

    names = [f"model.layers.{i}.self_attn.{leaf}" for i in (0, 1, 11) for leaf in ("q_proj", "v_proj")]
    names += ["q_proj", "model.q_projector", "lm_head"]
    pattern = peft_key(key)
    for name in names:
        assert bool(pattern.fullmatch(name)) == (get_pattern_key([key], name) == key), name


@pytest.mark.parametrize(
    "patterns",
    [
        {"h.1.*": 5, "c_proj": 3},
        {"*.h.1.*": 5},
        {"mlp.c_proj": 2, "c_proj": 3},
        {"c_attn": 4, "c_proj": 3},
        {},
    ],
)
def test_patterns_mean_the_same_for_peft_in_any_order(patterns: dict[str, int]) -> None:
    from peft.utils.other import get_pattern_key

    names = [f"x.h.{i}.{leaf}" for i in (1, 11) for leaf in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")]
    written = as_peft_pattern(patterns, names, {"lm_head": 9})
    for order in (sorted(written), sorted(written, reverse=True)):
        for name in names:
            assert written.get(get_pattern_key(order, name), 0) == pattern_value(patterns, name, 0), name
        assert written[get_pattern_key(order, "lm_head")] == 9


def test_what_is_no_name_is_no_key_of_a_pattern() -> None:
    for key in ("q_*", "*", "**", r"\.*", "(a+)+$", "a^b", "$", "", "[a]", "a|b", "q_proj\n", "a" * 201):
        with pytest.raises(ValueError, match="only names"):
            peft_key(key)
    assert not peft_key(".*a" * 60).fullmatch(
        "a" * 59 + "b" * 5000
    )  # A search that tries places again would not end.


def test_an_adapter_with_patterns_of_peft_is_the_same_here(
    bases: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = bases("llama gqa")
    patterns = {"^q_proj": 64, r"^model\.layers\.1.*": 9, "layers.2.self_attn.q_proj": 3}
    settings = peft().LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], alpha_pattern=patterns)
    theirs = peft().get_peft_model(pair.oracle, settings).eval()
    scramble_adapters(theirs)
    theirs.save_pretrained(str(tmp_path))
    load_adapter(pair.ours, pair.family, tmp_path)
    assert_near(pair.ours(TOKENS), theirs(TOKENS).logits, "logits")


ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "as pairs under a biased head": ("codegen", {}),
    "as pairs with DoRA": ("codegen", {"dora": True}),
    "as pairs, tied": ("phi mqa tied", {}),
    "as pairs, tied, with DoRA": ("phi mqa tied", {"dora": True}),
    "as pairs beside patterns": (
        "codegen", {"alpha": 16.0, "rank_pattern": {"*": 3}, "alpha_pattern": {"transformer.*": 5.0}}),
    "as pairs beside an embedding that is a target": ("codegen", {"targets": ("wte", "qkv_proj", "fc_in")}),
    "as pairs beside a tied head that is a target": ("llama mha tied", {"targets": ("q_proj", "lm_head")}),
    "of the head alone": ("llama gqa", {"targets": ("q_proj", "embed_tokens")}),
    "of the head alone, tied": ("llama mha tied", {"targets": ("q_proj", "embed_tokens")}),
    "of the head alone, by another name": ("bigcode mqa", {"targets": ("c_attn", "wte")}),
    "of the embedding alone": ("llama gqa", {"targets": ("q_proj", "lm_head")}),
}  # fmt: skip


Q, V = "q_proj", "v_proj"
# What PEFT is asked for beside a rank of 2; each must mean the same here, by config and by tensors.
CHOSEN: dict[str, tuple[str, dict[str, Any]]] = {
    "one layer": ("llama gqa", {"target_modules": [Q, V], "layers_to_transform": 1}),
    "two layers": ("llama gqa", {"target_modules": [Q, "down_proj"], "layers_to_transform": [0, 2]}),
    "layers by name": ("bigcode mqa", {"target_modules": ["c_attn"], "layers_to_transform": [1],
                                      "layers_pattern": "h"}),
    "no layers": ("llama gqa", {"target_modules": [Q], "layers_to_transform": []}),
    "all but some": ("llama gqa", {"target_modules": [Q, V], "exclude_modules": ["1.self_attn.q_proj"]}),
    "all linears but some": ("llama gqa", {"target_modules": "all-linear", "exclude_modules": ["up_proj"]}),
    "all but a pattern": ("llama gqa", {"target_modules": [Q, V], "exclude_modules": r".*\.[12]\..*v_proj"}),
    "a pattern": ("llama gqa", {"target_modules": r".*layers\.(0|2)\.self_attn\.(?:q|k)_proj"}),
    "a pattern of all": ("phi", {"target_modules": r"(^|.*\.)(q_proj|lm_head|embed_tokens|fc[12])$"}),
    "fan_in_fan_out": ("bigcode mha", {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
    "fan_in_fan_out, dora": ("llama gqa", {"target_modules": [Q], "fan_in_fan_out": True, "use_dora": True}),
    "lora_bias": ("phi", {"target_modules": [Q, "fc1"], "lora_bias": True, "lora_alpha": 7}),
    "lora_bias, rslora": ("bigcode mqa", {"target_modules": ["c_fc"], "lora_bias": True, "use_rslora": True}),
    "a rank above the width": ("llama gqa", {"target_modules": [Q, "embed_tokens"], "r": 60}),
    "tied, untied model": ("llama gqa", {"target_modules": [Q, "lm_head"], "ensure_weight_tying": True}),
    "tied, neither": ("llama mha tied", {"target_modules": [Q], "ensure_weight_tying": True}),
    "tied, embedding": ("phi mqa tied", {"target_modules": [Q, "embed_tokens"], "ensure_weight_tying": True}),
    "tied, head": ("llama mha tied", {"target_modules": [Q, "lm_head"], "ensure_weight_tying": True}),
    "tied, whole": ("llama mha tied", {"target_modules": [Q], "modules_to_save": ["embed_tokens"],
                                       "ensure_weight_tying": True}),
    "tied, whole head": ("bigcode mqa", {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"],
                                         "ensure_weight_tying": True}),
    "tied, rows": ("llama mha tied", {"target_modules": [Q], "trainable_token_indices": [3, 50],
                                      "ensure_weight_tying": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOSEN)
def test_what_a_config_of_peft_chooses_is_the_same_here(
    bases: Callable[[str], Pair], tmp_path: Path, case: str
) -> None:
    name, settings = CHOSEN[case]
    pair = bases(name)
    config = peft().LoraConfig(task_type="CAUSAL_LM", **{"r": 2} | settings)
    theirs = peft().get_peft_model(pair.oracle, config).eval()
    scramble_adapters(theirs)
    theirs.save_pretrained(str(tmp_path))
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    values |= {
        key: value for key, value in settings.items() if values[key] != value and key.startswith("fan")
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    reopened = peft().PeftModel.from_pretrained(make_oracle(name), str(tmp_path)).eval()
    load_adapter(pair.ours, pair.family, tmp_path)
    with torch.no_grad():
        assert_near(pair.ours(TOKENS), reopened(TOKENS).logits, case)
    # Our own file says the same in plainer words.
    save_adapter(pair.ours, pair.family, tmp_path / "again", base=None)
    again = bases(name)
    load_adapter(again.ours, again.family, tmp_path / "again")
    with torch.no_grad():
        assert_near(again.ours(TOKENS), reopened(TOKENS).logits, f"{case}, saved again")


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_to_transform": [1]},
        {"layers_to_transform": [0, 1, 2], "layers_pattern": "h"},
        {"exclude_modules": ["1.self_attn.q_proj"]},
        {"exclude_modules": r".*v_proj"},
        {"target_modules": r".*\.q_proj"},
        {"target_modules": r".*\.(q|k|v)_proj"},
        {"target_modules": "all-linear"},
    ],
)
def test_a_config_that_chooses_other_modules_than_have_tensors_is_refused(
    bases: Callable[[str], Pair], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """PEFT passes over the tensors that are left, or adds pairs that change nothing; neither was trained."""
    pair = bases("llama gqa")
    add_adapter(pair.ours, LoraConfig(r=2, targets=(Q, V)), pair.family.key)
    save_adapter(pair.ours, pair.family, tmp_path, base=None)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=r"is left over|is missing|match no module"):
        load_adapter(bases("llama gqa").ours, pair.family, tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"target_modules": r"(?!x).*q_proj"}, "a regular expression that is not known here"),
        ({"target_modules": "(" * 50}, "a regular expression that is not known here"),
        ({"target_modules": "(a{900}){900}"}, "a regular expression that is not known here"),
        ({"target_modules": r"(.*.*)*" * 200}, "is missing"),
        ({"target_modules": r"(x+x+)+y|(.*a)*b"}, "match no module"),
        ({"exclude_modules": "[[:alpha:]]+"}, "exclude_modules is .* a regular expression that is not known"),
        ({"exclude_modules": 3}, "exclude_modules is 3; it must be a list of names"),
        ({"layers_to_transform": ["1"]}, r"layers_to_transform is \['1'\]; it must be a number or a list"),
        ({"layers_to_transform": 1, "layers_pattern": "(a+)+"}, "it must be the name of the list of layers"),
        ({"layers_pattern": "layers"}, "layers_to_transform is not; PEFT refuses that too"),
        ({"layers_to_transform": 1, "target_modules": ".*q_proj"}, "PEFT knows no layers_to_transform"),
        ({"lora_bias": True}, "q_proj has no bias; known is lora_bias alone"),
        ({"ensure_weight_tying": "yes"}, "ensure_weight_tying is 'yes'; it must be bool"),
    ],
)
def test_a_choice_that_is_not_known_is_one_sentence_at_once(
    bases: Callable[[str], Pair], tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    pair = bases("llama gqa")
    add_adapter(pair.ours, LoraConfig(r=2, targets=(Q, V)), pair.family.key)
    save_adapter(pair.ours, pair.family, tmp_path, base=None)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    start = time.process_time()
    with pytest.raises(ValueError, match=sentence) as error:
        load_adapter(bases("llama gqa").ours, pair.family, tmp_path)
    assert "\n" not in str(error.value) and time.process_time() - start < 5


def test_tied_weights_stay_one_where_an_adapter_that_ties_them_trains_on(
    bases: Callable[[str], Pair], tmp_path: Path
) -> None:
    for case in ("tied, whole", "tied, embedding"):
        name, settings = CHOSEN[case]
        pair = bases(name)
        config = peft().LoraConfig(task_type="CAUSAL_LM", r=2, **settings)
        peft().get_peft_model(pair.oracle, config).save_pretrained(str(tmp_path / case))
        if case == "tied, embedding":
            with pytest.raises(ValueError, match="can be used here and not trained on"):
                load_adapter(pair.ours, pair.family, tmp_path / case, trainable=True)
            continue
        load_adapter(pair.ours, pair.family, tmp_path / case, trainable=True)
        layers: Any = adapter_layers(pair.ours, "default")
        assert layers["head"].copy.weight is layers["embed"].copy.weight


@pytest.mark.parametrize("case", ROWS)
def test_rows_leave_for_peft_and_come_back(bases: Callable[[str], Pair], tmp_path: Path, case: str) -> None:
    """PEFT's own rows drop a head's bias; a pair of the rows' number keeps it."""
    name, settings = ROWS[case]
    pair = bases(name)
    add_adapter(pair.ours, LoraConfig(r=2, **settings), pair.family.key, new_rows=[50, 4])
    scramble_adapters(pair.ours)
    save_adapter(pair.ours, pair.family, tmp_path / "out", base=None)
    values = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    for key in ("rank_pattern", "alpha_pattern"):
        assert not any("*" in pattern for pattern in values[key])  # nothing for PEFT to sort or to interpret
    opened = peft().PeftModel.from_pretrained(pair.oracle, str(tmp_path / "out"))
    assert_near(pair.ours(TOKENS), opened(TOKENS).logits, "in PEFT")
    again = bases(name)
    load_adapter(again.ours, again.family, tmp_path / "out")
    assert_near(again.ours(TOKENS), pair.ours(TOKENS), "here")


@pytest.mark.parametrize("name", ["llama gqa", "llama mha tied"])
def test_rows_of_peft_may_differ_by_module(bases: Callable[[str], Pair], tmp_path: Path, name: str) -> None:
    for i, rows in enumerate(({"embed_tokens": [50, 4], "lm_head": [7]}, {"lm_head": [3, 9]}, [8])):
        pair = bases(name)
        settings = peft().LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=rows)
        theirs = peft().get_peft_model(pair.oracle, settings).eval()
        scramble_adapters(theirs)
        theirs.save_pretrained(str(tmp_path / f"theirs {i}"))
        load_adapter(pair.ours, pair.family, tmp_path / f"theirs {i}")
        assert_near(pair.ours(TOKENS), theirs(TOKENS).logits, f"from PEFT {rows}")
        save_adapter(pair.ours, pair.family, tmp_path / f"ours {i}", base=None)
        other = peft().PeftModel.from_pretrained(bases(name).oracle, str(tmp_path / f"ours {i}"))
        assert_near(other(TOKENS).logits, theirs(TOKENS).logits, f"back to PEFT {rows}")


def test_weighted_adapters_are_those_of_peft(bases: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = bases("llama gqa")
    theirs = peft().get_peft_model(pair.oracle, peft_config(pair, SUMMARIES))
    theirs.add_adapter("second", peft_config(pair, SUMMARIES | {"r": 3, "targets": ("q_proj", "fc")[:1]}))
    for name in ("default", "second"):
        theirs.set_adapter(name)
        scramble_adapters(theirs)
    theirs.save_pretrained(str(tmp_path))
    load_adapter(pair.ours, pair.family, tmp_path, "first")
    load_adapter(pair.ours, pair.family, tmp_path / "second", "second")
    theirs.add_weighted_adapter(["default", "second"], [0.7, -1.5], "mixed", combination_type="cat")
    for mine, name in (
        ({"first": 1.0}, "default"),
        ({"second": 1.0}, "second"),
        ({"first": 0.7, "second": -1.5}, "mixed"),
    ):
        use_adapters(pair.ours, mine)
        theirs.set_adapter(name)
        assert_near(pair.ours(TOKENS), theirs.eval()(TOKENS).logits, name)


# --- planted faults ------------------------------------------------------------------------------------


def _swapped_rows(fused: Tensor) -> Tensor:
    """B of CodeGen's fused projection, its keys and values in the other order."""
    q, v, k = fused.unflatten(0, (4, 3, -1)).unbind(1)
    return torch.stack((q, k, v), dim=1).flatten(0, 2)


class _Transposed(LowRank):
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.a.flatten().view(self.a.size(1), -1).t(), self.b


def _forget_scale(patch: pytest.MonkeyPatch) -> None:
    right = lora.linear_with_term
    patch.setattr(
        lora, "linear_with_term", lambda x, w, bias, a, b, scale, drop: right(x, w, bias, a, b, 1.0, drop)
    )


def _transpose(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LowRank, "factors", _Transposed.factors)


def _swap_rows(patch: pytest.MonkeyPatch) -> None:
    def swapped(self: LowRank) -> tuple[Tensor, Tensor]:
        return self.a, _swapped_rows(self.b) if self.b.size(0) == 72 else self.b

    patch.setattr(LowRank, "factors", swapped)


def _last_pattern(patch: pytest.MonkeyPatch) -> None:
    right = lora.pattern_value
    patch.setattr(
        lora, "pattern_value", lambda p, name, default: right(dict(reversed(p.items())), name, default)
    )


def _norm_with_gradient(patch: pytest.MonkeyPatch) -> None:
    def gain(self: LowRank, base: Any) -> Tensor | None:
        if self.magnitude is None:
            return None
        return self.magnitude / self._length(base.weight.float() + self.delta())

    patch.setattr(LowRank, "gain", gain)


def _bias_scaled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lora.LoraLinear, "_without_bias", lambda self, x: self.base(x))


def _one_adapter_frozen(patch: pytest.MonkeyPatch) -> None:
    """The gradient of B made of the input instead of x a^T's."""
    right = products._factor_gradients

    def wrong(ctx: Any, *rest: Any) -> tuple[Tensor | None, Tensor | None]:
        grad_a, grad_b = right(ctx, *rest)
        return grad_a, None if grad_b is None else grad_b / ctx.scale

    patch.setattr(products, "_factor_gradients", wrong)


PLANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str, dict[str, Any]]] = {
    "scale forgotten": (_forget_scale, "refactoring mqa", {}),
    "A transposed": (_transpose, "summaries", {}),
    "keys and values swapped": (_swap_rows, "fastapi", {}),
    "alpha of another module": (
        _last_pattern, "refactoring mqa", {"alpha_pattern": {"mlp.c_proj": 5.0, "c_proj": 64.0}}),
    "norm not detached": (_norm_with_gradient, "dora", {}),
    "bias scaled by DoRA": (_bias_scaled, "dora all", {}),
    "scale forgotten in backward": (_one_adapter_frozen, "kotlin", {}),
}  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_faults_are_seen(
    bases: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch, plant: str
) -> None:
    fault, case, more = PLANTS[plant]
    name, settings = CASES[case]
    settings = settings | more

    def run() -> None:
        pair = bases(name)
        theirs = peft().get_peft_model(pair.oracle, peft_config(pair, settings)).eval()
        scramble_adapters(theirs)
        add_adapter(pair.ours, LoraConfig(**settings), pair.family.key)
        wanted = dict(theirs.named_parameters())
        with torch.no_grad():
            for our, layer in adapter_layers(pair.ours, "default").items():
                for part, p in layer.named_parameters():
                    p.copy_(wanted[oracle_key(our, part, layer, pair.family)])
        compare(pair, theirs)

    run()
    with monkeypatch.context() as patch:
        fault(patch)
        with pytest.raises(AssertionError):
            run()
