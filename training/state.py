"""The counters of a run, how much of its budget they have used, and whether the budget was too small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from config import TrainConfig

DEFAULT_SECONDS = 300.0  # The budget of a run for which none is set.
LEAST_QUARTER = 5  # Steps: the mean loss of fewer says little.
# A loss falls steeply at the end if its last quarter lowers it by more than this share of its whole fall.
# The same number is the least fall in nats a token.
STEEP = 0.1


@dataclass
class RunState:
    """All that changes while a run goes on, besides weights, optimizers and random states. Saved whole."""

    step: int = 0  # Updates done. With the seed it is also the position in the data.
    tokens: int = 0  # Targets that were trained on.
    seconds: float = 0.0  # Time spent in training, summed over all resumes.
    best_loss: float = math.inf
    validations_without_better: int = 0
    skipped_updates: int = 0  # Updates that were left out, since a loss or gradient was not finite.
    skipped_in_a_row: int = 0


def budget_used(train: TrainConfig, step: int, epoch: float, seconds: float) -> float:
    """Return the share of the budget that is used: of steps, epochs or seconds, whichever is furthest."""
    shares = [0.0]
    if train.max_steps:
        shares.append(step / train.max_steps)
    if train.max_epochs:
        shares.append(epoch / train.max_epochs)
    if train.max_seconds or len(shares) == 1:
        shares.append(seconds / (train.max_seconds or DEFAULT_SECONDS))
    return max(shares)


def still_falling(losses: Sequence[float]) -> str | None:
    """Return a warning for a run that ended while its training loss fell steeply, or None.

    Args:
        losses: The training loss of each step of the whole run, in nats a token.
    """
    quarter = len(losses) // 4
    if quarter < LEAST_QUARTER:
        return None
    before, last = (sum(part) / quarter for part in (losses[-2 * quarter : -quarter], losses[-quarter:]))
    share = (before - last) / max(losses[0] - last, 1e-9)
    if not (share > STEEP and before - last > STEEP):
        return None
    return (
        f"the training loss still fell steeply at the end, from {before:.2f} to {last:.2f} between the third "
        f"and the last quarter of {len(losses)} steps, {min(share, 1):.0%} of all that it fell: train for "
        "longer, or with a higher learning rate"
    )
