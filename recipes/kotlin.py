"""Continue a piece of a Kotlin file: `python -m recipes kotlin --source kotlin.jsonl.gz`.

Files lose their copyright headers, and are dropped if they are generated, too short, or hold absurd lines or
literals. Each is cut into windows of about 100 tokens with its line breaks, and each window into two parts at
a place that may be inside a line. All windows of a file are in one split. The model continues the first part
of a window; the second ends where a line does, so that it learns to stop there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from recipes.building import Counts, RecipeSettings, split_items, write_dataset
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
TEST_SHARE, VALIDATION_SHARE = 0.1, 0.1  # shares of all files, and of those that are not test
FEWEST = 8  # tokens on either side of a cut
SLACK = 8  # tokens by which prompt and completion may grow where they are encoded apart
LATEST_CUT = 0.75  # The cut is within this share of a window.


@dataclass(frozen=True)
class KotlinSettings(RecipeSettings):
    """Settings of the recipe kotlin: which files are read, and how they are cut.

    Args:
        source: The address of a git repository, a folder, an archive, or a .jsonl(.gz) file with `path` and
            `text`.
        revision: Branch, tag or commit of a repository.
        under: Only files whose path begins so.
        window: Approximate number of tokens of a prompt and its completion together.
        per_file: Most windows of a file, evenly spread; 0 takes all.
        split_seed: Seed of the split.
        methods: CodeXGLUE's test file of method generation, on which base and tuned model are scored too.
        method_samples: Number of its methods that are scored.
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
    if settings.methods:  # Checked now, although it is read last.
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
    """Return the most tokens of an example, with its end.

    Raises:
        ValueError: A number is out of range.
    """
    if settings.window < 4 * FEWEST:
        raise ValueError(f"--window is {settings.window}; it must be at least {4 * FEWEST} tokens")
    return settings.window + 2 * SLACK


def prompt_of(text: str) -> str:
    """Return the prompt, which is the text itself, in training, evaluation and serving."""
    return text


def build(settings: KotlinSettings, tokenizer: Tokenizer, folder: Path) -> Counts:
    """Write the dataset of windows; raise a ValueError where the source has too few Kotlin files."""
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
    splits = split_items(windows, settings.split_seed, TEST_SHARE, VALIDATION_SHARE)
    rows: dict[str, list[dict[str, str]]] = {}
    seen: set[str] = set()
    for split in ("test", "validation", "train"):  # A text of two splits stays in the one where it is scored.
        rows[split] = []
        for path, cut in splits[split]:
            for window in cut:
                text = (
                    window.prompt + window.completion
                )  # Joined, since equal files are cut at different places.
                if text not in seen:
                    rows[split].append(
                        {"path": path, "prompt": prompt_of(window.prompt), "completion": window.completion}
                    )
                seen.add(text)
    all_windows = [row for split in rows.values() for row in split]
    inside = sum(not row["prompt"].endswith("\n") for row in all_windows)
    twice = sum(len(cut) for _, cut in windows) - len(all_windows)
    return write_dataset(folder, rows, counts, "Kotlin windows", about(settings, inside, twice))


def about(settings: KotlinSettings, inside: int, twice: int) -> str:
    """Return the text of the dataset card."""
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
    """Return the scraper's stage of shape, with its default bounds."""
    s = CleanSettings()
    return shape.build(s.min_lines, s.max_line, s.max_mean_line, s.min_alnum, s.max_escapes, s.max_numbers)


def cleaned(file: ScrapedDocument, well_shaped: Any) -> ScrapedDocument | Drop:
    """Return a file without its copyright header, or why it is dropped; generated files are near copies."""
    if isinstance(own := origin.build()(file), Drop):
        return own
    return well_shaped(replace(file, text=without_header(file.text, file.path)))


def spread(items: Sequence[Any], most: int) -> list[Any]:
    if not most or len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


# --- windows -----------------------------------------------------------------------------------------


def windows_of(text: str, name: str, size: int, tokenizer: Tokenizer) -> Iterator[Window]:
    """Yield windows of at most `size` tokens that follow each other through the text, each cut into two.

    A window ends with the last line that fits, and only inside a line that is too long itself. A hash of the
    file's name and the window's place decides the cut.
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
    """Return the text of each token; a character of several tokens is the last one's, the others have ""."""
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
    """Return the last place up to `stop` at which a line ends; `stop` where none but near the start does.

    A token often has a line break and the next line's indentation; the line then ends before that token.
    """
    if stop == len(pieces):
        return stop
    for place in range(stop, start + 2 * FEWEST, -1):
        if pieces[place - 1].endswith("\n") or pieces[place].startswith("\n"):
            return place
    return stop


# --- scores ------------------------------------------------------------------------------------------


def evaluate(settings: KotlinSettings, scoring: Any, result: dict[str, Any]) -> str:
    """Compare base and tuned model on the Kotlin test set and, if its file is given, on CodeXGLUE's methods.

    Args:
        settings: The recipe's settings.
        scoring: The EvalConfig of the scores. The annotation does not name it, since its import needs torch.
        result: The result of `evaluate` with it.
    """
    from suites.evaluate import evaluate as evaluated
    from suites.tables import aligned

    suites = {"Kotlin test set": result.get("suite")}
    if settings.methods:
        requested = {"suite": "codexglue_method", "suite_file": settings.methods, "language": "python"}
        requested |= {"metrics": "edit_similarity,bleu_codexglue", "samples": settings.method_samples}
        suites["CodeXGLUE method generation"] = evaluated(replace(scoring, **requested)).get("suite")
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
