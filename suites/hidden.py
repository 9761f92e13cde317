"""The metric `semantic`: how alike a model's hidden states of a prediction and its reference are.

    judge = Judge(model, tokenizer, "the base of runs/a, weights 1f0c23d4", layer=0)
    scored(suite, examples, predictions, ["semantic"], models={"semantic": judge.metric()})

It is in the style of CodeBERTScore (arXiv:2302.05527), by `metrics.semantic`: each token is matched to the
nearest of the other text by cosine, and F1 is of the means over both texts; there are no weights by rarity
and no rescaling. Hidden states of one model are close to each other whatever the text, so that any two texts
score high: read it beside its baselines, and never beside another model's or layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from architecture import Decoder
from metrics.registry import Metric, of_means
from metrics.semantic import token_similarity
from metrics.texts import Pair
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Judge:
    """A model whose hidden states are compared, in fp32 or the format that its weights are stored in.

    Args:
        name: The model's name in the metric's signature.
        layer: The block whose output is taken, from 1; 0 is what the head reads, after the last norm.
        base: Makes the context in which `model` is run, such as one without its adapters.
    """

    model: Decoder
    tokenizer: Tokenizer
    name: str
    layer: int = 0
    base: Callable[[], AbstractContextManager[Any]] = nullcontext
    _known: dict[Pair, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.layer <= len(self.model.blocks):
            raise ValueError(
                f"--embedding_layer is {self.layer}, and the model has {len(self.model.blocks)} layers: name "
                "one from 1, or 0 for what its head reads"
            )

    def vectors(self, text: str) -> np.ndarray:
        """Return a text's hidden states, (tokens, C), without its start token, cut to the model's room."""
        start = self.tokenizer.start_id
        ids = [] if start is None else [start]
        ids = (ids + self.tokenizer.encode(text))[: self.model.config.block_size]
        skipped = 0 if start is None else 1
        if len(ids) <= skipped:
            return np.zeros((0, self.model.config.n_embd))
        kept: list[torch.Tensor] = []
        device = next(self.model.parameters()).device

        def keep(module: torch.nn.Module, given: Any, made: torch.Tensor) -> None:
            kept.append(made)

        block = self.model.blocks[self.layer - 1] if self.layer else self.model.norm
        hook = block.register_forward_hook(keep)
        try:
            with torch.no_grad(), self.base():
                self.model.hidden(torch.tensor([ids], device=device))
        finally:
            hook.remove()
        return kept[0][0, skipped:].double().cpu().numpy()

    def similarity(self, prediction: str, reference: str) -> float:
        """Return 100 times F1, at least 0; equal texts have 100, also those without a token."""
        if prediction == reference:
            return 100.0
        pair = prediction, reference
        if pair not in self._known:
            found = token_similarity(self.vectors(prediction), self.vectors(reference))
            self._known[pair] = 100 * found.f1
        return self._known[pair]

    def metric(self) -> Metric:
        """Return the metric `semantic` by this model and layer."""
        where = f"layer {self.layer} of {len(self.model.blocks)}" if self.layer else "the head's input"
        room = f"the first {self.model.config.block_size} tokens"
        says = f"F1 of greedy cosines, hidden states of {self.name}, {where}, {room}, no idf, no rescaling"
        return of_means("semantic", self._rows, says)

    def _rows(self, pairs: Sequence[Pair], language: str) -> np.ndarray:
        return np.array([[self.similarity(*pair), 1.0] for pair in pairs])
