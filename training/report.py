"""The report of a run at its end: scores and samples of its best checkpoint, pictures, and its adapter."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from config import Config, TrainConfig, write_atomically
from config.console import command_of, for_shell, printable
from dataset import PreparedData
from guards.faults import Fault
from guards.preflight import record_overrides
from guards.reference.exported import refuse_other_adapter
from modules.precision import Precision
from suites.closing import closing_lines, flags_of, shown_examples
from suites.evaluate import evaluate, table, write_results
from suites.functions import sample_completions
from suites.records import read_evaluation
from suites.settings import EvalConfig
from training.curves import draw_curves
from training.distributed import ALONE, World
from training.loggers import log_scores, places
from training.loop import TrainingManager
from training.outputs import OUTPUTS, note_made
from training.run import TrainedRun, export_adapter, load_run


@dataclass(frozen=True)
class EndedRun:
    """A run whose training was done when it was resumed: what a report needs of a manager."""

    folder: Path
    config: Config
    data: PreparedData
    device: torch.device
    eval_precision: Precision
    failed_loggers: frozenset[str] = frozenset()


def report(
    manager: TrainingManager | EndedRun, missing: Collection[str] = tuple(OUTPUTS), world: World = ALONE
) -> None:
    """Make scores of the best checkpoint, samples, pictures and the adapter, and print where they are.

    Args:
        missing: The names in OUTPUTS of what is made now; the others are there.
        world: The processes that share the scores. Each calls this function; the first makes the rest.
    """
    folder = manager.folder
    # Of several processes each takes its own device of this kind.
    device = manager.device if world.size == 1 else torch.device(manager.device.type)
    if not world.is_first:
        evaluate(final_settings(folder, manager.config, device), manager.data, world)
        return
    run = load_run(folder)
    wrong_adapter: Fault | None = None
    if run.family is not None and "adapter" in missing:
        try:
            make_adapter(folder, run, manager.config.train.allow)
        except Fault as fault:  # Scores and samples are made all the same: they are the checkpoint's.
            wrong_adapter = fault
    if "scores" in missing:
        settings = final_settings(folder, manager.config, device)
        scores = evaluate(settings, manager.data, world)
        print(f"\nbest checkpoint, step {run.step}, on all {scores['side']} files\n{table(scores)}")
        write_results(scores, settings)
        note_made(folder, "scores")
        log_scores(folder, manager.config, run.step, scores, manager.failed_loggers)
    else:
        scores = read_evaluation(folder / OUTPUTS["scores"])
    flags = flags_of([], manager.data.test.holds_conversations)
    if "samples" in missing:
        shown, flags = samples_of(manager, run, scores)
        shown = printable(shown)
        write_atomically(folder / "samples.txt", shown)
        note_made(folder, "samples")
        print(f"\n{shown}")
    pictures = make_pictures(folder) if "pictures" in missing else sorted((folder / "curves").glob("*.png"))
    print(f"checkpoints  {folder / 'checkpoints'}")
    if run.family is not None and wrong_adapter is None:
        print(f"adapter      {folder / 'adapter'}")
    for place in places(manager.config.train.log, folder):
        print(place)
    print(f"pictures     {', '.join(str(path) for path in pictures)}")
    print(f"every line   {folder / 'eval.html'}")
    print(f"score again  {command_of('eval.py')} --run {for_shell(str(folder))}")
    print("\n".join(closing_lines(folder, manager.config.lora.r > 0, printable(flags))))
    if wrong_adapter is not None:
        raise wrong_adapter


def samples_of(
    manager: TrainingManager | EndedRun, run: TrainedRun, scores: dict[str, Any]
) -> tuple[str, str]:
    """Return completions of held-out text, to read, and the flags with which `generate.py` makes one of them.

    A corpus of examples gives some of its examples, one of plain files the bodies of functions.
    """
    n = manager.config.train.samples
    if manager.data.test.holds_examples:
        record = scores.get("suite")
        if record is None:
            return "no held-out example to complete\n", flags_of([])
        return shown_examples(record, n), flags_of(record["samples"], manager.data.test.holds_conversations)
    samples = sample_completions(
        run.model.to(manager.device),
        run.tokenizer,
        manager.data.test,
        manager.config.row_length,
        manager.eval_precision,
        n,
    )
    shown = "\n".join(
        f"--- {s.name}:{s.line}\n{s.prompt}\n--- the model goes on\n{s.completion.strip(chr(10))}\n"
        f"--- the file goes on\n{s.reference}\n"
        for s in samples
    )
    if n and not samples:
        shown = "no held-out function to complete\n"
    return shown, flags_of([{"prompt": s.prompt.split("\n")[0].lstrip()} for s in samples])


def make_adapter(folder: Path, run: TrainedRun, allowed: Collection[str]) -> None:
    """Write the adapter of a run's best checkpoint, in the place of one of an earlier end of the same run.

    Raises:
        Fault: What was written is not the run's adapter; then there is none.
    """
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    passed: list[Fault] = []
    export_adapter(
        run, folder / "adapter", lambda hidden: passed.extend(refuse_other_adapter(hidden, run, allowed))
    )
    record_overrides(folder, passed)
    note_made(folder, "adapter")


def make_pictures(folder: Path) -> list[Path]:
    """Draw the curves of a run; return their paths."""
    pictures = draw_curves(folder)
    note_made(folder, "pictures")
    return pictures


def precision_of_scores(train: TrainConfig) -> Literal["auto", "bf16", "fp16", "fp32"]:
    """Return the setting of the precision in which the run is validated and scored."""
    return train.precision if train.eval_precision == "auto" else train.eval_precision


def final_settings(folder: Path, config: Config, device: torch.device) -> EvalConfig:
    """Return the settings with which a run is evaluated at its end."""
    precision, data = precision_of_scores(config.train), config.data
    passes = "differs-from-reference" in config.train.allow
    return EvalConfig(
        str(folder),
        device=str(device),
        precision=precision,
        source=data.source,
        cache=data.cache,
        allow="differs-from-reference" if passes else "nothing",
    )
