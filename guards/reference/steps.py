"""Comparison of the clip and of every parameter's step with the reference.

Both are derived from the gradient that the run itself has. AdamW and the clip act on each number alone, so
that of large parameters a sample is enough; Muon's matrices are derived whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from guards.reference.comparison import Comparison, Differs
from guards.reference.rehearsal import ObservedUpdate, trainable
from guards.subject import GuardSubject
from reference import optimizers, update

ELEMENTS = 2**13  # Of each parameter that AdamW moves.
PRODUCTS = 5e8  # Multiplications in fp64 for Muon's polynomials in one update: 0.05 s on two cores.
FP32 = 2.0**-24  # The largest relative error of one rounding.
MOST_LOST = 1e-3  # of a norm, by a sum in fp32; more is no rounding
LEAST = 2.0**-149  # The least number of fp32 above zero, to whose multiples tiny ones are rounded.
POLAR_GAIN = math.prod(a for a, _, _ in optimizers.POLAR_EXPRESS)  # By which the least singular values grow.


class Steps:
    """Successive updates, with the moments that the reference derives for them.

    Args:
        draw: What samples numbers and matrices with.
    """

    def __init__(self, subject: GuardSubject, comparison: Comparison, draw: np.random.Generator):
        self.subject, self.comparison, self.draw = subject, comparison, draw
        own = trainable(subject.model)
        self.rules = {name: optimizers.rule_of(subject.config, name, p.dim()) for name, p in own.items()}
        self.places = {name: self._places(name, p) for name, p in own.items()}
        states = {id(p): state for o in subject.optimizers for p, state in o.state.items()}
        self.moments: dict[str, dict[str, Tensor]] = {
            name: {key: self._at(name, value) for key, value in states.get(id(p), {}).items()}
            for name, p in own.items()
        }

    def _places(self, name: str, p: Tensor) -> Tensor | None:
        """Return sampled places of a parameter, or None where all are compared."""
        if self.rules[name].optimizer == "muon" or p.numel() <= ELEMENTS:
            return None
        return torch.from_numpy(self.draw.integers(p.numel(), size=ELEMENTS))

    def _at(self, name: str, values: Tensor) -> Tensor:
        """Return the compared numbers of a parameter's tensor in fp64; a count as it is."""
        places = self.places[name]
        chosen = values if places is None or not values.dim() else values.flatten()[places.to(values.device)]
        return chosen.detach().double().cpu()

    def compare_clip(self, where: str, found: ObservedUpdate) -> None:
        """Compare the gradient's norm, and the gradients that the optimizers used, with the clip."""
        norm = update.global_norm(found.gradients)
        tolerance = norm_tolerance(found.gradients)
        self.comparison.close(
            f"{where}, norm of all gradients",
            torch.tensor(found.logged["train/grad_norm"]),
            norm,
            tolerance,
            "the parameters that are clipped, or gradients that are still scaled",
        )
        # torch adds 1e-6 to the norm before it divides by it.
        factor = update.clip_factor(norm, self.subject.config.optimizer.grad_clip)
        tolerance += 1e-6 / max(float(norm), 1e-6)
        for name, whole in found.gradients.items():
            if name not in found.used:
                what = "its optimizer did not step, though its gradient is finite"
                raise Differs(f"{where}, step of {name}", what, "an optimizer that is left out")
            gradient = self._at(name, whole)
            self.comparison.close(
                f"{where}, clipped gradient of {name}",
                self._at(name, found.used[name]),
                gradient * factor,
                tolerance,
                "the clip: all parameters together, after unscaling",
                {"A gradient that is not clipped": lambda gradient=gradient: gradient},
            )

    def compare_steps(self, where: str, found: ObservedUpdate, factor: float) -> None:
        """Compare rate, moments and change of every parameter with the reference's update."""
        products = 0.0
        for name in self.draw.permutation(list(found.used)):
            rule, rate = self.rules[name], torch.tensor(found.rates[name])
            remedy = "the schedule, or the group that it is in"
            stage = f"{where}, learning rate of {name}"
            self.comparison.close(stage, rate, torch.tensor(rule.rate * factor), 1e-6, remedy)
            before, gradient = self._at(name, found.before[name]), self._at(name, found.used[name])
            products += 15 * before.numel() * min(before.shape) if rule.optimizer == "muon" else 0
            known = self.moments[name]
            after = self._derive(name, before, gradient, factor, products <= PRODUCTS)
            for key, expected in self.moments[name].items():
                value = self._at(name, torch.as_tensor(found.moments[name].get(key, torch.zeros(()))))
                stage = f"{where}, {key} of {name}"
                tolerance = moment_tolerance(known.get(key), gradient, expected, key)
                self.comparison.close(
                    stage, value, expected, tolerance, "the betas, or moments that were lost"
                )
            if after is None:
                continue
            on_gpu = found.after[name].is_cuda
            self.comparison.close(
                f"{where}, change of {name}",
                self._at(name, found.after[name]) - before,
                after - before,
                change_tolerance(rule, before, after - before, on_gpu, before.shape),
                "the optimizer's own arithmetic, or its decay",
            )

    def _derive(
        self, name: str, before: Tensor, gradient: Tensor, factor: float, affordable: bool
    ) -> Tensor | None:
        """Return a parameter after an update, and note its moments; None of a matrix that takes too long."""
        rule, known, zero = self.rules[name], self.moments[name], torch.zeros_like(gradient)
        if rule.optimizer == "muon":
            momentum = known.get("momentum", zero)
            self.moments[name] = {"momentum": optimizers.momentum_of(gradient, momentum)}
            return optimizers.muon(before, gradient, momentum, rule, factor)[0] if affordable else None
        count = int(known.get("step", torch.zeros(())))
        moments = (known.get("exp_avg", zero), known.get("exp_avg_sq", zero), count)
        after, (mean, square, count) = optimizers.adamw(before, gradient, moments, rule, factor)
        steps = torch.tensor(count, dtype=torch.float64)
        self.moments[name] = {"exp_avg": mean, "exp_avg_sq": square, "step": steps}
        return after


