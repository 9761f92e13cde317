"""Train a model: `python trainingmanager.py [--config FILE.yaml] [--flag value ...]`.

One batch: Batches.batch(step) -> token_loss -> backward -> unscale -> clip -> step -> schedule -> log.
With no arguments it trains for 300 seconds on the interpreter's own standard library.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from config import BEFORE, Config, one_sentence, parse_config


def command_line(words: list[str]) -> list[str]:
    """With --resume the run's own settings come first, so that flags need not be given again."""
    joined = [
        part
        for word in words
        for part in (word.split("=", 1) if word.startswith(("--run=", "--resume=")) else [word])
    ]
    if "--resume" in joined and "--run" in joined[:-1]:
        saved = Path(joined[joined.index("--run") + 1]) / "config.yaml"
        if saved.is_file():
            before = [part for key, value in BEFORE.items() for part in (f"--{key}", str(value))]
            return [*before, "--config", str(saved), *words]
    return words


def __getattr__(name: str) -> Any:
    """TrainingManager, train and the rest of the loop, for who imports this file; it imports torch."""
    from training import loop

    return getattr(loop, name)


def main(config: Config) -> None:
    """Train, plan or prove, as the settings say."""
    with one_sentence():
        # What imports torch is imported after the command line was understood.
        if config.train.plan:
            from training.plan import plan

            print(plan(config))
            return
        if config.train.prove_resume:
            from selftest.prove_resume import prove_resume

            sys.exit(0 if prove_resume(config) else 1)
        from training.loop import run_to_its_end

        sys.exit(run_to_its_end(config))


if __name__ == "__main__":
    main(parse_config(command_line(sys.argv[1:]), "Train a code model from scratch."))
