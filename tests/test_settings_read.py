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
from conftest import copy_planted

import trainingmanager
from config import CONFIG_GROUPS, Config
from config.files import REPOSITORY
from data import prepare
from selftest import faults
from selftest.planted_faults import EXAMPLES, GRADED, TUNED, merged
from selftest.run import small_config
from training import begin, report

# These check and compare settings, and so does what they call; they do not act on them.
WATCHERS = {*map(str, (REPOSITORY / "guards").glob("*.py"))}
HANDED_ON = {*map(str, (REPOSITORY / "config").glob("*.py")), str(REPOSITORY / "selftest/run.py")}


@contextmanager
def reads_noted() -> Iterator[set[str]]:
    """Full keys whose attribute is read by a file of the repository that is no watcher, while it lasts.

    `dataclasses.replace` and `asdict` read all fields, from another file.
    """
    noted: set[str] = set()

    def noting(group: str, names: set[str]) -> Callable[[Any, str], Any]:
        def read(self: Any, name: str) -> Any:
            if name in names:
                frame = sys._getframe(1)
                reader, function = frame.f_code.co_filename, frame.f_code.co_name
                if reader.startswith(f"{REPOSITORY}/") and (
                    reader not in HANDED_ON or function == "row_length"
                ):
                    callers = set()
                    while frame is not None:
                        callers.add(frame.f_code.co_filename)
                        frame = frame.f_back
                    if not callers & WATCHERS:
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
    EXAMPLES,
    GRADED,
    merged(TUNED, {"lora": {"new_tokens": ("<new>",)}}),
    {"tokenizer": {"kind": "bpe"}, "optimizer": {"name": "adamw"}, "data": {"skip_undecodable": True}},
]


def test_every_setting_is_read(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_planted(planted, tmp_path)
    monkeypatch.setattr(prepare, "POOL_PAYS_BYTES", 0)
    monkeypatch.setattr(report, "evaluate", lambda *args: {"side": "test"})
    monkeypatch.setattr(report, "table", str)
    monkeypatch.setattr(report, "write_results", lambda *args: None)
    managers = []
    with reads_noted() as noted:
        for settings in RUNS:
            if "skip_undecodable" in settings.get("data", {}):  # the last one, since the others would stop
                (tmp_path / "long" / "latin1.py").write_bytes(b"# caf\xe9\n")
            managers.append(begin.train(small_config(tmp_path, settings)))
        report.report(managers[-1])
        with pytest.raises(SystemExit):  # it has no such folder, and asks whether to prove a resume first
            trainingmanager.main(Config.from_dict({"resume": True, "run": str(tmp_path / "none")}))
    assert keys() - noted == set()


def test_a_setting_that_is_set_and_never_read_is_named(planted: Path, tmp_path: Path) -> None:
    """Planted: a schedule that is stored, saved and watched, and never used."""
    copy_planted(planted, tmp_path)
    allow = {"train": {"allow": ("schedule-ignored", "differs-from-reference"), "samples": 0}}
    config = small_config(tmp_path, allow | {"optimizer": {"cooldown": 0.1}})
    schedule = {"optimizer.schedule", "optimizer.warmup_steps", "optimizer.cooldown"}
    with reads_noted() as noted:
        begin.train(config)
    assert schedule <= noted
    config = small_config(tmp_path, allow | {"optimizer": {"cooldown": 0.1}})
    with reads_noted() as noted, faults.schedule_ignored():
        begin.train(config)
    assert not schedule & noted
