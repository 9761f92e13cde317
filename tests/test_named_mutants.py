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


def test_the_ledger_has_sixty_in_these_rooms() -> None:
    rooms = [json.loads(line)["room"] for line in LEDGER.read_text("utf-8").splitlines()]
    assert len(rooms) == 60 and {*rooms} == {*",".join(ROOMS).split(",")}


@pytest.mark.parametrize("rooms", ROOMS)
def test_mutants_that_were_named_are_named(rooms: str) -> None:
    """If more than a tenth are gone from the code, draw others: `python benchmarks/mutants.py --help`."""
    command = [sys.executable, "benchmarks/mutants.py", "--ledger", str(LEDGER), "--again", "--jobs", "1"]
    ended = subprocess.run([*command, "--rooms", rooms], cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
