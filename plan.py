"""Memory and speed of a run before it begins: `python trainingmanager.py --plan [the run's flags]`.

A child process on this machine makes the run's model with drawn weights, held as the run would hold them,
and does with it what a run does, by the same functions, on drawn text and tokens: the guards, some updates, a
validation, a checkpoint. A model above WHOLE weights is made at its full width with two and with eight of its
blocks, in a child each: what blocks take is linear in their number, so those of the whole depth follow.
Nothing of the data is read, and of a base only its config.json.

On a CPU, seconds are those of processor time of the thread that drives the step: it computes its own share of
every product, so that on a quiet machine they are the clock's, and what else runs does not count.

The peak is that of training, to its last checkpoint. The scores at the end read more rows at a time, hold the
best checkpoint's model too, and an n-gram model of the training files, and may take more.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from config import Config, DataConfig, ModelConfig

WARMUP = 1  # steps that fill caches and are not timed
STEPS, SECONDS = (3, 20), 3.0  # least and most that are timed, and when to stop in between
BASE_ROW = 512  # as runmodel's, where nothing is said
# Resident memory differs by some per cent from process to process, as the allocator finds room: by the line
# through one and three blocks, estimates of 24 blocks differed by up to 30%.
DEPTHS = (2, 8)
FUNCTIONS = 100  # in each of 24 drawn files
IDS = 259  # of their tokenizer: the least that one has
WHOLE = 50_000_000  # weights of a model that is measured with all of its blocks


@dataclass(frozen=True)
class Cost:
    """Of a number of blocks, as measured.

    Args:
        guard_bytes: Most memory of the process in the guards; on a GPU that of its tensors.
        step_bytes: While it trains and validates.
        save_bytes: While it saves a checkpoint.
        held_bytes: Weights as they are held, the trainable ones' gradients and optimizer state left out.
        trained_bytes: Trainable weights with gradients and optimizer state.
        micro_seconds: Of a micro-batch, forward and backward.
        update_seconds: Of the clip and the optimizers.
    """

    guard_bytes: float
    step_bytes: float
    save_bytes: float
    held_bytes: float
    trained_bytes: float
    micro_seconds: float
    update_seconds: float

    def at(self, other: Cost, n: int) -> Cost:
        """Of n blocks, by the line through this, of DEPTHS[0], and the other, of DEPTHS[1]."""
        first, second = asdict(self), asdict(other)
        share = (n - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
        # A block takes no less than nothing; clocks on a busy machine may say otherwise.
        return Cost(
            **{key: max(first[key] + share * (second[key] - first[key]), first[key]) for key in first}
        )

    @property
    def peak(self) -> float:
        return max(self.guard_bytes, self.step_bytes, self.save_bytes)


@dataclass(frozen=True)
class Plan:
    """What a run is expected to take."""

    cost: Cost
    n_layer: int
    depths: tuple[int, ...]  # that were measured
    row_tokens: int
    config: Config

    @property
    def step_seconds(self) -> float:
        return self.config.train.accumulation * self.cost.micro_seconds + self.cost.update_seconds

    def __str__(self) -> str:
        cost, train = self.cost, self.config.train
        tokens = train.batch_size * train.accumulation * self.row_tokens
        rest = cost.peak - cost.held_bytes - cost.trained_bytes
        seconds = self.step_seconds
        stages = {"": cost.step_bytes, " (in the guards)": cost.guard_bytes, " (in saving)": cost.save_bytes}
        where = max(stages, key=lambda stage: stages[stage])
        lines = [
            f"peak memory      {cost.peak / 1e9:.2f} GB{where}",
            f"  weights        {cost.held_bytes / 1e9:.2f} GB, frozen ones",
            f"  what trains    {cost.trained_bytes / 1e9:.2f} GB, with gradients and optimizer state",
            f"  the rest       {rest / 1e9:.2f} GB, activations and the program",
            f"steps an hour    {3600 / seconds:,.0f}, of {tokens:,} tokens and {seconds:.2f} s",
        ]
        if train.max_steps:
            hours = train.max_steps * seconds / 3600
            lines.append(f"{train.max_steps:,} steps".ljust(17) + f"{hours:.2f} hours")
        measured = f"all {self.n_layer} blocks"
        if self.depths != (self.n_layer,):
            measured = f"{' and '.join(map(str, self.depths))} of {self.n_layer} blocks at full width"
        lines.append(
            f"measured just now with {measured}, on drawn tokens that all bear loss, as if nothing else ran; "
            "the seconds of validation and guards are not counted, nor time and memory of the final scores"
        )
        return "\n".join(lines)


def plan(config: Config) -> Plan:
    """See the module.

    Raises:
        ValueError: The base or the settings do not fit, or a child failed: one sentence.
    """
    from training.beforehand import refuse_mistakes

    refuse_mistakes(config)
    model, family = shape_of(config)
    rows = config.train.row_length or (
        model.block_size if family is None else min(BASE_ROW, model.block_size)
    )
    whole = model.n_layer <= DEPTHS[1] or n_weights(model) <= WHOLE
    depths = (model.n_layer,) if whole else DEPTHS
    first, *others = (_measured(config, model, family, n, rows) for n in depths)
    cost = first.at(others[0], model.n_layer) if others else first
    return Plan(cost, model.n_layer, depths, rows, config)


def n_weights(model: ModelConfig) -> int:
    """About as many as the model has: its matrices, with a feed-forward of three and a head of its own."""
    block = model.n_embd * (4 * model.n_embd + 3 * model.n_inner)
    return model.n_layer * block + 2 * model.vocab_size * model.n_embd


def shape_of(config: Config) -> tuple[ModelConfig, str | None]:
    """The model that trains, resolved, and its family; of a base only config.json is read."""
    base = config.train.base
    if base is None:
        vocab_size = config.model.vocab_size or config.tokenizer.vocab_size
        return replace(config.model, vocab_size=vocab_size).resolved(), None
    from pretrained.load import described

    family, model = described(base, config.train.base_revision)
    return model, family.model_type


# --- a child -----------------------------------------------------------------------------------------


def _measured(config: Config, model: ModelConfig, family: str | None, n_layer: int, rows: int) -> Cost:
    asked = {"config": config.to_dict(), "model": asdict(model), "family": family, "rows": rows}
    asked["n_layer"] = n_layer
    made = subprocess.run(
        [sys.executable, str(Path(__file__).resolve())],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
    )
    last = made.stdout.strip().rpartition("\n")[2]
    if made.returncode or not last.startswith("{"):
        reason = (made.stderr.strip().splitlines() or [f"exit code {made.returncode}"])[-1]
        raise ValueError(
            f"{n_layer} of {model.n_layer} blocks could not be measured: {reason.removeprefix('error: ')}"
        )
    return Cost(**json.loads(last))


def _child(asked: dict[str, Any]) -> Cost:
    """In a process of its own: make the model, do what a run does with it, and say what that took."""
    import torch
    from torch.utils.tensorboard import SummaryWriter

    from guards.first_steps import FirstSteps
    from guards.subject import FAULTS
    from modules.precision import choose_device, choose_precision, keep_freed_memory, release_freed_memory
    from preflight import preflight
    from training.checkpoint import save_checkpoint

    assert SummaryWriter  # what a training process has in memory besides its tensors
    config = Config.from_dict(asked["config"])
    shape = asked["model"] | {"n_layer": asked["n_layer"]}
    shape["vocab_size"] = max(shape["vocab_size"], IDS)
    shape["window_layers"] = [layer for layer in shape["window_layers"] if layer < asked["n_layer"]]
    device = choose_device(config.train.device)
    precision = choose_precision(device, config.train.precision)
    model = _model(Config.from_dict({"model": shape}).model.resolved(), asked["family"], config, precision)
    model.to(device).train()
    train = replace(config.train, row_length=asked["rows"])
    config = replace(config, model=model.config, train=train)
    with tempfile.TemporaryDirectory() as folder:
        manager, subject = _run(config, model, precision, asked["family"], Path(folder))
        release_freed_memory()
        keep_freed_memory()
        _reset_peak(device)
        preflight(subject, FAULTS.split())  # on drawn tokens most things would be refused
        release_freed_memory()
        guard_bytes = _peak(device)
        batch = _batch(train.batch_size, asked["rows"], model.config.vocab_size, device)
        _reset_peak(device)
        watch = FirstSteps(subject)
        micro, update, started = [], [], time.perf_counter()
        for number in range(WARMUP + STEPS[1]):
            if number == WARMUP:
                watch.close()
            if number >= WARMUP + STEPS[0] and time.perf_counter() - started > SECONDS:
                break
            seconds = _step(manager, batch)
            micro.append(seconds[0])
            update.append(seconds[1])
        release_freed_memory()
        manager.score([batch, batch])
        step_bytes = _peak(device)
        _reset_peak(device)
        # Not by the manager, which refuses weights that are not finite, as on drawn tokens they may be.
        save_checkpoint(manager.folder / "checkpoints", 1, model, manager.whole_state(), None, False)
        save_bytes = _peak(device)
    held = {*model.parameters(), *model.buffers()} - set(manager.parameters)
    states = [value for o in manager.optimizers for state in o.state.values() for value in state.values()]
    state_bytes = sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    return Cost(
        guard_bytes=guard_bytes,
        step_bytes=step_bytes,
        save_bytes=save_bytes,
        held_bytes=sum(t.nbytes for t in held),
        trained_bytes=2 * sum(p.nbytes for p in manager.parameters) + state_bytes,
        # The least: what else runs takes caches, too, and only ever adds.
        micro_seconds=min(micro[WARMUP:]),
        update_seconds=min(update[WARMUP:]),
    )


def _run(config: Config, model: Any, precision: Any, family: str | None, folder: Path) -> tuple[Any, Any]:
    """As trainingmanager makes it, on some functions of drawn words; and what its guards look at."""
    from data.corpus import training_texts
    from dataset import prepare_data
    from planted_data import write_corpus
    from tokenizer import BPETokenizer
    from trainingmanager import TrainingManager

    write_corpus(folder / "texts", FUNCTIONS)
    config = replace(config, data=DataConfig(str(folder / "texts"), cache=str(folder / "cache"), workers=1))
    tokenizer = BPETokenizer.train(training_texts(config.data), IDS)
    data = prepare_data(config.data, tokenizer)
    manager = TrainingManager(config, model, data, precision, folder)
    return manager, manager.subject(tokenizer, "fresh" if family is None else "loaded", None)


def _model(shape: ModelConfig, family: str | None, config: Config, precision: Any) -> Any:
    """With drawn weights, held as runmodel.base_held_in holds those of a base."""
    import torch

    from architecture import Decoder
    from lora import add_adapter
    from modules.quantize import quantize_linears
    from pretrained import FAMILIES
    from training.run import resolved_format, set_dropout

    model = Decoder(replace(shape, init="normal"))
    if family is None:
        return model
    asked = {
        key: value
        for key, value in vars(config.model).items()
        if key.endswith("dropout") and value is not None
    }
    set_dropout(model, replace(shape, **asked).resolved())
    held = "fp32" if config.lora.r == 0 else resolved_format(config.train.base_format, precision.dtype)
    if held == "bf16" and precision.dtype == torch.bfloat16:
        model.to(torch.bfloat16)
    elif held != "fp32":
        matrices = [
            n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("blocks.")
        ]
        quantize_linears(model, held, matrices)
        if precision.dtype == torch.bfloat16:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
    if config.lora.r:
        add_adapter(model, config.lora, FAMILIES[family].key)
    return model


def _batch(rows: int, length: int, vocab_size: int, device: Any) -> Any:
    """Two documents a row; every token bears loss."""
    import torch

    from dataset import Batch

    tokens = torch.randint(0, vocab_size, (rows, length), device=device)
    place = torch.arange(length, device=device).expand(rows, length)
    second = (place >= length // 2).long()
    return Batch(tokens, tokens, second, place - second * (length // 2))


def _step(manager: Any, batch: Any) -> tuple[float, float]:
    """Seconds of forward and backward, and of the update; see the module."""
    import torch

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


def _reset_peak(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak of resident memory begins anew


def _peak(device: Any) -> float:
    import torch

    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return 1024.0 * int(kilobytes)


if __name__ == "__main__":
    from config import one_sentence

    with one_sentence():
        print(json.dumps(asdict(_child(json.load(sys.stdin)))))
