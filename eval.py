"""Scores of a trained model on the test files of its run: `python eval.py --checkpoint runs/default`.

A run without a test side is scored on its validation files, by which its checkpoint was chosen, and says so.
Beside every score stands that of an n-gram model of the same training files (`ngram.NGramModel`), and for a
run with adapters that of its base. Prints a table and writes RUN/eval.json: the scores, every predicted line,
and what is needed to run it again.

Token scores are over every token after a document's first, by the function that training validates with.
Bits per byte divides their nats by the UTF-8 bytes of all test files, whatever the tokenizer; the nats of
the tokens that end the files are counted.

Next line: the prompt is a held-out file up to the end of a line, its line break left off, and the prediction
is the first line written after it. With the line break in the prompt, a tokenizer that joins it to the
indentation ("\\n    " is one token) would have to go on from a token that no indented line ever follows: so
asked, the n-gram model has 2.5% of the lines of the standard library right, and 10% as it is done here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from config import DataConfig, make_parser, one_sentence, write_atomically


@dataclass(frozen=True)
class EvalConfig:
    """What is evaluated, and how.

    Args:
        checkpoint: Run folder, or one checkpoint inside it.
        which: The checkpoint of a run folder: `best` by validation loss, or `last`.
        samples: Held-out lines that are completed; 0 leaves the next-line scores out.
        max_new_tokens: Most tokens of a completed line; at most half the model's block is used.
        seed: Of the choice of lines and of the intervals.
        batch_size: Rows evaluated at a time.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: `auto` (what the hardware computes natively), `bf16`, `fp16` or `fp32`.
        source: Where the files are now, if they moved; the fingerprint still has to match.
        base: Where the base of a run with adapters is now, likewise.
        cache: Folder for token stores, keyed by content; the one that the run's config names is not touched.
    """

    checkpoint: str
    which: Literal["best", "last"] = "best"
    samples: int = 200
    max_new_tokens: int = 64
    seed: int = 0
    batch_size: int = 16
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    source: str | None = None
    base: str | None = None
    cache: str = "cache"


def parse_settings() -> EvalConfig:
    """The EvalConfig of the command line; a mistake prints one sentence and exits with 2."""
    parser = make_parser({"": EvalConfig}, "Score a trained model on its test files.")
    values = parser.parse_args()
    settings = EvalConfig(**{field.name: values[field.name] for field in dataclasses.fields(EvalConfig)})
    for name, least in (("samples", 0), ("max_new_tokens", 1), ("batch_size", 1), ("seed", 0)):
        if getattr(settings, name) < least:
            parser.error(f"--{name} is {getattr(settings, name)}, and must be at least {least}")
    if settings.samples == 1:
        parser.error("--samples is 1, and an interval needs at least 2; 0 leaves the next-line scores out")
    return settings


# Before torch is imported, so that --help and a typo answer at once.
SETTINGS = parse_settings() if __name__ == "__main__" else None

import ast
import json
import math
import platform
import shlex
import sys
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rapidfuzz
import torch

from architecture import Decoder
from checkpoint import code_fingerprint
from dataset import as_shown, prepare_data, shown, validation_batches
from decoding import generate_ids
from generate import GenerationConfig, added_text, prompt_ids
from generate import printable as printable
from lora import adapters_disabled
from loss import Scores, score
from metrics import Interval, edit_similarity, exact_match, mean_interval
from ngram import NGramModel
from precision import Precision, choose_device, choose_precision
from preflight import overrides
from runmodel import Run, load_run
from tokenizer import Tokenizer
from tokenstore import TokenStore

CONTEXT_LINES = 3  # fewest lines of a prompt
# Its training takes about 170 bytes a token at its peak; of more tokens, it gets evenly spread documents.
BASELINE_TOKENS = 10_000_000
SCORED_TOKENS = 2**20  # that the n-gram model scores at a time
FUNCTION_LINES = range(2, 16)  # of the bodies shown as samples


# --- token scores ------------------------------------------------------------------------------------


def train_ngram(train: TokenStore) -> NGramModel:
    """The baseline, from the train documents, or from evenly spread ones when they are very many."""
    stride = -(-train.n_tokens // BASELINE_TOKENS)
    documents = (train.document(number) for number in range(0, train.n_documents, stride))
    return NGramModel(documents, train.vocab_size)


def ngram_scores(baseline: NGramModel, store: TokenStore, block_size: int) -> Scores:
    """The baseline's scores over the same tokens as `loss.score` counts on `validation_batches`.

    Of examples these are the completions' tokens, each after as much of its prompt as a row shows.
    """
    nats, tokens, top1, top5 = 0.0, 0, 0, 0
    rows = shown(store, block_size)
    for numbers in _groups(store):
        documents = [as_shown(store, number, rows) for number in numbers]
        first = [max(1, int(rows.prompt_length[number])) for number in numbers]
        counts = np.concatenate([np.arange(1, len(d)) >= n for d, n in zip(documents, first, strict=True)])
        labels = np.concatenate([document[1:] for document in documents])[counts]
        hits = baseline.top(documents, 5)[counts] == labels[:, None]
        nats -= float(baseline.log_probs(documents)[counts].sum())
        tokens, top1, top5 = tokens + len(labels), top1 + int(hits[:, 0].sum()), top5 + int(hits.sum())
    return Scores(nats, tokens, top1 / tokens, top5 / tokens)


def _groups(store: TokenStore) -> Iterator[range]:
    """Numbers of the documents, in groups of about SCORED_TOKENS."""
    start = 0
    while start < store.n_documents:
        end = int(np.searchsorted(store.offsets, store.offsets[start] + SCORED_TOKENS))
        yield range(start, min(end, store.n_documents))
        start = end


# --- examples from held-out files --------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A place in a held-out file to go on from.

    Args:
        name: Of the file.
        line: The first line of the reference, counted from 1.
        prompt: What stands before it, cut at a line break on the left to fit the model.
        reference: What stands there.
        start: Where in the prompt the function begins; 0 for a line.
    """

    name: str
    line: int
    prompt: str
    reference: str
    start: int = 0


