"""Scores over every token of the held-out files: of the model, its base and the n-gram model, with intervals.

Documents are what is resampled: tokens of one document are not independent. `documents` of the scores holds
each one's nats, so that two evaluations of the same files can be compared in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from architecture import Decoder
from dataset import IGNORE_INDEX, Batch, as_shown, numbered_batches, shown
from loss import Scores, score
from metrics.intervals import Comparison, compare, interval
from ngram import NGramModel
from precision import Precision
from suites.scoring import NAMED, aligned
from tokenstore import TokenStore

# The n-gram model's training takes about 170 bytes a token at its peak; of more tokens, it gets evenly spread
# documents.
BASELINE_TOKENS = 10_000_000
SCORED_TOKENS = 2**20  # that the n-gram model scores at a time
# Of more documents neighbours are taken together: intervals are no narrower, and resampling no slower.
MOST_UNITS = 10_000


# --- scores --------------------------------------------------------------------------------------------


def model_scores(
    model: Decoder, store: TokenStore, batch_size: int, row_length: int, precision: Precision
) -> tuple[Scores, np.ndarray]:
    """The model's scores, and the nats (n_documents,) of each document."""
    nats = np.zeros(store.n_documents)
    numbers: list[np.ndarray] = []

    def batches() -> Iterator[Batch]:
        for batch, documents in numbered_batches(store, batch_size, row_length):
            numbers.append(documents[(batch.labels != IGNORE_INDEX).numpy()])
            yield batch

    def seen(batch: Batch, of_tokens: Tensor) -> None:
        np.add.at(nats, numbers.pop(), of_tokens.double().cpu().numpy())

    return score(model, batches(), precision, seen), nats


