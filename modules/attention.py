"""Attention as functions: masks, the layouts of a fused projection, and softmax(q k^T) v in two ways.

Shapes: B rows, T queries, S keys, H query heads, K key and value heads (K divides H), D = head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.blocked_attention import blocked_attention
from modules.dropout import Dropout

# Queries behind cached keys that share a key head are rows of one matrix: 4 of them take half the time behind
# 1,000 keys, 16 take 0.85 of it, and 64 as long as head by head.
FEW_QUERIES = 16


def attention_mask(query_documents: Tensor, key_documents: Tensor, window: int = 0) -> Tensor:
    """Return True where a query may look, (B, 1, T_query, T_key): its own document, at or before itself.

    With a window it sees at most that many tokens, itself included (Longformer, arXiv:2004.05150).

    The queries are the last T_query of the T_key tokens. Padding is a document of its own (-1), so that every
    row of the mask has at least one True and no softmax is taken over nothing.
    """
    n_query, n_key = query_documents.size(1), key_documents.size(1)
    same = query_documents[:, :, None] == key_documents[:, None, :]
    if n_query == 1 and not window:
        return same.unsqueeze(1)
    causal = torch.ones(n_query, n_key, dtype=torch.bool, device=query_documents.device).tril(n_key - n_query)
    if window:
        causal = causal.triu(n_key - n_query - window + 1)
    return (same & causal).unsqueeze(1)


def repeat_heads(x: Tensor, n_head: int) -> Tensor:
    """Repeat keys or values (B, K, S, D) for the n_head / K query heads that share each; one is a view."""
    if x.size(1) == 1:
        return x.expand(-1, n_head, -1, -1)
    return x if x.size(1) == n_head else x.repeat_interleave(n_head // x.size(1), dim=1)


def group_queries(q: Tensor, n_kv_head: int) -> Tensor:
    """Make the queries that share a key head rows of one matrix: (B, H, T, D) -> (B, K, H/K T, D).

    Copies of all keys for them took 3 ms of a decoding step of 8 rows.
    """
    return q.reshape(q.size(0), n_kv_head, -1, q.size(3))


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, dropout: Dropout
) -> Tensor:
    """Compute softmax(q k^T / sqrt(D)) v as written: q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D)."""
    B, H, T, _ = q.shape
    if T == 1:
        q = group_queries(q, k.size(1))
    k, v = (repeat_heads(x, q.size(1)) for x in (k, v))
    scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)
    if is_causal:
        mask = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        # A large negative number would make a fully masked row uniform; -inf makes it NaN, seen at once.
        # Added, since all heads share it: to fill the scores takes 5 times as long, and again in backward.
        scores += torch.zeros(mask.shape, dtype=scores.dtype, device=q.device).masked_fill_(~mask, -math.inf)
    exact = torch.promote_types(scores.dtype, torch.float32)
    weights = F.softmax(scores, dim=-1, dtype=exact).to(v.dtype)
    return (dropout(weights) @ v).reshape(B, H, T, -1)


def fast_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, dropout: Dropout
) -> Tensor:
    """Compute what `reference_attention` does by fused kernels: PyTorch's, or in training on a CPU ours."""
    p = dropout.p if dropout.training else 0.0
    if dropout.training and q.device.type == "cpu" and q.size(2) > 1 and (is_causal or mask is not None):
        return blocked_attention(q, k, v, mask, p)
    B, H, T, _ = q.shape
    groups = H // k.size(1)
    few = T <= FEW_QUERIES and mask is not None and mask.size(1) == 1 and q.device.type == "cpu"
    if T == 1 or (few and groups > 1):
        q = group_queries(q, k.size(1))
        mask = mask if mask is None or T == 1 else mask.repeat(1, 1, groups, 1)
    k, v = (repeat_heads(x, q.size(1)) for x in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=p)
    return y.reshape(B, H, T, -1)


ATTENTIONS = {"reference": reference_attention, "fast": fast_attention}


def split_blocks(qkv: Tensor, n_head: int, n_kv_head: int, head_dim: int) -> tuple[Tensor, ...]:
    """Split rows that are all queries, all keys, all values."""
    widths = [n_head * head_dim, n_kv_head * head_dim, n_kv_head * head_dim]
    return qkv.split(widths, dim=-1)


def split_heads(qkv: Tensor, n_head: int, n_kv_head: int, head_dim: int) -> tuple[Tensor, ...]:
    """Split rows that are query, key and value of each head in turn: GPTBigCode without multi-query."""
    return qkv.unflatten(-1, (n_head, 3, head_dim)).unbind(-2)


def split_shards(qkv: Tensor, n_head: int, n_kv_head: int, head_dim: int, n: int = 4) -> tuple[Tensor, ...]:
    """Split n shards, each query, value and key of its share of the heads: CodeGen, a shard a core."""
    shards = qkv.unflatten(-1, (n, 3, n_head // n, head_dim))
    q, v, k = (part.flatten(-3, -2) for part in shards.unbind(-3))  # the value comes second
    return q, k, v


# The rows of a fused projection stay as published; its output (B, T, 3C) is split to q, k and v, each
# (B, T, HD) or (B, T, H, D). So a weight is loaded byte for byte, and an adapter on it means what it does
# elsewhere.
QKV_SPLITS: dict[str, Callable[[Tensor, int, int, int], tuple[Tensor, ...]]] = {
    "blocks": split_blocks,
    "heads": split_heads,
    "shards": split_shards,
    "shards8": partial(split_shards, n=8),
}
