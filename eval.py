"""Scores of a trained model: `python eval.py --run runs/default`, on the test files of its run.

suites/evaluate.py describes the scores. `--rescore RUN/eval.json` says whether the numbers in that file are
those of its predictions, and `--compare` compares evaluations.
"""

from __future__ import annotations

import sys
from typing import Any

from config import one_sentence
from suites.settings import parse_settings


def __getattr__(name: str) -> Any:
    """Return a name of suites.evaluate to a caller that imports this file; only then torch is imported."""
    from suites import evaluate

    return getattr(evaluate, name)


def main(argv: list[str]) -> None:
    """Evaluate, score again or compare, by the command line."""
    settings = parse_settings(argv)
    with one_sentence(shares=settings.rescore is None and not settings.compare):
        # Each command is imported after the command line is parsed, and only the last one imports torch.
        if settings.rescore is not None:
            from suites.rescoring import rescore

            sys.exit(rescore(settings.rescore))
        if settings.compare:
            from suites.comparing import compare_files

            print(compare_files(settings.compare, settings.suite))
            return
        from suites.evaluate import write_evaluation
        from training.distributed import joined

        with joined() as world:
            write_evaluation(settings, world)


if __name__ == "__main__":
    main(sys.argv[1:])
