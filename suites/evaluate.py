"""Scores of a trained model, on the test files of its run.

A run without a test split is scored on its validation files, by which its checkpoint was chosen, and says
so. Beside every score stand those of baselines: an n-gram model of the same training files
(`data.ngram.NGramModel`), the base of a model with adapters, and for texts baselines that need no model.
Tables are printed, and RUN/eval.json stores the scores, every prediction, and what is needed to run it again.

Token scores are over every token after a document's first, by the function that training validates with.
Bits per byte divides their summed loss by the UTF-8 bytes of all test files, whatever the tokenizer; the loss
of the tokens that end the files is counted.

Texts are scored by suites (`suites/`), which `--suite` names: of the run's held-out files, or of a published
file, for which `--model FOLDER` evaluates a published model as well. `--predictions FILE` scores predictions
that were made elsewhere, and `--rescore RUN/eval.json` says whether the numbers in that file are those of its
predictions. Beside eval.json stands a page that shows every sample (`suites/page.py`), and `--compare`
compares evaluations.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import sandbox
from config import refuse_unwritable
from config.bars import is_watched, progress_bar
from config.files import code_fingerprint
from data.corpus import split_documents
from data.ngram import NGramModel
from dataset import PreparedData
from generation.settings import GenerationConfig
from guards.preflight import overrides
from guards.reference.evaluation import refuse_other_scores
from guards.reference.opened import Opened, consult
from lora import adapters_disabled
from metrics.registry import Metric
from modules.positions import longest_generated
from modules.precision import Precision, choose_device, choose_precision
from pretrained import load_pretrained
from sandbox.problems import read_problems
from suites import programs
from suites.completing import CompletionSettings, complete, ngram_complete
from suites.documents import add_intervals
from suites.evaluated import (
    EvaluatedModel,
    data_config,
    data_of,
    made_fast,
    open_published,
    published_name,
    weights_held,
)
from suites.hidden import Judge
from suites.kept import Kept
from suites.memorising import memorisation
from suites.overlaps import training_overlap
from suites.pairs import file_examples
from suites.prompts import variant_names, with_prompts
from suites.results import results_path, rewrite_page, set_aside, table, write_results
from suites.scoring import (
    SUITES,
    TOKENS,
    Predictions,
    metric_names,
    prediction_rows,
    read_predictions,
    scored,
    suites_of,
)
from suites.settings import EvalConfig, mistake
from suites.task import Given, Task, answers
from suites.tasks import OF_FILES, TASKS, suite_names
from suites.tokens import (
    KEPT,
    model_scores,
    ngram_scores,
    token_values,
    tokens_of,
    train_ngram,
)
from training.distributed import ALONE, World, of_rank
from training.run import TrainedRun, hold_run, load_run, run_folder
from training.shared_data import receive, send

TOKEN_ROWS = 16  # Rows at a time, for token scores.


@dataclass(frozen=True)
class Evaluation:
    """The settings, model and data that the suites of one evaluation share.

    Args:
        settings: What is evaluated, and how.
        evaluated: The model; None where predictions were made elsewhere.
        data: The run's data; None for a published model.
        baseline: The n-gram model of the run's training files; None without these.
        models: The metrics that a model computes, by name.
        world: The processes that share the work of the model; the first alone scores what all have made.
    """

    settings: EvalConfig
    evaluated: EvaluatedModel | None
    data: PreparedData | None
    baseline: NGramModel | None
    models: dict[str, Metric]
    world: World = ALONE

    @property
    def systems(self) -> tuple[str, ...]:
        """The names that the model's predictions have in a record: its own and, with adapters, its base's."""
        if self.evaluated is None:
            return ()
        return ("model", "base") if self.evaluated.adapted else ("model",)


# --- what is evaluated -------------------------------------------------------------------------------


def evaluate(settings: EvalConfig, data: PreparedData | None = None, world: World = ALONE) -> dict[str, Any]:
    """Evaluate, and return everything that eval.json stores but for the command and versions.

    Args:
        data: The run's data, where they are open; else they are read again.
        world: The processes that share the work of the model. Each calls this function; what it returns is
            whole in the first one alone.

    Raises:
        ValueError: There is no such run, checkpoint, model or suite, the data are not those that it was
            trained on, the model's loss is not finite, a suite's file or the predictions are not as they
            should be, or nothing isolates programs.
    """
    # Mistakes in the settings are told before anything takes time.
    problem = mistake(settings)
    if problem is not None:
        raise ValueError(problem)
    metric_names(settings.metrics)
    variant_names(settings.prompts)
    sampling(settings, ())
    names = suite_names(settings.suite)
    of_files = [name for name in names if name in OF_FILES]
    if len(of_files) > 1:
        raise ValueError(f"{' and '.join(of_files)} have a file each; ask for one of them at a time")
    if settings.suite_file is not None and not of_files:
        raise ValueError("--suite_file is of a suite with a file of its own; name that with --suite")
    if settings.samples == 0 and names and TOKENS not in names:
        raise ValueError(
            f"--samples is 0, which leaves the scores of texts out, and {', '.join(names)} has no others; "
            f"leave --samples out, or ask for {TOKENS} with --suite"
        )
    if of_files and not is_pipe(settings.suite_file):
        task_of(of_files[0], None, None, settings)  # This raises where the suite's file cannot be used.
    refuse_unwritable(settings.cache, "--cache", unless="*")
    if settings.predictions is not None and not is_pipe(settings.predictions):
        prediction_rows(settings.predictions)
    if any(SUITES[name].runs for name in of_files):
        refuse_unusable_problems(of_files[0], settings)
        sandbox.isolation(settings.allow == "unsandboxed")
    device = choose_device(settings.device)
    precision = of_rank(choose_precision(device, settings.precision), world)
    if world.size > 1 and (is_pipe(settings.suite_file) or is_pipe(settings.predictions)):
        raise ValueError("a pipe can be read by one process alone; give a file")
    if settings.held != "full":
        precision = dataclasses.replace(precision, reason=f"{precision.reason}; matrices in {settings.held}")
    if settings.checkpoint is not None:
        return evaluate_run(settings, names, precision, data, world)
    return evaluate_published(settings, names, precision, world)


def allowed_faults(settings: EvalConfig) -> tuple[str, ...]:
    """Return the names of the faults that may pass."""
    return () if settings.allow != "differs-from-reference" else (settings.allow,)


def is_pipe(path: str | None) -> bool:
    """Return whether a file can be read only once, and so not beforehand."""
    return path is not None and Path(path).is_fifo()


def evaluate_run(
    settings: EvalConfig,
    names: tuple[str, ...],
    precision: Precision,
    data: PreparedData | None = None,
    world: World = ALONE,
) -> dict[str, Any]:
    """Evaluate a run's checkpoint by its held-out files, or by a suite with a file of its own."""
    assert settings.checkpoint is not None
    run = load_run(settings.checkpoint, settings.which, settings.base)
    hold_run(run, settings.held)
    model = made_fast(run.model.to(precision.device), settings.held, precision)
    weights = weights_held(run.weights, settings.held)
    evaluated = EvaluatedModel(
        model,
        run.tokenizer,
        run.config.row_length,
        run.config.lora.r > 0,
        weights,
        precision,
    )
    models = judges(evaluated, settings) if world.is_first else {}
    at_the_end = data is not None  # Of the run, whose start has compared the model.
    if data is None:
        data = shared_data_of(run, settings, world)
    if not names:
        names = (TOKENS, "pairs" if data.test.holds_examples else "next_line")
    if settings.predictions is not None:
        names = tuple(name for name in names if name != TOKENS)
    if settings.samples == 0:
        names = tuple(name for name in names if name == TOKENS)
    store, baseline = data.test, train_ngram(data.train) if world.is_first else None
    result: dict[str, Any] = {
        "run": str(run.folder),
        "step": run.step,
        "precision": precision.reason,
        "fingerprints": run.fingerprints | {"weights": weights},
        "allowed faults": overrides(run.folder),
        "side": store.split,
        "files": store.n_documents,
        "bytes": store.n_bytes,
        "n-gram order": baseline.order if baseline is not None else None,
    }
    tasks = tasks_of(names, evaluated, data, settings)  # A suite that cannot be evaluated is refused here.
    worded = worded_tasks(tasks, run, evaluated, data, settings)
    if not at_the_end and settings.predictions is None and world.is_first:
        opened = Opened(Path(settings.checkpoint), run.model, run.tokenizer, settings.which)
        consult(opened, (), allowed_faults(settings), settings.cache)
    evaluation = Evaluation(settings, evaluated, data, baseline, models, world)
    if TOKENS in names:
        add_token_scores(result, evaluation)
    add_suites(result, evaluation, tasks)
    add_worded(result, evaluation, worded)
    if not world.is_first:
        return result
    for record in suites_of(result):
        record["training_overlap"] = training_overlap(record, data.train, run.tokenizer)
        if settings.memorisation:
            source = data_config(run, settings).source
            record["memorisation"] = memorisation(record, data.train, run.tokenizer, source)
    refuse_other_scores(result, evaluated, data, bool(allowed_faults(settings)))
    return result


