"""Sweeps through the real command line and by workers that are killed."""

from __future__ import annotations

import os
import pty
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import commands
import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from scipy import stats

import hyperparam_tune
from checkpoint import checkpoints
from config import RECIPES, parse_config
from hyperparam_tune import Crew, finish
from sweeps import study as studies
from sweeps import trial, worker
from sweeps.board import KILLED, VALIDATED, Board, Claim, Pulse, alone, is_done, is_open, slots_of
from sweeps.settings import Settings, parse_settings
from sweeps.study import open_studies, refuse_other_data
from sweeps.trial import Outcome, run_trial
from sweeps.verdict import (
    Repeated,
    best_yaml,
    counts,
    differences,
    front,
    idle,
    number,
    short,
    verdict,
    winner,
)
from sweeps.worker import STOPPED, Worker, more_trials
from trainingmanager import train

HOUSE = Path(__file__).parent.parent


def tiny(folder: Path, corpus: Path, **changes: Any) -> Path:
    """A YAML of a sweep whose trials take a second."""
    values: dict[str, Any] = {
        "data": {
            "source": str(corpus),
            "validation_one_in": 4,
            "test_one_in": 4,
            "workers": 1,
            "cache": str(folder / "cache"),
        },
        "tokenizer": {"vocab_size": 300, "min_count": 2},
        "model": {"block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 16},
        "optimizer": {"warmup_steps": 2},
        "max_steps": 12,
        "validate_every": 3,
        "batch_size": 4,
        "samples": 0,
        "space": {"head_lr": {"log": ["1e-3", "1e-1"]}, "model.dropout": [0.0, 0.2]},
        "sweep": {"study": str(folder / "study"), "trials": 3, "repeat_seeds": 2, "repeat_best": 1},
    }
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(value, dict) and key != "space" else value
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path


def command(*words: str | Path) -> list[str]:
    return [sys.executable, str(HOUSE / "hyperparam_tune.py"), *map(str, words)]


def run(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), cwd=cwd, capture_output=True, text=True, timeout=900)


def records(folder: Path, name: str = "study", url: str = "") -> list[optuna.trial.FrozenTrial]:
    """As Optuna's own reader has them."""
    storage = url or JournalStorage(JournalFileBackend(str(folder / "study" / "journal.log")))
    return optuna.load_study(study_name=name, storage=storage).get_trials()


def results(folder: Path, name: str = "study", url: str = "") -> dict[int, Any]:
    """Of each slot its parameters and value."""
    return {slot: (r.params, r.value) for slot, r in slots_of(records(folder, name, url)).items()}