def next_line_examples(
    store: TokenStore, tokenizer: Tokenizer, n: int, room: int, seed: int = 0
) -> list[Example]:
    """Lines to predict: one drawn from each file, then a second one, until there are `n`, or no more.

    A line qualifies if it is not blank and CONTEXT_LINES lines before it fit into `room`; there is no upper
    bound on its own length. The prompt ends where the last line before it that is not blank does.

    Args:
        store: Its documents are decoded, so that files are not read again.
        n: Most examples.
        room: Tokens that a prompt may have, bos included.
        seed: Of the draw; the same store, seed and `n` give the same examples.
    """
    draw = np.random.Generator(np.random.PCG64(seed))
    files = [_lines_of(store, tokenizer, int(i), room, draw) for i in draw.permutation(store.n_documents)]
    examples: list[Example] = []
    while files and len(examples) < n:
        drawn = [(file, next(file, None)) for file in files[: n - len(examples)]]
        left = files[n - len(examples) :]
        examples += [example for _, example in drawn if example]
        files = left + [file for file, example in drawn if example]
    return examples


def _lines_of(
    store: TokenStore, tokenizer: Tokenizer, number: int, room: int, draw: np.random.Generator
) -> Iterator[Example]:
    lines = tokenizer.decode(store.document(number).tolist()).split("\n")
    for i in draw.permutation(len(lines)):
        if lines[i].strip():
            before = "\n".join(lines[:i]).rstrip()
            prompt = _fitting(before, tokenizer, room)
            if prompt.count("\n") + 1 >= CONTEXT_LINES:
                yield Example(store.names[number], int(i) + 1, prompt, lines[i])


def _fitting(text: str, tokenizer: Tokenizer, room: int) -> str:
    """The last whole lines of `text` that make a prompt of at most `room` tokens; "" if none does."""
    start = max(
        0, len(text) - 8 * room
    )  # more characters never fit in practice, and encoding them takes time
    starts = [0] if start == 0 else []
    while (start := text.find("\n", start) + 1) > 0:
        starts.append(start)

    def fits(start: int) -> bool:
        return len(prompt_ids(tokenizer, text[start:])) <= room

    first = bisect_left(starts, True, key=fits)
    # Shorter text can have more tokens, by one or two, where the cut splits what was one token.
    while first < len(starts) and not fits(starts[first]):
        first += 1
    return text[starts[first] :] if first < len(starts) else ""


def function_examples(
    store: TokenStore, tokenizer: Tokenizer, n: int, room: int, seed: int = 0
) -> list[Example]:
    """Python functions to complete, one from a file: at most `n`, and none where no file is Python.

    The prompt holds the whole signature and ends with it, or with the docstring where there is one; the
    reference is the rest of the body, of as many lines as FUNCTION_LINES allows. Arguments as for
    `next_line_examples`.
    """
    draw = np.random.Generator(np.random.PCG64(seed))
    examples: list[Example] = []
    for number in draw.permutation(store.n_documents):
        if len(examples) == n:
            break
        text = tokenizer.decode(store.document(int(number)).tolist())
        lines, bodies = text.split("\n"), _bodies(text)
        for i in draw.permutation(len(bodies)):
            function, first, last = bodies[i]
            prompt = _fitting("\n".join(lines[:first]).rstrip(), tokenizer, room)
            shown = "\n".join(lines[function:first]).rstrip()
            if prompt.endswith(shown):
                name, reference = store.names[int(number)], "\n".join(lines[first:last])
                examples.append(Example(name, first + 1, prompt, reference, len(prompt) - len(shown)))
                break
    return examples


