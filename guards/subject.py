"""The subject of a guard: what is about to train, and the means to look at it without leaving a trace.

A guard takes a `GuardSubject`, the very objects that will train, and yields a `Fault` for each thing that is
wrong and a string for each thing worth printing. It leaves weights, modes and random states as it found them,
so that a run with guards equals one without them bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from adapters.layers import LowRank
from architecture import Decoder
from config import Config
from data.documents import Document
from data.tokenstore import TokenStore
from dataset import IGNORE_INDEX, Batch, Batches, micro_batches_of
from guards.faults import Fault
from modules.precision import Precision
from modules.quantized_linear import n_weights
from tokenizer import Tokenizer
from training.distributed import ALONE, World
from training.loss import TokenLoss, TokenScores
from training.random_state import seed_torch
from training.state import RunState

PASS_ELEMENTS = 3e10  # Parameters x tokens of a forward pass: 0.3 s on two cores.
SHORTEST_PASS = 16  # Tokens.
LARGE = 3e8  # Weights: of a model with more, a guard looks at a part.
# The least share of the usual size of a matrix's numbers that bf16 keeps beside them: half of its step.
LEAST = 2**-8


@dataclass(frozen=True)
class GuardSubject:
    """A run that is about to train. Its functions are the very ones that training calls."""

    config: Config
    model: Decoder
    tokenizer: Tokenizer
    train: TokenStore
    validation: TokenStore
    test: TokenStore  # The validation store, where there is no such split.
    first_documents: tuple[Document, ...]  # Of training, as they were read, in the order of `train`.
    micro_batch: Callable[[int], Batch]  # A batch of training by number, on the device, as the model gets it.
    batches: Batches  # The source of `micro_batch`.
    validation_batches: Callable[[int], Iterable[Batch]]  # As many of validation, spread evenly.
    loss: Callable[[Batch], TokenLoss]  # The loss of training, label smoothing included.
    score: Callable[[Iterable[Batch]], TokenScores]  # The scores of validation.
    precision: Precision
    eval_precision: Precision
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler  # Its scale multiplies all gradients until they are clipped.
    state: RunState  # The counters, of which the step chooses the data and the learning rate.
    set_rates: Callable[[float], None]  # Sets the rates of the next update, at a share of the budget.
    progress: Callable[[], float]  # The share of the budget that is used.
    update: Callable[[], dict[str, float]]  # Makes the run's next update, and returns what is logged of it.
    # The same, on these micro-batches and at a share of the budget.
    update_on: Callable[[list[Batch], float], dict[str, float]]
    folder: Path  # Of the run.
    start: str  # "fresh" weights, "loaded" ones, or "resumed" ones.
    targets_per_byte: float  # Of validation: with it bits per byte are made of the loss.
    known_ids: int | None = None  # The size of the base's own tokenizer; None without a base.
    base_folder: Path | None = None  # The files of the base, on this machine; None without a base.
    checkpoint: Path | None = None  # The folder that a resumed run goes on from.
    world: World = ALONE  # The processes that share the run.

    @property
    def passes(self) -> int:
        """The passes that this process makes in an update, by the settings alone."""
        train = self.config.train
        return micro_batches_of(train.batch_size, train.accumulation, self.batches.world_size)


Guard = Callable[[GuardSubject], Iterator[Fault | str]]


def scales_of_adapters(model: Decoder) -> dict[torch.nn.Parameter, float]:
    """Return by the last matrix of each low-rank term what its product is multiplied by, if it is above 1.

    Random numbers are divided by it: attention whose scores are 30 times as large sees one token only.
    """
    layers = [module for module in model.modules() if isinstance(module, LowRank)]
    return {layer.b: max(1.0, abs(layer.scale)) for layer in layers}


@contextlib.contextmanager
def with_nonzero_weights(model: Decoder) -> Iterator[None]:
    """Fill matrices that are next to zero with random numbers: a fresh model's blocks hand nothing on.

    Next to zero is what rounding to bf16 would lose beside such numbers, like an adapter after one step of a
    warmup. Afterwards weights and modes are what they were.
    """
    modes = {module: module.training for module in model.modules()}
    near_zero = {
        p: p.detach().clone()
        for p in model.parameters()
        if p.dim() > 1 and p.requires_grad and p.detach().abs().max() < LEAST * p.size(-1) ** -0.5
    }
    scales = scales_of_adapters(model)
    seed_torch(0, next(model.parameters()).device)
    try:
        with torch.no_grad():
            for p in near_zero:
                p.normal_(std=p.size(-1) ** -0.5 / scales.get(p, 1.0))
        yield
    finally:
        with torch.no_grad():
            for p, before in near_zero.items():
                p.copy_(before)
        for module, training in modes.items():
            module.training = training


def tokens_of_a_pass(model: Decoder) -> int:
    """Return how many tokens a forward pass may have to take as long as PASS_ELEMENTS says."""
    return int(PASS_ELEMENTS / n_weights(model))


def is_large(model: Decoder) -> bool:
    """Return whether guards look at a part of the model only."""
    return n_weights(model) > LARGE


def affordable(subject: GuardSubject, batch: Batch, passes: float = 1) -> Batch:
    """Return the first rows: all of them for small models, for 1B and more a part of one, with targets.

    Args:
        passes: The tokens, as a multiple of `tokens_of_a_pass`.
    """
    tokens = int(passes * tokens_of_a_pass(subject.model))
    length = batch.tokens.size(1)
    if tokens >= length:
        return Batch(*(t[: max(1, tokens // length)] for t in batch))
    targets = (batch.labels != IGNORE_INDEX).nonzero()
    row, place = targets[0].tolist() if len(targets) else (0, 0)
    size = max(SHORTEST_PASS, tokens)
    start = max(0, min(place - size // 2, length - size))
    return Batch(*(t[row : row + 1, start : start + size] for t in batch))


def of_each_kind(model: Decoder, last: bool = False) -> set[int]:
    """Return the number of the first block of each kind, or the last: with an attention window, or none."""
    attentions = [block.get_submodule("attention") for block in model.blocks]
    kinds = [(attention.has_window, attention.is_rotated) for attention in attentions]
    return {*(dict(zip(kinds, range(len(kinds)), strict=True)).values() if last else map(kinds.index, kinds))}


@contextlib.contextmanager
def through(model: Decoder, chosen: set[int]) -> Iterator[None]:
    """Let the model have these of its blocks only."""
    blocks = model.blocks
    try:
        model.blocks = torch.nn.ModuleList(blocks[i] for i in sorted(chosen))
        yield
    finally:
        model.blocks = blocks


def shortened(model: Decoder) -> contextlib.AbstractContextManager[None]:
    """Let a large model have its first and its last block only, and the first of any other kind.

    All blocks run one code; through 24 of them these guards would take a minute.
    """
    if not is_large(model):
        return contextlib.nullcontext()
    return through(model, {0, len(model.blocks) - 1} | of_each_kind(model))


def is_shortened(subject: GuardSubject) -> bool:
    """Return whether `shortened` has taken blocks out of the model."""
    return len(subject.model.blocks) < subject.config.model.n_layer


def tolerance_of(precision: Precision) -> float:
    """Return the relative difference that a function may have that is computed twice in one precision."""
    return 1e-4 if precision.dtype == torch.float32 else 2e-3
