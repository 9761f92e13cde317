"""The command `python trainingmanager.py`: train and report, go on, or make what an ended run lacks."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from config import Config
from training.begin import train
from training.ended import finish_ended
from training.log import say
from training.loop import UNOBSERVED, BudgetUsed, Observer
from training.overfit import prove_overfit
from training.report import report
from training.signals import RESUMABLE


class RunEnd(NamedTuple):
    """How a run ended: its folder, the command's exit code, and the signal that stopped it, if one did."""

    folder: Path
    code: int
    stop_signal: int | None = None


def run_to_its_end(config: Config, observer: Observer = UNOBSERVED) -> RunEnd:
    """Train and report, or make what a run lacks whose training is done.

    Args:
        observer: Functions that the training loop calls.
    """
    if config.train.resume and not config.train.overfit and finish_ended(config):
        return RunEnd(Path(config.train.run), 0)
    try:
        manager = train(config, observer)
    except BudgetUsed as used:  # With --overfit: the proof is made once more.
        manager = used.manager
    if manager.stop_signal is not None and manager.progress() < 1:
        say(f"stopped at step {manager.state.step}; go on with --resume --run {manager.folder}")
        return RunEnd(manager.folder, RESUMABLE, manager.stop_signal)
    if config.train.overfit:
        return RunEnd(manager.folder, 0 if prove_overfit(manager) else 1)
    report(manager)
    return RunEnd(manager.folder, 0)
