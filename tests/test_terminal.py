"""Names that a stranger chose do not steer the terminal, wherever they are printed."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from config import one_sentence, parse_config, say
from config.console import printable, shown_safely
from recipes import refactoring
from scraping.__main__ import main as scrape
from scraping.ledger import Ledger, ListedFile

EVIL = "a\x1b[2J\x1b]0;owned\x07\x9b1m\u202e\rb\udcff"  # clears, renames the window, turns, overwrites
SEEN = "a\\x1b[2J\\x1b]0;owned\\x07\\x9b1m\\u202e\\rb\\udcff"


def raised() -> None:
    raise ValueError(f"{EVIL} cannot be read")


def raised_by_the_system() -> None:
    Path("/nowhere", EVIL).read_bytes()


def barred() -> None:
    with tqdm(total=1, desc=EVIL, disable=False) as bar, tqdm(total=1, desc="b", disable=False):
        bar.update()
        tqdm.write(EVIL)


PRINTED: dict[str, Callable[[], object]] = {
    "an error": raised,
    "an error of the system": raised_by_the_system,
    "bars": barred,
    "a line": lambda: print(EVIL),
    "a line beside a bar": lambda: say(EVIL),
    "lines": lambda: sys.stdout.writelines([EVIL, EVIL]),
    "a note": lambda: print(f"warning: {EVIL}", file=sys.stderr),
}


@pytest.mark.parametrize("what", PRINTED)
def test_what_a_command_prints_is_seen_and_not_obeyed(what: str, capfd: pytest.CaptureFixture):
    ends = pytest.raises(SystemExit) if what.startswith("an error") else contextlib.nullcontext()
    with ends, one_sentence():
        PRINTED[what]()
    found = "".join(capfd.readouterr())
    shown = SEEN if not what.startswith("an error") else SEEN.replace("\\r", " ")
    assert shown in found
    assert ("\n\x1b[A" in found or "\x1b[A\r" in found) == (what == "bars"), "or bars fall apart"
    # With these a bar goes over itself, and over the one above it.
    left = re.sub(r"\r|\x1b\[A", "", found) if what == "bars" else found
    assert printable(left) == left


def test_a_parser_tells_a_key_of_a_file_without_obeying_it(tmp_path: Path, capfd: pytest.CaptureFixture):
    path = tmp_path / "a.yaml"
    path.write_text('"\\e[2Jkey": 1\n')
    with pytest.raises(SystemExit) as ended:
        parse_config(["--config", str(path)])
    said = capfd.readouterr().err
    assert ended.value.code == 2 and "\\x1b[2Jkey" in said and printable(said) == said


def test_names_in_the_ledger_are_told_without_obeying_them(tmp_path: Path, capfd: pytest.CaptureFixture):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.found("a", "local", "", "")
    ledger.listed("a", "", [ListedFile("b", "", 1, f"left out by {EVIL[:-1]}")])
    ledger.close()
    scrape(["status", "--folder", str(tmp_path)])
    said = capfd.readouterr().out
    assert "left out by a\\x1b[2J" in said and printable(said) == said


def test_a_diff_for_another_program_stays_as_it_is(capfdbinary: pytest.CaptureFixture):
    with shown_safely():
        refactoring._write("+x = '\xa0\x0c'\n")
    assert capfdbinary.readouterr().out == "+x = '\xa0\x0c'\n".encode()


@given(st.text())
def test_every_text_is_written_whole(text: str):
    class Kept:
        found = ""

        def write(self, text: str) -> int:
            self.found += text
            return len(text)

    kept, before = Kept(), sys.stdout
    sys.stdout = kept  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with shown_safely():
            assert sys.stdout.write(text) == len(text)
    finally:
        sys.stdout = before
    assert printable(kept.found) == printable(text)
