"""The command trainingmanager.py as a user runs it: --overfit, a run, a signal, --resume."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import command

from config.files import REPOSITORY
from training.checkpoint import checkpoints
from training.run import load_run
from training.signals import RESUMABLE

TINY = [
    *("--data.validation_one_in", "4", "--data.test_one_in", "4"),
    *("--tokenizer.vocab_size", "300", "--tokenizer.min_count", "2"),
    *("--model.n_layer", "1", "--model.n_embd", "16", "--model.n_head", "2", "--model.block_size", "64"),
    *("--run", "r", "--data.source"),
]


def started(*words: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPOSITORY / "trainingmanager.py"), *words]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def trained(*words: str, cwd: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    done = command("trainingmanager.py", *words, cwd=cwd)
    return done.returncode, done.stdout, done.stderr


def test_overfit_learns_the_tiny_corpus_by_heart(tmp_path: Path) -> None:
    code, out, err = trained("--overfit", cwd=tmp_path)
    assert code == 0, err
    assert "check 1" in out and "check 2" in out and "FAILED" not in out
    (run,) = (tmp_path / "runs").iterdir()
    assert load_run(run, "last").step <= 400


def test_overfit_that_fails_says_which_check_and_exits_1(tmp_path: Path) -> None:
    code, out, _ = trained("--overfit", "--max_steps", "3", cwd=tmp_path)
    assert code == 1 and "is predicted: FAILED" in out and "FAILED at character" in out


def test_the_main_command_reports_scores_completions_and_places(corpus: Path, tmp_path: Path) -> None:
    process = started(*TINY, str(corpus), "--max_steps", "4", cwd=tmp_path)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    for text in ("bits per byte", "top-5 accuracy", "-gram", "the model goes on", "TensorBoard", "eval.py"):
        assert text in out
    assert "\nverdict      training loss " in out
    printed = next(
        line.removeprefix("complete ") for line in out.splitlines() if line.startswith("complete ")
    )
    assert subprocess.run(printed, shell=True, cwd=tmp_path, capture_output=True).returncode == 0, printed
    for name in ("loss", "learning_rate", "grad_norm", "accuracy"):
        assert (tmp_path / "r" / "curves" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = trained(*TINY, str(corpus), "--max_steps", "4", cwd=tmp_path)
    assert code == 2 and err.count("\n") == 1 and "already holds another run" in err


@pytest.mark.slow
def test_a_signal_saves_and_the_run_goes_on(corpus: Path, tmp_path: Path) -> None:
    process = started(*TINY, str(corpus), "--max_steps", "1000000", "--log_every", "1", cwd=tmp_path)
    deadline = time.monotonic() + 120
    metrics = tmp_path / "r" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == RESUMABLE, err
    assert "go on with --resume" in out
    (manifest,) = checkpoints(tmp_path / "r" / "checkpoints")
    more = str(manifest.step + 2)
    code, _, err = trained(*TINY, str(corpus), "--max_steps", more, "--resume", cwd=tmp_path)
    assert code == 0, err
    assert checkpoints(tmp_path / "r" / "checkpoints")[-1].step == manifest.step + 2


def test_resume_takes_up_the_runs_own_settings(corpus: Path, tmp_path: Path) -> None:
    code, _, err = trained(*TINY, str(corpus), "--max_steps", "2", "--batch_size", "3", cwd=tmp_path)
    assert code == 0, err
    code, _, err = trained("--resume", "--run", "r", "--max_steps", "4", cwd=tmp_path)
    assert code == 0, err
    run = load_run(tmp_path / "r", "last")
    assert run.step == 4 and run.config.train.batch_size == 3 and run.config.model.n_embd == 16


@pytest.mark.slow
def test_overfit_proves_several_files(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "a.py").write_text("import os\n\n\ndef here():\n    return os.getcwd()\n")
    (folder / "b.py").write_text("x = [1, 2, 3]\nprint(sum(x))")
    (folder / "empty.py").write_text("")
    code, out, err = trained("--overfit", "--data.source", str(folder), "--max_steps", "200", cwd=tmp_path)
    assert code == 0, out + err
    assert out.count("regenerated") == 2 and "FAILED" not in out


def test_importing_has_no_side_effect(tmp_path: Path) -> None:
    """A command imports little before its flags are read: the files that it imports later are named here."""
    later = "training.command, training.plan, suites.evaluate, generation.command, training.export"
    names = f"trainingmanager, {later}, sweeps.command, selftest.run, recipes.pipeline"
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import {names}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == done.stderr == "" and not list(tmp_path.iterdir())
