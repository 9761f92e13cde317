"""The search space: which settings vary, over what, and when. From YAML, checked against the config.

    space:
      optimizer.lr: {log: [1e-3, 1e-1]}          # a range on a log scale; {float: [0, 0.3]} on a plain one
      model.n_layer: {int: [2, 8], step: 2}
      optimizer.name: [adamw, muon]              # or {choice: [adamw, muon]}
      optimizer.muon_lr: {log: [5e-3, 5e-2], when: {optimizer.name: muon}}
      arms:                                      # named settings, of which a trial takes one as a whole
        small: {model.n_layer: 2, model.n_embd: 128}
        large: {model.n_layer: 8, model.n_embd: 512}

    trial's parameters -> space.settings -> space.config -> a whole Config

No torch and no optuna: a mistake is told at once.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from config import CONFIG_GROUPS, SETTINGS, Config, check_ranges, unused_keys
from config.schema import flat
from config.setting import FREE

ARMS = "arms"
KINDS = ("float", "int", "log", "choice")
# These keys decide which run it is, or how it is compared, rather than how good it is.
NOT_A_SETTING = {
    **dict.fromkeys(
        ("run", "resume", "prove_resume", "plan", "prepare", "overfit", "allow"), "is no setting of a model"
    ),
    **dict.fromkeys(
        (
            "validation_rows",
            "eval_precision",
            *(f"data.{name}" for name in ("source", "suffixes", "text_field", "group_field", "regroup")),
            *(f"data.{name}" for name in ("validation_one_in", "test_one_in", "drop_comments")),
            "data.skip_undecodable",
        ),
        "changes what validation reads, so that trials would not compare",
    ),
}
# These keys may change on a resume, since fingerprints or the run itself tell; yet they change the result.
MATTERS = ("base", "base_revision", "tokenizer.path", "patience", "validate_every")
GRID = 10_000  # The most combinations of a grid: a week of trials of a minute.
# Combinations of choices that are checked before the start; where there are more, so many are sampled.
COMBINATIONS = 32


@dataclass(frozen=True)
class Parameter:
    """One thing that varies: a range, a choice of values, or a choice of arms.

    Args:
        key: A key of the config, or `arms`.
        kind: `float`, `int` or `choice`.
        low, high: The ends of a range, both included.
        log: Whether a range is sampled evenly on a log scale.
        step: The distance between the values of an `int` range.
        points: How many values of a range the grid tries; 0 where none were named.
        choices: The values, as the config holds them; for arms their names.
        when: The parameter varies only where each of these keys has one of its values.
        arms: The settings of each arm.
    """

    key: str
    kind: str
    low: float = 0
    high: float = 0
    log: bool = False
    step: int = 1
    points: int = 0
    choices: tuple[Any, ...] = ()
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def holds(self, value: Any) -> bool:
        """Return whether the parameter can have this value."""
        if self.kind == "choice":
            return value in self.choices
        if type(value) not in (int, float) or not self.low <= value <= self.high:
            return False
        return self.kind == "float" or (value == int(value) and (value - self.low) % self.step == 0)

    def grid(self) -> tuple[Any, ...]:
        """Return every value that the grid tries.

        Raises:
            ValueError: A range has infinitely many values, or too many.
        """
        if self.kind == "choice":
            return self.choices
        if self.points:
            shares = [i / (self.points - 1) for i in range(self.points)]
            if self.log:
                values = [math.exp(math.log(self.low) + s * math.log(self.high / self.low)) for s in shares]
            else:
                values = [self.low + s * (self.high - self.low) for s in shares]
            values[0], values[-1] = self.low, self.high
            if self.kind == "int":
                low = int(self.low)
                return tuple(dict.fromkeys(low + round((v - low) / self.step) * self.step for v in values))
            return tuple(values)
        if self.kind == "int" and not self.log and (self.high - self.low) / self.step < GRID:
            return tuple(range(int(self.low), int(self.high) + 1, self.step))
        raise ValueError(
            f"space: {self.key} is a range, of which a grid cannot try every value; add `points: 5` to "
            "it, or take another --sampler"
        )


@dataclass(frozen=True)
class Space:
    """The parameters of a sweep, each after those that its `when` names.

    `plain` is the space as it was written, with full keys; it tells one space from another.
    """

    parameters: tuple[Parameter, ...]
    plain: dict[str, Any]

    def draw(self, base: Mapping[str, Any], choose: Callable[[Parameter], Any]) -> dict[str, Any]:
        """Choose the parameters that vary, one by one, as their `when` allows.

        Args:
            base: The config's values by key.
            choose: Returns the value of a parameter.
        """
        chosen: dict[str, Any] = {}
        for parameter in self.parameters:
            known = {**base, **self.settings(chosen)}
            if all(known[key] in values for key, values in parameter.when.items()):
                chosen[parameter.key] = choose(parameter)
        return chosen

    def settings(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Return the chosen values by key of the config: arms become what they stand for."""
        arms = {p.key: p.arms for p in self.parameters if p.arms}
        found: dict[str, Any] = {}
        for key, value in chosen.items():
            found |= arms[key][value] if key in arms else {key: value}
        return found

    def config(self, base: Config, chosen: Mapping[str, Any]) -> Config:
        """Return the whole Config of a trial; a parameter that does not vary in it is as in `base`, if read.

        Raises:
            ValueError: A model that cannot be built, a value out of range, or one that nothing reads.
        """
        default, off = flat(Config()), {p.key for p in self.parameters if p.key not in chosen}
        config = replaced(base, self.settings(chosen))
        config = replaced(config, {key: default[key] for key, _ in unused_keys(config) if key in off})
        check_ranges(config)
        for key, reason in unused_keys(config):
            raise ValueError(f"{key} is set, but {reason}")
        return config

    def values(self, base: Config, key: str) -> list[Any]:
        """Return the values that a key of the config can have in a trial, or the two ends of a range."""
        found = [flat(base)[key]]
        for parameter in self.parameters:
            if parameter.key == key:
                own = [*parameter.choices] or [parameter.low, parameter.high]
                found = own + (found if parameter.when else [])  # Where it does not vary, it is as in `base`.
            elif key in next(iter(parameter.arms.values()), ()):
                found = [arm[key] for arm in parameter.arms.values()]
        return found

    def most_steps(self, base: Config) -> int:
        """Return the most steps of one trial in the space; 0 where a trial may have no such limit."""
        found = self.values(base, "max_steps")
        return max(found) if all(found) else 0

    def first_validation(self, base: Config) -> int:
        """Return the earliest step at which a trial may validate on the way; 0 where none does."""
        found = [n for key in ("validate_every", "save_every") for n in self.values(base, key) if n]
        return min(found, default=0)

    def default(self, base: Config) -> dict[str, Any] | None:
        """Return the parameters that give the config itself; None if the space does not hold it."""
        values, model = flat(base), base.model
        found = replace(base, model=replace(model, vocab_size=model.vocab_size or 1).resolved())
        resolved = flat(found.with_optimizer_defaults())

        def choose(parameter: Parameter) -> Any:
            if parameter.arms:
                named = (
                    n for n, arm in parameter.arms.items() if all(values[k] == v for k, v in arm.items())
                )
                return next(named, None)
            value = values[parameter.key]
            # A null of these groups follows another key; with a published base the dropout is the base's own.
            if value is None and parameter.key.startswith(("model.", "optimizer.")):
                unread = base.train.base is not None and model.dropout is None
                value = None if unread and parameter.key.startswith("model.") else resolved[parameter.key]
            return value if parameter.holds(value) else None

        chosen = self.draw(values, choose)
        return None if None in chosen.values() else chosen

    def grid(self, base: Config) -> list[dict[str, Any]]:
        """Return every combination, in a fixed order.

        Raises:
            ValueError: A range has infinitely many values, or there are more than GRID combinations.
        """
        values = {p.key: p.grid() for p in self.parameters}
        found = list(itertools.islice(self._walk(flat(base), {}, values), GRID + 1))
        if len(found) > GRID:
            counts = " x ".join(str(len(own)) for own in values.values())
            raise ValueError(
                f"space: its grid of {counts} values has more than {GRID} combinations; "
                "leave values or `points` out, or take another --sampler"
            )
        return found

    def _walk(
        self, base: Mapping[str, Any], chosen: dict[str, Any], values: Mapping[str, tuple[Any, ...]]
    ) -> Iterator[dict[str, Any]]:
        """Yield the combinations of `values` that begin with `chosen`."""
        last: Parameter | None = None

        def choose(parameter: Parameter) -> Any:
            nonlocal last
            if parameter.key in chosen:
                return chosen[parameter.key]
            last = last or parameter
            return values[parameter.key][0]

        whole = self.draw(base, choose)
        if last is None:
            yield whole
            return
        branch = last.key
        before = {key: whole[key] for key in itertools.takewhile(lambda key: key != branch, whole)}
        for value in values[branch]:
            yield from self._walk(base, {**before, branch: value}, values)

    def check(self, base: Config) -> int:
        """Build configs of combinations of choices; return how many of them cannot be built.

        A range is tried at its ends, and at the values that a `when` names between them.

        Raises:
            ValueError: A value can be built in none of them, so it contradicts the config.
        """
        ends = {p.key: p.choices or (p.low, p.high) for p in self.parameters}
        for key, named in (pair for p in self.parameters for pair in p.when.items()):
            parent = next((p for p in self.parameters if p.key == key and not p.choices), None)
            if parent is not None:
                ends[key] = tuple(dict.fromkeys((*ends[key], *filter(parent.holds, named))))
        values, generator = flat(base), random.Random(0)
        tried: list[dict[str, Any]] = list(itertools.islice(self._walk(values, {}, ends), COMBINATIONS + 1))
        if len(tried) > COMBINATIONS:
            tried = [self.draw(values, lambda p: generator.choice(ends[p.key])) for _ in range(COMBINATIONS)]
            for parameter in self.parameters:  # Each value of each parameter is tried at least twice.
                for value in ends[parameter.key]:
                    for _ in range(2):
                        tried.append(
                            self.draw(
                                values,
                                lambda p, at=parameter, v=value: (
                                    v if p is at else generator.choice(ends[p.key])
                                ),
                            )
                        )
        wrong: dict[tuple[str, Any], str] = {}
        reason = ""
        right: set[tuple[str, Any]] = set()
        refused = 0
        for chosen in tried:
            items = set(chosen.items())
            try:
                self.config(base, chosen)
                right |= items
            except ValueError as error:
                refused += 1
                reason = str(error)
                wrong |= dict.fromkeys(items, reason)
        if refused == len(tried):
            raise ValueError(f"space: it contradicts the config wherever it was looked at: {reason}")
        for parameter in self.parameters:  # Parents come first, since the contradiction is theirs.
            for value in ends[parameter.key]:
                if (parameter.key, value) in wrong and (parameter.key, value) not in right:
                    raise ValueError(
                        f"space: {parameter.key} {value} contradicts the config: "
                        f"{wrong[parameter.key, value]}"
                    )
            if not any((parameter.key, value) in right for value in ends[parameter.key]):
                raise ValueError(f"space: {parameter.key} never varies, since its `when` never holds")
        return refused


