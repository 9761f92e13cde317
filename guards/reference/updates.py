"""Comparison of backward pass, clip, schedule and optimizers with the reference, by a rehearsal.

Two updates of the run's own loop are made on two small ragged micro-batches, and undone. Gradients are
compared with those of plain autograd over the reference; what follows from them is derived from the run's own
gradient, so that each stage is judged alone, and by its own rounding.
"""

from __future__ import annotations

import dataclasses
import math
import secrets

import numpy as np
import torch

from dataset import IGNORE_INDEX, Batch
from guards.faults import Fault
from guards.first_steps import WATCHED, FirstSteps
from guards.ranks import RanksWatch
from guards.reference.comparison import Comparison, Differs
from guards.reference.gradients import Derived, compare_gradients, compare_unrounded
from guards.reference.rehearsal import (
    ObservedUpdate,
    observed,
    put_back,
    trainable,
    with_exercised_weights,
)
from guards.reference.steps import Steps
from guards.reference.stored import compare_stored
from guards.subject import GuardSubject, shortened
from reference import optimizers, update
from training.distributed import ALONE, World

UPDATES = 2  # The second one has moments, and gradients that should have been cleared.
LONGEST_ROW = 12  # Tokens; the other row has about half as many.
REHEARSED = 3e8  # Parameters that train: of more, copies of weights and moments would not fit beside the run.


def compare(subject: GuardSubject, comparison: Comparison) -> None:
    """Compare rules, schedule, restored moments and two rehearsed updates with the reference."""
    try:
        if subject.checkpoint is not None:
            compare_stored(subject, comparison, subject.checkpoint)
        compare_scaler(subject, comparison)
        compare_rules(subject, comparison)
        compare_schedule(subject, comparison)
        rehearse_if_small(subject, comparison, ALONE)
    except Differs as difference:
        better = named_fault(subject)
        raise better if better is not None else difference from None


def named_fault(subject: GuardSubject) -> Fault | None:
    """Return what the guard of the first updates says of the run's own, if it has a name for the fault.

    Of several processes this one alone cannot make the run's updates.
    """
    if subject.batches.world_size > 1:
        return None
    with put_back(subject):
        first_steps = FirstSteps(subject, (), subject.state.step, subject.progress())
        try:
            for _ in range(WATCHED):
                subject.update()
                first_steps.after(subject.progress(), subject.state.skipped_in_a_row > 0)
            first_steps.finish()
        except Fault as fault:
            return fault
        except ValueError:  # Updates that are not finite, which the run itself refuses.
            return None
        finally:
            first_steps.close()
    return None


# --- settings ---------------------------------------------------------------------------------------


def compare_scaler(subject: GuardSubject, comparison: Comparison) -> None:
    """See that gradients are scaled in fp16, which has no small numbers, and in no other format."""
    needed = subject.precision.dtype == torch.float16
    comparison.exact("scaling of gradients", subject.scaler.is_enabled(), needed, "it is for fp16 alone")


