"""The loss, one function for training and validation; all logits are never held at once.

With 22,812 words a batch of 4,096 tokens has 374 MB of fp32 logits; softmax, its gradient and their copies
each pass over them. Here logits exist for one chunk of tokens at a time: a chunk's loss and gradients are
computed while it is in cache, and only the gradients of the hidden states and of the head are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from architecture import Decoder
from dataset import IGNORE_INDEX, Batch
from metrics import bits_per_byte, perplexity
from modules.precision import Precision

# Of logits and their softmax alive at a time. On a CPU 256 tokens of 49,152 words, 2,048 wide, take 1.57
# times as long in bf16 with a quarter of it, 1.19 times with half of it, and 1.02 times with twice as much:
# each chunk packs the whole weight anew. A GPU wants large matrix products.
CHUNK_BYTES = {"cpu": 96 * 2**20, "cuda": 384 * 2**20}


class TokenLoss(NamedTuple):
    """Sums over the tokens that bear loss; divide by `tokens` for means."""

    objective: Tensor  # () what is minimised, label smoothing and z-loss included
    cross_entropy: Tensor  # () nats, never smoothed: perplexity and bits per byte come from this
    tokens: int
    nats: Tensor  # (tokens,) of each of them, in the order of the labels; none unless ranks were asked for
    above: Tensor  # (tokens,) logits that are not below the target's, likewise: 0 is a hit

    @property
    def top1(self) -> int:
        """Tokens whose target had the largest logit."""
        return int((self.above < 1).sum())

    @property
    def top5(self) -> int:
        """Tokens whose target was among the five largest."""
        return int((self.above < 5).sum())


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are made in forward, where each chunk of logits lives, and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        smoothing: float,
        z_loss: float,
        grad: bool,
        ranks: bool,
        u: Tensor | None = None,
        v: Tensor | None = None,
        *again: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        device = hidden.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden.dtype
        h, w = hidden.to(dtype), weight.to(dtype)
        grad_hidden = torch.empty_like(h) if grad and ctx.needs_input_grad[0] else None
        grad_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if grad and ctx.needs_input_grad[1] else None
        )
        grad_bias = (
            torch.zeros_like(bias, dtype=torch.float32)
            if bias is not None and grad and ctx.needs_input_grad[2]
            else None
        )
        grad_u = grad_v = pair = None
        if u is not None and v is not None:
            pair = u.to(dtype), v.to(dtype)
            grad_u = torch.empty_like(pair[0]) if grad and ctx.needs_input_grad[8] else None
            grad_v = torch.zeros_like(v, dtype=torch.float32) if grad and ctx.needs_input_grad[9] else None
        inputs, factors = ([t.to(dtype) for t in again[first::2]] for first in (0, 1))
        grad_again = [
            None if not (grad and ctx.needs_input_grad[10 + i]) else torch.zeros_like(t, dtype=torch.float32)
            for i, t in enumerate(again)
        ]
        sums = torch.zeros(2, device=device)
        nats = torch.empty(h.size(0) if ranks else 0, device=device)
        above = torch.empty(h.size(0) if ranks else 0, dtype=torch.long, device=device)
        a_token = w.size(0) * (4 + dtype.itemsize)
        chunks = -(-h.size(0) // max(1, CHUNK_BYTES[device.type] // a_token))
        n = max(1, -(-h.size(0) // max(1, chunks)))  # alike, since a small one packs the weight just as well
        # The same memory for every chunk: fresh pages cost more than the arithmetic on them.
        logits_buffer = torch.empty(n, w.size(0), dtype=dtype, device=device)
        softmax_buffer = torch.empty(n, w.size(0), device=device)
        again_buffers = [torch.empty_like(logits_buffer) for _ in inputs]
        for start in range(0, h.size(0), n):
            rows, target = h[start : start + n], labels[start : start + n, None]
            logits = torch.mm(rows, w.t(), out=logits_buffer[: len(rows)])
            if pair is not None:
                logits.addmm_(pair[0][start : start + n], pair[1].t())
            for x, factor, buffer in zip(inputs, factors, again_buffers, strict=True):
                torch.mm(x[start : start + n], w.t(), out=buffer[: len(rows)])
                logits.addcmul_(buffer[: len(rows)], factor)
            if bias is not None:
                logits += bias
            # Made fp32 in place: softmax with another dtype makes a copy of all logits first.
            softmax = softmax_buffer[: len(rows)]
            of = logits if dtype == torch.float32 else softmax.copy_(logits)
            torch.softmax(of, -1, out=softmax)
            target_logit = logits.gather(1, target)
            nll = -softmax.gather(1, target).log()
            far = nll > 80  # where the softmax nears the end of fp32; log_softmax costs more and is exact
            if far.any():
                chosen = far.squeeze(1)
                exact = torch.log_softmax(logits[chosen], -1, torch.float32).gather(1, target[chosen])
                nll[chosen] = -exact
            if ranks:
                # Counted are those below: a tie, as in a constant output, and NaN are then no hit.
                above[start : start + n] = w.size(0) - 1 - count_below(logits, target_logit)
                nats[start : start + n] = nll[:, 0]
            total = objective = nll.sum()
            log_sum = target_logit + nll  # of the exponentials: (n, 1)
            if smoothing:
                uniform = (log_sum - logits.mean(1, True, dtype=torch.float32)).sum()
                objective = (1 - smoothing) * total + smoothing * uniform
            if z_loss:
                objective = objective + z_loss * log_sum.square().sum()
            sums += torch.stack((objective, total))
            if all(g is None for g in (grad_hidden, grad_weight, grad_bias, grad_u, grad_v, *grad_again)):
                continue
            # Minus the smoothed target, the softmax is the gradient. Beside 1, 1e-26 is nothing, but below
            # 1e-38 numbers are denormal, and products with them took 5 times as long as a whole step.
            grad_logits = softmax.clamp_(min=1e-26)
            if z_loss:
                grad_logits *= 1 + 2 * z_loss * log_sum
            if smoothing:
                grad_logits -= smoothing / w.size(0)
            grad_logits.scatter_add_(1, target, grad_logits.new_full(target.shape, smoothing - 1))
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0)
            if dtype != torch.float32:
                grad_logits = logits.copy_(grad_logits)
            if grad_hidden is not None:
                torch.mm(grad_logits, w, out=grad_hidden[start : start + n])
            if grad_weight is not None and dtype == torch.float32:
                grad_weight.addmm_(grad_logits.t(), rows)
            elif grad_weight is not None:
                grad_weight += grad_logits.t() @ rows
            if pair is not None and grad_u is not None:
                torch.mm(grad_logits, pair[1], out=grad_u[start : start + n])
            if pair is not None and grad_v is not None:
                grad_v += grad_logits.t() @ pair[0][start : start + n]
            for i, (factor, buffer) in enumerate(zip(factors, again_buffers, strict=True)):
                grad_x, grad_factor = grad_again[2 * i : 2 * i + 2]
                if grad_factor is not None:
                    grad_factor += buffer[: len(rows)].mul_(grad_logits).sum(dim=0, dtype=torch.float32)
                if grad_x is not None:
                    grad_x[start : start + n] = torch.mul(grad_logits, factor, out=buffer[: len(rows)]) @ w
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, grad_u, grad_v, *grad_again)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (hidden, weight, bias, u, v, *again))
        cross_entropy = sums[1].clone()
        ctx.mark_non_differentiable(cross_entropy, nats, above)
        return sums[0].clone(), cross_entropy, nats, above

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if grad is None else (grad * grads[0]).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled[:3], None, None, None, None, None, *scaled[3:])


def count_below(logits: Tensor, targets: Tensor) -> Tensor:
    """(n,) how many of a row's logits (n, V) are less than its target's (n, 1).

    A few rows at a time on a CPU, where torch makes int64 of all that it sums: at once they took four times
    as long, and as much memory as all else of a validation.
    """
    n = 16 if logits.device.type == "cpu" else len(logits)
    pairs = zip(logits.split(n), targets.split(n), strict=True)
    return torch.cat([(rows < target).sum(dim=1) for rows, target in pairs])


def token_loss(
    model: Decoder, batch: Batch, smoothing: float = 0.0, z_loss: float = 0.0, ranks: bool = False
) -> TokenLoss:
    """Cross-entropy of a batch, summed over the tokens whose label is not IGNORE_INDEX.

    Args:
        model: Its head's weight is (V, C), and its bias, if any, (V). A head with adapters says by
            `terms(hidden)` what they add to the logits: u (N, k) and v (V, k), u v^T, and then pairs of
            x (N, C) and f (V), f * (x weight^T).
        batch: tokens, labels, document ids and positions, each (B, T).
        smoothing: Share of the target spread evenly over the vocabulary (arXiv:1512.00567). It changes the
            objective only, and masked tokens stay out of it.
        z_loss: Weight of the squared log of the softmax's denominator (arXiv:2204.02311), likewise.
        ranks: Rank each token's target too, by one more pass over the logits, and give each token's nats.
    """
    hidden = model.hidden(batch.tokens, batch.positions, batch.document_ids).flatten(0, 1)
    labels = batch.labels.flatten()
    bears = labels != IGNORE_INDEX
    tokens = int(bears.sum())
    if tokens < labels.numel():
        hidden, labels = hidden[bears], labels[bears]
    terms = getattr(model.head, "terms", None)
    added = terms(hidden) if terms is not None else ()
    objective, cross_entropy, nats, above = _ChunkedCrossEntropy.apply(
        hidden,
        model.head.weight,
        model.head.bias,
        labels,
        smoothing,
        z_loss,
        torch.is_grad_enabled(),
        ranks,
        *added,
    )
    return TokenLoss(objective, cross_entropy, tokens, nats, above)


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
def score(
    model: Decoder,
    batches: Iterable[Batch],
    precision: Precision,
    seen: Callable[[Batch, Tensor, Tensor], None] = lambda batch, nats, above: None,
) -> Scores:
    """Scores of `batches`, by the same function as training's loss, in eval mode; the mode is put back.

    Args:
        seen: Called after each batch with the nats of each of its tokens that bear loss, in order, and how
            many logits were not below its target's.
    """
    was_training, device = model.training, precision.device
    nats, tokens, top1, top5 = 0.0, 0, 0, 0
    model.eval()
    try:
        for batch in batches:
            with precision.autocast():
                loss = token_loss(model, Batch(*(t.to(device) for t in batch)), ranks=True)
            nats += loss.cross_entropy.item()
            seen(batch, loss.nats, loss.above)
            tokens, top1, top5 = tokens + loss.tokens, top1 + loss.top1, top5 + loss.top5
    finally:
        model.train(was_training)
    if tokens == 0:
        raise ValueError(
            "no token of the validation data bears loss; it needs at least one file of two tokens"
        )
    return Scores(nats, tokens, top1 / tokens, top5 / tokens)
