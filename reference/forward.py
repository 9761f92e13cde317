"""The decoder written out: what each setting of `ModelConfig` does to a row, from token ids to the loss.

    tokens (B, T) -> embedding (B, T, C) -> blocks -> last norm -> logits (B, T, V) -> nll of each target

Weights are looked up by name (`blocks.0.attention.q.weight`), each as (outputs, inputs); which of them there
are follows from the settings alone. Every function is differentiable, so that gradients come from autograd.

Shapes: B rows, T tokens, C = n_embd, H query heads, K = n_kv_head, D = head_dim, V words. All in fp64, and
without dropout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from config import ModelConfig
from reference.positions import rotated, sinusoids, visible, window_of

Weights = Mapping[str, Tensor]
IGNORED = -100  # The label of a token that is no target.


class Rows(NamedTuple):
    """Rows of packed documents."""

    tokens: Tensor  # (B, T) ids.
    positions: Tensor  # (B, T) of each token in its document, from 0.
    documents: Tensor  # (B, T) the number of its document.


def logits_of(config: ModelConfig, weights: Weights, rows: Rows) -> Tensor:
    """Return the logits (B, T, V) of rows; `config` is resolved."""
    x = embedding(config, weights, rows)
    for layer in range(config.n_layer):
        x = block(config, weights, layer, x, rows)["residual"]
    return head(config, weights, norm(config, weights, "norm", x))


def embedding(config: ModelConfig, weights: Weights, rows: Rows) -> Tensor:
    """Return the first residual stream (B, T, C): a row of the table for each id, and absolute positions.

    The row is multiplied by `embed_scale`: Gemma's is sqrt(C) (arXiv:2403.08295).
    """
    x = config.embed_scale * weights["embed.weight"][rows.tokens].double()
    if config.position == "learned":
        return x + weights["position.weight"][rows.positions].double()
    if config.position == "sinusoidal":
        return x + sinusoids(rows.positions, config.n_embd)
    return x


def block(config: ModelConfig, weights: Weights, layer: int, x: Tensor, rows: Rows) -> dict[str, Tensor]:
    """Return every stage of one block by name, in the order in which they are computed.

    The first is its norm and the last, `residual`, is its output. A sequential block adds attention and then
    the MLP of what that gave, each with a norm before it; a parallel one (CodeGen, Phi) adds both, computed
    from one norm, and GPT-NeoX (arXiv:2204.06745, section 2.1) both from x, each with a norm of its own. What
    is added is first multiplied by `residual_scale` (Granite).

    Args:
        x: (B, T, C), the residual stream before the block.
    """
    name, share = f"blocks.{layer}", config.residual_scale
    if config.block == "parallel":
        normed = norm(config, weights, f"{name}.norm", x)
        found = {"norm": normed} | attention(config, weights, layer, normed, rows)
        found |= mlp(config, weights, f"{name}.mlp", normed)
        return found | {"residual": x + share * found["attention output"] + share * found["MLP output"]}
    normed = norm(config, weights, f"{name}.attention_norm", x)
    found = {"attention norm": normed} | attention(config, weights, layer, normed, rows)
    if config.block == "parallel_norms":
        normed = norm(config, weights, f"{name}.mlp_norm", x)
        found |= {"MLP norm": normed} | mlp(config, weights, f"{name}.mlp", normed)
        return found | {"residual": x + share * found["attention output"] + share * found["MLP output"]}
    middle = x + share * found["attention output"]
    normed = norm(config, weights, f"{name}.mlp_norm", middle)
    found |= {"residual after attention": middle, "MLP norm": normed}
    found |= mlp(config, weights, f"{name}.mlp", normed)
    return found | {"residual": middle + share * found["MLP output"]}


def norm(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    """Normalise the last dimension: LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467).

    x is divided by sqrt(mean of squares + norm_eps), LayerNorm's after its mean was taken off; then come the
    learned scale and shift, where the settings have them. Gemma's scale is 1 + weight (arXiv:2403.08295).
    """
    if config.norm == "layer":
        x = x - x.mean(dim=-1, keepdim=True)
    x = x / (x.square().mean(dim=-1, keepdim=True) + config.norm_eps).sqrt()
    if config.norm_weight:
        x = x * (weights[f"{name}.weight"] + (1 if config.norm == "rms_offset" else 0))
    return x + weights[f"{name}.bias"] if config.norm_bias else x


def linear(weights: Weights, name: str, x: Tensor, bias: bool) -> Tensor:
    """Return x W^T, and the bias if there is one."""
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if bias else out


# --- attention ------------------------------------------------------------------------------------


def attention(config: ModelConfig, weights: Weights, layer: int, x: Tensor, rows: Rows) -> dict[str, Tensor]:
    """Return the stages of attention: projections, queries and keys as they meet, heads, and output.

    Queries and keys are normalised over each head (`qk_norm`, arXiv:2010.04245, as a norm of the settings'
    kind), and then rotated, but for layers without positions (NoPE). Another factor of the scores than
    1 / sqrt(D), `attention_scale`, is made of queries as they meet: `attend` divides by sqrt(D).
    """
    name = f"blocks.{layer}.attention"
    q, k, v = projections(config, weights, name, x)
    found = {"queries projected": q, "keys projected": k, "values": v}
    if config.qk_norm:
        q, k = norm(config, weights, f"{name}.q_norm", q), norm(config, weights, f"{name}.k_norm", k)
        found |= {"queries normalised": q, "keys normalised": k}
    if config.position == "rotary" and layer not in config.unrotated_layers:
        q, k = rotated(config, q, rows.positions), rotated(config, k, rows.positions)
    if config.attention_scale:
        q = q * (config.attention_scale * math.sqrt(config.head_dim))
    mixed = attend(q, k, v, visible(rows.documents, window_of(config, layer)))
    out = linear(weights, f"{name}.out", mixed.flatten(2), config.attention_bias)
    return found | {"queries": q, "keys": k, "attention": mixed, "attention output": out}


def projections(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries (B, T, H, D), keys and values (B, T, K, D) of x (B, T, C)."""
    heads, kv_heads, size = config.n_head, config.n_kv_head, config.head_dim
    if not config.fused_qkv:
        parts = [linear(weights, f"{name}.{part}", x, config.qkv_bias) for part in "qkv"]
    else:
        parts = split_fused(config, linear(weights, f"{name}.qkv", x, config.qkv_bias))
    q, k, v = (
        part.unflatten(-1, (n, size)) for part, n in zip(parts, (heads, kv_heads, kv_heads), strict=True)
    )
    return q, k, v


