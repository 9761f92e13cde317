"""A worker, in this process: its trials, budgets, pruners and samplers."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from commands import command
from optuna.trial import TrialState
from sweeping import forked_workers, sweep, tiny

from sweeps import budget, trial
from sweeps import study as studies
from sweeps.board import KILLED, VALIDATED, Board, Claim, Pulse, is_done
from sweeps.budget import foreseen, more_trials, room_for_a_round, whole_rounds
from sweeps.settings import parse_settings
from sweeps.study import open_studies
from sweeps.trial import TrialOutcome, run_trial
from sweeps.verdict import (
    counts,
    idle,
)
from sweeps.worker import Worker
from training.checkpoint import checkpoints

__all__ = ["forked_workers"]  # a fixture, which pytest finds here by its name
pytestmark = pytest.mark.usefixtures("unguarded")


@pytest.mark.guarded
def test_a_trial_that_cannot_train_is_failed_with_its_reason_and_the_study_goes_on(
    tmp_path: Path, corpus: Path
) -> None:
    arms = {
        "healthy": {"model.n_layer": 1},
        "too much memory": {"model.n_embd": 2**20, "model.n_head": 2**17},
        "not finite": {"optimizer.head_lr": 1e38, "optimizer.muon_lr": 1e38},
        "refused": {"model.vocab_size": 4_000},
        "healthy too": {"model.n_layer": 2},
    }
    path = tiny(
        tmp_path, corpus, space={"arms": arms}, sweep={"trials": 9, "sampler": "grid", "repeat_seeds": 0}
    )
    settings, slots = sweep(path)
    states = {r.params["arms"]: r.state for r in slots.values()}
    reasons = {r.params["arms"]: r.user_attrs["reason"] for r in slots.values()}
    assert set(states) == set(arms)
    trained = {name for name, state in states.items() if state == TrialState.COMPLETE}
    assert trained == {"healthy", "healthy too"}
    assert reasons["too much memory"] == "memory is full"
    assert "loss of step 3 is nan" in reasons["not finite"]
    (steps,) = [r.user_attrs["steps"] for r in slots.values() if r.params["arms"] == "not finite"]
    assert steps == 3  # The log, at every tenth step, has the first alone.
    assert reasons["refused"].startswith("preflight: vocabulary-too-large")
    assert "1 failed: memory is full" in counts(settings, slots)


@pytest.mark.guarded
@pytest.mark.usefixtures("forked_workers")
def test_a_sweep_of_failures_alone_says_why_and_what_to_do(tmp_path: Path, corpus: Path) -> None:
    words = ("--config", tiny(tmp_path, corpus), "--model.vocab_size", str(4_000), "--trials", "2")
    done = command("hyperparam_tune.py", *words, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    reason = "all 2 trials failed (it stops after 5); the first one: preflight: vocabulary-too-large"
    assert reason in done.stderr
    assert "; mend that, and begin anew with another --study" in done.stderr


def test_a_trial_at_which_workers_keep_dying_is_failed_with_the_steps_that_it_took(
    tmp_path: Path, corpus: Path
) -> None:
    words = ["--config", str(tiny(tmp_path, corpus)), "--trials", "1", "--repeat_seeds", "0", "--deaths", "2"]
    settings = parse_settings(words)
    settings.sweep.folder.mkdir()
    trials, repeats = open_studies(settings)
    with Pulse(trials, settings.sweep.folder) as pulse:
        board = Board(trials, pulse)
        for _ in range(2):
            claim = board.claim(lambda slots: len(slots) < 1, lambda slots: {})
            assert claim is not None
            trials._storage.set_trial_intermediate_value(claim.record._trial_id, 9, 1.0)
            board.release(claim.record, "its worker died")
        Worker(settings, trials, repeats, pulse).work()
        (slot,) = board.slots().values()
    assert is_done(slot) and slot.user_attrs["steps"] == 9 and slot.user_attrs[KILLED]
    assert slot.user_attrs["reason"] == "2 workers died at it after step 9; memory may be full"


def test_a_parameter_that_changes_nothing_is_named(tmp_path: Path, corpus: Path) -> None:
    """No gradient is so large that either of these clips it."""
    space = {"optimizer.grad_clip": [1e3, 1e4], "model.dropout": [0.0, 0.3]}
    path = tiny(tmp_path, corpus, space=space, sweep={"trials": 4, "sampler": "grid", "repeat_seeds": 0})
    settings, slots = sweep(path)
    assert len(slots) == 4
    (line,) = idle(settings, slots)
    assert (
        line.startswith("optimizer.grad_clip changed nothing in the first 10 losses")
        and "nor in their" in line
    )


def test_of_trials_that_end_early_the_losses_that_there_are_are_compared(
    tmp_path: Path, corpus: Path
) -> None:
    space = {"optimizer.grad_clip": [1e3, 1e4], "model.dropout": [0.0, 0.3]}
    short = {"trials": 4, "sampler": "grid", "repeat_seeds": 0}
    settings, slots = sweep(tiny(tmp_path, corpus, space=space, max_steps=4, sweep=short))
    assert [len(r.user_attrs["first_losses"]) for r in slots.values()] == [4] * 4
    (line,) = idle(settings, slots)
    assert line.startswith("optimizer.grad_clip changed nothing in the first 4 losses of trials ")
    assert line.endswith("; nor in their results")

    def ended(rate: float, losses: list[float], state: TrialState) -> optuna.trial.FrozenTrial:
        chosen = {"optimizer.grad_clip": rate, "model.dropout": 0.0}
        kinds = {p.key: studies.distribution(p) for p in settings.space.parameters}
        attributes = {"first_losses": losses}
        return optuna.trial.create_trial(
            state=state, params=chosen, distributions=kinds, value=1.0, user_attrs=attributes
        )

    whole, pruned = ended(1e3, [3.0, 2.0, 1.0], TrialState.COMPLETE), TrialState.PRUNED
    (line,) = idle(settings, {0: whole, 1: ended(1e4, [3.0, 2.0], pruned)})
    assert line.endswith("first 2 losses of trials 0 and 1; what it would have done later is not known")
    assert not idle(settings, {0: whole, 1: ended(1e4, [3.0, 2.5], pruned)})
    assert not idle(settings, {0: whole, 1: ended(1e4, [3.0], pruned)})  # before any update
    more = {0: whole, 1: ended(1e4, [3.0, 2.0], pruned), 2: ended(1e4, [3.0, 2.0, 1.0], pruned)}
    assert "first 3 losses of trials 0 and 2; what" in idle(settings, more)[0]


def test_the_time_of_a_trial_is_that_of_all_its_attempts(tmp_path: Path, corpus: Path) -> None:
    config = parse_settings(["--config", str(tiny(tmp_path, corpus))]).config
    folder, log = tmp_path / "trial", tmp_path / "log.txt"

    def attempt(report: Callable[[int, float], bool]) -> tuple[TrialOutcome, float]:
        """Run the trial; return its outcome and the seconds that it took by the clock."""
        started = time.monotonic()
        return run_trial(config, folder, log, report, lambda key, value: None), time.monotonic() - started

    def slow(step: int, value: float) -> bool:
        if step == 9:
            raise KeyboardInterrupt
        time.sleep(1.0)
        return False

    with pytest.raises(KeyboardInterrupt):
        attempt(slow)  # The checkpoint of step 9 has 2 s of it.
    told, _ = attempt(lambda step, value: True)  # The pruner says so now: nothing is trained.
    assert told.state == "pruned" and 2 < told.seconds < 60 and told.steps == 9
    outcome, own = attempt(lambda step, value: False)
    assert outcome.state == "complete" and outcome.steps == 12
    assert 1 < outcome.seconds - own < 60


@pytest.mark.parametrize("killed", [False, True])
def test_a_trial_at_its_end_is_complete_whatever_the_pruner_says(
    tmp_path: Path, corpus: Path, killed: bool
) -> None:
    config = parse_settings(["--config", str(tiny(tmp_path, corpus))]).config

    def last(step: int, value: float) -> bool:
        if killed and step == 12 and not told:
            told.append(step)
            raise KeyboardInterrupt  # between the last checkpoint and the record
        return step == 12 or bool(told)  # Optuna's pruners go by the last step that they know of

    told: list[int] = []
    attempt = (config, tmp_path / "trial", tmp_path / "log.txt", last, lambda key, value: None)
    if killed:
        with pytest.raises(KeyboardInterrupt):
            run_trial(*attempt)
    outcome = run_trial(*attempt)
    assert (outcome.state, outcome.steps) == ("complete", 12)


@pytest.mark.parametrize("budget", [{"max_steps": 12}, {"max_epochs": 0.5}, {"max_seconds": 1.0}])
def test_a_trial_killed_before_its_record_is_at_its_end_by_any_budget(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, budget: dict[str, float]
) -> None:
    config = parse_settings(["--config", str(tiny(tmp_path, corpus, **{"max_steps": 0} | budget))]).config
    folder, right = tmp_path / "trial", trial.numbers_of

    def killed(folder: Path) -> dict[str, float]:
        monkeypatch.setattr(trial, "numbers_of", right)
        raise KeyboardInterrupt

    monkeypatch.setattr(trial, "numbers_of", killed)
    with pytest.raises(KeyboardInterrupt):
        run_trial(config, folder, tmp_path / "log.txt", lambda step, value: False, lambda key, value: None)
    outcome = run_trial(
        config, folder, tmp_path / "log.txt", lambda step, value: True, lambda key, value: None
    )
    assert outcome.state == "complete" and outcome.steps == checkpoints(folder / "checkpoints")[-1].step > 3


def test_a_stop_is_known_of_a_trial_that_failed_and_its_steps_of_one_that_is_pruned(
    tmp_path: Path, corpus: Path
) -> None:
    config = parse_settings(["--config", str(tiny(tmp_path, corpus))]).config

    def fail(step: int, value: float) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("of the third step")

    log = tmp_path / "log.txt"
    failed = run_trial(config, tmp_path / "failed", log, fail, lambda key, value: None)
    assert (failed.state, failed.steps, failed.signalled) == ("failed", 3, True)

    def stop() -> None:
        ticks.append(0)
        if len(ticks) == 5:  # between two validations
            os.kill(os.getpid(), signal.SIGTERM)

    ticks: list[int] = []
    folder = tmp_path / "stopped"
    stopped = run_trial(config, folder, log, lambda step, value: False, lambda key, value: None, stop)
    assert (stopped.state, stopped.steps) == ("stopped", 5)
    pruned = run_trial(config, folder, log, lambda step, value: True, lambda key, value: None)
    assert (pruned.state, pruned.steps) == ("pruned", 5)


def test_bad_trials_are_pruned_and_equal_ones_taken_over(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "STARTUP", 1)
    arms = {"good": {"optimizer.embedding_lr": 0.3}, "bad": {"optimizer.embedding_lr": 1e-6}}
    path = tiny(tmp_path, corpus, space={"arms": arms}, sweep={"trials": 5, "repeat_seeds": 0})
    settings, slots = sweep(path, "--sampler", "random")
    for record in slots.values():
        good = record.params["arms"] == "good"
        assert record.state == (TrialState.COMPLETE if good else TrialState.PRUNED)
        assert record.user_attrs["steps"] == 0 if "same_as" in record.user_attrs else (12 if good else 3)
    assert sum("same_as" in r.user_attrs for r in slots.values()) == 3
    told = counts(settings, slots)
    assert told[0].endswith("; 15 steps, 38% fewer than without pruning")  # Without it: 24.
    assert told[1:] == ["3 of them had the settings of an earlier one and were not trained again"]
    assert {r.params["arms"] for r in slots.values()} == set(arms)
    assert (tmp_path / "study" / "trials" / "0000" / "checkpoints").is_dir()


def test_what_was_trained_of_a_trial_counts_although_an_equal_one_ended_before_it(
    tmp_path: Path, corpus: Path
) -> None:
    path = tiny(tmp_path, corpus, sweep={"trials": 2, "repeat_seeds": 0})
    settings = parse_settings(["--config", str(path)])
    settings.sweep.folder.mkdir()
    opened = open_studies(settings)
    with Pulse(opened[0], settings.sweep.folder) as pulse:
        own = Worker(settings, *opened, pulse)
        equals = [own.trials.claim(lambda slots: True, lambda slots: own.template({})) for _ in range(2)]
        first, equal = equals
        assert first is not None and equal is not None
        ticks: list[int] = []

        def stop() -> None:
            ticks.append(0)
            if len(ticks) == 5:
                os.kill(os.getpid(), signal.SIGTERM)

        stopped = Worker(settings, *opened, pulse, stop)
        with pytest.raises(KeyboardInterrupt):
            stopped.run(stopped.trials, equal)
        own.run(own.trials, first)
        own.work()
        ended = own.trials.slots()
    assert [record.user_attrs["steps"] for record in ended.values()] == [12, 12]
    assert ended[0].value == ended[1].value and "same_as" not in ended[1].user_attrs


def test_a_worker_whose_repeat_was_taken_over_leaves_its_checkpoints_to_the_next(
    tmp_path: Path, corpus: Path
) -> None:
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus))])
    settings.sweep.folder.mkdir()
    opened = open_studies(settings)
    with Pulse(opened[0], settings.sweep.folder) as pulse:
        left: list[Claim] = []  # Another worker thinks that this one is dead.

        def tick() -> None:
            for claim in left:
                own.repeats.release(claim.record, "its worker died")

        own = Worker(settings, *opened, pulse, tick)
        repeat = {"user_attrs": {"of": None, "seed": 1}}
        for kept in (True, False):
            claim = own.repeats.claim(lambda slots: not slots, lambda slots: repeat)
            assert claim is not None
            left[:] = [claim] if kept else []
            own.run(own.repeats, claim)
            at = settings.sweep.folder / "trials" / "repeat-0000" / "checkpoints"
            assert at.is_dir() == kept
        (record,) = own.repeats.slots().values()
        assert record.state == TrialState.COMPLETE and record.user_attrs["steps"] == 12


@pytest.mark.parametrize(
    ("budget", "equal"),
    [({}, True), ({"max_seconds": 9}, False), ({"max_steps": 0}, False), ({"max_epochs": 1}, True)],
)
def test_runs_by_the_clock_are_no_twins(
    tmp_path: Path, corpus: Path, budget: dict[str, int], equal: bool
) -> None:
    """Without any budget a run goes by the clock too."""
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus, **budget))])
    settings.sweep.folder.mkdir()
    opened = open_studies(settings)
    with Pulse(opened[0], settings.sweep.folder) as pulse:
        own, board = Worker(settings, *opened, pulse), Board(opened[0], pulse)
        first, other = (board.claim(lambda slots: True, lambda slots: {}) for _ in range(2))
        assert first is not None and other is not None
        assert own.twin(first, settings.config) is None
        own.record(board, first, TrialOutcome("complete", values={"bits_per_byte": 1.0}))
        assert (own.twin(other, settings.config) is not None) == equal


@pytest.mark.parametrize("pruner", ["halving", "hyperband", "median"])
def test_the_pruner_decides_as_in_a_study_in_which_nobody_was_stopped(
    tmp_path: Path, corpus: Path, pruner: str
) -> None:
    """A trial that another attempt goes on with has two records, and competes once, in the same bracket."""
    draw, values = random.Random(5), {}
    for slot in range(24):
        values[slot] = [draw.random() for _ in range(4)]

    def decisions(stopped: int) -> list[int]:
        """Return for each slot after how many validations it was pruned; 4 means never."""
        path = tiny(tmp_path, corpus, sweep={"study": str(tmp_path / f"stopped{stopped}" / "study")})
        settings = parse_settings(["--config", str(path), "--pruner", pruner])
        settings.sweep.folder.mkdir(parents=True)
        study, _ = open_studies(settings)
        study.pruner, ended = studies.make_pruner(settings), []
        with Pulse(study, settings.sweep.folder) as pulse:
            board = Board(study, pulse)
            for slot in values:
                went_on = 0
                while True:
                    claim = board.claim(lambda slots, n=slot: len(slots) <= n, lambda slots: {})
                    assert claim is not None and claim.slot == slot
                    trial, pruned = optuna.trial.Trial(study, claim.record._trial_id), False
                    while not pruned and went_on < 4:
                        trial.report(values[slot][went_on], 3 * went_on + 3)
                        pruned, went_on = trial.should_prune(), went_on + 1
                        if went_on <= stopped:
                            break
                    if pruned or went_on == 4:
                        break
                    board.release(claim.record, "it was stopped")
                state = TrialState.PRUNED if pruned else TrialState.COMPLETE
                study._storage.set_trial_state_values(claim.record._trial_id, state, [values[slot][-1]])
                ended.append(went_on)
        return ended

    undisturbed = decisions(0)
    assert set(undisturbed) >= {1, 4}
    assert decisions(1) == decisions(3) == undisturbed


@pytest.mark.parametrize("pruner", ["halving", "hyperband"])
def test_rungs_are_where_trials_of_the_space_validate(tmp_path: Path, corpus: Path, pruner: str) -> None:
    """Here at each third step of at most 24, whatever the config itself would do without the space."""
    space, changes = {"max_steps": {"int": [12, 24]}}, {"validate_every": 0, "save_every": 3}
    path = tiny(tmp_path, corpus, space=space, max_steps=9000, **changes)
    settings = parse_settings(["--config", str(path), "--pruner", pruner])
    settings.sweep.folder.mkdir()
    study, _ = open_studies(settings)
    study.pruner = studies.make_pruner(settings)
    rungs: dict[int, set[int]] = {}
    for slot in range(20):
        attributes = {"slot": slot, "attempt": 0}
        study.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=attributes))
        trial = optuna.trial.Trial(study, study.trials[-1]._trial_id)
        for step in range(3, 25, 3):
            trial.report(1 - slot / 100, step)  # each is better than those before it
            assert not trial.should_prune()
            rungs.setdefault(step, set()).add(len(study.trials[-1].system_attrs))
    assert rungs[3] == ({1} if pruner == "halving" else {0, 1})
    assert rungs[24] == ({2} if pruner == "halving" else {1, 2})


@pytest.mark.parametrize("sampler", ["cmaes", "gp", "tpe"])
def test_samplers_ask_within_the_space(tmp_path: Path, corpus: Path, sampler: str) -> None:
    """Without training: each is asked after trials that were told, as many as it needs to model them."""
    space = {"head_lr": {"log": [1e-3, 1e-1]}, "model.n_layer": {"int": [1, 3]}}
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus, space=space)), "--sampler", sampler])
    settings.sweep.folder.mkdir()
    trials, _ = open_studies(settings)
    drawn = []
    for slot in range(9):
        trials.sampler = studies.make_sampler(settings, slot)
        trial = trials.ask()
        chosen = settings.space.draw({}, lambda p, t=trial: studies.suggest(t, p))
        assert all(p.holds(chosen[p.key]) for p in settings.space.parameters)
        trials.tell(trial, abs(chosen["optimizer.head_lr"] - 0.02))
        drawn.append(chosen["optimizer.head_lr"])
    assert len(set(drawn)) == 9


def test_several_objectives_have_a_front(tmp_path: Path, corpus: Path) -> None:
    space = {"model.n_layer": {"int": [1, 2]}}
    words = ("--objectives", "bits_per_byte,parameters,tokens_per_second", "--sampler", "grid")
    path = tiny(tmp_path, corpus, space=space, sweep={"repeat_seeds": 0})
    settings, slots = sweep(path, *words)
    assert len(slots) == 2
    (_, small, fast), (_, large, slow) = (slots[n].values for n in (0, 1))
    assert small < large and fast > 0 and slow > 0
    assert [d.name for d in open_studies(settings)[0].directions] == ["MINIMIZE", "MINIMIZE", "MAXIMIZE"]
    assert [r.user_attrs[VALIDATED] for r in slots.values()] == [12, 12]


def test_budgets_in_steps_and_seconds_are_never_exceeded(tmp_path: Path, corpus: Path) -> None:
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus)), "--steps", "50", "--trials", "0"])

    def record(slot: int, state: TrialState, steps: int = 0) -> optuna.trial.FrozenTrial:
        attributes = {"slot": slot, "attempt": 0, "steps": steps, "seconds": 10.0}
        value = 1.0 if state == TrialState.COMPLETE else None
        return optuna.trial.create_trial(state=state, value=value, user_attrs=attributes)

    slots = {0: record(0, TrialState.COMPLETE, 12), 1: record(1, TrialState.PRUNED, 3)}
    assert more_trials(settings, slots, 0.0, None)  # 15 + 12
    slots[2] = record(2, TrialState.RUNNING)
    assert more_trials(settings, slots, 0.0, None)  # 27 + 12
    slots[3] = record(3, TrialState.COMPLETE, 12)
    assert not more_trials(settings, slots, 0.0, None)  # 39 + 12
    slots[3] = record(3, TrialState.FAIL, 9)
    assert more_trials(settings, slots, 0.0, None)  # 36 + 12
    slots[3].user_attrs[KILLED] = True  # It may have taken all 12.
    assert not more_trials(settings, slots, 0.0, None)
    slots[3] = record(3, TrialState.COMPLETE, 12)
    slots[3].user_attrs["same_as"], slots[3].user_attrs["seconds"] = 0, 0.0  # taken over in no time
    timed = parse_settings(["--config", str(tiny(tmp_path, corpus)), "--seconds", "100", "--trials", "0"])
    assert more_trials(timed, slots, 50.0, None)  # 10 for it, 40 for the repeats of two configs by two seeds
    assert not more_trials(timed, slots, 51.0, None)
    three = replace(timed, sweep=replace(timed.sweep, workers=3))
    assert more_trials(three, slots, 70.0, None)  # four repeats take three workers two turns
    assert not more_trials(three, slots, 71.0, None)


@pytest.mark.parametrize(
    ("seconds", "seeds", "rounds"), [(0, 3, 3), (120, 3, 3), (119, 3, 2), (80, 3, 2), (79, 3, 0), (40, 1, 1)]
)
def test_rounds_of_repeats_are_whole_and_take_half_of_the_time(
    tmp_path: Path, corpus: Path, seconds: float, seeds: int, rounds: int
) -> None:
    """Two configs by 10 s each: a round takes one worker 20 s."""
    words = ["--config", str(tiny(tmp_path, corpus)), "--seconds", str(seconds), "--repeat_seeds", str(seeds)]
    settings = parse_settings([*words, "--repeat_best", "1"])
    attributes = {"slot": 0, "attempt": 0, "steps": 12, "seconds": 10.0}
    one = optuna.trial.create_trial(state=TrialState.COMPLETE, value=1.0, user_attrs=attributes)
    assert whole_rounds(settings, {0: one}) == rounds
    if seconds:
        assert room_for_a_round(settings, {0: one}, seconds - 20.0)
        assert not room_for_a_round(settings, {0: one}, seconds - 19.0)
        assert f"then {rounds} rounds of repeats of 2 configs, {rounds * 20} s" in foreseen(
            settings, {0: one}
        )


def test_a_round_that_was_begun_is_ended_and_the_next_one_begins_only_with_room(
    tmp_path: Path, corpus: Path
) -> None:
    own = {"trials": 2, "repeat_seeds": 2, "repeat_best": 1, "seconds": 1000}
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus, sweep=own))])
    trials, repeats = open_studies(settings)
    worker = Worker(settings, trials, repeats, Pulse(trials, tmp_path / "study"))
    for slot in (0, 1):
        record = trials.ask()
        record.suggest_float("optimizer.head_lr", 1e-3, 1e-1, log=True)
        for key, value in {"slot": slot, "attempt": 0, "seconds": 10.0, "steps": 12}.items():
            record.set_user_attr(key, value)
        trials.tell(record, 1.0 + slot)
    first = optuna.trial.create_trial(
        state=TrialState.COMPLETE, value=1.0, user_attrs={"slot": 0, "of": 0, "seed": 1}
    )
    worker.spent = lambda: 981.0  # nineteen seconds are left, and a round takes twenty
    assert not worker.more_repeats({})
    assert worker.more_repeats({0: first})
    worker.spent = lambda: 980.0
    assert worker.more_repeats({})


def test_a_grid_is_tried_whole_where_other_samplers_have_seen_enough(tmp_path: Path, corpus: Path) -> None:
    """A block of twenty settings that cannot be built stands in front of the rest of a grid."""
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus)), "--steps", "900", "--trials", "0"])
    made = {"attempt": 0, "steps": 12, "seconds": 1.0}
    slots = {
        0: optuna.trial.create_trial(state=TrialState.COMPLETE, value=1.0, user_attrs=made | {"slot": 0})
    }
    for slot in range(1, 21):
        attributes = {"slot": slot, "attempt": 0, "steps": 0, "seconds": 0.0}
        slots[slot] = optuna.trial.create_trial(state=TrialState.FAIL, user_attrs=attributes)
    assert more_trials(settings, slots, 0.0, 80)
    assert not more_trials(settings, slots, 0.0, None)
    del slots[20]
    assert more_trials(settings, slots, 0.0, None)


def test_a_grid_that_goes_on_after_another_sampler_is_tried_whole(tmp_path: Path, corpus: Path) -> None:
    space, few = {"model.dropout": [0.0, 0.2], "model.n_layer": [1, 2]}, {"trials": 0, "repeat_seeds": 0}
    path = tiny(tmp_path, corpus, space=space, max_steps=3, sweep=few)
    _, drawn = sweep(path, "--sampler", "random", "--trials", "2", "--sampler_seed", "4")
    assert drawn[1].params["model.dropout"] == 0.2  # beside the config itself, which is the first of a grid
    _, slots = sweep(path, "--sampler", "grid")
    assert len({tuple(sorted(r.params.items())) for r in slots.values()}) == len(slots) == 4


def test_a_budget_in_steps_holds_the_longest_trial_of_the_space(tmp_path: Path, corpus: Path) -> None:
    for space in ({"max_steps": {"int": [6, 24]}}, {"arms": {"a": {"max_steps": 6}, "b": {"max_steps": 24}}}):
        words = ["--config", str(tiny(tmp_path, corpus, space=space)), "--trials", "0", "--steps"]
        settings = parse_settings([*words, "40"])
        attributes = {"slot": 0, "attempt": 0, "steps": 17}
        slots = {0: optuna.trial.create_trial(state=TrialState.COMPLETE, value=1.0, user_attrs=attributes)}
        assert not more_trials(settings, slots, 0.0, None)  # 17 + 24
        assert more_trials(settings, slots | {0: replaced(slots[0], steps=16)}, 0.0, None)
        with pytest.raises(SystemExit):
            parse_settings([*words, "23"])


def test_a_budget_in_steps_holds_a_trial_whose_steps_do_not_vary(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sometimes = {"max_steps": {"int": [6, 24], "when": {"optimizer.name": "muon"}}}
    space = sometimes | {"optimizer.name": ["adamw", "muon"]}
    for own, sentence in ((1000, "--steps is 30, and one trial may take 1000"), (0, "needs max_steps")):
        path = tiny(tmp_path, corpus, space=space, max_steps=own)
        with pytest.raises(SystemExit):
            parse_settings(["--config", str(path), "--steps", "30"])
        assert sentence in capsys.readouterr().err


def test_a_budget_in_steps_ends_where_the_space_has_nothing_left(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "NOTHING_NEW", 4)
    space = {"model.dropout": [0.0, 0.2]}
    path = tiny(tmp_path, corpus, space=space, max_steps=3, sweep={"trials": 0, "repeat_seeds": 0})
    _, slots = sweep(path, "--steps", "10000", "--sampler", "random")
    trained = [slot for slot, record in slots.items() if record.user_attrs["steps"]]
    assert len(trained) == 2 and len(slots) == trained[-1] + 5
    by_trials = parse_settings(["--config", str(path), "--trials", "100"])
    assert more_trials(by_trials, slots, 0.0, None)  # Trials end by themselves.
    monkeypatch.setattr(budget, "NOTHING_NEW", 5)
    assert more_trials(parse_settings(["--config", str(path), "--steps", "10000"]), slots, 0.0, None)


def replaced(record: optuna.trial.FrozenTrial, **attributes: Any) -> optuna.trial.FrozenTrial:
    return optuna.trial.create_trial(
        state=record.state, value=record.value, user_attrs=record.user_attrs | attributes
    )


def test_five_failures_and_nothing_else_end_a_sweep(tmp_path: Path, corpus: Path) -> None:
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus)), "--trials", "30"])
    slots = {
        n: optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={"slot": n, "attempt": 0})
        for n in range(5)
    }
    assert not more_trials(settings, slots, 0.0, None)
    del slots[4]
    assert more_trials(settings, slots, 0.0, None)
