"""The guard of the first updates: what they really did, watched from outside the training loop.

    watch = FirstSteps(subject, allowed, step, progress)
    for each update: update(); watch.after(progress, skipped)   # raises Fault
    watch.finish()                                              # likewise
    watch.close()

The loop cannot deceive the watch: gradients, learning rates and forward passes are read by hooks, at the
moment the optimizer steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import IGNORE_INDEX, Batch
from guards.faults import Fault
from guards.ranks import RanksWatch, drift
from guards.subject import GuardSubject
from modules.dropout import Dropout
from training.optim import learning_rate_factor

WATCHED = 4  # Updates. Where heads and outputs start at zero, the first blocks move in the third.
SAMPLED = 2**16  # Elements of a frozen parameter that are compared.
PASSES, TARGETS = 8, 8  # Passes of one update, and targets of each, whose gradients are computed again.
NEXT_TO_NOTHING = 1e-20  # A gradient below this has a square, and a rounding, of zero.
APART = 0.1  # More than rounding to 16 bits changes, as a share of the right size.


class FirstSteps:
    """A watch over a run's updates.

    Gradients, rows and frozen weights are watched for `WATCHED` updates; in one of them also the size of the
    loss's gradient where it leaves the head, unless nothing below the head trains. The clip is watched until
    it acts; the schedule, the mode and the optimizers' steps are watched throughout.

    Args:
        allowed: Names of faults that are kept in `passed` instead of raised.
        step: Updates done before the first that it watches.
        progress: Share of the budget used by then.
    """

    def __init__(
        self, subject: GuardSubject, allowed: Iterable[str] = (), step: int = 0, progress: float = 0.0
    ):
        self.subject, self.allowed, self.passed = subject, set(allowed), list[Fault]()
        self.updates, self.step, self.progress, self.norm = 0, step, progress, 0.0
        self.sizes: dict[int, float] = {}  # By pass its gradient, as a multiple of what it should be.
        self.compared = False
        self.ranks = RanksWatch(subject) if subject.world.size > 1 else None
        some = min(PASSES, subject.passes)
        self.chosen = {number * (subject.passes - 1) // max(1, some - 1) for number in range(some)}
        self._forget()
        self.clip_acted = not subject.config.optimizer.grad_clip
        # The rows of new tokens get no gradient as long as the tokens do not occur.
        parameters = subject.model.named_parameters()
        self.still = {n for n, p in parameters if p.requires_grad and not n.endswith(".rows")}
        # With the buffers, which are the matrices of a base that is stored in fewer bits.
        state = subject.model.state_dict(keep_vars=True)
        self.frozen = {name: sample(t) for name, t in state.items() if not t.requires_grad}
        self.pulled = set[str]()  # The names of frozen tensors that had a gradient.
        self.hooks: list[Any] = [o.register_step_pre_hook(self._before_step) for o in subject.optimizers]
        self.hooks.append(subject.model.embed.register_forward_hook(self._count))
        self.hooks.append(subject.model.norm.register_forward_hook(self._keep_targets))

    def _forget(self) -> None:
        """Begin anew with what is noted of one update."""
        if self.ranks is not None:
            self.ranks.begin()
        self.forwards, self.norm, self.factors = 0, 0.0, set[float]()
        self.stepped = set[int]()  # The ids of optimizers.
        self.read: list[Tensor] = []  # The tokens of each pass.
        self.kept_gradient = self.undropped = False
        self.targets: dict[int, tuple[Tensor, Tensor]] = {}  # By pass hidden states (n, C) and labels (n,).
        self.gradients: dict[int, Tensor] = {}  # By pass (n, C).

    def _count(self, module: torch.nn.Module, args: Any, output: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        model = self.subject.model
        self.undropped |= any(m.p > 0 and not m.training for m in model.modules() if isinstance(m, Dropout))
        if self.updates < WATCHED:
            self.read.append(args[0])
            if self.ranks is not None:
                self.ranks.before_pass()
            if self.forwards == 0:
                self.kept_gradient = any(p.grad is not None and p.grad.any() for p in model.parameters())
        self.forwards += 1

    def _batch(self, number: int) -> Batch:
        """Return the batch of a pass of the update that is under way."""
        return self.subject.batches.batch(self.step * self.subject.passes + number)

    def _labels(self) -> list[Tensor]:
        """Return the labels of every pass of the update that is under way, those of other processes too."""
        batches = self.subject.batches
        if batches.world_size > 1:
            return [batches.whole(self.step).labels]
        return [self._batch(number).labels for number in range(self.subject.passes)]

    def _keep_targets(self, module: torch.nn.Module, args: Any, output: Tensor) -> None:
        """Keep some hidden states of one update that are to predict a token, and their gradients."""
        number = self.forwards - 1
        if self.compared or self.updates >= WATCHED or number not in self.chosen or not output.requires_grad:
            return
        tokens, labels, *_ = self._batch(number)
        if not torch.equal(self.read[-1].cpu(), tokens):  # `_faults` names it.
            return
        places = (labels.flatten() != IGNORE_INDEX).nonzero().flatten()
        places = places[:: max(1, len(places) // TARGETS)][:TARGETS]
        targets = labels.flatten()[places].to(output.device)
        if len(places):
            self.targets[number] = output.detach().flatten(0, 1)[places], targets

        def keep(gradient: Tensor) -> None:
            self.gradients[number] = gradient.flatten(0, 1)[places].double()

        output.register_hook(keep)

    def _compare_sizes(self) -> None:
        """Note by how much the gradients that came are larger than they should be, before the weights change.

        They should be those of the mean over the update's targets. A head that is next to zero hands next to
        nothing back; then the next update is compared.
        """
        optimizer, subject, head = self.subject.config.optimizer, self.subject, self.subject.model.head
        tokens = sum(int((labels != IGNORE_INDEX).sum()) for labels in self._labels())
        modes = {module: module.training for module in head.modules()}
        head.eval()  # Its adapter's dropout would use up the run's random numbers, and be noise here.
        for number, (hidden, labels) in self.targets.items():
            rows = hidden.requires_grad_()
            with torch.enable_grad(), subject.precision.autocast():
                logits = head(subject.model.to_head(rows)).float()
                loss = F.cross_entropy(
                    logits, labels, reduction="sum", label_smoothing=optimizer.label_smoothing
                )
                loss = loss + optimizer.z_loss * logits.logsumexp(-1).square().sum()
                (right,) = torch.autograd.grad(loss, rows)
            right = right.double() / tokens  # Divided in fp64: in fp16 it would be zero.
            found = self.gradients.get(number, torch.zeros_like(right))
            if right.abs().amax() > NEXT_TO_NOTHING:
                size = float((right * found).sum() / right.square().sum())
                self.sizes[number] = size / subject.scaler.get_scale()
        for module, training in modes.items():
            module.training = training
        self.compared = bool(self.sizes)
        self.targets, self.gradients = {}, {}

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.targets:
            self._compare_sizes()
        if self.ranks is not None and not self.stepped:
            self.ranks.before_step()
        self.stepped.add(id(optimizer))
        self.factors |= {g["lr"] / g["initial_lr"] for g in optimizer.param_groups if g["initial_lr"]}
        if self.updates < WATCHED and (self.still or self.frozen):
            given = {name: p.grad for name, p in self.subject.model.named_parameters() if p.grad is not None}
            self.still -= {name for name in self.still & given.keys() if given[name].any()}
            self.pulled |= self.frozen.keys() & given.keys()
        if not self.clip_acted:
            groups = [group for o in self.subject.optimizers for group in o.param_groups]
            gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            self.norm = max(self.norm, float(torch.nn.utils.get_total_norm(gradients)))

    def after(self, progress: float, skipped: bool = False) -> bool:
        """Judge an update; return whether a fault was let pass that was not known before.

        Args:
            progress: Share of the budget used by now.
            skipped: Whether the update was skipped, since its loss or gradient was not finite.

        Raises:
            Fault: A setting had no effect, a parameter gets no gradient or no update, or a frozen one moved.
        """
        known = len(self.passed)
        if not skipped:
            self._judge(self._faults(progress))
            self.updates += 1
            self.progress = progress
        self.step += 1
        self._forget()
        return len(self.passed) > known

    def _judge(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            if fault.name not in self.allowed:
                raise fault
            if fault.name not in {known.name for known in self.passed}:
                self.passed.append(fault)

    def _faults(self, progress: float) -> Iterator[Fault]:
        if self.ranks is not None:
            yield from self.ranks.faults(self.read, self.step)
        yield from self._step_faults()
        yield from self._data_faults()
        yield from self._schedule_faults(progress)
        if self.updates in (0, WATCHED - 1) or self.pulled:
            yield from self._moved(self.updates + 1)
        if self.updates == WATCHED - 1:
            yield from self._still()
            self.frozen = {}
            self._leave_ranks()

    def _step_faults(self) -> Iterator[Fault]:
        """Yield what is wrong with the clip, the passes, the optimizers and the mode of an update."""
        optimizer, train, step = self.subject.config.optimizer, self.subject.config.train, self.step
        if not self.clip_acted and self.norm > optimizer.grad_clip * 1.001:
            yield Fault(
                "clip-ignored",
                f"the gradient that update {step + 1} used has norm {self.norm:.4g}, and grad_clip is "
                f"{optimizer.grad_clip}",
                "clip after unscaling and before the optimizer steps",
            )
        self.clip_acted |= self.norm > optimizer.grad_clip * 0.999
        if self.forwards != self.subject.passes:
            n = self.subject.batches.world_size
            shared = f", of which each of {n} processes makes {self.subject.passes}" if n > 1 else ""
            yield Fault(
                "accumulation-ignored",
                f"update {step + 1} made {self.forwards} passes and accumulation is {train.accumulation}"
                f"{shared}",
                "step once in that many micro-batches",
            )
        if idle := [o for o in self.subject.optimizers if id(o) not in self.stepped]:
            yield Fault(
                "parameter-not-updated",
                f"{type(idle[0]).__name__}, of {len(self.subject.optimizers)} optimizers, made no step in "
                f"update {step + 1}, whose gradient is finite",
                "let every optimizer step once in an update",
            )
        if self.kept_gradient:
            yield Fault(
                "gradient-not-cleared",
                f"update {step + 1} began with a gradient that is not zero, and added its own to it",
                "clear the gradients of all optimizers after each step",
            )
        if self.undropped:
            yield Fault(
                "dropout-ignored",
                f"update {step + 1} ran with a dropout in evaluation mode, where it drops nothing",
                "switch the model to training mode before each update: a validation may have left it",
            )

    def _data_faults(self) -> Iterator[Fault]:
        """Yield what is wrong with the batches that an update read, and with the size of its gradient."""
        step = self.step
        first = step * self.subject.passes
        for number, tokens in enumerate(self.read, first):
            if not torch.equal(tokens.cpu(), self.subject.batches.batch(number).tokens):
                yield Fault(
                    "data-out-of-order",
                    f"pass {number - first + 1} of update {step + 1} did not read batch {number} of the run",
                    "count batches over all updates, also after --resume: else some repeat and others never "
                    "come",
                )
                break
        for number, size in self.sizes.items():
            if abs(size - 1) > APART:
                yield Fault(
                    "gradient-not-the-mean",
                    f"the gradient of pass {number + 1} of update {step + 1} is {size:.3g} times that of the "
                    "mean over the targets of the update",
                    "divide the summed loss of each pass by the tokens of all passes of the update",
                )
                break
        self.sizes = {}

    def _schedule_faults(self, progress: float) -> Iterator[Fault]:
        """Yield the learning rates of an update that the schedule does not give."""
        optimizer, step = self.subject.config.optimizer, self.step
        most = learning_rate_factor(optimizer, step, self.progress)  # Schedules only fall with progress.
        least = learning_rate_factor(optimizer, step, progress)
        for factor in self.factors:
            if not least - 1e-6 <= factor <= most + 1e-6:
                yield Fault(
                    "schedule-ignored",
                    f"update {step + 1} had {factor:.4g} of the learning rate, and the schedule says "
                    f"{least:.4g}",
                    "set the rate of every group before the optimizer steps",
                )

    def _moved(self, updates: int) -> Iterator[Fault]:
        state = self.subject.model.state_dict(keep_vars=True)
        moved = [name for name, old in self.frozen.items() if not torch.equal(sample(state[name]), old)]
        for name in [*moved, *self.pulled]:  # Each is told of once.
            self.frozen.pop(name, None)
        if self.pulled:
            yield Fault(
                "frozen-parameter-moved",
                f"{listed(sorted(self.pulled))} should be frozen and had a gradient by update {updates}",
                "freeze it with requires_grad_(False), and leave it so",
            )
            self.pulled = set()
        if moved:
            yield Fault(
                "frozen-parameter-moved",
                f"{listed(moved)} should be frozen and moved by update {updates}",
                "leave frozen parameters out of the optimizer and of weight decay",
            )

    def _still(self) -> Iterator[Fault]:
        if self.still:
            yield Fault(
                "parameter-without-gradient",
                f"{listed(sorted(self.still))} had no gradient in {WATCHED} updates",
                "look for a detached tensor, or a part that nothing reads",
            )

    def finish(self) -> bool:
        """Judge a run that ends; return what `after` does.

        Raises:
            Fault: In a run of fewer updates than WATCHED a frozen parameter moved.
        """
        known = len(self.passed)
        if 0 < self.updates < WATCHED:
            self._judge(self._moved(self.updates))
        return len(self.passed) > known

    def compare_weights(self) -> bool:
        """Judge whether all processes have the same weights; return what `after` does.

        Raises:
            Fault: They do not.
        """
        known = len(self.passed)
        self._judge(drift(self.subject.world, self.subject.model))
        return len(self.passed) > known

    def _leave_ranks(self) -> None:
        if self.ranks is not None:
            self.ranks.close()
            self.ranks = None

    def close(self) -> None:
        """Take the hooks away."""
        self._leave_ranks()
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


def sample(p: Tensor) -> Tensor:
    """Return a copy of at most SAMPLED elements, evenly spread."""
    flat = p.detach().flatten()
    return flat[:: -(-len(flat) // SAMPLED)].clone()


def listed(names: list[str]) -> str:
    """Return the first four names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
