"""Scores of a validation: its loss, its bits per byte, and the checkpoint that is the best by it."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from reference.forward import IGNORED


def bits_per_byte(loss: float, targets: int, n_bytes: int) -> float:
    """Return the bits that a model needs for a byte of the text, which compare across tokenizers.

    Args:
        loss: Nats a token.
        targets: Tokens that are predicted.
        n_bytes: UTF-8 bytes of the texts that these tokens spell; a start or an end spells none.
    """
    return loss * targets / math.log(2) / n_bytes


def perplexity(loss: float) -> float:
    """Return e to the nats a token: between so many equally likely tokens the model hesitates."""
    return math.exp(loss)


def hits(logits: Tensor, labels: Tensor, k: int, advantage: float = 0.0) -> int:
    """Return how many targets of labels (B, T) are among the k largest of their logits (B, T, V).

    Args:
        advantage: Added to a target's logit before it is ranked.
    """
    chosen, targets = logits[labels != IGNORED], labels[labels != IGNORED]
    own = chosen.gather(-1, targets[:, None]) + advantage
    larger = (chosen > own).scatter(-1, targets[:, None], False).sum(dim=-1)
    return int((larger < k).sum())


def best_of(checkpoints: Iterable[tuple[int, float | None]]) -> int | None:
    """Return the step of the best checkpoint, of pairs of step and validation loss.

    It is the one with the lowest loss, and of two equals the later; without a loss a checkpoint cannot be it.
    """
    best: int | None = None
    least = math.inf
    for step, loss in sorted(checkpoints, key=lambda pair: pair[0]):
        if loss is not None and loss <= least:
            best, least = step, loss
    return best


def without_better(losses: Iterable[float], least: float = math.inf, count: int = 0) -> tuple[float, int]:
    """Return the least of some losses, and how many of the last in a row were not below all before them.

    This is what patience counts. An equal loss is not better.

    Args:
        least: The least loss before these.
        count: The count before these.
    """
    for loss in losses:
        least, count = (loss, 0) if loss < least else (least, count + 1)
    return least, count
