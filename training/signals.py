"""What stops a run from outside: at a signal the step ends, a checkpoint is saved, and the process leaves."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol

from config.console import under_torchrun

RESUMABLE = 75  # Exit code of a run that a signal stopped and that --resume continues (EX_TEMPFAIL).
RESUMABLE_MARK = "resumable"  # A file in the folder of such a run, where torchrun would start it again.
SAME_SIGNAL = 0.1  # Seconds within which a signal that comes twice counts once.
PASSED_ON = 10.0  # The same under torchrun, which passes on what a terminal or a cluster has sent to all.


class RankLost(ValueError):
    """Another process of the run has ended, or does not come to what all do together."""


class Stoppable(Protocol):
    """A loop that looks at `stop_signal` after each step, and ends once it is not None."""

    stop_signal: int | None


def leave(number: int) -> NoReturn:
    """End the process by a second signal: an exception may be swallowed, for one by a finalizer."""
    os._exit(128 + number)


def leave_the_run(number: int) -> NoReturn:
    """End the run, and not the process of a notebook or script that called it, by a second interrupt."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    leave(number)


@contextlib.contextmanager
def signals_noted(
    loop: Stoppable, on_second: Callable[[int], NoReturn] = leave, says: bool = True
) -> Iterator[None]:
    """Note SIGINT, SIGTERM, SIGHUP and SIGUSR1 in `loop.stop_signal`; a second signal ends the process.

    The same signal within SAME_SIGNAL seconds is no second one: a closed terminal hangs up twice, through the
    shell and through the kernel, and `timeout` signals its child and then the child's group. Under torchrun
    it may come twice within PASSED_ON seconds. Python gives
    signals to its main thread alone: a loop in another thread notes none.

    Args:
        on_second: Called with a second signal.
        says: Whether the first signal is answered by a line on the standard error.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first, same = 0.0, PASSED_ON if under_torchrun() else SAME_SIGNAL

    def note(number: int, frame: Any) -> None:
        nonlocal first
        if loop.stop_signal == number and time.monotonic() - first < same:
            return
        if loop.stop_signal is not None:
            on_second(number)
        loop.stop_signal, first = number, time.monotonic()
        if not says:
            return
        text = f"\n{signal.Signals(number).name}: finishing the step, then saving\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())  # `print` fails where it has itself been interrupted.

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has it ignored.
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
