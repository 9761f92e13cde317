"""Optimizers, loss scaling and whole runs on each device, against their plain forms on the CPU in fp32."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import DEVICES, assert_all_near, assert_near, sampled
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from architecture import Decoder
from config import Config, DataConfig, ModelConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from modules.precision import has_native_bf16
from selftest.prove_resume import run_difference
from training import begin
from training.begin import train
from training.optim import POLAR_EXPRESS, Muon, build_optimizers, orthogonalise

TINY = ModelConfig(
    vocab_size=31, block_size=8, n_layer=2, n_head=2, n_embd=16, norm_weight=True, mlp_bias=True
)


def with_gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    """Give every parameter a gradient that is the same on every device."""
    for i, p in enumerate(model.parameters()):
        p.grad = scale * sampled(*p.shape, seed=1000 * seed + i).to(p.device)


@DEVICES
def test_fused_adamw_is_the_plain_one(device: str) -> None:
    model = Decoder(TINY)
    plain, there = copy.deepcopy(model), copy.deepcopy(model).to(device)
    settings = OptimizerConfig(name="adamw", weight_decay=0.1)
    (fused,) = build_optimizers(there, settings)
    (groups,) = build_optimizers(plain, settings)
    assert all(group["fused"] for group in fused.param_groups)
    written_out = torch.optim.AdamW(
        [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups.param_groups],
        betas=groups.param_groups[0]["betas"],
        eps=groups.param_groups[0]["eps"],
        foreach=False,
        fused=False,
    )
    for step in range(5):
        for module, optimizer in ((there, fused), (plain, written_out)):
            with_gradients(module, step)
            optimizer.step()
    moved = {name: p - q for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True)}
    found = {
        name: p.cpu() - q for (name, p), q in zip(there.named_parameters(), model.parameters(), strict=True)
    }
    assert_all_near(found, moved, "fp32, several steps")


@DEVICES
@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (96, 32)])
def test_the_update_of_muon_is_orthogonal_and_that_of_one_matrix_in_fp32(
    shape: tuple[int, int], device: str
) -> None:
    """The second update, which has a momentum to look ahead by. On a GPU its products are in bf16."""
    first, second = ([sampled(*shape, seed=seed + i) for i in range(3)] for seed in (10, 20))
    parameters = [nn.Parameter(sampled(*shape, seed=i).to(device)) for i in range(3)]
    optimizer = Muon(parameters, lr=0.1)
    before: list[torch.Tensor] = []
    for gradients in (first, second):
        before = [p.detach().clone() for p in parameters]
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient.to(device)
        optimizer.step()
    size = 0.1 * math.sqrt(max(1.0, shape[0] / shape[1]))
    for p, was, g1, g2 in zip(parameters, before, first, second, strict=True):
        momentum = 0.05 * (0.95 * g1 + g2)
        update = (was - p.detach()).cpu() / size
        values = torch.linalg.svdvals(update)
        assert values.min() > 0.7 and values.max() < 1.2
        expected = written_out_polar_express(0.05 * g2 + 0.95 * momentum)
        assert_near(update, expected, "fp32" if device == "cpu" else "bf16")


def written_out_polar_express(matrix: torch.Tensor) -> torch.Tensor:
    """The polynomials of POLAR_EXPRESS on the singular values themselves, in fp64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / (1.01 * s.norm())
    for a, b, c in POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    return u * s @ vh


def test_products_in_bf16_leave_the_update_orthogonal() -> None:
    """The arithmetic that a GPU is given, on the CPU."""
    matrices = torch.stack([sampled(64, 32, seed=i) for i in range(3)])
    update = orthogonalise(matrices.bfloat16()).float()
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.7 and values.max() < 1.2
    for found, matrix in zip(update, matrices, strict=True):
        assert_near(found, written_out_polar_express(matrix), "bf16")