def replaced(base: Config, values: Mapping[str, Any]) -> Config:
    """Return the config with other values by full key."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        groups.setdefault(group or "train", {})[name] = value
    return replace(base, **{name: replace(getattr(base, name), **own) for name, own in groups.items()})


# --- from YAML ---------------------------------------------------------------------------------------


def parse_space(raw: Any, base: Config) -> Space:
    """Parse the space of a `space:` section and check it against the config that it varies.

    Raises:
        ValueError: One sentence: an unknown key, with the nearest known one; an empty or reversed range; a
            value that the key cannot have; a condition that never holds; a contradiction with the config.
    """
    if not isinstance(raw, dict) or not raw:
        raise ValueError("space: it must be a mapping of settings to what they vary over, with at least one")
    named: dict[str, Any] = {}
    for name, spec in _ungrouped(raw):
        key = name if name == ARMS else known_key(name)
        if key in named:
            raise ValueError(f"space: {key} is there twice; leave one out")
        named[key] = spec
    parameters = [_arms(spec, base) if key == ARMS else _parameter(key, spec) for key, spec in named.items()]
    set_by = [(k, p.key) for p in parameters for k in (next(iter(p.arms.values())) if p.arms else (p.key,))]
    for (key, one), (again, other) in itertools.combinations(set_by, 2):
        if key == again:
            raise ValueError(f"space: {key} is set by {one} and by {other}; leave one out")
    space = Space(tuple(_parents_first(parameters)), {p.key: _plain(p) for p in parameters})
    space.check(base)
    return space


def known_key(name: Any) -> str:
    """Return the full key of the config for a name that may leave its group out, if only one group has it."""
    keys = list(flat(Config()))
    found = [key for key in keys if key == name] or [k for k in keys if k.rsplit(".", 1)[-1] == name]
    if len(found) > 1:
        raise ValueError(f"space: {name} may be {' or '.join(found)}; write the whole name")
    if not found:
        known = {key if "." in str(name) else key.rsplit(".", 1)[-1]: key for key in keys}
        near = [known[n] for n in difflib.get_close_matches(str(name), known, 1, 0.5)]
        raise ValueError(f"space: {name} is no setting" + (f"; did you mean {near[0]}?" if near else ""))
    key = found[0]
    reason = NOT_A_SETTING.get(key)
    if reason is None and SETTINGS[key].on_resume == FREE and key not in MATTERS:
        reason = "changes nothing that a run computes"
    if reason is not None:
        raise ValueError(f"space: {key} {reason}; leave it out of the space")
    return key


def _ungrouped(raw: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield names and values, where `optimizer: {lr: ...}` is `optimizer.lr: ...`."""
    for key, value in raw.items():
        if key in CONFIG_GROUPS and key and isinstance(value, dict):
            if not value:
                raise ValueError(f"space: {key} is empty; write in it what varies, or leave it out")
            yield from ((f"{key}.{name}", spec) for name, spec in value.items())
        else:
            yield key, value


