"""The settings of a sweep, from YAML and flags: its own, the space, and the config that is varied."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from config import CONFIG_GROUPS, RECIPES, Config, parse_config
from config.console import refuse, say
from config.describe import config_as_yaml
from config.flags import Given, asks_for_help, flags_of, nearest, read_words, without_print
from config.help import settings_as_yaml, show_help
from config.parser import values_of
from config.yamlfile import read_yaml
from sweeps.space import Space, parse_space

DEFAULT = RECIPES / "sweep.yaml"
# Whether less of an objective is better, by its name.
OBJECTIVES = {
    "bits_per_byte": True,
    "parameters": True,
    "tokens_per_second": False,
}
NEEDS = {"cmaes": "cmaes", "gp": "scipy"}  # The package of a sampler that Optuna does not require itself.
TRIALS = 30  # The budget where none is set.


@dataclass(frozen=True)
class SweepConfig:
    """How long a sweep goes on, with how many workers, and how it chooses.

    Args:
        study: Folder of the sweep: runs, journal, table, pictures and the best config. The same command goes
            on with the study that is there. By default `runs/sweep`, and the config file's name. Its last
            part is the study's name in the storage.
        storage: `journal:FILE`, `grpc://HOST:PORT`, or any URL that Optuna knows (`sqlite:///FILE`,
            `postgresql://...`); by default a journal in the study's folder.
        trials: Budget in trials; by default 30 where no budget is set, and all of a grid.
        steps: Budget in training steps of all trials; no trial begins that might go beyond it.
        seconds: Budget in seconds by the clock while at least one worker is at it, repeats included.
        workers: Processes on this machine, which share its cores; each has one of several GPUs, in turn.
        sampler: How settings are chosen: `tpe`, `random`, `grid`, `cmaes` or `gp`.
        pruner: How trials that do badly are ended early: `median`, `hyperband`, `halving`, `patient` or
            `none`; `auto` is median, and none with several objectives or without validations on the way.
        objectives: `bits_per_byte` of validation, `parameters`, `tokens_per_second`; several give a front.
        sampler_seed: Seed of the sampler.
        repeat_best: How many of the best settings are trained again with other seeds, and the config itself.
        repeat_seeds: With how many other seeds; 0 repeats nothing.
        deaths: A trial at which this many workers died in a row, without a validation between, has failed.
        hung_after: A worker that ends no step in so many seconds is killed, and its trial has failed; 0 waits
            for ever. Guards, data and validation lie between two steps.
    """

    study: str = ""
    storage: str = field(default="", repr=False)  # It may hold a password.
    trials: int = 0
    steps: int = 0
    seconds: float = 0.0
    workers: int = 1
    sampler: Literal["tpe", "random", "grid", "cmaes", "gp"] = "tpe"
    pruner: Literal["auto", "none", "median", "hyperband", "halving", "patient"] = "auto"
    objectives: tuple[str, ...] = ("bits_per_byte",)
    sampler_seed: int = 0
    repeat_best: int = 2
    repeat_seeds: int = 3
    deaths: int = 5
    hung_after: float = 1800.0

    @property
    def folder(self) -> Path:
        return Path(self.study)

    @property
    def name(self) -> str:
        """The study's name in its storage: the last part of its folder, also where that is `.`."""
        return Path(os.path.abspath(self.study)).name  # With resolve() a link would lose its own name.


@dataclass(frozen=True)
class SweepSettings:
    """All that a worker needs; plain data, handed to its process.

    `config` is varied by the space, and the best trial is compared with it.
    """

    sweep: SweepConfig
    space: Space
    config: Config


class _Words(NamedTuple):
    """The flags of a command line and its config files, sorted by who reads them.

    `own` are flags of the sweep, `rest` those of the ordinary training; `sections` are taken out of `files`.
    """

    own: list[Given]
    rest: list[Given]
    sections: dict[str, dict[str, Any]]
    files: list[Path]


