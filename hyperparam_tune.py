"""Sweep over any setting: `python hyperparam_tune.py [--config FILE.yaml] [--workers N] [--flag value ...]`.

    space: -> trials through the ordinary training -> table, pictures, and the best config as a file

With no arguments it sweeps the default model on the interpreter's own standard library for 15 minutes. The
same command goes on with a study that was stopped, and joins one that is under way, here or elsewhere.
"""

from __future__ import annotations

import sys

from config import one_sentence
from sweeps.settings import parse_settings


def main(argv: list[str]) -> None:
    """Run the sweep of a command line."""
    settings = parse_settings(argv)
    with one_sentence():
        from sweeps.command import sweep  # This imports torch, after a mistyped flag was told.

        sys.exit(sweep(settings))


if __name__ == "__main__":
    main(sys.argv[1:])
