"""scraping/pool.py: a child's death costs one item and no neighbour; order, limits and second tries."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from scraping.pool import Died, guarded


def make(base: int) -> Callable[[Any], Any]:
    def work(item: Any) -> Any:
        if item == "hang":
            return sum(range(10**12))  # one call into C, which hears no Python signal handler
        if item == "eat":
            return len(bytearray(3 * 2**30))
        if item == "crash":
            return os.kill(os.getpid(), signal.SIGSEGV)
        return base + item  # of "raise" a TypeError

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
