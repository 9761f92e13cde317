"""Activations of the MLPs, each with the gradient that is cheapest to keep and to compute."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GELU_ELEMENTS = 2**18  # elements of a part: 2 MB of buffers in fp32, which stay in the cache
FEW_ELEMENTS = 2**13


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return (grads[0] * y).mul_(2)


class ReluSquared(nn.Module):
    """relu(x)^2 (So et al. 2021, arXiv:2109.08668).

    Its gradient is written out: on a CPU relu(x).square() takes 7 times as long, x * relu(x) 1.6 times.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _ReluSquared.apply(x)


def _gelu_tanh(x: Tensor) -> Tensor:
    """Compute x * sigmoid(1.6 x + 0.07 x^3) of bf16 on a CPU, in fp32: half the time of torch's tanh."""
    inner, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
    flat, y = x.reshape(-1), torch.empty(x.numel(), dtype=x.dtype)
    buffers = torch.empty(2, min(GELU_ELEMENTS, x.numel()), dtype=torch.float32)
    constant = torch.tensor(inner, dtype=torch.float32)
    for start in range(0, x.numel(), GELU_ELEMENTS):
        part = flat[start : start + GELU_ELEMENTS]
        exact, gate = buffers[:, : part.numel()]
        exact.copy_(part)
        torch.addcmul(constant, exact, exact, value=inner * cubic, out=gate)
        y[start : start + GELU_ELEMENTS] = gate.mul_(exact).sigmoid_().mul_(exact)
    return y.view(x.shape)


class _GeluTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _gelu_tanh(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grads[0], x, approximate="tanh")


class GeluTanh(nn.Module):
    """The tanh approximation of GELU that GPT-2, StarCoder and CodeGen were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.gelu(x, approximate="tanh")
        if torch.is_grad_enabled():
            return _GeluTanh.apply(x)
        # A step of decoding has few elements, for which so many calls take longer than torch's tanh.
        return _gelu_tanh(x) if x.numel() > FEW_ELEMENTS else F.gelu(x, approximate="tanh")


class GeGLUTanh(nn.Module):
    """gelu(gate) * x with the tanh approximation (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self):
        super().__init__()
        self.gelu = GeluTanh()

    def forward(self, gate: Tensor, x: Tensor) -> Tensor:
        return self.gelu(gate) * x


class SwiGLU(nn.Module):
    """silu(gate) * x (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self):
        super().__init__()
        self.silu = nn.SiLU()

    def forward(self, gate: Tensor, x: Tensor) -> Tensor:
        return self.silu(gate) * x
