"""The n-gram baseline against a slow one written from the definition, and against chains of known entropy."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from data.ngram import FALLBACK_DISCOUNTS, NGramModel, discounts


def zipf_documents(seed: int, n: int, vocab_size: int, longest: int = 40) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    p = 1 / np.arange(1, vocab_size + 1)
    return [draw.choice(vocab_size, size=draw.integers(1, longest), p=p / p.sum()) for _ in range(n)]


class SlowModel:
    """Interpolated modified Kneser-Ney from its definition, with dictionaries and recursion."""

    def __init__(self, documents: list[np.ndarray], vocab_size: int, order: int):
        self.vocab_size, self.order = vocab_size, order
        grams = [Counter() for _ in range(order + 1)]  # By their length.
        for document in documents:
            padded = self.padded(document)
            for i in range(order, len(padded) + 1):
                grams[order][padded[i - order : i]] += 1
        for length in range(order, 1, -1):
            for gram in grams[length]:
                grams[length - 1][gram[1:]] += 1
        self.counts = grams
        self.total = [Counter() for _ in range(order + 1)]
        self.kinds = [defaultdict(Counter) for _ in range(order + 1)]
        self.taken = []
        for length, counts in enumerate(grams):
            for gram, count in counts.items():
                self.total[length][gram[:-1]] += count
                self.kinds[length][gram[:-1]][min(count, 3)] += 1
            self.taken.append((0.0, *self.estimate(counts)))

    def padded(self, document: np.ndarray) -> tuple:
        return (None,) * (self.order - 2) + tuple(document.tolist())

    @staticmethod
    def estimate(counts: Counter) -> tuple[float, ...]:
        n = Counter(counts.values())
        if n[1] and n[2] and n[3]:
            y = n[1] / (n[1] + 2 * n[2])
            found = tuple(k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3))
            if all(0 < d <= k for k, d in enumerate(found, 1)):
                return found
        return FALLBACK_DISCOUNTS

    def p(self, token: int, history: tuple) -> float:
        length = len(history) + 1
        below = self.p(token, history[1:]) if history else 1 / self.vocab_size
        total = self.total[length][history]
        if total == 0:
            return below
        count, taken = self.counts[length][(*history, token)], self.taken[length]
        spared = sum(taken[k] * number for k, number in self.kinds[length][history].items())
        return (count - taken[min(count, 3)]) / total + spared / total * below

    def log_probs(self, document: np.ndarray) -> list[float]:
        padded, n = self.padded(document), self.order - 1
        return [math.log(self.p(padded[i], padded[i - n : i])) for i in range(n, len(padded))]


def whole_distribution(model: NGramModel, context: np.ndarray) -> np.ndarray:
    last = [model.log_probs([np.append(context, token)])[-1] for token in range(model.vocab_size)]
    return np.exp(last)


@pytest.mark.parametrize("order", [2, 3, 5])
@pytest.mark.parametrize(("n", "vocab_size"), [(200, 12), (60, 40), (2, 5)])
def test_equals_the_definition(order, n, vocab_size):
    train, held_out = zipf_documents(0, n, vocab_size), zipf_documents(1, 20, vocab_size)
    train.append(np.zeros(2, np.int64))
    slow = SlowModel(train, vocab_size, order)
    expected = np.concatenate([slow.log_probs(document) for document in held_out])
    assert np.allclose(NGramModel(train, vocab_size, order).log_probs(held_out), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("order", [1, 2, 4, 6])
def test_every_distribution_sums_to_one_and_has_no_zero(order):
    model = NGramModel(zipf_documents(2, 80, 30), 50, order)  # the ids 30 to 49 are never seen
    for context in zipf_documents(3, 12, 50):
        p = whole_distribution(model, context)
        assert p.min() > 0
        assert abs(p.sum() - 1) < 1e-12


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_top_is_the_order_of_the_whole_distribution(order):
    model = NGramModel(zipf_documents(4, 60, 20), 25, order)
    for context in zipf_documents(5, 25, 25, longest=12):
        p = whole_distribution(model, context)
        top = model.predict(context, 7)
        assert len(set(top)) == 7
        assert np.allclose(p[top], np.sort(p)[::-1][:7], rtol=1e-12, atol=0)


def test_top_has_a_row_for_each_probability_and_no_more_ids_than_there_are():
    documents = zipf_documents(6, 15, 4)
    model = NGramModel(documents, 4)
    top = model.top(documents, 9)
    assert top.shape == (len(model.log_probs(documents)), 4)
    assert (np.sort(top, axis=1) == np.arange(4)).all()


def test_documents_are_apart():
    documents = zipf_documents(7, 30, 10)
    model, turned = NGramModel(documents, 10), NGramModel(documents[::-1], 10)
    together = model.log_probs(documents)
    assert (together == np.concatenate([model.log_probs([document]) for document in documents])).all()
    assert np.allclose(together, turned.log_probs(documents), rtol=1e-12, atol=0)
    # Planted: end to end as one document, each first token becomes a target and a history crosses the seam.
    crossing = NGramModel([np.concatenate(documents)], 10)
    assert not np.allclose(together, crossing.log_probs(documents))


def test_the_first_token_is_not_predicted():
    model = NGramModel([np.array([3, 1, 2]), np.array([3, 1, 2])], 5)
    assert len(model.log_probs([np.array([3, 1, 2]), np.array([4]), np.array([], np.int64)])) == 2
    p = whole_distribution(
        model, np.array([2])
    )  # 3 begins two documents, and is as likely as what was never seen
    assert p[0] == p[3] == p[4] < p[1] == p[2]


def test_reaches_the_entropy_of_a_markov_chain():
    draw = np.random.default_rng(8)
    transitions = draw.dirichlet(np.full(8, 0.5), size=8)
    chain = [0]
    for u in draw.random(60_000):
        chain.append(int(np.searchsorted(np.cumsum(transitions[chain[-1]])[:-1], u)))
    values, vectors = np.linalg.eig(transitions.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    stationary /= stationary.sum()
    entropy = -(stationary[:, None] * transitions * np.log(np.maximum(transitions, 1e-300))).sum()
    train, held_out = np.array(chain[:50_000]), np.array(chain[50_000:])
    found = -NGramModel([train], 8, order=2).log_probs([held_out]).mean()
    assert found == pytest.approx(entropy, rel=0.02)


def test_completes_what_it_has_read_and_equals_predict_step_by_step():
    text = np.array([5, 1, 4, 2, 3, 0, 5, 1, 4, 2])
    model = NGramModel([text] * 3, 6)
    assert model.complete([text[:3], text[:1], text[:8]], 2).tolist() == [[2, 3], [1, 4], [4, 2]]
    model = NGramModel(zipf_documents(9, 60, 15), 15)
    contexts = [np.array([1]), *zipf_documents(10, 6, 15)]
    for context, completion in zip(contexts, model.complete(contexts, 8), strict=True):
        for i in range(8):
            assert model.predict(np.concatenate((context, completion[:i])), 1)[0] == completion[i]


def test_discounts_leave_something_for_what_was_not_seen():
    draw = np.random.default_rng(11)
    for _ in range(200):
        counts = draw.geometric(draw.uniform(0.2, 0.95), size=draw.integers(1, 400))
        taken = discounts(counts)
        assert (taken > 0).all()
        assert (taken <= (1, 2, 3)).all()
    assert discounts(np.repeat([1, 2, 3, 4], [80, 20, 10, 5])) == pytest.approx([2 / 3, 1.0, 5 / 3])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="order 0"):
        NGramModel([np.array([1, 2])], 5, order=0)
    with pytest.raises(ValueError, match="needs something to predict"):
        NGramModel([np.array([1]), np.array([], np.int64)], 5)
    for wrong in (5, -1):
        with pytest.raises(ValueError, match="vocabulary of 5"):
            NGramModel([np.array([1, 2, wrong])], 5)
    with pytest.raises(ValueError, match="vocabulary of 5"):
        NGramModel([np.array([1, 2])], 5).log_probs([np.array([1, 5])])


def test_small_ids_do_not_overflow():
    documents = zipf_documents(12, 30, 200)
    narrow = [document.astype(np.uint16) for document in documents]
    wide = NGramModel(documents, 60_000).log_probs(documents)
    assert (NGramModel(narrow, 60_000).log_probs(narrow) == wide).all()