def _parameter(key: str, spec: Any) -> Parameter:
    """Read what a key varies over; ValueError, in one sentence, for what is no such description."""
    spec = {"choice": spec} if isinstance(spec, list) else spec
    ways = f"{key}: a list of choices, or one of {{log: [low, high]}}, {{float: ...}}, {{int: ...}}"
    if not isinstance(spec, dict):
        raise ValueError(f"space: {key} is {flow(spec)}; write {ways}")
    goes_with = {"when": KINDS, "step": ("int",), "points": ("int", "float", "log")}
    kinds = [name for name in spec if name in KINDS]
    if len(kinds) != 1 or any(name not in KINDS and name not in goes_with for name in spec):
        raise ValueError(
            f"space: {key} is {flow(spec)}; write {ways}, and beside it `when`, `step` or `points`"
        )
    wrong = next((name for name in spec if name not in KINDS and kinds[0] not in goes_with[name]), None)
    if wrong is not None:
        raise ValueError(
            f"space: {key} has `{wrong}` beside `{kinds[0]}`; it goes with "
            f"{' and '.join(goes_with[wrong])} alone"
        )
    kind, when = kinds[0], _when(key, spec.get("when", {}))
    if kind == "choice":
        return Parameter(key, "choice", choices=_choices(key, spec["choice"]), when=when)
    low, high = _ends(key, spec[kind])
    whole = _type_of(key) is int
    if not whole and _type_of(key) is not float:
        raise ValueError(f"space: {key} is no number, so it has no range; write a list of choices")
    if kind == "float" and whole:
        raise ValueError(f"space: {key} is a whole number; write {{int: [{low:.15g}, {high:.15g}]}}")
    if (kind == "int" or whole) and (low != int(low) or high != int(high)):
        raise ValueError(f"space: {key} goes from {low:.15g} to {high:.15g}, and both must be whole numbers")
    if kind == "log" and low <= 0:
        raise ValueError(f"space: {key} goes from {low:.15g} on a log scale; it must begin above 0")
    step, points = spec.get("step", 1), spec.get("points", 0)
    if type(step) is not int or step < 1:
        raise ValueError(f"space: {key} has the step {step!r}; it must be a whole number from 1 on")
    if kind == "int" and (over := (high - low) % step):
        ends = [f"{end:.15g}" for end in (high - over, high - over + step) if end > low]
        raise ValueError(
            f"space: {key} goes from {low:.15g} to {high:.15g}, which steps of {step} do not meet; let it "
            f"end at {' or '.join(ends)}"
        )
    if "points" in spec and (type(points) is not int or not 2 <= points <= GRID):
        raise ValueError(f"space: {key} has {points!r} points; write a whole number from 2 to {GRID}")
    if kind == "int" or whole:
        return Parameter(key, "int", int(low), int(high), kind == "log", step, points, when=when)
    return Parameter(key, "float", low, high, kind == "log", points=points, when=when)


