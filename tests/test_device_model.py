"""The decoder and its loss on each device, against attention and cross-entropy written out on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from decoders import MODELS
from devices import DEVICES, DTYPES, assert_all_near, assert_near, gradients, sampled
from torch import Tensor

from architecture import Decoder
from config import ModelConfig
from dataset import IGNORE_INDEX, Batch
from training import loss
from training.loss import token_loss

# Heads of 16 numbers, which every fused kernel of attention takes, and rows that fill a block of them.
VARIANTS = {
    name: replace(config, n_embd=64, block_size=48, vocab_size=300, attention="fast")
    for name, config in {
        **MODELS,
        "window": replace(MODELS["rotary half"], sliding_window=5, window_layers=(1,)),
        "tied": replace(MODELS["rotary half"], tie_embeddings=True),
        "heads in shards": replace(MODELS["multi-query"], n_kv_head=0, qkv_layout="shards", head_bias=True),
        "llama3": replace(
            MODELS["grouped-query"],
            rope_scaling="llama3",
            rope_factor=4.0,
            rope_context=8,
            rope_high_freq=1.5,
        ),
    }.items()
}
LENGTHS = torch.tensor([[48, 0, 0], [20, 1, 27], [7, 30, 11]])  # Tokens of the documents of each row.


def packed_batch() -> Batch:
    """Three rows of one to three documents; three in ten tokens are no targets."""
    generator = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(300, (3, 48), generator=generator) for _ in range(2))
    labels[torch.rand(3, 48, generator=generator) < 0.3] = IGNORE_INDEX
    documents = torch.stack([torch.arange(3).repeat_interleave(lengths) for lengths in LENGTHS])
    positions = torch.stack([torch.cat([torch.arange(int(n)) for n in lengths]) for lengths in LENGTHS])
    return Batch(tokens, labels, documents, positions)


def one_document_a_row() -> Batch:
    """The rows are one document each, so that attention is causal, without a mask."""
    batch = packed_batch()
    positions = torch.arange(48).expand(3, 48).contiguous()
    return batch._replace(document_ids=torch.zeros_like(batch.tokens), positions=positions)


def scrambled(config: ModelConfig) -> Decoder:
    """A model with every parameter sampled, so large that every part changes the logits."""
    model = Decoder(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1, generator=generator)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter += 1  # A norm.
    return model.eval()


def passed(model: Decoder, batch: Batch, device: str, precision: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits of a copy on the device, and the gradients of a loss that weighs each differently."""
    model = copy.deepcopy(model).to(device)
    tokens, _, documents, positions = (t.to(device) for t in batch)
    with torch.autocast(device, DTYPES[precision], enabled=precision != "fp32"):
        logits = model(tokens, positions, documents)
    (logits.float() * sampled(*logits.shape, seed=9).to(device)).sum().backward()
    return logits, gradients(model)


@DEVICES
@pytest.mark.parametrize("make_batch", [packed_batch, one_document_a_row])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_gradients_are_those_of_attention_written_out(
    name: str, make_batch: Callable[[], Batch], device: str
) -> None:
    model, batch = scrambled(VARIANTS[name]), make_batch()
    plain = Decoder(replace(VARIANTS[name], attention="reference"))
    plain.load_state_dict(model.state_dict())
    expected, expected_gradients = passed(plain, batch, "cpu", "fp32")
    for precision in ("fp32", "bf16"):
        logits, found = passed(model, batch, device, precision)
        assert_near(logits, expected, precision, "logits")
        assert_all_near(found, expected_gradients, precision)


Losses = tuple[Tensor, Tensor, dict[str, Tensor]]


def loss_of(
    model: Decoder,
    batch: Batch,
    device: str,
    precision: str = "fp32",
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Losses:
    """Return the mean objective and cross-entropy of a copy on the device, in chunks, and the gradients."""
    model = copy.deepcopy(model).to(device)
    with torch.autocast(device, DTYPES[precision], enabled=precision != "fp32"):
        result = token_loss(model, Batch(*(t.to(device) for t in batch)), smoothing, z_loss)
    objective = result.objective / result.tokens
    objective.backward()
    return objective, result.cross_entropy / result.tokens, gradients(model)


def plain_loss(model: Decoder, batch: Batch, smoothing: float = 0.0, z_loss: float = 0.0) -> Losses:
    """Return loss and gradients by F.cross_entropy of all logits at once, on the CPU."""
    model = copy.deepcopy(model)
    targets = batch.labels != IGNORE_INDEX
    logits = model(batch.tokens, batch.positions, batch.document_ids)[targets]
    objective = F.cross_entropy(logits, batch.labels[targets], label_smoothing=smoothing)
    objective = objective + z_loss * logits.logsumexp(-1).square().mean()
    objective.backward()
    return objective, F.cross_entropy(logits, batch.labels[targets]), gradients(model)


@DEVICES
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.02)])
@pytest.mark.parametrize("name", ["rotary half", "tied", "heads in shards"])
def test_the_loss_of_training_is_the_plain_one(
    name: str, smoothing: float, z_loss: float, device: str
) -> None:
    model, batch = scrambled(VARIANTS[name]), packed_batch()
    objective, cross_entropy, wanted = plain_loss(model, batch, smoothing, z_loss)
    for precision, of_loss in (("fp32", "fp32"), ("bf16", "bf16 loss")):
        found = loss_of(model, batch, device, precision, smoothing, z_loss)
        assert_near(found[0], objective, of_loss, "objective")
        assert_near(found[1], cross_entropy, of_loss, "cross-entropy")
        assert_all_near(found[2], wanted, precision)


@DEVICES
@pytest.mark.parametrize("tokens_in_a_chunk", [32, 1000])
@pytest.mark.parametrize("largest", [1.0, 1e3])
def test_chunks_of_a_large_vocabulary(
    largest: float, tokens_in_a_chunk: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50,304 words, and logits up to 1e3, beyond the range of a softmax in fp32."""
    config = replace(VARIANTS["rotary half"], vocab_size=50_304, n_layer=1, n_embd=32)
    monkeypatch.setitem(loss.CHUNK_BYTES, device, config.vocab_size * 8 * tokens_in_a_chunk)
    model, batch = scrambled(config), packed_batch()
    with torch.no_grad():
        logits = model(batch.tokens, batch.positions, batch.document_ids)
        model.head.weight *= largest / logits.abs().max()
    objective, _, wanted = plain_loss(model, batch)
    found, _, found_gradients = loss_of(model, batch, device)
    assert_near(found, objective, "fp32")
    assert_all_near(found_gradients, wanted, "fp32" if largest == 1 else "fp32, far logits")
