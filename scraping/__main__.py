"""python -m scraping COMMAND: see the package. `python -m scraping` lists the commands."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import sys
from itertools import pairwise
from typing import Any

from config import make_parser, one_sentence
from config.console import refuse

# Each command is a dataclass of settings and a function of them, in a module that is imported when asked for.
COMMANDS = {
    "crawl": ("scraping.crawl", "find repositories on GitHub, and fetch their files"),
    "clone": ("scraping.clone", "fetch one git repository at a revision"),
    "local": ("scraping.local", "take in a folder or an archive"),
    "site": ("scraping.site", "take in the code examples of a documentation site"),
    "stdlib": ("scraping.stdlib", "take in the interpreter's own library"),
    "status": ("scraping.status", "what was found, and what became of it"),
    "clean": ("scraping.clean", "turn files into documents, and drop what does not belong"),
    "dedup": ("scraping.dedup", "find near duplicates over all shards"),
    "build": ("scraping.build", "write the corpus, its counts and its card"),
}


def parse(module: Any, command: str, argv: list[str]) -> Any:
    """The `module.Settings` of a command line: `--flag` alone is true, `--list a,b` is a list."""
    fields = {f"--{field.name}": str(field.type) for field in dataclasses.fields(module.Settings)}
    words: list[str] = []
    for word in argv:
        words += word.split("=", 1) if word.split("=")[0] in fields else [word]
    spelled: list[str] = []
    for word, after in pairwise([*words, "--"]):
        kind = fields.get(spelled[-1], "") if spelled else ""
        spelled.append(f"[{word}]" if kind.startswith("tuple") and not word.startswith("[") else word)
        if fields.get(word) == "bool" and after.startswith("-"):
            spelled.append("true")
    parser = make_parser({"": module.Settings}, COMMANDS[command][1])
    parser.prog = f"python -m scraping {command}"
    values = parser.parse_args(spelled).clone(with_meta=False).as_dict()
    values.pop("config", None)
    return module.Settings(**values)


def main(argv: list[str]) -> None:
    """Run one command; a mistake is one sentence and exit code 2."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:8}{what}" for name, (_, what) in COMMANDS.items()]
        print("\n".join(["usage: python -m scraping COMMAND [flags]", "", *lines]))
        return
    command, *words = argv
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        refuse(f"{command} is no command; {hint}")
    with one_sentence():
        module = importlib.import_module(COMMANDS[command][0])
        module.run(parse(module, command, words))


if __name__ == "__main__":
    main(sys.argv[1:])
