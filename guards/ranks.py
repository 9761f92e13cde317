"""What only several processes can get wrong, compared among them: settings, rows, seeds, gradients, weights.

    disagreement(world, settings)   # before anything is made
    drift(world, model)             # when the model is made, and at each validation
    watch = RanksWatch(subject)     # of the first updates; `FirstSteps` calls it

All processes call these at the same places, and all see the same fault.
"""

from __future__ import annotations

import functools
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from architecture import Decoder
from guards.faults import Fault
from guards.subject import GuardSubject
from modules.dropout import Dropout
from training.distributed import World

SAMPLED = 256  # Elements of each parameter whose gradients are added up again.
PARTS = 4  # Of each parameter's gradient, whose norms are compared.
APART = 0.1  # More than rounding to 16 bits changes, as a share of the right size.
CLIPPED = 0.99  # Of grad_clip: a gradient of this norm may have been clipped.
NEXT_TO_NOTHING = 1e-30  # A squared gradient below this says nothing.


def disagreement(world: World, known: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield the first thing that is not the same on all processes.

    Args:
        known: What this process knows, by name; it is sent as JSON.
    """
    first, *others = world.gather(dict(known))
    for rank, other in enumerate(others, 1):
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                yield Fault(
                    "ranks-disagree",
                    f"{name} is {first.get(name)!r} on process 0 and {other.get(name)!r} on process {rank}",
                    "start all processes with the same flags, code and versions",
                )
                return


def drift(world: World, model: Decoder) -> Iterator[Fault]:
    """Yield the first parameter whose numbers are not the same on all processes."""
    if world.size == 1:
        return
    own = {name: _sum(p) for name, p in model.named_parameters() if p.requires_grad}
    first, *others = world.gather(own)
    for rank, other in enumerate(others, 1):
        for name, total in first.items():
            if repr(total) != repr(other[name]):  # NaN is equal to itself here.
                yield Fault(
                    "ranks-drift",
                    f"the sum of {name} is {total!r} on process 0 and {other[name]!r} on process {rank}",
                    "begin with the same weights everywhere, and let the optimizers see the same gradients",
                )
                return


def _sum(t: Tensor) -> float:
    return float(t.detach().sum(dtype=torch.float64))


class RanksWatch:
    """A watch over what the processes read in an update, and over the gradient that they use together."""

    def __init__(self, subject: GuardSubject):
        self.subject, self.world = subject, subject.world
        named = subject.model.named_parameters()
        self.parameters = {name: p for name, p in named if p.requires_grad}
        self.hooks = [
            p.register_post_accumulate_grad_hook(functools.partial(self._keep, name))
            for name, p in self.parameters.items()
        ]
        self.begin()

    def begin(self) -> None:
        """Begin anew with what is noted of one update."""
        self.own: dict[str, Tensor] = {}  # By name sampled numbers of the gradient of the own rows.
        self.seed: int | None = None
        self.found: list[Fault] = []

    def before_pass(self) -> None:
        """Note by which random state the first pass of an update drops."""
        if self.seed is None:
            device = self.subject.precision.device
            state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
            self.seed = zlib.crc32(bytes(state.tolist()))

    def _keep(self, name: str, p: Tensor) -> None:
        if p.grad is not None:  # Of the last pass it is that of all passes.
            self.own[name] = _sampled(p, p.grad)

    def before_step(self) -> None:
        """Compare the gradient that is used with the sum of those of the processes."""
        used = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        # Of parts: in the first update only the head may have a gradient.
        parts = [(name, part) for name, g in used.items() for part in g.flatten().chunk(PARTS)]
        norms = [float(torch.linalg.vector_norm(part, dtype=torch.float64)) for _, part in parts]
        first, *others = self.world.gather([len(norms), *norms])
        for rank, other in enumerate(others, 1):
            if repr(first) != repr(other):
                self.found.append(_differs(first[1:], other[1:], rank, [name for name, _ in parts]))
                return
        scale = self.subject.scaler.get_scale()
        own = (
            torch.cat([self.own.get(name, _sampled(p, None)) for name, p in self.parameters.items()]) / scale
        )
        total = torch.tensor(self.world.sum(*own.tolist()), dtype=torch.float64)
        found = torch.cat([_sampled(p, p.grad) for p in self.parameters.values()])
        norm = sum(n * n for n in norms) ** 0.5
        self.found += self._compared(found, total, norm)

    def _compared(self, found: Tensor, total: Tensor, norm: float) -> Iterator[Fault]:
        """Yield how the gradient that is used, of this norm, is not the sum, or the sum that was clipped."""
        if float(total.square().sum()) < NEXT_TO_NOTHING:
            return
        size = float((found * total).sum() / total.square().sum())
        aligned = float((found * total).sum() / (found.norm() * total.norm()).clamp(min=NEXT_TO_NOTHING))
        clip = self.subject.config.optimizer.grad_clip
        shrunk = bool(clip) and norm > CLIPPED * clip
        n = self.world.size
        if aligned < 1 - APART**2:
            yield Fault(
                "gradient-not-averaged",
                f"the gradient that an update used has a cosine of {aligned:.3f} with the sum of those of "
                f"{n} processes",
                "add up the gradients of all processes before the clip",
            )
        elif size > 1 + APART or (size < 1 - APART and not shrunk):
            again = any(abs(size * by - 1) < APART for by in (n, 1 / n))
            yield Fault(
                "gradient-averaged-twice" if again else "clip-of-one-rank",
                f"the gradient that an update used is {size:.3g} times that of the mean over all targets of "
                f"{n} processes, and its norm {norm:.4g} is not that of a clip to {clip}",
                "divide by the targets of all processes, add up once, and clip by the norm of the sum",
            )

    def faults(self, read: list[Tensor], step: int) -> Iterator[Fault]:
        """Yield what the processes did wrong together in an update.

        Args:
            read: The tokens of each pass of this process.
            step: The number of the update, from 0.
        """
        yield from self._rows_faults(read, step)
        drops = any(m.p > 0 for m in self.subject.model.modules() if isinstance(m, Dropout))
        seeds = self.world.gather(self.seed)
        if drops and len(set(seeds)) < len(seeds):
            rank = next(rank for rank, seed in enumerate(seeds) if seed in seeds[:rank])
            yield Fault(
                "dropout-seeds-equal",
                f"process {rank} began update {step + 1} with the random numbers of process "
                f"{seeds.index(seeds[rank])}, so that both drop the same elements",
                "seed each pass by its first row",
            )
        yield from self.found

    def _rows_faults(self, read: list[Tensor], step: int) -> Iterator[Fault]:
        own = [_digest(row) for tokens in read for row in tokens]
        found = Counter(row for rows in self.world.gather(own) for row in rows)
        due = Counter(_digest(row) for row in self.subject.batches.whole(step).tokens)
        twice, missing = sum((found - due).values()), sum((due - found).values())
        if sum((found - due)[row] for row in due):
            yield Fault(
                "ranks-see-same-data",
                f"{twice} of {sum(found.values())} rows of update {step + 1} were read by more than one of "
                f"{self.world.size} processes",
                "let each process read its own range of the rows of an update",
            )
        elif missing:
            yield Fault(
                "rows-left-out-between-ranks",
                f"{missing} of {sum(due.values())} rows of update {step + 1} were read by none of "
                f"{self.world.size} processes",
                "let the ranges of the processes follow one another without a gap",
            )

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


def _places(p: Tensor) -> slice:
    """Return which of the numbers of a flattened parameter are sampled, evenly spread."""
    return slice(None, None, max(1, -(-p.numel() // SAMPLED)))


def _sampled(p: Tensor, gradient: Tensor | None) -> Tensor:
    """Return the sampled numbers of a gradient in fp64; zeros where a parameter has none."""
    return (
        (torch.zeros_like(p) if gradient is None else gradient).detach().flatten()[_places(p)].double().cpu()
    )


def _digest(row: Tensor) -> int:
    return zlib.crc32(row.cpu().numpy().tobytes())


def _differs(first: list[float], other: list[float], rank: int, names: list[str]) -> Fault:
    """Return what it is called that two processes use other gradients, by the norms of parts of each."""
    if len(first) != len(other):
        return Fault(
            "gradient-not-averaged",
            f"other parameters have a gradient on process {rank} than on process 0",
            "add up the gradients of all processes before the optimizers step",
        )
    most = max(range(len(first)), key=lambda i: first[i])
    factor = other[most] / first[most] if first[most] else 0.0
    in_step = all(abs(b - factor * a) <= 1e-3 * factor * a for a, b in zip(first, other, strict=True))
    evidence = (
        f"a part of the gradient of {names[most]} has norm {first[most]:.6g} on process 0 and "
        f"{other[most]:.6g} on process {rank}"
    )
    if in_step and factor:
        return Fault(
            "clip-of-one-rank",
            f"{evidence}, and all others differ by the same factor {factor:.4g}",
            "clip by the norm of the whole gradient, which is the same everywhere",
        )
    return Fault(
        "gradient-not-averaged", evidence, "add up the gradients of all processes before the optimizers step"
    )
