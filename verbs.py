"""The verbs of `./plumb`, as the table at the head of that script has them, with the settings of each.

`./plumb VERB words` runs `.venv/bin/python PROGRAM words`, once the environment is there. `python verbs.py
bash` prints the script by which a shell completes verbs and flags; docs/flags.md is made from them too.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from typing import NamedTuple

from config import CONFIG_GROUPS
from config.console import refuse
from config.files import REPOSITORY
from config.flags import Flag, flags_of
from config.help import documented


class Verb(NamedTuple):
    """A verb of the command, or a command of a verb, such as `scrape clone`.

    Args:
        program: The words behind `python`.
        about: What it does, in a line.
        groups: The dataclasses of its settings by their prefix, as often as it reads the command line; none
            where the flags are another program's, or those of its commands.
    """

    program: str
    about: str
    groups: tuple[dict[str, type], ...] = ()

    @property
    def flags(self) -> dict[str, Flag]:
        """The flags of all its groups by each of their names; those of the first come first, and count."""
        own = [flags_of(groups) for groups in self.groups]
        return {name: flag for flags in [*own, *reversed(own)] for name, flag in flags.items()}


def verbs() -> dict[str, Verb]:
    """Return every verb by its name, each before its commands."""
    from recipes.__main__ import RECIPES
    from scraping.__main__ import COMMANDS

    own, found = settings(), {}
    commands = {"scrape": {name: about for name, (_, _, about) in COMMANDS.items()}, "recipe": RECIPES}
    script = (REPOSITORY / "plumb").read_text("utf-8")
    for name, about, program in re.findall(r"^#   (\w+) +(.+?)  +python (.+)$", script, re.MULTILINE):
        found[name] = Verb(program, about, own.get(name, ()))
        for command, line in commands.get(name, {}).items():
            found[f"{name} {command}"] = Verb(f"{program} {command}", line, own[f"{name} {command}"])
    return found


def settings() -> dict[str, tuple[dict[str, type], ...]]:
    """Return the dataclasses of the settings of each verb that has flags of ours."""
    from generation.settings import CommandConfig
    from recipes.__main__ import RECIPES
    from scraping.__main__ import COMMANDS
    from selftest.settings import SelftestSettings
    from serving.settings import ServeConfig
    from suites.settings import EvalConfig
    from sweeps.settings import SweepConfig
    from training.export_config import ExportConfig

    found: dict[str, tuple[dict[str, type], ...]] = dict.fromkeys(
        ("train", "plan", "prepare"), (CONFIG_GROUPS,)
    )
    found |= {
        "sweep": ({"": SweepConfig}, CONFIG_GROUPS),
        "eval": ({"": EvalConfig},),
        "generate": ({"": CommandConfig},),
        "serve": ({"": ServeConfig},),
        "export": ({"": ExportConfig},),
        "selftest": ({"": SelftestSettings},),
    }
    for name, (module, group, _) in COMMANDS.items():
        found[f"scrape {name}"] = ({"": getattr(importlib.import_module(module), group)},)
    for name in RECIPES:
        found[f"recipe {name}"] = ({"": importlib.import_module(f"recipes.{name}").SETTINGS}, CONFIG_GROUPS)
    return found


def completion(shell: str) -> str:
    """Return the script by which a shell completes `plumb` and `./plumb`."""
    import shtab

    if shell not in shtab.SUPPORTED_SHELLS:
        shells = ", ".join(shtab.SUPPORTED_SHELLS)
        refuse(f"--print_completion needs the name of a shell: {shells}")
    parser = argparse.ArgumentParser("plumb", add_help=False)
    for flag in ("--help", "--version"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--print_completion", choices=shtab.SUPPORTED_SHELLS)
    commands = {"": parser.add_subparsers()}
    for name, verb in verbs().items():
        above, _, own = name.rpartition(" ")
        command = commands[above].add_parser(own, help=verb.about, add_help=False)
        if not verb.groups:
            commands[name] = command.add_subparsers()
        command.add_argument("--help", action="store_true", help="show all flags")
        meanings = meanings_of(verb)
        for written, flag in verb.flags.items():
            action = command.add_argument(
                written,
                nargs="?" if flag.alone else None,
                choices=flag.choices or None,
                help=meanings.get(flag.name, ""),
            )
            if not flag.choices:
                action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
    return shtab.complete(parser, shell)


def meanings_of(verb: Verb) -> dict[str, str]:
    """Return the first sentence on each flag of a verb, as argparse wants it."""
    found = {}
    for prefix, group in [one for groups in reversed(verb.groups) for one in groups.items()]:
        for key, text in documented(group)[1].items():
            found[f"--{prefix}.{key}".replace("--.", "--")] = text.partition(". ")[0].replace("%", "%%")
    return found


if __name__ == "__main__":
    print(completion("".join(sys.argv[1:])))
