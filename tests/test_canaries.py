"""Exposure of planted secrets: by hand, and rising with how often a model saw them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from architecture import Decoder
from benchmarks.canaries import OTHERS, exposure, exposures, line, nll, planted
from config import DataConfig, ModelConfig
from dataset import Batches, prepare_data
from tokenizer import CodeTokenizer

TOKENIZER = CodeTokenizer([], [], [])  # every byte is a token
TIMES = (0, 1, 4, 32)


def test_planted_secrets_stand_in_as_many_files_as_asked():
    texts, own = planted(TIMES)
    assert len(set(own)) == len(own)
    for number, (times, secret) in enumerate(zip(TIMES, own, strict=True)):
        assert sum(line(number, secret) in text for text in texts) == times
        assert "".join(texts).count(secret) == times
    assert planted(TIMES) == (texts, own)
    assert planted(TIMES, 1)[1] != own
    assert planted(())[1] == []


def test_exposure_by_hand():
    others = np.arange(1.0, 8.0)  # seven, so 3 bits at most
    assert exposure(0.5, others) == 3
    assert exposure(1.5, others) == 2  # the second of eight
    assert exposure(9.0, others) == 0
    assert exposure(4.0, others) == pytest.approx(np.log2(8 / 4.5))


def test_nats_are_the_models_own_whatever_stands_beside():
    torch.manual_seed(0)
    model = Decoder(
        ModelConfig(TOKENIZER.vocab_size, 32, n_layer=1, n_head=1, n_embd=16, init="normal")
    ).eval()
    texts = ["a = 1", "longer = 12345", "x"]
    for text, found in zip(texts, nll(model, TOKENIZER, texts), strict=True):
        ids = torch.tensor([[TOKENIZER.start_id, *TOKENIZER.encode(text)]])
        with torch.no_grad():
            log_p = model(ids[:, :-1])[0].log_softmax(-1)
        assert found == pytest.approx(-log_p.gather(1, ids[0, 1:, None]).sum().item(), rel=1e-5)


@pytest.mark.slow
def test_exposure_rises_with_how_often_a_secret_was_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.canaries.OTHERS", 255)
    texts, own = planted(TIMES)
    (tmp_path / "corpus").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "corpus" / f"f{number}.py").write_text(text, "utf-8")
    config = DataConfig(
        str(tmp_path / "corpus"), validation_one_in=0, test_one_in=0, cache=str(tmp_path / "cache"), workers=1
    )
    store = prepare_data(config, TOKENIZER).train
    torch.manual_seed(0)
    model = Decoder(ModelConfig(TOKENIZER.vocab_size, 128, n_layer=2, n_head=2, n_embd=48))
    before = exposures(model.eval(), TOKENIZER, own)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    batches = Batches(store, 8, 96, seed=0)
    model.train()
    for step in range(150):
        tokens, labels, documents, positions = batches.batch(step)
        logits = model(tokens, positions, documents)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unseen, once, four, often = exposures(model.eval(), TOKENIZER, own)
    assert often == 8 == np.log2(256)
    assert often > max(before)
    assert often >= four > unseen
    assert four >= once
    assert OTHERS == 1023
