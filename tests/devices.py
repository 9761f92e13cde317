"""The devices that a test runs on, and how far their numbers may be from those of the CPU.

A test that takes `device` runs on the CPU in the ordinary suite, and on the GPU with `pytest -m gpu`. On both
it is compared with a plain form on the CPU in fp32: attention written out, all logits at once, one row at a
time. So its CPU half is a test too, and the GPU half differs from it by the device alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Tolerance(NamedTuple):
    """The largest difference, as a share of the largest expected number, and why there is one."""

    share: float
    reason: str


TOLERANCES = {
    "fp32": Tolerance(1e-5, "the same sums in another order: 84 roundings of 2**-23"),
    "fp32, far logits": Tolerance(1e-3, "a hidden state off by 1e-6 moves a logit of 1e3 by 1e-3"),
    "fp32, several steps": Tolerance(1e-4, "each update starts from weights that differ by the one before"),
    "bf16 loss": Tolerance(2e-3, "half a rounding of bf16, 2**-9, which a mean over many targets evens out"),
    "bf16": Tolerance(5e-2, "one rounding of 2**-9 for each product on the way, and no mean over them"),
    "fp16": Tolerance(5e-3, "one rounding of 2**-12 for each product on the way"),
}


def assert_near(actual: Tensor, expected: Tensor, tolerance: str, name: str = "") -> None:
    """Compare a tensor of any device with one on the CPU, by a row of TOLERANCES."""
    assert_all_near({name: actual}, {name: expected}, tolerance)


def assert_all_near(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: str) -> None:
    """Compare tensors by name, on the scale of the largest number of all.

    Some gradients, as that of the bias of keys, are 0 but for rounding, which only the others can measure.
    """
    assert actual.keys() == expected.keys()
    share, reason = TOLERANCES[tolerance]
    scale = max(tensor.abs().max().item() for tensor in expected.values())
    assert scale > 0, "a comparison of zeros"
    for name, wanted in expected.items():
        found = actual[name].detach().double().cpu()
        assert found.shape == wanted.shape and found.isfinite().all(), name
        difference = (found - wanted.double()).abs().max().item() / scale
        assert difference <= share, f"{name} differs by {difference:.2g}, more than {share} ({reason})"


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return the gradient of every parameter that trains; a missing one fails."""
    found = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def sampled(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers, the same for every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
