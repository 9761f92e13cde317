"""Which parameter learns how, and the two rules by which the optimizers move it.

    kind_of -> rule_of -> adamw or muon

A rule has all numbers that a parameter's update needs besides its gradient. Moments begin at zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from config import Config

# Muon's own momentum, which is no setting (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).
MUON_MOMENTUM = 0.95
# The polynomials a x + b x^3 + c x^5 that bring singular values in [1e-3, 1] near 1, one after another (Amsel
# et al. 2025, arXiv:2505.16932, algorithm 1 with five steps, and its listing).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
POLAR_SAFETY = 1.01  # A rounded spectral norm stays below 1, where the polynomials converge.


@dataclass(frozen=True)
class UpdateRule:
    """How one parameter moves.

    Attributes:
        optimizer: `adamw` or `muon`.
        rate: The learning rate before the schedule.
        weight_decay: Share of the parameter, times the rate, that an update takes away.
    """

    optimizer: str
    rate: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float


def kind_of(name: str, dimensions: int) -> str:
    """Return what a parameter is, by its name in the model.

    A vector (a norm's scale or shift, a bias, DoRA's magnitudes) is one wherever it stands. The low-rank
    matrices `a` and `b` of an adapter are of its adapter; rows and full copies that train are of the module
    that they stand in for.
    """
    if dimensions < 2:
        return "vectors"
    if ".adapters." in name and name.endswith((".a", ".b")):
        return "adapters"
    place = name.split(".")[0]
    return {"blocks": "matrices", "head": "head"}.get(place, "embeddings")


def rule_of(config: Config, name: str, dimensions: int) -> UpdateRule:
    """Return how a parameter moves, by the settings.

    Maximal update parametrisation (Yang et al. 2022, arXiv:2203.03466, table 3) divides AdamW's rate by the
    width multiplier where a matrix has inputs as wide as the model: in blocks and in the head. Muon's
    orthogonal updates are as large at every width, and keep their rate. LoRA+ (Hayou et al. 2024,
    arXiv:2402.12354) multiplies the rate of every adapter's B.
    """
    own = config.optimizer.resolved()
    kind = kind_of(name, dimensions)
    optimizer = "muon" if kind == "matrices" and own.name == "muon" else "adamw"
    rates = {"embeddings": own.embedding_lr, "head": own.head_lr}
    rate = own.muon_lr if optimizer == "muon" else rates.get(kind) or own.lr or 0.0
    if optimizer == "adamw" and kind in ("matrices", "head"):
        rate /= config.model.width_mult
    if kind == "adapters" and name.endswith(".b"):
        rate *= config.lora.lr_ratio
    decay = 0.0 if kind == "vectors" else own.weight_decay
    return UpdateRule(optimizer, rate, decay, own.beta1 or 0.0, own.beta2 or 0.0, own.eps or 0.0)


def decayed(parameter: Tensor, rule: UpdateRule, factor: float) -> Tensor:
    """Return a parameter less its decay, which is decoupled from the gradient (arXiv:1711.05101)."""
    return parameter * (1 - factor * rule.rate * rule.weight_decay)


def adamw(
    parameter: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor, int], rule: UpdateRule, factor: float
) -> tuple[Tensor, tuple[Tensor, Tensor, int]]:
    """Return a parameter after an update of AdamW, and its moments (arXiv:1412.6980, arXiv:1711.05101).

    Args:
        moments: Running means of the gradient and of its square, and how many updates made them.
        factor: The schedule's share of the learning rate.
    """
    mean, square, count = moments
    mean = rule.beta1 * mean + (1 - rule.beta1) * gradient
    square = rule.beta2 * square + (1 - rule.beta2) * gradient.square()
    count += 1
    # Both began at zero, and are this much too small (Kingma and Ba 2014, section 3).
    unbiased_mean = mean / (1 - rule.beta1**count)
    unbiased_square = square / (1 - rule.beta2**count)
    change = unbiased_mean / (unbiased_square.sqrt() + rule.eps)
    return decayed(parameter, rule, factor) - factor * rule.rate * change, (mean, square, count)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return about the nearest semi-orthogonal matrix, of a matrix (rows, columns) of any scale.

    Every polynomial is odd, so it acts on the singular values alone: X(a + b X^T X + c (X^T X)^2). They end
    between 0.7 and 1.2 where they were at least a thousandth of the Frobenius norm.
    """
    x = matrix / (matrix.norm() * POLAR_SAFETY + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        inner = x.T @ x if x.size(0) > x.size(1) else x @ x.T
        polynomial = a * torch.eye(len(inner), dtype=x.dtype) + b * inner + c * inner @ inner
        x = x @ polynomial if x.size(0) > x.size(1) else polynomial @ x
    return x


def momentum_of(gradient: Tensor, momentum: Tensor) -> Tensor:
    """Return the running mean of the gradients with the newest."""
    return MUON_MOMENTUM * momentum + (1 - MUON_MOMENTUM) * gradient


def muon(
    parameter: Tensor, gradient: Tensor, momentum: Tensor, rule: UpdateRule, factor: float
) -> tuple[Tensor, Tensor]:
    """Return a matrix (rows, columns) after an update of Muon, and its momentum (Jordan et al. 2024).

    The momentum is a running mean of gradients, and the update looks one step ahead of it (Nesterov). A tall
    matrix moves by sqrt(rows / columns) more, so that one rate fits all shapes (arXiv:2310.17813).
    """
    momentum = momentum_of(gradient, momentum)
    ahead = MUON_MOMENTUM * momentum + (1 - MUON_MOMENTUM) * gradient
    rows, columns = parameter.shape
    change = orthogonalised(ahead) * max(1.0, rows / columns) ** 0.5
    return decayed(parameter, rule, factor) - factor * rule.rate * change, momentum
