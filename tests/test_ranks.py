"""Several processes share one run: it is the run of one, and all of them end together."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ended, changed, last_weights, lines, on_ranks, shared, small_run
from torch.utils._python_dispatch import TorchDispatchMode

from config import (
    Config,
    one_sentence,
    parse_config,
)
from dataset import IGNORE_INDEX
from training import distributed, loop
from training.begin import train
from training.checkpoint import checkpoints
from training.command import run_to_its_end
from training.distributed import World
from training.loop import TrainingManager
from training.loss import token_loss
from training.runfolder import LOCK, claimed_folder
from training.signals import RESUMABLE_MARK
from trainingmanager import command_line

pytestmark = pytest.mark.usefixtures("unguarded")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small_run(tmp_path)


def trained(size: int, config: Config, folder: Path) -> list[Ended]:
    folder.mkdir(exist_ok=True)
    return on_ranks(size, shared(lambda world: train(config, world=world)), folder)


# --- one meaning ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_is_the_same_on_one_two_and_four_processes(config: Config, tmp_path: Path, name: Any) -> None:
    """Weights to 1e-4, over the end of an epoch, with updates cut differently."""
    config = replace(config, optimizer=replace(config.optimizer, name=name))
    one = train(config)
    assert one.epoch() > 1 and one.state.step == 6
    targets = {int((one.batches.batch(n).labels != IGNORE_INDEX).sum()) for n in range(6)}
    assert len(targets) > 1  # ragged indeed
    for size, cut in ((2, {"batch_size": 2, "accumulation": 4}), (4, {})):
        run = tmp_path / f"run-{size}"
        ended = trained(size, changed(config, run=str(run), **cut), tmp_path / f"of-{size}")
        assert [end.code for end in ended] == [0] * size, ended
        assert not any(end.out or end.err for end in ended[1:])
        weights, expected = last_weights(run), last_weights(one.folder)
        assert weights.keys() == expected.keys()
        for key, values in expected.items():
            torch.testing.assert_close(weights[key], values, rtol=0, atol=1e-4, msg=key)
        for line, right in zip(lines(run), lines(one.folder), strict=True):
            assert line.keys() == right.keys()
            for key in line.keys() - {"train/tokens_per_second"}:
                assert line[key] == pytest.approx(right[key], rel=1e-4), (key, line["step"])


def test_dropout_falls_on_the_same_rows_and_a_resume_on_other_ranks_goes_on(
    config: Config, tmp_path: Path
) -> None:
    """Each pass is seeded by its first row: where passes are equal, so are the runs, dropout included."""
    constant = replace(config.optimizer, schedule="constant")
    config = replace(config, model=replace(config.model, dropout=0.1), optimizer=constant)
    one = train(changed(config, batch_size=4, accumulation=2))
    run = str(tmp_path / "run-2")
    on_two = changed(config, run=run, max_steps=3, batch_size=4, accumulation=2)
    assert {end.code for end in trained(2, on_two, tmp_path / "first")} == {0}
    train(changed(on_two, max_steps=4, resume=True))  # One update on one process.
    ended = trained(2, changed(on_two, max_steps=6, resume=True), tmp_path / "then")
    assert {end.code for end in ended} == {0}, ended
    expected = last_weights(one.folder)
    for key, values in last_weights(Path(run)).items():
        torch.testing.assert_close(values, expected[key], rtol=0, atol=1e-4, msg=key)


class Operators(TorchDispatchMode):
    """Counts by name what torch does."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_one_process_does_nothing_for_others(config: Config) -> None:
    """An update has the operators of one that is written out here, and no group of processes is there."""
    manager = train(changed(config, max_steps=1))
    batch = manager.micro_batch(1)
    with Operators() as found:
        manager.update_on([batch], 0.5)
    with Operators() as expected:
        targets = int((batch.labels != IGNORE_INDEX).sum())
        loss = token_loss(manager.model, batch)
        (loss.objective / targets).backward()
        loss.cross_entropy.item()
        torch.nn.utils.clip_grad_norm_(manager.parameters, 1.0).item()
        for optimizer in manager.optimizers:
            optimizer.step()
        for optimizer in manager.optimizers:
            optimizer.zero_grad()
    assert not dist.is_initialized() and manager.reduction is None
    assert found.names == expected.names


