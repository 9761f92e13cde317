"""What the first updates of a run really did, watched from outside the training loop.

    watch = FirstSteps(subject)
    for each update: update(); watch.after(step, progress)   # raises Fault
    watch.close()

The loop cannot deceive the watch: gradients, learning rates and forward passes are read by hooks, at the
moment the optimizer steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from guards.subject import Fault, Subject
from optim import learning_rate_factor

WATCHED = 4  # updates: where heads and outputs start at zero, the first blocks move in the third
SAMPLED = 2**16  # elements of a frozen parameter that are compared


class FirstSteps:
    """Watches gradients and frozen weights for `WATCHED` updates, the clip until it acts, and the schedule.

    Args:
        allowed: Names of faults that are kept in `passed` instead of raised.
    """

    def __init__(self, subject: Subject, allowed: Iterable[str] = ()):
        self.subject, self.allowed, self.passed = subject, set(allowed), list[Fault]()
        self.seen, self.forwards, self.norm, self.factors = 0, 0, 0.0, set[float]()
        self.progress = 0.0  # by the update before
        self.clip_acted = not subject.config.optimizer.grad_clip
        # Rows of new tokens get none as long as the tokens do not occur.
        parameters = subject.model.named_parameters()
        self.still = {n for n, p in parameters if p.requires_grad and not n.endswith(".rows")}
        # Buffers too: the matrices of a base that is held in fewer bits.
        state = subject.model.state_dict(keep_vars=True)
        self.frozen = {name: sample(t) for name, t in state.items() if not t.requires_grad}
        self.hooks: list[Any] = [o.register_step_pre_hook(self._before_step) for o in subject.optimizers]
        self.hooks.append(subject.model.embed.register_forward_hook(self._count))

    def _count(self, module: torch.nn.Module, args: Any, output: Tensor) -> None:
        self.forwards += torch.is_grad_enabled()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.factors |= {g["lr"] / g["initial_lr"] for g in optimizer.param_groups if g["initial_lr"]}
        if self.seen < WATCHED and self.still:
            named = self.subject.model.named_parameters()
            self.still -= {name for name, p in named if p.grad is not None and p.grad.any()}
        if not self.clip_acted:
            gradients = [p.grad for p in self.subject.model.parameters() if p.grad is not None]
            self.norm = max(self.norm, float(torch.nn.utils.get_total_norm(gradients)))

    def after(self, step: int, progress: float) -> None:
        """Call after each update.

        Args:
            step: Updates done before this one.
            progress: Share of the budget used by now.

        Raises:
            Fault: A setting had no effect, a parameter gets no gradient, or a frozen one moved.
        """
        if not self.factors:  # the update was skipped: nothing stepped
            self.forwards, self.progress = 0, progress
            return
        for fault in self._faults(step, progress):
            if fault.name not in self.allowed:
                raise fault
            if fault.name not in {known.name for known in self.passed}:
                self.passed.append(fault)
        self.seen += 1
        self.forwards, self.norm, self.factors, self.progress = 0, 0.0, set(), progress

    def _faults(self, step: int, progress: float) -> Iterator[Fault]:
        optimizer, train = self.subject.config.optimizer, self.subject.config.train
        if not self.clip_acted and self.norm > optimizer.grad_clip * 1.001:
            yield Fault(
                "clip-ignored",
                f"the gradient that update {step + 1} used has norm {self.norm:.4g}, and grad_clip is "
                f"{optimizer.grad_clip}",
                "clip after unscaling and before the optimizer steps",
            )
        self.clip_acted |= self.norm > optimizer.grad_clip * 0.999
        if self.forwards != train.accumulation:
            yield Fault(
                "accumulation-ignored",
                f"update {step + 1} made {self.forwards} passes and accumulation is {train.accumulation}",
                "step once in that many micro-batches",
            )
        most = learning_rate_factor(optimizer, step, self.progress)  # schedules only fall with progress
        least = learning_rate_factor(optimizer, step, progress)
        for factor in self.factors:
            if not least - 1e-6 <= factor <= most + 1e-6:
                yield Fault(
                    "schedule-ignored",
                    f"update {step + 1} had {factor:.4g} of the learning rate, and the schedule says "
                    f"{least:.4g}",
                    "set the rate of every group before the optimizer steps",
                )
        if self.seen == WATCHED - 1:
            yield from self._still_and_moved()

    def _still_and_moved(self) -> Iterator[Fault]:
        state = self.subject.model.state_dict(keep_vars=True)
        moved = [name for name, old in self.frozen.items() if not torch.equal(sample(state[name]), old)]
        self.frozen = {}
        if moved:
            yield Fault(
                "frozen-parameter-moved",
                f"{listed(moved)} should be frozen and moved in {WATCHED} updates",
                "leave frozen parameters out of the optimizer and of weight decay",
            )
        if self.still:
            yield Fault(
                "parameter-without-gradient",
                f"{listed(sorted(self.still))} had no gradient in {WATCHED} updates",
                "look for a detached tensor, or a part that nothing reads",
            )

    def close(self) -> None:
        """Take the hooks away. A run of fewer updates than WATCHED ends without its last check."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


def sample(p: Tensor) -> Tensor:
    """A copy of at most SAMPLED elements, evenly spread."""
    flat = p.detach().flatten()
    return flat[:: -(-len(flat) // SAMPLED)].clone()


def listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
