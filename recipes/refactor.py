"""Refactoring: a degraded Python function -> the function as it was. `python -m recipes refactor`.

    documents -> functions -> each written worse in six ways -> pairs that compile and agree -> three splits

Every file is assigned to one split before pairs are made of it, and a function that several files have is
used once, so that no version of a held-out function is trained on. (Variants of one function in both training
and test gave the first system of this kind its BLEU of 72.) A pair is kept only if both functions compile,
the degraded one uses no names from outside that the original does not, and they agree wherever the function
can be run: see degradations.py and behaviour.py.

The measure of a prediction is `kept`: it is one function, of the same name, and does what the original does.
A copy of the input has that by construction, and its score stands beside every other.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import sandbox
from data.documents import SPLITS, Report
from recipes.behaviour import Judgement, agreements, context_of
from recipes.building import Counts, RecipeSettings, plain_documents, write_dataset
from recipes.degradations import STRATEGIES, check_distinct, degrade
from recipes.functions import Function, own_identifiers, parsed, unwritable
from tokenizer import Tokenizer

FAMILY = "gpt_bigcode"
EVALUATION = {"metrics": "exact_match,edit_similarity,bleu_code,codebleu,semantic"}
# A small base needs a larger learning rate, and fewer than 500 steps to warm up.
SMALL: dict[str, Any] = {
    "functions": 300,
    "eval_samples": 60,
    "max_steps": 80,
    "optimizer.lr": 1e-3,
    "optimizer.warmup_steps": 10,
    "validate_every": 40,
    "validation_rows": 40,
}
MOST_DIGITS = 20  # A constant with more digits is not written out in a function.
HEADER = "### Refactor the following Python code to improve quality:"


@dataclass(frozen=True)
class RefactorSettings(RecipeSettings):
    """Settings of the recipe refactor: which functions are used, and how they are written worse.

    Args:
        source: The functions' source: `stdlib`, a folder, a corpus of `python -m scraping build`, or a
            .jsonl, .jsonl.gz or .parquet file.
        strategies: Ways to write a function worse.
        functions: Most functions, evenly spread; 0 takes all.
        min_lines: Fewest lines of a function, its decorators and docstring included.
        max_lines: Most lines of a function, likewise.
        max_tokens: Most tokens of a prompt, its completion and both ends; longer pairs are left out, since a
            truncated function teaches nothing.
        check_behaviour: Run both functions of each pair in the sandbox, where that is possible.
    """

    source: str = "stdlib"
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    functions: int = 0
    min_lines: int = 3
    max_lines: int = 60
    max_tokens: int = 1024
    check_behaviour: bool = True


SETTINGS = RefactorSettings


def longest(settings: RefactorSettings) -> int:
    """Return the most tokens of an example, after a check of the settings, before anything takes time.

    Raises:
        ValueError: A strategy is unknown, or the source does not exist.
    """
    for name in settings.strategies:
        if name not in STRATEGIES:
            raise ValueError(f"--strategies names {name}; there are {', '.join(STRATEGIES)}")
    if settings.source != "stdlib" and not Path(settings.source).exists():
        raise ValueError(
            f"--source {settings.source} does not exist: give stdlib, a folder or a file of rows"
        )
    return settings.max_tokens


def check_isolation(settings: RefactorSettings) -> None:
    """Raise a ValueError where pairs are to be run and nothing isolates; called once the source was read."""
    if settings.check_behaviour:
        try:
            sandbox.isolation()
        except ValueError as error:
            raise ValueError(f"{error}; or leave pairs unjudged with --check_behaviour false") from None


def prompt_of(code: str) -> str:
    """Return the prompt for a better `code`, in training, in evaluation and in `generate.py --recipe`."""
    return f"{HEADER}\n\n{code.rstrip()}\n\n"


# --- functions of a file -------------------------------------------------------------------------


class Piece(NamedTuple):
    """A function of a file that can be taken out and put back.

    Args:
        name: Its name with its classes: `Reader.read`.
        first: Number of its first line, from 1, decorators included.
        last: Number of its last line.
        indent: The blanks before each of its lines that is not blank.
        source: Its text without these blanks, with a line break at its end.
    """

    name: str
    first: int
    last: int
    indent: str
    source: str


def pieces(text: str, skipped: Counter[str] | None = None) -> list[Piece]:
    """Return the functions of a Python file and the methods of its classes, in order; no inner functions.

    Args:
        text: The file's text.
        skipped: The reasons why some functions cannot be taken out are counted in it.

    Raises:
        ValueError: The file does not parse.
    """
    skipped = Counter() if skipped is None else skipped
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except SyntaxError as error:
        where = f", line {error.lineno}" if error.lineno else ""
        raise ValueError(f"it does not parse: {error.msg}{where}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"it does not parse: {error}") from None
    lines = text.split("\n")
    found = []
    for name, node in _functions(tree, ""):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        last = node.end_lineno or first
        block = lines[first - 1 : last]
        indent = block[0][: len(block[0]) - len(block[0].lstrip(" \t"))]
        source = "\n".join(line.removeprefix(indent) if line.strip() else line for line in block) + "\n"
        if "\r" in text or "\f" in text:  # Python counts lines differently there
            skipped["unusual line ends"] += 1
        elif any(line.strip() and not line.startswith(indent) for line in block):
            skipped["text at the margin"] += 1
        elif indent and holds_text_over_lines(node):
            skipped["text over several lines, which cannot be indented"] += 1
        elif reason := unwritable(node):
            skipped[reason] += 1
        else:
            try:
                parsed(source)
            except ValueError:
                skipped["shares its lines, or is none alone"] += 1
            else:
                found.append(Piece(name, first, last, indent, source))
    return found


def _functions(node: ast.AST, before: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield before + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{before}{child.name}.")
        elif isinstance(child, ast.stmt | ast.ExceptHandler):  # the body of an `if` or a `try`
            yield from _functions(child, before)


def holds_text_over_lines(function: ast.AST) -> bool:
    """Return whether a string that is no docstring has several lines, which indentation would change."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(function)
        if isinstance(node, Function | ast.ClassDef) and node.body and isinstance(node.body[0], ast.Expr)
    }
    return any(
        isinstance(node, ast.JoinedStr)
        or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes))
        for node in ast.walk(function)
        if id(node) not in docstrings and getattr(node, "end_lineno", 0) != getattr(node, "lineno", 0)
    )


