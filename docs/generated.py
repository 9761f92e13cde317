"""Write the parts of the manual that are made from the code: the pages of settings and faults, and a picture.

    python docs/generated.py

tests/test_docs.py compares each with what this file makes.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "tests"), str(DOCS)]

NOTE = "<!-- Made by `python docs/generated.py`: change the code that it reads, not this page. -->"


def planted() -> dict[str, list[str]]:
    """Return, by the name of a fault, how the self-test plants it."""
    from selftest.planted_faults import PLANTED_FAULTS
    from selftest.rank_faults import RANK_FAULTS

    stories: dict[str, list[str]] = {}
    for plant in (*PLANTED_FAULTS, *RANK_FAULTS):
        stories.setdefault(plant.expected, []).append(plant.story)
    return stories


def faults_page() -> str:
    """Return the page with a paragraph for each fault."""
    from guards.faults import FAULTS

    stories = planted()
    lines = [
        "# Every fault by name",
        NOTE,
        "[Guards](guards.md) stop a run that has one of these faults, unless `--allow NAME` lets it pass. "
        "What stands after *planted* is how `python preflight.py --selftest` puts the fault into a healthy "
        "run, to see it caught under this name; faults of [several processes](ranks.md) are put there by "
        "`tests/test_rank_guards.py`.",
    ]
    for name, meaning in sorted(FAULTS.items()):
        lines += [f"## {name}", meaning]
        if name in stories:
            lines.append(f"*Planted:* {'; '.join(stories[name])}.")
    return "\n\n".join(lines) + "\n"


def settings_page() -> str:
    """Return the page with a table for each group of settings."""
    from config import CONFIG_GROUPS, SETTINGS
    from config.describe import range_in_words, use_in_words
    from config.help import default_of, documented

    lines = [
        "# Settings",
        NOTE,
        "Every setting is a flag of `python trainingmanager.py` and of `python hyperparam_tune.py`, and a "
        "key of a YAML file for `--config`. Those of a group have its name before them: `--data.source` as a "
        "flag, and `source:` inside `data:` in a file. `python trainingmanager.py --print_config` prints "
        "them all as such a file, each with what stands here, for the other flags given.",
        "Setting what a run does not read is refused. *On resume* says what becomes of another value when a "
        "run goes on: it is *refused*, because the position in the data or the sense of the saved state "
        "would change too; it is *warned* of, because the run is no longer the one that was never stopped; "
        "or it is *free*. The data and the tokenizer are compared by their content, wherever they lie.",
    ]
    for name, group in CONFIG_GROUPS.items():
        first, helps = documented(group)
        kinds = get_type_hints(group)
        lines += [f"## {name or 'Training'}", first]
        rows = ["| name | type | default | range | on resume | meaning |", "|---|---|---|---|---|---|"]
        for field in dataclasses.fields(group):
            full = f"{name}.{field.name}".lstrip(".")
            known, meaning = SETTINGS[full], helps[field.name]
            if use := use_in_words(known):
                meaning += f" *{use[0].upper()}{use[1:]}.*"
            kind, bounds = kind_of(kinds[field.name]), range_in_words(known)
            cells = f"`{full}`", kind, shown_default(default_of(field)), bounds, known.on_resume, meaning
            rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("\n".join(rows))
    return "\n\n".join(lines) + "\n"


def kind_of(kind: Any) -> str:
    """Return a field's type in words."""
    inner = [argument for argument in get_args(kind) if argument not in (type(None), ...)]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(f'`{choice}`' for choice in inner)}"
    if get_origin(kind) is tuple:
        return f"list of {kind_of(inner[0])}"
    if get_origin(kind) is dict:
        return f"mapping of name to {kind_of(inner[1])}"
    if inner:  # An optional type, whose None is not named.
        return kind_of(inner[0])
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}[kind]


