"""Semantic similarity by a model's hidden states, in the style of CodeBERTScore (arXiv:2302.05527).

It is a pure function of two matrices; the caller runs the model and chooses the layer. Each token of one text
is matched to the nearest of the other by cosine: precision is the mean over the prediction's tokens, recall
over the reference's. With the same vectors this equals the authors' code, without rescaling. The caller
leaves out the tokens that should not count (the prompt's, punctuation, markers).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Similarity(NamedTuple):
    """Cosines, from -1 to 1; 1 for a text against itself. F3 weighs recall nine times, as METEOR does."""

    precision: float
    recall: float
    f1: float
    f3: float


def token_similarity(
    prediction: np.ndarray,
    reference: np.ndarray,
    prediction_weights: Sequence[float] | np.ndarray | None = None,
    reference_weights: Sequence[float] | np.ndarray | None = None,
) -> Similarity:
    """Return how well the tokens of a prediction and a reference match.

    The similarity is 1 where both have no tokens, and 0 where one has none. A vector of zeros has the cosine
    0 with any other. F1 and F3 are 0 unless precision and recall are above 0.

    Args:
        prediction: (tokens, dimensions), of any scale.
        reference: (tokens, dimensions).
        prediction_weights: (tokens,), at least 0, such as `inverse_frequencies` gives; all are equal if it is
            None, or if their sum is 0.
        reference_weights: (tokens,), likewise.

    Raises:
        ValueError: The shapes do not fit, or vectors or weights are not finite.
    """
    found, wanted = np.asarray(prediction, np.float64), np.asarray(reference, np.float64)
    if found.ndim != 2 or wanted.ndim != 2 or found.shape[1] != wanted.shape[1]:
        raise ValueError(
            f"token vectors of shapes {found.shape} and {wanted.shape}: each must be (tokens, dimensions), "
            "with the same number of dimensions"
        )
    weights = [
        _weights(given, len(vectors), text)
        for given, vectors, text in (
            (prediction_weights, found, "prediction"),
            (reference_weights, wanted, "reference"),
        )
    ]
    if not len(found) or not len(wanted):
        return Similarity(*[float(len(found) == len(wanted))] * 4)
    if not (np.isfinite(found).all() and np.isfinite(wanted).all()):
        raise ValueError("token vectors that are not finite: the model's hidden states hold NaN or infinity")
    cosines = _unit(found) @ _unit(wanted).T
    precision = float(cosines.max(1) @ weights[0])
    recall = float(cosines.max(0) @ weights[1])
    both = precision > 0 and recall > 0
    return Similarity(
        precision,
        recall,
        2 * precision * recall / (precision + recall) if both else 0.0,
        10 * precision * recall / (9 * precision + recall) if both else 0.0,
    )


def inverse_frequencies(texts: Iterable[Sequence[Hashable]]) -> tuple[Mapping[Hashable, float], float]:
    """Return ln((n + 1) / (d + 1)) for each token that stands in d of n texts, and for d = 0.

    Args:
        texts: The references' tokens.
    """
    counts: Counter[Hashable] = Counter()
    n = 0
    for tokens in texts:
        counts.update(set(tokens))
        n += 1
    return {token: math.log((n + 1) / (d + 1)) for token, d in counts.items()}, math.log(n + 1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    # Vectors are scaled by their largest entry first, so that squares neither overflow nor vanish.
    largest = np.abs(vectors).max(1, keepdims=True)
    scaled = np.divide(vectors, largest, out=np.zeros_like(vectors), where=largest > 0)
    lengths = np.linalg.norm(scaled, axis=1, keepdims=True)
    return np.divide(scaled, lengths, out=scaled, where=lengths > 0)


def _weights(given: Sequence[float] | np.ndarray | None, n: int, text: str) -> np.ndarray:
    weights = np.ones(n) if given is None else np.asarray(given, np.float64)
    if weights.shape != (n,):
        raise ValueError(
            f"{weights.size} weights for the {n} tokens of the {text}: there must be one for each"
        )
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError(f"weights of the {text} must be finite and at least 0")
    if weights.sum() == 0:
        weights = np.ones(n)
    return weights / max(weights.sum(), np.finfo(float).tiny) if n else weights
