"""Optimizers and learning-rate schedules: AdamW, Muon for matrices, and the parameters that each trains."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from config import OptimizerConfig

# Polar Express coefficients (Amsel et al. 2025, arXiv:2505.16932): each step is the best odd quintic for the
# singular values that the steps before leave, so five of them bring [1e-3, 1] near 1.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return about the nearest (semi-)orthogonal matrices: their singular values are between 0.7 and 1.2.

    A matrix is first divided by 1.01 times its Frobenius norm, plus 1e-7 (arXiv:2505.16932, its listing).

    Args:
        matrices: Matrices of any scale, (N, rows, columns).
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Uncompiled(torch.optim.Optimizer):
    """An optimizer that runs without torch's compiler, which each of these methods of torch would import.

    Their decorators import it to keep it off them. That takes 1.2 s of processor time, and nothing here
    compiles an optimizer.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def state_dict(self) -> dict[str, Any]:
        return inspect.unwrap(torch.optim.Optimizer.state_dict)(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        inspect.unwrap(torch.optim.Optimizer.load_state_dict)(self, state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        inspect.unwrap(torch.optim.Optimizer.zero_grad)(self, set_to_none)


class AdamW(Uncompiled, torch.optim.AdamW):
    """torch's AdamW."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        return inspect.unwrap(torch.optim.AdamW.step)(self, closure)


class Muon(Uncompiled):
    """Momentum whose update is made orthogonal, for matrices (Jordan et al. 2024, "Muon").

    Matrices of one shape are orthogonalised together in one batched product. The step is scaled by
    sqrt(max(1, rows / columns)), so that one learning rate fits all shapes.

    Args:
        params: Groups of two-dimensional parameters.
        lr: Size of the orthogonal update.
        momentum: Share that the running mean of gradients keeps; the update looks one step ahead (Nesterov).
        weight_decay: Share of a weight, times lr, that a step takes away (decoupled).
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.orthogonalise = orthogonalise  # Several processes may share the matrices.
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() != 2:
                    raise ValueError(f"Muon trains matrices; a parameter has {p.dim()} dimensions")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, parameters in by_shape.items():
                looked_ahead = []
                for p in parameters:
                    assert p.grad is not None
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    looked_ahead.append(p.grad.lerp(momentum, group["momentum"]))
                updates = self.orthogonalise(torch.stack(looked_ahead))
                size = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for p, update in zip(parameters, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-size)
        return loss


class ParameterGroup(NamedTuple):
    """Parameters that one optimizer moves at one learning rate."""

    kind: str  # `embeddings`, `head`, `vectors`, `adapters` or `matrices`.
    key: str  # The key of OptimizerConfig that gives the rate.
    lr: float
    weight_decay: float
    parameters: list[Tensor]
    optimizer: Literal["AdamW", "Muon"]


def parameter_groups(
    model: nn.Module, config: OptimizerConfig, lr_ratio: float = 1.0, width_mult: float = 1.0
) -> list[ParameterGroup]:
    """Return the trainable parameters by kind, without kinds that are not there.

    The arguments are those of `build_optimizers`.

    `vectors` (norms, biases, DoRA's magnitudes) never decay. The adapters' A and B are two groups.
    """
    config, keys = config.resolved(), config.rate_keys()
    members: dict[str, list[Tensor]] = {kind: [] for kind in ("embeddings", "head", "vectors", "a", "b")}
    members["matrices"] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() < 2:
            kind = "vectors"
        elif ".adapters." in name and name.endswith((".a", ".b")):
            kind = name[-1]
        elif name.startswith("blocks."):
            kind = "matrices"
        else:
            kind = "head" if name.startswith("head.") else "embeddings"
        members[kind].append(p)
    found = []
    for part, parameters in members.items():
        kind = "adapters" if part in ("a", "b") else part
        by_muon = keys[kind] == "muon_lr"
        lr = getattr(config, keys[kind])
        if part == "b":
            lr *= lr_ratio
        elif kind == "head" or (kind == "matrices" and not by_muon):
            lr /= width_mult
        decay = 0.0 if kind == "vectors" else config.weight_decay
        if parameters:
            name = "Muon" if by_muon else "AdamW"
            found.append(ParameterGroup(kind, keys[kind], lr, decay, parameters, name))
    return found


def groups_table(groups: Sequence[ParameterGroup], config: OptimizerConfig) -> str:
    """Return a line for each group: its optimizer, parameters, rate, and the setting that gives the rate."""
    own = config.resolved()
    lines = [
        f"{g.optimizer:<5} {sum(p.numel() for p in g.parameters):>13,} parameters, {g.kind:<10} "
        f"learning rate {g.lr:<8.6g} optimizer.{g.key}"
        for g in groups
    ]
    betas = f"beta1 {own.beta1:g}, beta2 {own.beta2:g}, eps {own.eps:g}, "
    betas = betas if any(g.optimizer == "AdamW" for g in groups) else ""
    return "\n".join([*lines, f"AdamW with {betas}weight decay {own.weight_decay:g}"])


def build_optimizers(
    model: nn.Module, config: OptimizerConfig, lr_ratio: float = 1.0, width_mult: float = 1.0
) -> list[torch.optim.Optimizer]:
    """Return AdamW for all, or Muon for the blocks' matrices and AdamW for the rest, with adapters.

    Vectors (norms, biases) never decay. Every trainable parameter is in exactly one group (asserted). Each
    group keeps its own `initial_lr`, which the schedule scales.

    Args:
        lr_ratio: Learning rate of the adapters' B over that of their A (LoRA+, arXiv:2402.12354).
        width_mult: How many times as wide the model is as the one that the rates are of (ModelConfig). Those
            of AdamW for matrices whose inputs are as wide as the model are divided by it (arXiv:2203.03466,
            table 3). Those for embeddings and vectors stay, and so does Muon's: a step of it has the same
            spectral norm for its shape at every width (arXiv:2310.17813).
    """
    config = config.resolved()
    trainable = [p for p in model.parameters() if p.requires_grad]
    found = parameter_groups(model, config, lr_ratio, width_mult)
    plain: dict[str, list[dict[str, Any]]] = {"Muon": [], "AdamW": []}
    for g in found:
        plain[g.optimizer].append({"params": g.parameters, "lr": g.lr, "weight_decay": g.weight_decay})
    optimizers: list[torch.optim.Optimizer] = []
    if plain["Muon"]:
        optimizers.append(Muon(plain["Muon"], lr=config.muon_lr))
    if plain["AdamW"]:
        fused = all(p.device.type in ("cpu", "cuda") for p in trainable)
        assert config.beta1 is not None and config.beta2 is not None and config.eps is not None
        betas = (config.beta1, config.beta2)
        optimizers.append(AdamW(plain["AdamW"], betas=betas, eps=config.eps, fused=fused))

    grouped = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(grouped) == sorted(map(id, trainable)), "a parameter is in no group, or in two"
    for optimizer in optimizers:
        for g in optimizer.param_groups:
            g["initial_lr"] = g["lr"]
    return optimizers


# --- schedules: from progress in [0, 1] to a factor in [0, 1] ----------------------------------------


def cosine(progress: float, cooldown: float) -> float:
    """Fall from 1 to 0 by half a cosine (Loshchilov and Hutter 2016, arXiv:1608.03983)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float, cooldown: float) -> float:
    """Fall linearly from 1 to 0."""
    return 1 - progress


def constant(progress: float, cooldown: float) -> float:
    """Stay at 1."""
    return 1.0


def warmup_stable_decay(progress: float, cooldown: float) -> float:
    """Stay at 1, then fall linearly to 0 in the last share, `cooldown` (Hu et al. 2024, arXiv:2404.06395)."""
    return min(1.0, (1 - progress) / cooldown) if cooldown > 0 else 1.0


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "wsd": warmup_stable_decay,
}


def learning_rate_factor(config: OptimizerConfig, step: int, progress: float) -> float:
    """Return the number that all learning rates are multiplied by.

    Args:
        step: Updates done so far; the first `warmup_steps` rise linearly.
        progress: Share of the budget used, in [0, 1]: of steps, epochs or seconds, whichever ends first. A
            run with a wall-clock budget can then decay to the end of a length that nobody knows in steps.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay = SCHEDULES[config.schedule](min(1.0, progress), config.cooldown)
    return warmup * (config.min_lr_factor + (1 - config.min_lr_factor) * decay)
