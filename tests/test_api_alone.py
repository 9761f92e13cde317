"""The tests of the Python interface in a process of their own: no other test may fork after their threads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_python_interface_in_a_process_of_its_own() -> None:
    tests = Path(__file__).with_name("test_api.py")
    run = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "slow", str(tests)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
