"""Rates and initialisation are carried over to another width: the coordinate check, and its rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from architecture import Decoder
from benchmarks import widths
from config import ModelConfig, OptimizerConfig, parse_config
from dataset import Batch
from training.optim import Muon, build_optimizers

WIDTHS = (16, 32, 64, 128)
VOCABULARY = 48


def batches(n: int = 5, rows: int = 4, length: int = 24) -> list[Batch]:
    """Texts in which the next id follows from the last."""
    draw = torch.Generator().manual_seed(0)
    follows = torch.randperm(VOCABULARY, generator=draw)
    made = []
    for _ in range(n):
        ids = [torch.randint(VOCABULARY, (rows,), generator=draw)]
        for _ in range(length):
            ids.append(follows[ids[-1]])
        tokens = torch.stack(ids, 1)
        places = torch.arange(length).expand(rows, length)
        made.append(Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros_like(places), places))
    return made


@pytest.mark.parametrize(
    "init", ["zero_output", *(pytest.param(init, marks=pytest.mark.slow) for init in ("normal", "xavier"))]
)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_updates_change_outputs_alike_at_every_width(
    name: Literal["adamw", "muon"],
    init: Literal["zero_output", "normal", "xavier"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(widths, "HEAD_DIM", 8)
    model = ModelConfig(VOCABULARY, 24, n_layer=2, init=init)
    optimizer = OptimizerConfig(name=name, lr=3e-3, embedding_lr=3e-2, head_lr=3e-3)
    carried, plain = (
        widths.slopes(model, optimizer, batches(), WIDTHS, carried) for carried in (True, False)
    )
    assert min(carried) > -0.5 and max(carried) < 0.2, carried  # below 64 a drawn head is far from its limit
    if init != "xavier":  # Xavier shows it from 64 on only.
        assert max(plain) > 0.45, plain


def rates_of(name: Any, config: ModelConfig) -> dict[str, float]:
    model = Decoder(config)
    optimizer = OptimizerConfig(name=name, lr=0.1, muon_lr=0.2, embedding_lr=0.3, head_lr=0.4)
    given = {
        id(p): (group["lr"], type(o))
        for o in build_optimizers(model, optimizer, width_mult=config.width_mult)
        for group in o.param_groups
        for p in group["params"]
    }
    assert (given[id(model.blocks[0].get_parameter("mlp.up.weight"))][1] is Muon) == (name == "muon")
    return {n: given[id(p)][0] for n, p in model.named_parameters()}


@pytest.mark.parametrize(("name", "of_blocks"), [("adamw", 0.1 / 4), ("muon", 0.2)])
def test_only_rates_of_matrices_as_wide_as_the_model_fall(name: str, of_blocks: float) -> None:
    config = ModelConfig(31, 8, n_layer=1, n_head=4, n_embd=32, norm_weight=True, base_width=8)
    rates = rates_of(name, config)
    assert rates["embed.weight"] == 0.3 and rates["head.weight"] == pytest.approx(0.4 / 4)
    assert rates["blocks.0.mlp.up.weight"] == rates["blocks.0.attention.out.weight"] == of_blocks
    assert rates["norm.weight"] == 0.1


@pytest.mark.parametrize(
    ("init", "of_blocks", "of_head"), [("normal", 0.5, 0.25), ("xavier", 1.0, 0.5), ("zero_output", 1.0, 1.0)]
)
def test_what_is_drawn_falls_with_the_width(init: Any, of_blocks: float, of_head: float) -> None:
    """Standard deviations at four times base_width, as shares of those of the same model without one.

    What Xavier draws falls with the square root of the width by itself, and its embedding does not any more.
    """
    torch.manual_seed(0)
    config = ModelConfig(500, 8, n_layer=1, n_head=4, n_embd=64, init=init)
    plain, carried = (
        dict(Decoder(replace(config, base_width=width)).named_parameters()) for width in (0, 16)
    )

    def share(name: str) -> float:
        return float(carried[name].std() / plain[name].std()) if plain[name].any() else 1.0

    assert share("blocks.0.mlp.up.weight") == pytest.approx(of_blocks, rel=0.05)
    assert share("head.weight") == pytest.approx(of_head, rel=0.05)
    assert share("embed.weight") == pytest.approx(2.0 if init == "xavier" else 1.0, rel=0.05)


@pytest.mark.parametrize("init", ["zero_output", "normal", "xavier"])
def test_at_the_width_itself_nothing_changes(init: Any) -> None:
    models = []
    for base_width in (0, 16):
        torch.manual_seed(0)
        models.append(
            Decoder(ModelConfig(31, 8, n_layer=2, n_head=2, n_embd=16, init=init, base_width=base_width))
        )
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model.base_width", "-1"], "model.base_width is -1; it must be at least 1, or 0 for the default"),
        (["--model.base_width", "64", "--model.tie_embeddings", "true"], "set model.tie_embeddings to false"),
        (["--model.base_width", "64", "--base", "b"], "base brings weights of its own"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_config(words)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and sentence in error and error.count("\n") == 1