def _ends(key: str, ends: Any) -> tuple[float, float]:
    values = ends if isinstance(ends, list) else []
    try:
        # YAML reads 1e-4, which has no dot, as a text.
        low, high = (float(v) for v in values if not isinstance(v, bool))
    except (TypeError, ValueError):
        raise ValueError(f"space: {key} has the range {ends!r}; write two numbers, [low, high]") from None
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"space: {key} goes from {low} to {high}; both must be finite")
    if low == high:
        raise ValueError(
            f"space: {key} goes from {low:.15g} to {high:.15g}, which is one value; set it in the config"
        )
    if low > high:
        raise ValueError(
            f"space: {key} goes from {low:.15g} down to {high:.15g}; write the smaller one first"
        )
    return low, high


def _choices(key: str, values: Any) -> tuple[Any, ...]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"space: {key} has no choices; write a list of at least two")
    typed = tuple(_value(key, value) for value in values)
    twice = next((value for i, value in enumerate(typed) if value in typed[:i]), None)
    if twice is not None:
        raise ValueError(f"space: {key} has the choice {twice} twice, two arms that are one; leave one out")
    if len(typed) == 1:
        raise ValueError(f"space: {key} has one choice, {typed[0]}; set it in the config")
    return typed


def _value(key: str, value: Any) -> Any:
    """Return a value as the config holds it, a tuple for a list; ValueError if its type does not fit."""
    kind = _type_of(key)
    if value is None and kind is not _hint(key):
        return None
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # YAML reads 1e-4, which has no dot, as a text.
            return float(value)
    if get_origin(kind) is tuple and isinstance(value, list):
        inner = get_args(kind)[0]
        if all(type(item) is inner for item in value):
            return tuple(value)
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise ValueError(f"space: {key} {value!r} is none of {', '.join(get_args(kind))}")
    if get_origin(kind) is dict:
        raise ValueError(f"space: {key} is a mapping, which cannot vary")
    if type(value) is kind:
        return value
    raise ValueError(f"space: {key} {value!r} is not of the type {getattr(kind, '__name__', kind)}")