# What a flag took before config/flags.py read the words of all commands, by command and kind.
_ALONE, _NOT_ALONE = "alone, or with true or false", "with true or false, never alone"
_NO_COMMAND = "there was no such command"
_LIST = "`a,b` or `[a, b]`; of repeated ones the last"
_MAPPING = "`{NAME: VALUE}`, or with a dot and NAME behind the flag"
BEFORE = {
    ("train", "switch"): _ALONE,
    ("train", "switch of a group"): _NOT_ALONE,
    ("train", "list"): _LIST,
    ("train", "mapping"): _MAPPING,
    ("sweep", "list"): _LIST,
    ("eval", "switch"): _NOT_ALONE,
    ("eval", "list of words"): "words behind it",
    ("eval", "free text"): "taken as it is; repeated for several",
    ("generate", "switch"): _NOT_ALONE,
    ("generate", "free text"): "taken as it is; repeated for several",
    ("export", "switch"): _ALONE,
    ("export", "list"): "there was no such flag",
    ("generate", "list"): "there was no such flag",
    ("functional.py", "list"): "`1,10` or `[1, 10]`; of repeated ones the last",
    ("scrape", "switch"): _ALONE,
    ("scrape", "list"): _LIST,
    ("scrape", "number"): "with a value",
    ("recipe", "switch"): _ALONE,
    ("recipe", "list"): _LIST,
    ("serve", "switch"): _NO_COMMAND,
    ("serve", "list"): _NO_COMMAND,
    ("generate --recipe refactor", "switch"): f"`--write` {_ALONE}; `--check_behaviour` {_NOT_ALONE}",
    ("selftest", "switch"): "alone",
}
_SWITCH = "alone, or with true, false, yes, no, on, off, 1 or 0"
NOW = {
    "switch": _SWITCH,
    "switch of a group": _SWITCH,
    "list": "`a,b`, repeated, or `[a, b]`",
    "list of words": "words behind it, `a,b`, repeated, or `[a, b]`",
    "free text": "taken as it is; repeated for several",
    "mapping": _MAPPING,
    "number": "alone for 1, or with a value",
    "value": "`--flag VALUE` or `--flag=VALUE`",
}


def flags_page() -> str:
    """Return the page with the form of every flag, and with the names of other programs."""
    from config.foreign import NAMES, RATES

    lines = [
        "# Flags",
        NOTE,
        "[Commands](commands.md) says how flags are written. Here is, by command, every flag that is more "
        "than a name with a value, with the forms that it took before all commands had one parser, and those "
        "that it takes now; what it took, it still takes. Every other flag is "
        f"{NOW['value']}, then and now. Plan, prepare, sweep and recipe have the flags of train too.",
        "\n".join(["| command | kind | flags | before | now |", "|---|---|---|---|---|", *_form_rows()]),
        "## The run",
        "Before, a run was named by `--run` to train and export, by `--checkpoint` to eval, and by `--model` "
        "to generate. Now it is `--run`, or the first word, for all of them; the other two names "
        "still work.",
        "## Names of other programs",
        "A flag of another program is answered with ours, in one sentence and with exit code 2. Of the rows "
        "with a name, the first counts whose flag the command has.",
        "\n".join(["| ours | others' |", "|---|---|", *_name_rows(NAMES)]),
        f"To {' and '.join(f'`{rate[2:]}`' for rate in RATES)} training answers with the learning rates that "
        "its other settings use.",
    ]
    return "\n\n".join(lines) + "\n"


def _name_rows(names: dict[str, str]) -> list[str]:
    return [
        f"| `{ours}` | {', '.join(f'`{one}`' for one in theirs.split())} |" for ours, theirs in names.items()
    ]


def _form_rows() -> list[str]:
    """Return a row for each command and kind of flag other than a plain value."""
    from config.flags import flags_of
    from functional import FunctionalConfig
    from recipes.refactoring import RefactorConfig
    from verbs import settings

    commands = {name: groups[0] for name, groups in settings().items() if name not in ("plan", "prepare")}
    commands |= {"generate --recipe refactor": {"": RefactorConfig}, "functional.py": {"": FunctionalConfig}}
    found: dict[tuple[str, str], list[str]] = {}
    for name, groups in commands.items():
        command = name if name.startswith("generate") else name.split()[0]
        for flag in dict.fromkeys(flags_of(groups).values()):
            flags = found.setdefault((command, form_of(flag)), [])
            shown = " or ".join(f"`{one}`" for one in (*(f"--{other}" for other in flag.also), flag.name))
            if shown not in flags:
                flags.append(shown)
    return [
        f"| {command} | {form} | {', '.join(flags)} | {BEFORE[command, form]} | {NOW[form]} |"
        for (command, form), flags in found.items()
        if form != "value"
    ]


def form_of(flag: Any) -> str:
    """Return the kind of a flag, by which its form goes."""
    if flag.is_text:
        return "free text"
    if flag.holds(bool):
        return "switch of a group" if "." in flag.name and not flag.also else "switch"
    if flag.item is not None:
        return "list of words" if flag.takes_words else "list"
    if flag.alone:
        return "number"
    return "mapping" if flag.holds(dict) else "value"


def shown_default(value: Any) -> str:
    """Return a default for a table: in code, where it is a value."""
    from config.help import value_of

    shown = value_of(value)
    return shown if value is None or value == "" else f"`{shown}`"


def imports_picture() -> str:
    """Return the picture of the imports between folders."""
    from import_picture import import_picture

    return import_picture()


PAGES = {
    "settings.md": settings_page,
    "flags.md": flags_page,
    "faults.md": faults_page,
    "pictures/imports.svg": imports_picture,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), "utf-8")
