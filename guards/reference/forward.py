"""The forward pass of the run's own model against the reference, stage by stage, and its losses.

A fresh model hides nearly everything: its last matrices are zero, its norms one. So what trains is first
filled with random numbers, and put back afterwards bit for bit. A block is then computed again from what the
run itself put into it, so that a difference is seen where it is made and no error is carried on.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from adapters.layers import LowRank
from config import ModelConfig
from dataset import Batch
from guards.reference.comparison import Comparison, Differs, relative_difference
from guards.reference.mistakes import Explanations, Inputs, in_block, in_embedding, in_norm
from guards.reference.observed import Seen, observed, run_weights
from guards.subject import GuardSubject, is_large, scales_of_adapters
from modules.dropout import Dropout
from reference.forward import (
    Rows,
    block,
    embedding,
    head,
    is_sure,
    next_tokens,
    nll_of,
    norm,
    objective_of,
)

TOKENS = 40  # Of a row: two documents of different lengths, and rotations that are some turns apart.
WIDEST_WINDOW = 256  # A row is made longer than a sliding window of up to so many tokens.
FARTHEST = 1024  # Positions up to here are compared: the angles of later ones are too coarse in fp32.
HEAD_WORDS = 4096  # Of a large model, the logits of so many words are compared.
STEP32 = torch.finfo(torch.float32).eps  # Of the sums, whatever the format of the products.


@dataclass(frozen=True)
class Pass:
    """One forward pass of the run that is compared.

    Args:
        where: What the names of its stages begin with.
        dtype: The number format of its products.
        batch: What the run read; `rows` is the same for the reference.
        seen: What the modules noted.
    """

    where: str
    dtype: torch.dtype
    batch: Batch
    rows: Rows
    seen: Seen


class ForwardComparison:
    """The comparison of one run's forward passes.

    Args:
        layers: The blocks that are looked into.
    """

    def __init__(self, subject: GuardSubject, comparison: Comparison, layers: set[int]):
        self.subject, self.comparison, self.layers = subject, comparison, layers
        self.model, self.config = subject.model, subject.config.model
        self.large = is_large(subject.model)
        lazily = run_weights(subject)
        self.run_weights = lazily
        # The steps of the formats in which parameters are stored.
        self.stored = max(torch.finfo(p.dtype).eps for p in self.model.parameters())
        self.weights: Mapping[str, Tensor] = lazily if self.large else dict(lazily)

    def row(self, kind: str, rows: Rows) -> None:
        """Compare one row in full precision, as validation computes it, and as training does."""
        batch = Batch(rows.tokens, next_tokens(rows), rows.documents, rows.positions)
        batch = Batch(*(t.to(self.subject.precision.device) for t in batch))
        subject, eval_format = self.subject, self.subject.eval_precision.dtype
        self.model.eval()
        if all(p.dtype == torch.float32 for p in self.model.parameters()):
            self.comparison.begin("forward")
            with torch.no_grad(), observed(self.model, self.layers) as seen:
                hidden = self.model.hidden(batch.tokens, batch.positions, batch.document_ids)
            self.stages(Pass(f"{kind}, ", torch.float32, batch, rows, seen))
            self.logits(Pass(f"{kind}, ", torch.float32, batch, rows, seen), hidden)
        self.begin_in(eval_format)
        with observed(self.model, self.layers) as seen:
            scores = subject.score([batch])
        validation = Pass(f"{kind} in validation, ", eval_format, batch, rows, seen)
        if eval_format != torch.float32:
            self.stages(validation)
        self.scores(validation, scores.nats, scores.tokens)
        self.model.train()
        with nothing_dropped(self.model), torch.set_grad_enabled(not self.large):
            with observed(self.model, self.layers) as seen:
                loss = subject.loss(batch)
            if loss.objective.requires_grad:  # Else the graph would be kept, which holds what it saved.
                trained = [p for p in self.model.parameters() if p.requires_grad]
                torch.autograd.grad(loss.objective, trained, allow_unused=True)
        self.begin_in(subject.precision.dtype)
        training = Pass(f"{kind} in training, ", subject.precision.dtype, batch, rows, seen)
        self.stages(training)
        self.losses(training, loss.objective, loss.cross_entropy, loss.tokens)

    def begin_in(self, dtype: torch.dtype) -> None:
        """Begin a part of its own for each number format, whose agreement is told apart."""
        short = "" if dtype == torch.float32 else f" in {str(dtype).removeprefix('torch.')}"
        self.comparison.begin(f"forward{short}")

    # --- stages -------------------------------------------------------------------------------------

    def stages(self, run: Pass) -> None:
        """Compare embedding, blocks and last norm of one pass."""
        first = embedding(self.config, self.weights, run.rows)
        tolerance = self.rounding(run, 2) + _of_angles(self.config.position == "sinusoidal", run.rows)
        explain = partial(in_embedding, self.config, self.weights, run.rows, first)
        self.stage(run, "block 0, input", first, tolerance, explain)
        for layer in range(self.config.n_layer):
            if layer:
                self.handed_on(run, f"block {layer - 1}, residual", f"block {layer}, input")
            if layer in self.layers:
                self.block(run, layer)
        last = f"block {self.config.n_layer - 1}, residual"
        self.handed_on(run, last, "last norm's input")
        x = self.one(run, last).double().cpu()
        explain = partial(in_norm, self.config, self.weights, "norm", x)
        normed = norm(self.config, self.weights, "norm", x)
        self.stage(run, "last norm", normed, self.rounding(run, 3), explain)

    def block(self, run: Pass, layer: int) -> None:
        """Compare every stage of a block that can be observed."""
        x = self.one(run, f"block {layer}, input").double().cpu()
        inputs = Inputs(self.config, self.weights, layer, x, run.rows)
        scores, sharpened, sure = 0.0, 1.0, torch.tensor(True)
        for number, (stage, expected) in enumerate(block(*vars(inputs).values()).items()):
            name = f"block {layer}, {stage}"
            if stage == "keys":
                scores = _largest_score(self.one(run, f"block {layer}, queries"), expected)
            if stage in ("queries projected", "keys projected") and self.config.qk_norm:
                sharpened = max(sharpened, _sharpened(self.config, expected))
            tolerance = self.rounding(run, number + 2, scores) * sharpened
            tolerance += _of_angles(stage in ("queries", "keys"), run.rows)
            if stage == "MLP norm" and self.config.n_experts:
                sure = is_sure(self.config, self.weights, f"blocks.{layer}.mlp", expected, tolerance)
            elif stage in ("MLP output", "residual") and self.config.n_experts and name in run.seen.calls:
                # Where two experts are nearly equally good, rounding decides which of them a token gets.
                expected = expected.where(sure, self.one(run, name).double().cpu())
            if name in run.seen.calls:
                self.stage(run, name, expected, tolerance, partial(in_block, inputs, stage, expected))

    def stage(
        self,
        run: Pass,
        name: str,
        expected: Tensor,
        tolerance: float,
        explain: Callable[[], Explanations],
    ) -> None:
        """Compare what was noted of a stage; `explain` is only called where it differs."""
        found = self.one(run, name)
        if found.numel() == expected.numel():  # (B, T, H D) and (B, T, H, D) are one.
            found = found.reshape(expected.shape)
        explanations = None if agrees(found, expected, tolerance) else likeliest(found, expected, explain())
        self.comparison.close(run.where + name, found, expected, tolerance, REMEDY, explanations)

    def handed_on(self, run: Pass, given: str, taken: str) -> None:
        """Compare what one module gave with what the next one took, bit for bit."""
        if not torch.equal(self.one(run, given), self.one(run, taken)):
            what = f"it is not what {given} was"
            raise Differs(run.where + taken, what, "look for a layer that is skipped, or for what is between")

    def one(self, run: Pass, noted: str) -> Tensor:
        """Return what was noted under a name, which must have been computed once."""
        calls = run.seen.calls.get(noted, [])
        if len(calls) != 1:
            what = f"it was computed {len(calls)} times instead of once"
            raise Differs(run.where + noted, what, "look for a layer that is skipped or run twice")
        return calls[0]

    def rounding(self, run: Pass, roundings: int, scores: float = 0.0) -> float:
        """Return by how much a stage may differ, relative to its largest number.

        Every operation rounds once in the format of the products, and its sum of n numbers in fp32 by a
        quarter of sqrt(n) steps. Independent errors add as squares. An error of the scores, which is
        relative to the largest of them, becomes a relative one of the softmax.
        """
        n = max(self.config.n_embd, self.config.n_inner, self.config.n_head * self.config.head_dim)
        one = max(torch.finfo(run.dtype).eps, self.stored) + STEP32 * math.sqrt(n) / 4
        return 2 * one * (math.sqrt(roundings) + scores)

    # --- logits and losses --------------------------------------------------------------------------

    def logits(self, run: Pass, hidden: Tensor) -> None:
        """Compare the logits of the model; of a large one those of some words."""
        with torch.no_grad():
            found = self.model.head(hidden)
        weights = self.weights
        if self.large:
            names = [name for name in ("head.weight", "head.bias") if name in self.run_weights]
            weights = {name: self.run_weights.part(name, slice(HEAD_WORDS)) for name in names}
            found = found[..., :HEAD_WORDS]
        expected = head(self.config, weights, self.one(run, "last norm").double().cpu())
        self.comparison.close(f"{run.where}logits", found, expected, self.rounding(run, 3), REMEDY)

    def expected_logits(self, run: Pass) -> Tensor:
        """Return the logits from the last norm; those of a large model are its own, which were compared."""
        hidden = self.one(run, "last norm")
        if not self.large:
            return head(self.config, self.weights, hidden.double().cpu())
        with torch.no_grad():
            hidden = self.model.to_head(hidden.to(self.model.embed.weight.dtype))
            return self.model.head(hidden).double().cpu()

    def scores(self, run: Pass, nats: float, tokens: int) -> None:
        """Compare the sum of the nats of validation."""
        labels = next_tokens(run.rows)
        self.comparison.exact(f"{run.where}number of targets", tokens, int((labels >= 0).sum()), REMEDY)
        logits = self.expected_logits(run)
        self.close_sum(run, "loss", torch.tensor(nats), nll_of(logits, labels).sum(), logits, tokens)

    def losses(self, run: Pass, objective: Tensor, cross_entropy: Tensor, tokens: int) -> None:
        """Compare what training minimises, and the loss that it reports."""
        labels, optimizer = next_tokens(run.rows), self.subject.config.optimizer
        self.comparison.exact(f"{run.where}number of targets", tokens, int((labels >= 0).sum()), REMEDY)
        logits = self.expected_logits(run)
        self.close_sum(run, "loss", cross_entropy, nll_of(logits, labels).sum(), logits, tokens)
        minimised = objective_of(logits, labels, optimizer.label_smoothing, optimizer.z_loss)
        self.close_sum(run, "objective", objective, minimised, logits, tokens)

    def close_sum(
        self, run: Pass, name: str, found: Tensor, expected: Tensor, logits: Tensor, tokens: int
    ) -> None:
        """Compare a sum over targets, each of which may be off by what its logits are."""
        largest = float(logits.abs().amax())
        off = self.rounding(run, 3) * tokens * (1 + largest)
        tolerance = off * (1 + 2 * self.subject.config.optimizer.z_loss * largest) / float(expected.abs())
        self.comparison.close(run.where + name, found, expected, tolerance, REMEDY)


REMEDY = "compare the code of this stage with reference/forward.py"


def agrees(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return whether two tensors are of one shape and differ by no more than rounding."""
    if found.shape != expected.shape:
        return False
    return relative_difference(found.detach().double().cpu(), expected) <= tolerance


