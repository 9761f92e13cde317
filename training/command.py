"""The command `python trainingmanager.py`: train and report, go on, or make what an ended run lacks."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from config import Config, write_atomically
from config.console import under_torchrun
from training.begin import train
from training.distributed import ALONE, joined
from training.ended import finish_ended
from training.log import say
from training.loop import UNOBSERVED, BudgetUsed, Observer
from training.overfit import prove_overfit
from training.report import report
from training.signals import RESUMABLE, RESUMABLE_MARK


class RunEnd(NamedTuple):
    """How a run ended: its folder, the command's exit code, and the signal that stopped it, if one did."""

    folder: Path
    code: int
    stop_signal: int | None = None


def run_to_its_end(config: Config, observer: Observer = UNOBSERVED) -> RunEnd:
    """Train and report, or make what a run lacks whose training is done.

    Of the processes that torchrun started each calls this function; they share the final scores, and the
    first one alone reports.

    Args:
        observer: Functions that the training loop calls.
    """
    with joined() as world:
        resumes = config.train.resume and not config.train.overfit
        if world.told(resumes and world.is_first and finish_ended(config)):
            return RunEnd(Path(config.train.run), 0)
        try:
            manager = train(config, observer, world=world)
        except BudgetUsed as used:  # With --overfit: the proof is made once more.
            manager = used.manager
        stopped = manager.stop_signal is not None and manager.progress() < 1
        if world.size > 1 and not world.told(stopped or config.train.overfit):
            report(manager, world=world)
            return RunEnd(manager.folder, 0)
    manager.world = ALONE
    if not world.is_first:
        return RunEnd(manager.folder, 0)
    if manager.stop_signal is not None and manager.progress() < 1:
        say(f"stopped at step {manager.state.step}; go on with --resume --run {manager.folder}")
        if under_torchrun():  # It would start again what ends with another code than 0.
            write_atomically(manager.folder / RESUMABLE_MARK, f"{manager.state.step}\n")
            return RunEnd(manager.folder, 0, manager.stop_signal)
        return RunEnd(manager.folder, RESUMABLE, manager.stop_signal)
    if config.train.overfit:
        return RunEnd(manager.folder, 0 if prove_overfit(manager) else 1)
    report(manager)
    return RunEnd(manager.folder, 0)
