"""clean, dedup and build killed at any instant, or run twice at once: they leave what one calm run leaves.

The long proof: python -m pytest -m slow tests/test_kills.py
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

# What the commands import late is imported once here, and not in each child.
import matplotlib.pyplot
import pyarrow.parquet
import pytest

import scraping.build
import scraping.clean
import scraping.dedup
from scraping.__main__ import main
from scraping.ledger import Ledger, ListedFile

_ = (matplotlib.pyplot, pyarrow.parquet, scraping.build, scraping.clean, scraping.dedup)

STEPS = [
    ("clean", "--shard", "0/2"),
    ("clean", "--shard", "1/2"),
    ("dedup", "--workers", "2"),
    ("build", "--workers", "2"),
]
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")  # Names of audit events.


def fill(folder: Path, repositories: int) -> None:
    """A ledger with files that are dropped for each kind of reason, equal ones and near duplicates."""
    shared = "".join(f"def shared_{i}(a, b):\n    return a * {i} + b\n\n\n" for i in range(12))
    ledger = Ledger(folder / "ledger.sqlite")
    for number in range(repositories):
        own = "".join(f"def own_{number}_{i}(x):\n    return x - {number} / {i + 1}\n\n\n" for i in range(9))
        files = {
            "own.py": own,
            "header.py": f"# Copyright 2020 A\n\n{own}last = 1\n",
            "equal.py": shared,
            "near.py": f"{shared}NUMBER = {number}\n",
            "short.py": "x = 1\n",
            "two.py": "print 'x'\ny = 1\nz = 2\n",
        }
        data = {path: text.encode() for path, text in files.items()}
        ledger.found(f"o/r{number}", "local", "main", "MIT")
        entries = [ListedFile(path, path, len(text)) for path, text in data.items()]
        ledger.listed(f"o/r{number}", "c0", [*entries, ListedFile("large.py", "", 10**6, "too large")])
        ledger.stored(f"o/r{number}", list(data.items()))
        ledger.done(f"o/r{number}")
    ledger.close()


class Command:
    """`python -m scraping` in a child that is forked, so that no instant of it passes in imports."""

    def __init__(self, folder: Path, step: tuple[str, ...], kill_at: int = 0) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._alive, alive = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(alive)
            return
        try:
            os.setsid()
            os.close(self._alive)
            os.set_inheritable(alive, True)  # it closes when the last process of the command ends
            told = os.open(folder.with_name(f"{folder.name}.told"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for number in (1, 2):
                os.dup2(told, number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            seen = 0

            def count(event: str, values: tuple[Any, ...]) -> None:
                nonlocal seen
                if event in CHANGES and str(folder) in str(values[0]):
                    seen += 1
                    if seen == kill_at:
                        os.killpg(0, signal.SIGKILL)

            if kill_at:
                sys.addaudithook(count)
            main([step[0], "--folder", str(folder), *step[1:]])
        except BaseException as error:
            print(repr(error))
            sys.stdout.flush()
            os._exit(1)
        os._exit(0)

    def end(self) -> int:
        """Return its exit code; AssertionError if a process that it started goes on after it."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        gone, _, _ = select.select([self._alive], [], [], 20)
        os.close(self._alive)
        assert gone, "a process outlives the command"
        return code


def tree(folder: Path) -> dict[str, bytes]:
    """All files that the three commands wrote, those whose names begin with a dot among them."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b""
        for name in ("clean", "dedup", "corpus")
        for path in (folder / name).rglob("*")
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpus folder in it."""
    place = tmp_path_factory.mktemp("kills")
    fill(place / "corpus", 4)
    return place


@pytest.fixture(scope="module")
def straight(place: Path) -> dict[str, bytes]:
    """Return the files that an undisturbed run leaves, by path."""
    for step in STEPS:
        assert Command(place / "corpus", step).end() == 0, (place / "corpus.told").read_text()
    found = tree(place / "corpus")
    record = json.loads(found["corpus/corpus.json"])
    assert record["stages"][0]["dropped"] == {"too large": 4}
    assert record["stages"][-1]["dropped"] == {"exact duplicate": 3, "near duplicate": 8}
    return found


def cleared(place: Path) -> Path:
    """The corpus folder, which holds its ledger alone."""
    for name in ("clean", "dedup", "corpus"):
        shutil.rmtree(place / "corpus" / name, ignore_errors=True)
    return place / "corpus"


def killed_before(number: int, step: tuple[str, ...], place: Path) -> bool:
    """Run a step that is killed before its n-th change, then again to its end; whether it had so many."""
    killed = Command(place / "corpus", step, number).end() == -signal.SIGKILL
    assert Command(place / "corpus", step).end() == 0, (place / "corpus.told").read_text()
    return killed


def test_killed_before_a_change_to_its_files(place: Path, straight: dict[str, bytes]) -> None:
    """The slow form takes every change; here each step is killed before one that is drawn."""
    cleared(place)
    numbers = [random.randint(2, 12) for _ in STEPS]
    killed = [killed_before(number, step, place) for number, step in zip(numbers, STEPS, strict=True)]
    assert all(killed), numbers
    assert tree(place / "corpus") == straight, numbers


@pytest.mark.slow
def test_killed_before_every_change_to_its_files(place: Path, straight: dict[str, bytes]) -> None:
    number, kills, killed = 0, 0, 1
    while killed:
        number += 1
        cleared(place)
        killed = sum([killed_before(number, step, place) for step in STEPS])
        kills += killed
        assert tree(place / "corpus") == straight, number
    print(f"{kills} kills, before each of at most {number - 1} changes")
    assert kills > 30


@pytest.mark.slow
def test_killed_at_random_instants(place: Path, straight: dict[str, bytes]) -> None:
    """30 kills by the clock, every other one of the parent alone: its children follow it."""
    seed = time.time_ns()
    rng, kills, took = random.Random(seed), 0, dict.fromkeys(STEPS, 1.0)
    while kills < 30:
        folder = cleared(place)
        for step in STEPS:
            command = Command(folder, step)
            time.sleep(rng.uniform(0, took[step]))
            with contextlib.suppress(ProcessLookupError):  # It was quicker.
                (os.killpg if kills % 2 else os.kill)(command.pid, signal.SIGKILL)
            kills += command.end() != 0
            started = time.perf_counter()
            assert Command(folder, step).end() == 0, (place / "corpus.told").read_text()
            took[step] = time.perf_counter() - started
        assert tree(folder) == straight, f"seed {seed}, {kills} kills"


def test_what_a_scheduler_starts_twice_or_in_any_order_comes_out_the_same(
    place: Path, straight: dict[str, bytes]
) -> None:
    folder = cleared(place)
    waves = [
        [("clean", "--shard", f"{i}/2") for i in (1, 0, 1)],
        [("dedup", "--step", "signature", "--shard", f"{i}/2") for i in (1, 0, 0)],
        [("dedup", "--step", "bucket", "--shard", f"{i}/1") for i in (0, 0)],
        [("dedup", "--step", "cluster")] * 2,
        [("build", "--shard", f"{i}/2") for i in (1, 1, 0)],
        [("build", "--finish")] * 2,
    ]
    for wave in waves:
        commands = [Command(folder, step) for step in wave]
        assert [command.end() for command in commands] == [0] * len(wave), (place / "corpus.told").read_text()
    found = tree(folder)
    assert found.keys() == straight.keys()
    assert {name for name in found if found[name] != straight[name]} == set()
