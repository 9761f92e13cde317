"""guards/order.py: the order that was asked for passes, another one is named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from config import Config, DataConfig
from data.curriculum import difficulties
from data.tokenstore import TokenStore
from dataset import Batches
from guards.order import order
from tests.test_curriculum import BY_DIFFICULTY, KINDS, pairs, store  # noqa: F401


def found(store: TokenStore, asked: str, kind: str, **given: Any) -> list[str]:  # noqa: F811
    """Return the guard's lines on batches made with `given`, where the settings request `asked` by `kind`."""
    settings = {"order": asked, "difficulty": difficulties(store, kind)} | given
    batches = Batches(store, 2, 64, 3, **settings)
    subject = SimpleNamespace(
        config=Config(data=DataConfig(order=asked, difficulty=kind)),  # pyright: ignore
        micro_batch=batches.batch,
        batches=batches,
        train=store,
        validation=TokenStore(store.folder, "validation"),
    )
    return [str(finding) for finding in order(subject)]  # pyright: ignore


@pytest.mark.parametrize("asked", BY_DIFFICULTY)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["store", "pairs"])
def test_the_order_that_was_asked_for_passes(
    which: str, kind: str, asked: str, request: pytest.FixtureRequest
) -> None:
    (line,) = found(request.getfixturevalue(which), asked, kind)
    assert line.startswith(f"{asked} by {kind}: rank correlation of difficulty with time")


@pytest.mark.parametrize("asked", BY_DIFFICULTY)
def test_shuffled_batches_are_named(store: TokenStore, asked: str) -> None:  # noqa: F811
    (line,) = found(store, asked, "rarity", order="shuffled", difficulty=None)
    assert line.startswith("order-ignored: ") and "are those of shuffled" in line


@pytest.mark.parametrize("asked", BY_DIFFICULTY)
@pytest.mark.parametrize("kind", ["rarity", "loss"])
def test_scores_of_the_wrong_sign_are_named(store: TokenStore, asked: str, kind: str) -> None:  # noqa: F811
    *_, line = found(store, asked, kind, difficulty=-difficulties(store, kind))
    assert line.startswith("order-inverted: ")


def test_one_order_for_two_settings_is_named(
    store: TokenStore,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import dataset

    monkeypatch.setattr(dataset, "order_of", lambda hard, kind, draw: np.arange(len(hard)))
    (line,) = found(store, "easy-first", "rarity")
    assert "order-ignored" in line and "are those of hard-first" in line
