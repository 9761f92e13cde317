"""Text from a model: `python generate.py --model FOLDER --prompt "def fib(n):"`.

The command writes the completion to the standard output while it is made, and its length and speed to the
standard error. With --suffix the model fills the gap between prompt and suffix; with --recipe it does the
task that a recipe trained it for.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from config import make_parser, one_sentence
from generation.settings import CommandConfig


def parse_settings(argv: list[str]) -> CommandConfig:
    """Parse a command line; a mistake prints one sentence and exits with 2.

    Texts are taken as they are, where the parser would read them as YAML.
    """
    texts: dict[str, list[str]] = {"--prompt": [], "--stop": [], "--suffix": []}
    words, rest = [], iter(argv)
    for word in rest:
        flag, given, value = word.partition("=")
        text = value if given else next(rest, None) if flag in texts else None
        if flag in texts and text is not None:
            texts[flag].append(text)
        else:
            words.append(word)
    parser = make_parser({"": CommandConfig}, "Continue a prompt, or fill the gap before a suffix.")
    values = parser.parse_args(words).clone(with_meta=False).as_dict()
    values.pop("config", None)
    if len(texts["--suffix"]) > 1:
        parser.error(f"--suffix is given {len(texts['--suffix'])} times; give one")
    values |= {flag[2:]: tuple(found) for flag, found in texts.items() if found and flag != "--suffix"}
    if texts["--suffix"]:
        values["suffix"] = texts["--suffix"][0]
    try:
        return CommandConfig(**values | {key: tuple(values[key]) for key in ("prompt", "stop")})
    except ValueError as error:
        return parser.error(str(error))  # It exits.


def __getattr__(name: str) -> Any:
    """Hand on `generation.text`, which imports torch only when it is needed."""
    from generation import text

    return getattr(text, name)


def main(argv: list[str]) -> None:
    """Generate as the command line says, or hand it to the recipe that it names."""
    # Modules with torch are imported after the command line was understood.
    if any(word.split("=")[0] == "--recipe" for word in argv):
        from recipes.refactoring import main as refactor  # It has flags of its own.

        refactor(argv)
        return
    settings = parse_settings(argv)
    with one_sentence():
        from generation.command import write_completions

        try:
            write_completions(settings)
        except BrokenPipeError:  # The reader, such as `| head`, has closed the pipe.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # The flush at exit needs a file.


if __name__ == "__main__":
    main(sys.argv[1:])
