"""The settings of a sweep: its own, the space, and the config that is varied; from YAML and flags."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from config import CONFIG_GROUPS, RECIPES, Config, make_parser, parse_config
from config.console import refuse
from config.yamlfile import read_yaml
from sweeps.space import Space, parse_space

DEFAULT = RECIPES / "sweep.yaml"
OBJECTIVES = {  # name: whether less is better
    "bits_per_byte": True,
    "parameters": True,
    "tokens_per_second": False,
}
NEEDS = {"cmaes": "cmaes", "gp": "scipy"}  # of a sampler: the package that Optuna leaves open
TRIALS = 30  # where no budget is set


@dataclass(frozen=True)
class SweepConfig:
    """How long a sweep goes on, with how many workers, and how it chooses.

    Args:
        study: Folder of the sweep: runs, journal, table, pictures and the best config. The same command goes
            on with the study that is there. By default `runs/sweep`, and the config file's name. Its last
            part is the study's name in the storage.
        storage: `journal:FILE`, `grpc://HOST:PORT`, or any URL that Optuna knows (`sqlite:///FILE`,
            `postgresql://...`); by default a journal in the study's folder.
        trials: Budget in trials; where none is set 30, and all of a grid.
        steps: Budget in training steps of all trials; no trial begins that might go beyond it.
        seconds: Budget in seconds by the clock while at least one worker is at it, repeats included.
        workers: Processes on this machine, which share its cores; of several GPUs each has one, in turn.
        sampler: How settings are chosen: `tpe`, `random`, `grid`, `cmaes` or `gp`.
        pruner: What ends bad trials early: `median`, `hyperband`, `halving`, `patient` or `none`; `auto` is
            median, and none with several objectives or without validations on the way.
        objectives: `bits_per_byte` of validation, `parameters`, `tokens_per_second`; several give a front.
        sampler_seed: Of the sampler.
        repeat_best: How many of the best settings are trained again with other seeds, and the config itself.
        repeat_seeds: With how many; 0 repeats nothing.
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
        """Of the study in its storage: the folder's last part, of `.` too."""
        return Path(os.path.abspath(self.study)).name  # not resolve(): a link keeps its own name


@dataclass(frozen=True)
class Settings:
    """All that a worker needs; plain data, handed to its process."""

    sweep: SweepConfig
    space: Space
    config: Config  # what is varied, and what the best is compared with


def parse_settings(words: list[str]) -> Settings:
    """The settings of a command line; a mistake prints one sentence and exits with 2."""
    names = {f"--{f.name}" for f in fields(SweepConfig)}
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    parser = make_parser({"": SweepConfig}, _HELP)
    if "--help" in words or "-h" in words:
        parser.parse_args(["--help"])
    _refuse_unknown(words, names)
    if "--config" not in words:
        words = ["--config", str(DEFAULT), *words]
    own: list[str] = []  # flags of the sweep
    rest: list[str] = []
    sections: dict[str, dict[str, Any]] = {"space": {}, "sweep": {}}
    files: list[Path] = []
    place = 0
    while place < len(words):
        word, value = words[place], words[place + 1] if place + 1 < len(words) else None
        if word in names and (value is None or value.startswith("--")):
            parser.error(f"{word} has no value; write {word} VALUE")
        if word in names:
            own += [word, value]
        elif word == "--config" and value is not None:
            files.append(Path(value))
            rest += _without_sections(value, sections)
        elif "://" in word and not (place and words[place - 1].startswith("--")):  # It may hold a password.
            parser.error("an address stands there without its flag; write --storage ADDRESS")
        else:
            rest.append(word)
            place += 1
            continue
        place += 2
    if rest.count("--print_config"):
        own = []
    flags = [
        json.dumps(w.split(",")) if b == "--objectives" and not w.startswith("[") else w
        for b, w in zip(["", *own], own, strict=False)
    ]
    unknown = next((key for key in sections["sweep"] if f"--{key}" not in names), None)
    if unknown is not None:
        near = difflib.get_close_matches(str(unknown), [n.removeprefix("--") for n in names], 1, 0.5)
        parser.error(f"sweep: {unknown} is no setting" + (f"; did you mean {near[0]}?" if near else ""))
    given = {key: value for key, value in sections["sweep"].items() if value is not None}  # null: left open
    if not isinstance(given.get("storage", ""), str):  # The parser's own message would show it.
        parser.error("sweep: storage is no text; write it as in storage: sqlite:///FILE")
    before = ["--config", json.dumps(given, default=str)] if given else []
    values = parser.parse_args([*before, *flags]).clone(with_meta=False).as_dict()
    config = parse_config(rest, "Sweep over the settings of a training.")
    try:
        values["objectives"] = tuple(values["objectives"])
        values.pop("config", None)
        if not sections["space"]:
            raise ValueError(
                f"{' and '.join(map(str, files))}: there is no section `space:`, or it is empty; say there "
                "what varies, such as `optimizer.lr: {log: [1e-3, 1e-1]}`"
            )
        space = parse_space(sections["space"], config)
        sweep = _checked(SweepConfig(**values), config, space, files[-1])
        _refuse_flags(space, rest)
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
        return Settings(sweep, space, config)
    except ValueError as error:
        return parser.error(str(error))