def likeliest(found: Tensor, expected: Tensor, explanations: Explanations) -> Explanations:
    """Return the mistake that comes nearest to what was found, if it explains nine tenths of it."""
    if found.shape != expected.shape:
        return {}
    found = found.detach().double().cpu()
    off = {meaning: relative_difference(found, derive()) for meaning, derive in explanations.items()}
    off = {
        meaning: value for meaning, value in off.items() if value <= relative_difference(found, expected) / 10
    }
    return {meaning: explanations[meaning] for meaning in sorted(off, key=off.__getitem__)[:1]}


def _of_angles(has_angles: bool, rows: Rows) -> float:
    """Return by how much sines and cosines differ: an angle in fp32 is off by a step of its own size."""
    return 2 * STEP32 * float(rows.positions.max()) if has_angles else 0.0


def _sharpened(config: ModelConfig, projected: Tensor) -> float:
    """Return by how much norms of queries or keys (B, T, H, D) raise a difference, relative to the largest.

    A projection is rounded relative to its largest numbers. A head whose numbers are small, or with
    LayerNorm nearly equal, is divided by little.
    """
    centred = projected - projected.mean(-1, keepdim=True) * (config.norm == "layer")
    deviation = (centred.square().mean(-1) + config.norm_eps).sqrt()
    return max(1.0, float(projected.abs().amax() / deviation.amin()) / math.sqrt(config.head_dim))