def parse_settings(words: list[str]) -> SweepSettings:
    """Parse a command line; a mistake prints one sentence and exits with 2."""
    own = {f"--{f.name}" for f in fields(SweepConfig)}
    flags = flags_of(CONFIG_GROUPS) | flags_of({"": SweepConfig})
    if asks_for_help(words, flags):
        show_help({"": SweepConfig}, _HELP)
    given, prints = without_print(read_words(words, flags, subject=""))
    if all(one.flag != "--config" for one in given):
        given = [Given("--config", str(DEFAULT)), *given]
    found = _sorted(given, own)
    section = found.sections["sweep"]
    unknown = next((str(key) for key in section if f"--{key}" not in own), None)
    if unknown is not None:
        near = nearest(f"--{unknown}", own).removeprefix("--")
        refuse(f"sweep: {unknown} is no setting" + (f"; did you mean {near}?" if near else ""))
    # A null leaves a setting open.
    in_file = {key: value for key, value in section.items() if value is not None}
    if not isinstance(in_file.get("storage", ""), str):  # The parser's own message would show it.
        refuse("sweep: storage is no text; write it as in storage: sqlite:///FILE")
    before = [Given("--config", json.dumps(in_file, default=str))] if in_file else []
    values = values_of({"": SweepConfig}, [*before, *found.own])
    config = parse_config([str(one) for one in found.rest], "Sweep over the settings of a training.")
    try:
        settings = _settings_of(values, config, found)
    except ValueError as error:
        return refuse(str(error))  # exits
    if prints:
        space = yaml.safe_dump({"space": found.sections["space"]}, sort_keys=False, width=2**20)
        say(f"{settings_as_yaml(settings.sweep, 'sweep')}\n\n{space}\n{config_as_yaml(config)}")
        sys.exit(0)
    return settings


def _sorted(given: list[Given], own: Collection[str]) -> _Words:
    """Sort what a command line gives; `own` are the flags of the sweep."""
    found = _Words([], [], {"space": {}, "sweep": {}}, [])
    for one in given:
        if one.flag == "--config":
            found.files.append(Path(one.value))
            found.rest.extend(_without_sections(one.value, found.sections))
        else:
            (found.own if one.flag in own else found.rest).append(one)
    return found


def _settings_of(values: dict[str, Any], config: Config, words: _Words) -> SweepSettings:
    """Build the settings from the sweep's own values, the config and the `space:` section.

    Raises:
        ValueError: They contradict each other, or there is no space.
    """
    if not words.sections["space"]:
        raise ValueError(
            f"{' and '.join(map(str, words.files))}: there is no section `space:`, or it is empty; say there "
            "what varies, such as `optimizer.lr: {log: [1e-3, 1e-1]}`"
        )
    space = parse_space(words.sections["space"], config)
    sweep = _checked(SweepConfig(**values), config, space, words.files[-1])
    _refuse_flags(space, words.rest)
    most = space.most_steps(config)
    if sweep.steps and not most:
        raise ValueError("a budget of --steps needs max_steps in the config, the steps of one trial")
    if sweep.steps and sweep.steps < most:
        raise ValueError(
            f"--steps is {sweep.steps}, and one trial may take {most} of them, its max_steps; set "
            f"--steps to {most} at least, or max_steps to {sweep.steps} at most"
        )
    if sweep.sampler == "grid":
        space.grid(config)
    return SweepSettings(sweep, space, config)


_HELP = (
    "Sweep over any setting of a training. Every flag and YAML key of trainingmanager.py is taken too; what "
    "varies stands in the section `space:` of a --config file, and these flags may stand in `sweep:`."
)


def _without_sections(path: str, sections: dict[str, dict[str, Any]]) -> list[Given]:
    """Take the sections `space` and `sweep` out of a config file, and return what is left as one flag."""
    try:
        values = read_yaml(Path(path))
    except (OSError, ValueError):
        return [Given("--config", path)]  # The parser tells that the file cannot be read.
    if not isinstance(values, dict):
        return [Given("--config", path)]
    for key in values:
        near = difflib.get_close_matches(str(key), sections, 1, 0.6)
        if near and key not in (*sections, *CONFIG_GROUPS, *(f.name for f in fields(CONFIG_GROUPS[""]))):
            refuse(f"{key} in {path} is no section; did you mean {near[0]}?")
    for name, known in sections.items():
        found = values.pop(name, None) or {}  # A section whose lines are all comments is null.
        if not isinstance(found, dict):
            refuse(f"{name} in {path} must be a mapping of keys to values")
        known |= found
    return [Given("--config", json.dumps(values, default=str))] if values else []


