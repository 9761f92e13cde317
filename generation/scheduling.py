"""Which request begins when: the order, the slots, and the bounds of queue and memory."""

from __future__ import annotations

import math
import threading
from bisect import insort
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from architecture import Decoder
from generation.requests import Handle
from generation.rows import SPARE_COLUMNS

# Requests for which nobody waits begin when this share of all places is free: each time costs a pass and a
# copied cache.
FREE_PLACES = 0.25


@dataclass(frozen=True)
class EngineLimits:
    """The bounds of an engine; what does not fit is refused when it is added.

    Args:
        most_rows: Texts under way at a time.
        most_waiting: Requests that wait for places.
        most_bytes: Keys and values of the texts under way. While rows join, they stand in memory twice.
        prefix_bytes: Keys and values that are kept for later requests; 0 keeps none.
    """

    most_rows: int = 32
    most_waiting: float = 256
    most_bytes: float = 2**31
    prefix_bytes: int = 2**28


class QueueFull(ValueError):
    """A request that would wait behind as many as may wait: it may be sent again later."""


class Queue:
    """The requests that wait. One that begins has all its memory set aside, and can go to its end."""

    def __init__(self, model: Decoder, limits: EngineLimits):
        config = model.config
        numbers = 2 * config.n_layer * config.n_kv_head * config.head_dim
        self.of_token = numbers * model.embed.weight.element_size()  # bytes of a token
        self.limits = limits
        self.waiting: list[Handle] = []
        self.lock = threading.Lock()

    def add(self, handle: Handle) -> None:
        """Let a request wait.

        Raises:
            QueueFull: As many wait as may.
            ValueError: It would not fit if nothing else ran.
        """
        n, limits = handle.request.n, self.limits
        if n > limits.most_rows:
            raise ValueError(f"n is {n}, and the engine has {limits.most_rows} places; lower n")
        needed = self._bytes(handle.rows, handle.seat.longest)
        if needed > limits.most_bytes:
            raise ValueError(
                f"{handle.rows} rows of up to {handle.seat.longest} tokens take {needed / 1e6:,.1f} MB of "
                f"keys and values, more than the engine's {limits.most_bytes / 1e6:,.1f} MB; "
                "shorten the prompt or lower max_new_tokens or n"
            )
        with self.lock:
            if len(self.waiting) >= limits.most_waiting:
                raise QueueFull(
                    f"{len(self.waiting)} requests wait, as many as may; send it again when some have ended"
                )
            # Another list each time: `step` looks at this one without the lock.
            waiting = [*self.waiting]
            insort(waiting, handle, key=lambda one: one.order)
            has_editors = any(one.request.editor is not None for one in waiting)
            self.waiting = in_turn(waiting) if has_editors else waiting

    def start(self, under_way: Collection[Handle], delayed: Collection[Handle] = ()) -> list[Handle]:
        """Take the requests that begin now, none before one that comes first and does not fit yet.

        Args:
            under_way: Those that have begun.
            delayed: Those that others may pass this time.
        """
        started = list[Handle]()
        free = self.limits.most_rows - sum(one.request.n for one in under_way)
        rows = sum(one.rows for one in under_way)
        longest = max((one.seat.longest for one in under_way), default=0)
        with self.lock:
            has_room = not under_way or free >= FREE_PLACES * self.limits.most_rows
            for handle in self.waiting:
                if handle in delayed:
                    continue
                rows, longest = rows + handle.rows, max(longest, handle.seat.longest)
                needed = self._bytes(rows, longest, not under_way and not started)
                fits = handle.request.n <= free and needed <= self.limits.most_bytes
                if not fits or not (has_room or handle.request.interactive):
                    break
                free -= handle.request.n
                started.append(handle)
            begun = {*map(id, started)}
            self.waiting = [one for one in self.waiting if id(one) not in begun]
        return started

    def drop(self, handles: Collection[Handle]) -> None:
        """Forget requests that ended before they began."""
        with self.lock:
            self.waiting = [one for one in self.waiting if one not in handles]

    def _bytes(self, rows: int, longest: int, is_alone: bool = True) -> int:
        """Return what rows take at most, each as long as the longest may become."""
        return rows * (longest + (0 if is_alone else SPARE_COLUMNS)) * self.of_token


def in_turn(waiting: Collection[Handle]) -> list[Handle]:
    """Order requests, interactive ones first, then older; an editor's own hold their places newest first."""
    ordered = sorted(waiting, key=lambda one: one.order)
    of_editor: dict[tuple[str | None, bool], list[Handle]] = defaultdict(list)
    for one in ordered:
        of_editor[one.request.editor, one.request.interactive].append(one)
    return [
        one if one.request.editor is None else of_editor[one.request.editor, one.request.interactive].pop()
        for one in ordered
    ]


UNBOUNDED = {"most_waiting": math.inf, "most_bytes": math.inf, "prefix_bytes": 0}
