"""Completion: Python files -> a transformer from scratch. `python -m recipes completion`.

    files -> scraping's ledger, clean, dedup, build -> three splits by file -> plain text to train on

Comments and docstrings are removed. CodeTokenizer cuts identifiers into pieces; a piece that occurs more than
10 times has a token, and a rarer one falls back to bytes, so that there is no unknown token, which would be
easy to predict. Curricula are settings of training: `--data.order easy-first --data.difficulty rarity`, and a
guard refuses an order that is not the requested one.

At the end the lines of test files are completed in four ways: greedily, by top-k, by top-p, and by beam
search on log-probabilities. Each way's number of lines that differ from the greedy ones is printed, since a
beam search without such lines is greedy decoding under another name.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from config import DataConfig
from data.corpus import read_documents
from data.documents import SPLITS
from data.sourcefiles import CORPUS
from recipes.building import Counts, RecipeSettings, plain_documents, write_dataset
from recipes.files import ROWS, content_of
from tokenizer import Tokenizer

FAMILY = None
EVALUATION: dict[str, Any] = {}
SMALL: dict[str, Any] = {"max_seconds": 420, "tokenizer.vocab_size": 4096}
METRICS = ("exact_match", "edit_similarity")


@dataclass(frozen=True)
class CompletionSettings(RecipeSettings):
    """Settings of the recipe completion: its files, their format, and how lines are completed at the end.

    Args:
        source: `stdlib`, a folder or archive of Python files, or a corpus that `python -m scraping build`
            made, which is used unchanged.
        format: Formatter of the files: `autopep8`, `ruff`, which is some hundred times as fast, or `none`.
        temperature: Temperature of top-k and top-p.
        top_k: Number of tokens that top-k samples from.
        top_p: Probability of the tokens that top-p samples from.
        num_beams: Width of the beam search.
        decoded: Number of test lines that are completed in each way; 0 skips this.
        line_tokens: Most tokens of a completed line.
        decoding_seed: Seed of top-k and top-p.
    """

    source: str = "stdlib"
    format: Literal["autopep8", "ruff", "none"] = "autopep8"
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    num_beams: int = 4
    decoded: int = 100
    line_tokens: int = 48
    decoding_seed: int = 0


SETTINGS = CompletionSettings


def longest(settings: CompletionSettings) -> int:
    """Return 0: files are cut into rows, and no document has to fit one."""
    return 0


def check(settings: CompletionSettings) -> None:
    decoders(settings)
    source = settings.source
    if source != "stdlib" and (source.endswith(ROWS) or not Path(source).exists()):
        problem = "is a file of rows" if Path(source).exists() else "does not exist"
        raise ValueError(
            f"--source {source} {problem}: give stdlib, a folder or archive of Python files, or a corpus of "
            "python -m scraping build"
        )


def prompt_of(text: str) -> str:
    """Return a file's beginning without the line break at its end: see suites/lines.py."""
    return text.rstrip()


def build(settings: CompletionSettings, tokenizer: Tokenizer | None, folder: Path) -> Counts:
    """Scrape, clean and build the corpus, and write its documents by split.

    Raises:
        ValueError: The source cannot be read, or a split would be empty.
    """
    check(settings)
    counts = Counts("files")
    corpus = Path(settings.source)
    if not (corpus / CORPUS).is_file():
        corpus = scraped(settings, folder.parent / "corpus", counts)
    else:
        counts.found = sum(1 for _ in read_documents(DataConfig(source=str(corpus))))
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for split, document in plain_documents(str(corpus)):
        splits[split].append({"text": document.text, "path": document.name})
    counts.drop("a copy of another", counts.kept - sum(map(len, splits.values())))
    text = (
        f"Python files of `{settings.source}`, one a row, by way of `python -m scraping`; laid out by "
        f"{settings.format}. Near duplicates went, and a file is in one split."
    )
    return write_dataset(folder, splits, counts, "Python files", text)


