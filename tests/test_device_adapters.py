"""Adapters, dropout and quantised weights on each device, against dense products on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICES, DTYPES, assert_all_near, assert_near, gradients, sampled
from torch import Tensor, nn

from adapters.products import DropMask, linear_with_term
from architecture import Decoder
from config import LoraConfig, ModelConfig
from lora import add_adapter, wrappers
from modules.dropout import Dropout
from modules.quantized_linear import KINDS
from pretrained.merging import merge

TOKENS = torch.randint(53, (3, 16), generator=torch.Generator().manual_seed(1))
SHAPE = ModelConfig(
    vocab_size=53, block_size=16, n_layer=2, n_head=2, n_embd=32, fused_qkv=True, mlp_bias=True
)


def scramble(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15, generator=generator)


def adapted(**settings: Any) -> Decoder:
    """A model whose linears all have an adapter that changes much."""
    model = Decoder(SHAPE)
    scramble(model, 0)
    add_adapter(model, LoraConfig(r=4, targets=("all-linear",), **settings))
    scramble(model, 3)
    return model


def dense(model: Decoder) -> Decoder:
    """A plain model with the weights W + scale * B A."""
    state = {k.replace(".base.", "."): v for k, v in model.state_dict().items() if ".adapters." not in k}
    for name, wrapper in wrappers(model).items():
        layer: Any = wrapper.adapters["default"]
        state[f"{name}.weight"] = state[f"{name}.weight"] + layer.scale * layer.b @ layer.a
    plain = Decoder(SHAPE)
    plain.load_state_dict(state)
    return plain


def weighed(logits: Tensor) -> Tensor:
    """A loss to which every logit adds something else."""
    return (logits.float() * sampled(*logits.shape, seed=9).to(logits.device)).sum()


@DEVICES
def test_an_adapter_is_its_product_added_to_the_weights(device: str) -> None:
    """The gradients of the factors are those of the dense weight, handed on by hand: B^T dW and dW A^T."""
    model = adapted()
    plain = dense(model)
    expected = plain(TOKENS)
    weighed(expected).backward()
    wanted = {}
    for name, wrapper in wrappers(model).items():
        layer: Any = wrapper.adapters["default"]
        gradient = plain.get_parameter(f"{name}.weight").grad
        assert gradient is not None
        wanted[f"{name}.adapters.default.a"] = layer.scale * layer.b.detach().t() @ gradient
        wanted[f"{name}.adapters.default.b"] = layer.scale * gradient @ layer.a.detach().t()
    for precision in ("fp32", "bf16"):
        there = copy.deepcopy(model).to(device)
        with torch.autocast(device, DTYPES[precision], enabled=precision != "fp32"):
            logits = there(TOKENS.to(device))
        weighed(logits).backward()
        assert_near(logits, expected, precision, "logits")
        assert_all_near(gradients(there), wanted, precision)


@DEVICES
@pytest.mark.parametrize("dora", [False, True])
def test_merged_on_the_device_is_adapted_on_the_cpu(dora: bool, device: str) -> None:
    model = adapted(dora=dora)
    expected = model(TOKENS)
    there = copy.deepcopy(model).to(device)
    assert_near(there(TOKENS.to(device)), expected, "fp32", "adapted")
    merge(there)
    assert_near(there(TOKENS.to(device)), expected, "fp32", "merged")


@DEVICES
def test_backward_makes_the_mask_of_forward_again(device: str) -> None:
    x, weight, a, b = sampled(70, 32), sampled(48, 32, seed=1), sampled(4, 32, seed=2), sampled(48, 4, seed=3)
    leaves = [t.clone().to(device).requires_grad_() for t in (x, a, b)]
    drop = DropMask(0.4, 11)
    out = linear_with_term(leaves[0], weight.to(device), None, leaves[1], leaves[2], 0.5, drop)
    weighed(out).backward()
    mask = torch.cat([part for _, part in drop.masks(x.to(device))]).cpu()
    assert 0.5 < mask.mean() < 0.7 and set(mask.unique().tolist()) == {0, 1}
    plain = [t.clone().requires_grad_() for t in (x, a, b)]
    expected = (
        F.linear(plain[0], weight) + 0.5 * (plain[0] * mask * drop.factor) @ plain[1].t() @ plain[2].t()
    )
    weighed(expected).backward()
    assert_near(out, expected, "fp32")
    for name, mine, wanted in zip("xab", leaves, plain, strict=True):
        assert mine.grad is not None and wanted.grad is not None
        assert_near(mine.grad, wanted.grad, "fp32", name)


@DEVICES
def test_a_share_is_dropped_and_the_rest_scaled(device: str) -> None:
    """Both of an adapter, whose mask is its seed's, and of a module, whose backward has the same mask."""
    x = torch.ones(1000, 700, device=device)
    masks = [torch.cat([part for _, part in DropMask(0.1, seed).masks(x)]) for seed in (7, 7, 8)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert abs(masks[0].mean().item() - 0.9) < 0.002
    module, given = Dropout(0.1), x.requires_grad_()
    y = module(given)
    y.sum().backward()
    assert given.grad is not None
    torch.testing.assert_close(given.grad, y.detach(), rtol=1e-6, atol=0)  # A GPU rounds 1 / 0.9 twice.
    values = y.detach().unique().cpu()
    assert abs(y.detach().mean().item() - 1) < 0.002
    torch.testing.assert_close(values, torch.tensor([0, 1 / 0.9]), rtol=1e-4, atol=0)


@DEVICES
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_quantised_linear_is_its_decoded_weight(kind: str, device: str) -> None:
    """Stored on the CPU and moved; 700 rows of 320 weights take several chunks of a decoder."""
    linear = nn.Linear(320, 700)
    scramble(linear, 0)
    stored = KINDS[kind].from_linear(linear)
    weight = stored.weight.float()
    assert (weight - linear.weight).norm() < 0.15 * linear.weight.norm()
    module, x = copy.deepcopy(stored).to(device), sampled(5, 320)
    assert torch.equal(module.weight.cpu(), stored.weight)
    given, plain = x.clone().to(device).requires_grad_(), x.clone().requires_grad_()
    expected = F.linear(plain, weight, linear.bias.detach())
    weighed(expected).backward()
    for precision in ("fp32", "bf16"):
        given.grad = None
        with torch.autocast(device, DTYPES[precision], enabled=precision != "fp32"):
            y = module(given)
        weighed(y).backward()
        assert given.grad is not None and plain.grad is not None
        assert_near(y, expected, precision, "output")
        assert_near(given.grad, plain.grad, precision, "gradient")
