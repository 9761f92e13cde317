"""The metric `semantic` against plain numpy over the model's own layers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_eval import BYTES, random_model

from metrics.registry import METRICS, metric, score
from suites.hidden import Judge
from suites.records import models_of, scored_again
from suites.rescoring import differences
from suites.scoring import SUITES, Example, Predictions, scored

PAIRS = [
    ("def f(x):", "def g(y):"),
    ("return a", "return a"),
    ("", "x = 1"),
    ("", ""),
    ("ßeta", "beta"),
    ("a", ""),
]


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return random_model()


def by_hand(model, layer: int, text: str) -> np.ndarray:
    """The residual stream after so many blocks, or what the head reads."""
    ids = [BYTES.start_id, *BYTES.encode(text)]
    shorter = type(model)(replace(model.config, n_layer=layer or model.config.n_layer)).eval()
    shorter.load_state_dict(model.state_dict(), strict=False)
    if layer:
        shorter.norm = torch.nn.Identity()
    with torch.no_grad():
        return shorter.hidden(torch.tensor([ids]))[0, 1:].double().numpy()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_it_is_the_f1_of_greedy_cosines_of_that_layer(model, layer):
    judge = Judge(model, BYTES, "m", layer)
    for prediction, reference in PAIRS[:1] + PAIRS[4:5]:
        a, b = by_hand(model, layer, prediction), by_hand(model, layer, reference)
        a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
        cosines = a @ b.T
        p, r = cosines.max(1).mean(), cosines.max(0).mean()
        assert judge.similarity(prediction, reference) == pytest.approx(100 * 2 * p * r / (p + r), rel=1e-6)
    assert f"layer {layer} of 2" in judge.metric().equals or layer == 0


def test_equal_texts_have_100_and_nothing_has_0(model):
    judge = Judge(model, BYTES, "m")
    found = {pair: judge.similarity(*pair) for pair in PAIRS}
    assert found["return a", "return a"] == found["", ""] == 100
    assert found["", "x = 1"] == found["a", ""] == 0
    assert 0 < found["def f(x):", "def g(y):"] < 100


def test_it_repeats_and_does_not_hang_on_what_else_is_scored(model):
    first = score(["semantic"], PAIRS, models={"semantic": Judge(model, BYTES, "m").metric()})["semantic"]
    again = score(["semantic"], PAIRS[::-1], models={"semantic": Judge(model, BYTES, "m").metric()})[
        "semantic"
    ]
    assert first.samples.tolist() == again.samples[::-1].tolist()


def test_a_text_longer_than_the_model_is_cut(model):
    judge = Judge(model, BYTES, "m")
    assert judge.vectors("x" * 500).shape == (model.config.block_size - 1, model.config.n_embd)


def test_without_its_model_it_is_refused_and_a_wrong_layer_too(model):
    assert "semantic" not in METRICS
    assert metric("semantic").name == "semantic"
    with pytest.raises(ValueError, match="hidden states of a model, and none is here"):
        score(["semantic"], PAIRS)
    with pytest.raises(ValueError, match="embedding_layer is 3, and the model has 2 layers"):
        Judge(model, BYTES, "m", 3)


def test_a_record_keeps_its_samples_and_is_scored_again_without_the_model(model):
    examples = [Example("f", i, "p", wanted) for i, (_, wanted) in enumerate(PAIRS)]
    draws = Predictions([made for made, _ in PAIRS], more=[[e.reference for e in examples]])
    predictions = {"model": draws, "copy": Predictions(["p"] * len(PAIRS))}
    models = {"semantic": Judge(model, BYTES, "m", 1).metric()}
    record = scored(SUITES["pairs"], examples, predictions, ["semantic", "chrf"], models=models)
    assert list(differences(record)) == []
    again = scored_again(record)["model"]["semantic"]
    assert again.value == pytest.approx(record["scores"]["model"]["semantic"]["mean"], rel=1e-12)
    assert record["signatures"]["semantic"] == models_of(record)["semantic"].signature("python")
    assert "hidden states of m, layer 1 of 2" in record["signatures"]["semantic"]
    record["measured"]["semantic"]["model"][0][0] += 7
    assert any("semantic" in said for said in differences(record))
