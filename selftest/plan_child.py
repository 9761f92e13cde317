"""The process that training/plan.py starts: it does with some blocks what a run does, and prints the cost."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from architecture import Decoder
from config import DROPOUTS, Config, DataConfig, ModelConfig, one_sentence
from data.corpus import training_texts
from data.run_documents import RunDocuments
from dataset import Batch, prepare_data
from guards.faults import FAULTS
from guards.preflight import preflight
from guards.reference.live import DerivedSteps
from guards.subject import GuardSubject
from lora import add_adapter
from modules.precision import (
    Precision,
    choose_device,
    choose_precision,
    keep_freed_memory,
    release_freed_memory,
)
from modules.quantized_linear import quantize_linears
from pretrained import FAMILIES
from selftest.data import write_corpus
from tokenizer import BPETokenizer
from training.checkpoint import save_checkpoint
from training.loop import TrainingManager
from training.plan import Cost
from training.run import resolved_format, set_dropout

WARMUP = 1  # Steps that fill caches and are not timed.
STEPS, SECONDS = (3, 20), 3.0  # The least and most steps that are timed, and when to stop in between.
FUNCTIONS = 100  # In each of 24 sampled files.
IDS = 262  # The least ids that a byte tokenizer with its special tokens has.


def measure(request: dict[str, Any]) -> Cost:
    """Make the model, do with it what a run does, and return what that took.

    Args:
        request: The settings, the model's shape and family, its number of blocks and the tokens of a row.
    """
    assert SummaryWriter  # It is imported since a training process has it in memory, too.
    config = Config.from_dict(request["config"])
    shape = request["model"] | {"n_layer": request["n_layer"]}
    shape["vocab_size"] = max(shape["vocab_size"], IDS)
    for key in ("window_layers", "unrotated_layers"):
        shape[key] = [layer for layer in shape[key] if layer < request["n_layer"]]
    device = choose_device(config.train.device)
    precision = choose_precision(device, config.train.precision)
    model = make_model(
        Config.from_dict({"model": shape}).model.resolved(), request["family"], config, precision
    )
    model.to(device).train()
    train = replace(config.train, row_length=request["rows"])
    config = replace(config, model=model.config, train=train)
    with tempfile.TemporaryDirectory() as folder:
        manager, subject = make_run(config, model, precision, request["family"], Path(folder))
        release_freed_memory()
        keep_freed_memory()
        reset_peak(device)
        preflight(subject, FAULTS)  # All are allowed: on sampled tokens most things would be refused.
        release_freed_memory()
        guard_bytes = peak(device)
        batch = make_batch(train.batch_size, request["rows"], model.config.vocab_size, device)
        reset_peak(device)
        watch = DerivedSteps(subject)
        micro, update, started = [], [], time.perf_counter()
        for number in range(WARMUP + STEPS[1]):
            if number == WARMUP:
                watch.close()
            if number >= WARMUP + STEPS[0] and time.perf_counter() - started > SECONDS:
                break
            seconds = timed_step(manager, batch)
            micro.append(seconds[0])
            update.append(seconds[1])
        release_freed_memory()
        manager.score([batch, batch])
        step_bytes = peak(device)
        reset_peak(device)
        # Not `manager.save`, which refuses weights that are not finite: on random tokens they may be.
        save_checkpoint(manager.folder / "checkpoints", 1, model, manager.whole_state(), None, False)
        save_bytes = peak(device)
    frozen = {*model.parameters(), *model.buffers()} - set(manager.parameters)
    states = [value for o in manager.optimizers for state in o.state.values() for value in state.values()]
    state_bytes = sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    return Cost(
        guard_bytes=guard_bytes,
        step_bytes=step_bytes,
        save_bytes=save_bytes,
        held_bytes=sum(t.nbytes for t in frozen),
        trained_bytes=2 * sum(p.nbytes for p in manager.parameters) + state_bytes,
        # The least of them: what else runs on the machine only ever adds.
        micro_seconds=min(micro[WARMUP:]),
        update_seconds=min(update[WARMUP:]),
    )


def make_run(
    config: Config, model: Decoder, precision: Precision, family: str | None, folder: Path
) -> tuple[TrainingManager, GuardSubject]:
    """Return the manager of a run on some functions of sampled words, and what its guards look at."""
    write_corpus(folder / "texts", FUNCTIONS)
    config = replace(config, data=DataConfig(str(folder / "texts"), cache=str(folder / "cache"), workers=1))
    documents = RunDocuments(config.data)
    tokenizer = BPETokenizer.train(training_texts(documents), IDS)
    data = prepare_data(documents, tokenizer)
    manager = TrainingManager(config, model, data, precision, folder)
    return manager, manager.subject(tokenizer, "fresh" if family is None else "loaded", None)


def make_model(shape: ModelConfig, family: str | None, config: Config, precision: Precision) -> Decoder:
    """Return a model with random weights, stored as `training.run.base_stored_as` stores those of a base."""
    model = Decoder(replace(shape, init="normal"))
    if family is None:
        return model
    rates = {key: rate for key in DROPOUTS if (rate := getattr(config.model, key)) is not None}
    set_dropout(model, replace(shape, **rates).resolved())
    weight_format = (
        "fp32" if config.lora.r == 0 else resolved_format(config.train.base_format, precision.dtype)
    )
    if weight_format == "bf16" and precision.dtype == torch.bfloat16:
        model.to(torch.bfloat16)
    elif weight_format != "fp32":
        matrices = [
            n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("blocks.")
        ]
        quantize_linears(model, weight_format, matrices)
        if precision.dtype == torch.bfloat16:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
    if config.lora.r:
        add_adapter(model, config.lora, FAMILIES[family].key)
    return model


def make_batch(rows: int, length: int, vocab_size: int, device: torch.device) -> Batch:
    """Return rows of two documents, in which every token is a target."""
    tokens = torch.randint(0, vocab_size, (rows, length), device=device)
    place = torch.arange(length, device=device).expand(rows, length)
    second = (place >= length // 2).long()
    return Batch(tokens, tokens, second, place - second * (length // 2))


def timed_step(manager: TrainingManager, batch: Batch) -> tuple[float, float]:
    """Return the seconds of forward and backward, and of the update.

    On a CPU they are those of processor time of this thread; see training/plan.py.
    """

    def now() -> float:
        if manager.device.type == "cuda":
            torch.cuda.synchronize(manager.device)
            return time.perf_counter()
        return time.thread_time()

    start = now()
    loss = manager.loss(batch)
    (loss.objective / loss.tokens).backward()
    del loss
    middle = now()
    torch.nn.utils.clip_grad_norm_(manager.parameters, manager.config.optimizer.grad_clip or float("inf"))
    for optimizer in manager.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return middle - start, now() - middle


def reset_peak(device: torch.device) -> None:
    """Forget the peak of memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    Path("/proc/self/clear_refs").write_text("5")  # This resets the peak of resident memory: proc(5).


def peak(device: torch.device) -> float:
    """Return the most bytes that the process had since `reset_peak`; on a GPU those of its tensors."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return 1024.0 * int(kilobytes)


if __name__ == "__main__":
    with one_sentence():
        print(json.dumps(asdict(measure(json.load(sys.stdin)))))
