"""Learn a private repository, judged by what was written next: `python -m recipes repository --source DIR`.

    git history, cut by time  the tree at a commit V trains, what was added after T > V is the test
    a file of the tree        -> gaps: lines, rests of lines, blocks -> with other files, or without -> rows
    an added line             -> the file at the parent commit, without it -> what the repository of that
                                 moment says beside it -> prefix, suffix, middle -> asked of both models

So `shop/a.py` at V goes through `scraping.history` (its bytes), `recipes.history.Reader` (text, without
secrets and names), `recipes.written.gaps_of` (gaps), `data.context` (other files) and `row_of` (a row). A
line that a later commit added goes through `Cut.steps`, `recipes.written.cases_of`, `Snapshots` (the
repository at the parent), `data.context` and `row_of`, and is then scored as the test of every recipe is.

Nothing leaves the machine, and the checkout is never changed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from config import write_atomically
from data.context import RepositoryFiles, beside, context_of
from data.fim import fim_markers
from recipes.building import Counts, RecipeSettings, write_dataset
from recipes.history import Cut, Reader, Snapshots, cut, split_of_file
from recipes.line_search import searched
from recipes.written import KINDS, LIMIT_TOKENS, Known, Written, cases_of, chosen, gaps_of
from scraping.history import History, opened
from tokenizer import Tokenizer

FAMILY = "gpt_bigcode"
LIVING = True  # What is committed after a dataset was made of the source is no reason to make it again.
EVALUATION: dict[str, Any] = {"metrics": "exact_match,edit_similarity", "memorisation": True}
SMALL: dict[str, Any] = {
    "base_seconds": 180,
    "context_tokens": 128,
    "row_tokens": 512,
    "row_length": 512,
    "max_seconds": 300,
    "optimizer.lr": 2e-3,
    "lora.r": 32,
    "lora.targets": '["all-linear","wte"]',
    "batch_size": 8,
    "accumulation": 1,
}
LIKELY = {"line": 0.4, "rest": 0.3, "block": 0.3}  # Shares of the kinds among rows.
RECENT = 2.0  # A file that was changed lately gives so many times the rows that another gives.
FEWEST_CASES = 30
SAID = "repository.json"  # In OUT: which commits were learned and tested, and how much is shown.


@dataclass(frozen=True)
class RepositorySettings(RecipeSettings):
    """Settings of the recipe repository: which history is learned, and how its rows are made.

    Args:
        source: The top folder of a git checkout, or a bare repository.
        since: What was added after this date, commit, branch or tag is the test; by default the last fifth of
            the main line's commits.
        context_tokens: Most tokens that a prompt shows of other files; 0 shows nothing.
        row_tokens: Most tokens of a row: context, prefix, suffix, and the gap with its end.
        rows: Most rows for training.
        cases: Most cases of the test; a third as many validate.
        row_seed: Seed of the choice of rows.
    """

    source: str = ""
    since: str = ""
    context_tokens: int = 256
    row_tokens: int = 1024
    rows: int = 6000
    cases: int = 300
    row_seed: int = 0


SETTINGS = RepositorySettings


def check(settings: RepositorySettings) -> None:
    """Refuse what shows at once: no checkout, no commit, or numbers that leave no room."""
    if not settings.source:
        raise ValueError("no checkout is named: give --source the top folder of one, such as ~/code/mine")
    if "://" in settings.source:
        raise ValueError(
            f"--source {settings.source} is an address, and this recipe stays on the machine: clone it by "
            "git with its whole history, and give --source the folder"
        )
    with opened(settings.source):
        pass


def longest(settings: RepositorySettings) -> int:
    """Return the most tokens of a row.

    Raises:
        ValueError: A number is out of range.
    """
    least = settings.context_tokens + 2 * LIMIT_TOKENS
    if settings.row_tokens < least:
        raise ValueError(
            f"--row_tokens is {settings.row_tokens}; with --context_tokens {settings.context_tokens} it must "
            f"be at least {least}"
        )
    for name, few in (("rows", 100), ("cases", FEWEST_CASES)):
        if getattr(settings, name) < few:
            raise ValueError(f"--{name} is {getattr(settings, name)}; it must be at least {few}")
    return settings.row_tokens


class Prompt(NamedTuple):
    """A prompt with a gap."""

    prefix: str
    suffix: str


def prompt_of(
    files: RepositoryFiles,
    case: Written,
    tokenizer: Tokenizer,
    settings: RepositorySettings,
    shown: bool = True,
    more: Sequence[tuple[str, str]] = (),
) -> Prompt:
    """Return the prompt of a place: what other files say, and as much around the cursor as has room.

    Args:
        files: The repository as it is at that moment.
        case: The place; its middle plays no part.
        shown: Whether other files are shown.
        more: Pieces (name, text) of other files that an editor sends.
    """
    budget = settings.context_tokens if shown else 0
    context = context_of(files, case.path, case.prefix, case.suffix, tokenizer, budget, more)
    return Prompt(*beside(tokenizer, context, case.prefix, case.suffix, room_of(settings, tokenizer)))


def room_of(settings: RepositorySettings, tokenizer: Tokenizer) -> int:
    """Return the tokens that context, prefix and suffix have together."""
    return settings.row_tokens - LIMIT_TOKENS - len(tokenizer.before(gap=True)) - 4 - SLACK


SLACK = 12  # tokens by which texts may grow that are encoded together


def row_of(case: Written, prompt: Prompt, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Return the row of a case with the prompt that is shown; None for a middle that is too long."""
    if len(tokenizer.encode(case.middle)) >= LIMIT_TOKENS:
        return None
    return {
        "prefix": prompt.prefix,
        "suffix": prompt.suffix,
        "middle": case.middle,
        "path": case.name,
        "kind": case.kind,
        "commit": case.commit,
    }