def test_what_does_not_divide_is_refused_with_both_numbers(config: Config, tmp_path: Path) -> None:
    ended = trained(3, config, tmp_path)
    assert [(end.code, end.out) for end in ended[1:]] == [(2, ""), (2, "")] and ended[0].code == 2
    (said,) = [end.err for end in ended if end.err]  # By the first that comes to it.
    assert "an update has 8 rows" in said and "3 processes" in said
    assert not Path(config.train.run).exists()


# --- they end together -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_ends_all_after_the_same_update(
    config: Config, tmp_path: Path, rank: int
) -> None:
    def work(world: World) -> None:
        update = TrainingManager.update

        def signalled(manager: TrainingManager) -> dict[str, float]:
            if manager.state.step == 1 and world.rank == rank:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(manager)

        TrainingManager.update = signalled  # type: ignore[method-assign]
        manager = train(config, world=world)
        assert manager.stop_signal == signal.SIGTERM and manager.state.step == 2

    ended = on_ranks(2, shared(work), tmp_path)
    assert [end.code for end in ended] == [0, 0], ended
    assert ended[1].err == ""
    assert [saved.step for saved in checkpoints(tmp_path / "run" / "checkpoints")] == [2]


def test_what_one_process_tells_may_be_long(tmp_path: Path) -> None:
    """A tokenizer of 250,000 pieces has 30 MB, and torch's store takes 8 MB at once."""
    long = "\u65e5" * 3_000_000  # 18 MB as JSON

    def work(world: World) -> None:
        assert world.told(long if world.is_first else None) == long
        assert world.collect([world.rank, long]) == [[0, long], [1, long]]

    assert [end.code for end in on_ranks(2, shared(work), tmp_path)] == [0, 0]


def test_time_is_that_of_the_first_process(config: Config, tmp_path: Path) -> None:
    """The others' clocks may say anything: rates, and the end of a budget in seconds, are the first one's."""

    def work(world: World) -> None:
        ticks = itertools.count(step=1 if world.is_first else 1000)
        time.perf_counter = lambda: float(next(ticks))
        manager = train(changed(config, max_steps=0, max_seconds=200.0), world=world)
        assert manager.progress() >= 1 and manager.state.step > 3
        seen = world.gather([manager.state.step, manager.state.seconds])
        assert seen[0] == seen[1]

    assert [end.code for end in on_ranks(2, shared(work), tmp_path)] == [0, 0]


def test_an_error_of_one_process_is_said_once_and_ends_all(config: Config, tmp_path: Path) -> None:
    def work(world: World) -> None:
        batch = TrainingManager.micro_batch

        def failing(manager: TrainingManager, number: int) -> Any:
            if world.rank == 1 and manager.state.step == 4:
                raise ValueError("this row cannot be read; mend it")
            return batch(manager, number)

        TrainingManager.micro_batch = failing  # type: ignore[method-assign]
        train(config, world=world)

    ended = on_ranks(4, shared(work), tmp_path)
    assert [end.code for end in ended] == [2, 2, 2, 2]
    assert "this row cannot be read; mend it" in ended[1].err
    assert "Traceback" not in ended[1].err and ended[2] == ended[3] == Ended(2, "", "")
    assert "cannot be read" not in ended[0].err and "hangs" not in ended[0].err
    assert [saved.step for saved in checkpoints(tmp_path / "run" / "checkpoints")] == [3]


def test_a_disk_that_is_full_for_the_process_that_writes_ends_all_and_loses_nothing(
    config: Config, tmp_path: Path
) -> None:
    """It fails at the second checkpoint; the first one is whole, and the run goes on from it."""
    one = train(changed(config, run=str(tmp_path / "one")))
    config = changed(config, save_every=2)

    def until_full(world: World) -> None:
        real = loop.save_checkpoint

        def save(folder: Path, *args: Any, **named: Any) -> Any:
            if world.is_first and any(folder.glob("step-*")):
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            return real(folder, *args, **named)

        loop.save_checkpoint = save
        train(config, world=world)

    ended = on_ranks(2, shared(until_full), tmp_path)
    assert [end.code for end in ended] == [2, 2], ended
    assert "File too large" in ended[0].err and len(ended[0].err.splitlines()) == 1, ended
    assert not ended[1].err
    assert [found.step for found in checkpoints(Path(config.train.run) / "checkpoints")] == [2]
    again = trained(2, changed(config, resume=True), tmp_path / "again")
    assert [end.code for end in again] == [0, 0], again
    expected = last_weights(one.folder)
    for key, values in last_weights(Path(config.train.run)).items():
        assert (values - expected[key]).abs().max() < 1e-4, key


