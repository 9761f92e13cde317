"""The one thread that drives the engine: others give it requests, and it calls back."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from architecture import Decoder
from config import memory_is_full
from generation.engine import Engine
from generation.requests import Handle, Request
from generation.scheduling import EngineLimits
from generation.speculation import PROPOSERS
from lora import remove_adapter, use_adapters

Over = Callable[[Exception | None], object]  # called once, in the engine's thread


class Place:
    """An engine for the texts of one adapter, or of the base, so that they share no rows and no prefixes.

    Args:
        make: Makes the engine.
        adapter: The adapter's name in the model; empty for the base.
    """

    def __init__(self, make: Callable[[], Engine], adapter: str = ""):
        self.make, self.adapter = make, adapter
        self.empty()

    def empty(self) -> None:
        """Begin anew, without any text."""
        self.engine = self.make()

    @property
    def texts(self) -> int:
        """The texts under way and waiting."""
        return len(self.engine.texts) + len(self.engine.queue.waiting)


class EngineLoop:
    """The engines of a model, one for each of its adapters, and their thread.

    Args:
        model: In evaluation mode.
        vocab_size: That of its tokenizer.
        limits: The bounds of each engine.
        speculate: A name of PROPOSERS.

    Attributes:
        places: By the name for clients; that of the base is empty.
    """

    def __init__(self, model: Decoder, vocab_size: int, limits: EngineLimits, speculate: str = "none"):
        self.model = model
        self.engine_for = lambda words: Engine(model, words, limits, PROPOSERS[speculate])
        self.places = {"": Place(partial(self.engine_for, vocab_size))}
        self.leaving: list[Place] = []  # of adapters that were read again since
        self.work = deque[Callable[[], object]]()
        self.active: str | None = ""  # The adapter that is on; None where work may have changed it.
        self.lock = threading.Lock()
        self.watched: list[tuple[list[Handle], Over]] = []
        self.wake, self.ending = threading.Event(), False
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    @property
    def engine(self) -> Engine:
        """The engine of the base."""
        return self.places[""].engine

    def between(self, work: Callable[[], object]) -> None:
        """Let the thread do something between two steps; it must not raise."""
        self.work.append(work)
        self.wake.set()

    def serve(self, name: str, vocab_size: int, adapter: str) -> None:
        """Give a name to an adapter of the model, in the thread; texts of the one before end with that."""
        place = Place(partial(self.engine_for, vocab_size), adapter)
        with self.lock:
            if name in self.places:
                self.leaving.append(self.places[name])
            self.places[name] = place

    def add(self, requests: Sequence[Request], over: Over, name: str = "") -> list[Handle]:
        """Take requests that belong together, all or none; `over` is called when the last has ended.

        Args:
            name: Whose they are, of `places`.

        Raises:
            QueueFull: As many wait as may.
            ValueError: One of them could not run.
        """
        handles = list[Handle]()
        with self.lock:  # No step sees a part of them as all.
            try:
                for request in requests:
                    handles.append(self.places[name].engine.add(request))
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
            for place in self._all:
                for handle in list(place.engine.queue.waiting):
                    handle.cancel("shutdown")
        self.wake.set()

    def end(self) -> None:
        """End all texts, and wait for the thread, which takes one step.

        Where Python ends while another thread computes, torch aborts the process.
        """
        self.close()
        with self.lock:
            for place in self._all:
                for handle in list(place.engine.under_way):
                    handle.cancel("shutdown")
        self.thread.join()

    @property
    def texts(self) -> int:
        """The texts under way and waiting."""
        return sum(place.texts for place in self._all)

    @property
    def waiting(self) -> int:
        """The requests that wait."""
        return sum(len(place.engine.queue.waiting) for place in self._all)

    @property
    def _all(self) -> list[Place]:
        return [*self.places.values(), *self.leaving]

    def _run(self) -> None:
        while True:
            self.wake.clear()
            try:
                goes_on, error = self._step(), None
            except Exception as failed:  # No request's fault: all that ran is lost.
                goes_on, error = False, failed
                why = "memory is full" if memory_is_full(failed) else f"{type(failed).__name__}"
                print(f"the engine failed ({why}) and begins anew; what ran is lost", file=sys.stderr)
            self._tell(error)
            if not goes_on and self.ending:
                return
            if not goes_on and error is None:
                self.wake.wait()

    def _step(self) -> bool:
        """Do what waits for the thread, and step each engine that has something to do."""
        while self.work:
            self.work.popleft()()
            self.active = None
        goes_on = False
        for place in self._all:
            if not (place.engine.under_way or place.engine.queue.waiting):
                continue
            if place.adapter != self.active:
                use_adapters(self.model, {place.adapter: 1.0} if place.adapter else {})
                self.active = place.adapter
            goes_on = place.engine.step() or goes_on
        for place in [place for place in self.leaving if not place.texts]:
            with self.lock:
                self.leaving.remove(place)
            remove_adapter(self.model, place.adapter)
        return goes_on

    def _tell(self, error: Exception | None) -> None:
        """Call back for what has ended; all of it, with an error of the engine's own."""
        with self.lock:
            if error is not None:
                for place in self._all:
                    place.empty()
            over = [one for one in self.watched if error or all(handle.done for handle in one[0])]
            self.watched = [one for one in self.watched if one not in over]
        for handles, call in over:
            call(error or next((handle.error for handle in handles if handle.error), None))
