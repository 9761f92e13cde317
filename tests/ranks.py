"""Several processes that share a run as under torchrun, forked from the test's process as in commands.py.

Like torchrun's agent, the test's process has the store by which they find each other.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from commands import forked
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from config import one_sentence
from training.distributed import World, joined

LIMIT = 120.0  # Seconds; what has not ended by then hangs, and is killed.
SHUTDOWN = 5.0  # Seconds from the first failure.


class Ended(NamedTuple):
    """The exit code of a process, or minus the signal that killed it, and what it wrote."""

    code: int
    out: str
    err: str


def shared(work: Callable[[World], Any]) -> Callable[[], None]:
    """Return a function that joins the processes, and then does `work` with them."""

    def together() -> None:
        with joined() as world:
            work(world)

    return together


def on_ranks(
    size: int,
    work: Callable[[], Any],
    folder: Path,
    attempt: int = 0,
) -> list[Ended]:
    """Let `size` processes do `work`, as a command would; return how each ended.

    Args:
        work: It joins them, or is made by `shared`.
        folder: What they write goes there.
        attempt: How often they were started again before.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    files = [[folder / f"rank-{rank}-{attempt}.{name}" for name in ("out", "err")] for rank in range(size)]
    children = []
    for rank in range(size):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": store.port}
        own |= {"TORCHELASTIC_RUN_ID": "a test", "TORCHELASTIC_RESTART_COUNT": attempt}
        own |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1"}

        def begin(own: dict[str, Any] = own) -> None:
            os.environ.update({name: str(value) for name, value in own.items()})
            with one_sentence(shares=True):
                work()

        children.append(forked(begin, *files[rank]))
    codes = _codes(children)
    return [
        Ended(code, out.read_text(), err.read_text()) for code, (out, err) in zip(codes, files, strict=True)
    ]


def _codes(children: list[int]) -> list[int]:
    """Wait for all; like torchrun, kill those that do not end when another one has failed."""
    codes: dict[int, int] = {}
    until = time.monotonic() + LIMIT
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (found := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(found[1])
                if codes[child]:
                    until = min(until, time.monotonic() + SHUTDOWN)
        if time.monotonic() > until:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]
