"""Attention for training on a CPU, where PyTorch's fused kernel is slow and has no dropout.

Written out, it keeps three (H, T, S) tensors a row and layer for the backward pass. Here a block of queries
at a time is scored against the keys up to its last one, and what is kept are q, k, v, the output and a seed:
backward scores the block again and draws the same random numbers (as FlashAttention does, arXiv:2205.14135).
Only scores on the diagonal are masked, and a block stays in the cache: for 512 tokens and 16 heads of 64
forward and backward take 0.40 of the time of PyTorch's kernel in bf16 and 0.75 in fp32 (AVX-512, two cores).
In bf16 scores and weights are rounded to it, as where attention is written out; PyTorch's kernel, which
evaluation uses, keeps its scores in fp32. For normally distributed q, k and v its output
is off by 0.0020 of its size (rms), this one's by 0.0033.

Shapes: B rows, H query heads, K key and value heads, G = H / K, T queries, S keys, D = head_dim. Inside,
tensors lie as the projections made them, (B, T, H, D): with multi-query the queries of a block are then rows
of one matrix as they are, and no copy of them is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modules.dropout import kept, steps

BLOCK_ELEMENTS = 2**20  # scores alive at a time: 4 MB, which stay in the cache


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[int, slice, int]]:
    """Yield (number, queries, how many keys any of them may see) of each block."""
    B, T, H, _ = q.shape
    S = k.size(1)
    size = max(16, min(T, BLOCK_ELEMENTS // max(1, B * H * S)))
    for number, start in enumerate(range(0, T, size)):
        stop = min(T, start + size)
        yield number, slice(start, stop), stop + S - T


def _rows(x: Tensor, queries: slice, n_kv_head: int) -> Tensor:
    """Return a block of t queries of x (B, T, H, D) as rows, (B, K, t G, D); a view where K is 1."""
    return x[:, queries].unflatten(2, (n_kv_head, -1)).transpose(1, 2).flatten(2, 3)


def _put_rows(x: Tensor, queries: slice, rows: Tensor) -> None:
    """Write rows (B, K, t G, D) to their places in x (B, T, H, D): the inverse of `_rows`."""
    block = x[:, queries].unflatten(2, (rows.size(1), -1))
    block.copy_(rows.unflatten(2, (block.size(1), -1)).transpose(1, 2))


def _weights(rows: Tensor, k: Tensor, mask: Tensor | None, queries: slice, n_keys: int) -> Tensor:
    """Return softmax(q k^T), (B, K, t G, n_keys), of scaled queries (B, K, t G, D) and keys (B, K, S, D)."""
    t = queries.stop - queries.start
    scores = rows @ k[:, :, :n_keys].transpose(-2, -1)
    by_query = scores.unflatten(2, (t, -1))  # (B, K, t, G, n_keys)
    if mask is None:
        # All queries of the block see all keys but the last t.
        hidden = torch.full((t, t), -math.inf, dtype=scores.dtype, device=scores.device).triu_(1)
        by_query[..., n_keys - t :] += hidden.unsqueeze(1)
    else:
        seen = mask[:, :, queries, :n_keys].unsqueeze(3)
        by_query += torch.zeros_like(seen, dtype=scores.dtype).masked_fill_(~seen, -math.inf)
    return torch.softmax(scores, -1, out=scores)  # Its sums are fp32 for bf16 too.


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropped: int, seed: int
    ) -> Tensor:
        y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        keys, values = (x.transpose(1, 2).contiguous() for x in (k, v))
        for number, queries, n_keys in _blocks(q, k):
            rows = _rows(q, queries, k.size(2)) / math.sqrt(q.size(3))
            weights = _weights(rows, keys, mask, queries, n_keys)
            if dropped:
                weights *= kept(seed, number, weights.shape, dropped, weights.dtype)
            out = weights @ values[:, :, :n_keys]
            _put_rows(y, queries, out.mul_(2**16 / (2**16 - dropped)) if dropped else out)
        ctx.save_for_backward(q, k, v, y, mask)
        ctx.dropped, ctx.seed = dropped, seed
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        q, k, v, y, mask = ctx.saved_tensors
        K, scale, dropped = k.size(2), 1 / math.sqrt(q.size(3)), ctx.dropped
        grad_q = torch.empty_like(q)
        keys, values = (x.transpose(1, 2).contiguous() for x in (k, v))
        grad_k, grad_v = torch.zeros_like(keys), torch.zeros_like(values)
        # A query's sum over keys of weight times gradient is also that of its output times the gradient.
        inner = (grads[0] * y).sum(-1, keepdim=True)
        for number, queries, n_keys in _blocks(q, k):
            rows, grad = _rows(q, queries, K) * scale, _rows(grads[0], queries, K)
            weights = _weights(rows, keys, mask, queries, n_keys)
            keep = kept(ctx.seed, number, weights.shape, dropped, weights.dtype) if dropped else None
            if keep is not None:
                grad = grad * (2**16 / (2**16 - dropped))
            grad_scores = grad @ values[:, :, :n_keys].transpose(-2, -1)
            if keep is not None:
                grad_scores.mul_(keep)
            grad_scores.sub_(_rows(inner, queries, K)).mul_(weights)
            if keep is not None:
                weights *= keep
            _add_product(grad_v[:, :, :n_keys], weights.transpose(-2, -1), grad)
            _add_product(grad_k[:, :, :n_keys], grad_scores.transpose(-2, -1), rows)
            _put_rows(grad_q, queries, (grad_scores @ keys[:, :, :n_keys]).mul_(scale))
        return grad_q, grad_k.transpose(1, 2), grad_v.transpose(1, 2), None, None, None


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute out (B, K, n, D) += a (B, K, n, m) b (B, K, m, D)."""
    out.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """Return dropout(softmax(q k^T / sqrt(D))) v, (B, H, T, D), on a CPU.

    Args:
        q: (B, H, T, D), the last T of S positions.
        k, v: (B, K, S, D); K divides H.
        mask: (B, 1, T, S), True where a query may look, at or before itself; None: all at or before itself.
            A query that may look nowhere gives NaN.
        p: Probability that a weight is dropped, to the nearest 1 / 65,536.
    """
    assert mask is None or mask.size(2) == q.size(2)
    # Seeded by torch's generator, so that its state is all there is to save.
    seed = int(torch.randint(2**62, ())) if p else 0
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = _BlockedAttention.apply(q, k, v, mask, steps(p), seed)
    assert isinstance(y, Tensor)
    return y.transpose(1, 2)
