"""data/curriculum.py: what is rare is hard, every order is one of its own, and batches go by it."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from config import DataConfig, parse_config
from data.corpus import split_of
from data.curriculum import difficulties, order_of, rank_correlation
from data.tokenstore import TokenStore
from dataset import IGNORE_INDEX, Batches, prepare_data
from tokenizer import CodeTokenizer

KINDS = ("rarity", "entropy", "loss")
BY_DIFFICULTY = ("easy-first", "hard-first", "hybrid")
COMMON = "for i in range(10):\n    print(i)\n"


def drawn(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def store_of(folder: Path, rows: list[dict[str, str]]) -> TokenStore:
    """The train store of these rows, none of them held out but two."""
    folder.mkdir(exist_ok=True)
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = ["".join(row.values()) for row in rows]
    config = DataConfig(source=str(source), cache=str(folder / "cache"), validation_one_in=5)
    return prepare_data(config, CodeTokenizer.train(texts, 400, 0)).train


def source(rng: random.Random, words: int, lines: int) -> str:
    """Lines over so many different words: the more there are, the harder the text."""
    names = [f"{rng.choice('abcdefgh')}{n}" for n in range(words)]
    return "".join(f"{rng.choice(names)} = {rng.choice(names)} + {rng.choice(names)}\n" for _ in range(lines))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    rng = random.Random(1)
    rows = [{"path": f"{i}.py", "text": source(rng, 2 + i, 20 + i % 7)} for i in range(60)]
    return store_of(tmp_path_factory.mktemp("plain"), rows)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    rng = random.Random(2)
    rows = [
        {"prompt": f"{i}\n" + source(rng, 3, 2), "completion": source(rng, 2 + i, 1 + i % 3)}
        for i in range(60)
    ]
    return store_of(tmp_path_factory.mktemp("pairs"), rows)


def words_of(store: TokenStore) -> np.ndarray:
    """How many different words a document of the fixture was drawn from."""
    return np.array([int(name.split(".")[0]) for name in store.names])


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_more_words_are_harder(store: TokenStore, kind: str) -> None:
    hard = difficulties(store, kind)
    assert hard.shape == (store.n_documents,) and np.isfinite(hard).all()
    assert rank_correlation(hard, words_of(store)) > 0.6


@pytest.mark.parametrize("kind", ["rarity", "loss"])
def test_the_text_of_rare_tokens_is_the_hardest_however_often_it_repeats_itself(
    tmp_path: Path, kind: str
) -> None:
    """A model that saw the text would find it the easiest of all."""
    rows = [{"path": f"{i}.py", "text": COMMON * 5 + f"x = {i}\n"} for i in range(30)]
    rare = next(i for i in range(30) if split_of(f"{i}.py", 5) == "train")
    rows[rare]["text"] = "@\\qz~w|^!?`$;" * 12
    store = store_of(tmp_path, rows)
    assert store.names[int(difficulties(store, kind).argmax())] == f"{rare}.py"


def test_rarity_is_by_hand_the_mean_surprise(store: TokenStore) -> None:
    documents = [store.document(i).tolist() for i in range(store.n_documents)]
    every = [token for document in documents for token in document]
    p = {token: every.count(token) / len(every) for token in set(every)}
    expected = [np.mean([-np.log(p[token]) for token in document]) for document in documents]
    np.testing.assert_allclose(difficulties(store, "rarity"), expected)


def test_orders_are_permutations_that_differ_and_go_by_difficulty() -> None:
    hard = drawn(1).random(400)
    orders = {kind: order_of(hard, kind, drawn(2)) for kind in BY_DIFFICULTY}
    orders["shuffled"] = drawn(2).permutation(400)
    assert all(sorted(order) == list(range(400)) for order in orders.values())
    for (_, one), (_, other) in combinations(orders.items(), 2):
        assert (one != other).mean() > 0.9
    assert (np.diff(hard[orders["easy-first"]]) >= 0).all()
    assert (np.diff(hard[orders["hard-first"]]) <= 0).all()


def test_hybrid_is_drawn_from_a_growing_share_of_the_easiest() -> None:
    n = 1000
    places = np.empty((50, n))
    for seed in range(50):
        order = order_of(np.arange(n, dtype=float), "hybrid", drawn(seed))
        assert (order[: n // 100] < n * 0.15).all()
        places[seed] = order
    early, late = places[:, :100].mean(), places[:, -100:].mean()
    assert early < 150 < 550 < late
    assert np.abs(np.diff(places[:, :100], axis=1)).mean() > 20  # drawn, not sorted


def test_equal_difficulties_are_shuffled_anew_each_epoch() -> None:
    hard = np.zeros(100)
    assert (order_of(hard, "easy-first", drawn(1)) != order_of(hard, "easy-first", drawn(2))).any()


def batches_of(store: TokenStore, order: str, kind: str = "rarity", **more) -> Batches:
    hard = difficulties(store, kind) if order in BY_DIFFICULTY else None
    return Batches(store, 2, 64, 3, order=order, difficulty=hard, **more)


@pytest.mark.parametrize("which", ["store", "pairs"])
def test_batches_go_by_the_order(which: str, request: pytest.FixtureRequest) -> None:
    store: TokenStore = request.getfixturevalue(which)
    hard = difficulties(store, "rarity")
    surprise = np.zeros(store.vocab_size)
    every = np.concatenate([store.document(i) for i in range(store.n_documents)])
    counts = np.bincount(every, minlength=store.vocab_size)
    surprise[counts > 0] = -np.log(counts[counts > 0] / counts.sum())
    found = {}
    for order in ("shuffled", "sequential", *BY_DIFFICULTY):
        batches = batches_of(store, order)
        steps = [batches.batch(step) for step in range(batches.steps_per_epoch)]
        means = [float(surprise[b.tokens[b.document_ids >= 0].numpy()].mean()) for b in steps]
        found[order] = rank_correlation(np.array(means), np.arange(len(means)))
    assert hard.std() > 0
    assert found["easy-first"] > 0.7 and found["hard-first"] < -0.7, found
    assert abs(found["shuffled"]) < 0.5


@pytest.mark.parametrize("order", ["sequential", *BY_DIFFICULTY])
@pytest.mark.parametrize("which", ["store", "pairs"])
def test_every_order_shows_every_target_once_and_is_a_function_of_the_step(
    which: str, order: str, request: pytest.FixtureRequest
) -> None:
    store: TokenStore = request.getfixturevalue(which)

    def targets(batches: Batches, epoch: int) -> list[int]:
        first = epoch * batches.steps_per_epoch
        rows = [batches.batch(first + step) for step in range(batches.steps_per_epoch)]
        return sorted(int(t) for b in rows for t in b.labels[b.labels != IGNORE_INDEX])

    one = Batches(store, 1, 64, 3, order=order, difficulty=batches_of(store, order).difficulty)
    assert targets(one, 0) == targets(one, 1) == targets(Batches(store, 1, 64, 0), 0)
    later = batches_of(store, order)
    later.batch(2 * later.steps_per_epoch)
    for step in (3, 0, later.steps_per_epoch + 1):
        assert (later.batch(step).tokens == batches_of(store, order).batch(step).tokens).all()


def test_sequential_is_the_order_of_the_corpus(store: TokenStore) -> None:
    batches = Batches(store, 1, 64, 3, order="sequential")
    rows = [batches.batch(step).tokens[0] for step in range(batches.steps_per_epoch)]
    every = np.concatenate([store.document(i) for i in range(store.n_documents)])
    shown = np.concatenate([row.numpy() for row in rows])[: len(every)]
    assert (shown[: len(every) // 64 * 64] == every[: len(every) // 64 * 64]).all()


def test_a_difficulty_that_no_order_goes_by_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--data.difficulty", "loss"])
    assert "data.difficulty is set, but data.order goes by none" in capsys.readouterr().err
    assert parse_config(["--data.difficulty", "loss", "--data.order", "hybrid"]).data.difficulty == "loss"


def test_the_tokens_of_a_store_do_not_depend_on_the_order(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": COMMON * n}) + "\n" for n in range(1, 30))
    )
    tokenizer = CodeTokenizer.train([COMMON], 300, 0)
    base = {"source": str(tmp_path / "rows.jsonl"), "cache": str(tmp_path / "cache"), "validation_one_in": 5}
    prepare_data(DataConfig(**base), tokenizer)
    prepare_data(DataConfig(**base, order="hard-first", difficulty="entropy"), tokenizer)
    assert len(list((tmp_path / "cache").glob("tokens-*"))) == 1
