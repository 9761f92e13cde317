"""What every recipe's examples go through: settings, counts that add up, and a dataset folder with its card.

A recipe is a module `recipes/NAME.py`, and the settings of its training are `recipes/NAME.yaml`. It has

    SETTINGS                                 a frozen dataclass below RecipeSettings: its own flags
    FAMILY                                   model_type of the small base where none is given; None: no base
    EVALUATION                               fields of eval.EvalConfig that are not the default's
    evaluation(settings) -> {field: value}   optional: those that the settings decide
    SMALL                                    flags, its own and training's, that are other where no base is
                                             named: what two cores do in minutes with a small one
    longest(settings) -> int                 most tokens of an example, with its end: what a row must hold
    check(settings)                          optional: refuses at once what cannot be built from
    files_of(settings, work)                 optional: what is built from; it is had before a small base takes
                                             minutes, so that a source that holds nothing is told before
    check_isolation(settings)                optional: refuses where its programs have no sandbox
    build(settings, tokenizer, folder)       writes the dataset with `write_dataset`; returns its Counts.
                                             `tokenizer` is the base's; None where FAMILY is None
    evaluate(settings, scoring, result)      optional: tables of its own, as text, after the run's; of the
                                             eval.EvalConfig that it was scored by, and of the result
    variants(settings) -> {name: settings}   optional: the recipe is run once for each, in OUT/name, and then
    together({name: (settings, out)}) -> str says what they show side by side

and a function `prompt_of(...)`, the only place where a prompt is made: for training, evaluation and serving.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from config import DataConfig, write_atomically
from data.corpus import EmptySide, split_documents
from data.documents import SPLITS as SIDES
from data.documents import Document, Report

T = TypeVar("T")
CARD = "README.md"
COUNTS = "counts.json"


@dataclass(frozen=True)
class RecipeSettings:
    """What all recipes ask for.

    Args:
        out: Folder of everything that the recipe makes; by default runs/NAME.
        base_seconds: Budget of the small base that is trained where --base names none.
        eval_samples: Test examples that are completed at the end.
    """

    out: str = ""
    base_seconds: float = 120.0
    eval_samples: int = 200


@dataclass
class Counts:
    """What became of everything that was found: `found == kept + sum(dropped.values())`.

    Args:
        unit: What is counted, in the plural: `classes`.
        found: How many there were.
        dropped: Why some are no example -> how many.
        examples: On each side, as written; of one unit there may be several.
    """

    unit: str
    found: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIDES, 0))

    @property
    def kept(self) -> int:
        return self.found - sum(self.dropped.values())

    def drop(self, reason: str, n: int = 1) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + n

    def lines(self) -> list[str]:
        """As the scraper counts: what was found, what went and why, what is left."""
        width = max(10, len(f"{self.found:,}"))
        rows = [f"{self.found:>{width},}  {self.unit} found"]
        rows += [f"{-n:>{width},}  {reason}" for reason, n in self.dropped.items() if n]
        rows.append(f"{self.kept:>{width},}  {self.unit} kept")
        return [*rows, "examples: " + ", ".join(f"{side} {n:,}" for side, n in self.examples.items())]


def write_dataset(
    folder: Path, sides: Mapping[str, Sequence[Mapping[str, Any]]], counts: Counts, title: str, about: str
) -> Counts:
    """Write train.jsonl, validation.jsonl and test.jsonl, counts.json and the card; the card comes last.

    Args:
        folder: Made where it is missing; files of an earlier try are replaced.
        sides: Rows by side: `prompt` and `completion`, or `text`, and best a `path` each; other fields stay
            for whoever reads the file.
        counts: Its `examples` are filled in here.
        title: Of the card.
        about: Markdown: what an example is, and which choices were made.

    Raises:
        ValueError: A side would be empty, or what was kept and dropped do not add up.
    """
    counts.examples = {side: len(sides.get(side, ())) for side in SIDES}
    if counts.kept < 0:
        raise ValueError(
            f"of {counts.found} {counts.unit} {sum(counts.dropped.values())} were dropped: they do not add up"
        )
    if empty := [side for side in SIDES if not counts.examples[side]]:
        made = ", ".join(f"{n} {side}" for side, n in counts.examples.items())
        raise ValueError(
            f"the {empty[-1]} set would be empty: {counts.kept} of {counts.found} {counts.unit} are left and "
            f"give {made} examples{_because(counts)}; give a larger source, or ask less of it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for side in SIDES:
        write_atomically(folder / f"{side}.jsonl", _lines(sides[side]))
    write_atomically(folder / COUNTS, json.dumps(vars(counts), indent=1))
    table = "\n".join(f"    {line}" for line in counts.lines())
    write_atomically(folder / CARD, f"# {title}\n\n{about.strip()}\n\n## Counts\n\n{table}\n")
    return counts


def plain_documents(source: str, report: Report | None = None) -> list[tuple[str, Document]]:
    """(side, document) of a source of plain text, without the examples that it may hold.

    Args:
        source: As --data.source; of a folder, what is not UTF-8 is left out.
        report: Gets the counts.

    Raises:
        ValueError: It cannot be read, or has too few documents for three sides.
    """
    found: list[tuple[str, Document]] = []
    try:
        for side, document in split_documents(DataConfig(source=source, skip_undecodable=True), report):
            found.append((side, document))
    except EmptySide as error:
        if error.given:
            raise
        # Else its remedy is a flag of training, which no recipe is split by.
        by = "names" if all(document.group == document.name for _, document in found) else "groups"
        n = {side: sum(one == side and document.text != "" for one, document in found) for side in SIDES}
        raise ValueError(
            f"the {min(reversed(SIDES), key=lambda side: n[side])} set would be empty: the {len(found)} "
            f"documents of {source} are split by their {by}, and give "
            f"{', '.join(f'{n[side]} {side}' for side in SIDES)}; give a larger source"
        ) from None
    return [(side, document) for side, document in found if document.prompt is None]


def split(items: Sequence[T], seed: int, test_share: float, validation_share: float) -> dict[str, list[T]]:
    """The items by side, in their order; sizes are rounded up.

    Args:
        seed: Of numpy's permutation, whose first items are test, and the next ones validation.
        test_share: Of all.
        validation_share: Of those that are not test.
    """
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(items)).tolist()
    n_test = math.ceil(test_share * len(order))
    n_validation = math.ceil(validation_share * (len(order) - n_test))
    edges = (0, n_test, n_test + n_validation, len(order))
    sides = zip(("test", "validation", "train"), pairwise(edges), strict=True)
    return {side: [items[i] for i in sorted(order[start:end])] for side, (start, end) in sides}


def read_counts(folder: Path) -> Counts:
    """Of a dataset that `write_dataset` wrote."""
    return Counts(**json.loads((folder / COUNTS).read_text("utf-8")))


def _because(counts: Counts) -> str:
    if not counts.dropped:
        return ""
    most = max(counts.dropped, key=lambda reason: counts.dropped[reason])
    return f" (most went for: {most}, {counts.dropped[most]})"


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
