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

    stories: dict[str, list[str]] = {}
    for plant in PLANTED_FAULTS:
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
        "run, to see it caught under this name.",
    ]
    for name, meaning in sorted(FAULTS.items()):
        lines += [f"## {name}", meaning]
        if name in stories:
            lines.append(f"*Planted:* {'; '.join(stories[name])}.")
    return "\n\n".join(lines) + "\n"


def settings_page() -> str:
    """Return the page with a table for each group of settings."""
    from config import CONFIG_GROUPS
    from config.help import default_of, documented

    lines = [
        "# Settings",
        NOTE,
        "Every setting is a flag of `python trainingmanager.py` and of `python hyperparam_tune.py`, and a "
        "key of a YAML file for `--config`. Those of a group have its name before them: `--data.source` as a "
        "flag, and `source:` inside `data:` in a file. `python trainingmanager.py --print_config` prints "
        "them all, resolved for the other flags given.",
    ]
    for name, group in CONFIG_GROUPS.items():
        first, helps = documented(group)
        kinds = get_type_hints(group)
        lines += [f"## {name or 'Training'}", first]
        rows = ["| name | type | default | meaning |", "|---|---|---|---|"]
        for field in dataclasses.fields(group):
            full = f"{name}.{field.name}".lstrip(".")
            cells = (
                f"`{full}`",
                kind_of(kinds[field.name]),
                shown_default(default_of(field)),
                helps[field.name],
            )
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


def shown_default(value: Any) -> str:
    """Return a default for a table: in code, where it is a value."""
    from config.help import value_of

    shown = value_of(value)
    return shown if value is None or value == "" else f"`{shown}`"


def imports_picture() -> str:
    """Return the picture of the imports between folders."""
    from import_picture import import_picture

    return import_picture()


PAGES = {"settings.md": settings_page, "faults.md": faults_page, "pictures/imports.svg": imports_picture}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), "utf-8")
