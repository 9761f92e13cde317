"""A piece of a Kotlin file -> how it goes on: `python -m recipes kotlin --source kotlin.jsonl.gz`.

Files lose their copyright headers, and go where they are generated, too short, or hold absurd lines and
literals. Each is cut into windows of about 100 tokens with its line breaks, and each window at a place that
may lie inside of a line. All windows of a file stand on one side. The model continues the first part of a
window; the second ends where a line does, so that it learns to stop there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from recipes.building import Counts, RecipeSettings, split, write_dataset
from recipes.files import check_source, read_files
from scraping.clean import CleanSettings
from scraping.documents import Drop, ScrapedDocument
from scraping.stages import origin, shape
from scraping.stages.headers import without_header
from tokenizer import Tokenizer

FAMILY = "phi"
METRICS = ("edit_similarity", "bleu_codexglue")
EVALUATION: dict[str, Any] = {"metrics": ",".join(METRICS), "language": "kotlin"}
SMALL: dict[str, Any] = {
    "per_file": 6,
    "eval_samples": 100,
    "max_steps": 200,
    "optimizer.lr": 1e-3,
    "optimizer.warmup_steps": 10,
    "validate_every": 50,
    "validation_rows": 256,
}
TEST_SHARE, VALIDATION_SHARE = 0.1, 0.1  # of the files, and of those that are not test
FEWEST = 8  # tokens on either side of a cut
SLACK = 8  # tokens by which prompt and completion may grow where they are encoded apart
LATEST_CUT = 0.75  # of a window


@dataclass(frozen=True)
class KotlinSettings(RecipeSettings):
    """Which files are taken, and how they are cut.

    Args:
        source: The address of a git repository, a folder, an archive, or a .jsonl(.gz) file with `path` and
            `text`.
        revision: Branch, tag or commit of a repository.
        under: Only files whose path begins so.
        window: Tokens of a prompt and its completion together, about.
        per_file: Most windows of a file, evenly spread; 0 takes all.
        split_seed: Of the split.
        methods: CodeXGLUE's test file of method generation, on which base and tuned model are scored too.
        method_samples: How many of its methods.
    """

    source: str = ""
    revision: str = ""
    under: str = ""
    window: int = 100
    per_file: int = 0
    split_seed: int = 42
    methods: str = ""
    method_samples: int = 100


SETTINGS = KotlinSettings


class Window(NamedTuple):
    prompt: str
    completion: str


def check(settings: KotlinSettings) -> None:
    if settings.methods:  # not only when all else is done
        if settings.method_samples < 2:
            raise ValueError(
                f"--method_samples is {settings.method_samples}, and an interval needs at least 2"
            )
        from suites.codexglue import method_task
        from suites.task import Given

        method_task(Given(None, 2, settings.method_samples, 0, 0, file=settings.methods))
    check_source(settings.source, ".kt", settings.revision)


def files_of(settings: KotlinSettings, work: Path) -> list[ScrapedDocument | tuple[str, Drop]]:
    return read_files(settings.source, ".kt", settings.revision, settings.under, work)


def longest(settings: KotlinSettings) -> int:
    """See recipes/building.py.

    Raises:
        ValueError: A number out of range.
    """
    if settings.window < 4 * FEWEST:
        raise ValueError(f"--window is {settings.window}; it must be at least {4 * FEWEST} tokens")
    return settings.window + 2 * SLACK


def prompt_of(text: str) -> str:
    """What asks how a text goes on: the text itself, in training, evaluation and serving."""
    return text


def build(settings: KotlinSettings, tokenizer: Tokenizer, folder: Path) -> Counts:
    """See the module; ValueError in one sentence where the source has too few such files."""
    counts = Counts("files")
    well_shaped = shape_stage()
    windows: list[tuple[str, list[Window]]] = []
    for file in files_of(settings, folder.parent / "source"):
        counts.found += 1
        found = cleaned(file, well_shaped) if isinstance(file, ScrapedDocument) else file[1]
        if isinstance(found, Drop):
            counts.drop(found.reason)
            continue
        cut = list(windows_of(found.text, found.path, settings.window, tokenizer))
        if not cut:
            counts.drop("no window")
            continue
        windows.append((found.path, spread(cut, settings.per_file)))
    sides = split(windows, settings.split_seed, TEST_SHARE, VALIDATION_SHARE)
    rows: dict[str, list[dict[str, str]]] = {}
    seen: set[str] = set()
    for side in ("test", "validation", "train"):  # a text that two sides share stays where it is scored
        rows[side] = []
        for path, cut in sides[side]:
            for window in cut:
                text = window.prompt + window.completion  # wherever it is cut: equal files are cut elsewhere
                if text not in seen:
                    rows[side].append(
                        {"path": path, "prompt": prompt_of(window.prompt), "completion": window.completion}
                    )
                seen.add(text)
    all_windows = [row for side in rows.values() for row in side]
    inside = sum(not row["prompt"].endswith("\n") for row in all_windows)
    twice = sum(len(cut) for _, cut in windows) - len(all_windows)
    return write_dataset(folder, rows, counts, "Kotlin windows", about(settings, inside, twice))


def about(settings: KotlinSettings, inside: int, twice: int) -> str:
    """The card's text."""
    revision = f" at {settings.revision}" if settings.revision else ""
    return f"""
The `.kt` files of `{settings.source}`{revision}, without copyright headers. Windows are of at most
{settings.window} tokens of the base's tokenizer, end where a line does, and do not overlap: no completion is
another's prompt. Each is cut once, {inside} of them inside of a line. {twice} windows that another one
equals, wherever the two are cut, are left out.

The files were split by seed {settings.split_seed} before they were cut: a tenth is test, and a tenth of the
rest validation, by which the best checkpoint is chosen.
"""


