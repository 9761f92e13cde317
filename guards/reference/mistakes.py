"""Known mistakes of a decoder, as what the run would then have computed: each names a difference.

A mistake is made in the inputs of the reference, a setting, a weight or a mask that is another, so that its
result comes from the same textbook. The first that explains what was found is the likely cause.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from config import ModelConfig
from reference.forward import Rows, Weights, block, embedding, norm
from reference.positions import visible, window_of

Explanations = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Inputs:
    """What one block is computed from."""

    config: ModelConfig
    weights: Weights
    layer: int
    x: Tensor  # (B, T, C)
    rows: Rows


class Renamed(Mapping[str, Tensor]):
    """Weights under other names: looked up by what `rename` makes of a name, and changed by `change`."""

    def __init__(
        self,
        weights: Weights,
        rename: Callable[[str], str] = lambda name: name,
        change: Callable[[str, Tensor], Tensor] = lambda name, weight: weight,
    ):
        self.weights, self.rename, self.change = weights, rename, change

    def __getitem__(self, name: str) -> Tensor:
        return self.change(name, self.weights[self.rename(name)])

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def other_settings(config: ModelConfig) -> dict[str, ModelConfig]:
    """Return, by what it means, settings of which one is not that of the run."""
    swapped = {"half": "interleaved", "interleaved": "half"}
    of_experts: dict[str, dict] = {}
    if config.n_experts:
        divided = config.chosen_sum_to_one
        meaning = "not divided by their sum" if divided else "divided by their sum"
        of_experts[f"the shares of the chosen experts {meaning}"] = {"chosen_sum_to_one": not divided}
    if config.n_chosen > 1:
        of_experts["one expert fewer chosen"] = {"n_chosen": config.n_chosen - 1}
    changes: dict[str, dict] = {
        **of_experts,
        "the norm's epsilon left out": {"norm_eps": 0.0},
        "the norm's epsilon 1e-5": {"norm_eps": 1e-5},
        "the norm's epsilon 1e-6": {"norm_eps": 1e-6},
        **({"RMSNorm for LayerNorm": {"norm": "rms"}} if config.norm == "layer" else {}),
        "LayerNorm for RMSNorm": {"norm": "layer"},
        "the norm's learned scale not applied": {"norm_weight": False},
        "the norm's learned scale without the 1 that is added to it": {"norm": "rms"},
        "the norm's learned shift not applied": {"norm_bias": False},
        "the bias of queries, keys and values not added": {"qkv_bias": False},
        "the bias of attention's output not added": {"attention_bias": False},
        "the bias of the MLP not added": {"mlp_bias": False},
        "queries and keys not normalised": {"qk_norm": False},
        "no rotation by position": {"position": "none"},
        "the rotation's layouts, half and interleaved, swapped": {
            "rotary_layout": swapped[config.rotary_layout]
        },
        "all dimensions of a head rotated instead of rotary_dim": {"rotary_dim": config.head_dim},
        "rope_theta left at 10,000": {"rope_theta": 10_000.0},
        "positions rotated in all layers": {"unrotated_layers": ()},
        "the factor of rotated queries and keys not applied": {"rope_attention": 1.0},
        "attention_scale not applied": {"attention_scale": 0.0},
        "residual_scale not applied": {"residual_scale": 1.0},
        "rope_scaling not applied": {"rope_scaling": "none"},
        "the sliding window ignored": {"sliding_window": 0},
        "the sliding window one token too wide": {"sliding_window": config.sliding_window + 1},
        "the sliding window one token too narrow": {"sliding_window": max(1, config.sliding_window - 1)},
        "the sliding window in all layers": {"window_layers": ()},
        "GELU for its tanh approximation": {"mlp": "gelu"},
        "the tanh approximation for GELU": {"mlp": "gelu_tanh"},
        "the fused projection read as blocks": {"qkv_layout": "blocks"},
        "the fused projection read by heads": {"qkv_layout": "heads"},
    }
    return {
        meaning: replace(config, **change)
        for meaning, change in changes.items()
        if any(getattr(config, key) != value for key, value in change.items())
    }


def other_rows(rows: Rows) -> dict[str, Rows]:
    """Return, by what it means, rows whose documents or positions are others."""
    counted = torch.arange(rows.tokens.size(1), device=rows.tokens.device).expand_as(rows.tokens)
    return {
        "documents of a row see each other": rows._replace(documents=torch.zeros_like(rows.documents)),
        "positions not counted anew in each document": rows._replace(positions=counted),
        "positions counted from 1": rows._replace(positions=rows.positions + 1),
    }


def other_weights(inputs: Inputs) -> dict[str, Weights]:
    """Return, by what it means, weights that are taken for others."""
    weights, name = inputs.weights, f"blocks.{inputs.layer}."
    swaps = {
        "queries and keys swapped": (".q", ".k"),
        "keys and values swapped": (".k.", ".v."),
        "gate and up projection of the MLP swapped": (".gate.", ".up."),
        "the norms of attention and MLP swapped": (".attention_norm.", ".mlp_norm."),
    }
    found: dict[str, Weights] = {
        meaning: Renamed(weights, partial(_swap, pair)) for meaning, pair in swaps.items()
    }
    for layer in (inputs.layer - 1, inputs.layer + 1):
        if 0 <= layer < inputs.config.n_layer:
            meaning = f"the weights of block {layer} in its place"
            found[meaning] = Renamed(weights, partial(_of_layer, name, f"blocks.{layer}."))
    found["a weight transposed"] = Renamed(weights, change=_transposed)
    return found


def _swap(pair: tuple[str, str], name: str) -> str:
    first, second = pair
    if first in name:
        return name.replace(first, second)
    return name.replace(second, first)


def _of_layer(old: str, new: str, name: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def _transposed(name: str, weight: Tensor) -> Tensor:
    return weight.T if weight.dim() == 2 and weight.size(0) == weight.size(1) else weight


def in_block(inputs: Inputs, stage: str, expected: Tensor) -> Explanations:
    """Return what each mistake makes of one stage of a block, by its meaning."""
    changed: dict[str, dict[str, Any]] = {
        **{meaning: {"config": other} for meaning, other in other_settings(inputs.config).items()},
        **{meaning: {"rows": other} for meaning, other in other_rows(inputs.rows).items()},
        **{meaning: {"weights": other} for meaning, other in other_weights(inputs).items()},
    }
    found: Explanations = {}
    if stage == "attention":
        found |= in_attention(inputs)
    for meaning, other in changed.items():
        found[meaning] = partial(_stage, replace(inputs, **other), stage)
    if stage in ("residual", "residual after attention"):
        found |= in_residual(inputs, stage)
    return {meaning: partial(_or_nothing, derive, expected) for meaning, derive in found.items()}


def _stage(inputs: Inputs, stage: str) -> Tensor:
    return block(inputs.config, inputs.weights, inputs.layer, inputs.x, inputs.rows)[stage]


def _or_nothing(derive: Callable[[], Tensor], expected: Tensor) -> Tensor:
    """Return what a mistake makes, or numbers that explain nothing where it cannot be made."""
    try:
        found = derive()
    except (KeyError, AttributeError, RuntimeError, ValueError, IndexError):
        return torch.full_like(expected, math.nan)
    return found if found.shape == expected.shape else torch.full_like(expected, math.nan)


# --- attention and residual -----------------------------------------------------------------------


def in_attention(inputs: Inputs) -> Explanations:
    """Return what mistakes in the scores, the mask and the softmax make of attention."""
    config = inputs.config
    stages = block(config, inputs.weights, inputs.layer, inputs.x, inputs.rows)
    q, k, v = stages["queries"], stages["keys"], stages["values"]
    root = math.sqrt(config.head_dim)
    seen = visible(inputs.rows.documents, window_of(config, inputs.layer))
    same = inputs.rows.documents[:, :, None] == inputs.rows.documents[:, None, :]
    itself = torch.eye(seen.size(1), dtype=torch.bool, device=seen.device)
    one_late = seen.roll(1, dims=1) & same
    one_late[:, 0] = seen[:, 0]
    mixed = partial(_mixed, q, k, v)
    return {
        "1/sqrt(head_dim) missing in the scores": partial(mixed, seen, 1.0),
        "1/sqrt(head_dim) applied twice to the scores": partial(mixed, seen, 1 / root**2),
        "scores divided by sqrt(n_embd)": partial(mixed, seen, config.n_embd**-0.5),
        "no causal mask": partial(mixed, same, 1 / root),
        "the causal mask inverted": partial(mixed, seen.transpose(1, 2), 1 / root),
        "no mask of documents": partial(mixed, visible(torch.zeros_like(inputs.rows.documents)), 1 / root),
        "no mask at all": partial(mixed, torch.ones_like(seen), 1 / root),
        "a mask that is one token off, so that no token sees itself": partial(
            mixed, (seen & ~itself) | (itself & ~(seen & ~itself).any(2, keepdim=True)), 1 / root
        ),
        "a mask that is one token off": partial(mixed, one_late, 1 / root),
        "a mask that shows the next token": partial(mixed, (seen.roll(-1, 1) | seen) & same, 1 / root),
        "heads of keys in another order than those of queries": partial(_tiled, q, k, v, seen),
    }


def _mixed(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, factor: float) -> Tensor:
    """Return softmax(factor q k^T) v over the keys that are seen, (B, T, H, D)."""
    k, v = (part.repeat_interleave(q.size(2) // k.size(2), dim=2) for part in (k, v))
    scores = factor * torch.einsum("bthd,bshd->bhts", q, k)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~seen[:, None], -math.inf).softmax(-1), v)


def _tiled(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Return attention in which query head h has the keys of head h mod K."""
    groups = q.size(2) // k.size(2)
    return _mixed(q, k.repeat(1, 1, groups, 1), v.repeat(1, 1, groups, 1), seen, q.size(-1) ** -0.5)


