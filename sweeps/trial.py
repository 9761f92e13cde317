"""A trial: a whole run of the ordinary training in this process, whose numbers come from its folder."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from config import Config, memory_is_full
from guards.faults import Fault
from modules.quantized_linear import n_weights
from sweeps.storage import failures
from training import begin
from training.checkpoint import Manifest, load_counters, newest_whole
from training.loop import BudgetUsed, Observer, TrainingManager
from training.runfolder import LOCK
from training.state import budget_used

State = Literal["complete", "pruned", "failed", "stopped"]
FIRST = 10  # The number of first losses by which trials are told apart.
# Values of a trial: the tag of the run's metrics, and the function that chooses among its values.
TAGS = {"bits_per_byte": ("eval/bits_per_byte", min), "tokens_per_second": ("train/tokens_per_second", max)}


@dataclass
class TrialOutcome:
    """The outcome of a trial.

    Args:
        state: `complete`; `pruned`; `failed`, with the reason; `stopped` by a signal, so that it can go on.
        values: The values of the objectives, as far as the trial came.
        steps: The training steps that its folder holds.
        seconds: Seconds of all its attempts by the clock, guards and validations included, without those that
            a kill undid.
        signalled: Whether a signal told this process to stop, whatever the state.
    """

    state: State
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
        report: Called with the step and bits per byte of each validation; if it returns True, the trial is
            pruned, unless it is at its end.
        note: Called with facts of the run as soon as they are known: `parameters`, and `first_losses`, of
            which a run that ends early has fewer than FIRST.
        tick: Called after each step.

    Raises:
        OSError: The disk is full or read-only, which is no fault of the trial's; or what `failures` names.
        KeyboardInterrupt: A signal before or after the training itself.
    """
    newest = _newest(folder)
    config = replace(config, train=replace(config.train, run=str(folder), resume=newest is not None))
    before = 0.0  # Seconds of training by earlier attempts.
    if newest is not None:
        counters = load_counters(newest)
        before = counters["run"]["seconds"]
        pruned = _reported_again(folder, newest, report)
        if pruned and budget_used(config.train, newest.step, counters["epoch"], before) < 1:
            found = numbers_of(folder)
            return TrialOutcome("pruned", "", found, max(int(found.pop("step")), newest.step), before)
    watch = _Watch(report, note, tick)
    started = time.monotonic()
    reason = ""
    with _printing_to(log):
        try:
            state, signalled = _train(config, watch)
        except failures():
            raise
        except Exception as error:  # Whatever it is, the other trials go on; the log has all of it.
            traceback.print_exc()
            state, reason = "failed", reason_of(error)
            signalled = watch.manager is not None and watch.manager.stop_signal is not None
        # The log has every log_every-th step, which is not where a failure was.
        steps = [] if watch.manager is None else [watch.manager.state.step]
        watch.manager = None
        gc.collect()
    found = numbers_of(folder)
    if state == "complete" and "bits_per_byte" not in found:
        state, reason = "failed", "it ended without a validation"
    steps += [int(found.pop("step")), 0 if newest is None else newest.step]
    return TrialOutcome(state, reason, found, max(steps), before + time.monotonic() - started, signalled)


def _reported_again(folder: Path, newest: Manifest, report: Callable[[int, float], bool]) -> bool:
    """Report the validations up to the newest checkpoint again; return whether the last one prunes the trial.

    A validation is saved before it is reported, and a kill may fall between.
    """
    pruned = False
    for row in rows_of(folder):
        if "eval/bits_per_byte" in row and row["step"] <= newest.step:
            pruned = report(int(row["step"]), row["eval/bits_per_byte"])
    return pruned


class _Watch:
    """The watch over a trial's training: it notes and reports each step, and ends a trial that is pruned."""

    def __init__(
        self,
        report: Callable[[int, float], bool],
        note: Callable[[str, object], None],
        tick: Callable[[], None],
    ) -> None:
        self.report, self.note, self.tick = report, note, tick
        self.losses: list[float] = []
        self.manager: TrainingManager | None = None
        self.pruned = False

    def on_step(self, manager: TrainingManager, values: dict[str, float]) -> bool:
        """Note the step; True ends the training of a trial that is pruned."""
        self.tick()
        step = manager.state.step
        if step <= FIRST:
            self.losses.append(values["train/loss"])
        if self.manager is None:
            self.manager = manager
            self.note("parameters", n_weights(manager.model))
        if len(self.losses) == FIRST == step:
            self.note("first_losses", self.losses)
        if "eval/bits_per_byte" in values:
            self.pruned = self.report(step, values["eval/bits_per_byte"]) and manager.progress() < 1
        return self.pruned


def _train(config: Config, watch: _Watch) -> tuple[State, bool]:
    """Train until something ends it: what became of the trial, and whether a signal requested the end."""
    try:
        manager = begin.train(config, Observer(on_step=watch.on_step))
    except BudgetUsed:  # The trial was killed between the end of its training and its record.
        return "complete", False
    if len(watch.losses) == manager.state.step < FIRST:
        watch.note("first_losses", watch.losses)
    signalled = manager.stop_signal is not None
    if watch.pruned:
        return "pruned", signalled
    if signalled and manager.progress() < 1 and not manager.out_of_patience():
        return "stopped", signalled
    return "complete", signalled


@contextlib.contextmanager
def _printing_to(log: Path) -> Iterator[None]:
    """Append what is printed meanwhile, errors too, to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(log, "a", encoding="utf-8") as out,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        yield


def reason_of(error: Exception) -> str:
    """Return the reason of a failure in one line: a guard's words, full memory, or the error's own."""
    if memory_is_full(error):
        return "memory is full"
    if isinstance(error, Fault):
        return f"preflight: {error.name}: {' '.join(error.evidence.split())}"
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _newest(folder: Path) -> Manifest | None:
    """Return the checkpoint that a run goes on from; the remains of one that never saved are removed."""
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
    """Return the logged rows of a run, those whose lines are whole."""
    path = folder / "metrics.jsonl"
    rows: list[dict[str, float]] = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):  # A kill may have cut the line.
            rows.append(json.loads(line))
    return rows


def numbers_of(folder: Path) -> dict[str, float]:
    """Return `step` and the values of TAGS that there are in the run's metrics.jsonl."""
    rows = rows_of(folder)
    found = {"step": max((row["step"] for row in rows), default=0)}
    for name, (tag, of) in TAGS.items():
        values = [row[tag] for row in rows if tag in row and math.isfinite(row[tag])]
        if values:
            found[name] = of(values)
    return found


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a finished trial, which are most of what it takes on the disk."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / LOCK).unlink()
