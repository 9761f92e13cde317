"""Training: exact accumulation and resume, settings that do what they say, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import dataset
import trainingmanager
from architecture import Decoder
from config import (
    BEFORE,
    SETTINGS,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
    parse_config,
)
from config.schema import flat
from config.setting import REFUSED
from data.documents import SPLITS
from dataset import IGNORE_INDEX, Batch
from guards import preflight
from guards.reference import rows as rows_guard
from guards.reference.live import DerivedSteps
from selftest.prove_resume import run_difference
from training import begin, loop, report
from training.begin import train
from training.checkpoint import checkpoints, first_difference, load_counters, load_state
from training.log import Log
from training.loop import Observer, TrainingManager, compile_blocks
from training.optim import AdamW, Muon
from training.run import load_run
from training.runfolder import claimed_folder, config_fingerprint, new_folder
from training.state import RunState, budget_used

pytestmark = pytest.mark.usefixtures("unguarded")


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Config:
    """A run of six steps of a tiny model, with dropout, so that random states matter."""
    return Config(
        data=DataConfig(
            source=str(corpus), validation_one_in=4, test_one_in=4, cache=str(tmp_path / "cache"), workers=1
        ),
        tokenizer=TokenizerConfig(vocab_size=300, min_count=2),
        model=ModelConfig(block_size=32, n_layer=2, n_head=2, n_embd=16, dropout=0.1),
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(
            run=str(tmp_path / "run"), max_steps=6, batch_size=4, validate_every=3, log_every=1
        ),
    )


def adapted(config: Config, **train: Any) -> Config:
    return replace(config, train=replace(config.train, **train))


def logged(manager: TrainingManager, tag: str) -> list[float]:
    rows = [json.loads(line) for line in (manager.folder / "metrics.jsonl").read_text().splitlines()]
    return [row[tag] for row in rows if tag in row]


def weights(manager: TrainingManager) -> dict[str, torch.Tensor]:
    return {key: t.clone() for key, t in manager.model.state_dict().items()}


def assert_equal(a: Any, b: Any) -> None:
    """Bit for bit, through nested dicts and lists; names the first item that differs."""
    assert (name := first_difference(a, b)) is None, name


@pytest.mark.parametrize(("handler", "steps"), [(signal.SIG_IGN, 6), (signal.SIG_DFL, 2)])
def test_a_closed_terminal_ends_a_run_unless_nohup_waived_it(
    config: Config, handler: signal.Handlers, steps: int
) -> None:
    def hang_up(manager: TrainingManager, values: dict[str, float]) -> bool:
        if manager.state.step == 2:
            os.kill(os.getpid(), signal.SIGHUP)
        return False

    before = signal.signal(signal.SIGHUP, handler)
    try:
        assert train(config, Observer(on_step=hang_up)).state.step == steps
        assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


# --- exactness ---------------------------------------------------------------------------------------


@pytest.mark.guarded
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_resumed_equals_uninterrupted(config: Config, tmp_path: Path, name: Any) -> None:
    config = replace(config, optimizer=replace(config.optimizer, name=name, schedule="constant"))
    whole = train(config)
    half = adapted(config, run=str(tmp_path / "halves"), max_steps=3)
    train(half)
    resumed = train(adapted(half, max_steps=6, resume=True))
    assert whole.state.step == resumed.state.step == 6
    assert_equal(weights(whole), weights(resumed))
    assert run_difference(whole.folder, resumed.folder) is None
    saved = yaml.safe_load((resumed.folder / "config.yaml").read_text("utf-8"))["optimizer"]
    assert OptimizerConfig(**saved) == config.optimizer.resolved() == resumed.config.optimizer


@pytest.mark.parametrize(
    ("forgotten", "first"),
    [("random", 4), ("order", 4), ("optimizers", 5), ("moments", 5), ("skipped_in_a_row", 6)],
)
def test_a_checkpoint_that_lacks_something_is_seen(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str, first: int
) -> None:
    """The pair above can fail: falsify one item of what is loaded, and the runs differ from that step on.

    Step 4 is the first after the resume; its loss is logged before its update, in which moments count."""
    config = replace(config, optimizer=replace(config.optimizer, schedule="constant"))
    if forgotten == "random":  # Of older runs alone: dropout is seeded for each pass by now.
        begun_before(monkeypatch)
    whole = train(config)
    half = adapted(config, run=str(tmp_path / "halves"), max_steps=3)
    train(half)

    def forgetful(manifest: Any) -> dict[str, Any]:
        state = load_state(manifest)
        if forgotten == "optimizers":
            for optimizer in state["optimizers"]:
                optimizer["state"] = {}
        elif forgotten == "moments":
            state["optimizers"][0]["state"][0]["momentum"][0] *= 2
        elif forgotten == "random":
            state["random"]["torch"] = torch.Generator().manual_seed(99).get_state()
        elif forgotten == "order":
            del state["order_version"]
        else:
            state["run"]["skipped_in_a_row"] = state["run"]["skipped_updates"] = 1
        return state

    monkeypatch.setattr(loop, "load_state", forgetful)
    allow = ("differs-from-reference",)  # It names what is missing at once.
    resumed = train(adapted(half, max_steps=6, resume=True, allow=allow))
    difference = run_difference(whole.folder, resumed.folder)
    assert difference is not None and difference[0] == first


def begun_before(patch: pytest.MonkeyPatch) -> None:
    """Let runs begin as they did before rows were dealt by update, and passes seeded."""
    patch.setattr(dataset, "ORDER_VERSION", 1)
    patch.setattr(rows_guard, "VERSION", 1)


def test_a_run_that_was_begun_before_goes_on_in_its_order(config: Config, tmp_path: Path) -> None:
    """Over the end of an epoch, with dropout, where an update has micro-batches of both epochs."""
    config = replace(config, optimizer=replace(config.optimizer, schedule="constant"))
    config = adapted(config, max_steps=9, batch_size=6, accumulation=3)
    with pytest.MonkeyPatch.context() as patch:
        begun_before(patch)
        whole = train(config)
        half = adapted(config, run=str(tmp_path / "halves"), max_steps=3)
        older = train(half)
    resumed = train(adapted(half, max_steps=9, resume=True))
    assert older.batches.steps_per_epoch % 3 and resumed.epoch() > 1 > older.epoch()
    assert resumed.batches.version == 1 < dataset.ORDER_VERSION
    assert_equal(weights(whole), weights(resumed))
    assert run_difference(whole.folder, resumed.folder) is None


def ignored(*_: Any, **__: Any) -> None:
    """Restores nothing."""


@pytest.mark.parametrize(
    ("where", "what", "named"),
    [
        (AdamW, "load_state_dict", "optimizers/1/state/0"),
        (Muon, "load_state_dict", "optimizers/0/state/0"),
        (torch.amp.GradScaler, "load_state_dict", "scaler/scale"),
        (torch, "set_rng_state", "random/torch"),
        (random, "setstate", "random/python/1"),
        (np.random, "set_state", "random/numpy/state/key"),
        (loop, "load_weights", "embed.weight"),
        (loop, "config_fingerprint", "fingerprints/config"),
        (RunState, "step", "run/step"),
        (RunState, "tokens", "run/tokens"),
        (RunState, "best_loss", "run/best_loss"),
        (RunState, "validations_without_better", "run/validations_without_better"),
        (RunState, "skipped_updates", "run/skipped_updates"),
        (RunState, "skipped_in_a_row", "run/skipped_in_a_row"),
        (RunState, "seconds", "run/seconds"),
    ],
)
def test_a_resume_that_drops_something_is_refused_by_its_name(
    config: Config, monkeypatch: pytest.MonkeyPatch, where: Any, what: str, named: str
) -> None:
    scaler = torch.amp.GradScaler  # Runs have one in fp16 on a GPU; one on a CPU works too.
    monkeypatch.setattr(loop.torch.amp, "GradScaler", lambda *_, **__: scaler("cpu", init_scale=8))
    monkeypatch.setattr(TrainingManager, "validate_save_and_compare", with_every_counter_moved)
    train(adapted(config, max_steps=3))
    if where is RunState:

        def without(**values: Any) -> RunState:
            return RunState(**{key: value for key, value in values.items() if key != what})

        monkeypatch.setattr(loop, "RunState", without)
    else:
        monkeypatch.setattr(where, what, ignored)
    with pytest.raises(ValueError, match=f"^{named}.* is not what .*step-00000003 holds"):
        train(adapted(config, resume=True))


def with_every_counter_moved(manager: TrainingManager, *_: Any) -> dict[str, float]:
    """A save before which nothing that a resume restores is as it was at the start."""
    manager.scaler.update(new_scale=2.0)
    manager.state.validations_without_better = manager.state.skipped_updates = 2
    manager.state.skipped_in_a_row = 1
    manager.state.best_loss = 5.0
    random.random()
    np.random.rand()
    manager.save(5.0)
    return {}


def test_what_changes_between_the_resume_and_the_first_step_is_refused(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(adapted(config, max_steps=3))
    checks = begin.preflight

    def draws(*arguments: Any) -> Any:
        torch.rand(1)
        return checks(*arguments)

    monkeypatch.setattr(begin, "preflight", draws)
    with pytest.raises(ValueError, match=r"^random/torch is not what"):
        train(adapted(config, resume=True))


def test_a_checkpoint_of_another_run_is_refused(config: Config, tmp_path: Path) -> None:
    train(adapted(config, max_steps=3))
    (Path(config.data.source) / "one_more.py").write_text("def f0(x, y=0):\n    return total\n")
    other = replace(config, tokenizer=TokenizerConfig(path=f"{config.train.run}/tokenizer"))
    stranger = train(adapted(other, run=str(tmp_path / "other"), max_steps=3))
    (Path(config.data.source) / "one_more.py").unlink()
    own = Path(config.train.run, "checkpoints")
    shutil.rmtree(own)
    shutil.copytree(stranger.folder / "checkpoints", own)
    with pytest.raises(ValueError, match=r"^(epoch|fingerprints/\w+) is not what"):
        train(adapted(config, resume=True))


def test_a_changed_budget_is_warned_of_and_a_changed_log_is_not(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    train(adapted(config, max_steps=3))
    train(adapted(config, resume=True, log_every=2, samples=1))
    told = capsys.readouterr().err
    assert told.count("warning: ") == 1 and "warning: max_steps was 3 so far and is 6 now" in told


def test_micro_batches_equal_one_batch_although_ragged(config: Config) -> None:
    """Rows that bear few tokens weigh little: a mean of the micro-batches' means would differ."""
    config = replace(config, model=replace(config.model, dropout=0.0))
    one = train(adapted(config, max_steps=1, precision="fp32", run=config.train.run + "1"))
    whole = ragged(one.batches.batch(0))
    gradients = []
    for size in (4, 2, 1):
        parts = [Batch(*(t[i : i + size] for t in whole)) for i in range(0, 4, size)]
        bears = {int((part.labels != IGNORE_INDEX).sum()) for part in parts}
        assert size == 4 or len(bears) > 1  # ragged indeed
        manager = train(
            adapted(
                config,
                max_steps=1,
                precision="fp32",
                batch_size=size,
                accumulation=4 // size,
                run=f"{config.train.run}-{size}",
            )
        )
        fresh = Decoder(manager.config.model)
        fresh.load_state_dict(one.model.state_dict())
        manager.model, manager.parameters = fresh, list(fresh.parameters())
        manager.optimizers = [Recorder(fresh)]  # type: ignore[list-item]
        manager.config = replace(manager.config, optimizer=replace(manager.config.optimizer, grad_clip=0.0))
        manager.state.step = 0
        manager.update_on(parts, manager.progress())
        gradients.append(manager.optimizers[0].seen)  # type: ignore[attr-defined]
    for other in gradients[1:]:
        for key in other:
            torch.testing.assert_close(gradients[0][key], other[key], rtol=1e-5, atol=1e-6)


