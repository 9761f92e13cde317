"""TokenScores over every token of the held-out files, by the model, its base and the n-gram model.

Each comes with the sums of each document, from which `documents` computes intervals.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from architecture import Decoder
from data.ngram import NGramModel
from data.tokenstore import TokenStore
from dataset import IGNORE_INDEX, Batch, as_shown, numbered_batches, shown
from modules.precision import Precision
from training.distributed import ALONE, World, in_turns
from training.loss import BatchSums, TokenScores, sums_of_batches, total

# The n-gram model's training takes about 170 bytes a token at its peak; where there are more tokens than
# these, it reads evenly spread documents.
BASELINE_TOKENS = 10_000_000
SCORED_TOKENS = 2**20  # Tokens that the n-gram model scores at a time.


# Keys of an eval.json: each document's summed negative log-likelihood, and how many of its tokens were hit.
KEPT = "nats", "top1", "top5"
Sums = dict[str, np.ndarray]  # The values of these keys, (n_documents,) each.


# --- scores --------------------------------------------------------------------------------------------


def model_scores(
    model: Decoder,
    store: TokenStore,
    batch_size: int,
    row_length: int,
    precision: Precision,
    world: World = ALONE,
) -> tuple[TokenScores, Sums]:
    """Score every token by the model; return the scores and the sums of each document.

    Args:
        batch_size: Rows at a time.
        row_length: Tokens of a row, as in training.
        world: The processes that share the batches; all get the scores. A document's sums differ from those
            of one process by the order in which its tokens are added.
    """
    sums = {key: np.zeros(store.n_documents) for key in KEPT}
    numbers: list[np.ndarray] = []

    def batches() -> Iterator[Batch]:
        for batch, documents in numbered_batches(
            store, batch_size, row_length, rank=world.rank, world_size=world.size
        ):
            numbers.append(documents[(batch.labels != IGNORE_INDEX).numpy()])
            yield batch

    def on_batch(batch: Batch, nll: Tensor, target_rank: Tensor) -> None:
        owner = numbers.pop()
        for key, of_tokens in zip(KEPT, (nll, target_rank < 1, target_rank < 5), strict=True):
            np.add.at(sums[key], owner, of_tokens.double().cpu().numpy())

    own = [tuple(found) for found in sums_of_batches(model, batches(), precision, on_batch)]
    shares = world.collect([own, {key: values.tolist() for key, values in sums.items()}])
    scores = total(BatchSums(*found) for found in in_turns([share for share, _ in shares]))
    return scores, {key: np.sum([of_rank[key] for _, of_rank in shares], axis=0) for key in KEPT}


def train_ngram(train: TokenStore) -> NGramModel:
    """Train the baseline on the train documents, or on evenly spread ones where there are very many."""
    stride = -(-train.n_tokens // BASELINE_TOKENS)
    documents = (train.document(number) for number in range(0, train.n_documents, stride))
    return NGramModel(documents, train.vocab_size)


def ngram_scores(baseline: NGramModel, store: TokenStore, block_size: int) -> tuple[TokenScores, Sums]:
    """Score by the baseline the tokens that `training.loss.score` counts on `validation_batches`.

    The tokens of examples are those of completions, each after as much of its prompt as a row shows.
    """
    sums, tokens = {key: np.zeros(store.n_documents) for key in KEPT}, 0
    rows = shown(store, block_size)
    for numbers in _groups(store):
        documents = [as_shown(store, number, rows) for number in numbers]
        first = [max(1, int(rows.prompt_length[number])) for number in numbers]
        counts = np.concatenate([np.arange(1, len(d)) >= n for d, n in zip(documents, first, strict=True)])
        owner = np.concatenate([np.full(len(d) - 1, n) for d, n in zip(documents, numbers, strict=True)])[
            counts
        ]
        labels = np.concatenate([document[1:] for document in documents])[counts]
        hits = baseline.top(documents, 5)[counts] == labels[:, None]
        of_tokens = -baseline.log_probs(documents)[counts], hits[:, 0], hits.any(1)
        for key, values in zip(KEPT, of_tokens, strict=True):
            np.add.at(sums[key], owner, values)
        tokens += len(labels)
    nll, top1, top5 = (float(sums[key].sum()) for key in KEPT)
    return TokenScores(nll, tokens, top1 / tokens, top5 / tokens), sums


def _groups(store: TokenStore) -> Iterator[range]:
    """Yield the numbers of the documents in groups of about SCORED_TOKENS."""
    start = 0
    while start < store.n_documents:
        end = int(np.searchsorted(store.offsets, store.offsets[start] + SCORED_TOKENS))
        yield range(start, min(end, store.n_documents))
        start = end


def tokens_of(store: TokenStore, row_length: int) -> np.ndarray:
    """Return the number of tokens of each document that are targets, (n_documents,)."""
    rows = shown(store, row_length)
    return np.maximum(rows.length - np.maximum(rows.prompt_length, 1), 0)


def token_values(scores: TokenScores, n_bytes: int) -> dict[str, Any]:
    """Return the scores by the keys of an eval.json; `n_bytes` is the length of the scored text."""
    return {
        "tokens": scores.tokens,
        "loss": scores.loss,
        "perplexity": scores.perplexity,
        "bits_per_byte": scores.bits_per_byte(n_bytes),
        "top1": scores.top1,
        "top5": scores.top5,
    }
