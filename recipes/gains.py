"""Whether training helped, judged on the loss: a run beside its base, example by example, with an interval."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from architecture import Decoder
from dataset import Batch, as_shown, next_token_labels, shown
from lora import adapters_disabled
from loss import score
from metrics.intervals import Comparison, compare, interval, mean_of_sums
from precision import Precision
from runmodel import Run
from tokenstore import TokenStore

MOST = 1000  # examples that are read, evenly spread: as many as an interval has use for


@dataclass(frozen=True)
class Gain:
    """Losses in nats a token over the same examples; the comparison is the model's less the base's."""

    model: float
    base: float
    comparison: Comparison

    def __str__(self) -> str:
        low, high = self.comparison.difference.low, self.comparison.difference.high
        difference, n = self.comparison.difference.mean, self.comparison.difference.n
        if self.comparison.distinguishable:
            verdict = "tuned beats base" if difference < 0 else "tuned is worse than base"
        else:
            verdict = "tuned is not distinguishable from base"
        return (
            f"loss on {n} test examples, nats a token: base {self.base:.4f}, tuned {self.model:.4f}, "
            f"difference {difference:+.4f} [{low:+.4f}, {high:+.4f}]: {verdict}"
        )


@torch.no_grad()
def nats_by_example(
    model: Decoder, store: TokenStore, row_length: int, precision: Precision, numbers: np.ndarray
) -> np.ndarray:
    """(n, 2): the nats of an example's targets, and how many they are; each is read in a row of its own."""
    rows, found = shown(store, row_length), []
    for number in numbers.tolist():
        ids = as_shown(store, number, rows)[None]
        document = np.zeros_like(ids)
        is_prompt = np.arange(ids.shape[1])[None] < rows.prompt_length[number]
        labels = next_token_labels(ids, document, is_prompt if store.holds_examples else None)
        positions = np.arange(ids.shape[1] - 1)[None]
        parts = (ids[:, :-1], labels, document[:, :-1], positions)
        batch = Batch(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))
        scores = score(model, [batch], precision)
        found.append((scores.nats, scores.tokens))
    return np.array(found)


def gain_over_base(run: Run, store: TokenStore, precision: Precision, seed: int = 0) -> Gain:
    """Of a run with adapters, on at most MOST examples of the store, by the paired bootstrap over examples.

    Raises:
        ValueError: The run has no adapters, or the store fewer than two examples.
    """
    if not run.config.lora.r:
        raise ValueError(f"{run.folder} has no adapters, so there is no base beside it")
    numbers = np.unique(np.linspace(0, store.n_documents - 1, MOST).round().astype(int))
    run.model.to(precision.device)
    own = nats_by_example(run.model, store, run.config.row_length, precision, numbers)
    with adapters_disabled(run.model):
        base = nats_by_example(run.model, store, run.config.row_length, precision, numbers)
    comparison = compare(own, base, mean_of_sums, seed)
    return Gain(interval(own, mean_of_sums, seed).mean, interval(base, mean_of_sums, seed).mean, comparison)
