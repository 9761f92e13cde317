"""The order in which documents are learned, by how hard each is.

    hard = difficulties(store, "rarity")          # (n_documents,)
    order = order_of(hard, "easy-first", draw)    # a permutation of the documents

Difficulties are computed from the ids in the store, in nats:

    rarity   mean of -ln of the tokens' frequencies in the training data
    entropy  entropy of the tokens' distribution inside the document
    loss     mean loss of an n-gram model that was not trained on the document, since a model finds easy what
             it has seen: a model of documents of odd number scores those of even number, and vice versa
"""

from __future__ import annotations

import numpy as np

from data.ngram import NGramModel
from data.tokenstore import TokenStore

HALF_TOKENS = 5_000_000  # training tokens of each n-gram model, from evenly spread documents
FIRST_SHARE = 0.1  # the share of documents from which `hybrid` samples at its beginning


def difficulties(store: TokenStore, kind: str) -> np.ndarray:
    """Return (n_documents,) float64, larger for harder documents and never NaN.

    Args:
        store: The store of the training documents.
        kind: `rarity`, `entropy` or `loss`.
    """
    if kind == "loss":
        return _losses(store)
    documents = (store.document(number) for number in range(store.n_documents))
    if kind == "entropy":
        return np.array([_entropy(np.unique(ids, return_counts=True)[1]) for ids in documents])
    counts = np.zeros(store.vocab_size, np.int64)
    for number in range(store.n_documents):
        counts += np.bincount(store.document(number), minlength=store.vocab_size)
    surprise = -np.log(np.maximum(counts, 1) / counts.sum())
    return np.array([surprise[ids].mean() if len(ids) else 0.0 for ids in documents])


def _entropy(counts: np.ndarray) -> float:
    shares = counts / max(1, counts.sum())
    return float(-(shares * np.log(shares)).sum())


def _losses(store: TokenStore) -> np.ndarray:
    """Return the mean loss (n_documents,) of each document, by an n-gram model of the other half of them."""
    numbers = np.arange(store.n_documents)
    hard = np.zeros(store.n_documents)
    for half in (0, 1):
        others = numbers[numbers % 2 != half]
        sizes = np.diff(store.offsets)[others]
        stride = max(1, -(-int(sizes.sum()) // HALF_TOKENS))
        model = NGramModel((store.document(int(i)) for i in others[::stride]), store.vocab_size)
        for number in numbers[numbers % 2 == half]:
            ids = store.document(int(number))
            hard[number] = -model.log_probs([ids]).mean() if len(ids) > 1 else 0.0
    return hard


def order_of(difficulty: np.ndarray, kind: str, draw: np.random.Generator) -> np.ndarray:
    """Return a permutation (n,) of the documents; equally hard ones are in random order.

    Args:
        difficulty: (n,) values of `difficulties`.
        kind: `easy-first`, `hard-first`, or `hybrid`: sampled from the easiest documents, whose share grows
            with the square root of the time, from FIRST_SHARE to all (Platanios et al. 2019,
            arXiv:1903.09848).
        draw: The epoch's random generator.
    """
    shuffled = draw.permutation(len(difficulty))
    by_rank = shuffled[np.argsort(difficulty[shuffled], kind="stable")]
    if kind == "easy-first":
        return by_rank
    if kind == "hard-first":
        return by_rank[::-1]
    n = len(difficulty)
    time = np.arange(n) / max(1, n)
    there = np.sqrt(time * (1 - FIRST_SHARE**2) + FIRST_SHARE**2)
    available = np.maximum(np.ceil(there * n).astype(np.int64), np.arange(n) + 1)
    order, pool, entered = np.empty(n, np.int64), [], 0
    for place, share in enumerate(draw.random(n)):
        pool.extend(by_rank[entered : available[place]])
        entered = available[place]
        chosen = int(share * len(pool))
        pool[chosen], pool[-1] = pool[-1], pool[chosen]
        order[place] = pool.pop()
    return order


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return Spearman's correlation of two (n,) arrays, ties by their mean rank; 0 if one is constant."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[which]

    a, b = ranks(one), ranks(other)
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
