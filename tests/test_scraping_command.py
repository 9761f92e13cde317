"""python -m scraping: commands by name, flags, one sentence for a mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scraping.__main__ import COMMANDS, main
from scraping.ledger import Ledger, ListedFile


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
    ledger.listed("a/b", "c0", [ListedFile("x.py", "1", 3), ListedFile("y.py", "2", 9, "too large")])
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


def test_a_source_that_gives_nothing_is_an_error_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folder = tmp_path / "web", str(tmp_path / "ledger")
    source.mkdir()
    for name in ("a.js", "b.js", "c.py"):
        (source / name).write_text("x = 1\n" * (1 if name == "c.py" else 400))
    for _ in range(2):  # the ledger keeps what it found
        with pytest.raises(SystemExit, match="2"):
            main(["local", "--path", str(source), "--folder", folder])
        said = capsys.readouterr()
        assert "2  dropped: other extension" in said.out
        assert said.err == (
            "error: web gave no file, and of those found there are 2 other extension, 1 too small; ask for "
            "others with --extensions, --min_bytes or --max_bytes, with another --folder or --repository, "
            "since this ledger keeps what it found; or name another source\n"
        )
    with pytest.raises(SystemExit, match="2"):
        main(["clean", "--folder", folder, "--workers", "1"])
    assert "has no stored file, so there is nothing to clean" in capsys.readouterr().err
    main(["local", "--path", str(source), "--folder", folder, "--extensions", ".js", "--repository", "js"])


def test_a_corpus_that_lost_all_to_its_licence_is_an_error_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folder = tmp_path / "mine", str(tmp_path / "ledger")
    source.mkdir()
    for name in "ab":
        (source / f"{name}.py").write_text("".join(f"{name}_{i} = {i}\n" for i in range(200)))
    main(["local", "--path", str(source), "--folder", folder])
    for _ in range(2):  # The second time the record stands there.
        with pytest.raises(SystemExit, match="2"):
            main(["clean", "--folder", folder, "--workers", "1"])
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("error: no document is left: of 2 files 2 went by licence: licence unknown")
        assert "--licence; or keep such files with --unknown_licence true" in said
    main(["clean", "--folder", folder, "--workers", "1", "--unknown_licence", "true"])
