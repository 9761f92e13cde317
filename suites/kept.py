"""Predictions on the disk as they are made, so that an interrupted evaluation goes on where it was.

    kept = Kept(Path("cache/predictions"), "humaneval", {"weights": "1f0c...", "temperature": 0.8, ...})
    done = kept.read(len(examples), draws)     # {(example, draw): (text, how it ended)}
    kept.add({(3, 0): ("return x", "eos")})
    kept.remove()                              # once they stand in eval.json

The file is named by a hash of everything that decides a prediction, so that another checkpoint, example or
setting has another file. It lies in this machine's own cache and not in the run: a run may be a stranger's,
and then its predictions would be too.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from data.cache import InUse, say_damaged

_CHECKSUM = 16  # Hexadecimal digits of a line's SHA-256 that are stored.

Draw = tuple[int, int]  # the number of an example, and the number of one of its texts
Made = dict[Draw, tuple[str, str]]  # the text of each draw, and how it ended


class Kept:
    """The predictions of one system for one suite.

    Args:
        folder: The folder of the files.
        name: The names of suite and system, for people to read.
        made_by: All that decides a prediction, as plain values.
    """

    def __init__(self, folder: Path, name: str, made_by: dict[str, Any]):
        key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"eval-{name}-{key[:32]}.jsonl"
        self.reused = 0  # The number of predictions that `read` found.
        self._in_use: InUse | None = None

    def read(self, n_examples: int, draws: int) -> Made:
        """Read the predictions that are there.

        Lines that a kill cut, or that were changed since, are left out, and their number is printed.
        """
        made: Made = {}
        try:
            self._in_use = self._in_use or InUse(self.path)
            lines = self.path.read_text("utf-8", errors="replace").split("\n")
        except OSError:
            return made
        damaged = 0
        for line in lines[:-1]:
            try:
                row = json.loads(line)
                told = row.pop("sha256")
                one, text, ended = (int(row["example"]), int(row["draw"])), row["text"], row["ended"]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                damaged += 1
                continue
            if (
                told == _checksum(row)
                and 0 <= one[0] < n_examples
                and 0 <= one[1] < draws
                and isinstance(text, str)
            ):
                made[one] = text, str(ended)
            else:
                damaged += 1
        if damaged:
            say_damaged(self.path, f"{damaged} of its predictions cannot be read")
        self.reused = len(made)
        return made

    def add(self, made: Made) -> None:
        """Append predictions, each on a line of its own, in one write."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = (
            {"example": i, "draw": draw, "text": text, "ended": ended}
            for (i, draw), (text, ended) in made.items()
        )
        data = "".join(json.dumps(row | {"sha256": _checksum(row)}) + "\n" for row in rows).encode()
        with open(self.path, "ab+", buffering=0) as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # The last line was cut by a kill.
                    data = b"\n" + data
            file.write(data)
        self._in_use = self._in_use or InUse(self.path)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _checksum(row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row).encode()).hexdigest()[:_CHECKSUM]
