"""The run's folder: claimed by one run at a time, and what a resumed run may not change."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from config import Config

LOCK = ".lock"


@contextlib.contextmanager
def claimed_folder(config: Config) -> Iterator[Path]:
    """The run's folder, new or empty, or with `resume` one that holds a run; locked while the run lasts.

    The lock is the kernel's: a second run in the folder fails at once, and a killed run's lock is free. A run
    that fails before anything is written leaves no folder behind.
    """
    train = config.train
    if train.resume and not train.run:
        raise ValueError("--resume needs the folder of the run to go on with: --run runs/NAME")
    folder = Path(train.run) if train.run else new_folder()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder with --run")
    if train.resume and not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} holds no run to resume; check --run, or leave --resume out")
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run is under way in {folder}; wait for it, or name another --run"
            ) from None
        try:
            if not train.resume and any(path.name != LOCK for path in folder.iterdir()):
                raise ValueError(
                    f"{folder} already holds another run; go on with --resume, or name a new --run"
                )
            yield folder
        finally:
            lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if it is empty


def new_folder() -> Path:
    """A folder of `runs` named after the time, made here; runs that begin in the same second get a number."""
    name = time.strftime("%Y-%m-%d-%H%M%S", time.gmtime())
    for number in itertools.count(1):
        folder = Path("runs", name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError


# What a resumed run may not change: the position in the data or the sense of the state would change too.
# The data themselves are compared by their fingerprint, wherever they lie.
FIXED_GROUPS = ("data", "tokenizer", "model", "optimizer")
FIXED_KEYS = ("seed", "batch_size", "accumulation", "overfit")
FREE_KEYS = ("data.source", "data.cache", "data.workers", "tokenizer.path")


def refuse_changes(folder: Path, config: Config) -> None:
    """ValueError if a resumed run would go on with other settings."""
    before = Config.from_dict(yaml.safe_load((folder / "config.yaml").read_text("utf-8"))).to_dict()
    after = config.to_dict()
    pairs = {key: (before[key], after[key]) for key in FIXED_KEYS}
    for group in FIXED_GROUPS:
        pairs |= {f"{group}.{key}": (before[group][key], after[group][key]) for key in after[group]}
    for key, (old, new) in pairs.items():
        if old != new and key not in FREE_KEYS:
            raise ValueError(f"{key} was {old} when {folder} began and is {new} now; set it back")


def refuse_other_data(folder: Path, fingerprints: dict[str, str]) -> None:
    """ValueError if a resumed run would go on with other data or another tokenizer."""
    old_fingerprints = json.loads((folder / "fingerprints.json").read_text("utf-8"))
    for name in ("data", "tokenizer"):
        if old_fingerprints[name] != fingerprints[name]:
            raise ValueError(f"the {name} changed since {folder} began; restore it, or start another --run")