def shared_data_of(run: TrainedRun, settings: EvalConfig, world: World) -> PreparedData:
    """Return the data of a run, which of several processes the first reads, and the others open its store.

    Raises:
        ValueError: They are not those that the run was trained on.
    """
    if not world.is_first:
        return receive(world)[2]
    try:
        data = data_of(run, settings)
    except ValueError as error:  # Its sentence names training's flag.
        raise ValueError(str(error).replace("--data.source", "--source")) from None
    send(world, dataclasses.replace(run.config, data=data_config(run, settings)), run.tokenizer, data)
    return data


def evaluate_published(
    settings: EvalConfig, names: tuple[str, ...], precision: Precision, world: World
) -> dict[str, Any]:
    """Evaluate a published model, or predictions made elsewhere, by suites with a file of their own."""
    elsewhere = settings.model is None
    name = settings.predictions if elsewhere else settings.model
    wrong = [one for one in names if one not in OF_FILES]
    if wrong or not names:
        raise ValueError(
            f"{name} has no held-out files{f' for {wrong[0]}' if wrong else ''}; name a suite with a file of "
            f"its own by --suite: {', '.join(sorted(OF_FILES))}"
        )
    result: dict[str, Any] = {"run": None, "step": None, "precision": precision.reason, "allowed faults": {}}
    evaluated = None
    if settings.model is not None:
        evaluated = open_published(settings, precision)
        folder = Path(settings.out or Path("evals") / published_name(settings))
        result |= {
            "run": str(folder),
            "published": {"model": settings.model, "adapter": settings.adapter},
            "fingerprints": {"weights": evaluated.weights, "tokenizer": evaluated.tokenizer.fingerprint},
        }
    tasks = tasks_of(names, evaluated, None, settings)
    worded = worded_tasks(tasks, None, evaluated, None, settings)
    if evaluated is not None and settings.model is not None and world.is_first:
        place, adapter = Path(settings.model), settings.adapter or ""
        opened = Opened(place, evaluated.model, evaluated.tokenizer, adapter=adapter)
        consult(opened, (), allowed_faults(settings), settings.cache)
    models = judges(evaluated, settings) if world.is_first else {}
    evaluation = Evaluation(settings, evaluated, None, None, models, world)
    add_suites(result, evaluation, tasks)
    add_worded(result, evaluation, worded)
    return result


