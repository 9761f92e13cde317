"""The plan of a run: its memory and time, by measurements of its first blocks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import trainingmanager
from architecture import Decoder
from config import Config, LoraConfig, ModelConfig, OptimizerConfig, TrainConfig, parse_config
from guards import preflight
from selftest import plan_child
from training import plan
from training.loop import TrainingManager
from training.plan import Cost

pytestmark = pytest.mark.usefixtures("unguarded")

STARCODER_1B = {"model_type": "gpt_bigcode", "n_embd": 2048, "n_layer": 24, "n_head": 16, "n_positions": 8192}


def asked(config: Config, family: str | None, model: ModelConfig, n_layer: int) -> dict[str, object]:
    return {
        "config": config.to_dict(),
        "model": dataclasses.asdict(model),
        "family": family,
        "rows": 16,
        "n_layer": n_layer,
    }


@pytest.mark.parametrize("base_format", ["fp32", "nf4"])
def test_what_blocks_take_is_linear_and_counted_right(
    base_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "DEPTHS", (1, 3))
    values = {"model_type": "gpt_bigcode", "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(values), "utf-8")
    config = Config(
        lora=LoraConfig(r=4, targets=("c_attn",)),
        optimizer=OptimizerConfig(name="adamw"),
        train=TrainConfig(
            base=str(tmp_path),
            batch_size=2,
            base_format=base_format,  # pyright: ignore[reportArgumentType]
            device="cpu",
            precision="fp32",
        ),
    )
    model, family = plan.shape_of(config)
    one, two, three = (plan_child.measure(asked(config, family, model, n)) for n in (1, 2, 3))
    foreseen = one.at(three, 2, (1, 3))
    assert (foreseen.held_bytes, foreseen.trained_bytes) == (two.held_bytes, two.trained_bytes)
    # c_attn is 64 -> 64 + 2 heads of 16: A (4, 64) and B (96, 4); each with gradient and two moments in fp32.
    adapters = 3 * 4 * (64 + 96) * 4
    steps = 3 * 2 * 4  # AdamW counts its steps in a number for each matrix
    assert three.trained_bytes == 4 * adapters + steps
    matrices = 3 * (64 * 96 + 64 * 64 + 2 * 64 * 256)
    per_weight = 4.0 if base_format == "fp32" else 0.5 + 0.125
    others = 4 * (300 * 64 + 1024 * 64 + 2 * 64 + 3 * (4 * 64 + 96 + 64 + 256 + 64))
    assert three.held_bytes == pytest.approx(matrices * per_weight + others, rel=0.05)
    assert three.step_bytes > three.held_bytes and three.micro_seconds > 0


def test_a_run_from_scratch_trains_all_of_its_weights() -> None:
    config = Config(
        model=ModelConfig(n_layer=1, n_embd=24, block_size=16),
        train=TrainConfig(batch_size=2, device="cpu", max_steps=100),
    )
    model, family = plan.shape_of(config)
    assert family is None and model.vocab_size == config.tokenizer.vocab_size
    cost = plan_child.measure(asked(config, None, model, 1))
    weights = sum(p.numel() for p in Decoder(model).parameters())
    assert cost.held_bytes == 0
    assert 3 * 4 * weights <= cost.trained_bytes <= 4 * 4 * weights + 1000  # Muon keeps one moment, AdamW two


@pytest.mark.guarded
def test_the_child_does_what_a_run_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's own guards, each to its end, updates, validation and checkpoint, in this order."""
    done: list[str] = []
    guards = dict(preflight.GUARDS)

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            done.append(name)
            return function(*args, **options)

        return call

    def to_its_end(name: str) -> Any:
        def guard(subject: Any) -> Any:
            yield from guards[name](subject)
            done.append(name)

        return guard

    for name in guards:
        monkeypatch.setitem(preflight.GUARDS, name, to_its_end(name))
    for place, name in (
        (TrainingManager, "loss"),
        (TrainingManager, "score"),
        (plan_child, "save_checkpoint"),
    ):
        monkeypatch.setattr(place, name, noted(name, getattr(place, name)))
    config = Config(
        model=ModelConfig(n_layer=1, n_embd=24, block_size=16, vocab_size=50),
        train=TrainConfig(batch_size=2, device="cpu"),
    )
    model, _ = plan.shape_of(config)
    cost = plan_child.measure(asked(config, None, model, 1))
    assert min(cost.guard_bytes, cost.step_bytes, cost.save_bytes) > 0
    assert [name for name in done if name in guards] == [*guards]
    after = done[done.index([*guards][-1]) + 1 :]
    steps = after.index("score")
    assert steps >= plan_child.WARMUP + plan_child.STEPS[0]
    assert after == ["loss"] * steps + ["score", "save_checkpoint"]


