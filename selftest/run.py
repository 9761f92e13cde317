"""The self-test: every planted fault is caught by its name, and its healthy twin passes.

Both are runs of `training.begin.train`, the function that trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
)
from selftest.data import write_base, write_data
from selftest.planted_faults import PLANTED_FAULTS, PREVENTED, PlantedFault, merged
from training import begin


def small_config(folder: Path, settings: dict[str, dict[str, Any]]) -> Config:
    """Return the settings of a run of five updates of a tiny model, with its data in `folder`."""
    groups: dict[str, dict[str, Any]] = {
        "data": {"source": "long", "validation_one_in": 4, "test_one_in": 4, "workers": 1},
        "tokenizer": {"vocab_size": 300, "min_count": 2},
        "model": {"block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.1},
        "optimizer": {"warmup_steps": 2},
        "train": {"max_steps": 5, "batch_size": 4, "validate_every": 0},
    }
    groups = {name: values | settings.get(name, {}) for name, values in groups.items()}
    groups["data"] |= {"source": str(folder / groups["data"]["source"]), "cache": str(folder / "cache")}
    groups["train"] |= {"run": tempfile.mkdtemp(dir=folder)}
    if "base" in groups["train"]:
        if not (folder / "base").exists():
            write_base(folder)
        groups["train"]["base"] = str(folder / "base")
        groups["model"], groups["tokenizer"] = settings.get("model", {}), settings.get("tokenizer", {})
    if "path" in groups["tokenizer"]:
        groups["tokenizer"] |= {"path": str(folder / groups["tokenizer"]["path"])}
    return Config(
        DataConfig(**groups["data"]),
        TokenizerConfig(**groups["tokenizer"]),
        ModelConfig(**groups["model"]),
        LoraConfig(**settings.get("lora", {})),
        optimizer=OptimizerConfig(**groups["optimizer"]),
        train=TrainConfig(**groups["train"]),
    )


def outcome(config: Config) -> str:
    """Return what stopped the run, or an empty string; a crash is not a fault caught by name."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            begin.train(config)
    except ValueError as error:
        return str(error)
    except Exception as error:
        return f"a crash ({type(error).__name__})"
    return ""


def begun(config: Config, resumed: bool) -> Config:
    """Return the settings of a run, or, after its first three updates, those with which it goes on."""
    if not resumed:
        return config
    first = dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=3))
    stopped_by = outcome(first)
    assert not stopped_by, stopped_by
    return dataclasses.replace(config, train=dataclasses.replace(config.train, resume=True))


@dataclass(frozen=True)
class PlantedResult:
    """The outcome of a planted fault and of its healthy twin."""

    plant: PlantedFault
    caught: str  # The sentence that stopped the faulty run, or nothing.
    healthy: str  # The sentence that stopped its twin, or nothing.
    seconds: float

    @property
    def passed(self) -> bool:
        return self.plant.expected in self.caught and not self.healthy


def run_planted(planted: list[PlantedFault], twins: dict[str, str] | None = None) -> Iterator[PlantedResult]:
    """Plant each fault in turn, and run its healthy twin before it.

    Args:
        twins: What stopped healthy runs, by their settings: one run is the twin of several. Added to.
    """
    twins = {} if twins is None else twins
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        for number, plant in enumerate(planted):
            twin = repr((plant.settings, plant.resumed))
            if twin not in twins:
                twins[twin] = outcome(begun(small_config(folder, plant.settings), plant.resumed))
            config = small_config(folder, merged(plant.settings, plant.wrong))
            cache = str(folder / f"cache{number}")  # Of its own: the fault may be in what is built.
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache=cache))
            config = begun(config, plant.resumed)
            started = time.perf_counter()
            with plant.fault():
                caught = outcome(config)
            yield PlantedResult(plant, caught, twins[twin], time.perf_counter() - started)


def selftest(planted: list[PlantedFault] | None = None) -> bool:
    """Print a line for each planted fault; return whether all were caught by name and all twins passed."""
    passed = True
    for result in run_planted(PLANTED_FAULTS if planted is None else planted):
        plant = result.plant
        verdict = f"caught by {plant.expected!r} in {result.seconds:.1f} s"
        if plant.expected not in result.caught:
            verdict = f"MISSED: stopped by {result.caught!r}" if result.caught else "MISSED"
        twin = f"healthy: REFUSED by {result.healthy}" if result.healthy else "healthy: passes"
        print(f"{plant.name:14} {plant.story:45} {verdict}; {twin}", flush=True)
        passed &= result.passed
    if planted is None:
        for name, reason in PREVENTED.items():
            print(f"{name:14} {reason}")
    return passed
