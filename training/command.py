"""The command `python trainingmanager.py`: train and report, go on, or make what an ended run lacks."""

from __future__ import annotations

from config import Config
from training.begin import train
from training.ended import finish_ended
from training.log import say
from training.loop import BudgetUsed
from training.overfit import prove_overfit
from training.report import report
from training.signals import RESUMABLE


def run_to_its_end(config: Config) -> int:
    """Train and report, or make what a run lacks whose training is done; return the command's exit code."""
    if config.train.resume and not config.train.overfit and finish_ended(config):
        return 0
    try:
        manager = train(config)
    except BudgetUsed as used:  # With --overfit: the proof is made once more.
        manager = used.manager
    if manager.stop_signal is not None and manager.progress() < 1:
        say(f"stopped at step {manager.state.step}; go on with --resume --run {manager.folder}")
        return RESUMABLE
    if config.train.overfit:
        return 0 if prove_overfit(manager) else 1
    report(manager)
    return 0