def test_a_line_through_two_depths_gives_the_others() -> None:
    first, second = Cost(5, 10, 12, 1, 2, 0.5, 0.1), Cost(6, 16, 14, 3, 2, 0.9, 0.05)
    found = first.at(second, 11, (2, 8))
    assert found == Cost(6.5, 19, 15, 4, 2, pytest.approx(1.1), 0.1) and found.peak == 19  # pyright: ignore[reportArgumentType]
    config = Config(train=TrainConfig(accumulation=3, batch_size=2, max_steps=50))
    made = plan.Plan(found, 11, (2, 8), 128, config)
    assert made.step_seconds == pytest.approx(3.4)
    said = str(made)
    assert (
        "1,059, of 768 tokens and 3.40 s" in said and "2 and 8 of 11 blocks" in said and "0.05 hours" in said
    )
    assert "all 11 blocks" in str(dataclasses.replace(made, depths=(11,))) and "GB (in" not in said
    for stage, words in (("guard_bytes", "in the guards"), ("save_bytes", "in saving")):
        more = dataclasses.replace(found, **{stage: 2e9})
        assert f"2.00 GB ({words})" in str(dataclasses.replace(made, cost=more))


def test_small_models_are_measured_whole_and_large_ones_at_two_depths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []

    def measured(config: Config, model: ModelConfig, family: str | None, n: int, rows: int) -> Cost:
        made.append(n)
        return Cost(n, n, n, n, n, n, n)

    monkeypatch.setattr(plan, "_measured", measured)
    for width, depths in ((64, [12]), (2048, [2, 8])):
        made.clear()
        found = plan.plan(Config(model=ModelConfig(n_layer=12, n_head=4, n_embd=width)))
        assert made == depths and found.cost.peak == 12


# The shape of Qwen3-Coder-30B-A3B.
EXPERTS_30B = {"model_type": "qwen3_moe", "num_hidden_layers": 48, "head_dim": 128, "norm_topk_prob": True}


def test_a_base_that_no_memory_holds_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(EXPERTS_30B), "utf-8")
    made: list[int] = []
    monkeypatch.setattr(
        plan, "_measured", lambda *given: (made.append(given[3]), Cost(1, 1, 1, 1, 1, 1, 1))[1]
    )
    memory = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 24 * 10**9 // 4096}
    monkeypatch.setattr(plan.os, "sysconf", memory.__getitem__)

    def asked_as(base_format: Any) -> Config:
        train = TrainConfig(base=str(tmp_path), base_format=base_format, device="cpu", precision="bf16")
        return Config(lora=LoraConfig(r=4), train=train)

    monkeypatch.setattr(plan, "refuse_mistakes", lambda config: None)
    for base_format, needed in (("fp32", 122), ("bf16", 61), ("auto", 61)):
        with pytest.raises(
            ValueError,
            match=f"take about {needed} GB as .* 24 GB; as nf4 they take 17 GB .* as int8, .* 31 GB",
        ):
            plan.plan(asked_as(base_format))
    assert not made and plan.plan(asked_as("nf4")) and made == [1, 2]


def test_only_config_json_of_a_base_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(STARCODER_1B), "utf-8")
    model, family = plan.shape_of(Config(train=TrainConfig(base=str(tmp_path))))
    assert (family, model.n_layer, model.n_kv_head, model.n_inner) == ("gpt_bigcode", 24, 1, 8192)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        plan.shape_of(Config(train=TrainConfig(base=str(tmp_path))))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', "utf-8")
    with pytest.raises(ValueError, match="has model_type 'bert'; known are"):
        plan.shape_of(Config(train=TrainConfig(base=str(tmp_path))))


def test_the_command_says_a_mistake_in_one_sentence_and_starts_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = STARCODER_1B | {"n_embd": 64, "n_head": 4, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(small), "utf-8")
    run = tmp_path / "run"
    words = ["--plan", "--base", str(tmp_path), "--row_length", "9000", "--run", str(run)]
    with pytest.raises(SystemExit) as ended:
        trainingmanager.main(parse_config(words))
    assert ended.value.code == 2 and not run.exists()
    assert "row_length is 9000, and" in capsys.readouterr().err
    words[words.index("9000")] = "64"
    with pytest.raises(SystemExit) as ended:
        trainingmanager.main(parse_config([*words, "--lora.targets", "q_proj"]))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: lora.targets: the model has no q_proj; it has")
    with pytest.raises(ValueError, match=r"^1 of 24 blocks could not be measured: KeyError: 'nope'$"):
        model, _ = plan.shape_of(parse_config(["--base", str(tmp_path)]))
        plan._measured(Config(lora=LoraConfig(r=1)), model, "nope", 1, 8)  # Only the child reads the family.


@pytest.mark.slow
def test_the_command_prints_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    trainingmanager.main(parse_config(["--plan", "--model.n_embd", "48", "--max_steps", "10"]))
    assert "peak memory" in capsys.readouterr().out