def constants_of(text: str) -> dict[str, int | float]:
    """Return name -> number of a module's constants such as `LIMIT = 50` that are assigned once."""
    found: dict[str, int | float] = {}
    assigned: Counter[str] = Counter()
    tree = ast.parse(text)
    for node in ast.walk(tree):
        load = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        if not load and not isinstance(node, ast.arg):
            assigned.update(own_identifiers(node))
    if assigned["*"]:  # `from ... import *` may bind any name
        return {}
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=int() | float() as value)):
                # `inf` is no literal. isfinite raises for a long int, and repr past 4,300 digits.
                short = math.isfinite(value) if isinstance(value, float) else value < 10**MOST_DIGITS
                if not isinstance(value, bool) and short:
                    found[name] = value
    return {name: value for name, value in found.items() if assigned[name] == 1}


def shape_of(source: str) -> bytes:
    """Return a hash that is equal for copies of a function under any name and with any docstring."""
    function = parsed(degrade(source, "hints") or source)
    function.name = "f"
    return hashlib.sha256(ast.dump(function).encode()).digest()


# --- the dataset ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A function of the corpus with its degraded versions."""

    split: str
    path: str
    piece: Piece
    context: str
    ways: dict[str, str]
    judged: dict[str, Judgement]

    def rows(self) -> Iterator[dict[str, Any]]:
        for way, code in self.ways.items():
            if way in self.judged and self.judged[way].kind == "differs":
                continue
            row = {
                "prompt": prompt_of(code),
                "completion": self.piece.source,
                "path": self.path,
                "function": self.piece.name,
                "strategy": way,
            }
            if self.split == "test" and way in self.judged and self.judged[way].kind == "agrees":
                row["context"] = self.context
            yield row


