"""What is known of each setting beside its field: its range, its class for a resume, and when it is read."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any, get_args, get_origin

import pytest

from config import CONFIG_GROUPS, SETTINGS, Config, check_ranges
from config.schema import OPTIMIZER_DEFAULTS, flat
from config.setting import FREE, REFUSED, WARNED, Setting
from config.typed import field_types


def set_key(key: str, value: Any) -> Config:
    group, _, name = key.rpartition(".")
    config, group = Config(), group or "train"
    return replace(config, **{group: replace(getattr(config, group), **{name: value})})


def kind_of(key: str) -> Any:
    group, _, name = key.rpartition(".")
    return field_types(CONFIG_GROUPS[group])[name]


def test_every_setting_is_declared_with_a_class_for_a_resume() -> None:
    """A field that is given by its default alone has none."""
    bare = [
        f"{group.__name__}.{field.name}"
        for group in CONFIG_GROUPS.values()
        for field in dataclasses.fields(group)
        if not isinstance(field.metadata.get("setting"), Setting)
    ]
    assert bare == []
    assert list(SETTINGS) == list(flat(Config()))
    assert {known.on_resume for known in SETTINGS.values()} == {REFUSED, WARNED, FREE}


def test_every_number_has_a_range() -> None:
    numbers = {
        key: known
        for key, known in SETTINGS.items()
        if {int, float} & {kind_of(key), *get_args(kind_of(key))} and get_origin(kind_of(key)) is not tuple
    }
    assert {"seed", "optimizer.lr", "lora.rank_pattern"} <= numbers.keys()
    assert [key for key, known in numbers.items() if known.at_least is None and known.above is None] == []
    others = SETTINGS.keys() - numbers.keys()
    assert [key for key in others if SETTINGS[key].at_least is not None] == []


@pytest.mark.parametrize(
    "key", [key for key, known in SETTINGS.items() if {known.at_least, known.above} != {None}]
)
def test_the_bounds_of_every_range_are_held(key: str) -> None:
    known = SETTINGS[key]
    outside = [float("nan"), float("inf"), float("-inf"), 2**2000, -(2**70), known.above, known.below]
    outside += [bound - 1 for bound in (known.above, known.at_least) if bound is not None]
    outside += [bound + 1 for bound in (known.at_most, known.below) if bound is not None]
    for value in outside:
        if value is None or (known.or_zero and value == 0):
            continue
        is_mapping = isinstance(flat(Config())[key], dict)
        with pytest.raises(ValueError, match=rf"^{key}(\.c_attn)? is .*; it must be "):
            check_ranges(set_key(key, {"c_attn": value} if is_mapping else value))


def test_both_ends_of_a_range_are_in_it() -> None:
    check_ranges(Config())
    for key, value in [("optimizer.cooldown", 1.0), ("optimizer.lr", 0.0), ("seed", 2**63 - 1), ("keep", 0)]:
        check_ranges(set_key(key, value))


def test_zero_may_stand_for_a_default_below_the_least_value() -> None:
    check_ranges(set_key("model.n_kv_head", 0))
    sentence = r"^model.n_kv_head is -1; it must be at least 1, or 0 for the default$"
    with pytest.raises(ValueError, match=sentence):
        check_ranges(set_key("model.n_kv_head", -1))


def test_a_default_that_follows_the_optimizer_stands_for_every_one_of_them() -> None:
    names = set(get_args(kind_of("optimizer.name")))
    following = {key: known.by_optimizer for key, known in SETTINGS.items() if known.by_optimizer}
    assert all(values.keys() == names for values in following.values())
    assert {f"optimizer.{key}" for key in OPTIMIZER_DEFAULTS["adamw"]} == following.keys()
    assert [key for key in following if flat(Config())[key] is not None] == []
