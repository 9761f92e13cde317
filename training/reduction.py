"""The sum of all ranks' gradients, in flat buckets that are sent while backward still runs.

    reduction = Reduction(world, parameters)
    ...                    # all passes of an update but the last
    reduction.begin()
    loss.backward()        # each bucket is sent when its last gradient is there
    reduction.finish()     # every .grad is the sum over all ranks

A bucket ends with a number for each of its parameters: 1 where the rank has a gradient. A parameter that has
one on no rank keeps none, as in one process: an optimizer leaves it as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.distributed import World

BUCKET_BYTES = 25 * 2**20


class Reduction:
    """Buckets of parameters, the last ones first, since backward comes to them first.

    Args:
        world: The ranks.
        parameters: All that train, in the same order on every rank.
    """

    def __init__(self, world: World, parameters: list[torch.nn.Parameter]):
        self.world = world
        self.buckets: list[list[torch.nn.Parameter]] = []
        room = 0
        for p in reversed(parameters):
            size = p.numel() * p.element_size()
            if size > room or p.dtype != self.buckets[-1][0].dtype:
                self.buckets.append([])
                room = max(size, BUCKET_BYTES)
            self.buckets[-1].append(p)
            room -= size
        self.bucket_of = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self.missing: list[int] = []  # By bucket the gradients that are not there yet; empty between updates.
        self.sent: list[tuple[Tensor, Any]] = []  # By bucket its numbers and their way.
        for p in parameters:
            p.register_post_accumulate_grad_hook(self._ready)

    def begin(self) -> None:
        """Send each bucket as soon as the backward pass that follows has made its gradients."""
        self.sent, self.missing = [], [len(bucket) for bucket in self.buckets]

    def _ready(self, p: Tensor) -> None:
        if not self.missing:
            return
        self.missing[self.bucket_of[p]] -= 1  # pyright: ignore[reportArgumentType]
        # In their order, which is every rank's.
        while len(self.sent) < len(self.buckets) and self.missing[len(self.sent)] == 0:
            self._send()

    def _send(self) -> None:
        bucket = self.buckets[len(self.sent)]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        has = torch.tensor([float(p.grad is not None) for p in bucket], dtype=bucket[0].dtype)
        flat = torch.cat([*(part.flatten() for part in parts), has.to(bucket[0].device)])
        work = self.world.together(lambda: dist.all_reduce(flat, async_op=True))
        self.sent.append((flat, work))

    def finish(self) -> None:
        """Send what is left, and let every gradient be the sum."""
        while len(self.sent) < len(self.buckets):
            self._send()
        for bucket, (flat, work) in zip(self.buckets, self.sent, strict=True):
            self.world.together(work.wait)
            sizes = [p.numel() for p in bucket]
            *sums, has = flat.split([*sizes, len(bucket)])
            for p, total, ranks in zip(bucket, sums, has.tolist(), strict=True):
                p.grad = total.view(p.shape) if ranks else None
        self.sent, self.missing = [], []