def wait_for(true: Callable[[], bool], seconds: float = 600) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def workers_of(pid: int) -> list[int]:
    """The processes that a sweep's command spawned to train."""
    found = []
    for child in children(pid):
        try:
            words = Path(f"/proc/{child}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"spawn_main" in words:
            found.append(child)
    return found


# --- the real command line ---------------------------------------------------------------------------


def test_a_sweep_from_the_command_to_the_best_config_and_once_more(tmp_path: Path, corpus: Path) -> None:
    path = tiny(tmp_path, corpus, sweep={"trials": 2})
    done = run("--config", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    study = tmp_path / "study"
    for part in ("trial 0: bits_per_byte", "2 trials: 2 complete", "the config itself: ", " interval ["):
        assert part in done.stdout
    assert results(tmp_path)[0][0] == {"optimizer.head_lr": 0.01, "model.dropout": 0.0}  # the config itself
    assert [r.user_attrs["seed"] for r in records(tmp_path, "study-repeats")] == [1, 1, 2, 2]
    page = (study / "report.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == len(list((study / "pictures").glob("*.png"))) >= 4
    assert "2 trials: 2 complete" in page and "http" not in page
    assert len(list((study / "tensorboard").glob("*/events*"))) == 2
    assert not done.stderr or "Traceback" not in done.stderr

    best = parse_config(["--config", str(study / "best.yaml")])
    of = yaml.safe_load((study / "best.yaml").read_text("utf-8"))
    assert best.train.max_steps == 12 and of["data"]["source"] == str(corpus)
    words = ["--config", str(study / "best.yaml"), "--max_steps", "2", "--run", str(tmp_path / "again")]
    assert train(parse_config(words)).state.step == 2

    before = (study / "journal.log").read_bytes()
    other = tmp_path / "other.yaml"
    other.write_text(path.read_text("utf-8").replace("1e-3", "1e-4"), "utf-8")
    refused = commands.command("hyperparam_tune.py", "--config", other, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert (
        "another space: optimizer.head_lr was {log: [0.001, 0.1]} and is {log: [0.0001, 0.1]} now"
        in refused.stderr
    )
    assert (study / "journal.log").read_bytes() == before

    words = ("--config", path, "--storage", f"sqlite:///{tmp_path}/new.db")
    refused = commands.command("hyperparam_tune.py", *words, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "study/trials holds runs, and the study study in this storage has no trials" in refused.stderr

    (corpus / "part0.py").write_text("print('another file')\n", "utf-8")
    refused = commands.command("hyperparam_tune.py", "--config", path, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "the study study has other data: its fingerprint was" in refused.stderr
    assert (study / "journal.log").read_bytes() == before

    study.rename(tmp_path / "moved")  # whose journal tells of a study of another name
    words = ("hyperparam_tune.py", "--config", path, "--study", tmp_path / "moved", "--max_steps", "3")
    for _ in range(2):
        refused = commands.command(*words, cwd=tmp_path)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert "moved/trials holds runs, and the study moved in this storage has no trials" in refused.stderr


def test_a_reader_that_goes_away_does_not_end_a_sweep_and_commands_write_their_results_in_turn(
    tmp_path: Path, corpus: Path
) -> None:
    study = tmp_path / "study"
    study.mkdir()
    path = tiny(tmp_path, corpus, sweep={"trials": 1, "repeat_seeds": 0})
    process = subprocess.Popen(
        command("--config", path), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # before its first line
    with alone(study, ".finish"):  # as another command has it
        wait_for(lambda: (study / "trials").is_dir())
        wait_for(lambda: [r.state for r in records(tmp_path)] == [TrialState.COMPLETE])
        time.sleep(4)  # looks at the study come each second
        assert process.poll() is None and not (study / "best.yaml").exists()
    assert not process.stderr.read() and process.wait() == 0
    assert (study / "best.yaml").is_file() and (study / "report.html").is_file()


@pytest.mark.slow
def test_a_worker_whose_command_was_killed_while_it_began_ends(tmp_path: Path, corpus: Path) -> None:
    path = tiny(tmp_path, corpus, max_steps=100_000, sweep={"trials": 1, "repeat_seeds": 0})
    process = subprocess.Popen(
        command("--config", path), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: bool(workers_of(process.pid)))
    (worker,) = workers_of(process.pid)
    process.kill()
    process.wait()
    try:
        wait_for(lambda: not is_running(worker), 120)
    finally:
        if is_running(worker):
            os.kill(worker, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Not gone, and no zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_ctrl_c_ends_all_of_it_tells_what_was_found_and_the_same_command_goes_on(
    tmp_path: Path, corpus: Path
) -> None:
    grid = {"trials": 2, "repeat_seeds": 2, "sampler": "grid"}
    path = tiny(tmp_path, corpus, space={"max_steps": [12, 3000]}, sweep=grid)
    process = subprocess.Popen(
        command("--config", path), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: any((tmp_path / "study" / "trials").glob("0001/checkpoints/step-*")))
    trainers = workers_of(process.pid)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == STOPPED, errors
    assert "the same command goes on" in output and "Traceback" not in errors
    assert trainers and not any(Path(f"/proc/{pid}").exists() for pid in trainers)
    ended, slot = slots_of(records(tmp_path)).values()
    assert is_done(ended) and is_open(slot) and slot.user_attrs["requeue"] == "it was stopped"
    assert max(slot.intermediate_values) >= 3
    assert "\n2 trials: 1 complete, 0 pruned, 0 failed, 1 not ended; 12 steps\n" in output
    assert "nothing was repeated, so whether it differs is not known" in output
    best = yaml.safe_load((tmp_path / "study" / "best.yaml").read_text("utf-8"))
    assert best["max_steps"] == 12 and (tmp_path / "study" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.slow
def test_a_closed_terminal_stops_it_once_and_what_was_found_is_written(tmp_path: Path, corpus: Path) -> None:
    grid = {"trials": 2, "repeat_seeds": 2, "sampler": "grid"}
    path = tiny(tmp_path, corpus, space={"max_steps": [12, 3000]}, sweep=grid)
    child, terminal = pty.fork()
    if not child:
        os.execv(sys.executable, command("--config", path))
    wait_for(lambda: any((tmp_path / "study" / "trials").glob("0001/checkpoints/step-*")))
    os.close(terminal)  # by which the kernel hangs up
    time.sleep(0.03)
    os.kill(child, signal.SIGHUP)  # as does a shell
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == STOPPED
    ended, slot = slots_of(records(tmp_path)).values()
    assert is_done(ended) and slot.user_attrs["requeue"] == "it was stopped"
    assert all((tmp_path / "study" / name).is_file() for name in ("best.yaml", "report.html"))


def test_a_reader_that_went_away_and_a_terminal_that_nohup_waives_stop_nothing(
    tmp_path: Path, corpus: Path
) -> None:
    process = subprocess.Popen(
        ["nohup", *command("--config", tiny(tmp_path, corpus), "--trials", "3", "--repeat_seeds", "0")],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline().startswith("training a code tokenizer")
    wait_for(lambda: any((tmp_path / "study" / "trials").glob("0001")))
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.stderr is not None and process.stderr.read() == ""
    assert process.wait(300) == 0
    assert [r.state for r in records(tmp_path)] == [TrialState.COMPLETE] * 3
    assert (tmp_path / "study" / "report.html").is_file()


def test_workers_that_all_end_with_an_error_tell_it_once(tmp_path: Path, corpus: Path) -> None:
    path = tiny(tmp_path, corpus, sweep={"workers": 2})
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "logs").touch()  # where a folder must be
    done = run("--config", path, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "study/logs cannot be used (" in done.stderr
    assert all(is_open(record) for record in slots_of(records(tmp_path)).values())  # nothing is lost


def silent(*_: Any) -> None:
    os._exit(2)


def test_a_worker_that_ends_without_a_word_is_told_of(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hyperparam_tune, "start", silent)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        crew = Crew(parse_settings(["--config", str(tiny(tmp_path, corpus))]), "")
        crew.members[0].process.join()
        assert crew.look() == 2 and crew.sentence == "a worker ended with exit code 2 and did not say why"
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def ends_as_another_is_stopped(settings: Settings, *_: Any) -> None:
    try:
        (settings.sweep.folder / "first").mkdir(parents=True)
    except FileExistsError:
        os._exit(STOPPED)
    os._exit(0)


def test_a_study_is_at_its_end_where_one_worker_says_so_and_a_signal_twice_at_once_is_one(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hyperparam_tune, "start", ends_as_another_is_stopped)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        crew = Crew(parse_settings(["--config", str(tiny(tmp_path, corpus)), "--workers", "2"]), "")
        for member in crew.members:
            member.process.join()
        assert sorted(member.process.exitcode for member in crew.members) == [0, STOPPED]
        assert crew.look() == 0
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)  # as of a terminal that is closed
        assert crew.asked == 1
        crew.begin(1)  # which had begun when the signal came
        crew.members[1].process.join()
        assert len(crew.members) == 2 and crew.members[1].process.exitcode == -signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        assert crew.asked == 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def tells_its_gpu(settings: Settings, fingerprint: str, mouth: Any, name: str, ticks: Any) -> None:
    mouth.send(os.environ["CUDA_VISIBLE_DEVICES"])


def test_workers_share_out_the_gpus_that_their_command_may_see(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hyperparam_tune, "start", tells_its_gpu)
    for device, gpus in (("auto", ["3", "5", "3"]), ("cuda:1", ["3,5"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
        words = ["--config", str(tiny(tmp_path, corpus)), "--workers", str(len(gpus)), "--device", device]
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            crew = Crew(parse_settings(words), "")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        assert [member.ear.recv() for member in crew.members] == gpus


def stands_still(settings: Settings, fingerprint: str, mouth: Any, name: str, ticks: Any) -> None:
    """A worker that has a slot, and is busy until a file says that it is to stop as by SIGSTOP."""
    trials, _ = open_studies(settings)
    with Pulse(trials, settings.sweep.folder, name) as pulse:
        ticks.value += 1
        Board(trials, pulse).claim(lambda slots: not slots, lambda slots: {})
        while not (settings.sweep.folder / "stop").exists():
            ticks.value += 1
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGSTOP)


def test_a_worker_that_hangs_is_killed_and_its_trial_failed(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hyperparam_tune, "start", stands_still)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus)), "--hung_after", "3"])
    settings.sweep.folder.mkdir()
    trials, _ = open_studies(settings)
    board = Board(trials, Pulse(trials, settings.sweep.folder))
    crew = Crew(settings, "")
    try:
        wait_for(lambda: bool(board.slots()))
        for _ in range(10):  # longer than a worker that does nothing has
            crew.end_hung(pytest.fail)
            time.sleep(0.5)
        (settings.sweep.folder / "stop").touch()
        ended: list[str] = []

        def fail(name: str) -> None:
            # While it lives: of a dead one another worker would take the trial up.
            assert crew.members[0].process.is_alive() and board.fail(name, "it hung") == 1
            ended.append(name)

        wait_for(lambda: bool(time.sleep(0.5) or crew.end_hung(fail) or ended), 120)
        assert ended == [crew.members[0].name] and crew.members[0].process.exitcode == -signal.SIGKILL
        assert is_done(board.slots()[0])
        assert crew.look() is None and crew.members[0].name != ended[0]  # another one works on
    finally:
        crew.stop()
        crew.stop()
        crew.members[0].process.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_worker_that_finds_other_data_than_its_command_says_so(tmp_path: Path, corpus: Path) -> None:
    """Two first commands may both have found a study without any; the last one to say whose it is has it."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus))])
    settings.sweep.folder.mkdir()
    trials, _ = open_studies(settings)
    refuse_other_data(trials, "of one")
    trials.set_user_attr("data", "of another")  # as one that had looked before the line above
    try:
        crew = Crew(settings, "of one")
        crew.members[0].process.join()
        assert crew.look() == 2 and "has other data: its fingerprint was of another and is" in crew.sentence
        assert not trials.get_trials()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.slow
def test_a_sweep_ends_although_a_trial_hangs(tmp_path: Path, corpus: Path) -> None:
    options = ("--trials", "2", "--repeat_seeds", "0", "--hung_after", "60", "--sampler", "random")
    path = tiny(tmp_path, corpus, max_steps=300)
    process = subprocess.Popen(
        command("--config", path, *options),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: any((tmp_path / "study" / "trials").glob("0000/checkpoints/step-*")))
    (worker,) = workers_of(process.pid)
    os.kill(worker, signal.SIGSTOP)
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0 and not errors, errors  # no lock that it left behind either
    assert "trial 0: failed: its worker did nothing for 60 s (--hung_after) and was killed" in output
    assert [r.state for r in slots_of(records(tmp_path)).values()] == [TrialState.FAIL, TrialState.COMPLETE]


PROXY = """
import sys
from optuna.storages import JournalStorage, run_grpc_proxy_server
from optuna.storages.journal import JournalFileBackend
backend = JournalFileBackend(sys.argv[1])
run_grpc_proxy_server(JournalStorage(backend), host="localhost", port=int(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_study_behind_a_grpc_proxy_and_one_whose_proxy_is_down(tmp_path: Path, corpus: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    (tmp_path / "study").mkdir()
    journal = tmp_path / "study" / "journal.log"  # of the proxy
    server = subprocess.Popen([sys.executable, "-W", "ignore", "-c", PROXY, str(journal), port])
    path = tiny(tmp_path, corpus, sweep={"trials": 3, "workers": 2, "repeat_seeds": 0})
    words = ("--config", path, "--storage", f"grpc://localhost:{port}")
    try:
        wait_for(journal.exists)
        done = run(*words, cwd=tmp_path)
    finally:
        server.kill()
        server.wait()
    assert done.returncode == 0, done.stderr
    assert sorted(results(tmp_path)) == [0, 1, 2] and all(v for _, v in results(tmp_path).values())
    before = journal.read_bytes()
    down = run(*words, cwd=tmp_path)
    assert down.returncode == 2 and down.stderr.count("\n") == 1, down.stderr
    assert f"the storage grpc://localhost:{port} cannot be used" in down.stderr
    assert journal.read_bytes() == before


# --- workers in this process -------------------------------------------------------------------------


def sweep(path: Path, *words: str) -> tuple[Settings, dict[int, optuna.trial.FrozenTrial]]:
    """One worker's work, from the settings to the last slot."""
    settings = parse_settings(["--config", str(path), *words])
    settings.sweep.folder.mkdir(exist_ok=True)
    trials, repeats = open_studies(settings)
    with Pulse(trials, settings.sweep.folder) as pulse:
        Worker(settings, trials, repeats, pulse).work()
    return settings, Board(trials, pulse).slots()


def test_a_trial_that_cannot_train_is_failed_with_its_reason_and_the_study_goes_on(
    tmp_path: Path, corpus: Path
) -> None:
    arms = {
        "healthy": {"model.n_layer": 1},
        "too much memory": {"model.n_embd": 2**20, "model.n_head": 2**17},
        "not finite": {"optimizer.head_lr": 1e38, "optimizer.muon_lr": 1e38},
        "refused": {"model.vocab_size": 2**16},
        "healthy too": {"model.n_layer": 2},
    }
    path = tiny(
        tmp_path, corpus, space={"arms": arms}, sweep={"trials": 9, "sampler": "grid", "repeat_seeds": 0}
    )
    settings, slots = sweep(path)
    states = {r.params["arms"]: r.state for r in slots.values()}
    reasons = {r.params["arms"]: r.user_attrs["reason"] for r in slots.values()}
    assert set(states) == set(arms)
    trained = {name for name, state in states.items() if state == TrialState.COMPLETE}
    assert trained == {"healthy", "healthy too"}
    assert reasons["too much memory"] == "memory is full"
    assert "loss of step 3 is nan" in reasons["not finite"]
    (steps,) = [r.user_attrs["steps"] for r in slots.values() if r.params["arms"] == "not finite"]
    assert steps == 3  # of which the log, at every tenth step, has the first alone
    assert reasons["refused"].startswith("preflight: vocabulary-too-large")
    assert "1 failed: memory is full" in counts(settings, slots)


def test_a_sweep_of_failures_alone_says_why_and_what_to_do(tmp_path: Path, corpus: Path) -> None:
    words = ("--config", tiny(tmp_path, corpus), "--allow", "nothing", "--trials", "2")
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "all 2 trials failed (it stops after 5); the first one: --allow nothing names no" in done.stderr
    assert "; mend that, and begin anew with another --study" in done.stderr


def test_a_trial_at_which_workers_keep_dying_is_failed_with_the_steps_that_it_took(
    tmp_path: Path, corpus: Path
) -> None:
    words = ["--config", str(tiny(tmp_path, corpus)), "--trials", "1", "--repeat_seeds", "0", "--deaths", "2"]
    settings = parse_settings(words)
    settings.sweep.folder.mkdir()
    trials, repeats = open_studies(settings)
    with Pulse(trials, settings.sweep.folder) as pulse:
        board = Board(trials, pulse)
        for _ in range(2):
            claim = board.claim(lambda slots: len(slots) < 1, lambda slots: {})
            assert claim is not None
            trials._storage.set_trial_intermediate_value(claim.record._trial_id, 9, 1.0)
            board.release(claim.record, "its worker died")
        Worker(settings, trials, repeats, pulse).work()
        (slot,) = board.slots().values()
    assert is_done(slot) and slot.user_attrs["steps"] == 9 and slot.user_attrs[KILLED]
    assert slot.user_attrs["reason"] == "2 workers died at it after step 9; memory may be full"


def test_a_parameter_that_changes_nothing_is_named(tmp_path: Path, corpus: Path) -> None:
    """With muon, embedding_lr and head_lr of their own, nothing is left that lr moves."""
    space = {"optimizer.lr": [0.01, 0.1], "model.dropout": [0.0, 0.3]}
    path = tiny(tmp_path, corpus, space=space, sweep={"trials": 4, "sampler": "grid", "repeat_seeds": 0})
    settings, slots = sweep(path)
    assert len(slots) == 4
    (line,) = idle(settings, slots)
    assert line.startswith("optimizer.lr changed nothing in the first 10 losses") and "nor in their" in line


def test_of_trials_that_end_early_the_losses_that_there_are_are_compared(
    tmp_path: Path, corpus: Path
) -> None:
    space = {"optimizer.lr": [0.01, 0.1], "model.dropout": [0.0, 0.3]}
    short = {"trials": 4, "sampler": "grid", "repeat_seeds": 0}
    settings, slots = sweep(tiny(tmp_path, corpus, space=space, max_steps=4, sweep=short))
    assert [len(r.user_attrs["first_losses"]) for r in slots.values()] == [4] * 4
    (line,) = idle(settings, slots)
    assert line.startswith("optimizer.lr changed nothing in the first 4 losses of trials ")
    assert line.endswith("; nor in their results")

    def ended(rate: float, losses: list[float], state: TrialState) -> optuna.trial.FrozenTrial:
        chosen = {"optimizer.lr": rate, "model.dropout": 0.0}
        kinds = {p.key: studies.distribution(p) for p in settings.space.parameters}
        attributes = {"first_losses": losses}
        return optuna.trial.create_trial(
            state=state, params=chosen, distributions=kinds, value=1.0, user_attrs=attributes
        )

    whole, pruned = ended(0.01, [3.0, 2.0, 1.0], TrialState.COMPLETE), TrialState.PRUNED
    (line,) = idle(settings, {0: whole, 1: ended(0.1, [3.0, 2.0], pruned)})
    assert line.endswith("first 2 losses of trials 0 and 1; what it would have done later is not known")
    assert not idle(settings, {0: whole, 1: ended(0.1, [3.0, 2.5], pruned)})
    assert not idle(settings, {0: whole, 1: ended(0.1, [3.0], pruned)})  # before any update
    more = {0: whole, 1: ended(0.1, [3.0, 2.0], pruned), 2: ended(0.1, [3.0, 2.0, 1.0], pruned)}
    assert "first 3 losses of trials 0 and 2; what" in idle(settings, more)[0]


def test_the_time_of_a_trial_is_that_of_all_its_attempts(tmp_path: Path, corpus: Path) -> None:
    config = parse_settings(["--config", str(tiny(tmp_path, corpus))]).config
    folder, log = tmp_path / "trial", tmp_path / "log.txt"

    def attempt(report: Callable[[int, float], bool]) -> tuple[Outcome, float]:
        """With the time that it took by the clock."""
        started = time.monotonic()
        return run_trial(config, folder, log, report, lambda key, value: None), time.monotonic() - started

    def slow(step: int, value: float) -> bool:
        if step == 9:
            raise KeyboardInterrupt
        time.sleep(1.0)
        return False

    with pytest.raises(KeyboardInterrupt):
        attempt(slow)  # which the checkpoint of step 9 has 2 s of
    told, _ = attempt(lambda step, value: True)  # as the pruner says now: nothing is trained
    assert told.state == "pruned" and 2 < told.seconds < 60 and told.steps == 9
    outcome, own = attempt(lambda step, value: False)
    assert outcome.state == "complete" and outcome.steps == 12
    assert 1 < outcome.seconds - own < 60


@pytest.mark.parametrize("killed", [False, True])
def test_a_trial_at_its_end_is_complete_whatever_the_pruner_says(
    tmp_path: Path, corpus: Path, killed: bool
) -> None:
    config = parse_settings(["--config", str(tiny(tmp_path, corpus))]).config

    def last(step: int, value: float) -> bool:
        if killed and step == 12 and not told:
            told.append(step)
            raise KeyboardInterrupt  # between the last checkpoint and the record
        return step == 12 or bool(told)  # Optuna's pruners go by the last step that they know of

    told: list[int] = []
    attempt = (config, tmp_path / "trial", tmp_path / "log.txt", last, lambda key, value: None)
    if killed:
        with pytest.raises(KeyboardInterrupt):
            run_trial(*attempt)
    outcome = run_trial(*attempt)
    assert (outcome.state, outcome.steps) == ("complete", 12)


@pytest.mark.parametrize("budget", [{"max_steps": 12}, {"max_epochs": 0.5}, {"max_seconds": 1.0}])
def test_a_trial_killed_before_its_record_is_at_its_end_by_any_budget(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, budget: dict[str, float]
) -> None:
    config = parse_settings(["--config", str(tiny(tmp_path, corpus, **{"max_steps": 0} | budget))]).config
    folder, right = tmp_path / "trial", trial.numbers_of

    def killed(folder: Path) -> dict[str, float]:
        monkeypatch.setattr(trial, "numbers_of", right)
        raise KeyboardInterrupt

    monkeypatch.setattr(trial, "numbers_of", killed)
    with pytest.raises(KeyboardInterrupt):
        run_trial(config, folder, tmp_path / "log.txt", lambda step, value: False, lambda key, value: None)
    outcome = run_trial(
        config, folder, tmp_path / "log.txt", lambda step, value: True, lambda key, value: None
    )
    assert outcome.state == "complete" and outcome.steps == checkpoints(folder / "checkpoints")[-1].step > 3


def test_a_stop_is_known_of_a_trial_that_failed_and_its_steps_of_one_that_is_pruned(
    tmp_path: Path, corpus: Path
) -> None:
    config = parse_settings(["--config", str(tiny(tmp_path, corpus))]).config

    def fail(step: int, value: float) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("of the third step")

    log = tmp_path / "log.txt"
    failed = run_trial(config, tmp_path / "failed", log, fail, lambda key, value: None)
    assert (failed.state, failed.steps, failed.signalled) == ("failed", 3, True)

    def stop() -> None:
        ticks.append(0)
        if len(ticks) == 5:  # between two validations
            os.kill(os.getpid(), signal.SIGTERM)

    ticks: list[int] = []
    folder = tmp_path / "stopped"
    stopped = run_trial(config, folder, log, lambda step, value: False, lambda key, value: None, stop)
    assert (stopped.state, stopped.steps) == ("stopped", 5)
    pruned = run_trial(config, folder, log, lambda step, value: True, lambda key, value: None)
    assert (pruned.state, pruned.steps) == ("pruned", 5)


def test_bad_trials_are_pruned_and_equal_ones_taken_over(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "STARTUP", 1)
    arms = {"good": {"optimizer.embedding_lr": 0.3}, "bad": {"optimizer.embedding_lr": 1e-6}}
    path = tiny(tmp_path, corpus, space={"arms": arms}, sweep={"trials": 5, "repeat_seeds": 0})
    settings, slots = sweep(path, "--sampler", "random")
    for record in slots.values():
        good = record.params["arms"] == "good"
        assert record.state == (TrialState.COMPLETE if good else TrialState.PRUNED)
        assert record.user_attrs["steps"] == 0 if "same_as" in record.user_attrs else (12 if good else 3)
    assert sum("same_as" in r.user_attrs for r in slots.values()) == 3
    told = counts(settings, slots)
    assert told[0].endswith("; 15 steps, 38% fewer than without pruning")  # of 24
    assert told[1:] == ["3 of them had the settings of an earlier one and were not trained again"]
    assert {r.params["arms"] for r in slots.values()} == set(arms)
    assert (tmp_path / "study" / "trials" / "0000" / "checkpoints").is_dir()


def test_what_was_trained_of_a_trial_counts_although_an_equal_one_ended_before_it(
    tmp_path: Path, corpus: Path
) -> None:
    path = tiny(tmp_path, corpus, sweep={"trials": 2, "repeat_seeds": 0})
    settings = parse_settings(["--config", str(path)])
    settings.sweep.folder.mkdir()
    opened = open_studies(settings)
    with Pulse(opened[0], settings.sweep.folder) as pulse:
        own = Worker(settings, *opened, pulse)
        equals = [own.trials.claim(lambda slots: True, lambda slots: own.template({})) for _ in range(2)]
        first, equal = equals
        assert first is not None and equal is not None
        ticks: list[int] = []

        def stop() -> None:
            ticks.append(0)
            if len(ticks) == 5:
                os.kill(os.getpid(), signal.SIGTERM)

        stopped = Worker(settings, *opened, pulse, stop)
        with pytest.raises(KeyboardInterrupt):
            stopped.run(stopped.trials, equal)
        own.run(own.trials, first)
        own.work()
        ended = own.trials.slots()
    assert [record.user_attrs["steps"] for record in ended.values()] == [12, 12]
    assert ended[0].value == ended[1].value and "same_as" not in ended[1].user_attrs


def test_a_worker_whose_repeat_was_taken_over_leaves_its_checkpoints_to_the_next(
    tmp_path: Path, corpus: Path
) -> None:
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus))])
    settings.sweep.folder.mkdir()
    opened = open_studies(settings)
    with Pulse(opened[0], settings.sweep.folder) as pulse:
        left: list[Claim] = []  # of which another worker thinks that this one is dead

        def tick() -> None:
            for claim in left:
                own.repeats.release(claim.record, "its worker died")

        own = Worker(settings, *opened, pulse, tick)
        repeat = {"user_attrs": {"of": None, "seed": 1}}
        for kept in (True, False):
            claim = own.repeats.claim(lambda slots: not slots, lambda slots: repeat)
            assert claim is not None
            left[:] = [claim] if kept else []
            own.run(own.repeats, claim)
            at = settings.sweep.folder / "trials" / "repeat-0000" / "checkpoints"
            assert at.is_dir() == kept
        (record,) = own.repeats.slots().values()
        assert record.state == TrialState.COMPLETE and record.user_attrs["steps"] == 12


@pytest.mark.parametrize(
    ("budget", "equal"),
    [({}, True), ({"max_seconds": 9}, False), ({"max_steps": 0}, False), ({"max_epochs": 1}, True)],
)
def test_runs_by_the_clock_are_no_twins(
    tmp_path: Path, corpus: Path, budget: dict[str, int], equal: bool
) -> None:
    """Without any budget a run goes by the clock too."""
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus, **budget))])
    settings.sweep.folder.mkdir()
    opened = open_studies(settings)
    with Pulse(opened[0], settings.sweep.folder) as pulse:
        own, board = Worker(settings, *opened, pulse), Board(opened[0], pulse)
        first, other = (board.claim(lambda slots: True, lambda slots: {}) for _ in range(2))
        assert first is not None and other is not None
        assert own.twin(first, settings.config) is None
        own.record(board, first, Outcome("complete", values={"bits_per_byte": 1.0}))
        assert (own.twin(other, settings.config) is not None) == equal


@pytest.mark.parametrize("pruner", ["halving", "hyperband", "median"])
def test_the_pruner_decides_as_in_a_study_in_which_nobody_was_stopped(
    tmp_path: Path, corpus: Path, pruner: str
) -> None:
    """A trial that another attempt goes on with has two records, and competes once, in the same bracket."""
    draw, values = random.Random(5), {}
    for slot in range(24):
        values[slot] = [draw.random() for _ in range(4)]

    def decisions(stopped: int) -> list[int]:
        """Of each slot after how many validations it was pruned; 4: never."""
        path = tiny(tmp_path, corpus, sweep={"study": str(tmp_path / f"stopped{stopped}" / "study")})
        settings = parse_settings(["--config", str(path), "--pruner", pruner])
        settings.sweep.folder.mkdir(parents=True)
        study, _ = open_studies(settings)
        study.pruner, ended = studies.make_pruner(settings), []
        with Pulse(study, settings.sweep.folder) as pulse:
            board = Board(study, pulse)
            for slot in values:
                went_on = 0
                while True:
                    claim = board.claim(lambda slots, n=slot: len(slots) <= n, lambda slots: {})
                    assert claim is not None and claim.slot == slot
                    trial, pruned = optuna.trial.Trial(study, claim.record._trial_id), False
                    while not pruned and went_on < 4:
                        trial.report(values[slot][went_on], 3 * went_on + 3)
                        pruned, went_on = trial.should_prune(), went_on + 1
                        if went_on <= stopped:
                            break
                    if pruned or went_on == 4:
                        break
                    board.release(claim.record, "it was stopped")
                state = TrialState.PRUNED if pruned else TrialState.COMPLETE
                study._storage.set_trial_state_values(claim.record._trial_id, state, [values[slot][-1]])
                ended.append(went_on)
        return ended

    undisturbed = decisions(0)
    assert set(undisturbed) >= {1, 4}
    assert decisions(1) == decisions(3) == undisturbed


@pytest.mark.parametrize("pruner", ["halving", "hyperband"])
def test_rungs_are_where_trials_of_the_space_validate(tmp_path: Path, corpus: Path, pruner: str) -> None:
    """Here at each third step of at most 24, whatever the config itself would do without the space."""
    space, changes = {"max_steps": {"int": [12, 24]}}, {"validate_every": 0, "save_every": 3}
    path = tiny(tmp_path, corpus, space=space, max_steps=9000, **changes)
    settings = parse_settings(["--config", str(path), "--pruner", pruner])
    settings.sweep.folder.mkdir()
    study, _ = open_studies(settings)
    study.pruner = studies.make_pruner(settings)
    rungs: dict[int, set[int]] = {}
    for slot in range(20):
        attributes = {"slot": slot, "attempt": 0}
        study.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=attributes))
        trial = optuna.trial.Trial(study, study.trials[-1]._trial_id)
        for step in range(3, 25, 3):
            trial.report(1 - slot / 100, step)  # each is better than those before it
            assert not trial.should_prune()
            rungs.setdefault(step, set()).add(len(study.trials[-1].system_attrs))
    assert rungs[3] == ({1} if pruner == "halving" else {0, 1})
    assert rungs[24] == ({2} if pruner == "halving" else {1, 2})


