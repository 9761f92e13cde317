"""The run's folder: one run at a time, and every key of the settings has its rule for a resume."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from config import SETTINGS, Config, DataConfig, TrainConfig
from config.schema import flat
from config.setting import REFUSED, WARNED
from training import runfolder
from training.runfolder import (
    LOCK,
    claimed_folder,
    config_fingerprint,
    refuse_changes,
    refuse_other_data,
    with_data_resolved,
    words_of_run,
)


def test_the_fingerprint_of_settings_is_that_of_runs_saved_long_ago() -> None:
    """If a new key changes it, those runs cannot be resumed: the key says by `before` what they had."""
    config = Config(data=DataConfig(heal=False, regroup=False), train=TrainConfig(max_steps=1))
    assert config_fingerprint(config).startswith("d7fc37afbefb")


@pytest.mark.parametrize("saved", [False, True, None])  # None: it lacks the key, as the very first runs' do
@pytest.mark.parametrize("given", [False, True, None])
def test_a_run_is_split_as_it_was_unless_that_is_said(tmp_path: Path, saved: Any, given: Any) -> None:
    config = Config(data=DataConfig(regroup=given))
    assert with_data_resolved(config, tmp_path).data.regroup == (given is not False)  # no run is there
    plain = Config(data=DataConfig(regroup=saved)).to_dict()
    if saved is None:
        del plain["data"]["regroup"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain), "utf-8")
    assert with_data_resolved(config, tmp_path).data.regroup == (bool(saved) if given is None else given)


def test_a_run_saved_when_validation_was_counted_in_batches_is_read_in_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = Config().to_dict() | {"batch_size": 4}
    del now["validation_rows"]
    assert Config.from_dict(now | {"validation_batches": 3}).train.validation_rows == 12
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(now | {"validation_batches": 3}), "utf-8")
    refuse_changes(tmp_path, Config.from_dict(now | {"validation_rows": 12}))
    assert "its best loss so far is of other rows" in capsys.readouterr().err
    for bad in ({"validation_batches": "3"}, {"validation_batches": 3, "batch_size": "4"}):
        with pytest.raises(ValueError, match="the saved config cannot be read"):
            Config.from_dict(now | bad)


# --- the lock ----------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_one_sentence() -> None:
    with (
        pytest.raises(ValueError, match="/proc/x can be neither made nor locked; name another --run"),
        claimed_folder(config_of(Path("/proc/x"))),
    ):
        pass


def config_of(folder: Path, resume: bool = False) -> Config:
    return Config(train=TrainConfig(run=str(folder), resume=resume))


def forked(work: Callable[[], int]) -> int:
    """Process id of a child that exits with what `work` returns; 64 that import anew would take minutes."""
    child = os.fork()
    if child:
        return child
    try:
        os._exit(work())
    except BaseException:
        os._exit(99)


def exit_codes(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def race(folder: Path, contenders: int) -> list[int]:
    """Exit codes of processes that claim one folder at one instant: 0 won, 1 was told of another run."""
    ready, go = os.pipe()

    def start() -> int:
        os.close(go)
        os.read(ready, 1)  # returns when the last writing end is closed
        try:
            with claimed_folder(config_of(folder)) as claimed:
                (claimed / "config.yaml").write_text("{}")
                return 0
        except ValueError as error:
            return 1 if "another run" in str(error) else 2

    children = [forked(start) for _ in range(contenders)]
    os.close(ready)
    os.close(go)
    return exit_codes(children)


def test_of_16_racing_starts_one_wins(tmp_path: Path) -> None:
    assert sorted(race(tmp_path / "run", 16)) == [0] + [1] * 15


@pytest.mark.slow
def test_of_64_racing_starts_one_wins_200_times(tmp_path: Path) -> None:
    for number in range(200):
        assert sorted(race(tmp_path / str(number), 64)) == [0] + [1] * 63, number


def overlaps(folder: Path, processes: int, seconds: float) -> list[int]:
    """Exit codes of processes that claim and leave one folder over and over: 3 if two were ever inside."""
    inside, stop = folder / "inside", time.monotonic() + seconds

    def claim_and_leave() -> int:
        claims = 0
        while time.monotonic() < stop:
            try:
                with claimed_folder(config_of(folder / "run")):
                    try:
                        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                    except FileExistsError:
                        return 3
                    claims += 1
                    os.unlink(inside)
            except ValueError:
                continue
        return 0 if claims else 4

    return exit_codes([forked(claim_and_leave) for _ in range(processes)])


def test_no_two_runs_are_ever_inside_while_others_leave(tmp_path: Path) -> None:
    """Each leaves an empty folder, so that the next start races with the removal of the lock."""
    assert set(overlaps(tmp_path, 8, 1.0)) <= {0, 4}


@pytest.mark.slow
def test_no_two_runs_are_ever_inside_for_a_minute(tmp_path: Path) -> None:
    assert set(overlaps(tmp_path, 16, 60.0)) <= {0, 4}


def lock_without_comparison(folder: Path) -> tuple[Any, bool]:
    """Lock as once: without a look at whether the file is still the one in the folder."""
    file = open(folder / LOCK, "w")  # noqa: SIM115
    runfolder.fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file, False


@pytest.mark.parametrize("planted", [False, True])
def test_a_lock_on_a_removed_file_is_no_lock(tmp_path: Path, monkeypatch: Any, planted: bool) -> None:
    """The holder before ends between the opening and the locking; planted, two runs are then inside."""
    real, ended = fcntl.flock, []

    def flock(file: Any, operation: int) -> None:
        if not ended:
            ended.append(True)
            (tmp_path / LOCK).unlink()
        real(file, operation)

    monkeypatch.setattr(runfolder.fcntl, "flock", flock)
    if planted:
        monkeypatch.setattr(runfolder, "_try_lock", lock_without_comparison)
    with claimed_folder(config_of(tmp_path)):
        assert (tmp_path / LOCK).exists() != planted
        if planted:
            with claimed_folder(config_of(tmp_path)):
                return
        with pytest.raises(ValueError, match="another run is under way"), claimed_folder(config_of(tmp_path)):
            pass


def test_a_killed_runs_lock_is_free(tmp_path: Path) -> None:
    ready, inside = os.pipe()

    def hold() -> int:
        with claimed_folder(config_of(tmp_path)):
            os.write(inside, b".")
            time.sleep(60)
        return 0

    child = forked(hold)
    os.read(ready, 1)
    with pytest.raises(ValueError, match="another run is under way"), claimed_folder(config_of(tmp_path)):
        pass
    os.kill(child, signal.SIGKILL)
    assert exit_codes([child]) == [-signal.SIGKILL]
    assert (tmp_path / LOCK).exists()
    with claimed_folder(config_of(tmp_path)):
        pass
    assert not tmp_path.exists()


def test_only_a_holder_that_was_killed_leaves_a_folder_free(tmp_path: Path) -> None:
    """Who makes the lock file may be overtaken before locking it; the other one cleared an ended run."""
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / LOCK).touch()
    with pytest.raises(ValueError, match="already holds another run"), claimed_folder(config_of(tmp_path)):
        pass
    assert (tmp_path / "config.yaml").exists() and not (tmp_path / LOCK).exists()
    (tmp_path / LOCK).write_text("1\n")
    with claimed_folder(config_of(tmp_path)) as folder:
        assert [path.name for path in folder.iterdir()] == [LOCK]


@pytest.mark.parametrize("line", ["model: {path}", "config: {path}", "model: {{config: {path}}}"])
def test_a_strangers_run_reads_no_file_that_its_settings_name(line: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.yaml"
    secret.write_text("hunter22: 3\n", "utf-8")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(line.format(path=secret), "utf-8")
    with pytest.raises(ValueError, match="the saved config cannot be read") as raised:
        words_of_run(run)
    assert "hunter22" not in str(raised.value)


# --- what a resume may change ------------------------------------------------------------------------


def changed(config: Config, key: str) -> Config:
    """Return the settings with another value of that key, whether or not it is allowed."""
    group, _, name = key.rpartition(".")
    section = getattr(config, group or "train")
    old = getattr(section, name)
    if isinstance(old, bool):
        new: Any = not old
    elif isinstance(old, int | float):
        new = old + 1
    elif isinstance(old, tuple):
        new = (*old, "x")
    else:
        new = f"{old}x"
    return dataclasses.replace(config, **{group or "train": dataclasses.replace(section, **{name: new})})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(Config().to_dict()), "utf-8")
    return tmp_path


@pytest.mark.parametrize("key", list(flat(Config())))
def test_a_changed_key_is_refused_warned_of_or_free(run: Path, key: str, capsys: Any) -> None:
    other = changed(Config(), key)
    before, after = flat(Config())[key], flat(other)[key]
    assert before != after
    kind = SETTINGS[key].on_resume
    if kind == REFUSED:
        with pytest.raises(ValueError, match=f"{key} was .* set it back") as caught:
            refuse_changes(run, other)
        assert str(before) in str(caught.value) and str(after) in str(caught.value)
    else:
        refuse_changes(run, other)
    told = capsys.readouterr().err
    assert (f"warning: {key} was {before} so far and is {after} now" in told) == (kind == WARNED)
    assert kind == WARNED or not told
    assert (config_fingerprint(other) != config_fingerprint(Config())) == (kind == REFUSED)


@pytest.mark.parametrize(
    ("name", "place"), [("data", "in stdlib"), ("tokenizer", "trained on the data"), ("tokenizer", "in own")]
)
def test_other_data_or_another_tokenizer_is_named(run: Path, name: str, place: str) -> None:
    config = Config()
    if place == "in own":
        config = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, path="own"))
    before = {"data": "d" * 64, "tokenizer": "t" * 64, "code": "c" * 64}
    (run / "fingerprints.json").write_text(json.dumps(before))
    refuse_other_data(run, config, before | {"code": "0" * 64})
    with pytest.raises(ValueError, match=f"the {name} changed since") as error:
        refuse_other_data(run, config, before | {name: "0" * 64})
    assert str(error.value) == (
        f"the {name} changed since {run} began: the fingerprint is 000000000000 now ({place}) and was "
        f"{name[0] * 12} then ({run / 'fingerprints.json'}); restore the {name}, or start another --run"
    )
    for damaged in ("{", "[]", '{"data": 3}'):
        (run / "fingerprints.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"fingerprints\.json is damaged"):
            refuse_other_data(run, config, before)
