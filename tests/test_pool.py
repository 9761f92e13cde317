"""scraping/pool.py: a child's death costs one item and no neighbour; order, limits and second tries."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from scraping.pool import Died, each, guarded


def make(base: int) -> Callable[[Any], Any]:
    def work(item: Any) -> Any:
        if item == "hang":
            return sum(range(10**12))  # one call into C, which hears no Python signal handler
        if item == "eat":
            return len(bytearray(3 * 2**30))
        if item == "crash":
            return os.kill(os.getpid(), signal.SIGSEGV)
        return base + item  # For the item "raise" this is a TypeError.

    return work


def run(batches: list[list[Any]], workers: int = 2, retry: Callable[[Any], Any] | None = None) -> list[Any]:
    limits = {"workers": workers, "seconds": 0.3, "memory_mb": 1024}
    return list(guarded(make, (100,), iter(batches), retry=retry, **limits))


def test_results_come_in_order_whatever_the_number_of_children() -> None:
    batches = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(20)]
    assert run(batches, 1) == run(batches, 3) == list(range(100, 160))
    assert run([]) == []


def test_a_death_costs_its_one_item_and_is_named() -> None:
    slow, large, crashed = "took longer than 0.3 s", "took more than 1024 MB", "the parser crashed"
    batches = [[1, "hang", 2], [3, "eat"], ["crash", 4, "crash", 5], [6]]
    expected = [101, Died(slow), 102, 103, Died(large), Died(crashed), 104, Died(crashed), 105, 106]
    assert run(batches) == expected


def test_an_item_that_kills_may_be_tried_in_another_form() -> None:
    second = {"crash": 7, "hang": "crash"}
    assert run([[1, "crash", 2]], retry=second.get) == [101, 107, 102]
    assert run([["hang"]], retry=second.get) == [107]


def test_a_bug_in_the_work_itself_ends_the_run() -> None:
    with pytest.raises(RuntimeError, match="a worker process failed"):
        run([[1], ["raise"], [2]])


def test_no_child_outlives_a_run_that_is_left_early() -> None:
    results = guarded(make, (0,), ([i] for i in range(100)), workers=2, seconds=5, memory_mb=1024)
    assert next(results) == 0
    results.close()
    from multiprocessing import active_children

    assert active_children() == []


def part(folder: Path, item: int) -> None:
    (folder / f"{item}.pid").write_text(str(os.getpid()))
    if item < 0:
        raise ValueError("this part is none")
    if item > 9:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60 * (item > 1))


def test_each_does_all_and_tells_a_mistake_and_a_death(tmp_path: Path) -> None:
    each(partial(part, tmp_path), [0, 1], 2)
    assert len(list(tmp_path.glob("*.pid"))) == 2
    started = time.monotonic()
    with pytest.raises(ValueError, match="this part is none"):
        each(partial(part, tmp_path), [-1, 5], 2)
    with pytest.raises(ValueError, match="a process was killed while it worked on a part"):
        each(partial(part, tmp_path), [10, 5], 2)
    assert time.monotonic() - started < 30  # nobody waits for the minute of the other part


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_children_of_each_end_with_their_parent_without_a_word(tmp_path: Path, how: int) -> None:
    alive, theirs = os.pipe()
    os.set_inheritable(theirs, True)
    parent = os.fork()
    if not parent:
        os.setsid()
        os.close(alive)
        told = os.open(tmp_path / "told", os.O_WRONLY | os.O_CREAT)
        os.dup2(told, 1)
        os.dup2(told, 2)
        sys.stderr = os.fdopen(2, "w")
        try:
            each(partial(part, tmp_path), [0, 5], 2)
            os._exit(0)
        except KeyboardInterrupt:
            os._exit(130)
        finally:  # Whatever it raised: this child must not go on as a second pytest.
            os._exit(99)
    os.close(theirs)
    while len(list(tmp_path.glob("*.pid"))) < 2:
        assert os.waitpid(parent, os.WNOHANG) == (0, 0), "it ended before its children began"
        time.sleep(0.01)
    time.sleep(0.3)  # the child of item 0 has nothing to do by now
    (os.killpg if how == signal.SIGINT else os.kill)(parent, how)
    gone, _, _ = select.select([alive], [], [], 20)
    os.close(alive)
    try:
        assert gone, "a child outlives its parent"
    finally:
        if not gone:
            os.killpg(parent, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1])
    assert code == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert (tmp_path / "told").read_text() == ""