def shape_stage() -> Any:
    """The scraper's, with its own bounds."""
    s = CleanSettings()
    return shape.build(s.min_lines, s.max_line, s.max_mean_line, s.min_alnum, s.max_escapes, s.max_numbers)


def cleaned(file: ScrapedDocument, well_shaped: Any) -> ScrapedDocument | Drop:
    """Without its copyright header, or why it goes; generated files are near copies of each other."""
    if isinstance(own := origin.build()(file), Drop):
        return own
    return well_shaped(replace(file, text=without_header(file.text, file.path)))


def spread(items: Sequence[Any], most: int) -> list[Any]:
    if not most or len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


# --- windows -----------------------------------------------------------------------------------------


def windows_of(text: str, name: str, size: int, tokenizer: Tokenizer) -> Iterator[Window]:
    """Windows of at most `size` tokens that follow each other through the text, each cut into two.

    A window ends where the last line does that fits; only in a long line it ends inside. The cut is drawn by
    a hash of the file's name and the window's place.
    """
    pieces = whole_pieces(tokenizer, tokenizer.encode(text))
    start, number = 0, 0
    while start < len(pieces):
        stop = _line_end(pieces, start, min(len(pieces), start + size))
        least, most = start + FEWEST, min(start + int(LATEST_CUT * (stop - start)), stop - FEWEST)
        if most > least:
            digest = hashlib.sha256(f"{name}\0{number}".encode()).digest()
            cut = least + int.from_bytes(digest[:8]) % (most - least + 1)
            prompt, completion = "".join(pieces[start:cut]), "".join(pieces[cut:stop]).rstrip("\n")
            if prompt.strip() and completion.strip():
                yield Window(prompt, completion)
        start, number = stop, number + 1


def whole_pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text of each token; one that holds part of a character has "", and the one that ends it has it."""
    pieces, waiting = [], []
    for id in ids:
        waiting.append(id)
        text = tokenizer.decode(waiting)
        if "\ufffd" in text and len(waiting) < 8:
            pieces.append("")
            continue
        pieces.append(text)
        waiting = []
    if waiting:
        pieces[-1] = tokenizer.decode(waiting)
    return pieces


def _line_end(pieces: Sequence[str], start: int, stop: int) -> int:
    """The last place up to `stop` at which a line ends; `stop` where none does but near the start.

    A line break often begins a piece that goes on with the next line's indentation: it ends before that.
    """
    if stop == len(pieces):
        return stop
    for place in range(stop, start + 2 * FEWEST, -1):
        if pieces[place - 1].endswith("\n") or pieces[place].startswith("\n"):
            return place
    return stop


# --- scores ------------------------------------------------------------------------------------------


def evaluate(settings: KotlinSettings, scoring: Any, result: dict[str, Any]) -> str:
    """Base and tuned on the Kotlin test set and, where its file is given, on CodeXGLUE's methods.

    Args:
        scoring: An eval.EvalConfig, not named here: whoever reads annotations would import torch.
        result: Of `evaluate` by it.
    """
    from suites.evaluate import evaluate as evaluated
    from suites.scoring import aligned

    suites = {"Kotlin test set": result.get("suite")}
    if settings.methods:
        asked = {"suite": "codexglue_method", "suite_file": settings.methods, "language": "python"}
        asked |= {"metrics": "edit_similarity,bleu_codexglue", "samples": settings.method_samples}
        suites["CodeXGLUE method generation"] = evaluated(replace(scoring, **asked)).get("suite")
    rows, said = [["", "edit similarity", "BLEU"]], []
    for title, suite in suites.items():
        if suite is None:
            continue
        for system, name in (("base", "base"), ("model", "tuned")):
            intervals = [suite["scores"][system][metric] for metric in METRICS]
            cells = ["{mean:.1f} [{low:.1f}, {high:.1f}]".format(**one) for one in intervals]
            rows.append([f"{title}, {name}", *cells])
        verdicts = suite["verdicts"]
        said += [f"{title}, {metric}: {verdicts[metric]['against']['base']}" for metric in METRICS]
    if not settings.methods:
        said.append("CodeXGLUE method generation was not asked for: --methods FILE")
    return "\n".join(["base and tuned, with 95% intervals", *aligned(rows), *said])