def build(settings: RefactorSettings, tokenizer: Tokenizer, folder: Path) -> Counts:
    """Write the pairs of all splits.

    Raises:
        ValueError: A strategy is unknown; the corpus cannot be read, or has no functions; a split would be
            empty; two strategies do the same; or pairs cannot be run here.
    """
    longest(settings)
    counts = Counts("functions")
    functions, unread = _chosen(settings, counts)
    check_isolation(settings)
    made: dict[str, list[str | None]] = {name: [] for name in settings.strategies}
    found: list[Found] = []
    for split, path, piece, text in functions:
        constants = constants_of(text)
        ways: dict[str, str] = {}
        most = 0
        for name in settings.strategies:
            code = degrade(piece.source, name, constants)
            made[name].append(code)
            if code is not None:
                ways[name] = code
                most = max(most, len(tokenizer.encode(prompt_of(code))))
        if not ways:
            counts.drop("no strategy finds anything to do")
        elif most + len(tokenizer.encode(piece.source)) + 2 > settings.max_tokens:
            counts.drop(f"longer than {settings.max_tokens} tokens with their prompt")
        else:
            found.append(Found(split, path, piece, context_of(text, piece.source), ways, {}))
    if found:
        check_distinct(made)
    if settings.check_behaviour:
        _judge(found)
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for one in found:
        rows = list(one.rows())
        splits[one.split] += rows
        if not rows:
            counts.drop("no rewrite does what the function does")
    return write_dataset(folder, splits, counts, "Degraded functions", about(settings, found, unread))


def files_of(settings: RefactorSettings, work: Path | None = None) -> list[tuple[str, str, str]]:
    """Return (split, path, text) of the files of functions, after a check that pairs can be run."""
    documents = _documents(settings)[0]
    check_isolation(settings)
    return documents


def _documents(settings: RefactorSettings) -> tuple[list[tuple[str, str, str]], int]:
    """Return (split, path, text) of the files, and the number of documents that are not UTF-8."""
    report = Report()
    documents = [(split, one.name, one.text) for split, one in plain_documents(settings.source, report)]
    if not documents:
        raise ValueError(
            f"{settings.source} holds examples and no plain code to take functions from: name files, or a "
            "corpus of plain text"
        )
    return documents, report.undecodable


def _chosen(settings: RefactorSettings, counts: Counts) -> tuple[list[tuple[str, str, Piece, str]], str]:
    """Return (split, path, function, text of its file), and a sentence on documents that could not be read.

    Each function comes once; of several copies, the one of a held-out split stays.
    """
    documents, undecodable = _documents(settings)
    documents.sort(key=lambda document: SPLITS.index(document[0]), reverse=True)
    fitting: list[tuple[str, str, Piece, str]] = []
    unparsed = 0
    for split, path, text in documents:
        skipped: Counter[str] = Counter()
        try:
            here = pieces(text, skipped)
        except ValueError:
            unparsed += 1
            continue
        counts.found += len(here) + skipped.total()
        for reason, n in skipped.items():
            counts.drop(reason, n)
        for piece in here:
            n_lines = piece.last - piece.first + 1
            if n_lines < settings.min_lines:
                counts.drop(f"shorter than {settings.min_lines} lines")
            elif n_lines > settings.max_lines:
                counts.drop(f"longer than {settings.max_lines} lines")
            else:
                fitting.append((split, path, piece, text))
    if not counts.found:
        told = f", and {unparsed} of {len(documents)} documents do not parse" if unparsed else ""
        raise ValueError(f"{settings.source} holds no Python function{told}: give Python files")
    if settings.functions and len(fitting) > settings.functions:
        counts.drop(f"beyond --functions {settings.functions}", len(fitting) - settings.functions)
        step = len(fitting) / settings.functions
        fitting = [fitting[int(number * step)] for number in range(settings.functions)]
    seen: set[bytes] = set()
    chosen = []
    for one in fitting:
        shape = shape_of(one[2].source)
        if shape in seen:
            counts.drop("a copy of another")
        else:
            seen.add(shape)
            chosen.append(one)
    n_read = len(documents) + undecodable
    unread = f"Of {n_read:,} documents {unparsed:,} do not parse, and {undecodable:,} are not UTF-8."
    return chosen, unread


