"""The second derivation of an update, against the run's own and against faults that are made in it."""

from __future__ import annotations

import contextlib
import copy
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import copy_planted

import architecture
from guards import preflight
from guards.reference import updates
from guards.reference.comparison import Comparison, Differs
from guards.reference.rehearsal import put_back, with_exercised_weights
from guards.reference.steps import moment_tolerance
from guards.subject import GuardSubject
from modules.precision import Precision
from selftest.planted_faults import TUNED, merged
from selftest.run import begun, outcome, small_config
from training import beforehand, begin, log, loop, loss, optim

Settings = dict[str, dict[str, Any]]
FP32: Settings = {"train": {"precision": "fp32"}}


@pytest.fixture(scope="module")
def folder(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("update")
    copy_planted(planted, folder)
    return folder


class Caught(BaseException):
    """Ends a run before its first update."""


def subject_of(folder: Path, settings: Settings, resumed: bool = False) -> GuardSubject:
    """Return what the guards of a run look at; the run itself ends there."""
    found: list[GuardSubject] = []

    def keep(subject: GuardSubject) -> Iterator[str]:
        found.append(subject)
        raise Caught

    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(io.StringIO()):
        if settings.get("train", {}).get("precision") == "fp16":  # Which a CPU computes, but slowly.
            fp16 = Precision(torch.device("cpu"), torch.float16, "")
            patched.setattr(beforehand, "choose_precision", lambda *args: fp16)
        config = begun(small_config(folder, merged(FP32, settings)), resumed)
        patched.setattr(preflight, "GUARDS", {"sizes": keep})
        with pytest.raises(Caught):
            begin.train(config)
    return found[0]


def compared(subject: GuardSubject) -> Comparison:
    comparison = Comparison()
    comparison.begin("update")
    with torch.random.fork_rng([]):
        updates.compare(subject, comparison)
    return comparison


HEALTHY: list[Settings] = [
    {},
    {"train": {"accumulation": 3}, "optimizer": {"grad_clip": 0.0, "weight_decay": 0.1}},
    {"train": {"precision": "bf16"}},
    {"train": {"precision": "fp16"}},
    {"optimizer": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.3, "beta1": 0.5, "grad_clip": 0.01}},
    {"optimizer": {"label_smoothing": 0.2, "z_loss": 0.01, "schedule": "cosine", "embedding_lr": 0.0}},
    {"optimizer": {"schedule": "linear", "min_lr_factor": 0.0, "warmup_steps": 0}},
    {"optimizer": {"schedule": "constant"}, "model": {"base_width": 8, "n_embd": 32}},
    {
        "model": {
            "norm_weight": True,
            "norm_bias": True,
            "qkv_bias": True,
            "mlp_bias": True,
            "head_bias": True,
        }
    },
    {"model": {"tie_embeddings": True, "position": "learned", "block": "parallel", "mlp": "swiglu"}},
    {"model": {"sliding_window": 5, "window_layers": (1,), "n_kv_head": 1, "fused_qkv": True}},
    {"model": {"dropout": 0.9}, "train": {"activation_checkpointing": True}},
    TUNED,
    merged(TUNED, {"lora": {"dora": True, "lr_ratio": 16.0, "dropout": 0.5, "bias": "all"}}),
    merged(TUNED, {"lora": {"init": "pissa", "targets": ("c_attn", "wte", "lm_head")}}),
    merged(TUNED, {"lora": {"train_modules": ("lm_head",), "rslora": True}}),
    merged(TUNED, {"lora": {"new_tokens": ("<|one|>", "<|two|>")}}),
    merged(TUNED, {"train": {"base_format": "nf4"}}),
]


@pytest.mark.parametrize("settings", HEALTHY, ids=str)
def test_both_derivations_of_a_healthy_update_agree(folder: Path, settings: Settings) -> None:
    comparison = compared(subject_of(folder, settings))
    assert not comparison.left_out
    assert sum("change of" in stage for stage, _ in comparison.stages) >= 2


