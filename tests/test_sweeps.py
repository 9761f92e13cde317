"""Sweeps through the real command line and by workers that are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from sweeps.board import is_done, slots_of

HOUSE = Path(__file__).parent.parent


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
    return [sys.executable, str(HOUSE / "hyperparam_tune.py"), *map(str, words)]


def run(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), cwd=cwd, capture_output=True, text=True, timeout=300)


def records(folder: Path, name: str = "study") -> list[optuna.trial.FrozenTrial]:
    """As Optuna's own reader has them."""
    storage = JournalStorage(JournalFileBackend(str(folder / "study" / "journal.log")))
    return optuna.load_study(study_name=name, storage=storage).get_trials()


def results(folder: Path, name: str = "study") -> dict[int, Any]:
    """Of each slot its parameters and value."""
    return {slot: (r.params, r.value) for slot, r in slots_of(records(folder, name)).items()}


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


@pytest.mark.slow
def test_fifty_kills_at_random_instants_lose_nothing(tmp_path: Path, corpus: Path) -> None:
    """Each slot ends once, with the parameters and the value that it has in a study that nobody killed."""
    options = ("--sampler", "random", "--pruner", "none", "--trials", "8", "--deaths", "1000")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        tiny(folder, corpus, max_steps=40)
    assert run("--config", whole / "tiny.yaml", *options, cwd=whole).returncode == 0
    draw = random.Random(int(os.environ.get("PLUMB_SEED", "0")))
    words = command("--config", killed / "tiny.yaml", *options, "--workers", "2")
    wanted, kills, of_command, starts = int(os.environ.get("PLUMB_KILLS", "50")), 0, 0, 0
    while True:
        process = subprocess.Popen(
            words, cwd=killed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        starts += 1
        while process.poll() is None and kills < wanted:
            time.sleep(draw.uniform(0.2, 3.0))
            victims = workers_of(process.pid)
            if not victims:
                continue
            if draw.random() < 0.1:
                process.kill()
                of_command += 1
            else:
                os.kill(draw.choice(victims), signal.SIGKILL)
            kills += 1
        output, _ = process.communicate(timeout=900)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, output
    print(f"{kills} kills, {of_command} of them of the command itself; {starts} starts")
    for name in ("study", "study-repeats"):
        assert results(killed, name) == results(whole, name)
        assert all(r.state.is_finished() for r in records(killed, name))
        assert all(is_done(record) for record in slots_of(records(killed, name)).values())
    assert list(results(killed)) == list(range(8))
    assert kills == wanted or pytest.fail(f"the study ended after {kills} kills")
