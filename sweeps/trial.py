"""One trial: a whole run of the ordinary training in this process; its numbers come from its folder."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from config import Config, memory_is_full
from guards.subject import Fault
from modules.quantize import n_weights
from sweeps.storage import failures
from training import loop
from training.checkpoint import Manifest, load_counters, newest_whole
from training.loop import BudgetUsed, TrainingManager, budget_used
from training.runfolder import LOCK

FIRST = 10  # losses by which trials are told apart
# Kept of the finished run's metrics: name: the tag, and which of its values.
TAGS = {"bits_per_byte": ("eval/bits_per_byte", min), "tokens_per_second": ("train/tokens_per_second", max)}


@dataclass
class TrialOutcome:
    """What became of a trial.

    Args:
        state: `complete`; `pruned`; `failed`, with the reason; `stopped` by a signal: it can go on.
        values: Of the objectives, as far as it came.
        steps: Training steps that its folder holds.
        seconds: Of all its attempts by the clock, guards and validations included; without what a kill undid.
        signalled: A signal asked this process to stop, whatever the state.
    """

    state: Literal["complete", "pruned", "failed", "stopped"]
    reason: str = ""
    values: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    signalled: bool = False


def run_trial(
    config: Config,
    folder: Path,
    log: Path,
    report: Callable[[int, float], bool],
    note: Callable[[str, object], None],
    tick: Callable[[], None] = lambda: None,
) -> TrialOutcome:
    """Train in `folder`, or go on there from the newest checkpoint that is whole.

    Args:
        log: A file that takes what the training prints.
        report: Told the step and bits per byte of each validation; True prunes it, if it is not at its end.
        note: Told facts of the run as soon as they are known: `parameters`, and `first_losses`, of which one
            that ends early has fewer than FIRST.
        tick: Called after each step.

    Raises:
        OSError: The disk is full or read-only, which is no fault of the trial's; or what `failures` names.
        KeyboardInterrupt: A signal before or after the training itself.
    """
    newest = _newest(folder)
    config = replace(config, train=replace(config.train, run=str(folder), resume=newest is not None))
    before = 0.0  # seconds of training
    losses: list[float] = []
    managers: list[TrainingManager] = []
    pruned = False

    if newest is not None:  # a validation is saved before it is told, and a kill may fall between
        counters = load_counters(newest)
        before = counters["run"]["seconds"]
        for row in rows_of(folder):
            if "eval/bits_per_byte" in row and row["step"] <= newest.step:  # the pruner goes by the last one
                pruned = report(int(row["step"]), row["eval/bits_per_byte"])
        if pruned and budget_used(config.train, newest.step, counters["epoch"], before) < 1:
            found = numbers_of(folder)
            return TrialOutcome("pruned", "", found, max(int(found.pop("step")), newest.step), before)
        pruned = False

    def observe(manager: TrainingManager, values: dict[str, float]) -> bool:
        nonlocal pruned
        tick()
        step = manager.state.step
        if step <= FIRST:
            losses.append(values["train/loss"])
        if not managers:
            managers.append(manager)
            note("parameters", n_weights(manager.model))
        if len(losses) == FIRST == step:
            note("first_losses", losses)
        if "eval/bits_per_byte" in values:
            pruned = report(step, values["eval/bits_per_byte"]) and manager.progress() < 1
        return pruned

    started = time.monotonic()
    state, reason, signalled = "complete", "", False
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(log, "a", encoding="utf-8") as out,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        try:
            manager = loop.train(config, observe)
            if len(losses) == manager.state.step < FIRST:  # the whole of a short one
                note("first_losses", losses)
            signalled = manager.stop_signal is not None
            if pruned:
                state = "pruned"
            elif signalled and manager.progress() < 1 and not manager.out_of_patience():
                state = "stopped"
            del manager
        except BudgetUsed:  # killed between the end of the training and its record
            pass
        except failures():  # of the storage or the disk
            raise
        except Exception as error:  # whatever it is, the other trials go on; the log has all of it
            traceback.print_exc()
            state, reason = "failed", reason_of(error)
            signalled = any(manager.stop_signal is not None for manager in managers)
        seen = [manager.state.step for manager in managers]
        managers.clear()
        gc.collect()
    found = numbers_of(folder)
    if state == "complete" and "bits_per_byte" not in found:
        state, reason = "failed", "it ended without a validation"
    # The log has every log_every-th step, which is not where a failure was.
    steps = [int(found.pop("step")), *seen]
    if newest is not None:
        steps.append(newest.step)
    return TrialOutcome(state, reason, found, max(steps), before + time.monotonic() - started, signalled)


def reason_of(error: Exception) -> str:
    """Of a failure, in one line: the guard that refused it, full memory, or the error's own words."""
    if memory_is_full(error):
        return "memory is full"
    if isinstance(error, Fault):
        return f"preflight: {error.name}: {' '.join(error.evidence.split())}"
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _newest(folder: Path) -> Manifest | None:
    """The checkpoint that the run there goes on from; the remains of one that never saved are removed."""
    if not folder.exists():
        return None
    if (folder / "config.yaml").is_file():
        with contextlib.suppress(ValueError):
            return newest_whole(folder / "checkpoints")
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return None


def rows_of(folder: Path) -> list[dict[str, float]]:
    """What the run logged, of each line that is whole."""
    path = folder / "metrics.jsonl"
    rows: list[dict[str, float]] = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):  # cut short by a kill
            rows.append(json.loads(line))
    return rows


def numbers_of(folder: Path) -> dict[str, float]:
    """`step`, and the values of TAGS, from the run's metrics.jsonl; without what is not there."""
    rows = rows_of(folder)
    found = {"step": max((row["step"] for row in rows), default=0)}
    for name, (tag, of) in TAGS.items():
        values = [row[tag] for row in rows if tag in row and math.isfinite(row[tag])]
        if values:
            found[name] = of(values)
    return found


def remove_checkpoints(folder: Path) -> None:
    """Of a finished trial that nobody will look at: most of what it takes on the disk."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / LOCK).unlink()
