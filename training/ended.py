"""A run that is resumed when its training is done: what is missing of its outputs is made.

The token store in the cache is enough for all of them: the source of the data may be gone.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from config import Config, TrainConfig
from config.yamlfile import read_yaml
from dataset import stored_data
from guards.faults import refuse_unknown_faults
from modules.precision import choose_device, choose_precision
from suites.evaluated import data_config, data_of
from training.checkpoint import Manifest, best_of, checkpoints, load_counters, newest_whole
from training.log import say
from training.outputs import OUTPUTS, note_made, outputs_made
from training.report import (
    EndedRun,
    final_settings,
    make_adapter,
    make_pictures,
    precision_of_scores,
    report,
)
from training.run import load_run
from training.runfolder import claimed_folder, note_base, refuse_changes, with_data_resolved
from training.state import budget_used


def ended(train: TrainConfig, folder: Path) -> Manifest | None:
    """Return the newest checkpoint of a run whose budget or patience is used up; None where it goes on."""

    def is_done(manifest: Manifest) -> bool:
        counters = load_counters(manifest)
        run = counters["run"]
        is_patient = not train.patience or run["validations_without_better"] < train.patience
        return not is_patient or budget_used(train, run["step"], counters["epoch"], run["seconds"]) >= 1

    newest = checkpoints(folder / "checkpoints")[-1:]
    try:
        if not newest or not is_done(newest[0]):
            return None  # Training itself compares the checksums.
        whole = newest_whole(folder / "checkpoints")
        return whole if is_done(whole) else None
    except (OSError, ValueError, KeyError, TypeError):  # A damaged checkpoint, which training names.
        return None


class Lost(ValueError):
    """The base or the data of a run that ended, which some of its outputs need, are gone or have changed."""


def finish_ended(config: Config) -> bool:
    """Make what is missing of a run whose training is done, and warn of what cannot be made.

    Returns:
        Whether the training is done.

    Raises:
        ValueError: The folder holds no run, a file of the run is damaged, or a setting was changed that a run
            may not change.
        OSError: The disk is full or read-only.
    """
    with claimed_folder(config) as folder:
        last = ended(config.train, folder)
        if last is None:
            return False
        refuse_unknown_faults(config.train.allow)
        choose_precision(choose_device(config.train.device), precision_of_scores(config.train))
        config = with_data_resolved(config, folder)
        saved = Config.from_dict(read_yaml(folder / "config.yaml"))
        vocab_size = config.model.vocab_size or saved.model.vocab_size
        model = dataclasses.replace(config.model, vocab_size=vocab_size).resolved()
        refuse_changes(folder, dataclasses.replace(config, model=model))
        say(
            f"the training of {folder} is done, at step {last.step:,}; to train on, raise what ended it: "
            "--max_steps, --max_epochs and --max_seconds count from the run's beginning"
        )
        best = best_of(checkpoints(folder / "checkpoints")) or last
        made = outputs_made(folder, best.step)
        missing = [name for name in OUTPUTS if name not in made and (name != "adapter" or config.lora.r)]
        if not missing:
            say("nothing is missing: its scores, samples and pictures are there")
            return True
        note_made(folder, *made)
        try:
            _make_missing(folder, config, missing)
            say(f"made now: {', '.join(missing)}")
        except Lost as error:  # Another try would end alike, so that the command does not fail.
            there = outputs_made(folder, best.step)
            lost = " and ".join(name for name in missing if name not in there)
            reason = " ".join(str(error).split())
            print(f"warning: the training is whole, and its {lost} cannot be made: {reason}", file=sys.stderr)
    return True


def _make_missing(folder: Path, config: Config, missing: Sequence[str]) -> None:
    """Make the outputs that need no data, then the rest; Lost where base or data are gone or have changed."""
    if "pictures" in missing:
        make_pictures(folder)
    if [*missing] == ["pictures"]:
        return
    try:
        run = load_run(folder, base=config.train.base)
    except ValueError as error:
        if config.train.base is None:  # Then a file of the run itself is at fault.
            raise
        raise Lost(str(error)) from None
    note_base(folder, config.train.base)
    if "adapter" in missing:
        make_adapter(folder, run, config.train.allow)
    if {"scores", "samples"} & {*missing}:
        device = choose_device(config.train.device)
        precision = choose_precision(device, precision_of_scores(config.train))
        settings = final_settings(folder, config, device)
        data = stored_data(data_config(run, settings), run.tokenizer, run.fingerprints["data"])
        if data is None:
            try:
                data = data_of(run, settings)
            except ValueError as error:
                raise Lost(str(error).replace("--source", "--data.source")) from None
        rest = [name for name in missing if name in ("scores", "samples")]
        report(EndedRun(folder, config, data, device, precision), rest)
