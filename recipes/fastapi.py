"""Fill a gap in FastAPI's documentation code with its line: `python -m recipes fastapi --source FOLDER`.

    files -> pages -> groups of pages that share text -> three splits -> one example a line

An example is a line with the 15 lines before it and the 10 after it. The faults of the first system of this
kind, and the remedies of this one:

    windows of one page were split line by line,      pages are split whole, and pages that share their code
    so that every test window was in training          (`data.leaks.regroup`) stay together; a window that a
                                                       held-out split has is taken out of training
    variants of one tutorial gave one window often    a line with the same neighbours is taken once
    the lines after stood behind the target, where     they stand before it, as the suffix of a gap to fill
    no causal model can use them                       (`fim_prompt_ids`, in training, evaluation and
                                                       `generate.py --suffix`), by the base's own markers or
                                                       by markers that are added and whose rows train
    indentation was stripped                           the line is the file's, to the blank
    the markers' rows were not trained                 --lora.new_tokens
    "target accuracy" was of the prompt, too           the loss and every score are of the target alone

Where a tokenizer takes no markers, `prompt_of` puts the lines after the gap before those that precede it.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import DataConfig
from data import leaks
from data.corpus import read_documents
from data.documents import Document, utf8
from data.fim import fim_prompt_ids, known_markers
from data.sourcefiles import CORPUS
from recipes.building import SPLITS, Counts, RecipeSettings, write_dataset
from recipes.files import read_files
from tokenizer import Tokenizer

FAMILY = "codegen"
EVALUATION: dict[str, Any] = {"metrics": "exact_match,edit_similarity,bleu_code"}
SMALL: dict[str, Any] = {
    "eval_samples": 100,
    "max_steps": 100,
    "optimizer.lr": 1e-3,
    "validation_rows": 64,
}
SHARES = {"test": 0.1, "validation": 0.1}  # Shares of the lines; the rest is for training.
NEIGHBOURS = 3  # Two equal lines with this many equal lines before and after them are one.
COMPLETION = {True: "middle", False: "completion"}  # Whether there are markers -> the target's key in a row.
FOLDER = "docs_src/"  # the folder that is read of a clone of FastAPI


@dataclass(frozen=True)
class FastapiSettings(RecipeSettings):
    """Settings of the recipe fastapi: which lines become examples, and how much context they have.

    Args:
        source: A folder, an archive, the address of a git repository, a .jsonl file with `path` and `text`,
            or a corpus of `python -m scraping build`. In a clone of FastAPI only docs_src is read.
        revision: Tag, branch or commit of a repository.
        lines_before: Lines of context before the gap.
        lines_after: Lines of context after it.
        max_tokens: Most tokens of an example with its markers and its end; longer ones are left out.
    """

    source: str = ""
    revision: str = ""
    lines_before: int = 15
    lines_after: int = 10
    max_tokens: int = 512


SETTINGS = FastapiSettings


def longest(settings: FastapiSettings) -> int:
    """Return the most tokens of an example, after a check of the settings, before anything takes time.

    Raises:
        ValueError: There is no source, it does not exist, or a number is out of range.
    """
    for name, least in (("lines_before", 1), ("lines_after", 0), ("max_tokens", 16)):
        if getattr(settings, name) < least:
            raise ValueError(f"--{name} is {getattr(settings, name)}; it must be at least {least}")
    if not settings.source:
        raise ValueError(
            "no source is named: give --source https://github.com/fastapi/fastapi, a folder, an archive, or "
            "a .jsonl file with path and text"
        )
    if "://" not in settings.source and not Path(settings.source).exists():
        raise ValueError(f"--source {settings.source} does not exist: name a folder, an archive or a file")
    return settings.max_tokens


def prompt_of(prefix: str, suffix: str) -> str:
    """Return the prompt of a tokenizer without markers: the lines after the gap, then those before it."""
    return f"# After the gap:\n{suffix.strip(chr(10))}\n# Before the gap:\n{prefix}"


@dataclass(frozen=True)
class Line:
    """A line of a file, in which `prefix + middle + suffix` is a piece of the file, byte for byte."""

    path: str
    number: int
    prefix: str
    middle: str
    suffix: str

    def key(self) -> tuple[str, ...]:
        """Return the line and its neighbours without indentation, which variants of a file share."""
        before = [line.strip() for line in self.prefix.split("\n") if line.strip()][-NEIGHBOURS:]
        after = [line.strip() for line in self.suffix.split("\n") if line.strip()][:NEIGHBOURS]
        return (*before, "->", self.middle.strip(), "<-", *after)


def lines_of(path: str, text: str, before: int, after: int) -> Iterator[Line]:
    """Yield the lines of a file that have a letter or digit, with the lines around them.

    The line break before a line is part of the middle, since tokenizers join it to the indentation, and no
    indented line would ever follow a prompt that ends in a line break.
    """
    rows = text.rstrip("\n").split("\n")
    for number, row in enumerate(rows):
        if any(letter.isalnum() for letter in row):
            prefix = "\n".join(rows[max(0, number - before) : number])
            suffix = "".join(f"\n{row}" for row in rows[number + 1 : number + 1 + after])
            yield Line(path, number + 1, prefix, f"\n{row}" if number else row, suffix)


def page_of(path: str) -> str:
    """Return the page of a file: its folder, or the address before `#` in a file of `scraping site`."""
    if "#" in path:
        return path.partition("#")[0]
    inside = path.partition(FOLDER)[2] or path
    folder, slash, _ = inside.partition("/")
    return folder if slash else inside


def grouped(documents: Sequence[tuple[str, str]]) -> list[str]:
    """Return for each (path, text) its group: its page, and the pages that share text with it."""
    return leaks.regroup([Document(path, text, page_of(path)) for path, text in documents])


def splits_of(groups: Sequence[str], sizes: Sequence[int]) -> dict[str, str]:
    """Return a split for each group, in the order of a hash of its name; SHARES fill the held-out splits.

    The names alone decide the order. A group that would overfill a split by a quarter goes to training.
    """
    size: dict[str, int] = defaultdict(int)
    for group, n in zip(groups, sizes, strict=True):
        size[group] += n
    total, splits = sum(sizes), {}
    filled = dict.fromkeys(SHARES, 0)
    for group in sorted(size, key=lambda group: hashlib.sha256(utf8(group)).digest()):
        fits = (
            split
            for split, share in SHARES.items()
            if filled[split] < share * total and filled[split] + size[group] <= 1.25 * share * total
        )
        splits[group] = next(fits, "train")
        if splits[group] != "train":
            filled[splits[group]] += size[group]
    return splits


def build(settings: FastapiSettings, tokenizer: Tokenizer, folder: Path) -> Counts:
    """Write the examples of all splits.

    Raises:
        ValueError: The source cannot be read or has no Python file; a number is out of range; a split would
            be empty.
    """
    longest(settings)
    documents = files_of(settings, folder.parent / "source")
    counts = Counts("lines")
    groups = grouped(documents)
    per_file = [
        list(lines_of(path, text, settings.lines_before, settings.lines_after)) for path, text in documents
    ]
    split_of_group = splits_of(groups, [len(lines) for lines in per_file])
    with_markers = known_markers(tokenizer) is not None
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    seen: dict[tuple[str, ...], str] = {}
    for split in reversed(SPLITS):  # Held-out splits first: their windows are dropped from training.
        for group, lines in zip(groups, per_file, strict=True):
            if split_of_group[group] != split:
                continue
            for line in lines:
                counts.found += 1
                key = line.key()
                if key in seen:
                    variant = "in a variant of the file"
                    counts.drop(variant if seen[key] == split else f"in the {seen[key]} split, too")
                    continue
                row, n_tokens = row_of(line, with_markers, tokenizer)
                if n_tokens > settings.max_tokens:
                    counts.drop(f"longer than {settings.max_tokens} tokens with its context")
                    continue
                seen[key] = split
                rows[split].append(row)
    told = "fill-in-the-middle markers" if with_markers else "plain text, what follows the gap first"
    known = {row[COMPLETION[with_markers]].strip() for row in rows["train"]}
    stock = sum(row[COMPLETION[with_markers]].strip() in known for row in rows["test"])
    text = (
        "A row is a line that has a letter or digit, with its indentation and the line break before it; the "
        f"{settings.lines_before} lines before it and the {settings.lines_after} after it; as {told}.\n\n"
        f"The pages of the {len(documents)} files of `{settings.source}` make {len(set(groups))} groups that "
        f"share no text, each in one split. A line with the same {NEIGHBOURS} lines around it as another is "
        f"taken once. Of {len(rows['test'])} test lines {stock} stand in training, too, elsewhere, as "
        "`app = FastAPI()` does: scores are given for the others apart."
    )
    return write_dataset(folder, rows, counts, "Lines of documentation code", text)


def row_of(line: Line, with_markers: bool, tokenizer: Tokenizer) -> tuple[dict[str, Any], int]:
    """Return the row of a line, and its number of tokens with start and end."""
    where = {"path": f"{line.path}:{line.number}", "page": page_of(line.path)}
    n_middle = len(tokenizer.encode(line.middle)) + 1
    if with_markers:
        n = len(fim_prompt_ids(tokenizer, line.prefix, line.suffix)) + n_middle
        return {"prefix": line.prefix, "suffix": line.suffix, "middle": line.middle} | where, n
    prompt = prompt_of(line.prefix, line.suffix)
    n = 1 + len(tokenizer.encode(prompt)) + n_middle
    return {"prompt": prompt, "completion": line.middle} | where, n


def files_of(settings: FastapiSettings, work: Path) -> list[tuple[str, str]]:
    """Return (path, text) of the Python files; of a clone, those in FOLDER."""
    if (Path(settings.source) / CORPUS).is_file():
        found = [(row.name, row.text) for row in read_documents(DataConfig(source=settings.source))]
    else:
        files = read_files(settings.source, ".py", settings.revision, work=work)
        found = [(file.path, file.text) for file in files if not isinstance(file, tuple)]
    inside = [(path, text) for path, text in found if FOLDER in path]
    return sorted(inside or found)


# --- what predictions are worth ----------------------------------------------------------------------


def evaluate(settings: FastapiSettings, scoring: Any, result: dict[str, Any]) -> str:
    """Return the exact match of test lines that are not in the training text, and of the others, by system.

    Args:
        settings: The recipe's settings.
        scoring: The EvalConfig of the scores; its source is the dataset.
        result: The result of `evaluate` with it.
    """
    from metrics.registry import score
    from suites.scoring import origin_of
    from suites.tables import aligned

    samples = result.get("suite", {}).get("samples", [])
    rows = (Path(scoring.source) / "train.jsonl").read_text("utf-8").splitlines()
    known = {(row.get("middle") or row.get("completion", "")).strip() for row in map(json.loads, rows)}
    parts = {
        "lines that training has nowhere": [s for s in samples if s["reference"].strip() not in known],
        "lines that it has elsewhere": [s for s in samples if s["reference"].strip() in known],
    }
    table = [["exact match", *result["suite"]["scores"]]] if samples else []
    for name, part in parts.items():
        if len(part) < 2:
            continue
        shares = []
        for system in table[0][1:]:
            pairs = [(s["predictions"][system].strip(), s["reference"].strip()) for s in part]
            files = [origin_of(s["name"]) for s in part]
            ends = score(["exact_match"], pairs, origins=files)["exact_match"].interval()
            shares.append(f"{ends.mean:.1f} [{ends.low:.1f}, {ends.high:.1f}]")
        table.append([f"{len(part)} {name}", *shares])
    return "\n".join(aligned(table)) if len(table) > 1 else ""