_HELP = (
    "Sweep over any setting of a training. Every flag and YAML key of trainingmanager.py is taken too; what "
    "varies stands in the section `space:` of a --config file, and these flags may stand in `sweep:`."
)


def _without_sections(path: str, sections: dict[str, dict[str, Any]]) -> list[str]:
    """The words for the rest of a config file, after its sections `space` and `sweep` were taken."""
    try:
        values = read_yaml(Path(path))
    except (OSError, ValueError):
        return ["--config", path]  # whose reader has the right words for it
    if not isinstance(values, dict):
        return ["--config", path]
    for key in values:
        near = difflib.get_close_matches(str(key), sections, 1, 0.6)
        if near and key not in (*sections, *CONFIG_GROUPS, *(f.name for f in fields(CONFIG_GROUPS[""]))):
            refuse(f"{key} in {path} is no section; did you mean {near[0]}?")
    for name, known in sections.items():
        found = values.pop(name, None) or {}  # a section whose lines are all comments is null
        if not isinstance(found, dict):
            refuse(f"{name} in {path} must be a mapping of keys to values")
        known |= found
    return ["--config", json.dumps(values, default=str)] if values else []


def _refuse_unknown(words: list[str], names: set[str]) -> None:
    """A flag that nobody knows, with the nearest of both kinds."""
    keys = {"--config", "--help", "--print_config", *names}
    keys |= {
        f"--{g}.{f.name}".replace("--.", "--") for g, group in CONFIG_GROUPS.items() for f in fields(group)
    }
    for word in words:
        if word.startswith("--") and word not in keys:
            near = sorted(key for key in keys if key.rpartition(".")[2] == word[2:])
            near = near or difflib.get_close_matches(word, keys, 1, 0.6)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            refuse(f"{word} is no flag{hint}")


def _refuse_flags(space: Space, words: list[str]) -> None:
    """A value in a file is what the sweep is compared with; a flag for what varies contradicts the space."""
    for parameter in space.parameters:
        for key in (
            space.settings({parameter.key: parameter.choices[0]}) if parameter.arms else (parameter.key,)
        ):
            if f"--{key}" in words:
                raise ValueError(f"--{key} is set, and the space varies it; leave one of them out")


def _checked(sweep: SweepConfig, config: Config, space: Space, file: Path) -> SweepConfig:
    """With what was left open filled in; ValueError for what cannot be."""
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
    for name in ("run", "resume", "prove_resume", "plan", "overfit"):
        if getattr(config.train, name):
            raise ValueError(f"{name} is set, and every trial has a run of its own; leave it out")
    filled: dict[str, Any] = {}
    if not sweep.study:
        filled["study"] = "runs/sweep" if file == DEFAULT else f"runs/sweep-{file.stem}"
    if not (sweep.trials or sweep.steps or sweep.seconds or sweep.sampler == "grid"):  # which has an end
        filled["trials"] = TRIALS
    if sweep.pruner == "auto":
        filled["pruner"] = "median" if by_loss and first else "none"
    return SweepConfig(**asdict(sweep) | filled)
