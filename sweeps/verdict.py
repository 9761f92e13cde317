"""The findings of a sweep: its table, whether the best differs from the config itself, and idle settings.

The best of many trials is partly the luckiest, so its own value says little. The best few and the config
itself are trained again with the same other seeds, and compared seed by seed: Student's interval of the
paired differences, at 95% for all comparisons together (Bonferroni).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from config import Config, parse_config
from config.schema import flat
from suites.tables import aligned
from sweeps.board import is_done
from sweeps.budget import FEWEST, seconds_of_repeats, whole_rounds
from sweeps.settings import OBJECTIVES, SweepSettings
from sweeps.space import Space, flow
from sweeps.study import chosen_of

CONFIDENCE = 0.95
SHOWN = 10  # Rows of the table.
BUDGETS = "max_steps", "max_epochs", "max_seconds"


@dataclass(frozen=True)
class Repeated:
    """The values of one candidate by seed: those of a trial's slot, or of the config itself (None)."""

    of: int | None
    values: dict[int, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds; NaN for a single one."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else math.nan


@dataclass(frozen=True)
class Difference:
    """A candidate minus the config itself, over the seeds that both have."""

    of: int
    seeds: int
    mean: float
    low: float
    high: float


def repeated(repeats: Mapping[int, FrozenTrial]) -> dict[int | None, Repeated]:
    """Return the values of each candidate by the first objective."""
    found: dict[int | None, dict[int, float]] = {}
    for record in repeats.values():
        if record.state == TrialState.COMPLETE:
            attributes = record.user_attrs
            found.setdefault(attributes["of"], {})[attributes["seed"]] = record.values[0]
    return {of: Repeated(of, values) for of, values in found.items()}


def differences(found: Mapping[int | None, Repeated]) -> list[Difference]:
    """Return the difference of each candidate that shares two seeds or more with the config itself."""
    from scipy.stats import t

    if None not in found:
        return []
    paired = {
        of: [value - found[None].values[s] for s, value in one.values.items() if s in found[None].values]
        for of, one in found.items()
        if of is not None
    }
    paired = {of: deltas for of, deltas in paired.items() if len(deltas) > 1}
    result = []
    for of, deltas in paired.items():
        mean, n = statistics.fmean(deltas), len(deltas)
        quantile = float(t.ppf(1 - (1 - CONFIDENCE) / 2 / len(paired), n - 1))
        half = quantile * statistics.stdev(deltas) / math.sqrt(n)
        result.append(Difference(of, n, mean, mean - half, mean + half))
    return result


def winner(
    settings: SweepSettings, slots: Mapping[int, FrozenTrial], repeats: Mapping[int, FrozenTrial]
) -> int | None:
    """Return the slot that is best with the other seeds, else the best trial; None is the config itself.

    Time may end before the last round. Candidates compete that share the most seeds with the config itself
    (or have the most, where it has none), by the seeds that they all have. One that failed once is out. While
    only the config itself was repeated, and none failed, the trials decide.
    """
    sign = 1 if OBJECTIVES[settings.sweep.objectives[0]] else -1
    failed = {r.user_attrs["of"] for r in repeats.values() if r.state == TrialState.FAIL}
    found = {of: one.values for of, one in repeated(repeats).items() if of not in failed}
    seeds = {of: set(values) & set(found.get(None, values)) for of, values in found.items()}
    most = max((len(own) for of, own in seeds.items() if of is not None), default=0)
    seeds = {of: own for of, own in seeds.items() if of is None or len(own) == most}
    shared = set.intersection(*seeds.values()) if seeds else set()
    if shared and (most or failed):
        return min(seeds, key=lambda of: sign * statistics.fmean(found[of][s] for s in shared))
    out = [chosen_of(settings, r.params) for slot, r in slots.items() if slot in failed]
    out += [settings.space.default(settings.config)] if None in failed else []
    done = [(sign * r.values[0], slot) for slot, r in slots.items() if r.state == TrialState.COMPLETE]
    left = [pair for pair in done if chosen_of(settings, slots[pair[1]].params) not in out]
    return min(left or done)[1] if done else None


def config_of(settings: SweepSettings, slots: Mapping[int, FrozenTrial], of: int | None) -> Config:
    """Return the config of a trial's slot; None stands for the config itself."""
    if of is None:
        return settings.config
    return settings.space.config(settings.config, chosen_of(settings, slots[of].params))


def verdict(
    settings: SweepSettings, slots: Mapping[int, FrozenTrial], repeats: Mapping[int, FrozenTrial]
) -> list[str]:
    """Return sentences on the repeated candidates, with their spread, and on those that differ."""
    name, found = settings.sweep.objectives[0], repeated(repeats)
    best = winner(settings, slots, repeats)
    default = settings.space.default(settings.config)
    if not any(r.state == TrialState.COMPLETE for r in slots.values()):
        return ["no trial was trained to its end, so there is nothing to compare"]
    if not found:
        shown = (
            "the config itself"
            if best is None or chosen_of(settings, slots[best].params) == default
            else f"trial {best}"
        )
        among = " of those that did not fail again" if repeats else ""
        lines = [
            f"{shown} has the best {name}{among}; nothing was repeated, so whether it differs is not known"
        ]
        if settings.sweep.repeat_seeds and not repeats and not whole_rounds(settings, slots):
            lines.append(
                f"half of --seconds {settings.sweep.seconds:g} has no room for {FEWEST} rounds of repeats; "
                f"about {seconds_of_repeats(settings, slots, FEWEST) * 2:,.0f} would have"
            )
        return lines
    lines, sign = [], 1 if OBJECTIVES[name] else -1
    for of, one in sorted(found.items(), key=lambda pair: sign * pair[1].mean):
        values = ", ".join(number(one.values[s]) for s in sorted(one.values))
        spread = f" +- {number(one.spread)}" if len(one.values) > 1 else ""
        seeds = "one other seed" if len(one.values) == 1 else f"{len(one.values)} other seeds"
        lines.append(f"{called(of)}: {number(one.mean)}{spread} over {seeds} ({values})")
    compared = differences(found)
    better = [d for d in compared if sign * (d.high if sign > 0 else d.low) < 0]
    if not compared:
        lines.append("too few seeds were trained to say whether any differs from the config itself")
    for d in compared:
        way = "lower" if d.mean < 0 else "higher"
        sense = "better" if d in better else "worse"
        if d.low <= 0 <= d.high:
            sense = "not distinguishable"
        lines.append(
            f"{called(d.of)} against the config itself: {number(abs(d.mean))} {way}, "
            f"{CONFIDENCE:.0%} interval [{number(d.low)}, {number(d.high)}] over {d.seeds} seeds: {sense}"
        )
    if compared and not better:
        lines.append("no setting was found that differs for the better from the config itself")
    return lines


def called(of: int | None) -> str:
    return "the config itself" if of is None else f"trial {of}"


def number(value: float) -> str:
    size = abs(value)
    if 0 < size < 1e-3:
        return f"{value:.2g}"
    return f"{value:.4f}" if size < 1000 else f"{value:,.0f}" if size < 1e15 else f"{value:.4g}"


def table(settings: SweepSettings, slots: Mapping[int, FrozenTrial]) -> list[str]:
    """Return the lines of a table of the best trials, and of the one that is the config itself."""
    sign = 1 if OBJECTIVES[settings.sweep.objectives[0]] else -1
    done = [(sign * r.values[0], slot) for slot, r in slots.items() if r.state == TrialState.COMPLETE]
    order = [slot for _, slot in sorted(done)][:SHOWN]
    own = own_slot(settings, slots)
    if own is not None and own not in order and slots[own].state == TrialState.COMPLETE:
        order.append(own)
    return _lines(settings, slots, order)


def own_slot(settings: SweepSettings, slots: Mapping[int, FrozenTrial]) -> int | None:
    """Return the slot of the trial that is the config itself, if there is one."""
    default = settings.space.default(settings.config)
    return next((s for s, r in slots.items() if chosen_of(settings, r.params) == default), None)


def front(settings: SweepSettings, slots: Mapping[int, FrozenTrial]) -> list[str]:
    """Return the lines of a table of all trials that no other one beats; none for a single objective.

    One beats another if it is better by one objective and worse by none. Trials stand in the order of the
    first objective; among equal settings the one that was trained stands for all.
    """
    signs = [1 if OBJECTIVES[name] else -1 for name in settings.sweep.objectives]
    if len(signs) == 1:
        return []
    done = {
        slot: tuple(sign * value for sign, value in zip(signs, record.values, strict=True))
        for slot, record in slots.items()
        if record.state == TrialState.COMPLETE and "same_as" not in record.user_attrs
    }

    def is_beaten(own: tuple[float, ...]) -> bool:
        return any(
            other != own and all(theirs <= mine for theirs, mine in zip(other, own, strict=True))
            for other in done.values()
        )

    order = sorted((slot for slot, own in done.items() if not is_beaten(own)), key=lambda slot: done[slot])
    if not order:
        return []
    head = f"the front, {len(order)} of {len(done)} trials: none is better by one objective and worse by none"
    return [head, *_lines(settings, slots, order)]


def _lines(settings: SweepSettings, slots: Mapping[int, FrozenTrial], order: list[int]) -> list[str]:
    """Return the lines of a table of these trials: their values, steps and settings."""
    keys = [p.key for p in settings.space.parameters]
    own = own_slot(settings, slots)
    rows = [["trial", *(name.replace("_", " ") for name in settings.sweep.objectives), "steps", *keys]]
    for slot in order:
        record = slots[slot]
        mark = f"{slot} (the config)" if slot == own else str(slot)
        chosen = chosen_of(settings, record.params)
        rows.append(
            [
                mark,
                *(number(value) for value in record.values),
                f"{record.user_attrs.get('steps', 0):,}",
                *(short(chosen[key]) if key in chosen else "-" for key in keys),
            ]
        )
    return aligned(rows) if len(rows) > 1 else []


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else flow(value)


def requested_steps(settings: SweepSettings, record: FrozenTrial) -> int:
    """Return the steps of a trial that nothing ends early."""
    chosen = settings.space.settings(chosen_of(settings, record.params))
    return chosen.get("max_steps", settings.config.train.max_steps)


def counts(settings: SweepSettings, slots: Mapping[int, FrozenTrial]) -> list[str]:
    """Return lines on how many trials ended how, the steps they took, and each reason for a failure."""
    left = sum(not is_done(record) for record in slots.values())
    slots = {slot: record for slot, record in slots.items() if is_done(record)}
    states = Counter(record.state for record in slots.values())
    steps = sum(record.user_attrs.get("steps", 0) for record in slots.values())
    pruned = [r for r in slots.values() if r.state == TrialState.PRUNED and "same_as" not in r.user_attrs]
    whole = steps + sum(max(0, requested_steps(settings, r) - r.user_attrs.get("steps", 0)) for r in pruned)
    saved = f", {1 - steps / whole:.0%} fewer than without pruning" if whole > steps else ""
    line = (
        f"{len(slots) + left} trials: {states[TrialState.COMPLETE]} complete, "
        f"{states[TrialState.PRUNED]} pruned, {states[TrialState.FAIL]} failed"
        f"{f', {left} not ended' if left else ''}; {steps:,} steps{saved}"
    )
    reasons = Counter(
        record.user_attrs.get("reason", "") for record in slots.values() if record.state == TrialState.FAIL
    )
    twins = sum("same_as" in record.user_attrs for record in slots.values())
    same = [f"{twins} of them had the settings of an earlier one and were not trained again"] if twins else []
    return [line, *same, *(f"{count} failed: {reason}" for reason, count in reasons.most_common())]


def idle(settings: SweepSettings, slots: Mapping[int, FrozenTrial]) -> list[str]:
    """Name parameters that changed nothing: trials that differ in them alone had the same first losses.

    Where trials with equal losses differ in several parameters, these are named together. A trial that ended
    early has fewer losses; one loss alone, which is before any update, says nothing.
    """
    alike: dict[tuple[float, ...], list[tuple[int, dict[str, Any], list[float]]]] = {}
    for slot, record in slots.items():
        losses = record.user_attrs.get("first_losses", [])
        # Trials are grouped by two losses, since 20,000 trials have too many pairs.
        if len(losses) > 1:
            alike.setdefault(tuple(losses[:2]), []).append((slot, chosen_of(settings, record.params), losses))
    pairs = itertools.chain.from_iterable(itertools.combinations(group, 2) for group in alike.values())
    # The pair that says most, by the parameters in which it differs: (equal to the end, losses, two trials).
    found: dict[frozenset[str], tuple[bool, int, int, int]] = {}
    for (one, a, losses), (other, b, same) in pairs:
        differ = frozenset(key for key in {**a, **b} if a.get(key) != b.get(key))
        count = min(len(losses), len(same))
        if losses[:count] == same[:count] and differ:
            ended = all(slots[slot].state == TrialState.COMPLETE for slot in (one, other))
            to_the_end = ended and slots[one].values == slots[other].values
            known = found.get(differ)
            if known is None or (to_the_end, count) > known[:2]:
                found[differ] = (to_the_end, count, one, other)
    lines = []
    for differ, (to_the_end, count, one, other) in sorted(found.items(), key=lambda pair: len(pair[0])):
        if any(smaller < differ for smaller in found):
            continue
        names = " and ".join(sorted(differ))
        if to_the_end:
            after = "nor in their results"
        elif all(slots[slot].state == TrialState.COMPLETE for slot in (one, other)):
            after = "their results differ, so it may act later"
        else:
            after = "what it would have done later is not known"
        lines.append(
            f"{names} changed nothing in the first {count} losses of trials {one} and {other}; {after}"
        )
    return lines


def best_yaml(config: Config, space: Space, base: Config) -> dict[str, Any]:
    """Return the values of a config file for `trainingmanager.py`: those that differ from the defaults.

    The budget of the trials is left out, unless the space varies it: a run by the file is for longer.

    Args:
        config: The config that is written.
        space: The space of the sweep.
        base: The config that the space varies.
    """
    published = config.train.base  # A published base brings defaults of its own.
    default = flat(parse_config(["--base", published] if published is not None else [])) | {"base": None}
    left_out = {"run", "resume", *(key for key in BUDGETS if len(set(space.values(base, key))) == 1)}
    plain: dict[str, Any] = {}
    for key, value in flat(config).items():
        if value != default[key] and key not in left_out:
            group, _, name = key.rpartition(".")
            (plain.setdefault(group, {}) if group else plain)[name] = value
    return plain


def best_head(settings: SweepSettings, config: Config, of: int | None) -> str:
    """Return the comment on top of best.yaml: whose settings they are, and how long they were tried."""
    tried = ", ".join(f"{key} {value:g}" for key in BUDGETS if (value := flat(config)[key]))
    return (
        f"# {called(of).capitalize()} of the sweep in {str(settings.sweep.folder)!r}, tried for {tried}.\n"
        "# The budget is yours: --max_steps, --max_epochs or --max_seconds.\n"
    )
