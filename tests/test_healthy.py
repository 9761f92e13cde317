"""No false alarm: small runs over what a user can ask for, drawn at random, with every guard on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from healthy_runs import drawn, write_corpora

from benchmarks import mutant_runs
from guards.faults import Fault

# Each was refused once, or ended in an error. The few: a model of its own, an adapter, a whole base in bf16.
FEW, OTHERS = (9, 70, 71), (3, 16, 61, 65, 133, 198)
MANY = range(115)  # Some are refused in a sentence before they begin.


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the data of the runs, at the depth at which they look for it."""
    folder, before = tmp_path_factory.mktemp("bench"), Path.cwd()
    os.chdir(folder)
    mutant_runs.write_assets()
    write_corpora(folder / "assets")
    yield folder
    os.chdir(before)


def begin(number: int, bench: Path) -> None:
    """Train four updates with the drawn settings, and go on to six."""
    folder = bench / "runs" / str(number)
    folder.mkdir(parents=True)
    os.chdir(folder)
    groups = drawn(number, mutant_runs.ASSETS)
    for more in ({"max_steps": 4}, {"max_steps": 6, "resume": True}):
        mutant_runs.train_and_report(groups | {"": groups[""] | more}, False)


def is_healthy(number: int, bench: Path) -> bool:
    """Return whether it trained; a sentence that refuses the settings is no alarm, but a fault is."""
    try:
        begin(number, bench)
    except Fault:
        raise
    except ValueError as refused:
        print(f"run {number} is refused: {refused}")
        return False
    return True


@pytest.mark.parametrize("number", [*FEW, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)])
def test_a_healthy_run_is_not_refused(number: int, bench: Path) -> None:
    assert is_healthy(number, bench)


@pytest.mark.slow
def test_of_a_hundred_healthy_runs_none_is_refused(bench: Path) -> None:
    alarms, trained = [], 0
    for number in MANY:
        try:
            trained += is_healthy(number, bench)
        except Fault as fault:
            alarms.append(f"{number}: {fault}")
    assert not alarms and trained >= 100