def _hint(key: str) -> Any:
    group, _, name = key.rpartition(".")
    return get_type_hints(CONFIG_GROUPS[group])[name]


def _type_of(key: str) -> Any:
    """Return the type of a key; of one that may be null, its other type."""
    options = [kind for kind in get_args(_hint(key)) if kind is not type(None)]
    return options[0] if len(options) < len(get_args(_hint(key))) else _hint(key)


def _when(key: str, when: Any) -> dict[str, tuple[Any, ...]]:
    if not isinstance(when, dict):
        raise ValueError(f"space: {key} has `when` {when!r}; write {{setting: value}}")
    found = {}
    for name, values in when.items():
        parent = _any_key(name)
        found[parent] = tuple(_value(parent, v) for v in (values if isinstance(values, list) else [values]))
    return found


def _any_key(name: Any) -> str:
    """Return the full key as `known_key` does, for a key that need not vary."""
    return name if name in NOT_A_SETTING else known_key(name)


def _arms(raw: Any, base: Config) -> Parameter:
    if not isinstance(raw, dict) or len(raw) < 2:
        raise ValueError("space: arms is a mapping of at least two names to their settings")
    arms: dict[str, dict[str, Any]] = {}
    for name, values in raw.items():
        if not isinstance(values, dict) or not values:
            raise ValueError(f"space: arm {name} has no settings; write {{setting: value}}")
        if not str(name).isprintable() or "$" in str(name):  # Matplotlib reads $ as mathematics.
            raise ValueError(f"space: the arm {name!r} must be named by printable characters other than $")
        keys = {key: known_key(key) for key, _ in _ungrouped(values)}
        arms[str(name)] = {keys[key]: _value(keys[key], value) for key, value in _ungrouped(values)}
    every = {key for arm in arms.values() for key in arm}
    default = flat(base)
    whole = {name: {key: arm.get(key, default[key]) for key in sorted(every)} for name, arm in arms.items()}
    for (one, a), (other, b) in itertools.combinations(whole.items(), 2):
        if a == b:
            raise ValueError(f"space: arms {one} and {other} are the same settings; leave one out")
    return Parameter(ARMS, "choice", choices=tuple(arms), arms=whole)