def in_residual(inputs: Inputs, stage: str) -> Explanations:
    """Return what mistakes in adding to the residual stream make of it."""
    stages = block(inputs.config, inputs.weights, inputs.layer, inputs.x, inputs.rows)
    is_last, config_scale = stage == "residual", inputs.config.residual_scale
    before = stages.get("residual after attention", inputs.x) if is_last else inputs.x
    attention, mlp = (config_scale * stages[part] for part in ("attention output", "MLP output"))
    normed = stages["norm" if "norm" in stages else "MLP norm" if is_last else "attention norm"]
    found: Explanations = {
        "the residual stream not added": lambda: stages[stage] - before,
        "the residual stream added twice": lambda: stages[stage] + before,
        "the norm's output added instead of the residual stream": lambda: stages[stage] - before + normed,
        "attention not added": lambda: stages[stage] - attention,
        "attention added twice": lambda: stages[stage] + attention,
    }
    if is_last:
        found |= {
            "the MLP not added": lambda: stages[stage] - mlp,
            "the MLP added twice": lambda: stages[stage] + mlp,
        }
    return found


def in_norm(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Explanations:
    """Return what mistakes make of a norm of x."""
    found: Explanations = {
        meaning: partial(norm, other, weights, name, x) for meaning, other in other_settings(config).items()
    }
    found["the norm left out"] = lambda: x
    return {meaning: partial(_or_nothing, derive, x) for meaning, derive in found.items()}


# --- embedding ------------------------------------------------------------------------------------


def in_embedding(config: ModelConfig, weights: Weights, rows: Rows, expected: Tensor) -> Explanations:
    """Return what mistakes make of the first residual stream."""
    width = config.n_embd
    found: Explanations = {
        "embed_scale not applied": lambda: embedding(replace(config, embed_scale=1.0), weights, rows),
        "positions not added": lambda: embedding(replace(config, position="none"), weights, rows),
        "the embedding multiplied by sqrt(n_embd)": lambda: (
            expected + (math.sqrt(width) - 1) * weights["embed.weight"][rows.tokens].double()
        ),
        "ids shifted by one": lambda: embedding(config, weights, rows._replace(tokens=rows.tokens + 1)),
    }
    for meaning, other in other_rows(rows).items():
        found[meaning] = partial(embedding, config, weights, other)
    return {meaning: partial(_or_nothing, derive, expected) for meaning, derive in found.items()}
