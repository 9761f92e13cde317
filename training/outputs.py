"""The outputs of a run besides its checkpoints: which of them there are, and which are made.

RUN/outputs.json names what was made after the last checkpoint, each as soon as it is whole: a run that is
killed there makes the rest when it is resumed. No torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from config import write_atomically

RECORD = "outputs.json"
OUTPUTS = {  # One file of each, in the order in which they are made.
    "adapter": "adapter/adapter_config.json",
    "scores": "eval.json",
    "samples": "samples.txt",
    "pictures": "curves/loss.png",
}


def outputs_made(folder: Path, best_step: int) -> set[str]:
    """Return the names in OUTPUTS of those that are there and were made at the end of a run's training.

    A run that is older than the record has those that are there, if its scores are of its best checkpoint:
    the scores came after the adapter.

    Args:
        folder: The run's folder.
        best_step: The step of the checkpoint that is scored.
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
    """Record that some of OUTPUTS were made."""
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
    """Return the SHA-256 of the newest checkpoint's manifest, which has that of each of its files."""
    manifests = sorted((folder / "checkpoints").glob("step-*/manifest.json"))
    return hashlib.sha256(manifests[-1].read_bytes()).hexdigest() if manifests else ""
