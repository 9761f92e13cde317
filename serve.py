"""Completions for editors and other clients: `python serve.py --model FOLDER`.

With nothing named it serves the newest run. docs/serve.md has the protocols, the limits, and what each editor
is to be told.
"""

from __future__ import annotations

import sys

import config
from config import one_sentence
from serving.settings import ServeConfig


def parse_settings(argv: list[str]) -> ServeConfig:
    """Return the ServeConfig of a command line; a mistake prints one sentence and exits with 2."""
    return config.parse_settings(ServeConfig, argv, "Serve completions to editors and other clients.")


def main(argv: list[str]) -> None:
    """Serve until a signal ends it."""
    settings = parse_settings(argv)
    with one_sentence():
        from guards.reference.opened import examine  # It imports torch, and a typo was answered before.
        from serving.command import serve

        serve(settings, examine)


if __name__ == "__main__":
    main(sys.argv[1:])