# --- scores ------------------------------------------------------------------------------------------


def add_token_scores(result: dict[str, Any], evaluation: Evaluation) -> None:
    """Put the token scores of the model, its base and the n-gram model into `result`, with intervals."""
    evaluated, data, world = evaluation.evaluated, evaluation.data, evaluation.world
    assert evaluated is not None and data is not None
    store, rows = data.test, evaluation.settings.batch_size or TOKEN_ROWS

    def of_model() -> Any:
        return model_scores(evaluated.model, store, rows, evaluated.length, evaluated.precision, world)

    found = {"model": of_model()}
    scores = found["model"][0]
    if not math.isfinite(scores.perplexity):
        raise ValueError(
            f"the loss of {result['run']} at step {result['step']} is {scores.loss}: evaluate with "
            "--precision fp32, or another checkpoint, or train again with a lower learning rate"
        )
    if evaluated.adapted:
        with adapters_disabled(evaluated.model):
            found["base"] = of_model()
    if evaluation.baseline is None:  # Of several processes not the first.
        return
    found["n-gram"] = ngram_scores(evaluation.baseline, store, evaluated.length)
    result |= {name: token_values(scores, store.n_bytes) for name, (scores, _) in found.items()}
    documents = {
        "names": store.names,
        "tokens": tokens_of(store, evaluated.length).tolist(),
        "bytes": store.byte_lengths.tolist(),
        **{key: {name: sums[key].tolist() for name, (_, sums) in found.items()} for key in KEPT},
    }
    add_intervals(result, documents, evaluation.settings.seed)


