"""python -m scraping: commands by name, flags, one sentence for a mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scraping.__main__ import COMMANDS, main
from scraping.ledger import Entry, Ledger


def test_commands_are_listed_and_answer_at_once() -> None:
    done = subprocess.run([sys.executable, "-m", "scraping"], capture_output=True, text=True, check=True)
    assert all(f"  {name}" in done.stdout for name in COMMANDS)


def test_an_unknown_command_is_named_with_its_neighbour(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["crwal"])
    assert capsys.readouterr().err == "error: crwal is no command; did you mean crawl?\n"


def test_status_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.found("a/b", "crawl", "main", "MIT")
    ledger.listed("a/b", "c0", [Entry("x.py", "1", 3), Entry("y.py", "2", 9, "too large")])
    ledger.stored("a/b", [("x.py", b"abc")])
    main(["status", "--folder", str(tmp_path)])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert lines[lines.index(["files"]) + 1 :] == [
        ["1", "dropped: too large"],
        ["1", "stored"],
        ["2", "found in all"],
    ]


def test_status_without_a_ledger_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["status", "--folder", str(tmp_path)])
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds no ledger.sqlite")
