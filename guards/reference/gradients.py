"""Comparison of an update's gradients with those of plain autograd over the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from dataset import Batch
from guards.reference.comparison import Comparison, relative_difference
from guards.reference.effective import config_of, weights_of
from guards.reference.rehearsal import ObservedUpdate, trainable
from guards.reference.rounding import MORE_THAN_SAMPLED, MOST_ROUNDING, SAMPLES_OF_ROUNDING, Rounding
from guards.subject import GuardSubject
from reference import update
from reference.forward import Rows, logits_of, nll_of, objective_of
from training.loss import token_loss

RARE = 64  # Of a rounding that is little: where terms cancel, a few tokens make all of the error.
FP32 = 2.0**-24  # The largest relative error of one rounding.


class Derived:
    """Loss and gradients of an update, by plain autograd over the reference, at the weights as they are now.

    Attributes:
        loss: The mean cross-entropy over the targets of all micro-batches.
        parts: By micro-batch the gradient of its summed objective, of every parameter.
        targets: The number of targets in each micro-batch.
    """

    def __init__(self, subject: GuardSubject, batches: list[Batch]):
        self.subject, self.batches = subject, [Batch(*(t.cpu() for t in batch)) for batch in batches]
        self.targets = [update.n_targets([batch.labels]) for batch in self.batches]
        # They are kept, since the update moves them before its gradients are compared.
        self.values = {name: p.detach().double().cpu() for name, p in trainable(subject.model).items()}
        settings = subject.config.optimizer
        self.loss, self.parts = self._derive(settings.label_smoothing, settings.z_loss)

    def _derive(
        self, smoothing: float, z_loss: float, error: float = 0.0
    ) -> tuple[float, list[dict[str, Tensor]]]:
        """Return loss and gradients, where every operation of the forward pass has a rounding error."""
        model = self.subject.model
        leaves = {name: value.clone().requires_grad_() for name, value in self.values.items()}
        by_id = {id(p): leaves[name] for name, p in trainable(model).items()}
        config = config_of(model, self.subject.config.model)
        nll, parts = 0.0, []
        for batch in self.batches:
            weights = weights_of(model, by_id)
            rows = Rows(batch.tokens, batch.positions, batch.document_ids)
            with Rounding(error):
                logits = logits_of(config, weights, rows)
            nll += float(nll_of(logits, batch.labels).detach().sum())
            loss = objective_of(logits, batch.labels, smoothing, z_loss)
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            given = zip(leaves.items(), found, strict=True)
            parts.append({name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in given})
        return nll / sum(self.targets), parts

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradient of the mean over all targets of the step."""
        return weighted(self.parts, [1 / sum(self.targets)] * len(self.parts))

    def mistakes(self) -> dict[str, Callable[[], dict[str, Tensor]]]:
        """Return what would make the gradients that each known mistake gives."""
        n, own = sum(self.targets), [1 / targets for targets in self.targets]
        settings = self.subject.config.optimizer
        known: dict[str, Callable[[], dict[str, Tensor]]] = {
            "each micro-batch divided by its own targets": lambda: weighted(self.parts, own),
            "a mean of the micro-batches' means": lambda: weighted(
                self.parts, [share / len(own) for share in own]
            ),
            "the first micro-batch only": lambda: weighted(self.parts[:1], [1 / n]),
            "the last micro-batch only": lambda: weighted(self.parts[-1:], [1 / n]),
        }
        if settings.label_smoothing:
            known["label smoothing left out"] = lambda: self._without(0.0, settings.z_loss)
        if settings.z_loss:
            known["z-loss left out"] = lambda: self._without(settings.label_smoothing, 0.0)
        return known

    def rounded(self, error: float) -> list[dict[str, Tensor]]:
        """Return samples of the gradients with the rounding errors of a format."""
        settings, n = self.subject.config.optimizer, sum(self.targets)
        samples = [
            self._derive(settings.label_smoothing, settings.z_loss, error)[1]
            for _ in range(SAMPLES_OF_ROUNDING)
        ]
        return [weighted(parts, [1 / n] * len(parts)) for parts in samples]

    def _without(self, smoothing: float, z_loss: float) -> dict[str, Tensor]:
        parts = self._derive(smoothing, z_loss)[1]
        return weighted(parts, [1 / sum(self.targets)] * len(parts))


def weighted(parts: list[dict[str, Tensor]], factors: list[float]) -> dict[str, Tensor]:
    """Return the weighted sum of gradients."""
    return {
        name: sum((part[name] * f for part, f in zip(parts, factors, strict=True)), torch.zeros(()).double())
        for name in parts[0]
    }