def refuse_unusable_problems(suite: str, settings: EvalConfig) -> None:
    """Raise ValueError where the problems of a suite of programs cannot be read, or there is no run."""
    if settings.checkpoint is not None:
        run_folder(settings.checkpoint)
    if settings.suite_file is None:
        raise ValueError(f"the suite {suite} takes its examples from a file; name it with --suite_file")
    if not Path(settings.suite_file).is_fifo():  # A pipe is read only once.
        read_problems(settings.suite_file)


def tasks_of(
    names: tuple[str, ...], evaluated: EvaluatedModel | None, data: PreparedData | None, settings: EvalConfig
) -> dict[str, Task]:
    """Return the tasks of the suites by name; ValueError where a suite cannot be evaluated here."""
    names = tuple(name for name in names if name != TOKENS)
    if settings.predictions is not None and len(names) > 1:
        raise ValueError(f"--predictions are of one suite, and --suite names {len(names)}; name one")
    return {name: task_of(name, evaluated, data, settings) for name in names}


def add_suites(result: dict[str, Any], evaluation: Evaluation, tasks: dict[str, Task]) -> None:
    """Put the records of the suites into the result.

    The first suite's scores and predictions are `result["suite"]`, those of the others are
    `result["more_suites"]`, and why a suite has none is told in `result["suite_left_out"]`.
    """
    records, left_out, data = [], [], evaluation.data
    for name, task in tasks.items():
        if len(task.examples) < 2:
            where = "its file has"
            if data is not None and name not in OF_FILES:
                where = f"the {data.test.split} files have"
            left_out.append(
                f"{task.suite.title} not scored: {where} {len(task.examples)} {task.wanted}, and an "
                "interval needs at least 2"
            )
            continue
        records.append(suite_record(result, evaluation, task))
    if records:
        result["suite"] = records[0]
    if records[1:]:
        result["more_suites"] = records[1:]
    if left_out:
        result["suite_left_out"] = "\n".join(left_out)


def worded_tasks(
    tasks: dict[str, Task],
    run: TrainedRun | None,
    evaluated: EvaluatedModel | None,
    data: PreparedData | None,
    settings: EvalConfig,
) -> dict[str, Task]:
    """Return tasks with a file's examples, or a run's pairs, in other words, by the wording's name."""
    names = variant_names(settings.prompts)
    if not names:
        return {}
    if "examples" in tasks:
        assert settings.suite_file is not None
        task, documents = tasks["examples"], iter(file_examples(settings.suite_file))
    elif run is None or data is None or not data.test.holds_examples:
        raise ValueError(
            "--prompts are other wordings of examples, and here "
            + ("is no run whose examples they were" if run is None else "the run's files are plain text")
            + "; leave it out, or give --suite examples and a file of examples"
        )
    else:
        task = tasks["pairs"] if "pairs" in tasks else task_of("pairs", evaluated, data, settings)
        every = split_documents(data_config(run, settings))
        documents = (document for split, document in every if split == data.test.split)
    worded = with_prompts(task.examples, documents, names)
    return {name: dataclasses.replace(task, examples=examples) for name, examples in worded.items()}


def add_worded(result: dict[str, Any], evaluation: Evaluation, worded: dict[str, Task]) -> None:
    """Put the record of each wording into `result["prompts"]`."""
    if worded:
        result["prompts"] = {name: suite_record(result, evaluation, task) for name, task in worded.items()}


def task_of(
    name: str, evaluated: EvaluatedModel | None, data: PreparedData | None, settings: EvalConfig
) -> Task:
    """Return the task of a suite.

    A row has the length of training's rows; for a suite with its own file, whose prompts may be longer, it
    has the model's whole context.
    """
    length = 2**20
    if evaluated is not None:
        config = evaluated.model.config
        length = longest_generated(config, config.block_size if name in OF_FILES else evaluated.length)
    given = Given(
        None if evaluated is None else evaluated.tokenizer,
        length,
        settings.samples,
        settings.seed,
        settings.max_new_tokens,
        data,
        settings.suite_file,
    )
    task = TASKS[name](given)
    return task if settings.stop is None else dataclasses.replace(task, stop=settings.stop)


