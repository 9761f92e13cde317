"""The process that selftest/prove_resume.py starts: it trains, and may be killed after one of its saves.

    python -m selftest.resume_child CONFIG.yaml STEP

SIGKILL comes after the checkpoint of that step; 0 lets the run end by itself.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from config import Config, one_sentence
from config.yamlfile import read_yaml
from modules.precision import keep_freed_memory
from training.begin import train
from training.checkpoint import Manifest
from training.loop import Observer


def main(path: Path, kill_at: int) -> None:
    """Train with the settings in a file."""

    def kill(manifest: Manifest) -> None:
        if manifest.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    with one_sentence():
        keep_freed_memory()
        train(Config.from_dict(read_yaml(path)), Observer(on_save=kill))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
