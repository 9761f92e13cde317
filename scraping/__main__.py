"""python -m scraping COMMAND: see the package. `python -m scraping` lists the commands."""

from __future__ import annotations

import difflib
import importlib
import sys
from typing import Any

from config import one_sentence, parse_settings
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
    """Return the settings that a command line gives; a mistake prints one sentence and exits with 2."""
    return parse_settings(settings, argv, COMMANDS[command][2], f"python -m scraping {command}")


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