def compare_rules(subject: GuardSubject, comparison: Comparison) -> None:
    """Compare optimizer, rate, decay, betas and eps of every parameter with those of the settings."""
    found = {
        id(p): (type(optimizer).__name__.lower(), group)
        for optimizer in subject.optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for name, p in trainable(subject.model).items():
        rule = optimizers.rule_of(subject.config, name, p.dim())
        optimizer, group = found.get(id(p), ("none", {}))
        expected = [rule.rate, rule.weight_decay]
        values = [group.get("initial_lr"), group.get("weight_decay")]
        if rule.optimizer == "adamw":
            expected += [rule.beta1, rule.beta2, rule.eps]
            values += [*group.get("betas", ()), group.get("eps")]
        else:
            expected.append(optimizers.MUON_MOMENTUM)
            values.append(group.get("momentum"))
        comparison.exact(
            f"optimizer, rate, decay and betas of {name}",
            (optimizer, values),
            (rule.optimizer, expected),
            "the group that it is in, or a setting that did not arrive",
        )


def compare_schedule(subject: GuardSubject, comparison: Comparison) -> None:
    """Compare the rates that the run sets at the schedule's ends and corners.

    Raises:
        Fault: `schedule-ignored`, which is what a difference is called.
    """
    settings, step = subject.config.optimizer, subject.state.step
    groups = [group for optimizer in subject.optimizers for group in optimizer.param_groups]
    kept = [group["lr"] for group in groups]
    steps = {0, 1, max(0, settings.warmup_steps - 1), settings.warmup_steps, settings.warmup_steps + 1}
    corner = 1 - settings.cooldown
    shares = {0.0, 0.1, corner / 2, corner, (1 + corner) / 2, 0.5, 0.9, 1.0}
    try:
        for at, share in [(at, share) for at in sorted(steps) for share in sorted(shares)]:
            subject.state.step = at
            subject.set_rates(share)
            expected = update.rate_factor(settings, at, share)
            for group in groups:
                if not math.isclose(group["lr"], group["initial_lr"] * expected, rel_tol=1e-9, abs_tol=1e-15):
                    found = group["lr"] / group["initial_lr"]
                    raise Fault(
                        "schedule-ignored",
                        f"after {share:.0%} of the budget update {at + 1} would have {found:.4g} of the "
                        f"learning rate, and the schedule says {expected:.4g}",
                        "set the rate of every group by the step and by the share of the budget",
                    )
    finally:
        subject.state.step = step
        for group, rate in zip(groups, kept, strict=True):
            group["lr"] = rate
    comparison.exact("learning rates at the schedule's corners", True, True, "")


# --- the rehearsal ------------------------------------------------------------------------------------


def rehearse_if_small(subject: GuardSubject, comparison: Comparison, world: World) -> None:
    """Rehearse as `rehearse` does, if copies of what trains fit beside the run; of large models a part."""
    if sum(p.numel() for p in trainable(subject.model).values()) > REHEARSED:
        comparison.leave_out("a rehearsed update", f"more than {REHEARSED:,.0f} parameters train")
        return
    with shortened(subject.model):
        rehearse(subject, comparison, world)


def rehearse(subject: GuardSubject, comparison: Comparison, world: World) -> None:
    """Make two updates in a row, compare every quantity of each, and undo them.

    Args:
        world: The processes that make them, each on two micro-batches; the reference derives them from all.
    """
    draw = np.random.Generator(np.random.PCG64(world.told(secrets.randbits(64))))
    with put_back(subject), with_exercised_weights(subject.model):
        steps = Steps(subject, comparison, draw)
        for number in range(1, UPDATES + 1):
            batches = [random_batch(subject, draw, short) for short in (False, True) * world.size]
            progress = float(draw.uniform(0.1, 0.9))
            expected = Derived(subject, batches)
            if number == 1:
                compare_unrounded(subject, comparison, expected)
            factor = update.rate_factor(subject.config.optimizer, subject.state.step, progress)
            found = observed_among(world, subject, batches[2 * world.rank :][:2], progress)
            if not found.used and not all(bool(g.isfinite().all()) for g in found.gradients.values()):
                comparison.leave_out(f"update {number}", "its gradient was not finite")
                return
            where = f"rehearsed update {number}"
            trained = sorted(trainable(subject.model))
            comparison.exact(
                f"{where}, parameters that train", trained, sorted(expected.values), "what was unfrozen"
            )
            compare_gradients(subject, comparison, where, found, expected)
            steps.compare_clip(where, found)
            steps.compare_steps(where, found, factor)


def observed_among(world: World, subject: GuardSubject, own: list[Batch], progress: float) -> ObservedUpdate:
    """Observe an update that all processes make, each on its own micro-batches; the gradients are the sums.

    Raises:
        Fault: What only several processes get wrong, by its name.
    """
    if world.size == 1:
        return observed(subject, own, progress)
    watch = RanksWatch(subject)
    hook = subject.optimizers[0].register_step_pre_hook(lambda *_: watch.before_step())
    try:
        found = observed(subject, own, progress)
    finally:
        hook.remove()
        watch.close()
    for fault in watch.found:
        raise fault
    own_gradients = found.gradients
    sums = {
        name: world.sum_of(own_gradients.get(name, torch.zeros_like(p, dtype=torch.float64)))
        for name, p in trainable(subject.model).items()
    }
    return dataclasses.replace(found, gradients=sums)


def random_batch(subject: GuardSubject, draw: np.random.Generator, short: bool) -> Batch:
    """Return a micro-batch of random tokens: a row with padding, or two rows, one with two documents.

    The last ids of the vocabulary are among the tokens: those of new tokens may be all that trains.
    """
    length = max(2, min(LONGEST_ROW, subject.config.row_length) // (2 if short else 1))
    rows, size = 1 if short else 2, subject.config.model.vocab_size
    tokens = torch.from_numpy(draw.integers(size, size=(rows, length)))
    tokens[0, -2:] = size - 1 - torch.arange(min(2, length)) % size
    labels = torch.from_numpy(draw.integers(size, size=(rows, length)))
    documents = torch.zeros_like(tokens)
    positions = torch.arange(length).repeat(rows, 1)
    if short and length > 3:  # Padding at the end.
        documents[0, -1:], positions[0, -1:], labels[0, -2:] = -1, 0, IGNORE_INDEX
    elif length > 3:
        first = length // 3
        documents[-1, first:], positions[-1, first:] = 1, torch.arange(length - first)
        labels[-1, first - 1] = IGNORE_INDEX
    device = subject.precision.device
    return Batch(*(t.to(device) for t in (tokens, labels, documents, positions)))
