"""The weights that a run should begin with: their names and shapes, and how they are first sampled.

All of it follows from `ModelConfig` alone. How far a sample may be from its distribution is bounded so that
a healthy tensor is outside with a probability below exp(-28) = 7e-13 for each number that is compared: of a
model with 1,000 tensors, one run in 10^8.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from config import ModelConfig

UNLIKELY = 28.0  # -ln of the probability that a healthy sample is out of bounds.


class Start(NamedTuple):
    """The distribution that a tensor is first sampled from."""

    kind: str  # `normal`, `uniform`, or `constant`.
    size: float  # The standard deviation, the largest magnitude, or the value.


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter by name, matrices as (outputs, inputs).

    A tied head has no weight of its own.
    """
    width, inner, heads = config.n_embd, config.n_inner, config.n_head * config.head_dim
    kv_heads = config.n_kv_head * config.head_dim
    found: dict[str, tuple[int, ...]] = {"embed.weight": (config.vocab_size, width)}
    if config.position == "learned":
        found["position.weight"] = (config.block_size, width)

    def add(name: str, n_out: int, n_in: int, bias: bool) -> None:
        found[f"{name}.weight"] = (n_out, n_in)
        if bias:
            found[f"{name}.bias"] = (n_out,)

    def add_norm(name: str, size: int) -> None:
        for kind, is_there in (("weight", config.norm_weight), ("bias", config.norm_bias)):
            if is_there:
                found[f"{name}.{kind}"] = (size,)

    for layer in range(config.n_layer):
        block = f"blocks.{layer}"
        for name in ("norm",) if config.block == "parallel" else ("attention_norm", "mlp_norm"):
            add_norm(f"{block}.{name}", width)
        if config.fused_qkv:
            add(f"{block}.attention.qkv", heads + 2 * kv_heads, width, config.qkv_bias)
        else:
            for part, size in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                add(f"{block}.attention.{part}", size, width, config.qkv_bias)
        if config.qk_norm:
            add_norm(f"{block}.attention.q_norm", config.head_dim)
            add_norm(f"{block}.attention.k_norm", config.head_dim)
        add(f"{block}.attention.out", width, heads, config.attention_bias)
        for number in range(config.n_experts):
            for part, n_out, n_in in (("gate", inner, width), ("up", inner, width), ("down", width, inner)):
                add(f"{block}.mlp.experts.{number}.{part}", n_out, n_in, False)
        if config.n_experts:
            add(f"{block}.mlp.router", config.n_experts, width, False)
            continue
        gated = config.mlp in ("swiglu", "geglu_tanh")
        if gated and config.fused_gate:
            add(f"{block}.mlp.gate_up", 2 * inner, width, config.mlp_bias)
        else:
            for part in ("gate", "up") if gated else ("up",):
                add(f"{block}.mlp.{part}", inner, width, config.mlp_bias)
        add(f"{block}.mlp.down", width, inner, config.mlp_bias)
    add_norm("norm", width)
    add("head", config.vocab_size, width, config.head_bias)
    if config.tie_embeddings:
        del found["head.weight"]
    return found


def start_of(config: ModelConfig, name: str, shape: tuple[int, ...]) -> Start:
    """Return how a parameter is first sampled, by `ModelConfig.init`.

    `width_mult` is how many times as wide as `base_width` the model is (arXiv:2203.03466).
    """
    if name.endswith(".bias"):
        return Start("constant", 0.0)
    if len(shape) == 1:
        return Start("constant", 0.0 if config.norm == "rms_offset" else 1.0)
    starts = {"normal": _normal, "xavier": _xavier, "zero_output": _zero_output}
    return starts[config.init](config, name, shape)


def _is_table(name: str) -> bool:
    return name in ("embed.weight", "position.weight")


def _into_residual(name: str) -> bool:
    """Return whether a matrix gives what is added to the residual stream."""
    return name.endswith((".attention.out.weight", ".down.weight"))


def _normal(config: ModelConfig, name: str, shape: tuple[int, ...]) -> Start:
    if _is_table(name):
        return Start("normal", 0.02)
    if name == "head.weight":
        return Start("normal", 0.02 / config.width_mult)
    depth = math.sqrt(2 * config.n_layer) if _into_residual(name) else 1.0
    return Start("normal", 0.02 / depth / math.sqrt(config.width_mult))


