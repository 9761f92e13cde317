"""The parser of every command: jsonargparse, by the dataclasses of the command's settings.

    settings = parse_settings(ExportConfig, sys.argv[1:], "Write a model for other tools.")

A mistake ends the command with one sentence. Most are told by config/flags.py, which reads the words first.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import reprlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from config.console import one_line, printable, refuse, say
from config.files import REPOSITORY
from config.flags import Given, asks_for_help, flags_of, nearest, read_words, without_print
from config.help import documented, settings_as_yaml, show_help
from config.typed import field_types, wanted
from config.yamlfile import parse_yaml, read_yaml

Settings = TypeVar("Settings")
_FAULT = "the settings cannot be taken: "
_OF_A_SWEEP = ("space", "sweep")  # The sections that a sweep's file has beside the settings of a run.


def parse_settings(
    group: type[Settings], words: Sequence[str], description: str, prog: str | None = None
) -> Settings:
    """Return the settings that a command line gives, as an instance of the dataclass `group`.

    A mistake prints one sentence and exits with 2; so does a ValueError that the dataclass raises.

    Args:
        description: What the command does, for `--help`.
        prog: The command as `--help` shows it, where that is not the name of its file.
    """
    groups: dict[str, type] = {"": group}
    flags = flags_of(groups)
    if asks_for_help(words, flags):
        show_help(groups, description, prog)
    given, prints = without_print(read_words(words, flags))
    texts = [one for one in given if one.flag in flags and flags[one.flag].is_text]
    values = values_of(groups, [one for one in given if one not in texts])
    for flag in dict.fromkeys(one.flag for one in texts):
        found = [one.value for one in texts if one.flag == flag]
        is_list = flags[flag].item is not None
        if len(found) > 1 and not is_list:
            refuse(f"{flag} is given {len(found)} times; give one")
        values[flag.removeprefix("--")] = tuple(found) if is_list else found[0]
    try:
        settings = group(**values)
    except ValueError as error:
        return refuse(str(error))  # exits
    if prints:
        say(settings_as_yaml(settings))
        sys.exit(0)
    return settings


def values_of(groups: dict[str, type], given: Iterable[Given]) -> dict[str, Any]:
    """Return the value of every setting: its default, or what a file or a flag gives; the later one counts.

    The groups with a prefix are mappings of their own.
    """
    parser = _make_parser(tuple(groups.items()))
    given = list(given)
    for one in given:
        if one.flag == "--config" or one.flag.removeprefix("--") in groups:  # A group may have a file too.
            _refuse_unreadable(one)
    values = parser.parse_args([str(one) for one in given]).clone(with_meta=False).as_dict()
    del values["config"]
    return values


def _refuse_unreadable(given: Given) -> None:
    """End the command for a file of settings that is no YAML, or a name of one that cannot be."""
    if not os.path.isfile(given.value):  # The word holds the values themselves.
        if not given.value.replace("\n", "").replace("\t", "").isprintable():
            refuse(f"{given.flag} is {printable(given.value)}, and there is no such file")
        if re.fullmatch(r"[\w./~-]+", given.value) and not os.path.exists(given.value):
            presets = [f"recipes/{path.name}" for path in (REPOSITORY / "recipes").glob("*.yaml")]
            wanted_file = f"recipes/{Path(given.value).stem}.yaml"
            near = difflib.get_close_matches(wanted_file, presets, n=1, cutoff=0.9)
            meant = f"did you mean {near[0]}?" if near else "give the path of one"
            refuse(f"{given.flag} is {given.value}, and there is no such file; {meant}")
        return
    try:
        values = read_yaml(Path(given.value))
        if not isinstance(values, dict):
            found = "nothing" if values is None else reprlib.repr(values)
            refuse(f"{given.value} holds {found}; it must be a YAML mapping of keys to values")
    except ValueError as error:
        refuse(str(error))
    except OSError:
        pass  # The parser says so itself.


@functools.cache  # Making one takes three times as long as using it.
def _make_parser(named: tuple[tuple[str, type], ...]) -> Any:
    """Return a jsonargparse parser for dataclasses, each below its prefix, whose errors are one sentence."""
    from jsonargparse import ActionConfigFile, ArgumentParser, set_loader  # pyright: ignore
    from yaml import YAMLError

    groups = dict(named)

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            if message.startswith("Unexpected config:"):  # The whole file follows.
                message = "a --config file must be a YAML mapping of keys to values"
            if _FAULT in message:  # The parser's own words stand before it.
                message = message.rpartition(_FAULT)[2]
            if found := re.match(r"the following arguments are required: ([\w.]+)", message):
                prefix, _, key = found[1].rpartition(".")
                meaning = documented(groups[prefix])[1][key].partition(". ")[0].rstrip(".")
                message = f"{flags_of(groups)[f'--{found[1]}'].shown} is missing: {meaning}"
            refuse(f"{_in_our_words(message, groups)}{_suggestion(message, groups)}")

        def parse_args(self, *args: Any, **options: Any) -> Any:
            try:
                return super().parse_args(*args, **options)
            except (ValueError, TypeError, OSError, RecursionError) as error:  # A file is no YAML.
                self.error(f"the settings cannot be read: {error}")

    set_loader("settings", _load_settings, (ValueError, RecursionError, YAMLError))
    parser = Parser(allow_abbrev=False, parser_mode="settings")
    parser.add_argument("--config", action=ActionConfigFile)
    for name, group in groups.items():
        parser.add_class_arguments(group, name or None)
    return parser


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
    if kind in (bool, bool | None):
        meant = ", or stand alone: before another flag, or at the end"
    # For a list or mapping the parser names the wrong item, or says that the value is neither.
    inside = get_origin(kind) in (list, tuple, dict) and not re.search("<class '(list|tuple|dict)'>", line)
    is_or_holds = "holds" if inside else "is"
    shown = value or repr("")
    return f"{line[: found.start()]}{found[1]} {is_or_holds} {shown}; it must be {wanted(kind)}{meant}"


def _suggestion(message: str, groups: dict[str, type]) -> str:
    """Return what to do about the first word of an error that is no key of these settings."""
    known = [
        f"{name}.{f.name}".lstrip(".") for name, group in groups.items() for f in dataclasses.fields(group)
    ]
    group = re.search(r"Group '(\w+)' does not accept option '([\w.]+)'", message)
    key = re.search(r"(?:[Oo]ption '|Key ')([\w.]+)", message)
    wrong = f"{group[1]}.{group[2]}" if group else key[1] if key else ""
    if (section := wrong.partition(".")[0]) in _OF_A_SWEEP and section not in groups:
        return f": {section} is for a sweep; such a file is read by hyperparam_tune.py (./plumb sweep)"
    if also := flags_of(groups).get(f"--{wrong}"):  # Another name of a flag is none of its key.
        return f"; did you mean {also.name.removeprefix('--')}?"
    near = nearest(wrong, known) if wrong else ""
    return f"; did you mean {near}?" if near else ""
