"""The parts that all recipes share: settings, counts that add up, and a dataset folder with its card.

A recipe is a module `recipes/NAME.py`, and the settings of its training are `recipes/NAME.yaml`. It has

    SETTINGS                                 a frozen dataclass below RecipeSettings: its own flags
    FAMILY                                   model_type of the small base where none is given; None: no base
    EVALUATION                               fields of EvalConfig that differ from its defaults
    evaluation(settings) -> {field: value}   optional: fields of EvalConfig that the settings decide
    SMALL                                    flags of the recipe and of training that have other values where
                                             no base is named, so that two cores train a small one in minutes
    longest(settings) -> int                 most tokens of an example, with its end, which a row must hold
    check(settings)                          optional: refuses settings from which nothing can be built
    LIVING                                   optional: True for a source that goes on changing, of which a
                                             dataset that was made stays
    files_of(settings, work)                 optional: the files to build from; they are fetched before a
                                             small base is trained, so that an empty source is refused first
    check_isolation(settings)                optional: refuses a machine without a sandbox for its programs
    build(settings, tokenizer, folder)       writes the dataset with `write_dataset`; returns its Counts.
                                             `tokenizer` is the base's; None where FAMILY is None
    evaluate(settings, scoring, result)      optional: returns its own tables as text, to be printed after the
                                             run's, for the EvalConfig of the scores and their result
    variants(settings) -> {name: settings}   optional: the recipe is run once for each, in OUT/name, and then
    together({name: (settings, out)}) -> str returns a table of all of them

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
from data.corpus import EmptySplit, split_documents
from data.documents import SPLITS, Document, Report

T = TypeVar("T")
CARD = "README.md"
COUNTS = "counts.json"


@dataclass(frozen=True)
class RecipeSettings:
    """The settings that all recipes have.

    Args:
        out: Folder of everything that the recipe writes; by default runs/NAME.
        base_seconds: Training time of the small base that is trained where --base names none.
        eval_samples: Number of test examples that are completed at the end.
    """

    out: str = ""
    base_seconds: float = 120.0
    eval_samples: int = 200


@dataclass
class Counts:
    """The counts of a dataset, which add up: `found == kept + sum(dropped.values())`.

    Args:
        unit: Name of the counted things, in the plural: `classes`.
        found: How many there were.
        dropped: Reason why a thing is no example -> how many.
        examples: Split -> number of examples written; one thing may give several.
    """

    unit: str
    found: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))

    @property
    def kept(self) -> int:
        return self.found - sum(self.dropped.values())

    def drop(self, reason: str, n: int = 1) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + n

    def lines(self) -> list[str]:
        """Return the counts as lines of a table: found, dropped by reason, kept."""
        width = max(10, len(f"{self.found:,}"))
        rows = [f"{self.found:>{width},}  {self.unit} found"]
        rows += [f"{-n:>{width},}  {reason}" for reason, n in self.dropped.items() if n]
        rows.append(f"{self.kept:>{width},}  {self.unit} kept")
        return [*rows, "examples: " + ", ".join(f"{split} {n:,}" for split, n in self.examples.items())]


def write_dataset(
    folder: Path, splits: Mapping[str, Sequence[Mapping[str, Any]]], counts: Counts, title: str, about: str
) -> Counts:
    """Write train.jsonl, validation.jsonl and test.jsonl, counts.json and the card; the card comes last.

    Args:
        folder: The dataset's folder; files of an earlier attempt are replaced.
        splits: Rows by split: each has `prompt` and `completion`, or `text`, and best a `path`; other fields
            stay in the file for its readers.
        counts: Its `examples` are filled in here.
        title: The card's title.
        about: The card's text in Markdown: what an example is, and which choices were made.

    Raises:
        ValueError: A split would be empty, or the counts do not add up.
    """
    counts.examples = {split: len(splits.get(split, ())) for split in SPLITS}
    if counts.kept < 0:
        raise ValueError(
            f"of {counts.found} {counts.unit} {sum(counts.dropped.values())} were dropped: they do not add up"
        )
    if empty := [split for split in SPLITS if not counts.examples[split]]:
        made = ", ".join(f"{n} {split}" for split, n in counts.examples.items())
        raise ValueError(
            f"the {empty[-1]} set would be empty: {counts.kept} of {counts.found} {counts.unit} are left and "
            f"give {made} examples{_because(counts)}; give a larger source, or ask less of it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        write_atomically(folder / f"{split}.jsonl", _lines(splits[split]))
    write_atomically(folder / COUNTS, json.dumps(vars(counts), indent=1))
    table = "\n".join(f"    {line}" for line in counts.lines())
    write_atomically(folder / CARD, f"# {title}\n\n{about.strip()}\n\n## Counts\n\n{table}\n")
    return counts


def plain_documents(source: str, report: Report | None = None) -> list[tuple[str, Document]]:
    """Return (split, document) of a source of plain text, without the examples that it may hold.

    Args:
        source: A source as for --data.source; files of a folder that are not UTF-8 are left out.
        report: The counts are written into it.

    Raises:
        ValueError: It cannot be read, or has too few documents for three splits.
    """
    found: list[tuple[str, Document]] = []
    try:
        for split, document in split_documents(DataConfig(source=source, skip_undecodable=True), report):
            found.append((split, document))
    except EmptySplit as error:
        if error.given:
            raise
        # The original message names a flag of training, which has no effect on a recipe's splits.
        by = "names" if all(document.group == document.name for _, document in found) else "groups"
        n = {split: sum(one == split and document.text != "" for one, document in found) for split in SPLITS}
        raise ValueError(
            f"the {min(reversed(SPLITS), key=lambda split: n[split])} set would be empty: the {len(found)} "
            f"documents of {source} are split by their {by}, and give "
            f"{', '.join(f'{n[split]} {split}' for split in SPLITS)}; give a larger source"
        ) from None
    return [(split, document) for split, document in found if document.prompt is None]


def split_items(
    items: Sequence[T], seed: int, test_share: float, validation_share: float
) -> dict[str, list[T]]:
    """Return the items by split, in their order; sizes are rounded up.

    Args:
        items: The items to split.
        seed: Seed of numpy's permutation, whose first items are test, and the next ones validation.
        test_share: Share of test items.
        validation_share: Share of validation items among those that are not test.
    """
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(items)).tolist()
    n_test = math.ceil(test_share * len(order))
    n_validation = math.ceil(validation_share * (len(order) - n_test))
    edges = (0, n_test, n_test + n_validation, len(order))
    splits = zip(("test", "validation", "train"), pairwise(edges), strict=True)
    return {split: [items[i] for i in sorted(order[start:end])] for split, (start, end) in splits}


def read_counts(folder: Path) -> Counts:
    """Return the counts of a dataset that `write_dataset` wrote."""
    return Counts(**json.loads((folder / COUNTS).read_text("utf-8")))


def _because(counts: Counts) -> str:
    if not counts.dropped:
        return ""
    most = max(counts.dropped, key=lambda reason: counts.dropped[reason])
    return f" (most went for: {most}, {counts.dropped[most]})"


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