def ragged(batch: Batch) -> Batch:
    labels = batch.labels.clone()
    for row in range(len(labels)):
        labels[row, 3 + 5 * row :] = IGNORE_INDEX
    return batch._replace(labels=labels)


class Recorder(torch.optim.SGD):
    """Keeps the gradients of its step."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        super().__init__(model.parameters(), lr=0.0)
        self.param_groups[0]["initial_lr"] = 0.0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


# --- settings do what they say -----------------------------------------------------------------------


def test_clipping_is_applied_and_the_norm_before_it_is_logged(config: Config, tmp_path: Path) -> None:
    free = replace(config, optimizer=replace(config.optimizer, name="adamw", eps=1.0, grad_clip=0.0))
    # With an eps of 1 the weights move so slowly that some gradients are still zero after a few updates.
    free = adapted(free, allow=("parameter-without-gradient",))
    tight = replace(free, optimizer=replace(free.optimizer, grad_clip=1e-3))
    a, b = train(free), train(adapted(tight, run=str(tmp_path / "tight")))
    first = logged(a, "train/grad_norm")[0]
    assert first == logged(b, "train/grad_norm")[0] > 1e-2
    # With a large eps AdamW's step grows with the gradient, so a clipped run moves far less.
    torch.manual_seed(config.train.seed)
    start = Decoder(a.config.model).state_dict()
    moved = [sum(float((w[k] - start[k]).norm()) for k in start) for w in (weights(a), weights(b))]
    assert moved[1] < moved[0] / 3


def test_the_learning_rate_follows_the_schedule(config: Config) -> None:
    manager = train(
        replace(config, optimizer=replace(config.optimizer, schedule="linear", min_lr_factor=0.0))
    )
    rates = logged(manager, "train/learning_rate")
    peak = manager.optimizers[0].param_groups[0]["initial_lr"]
    expected = [peak * min(1, (i + 1) / 2) * (1 - i / 6) for i in range(6)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"batch_size": 3},
        {"accumulation": 2},
    ],
)
def test_a_setting_changes_the_run(config: Config, tmp_path: Path, other: dict[str, Any]) -> None:
    a, b = train(config), train(adapted(config, run=str(tmp_path / "other"), **other))
    assert logged(a, "train/loss")[1:] != logged(b, "train/loss")[1:]


def test_the_same_run_twice_is_the_same(config: Config, tmp_path: Path) -> None:
    a, b = train(config), train(adapted(config, run=str(tmp_path / "other")))
    assert_equal(weights(a), weights(b))


def test_activation_checkpointing_changes_nothing(config: Config, tmp_path: Path) -> None:
    a = train(config)
    b = train(adapted(config, run=str(tmp_path / "other"), activation_checkpointing=True))
    assert logged(a, "train/loss") == pytest.approx(logged(b, "train/loss"), rel=1e-5)


def test_patience_stops_a_run_that_does_not_improve(config: Config) -> None:
    still = replace(config.optimizer, muon_lr=0.0, embedding_lr=1e-30, head_lr=1e-30)
    patient = adapted(
        config, max_steps=100, validate_every=2, patience=3, allow=("parameter-without-gradient",)
    )
    manager = train(replace(patient, optimizer=still))
    assert manager.state.step == 8  # the first validation is the best, then three without a better one
    resumed = train(replace(adapted(patient, resume=True), optimizer=still))
    assert resumed.state.step == 8  # nor does it train on


def test_a_run_that_ends_while_its_loss_falls_says_so(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = replace(config.optimizer, name="adamw", lr=3e-3, schedule="constant")
    train(replace(adapted(config, max_steps=24, validate_every=0), optimizer=slow))
    assert "warning: the training loss still fell steeply at the end" in capsys.readouterr().err


def test_budgets_end_a_run(config: Config, tmp_path: Path) -> None:
    epochs = train(adapted(config, max_steps=0, max_epochs=0.5, run=str(tmp_path / "a")))
    assert epochs.state.step == math.ceil(0.5 * epochs.batches.steps_per_epoch)
    seconds = train(adapted(config, max_steps=0, max_seconds=1.0, run=str(tmp_path / "b")))
    assert 1.0 <= seconds.state.seconds < 20 and seconds.state.step > 1


def test_a_checkpoint_knows_how_much_of_the_budget_was_used(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows the clock too, its own validation included, as the run that saved it did."""
    known: dict[int, tuple[float, float]] = {}

    def observe(manager: TrainingManager, values: dict[str, float]) -> bool:
        known[manager.state.step] = manager.progress(), manager.state.seconds
        return False

    right = TrainingManager.validate
    monkeypatch.setattr(TrainingManager, "validate", lambda *given: time.sleep(0.2) or right(*given))
    run = adapted(config, validate_every=2, save_every=2, keep=0, max_seconds=300.0)
    manager = train(run, Observer(on_step=observe))
    found = checkpoints(manager.folder / "checkpoints")
    assert [m.step for m in found] == [2, 4, 6]
    for number, manifest in enumerate(found, 1):
        counters = load_counters(manifest)
        assert counters["run"]["seconds"] > 0.2 * number
        assert counters["run"] == load_state(manifest)["run"]
        epoch, seconds = counters["epoch"], counters["run"]["seconds"]
        assert (budget_used(run.train, manifest.step, epoch, seconds), seconds) == known[manifest.step]
        assert budget_used(adapted(run, max_steps=0).train, manifest.step, epoch, seconds) == seconds / 300
    nothing_set = adapted(run, max_steps=0, max_seconds=0.0).train
    assert budget_used(nothing_set, 1, 1.0, 30.0) == 0.1


