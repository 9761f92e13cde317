"""A study in its storage: its identity, its sampler and its pruner. The rest is Optuna's."""

from __future__ import annotations

import copy
import json
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    PatientPruner,
    SuccessiveHalvingPruner,
)
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from config import SETTINGS
from config.schema import flat
from config.setting import FREE
from sweeps.board import is_open, slots_of
from sweeps.settings import OBJECTIVES, SweepSettings
from sweeps.space import ARMS, MATTERS, Parameter, flow, written
from sweeps.storage import open_storage, patiently, told

STARTUP = 5  # Random trials before a sampler models, and before a pruner compares.
NO_BRACKET = -1  # Stands for none of Hyperband's brackets, whose numbers count from 0.
REPEATS = "-repeats"  # The study of the repeats has the study's name and this.


def open_studies(settings: SweepSettings) -> tuple[optuna.Study, optuna.Study]:
    """Open the study of the trials and that of the repeats, or create them.

    Raises:
        ValueError: The storage cannot be used, or it holds a study of that name with another space or config.
    """
    sweep = settings.sweep
    storage = open_storage(sweep.storage, sweep.folder)
    with told(sweep.storage, sweep.folder):
        name = sweep.name
        return _opened(storage, name, settings), _opened(storage, name + REPEATS, settings)


def _opened(storage: optuna.storages.BaseStorage, name: str, settings: SweepSettings) -> optuna.Study:
    """Open or create a study; ValueError where it is one of other settings."""
    directions = [
        StudyDirection.MINIMIZE if OBJECTIVES[o] else StudyDirection.MAXIMIZE
        for o in settings.sweep.objectives
    ]
    try:  # It is loaded before it is created, so that a study that is refused is not written to.
        study = optuna.load_study(storage=storage, study_name=name, pruner=NopPruner())
    except KeyError:
        study = optuna.create_study(
            storage=storage, study_name=name, directions=directions, load_if_exists=True, pruner=NopPruner()
        )
    own = json.loads(json.dumps(identity(settings)))
    known = study.user_attrs.get("identity")
    if known is None:
        if study.get_trials(deepcopy=False):
            raise ValueError(
                f"the study {name} in the storage was not made by this command; name another --study"
            )
        study.set_user_attr("identity", own)
        known = study.user_attrs["identity"]  # If two commands began at once, the later one's counts.
    # A study from before a setting existed did what `before` says of it.
    later = {
        key: known.stored_before for key, known in SETTINGS.items() if known.is_later and key in own["config"]
    }
    known = known | {"config": later | known["config"]}
    for part in ("objectives", "space", "config"):
        if known[part] != own[part]:
            raise ValueError(
                f"the study {name} has another {part}: {_difference(part, known[part], own[part])}"
                "; set it back, or name another --study"
            )
    return study


def refuse_other_data(study: optuna.Study, fingerprint: str) -> None:
    """Raise ValueError if the study's trials read other data, wherever these lay."""
    if "data" not in study.user_attrs:
        study.set_user_attr("data", fingerprint)
    known = study.user_attrs["data"]  # If two commands began at once, the later one's counts.
    if known != fingerprint:
        raise ValueError(
            f"the study {study.study_name} has other data: its fingerprint was {known[:12]} and is "
            f"{fingerprint[:12]} now; restore it, or name another --study"
        )


def refuse_other_runs(study: optuna.Study, folder: Path) -> None:
    """Raise ValueError if a new study would go on with runs of another storage, or of one that is gone."""
    # Runs are looked for before trials, since another command may begin now.
    runs = any((folder / "trials").glob("*"))
    if runs and not study.get_trials(deepcopy=False):
        raise ValueError(
            f"{folder / 'trials'} holds runs, and the study {study.study_name} in this storage has no "
            "trials; name the --storage that they are of, or another --study"
        )


def identity(settings: SweepSettings) -> dict[str, Any]:
    """Return what all trials of a study share; budgets, workers, samplers and pruners may change."""
    config = replace(settings.config, data=settings.config.data.resolved())
    return {
        "objectives": list(settings.sweep.objectives),
        "space": settings.space.plain,
        "config": {
            key: value
            for key, value in flat(config.with_optimizer_defaults()).items()
            if SETTINGS[key].on_resume != FREE or key in MATTERS
        },
    }


