"""A shell's completion of the verbs and their flags: `./plumb --print_completion bash`."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Literal, get_args, get_origin

import shtab

from config.console import refuse
from config.flags import Flag
from config.help import documented
from verbs import Verb, verbs


def completion(shell: str) -> str:
    """Return the script by which a shell completes `plumb` and `./plumb`."""
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
            options: dict[str, Any] = {"nargs": "?" if flag.alone else None, "choices": choices_of(flag)}
            action = command.add_argument(written, help=meanings.get(flag.name, ""), **options)
            if options["choices"] is None:
                action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
    return shtab.complete(parser, shell)


def meanings_of(verb: Verb) -> dict[str, str]:
    """Return the first sentence on each flag of a verb, as argparse wants it."""
    found = {}
    for prefix, group in [one for groups in reversed(verb.groups) for one in groups.items()]:
        for key, text in documented(group)[1].items():
            found[f"--{prefix}.{key}".replace("--.", "--")] = text.partition(". ")[0].replace("%", "%%")
    return found


def choices_of(flag: Flag) -> tuple[str, ...] | None:
    """Return the words that a flag's value may be, where they can be listed."""
    kinds = [flag.kind, *get_args(flag.kind)]
    if flag.holds(bool):
        return ("true", "false")
    return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), None)


if __name__ == "__main__":
    shells = ", ".join(shtab.SUPPORTED_SHELLS)
    if sys.argv[1:2] == [] or sys.argv[1] not in shtab.SUPPORTED_SHELLS:
        refuse(f"--print_completion needs the name of a shell: {shells}")
    print(completion(sys.argv[1]))
