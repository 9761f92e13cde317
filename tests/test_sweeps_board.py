"""Slots, claims and the journal, with processes that race and die."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import signal
import sqlite3
import sys
import time
import traceback
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.exc import OperationalError

from sweeps import board as boards
from sweeps.board import (
    KILLED,
    PULSE,
    VALIDATED,
    Board,
    Claim,
    Pulse,
    is_done,
    is_open,
    slots_of,
    spent_seconds,
)
from sweeps.settings import SweepConfig, parse_settings
from sweeps.storage import open_storage, shown, told
from sweeps.study import refuse_other_data


def study_in(url: str, folder: Path) -> optuna.Study:
    return optuna.create_study(storage=open_storage(url, folder), study_name="s", load_if_exists=True)


def claimed(board: Board, most: int) -> Claim | None:
    return board.claim(lambda slots: len(slots) < most, lambda slots: {})


def finish(board: Board, claim: Claim) -> None:
    board.study._storage.set_trial_state_values(
        claim.record._trial_id, TrialState.COMPLETE, [float(claim.slot)]
    )


def forked(work: Any) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(repr(error))
        os._exit(99)


@pytest.mark.parametrize("url", ["", "sqlite"])
@pytest.mark.parametrize("together", [True, False])
def test_workers_that_race_run_each_slot_once_and_no_more(tmp_path: Path, url: str, together: bool) -> None:
    """`together` they share a folder and its lock; else only the storage tells them apart."""
    url = f"sqlite:///{tmp_path}/s.db" if url else f"journal:{tmp_path}/s.log"
    study_in(url, tmp_path)
    ran = tmp_path / "ran"
    ran.mkdir()

    def work(number: int) -> None:
        folder = tmp_path / ("one" if together else f"own{number}")
        folder.mkdir(exist_ok=True)
        study = study_in(url, folder)
        with Pulse(study, folder) as pulse:
            board = Board(study, pulse)
            while not (len(slots := board.slots()) == 8 and all(map(is_done, slots.values()))):
                claim = claimed(board, 8)
                if claim is not None:
                    (ran / f"{claim.slot}-{number}-{claim.record.number}").touch()
                    finish(board, claim)

    ended = [os.waitpid(child, 0)[1] for child in [forked(lambda n=n: work(n)) for n in range(3)]]
    assert ended == [0, 0, 0]
    assert sorted(int(path.name.split("-")[0]) for path in ran.iterdir()) == list(range(8))
    records = study_in(url, tmp_path).get_trials()
    assert all(record.state.is_finished() for record in records)
    assert [r.value for r in slots_of(records).values()] == list(range(8))
    if together:
        assert len(records) == 8  # nobody lost a race


def test_a_killed_workers_slot_goes_on_where_it_was(tmp_path: Path) -> None:
    study = study_in("", tmp_path)
    ready = tmp_path / "ready"

    def hold() -> None:
        own = study_in("", tmp_path)
        with Pulse(own, tmp_path) as pulse:
            claim = claimed(Board(own, pulse), 3)
            assert claim is not None
            trial = optuna.trial.Trial(own, claim.record._trial_id)
            trial.suggest_float("x", 0, 1)
            own._storage.set_trial_user_attr(claim.record._trial_id, "fingerprint", "of all parameters")
            trial.report(0.5, 3)
            ready.touch()
            time.sleep(60)

    child = forked(hold)
    while not ready.exists():
        time.sleep(0.01)
    with Pulse(study, tmp_path) as pulse:
        board = Board(study, pulse)
        board.reap()
        assert not is_open(board.slots()[0]) and not is_done(board.slots()[0])  # it lives
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        board.reap()
        before = board.slots()[0]
        assert is_open(before)
        claim = claimed(board, 3)
        assert claim is not None and (claim.slot, claim.attempt) == (0, 1)
        assert claim.record.params == before.params != {}
        assert claim.record.intermediate_values == {3: 0.5}
        assert claim.record.user_attrs["deaths"] == 1
        finish(board, claim)
        assert [is_done(r) for r in board.slots().values()] == [True]


@pytest.mark.parametrize("told", [True, False])
def test_deaths_in_a_row_are_counted_at_one_place_only(tmp_path: Path, told: bool) -> None:
    """Optuna is not `told` of the validations of a repeat, or where there are several objectives."""
    study = study_in("", tmp_path)
    with Pulse(study, tmp_path) as pulse:
        board = Board(study, pulse)
        counted = []
        for step in (0, 0, 3, 3, 3, 6):
            claim = claimed(board, 1)
            assert claim is not None
            counted.append(claim.record.user_attrs.get("deaths", 0))
            if step and told and step not in claim.record.intermediate_values:
                study._storage.set_trial_intermediate_value(claim.record._trial_id, step, 1.0)
            elif step:
                study._storage.set_trial_user_attr(claim.record._trial_id, VALIDATED, step)
            board.release(board.slots()[0], "its worker died")
        assert counted == [0, 1, 2, 1, 2, 3]
        claim = claimed(board, 1)
        assert claim is not None and claim.record.user_attrs["deaths"] == 1
        board.release(board.slots()[0], "it was stopped")
        claim = claimed(board, 1)
        assert claim is not None and claim.record.user_attrs["deaths"] == 1  # a stop is no death


def test_a_worker_elsewhere_is_dead_when_its_pulse_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_in("", tmp_path)
    with Pulse(study, tmp_path) as pulse:
        now = [100.0]
        monkeypatch.setattr(boards.time, "monotonic", lambda: now[0])
        elsewhere = {PULSE + "x": {"host": "another machine", "start": 0.0, "seen": 5.0}}
        assert pulse.lives("x", elsewhere)
        now[0] += boards.STALE - 1
        assert pulse.lives("x", elsewhere)
        elsewhere[PULSE + "x"] = {"host": "another machine", "start": 0.0, "seen": 6.0}
        assert pulse.lives("x", elsewhere)
        now[0] += boards.STALE - 1
        assert pulse.lives("x", elsewhere)
        now[0] += 2
        assert not pulse.lives("x", elsewhere)
        assert not pulse.lives("never seen", {}) or pulse.last["never seen"] == (None, now[0])


def test_a_worker_whose_files_are_not_here_lives_by_its_pulse_until_it_says_that_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another container on this machine has its name and its kernel, and other files."""
    study = study_in("", tmp_path)
    with Pulse(study, tmp_path) as here:
        with Pulse(study, tmp_path / "there") as there:
            (tmp_path / "there" / "workers" / there.id).unlink()
            now = [100.0]
            monkeypatch.setattr(boards.time, "monotonic", lambda: now[0])
            pulses = study.user_attrs
            assert here.lives(there.id, pulses)
            now[0] += boards.STALE - 1
            assert here.lives(there.id, pulses)
            now[0] += 2
            assert not here.lives(there.id, pulses)
            there.beat()
            assert here.lives(there.id, study.user_attrs)
        assert not here.lives(there.id, study.user_attrs)