def _refuse_flags(space: Space, given: list[Given]) -> None:
    """Raise ValueError for a flag that sets what the space varies.

    A value in a file does not contradict the space: the sweep is compared with it.
    """
    flags = {one.flag for one in given}
    for parameter in space.parameters:
        for key in (
            space.settings({parameter.key: parameter.choices[0]}) if parameter.arms else (parameter.key,)
        ):
            if f"--{key}" in flags:
                raise ValueError(f"--{key} is set, and the space varies it; leave one of them out")


def _checked(sweep: SweepConfig, config: Config, space: Space, file: Path) -> SweepConfig:
    """Return the settings with what was left open filled in; ValueError for what contradicts itself."""
    for name, least in (
        ("trials", 0),
        ("steps", 0),
        ("seconds", 0),
        ("workers", 1),
        ("sampler_seed", 0),
        ("repeat_best", 1),
        ("repeat_seeds", 0),
        ("deaths", 1),
        ("hung_after", 0),
    ):
        if not getattr(sweep, name) >= least:
            raise ValueError(f"{name} is {getattr(sweep, name)}; it must be at least {least}")
    for name in sweep.objectives:
        if name not in OBJECTIVES:
            near = difflib.get_close_matches(name, OBJECTIVES, 1, 0.0)[0]
            raise ValueError(f"objectives: {name} is none of {', '.join(OBJECTIVES)}; did you mean {near}?")
    if not sweep.objectives or len(set(sweep.objectives)) < len(sweep.objectives):
        raise ValueError("objectives must be named, each once")
    several = len(sweep.objectives) > 1
    if several and sweep.sampler == "cmaes":
        raise ValueError("sampler cmaes knows one objective; take tpe, random, grid or gp for several")
    package = NEEDS.get(sweep.sampler)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"sampler {sweep.sampler} needs the package {package}, which is not installed: pip install "
            f"{package}, or take tpe"
        )
    if sweep.sampler == "cmaes" and all(p.kind == "choice" or p.when for p in space.parameters):
        raise ValueError(
            "sampler cmaes chooses from ranges that always vary, and the space has none; take tpe, random, "
            "grid or gp"
        )
    by_loss = sweep.objectives == ("bits_per_byte",)
    if not by_loss and sweep.pruner not in ("auto", "none"):
        raise ValueError(
            f"pruner {sweep.pruner} goes by bits_per_byte alone; take none with other objectives"
        )
    first, most = space.first_validation(config), space.most_steps(config)
    if sweep.pruner not in ("auto", "none") and not first:
        raise ValueError(
            f"pruner {sweep.pruner} goes by validations on the way, and validate_every is 0; set one of them"
        )
    if sweep.pruner not in ("auto", "none") and most and first >= most:
        raise ValueError(
            f"pruner {sweep.pruner} goes by validations on the way, and the first is at step {first} of "
            f"{most}; set validate_every lower than max_steps"
        )
    for name in ("run", "resume", "prove_resume", "plan", "prepare", "overfit"):
        if getattr(config.train, name):
            raise ValueError(f"{name} is set, and every trial has a run of its own; leave it out")
    filled: dict[str, Any] = {}
    if not sweep.study:
        filled["study"] = "runs/sweep" if file == DEFAULT else f"runs/sweep-{file.stem}"
    # A grid ends by itself, and needs no budget.
    if not (sweep.trials or sweep.steps or sweep.seconds or sweep.sampler == "grid"):
        filled["trials"] = TRIALS
    if sweep.pruner == "auto":
        filled["pruner"] = "median" if by_loss and first else "none"
    return SweepConfig(**asdict(sweep) | filled)