@pytest.mark.parametrize("sampler", ["cmaes", "gp", "tpe"])
def test_samplers_ask_within_the_space(tmp_path: Path, corpus: Path, sampler: str) -> None:
    """Without training: each is asked after trials that were told, as many as it needs to model them."""
    space = {"head_lr": {"log": [1e-3, 1e-1]}, "model.n_layer": {"int": [1, 3]}}
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus, space=space)), "--sampler", sampler])
    settings.sweep.folder.mkdir()
    trials, _ = open_studies(settings)
    drawn = []
    for slot in range(9):
        trials.sampler = studies.make_sampler(settings, slot)
        trial = trials.ask()
        chosen = settings.space.draw({}, lambda p, t=trial: studies.suggest(t, p))
        assert all(p.holds(chosen[p.key]) for p in settings.space.parameters)
        trials.tell(trial, abs(chosen["optimizer.head_lr"] - 0.02))
        drawn.append(chosen["optimizer.head_lr"])
    assert len(set(drawn)) == 9


def test_several_objectives_have_a_front(tmp_path: Path, corpus: Path) -> None:
    space = {"model.n_layer": {"int": [1, 2]}}
    words = ("--objectives", "bits_per_byte,parameters,tokens_per_second", "--sampler", "grid")
    path = tiny(tmp_path, corpus, space=space, sweep={"repeat_seeds": 0})
    settings, slots = sweep(path, *words)
    assert len(slots) == 2
    (_, small, fast), (_, large, slow) = (slots[n].values for n in (0, 1))
    assert small < large and fast > 0 and slow > 0
    assert [d.name for d in open_studies(settings)[0].directions] == ["MINIMIZE", "MINIMIZE", "MAXIMIZE"]
    assert [r.user_attrs[VALIDATED] for r in slots.values()] == [12, 12]


