"""The planted faults of runs that two processes share, as those in `selftest/planted_faults.py` are of one.

Each process plants the fault, as one program has it everywhere; some act on one of them only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

import dataset
from selftest.planted_faults import PlantedFault
from training import begin, loop
from training.reduction import Reduction


def rank() -> int:
    """Return the number of this process."""
    return int(os.environ["RANK"])


def rows_from(place: Callable[[int, int], int]) -> contextlib.AbstractContextManager:
    """Patch where a process begins to read, by a function of its number and of how many rows are its own."""

    def wrong(self: dataset.Batches, number: int) -> int:
        own = self.rows_per_update // self.world_size
        return place(self.rank, own) + number % self.per_update * (own // self.per_update)

    return patch.object(dataset.Batches, "first_row", wrong)


def all_read_the_first_rows() -> contextlib.AbstractContextManager:
    return rows_from(lambda rank, own: 0)


def a_row_between_the_ranges() -> contextlib.AbstractContextManager:
    return rows_from(lambda rank, own: rank * (own + 1))


def dropped_by_the_update() -> contextlib.AbstractContextManager:
    seed_pass = loop.seed_pass
    return patch.object(
        loop, "seed_pass", lambda seed, update, row, device: seed_pass(seed, update, 0, device)
    )


def finished_by(change: Callable[[list[torch.nn.Parameter]], None]) -> contextlib.AbstractContextManager:
    """Patch the sum of the gradients by something that is done to the parameters after it."""
    finish = Reduction.finish

    def wrong(self: Reduction) -> None:
        finish(self)
        change([p for bucket in self.buckets for p in bucket if p.grad is not None])

    return patch.object(Reduction, "finish", wrong)


def never_added_up() -> contextlib.AbstractContextManager:
    finish = Reduction.finish

    def wrong(self: Reduction) -> None:
        kept = [(p, p.grad) for bucket in self.buckets for p in bucket]
        finish(self)  # The others wait for it.
        for p, gradient in kept:
            p.grad = gradient

    return patch.object(Reduction, "finish", wrong)


def divided_once_more() -> contextlib.AbstractContextManager:
    def halve(parameters: list[torch.nn.Parameter]) -> None:
        for p in parameters:
            p.grad = p.grad / 2  # pyright: ignore[reportOptionalOperand]

    return finished_by(halve)


@contextlib.contextmanager
def clipped_by_own_rows() -> Any:
    """Take the norm of the own rows' gradient, and clip the sum by it."""
    finish, norm = Reduction.finish, torch.zeros(())

    def noting(self: Reduction) -> None:
        nonlocal norm
        own = [p.grad for bucket in self.buckets for p in bucket if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(own)
        finish(self)

    def clip(parameters: list[torch.nn.Parameter], limit: float) -> torch.Tensor:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    with patch.object(Reduction, "finish", noting), patch.object(torch.nn.utils, "clip_grad_norm_", clip):
        yield


def weights_of_its_own() -> contextlib.AbstractContextManager:
    seed = begin.seed_everything
    return patch.object(begin, "seed_everything", lambda number: seed(number + rank()))


def other_code() -> contextlib.AbstractContextManager:
    return patch.object(
        begin, "code_fingerprint", lambda: "0123456789abcdef" if rank() else "fedcba9876543210"
    )


RANK_FAULTS = [
    PlantedFault(
        "R1 rows", "all processes read the rows of the first", "ranks-see-same-data", all_read_the_first_rows
    ),
    PlantedFault(
        "R2 gap",
        "a row between the ranges of two processes was read by none",
        "rows-left-out-between-ranks",
        a_row_between_the_ranges,
    ),
    PlantedFault("R3 sum", "gradients were never added up", "gradient-not-averaged", never_added_up),
    PlantedFault(
        "R4 twice",
        "the sum was divided by the number of processes once more",
        "gradient-averaged-twice",
        divided_once_more,
        {"optimizer": {"grad_clip": 0.0}},
    ),
    PlantedFault(
        "R5 clip",
        "each process clipped by the norm of its own rows' gradient",
        "clip-of-one-rank",
        clipped_by_own_rows,
        {"optimizer": {"grad_clip": 0.01}},
    ),
    PlantedFault("R6 drift", "each process began with weights of its own", "ranks-drift", weights_of_its_own),
    PlantedFault(
        "R7 dropout",
        "dropout was seeded by the update alone",
        "dropout-seeds-equal",
        dropped_by_the_update,
    ),
    PlantedFault(
        "R9 clipped",
        "the sum was divided once more, which a clip hid",
        "differs-from-reference",
        divided_once_more,
        {"optimizer": {"grad_clip": 0.01}},
    ),
    PlantedFault("R8 code", "a process ran other code", "ranks-disagree", other_code),
]
