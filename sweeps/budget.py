"""The budget of a sweep: whether there is room for another trial, and how many rounds of repeats follow.

A budget in seconds is for trials and repeats. A round trains the best few and the config itself again, with
another seed; rounds are whole, since an unfinished one compares nothing, and take half of the time at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from optuna.trial import FrozenTrial, TrialState

from sweeps.board import KILLED, is_done
from sweeps.settings import SweepSettings

ALL_FAILED = 5  # Failed trials after which, if none trained, the fault is not one trial's.
# Trials in a row without a step after which the space is taken to hold no other settings, or next to none.
NOTHING_NEW = 20
FEWEST = 2  # The fewest rounds of repeats that give an interval.
SHARE = 0.5  # The part of a budget in seconds that repeats may take.


def more_trials(
    settings: SweepSettings, slots: Mapping[int, FrozenTrial], spent: float, grid: int | None
) -> bool:
    """Return whether the budget has room for a trial beyond these slots.

    Args:
        settings: The settings of the sweep.
        slots: The trials so far.
        spent: Seconds of the budget that are used.
        grid: How many trials a grid has; None for other samplers.
    """
    sweep = settings.sweep
    done = [r for r in slots.values() if is_done(r)]
    if len(done) >= ALL_FAILED and all(r.state == TrialState.FAIL for r in done):
        return False
    if not sweep.trials and grid is None and nothing_new(slots):  # A grid ends by itself.
        return False
    if (sweep.trials and len(slots) >= sweep.trials) or (grid is not None and len(slots) >= grid):
        return False
    whole = settings.space.most_steps(settings.config)
    known = [r.user_attrs.get("steps", 0) for r in done if KILLED not in r.user_attrs]
    used = sum(known) + whole * (len(slots) - len(known))
    if sweep.steps and used + whole > sweep.steps:
        return False
    if sweep.seconds and slots:
        repeats = seconds_of_repeats(settings, slots, whole_rounds(settings, slots))
        return spent + seconds_of_one(slots) + repeats <= sweep.seconds
    return True


def nothing_new(slots: Mapping[int, FrozenTrial]) -> bool:
    """Return whether the last trials took no step, so that budgets in steps or seconds would never end."""
    last = list(slots.values())[-NOTHING_NEW:]
    return len(last) == NOTHING_NEW and all(is_done(r) and not r.user_attrs.get("steps") for r in last)


def seconds_of_one(slots: Mapping[int, FrozenTrial]) -> float:
    """Return the mean seconds of a whole trial; 0 before there was one.

    Trials that took over the result of an earlier one do not count.
    """
    took = [
        r.user_attrs["seconds"]
        for r in slots.values()
        if r.state == TrialState.COMPLETE and "seconds" in r.user_attrs and "same_as" not in r.user_attrs
    ]
    return sum(took) / len(took) if took else 0.0


def seconds_of_repeats(settings: SweepSettings, slots: Mapping[int, FrozenTrial], rounds: int) -> float:
    """Estimate the seconds of so many rounds from the trials so far."""
    sweep = settings.sweep
    return math.ceil((sweep.repeat_best + 1) * rounds / sweep.workers) * seconds_of_one(slots)


def whole_rounds(settings: SweepSettings, slots: Mapping[int, FrozenTrial]) -> int:
    """Return the number of rounds of repeats: `repeat_seeds`, or as many as half of the seconds allow.

    Fewer than FEWEST would not tell a difference from chance, so then there are none.
    """
    sweep = settings.sweep
    room = SHARE * sweep.seconds
    if not sweep.seconds or seconds_of_repeats(settings, slots, sweep.repeat_seeds) <= room:
        return sweep.repeat_seeds
    fits = (n for n in range(sweep.repeat_seeds, -1, -1) if seconds_of_repeats(settings, slots, n) <= room)
    rounds = next(fits)
    return rounds if rounds >= FEWEST else 0


def room_for_a_round(settings: SweepSettings, slots: Mapping[int, FrozenTrial], spent: float) -> bool:
    """Return whether another round of repeats should end within the budget, after `spent` seconds of it."""
    seconds = settings.sweep.seconds
    return not seconds or spent + seconds_of_repeats(settings, slots, 1) <= seconds


def foreseen(settings: SweepSettings, slots: Mapping[int, FrozenTrial]) -> str:
    """Say what the rest of a budget in seconds is for, once a trial was whole; "" before."""
    sweep, one = settings.sweep, seconds_of_one(slots)
    if not (sweep.seconds and one):
        return ""
    rounds = whole_rounds(settings, slots)
    repeats = seconds_of_repeats(settings, slots, rounds)
    trials = int((sweep.seconds - repeats) / one * sweep.workers)
    return (
        f"a whole trial takes {one:,.0f} s: about {trials:,} in {sweep.seconds:g} s, more where some are "
        f"pruned, then {rounds} rounds of repeats of {sweep.repeat_best + 1} configs, {repeats:,.0f} s"
    )