def scraped(settings: CompletionSettings, folder: Path, counts: Counts) -> Path:
    """Scrape the source into a corpus in `folder`, and count what is dropped; return the corpus's folder.

    A ledger keeps all that was entered, so another source, or a changed one, begins with a new ledger.
    """
    source = Path(settings.source)
    content = content_of(source) if settings.source != "stdlib" and source.exists() else ""
    mark, made_from = folder / "source", f"{settings.source} {content}"
    if not mark.is_file() or mark.read_text("utf-8", "surrogateescape") != made_from:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        mark.write_text(made_from, "utf-8", "surrogateescape")
    from scraping import build, clean, dedup, local, stdlib
    from scraping.source import NothingStored, open_ledger

    place: dict[str, Any] = {"folder": str(folder)}
    with contextlib.redirect_stdout(io.StringIO()):  # `counts` has what these commands print
        with contextlib.suppress(NothingStored):  # refused below, in words of the recipe's own flags
            if settings.source == "stdlib":
                stdlib.run(stdlib.StdlibSettings(**place))
            else:
                local.run(local.LocalSettings(path=settings.source, **place))
        ledger = open_ledger(str(folder))
        try:
            counts.found = sum(1 for _ in ledger.files())
        finally:
            ledger.close()
        if not counts.found:
            raise ValueError(f"{settings.source} holds no .py file of 1 to 100 KiB: name another --source")
        # The user who names a folder answers for its licences.
        clean.run(
            clean.CleanSettings(format=settings.format, unknown_licence=settings.source != "stdlib", **place)
        )
        dedup.run(dedup.DedupSettings(**place))
        build.run(build.BuildSettings(**place))
    made = json.loads((folder / "corpus" / CORPUS).read_text("utf-8"))
    went: Counter[str] = Counter()
    for stage in made["stages"]:
        for reason, n in stage["dropped"].items():
            went[f"{stage['stage']}: {reason}"] += n
    for reason, n in went.items():
        counts.drop(reason, n)
    return folder / "corpus"


# --- four ways to complete a line --------------------------------------------------------------------


def decoders(settings: CompletionSettings) -> dict[str, Any]:
    """Return the GenerationConfig of each way to choose tokens, by its name.

    The signature does not name the class, since the parser of flags reads a module's annotations, and would
    import torch even for a name that is imported for type checkers alone.

    Raises:
        ValueError: A setting is out of range.
    """
    from generation.settings import GenerationConfig

    common: dict[str, Any] = {"max_new_tokens": settings.line_tokens}
    drawn = common | {"temperature": settings.temperature, "seed": settings.decoding_seed}
    return {
        "greedy": GenerationConfig(**common),
        f"top-k {settings.top_k}": GenerationConfig(**drawn, top_k=settings.top_k),
        f"top-p {settings.top_p:g}": GenerationConfig(**drawn, top_p=settings.top_p),
        f"beam {settings.num_beams}": GenerationConfig(**common, num_beams=settings.num_beams),
    }


def evaluate(settings: CompletionSettings, scoring: Any, result: dict[str, Any]) -> str:
    """Complete test lines in each way; return their scores with intervals, and verdicts against greedy.

    Args:
        settings: The recipe's settings.
        scoring: The EvalConfig of the run's scores.
        result: The result of `evaluate` with it; the texts are added to it.
    """
    from modules.precision import choose_device
    from suites.scoring import origin_of
    from training.run import load_run

    samples = result.get("suite", {}).get("samples", [])[: settings.decoded]
    if len(samples) < 2:
        return ""
    run, ways = load_run(scoring.checkpoint), decoders(settings)
    run.model.to(choose_device(scoring.device))
    texts = {name: completed(run, [s["prompt"] for s in samples], way) for name, way in ways.items()}
    result["decoding"] = texts
    files = [origin_of(sample["name"]) for sample in samples]
    return decoding_table(texts, [sample["reference"] for sample in samples], files)


def completed(run: Any, prompts: Sequence[str], way: Any, batch_size: int = 16) -> list[str]:
    """Return the first line that a run's model writes after each prompt, in one of the ways of `decoders`."""
    from generation.text import generate

    texts = []
    for start in range(0, len(prompts), batch_size):
        batch = [prompt_of(prompt) for prompt in prompts[start : start + batch_size]]
        for completion in generate(run.model, run.tokenizer, batch, way, first_row=start):
            text = completion.text.lstrip()
            texts.append(text.split("\n", 1)[0])
    return texts


def decoding_table(texts: dict[str, list[str]], references: Sequence[str], files: Sequence[str]) -> str:
    """Return a table with a row for each way, a verdict against greedy, and the number of lines that differ.

    Args:
        texts: Way -> its texts, one for each reference.
        references: The lines as they are in the files.
        files: The files of the references.
    """
    from metrics.registry import score
    from suites.tables import aligned

    found = {
        name: score(
            METRICS, [(t.strip(), r.strip()) for t, r in zip(own, references, strict=True)], origins=files
        )
        for name, own in texts.items()
    }
    rows = [["decoding", *METRICS]]
    for name, scores in found.items():
        ends = (scores[metric].interval() for metric in METRICS)
        rows.append([name, *(f"{e.mean:.1f} [{e.low:.1f}, {e.high:.1f}]" for e in ends)])
    first, *others = texts
    lines = [f"{len(references)} test lines, with 95% intervals", *aligned(rows)]
    for name in others:
        differs = sum(a != b for a, b in zip(texts[name], texts[first], strict=True))
        verdict = found[name]["edit_similarity"].compare(found[first]["edit_similarity"]).verdict(first)
        lines.append(f"{name}: {differs} lines differ from {first}; edit_similarity {verdict}")
    return "\n".join(lines)
