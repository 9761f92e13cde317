"""Plumb in Python, as in a notebook: what the commands do, by the functions that the commands call.

    run = train(data={"source": "code"}, max_seconds=60)    python trainingmanager.py --data.source code ...
    model = load(run)
    print(model.generate("def f("))                         python generate.py --model RUN --prompt "def f("
    scores = evaluate(run, suite="next_line")               python eval.py --checkpoint RUN --suite next_line

Settings have the names of the flags, and results are the same to the last digit. A mistake is a ValueError
with the sentence that the command prints. docs/python.md describes the rest.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import reprlib
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from architecture import Decoder
from config import CONFIG_GROUPS, Config, parse_config
from config.console import shown_safely
from config.flags import flags_of
from config.typed import field_types, typed_group
from generation.command import open_model
from generation.settings import GenerationConfig, OpeningConfig
from generation.text import generate
from suites.evaluate import write_evaluation
from suites.records import read_evaluation
from suites.settings import EvalConfig, mistake
from tokenizer import Tokenizer
from training.command import run_to_its_end
from training.loop import Observer
from training.runfolder import words_of_run
from training.signals import leave_the_run

__all__ = ["Model", "Run", "evaluate", "load", "train"]

# Settings by which a command does something else, and what it found is printed.
OF_COMMANDS = {
    "trainingmanager.py": ("overfit", "plan", "prepare", "prove_resume"),
    "eval.py": ("compare", "report", "rescore"),
}


@dataclass(frozen=True)
class Run:
    """A run by its folder: `train` returns one, and `Run("runs/NAME")` is one that was trained before."""

    folder: str | Path

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def scores(self) -> dict[str, Any]:
        """The run's eval.json: the scores of its best checkpoint beside their baselines."""
        return read_evaluation(Path(self.folder, "eval.json"))

    @property
    def log(self) -> list[dict[str, float]]:
        """The lines of the run's metrics.jsonl: each has its `step`, and values such as `train/loss`."""
        lines = Path(self.folder, "metrics.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]


@dataclass(frozen=True)
class Model:
    """A model that writes text.

    Attributes:
        decoder: The model itself, in eval mode.
        tokenizer: The one that it was trained with.
    """

    decoder: Decoder
    tokenizer: Tokenizer

    @overload
    def generate(self, prompt: str, suffix: str | None = None, **settings: Any) -> str: ...

    @overload
    def generate(self, prompt: list[str], suffix: str | None = None, **settings: Any) -> list[str]: ...

    def generate(
        self, prompt: str | list[str], suffix: str | None = None, **settings: Any
    ) -> str | list[str]:
        """Return the completion of a prompt, or those of several, which are one batch.

        Args:
            suffix: The text after a gap, which the completion fills.
            settings: Of `GenerationConfig`, such as `max_new_tokens=64`.

        Raises:
            ValueError: A setting is wrong, or the model cannot read a prompt or fill a gap.
        """
        if not isinstance(prompt, str | list | tuple) or not all(isinstance(one, str) for one in prompt):
            raise ValueError(f"the prompt is {reprlib.repr(prompt)}; it must be text, or a list of texts")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        chosen = _settings(GenerationConfig, settings)
        texts = [made.text for made in generate(self.decoder, self.tokenizer, prompts, chosen, 0, suffix)]
        return texts[0] if isinstance(prompt, str) else texts


def train(config: str | Path | None = None, **settings: Any) -> Run:
    """Train, score and report as `python trainingmanager.py` does, and return the run.

    Args:
        config: A YAML file of settings, which the others override.
        settings: Those of the command. A group is a dictionary: `model={"n_layer": 4}`. With `resume=True`
            and `run="runs/NAME"` that run goes on with its own settings, and these.

    Raises:
        ValueError: A setting, the data or the folder do not fit, or a guard refuses the run.
        KeyboardInterrupt: An interrupt stopped the run, once it has saved a checkpoint to go on from. Another
            signal that stopped it is raised again, too.
    """
    words = words_of_run(settings.get("run", "")) if settings.get("resume") is True else []
    words += [] if config is None else [f"--config={config}"]
    with shown_safely():
        chosen = _parsed(words, settings)
        _refuse_others(vars(chosen.train))
        end = run_to_its_end(chosen, Observer(on_second_signal=leave_the_run))
    if end.stop_signal is not None:
        signal.raise_signal(end.stop_signal)
    return Run(end.folder)


def load(model: str | Path | Run, **settings: Any) -> Model:
    """Open a run, one checkpoint of it, or a published model, to write text with it.

    Args:
        settings: Of `OpeningConfig`, such as `which="last"` or `device="cpu"`.

    Raises:
        ValueError: There is no such model, it is damaged, or it has no tokenizer.
    """
    with shown_safely():
        return Model(*open_model(_settings(OpeningConfig, {"model": _place(model)} | settings)))


def evaluate(run: str | Path | Run | None = None, **settings: Any) -> dict[str, Any]:
    """Evaluate as `python eval.py` does: print the table, write eval.json and its page, return the former.

    What is scored are files, as the command reads them, and no `Model`, whose weights may have been changed.

    Args:
        run: The run, or one checkpoint of it; None with `model="FOLDER"`, a published one.
        settings: Of `EvalConfig`, such as `suite="next_line"`.

    Raises:
        ValueError: A setting is wrong, the run or its data are not what they were, or a suite's file is not.
    """
    if isinstance(run, Model):
        raise ValueError("what is scored are a run's files, and a model may have been changed: give the run")
    _refuse_others(settings)
    with shown_safely():
        chosen = _settings(EvalConfig, ({} if run is None else {"checkpoint": _place(run)}) | settings)
        problem = mistake(chosen)
        if problem is not None:
            raise ValueError(problem)
        return read_evaluation(write_evaluation(chosen))


def _place(value: Any) -> Any:
    """Return a path or a run as text, which settings hold; anything else as it is."""
    return str(value.folder) if isinstance(value, Run) else str(value) if isinstance(value, Path) else value


def _refuse_others(settings: dict[str, Any]) -> None:
    """Raise a ValueError for a setting by which the command does something else."""
    for command, names in OF_COMMANDS.items():
        for name in names:
            if settings.get(name):
                raise ValueError(f"{name} is of the command: python {command} --{name}")


def _settings(group: type, values: dict[str, Any]) -> Any:
    """Return the dataclass of some settings; ValueError for an unknown name or a value that does not fit."""
    for name in values:
        if name not in field_types(group):
            near = difflib.get_close_matches(name, field_types(group), n=1)
            raise ValueError(f"{name} is no setting{f'; did you mean {near[0]}?' if near else ''}")
    return typed_group("", group, {name: _place(value) for name, value in values.items()}, {})


def _by_key(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each setting, plain, by its full key; those of a group are in a dictionary of their own."""
    for name, value in settings.items():
        if isinstance(value, dict) and not before and name in CONFIG_GROUPS:
            yield from _by_key(value, f"{name}.")
        else:
            value = _place(value)
            yield before + name, value.item() if isinstance(value, np.generic) else value


def _parsed(words: list[str], settings: Mapping[str, Any]) -> Config:
    """Return the Config of a command line and of settings in Python, whose values are taken as they are.

    Raises:
        ValueError: With the sentence by which the command would end.
    """
    flags, own, said = flags_of(CONFIG_GROUPS), dict[str, Any](), io.StringIO()
    for name, value in _by_key(settings):
        if f"--{name}" not in flags:
            words = [*words, f"--{name}={value}"]  # The command's own sentence is on it.
            continue
        key = flags[f"--{name}"].name.removeprefix("--")
        if key in own:
            raise ValueError(f"{key} is given twice, once as {name}; give it once")
        own[key] = value
    try:
        with contextlib.redirect_stderr(said):
            config = parse_config(words, own=own)
    except SystemExit:
        raise ValueError(said.getvalue().removeprefix("error: ").strip()) from None
    sys.stderr.write(said.getvalue())
    return config
