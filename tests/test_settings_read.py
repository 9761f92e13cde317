"""Every setting is read by the code that should act on it, in a run in which it has something to act on.

`unused_keys` refuses what nothing reads in a given run, and the guard of settings compares twins with and
without a key of the model; here it is seen that each key of each group is read at all. A setting that is only
stored, saved, compared or handed on is not read.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import planted_faults
import plants
import trainingmanager
from config import CONFIG_GROUPS, Config
from planted_data import write_data

HOUSE = Path(__file__).parent.parent
# These check and compare settings; they do not act on them.
WATCHERS = {"config.py", "live.py", "plants.py", *(path.name for path in (HOUSE / "guards").glob("*.py"))}


@contextmanager
def reads_noted() -> Iterator[set[str]]:
    """Full keys whose attribute is read by a file of the house that is no watcher, while it lasts.

    `dataclasses.replace` and `asdict` read all fields, from another file.
    """
    noted: set[str] = set()

    def noting(group: str, names: set[str]) -> Callable[[Any, str], Any]:
        def read(self: Any, name: str) -> Any:
            if name in names:
                code = sys._getframe(1).f_code
                file = Path(code.co_filename)
                if file.is_relative_to(HOUSE) and (file.name not in WATCHERS or code.co_name == "row_length"):
                    noted.add(f"{group}.{name}".lstrip("."))
            return object.__getattribute__(self, name)

        return read

    with pytest.MonkeyPatch.context() as patch:
        for group, kind in CONFIG_GROUPS.items():
            names = {field.name for field in dataclasses.fields(kind)}
            patch.setattr(kind, "__getattribute__", noting(group, names), raising=False)
        yield noted


def keys() -> set[str]:
    return {
        f"{group}.{field.name}".lstrip(".")
        for group, kind in CONFIG_GROUPS.items()
        for field in dataclasses.fields(kind)
    }


RUNS: list[dict[str, dict[str, Any]]] = [
    {"model": {"rope_scaling": "llama3", "rope_factor": 2.0, "fused_qkv": True, "sliding_window": 9}},
    {"tokenizer": {"kind": "bpe"}, "optimizer": {"name": "adamw", "lr": 1e-3}, "data": {"regroup": True}},
    plants.EXAMPLES,
    plants.merged(plants.TUNED, {"lora": {"new_tokens": ("<new>",)}}),
]


def test_every_setting_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path)
    monkeypatch.setattr(trainingmanager, "evaluate", lambda settings: {"side": "test"})
    monkeypatch.setattr(trainingmanager, "table", str)
    monkeypatch.setattr(trainingmanager, "write_results", lambda *args: None)
    with reads_noted() as noted:
        for settings in RUNS:
            manager = trainingmanager.train(plants.small_config(tmp_path, settings))
        trainingmanager.report(manager)
        with pytest.raises(SystemExit):  # it has no such folder, and asks whether to prove a resume first
            trainingmanager.main(Config.from_dict({"resume": True, "run": str(tmp_path / "none")}))
    assert keys() - noted == set()


def test_a_setting_that_is_set_and_never_read_is_named(tmp_path: Path) -> None:
    """Planted: a schedule that is stored, saved and watched, and never used."""
    write_data(tmp_path)
    allow = {"train": {"allow": ("schedule-ignored",), "samples": 0}}
    config = plants.small_config(tmp_path, allow | {"optimizer": {"cooldown": 0.1}})
    schedule = {"optimizer.schedule", "optimizer.warmup_steps", "optimizer.cooldown"}
    with reads_noted() as noted:
        trainingmanager.train(config)
    assert schedule <= noted
    config = plants.small_config(tmp_path, allow | {"optimizer": {"cooldown": 0.1}})
    with reads_noted() as noted, planted_faults.schedule_ignored():
        trainingmanager.train(config)
    assert not schedule & noted
