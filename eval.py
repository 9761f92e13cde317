"""Scores of a trained model on the test files of its run: `python eval.py --checkpoint runs/default`.

A run without a test side is scored on its validation files, by which its checkpoint was chosen, and says so.
Beside every score stand those of baselines: an n-gram model of the same training files
(`ngram.NGramModel`), for a run with adapters its base, and for texts those that take no model. Prints tables
and writes RUN/eval.json: the scores, every prediction, and what is needed to run it again.

Token scores are over every token after a document's first, by the function that training validates with.
Bits per byte divides their nats by the UTF-8 bytes of all test files, whatever the tokenizer; the nats of
the tokens that end the files are counted.

Texts are scored by a suite (`suites/`): lines of plain files from what stands before them, and the
completions of a corpus of examples. `--predictions FILE` scores those that were made elsewhere, and
`--rescore RUN/eval.json` says whether the numbers in that file are those of its predictions. Beside eval.json
stands a page to look at every sample (`suites/page.py`).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Literal

from config import DataConfig, make_parser, one_sentence, write_atomically


@dataclass(frozen=True)
class EvalConfig:
    """What is evaluated, and how.

    Args:
        checkpoint: Run folder, or one checkpoint inside it.
        rescore: An eval.json whose predictions are scored again, in the place of a checkpoint.
        report: An eval.json whose page is written again, likewise.
        compare: Two or more run folders or eval.json files, whose scores are set side by side, likewise. With
            `:NAME` behind one it is its predictions from prompts of that name.
        predictions: A JSONL file of predictions made elsewhere, one a line, that stand in for the model's.
        which: The checkpoint of a run folder: `best` by validation loss, or `last`.
        samples: Held-out lines, or examples, that are completed; 0 leaves the scores of texts out.
        max_new_tokens: Most tokens of a completion; 0 takes 64 for a line, and for an example as many as the
            longest completion in training has, but no more than 512.
        metrics: Names of scores of texts, between commas, in the place of the suite's own.
        language: Of the code, which only some metrics read.
        seed: Of the choice of lines and of the intervals.
        batch_size: Rows evaluated at a time.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: `auto` (what the hardware computes natively), `bf16`, `fp16` or `fp32`.
        source: Where the files are now, if they moved; the fingerprint still has to match.
        base: Where the base of a run with adapters is now, likewise.
        cache: Folder for token stores, keyed by content; the one that the run's config names is not touched.
    """

    checkpoint: str | None = None
    rescore: str | None = None
    report: str | None = None
    compare: tuple[str, ...] = ()
    predictions: str | None = None
    which: Literal["best", "last"] = "best"
    samples: int = 200
    max_new_tokens: int = 0
    metrics: str = ""
    language: Literal["python", "kotlin", "java"] = "python"
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
    values = parser.parse_args(several(sys.argv[1:], "--compare"))
    settings = EvalConfig(**{field.name: values[field.name] for field in dataclasses.fields(EvalConfig)})
    for name, least in (("samples", 0), ("max_new_tokens", 0), ("batch_size", 1), ("seed", 0)):
        if getattr(settings, name) < least:
            parser.error(f"--{name} is {getattr(settings, name)}, and must be at least {least}")
    if settings.samples == 1:
        parser.error("--samples is 1, and an interval needs at least 2; 0 leaves the scores of texts out")
    if sum(map(bool, (settings.checkpoint, settings.rescore, settings.report, settings.compare))) != 1:
        parser.error(
            "give one of --checkpoint RUN, --rescore RUN/eval.json, --report RUN/eval.json and --compare A B"
        )
    if settings.predictions is not None and not settings.samples:
        parser.error("--predictions are of samples, and --samples is 0; leave one of them out")
    return settings


def several(words: list[str], flag: str) -> list[str]:
    """The words with those that follow a flag made one list, as the parser reads it."""
    if flag not in words:
        return words
    start = words.index(flag) + 1
    end = next((i for i in range(start, len(words)) if words[i].startswith("--")), len(words))
    return [*words[: start - 1], f"{flag}={json.dumps(words[start:end])}", *words[end:]]


# Before torch is imported, so that --help and a typo answer at once.
SETTINGS = parse_settings() if __name__ == "__main__" else None
if SETTINGS is not None and SETTINGS.rescore is not None:
    with one_sentence():
        from suites.rescoring import rescore

        sys.exit(rescore(SETTINGS.rescore))
if SETTINGS is not None and SETTINGS.compare:
    with one_sentence():
        from suites.comparing import compare_files

        print(compare_files(SETTINGS.compare))
        sys.exit()

import math
import platform
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rapidfuzz
import torch

from checkpoint import code_fingerprint
from dataset import PreparedData, as_shown, prepare_data, shown, validation_batches
from lora import adapters_disabled
from loss import Scores, score
from ngram import NGramModel
from precision import Precision, choose_device, choose_precision
from preflight import overrides
from runmodel import Run, load_run
from suites.baselines import copied, last_lines, nearest
from suites.completing import complete, ngram_complete, uncut
from suites.lines import CONTEXT_LINES, divided, next_line_examples, through_first_line
from suites.page import write_page
from suites.pairs import longest_completion, pair_examples
from suites.records import read_evaluation
from suites.scoring import (
    SUITES,
    Example,
    Predictions,
    aligned,
    metric_names,
    read_predictions,
    scored,
    suite_table,
)
from tokenstore import TokenStore

# Its training takes about 170 bytes a token at its peak; of more tokens, it gets evenly spread documents.
BASELINE_TOKENS = 10_000_000
SCORED_TOKENS = 2**20  # that the n-gram model scores at a time
LINE_TOKENS = 64  # most of a predicted line
COMPLETION_TOKENS = 512  # most of a predicted completion, where --max_new_tokens does not say


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


# --- the command -------------------------------------------------------------------------------------


def evaluate(settings: EvalConfig) -> dict[str, Any]:
    """Everything that eval.json holds, but for the command and versions.

    Raises:
        ValueError: there is no such run or checkpoint, the data are not those that it was trained on, or the
            model's loss is not finite, or the predictions are not those of its examples.
    """
    metric_names(settings.metrics)  # an unknown one is named before anything takes time
    if settings.checkpoint is None:
        raise ValueError("there is no checkpoint to evaluate; give the folder of a run")
    run = load_run(settings.checkpoint, settings.which, settings.base)
    device = choose_device(settings.device)
    precision = choose_precision(device, settings.precision)
    run.model.to(device)
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
    store, baseline = data.test, train_ngram(data.train)
    result: dict[str, Any] = {
        "run": str(run.folder),
        "step": run.step,
        "precision": precision.reason,
        "fingerprints": run.fingerprints,
        "allowed faults": overrides(run.folder),
        "side": store.split,
        "files": store.n_documents,
        "bytes": store.n_bytes,
        "n-gram order": baseline.order,
    }
    if settings.predictions is None:
        add_token_scores(result, run, store, baseline, precision, settings)
    if settings.samples:
        add_suite(result, run, data, baseline, precision, settings)
    return result


def add_token_scores(
    result: dict[str, Any],
    run: Run,
    store: TokenStore,
    baseline: NGramModel,
    precision: Precision,
    settings: EvalConfig,
) -> None:
    """Put the token scores of the model, its base and the n-gram model into `result`."""

    def of_model() -> Scores:
        batches = validation_batches(store, settings.batch_size, run.config.row_length)
        return score(run.model, batches, precision)

    scores = {"model": of_model()}
    if not math.isfinite(scores["model"].perplexity):
        raise ValueError(
            f"the loss of {run.folder} at step {run.step} is {scores['model'].loss}: evaluate with "
            "--precision fp32, or another checkpoint, or train again with a lower learning rate"
        )
    if run.config.lora.r:
        with adapters_disabled(run.model):
            scores["base"] = of_model()
    scores["n-gram"] = ngram_scores(baseline, store, run.config.row_length)
    result |= {name: _token_values(values, store.n_bytes) for name, values in scores.items()}


def _token_values(scores: Scores, n_bytes: int) -> dict[str, Any]:
    return {
        "tokens": scores.tokens,
        "loss": scores.loss,
        "perplexity": scores.perplexity,
        "bits_per_byte": scores.bits_per_byte(n_bytes),
        "top1": scores.top1,
        "top5": scores.top5,
    }


def add_suite(
    result: dict[str, Any],
    run: Run,
    data: PreparedData,
    baseline: NGramModel,
    precision: Precision,
    settings: EvalConfig,
) -> None:
    """Put the scores of texts, and every prediction, into `result["suite"]`, or why there are none."""
    store, tokenizer, length = data.test, run.tokenizer, run.config.row_length
    if store.holds_examples:
        name, cut = "pairs", uncut
        max_new_tokens = settings.max_new_tokens or min(longest_completion(data.train), COMPLETION_TOKENS)
        examples = pair_examples(store, tokenizer, settings.samples, settings.seed)
        wanted = "examples"
    else:
        name, cut = "next_line", through_first_line
        max_new_tokens, room = divided(length, settings.max_new_tokens or LINE_TOKENS)
        examples = next_line_examples(store, tokenizer, settings.samples, room, settings.seed)
        wanted = f"lines with {CONTEXT_LINES} lines before them that fit {room} tokens"
    suite = SUITES[name]
    if len(examples) < 2:
        result["suite_left_out"] = (
            f"{suite.title} not scored: the {store.split} files have {len(examples)} {wanted}, and an "
            "interval needs at least 2"
        )
        return

    def completed() -> Predictions:
        return complete(
            run.model, tokenizer, examples, cut, max_new_tokens, length, precision, settings.batch_size
        )

    predictions: dict[str, Predictions] = {}
    if settings.predictions is not None:
        predictions["given"] = Predictions(read_predictions(settings.predictions, examples))
    else:
        predictions["model"] = completed()
        if run.config.lora.r:
            with adapters_disabled(run.model):
                predictions["base"] = completed()
    predictions["n-gram"] = ngram_complete(baseline, tokenizer, examples, cut, max_new_tokens, length)
    texts = _without_model(examples, data, run) if store.holds_examples else {"copy": last_lines(examples)}
    predictions |= {system: Predictions(made) for system, made in texts.items()}
    result["suite"] = {
        "max_new_tokens": max_new_tokens,
        **scored(
            suite,
            examples,
            predictions,
            metric_names(settings.metrics),
            settings.language,
            settings.seed,
        ),
    }


def _without_model(examples: list[Example], data: PreparedData, run: Run) -> dict[str, list[str]]:
    """What takes no model. Where every example has a gap there is nothing to copy."""
    texts = {
        "nearest": nearest(examples, data.test, data.train, run.tokenizer),
        "empty": [""] * len(examples),
    }
    if all(example.suffix is not None for example in examples):
        return texts
    return {"copy": copied(examples)} | texts


def table(result: dict[str, Any]) -> str:
    """The token scores, then those of texts, beside their baselines, and what a reader must know of them."""
    lines = token_table(result) if "model" in result else []
    if "suite" in result:
        lines += [""] * bool(lines) + [suite_table(result["suite"])]
    lines += [result["suite_left_out"]] if "suite_left_out" in result else []
    if result["side"] != "test":
        told = "was trained on" if result["side"] == "train" else "was chosen by, so they are optimistic"
        lines.append(
            f"no test side: the scores are of the {result['side']} files, which this checkpoint {told}"
        )
    for name, evidence in result["allowed faults"].items():
        lines.append(f"TRAINED WITH --allow {name}: {evidence}")
    return "\n".join(lines)


def token_table(result: dict[str, Any]) -> list[str]:
    """Lines: the metric, the model, its base where there is one, the n-gram model, and over what."""
    names = [name for name in ("model", "base", "n-gram") if name in result]
    over_tokens = f"{result['model']['tokens']:,} tokens of {result['files']:,} {result['side']} files"
    rows = [["metric", *names[:-1], f"{result['n-gram order']}-gram"]]
    overs = ["over"]
    for key, name, form, over in (
        ("loss", "loss, nats a token", "{:.4f}", over_tokens),
        ("perplexity", "perplexity", "{:.2f}", "the same"),
        ("bits_per_byte", "bits per byte", "{:.4f}", f"{result['bytes']:,} bytes of the same"),
        ("top1", "top-1 accuracy", "{:.2%}", over_tokens),
        ("top5", "top-5 accuracy", "{:.2%}", "the same"),
    ):
        rows.append([name, *(form.format(result[system][key]) for system in names)])
        overs.append(over)
    head, rule, *body = aligned(rows)
    lines = [f"{line}  {over}" for line, over in zip([head, *body], overs, strict=True)]
    return [lines[0], rule[0] * max(map(len, lines)), *lines[1:]]


def write_results(result: dict[str, Any], settings: EvalConfig) -> Path:
    """Write what `evaluate` returned, with what is needed to run it again, to RUN/eval.json: the path.

    Of predictions made elsewhere it is FILE.eval.json: the run's own scores stay. The page is beside it.
    """
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
    if settings.predictions is not None:
        path = Path(f"{settings.predictions}.eval.json")
    write_atomically(path, json.dumps(record | result, indent=1, allow_nan=False))
    write_page(path, record | result, table(result))
    return path


def rewrite_page(path: Path) -> Path:
    """The page of an eval.json, which may be an old one or a stranger's: where it was written.

    Raises:
        ValueError: it cannot be read, or is no whole evaluation.
    """
    result = read_evaluation(path)
    try:
        return write_page(path, result, table(result))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no whole evaluation ({type(error).__name__}: {error})") from None


def main(settings: EvalConfig) -> None:
    """Evaluate, print the table, and write eval.json and its page into the run's folder."""
    if settings.report is not None:
        print(f"written to {rewrite_page(Path(settings.report))}")
        return
    result = evaluate(settings)
    print(f"{result['run']}, step {result['step']}, {result['precision']}")
    print(table(result))
    path = write_results(result, settings)
    print(f"written to {path}, and {path.with_suffix('.html')} to look at it")


if SETTINGS is not None:
    with one_sentence():
        main(SETTINGS)