@pytest.mark.parametrize(
    ("number", "did"), [(signal.SIGKILL, "has ended without a word"), (signal.SIGSTOP, "hangs: it did not")]
)
def test_a_process_that_is_killed_or_hangs_is_named(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, did: str
) -> None:
    monkeypatch.setattr(distributed, "PATIENCE", 2.0)
    monkeypatch.setattr(distributed, "GRACE", 1.0)

    def work(world: World) -> None:
        batch = TrainingManager.micro_batch

        def stopping(manager: TrainingManager, n: int) -> Any:
            if world.rank == 1 and manager.state.step == 4:
                os.kill(os.getpid(), number)
            return batch(manager, n)

        TrainingManager.micro_batch = stopping  # type: ignore[method-assign]
        train(config, world=world)

    config = changed(config, batch_size=6)
    ended = on_ranks(3, shared(work), tmp_path)
    assert [ended[0].code, ended[2].code] == [2, 2]
    said = [end.err for end in ended if end.err.strip()]
    assert sum("process 1 of 3 " + did in text for text in said) == 1, said
    assert checkpoints(tmp_path / "run" / "checkpoints")[-1].step == 3


# --- the folder -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_run_leaves_a_folder_that_is_free_before_its_first_checkpoint(
    config: Config, tmp_path: Path, rank: int
) -> None:
    def killed(world: World) -> None:
        update = TrainingManager.update

        def kill(manager: TrainingManager) -> dict[str, float]:
            if manager.state.step == 1 and world.rank == rank:
                os.kill(os.getpid(), signal.SIGKILL)
            return update(manager)

        TrainingManager.update = kill  # type: ignore[method-assign]
        train(config, world=world)

    assert on_ranks(2, shared(killed), tmp_path)[rank].code == -signal.SIGKILL
    run = tmp_path / "run"
    assert (run / "metrics.jsonl").exists() and not checkpoints(run / "checkpoints")
    with claimed_folder(config):
        assert {path.name for path in run.iterdir()} == {LOCK}


def test_resume_auto_goes_on_where_there_is_a_checkpoint(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["--resume", "auto", "--run", str(run), "--max_steps", "6"]
    assert command_line(words) == ["--run", str(run), "--max_steps", "6", "--resume=false"]
    train(changed(config, max_steps=3))
    parsed = parse_config(command_line(words)).train
    assert parsed == changed(config, resume=True).train
    assert command_line(["--resume=auto", str(run)])[-1] == "--resume=true"
    with pytest.raises(SystemExit, match="2"):
        command_line(["--resume", "auto"])
    assert "--resume auto needs the folder of the run" in capsys.readouterr().err


def test_under_torchrun_a_stop_that_can_be_resumed_exits_with_0_and_leaves_a_mark(
    config: Config, tmp_path: Path
) -> None:
    def work() -> None:
        update = TrainingManager.update

        def signalled(manager: TrainingManager) -> dict[str, float]:
            if manager.state.step == 1 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.2)  # torchrun passes on what all were sent: that is no second signal.
                os.kill(os.getpid(), signal.SIGUSR1)
            return update(manager)

        TrainingManager.update = signalled  # type: ignore[method-assign]
        sys.exit(run_to_its_end(config).code)

    first, second = on_ranks(2, work, tmp_path)
    assert (first.code, second) == (0, Ended(0, "", ""))
    assert "stopped at step 2; go on with --resume" in first.out
    mark = tmp_path / "run" / RESUMABLE_MARK
    assert mark.read_text() == "2\n"
    assert train(changed(config, resume=True)).state.step == 6 and not mark.exists()


def test_a_command_of_one_process_is_refused_by_several(tmp_path: Path) -> None:
    def work() -> None:
        with one_sentence():
            raise AssertionError("it was begun")

    first, second = on_ranks(2, work, tmp_path)
    assert (first.code, second) == (2, Ended(2, "", ""))
    assert "torchrun started 2 processes, and this is a command of one" in first.err