def test_budgets_in_steps_and_seconds_are_never_exceeded(tmp_path: Path, corpus: Path) -> None:
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus)), "--steps", "50", "--trials", "0"])

    def record(slot: int, state: TrialState, steps: int = 0) -> optuna.trial.FrozenTrial:
        attributes = {"slot": slot, "attempt": 0, "steps": steps, "seconds": 10.0}
        value = 1.0 if state == TrialState.COMPLETE else None
        return optuna.trial.create_trial(state=state, value=value, user_attrs=attributes)

    slots = {0: record(0, TrialState.COMPLETE, 12), 1: record(1, TrialState.PRUNED, 3)}
    assert more_trials(settings, slots, 0.0, None)  # 15 + 12
    slots[2] = record(2, TrialState.RUNNING)
    assert more_trials(settings, slots, 0.0, None)  # 27 + 12
    slots[3] = record(3, TrialState.COMPLETE, 12)
    assert not more_trials(settings, slots, 0.0, None)  # 39 + 12
    slots[3] = record(3, TrialState.FAIL, 9)
    assert more_trials(settings, slots, 0.0, None)  # 36 + 12
    slots[3].user_attrs[KILLED] = True  # and may have taken all 12
    assert not more_trials(settings, slots, 0.0, None)
    slots[3] = record(3, TrialState.COMPLETE, 12)
    slots[3].user_attrs["same_as"], slots[3].user_attrs["seconds"] = 0, 0.0  # taken over in no time
    timed = parse_settings(["--config", str(tiny(tmp_path, corpus)), "--seconds", "100", "--trials", "0"])
    assert more_trials(timed, slots, 50.0, None)  # 10 for it, 40 for the repeats of two configs by two seeds
    assert not more_trials(timed, slots, 51.0, None)
    three = replace(timed, sweep=replace(timed.sweep, workers=3))
    assert more_trials(three, slots, 70.0, None)  # four repeats take three workers two turns
    assert not more_trials(three, slots, 71.0, None)


