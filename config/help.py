"""The text of `--help`, from the dataclasses of a command's settings and the Args of their docstrings.

jsonargparse can print one too, but its import alone takes longer than all of this.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import shutil
import sys
import textwrap
from typing import Any, NoReturn

from config.console import say
from config.flags import Flag, flags_of
from config.typed import wanted

INDENT = 24  # columns before the meaning of a flag


def show_help(groups: dict[str, type], description: str, prog: str | None = None, more: str = "") -> NoReturn:
    """Print the flags of a command with their meanings, and exit with 0.

    Args:
        groups: The dataclasses of its settings by their prefix, which is empty for those without one.
        description: What the command does.
        prog: The command, where that is not the name of its file.
        more: Text below the flags.
    """
    flags = flags_of(groups)
    prog = prog or f"python {os.path.basename(sys.argv[0])}"
    lines = [f"usage: {prog}{' [RUN]' if '--run' in flags else ''} [--flag value ...]", "", description, ""]
    lines += _entry("--help", "Show this text.")
    lines += _entry("--config FILE", "A YAML file of settings; flags override it.")
    lines += _entry("--print_config", "Print all settings as such a file, with what the other flags say.")
    for prefix, group in groups.items():
        first, meanings = documented(group)
        lines += ["", *_wrapped(first, "")]
        for field in dataclasses.fields(group):
            flag = flags[f"--{prefix}.{field.name}".replace("--.", "--")]
            lines += _entry(_form(flag), f"{meanings[field.name]} ({_kind(flag)}, {_default(field)})")
    say("\n".join([*lines, *(["", more] if more else [])]))
    sys.exit(0)


def documented(group: type) -> tuple[str, dict[str, str]]:
    """Return the first paragraph of a dataclass's docstring, and the text of each of its Args.

    Those of the dataclasses that it inherits from are among them.
    """
    meanings: dict[str, str] = {}
    for one in reversed(group.__mro__):
        args = inspect.cleandoc(one.__doc__ or "").partition("\n\n")[2]
        found = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", args, re.MULTILINE)
        meanings |= {name: " ".join(words.split()) for name, words in found}
    first = inspect.cleandoc(group.__doc__ or "").partition("\n\n")[0]
    return " ".join(first.split()), meanings


def settings_as_yaml(settings: Any, name: str = "") -> str:
    """Return the settings of a command as a YAML file for its `--config`, each below its meaning.

    A field that is in no repr may hold a password, and is left out.

    Args:
        settings: An instance of the dataclass of its settings.
        name: The section of the file that they stand in; none where they are all of it.
    """
    import yaml

    first, meanings = documented(type(settings))
    indent = "  " if name else ""
    head, lines = [f"# {first}", *([f"{name}:"] if name else [])], list[str]()
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        plain = {field.name: list(value) if isinstance(value, tuple) else value}
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=2**20).rstrip("\n")
        lines.append(f"# {meanings[field.name]}")
        lines.append(text if field.repr else f"# {field.name}: left out, since it may hold a password")
    return "\n".join([*head, *(textwrap.indent(line, indent) for line in lines)])


def value_of(default: Any) -> str:
    """Return a default as a YAML file would spell it."""
    if default is None:
        return "not given"
    if default == "":
        return "empty"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return f"[{', '.join(map(str, default))}]"
    return f"{default:g}" if isinstance(default, float) else str(default)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a field; MISSING for one that has to be given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _form(flag: Flag) -> str:
    """Return a flag as it is written, with a word for its value."""
    names = ", ".join([*(f"--{name}" for name in flag.also), flag.name])
    is_number = flag.holds(int) or flag.holds(float) or flag.item in (int, float)
    value = "N" if is_number else flag.shown.rpartition(".")[2].removeprefix("--").upper()
    if flag.choices:
        value = f"[{'|'.join(flag.choices)}]" if flag.alone else f"{{{','.join(flag.choices)}}}"
    elif flag.alone:
        value = f"[{value}]"
    elif flag.item and not flag.is_text:
        value += ",..."
    return f"{names} {value}"


def _kind(flag: Flag) -> str:
    if flag.is_text:
        return "text, taken as it is" + ("; may be repeated" if flag.item else "")
    return "one of these" if flag.choices and not flag.alone else wanted(flag.kind)


def _default(field: dataclasses.Field[Any]) -> str:
    default = default_of(field)
    return "required" if default is dataclasses.MISSING else f"default: {value_of(default)}"


def _entry(form: str, meaning: str) -> list[str]:
    """Return the lines of one flag."""
    wide = len(form) + 3 > INDENT
    lines = _wrapped(meaning, " " * INDENT)
    return [f"  {form}", *lines] if wide else [f"  {form}".ljust(INDENT) + lines[0].lstrip(), *lines[1:]]


def _wrapped(text: str, indent: str) -> list[str]:
    width = max(min(shutil.get_terminal_size().columns, 110), INDENT + 40)
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    ) or [""]
