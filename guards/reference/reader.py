"""The reference's reading of texts, and how far rounding moves it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from architecture import Decoder
from config import ModelConfig
from guards.reference.comparison import Comparison
from guards.reference.rounding import MOST_ROUNDING, of_log_sum, of_logits, step_of
from reference.forward import Rows, Weights, logits_of

REMEDY = "compare the code of generation/ with reference/generation.py"


class Reader:
    """What the reference reads in texts, and how far rounding moves it.

    Attributes:
        off: By how much a logit of the run may differ from the reference's.
    """

    def __init__(self, model: Decoder, config: ModelConfig, weights: Weights):
        self.config, self.weights, self.step = config, weights, step_of(model)
        self.off, self.known = 0.0, dict[tuple[int, ...], Tensor]()
        self.last: tuple[int, ...] = ()
        self.sampled = set[tuple[int, ...]]()

    def logits(self, text: Sequence[int]) -> Tensor:
        """Return the logits (T, V) after each token of a text."""
        self.last = key = tuple(text)
        if key not in self.known:
            found = logits_of(self.config, self.weights, _rows(key))[0]
            largest = float(found.abs().max())
            of_log = of_log_sum(largest, found.size(-1))
            self.off = max(self.off, of_logits(self.config, self.step) * largest + of_log)
            self.known[key] = found
        return self.known[key]

    def explains(self, difference: float, logits: int = 1) -> bool:
        """Return whether rounding explains a difference of so many logits of the text that was read last.

        A softmax moves by at most twice what its logits do. Where the difference is larger than was derived,
        samples of rounding are drawn for the text; beyond MOST_ROUNDING they explain everything.
        """
        if not difference <= 2 * logits * self.off and self.last not in self.sampled and self.known:
            self.sampled.add(self.last)
            found = self.known[self.last][None]
            share = of_logits(self.config, self.step, self.weights, _rows(self.last), found)
            self.off = max(self.off, share * float(found.abs().max()))
            if not share <= MOST_ROUNDING:
                self.off = math.inf
        return difference <= 2 * logits * self.off

    def close(self, comparison: Comparison, stage: str, found: float, expected: float, logits: int) -> None:
        """Compare the log-probability of tokens, each of which has so many logits before it.

        Args:
            logits: How many distributions the sum is of.
        """
        self.explains(abs(found - expected), logits)
        tolerance = 2 * logits * self.off / abs(expected or 1.0)
        right = torch.tensor(expected).double()
        comparison.close(stage, torch.tensor(found).double(), right, tolerance, REMEDY)


def _rows(text: Sequence[int]) -> Rows:
    tokens = torch.tensor([text])
    return Rows(tokens, torch.arange(len(text))[None], torch.zeros_like(tokens))