def test_a_grid_is_tried_whole_where_other_samplers_have_seen_enough(tmp_path: Path, corpus: Path) -> None:
    """A block of twenty settings that cannot be built stands in front of the rest of a grid."""
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus)), "--steps", "900", "--trials", "0"])
    made = {"attempt": 0, "steps": 12, "seconds": 1.0}
    slots = {
        0: optuna.trial.create_trial(state=TrialState.COMPLETE, value=1.0, user_attrs=made | {"slot": 0})
    }
    for slot in range(1, 21):
        attributes = {"slot": slot, "attempt": 0, "steps": 0, "seconds": 0.0}
        slots[slot] = optuna.trial.create_trial(state=TrialState.FAIL, user_attrs=attributes)
    assert more_trials(settings, slots, 0.0, 80)
    assert not more_trials(settings, slots, 0.0, None)
    del slots[20]
    assert more_trials(settings, slots, 0.0, None)


def test_a_grid_that_goes_on_after_another_sampler_is_tried_whole(tmp_path: Path, corpus: Path) -> None:
    space, few = {"model.dropout": [0.0, 0.2], "model.n_layer": [1, 2]}, {"trials": 0, "repeat_seeds": 0}
    path = tiny(tmp_path, corpus, space=space, max_steps=3, sweep=few)
    _, drawn = sweep(path, "--sampler", "random", "--trials", "2", "--sampler_seed", "4")
    assert drawn[1].params["model.dropout"] == 0.2  # beside the config itself, which is the first of a grid
    _, slots = sweep(path, "--sampler", "grid")
    assert len({tuple(sorted(r.params.items())) for r in slots.values()}) == len(slots) == 4


