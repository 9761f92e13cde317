"""Sweeps through the real command line and by workers that are killed."""

from __future__ import annotations

import multiprocessing
import os
import pty
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands
import optuna
import pytest
import yaml
from optuna.trial import TrialState
from sweeping import command, forked_workers, records, results, run, sweep, tiny, wait_for, workers_of

from config import parse_config
from sweeps import worker
from sweeps.board import Board, Pulse, alone, is_done, is_open, slots_of
from sweeps.command import Crew
from sweeps.settings import SweepSettings, parse_settings
from sweeps.study import open_studies, refuse_other_data
from sweeps.worker import STOPPED
from training.begin import train

pytestmark = pytest.mark.usefixtures("unguarded")

__all__ = ["forked_workers"]  # a fixture, which pytest finds here by its name


@pytest.fixture(autouse=True)
def handlers_restored() -> Iterator[None]:
    """A crew takes this process's signals."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# --- the real command line ---------------------------------------------------------------------------


def test_a_sweep_from_the_command_to_the_best_config_and_once_more(tmp_path: Path, corpus: Path) -> None:
    # What an option of its address is called, sqlite does not care.
    url = f"sqlite:///file:{tmp_path / 's.db'}?uri=true&password=secret"
    path = tiny(tmp_path, corpus, sweep={"trials": 2})
    done = run("--config", path, "--storage", url, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    study = tmp_path / "study"
    for part in ("trial 0: bits_per_byte", "2 trials: 2 complete", "the config itself: ", " interval ["):
        assert part in done.stdout
    assert results(tmp_path, url=url)[0][0] == {
        "optimizer.head_lr": 0.01,
        "model.dropout": 0.0,
    }  # the config itself
    assert [r.user_attrs["seed"] for r in records(tmp_path, "study-repeats", url)] == [1, 1, 2, 2]
    page = (study / "report.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == len(list((study / "pictures").glob("*.png"))) >= 4
    assert "2 trials: 2 complete" in page and "http" not in page
    assert len(list((study / "tensorboard").glob("*/events*"))) == 2
    assert not done.stderr or "Traceback" not in done.stderr
    assert "secret" not in done.stdout + done.stderr
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 30 and not [file for file in files if b"secret" in file.read_bytes()]

    best = parse_config(["--config", str(study / "best.yaml")])
    of = yaml.safe_load((study / "best.yaml").read_text("utf-8"))
    assert best.train.max_steps == 0 and of["data"]["source"] == str(corpus)
    assert "tried for max_steps 12.\n" in (study / "best.yaml").read_text("utf-8")
    assert "sweep over 2 settings with" in done.stderr + done.stdout
    words = ["--config", str(study / "best.yaml"), "--max_steps", "2", "--run", str(tmp_path / "again")]
    assert train(parse_config(words)).state.step == 2

    before = (tmp_path / "s.db").read_bytes()
    other = tmp_path / "other.yaml"
    other.write_text(path.read_text("utf-8").replace("1e-3", "1e-4"), "utf-8")
    refused = commands.command("hyperparam_tune.py", "--config", other, "--storage", url, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert (
        "another space: optimizer.head_lr was {log: [0.001, 0.1]} and is {log: [0.0001, 0.1]} now"
        in refused.stderr
    )
    assert (tmp_path / "s.db").read_bytes() == before and "secret" not in refused.stderr

    words = ("--config", path, "--storage", f"sqlite:///{tmp_path}/new.db")
    refused = commands.command("hyperparam_tune.py", *words, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "study/trials holds runs, and the study study in this storage has no trials" in refused.stderr

    (corpus / "part0.py").write_text("print('another file')\n", "utf-8")
    refused = commands.command("hyperparam_tune.py", "--config", path, "--storage", url, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "the study study has other data: its fingerprint was" in refused.stderr
    assert (tmp_path / "s.db").read_bytes() == before and "secret" not in refused.stderr

    study.rename(tmp_path / "moved")  # Its storage tells of a study of another name.
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
    with alone(study, ".finish"):  # Another command has it.
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
    os.close(terminal)  # The kernel then hangs up.
    time.sleep(0.03)
    os.kill(child, signal.SIGHUP)  # So does a shell.
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == STOPPED
    ended, slot = slots_of(records(tmp_path)).values()
    assert is_done(ended) and slot.user_attrs["requeue"] == "it was stopped"
    assert all((tmp_path / "study" / name).is_file() for name in ("best.yaml", "report.html"))


def test_a_reader_that_went_away_and_a_terminal_that_nohup_waives_stop_nothing(
    tmp_path: Path, corpus: Path
) -> None:
    process = subprocess.Popen(
        ["nohup", *command("--config", tiny(tmp_path, corpus), "--trials", "2", "--repeat_seeds", "0")],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline().startswith(
        "sweep over 2 settings with 1 worker, 2 trials"
    )
    wait_for(lambda: any((tmp_path / "study" / "trials").glob("0001")))
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.stderr is not None and process.stderr.read() == ""
    assert process.wait(300) == 0
    assert [r.state for r in records(tmp_path)] == [TrialState.COMPLETE] * 2
    assert (tmp_path / "study" / "report.html").is_file()


@pytest.mark.usefixtures("forked_workers")
def test_workers_that_all_end_with_an_error_tell_it_once(tmp_path: Path, corpus: Path) -> None:
    path = tiny(tmp_path, corpus, sweep={"workers": 2})
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "logs").touch()  # A folder must be there.
    done = commands.command("hyperparam_tune.py", "--config", path, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "study/logs cannot be used (" in done.stderr
    assert all(is_open(record) for record in slots_of(records(tmp_path)).values())  # nothing is lost


class StoppedWhileItIsTold:
    """A pipe's end to which a worker tells its error, and the signal to stop comes just then."""

    def send(self, sentence: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.usefixtures("forked_workers")
def test_a_worker_that_is_stopped_while_it_tells_its_error_ends_as_one_that_was_stopped(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus))])
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "logs").touch()  # A folder must be there.
    context = multiprocessing.get_context("spawn")
    process = context.Process(
        target=worker.start, args=(settings, "", StoppedWhileItIsTold(), "name", context.RawValue("Q"))
    )
    process.start()
    process.join()
    assert process.exitcode == STOPPED and capfd.readouterr().err == ""


