"""Completion: Python files -> a transformer from scratch. `python -m recipes completion`.

    files -> scraping's ledger, clean, dedup, build -> three sides by file -> plain text to train on

Comments and docstrings go, identifiers are cut by CodeTokenizer into pieces, of which those seen more than 10
times have a token, and what is rarer falls back to bytes: there is no unknown token to score as easy. The
curricula of the seed are training's own settings: `--data.order easy-first --data.difficulty rarity`, and a
guard refuses an order that is not the one asked for.

At the end the lines of test files are completed four ways: greedily, by top-k, by top-p, and by beam search
on log-probabilities; of each it is said how many lines differ from the greedy ones, for a beam search that
gives them all again is greedy under another name.
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
from data.corpus import CORPUS, read_documents
from data.documents import SPLITS
from recipes.building import Counts, RecipeSettings, plain_documents, write_dataset
from recipes.files import ROWS, content_of
from tokenizer import Tokenizer

FAMILY = None
EVALUATION: dict[str, Any] = {}
SMALL: dict[str, Any] = {"max_seconds": 420, "tokenizer.vocab_size": 4096}
METRICS = ("exact_match", "edit_similarity")


@dataclass(frozen=True)
class CompletionSettings(RecipeSettings):
    """Which files are read, how they are laid out, and how lines are completed at the end.

    Args:
        source: `stdlib`, a folder or archive of Python files, or a corpus that `python -m scraping build`
            made, which is taken as it is.
        format: Lay files out anew: `autopep8` as the seed, `ruff`, which is some hundred times as fast, or
            `none`.
        temperature: Of top-k and top-p.
        top_k: Tokens that top-k draws from.
        top_p: Probability that top-p draws from.
        num_beams: Width of the beam search.
        decoded: Test lines that are completed in each way; 0 leaves this out.
        line_tokens: Most tokens of a completed line.
        decoding_seed: Of top-k and top-p.
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
    """No document has to fit a row: files are cut into rows."""
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
    """A file as far as it goes, the line break at its end left off: see suites/lines.py."""
    return text.rstrip()


def build(settings: CompletionSettings, tokenizer: Tokenizer | None, folder: Path) -> Counts:
    """Scrape, clean and build the corpus, and write its documents by side.

    Raises:
        ValueError: The source cannot be had, or a side would be empty.
    """
    check(settings)
    counts = Counts("files")
    corpus = Path(settings.source)
    if not (corpus / CORPUS).is_file():
        corpus = scraped(settings, folder.parent / "corpus", counts)
    else:
        counts.found = sum(1 for _ in read_documents(DataConfig(source=str(corpus))))
    sides: dict[str, list[dict[str, Any]]] = {side: [] for side in SPLITS}
    for side, document in plain_documents(str(corpus)):
        sides[side].append({"text": document.text, "path": document.name})
    counts.drop("a copy of another", counts.kept - sum(map(len, sides.values())))
    text = (
        f"Python files of `{settings.source}`, one a row, by way of `python -m scraping`; laid out by "
        f"{settings.format}. Near duplicates went, and a file is on one side."
    )
    return write_dataset(folder, sides, counts, "Python files", text)


def scraped(settings: CompletionSettings, folder: Path, counts: Counts) -> Path:
    """The corpus that `python -m scraping` makes of the source, in `folder`; what goes is counted.

    A ledger keeps what it was given: a source that is another one, or has changed, begins anew.
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
    with contextlib.redirect_stdout(io.StringIO()):  # what they print is counted here
        with contextlib.suppress(NothingStored):  # which is said below, in the recipe's own flags
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
        # Whoever names a folder answers for its licences.
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
    """How each way chooses tokens, a GenerationConfig by its name.

    Not named in the signature: the parser of flags reads a module's annotations, and would import torch even
    for a name that is imported for type checkers alone.

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
    """The test lines completed in each way, with intervals, and each way's verdict against greedy.

    Args:
        scoring: The eval.EvalConfig of the run's scores.
        result: Of `evaluate` by it; gets the texts.
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
    """The first line that a runmodel.Run writes after each prompt, in one of the ways of `decoders`."""
    from generation.text import generate

    texts = []
    for start in range(0, len(prompts), batch_size):
        batch = [prompt_of(prompt) for prompt in prompts[start : start + batch_size]]
        for completion in generate(run.model, run.tokenizer, batch, way, first_row=start):
            text = completion.text.lstrip()
            texts.append(text.split("\n", 1)[0])
    return texts


def decoding_table(texts: dict[str, list[str]], references: Sequence[str], files: Sequence[str]) -> str:
    """A row for each way; below it, against greedy, a verdict, and of how many lines the choice differs.

    Args:
        texts: By way, one for each reference.
        files: That the references are from.
    """
    from metrics.registry import score
    from suites.scoring import aligned

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
