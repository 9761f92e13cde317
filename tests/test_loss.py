"""The chunked loss against the plain one, and the scores made of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from architecture import Decoder
from config import ModelConfig
from dataset import IGNORE_INDEX, Batch
from modules.precision import Precision
from training import loss
from training.loss import count_below, score, token_loss

FP32 = Precision(torch.device("cpu"), torch.float32, "")


def scrambled(**settings: Any) -> Decoder:
    """A tiny model with every parameter drawn anew."""
    base: dict[str, Any] = {"vocab_size": 53, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**(base | settings)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def random_batch(rows: int = 3, length: int = 16, masked: float = 0.3, seed: int = 1) -> Batch:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(53, (rows, length), generator=g)
    labels = torch.randint(53, (rows, length), generator=g)
    labels[torch.rand(rows, length, generator=g) < masked] = IGNORE_INDEX
    return Batch(tokens, labels, torch.zeros_like(tokens), torch.arange(length).expand(rows, length))


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (0.1, 0.02)])
@pytest.mark.parametrize("rows_in_chunk", [1, 7, 1000])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_chunked_equals_plain(
    monkeypatch: pytest.MonkeyPatch,
    smoothing: float,
    z_loss: float,
    rows_in_chunk: int,
    tied: bool,
    biased: bool,
) -> None:
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 53 * 8 * rows_in_chunk)
    model, batch = scrambled(tie_embeddings=tied, head_bias=biased), random_batch()
    bears = int((batch.labels != IGNORE_INDEX).sum())

    result = token_loss(model, batch, smoothing, z_loss)
    (result.objective / bears).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    logits = model(batch.tokens, batch.positions, batch.document_ids).flatten(0, 1)
    plain = F.cross_entropy(
        logits, batch.labels.flatten(), label_smoothing=smoothing, ignore_index=IGNORE_INDEX
    )
    kept = logits[batch.labels.flatten() != IGNORE_INDEX]
    plain = plain + z_loss * kept.logsumexp(-1).square().mean()
    plain.backward()
    assert result.tokens == bears
    torch.testing.assert_close(result.objective / bears, plain, rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.02)])
def test_gradients_in_bf16_are_those_of_its_logits(smoothing: float, z_loss: float) -> None:
    model, batch = scrambled(), random_batch()
    given: list[dict[str, torch.Tensor]] = []
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            result = token_loss(model, batch, smoothing, z_loss)
        (result.objective / result.tokens).backward()
        given.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    exact, rounded = given
    assert exact.keys() == rounded.keys()
    for name, grad in exact.items():
        assert (rounded[name] - grad).norm() < 0.03 * grad.norm(), name


def test_cross_entropy_is_never_smoothed() -> None:
    model, batch = scrambled(), random_batch()
    smoothed, plain = token_loss(model, batch, 0.2), token_loss(model, batch)
    assert smoothed.cross_entropy.item() == plain.cross_entropy.item() == plain.objective.item()
    assert smoothed.objective.item() != plain.objective.item()


def test_ranks_equal_topk() -> None:
    model, batch = scrambled(), random_batch(rows=8)
    result = token_loss(model, batch, ranks=True)
    bears = batch.labels != IGNORE_INDEX
    best = model(batch.tokens, batch.positions, batch.document_ids)[bears].topk(5).indices
    hits = best == batch.labels[bears][:, None]
    assert (result.top1, result.top5) == (int(hits[:, 0].sum()), int(hits.sum()))
    assert 0 < result.top5 < result.tokens  # neither bound would show a fault


def test_ranks_are_counted_in_little_memory() -> None:
    """A sum over many rows at once made int64 of them all, eight bytes for each logit."""
    logits = torch.randn(256, 1000)
    targets = logits[:, 7:8]
    with torch.profiler.profile(profile_memory=True) as profile:
        found = count_below(logits, targets)
    assert torch.equal(found, (logits < targets).sum(dim=1))
    assert 0 < max(event.self_cpu_memory_usage for event in profile.events() or ()) <= 16 * 1000 * 8


def test_a_constant_output_has_no_hits() -> None:
    model = scrambled()
    torch.nn.init.zeros_(model.head.weight)
    result = token_loss(model, random_batch(), ranks=True)
    assert (result.top1, result.top5) == (0, 0)
    assert math.isclose(result.cross_entropy.item() / result.tokens, math.log(53), rel_tol=1e-5)


def test_logits_that_are_not_numbers_have_no_hits() -> None:
    model = scrambled()
    torch.nn.init.constant_(model.head.weight, math.nan)
    result = token_loss(model, random_batch(), ranks=True)
    assert (result.top1, result.top5) == (0, 0) and math.isnan(result.cross_entropy.item())


def test_scores_do_not_depend_on_how_rows_are_batched() -> None:
    model, batch = scrambled(dropout=0.5), random_batch(rows=6)
    whole = score(model, [batch], FP32)
    parts = score(model, [Batch(*(t[i : i + 1] for t in batch)) for i in range(6)], FP32)
    assert whole.tokens == parts.tokens and whole.top1 == parts.top1 and whole.top5 == parts.top5
    assert math.isclose(whole.nats, parts.nats, rel_tol=1e-5)
    assert model.training  # the mode is put back


def test_validation_equals_training_loss_in_eval_mode() -> None:
    model, batch = scrambled(dropout=0.5), random_batch()
    scores = score(model, [batch], FP32)
    model.eval()
    trained = token_loss(model, batch)
    assert math.isclose(scores.nats, trained.objective.item(), rel_tol=1e-6)
    model.train()
    assert not math.isclose(scores.nats, token_loss(model, batch).objective.item(), rel_tol=1e-3)


def test_nothing_to_score_is_refused() -> None:
    batch = random_batch()
    batch.labels.fill_(IGNORE_INDEX)
    with pytest.raises(ValueError, match="no token of the validation data is a target"):
        score(scrambled(), [batch], FP32)


def test_no_full_matrix_of_logits_is_held() -> None:
    """The largest tensor that backward keeps is far below rows x vocabulary."""
    model = Decoder(ModelConfig(vocab_size=5000, block_size=64, n_layer=1, n_head=1, n_embd=8))
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(5000, (64, 64), generator=g)
    batch = Batch(tokens, tokens, torch.zeros_like(tokens), torch.arange(64).expand(64, 64))
    largest = 0

    def note(t: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        token_loss(model, batch)
    assert largest < 64 * 64 * 5000 / 50


def test_targets_beyond_the_range_of_a_softmax() -> None:
    """Where exp(logit - largest) is 0 in fp32 the loss is still that of log_softmax."""
    model, batch = scrambled(), random_batch()
    model.head.weight.data *= 100
    result = token_loss(model, batch, 0.1)
    result.objective.backward()
    assert model.head.weight.grad is not None
    ours = model.head.weight.grad.clone()
    model.zero_grad()
    logits = model(batch.tokens, batch.positions, batch.document_ids).flatten(0, 1)
    assert (logits.amax(1) - logits.amin(1)).max() > 200
    settings: dict[str, Any] = {"ignore_index": IGNORE_INDEX, "reduction": "sum"}
    plain = F.cross_entropy(logits, batch.labels.flatten(), label_smoothing=0.1, **settings)
    plain.backward()
    torch.testing.assert_close(result.objective, plain, rtol=1e-5, atol=0)
    unsmoothed = F.cross_entropy(logits, batch.labels.flatten(), **settings)
    torch.testing.assert_close(result.cross_entropy, unsmoothed.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(ours, model.head.weight.grad, rtol=1e-4, atol=1e-4)
