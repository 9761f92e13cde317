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