def sampling(settings: EvalConfig, stop: Sequence[str]) -> GenerationConfig:
    """Return how tokens are chosen; ValueError for settings that are out of range or would do nothing."""
    return GenerationConfig(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        stop=settings.stop if settings.stop is not None else tuple(stop),
        seed=settings.seed,
    )


def suite_record(result: dict[str, Any], evaluation: Evaluation, task: Task) -> dict[str, Any]:
    """Return the record of one suite: every system's predictions, and their scores.

    Of several processes the first alone does more than its share of the model's predictions.
    The files that keep the predictions until eval.json is written are added to `result["kept"]`.
    """
    settings, evaluated, examples = evaluation.settings, evaluation.evaluated, task.examples
    how = sampling(settings, task.stop)
    predictions: dict[str, Predictions] = {}
    if settings.predictions is not None:
        predictions["given"] = Predictions(read_predictions(settings.predictions, examples))
    else:
        for system in evaluation.systems:
            predictions[system], kept = model_predictions(evaluation, task, system, how)
            result.setdefault("kept", []).append(str(kept.path))
    if not evaluation.world.is_first:
        return {}
    if evaluation.baseline is not None:
        predictions["n-gram"] = ngram_predictions(evaluation, task)
    predictions |= answers(task.baselines(examples))
    about: dict[str, Any] = {
        "max_new_tokens": task.max_new_tokens,
        "stop": list(task.stop),
        "healed": evaluated is not None and evaluated.tokenizer.heals,
        "sampling": None
        if settings.temperature == 0
        else {key: getattr(how, key) for key in ("temperature", "top_k", "top_p", "seed")},
    }
    if task.problems is not None:
        return about | run_programs(task, predictions, settings)
    if evaluation.data is None:
        about["without"] = "no n-gram model and no nearest training example: no training text is at hand"
    names = metric_names(settings.metrics)
    found = scored(
        task.suite, examples, predictions, names, settings.language, settings.seed, evaluation.models
    )
    return about | found | {"draws": settings.samples_per_example}


def model_predictions(
    evaluation: Evaluation, task: Task, system: str, how: GenerationConfig
) -> tuple[Predictions, Kept]:
    """Return the predictions of the model, or of its base, and the file that keeps them."""
    settings, evaluated, name = evaluation.settings, evaluation.evaluated, task.suite.name
    assert evaluated is not None
    config = evaluated.model.config
    completion = CompletionSettings(
        task.max_new_tokens,
        longest_generated(config, config.block_size if name in OF_FILES else evaluated.length),
        evaluated.precision,
        settings.batch_size,
        how,
        settings.samples_per_example,
        evaluation.world,
    )
    made_by = made_by_of(evaluated, task, system, completion)
    kept = Kept(Path(settings.cache) / "predictions", f"{name}-{system}", made_by)
    total = len(task.examples) * settings.samples_per_example
    with (
        nullcontext() if system == "model" else adapters_disabled(evaluated.model),
        progress(f"{name}, {system}", total, kept) as bar,
    ):
        made = complete(
            evaluated.model, evaluated.tokenizer, task.examples, task.cut, completion, kept, bar.update
        )
    return made, kept


def made_by_of(
    evaluated: EvaluatedModel, task: Task, system: str, completion: CompletionSettings
) -> dict[str, Any]:
    """Return all that decides a system's predictions, by which they are kept; plain data."""
    return {
        "system": system,
        "suite": task.suite.name,
        "weights": evaluated.weights,
        "tokenizer": evaluated.tokenizer.fingerprint,
        "examples": [[e.id, e.prompt, e.suffix, e.reference] for e in task.examples],
        "how": dataclasses.asdict(completion.generation),
        "draws": completion.draws,
        "max_new_tokens": task.max_new_tokens,
        "length": completion.length,
        "precision": str(completion.precision.dtype),
        "device": completion.precision.device.type,
        "torch": torch.__version__,
        "code": code_fingerprint(),
    }


