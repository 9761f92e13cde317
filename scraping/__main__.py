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

# Command -> (module, class of its settings, help). The module has a function `run(settings)`, and is imported
# when its command is given.
COMMANDS = {
    "crawl": ("scraping.crawl", "CrawlSettings", "find repositories on GitHub, and fetch their files"),
    "clone": ("scraping.clone", "CloneSettings", "fetch one git repository at a revision"),
    "local": ("scraping.local", "LocalSettings", "take in a folder or an archive"),
    "site": ("scraping.site", "SiteSettings", "take in the code examples of a documentation site"),
    "stdlib": ("scraping.stdlib", "StdlibSettings", "take in the interpreter's own library"),
    "status": ("scraping.status", "StatusSettings", "what was found, and what became of it"),
    "clean": ("scraping.clean", "CleanSettings", "turn files into documents, and drop what does not belong"),
    "dedup": ("scraping.dedup", "DedupSettings", "find near duplicates over all shards"),
    "build": ("scraping.build", "BuildSettings", "write the corpus, its counts and its card"),
}


def parse(settings: type, command: str, argv: list[str]) -> Any:
    """Return the settings that a command line gives: `--flag` alone is true, `--list a,b` is a list."""
    fields = {f"--{field.name}": str(field.type) for field in dataclasses.fields(settings)}
    words: list[str] = []
    for word in argv:
        words += word.split("=", 1) if word.split("=")[0] in fields else [word]
    spelled: list[str] = []
    for word, after in pairwise([*words, "--"]):
        kind = fields.get(spelled[-1], "") if spelled else ""
        spelled.append(f"[{word}]" if kind.startswith("tuple") and not word.startswith("[") else word)
        if fields.get(word) == "bool" and after.startswith("-"):
            spelled.append("true")
    parser = make_parser({"": settings}, COMMANDS[command][2])
    parser.prog = f"python -m scraping {command}"
    values = parser.parse_args(spelled).clone(with_meta=False).as_dict()
    values.pop("config", None)
    return settings(**values)


def main(argv: list[str]) -> None:
    """Run one command; a mistake is one sentence and exit code 2."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:8}{what}" for name, (_, _, what) in COMMANDS.items()]
        print("\n".join(["usage: python -m scraping COMMAND [flags]", "", *lines]))
        return
    command, *words = argv
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        refuse(f"{command} is no command; {hint}")
    with one_sentence():
        name, settings, _ = COMMANDS[command]
        module = importlib.import_module(name)
        module.run(parse(getattr(module, settings), command, words))


if __name__ == "__main__":
    main(sys.argv[1:])
