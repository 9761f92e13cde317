"""Where a token stands: tables that are added to the embedding, and rotations of queries and keys.

Shapes: B rows, T tokens, H heads, n rotated dimensions of a head, N = n / 2 frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from config import ModelConfig


class SinusoidalPosition(nn.Module):
    """Fixed sines and cosines (Vaswani et al. 2017, arXiv:1706.03762, section 3.5)."""

    table: Tensor

    def __init__(self, n_positions: int, size: int):
        super().__init__()
        frequency = torch.exp(torch.arange(0, size, 2).float() * (-math.log(10_000.0) / size))
        angle = torch.arange(n_positions).float()[:, None] * frequency
        table = torch.zeros(n_positions, size)
        table[:, 0::2] = angle.sin()
        table[:, 1::2] = angle.cos()[:, : size // 2]
        self.register_buffer("table", table, persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        return self.table[positions]


ABSOLUTE_POSITIONS: dict[str, type[nn.Embedding] | type[SinusoidalPosition]] = {
    "learned": nn.Embedding,
    "sinusoidal": SinusoidalPosition,
}


def rotary_frequency(rotary_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Return radians a position, (rotary_dim / 2), from 1 to about 1 / theta (RoFormer, arXiv:2104.09864)."""
    exponent = torch.arange(0, rotary_dim, 2, device=device).float() / rotary_dim
    # Published models were trained with this rounding; theta**-exponent has another.
    return 1 / theta**exponent


def rotary_tables(positions: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (B, T, 1, N), of positions (B, T) x frequency (N) or (B, 1, N).

    Always computed in fp32: a bf16 angle is off by whole turns after some hundred positions.
    """
    angle = positions[..., None].float() * frequency
    return angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)


def scale_none(frequency: Tensor, config: ModelConfig, longest: Tensor) -> Tensor:
    """Leave the frequencies as they are."""
    return frequency


def scale_linear(frequency: Tensor, config: ModelConfig, longest: Tensor) -> Tensor:
    """Squeeze positions together (Chen et al. 2023, arXiv:2306.15595)."""
    return frequency / config.rope_factor


def scale_dynamic(frequency: Tensor, config: ModelConfig, longest: Tensor) -> Tensor:
    """Scale by the length of each row's text, (B, 1) -> (B, 1, N): NTK (arXiv:2309.00071, appendix B.2).

    The lowest frequency is divided by `ratio`, the highest kept: a base grown by ratio^(2N / (2N - 2)).
    """
    factor, context = config.rope_factor, config.rope_context
    ratio = factor * longest.clamp(min=context).float() / context - (factor - 1)
    exponent = torch.linspace(0, 1, frequency.numel(), device=frequency.device)
    return frequency * ratio[..., None] ** -exponent


def scale_llama3(frequency: Tensor, config: ModelConfig, longest: Tensor) -> Tensor:
    """Divide only frequencies with few turns in the first context, with a ramp (arXiv:2407.21783)."""
    turns = config.rope_context * frequency / (2 * math.pi)
    kept = ((turns - config.rope_low_freq) / (config.rope_high_freq - config.rope_low_freq)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / config.rope_factor)


ROPE_SCALINGS: dict[str, Callable[[Tensor, ModelConfig, Tensor], Tensor]] = {
    "none": scale_none,
    "linear": scale_linear,
    "dynamic": scale_dynamic,
    "llama3": scale_llama3,
}


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + n/2]) of x (B, T, H, n), as Llama lays them out."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[2i], x[2i + 1]) of x (B, T, H, n), as CodeGen lays them out.

    On a CPU they are multiplied as complex numbers, which lie in memory like that: to take every second
    element by itself takes 2.3 times as long.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # a compiler knows no complex numbers
        exact = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        pairs = torch.view_as_complex(exact.unflatten(-1, (-1, 2)))
        turned = pairs * torch.complex(cos.to(exact.dtype), sin.to(exact.dtype))
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


ROTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "half": rotate_half,
    "interleaved": rotate_interleaved,
}


class RotaryTables:
    """cos and sin of positions (B, T), each (B, T, 1, N), by the frequencies and the scaling of a model."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.scale = ROPE_SCALINGS[config.rope_scaling]

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        frequency = rotary_frequency(self.config.rotary_dim, self.config.rope_theta, positions.device)
        frequency = self.scale(frequency, self.config, positions.amax(dim=1, keepdim=True) + 1)
        return rotary_tables(positions, frequency)


def longest_generated(config: ModelConfig, length: int) -> int:
    """Return how many of `length` tokens a text may have that is generated, whose keys are rotated once.

    Past its first context a dynamic scaling rotates them anew with each token.
    """
    if config.position == "rotary" and config.rope_scaling == "dynamic":
        return min(length, config.rope_context)
    return length


def refuse_too_long(config: ModelConfig, length: int, cached: bool) -> None:
    """Refuse texts of `length` tokens that have no positions; `cached` if part of them was read before.

    Raises:
        ValueError: The table of positions is shorter, or a dynamic scaling would have to read all anew.
    """
    if config.position in ABSOLUTE_POSITIONS and length > config.block_size:
        raise ValueError(
            f"{length} tokens do not fit the model's {config.block_size} positions; "
            "shorten the text or train with a larger model.block_size"
        )
    is_dynamic = config.position == "rotary" and config.rope_scaling == "dynamic"
    if is_dynamic and cached and length > config.rope_context:
        raise ValueError(
            f"{length} tokens pass the context of {config.rope_context}, where dynamic scaling has "
            "to read each length anew; shorten the text or read it without a cache"
        )
