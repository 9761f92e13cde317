"""Dropout against the reference: agreement, faults that are named, and no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bare_subjects import bare_subject, decoder

import adapters.products as products
import lora
import modules.blocked_attention as blocked
import modules.dropout as dropouts
from config import LoraConfig
from guards.reference import dropout
from guards.reference.comparison import Comparison, Differs
from modules.quantized_linear import quantize_linears
from reference.dropout import mask, most_off, share

ADAPTERS: list[dict[str, Any]] = [{}, {"dora": True}, {"init": "pissa"}, {"bias": "lora_only"}]


def compared(model: Any, **settings: Any) -> Comparison:
    comparison = Comparison()
    comparison.begin("dropout")
    dropout.compare(bare_subject(model, **settings), comparison)
    return comparison


def adapted(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, LoraConfig]:
    model = decoder(qkv_bias=True).to(dtype)
    config = LoraConfig(r=4, targets=("attention", "mlp"), dropout=0.2, **settings)
    lora.add_adapter(model, config)
    return model, config


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("attention", ["fast", "reference"])
def test_dropout_of_the_model_agrees(attention: str, p: float) -> None:
    before = torch.random.get_rng_state()
    model = decoder(dropout=p, attention=attention, n_kv_head=2)
    modes = [module.training for module in model.modules()]
    with torch.random.fork_rng():
        stages = [stage for stage, _ in compared(model).stages]
    assert any("its mask" in stage for stage in stages)
    assert any("attention" in stage for stage in stages)
    assert modes == [module.training for module in model.modules()]
    torch.random.set_rng_state(before)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_number_that_is_drawn_for_nothing_is_named(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawing(self: dropouts.Dropout, x: torch.Tensor) -> torch.Tensor:
        torch.rand(1)
        return right(self, x)

    right = dropouts.Dropout.forward
    compared(decoder(dropout=p))
    monkeypatch.setattr(dropouts.Dropout, "forward", drawing)
    with pytest.raises(Differs, match="in evaluation, nothing happens"):
        compared(decoder(dropout=p))


@pytest.mark.parametrize("settings", ADAPTERS, ids=str)
def test_dropout_of_adapters_agrees_and_leaves_no_trace(settings: dict[str, Any]) -> None:
    model, config = adapted(**settings)
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert any("gradient of a" in stage for stage, _ in compared(model, lora=config).stages)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_dropout_beside_stored_weights_agrees() -> None:
    model, config = adapted(torch.bfloat16)
    compared(model, lora=config, dtype=torch.bfloat16)
    model = decoder()
    quantize_linears(
        model, "nf4", [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "." in n]
    )
    lora.add_adapter(model, config)
    compared(model, lora=config)


def test_without_dropout_it_is_seen_that_nothing_happens() -> None:
    stages = [stage for stage, _ in compared(decoder()).stages]
    assert stages and all(stage.endswith("nothing happens") for stage in stages)


def test_a_mask_has_its_share_of_zeros_in_every_column_and_row() -> None:
    for p in (0.001, 0.1, 0.37, 0.9):
        kept = mask(3, 1, (500, 200), p)
        assert abs((~kept).sum() - kept.size * share(p)) < most_off(kept.size, p, 200)
    assert not np.array_equal(mask(3, 1, (50, 20), 0.5), mask(3, 2, (50, 20), 0.5))
    assert np.array_equal(
        dropouts.kept(5, 2, torch.Size((60, 30)), dropouts.steps(0.3), torch.float32).bool().numpy(),
        mask(5, 2, (60, 30), 0.3),
    )


def without_scale(seed: int, shape: Any, dropped: int, dtype: Any) -> torch.Tensor:
    return dropouts.kept(seed, 0, shape, dropped, dtype)


def same_seed(seed: int, part: int, shape: Any, dropped: int, dtype: Any, true: Any = dropouts.kept) -> Any:
    return true(0, part, shape, dropped, dtype)


def by_rows(seed: int, part: int, shape: Any, dropped: int, dtype: Any, true: Any = dropouts.kept) -> Any:
    return true(seed, part, torch.Size((1, *shape[1:])), dropped, dtype).expand(shape).clone()


def twice_as_many(
    seed: int, part: int, shape: Any, dropped: int, dtype: Any, true: Any = dropouts.kept
) -> Any:
    return true(seed, part, shape, 2 * dropped, dtype)


def of_another_seed(seed: int, *args: Any, true: Any = dropouts.kept) -> Any:
    return true(seed + 1, *args)


FAULTS: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "kept numbers do not grow": (dropouts, "dropout_factor", without_scale, "dropout of"),
    "every mask is the same": (dropouts, "kept", same_seed, "dropout of"),
    "attention: every mask is the same": (blocked, "kept", same_seed, "attention dropout, difference of two"),
    "attention: too many are dropped": (blocked, "kept", twice_as_many, "attention dropout, "),
    "attention: one mask for all rows": (
        blocked,
        "kept",
        by_rows,
        "attention dropout, difference of (neighbouring )?(rows|columns|two draws)",
    ),
    "adapter: every mask is the same": (products, "kept", same_seed, "dropout of the adapter"),
    "adapter: the mask of another seed": (
        products,
        "kept",
        of_another_seed,
        "dropout of the adapter .*its mask",
    ),
    "adapter: one mask for all rows": (products, "kept", by_rows, "dropout of the adapter"),
    "adapter: kept numbers do not grow": (
        products.DropMask,
        "factor",
        property(lambda drop: 1.0),  # type: ignore[dict-item]
        "its factors|output",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_dropout_is_named(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong, stage = FAULTS[fault]
    monkeypatch.setattr(owner, name, wrong)
    model, config = adapted() if "adapter" in fault else (decoder(dropout=0.1), LoraConfig())
    with pytest.raises(Differs, match=stage):
        compared(model, lora=config)


def test_another_probability_is_named() -> None:
    model = decoder(dropout=0.1)
    model.blocks[0].dropout.p = 0.11  # type: ignore[union-attr]
    with pytest.raises(Differs, match="dropout of block 0, its probability"):
        compared(model)


def test_factors_of_another_scale_are_named() -> None:
    """Where masks are not derived, as on a GPU, the factors alone show their scale."""
    drawn = [torch.from_numpy(mask(3, part, (128, 256), 0.5)).double() for part in (0, 1)]
    dropout.compare_masks(Comparison(), "healthy", [2 * factor for factor in drawn], 0.5)
    with pytest.raises(Differs, match="its factors"):
        dropout.compare_masks(Comparison(), "without scale", drawn, 0.5)


def test_a_gradient_without_the_mask_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropouts._DropoutByBits, "backward", lambda ctx, *grads: (grads[0], None, None))
    with pytest.raises(Differs, match=r"dropout of .*, its gradient"):
        compared(decoder(dropout=0.1))


def test_a_backward_pass_with_another_mask_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def other_each_time(seed: int, *args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return true(seed + calls, *args)

    true = dropouts.kept
    monkeypatch.setattr(blocked, "kept", other_each_time)
    with pytest.raises(Differs, match="attention dropout, gradient of"):
        compared(decoder(attention_dropout=0.1))
    monkeypatch.setattr(products, "kept", other_each_time)
    model, config = adapted()
    with pytest.raises(Differs, match="adapter of"):
        compared(model, lora=config)
