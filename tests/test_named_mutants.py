"""Sixty faults that nobody chose, drawn by benchmarks/mutants.py, which the guards named: they still do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from config import REPOSITORY

LEDGER = Path(__file__).with_name("named_mutants.jsonl")
# Those of each take about as long.
ROOMS = ("data,tokenization,adapters", "model", "training,generation")
FEW = (4, 14, 22, 25, 37, 43)  # One of each room, named by six guards.


def lines() -> list[str]:
    return LEDGER.read_text("utf-8").splitlines()


def try_again(ledger: Path, *words: str) -> None:
    """Try the mutants of a ledger once more, and see that all are named."""
    command = [sys.executable, "benchmarks/mutants.py", "--ledger", str(ledger), "--again", "--jobs", "1"]
    ended = subprocess.run([*command, *words], cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_ledger_has_sixty_in_these_rooms_and_the_few_are_one_of_each() -> None:
    rooms = [json.loads(line)["room"] for line in lines()]
    assert len(rooms) == 60 and {*rooms} == {*",".join(ROOMS).split(",")}
    assert sorted(rooms[number] for number in FEW) == sorted({*rooms})


def test_a_mutant_of_each_room_that_was_named_is_named(tmp_path: Path) -> None:
    """If one is gone from the code, choose another of its room."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(lines()[number] + "\n" for number in FEW), "utf-8")
    try_again(few)


@pytest.mark.slow
@pytest.mark.parametrize("rooms", ROOMS)
def test_mutants_that_were_named_are_named(rooms: str) -> None:
    """If more than a tenth are gone from the code, draw others: `python benchmarks/mutants.py --help`."""
    try_again(LEDGER, "--rooms", rooms)
