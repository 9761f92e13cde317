"""Train a model: `python trainingmanager.py [--config FILE.yaml] [--flag value ...]`.

One batch: Batches.batch(step) -> token_loss -> backward -> unscale -> clip -> step -> schedule -> log.
With no arguments it trains for 300 seconds on the interpreter's own standard library.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from config import CONFIG_GROUPS, Config, one_sentence, parse_config
from config.console import refuse
from config.flags import asks_for_help, flags_of, read_words
from training.runfolder import words_of_run

HOMES = {"TrainingManager": "training.loop", "train": "training.begin"}


def command_line(words: list[str]) -> list[str]:
    """Return the words of a command, after those of the run's own settings where it is resumed."""
    flags = flags_of(CONFIG_GROUPS)
    if asks_for_help(words, flags):
        return words
    given = read_words(words, flags)
    values = dict(given)
    try:
        own = words_of_run(values.get("--run", "")) if values.get("--resume") == "true" else []
    except ValueError as error:
        refuse(str(error))
    if own:
        return [*own, *map(str, given)]
    return words


def __getattr__(name: str) -> Any:
    """Return TrainingManager or train for code that imports this file; only this imports torch."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)


def main(config: Config) -> None:
    """Train, plan, prepare or prove, as the settings say."""
    instead = [name for name in ("plan", "prepare", "prove_resume") if getattr(config.train, name)]
    if len(instead) > 1:
        refuse(f"--{' and --'.join(instead)} are given, and each is done instead of a run; give one of them")
    with one_sentence():
        # What imports torch is imported after the command line was understood.
        if config.train.plan:
            from training.plan import plan

            print(plan(config))
            return
        if config.train.prepare:
            from training.prepare import prepare

            print(prepare(config))
            return
        if config.train.prove_resume:
            from selftest.prove_resume import prove_resume

            sys.exit(0 if prove_resume(config) else 1)
        from training.command import run_to_its_end

        sys.exit(run_to_its_end(config).code)


if __name__ == "__main__":
    main(parse_config(command_line(sys.argv[1:]), "Train a code model from scratch."))
