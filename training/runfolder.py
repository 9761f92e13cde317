"""The run's folder: claimed by one run at a time, and what a resumed run may not change."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import yaml

from config import SETTINGS, Config, write_atomically
from config.schema import flat
from config.setting import REFUSED, WARNED
from config.yamlfile import read_yaml
from training.signals import RankLost

LOCK = ".lock"
# What a run writes before its first checkpoint.
BEGINNINGS = ("tokenizer", "fingerprints.json", "config.yaml", "overrides.json", "metrics.jsonl")
BEGINNINGS += ("tensorboard", "wandb", "mlruns", "checkpoints")
LOCK_TRIES = 1000  # Each fails only if another run ended in the same microseconds.


@contextlib.contextmanager
def claimed_folder(config: Config) -> Iterator[Path]:
    """Hold the run's folder, new or empty, or with `resume` one that holds a run; locked while it is held.

    The lock is the kernel's: a second run in the folder fails at once, and a killed run's lock is free. A run
    that fails before anything is written leaves no folder behind, and one that was killed before its first
    checkpoint leaves it free: it is cleared for the next one.
    """
    train = config.train
    if train.resume and not train.run:
        raise ValueError("--resume needs the folder of the run to go on with: --run runs/NAME")
    folder = Path(train.run) if train.run else new_folder()
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name a folder with --run")
    if train.resume and not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} holds no run to resume; check --run, or leave --resume out")
    with _locked(folder) as is_left:
        if not train.resume and is_left:
            _clear_beginning(folder)
        if not train.resume and any(path.name != LOCK for path in folder.iterdir()):
            raise ValueError(f"{folder} already holds another run; go on with --resume, or name a new --run")
        yield folder


def has_checkpoint(folder: Path) -> bool:
    """Return whether the folder of a run has a checkpoint, be it whole or not."""
    return any((folder / "checkpoints").glob("step-*"))


def _clear_beginning(folder: Path) -> None:
    """Remove what a killed run has left that came to no checkpoint, if there is nothing else."""
    found = [path for path in folder.iterdir() if path.name != LOCK]
    if has_checkpoint(folder) or any(path.name not in BEGINNINGS for path in found):
        return
    for path in found:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock; make the folder, and at the end remove the lock file, and the folder if empty.

    Yields whether a killed run has left the lock file.

    Raises:
        ValueError: Another process holds the lock.
    """
    lock = folder / LOCK
    found = next(filter(None, (_try_lock(folder) for _ in range(LOCK_TRIES))), None)
    if found is None:
        raise ValueError(f"{folder} can be neither made nor locked; name another --run")
    file, is_left = found
    is_lost = False
    try:
        yield is_left
    except RankLost:
        is_lost = True
        raise
    finally:
        if not is_lost:  # Else the file stays, as when all processes had been killed.
            lock.unlink(missing_ok=True)  # Before the lock is given up: see _try_lock.
        file.close()
        with contextlib.suppress(OSError):
            folder.rmdir()  # This fails unless the folder is empty.


