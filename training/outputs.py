"""What a run leaves at its end besides its checkpoints, and which of it is there.

RUN/outputs.json names what was made after the last checkpoint, each as soon as it is whole: a run that is
killed there makes the rest when it is resumed. No torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from config import write_atomically

RECORD = "outputs.json"
OUTPUTS = {  # in the order in which they are made, with a file of each
    "adapter": "adapter/adapter_config.json",
    "scores": "eval.json",
    "samples": "samples.txt",
    "pictures": "curves/loss.png",
}


def outputs_made(folder: Path, best_step: int) -> set[str]:
    """The names of OUTPUTS that are there and were made at the end of a run's training.

    A run of before there was a record has those that are there, if its scores are of its best checkpoint: the
    scores came after the adapter.

    Args:
        folder: Of the run.
        best_step: That of the checkpoint that is scored.
    """
    there = {name for name, file in OUTPUTS.items() if (folder / file).is_file()}
    if (folder / RECORD).exists():
        return there & _recorded(folder)
    try:
        scored = json.loads((folder / OUTPUTS["scores"]).read_text("utf-8"))["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
    return there if scored == best_step else set()


def note_made(folder: Path, *names: str) -> None:
    """Note that some of OUTPUTS were made."""
    made = [known for known in OUTPUTS if known in {*_recorded(folder), *names}]
    values = {"checkpoint": _newest(folder), "made": made}
    write_atomically(folder / RECORD, json.dumps(values, indent=1))


def _recorded(folder: Path) -> set[str]:
    try:
        values = json.loads((folder / RECORD).read_text("utf-8"))
        return {*values["made"]} if values["checkpoint"] == _newest(folder) else set()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def _newest(folder: Path) -> str:
    """SHA-256 of the newest checkpoint's manifest, which has that of each of its files."""
    manifests = sorted((folder / "checkpoints").glob("step-*/manifest.json"))
    return hashlib.sha256(manifests[-1].read_bytes()).hexdigest() if manifests else ""
