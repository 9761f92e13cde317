"""The forward pass against the reference: agreement, faults that are named, and no trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bare_subjects import bare_subject, decoder
from torch import Tensor

import architecture
from architecture import Attention, Decoder, LayerNorm
from config import OptimizerConfig
from guards.reference import forward
from guards.reference.comparison import Comparison, Differs
from modules import positions

SHAPES: list[dict[str, Any]] = [
    {},
    {"block": "parallel", "norm_weight": True, "norm_bias": True, "fused_qkv": True, "qkv_layout": "heads"},
    {"position": "learned", "mlp": "swiglu", "tie_embeddings": True, "head_bias": True, "mlp_bias": True},
    {"norm": "rms", "norm_weight": True, "n_kv_head": 2, "mlp": "relu2", "qk_norm": False},
    {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_context": 32, "qkv_bias": True},
    {"fused_qkv": True, "qkv_layout": "shards", "rotary_layout": "interleaved", "rotary_dim": 4},
    {"fused_qkv": True, "n_kv_head": 1, "position": "sinusoidal", "mlp": "gelu_tanh"},
    {"position": "none", "sliding_window": 7, "attention": "reference"},
    {"sliding_window": 7, "window_layers": (1,), "attention_bias": True, "dropout": 0.1},
    {"rope_scaling": "dynamic", "rope_factor": 2.0, "rope_context": 30},
    {"rope_scaling": "linear", "rope_factor": 4.0, "rope_theta": 500.0, "norm_eps": 1e-3},
    {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_context": 20, "rope_beta_fast": 2.0, "qkv_bias": True},
    {
        "rope_scaling": "longrope",
        "rope_context": 30,
        "rope_short": (1.0, 1.5, 2.0, 3.0),
        "rope_long": (2.0, 4.0, 5.0, 9.0),
    },
    {
        "norm": "rms_offset",
        "norm_weight": True,
        "mlp": "geglu_tanh",
        "embed_scale": 5.6,
        "tie_embeddings": True,
    },
    {
        "block": "parallel_norms",
        "norm_weight": True,
        "fused_qkv": True,
        "qkv_layout": "heads",
        "rotary_dim": 4,
    },
    {"n_head": 8, "fused_qkv": True, "qkv_layout": "shards8", "qk_norm": False, "mlp": "swiglu"},
    {"fused_gate": True, "mlp": "swiglu", "unrotated_layers": (1,), "n_kv_head": 1},
    {"embed_scale": 12.0, "residual_scale": 0.22, "attention_scale": 0.05, "logit_divisor": 6.0},
    {"n_experts": 5, "n_chosen": 2, "mlp": "swiglu"},
    {"n_experts": 3, "n_chosen": 2, "mlp": "geglu_tanh", "chosen_sum_to_one": True},
    {"n_layer": 1, "n_head": 1, "block_size": 4},
]


def compared(model: Decoder, **settings: Any) -> Comparison:
    comparison = Comparison()
    comparison.begin("forward")
    forward.compare(bare_subject(model, **settings), comparison)
    return comparison


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_part_of_a_decoder_agrees(shape: dict[str, Any], dtype: torch.dtype) -> None:
    losses = OptimizerConfig(label_smoothing=0.1, z_loss=1e-3)
    stages = [stage for stage, _ in compared(decoder(**shape), dtype=dtype, optimizer=losses).stages]
    assert any("in training, objective" in stage for stage in stages)


def in_place_of(owner: Any, name: str, wrong: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Return a fault: a function that is called instead, with the true one before its own arguments."""
    true = getattr(owner, name)

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(owner, name, lambda *args, **named: wrong(true, *args, **named))

    return plant


def attention_as(change: Callable[..., Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    true = architecture.ATTENTIONS["fast"]

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(architecture.ATTENTIONS, "fast", lambda *args: change(true, *args))

    return plant


def without_mask(
    attend: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, is_causal: Any, drop: Any
) -> Tensor:
    return attend(q, k, v, torch.ones(q.size(2), q.size(2), dtype=torch.bool), False, drop)


def with_eps(norm: Any, x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Tensor:
    return norm(x, shape, weight, bias, 1e-5)


def keys_for_queries(project: Any, self: Attention, x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = project(self, x)
    return k, q, v


FAULTS = {
    "scores divided twice": (
        attention_as(lambda attend, q, *rest: attend(q / math.sqrt(q.size(-1)), *rest)),
        "attention",
        "applied twice to the scores",
    ),
    "no mask": (attention_as(without_mask), "attention", "no mask at all"),
    "another epsilon": (in_place_of(F, "layer_norm", with_eps), "norm", "epsilon 1e-5"),
    "queries for keys": (
        in_place_of(Attention, "_project_separate", keys_for_queries),
        "queries normalised",
        "queries and keys swapped",
    ),
    "GELU by tanh": (
        in_place_of(F, "gelu", lambda gelu, x, approximate="none": gelu(x, approximate="tanh")),
        "MLP inner",
        "tanh approximation",
    ),
    "no positions": (
        in_place_of(positions, "rotary_frequency", lambda true, *args: 0 * true(*args)),
        "queries",
        "no rotation",
    ),
    "a norm left out": (
        in_place_of(LayerNorm, "forward", lambda true, self, x: x),
        "attention norm",
        "compare the code",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_where_it_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, stage, meaning = FAULTS[name]
    plant(monkeypatch)
    with pytest.raises(Differs) as found:
        compared(decoder())
    assert found.value.stage.endswith(stage)
    assert meaning in f"{found.value.what}; {found.value.remedy}"


def test_a_layer_that_is_run_twice_or_skipped_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder()
    run_block = model.run_block
    model.run_block = lambda block, x, context: (
        x if block is model.blocks[1] else run_block(block, x, context)
    )
    with pytest.raises(Differs, match="computed 0 times"):
        compared(model)
    model.run_block = lambda block, x, context: run_block(block, run_block(block, x, context), context)
    with pytest.raises(Differs, match="computed 2 times"):
        compared(model)


def test_a_loss_that_is_another_only_in_training_is_named() -> None:
    subject = bare_subject(decoder())
    true = subject.loss

    def doubled(batch: Any) -> Any:
        loss = true(batch)
        return loss._replace(objective=2 * loss.objective)

    subject.loss = doubled
    with pytest.raises(Differs, match="in training, objective: 2 times the reference"):
        forward.compare(subject, Comparison())


def test_it_leaves_no_trace() -> None:
    model = decoder(dropout=0.1, norm_weight=True).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compared(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.dropout.p == 0.1
