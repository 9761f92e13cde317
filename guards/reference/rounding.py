"""Bounds on what rounding changes in a model's results: derived ones, and sampled ones where terms cancel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from architecture import Decoder
from config import ModelConfig
from guards.reference.comparison import relative_difference
from reference.forward import Rows, Weights, logits_of

SAMPLES_OF_ROUNDING = 4
MORE_THAN_SAMPLED = 8  # How many times the largest of the samples another may be.
MOST_ROUNDING = 0.5  # What rounding may change by more is not compared.
STEP32 = torch.finfo(torch.float32).eps  # Of the sums, whatever the format of the products.


class Rounding(TorchFunctionMode):
    """Change what every operation gives by random shares of a rounding error, and so its gradient too."""

    def __init__(self, error: float):
        super().__init__()
        self.error = error

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.error or not isinstance(out, Tensor) or out.dtype != torch.float64:
            return out
        return out * (1 + self.error * (2 * torch.rand_like(out) - 1))


def step_of(model: Decoder) -> float:
    """Return the relative error of one product of a model in evaluation.

    It rounds once in the model's number format, and its sum of n numbers in fp32 by a quarter of sqrt(n)
    steps.
    """
    config = model.config
    n = max(config.n_embd, config.n_inner, config.n_head * config.head_dim)
    return max(torch.finfo(p.dtype).eps for p in model.parameters()) + STEP32 * math.sqrt(n) / 4


def of_logits(
    config: ModelConfig,
    step: float,
    weights: Weights | None = None,
    rows: Rows | None = None,
    expected: Tensor | None = None,
) -> float:
    """Return by how much logits may differ, relative to the largest.

    A block has about twelve products, whose errors add as squares. With weights, rows and their logits it is
    at least what samples of rounding do to the reference itself.
    """
    derived = 2 * step * math.sqrt(12 * config.n_layer + 12)
    if weights is None or rows is None or expected is None:
        return derived
    noise = []
    for _ in range(SAMPLES_OF_ROUNDING):
        with Rounding(step / 2):
            sample = logits_of(config, weights, rows)
        noise.append(relative_difference(sample, expected))
    return max(derived, MORE_THAN_SAMPLED * max(noise))


def of_log_sum(largest: float, n: int) -> float:
    """Return by how much fp32 rounds the logarithm of a softmax's sum over n logits up to `largest`.

    In half steps: each distance from the greatest logit rounds by its size, an exponential by two, a sum in
    pairs by one for each halving, and the result, greatest logit and logarithm, by its own size.
    """
    return STEP32 / 2 * (2 * largest + 2 + math.log2(n) + largest + math.log(n))