@pytest.mark.parametrize("size", [1.0, 1e-19, 1e-41])
def test_moments_that_cancel_or_are_next_to_zero_agree_and_lost_ones_do_not(size: float) -> None:
    """The second gradient takes the first one's moment off again, but for a hundred-thousandth."""
    first = torch.randn(50, generator=torch.Generator().manual_seed(0)) * size
    second = first * (-0.9 + 1e-4)
    p = torch.nn.Parameter(torch.ones(50))
    optimizer = torch.optim.AdamW([p], betas=(0.9, 0.95))
    moments = {"exp_avg": torch.zeros(50).double(), "exp_avg_sq": torch.zeros(50).double()}
    for gradient in (first, second):
        p.grad = gradient.clone()
        optimizer.step()
        g, known = gradient.double(), dict(moments)
        moments["exp_avg"] = 0.9 * moments["exp_avg"] + 0.1 * g
        moments["exp_avg_sq"] = 0.95 * moments["exp_avg_sq"] + 0.05 * g.square()
        for key, expected in moments.items():
            allowed = moment_tolerance(known[key], g, expected, key)
            Comparison().close(key, optimizer.state[p][key], expected, allowed, "")
    lost = 0.1 * second.double()
    with pytest.raises(Differs):
        allowed = moment_tolerance(known["exp_avg"], second.double(), moments["exp_avg"], "exp_avg")
        Comparison().close("exp_avg", lost, moments["exp_avg"], allowed, "")


@pytest.mark.parametrize("settings", [{}, TUNED], ids=["fresh", "adapters"])
def test_a_resumed_update_starts_from_the_moments_of_the_file(folder: Path, settings: Settings) -> None:
    subject = subject_of(folder, settings, resumed=True)
    assert any("as stored" in stage for stage, _ in compared(subject).stages)
    state = next(iter(subject.optimizers[-1].state.values()))
    state["exp_avg"].mul_(2)
    with pytest.raises(Exception, match=r"exp_avg .*: 2 times the reference"):
        compared(subject)


def everything(subject: GuardSubject) -> list[Any]:
    """Return all that a run has and a rehearsal touches."""
    return [
        [p.detach().clone() for p in subject.model.parameters()],
        [p.grad for p in subject.model.parameters()],
        [copy.deepcopy(optimizer.state_dict()) for optimizer in subject.optimizers],
        copy.deepcopy(subject.scaler.state_dict()),
        copy.deepcopy(subject.state),
        [module.training for module in subject.model.modules()],
        [getattr(module, "p", None) for module in subject.model.modules()],
        torch.get_rng_state(),
    ]


@pytest.mark.parametrize("resumed", [False, True], ids=["fresh", "resumed"])
@pytest.mark.parametrize(
    "settings", [{"train": {"precision": "fp16"}}, merged(TUNED, {"lora": {"dropout": 0.5}})]
)
def test_a_rehearsal_leaves_no_trace(folder: Path, settings: Settings, resumed: bool) -> None:
    subject = subject_of(folder, settings, resumed)
    tensors = [value for o in subject.optimizers for s in o.state.values() for value in s.values()]
    before = everything(subject)
    compared(subject)
    after = everything(subject)
    assert loop.first_difference(before, after) is None
    again = [value for o in subject.optimizers for s in o.state.values() for value in s.values()]
    assert all(one is other for one, other in zip(tensors, again, strict=True))


def test_a_failed_rehearsal_leaves_no_trace_either(folder: Path) -> None:
    subject = subject_of(folder, {})
    before = everything(subject)
    with (
        pytest.raises(ZeroDivisionError),
        torch.random.fork_rng([]),
        put_back(subject),
        with_exercised_weights(subject.model),
    ):
        subject.update()
        raise ZeroDivisionError
    assert loop.first_difference(before, everything(subject)) is None