def test_a_worker_that_could_not_say_that_it_ended_is_dead_at_once_where_its_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_in("", tmp_path)
    with Pulse(study, tmp_path) as here:
        with Pulse(study, tmp_path) as there:
            pulses = study.user_attrs
            assert here.lives(there.id, pulses)
            monkeypatch.setattr(there, "study", None)  # a storage that is down
        assert pulses == study.user_attrs and not here.lives(there.id, pulses)


def test_a_release_is_granted_once_and_never_undoes_a_result(tmp_path: Path) -> None:
    study = study_in("", tmp_path)
    with Pulse(study, tmp_path) as pulse:
        board = Board(study, pulse)
        claim = claimed(board, 1)
        assert claim is not None
        assert board.release(claim.record, "its worker died")
        assert not board.release(claim.record, "its worker died")
        claim = claimed(board, 1)
        assert claim is not None
        finish(board, claim)
        assert not board.release(claim.record, "its worker died")
        assert is_done(board.slots()[0]) and claimed(board, 1) is None


def test_what_a_worker_that_is_gone_was_running_is_failed_once_and_nothing_else(tmp_path: Path) -> None:
    study = study_in("", tmp_path)
    with Pulse(study, tmp_path, "hung") as hung, Pulse(study, tmp_path, "other") as other:
        board, others = Board(study, hung), Board(study, other)
        ended, running = claimed(board, 3), claimed(board, 3)
        assert ended is not None and running is not None and claimed(others, 3) is not None
        finish(board, ended)
        study._storage.set_trial_intermediate_value(running.record._trial_id, 6, 1.0)
        assert (others.fail("hung", "it hung"), others.fail("hung", "again")) == (1, 0)
        slots = others.slots()
        assert [r.state.name for r in slots.values()] == ["COMPLETE", "FAIL", "RUNNING"]
        assert is_done(slots[1]) and slots[1].user_attrs["reason"] == "it hung"
        assert slots[1].user_attrs["steps"] == 6 and slots[1].user_attrs[KILLED]
        board.release(slots[2], "its worker died")  # Somebody else saw it first.
        assert others.fail("other", "it hung") == 0 and is_open(others.slots()[2])