def error_of_product(subject: GuardSubject, dtype: torch.dtype) -> float:
    """Return the relative error of one product: rounding to `dtype`, and of a sum in fp32, a random walk.

    The longest sum is that of a hidden state's gradient over the vocabulary.
    """
    model = subject.config.model
    sums = FP32 * math.sqrt(max(model.n_inner, model.n_embd, subject.model.config.vocab_size))
    return torch.finfo(dtype).eps / 2 + sums


def gradient_tolerance(subject: GuardSubject, dtype: torch.dtype) -> float:
    """Return by how much rounding may change a gradient, relative to the largest of its module.

    A number passes about 12 products of a block forward and 24 backward. Errors of one sign in a row add up
    as a random walk does; a network multiplies them by some small number, for which 8 stands.
    """
    return 8 * math.sqrt(36 * len(subject.model.blocks) + 36) * error_of_product(subject, dtype)


def compare_unrounded(subject: GuardSubject, comparison: Comparison, expected: Derived) -> None:
    """Compare the gradients of training's loss in fp32 too, where it rounds its products to less.

    What is little, such as the share of label smoothing, is lost in the rounding of bf16. Only of models
    whose weights are all in fp32.
    """
    model, settings, batches = subject.model, subject.config.optimizer, expected.batches
    if subject.precision.dtype == torch.float32 or any(p.dtype != torch.float32 for p in model.parameters()):
        return
    model.train()
    parameters, losses = trainable(model), list[Tensor]()
    for batch in batches:
        own = Batch(*(t.to(subject.precision.device) for t in batch))
        losses.append(token_loss(model, own, settings.label_smoothing, settings.z_loss).objective)
    mean = torch.stack(losses).sum() / sum(expected.targets)
    found = torch.autograd.grad(mean, [*parameters.values()], allow_unused=True)
    own = {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
    compare_modules(comparison, "in fp32", own, expected, torch.float32)


def compare_gradients(
    subject: GuardSubject, comparison: Comparison, where: str, found: ObservedUpdate, expected: Derived
) -> None:
    """Compare the loss, and the gradient of every module: its weight and bias together.

    A bias before a softmax has a gradient of zero but for rounding, whose size is that of its weight's.
    """
    tolerance = gradient_tolerance(subject, subject.precision.dtype)
    loss, right = torch.tensor(found.logged["train/loss"]), torch.tensor(expected.loss)
    remedy = "training's loss: its targets, or what it is divided by"
    comparison.close(f"{where}, loss", loss, right, tolerance, remedy)
    compare_modules(comparison, where, found.gradients, expected, subject.precision.dtype)


def compare_modules(
    comparison: Comparison, where: str, found: Mapping[str, Tensor], expected: Derived, dtype: torch.dtype
) -> None:
    """Compare the gradient of every module, as far as rounding to the format of the products lets."""
    tolerance = gradient_tolerance(expected.subject, dtype)
    gradients, mistakes = expected.gradients(), expected.mistakes()
    modules: dict[str, list[str]] = {}
    for name in reversed(gradients):
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    samples: list[dict[str, Tensor]] = []
    for module, names in modules.items():
        own, right = flat(found, names, gradients), flat(gradients, names, gradients)
        allowed = tolerance
        if not relative_difference(own, right) <= tolerance:  # Where terms cancel, rounding weighs more.
            samples = samples or expected.rounded(error_of_product(expected.subject, dtype))
            noise = max(relative_difference(flat(sample, names, gradients), right) for sample in samples)
            allowed = max(tolerance, MORE_THAN_SAMPLED * noise, min(RARE * noise, 1e-3))
            if not allowed <= MOST_ROUNDING:
                reason = f"rounding to {dtype} alone may change it by {noise:.0%}"
                comparison.leave_out(f"{where}, gradient of {module}", reason)
                continue
        comparison.close(
            f"{where}, gradient of {module}",
            own,
            right,
            allowed,
            "the backward pass of what comes after it",
            {mistake: partial(_flat_of, wrong, names, gradients) for mistake, wrong in mistakes.items()},
        )


def flat(values: Mapping[str, Tensor], names: list[str], like: Mapping[str, Tensor]) -> Tensor:
    """Return the tensors of these names in one vector, with zeros for what is missing."""
    parts = [values.get(name, torch.zeros_like(like[name])).flatten().double().cpu() for name in names]
    return torch.cat(parts)


def _flat_of(
    derive: Callable[[], Mapping[str, Tensor]], names: list[str], like: Mapping[str, Tensor]
) -> Tensor:
    return flat(derive(), names, like)
