"""Evaluations read back from an eval.json: its suites, and the statistics of every sample behind each score.

No torch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from metrics.registry import Metric, Scored, of_values, score
from suites.passing import scores_of
from suites.scoring import SUITES, Example, mean_of_draws, origin_of


def read_json(path: str | Path) -> Any:
    """Read a file that should be an eval.json, unchecked; ValueError if it cannot be read."""
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); give an eval.json, as evaluation writes it"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def read_evaluation(path: str | Path) -> dict[str, Any]:
    """Read an eval.json; ValueError if it cannot be read, or holds something else."""
    evaluation = read_json(path)
    if not isinstance(evaluation, dict):
        raise ValueError(f"{path} holds a JSON {type(evaluation).__name__}, and no evaluation")
    return evaluation


def evaluation_files(place: Path) -> list[Path]:
    """Return the evaluations in a run's folder: eval.json, those of suites with their own file, earlier ones.

    The earlier ones were set aside for evaluations of other settings, and are last, the newest first. A file
    stands for itself, and a folder without evaluations for the eval.json that is missing.
    """
    if not place.is_dir():
        return [place]
    names = ["eval", *(f"eval-{name}" for name in SUITES)]
    files = [path for name in names if (path := place / f"{name}.json").exists()]
    earlier = [path for name in names for path in place.glob(f"{name}-*.json") if number_aside(path)]
    files += sorted(dict.fromkeys(earlier), key=lambda path: (-number_aside(path), path.name))
    return files or [place / "eval.json"]


def number_aside(path: Path) -> int:
    """Return the number of an evaluation that was set aside, such as 2 of eval-2.json; 0 of others."""
    found = re.fullmatch(r"eval(?:-.+)?-([1-9]\d{0,8})", path.stem, re.ASCII)
    return int(found[1]) if found else 0


# The errors that reading a damaged record, or one of a stranger, may raise.
DAMAGED = (KeyError, TypeError, AttributeError, IndexError, OverflowError)


def not_whole(what: str | Path, error: Exception) -> ValueError:
    """Return the error to raise where something in an eval.json is not as evaluation writes it."""
    reason = f"it has no {error}" if isinstance(error, KeyError) else "a value in it is of another kind"
    return ValueError(f"{what} is no whole evaluation: {reason}; evaluate again")


def scored_again(
    record: dict[str, Any], systems: list[str] | None = None, most: int | None = None
) -> dict[str, dict[str, Scored]]:
    """Score a record's own predictions again: the scores by system and metric, with a row for each sample.

    Programs are scored by the stored results of their runs, with a row for each that could be judged.

    Args:
        record: The record of a suite.
        systems: The systems to score; all if None.
        most: How many of the samples, from the first; all if None.
    """
    suite, samples = SUITES[record["suite"]], record["samples"][:most]
    clean, names = suite.clean, list(record["signatures"])
    references, models = [clean(sample["reference"]) for sample in samples], models_of(record)
    if suite.runs:
        examples = examples_of(record)[:most]
        results = {
            system: [list(sample["results"][system]) for sample in samples]
            for system in systems or record["scores"]
        }
        return scores_of(examples, results, dict(record["left_out"]), str(record["sandbox"]))
    found: dict[str, dict[str, Scored]] = {}
    for system in systems or record["scores"]:
        draws = [
            score(
                names,
                list(zip(map(clean, texts), references, strict=True)),
                record["language"],
                models,
                [origin_of(str(sample["name"])) for sample in samples],
            )
            for texts in zip(*(texts_of(sample, system) for sample in samples), strict=True)
        ]
        found[system] = mean_of_draws(draws)
    return found


def models_of(record: dict[str, Any]) -> dict[str, Metric]:
    """Return the metrics of a record that a model computed, by the samples' stored scores."""
    clean, found = SUITES[record["suite"]].clean, {}
    for name, by_system in record.get("measured", {}).items():
        values = {
            (clean(text), clean(sample["reference"])): float(value)
            for system, of_samples in by_system.items()
            for sample, of_draws in zip(record["samples"], of_samples, strict=True)
            for text, value in zip(texts_of(sample, system), of_draws, strict=True)
        }
        _, equals, *_ = record["signatures"][name].split("|")
        found[name] = of_values(name, equals, values)
    return found


def examples_of(record: dict[str, Any]) -> list[Example]:
    """Return the examples of a record."""
    return [
        Example(str(s["name"]), int(s["where"]), str(s["prompt"]), str(s["reference"]), s.get("suffix"))
        for s in record["samples"]
    ]


def texts_of(sample: dict[str, Any], system: str) -> list[str]:
    """Return all texts that a system has for a sample, one for each draw."""
    return [sample["predictions"][system], *sample.get("more", {}).get(system, [])]