def _largest_score(queries: Tensor, keys: Tensor) -> float:
    """Return a bound of the attention scores: |q| |k| / sqrt(D) of the longest query and key."""
    lengths = [x.double().square().sum(-1).amax().sqrt() for x in (queries, keys)]
    return float(lengths[0] * lengths[1]) / math.sqrt(queries.size(-1))


def compare(subject: GuardSubject, comparison: Comparison) -> None:
    """Compare embedding, blocks, head and losses of the model that will train with the reference."""
    n = len(subject.model.blocks)
    layers = set(range(n))
    if is_large(subject.model):
        layers = {0, int(torch.randint(n, ())), n - 1}
        others = "the inside of the blocks other than " + ", ".join(map(str, sorted(layers)))
        comparison.leave_out(others, "the model is large")
    with scrambled(subject, layers):
        comparing = ForwardComparison(subject, comparison, layers)
        for kind, rows in rows_of(subject, comparison).items():
            comparing.row(kind, rows)


def rows_of(subject: GuardSubject, comparison: Comparison) -> dict[str, Rows]:
    """Return the rows that are compared: one document, and two that are packed; ids are random."""
    config = subject.config.model
    length = min(TOKENS, subject.config.row_length)
    window = config.sliding_window
    if 0 < window < subject.config.row_length:
        if window <= WIDEST_WINDOW and not is_large(subject.model):
            length = max(length, min(window + 8, subject.config.row_length))
        elif window >= length:
            comparison.leave_out(f"the sliding window of {window}", f"the rows compared have {length} tokens")
    first = max(1, 3 * length // 5)
    tokens = torch.randint(config.vocab_size, (1, length))
    counted = torch.arange(length)
    packed = torch.where(counted < first, counted, counted - first)[None]
    rows = {"packed row": Rows(tokens, packed, (counted >= first).long()[None])}
    if not is_large(subject.model):
        last = min(config.block_size, FARTHEST) - length
        reaches = config.position == "rotary" and config.rope_scaling != "none"
        late = counted[None] + max(0, last) * reaches
        rows["row"] = Rows(tokens.flip(1), late, torch.zeros_like(tokens))
    if config.rotates_by_length and config.rope_context < FARTHEST:
        counted = counted[None] + config.rope_context
        rows["row past the first context"] = Rows(tokens, counted, torch.zeros_like(tokens))
    return rows


@contextlib.contextmanager
def nothing_dropped(model: nn.Module) -> Iterator[None]:
    """Let dropout drop nothing, so that a model in training mode can be compared."""
    before = {module: module.p for module in model.modules() if isinstance(module, Dropout | LowRank)}
    try:
        for module in before:
            module.p = 0.0
        yield
    finally:
        for module, p in before.items():
            module.p = p


@contextlib.contextmanager
def scrambled(subject: GuardSubject, layers: set[int]) -> Iterator[None]:
    """Fill what trains with random numbers that hide nothing; put weights and modes back bit for bit.

    Of a large model whose own weights train, only what lies in the chosen blocks, and vectors.
    """
    model = subject.model
    modes = {module: module.training for module in model.modules()}
    inside, is_small = tuple(f"blocks.{layer}." for layer in layers), not is_large(model)
    chosen = {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and (is_small or p.dim() < 2 or name.startswith(inside))
    }
    before, scales = {name: p.detach().clone() for name, p in chosen.items()}, scales_of_adapters(model)
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    try:
        with torch.no_grad():
            for name, p in chosen.items():
                p.copy_(_scrambled(name, p, generator) / scales.get(p, 1.0))
        yield
    finally:
        with torch.no_grad():
            for name, p in chosen.items():
                p.copy_(before[name])
        for module, training in modes.items():
            module.training = training


def _scrambled(name: str, p: Tensor, generator: torch.Generator) -> Tensor:
    """Return random numbers in the place of a parameter.

    Matrices keep the size of what they multiply. Embeddings are small, so that a norm's epsilon shows beside
    them; lengths of DoRA and other vectors stay near what they are.
    """
    noise = torch.randn(p.shape, generator=generator)
    if p.dim() < 2:
        return p.detach().cpu() * (1 + 0.2 * noise) + 0.1 * noise.flip(0)
    if "embed" in name.split(".")[0] or name.startswith("position"):
        return 0.05 * noise
    return noise * p.size(-1) ** -0.5
