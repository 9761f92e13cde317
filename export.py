"""A run's model as a folder that other tools open: `python export.py --run runs/NAME --out FOLDER`.

training/export.py documents the files that are written.
"""

from __future__ import annotations

import sys
from typing import Any

from config import make_parser, one_sentence
from training.export_config import ExportConfig

FLAGS = ("--merge", "--requantise")  # These need no value.


def parse_settings(argv: list[str]) -> ExportConfig:
    """Parse a command line; a mistake prints one sentence and exits with 2."""
    parser = make_parser({"": ExportConfig}, "Write a model for other tools.")
    words = []
    for word, after in zip(argv, [*argv[1:], "--"], strict=True):
        words += [word, "true"] if word in FLAGS and after.startswith("-") else [word]
    values = parser.parse_args(words).clone(with_meta=False).as_dict()
    values.pop("config", None)
    settings = ExportConfig(**values)
    if not settings.tolerance > 0:
        parser.error(f"--tolerance is {settings.tolerance}; it must be above 0")
    if bool(settings.run) == bool(settings.base):
        parser.error("give one of --run FOLDER and --base MODEL")
    if bool(settings.base) != bool(settings.adapter):
        parser.error("--base and --adapter belong together; give both, or --run")
    if settings.requantise and not settings.merge:
        parser.error("--requantise is for --merge; leave it out, or merge")
    if settings.base and not settings.merge:
        parser.error("--base with --adapter is for --merge; without it there is nothing to write")
    return settings


def __getattr__(name: str) -> Any:
    """Hand on `training.export`, which imports torch only when it is needed."""
    from training import export

    return getattr(export, name)


def main(argv: list[str]) -> None:
    """Export as the command line says."""
    settings = parse_settings(argv)
    with one_sentence():
        from training.export import export  # It imports torch, and a typo was answered before.

        print(export(settings))


if __name__ == "__main__":
    main(sys.argv[1:])
