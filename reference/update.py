"""One update: what is minimised, the mean over a step, the clip, and the learning rate.

forward.objective_of -> mean over all targets of the step -> gradient -> clip -> rate -> optimizers.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from config import OptimizerConfig, TrainConfig
from reference.forward import IGNORED

DEFAULT_SECONDS = 300.0  # The budget of a run that is given none.


def n_targets(labels: Sequence[Tensor]) -> int:
    """Return the number of targets in all micro-batches of a step, by which each of their sums is divided."""
    return sum(int((one != IGNORED).sum()) for one in labels)


def global_norm(gradients: Mapping[str, Tensor]) -> Tensor:
    """Return the Euclidean norm of all gradients together, as if they were one vector."""
    squares = [gradient.square().sum() for gradient in gradients.values()]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)


def clip_factor(norm: Tensor, grad_clip: float) -> Tensor:
    """Return what every gradient is multiplied by, so that their norm is at most `grad_clip`; 0 is no clip.

    Pascanu et al. 2013, arXiv:1211.5063.
    """
    return (grad_clip / norm).clamp(max=1.0) if grad_clip else torch.ones_like(norm)


def progress(train: TrainConfig, step: int, epoch: float, seconds: float) -> float:
    """Return the share of the budget that is used, at most 1: of whichever budget is used up first."""
    budgets = [(step, train.max_steps), (epoch, train.max_epochs), (seconds, train.max_seconds)]
    if not any(most for _, most in budgets):
        budgets = [(seconds, DEFAULT_SECONDS)]
    return min(1.0, max(used / most for used, most in budgets if most))


def schedule(settings: OptimizerConfig, progress: float) -> float:
    """Return where a schedule between 1 and 0 stands after a share of the budget.

    `wsd` (Hu et al. 2024, arXiv:2404.06395) stays at 1, and falls in the last share `cooldown` to 0, along a
    straight line; `linear` falls so from the beginning; `cosine` (Loshchilov and Hutter 2016,
    arXiv:1608.03983) along half a wave.
    """
    left = 1 - progress
    if settings.schedule == "wsd":
        return min(1.0, left / settings.cooldown) if settings.cooldown else 1.0
    if settings.schedule == "linear":
        return left
    if settings.schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1.0


def rate_factor(settings: OptimizerConfig, step: int, progress: float) -> float:
    """Return the share of its learning rate at which each parameter moves in an update.

    The warmup rises along a straight line that would be 0 before the first update and is 1 in the last of
    `warmup_steps`; it multiplies the schedule, which falls from 1 to `min_lr_factor`.

    Args:
        step: The updates that were made before this one.
        progress: The share of the budget that was used before this one.
    """
    rise = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    least = settings.min_lr_factor
    return rise * (least + (1 - least) * schedule(settings, progress))
