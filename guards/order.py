"""Guard of the order: batches come in the order by difficulty that the settings request."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from data.curriculum import rank_correlation
from data.ngram import NGramModel
from dataset import IGNORE_INDEX, Batches
from guards.faults import Fault
from guards.subject import GuardSubject

OTHER = {"easy-first": "hard-first", "hard-first": "easy-first", "hybrid": "easy-first"}
COMPARED = 4  # Batches.
SPREAD = 48  # Batches of an epoch whose difficulty is measured.
FEWEST = 12  # Documents and rows by which an order can be told from its opposite.
UNSEEN_TOKENS = 2**18  # Tokens of held-out files that the n-gram model for `loss` is trained on.
# Rank correlation of difficulty and time. Measured by batches of the standard library and of its package
# asyncio, 28 files: easy-first 0.15 to 0.70, hybrid 0.0 to 0.73, hard-first the same below 0.
INVERTED = -0.1


def order(subject: GuardSubject) -> Iterator[Fault | str]:
    """See that another order gives other batches, and that difficulty, measured on them, goes with time."""
    data, batches = subject.config.data, subject.batches
    if data.order not in OTHER:
        yield f"{data.order}, by no difficulty"
        return
    requested = f"{data.order} by {data.difficulty}"
    for other in ("shuffled", OTHER[data.order]):
        if batches.store.n_documents >= FEWEST and _same(subject, _batches(batches, other)):
            yield Fault(
                "order-ignored",
                f"{requested} was requested, and the first batches are those of {other}",
                "let batches come in the order of the scores",
            )
            return
    hard = _measured(subject)
    if min(batches.store.n_documents, len(hard)) < FEWEST or hard.std() == 0:
        yield f"{requested}: {len(hard)} rows of {batches.store.n_documents} documents cannot tell it"
        return
    found = rank_correlation(hard, np.arange(len(hard), dtype=float))
    yield f"{requested}: rank correlation of difficulty with time {found:.2f}"
    if (-found if data.order == "hard-first" else found) < INVERTED:
        yield Fault(
            "order-inverted",
            f"{requested} was requested, and the rank correlation of difficulty with time is {found:.2f}",
            "let the larger score be that of the harder text, of the very ids that are trained on",
        )


def _batches(batches: Batches, other: str) -> Batches:
    difficulty = None if other == "shuffled" else batches.difficulty
    return batches.altered(order=other, difficulty=difficulty)


def _same(subject: GuardSubject, others: Batches) -> bool:
    return all(
        torch.equal(subject.micro_batch(number).tokens.cpu(), others.batch(number).tokens)
        for number in range(min(COMPARED, others.steps_per_epoch))
    )


def _measured(subject: GuardSubject) -> np.ndarray:
    """Return how hard each row is by the measure of the setting, from its targets alone: (rows,)."""
    numbers = np.unique(np.linspace(0, subject.batches.steps_per_epoch - 1, SPREAD).round().astype(int))
    rows = [
        labels[labels != IGNORE_INDEX].cpu().numpy()
        for number in numbers
        for labels in subject.micro_batch(int(number)).labels
    ]
    rows = [row for row in rows if len(row) > 1]
    kind = subject.config.data.difficulty
    if kind == "loss":
        held_out = subject.validation
        stride = max(1, held_out.n_tokens // UNSEEN_TOKENS)
        documents = (held_out.document(n) for n in range(0, held_out.n_documents, stride))
        judge = NGramModel(documents, held_out.vocab_size)
        return np.array([-judge.log_probs([row]).mean() for row in rows])
    if kind == "entropy":
        return np.array([_entropy(row) for row in rows])
    counts = np.bincount(np.concatenate(rows), minlength=subject.train.vocab_size)
    surprise = -np.log(np.maximum(counts, 1) / counts.sum())
    return np.array([surprise[row].mean() for row in rows])


def _entropy(row: np.ndarray) -> float:
    shares = np.unique(row, return_counts=True)[1] / len(row)
    return float(-(shares * np.log(shares)).sum())
