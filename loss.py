"""The loss, one function for training and validation; all logits are never held at once.

With 22,812 words a batch of 4,096 tokens has 374 MB of fp32 logits; softmax, its gradient and their copies
each pass over them. Here logits exist for one chunk of tokens at a time: a chunk's loss and gradients are
computed while it is in cache, and only the gradients of the hidden states and of the head are kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from architecture import Decoder
from dataset import IGNORE_INDEX, Batch
from metrics import bits_per_byte, perplexity
from precision import Precision

# Logits alive at a time. At 22,812 words a CPU's step takes 1.49 s with 2**23, 1.63 s with 2**22 (small
# matrix products) and 1.54 s with 2**24 (out of cache). A GPU wants large matrix products.
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}


class TokenLoss(NamedTuple):
    """Sums over the tokens that bear loss; divide by `tokens` for means."""

    objective: Tensor  # () what is minimised, label smoothing included
    cross_entropy: Tensor  # () nats, never smoothed: perplexity and bits per byte come from this
    tokens: int
    top1: int  # tokens whose target had the largest logit; 0 unless ranks were asked for
    top5: int  # tokens whose target was among the five largest


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are made in forward, where each chunk of logits lives, and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, grad: bool, ranks: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden.dtype
        h, w = hidden.to(dtype), weight.to(dtype)
        grad_hidden = torch.empty_like(h) if grad and ctx.needs_input_grad[0] else None
        grad_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if grad and ctx.needs_input_grad[1] else None
        )
        sums = torch.zeros(2, device=device)
        hits = torch.zeros(2, dtype=torch.long, device=device)
        n = max(1, min(h.size(0), CHUNK_ELEMENTS[device.type] // w.size(0)))
        # The same memory for every chunk: fresh pages cost more than the arithmetic on them.
        logits_buffer = torch.empty(n, w.size(0), dtype=dtype, device=device)
        log_p_buffer = torch.empty(n, w.size(0), device=device)
        for start in range(0, h.size(0), n):
            rows, target = h[start : start + n], labels[start : start + n, None]
            logits = torch.mm(rows, w.t(), out=logits_buffer[: len(rows)])
            log_p = torch.log_softmax(logits, -1, torch.float32, out=log_p_buffer[: len(rows)])
            target_log_p = log_p.gather(1, target)
            if ranks:
                # Counted are those below: a tie, as in a constant output, and NaN are then no hit.
                above = log_p.size(1) - 1 - (log_p < target_log_p).sum(dim=1)
                hits += torch.stack(((above < 1).sum(), (above < 5).sum()))
            nll = -target_log_p.sum()
            smoothed = nll if smoothing == 0 else (1 - smoothing) * nll - smoothing * log_p.mean(dim=1).sum()
            sums += torch.stack((smoothed, nll))
            if grad_hidden is None and grad_weight is None:
                continue
            # The softmax, in place; minus the smoothed target below. Under e^-60, which is nothing beside 1,
            # denormal numbers begin to arise, and products with them took 5 times as long as a whole step.
            grad_logits = log_p.clamp_(min=-60.0).exp_()
            if smoothing:
                grad_logits -= smoothing / w.size(0)
            grad_logits.scatter_add_(1, target, grad_logits.new_full(target.shape, smoothing - 1))
            grad_logits = grad_logits.to(dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, w, out=grad_hidden[start : start + n])
            if grad_weight is not None and dtype == torch.float32:
                grad_weight.addmm_(grad_logits.t(), rows)
            elif grad_weight is not None:
                grad_weight += grad_logits.t() @ rows
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        cross_entropy = sums[1].clone()
        ctx.mark_non_differentiable(cross_entropy, hits)
        return sums[0].clone(), cross_entropy, hits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else (grad_hidden * grads[0]).to(ctx.dtypes[0]),
            None if grad_weight is None else (grad_weight * grads[0]).to(ctx.dtypes[1]),
            None,
            None,
            None,
            None,
        )


def token_loss(model: Decoder, batch: Batch, smoothing: float = 0.0, ranks: bool = False) -> TokenLoss:
    """Cross-entropy of a batch, summed over the tokens whose label is not IGNORE_INDEX.

    Args:
        model: Its head's weight is (V, C).
        batch: tokens, labels, document ids and positions, each (B, T).
        smoothing: Share of the target spread evenly over the vocabulary (arXiv:1512.00567). It changes the
            objective only, and masked tokens stay out of it.
        ranks: Count top-1 and top-5 hits too; one more pass over the logits.
    """
    hidden = model.hidden(batch.tokens, batch.positions, batch.document_ids).flatten(0, 1)
    labels = batch.labels.flatten()
    bears = labels != IGNORE_INDEX
    tokens = int(bears.sum())
    if tokens < labels.numel():
        hidden, labels = hidden[bears], labels[bears]
    objective, cross_entropy, hits = _ChunkedCrossEntropy.apply(
        hidden, model.head.weight, labels, smoothing, torch.is_grad_enabled(), ranks
    )
    top1, top5 = hits.tolist()
    return TokenLoss(objective, cross_entropy, tokens, top1, top5)


@dataclass(frozen=True)
class Scores:
    """Unsmoothed scores over the tokens that bore loss."""

    nats: float  # summed
    tokens: int
    top1: float  # share of tokens, 0 to 1
    top5: float

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return perplexity(self.nats, self.tokens)

    def bits_per_byte(self, n_bytes: int) -> float:
        """Over the UTF-8 bytes that the tokens stand for; comparable across tokenizers."""
        return bits_per_byte(self.nats, n_bytes)


@torch.no_grad()
def score(model: Decoder, batches: Iterable[Batch], precision: Precision) -> Scores:
    """Scores of `batches`, by the same function as training's loss, in eval mode; the mode is put back."""
    was_training, device = model.training, precision.device
    nats, tokens, top1, top5 = 0.0, 0, 0, 0
    model.eval()
    try:
        for batch in batches:
            with precision.autocast():
                loss = token_loss(model, Batch(*(t.to(device) for t in batch)), ranks=True)
            nats += loss.cross_entropy.item()
            tokens, top1, top5 = tokens + loss.tokens, top1 + loss.top1, top5 + loss.top5
    finally:
        model.train(was_training)
    if tokens == 0:
        raise ValueError(
            "no token of the validation data bears loss; it needs at least one file of two tokens"
        )
    return Scores(nats, tokens, top1 / tokens, top5 / tokens)
