"""scraping/ledger.py: states that add up, bytes that come back, and nothing half written."""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import pytest

from scraping.documents import RawFile
from scraping.ledger import Ledger, ListedFile, claimed_ledger, fingerprint_line


@pytest.fixture
def ledger(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for name in ("a/b", "c/d"):
        ledger.found(name, "crawl", "main", "MIT")
        ledger.listed(
            name,
            "c0",
            [
                ListedFile("x.py", "1", 3),
                ListedFile("y.py", "2", 999, "too large"),
                ListedFile("z.py", "3", 1),
            ],
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
    assert ledger.waiting("c/d") == [ListedFile("x.py", "1", 3), ListedFile("z.py", "3", 1)]
    assert list(ledger.files()) == [RawFile("a/b", "x.py", "c0", "MIT", b"abc\0\xff")]


def test_what_is_not_stored_is_counted_with_its_reason(ledger: Ledger) -> None:
    ledger.stored("a/b", [("x.py", b"abc")])
    with ledger.transaction() as db:
        db.execute("INSERT INTO hosted VALUES (7, 'c/d', 'main', '', 0, 5)")
    found = {"not fetched yet": 3, "other extension": 5, "too large": 2}
    assert ledger.not_stored() == found
    parts = [ledger.not_stored((number, 5)) for number in range(5)]
    assert sum((Counter(part) for part in parts), Counter()) == found


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
    with pytest.raises(
        ValueError, match=r"l\.sqlite cannot be used as a ledger: file is not a database; restore"
    ):
        Ledger(tmp_path / "l.sqlite")


def test_an_outline_names_the_input_of_a_shard_without_reading_it(ledger: Ledger) -> None:
    ledger.stored("a/b", [("x.py", b"1")])
    count, fingerprint = ledger.outline()
    lines = [
        fingerprint_line(f.repository, f.path, f.commit, f.licence, hashlib.sha256(f.data).hexdigest())
        for f in ledger.files()
    ]
    assert (count, fingerprint) == (1, hashlib.sha256(b"".join(lines)).hexdigest())
    ledger.stored("c/d", [("x.py", b"1")])
    assert ledger.outline()[0] == 2
    assert ledger.outline()[1] != fingerprint
    assert sum(ledger.outline((number, 3))[0] for number in range(3)) == 2


def test_what_may_not_be_kept_goes_with_the_bytes_that_nobody_else_has(ledger: Ledger) -> None:
    ledger.stored("a/b", [("x.py", b"mine"), ("z.py", b"ours")])
    ledger.stored("c/d", [("x.py", b"ours")])
    ledger.removed("a/b", "by law")
    assert [(file.repository, file.data) for file in ledger.files()] == [("c/d", b"ours")]
    assert ledger.counts() == {
        ("dropped", "by law"): 2,
        ("dropped", "too large"): 2,
        ("found", ""): 1,
        ("stored", ""): 1,
    }
    assert ledger.counts("repositories") == {("dropped", "by law"): 1, ("listed", ""): 1}
    assert ledger.rows("SELECT count(*) FROM contents") == [(1,)]


def test_a_transaction_inside_another_is_part_of_it(ledger: Ledger) -> None:
    with pytest.raises(KeyboardInterrupt), ledger.transaction():
        ledger.stored("a/b", [("x.py", b"abc")])
        ledger.done("a/b")
        raise KeyboardInterrupt
    assert list(ledger.files()) == []
    assert ledger.counts("repositories") == {("listed", ""): 2}


def test_the_manifest_says_what_became_of_each_in_any_order(tmp_path: Path) -> None:
    lines = []
    for number, order in enumerate((("a/b", "c/d"), ("c/d", "a/b"))):
        ledger = Ledger(tmp_path / f"{number}.sqlite")
        for name in order:
            ledger.found(name, "crawl", "main", "MIT")
            entries = [ListedFile("y\\x0a.py", "1", 3), ListedFile("x.py", "2", 9, "too large")]
            ledger.listed(name, "c0", entries[::-1] if number else entries)
            ledger.stored(name, [("y\\x0a.py", b"abc")])
            ledger.done(name)
        lines.append(list(ledger.manifest()))
        ledger.close()
    assert lines[0] == lines[1]
    rows = [json.loads(line) for line in lines[0]]
    assert [(row["repository"], row.get("path")) for row in rows] == [
        (name, path) for name in ("a/b", "c/d") for path in (None, "x.py", "y\\x0a.py")
    ]
    assert rows[0] == {"repository": "a/b", "pinned": "c0", "licence": "MIT", "state": "done", "reason": ""}
    assert rows[1]["state"] == "dropped"
    assert rows[1]["reason"] == "too large"
    assert rows[2]["sha256"] == hashlib.sha256(b"abc").hexdigest()


def test_bytes_are_found_by_their_address(ledger: Ledger) -> None:
    ledger.stored("a/b", [("x.py", b"abc")])
    assert ledger.by_address("1") == b"abc"
    assert ledger.by_address("3") is None


def test_answers_and_limits_outlive_the_process(ledger: Ledger) -> None:
    ledger.remember("json /trees/a", "t1", b"old")
    ledger.remember("json /trees/a", "t2", b"body" * 1000)
    ledger.remember("json /blobs/a", "t3", b"")
    ledger.limited("core", 5.0)
    ledger.limited("core", 7.5)
    again = Ledger(ledger.path)
    assert again.recall("json /trees/a") == ("t2", b"body" * 1000)
    assert again.limits() == {"core": 7.5}
    again.forget("json /trees/")
    assert again.recall("json /trees/a") is None
    assert again.recall("json /blobs/a") == ("t3", b"")
    again.close()


def read_whole(path: Path) -> dict[str, bytes]:
    """Path -> bytes, through everything that `clean` and its reports read."""
    ledger = Ledger(path)
    try:
        for read in (ledger.outline, ledger.not_stored, ledger.counts, lambda: list(ledger.manifest())):
            read()
        assert ledger.recall("key") in (("tag", b"answer" * 100), None)
        return {file.path: file.data for file in ledger.files()}
    finally:
        ledger.close()


def test_a_flipped_bit_is_one_sentence_that_names_the_ledger(ledger: Ledger, tmp_path: Path) -> None:
    data = random.Random(0).randbytes(5000)
    ledger.stored("a/b", [("x.py", data), ("z.py", data[::-1])])
    ledger.remember("key", "tag", b"answer" * 100)
    ledger.rows("PRAGMA wal_checkpoint(TRUNCATE)")
    whole, told = ledger.path.read_bytes(), 0
    packed, key = zlib.compress(data, 1), hashlib.sha256(data).hexdigest().encode()
    inside = whole.index(packed[:50])
    places = [inside, inside + 40, *(found.start() for found in re.finditer(key, whole))]
    draw = random.Random(1)
    for number, place in enumerate([*places, *(draw.randrange(100, len(whole)) for _ in range(100))]):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(7)  # The eighth bit would make no text of a text.
        path = tmp_path / f"{number}.sqlite"
        path.write_bytes(damaged)
        try:
            found = read_whole(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            told += 1
        else:
            assert number > 1 and set(found.values()) <= {data, data[::-1]}
    assert told > 10


def test_a_file_whose_bytes_are_gone_is_not_left_out(ledger: Ledger) -> None:
    ledger.stored("a/b", [("x.py", b"abc")])
    with ledger.transaction() as db:
        db.execute("PRAGMA defer_foreign_keys=ON")
        db.execute("UPDATE contents SET data = zeroblob(3)")
    with pytest.raises(ValueError, match=r"is damaged .the bytes of 'x\.py' of 'a/b' cannot be unpacked"):
        list(ledger.files())
    with pytest.raises(ValueError, match=r"ledger\.sqlite is damaged"):
        ledger.by_address("1")
    ledger._db.execute("PRAGMA foreign_keys=OFF")
    with ledger.transaction() as db:
        db.execute("DELETE FROM contents")
    with pytest.raises(ValueError, match=r"ledger\.sqlite is damaged"):
        list(ledger.files())


def test_a_ledger_is_claimed_by_one_process_and_freed_by_its_death(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, scraping.ledger as l\n"
        "with l.claimed_ledger(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another crawl is under way in"), claimed_ledger(tmp_path):
            pass
        holder.kill()
    with claimed_ledger(tmp_path) as ledger:
        assert ledger.counts() == {}
