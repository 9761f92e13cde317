"""Killed and resumed equals never killed: the proof itself, and kills and signals at every instant.

Children are forked from this process, with one thread of torch: a fork with its threads alive would hang.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import exit_code, forked
from safetensors.torch import load_file, save_file

from config import Config, DataConfig, ModelConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from config.files import REPOSITORY
from modules import tensorfiles
from selftest.prove_resume import (
    OF_TIME,
    logged_numbers,
    prove_resume,
    run_difference,
    saved_state,
    state_digest,
)
from training import checkpoint, loop, signals
from training.begin import train
from training.checkpoint import checkpoints, first_difference
from training.loop import TrainingManager
from training.signals import RESUMABLE
from trainingmanager import main

pytestmark = pytest.mark.usefixtures("unguarded")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Config:
    """Six steps with dropout, a checkpoint after each, of which some are removed again."""
    return Config(
        data=DataConfig(
            source=str(corpus), validation_one_in=4, test_one_in=4, cache=str(tmp_path / "cache"), workers=1
        ),
        tokenizer=TokenizerConfig(vocab_size=300, min_count=2),
        model=ModelConfig(block_size=32, n_layer=1, n_head=2, n_embd=16, dropout=0.1),
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(
            run=str(tmp_path / "run"), max_steps=6, batch_size=4, validation_rows=4, validate_every=2,
            save_every=1, keep=2, log_every=1,
        ),
    )  # fmt: skip


def adapted(config: Config, **train: Any) -> Config:
    return replace(config, train=replace(config.train, **train))


@pytest.fixture
def one_thread(config: Config, tmp_path: Path) -> Iterator[None]:
    """Give torch one thread, and import what a run imports late, which would cost each child a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    train(adapted(config, run=str(tmp_path / "first"), max_steps=1))
    yield
    torch.set_num_threads(before)


# --- kill -9 -----------------------------------------------------------------------------------------