# --- the dataset -------------------------------------------------------------------------------------


def build(settings: RepositorySettings, tokenizer: Tokenizer, folder: Path) -> Counts:
    """Write the rows of all splits.

    Raises:
        ValueError: The checkout cannot be read, the base fills no gaps, or a split would be too small.
    """
    fim_markers(tokenizer, "it cannot learn to complete inside of a file")
    with opened(settings.source) as history:
        made = cut(history, settings.since)
        counts = made.counts
        train = training_gaps(made, settings)
        files = RepositoryFiles(made.together)
        for path, text in made.tree.items():
            files.put(path, text)
        rows = {"train": _rows(train, files, tokenizer, settings, counts, mixed=True)}
        held_out = _by_files(made, settings) if made.by_files else _by_time(made, settings)
        for split, cases in held_out.items():
            if made.by_files:
                rows[split] = _rows(cases, files, tokenizer, settings, counts)
            else:
                rows[split] = _rows_then(history, made, cases, tokenizer, settings, counts)
    if len(rows["test"]) < FEWEST_CASES:
        raise ValueError(
            f"{settings.source} gives {len(rows['test'])} cases that were written after {made.since[:10]}, "
            f"and at least {FEWEST_CASES} are needed: move --since back, or wait until more is written"
        )
    said = {
        "source": str(Path(settings.source).expanduser().resolve()),
        "known": made.known,
        "since": made.since,
        "head": made.head,
        "by_files": made.by_files,
        "context_tokens": settings.context_tokens,
        "row_tokens": settings.row_tokens,
        "together": {path: dict(found.most_common(8)) for path, found in made.together.items()},
    }
    about = _about(settings, made, rows)
    counts = write_dataset(folder, rows, counts, "A repository, and what was written next", about)
    write_atomically(folder.parent / SAID, json.dumps(said, indent=1))
    return counts


def evaluate(settings: RepositorySettings, scoring: Any, result: dict[str, Any]) -> str:
    """Return the report on what was written next, and write the threshold into OUT/repository.json.

    Args:
        scoring: The EvalConfig of the scores. The annotation does not name it, since its import needs torch.
    """
    from recipes.foretold import report

    text, threshold = report(scoring)
    change_said(Path(scoring.source).parent, threshold=threshold)
    return text


def read_said(out: Path) -> dict[str, Any]:
    """Return what OUT/repository.json says.

    Raises:
        ValueError: It is not there, or damaged.
    """
    path = out / SAID
    try:
        said = json.loads(path.read_text("utf-8"))
        if isinstance(said, dict) and isinstance(said.get("source"), str):
            return said
    except FileNotFoundError:
        raise ValueError(f"{out} has no {SAID}: no repository was learned there") from None
    except ValueError:
        pass
    raise ValueError(f"{path} is damaged; restore it, or learn the repository anew with another --out")


def adapter_of(out: Path, said: dict[str, Any]) -> Path:
    """Return the folder of the adapter that is the repository's now: the first, or that of an update."""
    version = said.get("version", 1)
    return out / "adapter" if version == 1 else out / "versions" / str(int(version)) / "adapter"


def change_said(out: Path, **more: Any) -> None:
    """Put values into OUT/repository.json."""
    write_atomically(out / SAID, json.dumps(read_said(out) | more, indent=1))


