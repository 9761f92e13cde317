"""Optimizers, parameter groups and schedules."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from architecture import Decoder
from config import REPOSITORY, Config, ModelConfig, OptimizerConfig, possible_kinds, unread_rates
from training.optim import (
    SCHEDULES,
    Muon,
    build_optimizers,
    groups_table,
    learning_rate_factor,
    orthogonalise,
    parameter_groups,
)

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


BESIDE_MUON: dict[str, Any] = {
    "lr": 0.01,
    "embedding_lr": 0.3,
    "head_lr": 0.01,
    "beta1": 0.8,
    "beta2": 0.95,
    "eps": 1e-10,
}


def test_what_is_not_given_follows_the_optimizer() -> None:
    muon = OptimizerConfig().resolved()
    assert {key: getattr(muon, key) for key in BESIDE_MUON} == BESIDE_MUON and muon.muon_lr == 0.02
    adamw = OptimizerConfig(name="adamw", lr=3e-4).resolved()
    own = inspect.signature(torch.optim.AdamW).parameters
    assert (adamw.beta1, adamw.beta2) == own["betas"].default and adamw.eps == own["eps"].default
    assert OptimizerConfig(name="adamw").resolved().lr == own["lr"].default
    (optimizer,) = build_optimizers(Decoder(TINY), OptimizerConfig(name="adamw", lr=3e-4))
    assert {group["initial_lr"] for group in optimizer.param_groups} == {3e-4}
    given = OptimizerConfig(name="adamw", **BESIDE_MUON)
    assert given.resolved() == given
    partly = OptimizerConfig(beta1=0.7, head_lr=0.0).resolved()
    assert (partly.beta1, partly.head_lr, partly.embedding_lr) == (0.7, 0.0, 0.3)


def test_the_default_moves_as_if_every_value_were_given() -> None:
    """Runs whose config.yaml names them all, and runs that name none, are one run."""
    states = []
    for config in (OptimizerConfig(), OptimizerConfig(**BESIDE_MUON)):
        torch.manual_seed(0)
        model = Decoder(TINY)
        optimizers = build_optimizers(model, config)
        model(torch.randint(31, (2, 8))).logsumexp(-1).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        settings = [{k: v for k, v in g.items() if k != "params"} for o in optimizers for g in o.param_groups]
        states.append((settings, [p.detach() for p in model.parameters()]))
    assert states[0][0] == states[1][0]
    assert all(torch.equal(a, b) for a, b in zip(states[0][1], states[1][1], strict=True))


PLAIN = replace(TINY, norm_weight=False, norm_bias=False, qkv_bias=False, mlp_bias=False)


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"tie_embeddings": True},
        {"position": "rotary"},
        *({part: True} for part in ("norm_weight", "norm_bias", "qkv_bias", "mlp_bias")),
        *({part: True} for part in ("attention_bias", "head_bias")),
    ],
)
def test_the_settings_foretell_the_groups_and_a_rate_without_one_is_named(name: Any, parts: Any) -> None:
    """The groups foretold before torch is imported are those of the model's own parameters."""
    shape = replace(PLAIN, **parts)
    config = Config(model=shape, optimizer=OptimizerConfig(name=name))
    groups = parameter_groups(Decoder(shape), config.optimizer)
    kinds = {group.kind for group in groups}
    assert kinds == possible_kinds(config)
    read = {group.key for group in groups}
    assert {f"optimizer.{key}" for key in read} == {*config.optimizer.rates_read(kinds)}
    # With adamw these rates are lr's.
    separate = {"embedding_lr", "head_lr"} if "head" in kinds else {"embedding_lr"}
    for key in ("lr", "muon_lr", "embedding_lr", "head_lr"):
        rate: dict[str, Any] = {key: 0.123}
        found = dict(unread_rates(OptimizerConfig(name=name, **rate), kinds))
        assert (f"optimizer.{key}" in found) == (key not in read | separate)
        assert all(all(f"optimizer.{one}" in reason for one in read) for reason in found.values())


def test_a_saved_rate_that_nothing_reads_is_no_mistake_and_a_named_one_is() -> None:
    """A run's config.yaml has every key; before rates followed the optimizer it had Muon's for all."""
    old = OptimizerConfig(name="adamw", **BESIDE_MUON)
    assert not list(unread_rates(old, {"embeddings", "matrices"}))
    assert not list(unread_rates(old.resolved(), {"adapters"}))
    given = ["optimizer.head_lr", "optimizer.muon_lr"]
    assert [key for key, _ in unread_rates(old, {"adapters"}, given)] == [
        "optimizer.muon_lr",
        "optimizer.head_lr",
    ]
    assert not list(unread_rates(OptimizerConfig(), {"adapters"}, given[:1]))
    (found,) = unread_rates(replace(old, head_lr=0.02), set())
    assert found == ("optimizer.head_lr", "no parameter of this run learns at it; what acts is none")


def test_each_group_is_shown_with_its_rate_setting_and_size() -> None:
    model = Decoder(TINY)
    config = OptimizerConfig(weight_decay=0.1, lr=0.002)
    groups = parameter_groups(model, config, width_mult=4.0)
    lines = groups_table(groups, config).splitlines()
    vectors = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    assert [" ".join(line.split()) for line in lines[:-1]] == [
        "AdamW 624 parameters, embeddings learning rate 0.3 optimizer.embedding_lr",
        "AdamW 496 parameters, head learning rate 0.0025 optimizer.head_lr",
        f"AdamW {vectors:,} parameters, vectors learning rate 0.002 optimizer.lr",
        "Muon 6,144 parameters, matrices learning rate 0.02 optimizer.muon_lr",
    ]
    assert lines[-1] == "AdamW with beta1 0.8, beta2 0.95, eps 1e-10, weight decay 0.1"


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


def test_a_step_does_without_the_compiler() -> None:
    """Its import by torch's decorators took more than a second of every run."""
    code = (
        "import sys, torch; from training.optim import AdamW\n"
        "p = torch.nn.Parameter(torch.ones(2)); optimizer = AdamW([p], lr=0.1, fused=True)\n"
        "p.grad = torch.ones(2); optimizer.step(); optimizer.zero_grad()\n"
        "optimizer.load_state_dict(optimizer.state_dict())\n"
        "sys.exit('torch._dynamo' in sys.modules or not (p < 1).all())"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
