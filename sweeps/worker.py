"""A worker: it claims a slot, trains it and records it, until the budget and the repeats are done.

Every worker decides alone, from the storage, so that any number of them, here and elsewhere, may come and go:

    trials      slots of the study: the config itself first, if the space holds it, then the sampler's choices
    repeats     slots of a second study: the best few and the config itself, with other seeds
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from config import Config
from config.console import shown_safely
from config.schema import flat
from sweeps.board import KILLED, VALIDATED, Board, Claim, Pulse, is_done, is_locked, spent_seconds
from sweeps.budget import more_trials, room_for_a_round, whole_rounds
from sweeps.settings import OBJECTIVES, SweepSettings
from sweeps.storage import patiently, told
from sweeps.study import (
    chosen_of,
    distribution,
    label,
    make_pruner,
    make_sampler,
    open_studies,
    refuse_other_data,
    suggest,
)
from training.runfolder import LOCK

if TYPE_CHECKING:
    from sweeps.trial import TrialOutcome

STOPPED = 75  # The exit code of a worker that was told to stop (EX_TEMPFAIL).


def candidates(settings: SweepSettings, slots: Mapping[int, FrozenTrial]) -> list[int | None]:
    """Return the slots to repeat, the best first, and None for the config itself; [] before any trained."""
    sweep = settings.sweep
    default = settings.space.default(settings.config)
    whole = [
        (record.values, slot)
        for slot, record in slots.items()
        if record.state == TrialState.COMPLETE and chosen_of(settings, record.params) != default
    ]
    if not any(r.state == TrialState.COMPLETE for r in slots.values()):
        return []
    sign = 1 if OBJECTIVES[sweep.objectives[0]] else -1
    best: list[int | None] = []
    chosen: list[dict[str, Any]] = []
    for _, slot in sorted(whole, key=lambda pair: (sign * pair[0][0], pair[1])):
        if slots[slot].params not in chosen and len(best) < sweep.repeat_best:
            best.append(slot)
            chosen.append(slots[slot].params)
    return [*best, None]


# --- the worker --------------------------------------------------------------------------------------


class Worker:
    """One process at the study."""

    def __init__(
        self,
        settings: SweepSettings,
        trials: optuna.Study,
        repeats: optuna.Study,
        pulse: Pulse,
        tick: Callable[[], None] = lambda: None,
    ):
        """Open the worker's view of both studies.

        Args:
            tick: Called after each step, and each look at what there is to do.
        """
        self.settings, self.pulse, self.tick = settings, pulse, tick
        self.trials, self.repeats = Board(trials, pulse), Board(repeats, pulse)
        self.folder = settings.sweep.folder
        self.grid = settings.space.grid(settings.config) if settings.sweep.sampler == "grid" else None
        trials.pruner = make_pruner(settings)

    def work(self) -> None:
        """Run slots until there is nothing left that any worker could do."""
        while True:
            self.tick()
            self.trials.reap()
            claim = self.trials.claim(self.more, self.template)
            if claim is not None:
                self.run(self.trials, claim)
                continue
            slots = self.trials.slots()
            if not all(is_done(record) for record in slots.values()):
                time.sleep(1.0)
                continue
            self.repeats.reap()
            claim = self.repeats.claim(self.more_repeats, lambda known: self.missing(known)[0])
            if claim is not None:
                self.run(self.repeats, claim)
            elif all(is_done(record) for record in self.repeats.slots().values()):
                return
            else:
                time.sleep(1.0)

    def more(self, slots: dict[int, FrozenTrial]) -> bool:
        """Return whether the budget has room for another trial."""
        grid = None if self.grid is None else len(slots) + len(self.untried(self.grid, slots))
        return more_trials(self.settings, slots, self.spent(), grid)

    def more_repeats(self, known: dict[int, FrozenTrial]) -> bool:
        """Return whether a repeat is missing, and its round was begun or has room in the budget."""
        missing = self.missing(known)
        if not missing:
            return False
        seed = missing[0]["user_attrs"]["seed"]
        begun = any(record.user_attrs["seed"] == seed for record in known.values())
        return begun or room_for_a_round(self.settings, self.trials.slots(), self.spent())

    def spent(self) -> float:
        """Return the seconds of the budget that are used; 0 without such a budget."""
        if not self.settings.sweep.seconds:
            return 0.0
        patiently(self.pulse.beat)
        return spent_seconds(patiently(lambda: self.pulse.study.user_attrs))

    def template(self, slots: dict[int, FrozenTrial]) -> dict[str, Any]:
        """Return the arguments of a new trial; none where the sampler chooses."""
        chosen = None
        if self.grid is not None:
            chosen = next(iter(self.untried(self.grid, slots)), None)
        elif not slots:
            chosen = self.settings.space.default(self.settings.config)
        if chosen is None:
            return {}
        named = {p.key: p for p in self.settings.space.parameters}
        return {
            "params": {key: label(value) for key, value in chosen.items()},
            "distributions": {key: distribution(named[key]) for key in chosen},
        }

    def untried(self, grid: list[dict[str, Any]], slots: Mapping[int, FrozenTrial]) -> list[dict[str, Any]]:
        """Return the grid's combinations that no slot has, whatever sampler or `points` made the slots."""
        tried = {tuple(sorted(record.params.items())) for record in slots.values()}
        return [c for c in grid if tuple(sorted((key, label(v)) for key, v in c.items())) not in tried]

    def missing(self, known: dict[int, FrozenTrial]) -> list[dict[str, Any]]:
        """Return the attributes of all repeats that are not known, each seed of all candidates in turn."""
        base, best = self.settings.config.train.seed, candidates(self.settings, self.trials.slots())
        had = {(record.user_attrs["of"], record.user_attrs["seed"]) for record in known.values()}
        return [
            {"user_attrs": {"of": of, "seed": base + number}}
            for number in range(1, whole_rounds(self.settings, self.trials.slots()) + 1)
            for of in best
            if (of, base + number) not in had
        ]

    def run(self, board: Board, claim: Claim) -> None:
        """Train what was claimed and record what became of it; a signal gives it back and ends the worker."""
        from sweeps.trial import remove_checkpoints

        name = f"{claim.slot:04}" if board is self.trials else f"repeat-{claim.slot:04}"
        folder = self.folder / "trials" / name
        try:
            outcome = self.attempt(board, claim, folder)
            if outcome is not None and outcome.state == "stopped":
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            board.release(claim.record, "it was stopped")
            raise
        if outcome is None:
            return
        known = patiently(lambda: board.study.get_trials(deepcopy=False))[claim.record.number].user_attrs
        outcome.values |= {"parameters": known["parameters"]} if "parameters" in known else {}
        granted = self.record(board, claim, outcome)
        if board is self.trials:
            self.keep_the_best()
        elif granted:  # Else another worker goes on from there.
            remove_checkpoints(folder)
        if outcome.signalled:  # The signal came as the trial ended.
            raise KeyboardInterrupt

    def attempt(self, board: Board, claim: Claim, folder: Path) -> TrialOutcome | None:
        """Train what was claimed in its folder; None where it was recorded or given back without training."""
        from sweeps.trial import TrialOutcome, run_trial

        trial = None
        if board is self.trials:
            board.study.sampler = make_sampler(self.settings, claim.slot)
            trial = patiently(lambda: optuna.trial.Trial(board.study, claim.record._trial_id))
        if claim.record.user_attrs.get("deaths", 0) >= self.settings.sweep.deaths:
            at = claim.record.user_attrs["died_at"]
            reason = f"{self.settings.sweep.deaths} workers died at it after step {at}; memory may be full"
            self.note(board, claim, KILLED, True)
            self.record(board, claim, TrialOutcome("failed", reason, steps=at))
            return None
        try:
            config = self.config_of(claim, trial)
        except ValueError as error:  # The choices do not go together.
            self.record(board, claim, TrialOutcome("failed", f"it cannot be built: {error}"))
            return None
        # An earlier attempt may have trained: its steps are spent.
        trained = (folder / "checkpoints").is_dir()
        if trial is not None and not trained and (twin := self.twin(claim, config)) is not None:
            self.note(board, claim, "same_as", twin.user_attrs["slot"])
            state = "complete" if twin.state == TrialState.COMPLETE else "pruned"
            values = dict(zip(self.objectives, twin.values or [], strict=False))
            self.record(board, claim, TrialOutcome(state, values=values))
            return None
        if is_locked(folder / LOCK):  # A worker that was thought dead is still at it.
            board.release(claim.record, "its folder is in use")
            time.sleep(5.0)
            return None
        told_before = set(claim.record.intermediate_values)
        return run_trial(
            config,
            folder,
            self.folder / "logs" / f"{folder.name}.txt",
            lambda step, value: self.report(board, claim, trial, step, value, told_before),
            lambda key, value: self.note(board, claim, key, value),
            self.tick,
        )

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.settings.sweep.objectives

    @property
    def prunes(self) -> bool:
        return self.settings.sweep.pruner != "none"

    def config_of(self, claim: Claim, trial: optuna.trial.Trial | None) -> Config:
        """Return the config of a trial, or of a repeat if `trial` is None; ValueError if it is impossible."""
        base, attributes = self.settings.config, claim.record.user_attrs
        if trial is not None:
            chosen = self.settings.space.draw(flat(base), lambda parameter: suggest(trial, parameter))
            return self.settings.space.config(base, chosen)
        of = attributes["of"]
        if of is not None:
            base = self.settings.space.config(base, chosen_of(self.settings, self.trials.slots()[of].params))
        return replace(base, train=replace(base.train, seed=attributes["seed"]))

    def twin(self, claim: Claim, config: Config) -> FrozenTrial | None:
        """Return a trial that ended with the same config, which would give the same numbers; else None."""
        own = json.dumps(
            {k: v for k, v in flat(config).items() if k not in ("run", "resume")}, sort_keys=True
        )
        self.note(
            self.trials, claim, "fingerprint", own_hash := hashlib.sha256(own.encode()).hexdigest()[:16]
        )
        train = config.train
        if train.max_seconds or not (train.max_steps or train.max_epochs):
            return None  # No two runs by the clock are the same.
        ended = (TrialState.COMPLETE, TrialState.PRUNED)
        return next(
            (
                r
                for r in self.trials.slots().values()
                if r.state in ended and r.user_attrs.get("fingerprint") == own_hash
            ),
            None,
        )

    def report(
        self,
        board: Board,
        claim: Claim,
        trial: optuna.trial.Trial | None,
        step: int,
        value: float,
        known: set[int],
    ) -> bool:
        """Report a validation to the storage, once; return whether the pruner ends the trial."""
        if step not in known:
            known.add(step)
            if trial is None or len(self.objectives) > 1:  # Optuna takes values of a single objective only.
                if step > claim.record.user_attrs.get(VALIDATED, 0):
                    self.note(board, claim, VALIDATED, step)
            else:
                patiently(lambda: trial.report(value, step))
        return trial is not None and self.prunes and patiently(trial.should_prune)

    def note(self, board: Board, claim: Claim, key: str, value: Any) -> None:
        """Set an attribute of the slot's record."""
        storage = board.study._storage
        try:
            patiently(lambda: storage.set_trial_user_attr(claim.record._trial_id, key, value))
        except UpdateFinishedTrialError:  # Another worker thought that this one was dead.
            _say(f"slot {claim.slot} was taken over while this worker stood still")

    def record(self, board: Board, claim: Claim, outcome: Any) -> bool:
        """End the slot's record with all that the table shows of it; return False if it had ended before."""
        facts = {
            "steps": outcome.steps,
            "seconds": outcome.seconds,
            "reason": outcome.reason,
            **outcome.values,
        }
        storage, record = board.study._storage, claim.record._trial_id
        try:
            for key, value in facts.items():
                patiently(lambda key=key, value=value: storage.set_trial_user_attr(record, key, value))
            if outcome.state == "complete":
                values = [outcome.values[name] for name in self.objectives]
                patiently(lambda: storage.set_trial_state_values(record, TrialState.COMPLETE, values))
            elif outcome.state == "pruned":
                value = outcome.values.get("bits_per_byte")
                values = None if value is None or len(self.objectives) > 1 else [value]
                patiently(lambda: storage.set_trial_state_values(record, TrialState.PRUNED, values))
            else:
                patiently(lambda: storage.set_trial_state_values(record, TrialState.FAIL))
        except UpdateFinishedTrialError:
            _say(f"slot {claim.slot} was taken over while this worker stood still; its result is dropped")
            return False
        return True

    def keep_the_best(self) -> None:
        """Remove the checkpoints of trials that can neither be repeated nor be the best any more."""
        from sweeps.trial import remove_checkpoints

        slots = self.trials.slots()
        kept = {0, *candidates(self.settings, slots)}
        for slot, record in slots.items():
            if is_done(record) and slot not in kept:
                remove_checkpoints(self.folder / "trials" / f"{slot:04}")


