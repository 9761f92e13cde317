"""Train a model: `python trainingmanager.py [--config FILE.yaml] [--flag value ...]`.

One batch: Batches.batch(step) -> token_loss -> backward -> unscale -> clip -> step -> schedule -> log.
With no arguments it trains for 300 seconds on the interpreter's own standard library.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from config import CONFIG_GROUPS, Config, one_sentence, parse_config
from config.console import refuse
from config.flags import asks_for_help, flags_of, read_words
from training.runfolder import has_checkpoint, words_of_run

HOMES = {"TrainingManager": "training.loop", "train": "training.begin"}


def command_line(words: list[str]) -> list[str]:
    """Return the words of a command, after those of the run's own settings where it is resumed.

    `--resume auto` becomes true or false by whether the run has a checkpoint. With `--prepare`, `--out` is
    `--data.store`.
    """
    flags = flags_of(CONFIG_GROUPS)
    if "--prepare" in words:
        words = [re.sub(r"^--out(?=$|=)", "--data.store", word) for word in words]
    if asks_for_help(words, flags):
        return words
    words, is_auto = without_auto(words)
    if is_auto:
        run = dict(read_words(words, flags)).get("--run", "")
        if not run:
            refuse("--resume auto needs the folder of the run to go on with or to begin: --run runs/NAME")
        words = [*words, f"--resume={str(has_checkpoint(Path(run))).lower()}"]
    given = read_words(words, flags)
    values = dict(given)
    try:
        own = words_of_run(values.get("--run", "")) if values.get("--resume") == "true" else []
    except ValueError as error:
        refuse(str(error))
    if own:
        return [*own, *map(str, given)]
    return words


def without_auto(words: list[str]) -> tuple[list[str], bool]:
    """Return the words without `--resume auto`, and whether it was among them."""
    for place, word in enumerate(words):
        if word == "--resume=auto":
            return words[:place] + words[place + 1 :], True
        if word == "--resume" and words[place + 1 : place + 2] == ["auto"]:
            return words[:place] + words[place + 2 :], True
    return words, False


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
    with one_sentence(shares=not instead):
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