def _parents_first(parameters: list[Parameter]) -> list[Parameter]:
    """Order the parameters, each after those that its `when` names.

    Raises:
        ValueError: There is a circle, or a value that a parent never has.
    """
    sets = {key: p for p in parameters for key in (next(iter(p.arms.values())) if p.arms else (p.key,))}
    for parameter in parameters:
        for key, values in parameter.when.items():
            parent = sets.get(key)
            if parent is not None and not parent.arms and not any(parent.holds(v) for v in values):
                raise ValueError(
                    f"space: {parameter.key} varies when {key} is {values[0]}, which the space never has"
                )
    ordered: list[Parameter] = []
    waiting = list(parameters)
    while waiting:
        ready = [p for p in waiting if all(sets[key] in ordered for key in p.when if key in sets)]
        if not ready:
            raise ValueError(f"space: `when` of {waiting[0].key} comes back to itself")
        ordered += ready
        waiting = [p for p in waiting if p not in ready]
    return ordered


def flow(value: Any) -> str:
    """Return a value as YAML writes it in one line."""
    text = yaml.safe_dump([value], default_flow_style=True, sort_keys=False, width=math.inf)
    return text.strip()[1:-1]


def _plain(parameter: Parameter) -> dict[str, Any]:
    """Return what a parameter varies over, as JSON holds it."""
    values = {k: v for k, v in vars(parameter).items() if v not in ((), {}, 0, False) and k != "points"}
    return json.loads(json.dumps(values, default=list))


def written(plain: Mapping[str, Any]) -> Any:
    """Return what `_plain` returned, in the form of a `space:` section."""
    if "arms" in plain:
        return plain["arms"]
    when = {key: values[0] if len(values) == 1 else values for key, values in plain.get("when", {}).items()}
    beside = {"when": when} if when else {}
    if plain["kind"] == "choice":
        return {"choice": plain["choices"], **beside} if beside else plain["choices"]
    step = {"step": plain["step"]} if plain["step"] > 1 else {}
    ends = [plain.get("low", 0), plain.get("high", 0)]
    return {"log" if plain.get("log") else plain["kind"]: ends, **step, **beside}