def test_a_budget_in_steps_holds_the_longest_trial_of_the_space(tmp_path: Path, corpus: Path) -> None:
    for space in ({"max_steps": {"int": [6, 24]}}, {"arms": {"a": {"max_steps": 6}, "b": {"max_steps": 24}}}):
        words = ["--config", str(tiny(tmp_path, corpus, space=space)), "--trials", "0", "--steps"]
        settings = parse_settings([*words, "40"])
        attributes = {"slot": 0, "attempt": 0, "steps": 17}
        slots = {0: optuna.trial.create_trial(state=TrialState.COMPLETE, value=1.0, user_attrs=attributes)}
        assert not more_trials(settings, slots, 0.0, None)  # 17 + 24
        assert more_trials(settings, slots | {0: replaced(slots[0], steps=16)}, 0.0, None)
        with pytest.raises(SystemExit):
            parse_settings([*words, "23"])


def test_a_budget_in_steps_holds_a_trial_whose_steps_do_not_vary(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sometimes = {"max_steps": {"int": [6, 24], "when": {"optimizer.name": "muon"}}}
    space = sometimes | {"optimizer.name": ["adamw", "muon"]}
    for own, sentence in ((1000, "--steps is 30, and one trial may take 1000"), (0, "needs max_steps")):
        path = tiny(tmp_path, corpus, space=space, max_steps=own)
        with pytest.raises(SystemExit):
            parse_settings(["--config", str(path), "--steps", "30"])
        assert sentence in capsys.readouterr().err


def test_a_budget_in_steps_ends_where_the_space_has_nothing_left(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "NOTHING_NEW", 4)
    space = {"model.dropout": [0.0, 0.2]}
    path = tiny(tmp_path, corpus, space=space, max_steps=3, sweep={"trials": 0, "repeat_seeds": 0})
    _, slots = sweep(path, "--steps", "10000", "--sampler", "random")
    trained = [slot for slot, record in slots.items() if record.user_attrs["steps"]]
    assert len(trained) == 2 and len(slots) == trained[-1] + 5
    by_trials = parse_settings(["--config", str(path), "--trials", "100"])
    assert more_trials(by_trials, slots, 0.0, None)  # which end by themselves
    monkeypatch.setattr(worker, "NOTHING_NEW", 5)
    assert more_trials(parse_settings(["--config", str(path), "--steps", "10000"]), slots, 0.0, None)


def replaced(record: optuna.trial.FrozenTrial, **attributes: Any) -> optuna.trial.FrozenTrial:
    return optuna.trial.create_trial(
        state=record.state, value=record.value, user_attrs=record.user_attrs | attributes
    )


def test_five_failures_and_nothing_else_end_a_sweep(tmp_path: Path, corpus: Path) -> None:
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus)), "--trials", "30"])
    slots = {
        n: optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={"slot": n, "attempt": 0})
        for n in range(5)
    }
    assert not more_trials(settings, slots, 0.0, None)
    del slots[4]
    assert more_trials(settings, slots, 0.0, None)


# --- the verdict -------------------------------------------------------------------------------------


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    a, b = [1.0, 1.2, 1.1, 1.4], [1.3, 1.4, 1.6, 1.5]
    found = {0: Repeated(0, dict(enumerate(a))), None: Repeated(None, dict(enumerate(b)))}
    (one,) = differences(found)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (one.low, one.high) == pytest.approx((expected.low, expected.high))
    assert one.mean == pytest.approx(statistics.fmean(a) - statistics.fmean(b))
    found[7] = Repeated(7, {0: 1.0, 1: 1.1, 5: 9.0})  # of seed 5 the config itself has none
    wide, other = differences(found)
    expected = stats.ttest_rel(a, b).confidence_interval(0.975)  # two comparisons
    assert (wide.low, wide.high) == pytest.approx((expected.low, expected.high))
    assert other.seeds == 2


def test_the_winner_is_best_by_the_seeds_that_all_have_and_failed_with_none(
    tmp_path: Path, corpus: Path
) -> None:
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus))])

    def again(of: int | None, seed: int, value: float | None) -> optuna.trial.FrozenTrial:
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        return optuna.trial.create_trial(state=state, value=value, user_attrs={"of": of, "seed": seed})

    repeats = [again(4, 1, 2.0), again(None, 1, 1.5), again(4, 2, 2.0), again(None, 2, 1.5), again(4, 3, 0.0)]
    assert winner(settings, {}, dict(enumerate(repeats))) is None  # whose third turn did not come
    repeats += [again(7, 1, 1.0), again(7, 2, None)]
    assert winner(settings, {}, dict(enumerate(repeats))) is None
    repeats += [again(8, 1, 1.0), again(8, 2, 1.0)]
    assert winner(settings, {}, dict(enumerate(repeats))) == 8