def test_time_is_counted_while_anybody_is_at_it() -> None:
    spans = [(0, 10), (5, 20), (30, 40), (32, 35)]
    pulses = {f"{PULSE}{i}": {"host": "h", "start": a, "seen": b} for i, (a, b) in enumerate(spans)}
    assert spent_seconds(pulses | {"identity": {}}) == 30


def test_half_a_line_of_the_journal_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    study = study_in("", tmp_path)
    study.set_user_attr("a", 1)
    with open(path, "a", encoding="utf-8") as file:
        # A full disk, or a lost machine, leaves this.
        file.write('{"op_code":2,"worker_id":"x","study_id":0,"user_at')
    again = study_in("", tmp_path)
    again.set_user_attr("b", 2)
    known = optuna.load_study(
        study_name="s", storage=JournalStorage(JournalFileBackend(str(path)))
    ).user_attrs
    assert known == {"a": 1, "b": 2}
    assert all(json.loads(line) for line in path.read_text("utf-8").splitlines())


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    study = study_in("", tmp_path)
    before = path.read_bytes()

    def write() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, resource.RLIM_INFINITY))
        with pytest.raises(OSError):
            study.set_user_attr("a", "x" * 100)

    assert os.waitpid(forked(write), 0)[1] == 0
    assert path.read_bytes() == before
    study.set_user_attr("a", 1)
    assert study_in("", tmp_path).user_attrs == {"a": 1}


def test_commands_that_begin_at_once_share_a_new_database(tmp_path: Path) -> None:
    url, (wait, go) = f"sqlite:///{tmp_path / 's.db'}", os.pipe()

    def begin() -> None:
        os.close(go)
        os.read(wait, 1)  # until the parent closes its end, after the last fork
        open_storage(url, tmp_path)

    children = [forked(begin) for _ in range(6)]
    os.close(go)
    os.close(wait)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6


def test_a_command_that_comes_second_to_every_table_makes_the_rest(tmp_path: Path) -> None:
    """The worst that other first commands can do: each table is there right before it would be made."""
    url, met = f"sqlite:///{tmp_path / 's.db'}", []

    def another(_: Any, __: Any, statement: str, *___: Any) -> None:
        if "CREATE TABLE" in statement:
            met.append(statement)
            with contextlib.suppress(sqlite3.OperationalError), sqlite3.connect(tmp_path / "s.db") as other:
                other.execute(statement)

    event.listen(Engine, "before_cursor_execute", another)
    try:
        storage = open_storage(url, tmp_path)
    finally:
        event.remove(Engine, "before_cursor_execute", another)
    assert len(met) > 10
    assert optuna.create_study(storage=storage, study_name="s").study_name == "s"


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("study.db", "--storage is no URL; write journal:FILE, sqlite:///FILE, "),
        ("journal:postgresql://me:secret@h/s", "after journal: in --storage is a URL and no file; write"),
        ("sqlite://", "is kept in the memory of one process, and every worker is one; write sqlite:///FILE"),
        ("sqlite:///:memory:", "is kept in the memory of one process"),
        ("sqlite+pysqlite:///", "is kept in the memory of one process"),
        ("sqlite:////nowhere/at/all/s.db", "cannot be used"),
        ("postgresql://me:secret@localhost:1/s", "cannot be"),
        ("nosuch://me:secret@x", "be opened .no kind of storage is called .*; write journal:FILE, "),
        ("postgres://me:secret@h/s", "cannot be opened .no kind .*; write .* postgresql://"),
        ("grpc://here:x", "cannot be opened .it is no address .*; write .* grpc://HOST:PORT"),
    ],
)
def test_a_storage_that_cannot_be_had_is_one_sentence(tmp_path: Path, url: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as told:
        open_storage(url, tmp_path)
    assert "secret" not in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("url", "driver", "advice"),
    [
        (
            "mysql://me:secret@h/s",
            "MySQLdb",
            "pip install pymysql, and let the URL begin with mysql+pymysql://",
        ),
        (
            "mysql+mysqldb://me:secret@h/s",
            "MySQLdb",
            "pip install pymysql, and let the URL begin with mysql+py",
        ),
        ("mysql+pymysql://me:secret@h/s", "pymysql", "install it: pip install pymysql"),
        ("mariadb://h/s", "MySQLdb", "pip install pymysql, and let the URL begin with mariadb+pymysql://"),
        (
            "postgresql+asyncpg://h/s",
            "asyncpg",
            "pip install psycopg2-binary, and let the URL begin with post",
        ),
        ("postgresql+psycopg2://h/s", "psycopg2", "install it: pip install psycopg2-binary"),
        ("oracle+oracledb://h/s", "oracledb", "install it: pip install oracledb"),
    ],
)
def test_a_driver_that_is_not_installed_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, driver: str, advice: str
) -> None:
    monkeypatch.setitem(sys.modules, driver, None)  # It is as if it were not installed.
    with pytest.raises(ValueError) as told:
        open_storage(url, tmp_path)
    sentence = str(told.value)
    assert f"cannot be opened: its driver {driver} is not installed; {advice}" in sentence
    assert "secret" not in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            OSError("step 6 could not be written (No space left on device); go on with --resume"),
            "step 6 could not be written (No space left on device); the study is as it was: free some space "
            "and start the same command again",
        ),
        (
            ConnectionError("GRPC connection timeout"),
            "the storage x/journal.log cannot be used (GRPC connection timeout); the study is as it was: "
            "start the same command again when it is back, or name another --storage",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),  # A write's error: the file is not known.
            "the storage x/journal.log cannot be used ([Errno 28] No space left on device); the study is as "
            "it was: free some space and start the same command again, or name another --storage",
        ),
        (
            OperationalError("INSERT", {}, Exception("database or disk is full")),  # SQLite's own error.
            "the storage x/journal.log cannot be used ((builtins.Exception) database or disk is full); the "
            "study is as it was: free some space and start the same command again, or name another --storage",
        ),
        (
            OSError(errno.EACCES, "Permission denied", "x/logs"),
            "x/logs cannot be used ([Errno 13] Permission denied: 'x/logs'); the study is as it was: start "
            "the same command again when it is back, or name another --storage",
        ),
    ],
)
def test_what_cannot_be_written_is_named_and_nothing_else_blamed(error: Exception, sentence: str) -> None:
    with pytest.raises(ValueError) as found, told("", Path("x")):
        raise error
    assert str(found.value) == sentence


