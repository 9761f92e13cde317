"""The weights that a run begins with against the reference: sampled, loaded, and with adapters."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bare_subjects import bare_subject, decoder
from decoders import scramble
from pretrained_folders import change_json
from test_reference_forward import SHAPES
from torch import nn

import lora
from adapters.layers import LowRank, TrainableRows
from config import LoraConfig, TrainConfig
from guards.reference import forward, said, weights
from guards.reference.comparison import Comparison, Differs
from guards.reference.observed import adapter_of
from modules.nf4 import dequantize_nf4, quantize_nf4
from modules.quantized_linear import Linear4bit
from pretrained.save import save_pretrained
from reference.formats import nf4_decoded, nf4_rounding
from training.run import base_stored_as, starting_model

LLAMA = {"norm": "rms", "norm_weight": True, "n_kv_head": 2, "mlp": "swiglu", "qk_norm": False}
ADAPTERS: list[tuple[str, dict[str, Any]]] = [
    ("fp32", {"r": 4, "rslora": True, "targets": ("attention", "embed_tokens", "lm_head")}),
    ("bf16", {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5.0}, "dora": True}),
    ("nf4", {"r": 4, "init": "pissa"}),
    ("fp32", {"r": 4, "targets": ("mlp",), "train_modules": ("lm_head", "norm")}),
    ("fp32", {}),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = decoder(**LLAMA)
    scramble(model)
    save_pretrained(model, None, folder)
    return folder


def loaded(base: Path, weight_format: str, settings: dict[str, Any]) -> Any:
    """Return the subject of a run that starts from the base."""
    lora = LoraConfig(**settings)
    found = base_stored_as(weight_format, str(base), torch.float32, "cpu", None)
    subject = bare_subject(found.model, lora=lora, start="loaded", base_folder=base)
    subject.config = replace(subject.config, train=TrainConfig(base=str(base), base_format=weight_format))  # type: ignore
    no_tokens: Any = SimpleNamespace(vocab_size=subject.config.model.vocab_size, token_id=int)
    subject.model = starting_model(subject.config, found, no_tokens)
    return subject


@pytest.mark.parametrize("init", ["normal", "xavier", "zero_output"])
@pytest.mark.parametrize("shape", [*SHAPES, {"base_width": 16}], ids=str)
def test_a_fresh_model_is_sampled_as_the_settings_say(shape: dict[str, Any], init: str) -> None:
    weights.compare(bare_subject(decoder(**shape, init=init)), Comparison())


@pytest.mark.parametrize("name, factor", [("blocks.1.mlp.up.weight", 1.3), ("embed.weight", 0.7)])
def test_another_size_of_first_weights_is_named(name: str, factor: float) -> None:
    model = decoder(init="normal", n_embd=64)
    with torch.no_grad():
        model.get_parameter(name).mul_(factor)
    with pytest.raises(Differs, match=f"{name}, first values"):
        weights.compare(bare_subject(model), Comparison())


def test_tensors_that_are_one_or_equal_are_named() -> None:
    model = decoder(init="normal")
    first, second = (block.get_submodule("mlp.up") for block in model.blocks)
    with torch.no_grad():
        first.get_parameter("weight").copy_(second.get_parameter("weight"))
    with pytest.raises(Differs, match=r"those of blocks\.0\.mlp\.up"):
        weights.compare(bare_subject(model), Comparison())
    second.weight = first.weight
    with pytest.raises(Differs, match="memory"):
        weights.compare(bare_subject(model), Comparison())


@pytest.mark.parametrize("weight_format, settings", ADAPTERS, ids=str)
def test_a_base_and_its_adapters_are_what_files_and_settings_say(
    base: Path, weight_format: str, settings: dict[str, Any]
) -> None:
    subject = loaded(base, weight_format, settings)
    weights.compare(subject, Comparison())
    forward.compare(subject, Comparison())


def uncounted(right: Any) -> Any:
    """Leave one module out of those that have weights."""
    return lambda model: {name: m for name, m in right(model).items() if name != "blocks.1.mlp.up"}


@pytest.mark.parametrize(
    ("owner", "name", "wrong", "stage"),
    [
        (lora, "held_modules", uncounted, "table of what trains"),
        (said, "n_weights", lambda right: lambda model: right(model) + 1, "parameters of the model"),
        (said, "parameter_groups", lambda right: lambda *args: right(*args)[1:], "table of learning rates"),
    ],
)
def test_what_a_run_says_of_its_parameters_is_counted_again(
    base: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, wrong: Any, stage: str
) -> None:
    subject = loaded(base, "fp32", {"r": 4, "train_modules": ("norm",)})
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    with pytest.raises(Differs, match=stage):
        weights.compare(subject, Comparison())


def test_a_setting_that_was_not_read_of_the_base_is_named(base: Path) -> None:
    subject = loaded(base, "fp32", {})
    model = replace(subject.config.model, rope_theta=500.0)
    subject.config = replace(subject.config, model=model)
    with pytest.raises(Differs, match=r"config\.json of the base, rope_theta: 500\.0, and the reference has"):
        weights.compare(subject, Comparison())


def test_a_layer_that_was_not_loaded_or_not_where_it_belongs_is_named(base: Path) -> None:
    subject = loaded(base, "fp32", {})
    attention = subject.model.blocks[1].attention
    with torch.no_grad():
        attention.q.weight.copy_(attention.q.weight.T.clone())
    with pytest.raises(Differs, match="the matrix transposed"):
        weights.compare(subject, Comparison())


def test_a_base_of_a_family_that_the_reference_does_not_know_is_said(base: Path, tmp_path: Path) -> None:
    subject = loaded(base, "fp32", {"r": 4, "rank_pattern": {"q_proj": 2}})
    subject.base_folder = shutil.copytree(base, tmp_path / "camel")
    change_json(subject.base_folder / "config.json", model_type="camel")
    comparison = Comparison()
    weights.compare(subject, comparison)
    forward.compare(subject, comparison)
    assert comparison.left_out == [
        "the base was not compared with the reference: reference/published.py does not know the family camel"
    ]


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_row_of_a_new_token_is_the_mean_also_where_that_is_zero(value: float) -> None:
    """A head's bias often begins at zero in every row."""
    subject, n = bare_subject(decoder(head_bias=True)), 10
    published: Any = SimpleNamespace(rows=lambda name, start, stop: torch.full((stop - start,), value))
    bias = subject.model.head.bias
    assert bias is not None
    with torch.no_grad():
        bias.fill_(value)
    weights._new_rows(subject, Comparison(), published, "head.bias", n)
    with torch.no_grad():
        bias[n] += 0.01
    with pytest.raises(Differs, match="rows of new tokens"):
        weights._new_rows(subject, Comparison(), published, "head.bias", n)