def test_one_with_few_seeds_does_not_decide_for_all_and_one_that_failed_again_never_wins(
    tmp_path: Path, corpus: Path
) -> None:
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus))])

    def again(found: dict[int | None, list[float | None]]) -> dict[int, optuna.trial.FrozenTrial]:
        whole = [(of, seed, v) for of, values in found.items() for seed, v in enumerate(values, 1)]
        return {
            place: optuna.trial.create_trial(
                state=TrialState.FAIL if value is None else TrialState.COMPLETE,
                value=value,
                user_attrs={"of": of, "seed": seed},
            )
            for place, (of, seed, value) in enumerate(whole)
        }

    own: list[float | None] = [1.0, 1.5, 1.5]
    assert verdict(settings, {0: optuna.trial.create_trial(value=1.0)}, again({4: [1.05], None: own}))[
        :2
    ] == [
        "trial 4: 1.0500 over one other seed (1.0500)",
        "the config itself: 1.3333 +- 0.2887 over 3 other seeds (1.0000, 1.5000, 1.5000)",
    ]
    assert winner(settings, {}, again({None: own, 4: [1.05, 1.0, 1.0], 9: [2.0]})) == 4
    assert winner(settings, {}, again({None: own, 4: [1.05, 1.0, 1.0], 9: [0.5]})) == 4
    assert winner(settings, {}, again({4: [1.0, 1.0], 9: [0.9, 1.2], 2: [0.5]})) == 4  # without the config

    def trial(rate: float, value: float) -> optuna.trial.FrozenTrial:
        chosen = {"optimizer.head_lr": rate, "model.dropout": 0.0}
        kinds = {p.key: studies.distribution(p) for p in settings.space.parameters}
        return optuna.trial.create_trial(params=chosen, distributions=kinds, value=value)

    slots = {0: trial(0.01, 1.0), 2: trial(0.02, 3.0), 4: trial(0.03, 0.5), 5: trial(0.03, 0.5)}
    assert winner(settings, slots, {}) == 4
    assert winner(settings, slots, again({4: [None]})) == 0  # and 5 has its settings
    assert winner(settings, slots, again({4: [None], None: [None]})) == 2
    (sentence,) = verdict(settings, slots, again({4: [None], None: [None]}))
    assert sentence.startswith("trial 2 has the best bits_per_byte of those that did not fail again; ")
    assert winner(settings, slots, again({None: own})) == 4  # whose first turn has not ended
    assert winner(settings, slots, again({None: own, 4: [None]})) is None
    del slots[2]
    assert winner(settings, slots, again({4: [None], None: [None]})) == 4  # nothing else is left


def test_a_repeat_that_was_stopped_did_not_fail(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus))])
    settings.sweep.folder.mkdir()
    kinds = {p.key: studies.distribution(p) for p in settings.space.parameters}
    slots = {
        slot: optuna.trial.create_trial(
            params={"optimizer.head_lr": rate, "model.dropout": 0.0}, distributions=kinds, value=rate
        )
        for slot, rate in enumerate((0.03, 0.02, 0.05))
    }
    repeat = {"of": 1, "seed": 1}
    for reason, best in (({"requeue": "it was stopped"}, 1), ({"reason": "memory is full"}, 0)):
        ended = optuna.trial.create_trial(state=TrialState.FAIL, user_attrs=repeat | reason)
        finish(settings, open_studies(settings), slots, {0: ended})
        assert f"\ntrial {best} has the best bits_per_byte" in capsys.readouterr().out
        found = yaml.safe_load((settings.sweep.folder / "best.yaml").read_text("utf-8"))
        assert found["optimizer"]["head_lr"] == slots[best].params["optimizer.head_lr"]


@pytest.mark.parametrize(
    ("objective", "first"), [("bits_per_byte", "trial 1"), ("tokens_per_second", "trial 0")]
)
def test_the_best_of_the_repeated_stands_first(
    tmp_path: Path, corpus: Path, objective: str, first: str
) -> None:
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus)), "--objectives", objective])
    values = {0: (3.0, 3.1, 3.2), None: (2.0, 2.1, 2.3), 1: (1.0, 1.1, 1.3)}
    repeats = [
        optuna.trial.create_trial(value=value, user_attrs={"of": of, "seed": seed})
        for of, own in values.items()
        for seed, value in enumerate(own, 1)
    ]
    slots = {n: optuna.trial.create_trial(value=values[n][0]) for n in (0, 1)}
    lines = verdict(settings, slots, dict(enumerate(repeats)))
    assert [line.split(":")[0] for line in lines[:2]] == [first, "the config itself"]
    assert [line.rpartition(": ")[2] for line in lines[3:]].count("better") == 1
    assert winner(settings, slots, dict(enumerate(repeats))) == int(first[-1])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.81614, "1.8161"),
        (0.0, "0.0000"),
        (-0.000053, "-5.3e-05"),
        (0.00051, "0.00051"),
        (960_512.0, "960,512"),
        (7_241_732_096.0, "7,241,732,096"),
        (1e30, "1e+30"),
    ],
)
def test_a_value_is_written_with_digits_that_say_something(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    "words",
    [
        ["--max_seconds", "60", "--model.n_layer", "2"],
        ["--base", "folder", "--config", str(RECIPES / "kotlin.yaml")],  # whose batch_size is 8
        ["--base", "folder", "--lora.r", "0", "--optimizer.name", "muon", "--optimizer.schedule", "wsd"],
    ],
)
def test_the_best_config_is_read_again_as_it_was(words: list[str], tmp_path: Path) -> None:
    config, path = parse_config(words), tmp_path / "best.yaml"
    path.write_text(yaml.safe_dump(best_yaml(config)), "utf-8")
    assert parse_config(["--config", str(path)]) == config


def test_settings_in_the_table_are_as_yaml_has_them() -> None:
    values = (None, True, (0.9, 0.95), "adamw", 0.0200001, 1e-5)
    assert [short(v) for v in values] == ["null", "true", "[0.9, 0.95]", "adamw", "0.02", "1e-05"]


def test_the_front_in_words_is_optunas(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--objectives", "bits_per_byte,parameters,tokens_per_second"]
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus)), *words])
    settings.sweep.folder.mkdir()
    opened = open_studies(settings)
    draw, kinds = random.Random(0), {p.key: studies.distribution(p) for p in settings.space.parameters}
    slots = {
        slot: optuna.trial.create_trial(
            values=[1 + draw.randrange(9) / 8, float(draw.randrange(2000, 2009)), float(draw.randrange(7))],
            params={"optimizer.head_lr": (slot + 1) / 1000, "model.dropout": 0.0},
            distributions=kinds,
            user_attrs={"slot": slot, "attempt": 0},
        )
        for slot in range(40)
    }
    told = optuna.create_study(directions=opened[0].directions)
    told.add_trials(list(slots.values()))
    expected = {trial.number for trial in told.best_trials}
    assert 2 < len(expected) < 40
    twin = {"values": slots[min(expected)].values, "user_attrs": {"slot": 41, "attempt": 0, "same_as": 0}}
    slots[41] = optuna.trial.create_trial(**twin)  # was not trained
    slots[42] = optuna.trial.create_trial(state=TrialState.FAIL)
    head, names, _, *lines = front(settings, slots)
    assert head.startswith(f"the front, {len(expected)} of 40 trials: ")
    assert names.split()[:8] == ["trial", "bits", "per", "byte", "parameters", "tokens", "per", "second"]
    assert {int(line.split()[0]) for line in lines} == expected
    assert [line.split()[1] for line in lines] == sorted(line.split()[1] for line in lines)
    finish(settings, opened, slots, {})
    assert "\n".join([head, names]) in capsys.readouterr().out
    assert head in (settings.sweep.folder / "report.html").read_text("utf-8")
    one = parse_settings(["--config", str(tiny(tmp_path, corpus))])
    assert front(one, {0: optuna.trial.create_trial(value=1.0)}) == []


