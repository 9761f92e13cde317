"""Where a token stands, and what it may look at: positions as tables and rotations, and the attention mask.

Shapes: B rows, T tokens, H heads, D = head_dim, n = rotary_dim, N = n / 2 frequencies. All in fp64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from config import ModelConfig


def visible(documents: Tensor, window: int = 0) -> Tensor:
    """Return which keys each query sees, (B, T, T): those of its document, up to itself, within the window.

    Args:
        documents: (B, T) the number of each token's document.
        window: How many tokens a token sees, itself among them (arXiv:2004.05150); 0 sees all.
    """
    index = torch.arange(documents.size(1), device=documents.device)
    distance = index[:, None] - index[None, :]
    seen = (distance >= 0) & (documents[:, :, None] == documents[:, None, :])
    return seen & (distance < window) if window else seen


def window_of(config: ModelConfig, layer: int) -> int:
    """Return the sliding window of a layer: all layers have it where none is named, else the named ones."""
    has_window = not config.window_layers or layer in config.window_layers
    return config.sliding_window if has_window else 0


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Return the sines and cosines of positions, (..., width) (arXiv:1706.03762, section 3.5).

    Dimension 2i is sin(p / 10000^(2i / width)), and dimension 2i + 1 the cosine of the same angle.
    """
    even = torch.arange(0, width, 2, dtype=torch.float64)
    angle = positions[..., None].double() / 10_000 ** (even / width)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)[..., :width]


def frequencies(config: ModelConfig, positions: Tensor) -> Tensor:
    """Return the radians by which each pair of dimensions turns a position, (B, 1, N) (arXiv:2104.09864).

    Pair i turns by theta^(-2i / n). Scalings reach past `rope_context`, the first context:

    - linear (arXiv:2306.15595): every angle is divided by the factor.
    - dynamic (arXiv:2309.00071, appendix B.2): once a row's text is longer than the first context, theta
      grows by (factor * length / context - (factor - 1))^(n / (n - 2)), so that the slowest pair turns as if
      the text were no longer, and the fastest as before.
    - llama3 (arXiv:2407.21783): pairs with fewer than `low` turns in the first context are divided by the
      factor, those with more than `high` stay, and in between a ramp leads from one to the other.
    - yarn (arXiv:2309.00071, section 3.2): a ramp over the numbers of the pairs leads from the last pair that
      stays, which has beta_fast turns in the first context, to the first that is divided by the factor, which
      has beta_slow. Both numbers are rounded outwards, unless the settings say that they are not.
    - longrope (arXiv:2402.13753): each pair is divided by a number of its own, of one list in rows that the
      first context holds, and of another in longer rows.
    """
    n, factor = config.rotary_dim, config.rope_factor
    exponent = torch.arange(0, n, 2, dtype=torch.float64) / n
    theta = torch.full((len(positions), 1, 1), config.rope_theta, dtype=torch.float64)
    if config.rope_scaling == "dynamic":
        length = positions.amax(dim=1).double() + 1
        stretch = (factor * length / config.rope_context - (factor - 1)).where(
            length > config.rope_context, torch.ones_like(length)
        )
        theta = theta * stretch[:, None, None] ** (n / (n - 2))
    turning = theta**-exponent
    if config.rope_scaling == "linear":
        return turning / factor
    if config.rope_scaling == "llama3":
        turns = turning * config.rope_context / (2 * math.pi)
        low, high = config.rope_low_freq, config.rope_high_freq
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return kept * turning + (1 - kept) * turning / factor
    if config.rope_scaling == "yarn":
        divided = yarn_ramp(config)
        return (1 - divided) * turning + divided * turning / factor
    if config.rope_scaling == "longrope":
        is_long = positions.amax(dim=1)[:, None, None] >= config.rope_context
        short, long = (torch.tensor(x, dtype=torch.float64) for x in (config.rope_short, config.rope_long))
        return turning / long.where(is_long, short)
    return turning


def yarn_ramp(config: ModelConfig) -> Tensor:
    """Return the share, 0 to 1, of each pair (N) that YaRN divides.

    Pair i has L theta^(-2i / n) / (2 pi) turns in a context of L tokens. Solved for i, `beta` turns are those
    of pair n ln(L / (2 pi beta)) / (2 ln theta).
    """
    n, turns = config.rotary_dim, config.rope_context / (2 * math.pi)
    kept = n * math.log(turns / config.rope_beta_fast) / (2 * math.log(config.rope_theta))
    squeezed = n * math.log(turns / config.rope_beta_slow) / (2 * math.log(config.rope_theta))
    if config.rope_truncate:
        kept, squeezed = float(math.floor(kept)), float(math.ceil(squeezed))
    kept, squeezed = max(kept, 0.0), min(squeezed, n - 1.0)
    if kept == squeezed:
        squeezed += 0.001  # As published code has it.
    return ((torch.arange(n // 2, dtype=torch.float64) - kept) / (squeezed - kept)).clamp(0, 1)


def rotation_factor(config: ModelConfig) -> float:
    """Return the factor of rotated queries and keys, by which yarn and longrope make attention sharper."""
    return config.rope_attention if config.rope_scaling in ("yarn", "longrope") else 1.0


def rotated(config: ModelConfig, x: Tensor, positions: Tensor) -> Tensor:
    """Rotate the leading dimensions of queries or keys (B, T, H, D) by their positions (B, T).

    With the layout `half`, dimension i is paired with i + n / 2 (Llama); with `interleaved`, 2i with 2i + 1
    (CodeGen). Dimensions from n on stay.
    """
    n = config.rotary_dim
    angle = (positions[..., None].double() * frequencies(config, positions))[:, :, None, :]
    cos, sin = (rotation_factor(config) * part for part in (angle.cos(), angle.sin()))
    turned, rest = x[..., :n], x[..., n:]
    if config.rotary_layout == "half":
        first, second = turned[..., : n // 2], turned[..., n // 2 :]
        pairs = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:
        first, second = turned[..., 0::2], turned[..., 1::2]
        pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    return torch.cat((pairs, rest), dim=-1)