def mutated(owner: Any, name: str, make: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Return what replaces a function of the product by one that is made of it."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, make(getattr(owner, name)))


def without_decay(right: Any) -> Any:
    def wrong(self: optim.Muon, closure: Any = None) -> None:
        for group in self.param_groups:
            group["weight_decay"] = 0.0
        right(self)

    return wrong


def with_every_rate(right: Any) -> Any:
    def wrong(self: loop.TrainingManager, progress: float) -> None:
        right(self, progress)
        for group in self.optimizers[0].param_groups:
            group["lr"] *= 2

    return wrong


def first_only(right: Any) -> Any:
    """Make the clip see a part of the parameters only."""
    return lambda parameters, limit: right(list(parameters)[:2], limit)


def halved_in_backward(right: Any) -> Any:
    """Halve the gradient of what a module gives, and leave its output as it is."""

    def wrong(self: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
        y = right(self, x, *args)
        return y.detach() + (y - y.detach()) * 0.5

    return wrong


DECAYED: Settings = {"optimizer": {"weight_decay": 0.5}}
SMOOTHED: Settings = {"optimizer": {"z_loss": 0.01, "label_smoothing": 0.1}}
FAULTS: dict[str, tuple[Settings, Callable[[pytest.MonkeyPatch], None], str]] = {
    "safety": (
        {},
        mutated(optim, "orthogonalise", lambda right: lambda m: right(m) * 1.02),
        "change of blocks",
    ),
    "coefficients": (
        {},
        mutated(optim, "POLAR_EXPRESS", lambda right: right[:-1]),
        "change of blocks",
    ),
    "decay": (DECAYED, mutated(optim.Muon, "step", without_decay), "change of blocks"),
    "rates": ({}, mutated(loop.TrainingManager, "set_rates", with_every_rate), "schedule-ignored"),
    "clip of a part": ({}, mutated(torch.nn.utils, "clip_grad_norm_", first_only), "norm of all gradients"),
    "MLP": ({}, mutated(architecture.MLP, "forward", halved_in_backward), "gradient of blocks.1.mlp.down"),
    "z-loss": (
        SMOOTHED,
        mutated(loss, "_grad_logits", lambda right: lambda *a: right(*a[:3], a[3]._replace(z_loss=0.0))),
        "gradient of head: .*z-loss left out",
    ),
    "smoothing": (
        SMOOTHED,
        mutated(loss, "_grad_logits", lambda right: lambda *a: right(*a[:3], a[3]._replace(smoothing=0.0))),
        "gradient of head: .*label smoothing left out|gradient-not-the-mean",
    ),
    "smoothing in bf16": (
        SMOOTHED | {"train": {"precision": "bf16"}},
        mutated(loss, "_grad_logits", lambda right: lambda *a: right(*a[:3], a[3]._replace(smoothing=0.0))),
        "in fp32, gradient of head: .*label smoothing left out|gradient-not-the-mean",
    ),
    "scaling of what needs none": (
        {},
        mutated(loop.torch.amp, "GradScaler", lambda right: lambda *a, enabled: right("cpu")),
        "scaling of gradients",
    ),
    "momentum": (
        {},
        mutated(optim.Muon.__init__, "__defaults__", lambda right: (0.9, 0.0)),
        "optimizer, rate, decay and betas of blocks",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_nobody_planted_is_named(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, plant, stage = FAULTS[name]
    with pytest.MonkeyPatch.context() as patched:
        plant(patched)
        subject = subject_of(folder, settings)
        with pytest.raises(Exception, match=f"(?s){stage}"):
            compared(subject)


def saved_as(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Any], Any]:
    """Return what makes a checkpoint hold another state than the run has."""

    def make(right: Any) -> Any:
        def wrong(folder: Path, step: int, model: Any, state: dict[str, Any], *rest: Any) -> Any:
            return right(folder, step, model, change(state), *rest)

        return wrong

    return make


def without_moments(state: dict[str, Any]) -> dict[str, Any]:
    return state | {"optimizers": [own | {"state": {}} for own in state["optimizers"]]}


def without_draws(state: dict[str, Any]) -> dict[str, Any]:
    return state | {"random": state["random"] | {"torch": torch.zeros_like(state["random"]["torch"])}}


def without_counts(state: dict[str, Any]) -> dict[str, Any]:
    return state | {"run": state["run"] | {"validations_without_better": 7}}


def with_twice_the_targets(right: Any) -> Any:
    def wrong(self: loop.TrainingManager, *args: Any, **options: Any) -> None:
        right(self, *args, **options)
        self.targets_per_byte *= 2

    return wrong


def with_more_tokens(right: Any) -> Any:
    def wrong(self: loop.TrainingManager, *args: Any) -> None:
        right(self, *args)
        self.state.tokens += 1

    return wrong


def called_skipped(right: Any) -> Any:
    def wrong(self: loop.TrainingManager, *args: Any) -> None:
        right(self, *args)
        self.state.skipped_in_a_row = 1

    return wrong


def with_another_validation(right: Any) -> Any:
    def wrong(self: log.Log, step: int, values: dict[str, float]) -> None:
        if "eval/loss" in values:
            right(self, step - 1, values)
        right(self, step, values)

    return wrong


def with_another_epoch(right: Any) -> Any:
    def wrong(self: log.Log, step: int, values: dict[str, float]) -> None:
        right(self, step, values | {key: 2 * x for key, x in values.items() if key == "train/epoch"})

    return wrong


def without_first_lines(right: Any) -> Any:
    def wrong(self: log.Log, step: int, values: dict[str, float]) -> None:
        if step > 1:
            right(self, step, values)

    return wrong


VALIDATED: Settings = {"train": {"precision": "fp32", "validate_every": 2, "max_steps": 5}}
# The guards before the first update are switched off: these come later.
LIVE: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "scores in training mode": (
        mutated(
            loop,
            "sums_of_batches",
            lambda right: lambda *a: [sums._replace(nats=100.0) for sums in right(*a)],
        ),
        "loss of .* rows of validation",
    ),
    "bits": (
        mutated(loop.TrainingManager, "__init__", with_twice_the_targets),
        "bits per byte",
    ),
    "ranks": (
        mutated(loss, "count_below", lambda right: lambda logits, own: right(logits, own) * 0),
        "targets among the 1 largest",
    ),
    "moments not saved": (mutated(loop, "save_checkpoint", saved_as(without_moments)), "as stored in step-"),
    "a generator that is not saved": (
        mutated(loop, "save_checkpoint", saved_as(without_draws)),
        "random state of torch as stored in step-",
    ),
    "counters": (mutated(loop, "save_checkpoint", saved_as(without_counts)), "counters as stored in step-"),
    "superseded ones stay": (
        mutated(loop, "remove_superseded", lambda right: lambda *a: None),
        "steps of checkpoints",
    ),
    "kept ones go": (
        mutated(loop, "save_checkpoint", lambda right: lambda *a: right(*a[:5], True)),
        "whether step 2 is to be kept",
    ),
    "patience": (
        lambda monkeypatch: monkeypatch.setattr(loop, "min", max, raising=False),
        "best loss, and the validations",
    ),
    "targets counted twice": (
        mutated(loop.TrainingManager, "count_skipped", with_more_tokens),
        "counts of updates, targets and skipped ones after update 1",
    ),
    "an update called skipped": (
        mutated(loop.TrainingManager, "count_skipped", called_skipped),
        "counts of updates, targets and skipped ones after update 1",
    ),
    "another epoch in the log": (
        mutated(log.Log, "write", with_another_epoch),
        "epoch and learning rate of update 1 in the log",
    ),
    "a line too few": (
        mutated(log.Log, "write", without_first_lines),
        "updates with a line in the log",
    ),
    "a line of no update": (
        mutated(log.Log, "write", with_another_validation),
        "updates after which was validated",
    ),
    "half of the budget": (
        mutated(loop.TrainingManager, "progress", lambda right: lambda self: 2 * right(self)),
        "share of the budget after update 1: 2 times the reference",
    ),
    "an update beside": (
        mutated(
            torch.optim.Optimizer,
            "zero_grad",
            lambda right: (
                lambda self, *a: (self.param_groups[0]["params"][0].data.mul_(1.1), right(self, *a))
            ),
        ),
        "change of",
    ),
}


def test_the_run_in_which_those_faults_are_planted_is_healthy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "GUARDS", {})
    assert outcome(small_config(folder, VALIDATED)) == ""


@pytest.mark.parametrize("name", LIVE)
def test_a_fault_of_a_run_that_trains_is_named(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, stage = LIVE[name]
    monkeypatch.setattr(preflight, "GUARDS", {})
    plant(monkeypatch)
    assert re.search(f"differs-from-reference: .*{stage}", outcome(small_config(folder, VALIDATED)))


BUDGETS: dict[str, Settings] = {
    "seconds, past their end": {"train": {"max_steps": 0, "max_seconds": 1e-3}},
    "epochs, past their end": {"train": {"max_steps": 0, "max_epochs": 1e-3}},
    "thirds": {"train": {"max_steps": 3}},
    "several": {"train": {"max_steps": 7, "max_epochs": 50.0, "max_seconds": 500.0}},
}


@pytest.mark.parametrize("name", BUDGETS)
def test_every_healthy_budget_is_derived_alike(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget that the first update went past was refused: the reference's share ends at 1."""
    monkeypatch.setattr(preflight, "GUARDS", {})
    assert outcome(small_config(folder, merged(VALIDATED, BUDGETS[name]))) == ""


def test_a_start_that_the_folder_of_a_base_does_not_name_has_no_bytes(planted: Path, tmp_path: Path) -> None:
    """Without tokenizer_config.json a document's start decodes to its characters; it was refused."""
    copy_planted(planted, tmp_path)
    base = small_config(tmp_path, TUNED).train.base
    assert base is not None
    (Path(base) / "tokenizer_config.json").unlink()
    assert outcome(small_config(tmp_path, merged(TUNED, VALIDATED))) == ""
