"""The guards: every planted fault is caught by name, healthy runs pass, and nothing is disturbed."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import copy_planted

import architecture
import guards.probe
from architecture import Decoder
from config import Config, ModelConfig, parse_config
from guards import preflight as guards_preflight
from guards import subject as looking
from guards.faults import FAULTS, Fault
from guards.first_steps import FirstSteps
from guards.generation import batch_faults, beam_faults, first_difference, tie
from modules.precision import Precision
from selftest import run as selftest_run
from selftest.faults import base_moved, clip_stored_only, labels_by
from selftest.planted_faults import EXAMPLES, PLANTED_FAULTS, TUNED, PlantedFault, merged
from selftest.rank_faults import RANK_FAULTS
from selftest.run import outcome, run_planted, selftest, small_config
from training import beforehand
from training.begin import train
from training.loop import TrainingManager


@pytest.fixture(scope="module")
def folder(planted: Path) -> Path:
    """The folder of the corpora that healthy runs share; each run makes a folder of its own in it."""
    return planted


@pytest.fixture
def own_folder(planted: Path, tmp_path: Path) -> Path:
    """A copy of the corpora for one run with a fault, which may spoil what the run builds from them."""
    copy_planted(planted, tmp_path)
    return tmp_path


@pytest.fixture
def base_copied(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test trains a base in each folder; here it is copied."""
    monkeypatch.setattr(selftest_run, "write_base", lambda folder: copy_planted(planted, folder))


@pytest.fixture(scope="module")
def twins() -> dict[str, str]:
    return {}


def twin_of(plant: PlantedFault) -> str:
    return repr((plant.settings, plant.resumed))


def one_of_each_name() -> list[Any]:
    """All of them; of those that are caught by one name all are slow but that of the plainest run."""
    plain = sorted(PLANTED_FAULTS, key=lambda plant: (plant.resumed, len(twin_of(plant))))
    kept = {plant.expected: plant for plant in reversed(plain)}.values()
    return [
        plant if plant in kept else pytest.param(plant, marks=pytest.mark.slow)
        for plant in sorted(PLANTED_FAULTS, key=twin_of)  # Neighbours share their healthy twin.
    ]


@pytest.mark.parametrize("plant", one_of_each_name(), ids=lambda plant: plant.name)
@pytest.mark.usefixtures("base_copied")
def test_a_planted_fault_is_caught_and_its_twin_passes(plant: PlantedFault, twins: dict[str, str]) -> None:
    (result,) = run_planted([plant], twins)
    assert plant.expected in result.caught
    assert not result.healthy


def test_every_fault_that_a_guard_names_is_planted() -> None:
    assert {*FAULTS} <= {plant.expected for plant in (*PLANTED_FAULTS, *RANK_FAULTS)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*guards_preflight.GUARDS, "live"])
