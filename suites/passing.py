"""pass@k, with intervals, from the results of programs that were run. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from metrics.estimates import pass_at_k
from metrics.intervals import mean_of_sums, mean_rows
from metrics.registry import Metric, Scored, numbers_of
from suites.scoring import Example

K = (1, 10, 100)


def scores_of(
    examples: Sequence[Example], results: dict[str, list[list[str]]], left_out: dict[str, str], box: str
) -> dict[str, dict[str, Scored]]:
    """Compute pass@k of each system over the problems that can be judged, for each k of K with enough draws.

    Args:
        examples: The problems.
        results: (examples, draws) results of each system, "passed" or other words; the judged system first.
        left_out: The problems that cannot be judged, and why.
        box: The name of the sandbox.

    Raises:
        ValueError: Fewer than two problems can be judged.
    """
    kept = [i for i, example in enumerate(examples) if example.name not in left_out]
    if len(kept) < 2:
        why = next(iter(left_out.values()), "there are no more")
        raise ValueError(f"{len(kept)} problems could be judged, and an interval needs at least 2: {why}")
    origins = numbers_of([examples[i].origin for i in kept])  # Gaps of one solution are not independent.
    subject = next(iter(results))
    fewest = min(len(results[subject][i]) for i in kept)
    found: dict[str, dict[str, Scored]] = {}
    for system, rows in results.items():
        found[system] = {}
        for k in (k for k in K if k <= fewest):
            # A system that does not sample has one text, which it would give again.
            chances = [
                100.0 * pass_at_k(n, c, k) if n > 1 else 100.0 * c
                for n, c in ((len(rows[i]), rows[i].count("passed")) for i in kept)
            ]
            found[system][f"pass@{k}"] = Scored(_pass_metric(k, box), mean_rows(chances), origins)
    return found


def _pass_metric(k: int, box: str) -> Metric:
    def no_rows(pairs: Sequence[Any], language: str) -> np.ndarray:
        raise ValueError(f"pass@{k} is had by running programs, not from texts")

    says = f"unbiased estimator of arXiv:2107.03374, run in {box}"
    return Metric(f"pass@{k}", no_rows, mean_of_sums, says, all_or_nothing=True)
