"""Small sweeps, and their processes and records, for the tests of sweeps."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from config.files import REPOSITORY
from sweeps.board import Board, Pulse, slots_of
from sweeps.settings import SweepSettings, parse_settings
from sweeps.study import open_studies
from sweeps.worker import Worker


def tiny(folder: Path, corpus: Path, **changes: Any) -> Path:
    """A YAML of a sweep whose trials take a second."""
    values: dict[str, Any] = {
        "data": {
            "source": str(corpus),
            "validation_one_in": 4,
            "test_one_in": 4,
            "workers": 1,
            "cache": str(folder / "cache"),
        },
        "tokenizer": {"vocab_size": 300, "min_count": 2},
        "model": {"block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 16},
        "optimizer": {"warmup_steps": 2},
        "max_steps": 12,
        "validate_every": 3,
        "batch_size": 4,
        "samples": 0,
        "space": {"head_lr": {"log": ["1e-3", "1e-1"]}, "model.dropout": [0.0, 0.2]},
        "sweep": {"study": str(folder / "study"), "trials": 3, "repeat_seeds": 2, "repeat_best": 1},
    }
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(value, dict) and key != "space" else value
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path


def command(*words: str | Path) -> list[str]:
    return [sys.executable, str(REPOSITORY / "hyperparam_tune.py"), *map(str, words)]


def run(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), cwd=cwd, capture_output=True, text=True, timeout=900)


class Fork(multiprocessing.context.ForkProcess):
    """A fork that takes signals as a process that was spawned does: none reaches its parent's handlers."""

    stopping = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})

    def start(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, self.stopping)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.stopping)

    def run(self) -> None:
        for number in self.stopping:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.stopping)
        super().run()


class ForkContext(multiprocessing.context.ForkContext):
    Process = Fork


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers begin as forks of this process: to import torch anew takes each of them three seconds."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: ForkContext())


def records(folder: Path, name: str = "study", url: str = "") -> list[optuna.trial.FrozenTrial]:
    """Return the records of a study, as Optuna's own reader has them."""
    storage = url or JournalStorage(JournalFileBackend(str(folder / "study" / "journal.log")))
    return optuna.load_study(study_name=name, storage=storage).get_trials()


def results(folder: Path, name: str = "study", url: str = "") -> dict[int, Any]:
    """Return the parameters and the value of each slot."""
    return {slot: (r.params, r.value) for slot, r in slots_of(records(folder, name, url)).items()}


def wait_for(true: Callable[[], bool], seconds: float = 600) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def workers_of(pid: int) -> list[int]:
    """The processes that a sweep's command spawned to train."""
    found = []
    for child in children(pid):
        try:
            words = Path(f"/proc/{child}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"spawn_main" in words:
            found.append(child)
    return found


def sweep(path: Path, *words: str) -> tuple[SweepSettings, dict[int, optuna.trial.FrozenTrial]]:
    """One worker's work, from the settings to the last slot."""
    settings = parse_settings(["--config", str(path), *words])
    settings.sweep.folder.mkdir(exist_ok=True)
    trials, repeats = open_studies(settings)
    with Pulse(trials, settings.sweep.folder) as pulse:
        Worker(settings, trials, repeats, pulse).work()
    return settings, Board(trials, pulse).slots()
