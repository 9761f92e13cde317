"""What the first updates of a run really did, watched from outside the training loop.

    watch = FirstSteps(subject)
    for each of the first updates: update(); watch.after(step, progress)   # raises Fault

The loop cannot deceive the watch: gradients, learning rates and forward passes are read by hooks, at the
moment the optimizer steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optim import learning_rate_factor
from preflight import Fault, Subject

WATCHED = 4  # updates: where heads and outputs start at zero, the first blocks move in the third
SAMPLED = 2**16  # elements of a parameter that are compared


class FirstSteps:
    """Watches the first `WATCHED` updates, then takes its hooks away."""

    def __init__(self, subject: Subject):
        self.subject, self.seen = subject, 0
        self.forwards, self.norm, self.factors = 0, 0.0, set[float]()
        self.before = {name: sample(p) for name, p in subject.model.named_parameters()}
        self.hooks: list[Any] = [o.register_step_pre_hook(self._before_step) for o in subject.optimizers]
        self.hooks.append(subject.model.embed.register_forward_hook(self._count))

    def _count(self, module: torch.nn.Module, args: Any, output: Tensor) -> None:
        self.forwards += torch.is_grad_enabled()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        gradients = [p.grad for p in self.subject.model.parameters() if p.grad is not None]
        self.norm = max(self.norm, float(torch.nn.utils.get_total_norm(gradients)))
        self.factors |= {g["lr"] / g["initial_lr"] for g in optimizer.param_groups if g["initial_lr"]}

    def after(self, step: int, progress: float) -> None:
        """Call after each update.

        Args:
            step: Updates done before this one.
            progress: Share of the budget used by now.

        Raises:
            Fault: A setting had no effect, or a parameter moved that should not, or the reverse.
        """
        if not self.hooks:
            return
        if not self.factors:  # the update was skipped: nothing stepped
            self.forwards = 0
            return
        self._check(step, progress)
        self.seen += 1
        self.forwards, self.norm, self.factors = 0, 0.0, set()
        if self.seen == WATCHED:
            self._check_movement()
            self.close()

    def _check(self, step: int, progress: float) -> None:
        optimizer, train = self.subject.config.optimizer, self.subject.config.train
        if optimizer.grad_clip and self.norm > optimizer.grad_clip * 1.001:
            raise Fault(
                "clip-ignored",
                f"the gradient that update {step + 1} used has norm {self.norm:.4g}, and grad_clip is "
                f"{optimizer.grad_clip}",
                "clip after unscaling and before the optimizer steps",
            )
        if self.forwards != train.accumulation:
            raise Fault(
                "accumulation-ignored",
                f"update {step + 1} made {self.forwards} passes and accumulation is {train.accumulation}",
                "step once in that many micro-batches",
            )
        most = learning_rate_factor(optimizer, step, 0.0)  # schedules only fall with progress
        least = learning_rate_factor(optimizer, step, progress)
        for factor in self.factors:
            if not least - 1e-6 <= factor <= most + 1e-6:
                raise Fault(
                    "schedule-ignored",
                    f"update {step + 1} had {factor:.4g} of the learning rate, and the schedule says "
                    f"{most:.4g}",
                    "set the rate of every group before the optimizer steps",
                )

    def _check_movement(self) -> None:
        still, moved = [], []
        for name, p in self.subject.model.named_parameters():
            same = torch.equal(sample(p), self.before[name])
            if same and p.requires_grad and self.subject.start != "resumed":  # a rate may end at zero
                still.append(name)
            if not same and not p.requires_grad:
                moved.append(name)
        if moved:
            raise Fault(
                "frozen-parameter-moved",
                f"{listed(moved)} should be frozen and moved in {WATCHED} updates",
                "leave frozen parameters out of the optimizer and of weight decay",
            )
        if still:
            raise Fault(
                "parameter-did-not-move",
                f"{listed(still)} did not move in {WATCHED} updates",
                "look for a detached tensor, a parameter in no group, or a part that nothing reads",
            )

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


def sample(p: Tensor) -> Tensor:
    """A copy of at most SAMPLED elements, evenly spread."""
    flat = p.detach().flatten()
    return flat[:: -(-len(flat) // SAMPLED)].clone()


def listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
