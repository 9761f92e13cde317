"""A run's model as a folder or a file that other tools open.

    python export.py --run runs/NAME --out FOLDER
    python export.py --run runs/NAME --gguf model.gguf --type q8_0

training/export.py documents the files that are written.
"""

from __future__ import annotations

import sys
from typing import Any

import config
from config import one_sentence
from config.console import refuse
from training.export_config import ExportConfig


def parse_settings(argv: list[str]) -> ExportConfig:
    """Return the ExportConfig of a command line; a mistake prints one sentence and exits with 2."""
    settings = config.parse_settings(ExportConfig, argv, "Write a model for other tools.")
    if not settings.tolerance > 0:
        refuse(f"--tolerance is {settings.tolerance}; it must be above 0")
    if bool(settings.run) == bool(settings.base):
        refuse("give one of --run FOLDER and --base MODEL")
    if bool(settings.out) == bool(settings.gguf):
        refuse("give one of --out FOLDER and --gguf FILE")
    if settings.type != "f16" and not settings.gguf:
        refuse("--type is for --gguf; leave it out, or name a file")
    if bool(settings.base) != bool(settings.adapter) and not (settings.base and settings.gguf):
        refuse("--base and --adapter belong together; give both, or --run")
    if settings.requantise and not settings.merge:
        refuse("--requantise is for --merge; leave it out, or merge")
    if settings.adapter and not settings.merge:
        refuse("--base with --adapter is for --merge; without it there is nothing to write")
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
