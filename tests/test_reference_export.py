"""What an export writes, opened again by the reference from its files: agreement, and faults of exporters."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bare_subjects import decoder
from decoders import scramble
from pretrained_folders import change_json
from test_adapter import CASES, scramble_adapters
from test_pretrained import TOKENS, Pair, pairs, two_of_each_family
from torch import Tensor

from architecture import Decoder
from config import Config, LoraConfig, TrainConfig
from guards.faults import Fault
from guards.reference import exported
from guards.reference.exported import refuse_other_adapter, refuse_other_model
from lora import add_adapter
from pretrained import Pretrained, family, save, save_adapter
from pretrained.save import save_pretrained
from reference.forward import Rows, logits_of
from reference.published_settings import DEFAULTS, settings_of
from training.run import base_stored_as, grow_vocabulary

__all__ = ["pairs"]  # A fixture.
LLAMA = {"norm": "rms", "norm_weight": True, "n_kv_head": 2, "mlp": "swiglu", "qk_norm": False}
NAMED = "differs-from-reference: exported .*; nothing was written. To export all the same: --allow "


# --- published models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", two_of_each_family())
def test_the_reference_opens_a_published_folder_as_transformers_does(
    name: str, pairs: Callable[[str], Pair]
) -> None:
    """The config.json is read as it is, and once more without the keys that say what is the default."""
    pair = pairs(name)
    with torch.no_grad():
        tokens = TOKENS % pair.ours.config.vocab_size
        expected = pair.oracle(tokens).logits
    values = json.loads((pair.folder / "config.json").read_text("utf-8"))
    defaults = DEFAULTS[values["model_type"]]
    short = {key: value for key, value in values.items() if value != defaults.get(key, [])}
    for stored in (values, short):
        (pair.folder / "config.json").write_text(json.dumps(stored), "utf-8")
        settings, weights = settings_of(pair.folder), exported.OpenedModel(pair.folder, *names_of(pair.ours))
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        found = logits_of(settings, weights, Rows(tokens, positions, torch.zeros_like(tokens)))
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        exact = pair.ours.double()(tokens)
        pair.ours.float()
    assert (found - exact).abs().max() < 1e-9 * exact.abs().max().clamp(min=1), "in fp64"


def names_of(model: Decoder) -> tuple[list[str], bool]:
    return [name for name, _ in model.named_parameters(remove_duplicate=False)], model.config.tie_embeddings


def rewritten(model: Decoder, folder: Path, **more: Any) -> None:
    """Export a model, and let the reference open what was written."""
    save_pretrained(
        model, None, folder, complete=lambda hidden: refuse_other_model(hidden, model, ()), **more
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", two_of_each_family())
def test_a_healthy_export_of_a_model_passes(
    name: str, dtype: torch.dtype, pairs: Callable[[str], Pair], tmp_path: Path, capsys: Any
) -> None:
    rewritten(pairs(name).ours.to(dtype), tmp_path / "out", max_shard_bytes=20_000)
    pairs(name).ours.float()
    assert "settings exactly, weights exactly, logits" in capsys.readouterr().out
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.fixture
def llama() -> Decoder:
    torch.manual_seed(0)
    model = decoder(**LLAMA, rope_theta=500.0, n_inner=32)
    scramble(model)
    return model.eval()


def wrong_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Return what lets the exporter write other tensors."""
    right = save._tensors

    def wrong(*args: Any) -> dict[str, Tensor]:
        tensors = {key: tensor.clone() for key, tensor in right(*args).items()}
        change(tensors)
        return tensors

    return lambda patch: patch.setattr(save, "_tensors", wrong)