def norm_tolerance(gradients: Mapping[str, Tensor]) -> float:
    """Return by how much rounding may change the norm of all gradients, relative to it.

    On a CPU torch adds up the squares of a tensor one after another in fp32, and of many that are alike each
    is rounded to the same side: of 64,000 numbers by 2e-5. So what a sum in fp32 loses is seen by making one.
    """
    numbers, lost = 0, 0.0
    for gradient in gradients.values():
        numbers += gradient.numel()
        exact = float(gradient.double().norm())
        lost = max(lost, abs(float(torch.linalg.vector_norm(gradient.float())) / max(exact, LEAST) - 1))
    return FP32 * (8 + math.sqrt(numbers)) + min(2 * lost, MOST_LOST)


def moment_tolerance(known: Tensor | None, gradient: Tensor, expected: Tensor, key: str) -> float:
    """Return by how much rounding may change a moment, relative to its largest number.

    Its two terms may cancel, so that their rounding counts and not that of their sum. Next to zero fp32 has
    only multiples of its least number.
    """
    largest = float(expected.abs().amax()) if expected.numel() else 0.0
    if not largest:
        return 8 * LEAST
    term = gradient.square() if key == "exp_avg_sq" else gradient
    terms = max(float(term.abs().amax()), 0.0 if known is None else float(known.abs().amax()), largest)
    return 8 * (FP32 * terms + LEAST) / largest


def change_tolerance(
    rule: optimizers.UpdateRule, before: Tensor, change: Tensor, on_gpu: bool, shape: Sequence[int]
) -> float:
    """Return by how much rounding may change the change of a parameter, relative to its largest number.

    Decay and step round the parameter itself, thrice. AdamW rounds a handful of times beside; Muon's
    polynomials carry errors of sums of min(rows, columns) terms from the least singular values to 1.
    """
    largest = float(change.abs().amax()) if change.numel() else 0.0
    tolerance = 64 * FP32 + 6 * FP32 * float(before.abs().amax()) / (largest or 1.0)
    if rule.optimizer == "muon":
        tolerance += POLAR_GAIN * (2**-9 if on_gpu else FP32) * math.sqrt(min(shape))
    return tolerance
