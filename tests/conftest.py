"""Tiny data and settings that several test files share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; tiny models gain nothing from more
# Of a job in the background, or under nohup: children would inherit that these signals are ignored.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

FILES = {
    f"part{i}.py": f"def f{i}(x, y={i}):\n    total = x * {i} + y\n    return total\n\n\nprint(f{i}({i}))\n"
    * 3
    for i in range(24)
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of 24 small Python files; with one in four held out, both sides of the split have some."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder
