"""The loss, one function for training and validation; all logits are never in memory at once.

With 22,812 words a batch of 4,096 tokens has 374 MB of fp32 logits; softmax, its gradient and their copies
each pass over them. Here logits exist for one chunk of tokens at a time: a chunk's loss and gradients are
computed while it is in cache, and only the gradients of the hidden states and of the head are kept.

In comments N is the number of targets, n of those in a chunk, V the vocabulary, C the width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from architecture import Decoder
from dataset import IGNORE_INDEX, Batch
from lora import LogitTerms
from metrics import bits_per_byte, perplexity
from modules.precision import Precision

# The memory of a chunk's logits and softmax. On a CPU, 256 tokens of 49,152 words, 2,048 wide, take 1.57
# times as long in bf16 with a quarter of it, 1.19 times with half of it, and 1.02 times with twice as much:
# each chunk packs the whole weight anew. A GPU wants large matrix products.
CHUNK_BYTES = {"cpu": 96 * 2**20, "cuda": 384 * 2**20}
# From this loss on, in nats, a softmax nears the end of fp32. log_softmax costs more time and is exact.
FAR = 80
# The smallest probability whose gradient is computed. Beside 1 it is nothing, but below 1e-38 numbers are
# denormal, and products with them took 5 times as long as a whole step.
LEAST_SOFTMAX = 1e-26


class TokenLoss(NamedTuple):
    """Sums over the targets, the tokens whose label is not IGNORE_INDEX; divide by `tokens` for means."""

    objective: Tensor  # () What is minimised, label smoothing and z-loss included.
    cross_entropy: Tensor  # () In nats and never smoothed: perplexity and bits per byte come from this.
    tokens: int
    nll: Tensor  # (tokens,) Nats of each target, in the labels' order; empty without `ranks`.
    target_rank: Tensor  # (tokens,) Other logits that are not below the target's: 0 is a hit. Likewise empty.

    @property
    def top1(self) -> int:
        """How many targets had the largest logit."""
        return int((self.target_rank < 1).sum())

    @property
    def top5(self) -> int:
        """How many targets were among the five largest logits."""
        return int((self.target_rank < 5).sum())


# --- the chunked cross-entropy -----------------------------------------------------------------------


class _Options(NamedTuple):
    smoothing: float
    z_loss: float
    needs_grad: bool
    ranks: bool


class _Head(NamedTuple):
    """All that the logits are made of: hidden weight^T + bias + u v^T + sum of factor * (input weight^T).

    The last two are an adapter's `lora.LogitTerms`. All but the bias are in the products' number format.
    """

    hidden: Tensor  # (N, C)
    weight: Tensor  # (V, C)
    bias: Tensor | None  # (V,)
    u: Tensor | None  # (N, k)
    v: Tensor | None  # (V, k)
    inputs: tuple[Tensor, ...]  # Each (N, C).
    factors: tuple[Tensor, ...]  # Each (V,).

    def chunk(self, rows: slice) -> _Head:
        """Return the head for a chunk of the tokens."""
        u = None if self.u is None else self.u[rows]
        return self._replace(hidden=self.hidden[rows], u=u, inputs=tuple(x[rows] for x in self.inputs))

    def logits(self, buffer: Tensor, products: list[Tensor]) -> Tensor:
        """Compute the logits (N, V) into a buffer, and the product of each input into its own."""
        torch.mm(self.hidden, self.weight.t(), out=buffer)
        if self.u is not None and self.v is not None:
            buffer.addmm_(self.u, self.v.t())
        for x, factor, product in zip(self.inputs, self.factors, products, strict=True):
            torch.mm(x, self.weight.t(), out=product)
            buffer.addcmul_(product, factor)
        if self.bias is not None:
            buffer += self.bias
        return buffer


class _Gradients(NamedTuple):
    """The gradients of a `_Head`, summed over chunks; None for what needs none."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    u: Tensor | None
    v: Tensor | None
    inputs: tuple[Tensor | None, ...]
    factors: tuple[Tensor | None, ...]

    @classmethod
    def empty(cls, head: _Head, given: Sequence[Tensor | None], needs: Sequence[bool]) -> _Gradients:
        """Return zeros in fp32 for sums over tokens, and memory in the products' format for the rest.

        Args:
            given: The tensors of the head as autograd knows them, in the order of `flat`.
            needs: Whether each needs a gradient.
        """

        def zeros(i: int) -> Tensor | None:
            t = given[i]
            return torch.zeros_like(t, dtype=torch.float32) if t is not None and needs[i] else None

        hidden = torch.empty_like(head.hidden) if needs[0] else None
        u = torch.empty_like(head.u) if head.u is not None and needs[3] else None
        first, last, end = 5, 5 + len(head.inputs), len(given)
        inputs, factors = (tuple(map(zeros, range(*ends))) for ends in ((first, last), (last, end)))
        return cls(hidden, zeros(1), zeros(2), u, zeros(4), inputs, factors)

    def chunk(self, rows: slice) -> _Gradients:
        """Return views of the gradients for a chunk of the tokens."""
        hidden, u = (None if t is None else t[rows] for t in (self.hidden, self.u))
        return self._replace(
            hidden=hidden, u=u, inputs=tuple(None if x is None else x[rows] for x in self.inputs)
        )

    def flat(self) -> tuple[Tensor | None, ...]:
        """Return them in the order in which autograd is given the tensors."""
        return (*self[:5], *self.inputs, *self.factors)

    def add(self, head: _Head, grad_logits: Tensor, products: list[Tensor]) -> None:
        """Add those of a chunk, by the gradient of its logits (n, V) in the format of the products."""
        if self.hidden is not None:
            torch.mm(grad_logits, head.weight, out=self.hidden)
        if self.weight is not None and grad_logits.dtype == torch.float32:
            self.weight.addmm_(grad_logits.t(), head.hidden)
        elif self.weight is not None:
            self.weight.add_(grad_logits.t() @ head.hidden)
        if self.u is not None and head.v is not None:
            torch.mm(grad_logits, head.v, out=self.u)
        if self.v is not None and head.u is not None:
            self.v.add_(grad_logits.t() @ head.u)
        for x, factor, own, product in zip(self.inputs, self.factors, head.factors, products, strict=True):
            if factor is not None:
                factor.add_(product.mul_(grad_logits).sum(dim=0, dtype=torch.float32))
            if x is not None:
                x.copy_(torch.mul(grad_logits, own, out=product) @ head.weight)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are made in forward, where each chunk of logits lives, and scaled in backward.

    The tensors after the options are u, v, inputs and factors of `lora.LogitTerms`, or none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: _Options,
        *added: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        device = hidden.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden.dtype
        u, v, *rest = [t.to(dtype) for t in added] or (None, None)
        n_inputs = len(rest) // 2
        head = _Head(
            hidden.to(dtype), weight.to(dtype), bias, u, v, tuple(rest[:n_inputs]), tuple(rest[n_inputs:])
        )
        given = (hidden, weight, bias, *(added or (None, None)))
        needs = ctx.needs_input_grad[:3] + (ctx.needs_input_grad[5:] or (False, False))
        grads = _Gradients.empty(head, given, [options.needs_grad and need for need in needs])
        needs_any = any(g is not None for g in grads.flat())
        ranked = len(labels) if options.ranks else 0
        all_nll = torch.empty(ranked, device=device)
        target_rank = torch.empty(ranked, dtype=torch.long, device=device)
        sums = torch.zeros(2, device=device)
        # The same memory for every chunk: fresh pages cost more than the arithmetic on them.
        n = tokens_of_a_chunk(len(labels), weight.size(0), dtype, device)
        logits_buffer = torch.empty(n, weight.size(0), dtype=dtype, device=device)
        softmax_buffer = torch.empty(n, weight.size(0), device=device)
        product_buffers = [torch.empty_like(logits_buffer) for _ in head.inputs]
        for start in range(0, len(labels), n):
            rows = slice(start, start + n)
            chunk, targets = head.chunk(rows), labels[rows, None]
            products = [buffer[: len(targets)] for buffer in product_buffers]
            logits = chunk.logits(logits_buffer[: len(targets)], products)
            softmax = _softmax(logits, softmax_buffer[: len(targets)])
            target_logits = logits.gather(1, targets)
            nll = _nll(logits, softmax, targets)
            if options.ranks:
                # Counted are those below: a tie, as in a constant output, and NaN are then no hit.
                target_rank[rows] = logits.size(1) - 1 - count_below(logits, target_logits)
                all_nll[rows] = nll[:, 0]
            log_sum = target_logits + nll
            sums += torch.stack((_objective(logits, nll, log_sum, options), nll.sum()))
            if needs_any:
                grad_logits = _grad_logits(softmax, targets, log_sum, options)
                if grads.bias is not None:
                    grads.bias.add_(grad_logits.sum(dim=0))
                if dtype != torch.float32:
                    grad_logits = logits.copy_(grad_logits)
                grads.chunk(rows).add(chunk, grad_logits, products)
        ctx.save_for_backward(*grads.flat())
        ctx.dtypes = tuple(None if t is None else t.dtype for t in given)
        ctx.n_added = len(added)
        cross_entropy = sums[1].clone()
        ctx.mark_non_differentiable(cross_entropy, all_nll, target_rank)
        return sums[0].clone(), cross_entropy, all_nll, target_rank

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if grad is None else (grad * grads[0]).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled[:3], None, None, *scaled[3 : 3 + ctx.n_added])