def test_a_sweep_that_trained_nothing_names_no_best(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus))])
    settings.sweep.folder.mkdir()
    failed = optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={"reason": "memory is full"})
    finish(settings, open_studies(settings), {0: failed}, {})
    output = capsys.readouterr().out
    assert "no trial was trained to its end" in output and "best config" not in output
    assert not (settings.sweep.folder / "best.yaml").exists()
    assert (settings.sweep.folder / "report.html").exists()


def test_names_in_what_is_written_are_text_and_every_picture_is_drawn(tmp_path: Path, corpus: Path) -> None:
    name = "<script>alert('&')</script>"
    space = {
        "arms": {name: {"model.n_layer": 1}, "b": {"model.n_layer": 2}},
        "head_lr": {"log": [1e-3, 1e-1]},
    }
    study = str(tmp_path / "<img src=x>\nseed: 7 #")
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus, space=space, sweep={"study": study}))])
    settings.sweep.folder.mkdir()
    distributions = {p.key: studies.distribution(p) for p in settings.space.parameters}
    slots = {
        slot: optuna.trial.create_trial(
            value=3 - slot / 20,
            params={"arms": (name, "b")[slot % 2], "optimizer.head_lr": (slot + 1) / 490},
            distributions=distributions,
            user_attrs={"slot": slot, "attempt": 0},
            intermediate_values={3: 2.5, 6: 2.2},
        )
        for slot in range(48)
    }
    finish(settings, open_studies(settings), slots, {})
    drawn = {path.stem for path in (settings.sweep.folder / "pictures").iterdir()}
    assert drawn == {"history", "parallel", "slices", "importances", "intermediate"}
    heights = [int.from_bytes(p.read_bytes()[20:24]) for p in (settings.sweep.folder / "pictures").iterdir()]
    assert max(heights) < 800  # not all 48 stand in a legend
    assert "seed" not in yaml.safe_load((settings.sweep.folder / "best.yaml").read_text("utf-8"))
    page = (settings.sweep.folder / "report.html").read_text("utf-8")
    assert "<script" not in page and "<img src" not in page
    assert page.count("&lt;script&gt;") == 5 and "<title>&lt;img src=x&gt;\n" in page


# --- kills -------------------------------------------------------------------------------------------


def test_killed_workers_trials_end_as_in_a_study_that_nobody_killed(tmp_path: Path, corpus: Path) -> None:
    words = ("--sampler", "random", "--pruner", "none", "--trials", "2", "--repeat_seeds", "0")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        tiny(folder, corpus, max_steps=24)
    _, expected = sweep(whole / "tiny.yaml", *words)
    for step in (3, 12):  # once before the middle, once after it
        child = os.fork()
        if not child:
            sweep(killed / "tiny.yaml", *words)
            os._exit(0)
        at = killed / "study" / "trials" / "0000" / "checkpoints"
        wait_for(lambda: any(int(p.name[5:]) >= step for p in at.glob("step-*")))  # noqa: B023
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    _, found = sweep(killed / "tiny.yaml", *words)
    assert {s: (r.params, r.value) for s, r in found.items()} == {
        s: (r.params, r.value) for s, r in expected.items()
    }
    assert (
        found[0].user_attrs["attempt"] == 2
        and found[0].intermediate_values == expected[0].intermediate_values
    )
    assert "resumed from" in (killed / "study" / "logs" / "0000.txt").read_text("utf-8")


def test_a_stop_between_two_parameters_changes_none(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the first one kept, the next would be drawn by the random number that the first was drawn by."""
    space = {"optimizer.beta1": {"float": [0.1, 0.9]}, "optimizer.beta2": {"float": [0.1, 0.9]}}
    right, drawn = worker.suggest, []

    def interrupted(trial: optuna.trial.Trial, parameter: Any) -> Any:
        if parameter.key == "optimizer.beta2" and not drawn:
            drawn.append(trial.params)
            raise KeyboardInterrupt
        return right(trial, parameter)

    found = []
    for name in ("whole", "stopped"):
        own = {"trials": 2, "repeat_seeds": 0, "sampler": "random", "study": str(tmp_path / name)}
        path = tiny(tmp_path, corpus, space=space, max_steps=3, sweep=own)
        if name == "stopped":
            monkeypatch.setattr(worker, "suggest", interrupted)
            with pytest.raises(KeyboardInterrupt):
                sweep(path)
        _, slots = sweep(path)
        found.append([record.params for record in slots.values()])
    assert list(drawn[0]) == ["optimizer.beta1"] and found[0] == found[1]


@pytest.mark.slow
def test_fifty_kills_at_random_instants_lose_nothing(tmp_path: Path, corpus: Path) -> None:
    """Each slot ends once, with the parameters and the value that it has in a study that nobody killed.

    Studies are kept in PLUMB_STORAGE, the URL of a database, or in journals where it is not set.
    """
    url, mark = os.environ.get("PLUMB_STORAGE", ""), uuid.uuid4().hex[:8]
    options = ("--sampler", "random", "--pruner", "none", "--trials", "8", "--deaths", "1000")
    whole = tmp_path / "whole"
    whole.mkdir()
    tiny(whole, corpus, max_steps=40)
    assert run("--config", whole / "tiny.yaml", *options, cwd=whole).returncode == 0
    draw = random.Random(int(os.environ.get("PLUMB_SEED", "0")))
    wanted, kills, of_command, starts, ended = int(os.environ.get("PLUMB_KILLS", "50")), 0, 0, 0, 0
    while kills < wanted:  # a fast machine ends a study before as many have come
        killed = tmp_path / f"killed-{ended}"
        killed.mkdir()
        words = command("--config", tiny(killed, corpus, max_steps=40), *options, "--workers", "2")
        study = "study"
        if url:  # whose names are not of this folder alone
            study = f"study-{mark}-{ended}"
            words += ["--storage", url, "--study", str(killed / study)]
        while True:
            process = subprocess.Popen(
                words, cwd=killed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            starts += 1
            while process.poll() is None and kills < wanted:
                time.sleep(draw.uniform(0.2, 3.0))
                victims = workers_of(process.pid)
                if not victims:
                    continue
                if draw.random() < 0.1:
                    process.kill()
                    of_command += 1
                else:
                    os.kill(draw.choice(victims), signal.SIGKILL)
                kills += 1
            output, _ = process.communicate(timeout=900)
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, output
        for kind in ("", "-repeats"):
            found = records(killed, study + kind, url)
            assert results(killed, study + kind, url) == results(whole, "study" + kind)
            assert all(r.state.is_finished() for r in found)
            assert all(is_done(record) for record in slots_of(found).values())
        assert list(results(killed, study, url)) == list(range(8))
        ended += 1
    print(f"{kills} kills, {of_command} of them of the command itself; {starts} starts of {ended} studies")
