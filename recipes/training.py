"""Begin a training run, continue it, or leave it as it is, depending on the state of its folder."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from config import SETTINGS, Config, write_atomically
from config.schema import flat
from config.setting import REFUSED, WARNED
from config.yamlfile import read_yaml
from modules.precision import choose_device, choose_precision
from training.begin import train
from training.checkpoint import step_folders
from training.log import say
from training.loop import BudgetUsed
from training.run import resolved_format
from training.runfolder import note_base, with_data_resolved
from training.signals import RESUMABLE

FINISHED = "asked.json"  # The requested settings of a run whose budget is used, or whose patience ended.

BUDGET = {"max_seconds", "max_steps", "max_epochs", "patience"}
BASE = {"base", "base_revision"}  # A base may move, since training compares its fingerprint.
DECIDE_FORMAT = {"precision", "device"}  # These decide how a base is stored whose format is `auto`.


def finish(config: Config, is_preset: bool = False) -> bool:
    """Train in `config.train.run` until the budget is used; return False if it was before this call.

    Args:
        config: The run's settings.
        is_preset: As for `training.begin.train`.

    Raises:
        ValueError: As by `training.begin.train`, and for a run that was finished with another fixed setting.
        SystemExit: With 75, when a signal stopped training; the next call goes on.
    """
    folder = Path(config.train.run)
    config = _as_begun(config, folder).with_optimizer_defaults()
    mark = folder / FINISHED
    if mark.is_file():
        try:
            made = Config.from_dict(json.loads(mark.read_text("utf-8"))).with_optimizer_defaults()
        except ValueError as error:
            raise ValueError(
                f"{mark} is damaged ({error}); remove it, and the run is looked at anew"
            ) from None
        before, now = (flat(with_data_resolved(one, folder)) for one in (made, config))
        changed = [key for key in now if before[key] != now[key]]
        for key in changed:
            if SETTINGS[key].on_resume == REFUSED:
                raise ValueError(
                    f"{folder} was finished with {key} {before[key]}, and now it is {now[key]}; set it back, "
                    "or name another --out"
                )
        if DECIDE_FORMAT & {*changed}:
            _refuse_another_format(config, folder)
        if not (BUDGET | BASE) & {*changed}:
            for key in changed:
                if SETTINGS[key].on_resume == WARNED:
                    print(
                        f"warning: {key} was {before[key]} when {folder} was trained and is {now[key]} now; "
                        "it is finished, and only its scores are made by that",
                        file=sys.stderr,
                    )
            return False
    begun = (folder / "config.yaml").is_file()
    if begun and not step_folders(folder / "checkpoints"):  # The run was killed before its first checkpoint.
        shutil.rmtree(folder)
        begun = False
    try:
        manager = train(replace(config, train=replace(config.train, resume=begun)), is_preset=is_preset)
    except BudgetUsed:
        # It was killed between its last checkpoint and the mark, or its base, whose fingerprint training has
        # compared, lies elsewhere now.
        note_base(folder, config.train.base)
    else:
        if manager.stop_signal is not None and manager.progress() < 1:
            say(f"stopped at step {manager.state.step}; the same command goes on")
            sys.exit(RESUMABLE)
    write_atomically(mark, json.dumps(config.to_dict()))
    return True


def _as_begun(config: Config, folder: Path) -> Config:
    """Return the config without healing of prompts' ends, for a run that was begun before there was any."""
    saved = folder / "config.yaml"
    if not saved.is_file() or "heal" in read_yaml(saved).get("data", {}):
        return config
    return replace(config, data=replace(config.data, heal=False))


def _refuse_another_format(config: Config, folder: Path) -> None:
    """Raise a ValueError if a base would be stored as another format now than in the finished run."""
    train = config.train
    if not (train.base and config.lora.r):
        return
    requested = choose_precision(choose_device(train.device), train.precision)
    now = resolved_format(train.base_format, requested.dtype)
    before = read_yaml(folder / "config.yaml")["base_format"]
    if now != before:
        raise ValueError(
            f"{folder} was finished on a base stored as {before}, and with --precision {train.precision} on "
            f"{requested.device.type} it would be stored as {now}; set it back, or name another --out"
        )