def test_an_interrupt_of_the_imports_of_a_storage_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sqlalchemy.exc", None)
    with pytest.raises(KeyboardInterrupt), told("", Path("x")):
        raise KeyboardInterrupt


@pytest.mark.parametrize("text", ["hello\nworld\n", "[1]\n", "3\n", '{"a": 1}\n'])
def test_a_file_that_is_no_journal_is_refused_and_left(tmp_path: Path, text: str) -> None:
    path = tmp_path / "journal.log"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match="cannot be opened"):
        open_storage("", tmp_path)
    assert path.read_text("utf-8") == text


UNREAD = "that --storage names"
PASSWORDS = [
    ("mysql://me:secret@host/db", "mysql://host/db"),
    ("mysql+pymysql://me:secret@host:33/db?charset=utf8", "mysql://host/db"),
    ("mysql://me@here:secret@host/db", UNREAD),
    ("mysql://me:se@cret@host/db", UNREAD),
    ("mysql://me:54/secret@host/db", UNREAD),
    ("mysql://me:s@e/secret@host/db", UNREAD),
    ("mysql://me:54/s?e=secret@host/db", UNREAD),
    ("mysql://me:s@secret?c=ret@host/db", UNREAD),
    ("mysql://me/here:secret@host/db", UNREAD),  # a user with a slash
    ("mysql://me:secret/db", UNREAD),  # The port is no number.
    ("mysql://me:secret", UNREAD),
    ("mysql://me:5432secret/db", UNREAD),
    ("mysql:///me:secret@host/db", UNREAD),
    ("postgresql://host:5432/db?options=a@b", UNREAD),  # SQLAlchemy takes b for the host.
    ("postgresql://host:5432/db?password=a@secret", UNREAD),
    ("postgresql://host/db?password=secret", "postgresql://host/db"),
    ("postgresql://host/db?user=me&passwd=secret", "postgresql://host/db"),
    ("postgresql://me@host/db?sslpassword=secret", "postgresql://host/db"),
    ("postgresql://host/db?a=1?password=secret", "postgresql://host/db"),
    ("postgresql://[::1]:5432/db?password=secret", "postgresql://[::1]/db"),
    ("postgresql://me:%73ecret@host/db", "postgresql://host/db"),
    ("postgresql://host/db;password=secret", UNREAD),
    ("postgresql://host/?host=other&password=secret", "postgresql://host"),
    ("sqlite:////data/s.db?password=secret", "sqlite:////data/s.db"),
    ("sqlite://?password=secret", "sqlite://"),
    ("sqlite:////data/s.db;password=secret", UNREAD),
    ("postgresql:/me:secret@host/db", UNREAD),  # one slash
    ("postgresql:me:secret@host/db", UNREAD),
    ("me:secret@host/db", UNREAD),  # no scheme
    ("//me:secret@host/db", UNREAD),
    ("://me:secret@host/db", UNREAD),
    ("post-gresql://me:secret@host/db", UNREAD),
    ("nosuch://me:secret@host/db", UNREAD),
    ("journal:s.log", "journal:s.log"),
    ("journal:s.log?password=secret", UNREAD),
    ("journal://me:secret@host/db", UNREAD),
    ("grpc://host:13000", "grpc://host:13000"),
    ("grpc://me:secret@host:13000", UNREAD),
    ("grpc://host:secret", UNREAD),
    ("grpc://host:13000/?password=secret", UNREAD),
]