def wrong_settings(change: Callable[[dict[str, Any]], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Return what lets the exporter write another config.json."""
    right = family.from_model

    def wrong(*args: Any) -> dict[str, Any]:
        values = right(*args)
        change(values)
        return values

    return lambda patch: patch.setattr(save, "from_model", wrong)


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda values: values.pop(key)


def rounded(tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        tensors[key] = tensor.bfloat16().float()


def swapped(tensors: dict[str, Tensor]) -> None:
    first, second = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up"))
    tensors[first], tensors[second] = tensors[second], tensors[first]


Q = "model.layers.1.self_attn.q_proj.weight"
WRONG_MODELS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "a transposed matrix": (
        r"blocks\.1\.attention\.q\.weight as stored.*the matrix transposed\?",
        wrong_tensors(lambda tensors: tensors.update({Q: tensors[Q].t().contiguous()})),
    ),
    "a matrix that is left out": (
        r"blocks\.1\.attention\.q\.weight: the files cannot give it",
        wrong_tensors(without(Q)),
    ),
    "two matrices swapped": (r"blocks\.0\.mlp\.(gate|up)\.weight as stored", wrong_tensors(swapped)),
    "rounded to bf16": ("embed.weight as stored: differs by", wrong_tensors(rounded)),
    "a head that is left out": (r"head\.weight: the files cannot", wrong_tensors(without("lm_head.weight"))),
    "a layer too few": (
        "n_layer: 2, and the reference has 1",
        wrong_settings(lambda values: values.update(num_hidden_layers=1)),
    ),
    "a head said to be tied": (
        "tie_embeddings: False, and the reference has True",
        wrong_settings(lambda values: values.update(tie_word_embeddings=True)),
    ),
    "a missing key, for transformers 5": (
        "rope_theta: 500.0, and the reference has 10000.0",
        wrong_settings(lambda values: values["rope_parameters"].update(rope_theta=1e4)),
    ),
    "a missing key, for transformers 4": (
        "rope_theta: 500.0, and the reference has 10000.0",
        wrong_settings(without("rope_theta")),
    ),
    "another epsilon": (
        r"norm_eps: 1e-06, and the reference has 1e-05",
        wrong_settings(lambda values: values.update(rms_norm_eps=1e-5)),
    ),
    "an unknown activation": (
        r"config\.json: it cannot be read \(hidden_act is 'tanh'",
        wrong_settings(lambda values: values.update(hidden_act="tanh")),
    ),
}


@pytest.mark.parametrize("fault", WRONG_MODELS)
def test_a_model_that_is_written_wrong_is_refused_and_nothing_is_left(
    fault: str, llama: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, plant = WRONG_MODELS[fault]
    plant(monkeypatch)
    with pytest.raises(Fault, match=named) as error:
        rewritten(llama, tmp_path / "out", family="llama")
    assert re.match(NAMED, str(error.value)) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_forward_pass_that_its_files_do_not_mean_is_named(llama: Decoder, tmp_path: Path) -> None:
    """Settings and weights agree, and what the model computes with them is another."""
    norm: Any = llama.norm
    right = norm.forward
    norm.forward = lambda x: right(x) * 1.001
    with pytest.raises(Fault, match=r"exported model, logits of a row: 1\.001 times the reference"):
        rewritten(llama, tmp_path / "out")


def test_a_difference_that_is_allowed_is_said_and_written(
    llama: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    WRONG_MODELS["a layer too few"][1](monkeypatch)
    allowed = ("differs-from-reference",)
    complete = lambda hidden: refuse_other_model(hidden, llama, allowed)  # noqa: E731
    save_pretrained(llama, None, tmp_path / "out", "llama", complete=complete)
    assert capsys.readouterr().err.startswith(
        "ALLOWED differs-from-reference: exported model, config.json, n_"
    )
    assert (tmp_path / "out").is_dir()


def test_of_a_large_model_a_sample_is_compared_and_what_is_left_out_is_said(
    llama: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(exported, "LARGE", 1000)
    monkeypatch.setattr(exported, "SAMPLED", 64)
    rewritten(llama, tmp_path / "out")
    said = capsys.readouterr().out
    assert "a row of logits was not compared with the reference: the model has 16,352 weights" in said
    assert "settings exactly, weights exactly (" in said


def test_a_family_that_is_not_known_is_said(llama: Decoder, tmp_path: Path, capsys: Any) -> None:
    save_pretrained(llama, None, tmp_path / "out")
    change_json(tmp_path / "out" / "config.json", model_type="camel")
    assert not refuse_other_model(tmp_path / "out", llama, ())
    assert "reference/published.py does not know the family camel" in capsys.readouterr().out


# --- adapters -----------------------------------------------------------------------------------------


def write_adapter(found: Pretrained, base: Path, lora: LoraConfig, out: Path, stored: str = "fp32") -> None:
    """Write an adapter as `export_adapter` does, without a tokenizer, and let the reference open it."""
    run: Any = SimpleNamespace(model=found.model.eval(), family=found.family, base_folder=base)
    run.config = Config(lora=lora, train=TrainConfig(base=str(base), base_format=stored))  # type: ignore

    def complete(hidden: Path) -> None:
        (hidden / "base.json").write_text(json.dumps({"base_format": stored}), "utf-8")
        refuse_other_adapter(hidden, run, ())

    save_adapter.save_adapter(run.model, run.family, out, "base", complete=complete)


def adapted(
    folder: Path, settings: dict[str, Any], stored: str = "fp32", new: int = 0
) -> tuple[Pretrained, LoraConfig]:
    """Return a base with a scrambled adapter; `new` tokens are added to its vocabulary."""
    found, lora = base_stored_as(stored, str(folder), torch.float32, "cpu"), LoraConfig(**settings)
    if new:
        grow_vocabulary(found.model, found.model.config.vocab_size + new)
    ids = [int(token) for token in lora.new_tokens]
    add_adapter(found.model, lora, found.family.key, new_rows=ids)
    scramble_adapters(found.model)
    return found, lora


@pytest.mark.parametrize("case", CASES)
def test_a_healthy_export_of_an_adapter_passes(
    case: str, pairs: Callable[[str], Pair], tmp_path: Path, capsys: Any
) -> None:
    name, settings = CASES[case]
    folder = pairs(name).folder
    found, lora = adapted(folder, settings)
    write_adapter(found, folder, lora, tmp_path / "out")
    assert "settings exactly, weights" in capsys.readouterr().out


GROWN = {"r": 3, "alpha": 5.0, "new_tokens": ("53", "54")}
STORED: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "nf4": ("llama gqa", "nf4", {"r": 3, "dora": True}, 0),
    "bf16": ("codegen", "bf16", {"r": 3, "bias": "all"}, 0),
    "pissa": ("phi", "fp32", {"r": 3, "init": "pissa", "rslora": True}, 0),
    "pissa and a table": ("bigcode mqa", "fp32", {"r": 3, "init": "pissa", "targets": ("mlp", "wte")}, 0),
    "grown": ("llama gqa", "fp32", GROWN, 2),
    "grown, tied": ("bigcode mqa", "bf16", GROWN, 2),
    "grown, head with a bias": ("codegen", "fp32", GROWN, 2),
    "grown, table a target": ("bigcode mqa", "fp32", GROWN | {"targets": ("wte", "c_attn")}, 2),
    "grown, both targets": ("llama gqa", "fp32", GROWN | {"targets": ("embed_tokens", "lm_head")}, 2),
}  # fmt: skip


@pytest.mark.parametrize("case", STORED)
def test_a_healthy_adapter_of_a_stored_or_grown_base_passes(
    case: str, pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    name, stored, settings, new = STORED[case]
    folder = pairs(name).folder
    found, lora = adapted(folder, settings, stored, new)
    write_adapter(found, folder, lora, tmp_path / "out", stored)


def test_rows_that_nobody_has_are_not_passed_over(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    """A pair on a grown table is a change of rows that are in no file, unless the whole table is written."""
    name, stored, settings, new = STORED["grown, table a target"]
    folder = pairs(name).folder
    found, lora = adapted(folder, settings, stored, new)
    found.model.grown = False
    with pytest.raises(Fault, match=r"exported adapter, embed\.weight, change by the adapter: .*nan"):
        write_adapter(found, folder, lora, tmp_path / "out", stored)


def wrong_adapter(change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> Callable[..., Any]:
    """Return an exporter that writes another config or other tensors."""
    right = save_adapter._written

    def wrong(*args: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, tensors = right(*args)
        tensors = {key: tensor.detach().clone() for key, tensor in tensors.items()}
        change(values, tensors)
        return values, tensors

    return wrong


def times(suffix: str, factor: float) -> Callable[[dict[str, Any], dict[str, Tensor]], Any]:
    def change(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            if key.endswith(suffix):
                tensors[key] = tensor * factor

    return change


def transposed(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if "lora_A" in key]:
        tensors[key] = tensors[key].t().contiguous()


def drop(end: str) -> Callable[[dict[str, Any], dict[str, Tensor]], Any]:
    return lambda values, tensors: tensors.pop(next(key for key in tensors if key.endswith(end)))


ADAPTER = {"r": 4, "alpha": 12.0, "targets": ("q_proj", "down_proj"), "rank_pattern": {"down_proj": 2}}
MORE = {"bias": "all", "dora": True, "train_modules": ("model.norm",), "new_tokens": ("3", "9")}
WRONG_ADAPTERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "alpha is not written": (
        r"q\.weight, change by the adapter: 3 times the reference",
        lambda values, _: values.update(lora_alpha=4),
    ),
    "the scale is applied twice": (
        r"q\.weight, change by the adapter: 0\.3333 times the reference",
        times("q_proj.lora_B.weight", 3),
    ),
    "the pattern of ranks is not written": (
        r"mlp\.down\.weight: the files cannot give it \(A is \[2, 48\] and B \[32, 2\], where",
        lambda values, _: values.update(rank_pattern={}),
    ),
    "rsLoRA is said": (r"q\.weight, change", lambda values, _: values.update(use_rslora=True)),
    "a factor is transposed": (r"q\.weight: the files cannot give it", transposed),
    "a layer is left out": (
        r"blocks\.1\.attention\.q\.weight: the files cannot give it",
        drop("layers.1.self_attn.q_proj.lora_A.weight"),
    ),
    "other targets are named": (
        r"q\.weight, change by the adapter: .*, and the reference has 0;",
        lambda values, _: values.update(target_modules=["k_proj", "down_proj"]),
    ),
    "whole names are written where parts would do": (
        r"adapter_config\.json, target_modules: ",
        lambda values, _: values.update(
            target_modules=[
                f"model.layers.{n}.{part}" for n in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")
            ]
        ),
    ),
    "the start is not what PEFT writes": (
        r"adapter_config\.json, init_lora_weights: False, and the reference has True",
        lambda values, _: values.update(init_lora_weights=False),
    ),
    "the factors are rounded": (
        r"q\.weight, change by the adapter: differs by",
        lambda _, tensors: tensors.update({k: t.bfloat16().float() for k, t in tensors.items()}),
    ),
}
WRONG_PARTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "a copy is not named": (
        r"norm\.weight, change by the adapter", lambda values, _: values.update(modules_to_save=None)),
    "DoRA is not said": (r"q\.weight, change", lambda values, _: values.update(use_dora=False)),
    "its lengths are left out": (r"q\.weight: the files cannot give it", drop("lora_magnitude_vector")),
    "rows of other tokens": (
        r"(embed|head)\.weight, change by the adapter",
        lambda values, _: values.update(
            trainable_token_indices={"embed_tokens": [3, 8], "lm_head": [3, 9]})),
    "a bias is left out": (r"q\.bias, change", drop("layers.0.self_attn.q_proj.base_layer.bias")),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG_ADAPTERS | WRONG_PARTS)
def test_an_adapter_that_is_written_wrong_is_refused_and_nothing_is_left(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = decoder(**LLAMA, qkv_bias=fault in WRONG_PARTS)
    scramble(model)
    save_pretrained(model, None, tmp_path / "base")
    found, lora = adapted(tmp_path / "base", ADAPTER | (MORE if fault in WRONG_PARTS else {}))
    named, change = (WRONG_ADAPTERS | WRONG_PARTS)[fault]
    write_adapter(found, tmp_path / "base", lora, tmp_path / "healthy")
    monkeypatch.setattr(save_adapter, "_written", wrong_adapter(change))
    with pytest.raises(Fault, match=named) as error:
        write_adapter(found, tmp_path / "base", lora, tmp_path / "out")
    assert re.match(NAMED, str(error.value)) and "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "healthy"}
