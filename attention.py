"""Attention with dropout on a CPU, where PyTorch's fused kernels have none.

Written out, it keeps three (H, T, S) tensors a row and layer for the backward pass. Here a block of queries
at a time is scored against the keys up to its last one, and what is kept are q, k, v, the output and a seed:
backward scores the block again and draws the same random numbers (as FlashAttention does, arXiv:2205.14135).

Shapes: B rows, H query heads, K key and value heads, G = H / K, T queries, S keys, D = head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**20  # scores alive at a time: 4 MB, which stay in the cache


def kept(seed: int, part: int, shape: torch.Size, dropped: int, dtype: torch.dtype) -> Tensor:
    """0 with probability dropped / 65,536, else 1: the same for the same arguments.

    Four elements share a random number of 64 bits: torch draws one for each, on one thread.
    """
    n = shape.numel()
    bits = torch.from_numpy(np.random.SFC64([seed, part]).random_raw(-(-n // 4)).view(np.int16))
    # 0 or 1, in place and as numbers: with booleans, or by torch.where, this took 3 times as long.
    return bits[:n].view(shape).ge_(dropped - 2**15).to(dtype)


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[int, slice, int]]:
    """(number, queries, how many keys any of them may see) of each block."""
    B, H, T, _ = q.shape
    S = k.size(2)
    size = max(16, min(T, BLOCK_ELEMENTS // (B * H * S)))
    for number, start in enumerate(range(0, T, size)):
        stop = min(T, start + size)
        yield number, slice(start, stop), stop + S - T


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, queries: slice, n_keys: int) -> Tensor:
    """softmax(q k^T), (B, K, G, t, n_keys), of a block q (B, K, G, t, D), already scaled."""
    B, K, G, t, D = q.shape
    scores = (q.reshape(B, K, G * t, D) @ k[:, :, :n_keys].transpose(-2, -1)).view(B, K, G, t, n_keys)
    if mask is None:
        # Of a causal block only the last t keys are not seen by all of its queries.
        corner = scores[..., n_keys - t :]
        corner += torch.full((t, t), -math.inf, dtype=scores.dtype, device=q.device).triu_(1)
    else:
        seen = mask[:, :, queries, :n_keys].unsqueeze(1)
        scores += torch.zeros(seen.shape, dtype=scores.dtype, device=q.device).masked_fill_(~seen, -math.inf)
    if scores.dtype in (torch.bfloat16, torch.float16):
        return torch.softmax(scores, -1, torch.float32).to(scores.dtype)
    return torch.softmax(scores, -1, out=scores)


class _DroppedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropped: int, seed: int
    ) -> Tensor:
        B, H, T, D = q.shape
        K = k.size(1)
        y = torch.empty(B, H, T, D, dtype=q.dtype, device=q.device)
        grouped, y_grouped = q.unflatten(1, (K, H // K)), y.unflatten(1, (K, H // K))
        for number, queries, n_keys in _blocks(q, k):
            block = grouped[:, :, :, queries] / math.sqrt(D)
            weights = _weights(block, k, mask, queries, n_keys)
            weights *= kept(seed, number, weights.shape, dropped, weights.dtype)
            out = weights.flatten(2, 3) @ v[:, :, :n_keys]
            torch.mul(out.view(block.shape), 2**16 / (2**16 - dropped), out=y_grouped[:, :, :, queries])
        ctx.save_for_backward(q, k, v, y, mask)
        ctx.dropped, ctx.seed = dropped, seed
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, mask = ctx.saved_tensors
        B, H, T, D = q.shape
        K = k.size(1)
        grad_q = torch.empty(B, H, T, D, dtype=q.dtype, device=q.device)
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)

        def grouped(x: Tensor) -> Tensor:
            return x.unflatten(1, (K, H // K))

        for number, queries, n_keys in _blocks(q, k):
            block, grad = (grouped(x)[:, :, :, queries] for x in (q, grads[0]))
            block = block / math.sqrt(D)
            weights = _weights(block, k, mask, queries, n_keys)
            keep = kept(ctx.seed, number, weights.shape, ctx.dropped, weights.dtype)
            # sum_j of weight times its gradient, by the output instead of by the weights.
            inner = (grad * grouped(y)[:, :, :, queries]).sum(-1, keepdim=True)
            rows = (grad * (2**16 / (2**16 - ctx.dropped))).reshape(B, K, -1, D)
            grad_weights = (rows @ v[:, :, :n_keys].transpose(-2, -1)).view(weights.shape)
            grad_weights *= keep
            grad_scores = grad_weights.sub_(inner).mul_(weights).flatten(2, 3)
            weights *= keep
            grad_v[:, :, :n_keys] += weights.flatten(2, 3).transpose(-2, -1) @ rows
            grad_k[:, :, :n_keys] += grad_scores.transpose(-2, -1) @ block.reshape(B, K, -1, D)
            out = (grad_scores @ k[:, :, :n_keys]).div_(math.sqrt(D))
            grouped(grad_q)[:, :, :, queries] = out.view(block.shape)
        return grad_q, grad_k, grad_v, None, None, None


def dropped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """dropout(softmax(q k^T / sqrt(D))) v, (B, H, T, D), on a CPU.

    Args:
        q: (B, H, T, D), the last T of S positions.
        k, v: (B, K, S, D); K divides H.
        mask: (B, 1, T, S), True where a query may look, at or before itself; None: all at or before itself.
        p: Share of the weights that is dropped, to the nearest 1 / 65,536.
    """
    # Seeded by torch's generator, so that its state is all there is to save.
    seed = int(torch.randint(2**62, ()))
    y = _DroppedAttention.apply(q, k, v, mask, min(round(p * 2**16), 2**16 - 1), seed)
    assert isinstance(y, Tensor)
    return y