def test_a_matrix_in_4_bits_that_is_another_is_named(base: Path) -> None:
    subject = loaded(base, "nf4", {"r": 4})
    stored = subject.model.blocks[0].mlp.up.base
    assert isinstance(stored, Linear4bit)
    stored.get_buffer("packed").bitwise_not_()
    with pytest.raises(Differs, match=r"mlp\.up\.weight of the base, in 4 bits"):
        weights.compare(subject, Comparison())


def test_a_base_that_is_not_stored_as_asked_is_named(base: Path) -> None:
    subject = loaded(base, "bf16", {"r": 4})
    train = replace(subject.config.train, base_format="nf4")
    subject.config = replace(subject.config, train=train)
    with pytest.raises(Differs, match="of the base, in 4 bits: False, and the reference has True"):
        weights.compare(subject, Comparison())


def test_a_scale_that_is_applied_twice_is_named(base: Path) -> None:
    subject = loaded(base, "fp32", {"r": 4})
    layer = next(module for module in subject.model.modules() if isinstance(module, LowRank))
    layer.scale *= layer.scale
    with pytest.raises(Differs, match="scale: 8 times the reference"):
        weights.compare(subject, Comparison())
    with pytest.raises(Differs, match="block 0"):
        forward.compare(subject, Comparison())


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_new_tokens_that_are_tied_otherwise_than_the_tables_are_named(
    tmp_path: Path, tied: bool
) -> None:
    save_pretrained(decoder(**LLAMA, tie_embeddings=tied), None, tmp_path)
    subject = loaded(tmp_path, "fp32", {"r": 4, "new_tokens": ("3", "5")})
    weights.compare(subject, Comparison())
    embed, head = (adapter_of(module)[1] for module in (subject.model.embed, subject.model.head))
    assert isinstance(embed, TrainableRows) and isinstance(head, TrainableRows)
    head.rows = nn.Parameter(embed.rows.detach().clone()) if tied else embed.rows
    with pytest.raises(Differs, match=r"rows of new tokens, one for|rows, memory"):
        weights.compare(subject, Comparison())


def test_the_decoder_of_nf4_agrees_and_its_bound_holds() -> None:
    weight = torch.randn(70, 90)
    stored = quantize_nf4(weight)
    found = nf4_decoded(*stored, (70, 90))
    torch.testing.assert_close(found.float(), dequantize_nf4(stored, (70, 90)), rtol=1e-5, atol=1e-6)
    assert bool(((found - weight).abs() <= nf4_rounding(weight, stored.nested_absmax)).all())
