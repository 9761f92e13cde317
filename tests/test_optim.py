"""Optimizers, parameter groups and schedules."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from architecture import Decoder
from config import ModelConfig, OptimizerConfig
from optim import SCHEDULES, Muon, build_optimizers, learning_rate_factor, orthogonalise

TINY = ModelConfig(
    vocab_size=31,
    block_size=8,
    n_layer=2,
    n_head=2,
    n_embd=16,
    norm="layer",
    norm_weight=True,
    norm_bias=True,
    qkv_bias=True,
    mlp_bias=True,
    position="learned",
)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 48, 16), (2, 16, 48)])
def test_orthogonalise_brings_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    matrices = torch.randn(shape, generator=g) * 1e-3
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    ours = orthogonalise(matrices)
    values = torch.linalg.svdvals(ours)
    assert (s.amax() / s.amin()) > 2  # they were not near one another before
    assert values.min() > 0.6 and values.max() < 1.3
    cosine = torch.nn.functional.cosine_similarity(ours.flatten(1), (u @ vt).flatten(1))
    assert cosine.min() > 0.98


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_one_group_and_vectors_do_not_decay(name: Any, tied: bool) -> None:
    model = Decoder(replace(TINY, tie_embeddings=tied))
    config = OptimizerConfig(name=name, weight_decay=0.1)
    optimizers = build_optimizers(model, config)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    members = [p for group in groups for p in group["params"]]
    assert len(members) == len({id(p) for p in members}) == len(list(model.parameters()))
    for group in groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if p.dim() == 2 else 0.0)
    assert any(isinstance(o, Muon) for o in optimizers) == (name == "muon")


def test_frozen_parameters_are_left_out_and_do_not_move() -> None:
    model = Decoder(TINY)
    model.embed.weight.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizers = build_optimizers(model, OptimizerConfig())
    model(torch.randint(31, (2, 8))).logsumexp(-1).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(before["embed.weight"], model.embed.weight)
    assert not torch.equal(before["head.weight"], model.head.weight)


def test_muon_batches_equal_one_matrix_at_a_time() -> None:
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(8, 12, generator=g) for _ in range(3)]
    together = [torch.nn.Parameter(v.clone()) for v in values]
    alone = [torch.nn.Parameter(v.clone()) for v in values]
    optimizers = [Muon(together, lr=0.1, weight_decay=0.01)]
    optimizers += [Muon([p], lr=0.1, weight_decay=0.01) for p in alone]
    for _ in range(3):
        for a, b in zip(together, alone, strict=True):
            a.grad = torch.randn(8, 12, generator=g)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, v in zip(together, alone, values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(a, v, atol=0.05)


def test_muon_refuses_a_vector() -> None:
    with pytest.raises(ValueError, match="1 dimensions"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


def test_schedules_start_at_one_never_rise_and_end_where_they_should() -> None:
    ends = {"cosine": 0.0, "linear": 0.0, "constant": 1.0, "wsd": 0.0}
    assert set(ends) == set(SCHEDULES)
    for name, schedule in SCHEDULES.items():
        values = [schedule(i / 100, 0.4) for i in range(101)]
        assert values[0] == 1.0 and math.isclose(values[-1], ends[name], abs_tol=1e-12)
        assert all(a >= b for a, b in pairwise(values))
    assert SCHEDULES["wsd"](0.6, 0.4) == 1.0 and math.isclose(SCHEDULES["wsd"](0.8, 0.4), 0.5)
    assert math.isclose(SCHEDULES["cosine"](0.5, 0.4), 0.5)


def test_warmup_rises_over_the_steps_asked_for() -> None:
    config = OptimizerConfig(schedule="constant", warmup_steps=4)
    factors = [learning_rate_factor(config, step, 0.0) for step in range(6)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    floor = OptimizerConfig(schedule="linear", warmup_steps=0, min_lr_factor=0.1)
    assert math.isclose(learning_rate_factor(floor, 9, 1.0), 0.1)
    assert math.isclose(learning_rate_factor(floor, 9, 1.7), 0.1)  # past its budget