def ngram_predictions(evaluation: Evaluation, task: Task) -> Predictions:
    """Complete a suite's examples by the n-gram model, which reads on from what stands before a gap.

    In training on examples it has seen gaps whole, and is shown them so.
    """
    baseline, evaluated, data = evaluation.baseline, evaluation.evaluated, evaluation.data
    assert baseline is not None and evaluated is not None and data is not None
    examples = task.examples
    if not data.test.holds_examples:
        examples = [dataclasses.replace(example, suffix=None) for example in examples]
    return ngram_complete(
        baseline, evaluated.tokenizer, examples, task.cut, task.max_new_tokens, evaluated.length, task.stop
    )


@contextmanager
def progress(what: str, total: int, kept: Kept) -> Iterator[tqdm]:
    """Show a progress bar of texts; where nobody would see it, print a line."""
    if not is_watched():
        print(f"{what}: {total:,} texts", file=sys.stderr)
    with progress_bar(total=total, desc=what, unit=" texts", leave=False) as bar:
        yield bar
    if kept.reused:
        print(
            f"{what}: {kept.reused:,} of {total:,} texts are those of an interrupted evaluation, {kept.path}",
            file=sys.stderr,
        )


def judges(evaluated: EvaluatedModel | None, settings: EvalConfig) -> dict[str, Metric]:
    """Return the metric `semantic`, if requested, by a model named for it or the evaluated one's base."""
    if "semantic" not in metric_names(settings.metrics):
        return {}
    if settings.embedding_model is not None:
        found = load_pretrained(settings.embedding_model)
        if found.tokenizer is None:
            raise ValueError(f"{settings.embedding_model} has no tokenizer; name a model's whole folder")
        name = f"{Path(settings.embedding_model).name}, weights {found.fingerprint[:12]}"
        judge = Judge(found.model, found.tokenizer, name, settings.embedding_layer)
    elif evaluated is None:
        raise ValueError("semantic needs a model, and only predictions are here; name one: --embedding_model")
    else:
        name = f"{'its base' if evaluated.adapted else 'the model itself'}, weights {evaluated.weights[:12]}"
        base = partial(adapters_disabled, evaluated.model) if evaluated.adapted else nullcontext
        judge = Judge(evaluated.model, evaluated.tokenizer, name, settings.embedding_layer, base)
    return {"semantic": judge.metric()}


def run_programs(task: Task, predictions: dict[str, Predictions], settings: EvalConfig) -> dict[str, Any]:
    """Judge the predicted programs one by one in the sandbox, under a bar, and return their record."""
    total = sum(len(texts) for made in predictions.values() for texts in made.draws)
    with progress_bar(total=total, desc="judged", unit=" programs", leave=False) as bar:
        return programs.judged(
            task, predictions, settings.language, settings.seed, settings.allow == "unsandboxed", bar.update
        )


def write_evaluation(settings: EvalConfig, world: World = ALONE) -> Path:
    """Evaluate, print the table, and write eval.json and its page into the run's folder; return its path.

    Args:
        world: The processes that share the work of the model. Each calls this function; the first writes.
    """
    if settings.report is not None:
        page = rewrite_page(Path(settings.report))
        print(f"written to {page}")
        return page
    if settings.out is not None:  # A folder that cannot be made is told before anything takes time.
        Path(settings.out).mkdir(parents=True, exist_ok=True)
    try:
        result = evaluate(settings, world=world)
    except KeyboardInterrupt:
        folder = Path(settings.cache) / "predictions"
        if any(folder.glob("eval-*.jsonl")):
            print(
                f"what was predicted is kept in {folder}; the same command goes on from it", file=sys.stderr
            )
        raise
    if not world.is_first:
        return results_path(result, settings)
    what = settings.model or (settings.predictions if result["run"] is None else result["run"])
    step = "" if result["step"] is None else f", step {result['step']}"
    print(f"{what}{step}, {result['precision']}")
    print(table(result))
    earlier = set_aside(results_path(result, settings), settings)
    if earlier is not None:
        print(f"the evaluation that stood there, of other settings, is {earlier} now")
    path = write_results(result, settings)
    print(f"written to {path}, and {path.with_suffix('.html')} to look at it")
    return path