def train_ngram(train: TokenStore) -> NGramModel:
    """The baseline, from the train documents, or from evenly spread ones when they are very many."""
    stride = -(-train.n_tokens // BASELINE_TOKENS)
    documents = (train.document(number) for number in range(0, train.n_documents, stride))
    return NGramModel(documents, train.vocab_size)


def ngram_scores(baseline: NGramModel, store: TokenStore, block_size: int) -> tuple[Scores, np.ndarray]:
    """The baseline's, over the same tokens as `loss.score` counts on `validation_batches`.

    Of examples these are the completions' tokens, each after as much of its prompt as a row shows.
    """
    nats, tokens, top1, top5 = np.zeros(store.n_documents), 0, 0, 0
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
        np.subtract.at(nats, owner, baseline.log_probs(documents)[counts])
        tokens, top1, top5 = tokens + len(labels), top1 + int(hits[:, 0].sum()), top5 + int(hits.sum())
    return Scores(float(nats.sum()), tokens, top1 / tokens, top5 / tokens), nats


def _groups(store: TokenStore) -> Iterator[range]:
    """Numbers of the documents, in groups of about SCORED_TOKENS."""
    start = 0
    while start < store.n_documents:
        end = int(np.searchsorted(store.offsets, store.offsets[start] + SCORED_TOKENS))
        yield range(start, min(end, store.n_documents))
        start = end


def tokens_of(store: TokenStore, row_length: int) -> np.ndarray:
    """(n_documents,) tokens of each document that bear loss."""
    rows = shown(store, row_length)
    return np.maximum(rows.length - np.maximum(rows.prompt_length, 1), 0)


def token_values(scores: Scores, n_bytes: int) -> dict[str, Any]:
    return {
        "tokens": scores.tokens,
        "loss": scores.loss,
        "perplexity": scores.perplexity,
        "bits_per_byte": scores.bits_per_byte(n_bytes),
        "top1": scores.top1,
        "top5": scores.top5,
    }


# --- intervals -----------------------------------------------------------------------------------------


def add_intervals(result: dict[str, Any], documents: dict[str, Any], seed: int) -> None:
    """Put each document's sums, 95% intervals of each system, and the model's differences into `result`.

    A difference is the model's score less the other's on the same resamples, so below 0 the model is better.

    Args:
        documents: `names`, `tokens`, `bytes`, and `nats` of each system, one for each document.
    """
    result["documents"] = documents
    names: list[str] = list(documents["nats"])
    model, *others = names
    units = min(len(documents["names"]), MOST_UNITS)
    if units < 2:
        return
    rows = {system: _rows(documents, system, units) for system in names}
    verdicts: dict[str, Any] = {}
    for key, of_sums in OF_SUMS.items():
        for system in names:
            found = interval(rows[system], of_sums, seed)
            result[system].setdefault("intervals", {})[key] = found._asdict()
        verdicts[key] = {}
        for other in others:
            compared = compare(rows[model], rows[other], of_sums, seed)
            verdicts[key][other] = {
                **compared.difference._asdict(),
                "distinguishable": compared.distinguishable,
                "verdict": said(compared, NAMED.get(other, other)),
            }
    result["token_verdicts"] = verdicts


def _rows(documents: dict[str, Any], system: str, units: int) -> np.ndarray:
    """(units, 3) nats, tokens and bytes."""
    columns = [documents["nats"][system], documents["tokens"], documents["bytes"]]
    rows = np.column_stack([np.asarray(column, np.float64) for column in columns])
    edges = np.arange(units) * len(rows) // units
    return np.add.reduceat(rows, edges, axis=0)


def _loss(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def _bits_per_byte(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / math.log(2) / np.maximum(sums[..., 2], 1)


OF_SUMS = {"loss": _loss, "bits_per_byte": _bits_per_byte}


def said(compared: Comparison, other: str) -> str:
    """The verdict in words, as those of texts are, with the interval of the difference: lower is better."""
    low, high, n = compared.difference.low, compared.difference.high, compared.difference.n
    if not compared.distinguishable:
        return compared.verdict(other, higher_is_better=False).replace("samples", "documents")
    better, size = compared.difference.mean < 0, abs(compared.difference.mean)
    ends = sorted((abs(low), abs(high)))
    return (
        f"{'better' if better else 'worse'} than {other} by {size:.4f} [{ends[0]:.4f}, {ends[1]:.4f}] "
        f"on {n} documents"
    )


# --- the table -----------------------------------------------------------------------------------------


def token_table(result: dict[str, Any]) -> list[str]:
    """Lines: the metric, the model, its base where there is one, the n-gram model, and over what."""
    names = [name for name in ("model", "base", "n-gram") if name in result]
    over_tokens = f"{result['model']['tokens']:,} tokens of {result['files']:,} {result['side']} files"
    rows = [["metric", *names[:-1], f"{result['n-gram order']}-gram"]]
    overs = ["over"]
    for key, name, form, over in (
        ("loss", "loss, nats a token", "{:.4f}", over_tokens),
        ("perplexity", "perplexity", "{:.2f}", "the same"),
        ("bits_per_byte", "bits per byte", "{:.4f}", f"{result['bytes']:,} bytes of the same"),
        ("top1", "top-1 accuracy", "{:.2%}", over_tokens),
        ("top5", "top-5 accuracy", "{:.2%}", "the same"),
    ):
        rows.append([name, *(form.format(result[system][key]) for system in names)])
        overs.append(over)
        intervals = [result[system].get("intervals", {}).get(key) for system in names]
        if all(intervals):
            rows.append(["  95% interval", *(f"[{i['low']:.4f}, {i['high']:.4f}]" for i in intervals if i)])
            overs.append("")
    head, rule, *body = aligned(rows)
    lines = [f"{line}  {over}".rstrip() for line, over in zip([head, *body], overs, strict=True)]
    table = [lines[0], rule[0] * max(map(len, lines)), *lines[1:]]
    for found in result.get("token_verdicts", {}).get("loss", {}).values():
        table.append(f"loss: {found['verdict']}")
    return table
