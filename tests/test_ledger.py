"""scraping/ledger.py: states that add up, bytes that come back, and nothing half written."""

from __future__ import annotations

from pathlib import Path

import pytest

from scraping.documents import RawFile
from scraping.ledger import Entry, Ledger


@pytest.fixture
def ledger(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for name in ("a/b", "c/d"):
        ledger.found(name, "crawl", "main", "MIT")
        ledger.listed(
            name, "c0", [Entry("x.py", "1", 3), Entry("y.py", "2", 999, "too large"), Entry("z.py", "3", 1)]
        )
    yield ledger
    ledger.close()


def test_states_add_up_and_bytes_come_back(ledger: Ledger) -> None:
    ledger.stored("a/b", [("x.py", b"abc\0\xff")])
    ledger.dropped("a/b", "z.py", "gone")
    ledger.done("a/b")
    assert ledger.counts() == {
        ("dropped", "gone"): 1,
        ("dropped", "too large"): 2,
        ("found", ""): 2,
        ("stored", ""): 1,
    }
    assert ledger.counts("repositories") == {("done", ""): 1, ("listed", ""): 1}
    assert ledger.waiting("c/d") == [Entry("x.py", "1", 3), Entry("z.py", "3", 1)]
    assert list(ledger.files()) == [RawFile("a/b", "x.py", "c0", "MIT", b"abc\0\xff")]


def test_equal_bytes_are_kept_once(ledger: Ledger) -> None:
    for name in ("a/b", "c/d"):
        ledger.stored(name, [("x.py", b"same"), ("z.py", b"same")])
    assert [file.data for file in ledger.files()] == [b"same"] * 4
    with ledger.transaction() as db:
        assert db.execute("SELECT count(*) FROM contents").fetchone() == (1,)


def test_a_transaction_that_fails_leaves_nothing(ledger: Ledger) -> None:
    def broken():
        yield "x.py", b"abc"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger.stored("a/b", broken())
    assert list(ledger.files()) == []
    assert len(ledger.waiting("a/b")) == 2


def test_shards_hold_each_repository_once(ledger: Ledger) -> None:
    for name in ("a/b", "c/d"):
        ledger.stored(name, [("x.py", b"1")])
    whole = list(ledger.files())
    parts = [file for number in range(5) for file in ledger.files((number, 5))]
    assert sorted(parts, key=lambda file: file.repository) == whole


def test_a_file_that_is_no_ledger_is_named(tmp_path: Path) -> None:
    (tmp_path / "l.sqlite").write_bytes(b"hello" * 1000)
    with pytest.raises(ValueError, match=r"l\.sqlite cannot be used as a ledger: file is not a database"):
        Ledger(tmp_path / "l.sqlite")
