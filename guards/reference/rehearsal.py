"""A rehearsal: updates of the run's own loop on small micro-batches, observed by hooks and then undone.

Inside `put_back(subject)` the run's objects may train. Afterwards weights, gradients, moments, learning
rates, the scaler, modes and counters are what they were, bit for bit: optimizers and scaler work on copies of
their state, and the very tensors are put back.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from architecture import Decoder
from dataset import Batch
from guards.subject import GuardSubject, with_nonzero_weights

SCALE_IN_FP16 = 2.0**10  # Where a rehearsal begins: the run's own start at 2**16 may skip its first updates.
NOISE = 0.1  # On norms, biases and lengths, so that none is at a value that hides a fault.


@dataclass(frozen=True)
class ObservedUpdate:
    """What one update did; tensors are copies, by the name of the parameter.

    Attributes:
        logged: What the loop logs of it.
        gradients: The gradient of all micro-batches, without the scaler's factor, before the clip.
        used: The gradient that the optimizer stepped with; without those whose optimizer did not step.
        rates: The learning rate that it stepped with.
        moments: The optimizer's state of the parameter afterwards.
    """

    logged: dict[str, float]
    before: dict[str, Tensor]
    gradients: dict[str, Tensor]
    used: dict[str, Tensor]
    rates: dict[str, float]
    after: dict[str, Tensor]
    moments: dict[str, dict[str, Any]]


def trainable(model: Decoder) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that train by name, tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def put_back(subject: GuardSubject) -> Iterator[None]:
    """Let the run's objects train, and put everything back afterwards."""
    with _same_training_state(subject), _same_weights(subject.model):
        yield


@contextlib.contextmanager
def with_exercised_weights(model: Decoder) -> Iterator[None]:
    """Bring weights out of zero, and norms, biases and lengths away from where they start; without dropout.

    Afterwards matrices and dropouts are what they were; `put_back` does the same for what trains.
    """
    with with_nonzero_weights(model), _without_dropout(model):
        with torch.no_grad():
            for p in trainable(model).values():
                if p.dim() < 2:
                    p.add_(torch.randn_like(p), alpha=NOISE)
        yield


@contextlib.contextmanager
def _same_training_state(subject: GuardSubject) -> Iterator[None]:
    """Put back optimizers, scaler and counters, which work on copies meanwhile."""
    optimizers, scaler, state = subject.optimizers, subject.scaler, subject.state
    counters = dataclasses.asdict(state)
    moments = [optimizer.state for optimizer in optimizers]
    groups = [[dict(group) for group in optimizer.param_groups] for optimizer in optimizers]
    of_scaler = scaler.__dict__
    try:
        for optimizer in optimizers:
            copies = {p: copy.deepcopy(own) for p, own in optimizer.state.items()}
            optimizer.state = defaultdict(dict, copies)
        scaler.__dict__ = copy.deepcopy(of_scaler)
        if scaler.is_enabled():
            scaler.load_state_dict(scaler.state_dict() | {"scale": SCALE_IN_FP16})
        yield
    finally:
        scaler.__dict__ = of_scaler
        for optimizer, own, kept in zip(optimizers, moments, groups, strict=True):
            optimizer.state = own
            for group, values in zip(optimizer.param_groups, kept, strict=True):
                group.clear()
                group.update(values)
        for name, value in counters.items():
            setattr(state, name, value)


@contextlib.contextmanager
def _same_weights(model: Decoder) -> Iterator[None]:
    """Put back the parameters that train, their gradients, which of all train, and all modes."""
    trains = {p: p.requires_grad for p in model.parameters()}
    kept = [(p, p.detach().clone(), p.grad) for p in trainable(model).values()]
    modes = {module: module.training for module in model.modules()}
    try:
        for p, _, _ in kept:
            p.grad = None
        yield
    finally:
        with torch.no_grad():
            for p, before, gradient in kept:
                p.copy_(before)
                p.grad = gradient
        for p, requires_grad in trains.items():
            p.requires_grad_(requires_grad)
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _without_dropout(model: Decoder) -> Iterator[None]:
    """Set the probability of every dropout to zero, those of adapters included."""
    modules: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "p", None), float)]
    kept = [(module, module.p) for module in modules]
    try:
        for module in modules:
            module.p = 0.0
        yield
    finally:
        for module, p in kept:
            module.p = p


def observed(subject: GuardSubject, micro_batches: list[Batch], progress: float) -> ObservedUpdate:
    """Make an update of the run on micro-batches, as of a share of the budget, and note all that it does."""
    parameters = trainable(subject.model)
    groups = {id(p): g for o in subject.optimizers for g in o.param_groups for p in g["params"]}
    states = {id(p): o.state for o in subject.optimizers for g in o.param_groups for p in g["params"]}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    gradients: dict[str, Tensor] = {}
    used: dict[str, Tensor] = {}
    scale = subject.scaler.get_scale()

    def accumulated(name: str) -> Any:
        def note(p: Tensor) -> None:
            assert p.grad is not None
            gradients[name] = p.grad.detach().double() / scale

        return note

    def stepping(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, p in parameters.items():
            if id(p) in own and p.grad is not None:
                used[name] = p.grad.detach().clone()

    hooks = [p.register_post_accumulate_grad_hook(accumulated(name)) for name, p in parameters.items()]
    hooks += [optimizer.register_step_pre_hook(stepping) for optimizer in subject.optimizers]
    try:
        logged = subject.update_on(micro_batches, progress)
    finally:
        for hook in hooks:
            hook.remove()
    return ObservedUpdate(
        logged=logged,
        before=before,
        gradients=gradients,
        used=used,
        rates={name: float(groups[id(p)]["lr"]) for name, p in parameters.items() if id(p) in groups},
        after={name: p.detach().clone() for name, p in parameters.items()},
        moments={
            name: copy.deepcopy(dict(states[id(p)][p])) if id(p) in states and p in states[id(p)] else {}
            for name, p in parameters.items()
        },
    )
