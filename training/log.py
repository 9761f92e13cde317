"""The log of a run: lines of metrics.jsonl, its loggers, and a progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Self

from tqdm import tqdm

from config import Config, write_atomically
from config.bars import progress_bar
from training.loggers import close, couriers


class Log:
    """metrics.jsonl and the loggers of `config.train.log`, with the same values under the same names.

    Lines that a killed run wrote after its last checkpoint are removed, and so is one that was cut short.

    Args:
        folder: The run's folder.
        step: Updates done; what was logged of later ones is forgotten.
        config: The run's settings.
        writes: Whether anything is written; of several processes only the first one does.
    """

    def __init__(self, folder: Path, step: int, config: Config, writes: bool = True):
        self.writes, self.loggers = writes, []
        if not writes:
            return
        path = folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text("utf-8").splitlines() if step_of(line) <= step]
            write_atomically(path, "".join(f"{line}\n" for line in kept))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self.loggers = couriers(config.train.log, folder, config, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.close(failed=error is not None)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line, and hand it to the operating system and to the loggers."""
        if not self.writes:
            return
        self.file.write(json.dumps({"step": step} | values) + "\n")
        self.file.flush()
        for logger in self.loggers:
            logger.write(step, values)

    def to_disk(self) -> None:
        """Wait until the lines are on the disk; before that, a loss of power may take them."""
        if self.writes:
            os.fsync(self.file.fileno())

    def close(self, failed: bool = False) -> None:
        """Close the file and the loggers.

        Args:
            failed: Whether an error ends the run.
        """
        if self.writes:
            self.file.close()
        close(self.loggers, failed)

    def failed_loggers(self) -> frozenset[str]:
        """Return the names of the loggers that failed."""
        return frozenset(logger.name for logger in self.loggers if logger.failed)


def step_of(line: str) -> float:
    """Return the step of a line of metrics.jsonl; infinity for a line that was cut short."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def say(text: str) -> None:
    """Print beside the bar. A reader (`| head`) or a terminal that went away does not end the run."""
    with contextlib.suppress(OSError):
        tqdm.write(text)


def training_bar() -> tqdm:
    """Return the bar of a run, from 0 to 1."""
    return progress_bar(total=1.0, bar_format="{percentage:3.0f}%|{bar:20}| {desc}")


def show_progress(bar: tqdm, text: str, progress: float, seconds: float) -> None:
    """Move the bar, and write beside it what a step was like and how much time is left.

    Args:
        progress: Share of the budget that is used, from 0.
        seconds: Time that this took.
    """
    left = seconds * (1 / progress - 1) if progress else 0.0
    bar.set_description_str(f"{text}  {left // 60:.0f}:{left % 60:02.0f} left")
    bar.update(min(1.0, progress) - bar.n)