def _difference(part: str, known: Any, own: Any) -> str:
    """Return the first setting that differs, with both values as flags and YAML write them."""
    if part == "objectives":
        return f"--objectives was {','.join(known)} and is {','.join(own)} now"
    key = next(k for k in {**known, **own} if known.get(k, ()) != own.get(k, ()))
    was, now = ((written(d[key]) if part == "space" else d[key]) if key in d else () for d in (known, own))
    if part == "space" and key == ARMS and () not in (was, now):
        if list(was) == list(now):
            arm = next(name for name in was if was[name] != now[name])
            return f"in the arm {arm} {_difference('arm', was[arm], now[arm])}"
        was, now = list(was), list(now)
    was, now = ("left out" if value == () else flow(value) for value in (was, now))
    return f"{key} was {was} and is {now} now"


def make_sampler(settings: SweepSettings, slot: int) -> BaseSampler:
    """Make the sampler of a slot, seeded by it: workers that share a seed would try the same settings."""
    sweep = settings.sweep
    seed = (sweep.sampler_seed * 1_000_003 + slot) % 2**32
    if sweep.sampler == "tpe":
        return TPESampler(
            n_startup_trials=STARTUP,
            multivariate=True,
            group=True,
            constant_liar=True,
            seed=seed,
        )
    if sweep.sampler == "cmaes":
        return CmaEsSampler(n_startup_trials=STARTUP, seed=seed)
    if sweep.sampler == "gp":
        return GPSampler(n_startup_trials=STARTUP, seed=seed)
    return RandomSampler(seed=seed)


def make_pruner(settings: SweepSettings) -> BasePruner:
    """Make the pruner, which goes by validations: the first rung is at the first of them."""
    name, space = settings.sweep.pruner, settings.space
    if name == "median":
        return MedianPruner(n_startup_trials=STARTUP)
    if name == "patient":
        return PatientPruner(MedianPruner(n_startup_trials=STARTUP), patience=1)
    every = space.first_validation(settings.config)
    if name == "halving":
        return _Halving(min_resource=every, reduction_factor=3)
    if name == "hyperband":
        most = space.most_steps(settings.config) or "auto"
        return _Hyperband(min_resource=every, max_resource=most, reduction_factor=3)
    return NopPruner()


class _Slots(optuna.Study):
    """A study in which only the last attempt of each slot competes."""

    def __init__(self, study: optuna.Study):
        super().__init__(study.study_name, study._storage, study.sampler, study.pruner)

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return list(slots_of(super().get_trials(deepcopy, states)).values())


class _Halving(SuccessiveHalvingPruner):
    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        return super().prune(_Slots(study), trial)


class _Hyperband(HyperbandPruner):
    """Hyperband with brackets by slot, so that a trial stays in its bracket whoever goes on with it."""

    def _get_bracket_id(self, study: optuna.Study, trial: FrozenTrial) -> int:
        if is_open(trial):
            return NO_BRACKET
        slot = copy.copy(trial)
        slot.number = trial.user_attrs["slot"]
        return super()._get_bracket_id(study, slot)


def distribution(parameter: Parameter) -> BaseDistribution:
    """Return Optuna's distribution of a parameter."""
    if parameter.kind == "choice":
        return CategoricalDistribution([label(value) for value in parameter.choices])
    if parameter.kind == "int":
        return IntDistribution(int(parameter.low), int(parameter.high), parameter.log, parameter.step)
    return FloatDistribution(parameter.low, parameter.high, parameter.log)


def label(value: Any) -> Any:
    """Return a choice as storages hold it, a tuple as JSON."""
    return json.dumps(value) if isinstance(value, tuple) else value


def chosen_of(settings: SweepSettings, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's parameters as the config holds them, without those that the space lacks."""
    found = {}
    for parameter in settings.space.parameters:
        if parameter.key in params:
            labels = {label(value): value for value in parameter.choices}
            value = params[parameter.key]
            found[parameter.key] = labels[value] if parameter.kind == "choice" else value
    return found


def suggest(trial: optuna.trial.Trial, parameter: Parameter) -> Any:
    """Ask Optuna for the trial's value of a parameter, and return it as the config holds it."""

    def ask() -> Any:
        if parameter.kind == "choice":
            labels = {label(value): value for value in parameter.choices}
            return labels[trial.suggest_categorical(parameter.key, list(labels))]
        if parameter.kind == "int":
            return trial.suggest_int(
                parameter.key, int(parameter.low), int(parameter.high), step=parameter.step, log=parameter.log
            )
        return trial.suggest_float(parameter.key, parameter.low, parameter.high, log=parameter.log)

    return patiently(ask)
