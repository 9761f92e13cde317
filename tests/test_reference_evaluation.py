"""The scores at the end of a run against the reference: agreement, and faults that are named."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import suites.evaluate as suites_evaluate
import suites.memorising as memorising
import training.loss as losses
from data.ngram import NGramModel
from guards.faults import Fault
from reference.memory import Training
from reference.ngrams import NGrams
from selftest.data import write_data
from selftest.run import small_config
from suites.settings import EvalConfig
from suites.tokens import KEPT
from training.begin import train


def documents(seed: int, n: int = 9, words: int = 12) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(words) for _ in range(draw.randrange(1, 30))] for _ in range(n)]


@pytest.mark.parametrize("order", [1, 2, 3, 6])
@pytest.mark.parametrize("words", [3, 12])
def test_the_ngram_model_is_the_counted_one(order: int, words: int) -> None:
    texts = documents(order, 30, words)
    ours, theirs = NGrams(texts, words, order), NGramModel([np.array(t) for t in texts], words, order)
    for text in documents(99, 6, words):
        expected = [ours.distribution(history) for history, _ in ours.predicted(text)]
        assert all(abs(p.sum() - 1) < 1e-12 for p in expected)
        if len(text) > 1:
            own = [np.log(p[token]) for p, token in zip(expected, text[1:], strict=True)]
            assert np.allclose(theirs.log_probs([np.array(text)]), own, rtol=1e-12)


def test_the_longest_run_is_the_one_that_is_seen() -> None:
    training = Training([[1, 2, 3, 4, 5, 6], [9, 3, 4, 5, 9], [3, 4, 5]])
    assert training.longest_run([7, 3, 4, 5, 7], 2) == (3, 3, 0)
    assert training.longest_run([7, 3, 4, 5, 9, 7], 2) == (4, 1, 1)
    assert training.longest_run([6, 9], 2) == (0, 0, -1)  # Not across documents.
    assert training.longest_run([256, 512], 1) == (0, 0, -1)  # Not across the bytes of two ids.


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs on plain texts and on examples, trained for a few updates."""
    folder = tmp_path_factory.mktemp("evaluated")
    write_data(folder)
    found = {}
    for name, source in {"plain": "long", "examples": "examples.jsonl"}.items():
        own = {"max_steps": 3, "validate_every": 3, "samples": 0}
        found[name] = Path(train(small_config(folder, {"data": {"source": source}, "train": own})).folder)
    return found


@pytest.mark.parametrize("name", ["plain", "examples"])
def test_a_healthy_evaluation_agrees(
    runs: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    suites_evaluate.evaluate(
        EvalConfig(str(runs[name]), cache=str(runs[name].parent / "cache"), memorisation=True)
    )
    said = capsys.readouterr().err
    assert "preflight, evaluation: a second opinion agrees: scores to" in said
    assert "memorised text exactly" in said


def without_the_last(right: Any) -> Callable[..., Any]:
    return lambda self, documents, *rest: right(self, list(documents)[:-1], *rest)


def one_longer(right: Any) -> Callable[..., Any]:
    return lambda *args: [run._replace(length=run.length + 1) for run in right(*args)]


def doubled(right: Any) -> Callable[..., Any]:
    def wrong(*args: Any) -> Any:
        scores, sums = right(*args)
        return scores, sums | {KEPT[0]: 2 * sums[KEPT[0]]}

    return wrong


FAULTS: dict[str, tuple[Any, str, Callable[[Any], Any], str]] = {
    "an n-gram model of fewer files": (NGramModel, "__init__", without_the_last, "loss of the n-gram"),
    "discounts": (
        NGramModel,
        "_top",
        lambda right: lambda *args: right(*args)[:, ::-1],
        "top1 of the n-gram",
    ),
    "ranks": (losses, "count_below", lambda right: lambda *args: right(*args) * 0, "top1 of the model"),
    "files": (
        suites_evaluate,
        "add_token_scores",
        lambda right: lambda result, *rest: (right(result, *rest), result.update(files=1)),
        "files and bytes",
    ),
    "nats": (suites_evaluate, "model_scores", doubled, "loss of the model on test document"),
    "longer runs": (memorising, "longest_runs", one_longer, "longest run of sample|memorised text"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_score_is_named(
    runs: dict[str, Path], fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    owner, name, wrong, stage = FAULTS[fault]
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    run, cache = str(runs["plain"]), str(runs["plain"].parent / "cache")
    with pytest.raises(Fault, match=f"differs-from-reference: ({stage})"):
        suites_evaluate.evaluate(EvalConfig(run, cache=cache, memorisation=True))
    found = suites_evaluate.evaluate(
        EvalConfig(run, cache=cache, memorisation=True, allow="differs-from-reference")
    )
    assert "differs-from-reference" in found["allowed faults"]
    assert "ALLOWED differs-from-reference" in capsys.readouterr().err
