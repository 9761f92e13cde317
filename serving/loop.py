"""The one thread that drives the engine: others give it requests, and it calls back."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence

from architecture import Decoder
from config import memory_is_full
from generation.engine import Engine
from generation.requests import Handle, Request
from generation.scheduling import EngineLimits
from generation.speculation import PROPOSERS

Over = Callable[[Exception | None], object]  # called once, in the engine's thread


class EngineLoop:
    """An engine and its thread.

    Args:
        model: In evaluation mode.
        vocab_size: That of its tokenizer.
        limits: The engine's bounds.
        speculate: A name of PROPOSERS.
    """

    def __init__(self, model: Decoder, vocab_size: int, limits: EngineLimits, speculate: str = "none"):
        self.make = lambda: Engine(model, vocab_size, limits, PROPOSERS[speculate])
        self.engine = self.make()
        self.lock = threading.Lock()
        self.watched: list[tuple[list[Handle], Over]] = []
        self.wake, self.ending = threading.Event(), False
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def add(self, requests: Sequence[Request], over: Over) -> list[Handle]:
        """Take requests that belong together, all or none; `over` is called when the last has ended.

        Raises:
            QueueFull: As many wait as may.
            ValueError: One of them could not run.
        """
        handles = list[Handle]()
        with self.lock:  # No step sees a part of them as all.
            try:
                for request in requests:
                    handles.append(self.engine.add(request))
            except ValueError:
                for handle in handles:
                    handle.cancel()
                raise
            finally:
                self.wake.set()
            self.watched.append((handles, over))
        return handles

    def close(self) -> None:
        """End the requests that have not begun; those under way go on. The thread ends with them."""
        self.ending = True
        with self.lock:
            for handle in list(self.engine.queue.waiting):
                handle.cancel("shutdown")
        self.wake.set()

    @property
    def texts(self) -> int:
        """The texts under way and waiting."""
        return len(self.engine.texts) + len(self.engine.queue.waiting)

    def _run(self) -> None:
        while True:
            self.wake.clear()
            try:
                goes_on = self.engine.step()
                error = None
            except Exception as failed:  # No request's fault: all that ran is lost.
                goes_on, error = False, failed
                why = "memory is full" if memory_is_full(failed) else f"{type(failed).__name__}"
                print(f"the engine failed ({why}) and begins anew; what ran is lost", file=sys.stderr)
            self._tell(error)
            if not goes_on and self.ending:
                return
            if not goes_on and error is None:
                self.wake.wait()

    def _tell(self, error: Exception | None) -> None:
        """Call back for what has ended; all of it, with an error of the engine's own."""
        with self.lock:
            if error is not None:
                self.engine = self.make()
            over = [one for one in self.watched if error or all(handle.done for handle in one[0])]
            self.watched = [one for one in self.watched if one not in over]
        for handles, call in over:
            call(error or next((handle.error for handle in handles if handle.error), None))