def _say(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


@shown_safely()
def start(settings: SweepSettings, fingerprint: str, mouth: Connection, name: str, ticks: Any) -> NoReturn:
    """Run a worker's process; it exits with 0 where nothing is left, 75 if stopped, 2 for an error.

    Args:
        fingerprint: The fingerprint of the data, as the command that started it found them.
        mouth: The end of a pipe that takes the error.
        name: The id by which the storage knows the worker.
        ticks: A shared number that counts what it does: while it stands still, the worker does nothing.
    """

    has_ended = False  # From then on a signal to stop asks for what is under way already.

    def interrupt(number: int, frame: Any) -> None:
        if not has_ended:
            raise KeyboardInterrupt

    # tqdm's own lock is a semaphore between processes, which would outlive a worker that is killed.
    tqdm.set_lock(threading.RLock())
    os.setpgid(0, 0)  # A Ctrl-C then reaches only the command that started it, which tells the worker.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)

    def tick() -> None:
        ticks.value += 1

    sweep, code = settings.sweep, 0
    try:
        try:
            with told(sweep.storage, sweep.folder):
                trials, repeats = open_studies(settings)
                # Two first commands may both have found a study without data.
                refuse_other_data(trials, fingerprint)
                with Pulse(trials, sweep.folder, name) as pulse:
                    Worker(settings, trials, repeats, pulse, tick).work()
        except ValueError as error:
            if os.environ.get("PLUMB_TRACEBACK"):
                raise
            mouth.send(str(error))
            code = 2
        has_ended = True
    except KeyboardInterrupt:  # It may come while the error is told, where another worker failed by the same.
        has_ended, code = True, STOPPED
    sys.exit(code)