def broken_from(step: int, monkeypatch: pytest.MonkeyPatch, value: float = math.nan) -> None:
    """Let the gradients of all updates after `step` be `value`."""
    clip = torch.nn.utils.clip_grad_norm_
    update = TrainingManager.update

    def broken_update(manager: TrainingManager) -> dict[str, float]:
        def broken_clip(parameters: Any, *arguments: Any) -> torch.Tensor:
            if manager.state.step >= step:
                parameters[0].grad.fill_(value)
            return clip(parameters, *arguments)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken_clip)
        return update(manager)

    monkeypatch.setattr(TrainingManager, "update", broken_update)


def test_updates_that_are_not_finite_are_skipped_and_three_in_a_row_end_the_run(config: Config) -> None:
    manager = train(config)
    before = weights(manager)
    optimizers = copy.deepcopy(manager.whole_state()["optimizers"])
    for optimizer in optimizers:
        for group in optimizer["param_groups"]:
            del group["lr"]
    manager.model.blocks[0].register_forward_hook(
        lambda module, inputs, output: torch.full_like(inputs[0], math.nan)
    )
    manager.update()
    manager.update()
    assert manager.state.skipped_updates == manager.state.skipped_in_a_row == 2
    assert_equal(before, weights(manager))
    with pytest.raises(ValueError, match=r"not finite 3 times in a row, up to step 9, .* start another") as e:
        manager.update()
    assert_equal(before, weights(manager))
    after = manager.whole_state()["optimizers"]
    for optimizer in after:
        for group in optimizer["param_groups"]:
            del group["lr"]
    assert_equal(optimizers, after)
    path = manager.folder / "not-finite-step-9.safetensors"
    assert f"in {path};" in str(e.value)
    saved = load_file(path)
    assert_equal(saved["0/tokens"], manager.batches.batch(8).tokens)
    assert_equal(saved["0/labels"], manager.batches.batch(8).labels)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_that_ended_in_nan_resumes_as_if_there_had_been_none(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    whole = train(config)
    broken = adapted(config, run=str(tmp_path / "broken"))
    with monkeypatch.context() as plant:
        broken_from(3, plant, value)
        with pytest.raises(ValueError, match="not finite 3 times in a row, up to step 6"):
            train(broken)
    assert [m.step for m in checkpoints(Path(broken.train.run, "checkpoints"))] == [3]
    resumed = train(adapted(broken, resume=True))
    assert resumed.state.skipped_updates == 0
    assert run_difference(whole.folder, resumed.folder) is None


def test_skips_in_a_row_are_counted_over_a_resume(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = adapted(config, max_steps=9, allow=("parameter-without-gradient", "differs-from-reference"))
    broken_from(1, monkeypatch)
    with monkeypatch.context() as plant:  # The run ends early: the reference would say so.
        plant.setattr(TrainingManager, "progress", lambda manager: manager.state.step / 3)
        assert train(config).state.skipped_in_a_row == 2
    with pytest.raises(ValueError, match="not finite 3 times in a row, up to step 4"):
        train(adapted(config, resume=True))


def test_freed_memory_is_given_back_where_other_sizes_follow(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Freed memory is kept for the next update alone: in all other work it would come on top."""
    done: list[str] = []

    def note(place: Any, name: str) -> None:
        function = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args: (done.append(name), function(*args))[1])

    for name in ("prepare_data", "release_freed_memory", "preflight"):
        note(begin, name)
    note(loop, "release_freed_memory")
    for name in ("update", "validation_batches"):
        note(TrainingManager, name)
    monkeypatch.setattr(preflight, "GUARDS", {})
    monkeypatch.setattr(DerivedSteps, "after_save", ignored)  # The guard validates some rows again.
    train(config)
    validated = ["update"] * 3 + ["release_freed_memory", "validation_batches", "release_freed_memory"]
    begun = ["prepare_data", "release_freed_memory", "preflight", "release_freed_memory"]
    assert done == begun + validated * 2


def test_a_validation_that_is_not_finite_is_never_saved(config: Config) -> None:
    manager = train(config)
    before = checkpoints(manager.folder / "checkpoints")
    torch.nn.init.constant_(manager.model.head.weight, math.nan)
    manager.state.step += 1
    said = "the validation loss of step 7 is nan"
    with pytest.raises(ValueError, match=said), Log(manager.folder, 6, manager.config) as log:
        manager.validate_and_save(log)
    assert checkpoints(manager.folder / "checkpoints") == before


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("where", ["weight", "moment"])
def test_what_is_not_finite_is_never_saved_although_the_loss_is(
    config: Config, where: str, value: float
) -> None:
    """The embedding of an id that no text has: no loss depends on it."""
    manager = train(replace(config, model=replace(config.model, vocab_size=400)))
    before = checkpoints(manager.folder / "checkpoints")
    manager.state.step += 1
    embedding = manager.model.embed.weight
    if where == "weight":
        with torch.no_grad():
            embedding[399, 0] = value
    else:
        manager.optimizers[1].state[embedding]["exp_avg"][399, 0] = value
    name = "embed.weight" if where == "weight" else "optimizers/1/state/0/exp_avg"
    said = f"{name} of step 7 is not finite, so it was not saved"
    with pytest.raises(ValueError, match=said), Log(manager.folder, 6, manager.config) as log:
        manager.validate_and_save(log)
    assert checkpoints(manager.folder / "checkpoints") == before


def test_logs_carry_the_conventional_tags(config: Config) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    manager = train(config)
    tags = {
        "train/loss", "train/learning_rate", "train/grad_norm", "train/epoch", "train/tokens_per_second",
        "eval/loss", "eval/perplexity", "eval/bits_per_byte",
    }  # fmt: skip
    events = EventAccumulator(str(manager.folder / "tensorboard"))
    events.Reload()
    assert tags <= set(events.Tags()["scalars"])
    for tag in tags:
        assert [e.value for e in events.Scalars(tag)] == pytest.approx(logged(manager, tag), rel=1e-5)
    assert [e.step for e in events.Scalars("eval/loss")] == [3, 6]


def test_torch_compile_warns_and_runs_eager_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any) -> Any:
        def call(*_: Any) -> Any:
            raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    model = Decoder(ModelConfig(vocab_size=9, block_size=8, n_layer=1, n_head=1, n_embd=8))
    with pytest.warns(UserWarning, match=r"running eager: InvalidCxxCompiler: .*; on a CPU it needs g\+\+"):
        compile_blocks(model)
    assert model(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 9)


# --- what is refused ---------------------------------------------------------------------------------


def test_a_folder_with_another_run_is_left_alone(config: Config) -> None:
    manager = train(config)
    before = {path: path.read_bytes() for path in manager.folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="already holds another run"):
        train(config)
    with pytest.raises(ValueError, match=r"model.n_embd was 16 when .* is 32 now"):
        train(replace(adapted(config, resume=True), model=replace(config.model, n_embd=32)))
    Path(config.data.source, "part0.py").write_text("changed = 1\n")
    with pytest.raises(
        ValueError, match=rf"the data changed since .* now \(in {config.data.source}\) and was"
    ):
        train(adapted(config, resume=True))
    assert before == {path: path.read_bytes() for path in manager.folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("changed", [{"seed": 7}, {"batch_size": 2}, {"accumulation": 2}])
def test_a_resume_that_would_move_in_the_data_is_refused(config: Config, changed: dict[str, int]) -> None:
    train(config)
    with pytest.raises(ValueError, match=f"{next(iter(changed))} was .* set it back"):
        train(adapted(config, resume=True, **changed))


def test_a_resume_may_move_the_files_and_the_cache(config: Config, tmp_path: Path) -> None:
    train(adapted(config, max_steps=3))
    moved = Path(config.data.source).rename(tmp_path / "moved")
    data = replace(config.data, source=str(moved), cache=str(tmp_path / "cache2"), workers=2)
    assert train(replace(adapted(config, resume=True), data=data)).state.step == 6


def test_what_was_logged_is_on_the_disk_before_the_checkpoint(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of power between the two would else leave a checkpoint whose lines nobody can write again."""
    done: list[str] = []
    fsync, save = os.fsync, TrainingManager.save

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def saved(self: TrainingManager, loss: float | None) -> None:
        assert "eval/loss" in (self.folder / "metrics.jsonl").read_text()
        assert done[-1] == "metrics.jsonl"
        save(self, loss)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(TrainingManager, "save", saved)
    train(config)
    assert any("manifest.json" in name for name in done)


def test_resuming_a_finished_run_says_so_and_changes_nothing(config: Config) -> None:
    manager = train(config)
    before = {path: path.read_bytes() for path in manager.folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"the budget of .* is used up at step 6"):
        train(adapted(config, resume=True))
    assert before == {path: path.read_bytes() for path in manager.folder.rglob("*") if path.is_file()}


def as_saved_before_there_was_a_test_side(run: Path) -> None:
    """Nor any other key that came since."""
    saved = yaml.safe_load((run / "config.yaml").read_text())
    for key in BEFORE:
        group, name = key.split(".")
        del saved[group][name]
    (run / "config.yaml").write_text(yaml.safe_dump(saved))


def test_a_run_from_before_the_test_split_goes_on_without_one(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default would make some of its files a test split, though it trained on them."""
    from suites.evaluate import evaluate, table
    from suites.settings import EvalConfig

    config = replace(config, data=replace(config.data, test_one_in=0, heal=False))
    values = flat(config.with_optimizer_defaults())
    later = ["data.heal", "data.test_one_in", "data.fim_order", "model.base_width"]
    of_rope = ("attention", "truncate", "beta_fast", "beta_slow", "short", "long")
    later += [f"model.rope_{name}" for name in of_rope]
    of_families = ("unrotated_layers", "fused_gate", "attention_scale", "embed_scale", "residual_scale")
    later += [f"model.{name}" for name in (*of_families, "logit_divisor")]
    later += ["model.n_experts", "model.n_chosen", "model.chosen_sum_to_one"]
    fixed = {
        key: value for key, value in values.items() if SETTINGS[key].on_resume == REFUSED and key not in later
    }
    assert (
        config_fingerprint(config) == hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()
    )
    manager = train(adapted(config, max_steps=3))
    assert manager.data.test is manager.data.validation
    as_saved_before_there_was_a_test_side(manager.folder)
    words = ["--resume", "--run", str(manager.folder), "--max_steps", "6"]
    manager = train(parse_config(trainingmanager.command_line(words)))
    assert manager.state.step == 6 and "warning: max_steps" in capsys.readouterr().err
    as_saved_before_there_was_a_test_side(manager.folder)
    result = evaluate(EvalConfig(str(manager.folder), samples=0, cache=config.data.cache))
    assert result["side"] == "validation" and result["bytes"] == manager.data.validation.n_bytes
    assert "no test split: the scores are of the validation files" in table(result)


def test_a_run_on_the_library_says_how_it_is_split_and_one_of_before_goes_on_by_name(
    config: Config, library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The config.yaml of a run of before says `regroup: false`. Of 64 modules 24 are near copies."""
    from suites.evaluated import data_of
    from suites.settings import EvalConfig

    data = replace(config.data, source="stdlib")
    runs = {}
    for regroup in (None, False):
        place = str(Path(config.train.run) / str(regroup))
        own = adapted(replace(config, data=replace(data, regroup=regroup)), run=place, max_steps=1)
        own = adapted(own, allow=("split-leaks",))
        capsys.readouterr()
        train(own)
        said = "split: 64 documents in 41 groups by their text (data.regroup true)" in capsys.readouterr().out
        saved = yaml.safe_load((Path(place) / "config.yaml").read_text())["data"]["regroup"]
        assert said is saved is (regroup is None)
        # A program that resumes may leave data.regroup unset.
        later = adapted(replace(own, data=data), max_steps=2, resume=True)
        assert train(later).state.step == 2
        # This refuses other data than the run was trained on.
        data_of(load_run(place), EvalConfig(place, cache=data.cache))
        runs[regroup] = json.loads((Path(place) / "fingerprints.json").read_text())["data"]
    assert runs[None] != runs[False]


def test_what_is_chosen_is_chosen_by_validation_and_what_is_reported_is_read_from_test(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import suites.tokens as evaluation

    read: list[tuple[str, str]] = []
    for module in (loop, report, evaluation):
        for name, number in (("validation_batches", 0), ("numbered_batches", 0), ("sample_completions", 2)):
            right = getattr(module, name, None)

            def noted(
                *args: Any, right: Any = right, of: tuple = (module.__name__, number), **kw: Any
            ) -> Any:
                read.append((of[0], args[of[1]].split))
                return right(*args, **kw)

            if right is not None:
                monkeypatch.setattr(module, name, noted)
    manager = train(config)
    assert {manager.data.train.split, manager.data.validation.split, manager.data.test.split} == set(SPLITS)
    assert set(read) == {("training.loop", "validation")}
    read.clear()
    report.report(manager)
    assert set(read) == {("training.report", "test"), ("suites.tokens", "test")}
    result = json.loads((manager.folder / "eval.json").read_text())
    assert result["side"] == "test" and result["files"] == manager.data.test.n_documents
    out = capsys.readouterr().out
    assert "on all test files" in out and "no test split" not in out
    for store in (manager.data.train, manager.data.validation, manager.data.test):
        assert f"{store.split}: {store.n_documents:,} files, {store.n_bytes:,} bytes, " in out


def test_a_runs_config_makes_another_run(config: Config, tmp_path: Path) -> None:
    train(adapted(config, max_steps=3))
    train(adapted(config, resume=True))
    saved = Config.from_dict(yaml.safe_load(Path(config.train.run, "config.yaml").read_text()))
    assert train(adapted(saved, run=str(tmp_path / "again"))).state.step == 6


def test_lines_that_a_killed_run_left_are_dropped_on_resume(config: Config) -> None:
    manager = train(adapted(config, max_steps=3))
    metrics = manager.folder / "metrics.jsonl"
    before = metrics.read_text()
    metrics.write_text(before + '{"step": 4, "train/loss": 9.0}\n{"step": 5, "train/lo')
    resumed = train(adapted(config, resume=True))
    assert resumed.state.step == 6 and metrics.read_text().startswith(before)
    assert 9.0 not in logged(resumed, "train/loss") and len(logged(resumed, "train/loss")) == 6


def test_a_second_run_in_a_folder_under_way_is_refused(config: Config) -> None:
    with claimed_folder(config) as folder:
        with pytest.raises(ValueError, match="another run is under way"):
            train(config)
        (folder / "config.yaml").write_text("{}")
        with pytest.raises(ValueError, match="another run is under way"):
            train(adapted(config, resume=True))


def test_new_folders_of_one_second_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len({new_folder() for _ in range(5)}) == 5


def test_damaged_checkpoints_are_passed_over_and_none_whole_is_refused(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config = adapted(config, save_every=2)
    manager = train(config)
    last = checkpoints(manager.folder / "checkpoints")[-1]
    (last.folder / "model.safetensors").write_bytes(b"")
    resumed = train(adapted(config, resume=True))
    assert "passed over" in capsys.readouterr().err and resumed.state.step == 6
    for manifest in checkpoints(manager.folder / "checkpoints"):
        (manifest.folder / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="none is whole"):
        train(adapted(config, resume=True))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": {"vocab_size": 20}}, "model.vocab_size 20 does not hold the tokenizer's"),
        ({"data": {"source": "/no/such/corpus"}}, "/no/such/corpus"),
        ({"data": {"validation_one_in": 0}}, "only --overfit may"),
        ({"train": {"resume": True}}, "no run to resume"),
        ({"tokenizer": {"kind": "pretrained"}}, "tokenizer.path is not set"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    config: Config, change: dict[str, dict[str, Any]], sentence: str
) -> None:
    for group, values in change.items():
        config = replace(config, **{group: replace(getattr(config, group), **values)})
    with pytest.raises(ValueError, match=sentence):
        train(config)
    assert not Path(config.train.run).exists()
