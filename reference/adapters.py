"""What an adapter makes of a weight: LoRA and what was built on it, as PEFT defines them.

Shapes: a weight W is (O, I), outputs by inputs; B is (O, r) and A (r, I). An embedding's table (V, C) has
this form when it is transposed: I = V, and O = C.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from config import LoraConfig

T = TypeVar("T")


def named(published: str, key: str) -> bool:
    """Return whether a key of the settings means a module: by its name's end, or by a pattern with `*`."""
    if "*" not in key:
        return f".{published}".endswith(f".{key}")
    first, *parts = key.split("*")
    if not published.startswith(first):
        return False
    rest = published[len(first) :]
    for part in parts[:-1]:
        _, found, rest = rest.partition(part) if part else ("", "*", rest)
        if not found:
            return False
    return rest.endswith(parts[-1])


def of_pattern(patterns: Mapping[str, T], published: str, default: T) -> T:
    """Return the value of the first key that means a module, or the default."""
    return next((value for key, value in patterns.items() if named(published, key)), default)


def rank(lora: LoraConfig, published: str) -> int:
    """Return the rank r of a module by its published name."""
    return of_pattern(lora.rank_pattern, published, lora.r)


def scale(lora: LoraConfig, published: str) -> float:
    """Return s = alpha / r (arXiv:2106.09685), or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)."""
    r, alpha = rank(lora, published), of_pattern(lora.alpha_pattern, published, lora.alpha)
    return alpha / (math.sqrt(r) if lora.rslora else r)


def is_target(lora: LoraConfig, name: str, published: str) -> bool:
    """Return whether `lora.targets` mean a linear or embedding, by its name here and its published one.

    Neither experts are meant, nor what chooses them.
    """
    if ".experts." in name or name.endswith(".router"):
        return False
    roles = {
        "attention": ".attention." in name,
        "mlp": ".mlp." in name,
        "embedding": name == "embed",
        "all-linear": name.startswith("blocks."),
    }
    return any(roles[key] if key in roles else named(published, key) for key in lora.targets)


def effective(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    s: float,
    start: tuple[Tensor, Tensor] | None = None,
    magnitude: Tensor | None = None,
) -> Tensor:
    """Return the weight (O, I) that a target multiplies by: W + s B A.

    Args:
        start: A and B of a PiSSA start (arXiv:2404.02948), whose product the base is less by: W + s (B A -
            B0 A0), which is W at first.
        magnitude: (O), with DoRA (arXiv:2402.09353) the length that each output's weights are brought to.
            The length that they have is a constant to the gradient.
    """
    total = weight + s * (b @ a)
    if start is not None:
        total = total - s * (start[1] @ start[0])
    if magnitude is None:
        return total
    length = total.detach().square().sum(dim=1, keepdim=True).sqrt()
    return magnitude[:, None] * total / length


def with_rows(weight: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """Return a table (V, C) whose rows of these ids are others: those of new tokens."""
    return torch.index_copy(weight, 0, ids, rows.to(weight.dtype))
