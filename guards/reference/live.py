"""The watch of a run's first updates that also derives them again.

    watch = DerivedSteps(subject, allowed, step, progress)     # used as FirstSteps is
    watch.after_save(values, is_last)  # after each validation and its checkpoint

What is compared is the share of the budget that is used; the change of sampled numbers of every parameter
with the reference's update by the gradient that the optimizer used, of Muon's matrices that of a whole one;
and what checkpoints hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from guards.faults import Fault
from guards.first_steps import FirstSteps
from guards.reference import saved
from guards.reference.comparison import Comparison, Differs
from guards.reference.rehearsal import trainable
from guards.reference.steps import change_tolerance
from reference import optimizers, update

DERIVED = 2  # Updates: of the second the moments are not zero.
ELEMENTS = 2**10  # Of each parameter that AdamW moves.
SMALL = 5e6  # Parameters that train: so small a checkpoint is read again in 0.1 s.
MATRIX = 2e9  # Multiplications for Muon's polynomials, above which a matrix is not derived again: 0.1 s.


class SampledParameter(NamedTuple):
    """Numbers of one parameter before an update, in fp64, and all that moves them."""

    places: Tensor  # (n,) into the flattened parameter; of a matrix of Muon's all, in order.
    before: Tensor
    gradient: Tensor
    moments: Mapping[str, Tensor]
    factor: float  # The schedule's share of the learning rate.


class DerivedSteps(FirstSteps):
    """`FirstSteps`, of whose arguments it has the same, and the reference's view of the first two updates."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.draw = np.random.Generator(np.random.PCG64())
        self.samples: dict[str, SampledParameter] = {}
        self.saves, self.begun = 0, saved.Begun(self.subject)

    def _forget(self) -> None:
        super()._forget()
        self.samples, self.tokens = {}, self.subject.state.tokens
        self.skipped = self.subject.state.skipped_updates

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        super()._before_step(optimizer, args, kwargs)
        if self.updates >= DERIVED:
            return
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        own = [(n, p) for n, p in trainable(self.subject.model).items() if id(p) in groups]
        own = [(name, p) for name, p in own if p.grad is not None]
        if isinstance(optimizer, torch.optim.AdamW):
            chosen = {name: self._places(p) for name, p in own}
        else:
            small = [(n, p) for n, p in own if 15 * p.numel() * min(p.shape) <= MATRIX]
            name, p = small[self.draw.integers(len(small))] if small else ("", torch.zeros(0))
            chosen = {name: torch.arange(p.numel(), device=p.device)} if small else {}
        for name, p in own:
            if name in chosen and p.grad is not None:
                group, places = groups[id(p)], chosen[name]
                factor = group["lr"] / group["initial_lr"] if group["initial_lr"] else 0.0
                moments = {key: _at(value, places) for key, value in optimizer.state.get(p, {}).items()}
                self.samples[name] = SampledParameter(
                    places, _at(p, places), _at(p.grad, places), moments, factor
                )

    def _places(self, p: Tensor) -> Tensor:
        """Return sampled places of a parameter, in no order."""
        most = min(ELEMENTS, p.numel())
        return torch.from_numpy(self.draw.integers(p.numel(), size=most)).to(p.device)

    def _faults(self, progress: float) -> Iterator[Fault]:
        yield from super()._faults(progress)
        if self.updates < DERIVED:
            comparison = Comparison()
            try:
                self._compare_counters(comparison)
                self._compare_budget(comparison)
                self._compare_changes(comparison)
            except Differs as difference:
                yield Fault("differs-from-reference", comparison.evidence(difference), difference.remedy)

    def _compare_counters(self, comparison: Comparison) -> None:
        """Compare by how much the counts of updates, targets and skipped updates rose."""
        state = self.subject.state
        comparison.exact(
            f"counts of updates, targets and skipped ones after update {self.step + 1}",
            (
                state.step - self.step,
                state.tokens - self.tokens,
                state.skipped_updates - self.skipped,
                state.skipped_in_a_row,
            ),
            (1, update.n_targets(self._labels()), 0, 0),
            "what an update adds to the counts that a checkpoint keeps",
        )

    def _compare_budget(self, comparison: Comparison) -> None:
        """Compare the share of the budget that is used, by which the schedule goes and the run ends."""
        subject, step = self.subject, self.subject.state.step
        train = subject.config.train
        epoch = step * subject.passes / subject.batches.steps_per_epoch
        expected = update.progress(train, step, epoch, subject.state.seconds)
        found = min(1.0, subject.progress())  # A last update may go past the end.
        # Some products and quotients in fp64: each rounds by 1e-16.
        found, expected = (torch.tensor(share, dtype=torch.float64) for share in (found, expected))
        remedy = "look at the counts of updates, seconds and epochs, and at what they are divided by"
        comparison.close(f"share of the budget after update {step}", found, expected, 1e-14, remedy)

    def _compare_changes(self, comparison: Comparison) -> None:
        """Compare the change of the sampled numbers with the reference's update."""
        parameters = trainable(self.subject.model)
        for name, sample in self.samples.items():
            p = parameters[name]
            rule = optimizers.rule_of(self.subject.config, name, p.dim())
            before, gradient, zero = sample.before, sample.gradient, torch.zeros_like(sample.before)
            if rule.optimizer == "muon":
                before, gradient, zero = (part.view(p.shape) for part in (before, gradient, zero))
                momentum = sample.moments.get("momentum", zero).view(p.shape)
                after, _ = optimizers.muon(before, gradient, momentum, rule, sample.factor)
            else:
                mean, square = (sample.moments.get(key, zero) for key in ("exp_avg", "exp_avg_sq"))
                moments = (mean, square, int(sample.moments.get("step", torch.zeros(()))))
                after, _ = optimizers.adamw(before, gradient, moments, rule, sample.factor)
            found, expected = _at(p, sample.places) - sample.before, (after - before).flatten()
            comparison.close(
                f"update {self.step + 1}, change of {name}",
                found,
                expected,
                change_tolerance(rule, before, expected, p.is_cuda, p.shape),
                "the optimizer's own arithmetic, or something that moves the weights beside it",
            )

    def after_save(self, values: Mapping[str, float], is_last: bool) -> bool:
        """Compare a checkpoint with the reference, and of the first and the last the scores too.

        Of large models only the first and the last are read again.

        Args:
            values: What is logged of the validation.

        Raises:
            Fault: The checkpoint or its scores are not what the reference derives.
        """
        known = len(self.passed)
        self.saves += 1
        whole = self.saves == 1 or is_last
        if whole or sum(p.numel() for p in trainable(self.subject.model).values()) <= SMALL:
            self._judge(saved.faults(self.subject, values, self.begun, whole))
        self.begun.manifests, self.begun.saves = saved.by_step(self.subject), self.saves
        return len(self.passed) > known


def _at(values: Tensor, places: Tensor) -> Tensor:
    """Return the numbers at these places in fp64; a single number, such as a count, as it is."""
    flat = values.detach().flatten()
    return (flat[places] if values.dim() else values.detach()).double().cpu()
