"""Text from a model: `python generate.py --model FOLDER --prompt "def fib(n):"`.

The command writes the completion to the standard output while it is made, and its length and speed to the
standard error. With --suffix the model fills the gap between prompt and suffix; with --recipe it does the
task that a recipe trained it for.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import config
from config import one_sentence
from config.flags import flags_of, has_flag
from generation.settings import CommandConfig


def parse_settings(argv: list[str]) -> CommandConfig:
    """Return the CommandConfig of a command line; a mistake prints one sentence and exits with 2."""
    return config.parse_settings(CommandConfig, argv, "Continue a prompt, or fill the gap before a suffix.")


def __getattr__(name: str) -> Any:
    """Hand on `generation.text`, which imports torch only when it is needed."""
    from generation import text

    return getattr(text, name)


def main(argv: list[str]) -> None:
    """Generate as the command line says, or hand it to the recipe that it names."""
    # Modules with torch are imported after the command line was understood.
    if has_flag(argv, flags_of({"": CommandConfig}), ["--recipe"]):
        from recipes.refactoring import main as refactor  # It has flags of its own.

        refactor(argv)
        return
    settings = parse_settings(argv)
    with one_sentence():
        from generation.command import write_completions
        from guards.reference.opened import examine

        try:
            write_completions(settings, examine)
        except BrokenPipeError:  # The reader, such as `| head`, has closed the pipe.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # The flush at exit needs a file.


if __name__ == "__main__":
    main(sys.argv[1:])