def split_fused(config: ModelConfig, fused: Tensor) -> list[Tensor]:
    """Return queries, keys and values, each (..., heads x D), of the output of a fused projection.

    - blocks: all queries, all keys, all values.
    - heads: query, key and value of the first head, then of the second (GPTBigCode).
    - shards: four shards, one a core of the first training, each with query, value and key of a quarter of
      the heads, in that order (CodeGen). Those of `shards8` are eight (CodeGen2).
    """
    size = config.head_dim
    if config.qkv_layout == "blocks":
        return list(fused.split([config.n_head * size] + 2 * [config.n_kv_head * size], dim=-1))
    groups = {"heads": config.n_head, "shards": 4, "shards8": 8}[config.qkv_layout]
    order = (0, 1, 2) if config.qkv_layout == "heads" else (0, 2, 1)
    parts = fused.unflatten(-1, (groups, 3, config.n_head // groups * size))
    return [parts[..., place, :].flatten(-2) for place in order]


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v, (B, T, H, D), over the keys that are seen (arXiv:1706.03762).

    Heads share keys and values in groups of H / K neighbours (arXiv:2305.13245).

    Args:
        q: (B, T, H, D).
        k: (B, T, K, D), as is v.
        seen: (B, T, T) of bool.
    """
    k, v = (part.repeat_interleave(q.size(2) // k.size(2), dim=2) for part in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.size(-1))
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(dim=-1), v)


# --- the MLP and the head ---------------------------------------------------------------------------


def mlp(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> dict[str, Tensor]:
    """Return the stages of the MLP: its inner state (B, T, n_inner), and its output (B, T, C).

    With a gate (arXiv:2002.05202) the inner state is a product. A fused projection has the gate's rows first.
    Experts have no inner state in common.
    """
    if config.n_experts:
        return {"MLP output": experts(config, weights, name, x)}
    if config.mlp in GATES and config.fused_gate:
        gate, up = linear(weights, f"{name}.gate_up", x, config.mlp_bias).tensor_split(2, dim=-1)
        inner = GATES[config.mlp](gate) * up
    elif config.mlp in GATES:
        gate, up = (linear(weights, f"{name}.{part}", x, config.mlp_bias) for part in ("gate", "up"))
        inner = GATES[config.mlp](gate) * up
    else:
        inner = ACTIVATIONS[config.mlp](linear(weights, f"{name}.up", x, config.mlp_bias))
    return {"MLP inner": inner, "MLP output": linear(weights, f"{name}.down", inner, config.mlp_bias)}


def shares_of(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    """Return the share of each expert for each token, (B, T, E); 0 where it is not chosen.

    They are the n_chosen largest of softmax(x W^T), divided by their sum where the settings say so
    (arXiv:1701.06538).
    """
    shares = (x @ weights[f"{name}.router.weight"].T).softmax(dim=-1)
    least = shares.topk(config.n_chosen, dim=-1).values[..., -1:]
    shares = shares.where(shares >= least, 0)
    return shares / shares.sum(dim=-1, keepdim=True) if config.chosen_sum_to_one else shares


def is_sure(config: ModelConfig, weights: Weights, name: str, x: Tensor, rounding: float) -> Tensor:
    """Return for which tokens rounding cannot change which experts are chosen, (B, T, 1) of bool.

    Args:
        rounding: By how much scores may be off, relative to the largest.
    """
    scores = x @ weights[f"{name}.router.weight"].T
    if config.n_chosen == config.n_experts:
        return torch.ones_like(scores[..., :1], dtype=torch.bool)
    ordered = scores.sort(dim=-1, descending=True).values
    gap = ordered[..., config.n_chosen - 1] - ordered[..., config.n_chosen]
    return (gap > 2 * rounding * scores.abs().amax())[..., None]


def experts(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    """Return the sum of the experts' outputs (B, T, C), each times its share, which is 0 for most."""
    shares, found = shares_of(config, weights, name, x), torch.zeros_like(x)
    for number in range(config.n_experts):
        share = shares[..., number, None]
        if bool(share.any()):
            one = f"{name}.experts.{number}"
            gate, up = (linear(weights, f"{one}.{part}", x, False) for part in ("gate", "up"))
            found = found + share * linear(weights, f"{one}.down", GATES[config.mlp](gate) * up, False)
    return found


def silu(x: Tensor) -> Tensor:
    """Return x sigmoid(x), the gate of SwiGLU (arXiv:2002.05202)."""
    return x / (1 + (-x).exp())


def gelu(x: Tensor) -> Tensor:
    """Return x times the normal distribution's probability of less than x (arXiv:1606.08415)."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x: Tensor) -> Tensor:
    """Return the approximation of GELU by a tanh, with which GPT-2 and StarCoder were trained."""
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def relu2(x: Tensor) -> Tensor:
    """Return the square of the positive part (arXiv:2109.08668)."""
    return x.clamp(min=0).square()


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu2": relu2}
GATES = {"swiglu": silu, "geglu_tanh": gelu_tanh}


def head(config: ModelConfig, weights: Weights, hidden: Tensor) -> Tensor:
    """Return logits (..., V) of hidden states (..., C).

    A tied head has the embedding's weight, unless an adapter gives it one of its own. Granite divides logits
    by a constant.
    """
    tied = config.tie_embeddings and "head.weight" not in weights
    logits = hidden @ weights["embed.weight" if tied else "head.weight"].T / config.logit_divisor
    return logits + weights["head.bias"] if config.head_bias else logits


# --- the loss -----------------------------------------------------------------------------------------


def next_tokens(rows: Rows) -> Tensor:
    """Return the labels (B, T): the next token of the same document, and no target at a document's end."""
    labels = torch.full_like(rows.tokens, IGNORED)
    same = rows.documents[:, 1:] == rows.documents[:, :-1]
    labels[:, :-1] = rows.tokens[:, 1:].where(same, labels[:, :-1])
    return labels


def nll_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target in nats, (targets): ln sum exp(logits) - logit."""
    is_target = labels != IGNORED
    logits, labels = logits[is_target], labels[is_target]
    return logits.logsumexp(dim=-1) - logits.gather(-1, labels[:, None])[:, 0]


def objective_of(logits: Tensor, labels: Tensor, smoothing: float, z_loss: float) -> Tensor:
    """Return what training minimises, summed over the targets, ().

    Label smoothing spreads a share of each target evenly over the vocabulary (arXiv:1512.00567), and z-loss
    adds the squared logarithm of the softmax's denominator (arXiv:2204.02311).
    """
    chosen = logits[labels != IGNORED]
    denominator = chosen.logsumexp(dim=-1)
    uniform = denominator - chosen.mean(dim=-1)
    nll = (1 - smoothing) * nll_of(logits, labels) + smoothing * uniform
    return (nll + z_loss * denominator.square()).sum()
