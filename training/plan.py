"""Memory and speed of a run before it begins: `python trainingmanager.py --plan [the run's flags]`.

A child process on this machine makes the run's model with random weights, stored as the run would, and does
with it what a run does, by the same functions, on random text and tokens: the guards, some updates, a
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
import os
import subprocess
from dataclasses import asdict, dataclass, replace

from config import BASE_ROW, Config, ModelConfig
from config.files import own_module
from modules.precision import choose_device, choose_precision
from pretrained.load import described
from training.beforehand import refuse_mistakes
from training.run import resolved_format

# Resident memory differs by some per cent from process to process, as the allocator finds room: by the line
# through one and three blocks, estimates of 24 blocks differed by up to 30%.
DEPTHS = (2, 8)
BITS = {"fp32": 32.0, "bf16": 16.0, "nf4": 4.127}  # a weight of the blocks; see modules/quantized_linear.py
WIDE_DEPTHS = (1, 2)  # of a model whose blocks have more than WIDE_BLOCK weights, as those with experts have
WIDE_BLOCK = 300_000_000
WHOLE = 50_000_000  # Weights: a model with at most as many is measured with all of its blocks.


@dataclass(frozen=True)
class Cost:
    """The measured cost of a number of blocks.

    Attributes:
        guard_bytes: The most memory of the process in the guards; on a GPU that of its tensors.
        step_bytes: The same while it trains and validates.
        save_bytes: The same while it saves a checkpoint.
        held_bytes: The frozen weights, as they are stored.
        trained_bytes: The trainable weights with gradients and optimizer state.
        micro_seconds: The time of a micro-batch, forward and backward.
        update_seconds: The time of the clip and the optimizers.
    """

    guard_bytes: float
    step_bytes: float
    save_bytes: float
    held_bytes: float
    trained_bytes: float
    micro_seconds: float
    update_seconds: float

    def at(self, other: Cost, n: int, depths: tuple[int, int]) -> Cost:
        """Return the cost of n blocks, on the line through this one's and the other's at two depths."""
        first, second = asdict(self), asdict(other)
        share = (n - depths[0]) / (depths[1] - depths[0])
        # A block takes no less than nothing; clocks on a busy machine may say otherwise.
        return Cost(
            **{key: max(first[key] + share * (second[key] - first[key]), first[key]) for key in first}
        )

    @property
    def peak(self) -> float:
        """The most memory of the process at any time of the run, in bytes."""
        return max(self.guard_bytes, self.step_bytes, self.save_bytes)


@dataclass(frozen=True)
class Plan:
    """The memory and time that a run is expected to take."""

    cost: Cost
    n_layer: int
    depths: tuple[int, ...]  # The numbers of blocks that were measured.
    row_tokens: int
    config: Config

    @property
    def step_seconds(self) -> float:
        """The time of an optimizer step, all its micro-batches included."""
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
            f"measured just now with {measured}, on sampled tokens that are all targets, as if nothing "
            "else ran; the seconds of validation and guards are not counted, nor time and memory of the "
            "final scores"
        )
        return "\n".join(lines)


def plan(config: Config) -> Plan:
    """Measure what a run would take, as the module says.

    Raises:
        ValueError: The base or the settings do not fit, or a child failed: one sentence.
    """
    refuse_mistakes(config)
    model, family = shape_of(config)
    rows = config.train.row_length or (
        model.block_size if family is None else min(BASE_ROW, model.block_size)
    )
    if family is not None:
        refuse_too_large(config, model)
    two = WIDE_DEPTHS if block_weights(model) > WIDE_BLOCK else DEPTHS
    whole = model.n_layer <= two[1] or estimated_weights(model) <= WHOLE
    depths = (model.n_layer,) if whole else two
    first, *others = (_measured(config, model, family, n, rows) for n in depths)
    cost = first.at(others[0], model.n_layer, two) if others else first
    return Plan(cost, model.n_layer, depths, rows, config)


def estimated_weights(model: ModelConfig) -> int:
    """Return about how many weights a model has, with a feed-forward of three matrices and an untied head."""
    return model.n_layer * block_weights(model) + 2 * model.vocab_size * model.n_embd


def block_weights(model: ModelConfig) -> int:
    """Return about how many weights a block has."""
    return model.n_embd * (4 * model.n_embd + 3 * model.n_inner * max(1, model.n_experts))


def refuse_too_large(config: Config, model: ModelConfig) -> None:
    """Raise ValueError, with both numbers, for frozen weights that the machine's memory does not hold.

    Blocks are measured in the memory of this machine; a GPU tells by itself what it does not hold.
    """
    if not config.lora.r or choose_device(config.train.device).type != "cpu":
        return
    dtype = choose_precision(choose_device(config.train.device), config.train.precision).dtype
    weight_format = resolved_format(config.train.base_format, dtype)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = {name: frozen_bytes(model, name) for name in (*BITS, "int8")}
    if needed[weight_format] > there:
        raise ValueError(
            f"the frozen weights take about {needed[weight_format] / 1e9:.0f} GB as {weight_format}, and "
            f"this machine has {there / 1e9:.0f} GB; as nf4 they take {needed['nf4'] / 1e9:.0f} GB "
            f"(--base_format nf4), as int8, in which models only generate, {needed['int8'] / 1e9:.0f} GB"
        )


def frozen_bytes(model: ModelConfig, weight_format: str) -> float:
    """Return about how many bytes the frozen weights of a base take, embedding and head in 16 bits or 32."""
    tables = (1 if model.tie_embeddings else 2) * model.vocab_size * model.n_embd
    blocks = model.n_layer * block_weights(model)
    bits = 8.0 if weight_format == "int8" else BITS[weight_format]
    return blocks * bits / 8 + tables * (4 if weight_format == "fp32" else 2)


def shape_of(config: Config) -> tuple[ModelConfig, str | None]:
    """Return the model that trains, resolved, and its family; of a base only config.json is read."""
    base = config.train.base
    if base is None:
        vocab_size = config.model.vocab_size or config.tokenizer.vocab_size
        return replace(config.model, vocab_size=vocab_size).resolved(), None
    family, model = described(base, config.train.base_revision)
    return model, family.model_type


# --- a child -----------------------------------------------------------------------------------------


def _measured(config: Config, model: ModelConfig, family: str | None, n_layer: int, rows: int) -> Cost:
    request = {"config": config.to_dict(), "model": asdict(model), "family": family, "rows": rows}
    request["n_layer"] = n_layer
    command, environment = own_module("selftest.plan_child")
    made = subprocess.run(command, env=environment, input=json.dumps(request), capture_output=True, text=True)
    last = made.stdout.strip().rpartition("\n")[2]
    if made.returncode or not last.startswith("{"):
        reason = (made.stderr.strip().splitlines() or [f"exit code {made.returncode}"])[-1]
        raise ValueError(
            f"{n_layer} of {model.n_layer} blocks could not be measured: {reason.removeprefix('error: ')}"
        )
    return Cost(**json.loads(last))
