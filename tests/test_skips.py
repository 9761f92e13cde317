"""Tests that are left out: for which reasons they may be, and what the last line of a run says of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from config.files import REPOSITORY

TESTS = """
import pytest

def test_a(isolated): pass
def test_b(isolated): pass

@pytest.mark.skipif(True, reason="git is not installed")
def test_c(): pass

@pytest.mark.skipif(True, reason="it is Monday")
def test_d(): pass

@pytest.mark.xfail(reason="it is Tuesday")
def test_e(): assert False
"""


GPU_TESTS = """
import pytest

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a(device): print(f"ran on {device}")
"""


def run_gpu_tests(folder: Path, has_gpu: bool, *words: str) -> tuple[int, str]:
    """Exit code and output of pytest under the repository's settings, where torch sees a GPU or none."""
    shutil.copy(REPOSITORY / "tests" / "conftest.py", folder)
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    (folder / "test_some.py").write_text(GPU_TESTS)
    (folder / "torch.py").write_text(f"class cuda:\n    is_available = staticmethod(lambda: {has_gpu})\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)])}
    words = ("-q", "-s", "-n", "0", "-p", "no:cacheprovider", *words, "test_some.py")
    command = [sys.executable, "-m", "pytest", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_gpu_tests_are_left_out_unless_they_are_requested_and_there_is_a_gpu(tmp_path: Path) -> None:
    for has_gpu in (False, True):
        code, said = run_gpu_tests(tmp_path, has_gpu)
        assert code == 0 and "ran on cpu" in said and "ran on cuda" not in said
    nothing = (0, "no CUDA device here: the tests marked gpu are left out\n")
    assert run_gpu_tests(tmp_path, False, "-m", "gpu") == nothing
    code, said = run_gpu_tests(tmp_path, True, "-m", "gpu")
    assert code == 0 and "ran on cuda" in said and "ran on cpu" not in said
    code, said = run_gpu_tests(tmp_path, False, "-m", "gpu or not gpu")
    assert code == 0 and "1 passed, 1 skipped" in said


def test_an_unlisted_reason_fails_and_the_last_line_counts_what_wants_a_sandbox(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_some.py").write_text(TESTS)
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "test_some.py"]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env={**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    *_, closing, last = done.stdout.splitlines()
    assert done.returncode == 1 and closing.startswith("3 skipped, 1 xfailed, 1 error in ")
    assert "is not in SKIPS of tests/conftest.py: it is Monday\n" in done.stdout
    assert last.startswith(
        "2 tests were left out for one reason: generated code runs in a sandbox only, and bubble"
    )
