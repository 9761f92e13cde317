"""The API in Python: the results of the commands, mistakes as ValueErrors, and imports without effects."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from commands import command, exit_code, forked
from conftest import FILES

from config.files import REPOSITORY
from training import signals
from training.api import Run, _parsed, evaluate, load, train
from training.checkpoint import checkpoints
from training.loop import TrainingManager

# Slow, and run by test_api_alone.py: whole runs start threads, for which later forks of the process wait.
pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {
    "run": "run",
    "data": {"source": "code", "validation_one_in": 4, "test_one_in": 4, "suffixes": [".py", ".md"]},
    "tokenizer": {"vocab_size": 300, "min_count": 2},
    "model": {"n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 64},
    "optimizer": {"lr": None},
    "max_steps": 4,
    "log_every": 1,
    "device": "cpu",
}
WORDS = [
    *("--run", "run", "--data.source", "code", "--data.validation_one_in", "4", "--data.test_one_in", "4"),
    *("--data.suffixes", ".py,.md", "--tokenizer.vocab_size", "300", "--tokenizer.min_count", "2"),
    *("--model.n_layer", "1", "--model.n_embd", "16", "--model.n_head", "2", "--model.block_size", "64"),
    *("--max_steps", "4", "--log_every", "1", "--device", "cpu"),
]


def with_code(folder: Path) -> Path:
    (folder / "code").mkdir(parents=True)
    for name, text in FILES.items():
        (folder / "code" / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def commanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands trained and evaluated."""
    folder = with_code(tmp_path_factory.mktemp("commanded"))
    done = command("trainingmanager.py", *WORDS, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def called(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the API trained, in a thread: Python gives signals to the main thread alone."""
    folder = with_code(tmp_path_factory.mktemp("called"))
    before = Path.cwd()
    os.chdir(folder)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, **SETTINGS).result() == Run(Path("run"))
    os.chdir(before)
    return folder


def lines(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's log without its speed, which no two runs share."""
    return [{k: v for k, v in row.items() if "per_second" not in k} for row in Run(folder / "run").log]


def numbers(scores: dict[str, Any]) -> dict[str, Any]:
    """An evaluation without its command and the hash of the checkpoint, in which is what time it took."""
    prints = {name: value for name, value in scores["fingerprints"].items() if name != "weights"}
    return scores | {"command": "", "fingerprints": prints}


def weights(folder: Path) -> bytes:
    """The weights of the last checkpoint."""
    return (checkpoints(folder / "run" / "checkpoints")[-1].folder / "model.safetensors").read_bytes()


def test_a_run_is_that_of_the_command_to_the_last_digit(called: Path, commanded: Path) -> None:
    runs = called / "run", commanded / "run"
    assert lines(called) == lines(commanded)
    assert numbers(Run(called / "run").scores) == numbers(Run(commanded / "run").scores)
    assert weights(called) == weights(commanded)
    files = [
        sorted(str(p.relative_to(run)) for p in run.rglob("*.*") if "tfevents" not in p.name) for run in runs
    ]
    assert files[0] == files[1]
    for name in ("config.yaml", "samples.txt", "fingerprints.json"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()


def test_texts_are_those_of_the_command(
    called: Path, commanded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", "run", "--prompt", "def f(", "--max_new_tokens", "9", "--device", "cpu"]
    sampled = ["--temperature", "0.9", "--seed", "3", "--stop", "zz"]
    monkeypatch.chdir(called)
    model = load(Path("run"), device="cpu")
    one = model.generate("def f(", max_new_tokens=9)
    assert command("generate.py", *words, cwd=commanded).stdout == f"{one}\n"
    choice: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0.9, "seed": 3, "stop": ["zz"]}
    several = model.generate(["def f(", "x"], **choice)
    shown = "".join(f"--- completion {n}\n{text}\n" for n, text in enumerate(several, 1))
    assert command("generate.py", *words, "--prompt", "x", *sampled, cwd=commanded).stdout == shown


def test_scores_are_those_of_the_command(
    called: Path, commanded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--suite", "next_line", "--samples", "6", "--device", "cpu", "--out", "scores"]
    done = command("eval.py", "--checkpoint", "run", *words, cwd=commanded)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(called)
    found = evaluate(Run("run"), suite="next_line", samples=6, device="cpu", out=Path("scores"))
    assert capsys.readouterr().out == done.stdout
    theirs = json.loads((commanded / "scores" / "eval.json").read_text())
    assert numbers(found) == numbers(theirs)
    assert len(found["suite"]["samples"]) == 6


MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an unknown key": ({"model": {"n_layers": 2}}, ["--model.n_layers=2"]),
    "a wrong type": ({"max_steps": "many"}, ["--max_steps", "many"]),
    "out of range": ({"batch_size": 0}, ["--batch_size", "0"]),
    "a key that nothing reads": ({"keep": 2}, ["--keep", "2"]),
    "no corpus": ({"data": {"source": "nowhere"}}, ["--data.source", "nowhere"]),
    "a run that is there": ({"run": "code"}, ["--run", "code"]),
    "nothing to resume": ({"run": "nowhere", "resume": True}, ["--run", "nowhere", "--resume"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_value_error_with_the_sentence_of_the_command(
    mistake: str, called: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, words = MISTAKES[mistake]
    monkeypatch.chdir(called)
    with pytest.raises(ValueError) as raised:
        train(**settings)
    assert capsys.readouterr().err == ""
    done = command("trainingmanager.py", *words, cwd=called)
    # A value has a type in Python, which its sentence shows; a word has none.
    assert done.returncode == 2 and done.stderr == f"error: {raised.value}\n".replace("'many'", "many")


def test_other_mistakes_are_value_errors(called: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(called)
    model = load("run", device="cpu")
    for wrong, words in (
        (lambda: train(plan=True), "plan is of the command: python trainingmanager.py --plan"),
        (lambda: evaluate("run", compare=["a", "b"]), "compare is of the command: python eval.py --compare"),
        (lambda: evaluate(cast(Any, model)), "what is scored are a run's files"),
        (lambda: evaluate("run", sample=3), "sample is no setting; did you mean samples?"),
        (lambda: evaluate("run", samples=1), "--samples is 1, and an interval needs at least 2"),
        (lambda: evaluate("nowhere"), "nowhere holds no run"),
        (lambda: load("run", whick="last"), "whick is no setting; did you mean which?"),
        (lambda: model.generate("x", temperature="hot"), "temperature is 'hot'; it must be a number"),
        (lambda: model.generate(cast(Any, 5)), "the prompt is 5; it must be text, or a list of texts"),
        (lambda: model.generate(cast(Any, ["x", 5])), "the prompt is ['x', 5]; it must be text"),
        (lambda: model.generate("x", top_k=3), "top_k is 3 but temperature 0 samples nothing"),
    ):
        with pytest.raises(ValueError) as raised:
            wrong()
        assert str(raised.value).startswith(words)


def test_values_in_python_are_taken_as_they_are() -> None:
    """They are no words of a command line, which are read as YAML."""
    config = _parsed([], {"max_steps": np.int64(5), "data": {"text_field": "null"}, "base": "b", "fix": True})
    assert (config.train.max_steps, config.data.text_field, config.data.regroup) == (5, "null", True)
    assert config.optimizer.schedule == "cosine"  # A base brings its recipe's settings.
    config = _parsed([], {"base": Path("b"), "lora": {"r": 4, "new_tokens": ["[PAD]"]}})
    assert (config.train.base, config.lora.new_tokens) == ("b", ("[PAD]",))
    for wrong, words in (
        ({"base": "b", "lora": {"new_tokens": "[PAD]"}}, "lora.new_tokens is '[PAD]'; it must be a list"),
        ({"fix": True, "data": {"regroup": True}}, "data.regroup is given twice"),
        ({"max_seconds": math.inf}, "max_seconds is inf; it must be finite"),
        ({"print_config": ""}, "--print_config has no value"),
        ({"model": 3}, "model is 3; it must be a mapping"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            _parsed([], wrong)


def interrupted_at(monkeypatch: pytest.MonkeyPatch, step: int, times: int = 1) -> None:
    """Have a step send the interrupt that a kernel sends."""
    update = TrainingManager.update

    def interrupted(manager: TrainingManager) -> dict[str, float]:
        for _ in range(times if manager.state.step == step else 0):
            signal.raise_signal(signal.SIGINT)
        return update(manager)

    monkeypatch.setattr(TrainingManager, "update", interrupted)


def test_an_interrupt_saves_and_the_run_goes_on_to_the_same_end(
    commanded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(with_code(tmp_path / "here"))
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(patch, step=1)
        train(**SETTINGS)
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == before
    assert [manifest.step for manifest in checkpoints(Path("run/checkpoints"))] == [2]
    assert not Path("run/eval.json").exists()
    train(run="run", resume=True)
    assert lines(Path()) == lines(commanded)
    assert weights(Path()) == weights(commanded)


def test_a_second_interrupt_ends_the_run_and_not_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(with_code(tmp_path / "here"))
    monkeypatch.setattr(signals, "SAME_SIGNAL", 0)
    interrupted_at(monkeypatch, step=1, times=2)
    with pytest.raises(KeyboardInterrupt):
        train(**SETTINGS)
    assert not checkpoints(Path("run/checkpoints")) and not Path("run/.lock").exists()


def test_a_second_signal_ends_the_process_of_a_command(tmp_path: Path) -> None:
    class Loop:
        stop_signal: int | None = None

    def work() -> None:
        signals.SAME_SIGNAL = 0
        with signals.signals_noted(Loop()):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    assert exit_code(forked(work, tmp_path / "said")) == 128 + signal.SIGINT


STATE = """
import logging, os, random, signal, sys, threading, warnings
import numpy, torch

def state():
    return {
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count()),
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "environment": dict(os.environ),
        "files": (os.getcwd(), os.listdir()),
        "logging": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "warnings": list(warnings.filters),
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.stdout, sys.stderr),
        "random": (random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()),
        "torch": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_float32_matmul_precision()),
        "limits": (sys.getrecursionlimit(), numpy.geterr(), sys.path[:]),
    }

before = state()
import training.api
print([name for name, value in state().items() if value != before[name]])
"""


def test_importing_has_no_side_effect(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, "-c", STATE]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
