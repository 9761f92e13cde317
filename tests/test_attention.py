"""Attention by blocks of queries, with dropout and without: equal to what is written out, gradients too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modules import blocked_attention as blocked
from modules.attention import attention_mask, reference_attention
from modules.blocked_attention import blocked_attention
from modules.dropout import Dropout


def drawn(B: int, H: int, K: int, T: int, S: int, D: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((B, H, T, D), (B, K, S, D), (B, K, S, D))
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
    return reference_attention(q, k, v, mask, mask is None, Dropout(0.0))


def masks(B: int, T: int) -> list[Tensor | None]:
    documents = torch.tensor([[0] * (T // 2) + [1] * (T - T // 2 - 3) + [-1] * 3, [0] * T])[:B]
    return [None, attention_mask(documents, documents), attention_mask(documents, documents, window=4)]


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize("block", [1, 40 * 16 * 8, 2**20])
def test_without_dropped_weights_it_is_attention(
    heads: tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", block)
    B, T = 2, 40
    for mask in masks(B, T):
        q, k, v = drawn(B, *heads, T, T, 8)
        weight = torch.randn(B, heads[0], T, 8, dtype=torch.float64)
        found, expected = (
            (*torch.autograd.grad((y * weight).sum(), (q, k, v), retain_graph=True), y)
            for y in (blocked_attention(q, k, v, mask, 0.0), written_out(q, k, v, mask))
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # The softmax is fp32.


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_the_gradient_is_that_of_the_same_drawn_weights(
    heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", 1)  # blocks of 16 queries, of 20
    mask = masks(1, 20)[1]

    def seeded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(5)
        return blocked_attention(q, k, v, mask, 0.4)

    assert torch.autograd.gradcheck(seeded, drawn(1, *heads, 20, 20, 3), fast_mode=True)


def test_a_weight_is_dropped_or_scaled_up() -> None:
    S, p = 64, 0.25
    q, k, _ = drawn(2, 4, 2, S, S, S)
    v = torch.eye(S, dtype=torch.float64).expand(2, 2, S, S)  # The output is then the weights.
    torch.manual_seed(0)
    found, whole = blocked_attention(q, k, v, None, p), written_out(q, k, v, None)
    is_kept = found != 0
    torch.testing.assert_close(found[is_kept], whole[is_kept] / (1 - p), rtol=1e-5, atol=1e-6)
    lower = torch.ones(S, S, dtype=torch.bool).tril()
    share = is_kept[..., lower].double().mean().item()
    assert abs(share - (1 - p)) < 0.01 and not found[..., ~lower].any()
    assert not torch.equal(found, blocked_attention(q, k, v, None, p))  # other random numbers


def test_nothing_of_the_size_of_the_weights_is_kept() -> None:
    q, k, v = (x.detach().float().requires_grad_() for x in drawn(2, 4, 1, 96, 96, 8))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        y = blocked_attention(q, k, v, None, 0.1)
    assert sum(saved) == q.numel() + k.numel() + v.numel() + y.numel()