def _xavier(config: ModelConfig, name: str, shape: tuple[int, ...]) -> Start:
    of_base = 1 / (2 * math.sqrt(config.base_width or config.n_embd))
    if _is_table(name):
        return Start("normal", of_base)
    if name == "head.weight":
        return Start("normal", of_base / config.width_mult)
    return Start("uniform", math.sqrt(6 / sum(shape)))


def _zero_output(config: ModelConfig, name: str, shape: tuple[int, ...]) -> Start:
    if _is_table(name):
        return Start("normal", min(0.02, 4 / config.n_embd) if config.tie_embeddings else 1.0)
    if name == "head.weight" or _into_residual(name):
        return Start("constant", 0.0)
    return Start("uniform", math.sqrt(3 / shape[1]))


# --- how far a sample may be from its distribution ------------------------------------------------------


def unlike(values: Tensor, start: Start) -> str | None:
    """Return how values differ from the distribution that they should be sampled from; None if they do not.

    Compared are the mean, the mean square (of the whole, of each row and of each column) and the largest
    magnitude.

    Args:
        values: (O, I) or (O).
    """
    if start.kind == "constant" or not values.numel():
        wrong = values != start.size
        return (
            f"{int(wrong.sum())} of {values.numel()} numbers are not {start.size:g}" if wrong.any() else None
        )
    values = values.double()
    deviation = start.size if start.kind == "normal" else start.size / math.sqrt(3)
    n = values.numel()
    mean, mean_bound = float(values.mean()), start.size * math.sqrt(2 * UNLIKELY / n)
    if not abs(mean) <= mean_bound:
        return f"its mean is {mean:.3g}, and chance explains {mean_bound:.3g}"
    found = math.sqrt(float(values.square().mean()))
    low, high = square_bounds(start, n, 1)
    if not low <= found / deviation <= high:
        return f"its standard deviation is {found:.4g}, and the initialisation's is {deviation:.4g}"
    for dim, lines in ((1, "row"), (0, "column")):
        shares = values.square().mean(dim=dim).sqrt() / deviation
        low, high = square_bounds(start, values.size(dim), len(shares))
        outside = (shares < low) | (shares > high)
        if outside.any():
            worst = int(torch.argmax((shares - 1).abs()))
            size = float(shares[worst])
            return f"{lines} {worst} has {size:.3g} times the standard deviation of the initialisation"
    largest = float(values.abs().max())
    least, most = largest_bounds(start, n)
    if not least <= largest <= most:
        return f"its largest number is {largest:.4g}, and a {start.kind} sample has {least:.4g} to {most:.4g}"
    return None


def square_bounds(start: Start, n: int, times: int) -> tuple[float, float]:
    """Return the least and the largest root mean square of n numbers, in standard deviations.

    That is for `times` samples. The squares of normal numbers are bounded by Laurent and Massart (2000,
    lemma 1), those of uniform ones by Hoeffding (1963), whose squares lie between 0 and 3 variances.
    """
    x = (UNLIKELY + math.log(times)) / n
    if start.kind == "normal":
        return math.sqrt(max(0.0, 1 - 2 * math.sqrt(x))), math.sqrt(1 + 2 * math.sqrt(x) + 2 * x)
    off = 3 * math.sqrt(x / 2)
    return math.sqrt(max(0.0, 1 - off)), math.sqrt(1 + off)


def largest_bounds(start: Start, n: int) -> tuple[float, float]:
    """Return the least and the most that the largest magnitude of n numbers may be.

    All n lie within t with probability P(|x| <= t)^n, and one is beyond t with probability at most
    n P(|x| > t).
    """
    share = min(1.0, UNLIKELY / n)
    if start.kind == "uniform":
        rounded = 1 + torch.finfo(torch.bfloat16).eps  # Stored in 16 bits, the bound may be rounded up.
        return start.size * (1 - share), start.size * rounded
    least = -float(torch.special.ndtri(torch.tensor(share / 2, dtype=torch.float64)))
    return start.size * least, start.size * math.sqrt(2 * (UNLIKELY + math.log(2 * n)))