def _try_lock(folder: Path) -> tuple[TextIO, bool] | None:
    """Return the locked file and whether a killed run left it, or None if it is no longer the folder's.

    A holder removes the file at its end. Who had opened it before gets a lock on what nobody else can see,
    while a third makes a new file and locks that: two runs in one folder. So the inodes are compared. Who
    holds the lock writes into the file: an empty one was made by somebody whom another was ahead of.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
    except (FileNotFoundError, FileExistsError):  # Another one removed the folder in the middle.
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
            is_left = os.fstat(file.fileno()).st_size > 0
            file.write(f"{os.getpid()}\n")
            file.flush()
            return file, is_left
    except FileNotFoundError:
        pass
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"another run is under way in {folder}; wait for it, or name another --run"
        ) from None
    file.close()
    return None


def new_folder() -> Path:
    """Make a folder in `runs` that is named after the time; a second one in the same second has a number."""
    name = time.strftime("%Y-%m-%d-%H%M%S", time.gmtime())
    for number in itertools.count(1):
        folder = Path("runs", name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError


def words_of_run(folder: str | Path) -> list[str]:
    """Return the words of a command line that give a resumed run its own settings; none without a run.

    Raises:
        ValueError: The run's config.yaml cannot be read.
    """
    saved = Path(folder) / "config.yaml"
    if not str(folder) or not saved.is_file():
        return []
    # As values and not as a file: a stranger's could name other files, which the parser would read.
    return [f"--config={json.dumps(Config.from_dict(read_yaml(saved)).to_dict())}"]


def with_data_resolved(config: Config, folder: Path) -> Config:
    """Return the config with `data.regroup` decided.

    Where it is unset, it is what the run in the folder has, or else what suits the source.

    Raises:
        ValueError: The folder's config.yaml cannot be read.
    """
    data, saved = config.data, folder / "config.yaml"
    if data.regroup is None and saved.is_file():
        before = Config.from_dict(read_yaml(saved))
        data = dataclasses.replace(data, regroup=before.data.resolved().regroup)
    return dataclasses.replace(config, data=data.resolved())


def config_fingerprint(config: Config) -> str:
    """Return the SHA-256 of the values that a resumed run may not change: equal for all stretches of one run.

    A setting that came later is left out while it has the value that stood for it before, so that a run that
    was saved then can go on.
    """
    fixed = {
        key: value
        for key, value in flat(config.with_optimizer_defaults()).items()
        if (known := SETTINGS[key]).on_resume == REFUSED
        and not (known.is_later and known.stored_before == value)
    }
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def refuse_changes(folder: Path, config: Config) -> None:
    """Raise a ValueError if a resumed run has another value of a key that refuses one; warn of others."""
    saved = read_yaml(folder / "config.yaml")
    before = flat(with_data_resolved(Config.from_dict(saved), folder).with_optimizer_defaults())
    if "validation_batches" in saved:
        print(
            f"warning: {folder} began when a validation read whole batches; it reads as many single rows "
            "now, so that its best loss so far is of other rows",
            file=sys.stderr,
        )
    after = flat(with_data_resolved(config, folder).with_optimizer_defaults())
    changed = {key: (before[key], new) for key, new in after.items() if before[key] != new}
    for key, (old, new) in changed.items():
        if SETTINGS[key].on_resume == REFUSED:
            raise ValueError(f"{key} was {old} when {folder} began and is {new} now; set it back")
    for key, (old, new) in changed.items():
        if SETTINGS[key].on_resume == WARNED:
            print(
                f"warning: {key} was {old} so far and is {new} now; from here on the run differs from one "
                "that was never stopped",
                file=sys.stderr,
            )


def found_from_anywhere(base: str) -> str:
    """Return a base as it is found from any folder: a hub's id as it is, a folder as a whole path."""
    return str(Path(base).resolve()) if Path(base).is_dir() else base


def note_base(folder: Path, base: str | None) -> None:
    """Write down where the base of a run lies now: whoever opens the run looks for it there."""
    if base is not None:
        path = folder / "config.yaml"
        saved = read_yaml(path) | {"base": found_from_anywhere(base)}
        write_atomically(path, yaml.safe_dump(saved, sort_keys=False))


def refuse_other_data(folder: Path, config: Config, fingerprints: dict[str, str]) -> None:
    """Raise a ValueError if a resumed run would go on with other data or another tokenizer."""
    path = folder / "fingerprints.json"
    try:
        before = json.loads(path.read_text("utf-8"))
        if not isinstance(before, dict) or not all(isinstance(value, str) for value in before.values()):
            raise ValueError("it must be a mapping of names to text")
    except (OSError, ValueError):
        raise ValueError(f"{path} is damaged, so what the run was trained on is not known") from None
    places = {
        "data": f"in {config.data.source}",
        "tokenizer": f"in {config.tokenizer.path}" if config.tokenizer.path else "trained on the data",
    }
    if "base" in fingerprints:
        places["base"] = f"in {config.train.base}"
    for name, place in places.items():
        was = before.get(name, "none")
        if was != fingerprints[name]:
            raise ValueError(
                f"the {name} changed since {folder} began: the fingerprint is {fingerprints[name][:12]} now "
                f"({place}) and was {was[:12]} then ({path}); restore the {name}, or start another --run"
            )