def train_and_die(config: Config, die_at: int, cut: float, counts: Path) -> None:
    """Train, and be killed at call number `die_at` to the disk from inside a save or a removal.

    A tensor file that is being written is then cut at a share `cut` of its length. Below 1 nothing is killed,
    and `counts` receives the calls of the first save and of all.
    """
    calls, first, inside = 0, 0, 0

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += bool(inside)
            if inside and calls == die_at:
                if function is save_file:
                    save_file(*arguments, **options)
                    os.truncate(arguments[1], int(cut * os.path.getsize(arguments[1])))
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    def watched(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal inside, first
            inside += 1
            try:
                return function(*arguments)
            finally:
                inside -= 1
                first = first or calls

        return call

    for where, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")):
        setattr(where, name, counted(getattr(where, name)))
    tensorfiles.save_file = counted(save_file)
    loop.save_checkpoint = watched(loop.save_checkpoint)
    loop.remove_superseded = watched(loop.remove_superseded)
    train(config)
    counts.write_text(json.dumps([first, calls]))


def kills(config: Config, folder: Path, trials: int) -> None:
    """Each trial kills a run, every second one inside a save, resumes it, and compares it to one unkilled."""
    log, counts, draw = folder / "log", folder / "counts", random.Random(trials)
    whole = adapted(config, run=str(folder / "whole"))
    assert exit_code(forked(lambda: train_and_die(whole, 0, 0.0, counts), log)) == 0, log.read_text()
    first, calls = json.loads(counts.read_text())
    digest = state_digest(saved_state(checkpoints(folder / "whole" / "checkpoints")[-1]))
    times: list[float] = []
    done = 0
    while done < trials:
        run = folder / f"run-{done}"
        shutil.rmtree(run, ignore_errors=True)
        here = adapted(config, run=str(run))
        if done % 2:
            at, cut = draw.randint(first + 1, calls), draw.random()
            code = exit_code(forked(lambda h=here, a=at, c=cut: train_and_die(h, a, c, counts), log))
        else:
            code = killed_at_random(here, log, draw, times)
        if code == 0:  # it was at its end before it was killed
            continue
        assert code == -signal.SIGKILL, log.read_text()[-3000:]
        log.unlink()
        resumed = adapted(here, resume=True)
        code = exit_code(forked(lambda r=resumed: train(r), log))
        text = log.read_text()
        if code and "the budget" in text and "used up" in text:  # killed after the last checkpoint was there
            code = 0
        assert code == 0 and "passed over" not in text, (done, text[-3000:])
        assert run_difference(folder / "whole", run) is None, done
        assert state_digest(saved_state(checkpoints(run / "checkpoints")[-1])) == digest, done
        shutil.rmtree(run)
        done += 1


def killed_at_random(config: Config, log: Path, draw: random.Random, times: list[float]) -> int:
    """Exit code of a run that is killed at a random instant after its first checkpoint."""
    child = forked(lambda: train(config), log)
    first = Path(config.train.run, "checkpoints", "step-00000001")
    while not first.exists():
        time.sleep(0.0005)
        assert os.waitpid(child, os.WNOHANG) == (0, 0), log.read_text()[-3000:]
    started = time.perf_counter()
    if not times:  # the first one only measures how long the rest of a run takes
        code = exit_code(child)
        times.append(time.perf_counter() - started)
        return code
    time.sleep(draw.random() * times[0])
    os.kill(child, signal.SIGKILL)
    return exit_code(child)


def test_killed_runs_resume_to_the_same_end(config: Config, tmp_path: Path, one_thread: None) -> None:
    kills(config, tmp_path, 4)


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_end_200_of_200(
    config: Config, tmp_path: Path, one_thread: None
) -> None:
    kills(config, tmp_path, 200)


# --- signals -----------------------------------------------------------------------------------------


def signalled(config: Config, place: str, step: int, numbers: list[int], counts: Path) -> None:
    """The command, which receives `numbers` in a step, in a validation or inside the save of one."""
    updates, saves, sent = 0, 0, [0, 0]
    factor, save, fit = loop.learning_rate_factor, loop.save_checkpoint, loop.TrainingManager.fit

    def receive(here: str) -> None:
        nonlocal sent
        if here == place and updates >= step and numbers:
            sent = [updates, saves]
            while numbers:
                os.kill(os.getpid(), numbers.pop(0))

    def in_a_step(*arguments: Any) -> float:
        nonlocal updates
        updates += 1
        receive("step")
        return factor(*arguments)

    def saving(*arguments: Any) -> Any:
        nonlocal saves
        saves += 1
        return save(*arguments)

    def hooked(function: Any, here: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            receive(here)
            return function(*arguments, **options)

        return call

    def fitting(*arguments: Any, **options: Any) -> None:
        loop.learning_rate_factor = in_a_step  # A guard has rehearsed updates by now.
        fit(*arguments, **options)

    loop.TrainingManager.fit = fitting
    loop.save_checkpoint = saving
    loop.sums_of_batches = hooked(loop.sums_of_batches, "validation")
    tensorfiles.save_file = hooked(save_file, "save")
    try:
        main(config)
    finally:
        counts.write_text(json.dumps([updates - sent[0], saves - sent[1]]))


def stops(config: Config, folder: Path, trials: int) -> None:
    log, counts, draw = folder / "log", folder / "counts", random.Random(trials)
    for trial in range(trials):
        run, place = folder / f"run-{trial}", ("step", "validation", "save")[trial % 3]
        number, step = SIGNALS[trial // 3 % 4], draw.randint(2, 5)
        # In half of the trials the step at which the signal comes has no validation of its own.
        every = draw.choice([1, 2]) if place == "step" else 1
        here = adapted(config, run=str(run), max_steps=1000, validate_every=every, save_every=0, keep=0)
        code = exit_code(
            forked(lambda h=here, p=place, s=step, n=number: signalled(h, p, s, [n], counts), log)
        )
        text = log.read_text()
        assert code == RESUMABLE, (trial, text[-3000:])
        assert text.count(f"{signal.Signals(number).name}: finishing the step") == 1
        updates, saves = json.loads(counts.read_text())
        assert updates == 0 and saves <= 1, (trial, updates, saves)
        last = checkpoints(run / "checkpoints")[-1]
        assert last.step >= step and not list(run.glob("checkpoints/.*"))
        assert (last.loss is None) == (last.step % every != 0)
        shutil.rmtree(run)
        log.unlink()


def test_a_signal_ends_a_run_within_a_step_and_a_save(
    config: Config, tmp_path: Path, one_thread: None
) -> None:
    stops(config, tmp_path, 6)


@pytest.mark.slow
def test_a_signal_ends_a_run_within_a_step_and_a_save_60_of_60(
    config: Config, tmp_path: Path, one_thread: None
) -> None:
    stops(config, tmp_path, 60)


@pytest.mark.parametrize(
    "place",
    [
        pytest.param("step", marks=pytest.mark.slow),
        pytest.param("validation", marks=pytest.mark.slow),
        "save",
    ],
)
def test_a_second_signal_ends_a_run_at_once(
    config: Config, tmp_path: Path, one_thread: None, place: str
) -> None:
    """The step under way is not saved; what was saved before stays."""
    here = adapted(config, max_steps=1000, validate_every=1, save_every=0, keep=0)
    numbers: list[int] = [signal.SIGUSR1, signal.SIGTERM]
    code = exit_code(
        forked(lambda: signalled(here, place, 3, numbers, tmp_path / "counts"), tmp_path / "log")
    )
    assert code == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
    assert [m.step for m in checkpoints(tmp_path / "run" / "checkpoints")][-1] == 2
    resumed = adapted(here, max_steps=4, resume=True)
    assert exit_code(forked(lambda: train(resumed), tmp_path / "log")) == 0, (tmp_path / "log").read_text()


def test_a_signal_that_is_sent_twice_over_is_one(config: Config, tmp_path: Path, one_thread: None) -> None:
    """A closed terminal sends it so; a person's second signal comes later, and ends the run."""
    for number in SIGNALS:
        here = adapted(config, run=str(tmp_path / number.name), max_steps=1000)
        twice = [int(number)] * 2
        code = exit_code(
            forked(lambda h=here, n=twice: signalled(h, "step", 3, n, tmp_path / "counts"), tmp_path / "log")
        )
        assert code == RESUMABLE, (tmp_path / "log").read_text()
        assert checkpoints(tmp_path / number.name / "checkpoints")[-1].step == 3


def test_the_same_signal_later_is_a_second_one(
    config: Config, tmp_path: Path, one_thread: None, monkeypatch: Any
) -> None:
    monkeypatch.setattr(signals, "SAME_SIGNAL", 0.0)
    here, twice = adapted(config, max_steps=1000), [int(signal.SIGINT)] * 2
    code = exit_code(forked(lambda: signalled(here, "save", 3, twice, tmp_path / "counts"), tmp_path / "log"))
    assert code == 128 + signal.SIGINT, (tmp_path / "log").read_text()


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    config: Config, tmp_path: Path, one_thread: None
) -> None:
    """It stops in a step without a validation: one that only it had would count for its patience."""
    here = adapted(config, validate_every=4, save_every=0, keep=0)
    whole = adapted(here, run=str(tmp_path / "whole"))
    assert exit_code(forked(lambda: train(whole), tmp_path / "log")) == 0
    stop = [int(signal.SIGTERM)]
    code = exit_code(forked(lambda: signalled(here, "step", 3, stop, tmp_path / "counts"), tmp_path / "log"))
    assert code == RESUMABLE, (tmp_path / "log").read_text()
    assert exit_code(forked(lambda: train(adapted(here, resume=True)), tmp_path / "log")) == 0
    assert run_difference(tmp_path / "whole", tmp_path / "run") is None


# --- the comparison ----------------------------------------------------------------------------------


def rewritten(
    run: Path, step: int, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]
) -> None:
    """Save the checkpoint of `step` again, with another state or other weights."""
    (manifest,) = (m for m in checkpoints(run / "checkpoints") if m.step == step)
    state, weights = checkpoint.load_state(manifest), load_file(manifest.folder / "model.safetensors")
    change(state, weights)
    model = torch.nn.Module()
    for name, tensor in weights.items():
        model.register_buffer(name.replace(".", "|"), tensor)
    model.state_dict = lambda **_: weights  # type: ignore[method-assign]
    checkpoint.save_checkpoint(run / "checkpoints", step, model, state, manifest.loss, manifest.keep)


def test_the_first_step_and_item_that_differ_are_named(config: Config, tmp_path: Path) -> None:
    config = adapted(config, keep=0)
    train(config)
    a, b = Path(config.train.run), tmp_path / "b"

    def difference(change: Callable[[], None]) -> tuple[int, str] | None:
        shutil.rmtree(b, ignore_errors=True)
        shutil.copytree(a, b)
        change()
        return run_difference(a, b)

    def log(old: str, new: str) -> Callable[[], None]:
        def change() -> None:
            text = (b / "metrics.jsonl").read_text()
            assert old in text
            (b / "metrics.jsonl").write_text(text.replace(old, new))

        return change

    def twice(values: dict[str, Any], key: Any) -> None:
        values[key] = values[key] * 2

    def saved(step: int, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Any:
        return lambda: rewritten(b, step, change)

    assert difference(lambda: None) is None
    rows = [json.loads(line) for line in (a / "metrics.jsonl").read_text().splitlines()]
    rate = next(row for row in rows if row["step"] == 4 and "train/loss" in row)
    seconds = rate["train/tokens_per_second"]
    assert difference(log(repr(seconds), "1.0")) is None  # it measures time
    assert difference(saved(4, lambda state, _: twice(state["run"], "seconds"))) is None
    norm = rate["train/grad_norm"]
    assert difference(log(repr(norm), repr(math.nextafter(norm, math.inf)))) == (4, "train/grad_norm")
    assert difference(log(repr(norm), "NaN")) == (4, "train/grad_norm")
    assert difference(log('"step": 2, "eval/loss"', '"step": 2, "eval/lost"')) == (2, "eval/loss")
    for path, change in {
        "weights/embed.weight": lambda state, weights: weights["embed.weight"][0, 0].mul_(1 + 2**-22),
        "run/tokens": lambda state, weights: twice(state["run"], "tokens"),
        "run/skipped_in_a_row": lambda state, weights: state["run"].update(skipped_in_a_row=1),
        "optimizers/0/state/0/momentum": lambda state, weights: twice(
            state["optimizers"][0]["state"][0], "momentum"
        ),
        "optimizers/1/param_groups/0/lr": lambda state, weights: twice(
            state["optimizers"][1]["param_groups"][0], "lr"
        ),
        "random/torch": lambda state, weights: state["random"]["torch"][-1].add_(1),
        "random/python/1": lambda state, weights: state["random"]["python"][1][5].add_(1),
        "random/numpy/state/pos": lambda state, weights: state["random"]["numpy"]["state"].update(pos=3),
        "epoch": lambda state, weights: twice(state, "epoch"),
        "fingerprints/data": lambda state, weights: twice(state["fingerprints"], "data"),
    }.items():
        assert difference(saved(5, change)) == (5, path)
    assert difference(lambda: shutil.rmtree(b / "checkpoints" / "step-00000006")) == (
        5,
        "the last checkpoint",
    )
    assert difference(lambda: shutil.rmtree(b / "checkpoints")) == (0, "the last checkpoint")


def test_a_digest_is_equal_where_no_difference_is_and_only_there() -> None:
    states: list[Any] = [
        {"a": 1}, {"a": 1.0}, {"a": True}, {"b": 1}, {"a": [1]}, {"a": [1, 1]}, {"a": [[1], 1]}, {"a": "1"},
        {"a": torch.ones(2)}, {"a": torch.ones(1, 2)}, {"a": torch.ones(2).double()}, {"a": -torch.zeros(1)},
        {"a": torch.zeros(1)}, {"a": torch.tensor(True)}, {}, None,
    ]  # fmt: skip
    for i, a in enumerate(states):
        for j, b in enumerate(states):
            equal = first_difference(a, b, "x") is None
            assert equal == (i == j) == (state_digest(a) == state_digest(b)), (a, b)


def test_the_log_is_read_without_its_times(config: Config) -> None:
    manager: TrainingManager = train(config)
    numbers = logged_numbers(manager.folder)
    tags = {tag for _, tag, _ in numbers}
    assert {"train/loss", "train/grad_norm", "eval/loss"} <= tags and not tags & set(OF_TIME)
    assert [step for step, tag, _ in numbers if tag == "train/loss"] == [1, 2, 3, 4, 5, 6]


# --- the command -------------------------------------------------------------------------------------

TINY = [
    *("--overfit", "--prove_resume", "--max_steps", "2", "--model.n_embd", "16", "--model.n_layer", "1"),
    *("--model.dropout", "0.1"),
]


def proved(*words: str, cwd: Path, plant: str = "") -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command; `plant` is run by every Python before anything else."""
    environment = dict(os.environ)
    if plant:
        (cwd / "plant").mkdir()
        (cwd / "plant" / "sitecustomize.py").write_text(plant)
        environment["PYTHONPATH"] = str(cwd / "plant")
    command = [sys.executable, str(REPOSITORY / "trainingmanager.py"), *words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_command_proves_a_resume(tmp_path: Path) -> None:
    code, out, err = proved(*TINY, cwd=tmp_path)
    assert code == 0, out + err
    assert "2 of 3: 2 steps, then SIGKILL" in out and "equal: " in out and "digest" in out
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


# The gradients of each update are scaled by how many this process has made: a state that nothing saves.
UNSAVED_COUNTER = """
import sys
if "selftest.resume_child" in " ".join(sys.orig_argv):
    import torch
    made, clip = [], torch.nn.utils.clip_grad_norm_
    def counting(parameters, *rest):
        made.append(1)
        for p in parameters:
            p.grad.mul_(1 + len(made) / 100)
        return clip(parameters, *rest)
    torch.nn.utils.clip_grad_norm_ = counting
"""
NO_RANDOM_STATE = """
import sys
if "selftest.resume_child" in " ".join(sys.orig_argv):
    import torch
    torch.set_rng_state = lambda state: None
"""


@pytest.mark.slow
def test_the_command_names_the_first_step_and_item_that_differ(tmp_path: Path) -> None:
    code, out, err = proved(*TINY, cwd=tmp_path, plant=UNSAVED_COUNTER)
    assert code == 1 and "DIFFERENT, first in step 3: train/grad_norm" in out, out + err


@pytest.mark.slow
def test_the_command_says_what_a_resume_refused(tmp_path: Path) -> None:
    code, out, err = proved(*TINY, cwd=tmp_path, plant=NO_RANDOM_STATE)
    assert code == 2 and "random/torch is not what" in err and err.count("\n") == 1, out + err


@pytest.mark.slow
def test_the_command_proves_a_resume_of_an_ordinary_run(corpus: Path, tmp_path: Path) -> None:
    words = ("--prove_resume", "--data.source", str(corpus), "--data.validation_one_in", "4")
    small = (
        "--model.n_layer",
        "1",
        "--model.n_embd",
        "16",
        "--model.n_head",
        "2",
        "--model.block_size",
        "64",
    )
    vocabulary = ("--tokenizer.vocab_size", "300", "--tokenizer.min_count", "2", "--accumulation", "2")
    code, out, err = proved(*words, *small, *vocabulary, cwd=tmp_path)
    assert code == 0 and "1 of 3: 8 steps in one go" in out, out + err


@pytest.mark.parametrize("train_settings", [{"run": "r"}, {"resume": True}])
def test_a_proof_has_folders_of_its_own(train_settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="leave --run and --resume out"):
        prove_resume(Config(train=TrainConfig(**train_settings)))
