"""The command line of training, which sweeps and recipes take too, as a Config."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from config.console import refuse, say
from config.describe import config_as_yaml
from config.files import REPOSITORY
from config.flags import Given, asks_for_help, flags_of, read_words, without_print
from config.foreign import RATES
from config.help import show_help
from config.parser import values_of
from config.rules import left_of_other_optimizer, possible_kinds, unused_keys
from config.schema import CONFIG_GROUPS, Config, DataConfig, build, check_ranges

RECIPES = REPOSITORY / "recipes"  # the YAML files of presets


def parse_config(
    argv: Sequence[str] | None = None, description: str = "", own: Mapping[str, Any] | None = None
) -> Config:
    """Return the Config of a command line: defaults, then each `--config FILE.yaml`, then single flags.

    A mistake prints one sentence and exits with 2: an unknown key (with the nearest known one), a value of
    the wrong type or out of range, a model that cannot be built, and a key that nothing reads.
    `--print_config` prints the settings that would be returned, and exits with 0.

    Args:
        own: Values by full key that are given in Python; they count as flags, and are taken as they are.
    """
    own = own or {}
    words, flags = sys.argv[1:] if argv is None else argv, flags_of(CONFIG_GROUPS)
    if asks_for_help(words, flags):
        show_help(CONFIG_GROUPS, description)
    given, prints = without_print(read_words(words, flags))
    rate = next((one.flag for one in given if one.flag in RATES), "")
    given = [one for one in given if one.flag not in RATES]
    names = [one.flag.removeprefix("--") for one in given] + [*own]
    presets = (
        [Given("--config", str(RECIPES / "overfit.yaml"))] if Given("--overfit", "true") in given else []
    )
    values = _with_own(values_of(CONFIG_GROUPS, [*presets, *given]), own)
    if values["base"] is not None:  # A flag or a file has set it.
        presets = [Given("--config", str(RECIPES / "finetune.yaml")), *presets]
        values = _with_own(values_of(CONFIG_GROUPS, [*presets, *given]), own)
    try:
        config = build(values)
        if rate:
            _refuse_rate(rate, config)
        if config.train.overfit and config.data.source == DataConfig.source and "data.source" not in names:
            config = replace(config, data=replace(config.data, source=str(RECIPES / "overfit")))
        check_ranges(config)
        _refuse_unread(config, names)
    except ValueError as error:
        return refuse(str(error))  # exits
    if prints:
        say(config_as_yaml(config))
        sys.exit(0)
    return config


def _with_own(values: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with those by full key in their places."""
    for key, value in own.items():
        group, _, name = key.rpartition(".")
        (values[group] if group else values)[name] = value
    return values


def _refuse_rate(flag: str, config: Config) -> NoReturn:
    """Raise a ValueError that names the learning rates that a run with these settings has."""
    acting = config.optimizer.rates_read(possible_kinds(config))
    ours = " or ".join(f"--{key}" for key in acting)
    raise ValueError(f"{flag} is another program's name; here it is {ours}")


def _refuse_unread(config: Config, given: Sequence[str]) -> None:
    """Raise a ValueError for settings that contradict each other, or that nothing reads.

    Args:
        given: The keys that the command line gives as flags.
    """
    weight_format = config.train.base_format
    if config.train.base is not None and config.lora.r == 0 and weight_format in ("bf16", "nf4"):
        raise ValueError(
            f"base_format is {weight_format} and lora.r is 0, by which all of the base would train, and "
            "weights can only in fp32: set lora.r to 1 or more to train adapters, or remove base_format"
        )
    left = left_of_other_optimizer(config.optimizer, given)
    if "config" in given and "optimizer.name" in given and left:
        name, shown = config.optimizer.name, ", ".join(f"{key} {value:g}" for key, value in left.items())
        raise ValueError(
            f"optimizer.name is {name}, and --config brings the other optimizer's {shown}; give each as "
            f"a flag, such as --optimizer.{next(iter(left))} null for the value that {name} takes"
        )
    for key, reason in unused_keys(config, given):
        raise ValueError(f"{key} is set, but {reason}; remove it, or change that")