@DEVICES
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_scaled_step_is_the_plain_one_and_an_overflow_is_skipped(name: Any, device: str) -> None:
    """The order of training: unscale, clip, step, update. A power of two changes no number of fp32."""
    model = Decoder(TINY).to(device)
    plain = copy.deepcopy(model)
    optimizers, plain_optimizers = (build_optimizers(m, OptimizerConfig(name=name)) for m in (model, plain))
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=10)
    scaler.scale(torch.zeros((), device=device))  # The scale is made when it is first used.
    for step in range(3):
        with_gradients(plain, step)
        with_gradients(model, step, scale=2.0**10)
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for optimizer in plain_optimizers:
            optimizer.step()
        step_scaled(scaler, optimizers, model)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
    with_gradients(model, 9)
    for p in model.parameters():  # Every optimizer looks at its own parameters only.
        assert p.grad is not None
        p.grad.view(-1)[0] = math.inf
    step_scaled(scaler, optimizers, model)
    assert scaler.get_scale() == 2.0**9
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def step_scaled(
    scaler: torch.amp.GradScaler, optimizers: list[torch.optim.Optimizer], model: nn.Module
) -> None:
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()


# --- whole runs --------------------------------------------------------------------------------------


@pytest.fixture
def config(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Five steps of a tiny model; AdamW, since Muon computes in bf16 on a GPU.

    Without the guards before a run, which are a check of their own on a GPU (benchmarks/gpu.py).
    """
    monkeypatch.setattr(begin, "preflight", lambda subject, allowed: [])
    return Config(
        data=DataConfig(
            source=str(corpus), validation_one_in=4, test_one_in=4, cache=str(tmp_path / "cache"), workers=1
        ),
        tokenizer=TokenizerConfig(vocab_size=300, min_count=2),
        model=ModelConfig(block_size=32, n_layer=2, n_head=2, n_embd=16),
        optimizer=OptimizerConfig(name="adamw", lr=0.02, warmup_steps=2, schedule="constant"),
        train=TrainConfig(
            run=str(tmp_path / "run"), max_steps=5, batch_size=4, validate_every=0, log_every=1,
            device="cpu", precision="fp32",
        ),
    )  # fmt: skip


def adapted(config: Config, run: str, **train: Any) -> Config:
    return replace(
        config, train=replace(config.train, run=str(Path(config.train.run).with_name(run)), **train)
    )


def losses(folder: Path) -> torch.Tensor:
    """The losses of a run, of training and then of validation."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [row[tag] for tag in ("train/loss", "eval/loss") for row in rows if tag in row]
    assert len(found) == 6
    return torch.tensor(found)


RUNS = [("cpu", "fp32"), ("cpu", "bf16")]  # A CPU is refused fp16.
GPU_RUNS = [pytest.param("cuda", precision, marks=pytest.mark.gpu) for precision in ("fp32", "bf16", "fp16")]


@pytest.mark.parametrize(("device", "precision"), [*RUNS, *GPU_RUNS])
def test_a_run_has_the_losses_of_attention_written_out(config: Config, precision: str, device: str) -> None:
    """Data, batches, updates, schedule, validation and checkpoint; fp16 with its loss scaling."""
    if (device, precision) == ("cuda", "bf16") and not has_native_bf16(torch.device(device)):
        pytest.skip("this GPU has no bf16")
    written_out = replace(config, model=replace(config.model, attention="reference"))
    expected = losses(train(adapted(written_out, "plain")).folder)
    there = train(adapted(config, "there", device=device, precision=precision))
    assert there.state.skipped_updates == 0, "the scale of the loss is too large for the gradients of fp16"
    found = losses(there.folder)
    assert_near(found, expected, "fp32, several steps" if precision == "fp32" else "bf16 loss")
    assert expected[4] < expected[0] - 0.05  # It learns, by more than the tolerance.


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that give the same bits each time, as far as there are some."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@DEVICES
@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.usefixtures("deterministic")
def test_resumed_equals_uninterrupted(config: Config, name: Any, device: str) -> None:
    """Bit for bit, in the device's own number format and with dropout."""
    config = replace(
        config,
        model=replace(config.model, dropout=0.1),
        optimizer=OptimizerConfig(name=name, warmup_steps=2, schedule="constant"),
        train=replace(config.train, device=device, precision="auto", validate_every=3),
    )
    whole = train(adapted(config, "whole"))
    train(adapted(config, "halves", max_steps=3))
    resumed = train(adapted(config, "halves", resume=True))
    assert resumed.state.step == 5
    assert run_difference(whole.folder, resumed.folder) is None
