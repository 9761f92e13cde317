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


def rotary_frequency(
    rotary_dim: int,
    theta: float,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return radians a position, (rotary_dim / 2), from 1 to about 1 / theta (RoFormer, arXiv:2104.09864)."""
    exponent = torch.arange(0, rotary_dim, 2, device=device).to(dtype) / rotary_dim
    # Published models were trained with this rounding; theta**-exponent has another.
    return 1 / theta**exponent


def rotary_tables(positions: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (B, T, 1, N), of positions (B, T) x frequency (N) or (B, 1, N).

    Computed in the frequency's format, never in bf16: there an angle is off by whole turns after some hundred
    positions.
    """
    angle = positions[..., None].to(frequency.dtype) * frequency
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
    ratio = factor * longest.clamp(min=context).to(frequency.dtype) / context - (factor - 1)
    exponent = torch.linspace(0, 1, frequency.numel(), device=frequency.device, dtype=frequency.dtype)
    return frequency * ratio[..., None] ** -exponent


def scale_llama3(frequency: Tensor, config: ModelConfig, longest: Tensor) -> Tensor:
    """Divide only frequencies with few turns in the first context, with a ramp (arXiv:2407.21783)."""
    turns = config.rope_context * frequency / (2 * math.pi)
    kept = ((turns - config.rope_low_freq) / (config.rope_high_freq - config.rope_low_freq)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / config.rope_factor)


def scale_yarn(frequency: Tensor, config: ModelConfig, longest: Tensor) -> Tensor:
    """Divide only slow frequencies, with a ramp over their numbers (YaRN, arXiv:2309.00071, section 3.2).

    Frequency i of N turns `beta` times in the first context where i = N log_theta(context / (2 pi beta)).
    """
    n, context = frequency.numel(), config.rope_context
    first, last = (
        n * math.log(context / (2 * math.pi * beta)) / math.log(config.rope_theta)
        for beta in (config.rope_beta_fast, config.rope_beta_slow)
    )
    if config.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * n - 1)
    width = last - first or 0.001  # Published code's, where both are one frequency.
    number = torch.arange(n, device=frequency.device, dtype=frequency.dtype)
    divided = ((number - first) / width).clamp(0, 1)
    return frequency * (1 - divided + divided / config.rope_factor)


def scale_longrope(frequency: Tensor, config: ModelConfig, longest: Tensor) -> Tensor:
    """Divide each frequency by a number that was searched for, (B, 1) -> (B, 1, N) (arXiv:2402.13753).

    There are two such lists: one for rows within the first context, and one for longer rows.
    """
    short, long = (
        torch.tensor(factors, device=frequency.device, dtype=frequency.dtype)
        for factors in (config.rope_short, config.rope_long)
    )
    return frequency / torch.where(longest[..., None] > config.rope_context, long, short)


ROPE_SCALINGS: dict[str, Callable[[Tensor, ModelConfig, Tensor], Tensor]] = {
    "none": scale_none,
    "linear": scale_linear,
    "dynamic": scale_dynamic,
    "llama3": scale_llama3,
    "yarn": scale_yarn,
    "longrope": scale_longrope,
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
        self.attention = config.rope_attention or 1.0

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the tables for a model whose numbers have the format `dtype`."""
        config, exact = self.config, torch.promote_types(dtype, torch.float32)
        frequency = rotary_frequency(config.rotary_dim, config.rope_theta, positions.device, exact)
        frequency = self.scale(frequency, config, positions.amax(dim=1, keepdim=True) + 1)
        cos, sin = rotary_tables(positions, frequency)
        return (cos, sin) if self.attention == 1 else (self.attention * cos, self.attention * sin)


def longest_generated(config: ModelConfig, length: int) -> int:
    """Return how many of `length` tokens a text may have that is generated, whose keys are rotated once.

    Past its first context a scaling by length rotates them anew.
    """
    if config.rotates_by_length:
        return min(length, config.rope_context)
    return length


def refuse_too_long(config: ModelConfig, length: int, cached: bool) -> None:
    """Refuse texts of `length` tokens that have no positions; `cached` if part of them was read before.

    Raises:
        ValueError: The table of positions is shorter, or a scaling by length would have to read all anew.
    """
    if config.position in ABSOLUTE_POSITIONS and length > config.block_size:
        raise ValueError(
            f"{length} tokens do not fit the model's {config.block_size} positions; "
            "shorten the text or train with a larger model.block_size"
        )
    if config.rotates_by_length and cached and length > config.rope_context:
        raise ValueError(
            f"{length} tokens pass the context of {config.rope_context}, where {config.rope_scaling} scaling "
            "has to read each length anew; shorten the text or read it without a cache"
        )
