"""The settings of an evaluation, and its command line. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import config
from config import option
from config.console import refuse


@dataclass(frozen=True)
class EvalConfig:
    """The settings of an evaluation.

    Args:
        checkpoint: Run folder, or one checkpoint inside it.
        model: In its place a published model, a folder or hub id, for suites with a file of their own.
        adapter: A PEFT folder for `model`.
        rescore: An eval.json whose predictions are scored again, in the place of a checkpoint.
        report: An eval.json whose page is written again, in the place of a checkpoint.
        compare: Two or more run folders or eval.json files whose scores are compared, in the place of a
            checkpoint. `:NAME` behind one stands for its predictions from prompts of that name.
        suite: Names between commas: `next_token`; of held-out files `next_line`, `pairs` and `fim`; of a file
            of their own `humaneval`, `humaneval_infilling`, `mbpp`, `codexglue_method` and `codexglue_line`.
            `examples` is rows of prompt and completion of `suite_file`, which any model can complete. `fim`
            stands for `fim_line`, `fim_lines` and `fim_span`. Empty stands for `next_token` and, by the run's
            data, `next_line` or `pairs`.
        suite_file: The published file of a suite; for `examples` your own .jsonl, .jsonl.gz or .parquet.
        predictions: A JSONL file of predictions made elsewhere, one on each line, in place of the model's.
        held: Format that the matrices are stored in: `full`, or with fewer bits, `int8`, `int4` or `nf4`.
        which: The checkpoint of a run folder: `best` by validation loss, or `last`.
        samples: Examples of each suite; 0 leaves the scores of texts out. By default 200 of held-out files,
            and all of a suite's own file.
        max_new_tokens: Most tokens of a completion; 0 for the suite's own number: 64 for a line, for an
            example as many as the longest completion in training has, but no more than 512, and for a program
            512.
        stop: Strings that end a text and are no part of it, in the place of the suite's own.
        temperature: Temperature of sampling; 0 takes the most likely token.
        top_k: Sample only among the k most likely tokens; 0 means all.
        top_p: Sample only from the nucleus that holds this much probability; 1 means all.
        samples_per_example: Texts sampled for each example.
        prompts: Names, between commas, of other wordings that rows of examples store in their field
            `prompts`; the examples are completed with each.
        memorisation: Look for the predictions in the training files, and say which runs stand there.
        metrics: Names of scores of texts, between commas, in the place of the suite's own.
        embedding_model: Folder of the published model whose hidden states the metric `semantic` compares; by
            default the base of the model that is evaluated, or that model itself.
        embedding_layer: Its layer, from 1; 0 for what its head reads.
        language: Language of the code, which only some metrics read.
        seed: Seed of the choice of examples, of sampling and of the intervals.
        batch_size: Rows at a time; by default as many as memory is estimated to have room for.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: `auto` (what the hardware computes natively), `bf16`, `fp16` or `fp32`.
        source: Where the files are now, if they moved; the fingerprint still has to match.
        base: Where the base of a run with adapters is now, if it moved; its fingerprint has to match too.
        cache: Folder for token stores, keyed by content, and for the predictions of an evaluation that was
            interrupted; the one that the run's config names is not touched.
        out: Folder for eval.json; by default the run's own, and evals/NAME for a published model.
        allow: `unsandboxed` runs programs where nothing isolates them; `differs-from-reference` lets scores
            pass that the second opinion derives differently. The scores then say so.
    """

    checkpoint: str | None = option(None, also=("run",))
    model: str | None = None
    adapter: str | None = None
    rescore: str | None = None
    report: str | None = None
    compare: tuple[str, ...] = option((), takes_words=True)
    suite: str = ""
    suite_file: str | None = None
    predictions: str | None = None
    held: Literal["full", "int8", "int4", "nf4"] = "full"
    which: Literal["best", "last"] = "best"
    samples: int | None = None
    max_new_tokens: int = 0
    stop: tuple[str, ...] | None = option(None, is_text=True)
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
    allow: Literal["nothing", "unsandboxed", "differs-from-reference"] = "nothing"


def parse_settings(words: list[str]) -> EvalConfig:
    """Return the EvalConfig of a command line; a mistake prints one sentence and exits with 2."""
    settings = config.parse_settings(EvalConfig, words, "Score a trained model.")
    problem = mistake(settings)
    if problem is not None:
        refuse(problem)
    return settings


def mistake(settings: EvalConfig) -> str | None:
    """Return a sentence on what is wrong with the settings by themselves, or None."""
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
            "give one of --run RUN, --model FOLDER, --rescore RUN/eval.json, --report RUN/eval.json "
            "and --compare RUN_A RUN_B"
        )
    if settings.checkpoint is None and settings.memorisation:
        return "--memorisation is of a run, whose data it reads; give --run RUN"
    if settings.prompts and settings.predictions is not None:
        return "--prompts ask a model again, and --predictions stand in for it; leave one of them out"
    if settings.predictions is not None and settings.samples == 0:
        return "--predictions are of samples, and --samples is 0; leave one of them out"
    if settings.predictions is not None and settings.model is not None:
        return "--predictions stand in for a model's; leave --model out"
    if settings.adapter is not None and settings.model is None:
        return "--adapter belongs to a published model; give --model FOLDER with it"
    if settings.held != "full" and settings.adapter is not None:
        return f"an adapter's folder says which weights it was trained on; leave --held {settings.held} out"
    if settings.held != "full" and settings.checkpoint is None and settings.model is None:
        return f"--held {settings.held} is of a model, and none is opened; give --run RUN or --model FOLDER"
    if settings.samples_per_example > 1 and (settings.temperature == 0 or settings.predictions is not None):
        return (
            f"--samples_per_example is {settings.samples_per_example}, and without sampling all of them "
            "would be equal; give --temperature above 0, and no --predictions"
        )
    return None