def _judge(found: Sequence[Found]) -> None:
    """Run every function and its rewrites, and enter the judgements into `judged`."""
    from config.bars import progress_bar

    def judge(one: Found) -> None:
        one.judged.update(
            zip(one.ways, agreements(one.piece.source, list(one.ways.values()), one.context), strict=True)
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in progress_bar(pool.map(judge, found), total=len(found), desc="run", unit=" functions"):
            pass


def about(settings: RefactorSettings, found: Sequence[Found], unread: str) -> str:
    """Return the card's text: what a pair is, and how many each strategy made.

    Args:
        unread: A sentence about the documents that could not be read.
    """
    made = Counter(way for one in found for way in one.ways)
    kinds = Counter((way, judgement.kind) for one in found for way, judgement in one.judged.items())
    rows = [
        f"| {way} | {made[way]:,} | {kinds[way, 'agrees']:,} | {kinds[way, 'differs']:,} |"
        for way in settings.strategies
    ]
    runs = sum(any(j.kind == "agrees" for j in one.judged.values()) for one in found)
    ran = (
        f"Of {len(found):,} functions {runs:,} could be run on generated inputs; pairs that differ went."
        if settings.check_behaviour
        else "Nothing was run (`--check_behaviour false`)."
    )
    table = "\n".join(
        ["| strategy | pairs | agree when run | differ, left out |", "|---|---|---|---|", *rows]
    )
    return (
        "A row is a function written worse (`prompt`) and as it was (`completion`). `path` is the file that "
        "it is from, which is in one split only; a function that stands in several files is taken once. "
        f"`strategy` says how it was degraded.\n\nSource: {settings.source}. {unread} {ran}\n\n{table}"
    )


# --- what predictions are worth ------------------------------------------------------------------


def evaluate(settings: RefactorSettings, scoring: Any, result: dict[str, Any]) -> str:
    """Return a table of the share of predictions that keep behaviour, for every system of the result.

    The shares are of the test examples whose function can be run. One of the systems copies its input.

    Args:
        settings: The recipe's settings.
        scoring: The EvalConfig of the scores; its source is the dataset.
        result: The result of `evaluate` with it; the judgements are added to it.
    """
    samples = result.get("suite", {}).get("samples", [])
    if not (samples and settings.check_behaviour):
        return ""
    contexts = {}
    for line in (Path(scoring.source) / "test.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        contexts[row["prompt"]] = row.get("context")
    cases = [
        (sample["reference"], context, sample["predictions"])
        for sample in samples
        if (context := contexts.get(sample["prompt"])) is not None
    ]
    found = kept_behaviour(cases, list(result["suite"]["scores"]))
    result["behaviour"] = {name: [list(judgement) for judgement in told] for name, told in found.items()}
    return behaviour_table(found, len(samples))


def kept_behaviour(
    cases: Sequence[tuple[str, str, Mapping[str, str]]], systems: Sequence[str]
) -> dict[str, list[Judgement]]:
    """Return for each system a judgement of each case: (original, its context, prediction by system)."""

    def judge(case: tuple[str, str, Mapping[str, str]]) -> list[Judgement]:
        original, context, predictions = case
        texts = list(dict.fromkeys(predictions[system] for system in systems))
        by_text = dict(zip(texts, agreements(original, texts, context, apart=True), strict=True))
        return [by_text[predictions[system]] for system in systems]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        judged = list(pool.map(judge, cases))
    return {system: [row[n] for row in judged] for n, system in enumerate(systems)}


def behaviour_table(found: Mapping[str, Sequence[Judgement]], n_samples: int) -> str:
    """Return a line for each system: the share that keeps behaviour, with Wilson's interval."""
    from metrics.intervals import share_interval
    from suites.tables import aligned

    rows = [["behaviour kept", "share", "of"]]
    for system, judgements in found.items():
        told = [judgement for judgement in judgements if judgement.kind != "not run"]
        kept = sum(judgement.kind == "agrees" for judgement in told)
        if len(told) < 2:
            continue
        ends = share_interval(kept, len(told))
        rows.append(
            [system, f"{100 * kept / len(told):.1f} [{ends.low:.1f}, {ends.high:.1f}]", str(len(told))]
        )
    if len(rows) == 1:
        return f"behaviour: of {n_samples} samples fewer than 2 can be run"
    return "\n".join(aligned(rows))
