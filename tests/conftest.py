"""Tiny data and settings that several test files share."""

from __future__ import annotations

import os
import signal
import sysconfig
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


def code_page(name: str, changed: int) -> str:
    """A table as in `encodings/`: 64 lines of a character each, one of which is another one for each page."""
    rows = [f"    '\\u{i:04x}'  #  0x{i:02X} -> CHARACTER NUMBER {i} OF THE TABLE\n" for i in range(64)]
    rows[changed] = f"    '\\u{changed + 999:04x}'  #  0x{changed:02X} -> THE OWN CHARACTER OF {name}\n"
    return f'"""Codec for the code page {name}."""\n\nTABLE = (\n{"".join(rows)})\n'


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library in place of the interpreter's: 40 modules that share nothing, and 24 code pages that are near
    copies of each other, so that a split by name puts them on every side."""
    folder = tmp_path / "library"
    (folder / "encodings").mkdir(parents=True)
    for i in range(40):
        lines = [f"name_{i}_{j} = call_{(i * 37 + j * j) % 1009}({i * j}, word_{i}_{j})" for j in range(40)]
        (folder / f"module{i}.py").write_text("\n".join(lines), encoding="utf-8")
    for i in range(24):
        (folder / "encodings" / f"cp{i}.py").write_text(code_page(f"cp{i}", i), encoding="utf-8")
    path_of = sysconfig.get_path
    monkeypatch.setattr(
        sysconfig, "get_path", lambda name, *rest: str(folder) if name == "stdlib" else path_of(name, *rest)
    )
    return folder
