"""Work in child processes that may die.

`guarded` works on strangers' files, where the death of a child costs the one file that caused it:

    for result in guarded(make, arguments, batches, workers=2, seconds=5.0, memory_mb=1024):
        ...                                  # in the order of the items, whatever the order of the work

A child bounds its own address space by RLIMIT_AS, and its processor time on each item by a timer whose signal
kills it, which no C code can delay. A batch whose child died is repeated item by item.

`each` works on cleaned documents, without limits.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any

OUT_OF_MEMORY = 77  # exit status of a child without memory
PATIENCE = 20  # A child may take this many times its processor time by the clock, on a busy machine.


@dataclass(frozen=True)
class Died:
    """A result's place-holder for an item whose child died: why it did."""

    reason: str


_starting = threading.Lock()  # several threads start processes


def _child(
    pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...], limits: tuple[float, int]
) -> None:
    """Answer the items that come through the pipe, in a process of its own with limits on time and memory."""
    import gc
    import resource

    seconds, memory_mb = limits
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent hears Ctrl-C and closes the pipe.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        work = make(*arguments)
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb * 2**20, memory_mb * 2**20))
        gc.disable()  # The trees of parsers have no cycles, and parsing takes a third less time.
        while True:
            answers = []
            for item in pipe.recv():
                signal.setitimer(signal.ITIMER_PROF, seconds)
                answers.append(work(item))
                signal.setitimer(signal.ITIMER_PROF, 0)
            pipe.send(answers)
            gc.collect(0)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except (EOFError, BrokenPipeError):
        os._exit(0)


class _Worker:
    """One child at a time, used by one thread."""

    def __init__(
        self,
        start: tuple[Callable[..., Any], tuple[Any, ...], tuple[float, int]],
        retry: Callable[[Any], Any] | None,
    ) -> None:
        self._start = start
        self._retry = retry
        self._process: Any = None
        self._pipe: Any = None

    def answer(self, items: list[Any]) -> list[Any]:
        """Return a result for each item, `Died` for those that killed the child."""
        answers = self._ask(items)
        if not isinstance(answers, Died):
            return answers
        if len(items) == 1:
            again = self._retry(items[0]) if self._retry else None
            return [answers] if again is None else self.answer([again])
        return [answer for item in items for answer in self.answer([item])]

    def _ask(self, items: list[Any]) -> list[Any] | Died:
        seconds, memory_mb = self._start[2]
        if self._process is None:
            context = get_context("spawn")  # A fork would copy the threads' locks without the threads.
            with _starting:
                main = sys.modules["__main__"]
                sys.modules["__main__"] = ModuleType("__main__")  # no child imports the caller's script
                try:
                    self._pipe, theirs = context.Pipe()
                    self._process = context.Process(target=_child, args=(theirs, *self._start), daemon=True)
                    self._process.start()
                    theirs.close()
                finally:
                    sys.modules["__main__"] = main
        try:
            self._pipe.send(items)
            if self._pipe.poll(PATIENCE * seconds * len(items) + 60):
                return self._pipe.recv()
            self._process.kill()
        except (EOFError, OSError):
            pass
        self._process.join()
        status = self._process.exitcode
        self.close()
        if status in (-signal.SIGPROF, -signal.SIGKILL):
            return Died(f"took longer than {seconds:g} s")
        if status == OUT_OF_MEMORY:
            return Died(f"took more than {memory_mb} MB")
        if status == 1:
            raise RuntimeError("a worker process failed; its error stands above")
        return Died("the parser crashed")

    def close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._process.join()
        self._process = self._pipe = None


def guarded(
    make: Callable[..., Callable[[Any], Any]],
    arguments: tuple[Any, ...],
    batches: Iterable[list[Any]],
    *,
    workers: int,
    seconds: float,
    memory_mb: int,
    retry: Callable[[Any], Any] | None = None,
) -> Generator[Any]:
    """Yield a result for each item of each batch, in order; `Died` where the item killed its child.

    Args:
        make: Called in each child with `arguments`; returns the function of an item. Both must pickle.
        arguments: The arguments of `make`.
        batches: Lists of items; a few of them are in memory at a time.
        workers: Number of child processes.
        seconds: Processor time that one item may take.
        memory_mb: Address space of a child, in MiB.
        retry: Returns, for an item that killed its child, another to try in its place, or None.
    """
    local = threading.local()
    made: list[_Worker] = []

    def run(batch: list[Any]) -> list[Any]:
        if not hasattr(local, "worker"):
            local.worker = _Worker((make, arguments, (seconds, memory_mb)), retry)
            made.append(local.worker)
        return local.worker.answer(batch)

    waiting: deque[Future[list[Any]]] = deque()
    threads = ThreadPoolExecutor(workers)
    try:
        for batch in batches:
            waiting.append(threads.submit(run, batch))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        threads.shutdown()
        for worker in made:
            worker.close()


def cores() -> int:
    """Return the number of processor cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def each(work: Callable[[Any], object], items: Sequence[Any], workers: int = 0) -> None:
    """Have child processes do `work` on every item; none of them outlives this call, or this process.

    Args:
        work: A function that pickles; an exception that it raises is raised here.
        items: Its arguments, one for each call.
        workers: Number of processes; 0 means one for each core.

    Raises:
        ValueError: a child was killed.
    """
    # A fork has all imports already. Python 3.14's fork server fails in a process that was itself forked.
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        with ProcessPoolExecutor(min(workers or cores(), len(items)), context, _bound_to_parent) as pool:
            try:
                for _ in pool.map(work, items):
                    pass
            except BaseException:  # A mistake, or Ctrl-C: the other children's work may take an hour.
                for child in multiprocessing.active_children():
                    child.terminate()
                raise
    except BrokenProcessPool:
        raise ValueError(
            "a process was killed while it worked on a part, as where memory is full; run again, with fewer"
            " --workers or smaller parts"
        ) from None


def _bound_to_parent() -> None:
    """Let this child die silently of Ctrl-C, and with its parent, even when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
