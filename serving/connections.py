"""Connections that send nothing: uvicorn waits for them without end, and they would take all places."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class BoundedConnection(H11Protocol):
    """uvicorn's connection, which is closed when no request comes in time, or another needs its place.

    Attributes:
        most: Connections at a time.
        seconds: For the head of the first request; bodies have a limit of their own.
        grace: Seconds that a connection has before another may take its place: hundreds are taken before the
            first of them is read.
    """

    most, seconds, grace = 256, 60.0, 0.2

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.since = time.monotonic()
        self.head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        """Take a connection; one too many closes the oldest that has no request under way, a little later."""
        super().connection_made(transport)
        self.loop.call_later(self.grace, self._make_room)
        self.head_timer = self.loop.call_later(self.seconds, self._close_without_request)

    @property
    def is_idle(self) -> bool:
        """Whether no request of the connection waits for its answer."""
        return self.cycle is None or self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        """Hand on what came; a part of a head that follows an answer gets its time too."""
        super().data_received(data)
        if not self.is_idle:
            self._stop_timer()
        elif self.head_timer is None and not self.transport.is_closing():
            self.head_timer = self.loop.call_later(self.seconds, self._close_without_request)

    def on_response_complete(self) -> None:
        """Note the time: the connection is idle from now on."""
        self.since = time.monotonic()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_timer()
        super().connection_lost(exc)

    def _make_room(self) -> None:
        if len(self.connections) > self.most:
            idle = [one for one in self.connections if isinstance(one, BoundedConnection) and one.is_idle]
            oldest = min(idle, key=lambda one: one.since, default=self)
            oldest.transport.abort()
            self.connections.discard(oldest)

    def _stop_timer(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def _close_without_request(self) -> None:
        self.head_timer = None
        self.transport.abort()
