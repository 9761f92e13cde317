"""Small decoders with known answers, and tokenizers for them."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from architecture import Decoder
from config import ModelConfig
from generation.settings import GenerationConfig
from tokenizer import Tokenizer

# The parts are spelt out: a test says what it tests, whatever the default model becomes.
SMALL = ModelConfig(
    vocab_size=40,
    block_size=32,
    n_layer=2,
    n_head=4,
    n_embd=16,
    norm="rms",
    norm_weight=False,
    norm_bias=False,
    position="rotary",
    mlp="relu2",
    qk_norm=True,
    qkv_bias=False,
    attention_bias=False,
    mlp_bias=False,
    tie_embeddings=False,
)
# What turns weights without biases into a model that has all of them.
BIASES = {
    "norm": "layer",
    "norm_weight": True,
    "norm_bias": True,
    "qkv_bias": True,
    "attention_bias": True,
    "mlp_bias": True,
}
BIASED = replace(SMALL, **BIASES)
MODELS = {
    "rotary half": replace(SMALL, norm_weight=True),
    "rotary interleaved": replace(SMALL, rotary_layout="interleaved", mlp="swiglu", qk_norm=False),
    "rotary partial": replace(BIASED, head_dim=8, rotary_dim=4, block="parallel", mlp="gelu"),
    "learned": replace(BIASED, position="learned", qk_norm=False, mlp="gelu_tanh", tie_embeddings=True),
    "sinusoidal": replace(BIASED, position="sinusoidal"),
    "multi-query": replace(SMALL, n_kv_head=1, fused_qkv=True, qkv_bias=True),
    "grouped-query": replace(SMALL, n_kv_head=2, attention="reference"),
    "no position": replace(SMALL, position="none"),
}
PROMPTS = [[1, 5, 9, 3, 7, 30, 2], [1], [4, 4, 8], [1, 39, 12, 20, 33, 6, 17, 28, 9, 10, 11]]


def scramble(module: nn.Module, seed: int = 0) -> None:
    """Sample every parameter: biases of 0 and norms of 1, as at initialisation, hide most faults."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4, generator=generator)


def scrambled(config: ModelConfig, seed: int = 0) -> Decoder:
    """Make a decoder of the settings whose every parameter is sampled, ready to evaluate."""
    model = Decoder(config)
    scramble(model, seed)
    return model.eval()


def chain(rows: dict[int, dict[int, float]], vocab_size: int) -> Decoder:
    """A model whose next token depends on the last one alone: rows[last][next] is its probability.

    The blocks are the identity and the embedding one-hot, so the head's columns are the logits.
    """
    config = replace(
        SMALL,
        vocab_size=vocab_size,
        n_embd=vocab_size,
        n_layer=1,
        n_head=1,
        head_dim=2,
        n_inner=2,
        position="none",
        norm_eps=1e-12,
        init="zero_output",
    )
    model = Decoder(config)
    head = torch.full((vocab_size, vocab_size), -60.0)
    for last, nexts in rows.items():
        for next, probability in nexts.items():
            head[next, last] = math.log(probability)
    with torch.no_grad():
        model.embed.weight.copy_(torch.eye(vocab_size))
        model.head.weight.copy_(head / math.sqrt(vocab_size))  # the norm makes the 1 a sqrt(V)
    return model.eval()


class Bytes(Tokenizer):
    """A token a byte, after pad, bos and eos."""

    vocab_size, pad_id, bos_id, eos_id, fingerprint = 259, 0, 1, 2, "bytes"

    def __init__(self):
        self.decoded: list[int] = []

    def encode(self, text: str) -> list[int]:
        return [3 + byte for byte in text.encode()]

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        assert all(0 <= id < self.vocab_size for id in ids)
        self.decoded.append(len(ids))
        return bytes(id - 3 for id in ids if id > 2).decode(errors="replace")

    def save(self, folder: Path) -> None:
        raise NotImplementedError

    @classmethod
    def load(cls, folder: Path, as_saved: bool = False) -> Tokenizer:
        raise NotImplementedError


class Words(Bytes):
    """A token a word, with the spaces between them implied: decode(a) + decode(b) != decode(a + b)."""

    words = ("", "", "", "one", "two", "three", "four", "five")

    def encode(self, text: str) -> list[int]:
        return [self.words.index(word) for word in text.split() if word in self.words]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self.words[id] for id in ids if id > 2)


class Shouting(Bytes):
    """Capitals for whatever follows bos, as far off as it may be."""

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        return super().decode(ids).upper() if ids[:1] == [self.bos_id] else super().decode(ids)


def saying(text: str, tokenizer: Tokenizer, end: int | None = None) -> Decoder:
    """A chain that says `text`, each of whose tokens is followed by the same one wherever it stands."""
    ids = tokenizer.prompt_ids(text)
    ids += [] if end is None else [end]
    nexts = dict(itertools.pairwise(ids))
    assert all(nexts[a] == b for a, b in itertools.pairwise(ids))
    return chain({a: {b: 1.0} for a, b in nexts.items()}, tokenizer.vocab_size)


def greedy(max_new_tokens: int = 12) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=max_new_tokens)


@torch.no_grad()
def uncached_greedy(model: Decoder, prompt: list[int], n: int) -> tuple[list[int], float]:
    """The slow way, one whole forward a token, and then the log-probability from one more."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    log_probs = model(torch.tensor([ids])).double().log_softmax(-1)[0]
    return ids[len(prompt) :], sum(log_probs[t - 1, ids[t]].item() for t in range(len(prompt), len(ids)))


def log_prob(model: Decoder, prompt: list[int], ids: list[int]) -> float:
    with torch.no_grad():
        log_probs = model(torch.tensor([prompt + ids])).double().log_softmax(-1)[0]
    return sum(log_probs[len(prompt) - 1 + t, id].item() for t, id in enumerate(ids))


def beams(n: int, max_new_tokens: int = 8, length_penalty: float = 0.0) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=max_new_tokens, num_beams=n, length_penalty=length_penalty)
