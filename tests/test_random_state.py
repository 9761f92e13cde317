"""Random states on a machine with GPUs, whose generators are numbers here: a run touches its own only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from config import Config, DataConfig, ModelConfig, TokenizerConfig, TrainConfig
from guards import preflight
from modules.precision import Precision
from training import begin, loop
from training.checkpoint import load_state
from training.random_state import random_states, set_random_states


class Gpus:
    """The generators of some GPUs, the first of which is the current one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *states: int):
        self.states = [torch.tensor([state]) for state in states]
        self.touched: set[int] = set()
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(self.states))
        monkeypatch.setattr(torch.cuda, "get_rng_state", self.get)
        monkeypatch.setattr(torch.cuda, "set_rng_state", self.set)

    def get(self, device: torch.device) -> torch.Tensor:
        self.touched.add(device.index or 0)
        return self.states[device.index or 0].clone()

    def set(self, state: torch.Tensor, device: torch.device) -> None:
        self.touched.add(device.index or 0)
        self.states[device.index or 0] = state.clone()

    def numbers(self) -> list[int]:
        return [int(state) for state in self.states]


@pytest.mark.parametrize(
    ("saved_on", "resumed_on", "expected"),
    [
        ("cuda", "cuda", [10, 2, 3]),
        ("cuda:1", "cuda:1", [1, 11, 3]),
        ("cuda:1", "cuda", [11, 2, 3]),  # As with CUDA_VISIBLE_DEVICES=1.
        ("cuda", "cuda:2", [1, 2, 10]),
        ("cpu", "cuda", [1, 2, 3]),
    ],
)
def test_a_run_goes_on_under_another_number_of_gpus(
    saved_on: str, resumed_on: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = Gpus(monkeypatch, 10, 11)
    saved = random_states(torch.device(saved_on))
    assert gpus.touched == ({torch.device(saved_on).index or 0} if saved_on != "cpu" else set())
    gpus = Gpus(monkeypatch, 1, 2, 3)
    set_random_states(saved, torch.device(resumed_on))
    assert gpus.numbers() == expected
    set_random_states(saved, torch.device("cpu"))
    assert gpus.touched <= {torch.device(resumed_on).index or 0}


@pytest.mark.parametrize(
    ("device", "expected"), [("cuda", [20, 2]), ("cuda:0", [20, 2]), ("cuda:1", [1, 21])]
)
def test_older_checkpoints_have_the_states_of_all_gpus(
    device: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = Gpus(monkeypatch, 1, 2)
    saved = random_states(torch.device("cpu")) | {"cuda": [torch.tensor([n]) for n in (20, 21, 22)]}
    set_random_states(saved, torch.device(device))
    assert gpus.numbers() == expected


def test_guards_restore_the_gpu_of_their_run(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch, 1, 2)

    def sample(subject: Any) -> Any:
        gpus.states[1] += 5
        yield "sampled"

    for name in preflight.GUARDS:
        monkeypatch.setitem(preflight.GUARDS, name, sample)
    monkeypatch.setattr(preflight, "BY_BLOCKS", ())
    subject: Any = SimpleNamespace(precision=Precision(torch.device("cuda:1"), torch.float32, ""), model=None)
    preflight.preflight(subject)
    assert gpus.numbers() == [1, 2] and gpus.touched == {1}


def test_a_run_of_two_gpus_goes_on_without_one(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoint is one from before a run kept its own GPU's state alone."""
    monkeypatch.setattr(begin, "preflight", lambda subject, allowed: [])
    config = Config(
        data=DataConfig(
            str(corpus), validation_one_in=4, test_one_in=4, cache=str(tmp_path / "cache"), workers=1
        ),
        tokenizer=TokenizerConfig(vocab_size=300, min_count=2),
        model=ModelConfig(block_size=32, n_layer=1, n_head=2, n_embd=16),
        train=TrainConfig(run=str(tmp_path / "run"), max_steps=1, batch_size=4, device="cpu"),
    )
    begin.train(config)

    def of_two_gpus(manifest: Any) -> dict[str, Any]:
        state = load_state(manifest)
        state["random"]["cuda"] = [torch.tensor([1]), torch.tensor([2])]
        return state

    monkeypatch.setattr(loop, "load_state", of_two_gpus)
    resumed = replace(config, train=replace(config.train, max_steps=2, resume=True))
    assert begin.train(resumed).state.step == 2
    assert "warning: the run was on a GPU and is on cpu now, or its precision" in capsys.readouterr().err
