"""Where progress bars are drawn: on a terminal and in a notebook, and not in a log or a pipe."""

from __future__ import annotations

import io
import re
import sys

import pytest

from config.bars import is_watched, progress_bar
from config.console import shown_safely
from config.files import REPOSITORY


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Cell(io.StringIO):
    """A kernel's stream by the name of its module; like that of ipykernel it says that it is no terminal."""


Cell.__module__ = "ipykernel.iostream"


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("stream", "drawn"), [(Terminal(), True), (Cell(), True), (io.StringIO(), False)])
def test_a_bar_is_drawn_where_somebody_watches(
    stream: io.StringIO, drawn: bool, wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream.truncate(0)
    monkeypatch.setattr(sys, "stderr", stream)
    if wrapped:
        with shown_safely():
            assert is_watched() is drawn and list(progress_bar(range(3), desc="here")) == [0, 1, 2]
    else:
        assert is_watched() is drawn and list(progress_bar(range(3), desc="here")) == [0, 1, 2]
    assert ("here: 100%" in stream.getvalue()) is drawn


def test_a_kernels_stream_is_named_as_this_test_names_it() -> None:
    iostream = pytest.importorskip("ipykernel.iostream", reason="ipykernel is not installed")
    assert iostream.OutStream.__module__ == Cell.__module__


def test_every_bar_is_made_by_one_function() -> None:
    folders = [path for path in REPOSITORY.iterdir() if path.name not in ("tests", ".venv", "benchmarks")]
    files = [file for folder in folders for file in (folder.rglob("*.py") if folder.is_dir() else [folder])]
    makes = r"\bt(qdm|range)\(|tqdm.*import.*\bas\b"
    sources = [file for file in files if file.suffix == ".py"]
    made = [file.name for file in sources if re.search(makes, file.read_text("utf-8"))]
    assert made == ["bars.py"]
