"""Pure scores: of a predicted text against its reference, of nats, and the interval of a mean. No torch.

Scores of texts go from 0 to 100, and a reference against itself has 100, the empty one too. An empty
prediction of a reference that is not empty has 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rapidfuzz import fuzz


def exact_match(prediction: str, reference: str) -> float:
    """100 if both strings are equal, else 0; nothing is cleaned here."""
    return 100.0 if prediction == reference else 0.0


def edit_similarity(prediction: str, reference: str) -> float:
    """100 (1 - d / (len(prediction) + len(reference))), d the insertions and deletions between them (Indel).

    `fuzz.ratio`, as CodeXGLUE's code completion scores edit similarity (arXiv:2102.04664); there each sample
    is rounded to a whole number, here it is not. Two empty strings have 100.
    """
    return fuzz.ratio(prediction, reference)


class Interval(NamedTuple):
    """The mean of n scores, and the ends of its confidence interval."""

    mean: float
    low: float
    high: float
    n: int


def mean_interval(
    scores: Sequence[float] | np.ndarray, seed: int = 0, confidence: float = 0.95, resamples: int = 2000
) -> Interval:
    """The mean with its percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    The scores must be independent of each other. Scores that are all equal have an interval of no width,
    however few they are.

    Args:
        scores: One for each sample.
        seed: Of the resampling; the same scores and seed give the same interval.
        confidence: Share of intervals that hold the true mean, nearly, when n is not small.
        resamples: Samples of size n that are drawn from the scores.

    Raises:
        ValueError: fewer than two scores.
    """
    values = np.asarray(scores, np.float64)
    if len(values) < 2:
        raise ValueError(f"an interval needs at least 2 scores and got {len(values)}: take more samples")
    draw = np.random.Generator(np.random.PCG64(seed))
    means = [values[draw.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(values.mean()), float(low), float(high), len(values))


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Nats summed over a text's tokens, in bits per UTF-8 byte of the text; comparable across tokenizers.

    Raises:
        ValueError: a text of no bytes.
    """
    if n_bytes < 1:
        raise ValueError(f"bits per byte of a text of {n_bytes} bytes: it needs at least 1")
    return nats / math.log(2) / n_bytes


def perplexity(nats: float, n_tokens: int) -> float:
    """exp(nats per token) of unsmoothed nats; infinite where that is too large for a float.

    Raises:
        ValueError: no tokens.
    """
    if n_tokens < 1:
        raise ValueError(f"perplexity of {n_tokens} tokens: it needs at least 1")
    try:
        return math.exp(nats / n_tokens)
    except OverflowError:
        return math.inf