def _bodies(text: str) -> list[tuple[int, int, int]]:
    """(its `def`, the body after the docstring, the line after it) of each function FUNCTION_LINES admits.

    All are line numbers counted from 0.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the corpus are not the user's
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    if "\r" in text or "\f" in text:  # where Python's count of lines may differ
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            has_docstring = ast.get_docstring(node, clean=False) is not None
            body = node.body[1:] if has_docstring else node.body
            last = node.end_lineno or 0
            if body:
                before = node.body[0].end_lineno if has_docstring else _signature_end(node)
                first = min(_first_line(statement) for statement in body) - 1
                if (before or 0) <= first and last - first in FUNCTION_LINES:
                    found.append((node.lineno - 1, first, last))
    return found


def _signature_end(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    parts = [*ast.walk(node.args), *([node.returns] if node.returns else [])]
    return max([node.lineno, *(getattr(part, "end_lineno", None) or 0 for part in parts)])


def _first_line(statement: ast.stmt) -> int:
    """Decorators belong to the statement, but stand above its `lineno`."""
    decorators = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(decorator.lineno for decorator in decorators)])


# --- completions -------------------------------------------------------------------------------------

Cut = Callable[[Example, str], str]  # the part of a completion's text that belongs to the prediction


def through_first_line(example: Example, text: str) -> str:
    """Up to the end of the first line that is not blank."""
    end = text.find("\n", len(text) - len(text.lstrip()))
    return text if end < 0 else text[:end]


def through_body(example: Example, text: str) -> str:
    """Up to the line that is indented less than the reference begins."""
    lines = text.split("\n")
    indent = len(example.reference) - len(example.reference.lstrip())
    for i, line in enumerate(lines[1:], 1):
        if line.strip() and len(line) - len(line.lstrip()) < indent:
            return "\n".join(lines[:i])
    return text


def complete(
    model: Decoder,
    tokenizer: Tokenizer,
    examples: list[Example],
    cut: Cut,
    max_new_tokens: int,
    precision: Precision,
    batch_size: int = 16,
) -> list[str]:
    """Greedy completions, without the prompt, each until `cut` leaves something of it off, or eos."""
    settings = GenerationConfig(max_new_tokens=max_new_tokens)
    completions = []
    for start in range(0, len(examples), batch_size):
        rows = examples[start : start + batch_size]
        prompts = [prompt_ids(tokenizer, example.prompt) for example in rows]

        def text_of(row: int, ids: list[int], prompts: list[list[int]] = prompts) -> str:
            return added_text(tokenizer, prompts[row], ids)

        def stopped(row: int, ids: list[int], rows: list[Example] = rows, text_of: Any = text_of) -> bool:
            text = text_of(row, ids)
            return cut(rows[row], text) != text

        with precision.autocast():
            results = generate_ids(model, prompts, settings, tokenizer.eos_id, tokenizer.vocab_size, stopped)
        texts = [text_of(row, result.ids) for row, result in enumerate(results)]
        completions += [cut(example, text) for example, text in zip(rows, texts, strict=True)]
    return completions


def ngram_complete(
    baseline: NGramModel, tokenizer: Tokenizer, examples: list[Example], cut: Cut, max_new_tokens: int
) -> list[str]:
    """The same by the baseline."""
    prompts = [prompt_ids(tokenizer, example.prompt) for example in examples]
    completions = []
    continued = baseline.complete([np.array(prompt) for prompt in prompts], max_new_tokens).tolist()
    for example, prompt, ids in zip(examples, prompts, continued, strict=True):
        if tokenizer.eos_id in ids:
            ids = ids[: ids.index(tokenizer.eos_id)]
        completions.append(cut(example, added_text(tokenizer, prompt, ids)))
    return completions


@dataclass(frozen=True)
class LineScores:
    """Scores of predicted lines against the references, 0 to 100, white space at both ends left out.

    The intervals take the lines for independent; several lines of one file are a little less than that.
    """

    exact_match: Interval
    edit_similarity: Interval


def line_scores(examples: list[Example], predictions: list[str], seed: int = 0) -> LineScores:
    """Means over the examples, each with its 95% bootstrap interval. ValueError for fewer than two."""
    pairs = [(p.strip(), example.reference.strip()) for p, example in zip(predictions, examples, strict=True)]
    return LineScores(
        mean_interval([exact_match(*pair) for pair in pairs], seed),
        mean_interval([edit_similarity(*pair) for pair in pairs], seed),
    )


@dataclass(frozen=True)
class Sample:
    """A held-out function and what the model makes of it; `prompt` begins with the `def`."""

    name: str
    line: int
    prompt: str
    reference: str
    completion: str


def _divided(length: int, max_new_tokens: int) -> tuple[int, int]:
    """Tokens of a completion, half the length at most, and of its prompt; each at least 1."""
    max_new_tokens = max(1, min(max_new_tokens, length // 2))
    return max_new_tokens, max(1, length - max_new_tokens)


def sample_completions(
    model: Decoder,
    tokenizer: Tokenizer,
    store: TokenStore,
    length: int,
    precision: Precision,
    n: int = 3,
    seed: int = 0,
) -> list[Sample]:
    """Greedy completions of held-out Python functions, to look at.

    Args:
        length: Most tokens of a prompt and its completion.
        store, n, seed: As for `function_examples`.
    """
    max_new_tokens, room = _divided(length, 128)
    examples = function_examples(store, tokenizer, n, room, seed)
    completions = complete(model, tokenizer, examples, through_body, max_new_tokens, precision)
    return [
        Sample(e.name, e.line, e.prompt[e.start :], e.reference, completion)
        for e, completion in zip(examples, completions, strict=True)
    ]


# --- the command -------------------------------------------------------------------------------------


def evaluate(settings: EvalConfig) -> dict[str, Any]:
    """Everything that eval.json holds, but for the command and versions.

    Raises:
        ValueError: there is no such run or checkpoint, the data are not those that it was trained on, or the
            model's loss is not finite.
    """
    run = load_run(settings.checkpoint, settings.which, settings.base)
    device = choose_device(settings.device)
    precision = choose_precision(device, settings.precision)
    model = run.model.to(device)
    source = run.config.data.source if settings.source is None else settings.source
    # The run may be a stranger's: its config does not say where this machine writes, nor how busy it gets.
    config = dataclasses.replace(
        run.config.data, source=source, cache=settings.cache, workers=DataConfig.workers
    )
    data = prepare_data(config, run.tokenizer)
    if data.fingerprint != run.fingerprints["data"]:
        raise ValueError(
            f"the data of {source} have fingerprint {data.fingerprint[:12]}, and those of "
            f"{run.folder} had {run.fingerprints['data'][:12]}, so files held out now may have been trained "
            "on: restore the files (for stdlib, use the same Python), say with --source where they are now, "
            "or train a new run"
        )
    store = data.test
    batches = validation_batches(store, settings.batch_size, run.config.row_length)
    scores = score(model, batches, precision)
    if not math.isfinite(scores.perplexity):
        raise ValueError(
            f"the loss of {run.folder} at step {run.step} is {scores.loss}: evaluate with --precision fp32, "
            "or another checkpoint, or train again with a lower learning rate"
        )
    base_scores = None
    if run.config.lora.r:
        with adapters_disabled(model):
            base_batches = validation_batches(store, settings.batch_size, run.config.row_length)
            base_scores = score(model, base_batches, precision)
    baseline = train_ngram(data.train)
    baseline_scores = ngram_scores(baseline, store, run.config.row_length)
    n_bytes = store.n_bytes
    result: dict[str, Any] = {
        "run": str(run.folder),
        "step": run.step,
        "precision": precision.reason,
        "fingerprints": run.fingerprints,
        "allowed faults": overrides(run.folder),
        "side": store.split,
        "files": store.n_documents,
        "bytes": n_bytes,
        "model": _token_values(scores, n_bytes),
        **({"base": _token_values(base_scores, n_bytes)} if base_scores else {}),
        "n-gram": _token_values(baseline_scores, n_bytes),
        "n-gram order": baseline.order,
    }
    if settings.samples:
        add_line_scores(result, run, store, baseline, precision, settings)
    return result


def _token_values(scores: Scores, n_bytes: int) -> dict[str, Any]:
    return {
        "tokens": scores.tokens,
        "loss": scores.loss,
        "perplexity": scores.perplexity,
        "bits_per_byte": scores.bits_per_byte(n_bytes),
        "top1": scores.top1,
        "top5": scores.top5,
    }


def add_line_scores(
    result: dict[str, Any],
    run: Run,
    store: TokenStore,
    baseline: NGramModel,
    precision: Precision,
    settings: EvalConfig,
) -> None:
    """Put the next-line scores of each, and every prediction, into `result`, or why there are none."""
    if store.holds_examples:
        result["next_line_left_out"] = "next line not scored: the corpus holds prompts and completions"
        return
    tokenizer = run.tokenizer
    max_new_tokens, room = _divided(run.config.row_length, settings.max_new_tokens)
    examples = next_line_examples(store, tokenizer, settings.samples, room, settings.seed)
    if len(examples) < 2:
        result["next_line_left_out"] = (
            f"next line not scored: the {store.split} files have {len(examples)} lines with {CONTEXT_LINES} "
            f"lines before them that fit {room} tokens, and an interval needs at least 2"
        )
        return

    def completed() -> list[str]:
        return complete(
            run.model, tokenizer, examples, through_first_line, max_new_tokens, precision, settings.batch_size
        )

    predictions = {"model": completed()}
    if "base" in result:
        with adapters_disabled(run.model):
            predictions["base"] = completed()
    predictions["n-gram"] = ngram_complete(baseline, tokenizer, examples, through_first_line, max_new_tokens)
    for name, lines in predictions.items():
        result[name]["next_line"] = dataclasses.asdict(line_scores(examples, lines, settings.seed))
        for interval in result[name]["next_line"]:
            result[name]["next_line"][interval] = result[name]["next_line"][interval]._asdict()
    result["max_new_tokens"] = max_new_tokens
    result["lines"] = [
        {"file": e.name, "line": e.line, "reference": e.reference}
        | {name: lines[i] for name, lines in predictions.items()}
        for i, e in enumerate(examples)
    ]


def table(result: dict[str, Any]) -> str:
    """The scores as aligned columns: metric, model, base where there is one, n-gram, what it is over."""
    names = [name for name in ("model", "base", "n-gram") if name in result]
    columns = [result[name] for name in names]
    over_tokens = f"{result['model']['tokens']:,} tokens of {result['files']:,} {result['side']} files"
    rows = [["metric", *names[:-1], f"{result['n-gram order']}-gram", "over"]]
    for key, name, form, over in (
        ("loss", "loss, nats a token", "{:.4f}", over_tokens),
        ("perplexity", "perplexity", "{:.2f}", "the same"),
        ("bits_per_byte", "bits per byte", "{:.4f}", f"{result['bytes']:,} bytes of the same"),
        ("top1", "top-1 accuracy", "{:.2%}", over_tokens),
        ("top5", "top-5 accuracy", "{:.2%}", "the same"),
    ):
        rows.append([name, *(form.format(values[key]) for values in columns), over])
    if "lines" in result:
        files = len({line["file"] for line in result["lines"]})
        over_lines = f"{len(result['lines'])} lines of {files} files; 95% bootstrap intervals"
        for key, name in (("exact_match", "exact match"), ("edit_similarity", "edit similarity")):
            intervals = (values["next_line"][key] for values in columns)
            shown = ("{mean:.1f} [{low:.1f}, {high:.1f}]".format(**interval) for interval in intervals)
            rows.append([f"next line, {name}", *shown, over_lines])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *values, over in rows:
        cells = [f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=False)]
        lines.append("  ".join([f"{name:<{widths[0]}}", *cells, over]).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    lines += [result["next_line_left_out"]] if "next_line_left_out" in result else []
    if result["side"] != "test":
        told = "was trained on" if result["side"] == "train" else "was chosen by, so they are optimistic"
        lines.append(
            f"no test side: the scores are of the {result['side']} files, which this checkpoint {told}"
        )
    for name, evidence in result["allowed faults"].items():
        lines.append(f"TRAINED WITH --allow {name}: {evidence}")
    return "\n".join(lines)


def write_results(result: dict[str, Any], settings: EvalConfig) -> Path:
    """Write what `evaluate` returned, with what is needed to run it again, to RUN/eval.json: the path."""
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "settings": dataclasses.asdict(settings),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "rapidfuzz": rapidfuzz.__version__,
        },
        "evaluation_code": code_fingerprint(Path(__file__).parent),
    }
    path = Path(result["run"]) / "eval.json"
    write_atomically(path, json.dumps(record | result, indent=1, allow_nan=False))
    return path


def main(settings: EvalConfig) -> None:
    """Evaluate, print the table, and write eval.json into the run's folder."""
    result = evaluate(settings)
    print(f"{result['run']}, step {result['step']}, {result['precision']}")
    print(table(result))
    print(f"written to {write_results(result, settings)}")


if SETTINGS is not None:
    with one_sentence():
        main(SETTINGS)