@pytest.mark.parametrize(("url", "text"), PASSWORDS)
def test_of_a_storage_only_host_and_database_are_shown(url: str, text: str) -> None:
    """Whatever a parser or driver says of it, by pieces of the address too."""
    assert shown(url, Path("x")) == text
    plain = unquote_plus(url)
    for message in (url, plain, *re.split("[/@?]", plain), repr(plain), plain[len(plain) // 2 :]):
        for problem in (
            ConnectionError(f"no answer from {message} in time"),
            OSError(errno.EACCES, "no", message),
        ):
            with pytest.raises(ValueError) as error, told(url, Path("x")):
                raise problem
            assert "secret" not in str(error.value).lower(), message
            assert text in str(error.value) or isinstance(problem, PermissionError)


@pytest.mark.parametrize("url", [url for url, _ in PASSWORDS if "secret" in url and "/data/" not in url])
def test_no_password_is_shown_of_a_storage_that_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    """Through the real parsers; the host does not exist, and no traceback has a word of the address."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sweeps.storage.CONNECT_SECONDS", 0.2)
    url = url.replace("@host", "@host.invalid").replace("//host", "//host.invalid")
    try:
        open_storage(url, tmp_path)
    except ValueError as error:
        said = "".join(traceback.format_exception(error, chain=True))
        assert "\n" not in str(error)
    else:
        said = "opened"
        assert url.startswith("journal:")
    assert "secret" not in said.lower() + "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("words", "section"),
    [
        (["--storag", "SECRET"], ""),
        (["SECRET"], ""),
        (["--trials", "3", "SECRET"], ""),
        (["--storage.url", "SECRET"], ""),
        (["--storage", "SECRET", "--trials", "x"], ""),
        ([], "sweep: {storage: [SECRET]}"),
        ([], "sweep: {storage: {url: SECRET}}"),
        ([], "sweep: {storge: SECRET}"),
        ([], "sweep: {storage: SECRET, trials: -1}"),
    ],
)
def test_a_mistake_beside_a_storage_is_told_without_its_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], section: str
) -> None:
    path, url = tmp_path / "c.yaml", "mysql://me:secret@host/db"
    path.write_text("space: {optimizer.lr: {log: [1e-3, 1e-1]}}\n" + section.replace("SECRET", f"'{url}'"))
    with pytest.raises(SystemExit):
        parse_settings(["--config", str(path), *(url if word == "SECRET" else word for word in words)])
    said = "".join(capsys.readouterr())
    assert "error: " in said and "secret" not in said


def test_settings_of_a_sweep_are_printed_without_their_storage() -> None:
    assert "secret" not in repr(SweepConfig(storage="mysql://me:secret@host/db"))


def test_of_two_that_begin_at_once_with_other_data_one_is_refused(tmp_path: Path) -> None:
    one, other = study_in("", tmp_path), study_in("", tmp_path)
    own, set_own = one.set_user_attr, other.set_user_attr

    def both(key: str, value: str) -> None:
        own(key, value)
        set_own(key, "of the other")

    one.set_user_attr = both
    with pytest.raises(
        ValueError, match="has other data: its fingerprint was of the other and is of one now"
    ):
        refuse_other_data(one, "of one")
    refuse_other_data(other, "of the other")
