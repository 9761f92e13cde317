"""Memory and speed of a run before it begins: `python trainingmanager.py --plan [the run's flags]`.

A child process on this machine makes the run's model with drawn weights, held as the run would hold them,
and takes a few steps of training on rows of drawn tokens, reads a batch as validation does, and saves a
checkpoint. A model above WHOLE weights is made at its full width with one and with three of its blocks, in a
child each: what blocks take is linear in their number, so peak memory and time of the whole depth follow.
Nothing of the data is read, and of a base only its config.json.

On a CPU, seconds are those of processor time of the thread that drives the step: it computes its own share of
every product, so that on a quiet machine they are the clock's, and what else runs does not count.

The peak is that of the training process: evaluation at the end, and an n-gram model of many files there, may
take more.
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

from config import Config, ModelConfig

WARMUP = 1  # steps that fill caches and are not timed
STEPS, SECONDS = (2, 20), 3.0  # least and most that are timed, and when to stop in between
BASE_ROW = 512  # as runmodel's, where nothing is said
DEPTHS = (1, 3)
WHOLE = 50_000_000  # weights of a model that is measured with all of its blocks


@dataclass(frozen=True)
class Cost:
    """Of a number of blocks, as measured.

    Args:
        step_bytes: Most memory of the process while it trains; on a GPU that of its tensors.
        save_bytes: While it saves a checkpoint.
        held_bytes: Weights as they are held, the trainable ones' gradients and optimizer state left out.
        trained_bytes: Trainable weights with gradients and optimizer state.
        micro_seconds: Of a micro-batch, forward and backward.
        update_seconds: Of the clip and the optimizers.
    """

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
        return max(self.step_bytes, self.save_bytes)


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
        where = " (in saving)" if cost.save_bytes > cost.step_bytes else ""
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
            "the seconds of validation, guards and the final scores are not counted"
        )
        return "\n".join(lines)


def plan(config: Config) -> Plan:
    """See the module.

    Raises:
        ValueError: The base or the settings do not fit, or a child failed: one sentence.
    """
    model, family = shape_of(config)
    rows = config.train.row_length or (
        model.block_size if family is None else min(BASE_ROW, model.block_size)
    )
    if rows > model.block_size:
        raise ValueError(f"row_length is {rows}, and the model has a context of {model.block_size} tokens")
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
    from pretrained import FAMILIES
    from pretrained.family import to_model
    from pretrained.folder import read_json

    folder = Path(base)
    if not folder.is_dir():
        import huggingface_hub

        try:
            revision = config.train.base_revision
            folder = Path(huggingface_hub.hf_hub_download(base, "config.json", revision=revision)).parent
        except Exception as error:  # of the network, of the hub, of the disk
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"config.json of {base} could not be fetched ({reason}); check the name, or name a folder"
            ) from error
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json, which says the model's shape; name its folder")
    values = read_json(folder, "config.json", not Path(base).is_dir())
    family = FAMILIES.get(str(values.get("model_type")))
    if family is None:
        raise ValueError(
            f"{folder / 'config.json'} is of no family known here; known are {', '.join(FAMILIES)}"
        )
    return to_model(family, values), family.model_type


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
    """In a process of its own: make the model, train, validate, save, and say what it took."""
    import torch
    from torch.utils.tensorboard import SummaryWriter

    # What a training process has in memory besides its tensors.
    import trainingmanager
    from checkpoint import save_checkpoint
    from loss import score
    from optim import build_optimizers
    from precision import choose_device, choose_precision, keep_freed_memory

    assert trainingmanager and SummaryWriter
    config = Config.from_dict(asked["config"])
    shape = asked["model"] | {"n_layer": asked["n_layer"]}
    shape["window_layers"] = [layer for layer in shape["window_layers"] if layer < asked["n_layer"]]
    device = choose_device(config.train.device)
    precision = choose_precision(device, config.train.precision)
    model = _model(Config.from_dict({"model": shape}).model.resolved(), asked["family"], config, precision)
    model.to(device).train()
    model.checkpoint_activations = config.train.activation_checkpointing
    if config.lora.r and not config.train.activation_checkpointing:
        model.keep_less()
    trainable = [p for p in model.parameters() if p.requires_grad]
    held = {*model.parameters(), *model.buffers()} - set(trainable)
    optimizers = build_optimizers(model, config.optimizer, config.lora.lr_ratio)
    keep_freed_memory()
    batch = _batch(config.train.batch_size, asked["rows"], model.config.vocab_size, device)
    _reset_peak(device)
    scored_in = config.train.eval_precision
    scoring = precision if scored_in == "auto" else choose_precision(device, scored_in)
    score(model, [batch], scoring)  # as a guard does, before the first step
    micro, update, started = [], [], time.perf_counter()
    for number in range(WARMUP + STEPS[1]):
        if number >= WARMUP + STEPS[0] and time.perf_counter() - started > SECONDS:
            break
        seconds = _step(model, batch, optimizers, trainable, config, precision)
        micro.append(seconds[0])
        update.append(seconds[1])
    score(model, [batch], scoring)
    step_bytes = _peak(device)
    states = [value for o in optimizers for state in o.state.values() for value in state.values()]
    state_bytes = sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    _reset_peak(device)
    with tempfile.TemporaryDirectory() as folder:
        state = {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        save_checkpoint(Path(folder), 1, model, state, None, False)
    return Cost(
        step_bytes=step_bytes,
        save_bytes=_peak(device),
        held_bytes=sum(t.nbytes for t in held),
        trained_bytes=2 * sum(p.nbytes for p in trainable) + state_bytes,
        # The least: what else runs takes caches, too, and only ever adds.
        micro_seconds=min(micro[WARMUP:]),
        update_seconds=min(update[WARMUP:]),
    )


def _model(shape: ModelConfig, family: str | None, config: Config, precision: Any) -> Any:
    """With drawn weights, held as runmodel.base_held_in holds those of a base."""
    import torch

    from architecture import Decoder
    from lora import add_adapter
    from pretrained import FAMILIES
    from quantize import quantize_linears
    from runmodel import resolved_format, set_dropout

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


def _step(
    model: Any, batch: Any, optimizers: list[Any], trainable: list[Any], config: Config, precision: Any
) -> tuple[float, float]:
    """Seconds of forward and backward, and of the update; see the module."""
    import torch

    from loss import token_loss

    def now() -> float:
        if precision.device.type == "cuda":
            torch.cuda.synchronize(precision.device)
            return time.perf_counter()
        return time.thread_time()

    start = now()
    with precision.autocast():
        loss = token_loss(model, batch, config.optimizer.label_smoothing, config.optimizer.z_loss)
    (loss.objective / loss.tokens).backward()
    del loss
    middle = now()
    torch.nn.utils.clip_grad_norm_(trainable, config.optimizer.grad_clip or float("inf"))
    for optimizer in optimizers:
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
