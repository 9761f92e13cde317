"""What is known of one setting, beside its field.

    n_layer: int = setting(4, at_least=1, at_most=10_000, on_resume=REFUSED)

Its meaning is its line of Args in the docstring of its class. From both come the checks of values (below),
the refusal of what nothing reads (config/rules.py), what a resumed run may change (training/runfolder.py),
`--print_config` (config/describe.py) and docs/settings.md.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

Value = TypeVar("Value")

# What a resumed run does with another value. REFUSED: the position in the data or the sense of the state
# would change too. WARNED: it goes on, but is no longer the run that was never stopped, since its numbers,
# its learning rates or what its best checkpoint was chosen by differ. FREE: none of these is touched. The
# data and the tokenizer themselves are compared by their fingerprints, wherever they lie.
OnResume = Literal["refused", "warned", "free"]
REFUSED, WARNED, FREE = "refused", "warned", "free"

ALWAYS_THERE: Any = object()  # `before` of a setting that every saved run has.
LARGEST = {int: 2**63 - 1, float: sys.float_info.max}


class Use(NamedTuple):
    """A condition under which a run reads a setting; where it does not hold, setting it is refused."""

    when: str  # completes "read where ..."
    holds: Callable[[Any], bool]  # takes the whole Config
    otherwise: str  # completes "KEY is set, but ..."


@dataclass(frozen=True)
class Setting:
    """What is known of a setting beside its default, its type and its meaning.

    Args:
        on_resume: What a resumed run does with another value.
        at_least: The least value. Bounds that depend on several settings are in ModelConfig.resolved.
        above: A bound that is itself refused.
        at_most: The largest value. The model's are there to refuse what fits no machine.
        below: A bound that is itself refused.
        or_zero: Whether 0 is allowed below `at_least`, for a default that follows other settings.
        used: Conditions of which all must hold for a run to read the setting.
        before: The value of runs that were saved before there was the setting, whose config.yaml lacks it.
        always_hashed: Whether their fingerprint of settings holds that value, as that of a new run does.
        by_optimizer: By `optimizer.name`, the value that stands for None.
        compared: Whether the guard of settings compares small models with and without it. Not so are two ways
            that agree by design, sizes that are compared elsewhere, and numbers of which those models have
            others.
    """

    on_resume: OnResume
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    or_zero: bool = False
    used: tuple[Use, ...] = ()
    before: Any = ALWAYS_THERE
    always_hashed: bool = False
    by_optimizer: Mapping[str, float] = field(default_factory=dict)
    compared: bool = True

    @property
    def is_later(self) -> bool:
        """Whether the fingerprints of older runs lack it."""
        return self.before is not ALWAYS_THERE and not self.always_hashed

    @property
    def stored_before(self) -> Any:
        """`before` as files have it, which have no tuples."""
        return list(self.before) if isinstance(self.before, tuple) else self.before

    def broken_bound(self, value: float) -> str:
        """Return the bound that a number breaks, in words, or nothing."""
        largest = LARGEST[type(value)]
        if not abs(value) <= largest:  # NaN too
            return "finite" if isinstance(value, float) else f"at most {largest}"
        if self.or_zero and value == 0:
            return ""
        if self.at_least is not None and value < self.at_least:
            return f"at least {self.at_least}{', or 0 for the default' if self.or_zero else ''}"
        if self.above is not None and value <= self.above:
            return f"above {self.above}"
        if self.at_most is not None and value > self.at_most:
            return f"at most {self.at_most}"
        return f"below {self.below}" if self.below is not None and value >= self.below else ""

    def unread_because(self, config: Any) -> str:
        """Return why a run with this Config does not read the setting, or nothing."""
        return next((use.otherwise for use in self.used if not use.holds(config)), "")


def setting(default: Value, *, on_resume: OnResume, also: Sequence[str] = (), **facts: Any) -> Value:
    """Return a field of a dataclass of settings.

    Args:
        default: Its default; each instance has a copy of a mapping.
        on_resume: What a resumed run does with another value: REFUSED, WARNED or FREE.
        also: Other names of the flag, without `--`.
        facts: Other fields of `Setting`.
    """
    metadata = {"setting": Setting(on_resume, **facts), "flag": {"also": tuple(also)}}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)  # pyright: ignore
    return field(default=default, metadata=metadata)


def settings_of(group: type) -> dict[str, Setting]:
    """Return what is known of each field of a dataclass of settings."""
    return {f.name: f.metadata["setting"] for f in dataclasses.fields(group)}


def refuse_out_of_range(name: str, group: Any) -> None:
    """Raise ValueError, in one sentence, for a number of a group of settings that is outside its range.

    The values of a mapping are held to its range, each.

    Args:
        name: The group's prefix on the command line, which is empty for training's own settings.
    """
    for key, known in settings_of(type(group)).items():
        full, value = f"{name}.{key}".lstrip("."), getattr(group, key)
        values = (
            {f"{full}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {full: value}
        )
        for place, number in values.items():
            if type(number) in LARGEST and (bound := known.broken_bound(number)):
                raise ValueError(f"{place} is {number}; it must be {bound}")
