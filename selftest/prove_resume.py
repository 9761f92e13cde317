"""Proof of resume: `python trainingmanager.py --prove_resume [flags]`.

There are two runs with the flags' settings, in folders of their own: one of 2N steps, and one that is killed
(SIGKILL) after its checkpoint of step N and goes on with --resume. Each stretch is a process of its own, as a
user's would be (`selftest/resume_child.py`). Then all that was saved and all that was logged is compared, bit
for bit; only times may differ.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from config import Config
from config.files import own_module
from training.beforehand import refuse_mistakes
from training.checkpoint import Manifest, checkpoints, first_difference, load_state

DEFAULT_STEPS = 4  # The steps before the kill, and as many after it.
OF_TIME = ("train/tokens_per_second",)  # Logged values that measure time, and differ between runs.


def prove_resume(config: Config) -> bool:
    """Return whether the killed run ends as the other; print that, or where they differ first.

    Raises:
        ValueError: A folder was named, or training with these settings ends in an error.
    """
    given = config.train
    if given.run or given.resume:
        raise ValueError(
            f"--prove_resume trains in folders of its own, and --run {given.run or 'of --resume'} was given; "
            "leave --run and --resume out"
        )
    refuse_mistakes(config)
    steps = given.max_steps or DEFAULT_STEPS
    # There are validations before and after the kill. The budget is in steps, since times never repeat.
    settings = replace(
        given,
        max_steps=2 * steps,
        max_seconds=0.0,
        max_epochs=0.0,
        validate_every=steps,
        validation_rows=min(given.validation_rows, 2 * given.batch_size),
        patience=0,
        save_every=steps,
        keep=0,
        log_every=1,
    )
    with tempfile.TemporaryDirectory(prefix="prove-resume-") as name:
        whole, halves = Path(name, "whole"), Path(name, "halves")
        print(f"1 of 3: {2 * steps} steps in one go")
        _train_in_child(replace(config, train=replace(settings, run=str(whole))), 0)
        print(f"2 of 3: {steps} steps, then SIGKILL")
        _train_in_child(replace(config, train=replace(settings, run=str(halves))), steps)
        print(f"3 of 3: {steps} steps more, with --resume")
        _train_in_child(replace(config, train=replace(settings, run=str(halves), resume=True)), 0)
        difference = run_difference(whole, halves)
        if difference is not None:
            step, item = difference
            print(f"DIFFERENT, first in step {step}: {item}")
            return False
        last = checkpoints(whole / "checkpoints")[-1]
        digest = state_digest(saved_state(last))[:16]
        print(
            f"equal: {len(logged_numbers(whole))} logged numbers, and at step {last.step} weights, "
            f"optimizers, random states and run state, with the digest {digest}"
        )
        return True


def run_difference(a: Path, b: Path) -> tuple[int, str] | None:
    """Return step and name of the first item, logged or saved, in which two runs differ; None if in none.

    The logs are compared, the checkpoints of steps that both have, and which step is the last.
    """
    found = []
    logs = logged_numbers(a), logged_numbers(b)
    for i in range(max(map(len, logs))):
        rows = [log[i] if i < len(log) else None for log in logs]
        if repr(rows[0]) != repr(rows[1]):  # As text, where NaN equals NaN.
            found.append(min(row[:2] for row in rows if row is not None))
            break
    saved = [{m.step: m for m in checkpoints(folder / "checkpoints")} for folder in (a, b)]
    for step in sorted(saved[0].keys() & saved[1].keys()):
        item = first_difference(saved_state(saved[0][step]), saved_state(saved[1][step]))
        if item is not None:
            found.append((step, item))
            break
    last = [max(manifests, default=0) for manifests in saved]
    if last[0] != last[1] or not all(saved):
        found.append((min(last), "the last checkpoint"))
    return min(found, key=lambda item: item[0]) if found else None


def logged_numbers(folder: Path) -> list[tuple[int, str, float]]:
    """Return step, tag and value of all in metrics.jsonl, in order, but for what measures time."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [(r["step"], tag, r[tag]) for r in rows for tag in r if tag != "step" and tag not in OF_TIME]


def saved_state(manifest: Manifest) -> dict[str, Any]:
    """Return all that a checkpoint holds, but for the seconds that the run took."""
    state = load_state(manifest)
    del state["run"]["seconds"]
    loss = repr(manifest.loss)
    return {"weights": load_file(manifest.folder / "model.safetensors"), "validation loss": loss} | state


def state_digest(state: Any) -> str:
    """Return a SHA-256 of nested dicts and lists; two are equal where `first_difference` finds none."""
    digest = hashlib.sha256()
    if isinstance(state, torch.Tensor):
        digest.update(f"{state.dtype} {tuple(state.shape)}".encode())
        digest.update(state.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(state, dict):
        for key in sorted(state, key=str):
            digest.update(f"{key}: {state_digest(state[key])}, ".encode())
    elif isinstance(state, list | tuple):
        digest.update("".join(map(state_digest, state)).encode())
    else:
        digest.update(f"{type(state).__name__} {state!r}".encode())
    return digest.hexdigest()


def _train_in_child(config: Config, kill_at: int) -> None:
    """Train in a new process, which is killed after its checkpoint of step `kill_at`; 0 lets it end.

    Raises:
        ValueError: The process ended in another way; the message has the sentence that it printed last.
    """
    folder = Path(config.train.run)
    file = folder.with_name("config.yaml")
    file.write_text(yaml.safe_dump(config.to_dict()), "utf-8")
    command, environment = own_module("selftest.resume_child")
    words = [*command, str(file), str(kill_at)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode != (-signal.SIGKILL if kill_at else 0):
        lines = done.stderr.strip().splitlines() or ["it printed no reason"]
        raise ValueError(
            f"training ended with exit code {done.returncode}: {lines[-1].removeprefix('error: ')}"
        )