def test_without_a_guard_the_selftest_is_red(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    disable(name, monkeypatch)
    assert not selftest()


def disable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "live":
        monkeypatch.setattr(FirstSteps, "after", lambda *args, **named: None)
    else:
        others = {other: guard for other, guard in guards_preflight.GUARDS.items() if other != name}
        monkeypatch.setattr(guards_preflight, "GUARDS", others)  # An entry put back would come last.


# One plant that only this guard catches.
ALONE = {
    "sizes": "M8 vocabulary",
    "labels": "T4 end",
    "order": "D6 order",
    "probe": "M2 packing",
    "start": "M3 start",
    "split": "D1 variants",
    "settings": "M6 dropout",
    "same path": "M9 path",
    "generation": "E4 batch",
    "reference": "M15 scale",
    "live": "M5 clip",
}


def test_every_guard_is_disabled_in_turn() -> None:
    assert ALONE.keys() == {*guards_preflight.GUARDS, "live"}


@pytest.mark.parametrize("name", ALONE)
def test_without_its_guard_a_fault_goes_unseen(
    name: str, own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant = next(plant for plant in PLANTED_FAULTS if plant.name == ALONE[name])
    disable(name, monkeypatch)
    if name == "sizes":  # the selftest itself, once
        assert not selftest([plant])
        assert "MISSED" in capsys.readouterr().out
        return
    with plant.fault():
        assert plant.expected not in outcome(small_config(own_folder, merged(plant.settings, plant.wrong)))


HEALTHY: list[dict[str, dict[str, Any]]] = [
    {"model": {"init": "normal", "tie_embeddings": True}},
    {"model": {"init": "normal", "n_embd": 64, "norm_weight": True}},
    {"model": {"init": "xavier", "mlp": "swiglu", "norm": "rms"}},
    {"model": {"init": "xavier", "tie_embeddings": True, "norm": "rms", "norm_weight": True}},
    {"model": {"init": "zero_output", "tie_embeddings": True, "n_embd": 128}},
    {"model": {"position": "learned", "dropout": 0.0}},
    {"model": {"position": "sinusoidal", "mlp": "relu2"}},
    {"model": {"position": "none", "block": "parallel"}},
    {"model": {"n_head": 4, "n_kv_head": 1, "fused_qkv": True, "qkv_bias": True}},
    {"model": {"n_embd": 32, "n_head": 4, "n_kv_head": 2, "rotary_dim": 4, "rotary_layout": "interleaved"}},
    {"model": {"attention": "reference", "dropout": 0.5}},
    {"model": {"norm_weight": True, "norm_bias": True, "attention_bias": True, "mlp_bias": True}},
    {"model": {"qk_norm": False, "rope_theta": 500_000.0, "head_dim": 16, "n_inner": 40}},
    {"optimizer": {"name": "adamw", "lr": 1e-3, "embedding_lr": 0.0, "head_lr": 0.0, "weight_decay": 0.1}},
    {"optimizer": {"schedule": "cosine", "warmup_steps": 0, "grad_clip": 0.0}},
    {"optimizer": {"schedule": "linear", "label_smoothing": 0.1, "min_lr_factor": 0.0}},
    {"optimizer": {"schedule": "constant", "grad_clip": 0.01}},
    {"train": {"accumulation": 3, "batch_size": 1}},
    {"train": {"precision": "bf16"}},
    {"train": {"precision": "bf16", "eval_precision": "fp32", "activation_checkpointing": True}},
    {"train": {"max_steps": 0, "max_seconds": 0.5}},
    {"model": {"vocab_size": 384}, "tokenizer": {"kind": "bpe"}},
    EXAMPLES,
    EXAMPLES | {"train": {"accumulation": 2}},
    {"model": {"n_layer": 1, "n_head": 1, "dropout": 0.9}},
    {"model": {"dropout": 0.95}},
    {"model": {"n_head": 8, "rope_theta": 500_000.0}},
    {"model": {"norm_weight": True}, "optimizer": {"name": "adamw", "lr": 1e-4, "warmup_steps": 20_000}},
    {"optimizer": {"label_smoothing": 0.1}, "train": {"precision": "bf16"}},
    {"train": {"max_steps": 2}},
    {"model": {"dropout": 3.4e-5}, "train": {"max_steps": 2}},
    {"model": {"sliding_window": 5, "window_layers": (0,), "head_bias": True, "attention_dropout": 0.0}},
    {"model": {"sliding_window": 3, "n_layer": 1, "embed_dropout": 0.3, "dropout": 0.0}},
    {"model": {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_context": 32}},
    {"model": {"rope_scaling": "dynamic", "rope_factor": 2.0}},
    {"model": {"n_head": 4, "fused_qkv": True, "qkv_layout": "shards"}},
    {"model": {"block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 8}},
    merged(TUNED, {"lora": {"dropout": 0.5, "dora": True, "lr_ratio": 16.0}}),
    merged(TUNED, {"lora": {"dropout": 0.1, "init": "pissa"}}),
    merged(TUNED, {"model": {"dropout": 0.1, "attention_dropout": 0.1}}),
]


# Each has a kind of position, attention, format, tokenizer, dropout or adapter of its own; others are slow.
FEW = (2, 6, 7, 8, 9, 14, 17, 19, 21, 23, 31, 32, 34, 37, 38)


def few_of_the_healthy() -> list[Any]:
    return [
        settings if number in FEW else pytest.param(settings, marks=pytest.mark.slow)
        for number, settings in enumerate(HEALTHY)
    ]


@pytest.mark.parametrize("settings", few_of_the_healthy(), ids=lambda settings: json.dumps(settings)[:60])
def test_no_false_alarm_on_a_healthy_configuration(folder: Path, settings: dict[str, dict[str, Any]]) -> None:
    assert outcome(small_config(folder, settings)) == ""


def final_weights(config: Config) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in train(config).model.named_parameters()}


ON_THE_HEAD = merged(TUNED, {"lora": {"targets": ("c_attn", "lm_head"), "dropout": 0.5}})


@pytest.mark.parametrize("settings", [{}, ON_THE_HEAD], ids=["fresh", "adapters"])
def test_guards_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, settings: Any) -> None:
    """A run with every guard and one with none have the same weights, bit for bit, dropout included."""
    with_guards = final_weights(small_config(folder, settings))
    monkeypatch.setattr(guards_preflight, "GUARDS", {})
    monkeypatch.setattr(FirstSteps, "after", lambda *args, **named: None)
    monkeypatch.setattr(FirstSteps, "_compare_sizes", lambda self: None)
    without = final_weights(small_config(folder, settings))
    assert all(torch.equal(p, without[name]) for name, p in with_guards.items())


def test_a_fault_names_itself_its_evidence_its_remedy_and_its_override(folder: Path) -> None:
    config = small_config(folder, {"model": {"vocab_size": 4_000}})
    text = outcome(config)
    assert text.startswith("vocabulary-too-large: model.vocab_size is 4000 and the tokenizer has ")
    assert "leave model.vocab_size out" in text and text.endswith("--allow vocabulary-too-large")
    assert "\n" not in text


def test_what_leaks_although_it_was_split_by_text_is_not_told_to_be(own_folder: Path) -> None:
    plant = next(plant for plant in PLANTED_FAULTS if plant.name == "E3 trained on")
    with plant.fault():
        by_name, by_text = (
            outcome(small_config(own_folder, {"data": {"regroup": on}})) for on in (False, True)
        )
    assert by_name.startswith("split-leaks: ") and "let --fix find it" in by_name
    assert by_text.startswith("split-leaks: ") and "is by text already (data.regroup)" in by_text
    assert "--fix" not in by_text


def test_an_override_is_recorded_and_printed_with_every_score(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from suites.evaluate import evaluate, table
    from suites.settings import EvalConfig

    settings = {"model": {"vocab_size": 4_000}, "train": {"allow": ("vocabulary-too-large",)}}
    config = small_config(folder, settings)
    run = train(config).folder
    assert "ALLOWED vocabulary-too-large: " in capsys.readouterr().err
    assert "4000" in json.loads((run / "overrides.json").read_text())["vocabulary-too-large"]
    scores = evaluate(EvalConfig(str(run), samples=0, cache=config.data.cache))
    assert "TRAINED WITH --allow vocabulary-too-large: model.vocab_size is 4000" in table(scores)
    # Gone on with, the run keeps the record.
    resumed = dataclasses.replace(config.train, run=str(run), resume=True, max_steps=6)
    train(dataclasses.replace(config, train=resumed))
    assert (run / "overrides.json").is_file()


def test_a_run_without_overrides_says_nothing(folder: Path) -> None:
    run = train(small_config(folder, {})).folder
    assert guards_preflight.overrides(run) == {} and not (run / "overrides.json").exists()


def test_what_is_learned_is_shown_in_brackets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(small_config(folder, EXAMPLES))
    line = next(line for line in capsys.readouterr().out.splitlines() if "in [brackets]" in line)
    shown = line.split("what is learned: ")[1]
    assert re.search(r"\):\\n\[    \w+ = \w+ [-+*] ", shown)  # the head is not learned, the body is


def test_an_unknown_name_to_allow_is_refused_with_the_nearest(folder: Path) -> None:
    text = outcome(small_config(folder, {"train": {"allow": ("future-visable",)}}))
    assert text == "--allow future-visable names no fault; did you mean future-visible?"


def test_an_allowed_fault_hides_no_other(folder: Path) -> None:
    """Nor a second one of the same guard: prompts and padding are targets, and only the first is allowed."""
    everything = labels_by(lambda tokens, documents, labels: tokens[:, 1:])
    with everything():
        assert outcome(small_config(folder, EXAMPLES)).startswith("prompt-bears-loss: ")
    settings = merged(EXAMPLES, {"train": {"allow": ("prompt-bears-loss",)}})
    with everything():
        assert outcome(small_config(folder, settings)).startswith("padding-bears-loss: ")


def test_what_moved_is_seen_in_a_run_of_two_updates(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(guards_preflight.GUARDS, "reference")  # Its rehearsal would see it before the run.
    settings = merged(TUNED, {"train": {"max_steps": 2}})
    assert outcome(small_config(folder, settings)) == ""
    config = small_config(folder, settings)
    with base_moved(sound=1):  # the first update is looked at by itself
        assert "should be frozen and moved by update 2" in outcome(config)
    assert not (Path(str(config.train.run)) / "checkpoints").exists()
    allowing = small_config(folder, merged(settings, {"train": {"allow": ("frozen-parameter-moved",)}}))
    with base_moved(sound=1):  # the first update is looked at by itself
        assert outcome(allowing) == ""
    assert [*guards_preflight.overrides(Path(str(allowing.train.run)))] == ["frozen-parameter-moved"]


def sizes_of(config: Config) -> list[float]:
    """Return the gradients of a run that nothing stops, as multiples of what they should be."""
    sizes: list[float] = []
    compare = FirstSteps._compare_sizes

    def noted(self: FirstSteps) -> None:
        compare(self)
        sizes.extend(self.sizes.values())

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FirstSteps, "_compare_sizes", noted)
        assert outcome(config) == ""
    return sizes


@pytest.mark.usefixtures("unguarded")
@pytest.mark.parametrize(("dtype", "apart"), [("float32", 1e-4), ("bfloat16", 0.03), ("float16", 0.01)])
def test_the_size_of_a_gradient_is_that_of_the_mean(
    folder: Path, dtype: str, apart: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes have different numbers of tokens, and the loss is smoothed and has a z-loss."""
    precision = Precision(torch.device("cpu"), getattr(torch, dtype), "planted")
    monkeypatch.setattr(beforehand, "choose_precision", lambda *args: precision)
    settings = merged(
        EXAMPLES,
        {
            "train": {"accumulation": 10, "batch_size": 1},
            "optimizer": {"label_smoothing": 0.1, "z_loss": 1e-3},
        },
    )
    assert sizes_of(small_config(folder, settings)) == pytest.approx([1] * 8, abs=apart)


@pytest.mark.usefixtures("unguarded")
def test_a_small_gradient_of_fp16_is_not_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the scaler's scale, that of one of 8,000 tokens is below what fp16 holds."""
    precision = Precision(torch.device("cpu"), torch.float16, "planted")
    monkeypatch.setattr(beforehand, "choose_precision", lambda *args: precision)
    settings: dict[str, dict[str, Any]] = {
        "train": {"accumulation": 8, "batch_size": 16},
        "optimizer": {"warmup_steps": 20},
    }
    assert sizes_of(small_config(folder, settings)) == pytest.approx([1] * 8, abs=0.02)


def test_an_adapter_of_the_head_that_drops_much_is_no_alarm(folder: Path) -> None:
    config = small_config(folder, merged(ON_THE_HEAD, {"optimizer": {"lr": 0.02}}))
    assert outcome(config) == ""
    gone_on = dataclasses.replace(config.train, resume=True, max_steps=7)
    assert sizes_of(dataclasses.replace(config, train=gone_on)) == pytest.approx([1], abs=0.12)


def test_a_pass_that_bears_no_loss_has_no_size(folder: Path) -> None:
    half = labels_by(lambda tokens, documents, labels: np.where(tokens[:, :1] % 2 == 0, -100, labels))
    settings = {
        "train": {
            "allow": ("row-without-loss", "differs-from-reference"),
            "batch_size": 1,
            "accumulation": 8,
        },
        "model": {"dropout": 0.0},
    }
    with half():
        assert outcome(small_config(folder, settings)) == ""


def test_allow_takes_names_on_the_command_line() -> None:
    for words in (["--allow", "a-b,c"], ["--allow=a-b,c"], ["--allow", "[a-b,c]"]):
        assert parse_config(words).train.allow == ("a-b", "c")
    assert parse_config(["--data.suffixes", ".kt"]).data.suffixes == (".kt",)


def test_guards_leave_no_tensor_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run would hold it until its end: once, of a LoRA run, as much as all that it trains and freezes."""
    held: dict[str, int] = {}
    guard = guards_preflight.run_guard

    def held_now() -> int:
        gc.collect()
        # Other kinds, such as the fake tensors that a compiler leaves to the whole process, have no memory.
        tensors = (o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def counted(subject: looking.GuardSubject, name: str, allowed: set[str]) -> list[Fault]:
        before = held_now()
        found = guard(subject, name, allowed)
        held[name] = held_now() - before
        return found

    monkeypatch.setattr(guards_preflight, "run_guard", counted)
    gc.collect()
    gc.freeze()  # What other tests left is not looked through twenty times.
    assert outcome(small_config(folder, TUNED)) == ""
    assert held == dict.fromkeys(guards_preflight.GUARDS, 0)


def test_guards_restore_the_random_states(folder: Path) -> None:
    """torch.manual_seed also sets the GPUs' generators: it may be called inside fork_rng only."""
    depth, outside = [0], []
    fork, seed = torch.random.fork_rng, torch.manual_seed

    @contextlib.contextmanager
    def noted(devices: list[torch.device]) -> Any:
        assert devices == []  # A run on the CPU touches no GPU.
        depth[0] += 1
        with fork(devices):
            yield
        depth[0] -= 1

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.random, "fork_rng", noted)
        patched.setattr(
            torch, "manual_seed", lambda n: (outside.append(n) if not depth[0] else None, seed(n))
        )
        manager = train(small_config(folder, {}))
    assert outside == [manager.config.train.seed]


def test_an_allowed_fault_of_the_first_steps_is_recorded_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first checkpoint, so that a run that is killed later has the record."""
    seen = []
    save = TrainingManager.save

    def noted(self: TrainingManager, loss: float | None) -> None:
        seen.append(list(guards_preflight.overrides(self.folder)))
        save(self, loss)

    monkeypatch.setattr(TrainingManager, "save", noted)
    settings = {"optimizer": {"grad_clip": 0.01}, "train": {"allow": ("clip-ignored",)}}
    with clip_stored_only():
        train(small_config(folder, settings))
    assert seen == [["clip-ignored"]]


def test_a_large_model_is_looked_at_through_two_blocks_and_a_part_of_a_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults are seen as in all of it, also in the last block, and the model is whole again afterwards."""
    monkeypatch.setattr(looking, "LARGE", 0)
    monkeypatch.setattr(looking, "PASS_ELEMENTS", 1)
    settings: dict[str, dict[str, Any]] = {
        "model": {"n_layer": 6, "sliding_window": 9, "window_layers": (3,)}
    }
    seen = []
    monkeypatch.setitem(
        guards_preflight.GUARDS, "probe", lambda subject: seen.extend(subject.model.blocks) or ()
    )
    healthy = train(small_config(folder, settings))
    assert [block.get_submodule("attention").layer for block in seen] == [0, 3, 5]  # 3 is of another kind
    monkeypatch.setitem(guards_preflight.GUARDS, "probe", guards_preflight.probe)
    assert len(healthy.model.blocks) == 6
    right = Decoder.__init__

    def wrong(self: Decoder, *args: Any) -> None:
        right(self, *args)
        attention = self.blocks[5].get_submodule("attention")
        monkeypatch.setattr(attention, "attend", lambda q, k, v, *rest: v.mean(2, keepdim=True) + 0 * q)

    monkeypatch.setattr(Decoder, "__init__", wrong)
    assert "future-visible" in outcome(small_config(folder, settings))


# What a guard looks at by a part of a large model: all of these must be seen in the part too.
OF_A_PART = [
    plant
    for plant in PLANTED_FAULTS
    if plant.name.startswith(
        ("M1 ", "M2 ", "M3 ", "M4 ", "M6 ", "M8 ", "M9 ", "E1 ", "E4 ", "E5 ", "E7 ", "E8 ")
    )
]
# Under another name: the long row has labels at the beginning of its second document.
NAMED_OTHERWISE = {"M2 late": "other-document-visible"}


@pytest.mark.slow
@pytest.mark.parametrize("plant", OF_A_PART, ids=lambda plant: plant.name)
def test_a_planted_fault_of_a_large_model_is_caught(
    plant: PlantedFault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe's short rows too, with one long one; and the fewest new tokens."""
    for module, name, value in (
        (looking, "LARGE", 0),
        (looking, "PASS_ELEMENTS", 1),
        (guards.probe, "PROBE_ELEMENTS", 1),
    ):
        monkeypatch.setattr(module, name, value)
    settings = {"model": {"n_layer": 4}} if "base" not in plant.settings.get("train", {}) else {}
    (result,) = run_planted([dataclasses.replace(plant, settings=merged(plant.settings, settings))])
    assert NAMED_OTHERWISE.get(plant.name, plant.expected) in result.caught
    assert not result.healthy


@pytest.mark.parametrize(
    "margin, dtype, is_tie",
    [(1e-5, torch.float32, True), (1e-3, torch.float32, False), (1e-3, torch.bfloat16, True),
     (0.1, torch.bfloat16, False)],
)  # fmt: skip
def test_rounding_decides_between_logits_that_are_near(
    margin: float, dtype: torch.dtype, is_tie: bool
) -> None:
    assert tie(torch.tensor([[0.0, 0.2, 1.0, 1.0 - margin]]), dtype) is is_tie


def test_where_two_continuations_differ() -> None:
    assert [first_difference([1, 2], b) for b in ([3], [1, 3], [1], [1, 2, 4], [])] == [0, 1, 1, 2, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_that_only_decoding_sees_is_caught_in_each_format(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for seed in range(6):
        torch.manual_seed(seed)
        model = Decoder(ModelConfig(vocab_size=4096, n_layer=2, n_embd=64, n_head=4, init="xavier")).to(dtype)
        prompts = [torch.randint(4096, (n,)).tolist() for n in (16, 3)]
        assert not list(batch_faults(model.eval(), prompts))  # the sound one
        attended = architecture.attention_mask

        def seen(query: torch.Tensor, *rest: Any, right: Any = attended) -> torch.Tensor:
            mask = right(query, *rest)
            return torch.ones_like(mask) if query.size(1) == 1 else mask

        with monkeypatch.context() as patched:
            patched.setattr(architecture, "attention_mask", seen)
            found.append(bool(list(batch_faults(model, prompts))))
    assert all(found), found


def test_beams_of_sound_models_in_bf16_pass() -> None:
    for seed in range(24):
        torch.manual_seed(seed)
        model = Decoder(ModelConfig(vocab_size=1024, n_layer=2, n_embd=64, n_head=4, init="xavier"))
        prompts = torch.randint(1024, (8, 3)).tolist()
        assert not list(beam_faults(model.bfloat16().eval(), prompts))


def test_matrices_of_next_to_nothing_are_filled_and_then_as_they_were() -> None:
    """Such is an adapter after the first step of a warmup, whose dropout bf16 would round away."""
    model = Decoder(ModelConfig(vocab_size=9, block_size=8, n_layer=1, n_head=2, n_embd=8, init="normal"))
    names = ("blocks.0.attention.out.weight", "head.weight", "blocks.0.mlp.down.weight")
    tiny, whole, none = (model.get_parameter(name) for name in names)
    with torch.no_grad():
        tiny.fill_(1e-5)
        none.zero_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with looking.with_nonzero_weights(model):
        for woken in (tiny, none):
            assert woken.std() > 0.5 * woken.size(1) ** -0.5
        assert torch.equal(whole, before["head.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