def silent(*_: Any) -> None:
    os._exit(2)


@pytest.mark.usefixtures("forked_workers")
def test_a_worker_that_ends_without_a_word_is_told_of(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweeps.command.start", silent)
    crew = Crew(parse_settings(["--config", str(tiny(tmp_path, corpus))]), "")
    crew.members[0].process.join()
    assert crew.look() == 2 and crew.sentence == "a worker ended with exit code 2 and did not say why"


def ends_as_another_is_stopped(settings: SweepSettings, *_: Any) -> None:
    try:
        (settings.sweep.folder / "first").mkdir(parents=True)
    except FileExistsError:
        os._exit(STOPPED)
    os._exit(0)


def test_a_study_is_at_its_end_where_one_worker_says_so_and_a_signal_twice_at_once_is_one(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweeps.command.start", ends_as_another_is_stopped)
    crew = Crew(parse_settings(["--config", str(tiny(tmp_path, corpus)), "--workers", "2"]), "")
    for member in crew.members:
        member.process.join()
    assert sorted(member.process.exitcode for member in crew.members) == [0, STOPPED]
    assert crew.look() == 0
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGHUP)  # A terminal that is closed sends it twice.
    assert crew.stop_requests == 1
    crew.begin(1)  # This worker had begun when the signal came.
    crew.members[1].process.join()
    assert len(crew.members) == 2 and crew.members[1].process.exitcode == -signal.SIGTERM
    os.kill(os.getpid(), signal.SIGINT)
    assert crew.stop_requests == 2


def tells_its_gpu(settings: SweepSettings, fingerprint: str, mouth: Any, name: str, ticks: Any) -> None:
    mouth.send(os.environ["CUDA_VISIBLE_DEVICES"])


@pytest.mark.usefixtures("forked_workers")
def test_workers_share_out_the_gpus_that_their_command_may_see(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweeps.command.start", tells_its_gpu)
    for device, gpus in (("auto", ["3", "5", "3"]), ("cuda:1", ["3,5"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
        words = ["--config", str(tiny(tmp_path, corpus)), "--workers", str(len(gpus)), "--device", device]
        crew = Crew(parse_settings(words), "")
        assert [member.ear.recv() for member in crew.members] == gpus


def stands_still(settings: SweepSettings, fingerprint: str, mouth: Any, name: str, ticks: Any) -> None:
    """A worker that has a slot, and is busy until a file says that it is to stop as by SIGSTOP."""
    trials, _ = open_studies(settings)
    with Pulse(trials, settings.sweep.folder, name) as pulse:
        ticks.value += 1
        Board(trials, pulse).claim(lambda slots: not slots, lambda slots: {})
        while not (settings.sweep.folder / "stop").exists():
            ticks.value += 1
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.usefixtures("forked_workers")
def test_a_worker_that_hangs_is_killed_and_its_trial_failed(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweeps.command.start", stands_still)
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


@pytest.mark.usefixtures("forked_workers")
def test_a_worker_that_finds_other_data_than_its_command_says_so(tmp_path: Path, corpus: Path) -> None:
    """Two first commands may both have found a study without any; the last one to say whose it is has it."""
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus))])
    settings.sweep.folder.mkdir()
    trials, _ = open_studies(settings)
    refuse_other_data(trials, "of one")
    trials.set_user_attr("data", "of another")  # So does one that had looked before the line above.
    crew = Crew(settings, "of one")
    crew.members[0].process.join()
    assert crew.look() == 2 and "has other data: its fingerprint was of another and is" in crew.sentence
    assert not trials.get_trials()


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
    journal = tmp_path / "study" / "journal.log"  # The journal of the proxy.
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


# --- kills -------------------------------------------------------------------------------------------


def test_killed_workers_trials_end_as_in_a_study_that_nobody_killed(tmp_path: Path, corpus: Path) -> None:
    words = ("--sampler", "random", "--pruner", "none", "--trials", "2", "--repeat_seeds", "0")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        tiny(folder, corpus, max_steps=24)
    _, expected = sweep(whole / "tiny.yaml", *words)
    for step in (3, 12):  # once before the middle, once after it
        child = commands.forked(lambda: sweep(killed / "tiny.yaml", *words), tmp_path / "told")
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
    """If the first one were kept, the second would be sampled by the random number of the first."""
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
        if url:  # Names in a server are not of this folder alone.
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
