"""The choice of a token: logits to logits, and one sample a row.

Each function of logits takes (n, V) and returns new ones; a token that may not be chosen has -inf. n is the
number of rows, V that of the words.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from generation.settings import GenerationConfig


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide the logits of `seen` tokens by the penalty, or multiply negative ones (CTRL, arXiv:1909.05858).

    Args:
        logits: (n, V).
        seen: (n, V), True for tokens of the row's prompt and text so far.
        penalty: Above 1 makes them less likely. The paper only divides, which would make a negative logit
            more likely.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest of a row, and all that tie with the last (Fan et al. 2018, arXiv:1805.04833)."""
    last = logits.topk(min(k, logits.size(-1)), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < last, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest tokens whose probabilities reach p (nucleus sampling, arXiv:1904.09751)."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1, dtype=torch.float64)
    before = probabilities.cumsum(dim=-1) - probabilities  # exactly 0 for the most likely one, which stays
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(dropped, -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens at least p times as likely as the likeliest one (Nguyen et al. 2024, arXiv:2407.01082)."""
    probabilities = logits.softmax(dim=-1, dtype=torch.float64)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), -math.inf)


def adjust_logits(logits: Tensor, seen: Tensor | None, settings: GenerationConfig) -> Tensor:
    """Apply repetition penalty, temperature, top-k, top-p, min-p: the order of transformers' `generate`.

    Each works on the result of the one before: the nucleus is of the k tokens, for instance. At temperature 0
    there is only the penalty.
    """
    if seen is not None:
        logits = penalize_repetition(logits, seen, settings.repetition_penalty)
    if settings.temperature > 0:
        logits = logits / settings.temperature
        if settings.top_k:
            logits = keep_top_k(logits, settings.top_k)
        if settings.top_p < 1:
            logits = keep_top_p(logits, settings.top_p)
        if settings.min_p > 0:
            logits = keep_min_p(logits, settings.min_p)
    return logits


class Score(NamedTuple):
    """A token and its natural-log probability after those before it, under the model itself.

    likeliest: The tokens that would have been likeliest in its place, with theirs.
    """

    id: int
    log_prob: float
    likeliest: tuple[tuple[int, float], ...] = ()


def scores_of(logits: Tensor, ids: Tensor, n: int) -> list[Score]:
    """Score one id (rows,) a row of the model's logits (rows, V), beside the n likeliest."""
    log_probs = logits.log_softmax(dim=-1, dtype=torch.float64)
    own = log_probs.gather(1, ids[:, None])[:, 0].tolist()
    best = log_probs.topk(min(n, logits.size(1)), dim=1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    likeliest = [tuple(zip(*pair, strict=True)) for pair in pairs]
    return [Score(*found) for found in zip(ids.tolist(), own, likeliest, strict=True)]


def row_generator(seed: int, row: int) -> torch.Generator:
    """Return the generator of one row's random numbers, which do not depend on other rows.

    A trap: the CPU generator reads only the low 32 bits of its seed, so `seed << 32 | row` would
    ignore `seed`.
    """
    digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def sample(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Sample one token (n,) a row from softmax(logits (n, V)), by inverting the cumulative distribution.

    Each generator gives one number, on the CPU, so that a seed means the same on every device.
    """
    cumulative = logits.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    draws = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
    # right=True steps over tokens of probability 0, also for a number of exactly 0.
    return torch.searchsorted(cumulative, draws.to(logits.device) * cumulative[:, -1:], right=True)[:, 0]