def training_gaps(made: Cut, settings: RepositorySettings) -> list[Written]:
    """Choose the gaps of the learned tree: in the shares of LIKELY, more of them from files changed lately.

    A hash of the seed and the gap's name chooses, so that neither order nor machine matters.
    """
    by_kind: dict[str, list[tuple[float, Written]]] = {kind: [] for kind in KINDS}
    for path, text in made.tree.items():
        if made.by_files and split_of_file(path) != "train":
            continue
        weight = RECENT if path in made.recent else 1.0
        for gap in gaps_of(path, text):
            digest = hashlib.sha256(
                f"{settings.row_seed} {gap.name}".encode("utf-8", "surrogatepass")
            ).digest()
            # The largest of these keys are a sample with these weights (Efraimidis and Spirakis 2006).
            key = ((1 + int.from_bytes(digest[:8])) / 2**64) ** (1 / weight)
            by_kind[gap.kind].append((key, gap))
    found: list[Written] = []
    for kind, gaps in by_kind.items():
        gaps.sort(key=lambda one: (-one[0], one[1].name))
        found += [gap for _, gap in gaps[: int(LIKELY[kind] * settings.rows)]]
    return sorted(found, key=lambda gap: _hash(gap.name))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _by_files(made: Cut, settings: RepositorySettings) -> dict[str, list[Written]]:
    """Return gaps in files that are not learned, where the history is too short to be cut by time."""
    cases: dict[str, list[Written]] = {"validation": [], "test": []}
    for path, text in made.tree.items():
        if (split := split_of_file(path)) != "train":
            cases[split] += gaps_of(path, text, made.head)
    return {split: chosen(found, most_of(split, settings)) for split, found in cases.items()}


def _by_time(made: Cut, settings: RepositorySettings) -> dict[str, list[Written]]:
    """Return the cases that commits after V and after T wrote."""
    known = Known(made.tree.values())
    cases: dict[str, list[Written]] = {"validation": [], "test": []}
    for step in made.steps:
        cases[step.split] += cases_of(step, known, made.counts)
    return {split: chosen(found, most_of(split, settings)) for split, found in cases.items()}


def most_of(split: str, settings: RepositorySettings) -> int:
    return settings.cases if split == "test" else settings.cases // 3


def _rows(
    cases: Iterable[Written],
    files: RepositoryFiles,
    tokenizer: Tokenizer,
    settings: RepositorySettings,
    counts: Counts,
    mixed: bool = False,
) -> list[dict[str, Any]]:
    """Return the rows of cases at one moment of the repository.

    Args:
        mixed: Show every second one no other file, so that the model learns to do without: rows to learn.
            Others have their prompt without other files too, and what a search answers.
    """
    found = []
    for number, case in enumerate(cases):
        prompt = prompt_of(files, case, tokenizer, settings, shown=not (mixed and number % 2))
        row = row_of(case, prompt, tokenizer)
        counts.found += 1
        if row is None:
            counts.drop(f"gap: of more than {LIMIT_TOKENS} tokens")
            continue
        if not mixed:  # What the report asks besides.
            row["alone"] = prompt_of(files, case, tokenizer, settings, shown=False)
            row["searched"] = searched(files, case)
        found.append(row)
    return found


def _rows_then(
    history: History,
    made: Cut,
    cases: Sequence[Written],
    tokenizer: Tokenizer,
    settings: RepositorySettings,
    counts: Counts,
) -> list[dict[str, Any]]:
    """Return the rows of cases, each with the repository as it was at the parent of its commit."""
    people = {one for commit in history.commits(history.ids(made.head)) for one in commit.people}
    snapshots = Snapshots(history, Reader(history, people))
    files = RepositoryFiles(made.together)
    rows = []
    for step in made.steps:
        own = [case for case in cases if case.commit == step.id]
        if own:
            for path, text in snapshots.move_to(step.parent):
                files.put(path, text)
            rows += _rows(own, files, tokenizer, settings, counts)
    return rows


def _about(settings: RepositorySettings, made: Cut, rows: dict[str, list[dict[str, Any]]]) -> str:
    kinds = Counter(row["kind"] for row in rows["test"])
    commits = len({row["commit"] for row in rows["test"]})
    told = (
        "The history is too short to be cut by time, so files were split: the test asks for lines of files "
        "that were not learned, which is weaker, since it says nothing of what comes next."
        if made.by_files
        else f"The tree at {made.known[:10]} is learned; lines added up to {made.since[:10]} validate; lines "
        f"added after it, by {commits} commits up to {made.head[:10]}, are the test."
    )
    asked = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    return (
        f"{told}\n\nA row is a gap in a file: {asked} in the test, each with the file as it was before the "
        f"commit, and with up to {settings.context_tokens} tokens of other files of that moment as comments "
        "before it. Secrets, names and addresses of committers, and headers of licences are taken out."
    )
