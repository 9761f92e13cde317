"""Killed, interrupted and started again, by torchrun itself and at every instant: the run is the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import changed, last_weights, lines, on_ranks, shared, small_run

from config import Config
from config.files import REPOSITORY
from config.schema import flat
from training.begin import train
from training.checkpoint import checkpoints
from training.runfolder import has_checkpoint
from training.signals import RESUMABLE_MARK

pytestmark = [pytest.mark.usefixtures("unguarded"), pytest.mark.slow]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small_run(tmp_path)


def assert_same_weights(run: Path, other: Path) -> None:
    expected = last_weights(other)
    for name, values in last_weights(run).items():
        assert torch.equal(values, expected[name]), name


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_killed_at_any_instant_costs_nothing(config: Config, tmp_path: Path, rank: int) -> None:
    """Twenty-five kills of each of two processes; started again, all end as one that was never killed."""
    config = changed(config, validate_every=1, validation_rows=8)
    whole = changed(config, run=str(tmp_path / "whole"))
    began = time.monotonic()
    on_ranks(2, shared(lambda world: train(whole, world=world)), tmp_path)
    takes, draw, killed = time.monotonic() - began, random.Random(rank), 0

    def kill(children: list[int]) -> None:
        time.sleep(draw.uniform(0, takes))
        os.kill(children[rank], signal.SIGKILL)

    while killed < 25:
        run = tmp_path / f"run-{killed}-{takes}"
        own = changed(config, run=str(run))
        ended = on_ranks(2, shared(lambda world, own=own: train(own, world=world)), tmp_path, beside=kill)
        if ended[rank].code != -signal.SIGKILL:  # It had ended before its time.
            takes *= 0.9
            continue
        killed += 1
        own = changed(own, resume=has_checkpoint(run))
        ended = on_ranks(2, shared(lambda world, own=own: train(own, world=world)), tmp_path, attempt=1)
        assert [end.code for end in ended] == [0, 0] or any("is used up" in end.err for end in ended), ended
        assert_same_weights(run, tmp_path / "whole")


# --- torchrun itself -------------------------------------------------------------------------------------


def begun(config: Config, folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start two processes by torchrun, in a group of their own; what they print goes to a file."""
    default = flat(Config())
    given = {name: value for name, value in flat(config).items() if value != default[name] and name != "log"}
    flags = [f"--{name}={value}" for name, value in given.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
    with open(folder / "torchrun.txt", "a") as out:
        return subprocess.Popen(
            [
                *command,
                "--",
                "trainingmanager.py",
                *flags,
                "--log=[]",
                "--samples=0",
                "--resume=auto",
                "--allow=split-leaks",
            ],
            cwd=REPOSITORY,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def wait_until(happened: Callable[[], bool], agent: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not happened():
        if time.monotonic() > until or agent.poll() is not None:
            os.killpg(agent.pid, signal.SIGKILL)
            raise AssertionError(f"it did not come to that, and ended with {agent.poll()}")
        time.sleep(0.02)


def logged(run: Path, steps: int) -> bool:
    return (run / "metrics.jsonl").exists() and len(lines(run)) > steps


def test_an_interrupt_of_a_terminal_saves_and_resume_auto_goes_on(config: Config, tmp_path: Path) -> None:
    """A terminal interrupts all processes of a group, and torchrun passes the signal on to them once more."""
    config = changed(config, max_steps=300, validate_every=300)
    whole, run = tmp_path / "whole", tmp_path / "run"
    on_ranks(2, shared(lambda world: train(changed(config, run=str(whole)), world=world)), tmp_path)
    agent = begun(config, tmp_path)
    wait_until(lambda: logged(run, 3), agent)
    os.killpg(agent.pid, signal.SIGINT)
    assert agent.wait(120) != 0  # As torchrun ends whenever it is interrupted.
    (saved,) = checkpoints(run / "checkpoints")
    assert 3 < saved.step < 300 and (run / RESUMABLE_MARK).read_text() == f"{saved.step}\n"
    assert begun(config, tmp_path).wait(240) == 0
    assert not (run / RESUMABLE_MARK).exists()
    assert_same_weights(run, whole)


def test_torchrun_starts_all_again_when_one_is_killed(config: Config, tmp_path: Path) -> None:
    config = changed(config, max_steps=300, validate_every=50)
    whole, run = tmp_path / "whole", tmp_path / "run"
    on_ranks(2, shared(lambda world: train(changed(config, run=str(whole)), world=world)), tmp_path)
    agent = begun(config, tmp_path, "--max_restarts", "1")
    wait_until(lambda: logged(run, 60), agent)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert agent.wait(300) == 0
    assert "resumed from" in (tmp_path / "torchrun.txt").read_text()
    assert_same_weights(run, whole)
