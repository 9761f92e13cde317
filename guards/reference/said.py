"""Comparison of what a run says of itself with the reference: its tables of what trains, and its log."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from adapters.layers import Bias, LowRank, TrainableRows
from guards.reference.comparison import Comparison
from guards.reference.observed import adapter_of
from guards.reference.rehearsal import trainable
from guards.subject import GuardSubject
from lora import trainable_table
from modules.quantized_linear import n_weights
from reference import optimizers, update
from reference.published import PUBLISHED, family_of, published_name
from reference.weights import shapes
from training.optim import groups_table, parameter_groups

LOG = "look at what the loop writes, and when"
COUNTS = "compare what is counted for the table with the parameters that train"


def compare(subject: GuardSubject, comparison: Comparison) -> None:
    """Compare the number of parameters, and the tables of what trains and at which rate."""
    n_trained = sum(p.numel() for p in trainable(subject.model).values())
    n_base = sum(math.prod(shape) for shape in shapes(subject.config.model).values())
    n_added = n_trained if subject.config.lora.r else 0
    comparison.exact("parameters of the model", n_weights(subject.model), n_base + n_added, COUNTS)
    compare_rates(subject, comparison)
    if subject.base_folder is not None and family_of(subject.base_folder) in PUBLISHED:
        compare_trained(subject, comparison, n_trained, n_base + n_added - n_trained)


def compare_rates(subject: GuardSubject, comparison: Comparison) -> None:
    """Compare the table of learning rates: by optimizer, kind and rate the parameters, and the constants."""
    config = subject.config
    expected, found = defaultdict[tuple[str, ...], int](int), defaultdict[tuple[str, ...], int](int)
    for name, p in trainable(subject.model).items():
        rule = optimizers.rule_of(config, name, p.dim())
        kind = optimizers.kind_of(name, p.dim())
        expected[rule.optimizer, kind, f"{rule.rate:.6g}"] += p.numel()
    groups = parameter_groups(subject.model, config.optimizer, config.lora.lr_ratio, config.model.width_mult)
    *lines, last = groups_table(groups, config.optimizer).splitlines()
    for line in lines:
        optimizer, count, _, kind, _, _, rate, _ = line.split()
        found[optimizer.lower(), kind, rate] += _number(count)
    comparison.exact("table of learning rates", sorted(found.items()), sorted(expected.items()), COUNTS)
    own = config.optimizer.resolved()
    constants = [own.beta1, own.beta2, own.eps] if any(key[0] == "adamw" for key in expected) else []
    shown = [float(text) for text in re.findall(r"(?<= )\d[-+.e\d]*", last)]
    constants = [float(f"{value:g}") for value in [*constants, own.weight_decay] if value is not None]
    comparison.exact("constants under the table of learning rates", shown, constants, COUNTS)


def compare_trained(subject: GuardSubject, comparison: Comparison, n_trained: int, n_frozen: int) -> None:
    """Compare the table of what trains: by kind and published name the modules and their parameters."""
    assert subject.base_folder is not None
    published = partial(published_name, family_of(subject.base_folder))
    modules, counts = defaultdict[str, set[str]](set), defaultdict[str, int](int)
    for name, p in trainable(subject.model).items():
        path = name.partition(".adapters.")[0] if ".adapters." in name else name.rpartition(".")[0]
        line = f"{_kind(subject, path)} {re.sub(r'(?<=[.])[0-9]+(?=[.])', '*', published(path))}"
        modules[line].add(path)
        counts[line] += p.numel()
    found = {line: [0, 0] for line in counts}
    *lines, last = trainable_table(subject.model, published).splitlines()[2:]
    for line in lines:
        module, n_modules, *_, count = line[9:].split()
        sums = found.setdefault(f"{line[:9].strip()} {module}", [0, 0])
        sums[0] += int(n_modules)
        sums[1] += _number(count)
    expected = {line: [len(modules[line]), counts[line]] for line in counts}
    comparison.exact("table of what trains", found, expected, COUNTS)
    said = [_number(text) for text in re.findall(r"\d[\d,]*(?= )", last)]
    comparison.exact("parameters that train, and frozen ones", said, [n_trained, n_frozen], COUNTS)


def _kind(subject: GuardSubject, path: str) -> str:
    """Return the word of the table for what trains of a module."""
    _, layer = adapter_of(subject.model.get_submodule(path))
    if isinstance(layer, LowRank):
        return "low rank" if layer.magnitude is None else "DoRA"
    return "rows" if isinstance(layer, TrainableRows) else "bias" if isinstance(layer, Bias) else "whole"


def _number(text: str) -> int:
    return int(text.replace(",", ""))


# --- the log ------------------------------------------------------------------------------------------


def logged(subject: GuardSubject, after: int) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl of updates after a step, in their order."""
    lines = (subject.folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["step"] > after]


def compare_log(
    subject: GuardSubject, comparison: Comparison, values: Mapping[str, float], begun: int
) -> None:
    """Compare the log since a step: which updates have a line, and their epochs and learning rates.

    Rates of a budget in seconds are derived in the first updates only.

    Args:
        values: What was logged of the validation.
        begun: The step at which this part of the run began.
    """
    train, step = subject.config.train, subject.state.step
    *_, newest = lines = logged(subject, begun)
    comparison.exact("last line of the log", newest, {"step": step} | dict(values), LOG)
    steps = [line["step"] for line in lines if "train/loss" in line]
    due = [n for n in range(begun + 1, step + 1) if n == 1 or n % train.log_every == 0]
    comparison.exact("updates with a line in the log", steps, due, LOG)
    validated = [line["step"] for line in lines if "eval/loss" in line]
    every = [n for n in (train.validate_every, train.save_every) if n]
    due = [n for n in range(begun + 1, step) if any(n % often == 0 for often in every)]
    comparison.exact("updates after which was validated", validated, [*due, step], LOG)
    for line in lines:
        if "train/loss" not in line:
            continue
        passes = [(line["step"] - back) * subject.passes / subject.batches.steps_per_epoch for back in (0, 1)]
        found, expected = [line["train/epoch"]], [passes[0]]
        if not train.max_seconds and (train.max_steps or train.max_epochs):
            used = update.progress(train, line["step"] - 1, passes[1], 0.0)
            factor = update.rate_factor(subject.config.optimizer, line["step"] - 1, used)
            found.append(line["train/learning_rate"])
            expected.append(factor * subject.optimizers[0].param_groups[0]["initial_lr"])
        stage = f"epoch and learning rate of update {line['step']} in the log"
        # Products and quotients in fp64.
        pair = (torch.tensor(numbers, dtype=torch.float64) for numbers in (found, expected))
        comparison.close(stage, next(pair), next(pair), 1e-12, LOG)
