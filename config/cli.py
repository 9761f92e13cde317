"""A command line of `--key value` and `--config FILE.yaml` as settings; a mistake is one sentence."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import reprlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from config.console import one_line, printable, refuse
from config.files import REPOSITORY
from config.rules import left_of_other_optimizer, possible_kinds, unused_keys
from config.schema import CONFIG_GROUPS, Config, DataConfig, TrainConfig, build, check_ranges
from config.typed import field_types, wanted
from config.yamlfile import by_base_60, parse_yaml, read_yaml

RECIPES = REPOSITORY / "recipes"  # the YAML files of presets


def parse_config(argv: Sequence[str] | None = None, description: str = "") -> Config:
    """Return the Config of a command line: defaults, then each `--config FILE.yaml`, then single flags.

    A mistake prints one sentence and exits with 2: an unknown key (with the nearest known one), a value of
    the wrong type or out of range, a model that cannot be built, and a key that nothing reads.
    """
    parser = make_parser(CONFIG_GROUPS, description)
    words = _switches(argv)
    has_file = any(word.partition("=")[0] == "--config" for word in words)
    if any(word == "--overfit" and after.lower() in ("true", "yes", "on") for word, after in pairwise(words)):
        words = ["--config", str(RECIPES / "overfit.yaml"), *words]
    words, rate = _without_rate(words)
    values = parser.parse_args(words).clone(with_meta=False).as_dict()
    if values["base"] is not None:  # A flag or a file has set it.
        words = ["--config", str(RECIPES / "finetune.yaml"), *words]
        values = parser.parse_args(words).clone(with_meta=False).as_dict()
    values.pop("config", None)
    try:
        config = build(values)
        if rate:
            acting = config.optimizer.rates_read(possible_kinds(config))
            raise ValueError(f"{rate} is no flag; did you mean {' or '.join(acting)}?")
        sourced = any(word.split("=")[0] == "--data.source" for word in words)
        if config.train.overfit and config.data.source == DataConfig.source and not sourced:
            config = replace(config, data=replace(config.data, source=str(RECIPES / "overfit")))
        check_ranges(config)
        weight_format = config.train.base_format
        if config.train.base is not None and config.lora.r == 0 and weight_format in ("bf16", "nf4"):
            raise ValueError(
                f"base_format is {weight_format} and lora.r is 0, by which all of the base would train, and "
                "weights can only in fp32: set lora.r to 1 or more to train adapters, or remove base_format"
            )
        given = [word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")]
        left = left_of_other_optimizer(config.optimizer, given)
        if has_file and "optimizer.name" in given and left:
            name, shown = config.optimizer.name, ", ".join(f"{key} {value:g}" for key, value in left.items())
            raise ValueError(
                f"optimizer.name is {name}, and --config brings the other optimizer's {shown}; give each as "
                f"a flag, such as --optimizer.{next(iter(left))} null for the value that {name} takes"
            )
        for key, reason in unused_keys(config, given):
            raise ValueError(f"{key} is set, but {reason}; remove it")
        return config
    except ValueError as error:
        return parser.error(str(error))  # exits


def _without_rate(words: list[str]) -> tuple[list[str], str]:
    """Return the words without `--lr`, and that flag or "": the other words decide which key it means."""
    place = next(
        (n for n, word in enumerate(words) if word.split("=")[0] in ("--lr", "--learning_rate")), None
    )
    if place is None:
        return words, ""
    has_value = "=" not in words[place] and not "".join(words[place + 1 : place + 2]).startswith("--")
    return words[:place] + words[place + 1 + has_value :], words[place].split("=")[0]


def _switches(argv: Sequence[str] | None) -> list[str]:
    """Write out short flags: `--overfit` alone is `--overfit true`, and `--allow a,b` is a list.

    `--fix`, which the guard against leaks recommends, is `--data.regroup`.
    """
    switches = {f"--{f.name}" for f in dataclasses.fields(TrainConfig) if f.type == "bool"}
    switches.add("--data.regroup")
    lists = {
        f"--{name}.{f.name}".replace("--.", "--")
        for name, group in CONFIG_GROUPS.items()
        for f in dataclasses.fields(group)
        if f.type == "tuple[str, ...]"
    }
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        name, *value = word.split("=", 1)
        if name == "--fix":
            name = "--data.regroup"
        words += [name, *value] if name in switches | lists else [word]
    spelled = []
    for word, following in pairwise([*words, "--"]):
        if spelled and spelled[-1] in lists and not word.startswith("["):
            word = json.dumps(word.split(","))  # It is quoted, since a leading * is no text to YAML.
        spelled.append(word)
        if word in switches and following.startswith("-"):
            spelled.append("true")
    return spelled


def make_parser(groups: dict[str, type], description: str) -> Any:
    """Return a jsonargparse parser for dataclasses, each below its prefix, whose errors are one sentence."""
    from jsonargparse import ActionConfigFile, ArgumentParser, set_loader  # pyright: ignore
    from yaml import YAMLError

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            if message.startswith("Unexpected config:"):  # The whole file follows.
                message = "a --config file must be a YAML mapping of keys to values"
            if _FAULT in message:  # The parser's own words stand before it.
                message = message.rpartition(_FAULT)[2]
            refuse(f"{_in_our_words(message, groups)}{_suggestion(message, groups)}")

        def parse_args(self, *args: Any, **options: Any) -> Any:
            words = args[0] if args and args[0] is not None else sys.argv[1:]
            flags = ("--config", *(f"--{name}" for name in groups if name))  # A group may have a file too.
            numbers = {
                f"--{name}.{key}".replace("--.", "--")
                for name, group in groups.items()
                for key, kind in field_types(group).items()
                if {int, float} & {kind, *get_args(kind)}
            }
            for word, after in pairwise([*words, ""]):
                flag, equals, value = word.partition("=")
                file = value if equals else after
                if flag in flags and os.path.isfile(file):  # Otherwise the word holds the values themselves.
                    try:
                        read_yaml(Path(file))
                    except ValueError as error:
                        self.error(str(error))
                    except OSError:
                        pass  # The parser says so itself.
                elif flag in flags and not file.replace("\n", "").replace("\t", "").isprintable():
                    self.error(f"{flag} is {printable(file)}, and there is no such file")
                if flag in numbers and (wrong := by_base_60(file, f"{flag} {file}")):
                    self.error(wrong)
            try:
                return super().parse_args(*args, **options)
            except (ValueError, TypeError, OSError, RecursionError) as error:  # A file is no YAML.
                self.error(f"the settings cannot be read: {error}")

    set_loader("settings", _load_settings, (ValueError, RecursionError, YAMLError))
    parser = Parser(description=description, allow_abbrev=False, parser_mode="settings")
    parser.add_argument("--config", action=ActionConfigFile, help="A YAML file; flags after it override it.")
    for name, group in groups.items():
        parser.add_class_arguments(group, name or None)
    return parser


_FAULT = "the settings cannot be taken: "


def _load_settings(text: str, path: str = "") -> Any:
    """Load the text of a file, of a file that it names, or of a flag, for the parser.

    Raises:
        ValueError: The errors of `parse_yaml`. Where the parser wants text, it then takes it as it is.
    """
    from jsonargparse import get_loader

    name = str(path) or "the settings given"
    try:
        values = parse_yaml(text, name)
        named = values.get("config") if isinstance(values, dict) else None
        if named is not None and not isinstance(named, str):
            raise ValueError(f"config in {name} is {reprlib.repr(named)}; it must be one file's name")
    except ValueError as error:
        raise ValueError(f"{_FAULT}{error}") from None
    return get_loader("yaml")(text)


def _in_our_words(message: str, groups: dict[str, type]) -> str:
    """Put an error of jsonargparse in one line; for a value that does not fit, add what would."""
    line = one_line(message)
    found = re.search(
        r'Parser key "([\w.]+)": (?:Expected|Does not validate) .*?(?:Got|Given) value: ?(.*)$', line
    )
    kinds = {
        f"{name}.{key}".lstrip("."): kind
        for name, group in groups.items()
        for key, kind in field_types(group).items()
    }
    if found is None or found[1] not in kinds:
        return line
    kind, value = kinds[found[1]], found[2]
    near = ""
    if get_origin(kind) is Literal:
        near = "".join(difflib.get_close_matches(value.lower(), get_args(kind), n=1))
    meant = f"; did you mean {near}?" if near else ""
    # For a list or mapping the parser names the wrong item, or says that the value is neither.
    inside = get_origin(kind) in (list, tuple, dict) and not re.search("<class '(list|tuple|dict)'>", line)
    is_or_holds = "holds" if inside else "is"
    shown = value or repr("")
    return f"{line[: found.start()]}{found[1]} {is_or_holds} {shown}; it must be {wanted(kind)}{meant}"


def _suggestion(message: str, groups: dict[str, type]) -> str:
    """Return `; did you mean ...` for the first word of an error that is nearly a key."""
    known = [
        f"{name}.{f.name}".lstrip(".") for name, group in groups.items() for f in dataclasses.fields(group)
    ]
    group = re.search(r"Group '(\w+)' does not accept option '([\w.]+)'", message)
    flag = re.search(r"(?:unrecognized arguments: --|[Oo]ption '|Key ')([\w.]+)", message)
    if group:
        wrong = f"{group[1]}.{group[2]}"
    elif flag:
        wrong = flag[1]
    else:
        return ""
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6) or [
        key for key in known if key.split(".")[-1] == wrong.split(".")[-1]
    ]
    return f"; did you mean {near[0]}?" if near else ""