def tokens_of_a_chunk(tokens: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many tokens a chunk has, so that logits and softmax take CHUNK_BYTES at most.

    All chunks but the last are equal: a small one would pack the whole weight just as well.
    """
    most = max(1, CHUNK_BYTES[device.type] // (vocab_size * (4 + dtype.itemsize)))
    chunks = max(1, -(-tokens // most))
    return max(1, -(-tokens // chunks))


def _softmax(logits: Tensor, buffer: Tensor) -> Tensor:
    """Compute the softmax (n, V) in fp32 into a buffer."""
    # Made fp32 in place: softmax with another dtype makes a copy of all logits first.
    source = logits if logits.dtype == torch.float32 else buffer.copy_(logits)
    return torch.softmax(source, -1, out=buffer)


def _nll(logits: Tensor, softmax: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target, (n, 1) nats in fp32."""
    nll = -softmax.gather(1, targets).log()
    far = nll > FAR
    if far.any():
        chosen = far.squeeze(1)
        exact = torch.log_softmax(logits[chosen], -1, torch.float32).gather(1, targets[chosen])
        nll[chosen] = -exact
    return nll


def _objective(logits: Tensor, nll: Tensor, log_sum: Tensor, options: _Options) -> Tensor:
    """Return what is minimised, summed over a chunk.

    Args:
        log_sum: The logarithm of each row's sum of exp(logits), (n, 1).
    """
    objective = nll.sum()
    if options.smoothing:
        uniform = (log_sum - logits.mean(1, True, dtype=torch.float32)).sum()
        objective = (1 - options.smoothing) * objective + options.smoothing * uniform
    if options.z_loss:
        objective = objective + options.z_loss * log_sum.square().sum()
    return objective


def _grad_logits(softmax: Tensor, targets: Tensor, log_sum: Tensor, options: _Options) -> Tensor:
    """Return the gradient of the objective for the logits, (n, V) in fp32, in the memory of the softmax.

    It is the softmax, less the smoothed target, plus what z-loss adds.
    """
    grad = softmax.clamp_(min=LEAST_SOFTMAX)
    if options.z_loss:
        grad *= 1 + 2 * options.z_loss * log_sum
    if options.smoothing:
        grad -= options.smoothing / grad.size(1)
    return grad.scatter_add_(1, targets, grad.new_full(targets.shape, options.smoothing - 1))


def count_below(logits: Tensor, targets: Tensor) -> Tensor:
    """Count, for each row of the logits (n, V), those that are less than its target's (n, 1); int64 (n,).

    A few rows at a time on a CPU, where torch makes int64 of all that it sums: at once they took four times
    as long, and as much memory as all else of a validation.
    """
    n = 16 if logits.device.type == "cpu" else len(logits)
    pairs = zip(logits.split(n), targets.split(n), strict=True)
    return torch.cat([(rows < target).sum(dim=1) for rows, target in pairs])


# --- of a batch, and of many -------------------------------------------------------------------------


def token_loss(
    model: Decoder, batch: Batch, smoothing: float = 0.0, z_loss: float = 0.0, ranks: bool = False
) -> TokenLoss:
    """Return the cross-entropy of a batch, summed over the tokens whose label is not IGNORE_INDEX.

    Args:
        model: Its head's weight is (V, C), and its bias, if any, (V). A head with adapters says what they add
            to the logits by `terms(hidden)`, a `lora.LogitTerms` or None.
        batch: Tokens, labels, document ids and positions, each (B, T).
        smoothing: Share of the target spread evenly over the vocabulary (arXiv:1512.00567). It changes the
            objective only, and masked tokens stay out of it.
        z_loss: Weight of the squared log of the softmax's denominator (arXiv:2204.02311), likewise.
        ranks: Rank each target too, by one more pass over the logits, and give the nats of each.
    """
    hidden = model.hidden(batch.tokens, batch.positions, batch.document_ids).flatten(0, 1)
    labels = batch.labels.flatten()
    is_target = labels != IGNORE_INDEX
    tokens = int(is_target.sum())
    if tokens < labels.numel():
        hidden, labels = hidden[is_target], labels[is_target]
    terms_of = getattr(model.head, "terms", None)
    terms: LogitTerms | None = None if terms_of is None else terms_of(hidden)
    added = () if terms is None else (terms.u, terms.v, *terms.inputs, *terms.factors)
    options = _Options(smoothing, z_loss, torch.is_grad_enabled(), ranks)
    objective, cross_entropy, nll, target_rank = _ChunkedCrossEntropy.apply(
        hidden, model.head.weight, model.head.bias, labels, options, *added
    )
    return TokenLoss(objective, cross_entropy, tokens, nll, target_rank)


@dataclass(frozen=True)
class TokenScores:
    """Unsmoothed scores over the targets."""

    nats: float  # The negative log-likelihood of all targets.
    tokens: int  # The number of targets.
    top1: float  # Share of the targets, 0 to 1.
    top5: float

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return perplexity(self.nats, self.tokens)

    def bits_per_byte(self, n_bytes: int) -> float:
        """Return the bits over the UTF-8 bytes of the targets, which compare across tokenizers."""
        return bits_per_byte(self.nats, n_bytes)


class BatchSums(NamedTuple):
    """Sums over the targets of one batch, which has none where all of it is padding."""

    nats: float
    tokens: int
    top1: int  # Targets that had the largest logit.
    top5: int


def score(
    model: Decoder,
    batches: Iterable[Batch],
    precision: Precision,
    on_batch: Callable[[Batch, Tensor, Tensor], None] = lambda batch, nll, target_rank: None,
) -> TokenScores:
    """Score batches by the same function as training's loss, in eval mode; the mode is put back.

    Args:
        on_batch: Called after each batch with the `nll` and the `target_rank` of its TokenLoss.

    Raises:
        ValueError: No token is a target.
    """
    return total(sums_of_batches(model, batches, precision, on_batch))


@torch.no_grad()
def sums_of_batches(
    model: Decoder,
    batches: Iterable[Batch],
    precision: Precision,
    on_batch: Callable[[Batch, Tensor, Tensor], None] = lambda batch, nll, target_rank: None,
) -> list[BatchSums]:
    """Return the sums of each batch; the arguments are those of `score`."""
    was_training, device = model.training, precision.device
    sums = []
    model.eval()
    try:
        for batch in batches:
            with precision.autocast():
                loss = token_loss(model, Batch(*(t.to(device) for t in batch)), ranks=True)
            on_batch(batch, loss.nll, loss.target_rank)
            sums.append(BatchSums(loss.cross_entropy.item(), loss.tokens, loss.top1, loss.top5))
    finally:
        model.train(was_training)
    return sums


def total(sums: Iterable[BatchSums]) -> TokenScores:
    """Return the scores over all batches, which are added one after another.

    Raises:
        ValueError: No token is a target.
    """
    nats, tokens, top1, top5 = 0.0, 0, 0, 0
    for batch in sums:
        nats, tokens, top1, top5 = (
            nats + batch.nats,
            tokens + batch.tokens,
            top1 + batch.top1,
            top5 + batch.top5,
        )
    if tokens == 0:
        raise ValueError(
            "no token of the validation data is a target; it needs at least one file of two tokens"
        )
    return TokenScores(nats, tokens, top1 / tokens, top5 / tokens)
