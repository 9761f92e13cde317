"""Exactness pairs for the cache and for decoding: cached = uncached, batched = single, one beam = greedy.

Every parameter is scrambled: at initialisation biases are 0 and norms 1, so most faults would not show.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from architecture import Decoder
from config import ModelConfig
from config.console import printable
from generation import rows as rows_under_way
from generation.engine import _beam_search, generate_ids
from generation.kvcache import KVCache
from generation.rows import LiveRows, pad_left, read_together
from generation.sampling import (
    adjust_logits,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    row_generator,
    sample,
)
from generation.settings import GenerationConfig
from generation.text import generate, trim_prompt
from modules import linear
from tokenization.healing import Prompt
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
BIASED = replace(
    SMALL, norm="layer", norm_weight=True, norm_bias=True, qkv_bias=True, attention_bias=True, mlp_bias=True
)
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


def scrambled(config: ModelConfig, seed: int = 0) -> Decoder:
    model = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4, generator=generator)
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
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self.words[id] for id in ids if id > 2)


class Shouting(Bytes):
    """Capitals for whatever follows bos, as far off as it may be."""

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        return super().decode(ids).upper() if ids[0] == self.bos_id else super().decode(ids)


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


# --- the cache ------------------------------------------------------------------------------------


@torch.no_grad()
def read_in_pieces(model: Decoder, prompts: Sequence[list[int]], sizes: Sequence[int]) -> Tensor:
    cache = KVCache(model.config.n_layer, sum(sizes) + 3)
    pieces = zip(*(x.split(sizes, dim=1) for x in pad_left(prompts)), strict=True)
    parts = [model(*piece, cache) for piece in pieces]
    assert cache.length == sum(sizes)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_equal_uncached_at_every_position(name):
    model = scrambled(MODELS[name])
    longest = max(map(len, PROMPTS))
    with torch.no_grad():
        alone = [model(torch.tensor([ids]))[0] for ids in PROMPTS]
    assert alone[-1].std() > 0.3  # a model that says something
    for sizes in ([longest], [1] * longest, [4, 1, 5, 1], [10, 1]):
        logits = read_in_pieces(model, PROMPTS, sizes)
        for row, expected in enumerate(alone):
            torch.testing.assert_close(logits[row, longest - len(expected) :], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_batched_cached_greedy_equals_single_uncached(name):
    model = scrambled(MODELS[name], seed=1)
    results = generate_ids(model, PROMPTS, greedy())
    for prompt, result in zip(PROMPTS, results, strict=True):
        ids, expected = uncached_greedy(model, prompt, 12)
        assert result.ids == ids
        assert result.log_prob == pytest.approx(expected, abs=1e-4)
        assert result.finish_reason == "length"
        assert generate_ids(model, [prompt], greedy())[0].ids == ids


def test_products_of_few_rows_give_the_same_tokens(monkeypatch):
    """What large matrices take, which no small model has: fp32, batched and single, cached and not."""
    monkeypatch.setattr(linear, "LEAST", 0)
    monkeypatch.setattr(linear, "OUTPUTS", 8)
    rows: set[int] = set()
    way = linear.few_rows
    monkeypatch.setattr(linear, "few_rows", lambda x, *rest: rows.add(len(x)) or way(x, *rest))
    for name in ("learned", "grouped-query"):
        test_batched_cached_greedy_equals_single_uncached(name)
        test_cached_logits_equal_uncached_at_every_position(name)
        assert {len(PROMPTS), len(PROMPTS[-1])} <= rows  # of a step, and of a prompt
        rows.clear()


@pytest.mark.parametrize("fault", ["padding on the right", "padding seen", "positions count padding"])
def test_a_faulty_batch_would_be_noticed(fault):
    model = scrambled(MODELS["learned"])
    tokens, positions, document_ids = pad_left(PROMPTS)
    T = tokens.size(1)
    if fault == "padding on the right":
        tokens = torch.tensor([ids + [0] * (T - len(ids)) for ids in PROMPTS])
        positions = document_ids = None
    elif fault == "padding seen":
        document_ids = None
    else:
        positions = None
    with torch.no_grad():
        faulty = model(tokens, positions, document_ids)[:, -1]
        for row, ids in enumerate(PROMPTS):
            expected = model(torch.tensor([ids]))[0, -1]
            assert torch.allclose(faulty[row], expected, atol=1e-5) == (len(ids) == T)


def test_prompts_are_read_in_the_passes_that_compute_least(monkeypatch):
    lengths = [7, 90, 12, 91, 8, 300]
    cost = {a_pass: read_together(lengths, a_pass) for a_pass in (0, 10, 300, 10_000)}
    assert [len(passes) for passes in cost.values()] == [6, 3, 2, 1]
    assert sorted(map(sorted, cost[10])) == [[0, 2, 4], [1, 3], [5]]
    for passes in cost.values():
        assert sorted(itertools.chain(*passes)) == list(range(6))


@pytest.mark.parametrize("name", ["learned", "rotary partial", "grouped-query"])
def test_prompts_read_in_several_passes_are_continued_as_alone(name, monkeypatch):
    passes: list[int] = []
    monkeypatch.setattr(
        rows_under_way, "read_together", lambda n: passes.append(1) or read_together(n, a_pass=2)
    )
    window = 5 if name == "grouped-query" else 0
    model = scrambled(replace(MODELS[name], sliding_window=window))
    settings = GenerationConfig(max_new_tokens=8, repetition_penalty=1.3)
    unequal = [PROMPTS[3], *PROMPTS, PROMPTS[0]]
    assert len(read_together([len(ids) for ids in PROMPTS], 2)) == 3
    assert sum(unequal.count(ids) > 1 for ids in unequal) == 4  # which are read once
    # A row that ends at once leaves, so that the joined cache is cut as well.
    stops = lambda row, ids: row == 1 and len(ids) == 2  # noqa: E731
    together = generate_ids(model, unequal, settings, stopped=stops)
    assert len(passes) == 1
    for row, (ids, found) in enumerate(zip(unequal, together, strict=True)):
        alone = generate_ids(model, [ids], settings)[0]
        assert found.ids == (alone.ids[:2] if row == 1 else alone.ids)
        assert row == 1 or found.log_prob == pytest.approx(alone.log_prob, abs=1e-4)


@pytest.mark.parametrize("name", ["learned", "rotary partial", "grouped-query"])
@pytest.mark.parametrize("spare", [1, 64])
def test_prompts_that_wait_for_places_are_continued_as_alone(name, spare, monkeypatch):
    """Rows end at different times, and others begin in the midst of those under way."""
    monkeypatch.setattr(rows_under_way, "SPARE_COLUMNS", spare)  # with 1 the cache is packed again and again
    window = 5 if name == "grouped-query" else 0
    model = scrambled(replace(MODELS[name], sliding_window=window))
    settings = GenerationConfig(max_new_tokens=9, repetition_penalty=1.3)
    asked = [*PROMPTS, *PROMPTS[::-1], PROMPTS[0], PROMPTS[0]]
    stops = lambda row, ids: len(ids) == 1 + 5 * row % 8  # noqa: E731
    under_way, ended = [], {}
    real = model.hidden
    monkeypatch.setattr(
        model,
        "hidden",
        lambda tokens, *rest: (
            under_way.append(len(tokens) if tokens.size(1) == 1 else 0) or real(tokens, *rest)
        ),
    )
    for most in (1, 3):
        ended.clear()
        found = generate_ids(model, asked, settings, stopped=stops, most_rows=most, on_done=ended.__setitem__)
        assert max(under_way) == most
        assert [ended[row] for row in range(len(asked))] == found
        for row, (ids, one) in enumerate(zip(asked, found, strict=True)):
            alone = generate_ids(model, [ids], settings, stopped=lambda _, ids, row=row: stops(row, ids))[0]
            assert (one.ids, one.finish_reason) == (alone.ids, alone.finish_reason)
            assert one.log_prob == pytest.approx(alone.log_prob, abs=1e-4)
        under_way.clear()


def test_draws_do_not_depend_on_how_many_are_under_way():
    model = scrambled(MODELS["multi-query"])
    sampled = GenerationConfig(max_new_tokens=6, temperature=1.5, seed=3)
    rows = [PROMPTS[0], PROMPTS[2], PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    whole = [one.ids for one in generate_ids(model, rows, sampled, eos_id=range(8))]
    assert len(set(map(len, whole))) > 1
    for most in (1, 2, 4):
        found = generate_ids(model, rows, sampled, eos_id=range(8), most_rows=most)
        assert [one.ids for one in found] == whole


def test_texts_as_long_as_the_positions_go_wait_for_places_too():
    """The columns that rows waste are no positions, and a table of them ends at block_size."""
    model = scrambled(MODELS["learned"])
    end = model.config.block_size
    asked = [[1 + i % 30 for i in range(n)] for n in (end - 6, 3, end - 9, 4, end - 6)]
    found = generate_ids(model, asked, greedy(6), stopped=lambda row, ids: len(ids) == 6 - row, most_rows=2)
    for row, ids in enumerate(asked):
        assert found[row].ids == generate_ids(model, [ids], greedy(6))[0].ids[: 6 - row]


def test_rows_that_close_gaps_are_all_that_select_copies():
    cache = KVCache(1, 6)
    cache.extend_documents(torch.tensor([[-1, 0], [0, 0], [0, 0], [0, 0]]))
    held = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 2, 3)
    cache.update(0, held, held)
    memory = cache._keys[0]
    cache.select([3, 1])
    assert cache._keys[0] is memory
    assert cache.extend_documents(torch.zeros(2, 1, dtype=torch.long)) is None  # the padded row has left
    k, _ = cache.update(0, *torch.zeros(2, 2, 1, 1, 3))
    assert k[:, 0, :, 0].tolist() == [[3, 3, 0], [1, 1, 0]]


def test_draws_of_one_prompt_read_it_once(monkeypatch):
    model = scrambled(MODELS["multi-query"])
    read: list[int] = []
    monkeypatch.setattr(
        rows_under_way, "pad_left", lambda rows, *rest: read.append(len(rows)) or pad_left(rows, *rest)
    )
    sampled = GenerationConfig(max_new_tokens=6, temperature=1.5, seed=3)
    rows = [PROMPTS[0], PROMPTS[2], PROMPTS[0], PROMPTS[0]]
    together = generate_ids(model, rows, sampled)
    assert read == [2]
    for row, (ids, found) in enumerate(zip(rows, together, strict=True)):
        assert found.ids == generate_ids(model, [ids], sampled, first_row=row)[0].ids
    assert len({tuple(found.ids) for found in together}) == 4


def test_select_reorders_repeats_and_drops_rows():
    model = scrambled(MODELS["grouped-query"])
    order = [3, 0, 3]
    tokens, positions, document_ids = pad_left(PROMPTS)
    step = torch.tensor([[7], [8], [9]])
    with torch.no_grad():
        cache = KVCache(2, 12)
        model(tokens, positions, document_ids, cache)
        cache.select(order)
        logits = model(step, positions[order, -1:] + 1, torch.zeros_like(step), cache)[:, 0]
        for row, prompt in enumerate(order):
            expected = model(torch.tensor([PROMPTS[prompt] + step[row].tolist()]))[0, -1]
            torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)


def test_rows_of_a_cache_do_not_share_memory_after_select():
    cache = KVCache(1, 4)
    cache.extend_documents(torch.zeros(1, 2, dtype=torch.long))
    cache.update(0, torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 3))
    cache.select([0, 0])
    documents = cache.extend_documents(torch.tensor([[5], [6]]))
    assert documents is not None and documents.tolist() == [[0, 0, 5], [0, 0, 6]]
    k, v = cache.update(
        0, torch.tensor([2.0, 3.0]).expand(1, 1, 3, 2).permute(3, 0, 1, 2), torch.zeros(2, 1, 1, 3)
    )
    assert k[:, 0, :, 0].tolist() == [[1, 1, 2], [1, 1, 3]]
    assert v[:, 0, :, 0].tolist() == [[1, 1, 0], [1, 1, 0]]


def test_select_copies_what_was_written_and_no_more():
    class Copied(TorchDispatchMode):
        read = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func in (torch.ops.aten.new_empty.default, torch.ops.aten.slice.Tensor)
            if not made:  # memory, and a part of it: neither reads
                self.read += sum(
                    x.numel() for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)
                )
            return func(*args, **(kwargs or {}))

    read = []
    for max_length in (8, 4096):
        cache = KVCache(1, max_length)
        cache.extend_documents(torch.zeros(3, 5, dtype=torch.long))
        cache.update(0, *torch.randn(2, 3, 2, 5, 4))
        with Copied() as copied:
            cache.select([2, 0])
        read.append(copied.read)
    assert read[0] == read[1]


def test_rows_of_one_document_each_need_no_mask():
    cache, zero = KVCache(1, 9), torch.zeros(2, 1, dtype=torch.long)
    assert cache.extend_documents(torch.zeros(2, 3, dtype=torch.long)) is None
    assert cache.extend_documents(zero) is None
    padded = KVCache(1, 9)
    assert padded.extend_documents(torch.tensor([[-1, 0], [0, 0]])) is not None
    assert padded.extend_documents(zero) is not None
    padded.select([0])
    assert padded.extend_documents(zero[:1]) is not None
    padded = KVCache(1, 9)
    padded.extend_documents(torch.tensor([[-1, 0], [0, 0]]))
    padded.select([1])  # the padded row has left
    assert padded.extend_documents(zero[:1]) is None


def test_cache_takes_the_models_precision():
    model = scrambled(MODELS["rotary half"]).bfloat16()
    cache = KVCache(2, 8)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), cache=cache)
    cache.extend_documents(torch.zeros(1, 1, dtype=torch.long))
    k, _ = cache.update(0, *torch.zeros(2, 1, 4, 1, 4, dtype=torch.bfloat16))
    assert k.dtype == torch.bfloat16 and k.shape == (1, 4, 4, 4)


def test_a_full_cache_says_so():
    cache = KVCache(1, 4)
    with pytest.raises(ValueError, match=r"5 tokens do not fit a cache of 4; .*larger max_length"):
        cache.extend_documents(torch.zeros(1, 5, dtype=torch.long))


# --- logits to logits -----------------------------------------------------------------------------

LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12)
PROBABILITY = st.floats(0.01, 0.99)


def kept(logits: Tensor) -> set[int]:
    return {i for i, value in enumerate(logits[0].tolist()) if value > -math.inf}


def softmax(row: list[float]) -> list[float]:
    weights = [math.exp(x - max(row)) for x in row]
    return [weight / sum(weights) for weight in weights]


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.integers(1, 14))
def test_top_k_keeps_what_fewer_than_k_exceed(row, k):
    result = keep_top_k(torch.tensor([row]), k)
    assert kept(result) == {i for i, x in enumerate(row) if sum(y > x for y in row) < k}
    assert all(result[0, i] == row[i] for i in kept(result))


@settings(max_examples=60, deadline=None)
@given(LOGITS, PROBABILITY)
def test_top_p_keeps_the_fewest_tokens_that_reach_p(row, p):
    probabilities = softmax(torch.tensor(row).tolist())
    stays = kept(keep_top_p(torch.tensor([row]), p))
    mass = sum(probabilities[i] for i in stays)
    least = min(probabilities[i] for i in stays)
    assert mass >= p - 1e-9
    assert mass - least < p + 1e-9 or len(stays) == 1
    assert all(probabilities[i] <= least + 1e-12 for i in range(len(row)) if i not in stays)


@settings(max_examples=60, deadline=None)
@given(LOGITS, PROBABILITY)
def test_min_p_keeps_what_is_likely_enough_beside_the_best(row, p):
    probabilities = softmax(torch.tensor(row).tolist())
    stays = kept(keep_min_p(torch.tensor([row]), p))
    for i, probability in enumerate(probabilities):
        ratio = probability / max(probabilities)
        assert (i in stays) == (ratio >= p) or abs(ratio - p) < 1e-6


def test_what_lies_on_the_boundary_of_a_cut():
    even = torch.zeros(1, 4)  # quarters, which add up without rounding
    assert kept(keep_top_p(even, 0.5)) == {0, 1}  # reached
    assert kept(keep_top_p(even, 1e-9)) == {0}
    assert kept(keep_min_p(torch.tensor([[1.0, 1.0, 0.0]]), 1.0)) == {0, 1}


def test_each_row_is_cut_by_itself():
    logits = torch.tensor([[4.0, 0.0, 1.0, 3.9], [0.0, 1.0, 2.0, 9.0]])
    for cut in (lambda x: keep_top_k(x, 2), lambda x: keep_top_p(x, 0.9), lambda x: keep_min_p(x, 0.1)):
        torch.testing.assert_close(cut(logits), torch.cat([cut(row[None]) for row in logits]))
    assert kept(keep_top_p(logits, 0.9)) == {0, 3}
    assert kept(keep_top_p(logits[1:], 0.9)) == {3}


def test_repetition_penalty_lowers_seen_logits_of_either_sign():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0, -math.inf]])
    seen = torch.tensor([[True, True, False, False, True]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0, -math.inf]]


def test_order_of_the_adjustments():
    """Each other order of the same five keeps other tokens or other logits here."""
    chosen = GenerationConfig(temperature=0.5, top_k=3, top_p=0.8, min_p=0.3, repetition_penalty=2.0)
    logits = torch.tensor([[3.0, 1.4, 1.0, 0.9, -1.0]])
    seen = torch.tensor([[True, False, False, False, False]])
    # penalty: 1.5 1.4 1.0 0.9 -1; temperature: 3 2.8 2 1.8 -2; top 3: probabilities .46 .37 .17; 0.8 of them:
    # the first two, as .83 reaches it (of all four, .62 + .14 = .76 would not); min-p keeps both.
    assert adjust_logits(logits, seen, chosen).tolist() == [[3.0, pytest.approx(2.8), *[-math.inf] * 3]]
    all_four = adjust_logits(logits, seen, replace(chosen, top_k=0, min_p=0.0))
    assert kept(all_four) == {0, 1, 2}
    assert torch.equal(adjust_logits(logits, None, GenerationConfig()), logits)


# --- sampling -------------------------------------------------------------------------------------


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    return ((counts - expected) ** 2 / expected)[expected > 0].sum().item()


def test_samples_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.25, 0.125, 0.125, 0.0])
    draws = sample(probabilities.log().expand(20_000, 6), [torch.Generator().manual_seed(3)] * 20_000)
    counts = draws.bincount(minlength=6)
    assert counts[1] == counts[5] == 0
    assert chi_square(counts, probabilities) < 21.1  # 3 degrees of freedom, one in 10,000
    assert chi_square(counts, torch.tensor([0.45, 0.0, 0.25, 0.15, 0.15, 0.0])) > 21.1


def test_a_draw_of_zero_takes_no_impossible_token(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.zeros(*size, dtype=torch.float64))
    assert sample(torch.tensor([[-math.inf, 0.0, 0.0]]), [torch.Generator()]).tolist() == [1]


def test_rows_of_a_batch_sample_the_models_distribution():
    model = chain({0: {1: 0.5, 2: 0.3, 3: 0.2}}, 4)
    prompts = [[0]] * 3_000
    results = generate_ids(model, prompts, GenerationConfig(max_new_tokens=1, temperature=1.0))
    counts = torch.tensor([result.ids[0] for result in results]).bincount(minlength=4)
    assert chi_square(counts, torch.tensor([0.0, 0.5, 0.3, 0.2])) < 18.4  # 2 degrees of freedom
    hot = generate_ids(model, prompts, GenerationConfig(max_new_tokens=1, temperature=2.0))
    counts = torch.tensor([result.ids[0] for result in hot]).bincount(minlength=4)
    flatter = torch.tensor([0.0, 0.5, 0.3, 0.2]).sqrt()
    assert chi_square(counts, flatter / flatter.sum()) < 18.4


SAMPLING = GenerationConfig(max_new_tokens=12, temperature=0.8, top_k=20, top_p=0.95, min_p=0.01, seed=5)


def test_a_seed_gives_the_same_text_and_another_seed_another():
    model = scrambled(MODELS["rotary half"])
    first, again = (generate_ids(model, PROMPTS, SAMPLING) for _ in range(2))
    assert first == again
    other = generate_ids(model, PROMPTS, replace(SAMPLING, seed=6))
    assert all(a.ids != b.ids for a, b in zip(first, other, strict=True))


def test_a_sample_does_not_depend_on_its_neighbours():
    model = scrambled(MODELS["learned"])
    eos = generate_ids(model, PROMPTS, SAMPLING)[0].ids[2]  # the first row leaves the batch early
    together = generate_ids(model, PROMPTS, SAMPLING, eos)
    assert len(together[0].ids) <= 3 < min(len(result.ids) for result in together[1:])
    for row, prompt in enumerate(PROMPTS):
        alone = generate_ids(model, [prompt], SAMPLING, eos, first_row=row)[0]
        assert alone.ids == together[row].ids
        assert alone.log_prob == pytest.approx(together[row].log_prob, abs=1e-4)
    same = generate_ids(model, [PROMPTS[0]] * 3, SAMPLING)
    assert same[0].ids != same[1].ids != same[2].ids  # rows of one prompt are samples of their own


def test_every_seed_and_row_has_numbers_of_its_own():
    draws = {
        torch.rand(1, generator=row_generator(seed, row)).item() for seed in range(30) for row in range(30)
    }
    assert len(draws) == 900


def test_global_randomness_is_neither_used_nor_changed():
    model = scrambled(MODELS["rotary half"])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    generate_ids(model, PROMPTS, SAMPLING)
    assert torch.equal(torch.get_rng_state(), before)


def test_log_prob_of_a_sample_is_the_models_own():
    """Neither temperature, cuts nor penalty enter it: one uncached forward gives the same."""
    model = scrambled(MODELS["multi-query"])
    chosen = replace(SAMPLING, repetition_penalty=1.7)
    for prompt, result in zip(PROMPTS, generate_ids(model, PROMPTS, chosen, eos_id=3), strict=True):
        assert result.log_prob == pytest.approx(log_prob(model, prompt, result.ids), abs=1e-4)


# --- beams ----------------------------------------------------------------------------------------


def beams(n: int, max_new_tokens: int = 8, length_penalty: float = 0.0) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=max_new_tokens, num_beams=n, length_penalty=length_penalty)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
def test_one_beam_is_greedy(length_penalty):
    model = scrambled(MODELS["rotary half"], seed=2)
    prompts = [[1, a, (7 * a) % 40] for a in range(20)]
    eos = generate_ids(model, prompts, greedy(10))[0].ids[4]
    expected = generate_ids(model, prompts, greedy(10), eos)
    assert {result.finish_reason for result in expected} == {"eos", "length"}
    one = beams(1, 10)  # `generate_ids` itself decodes greedily then, and has no use for a length penalty
    object.__setattr__(one, "length_penalty", length_penalty)
    with torch.inference_mode():
        results = _beam_search(
            LiveRows(model, list(map(Prompt, prompts)), one, None), one, () if eos is None else (eos,), None
        )
    for result, best in zip(results, expected, strict=True):
        assert (result.ids, result.finish_reason) == (best.ids, best.finish_reason)
        assert result.log_prob == pytest.approx(best.log_prob, abs=1e-6)


def test_four_beams_find_likelier_texts_than_greedy():
    model = scrambled(MODELS["rotary half"], seed=3)
    prompts = [
        [1, *torch.randint(40, (n,), generator=torch.Generator().manual_seed(n)).tolist()] for n in range(50)
    ]
    prompts = [ids[:12] for ids in prompts]
    best = generate_ids(model, prompts, greedy(8))
    four = generate_ids(model, prompts, beams(4))
    gains = [b.log_prob - a.log_prob for a, b in zip(best, four, strict=True)]
    assert sum(gains) / len(gains) > 0.1
    assert sum(gain > 1e-4 for gain in gains) >= 10
    assert sum(a.ids != b.ids for a, b in zip(best, four, strict=True)) >= 10
    for prompt, result in zip(prompts, four, strict=True):
        assert result.log_prob == pytest.approx(log_prob(model, prompt, result.ids), abs=1e-4)


def test_beams_of_a_batch_equal_beams_of_one_prompt():
    model = scrambled(MODELS["learned"], seed=4)
    together = generate_ids(model, PROMPTS, beams(3, length_penalty=0.7), eos_id=3)
    for prompt, result in zip(PROMPTS, together, strict=True):
        alone = generate_ids(model, [prompt], beams(3, length_penalty=0.7), eos_id=3)[0]
        assert alone.ids == result.ids
        assert alone.log_prob == pytest.approx(result.log_prob, abs=1e-4)


def test_beams_pass_the_greedy_trap():
    model = chain({0: {1: 0.6, 2: 0.4}, 1: dict.fromkeys(range(3, 8), 0.2), 2: {3: 1.0}, 3: {3: 1.0}}, 8)
    assert generate_ids(model, [[0]], greedy(2))[0].log_prob == pytest.approx(math.log(0.12))
    result = generate_ids(model, [[0]], beams(2, 2))[0]
    assert result.ids == [2, 3]
    assert result.log_prob == pytest.approx(math.log(0.4))


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_enough_beams_find_the_best_of_all_texts(seed, length_penalty):
    """Against brute force: every text of up to 4 tokens out of 4, ended by eos or by its length."""
    model = scrambled(replace(SMALL, vocab_size=4), seed)
    eos, n = 3, 4
    texts = [
        list(ids)
        for length in range(1, n + 1)
        for ids in itertools.product(range(4), repeat=length)
        if eos not in ids[:-1] and (ids[-1] == eos or length == n)
    ]
    ranks = [log_prob(model, [0, 1], ids) / len(ids) ** length_penalty for ids in texts]
    result = generate_ids(model, [[0, 1]], beams(4**n, n, length_penalty), eos_id=eos)[0]
    assert result.ids == texts[max(range(len(texts)), key=ranks.__getitem__)]


def test_length_penalty_trades_short_for_long():
    # The short text has log-probability ln 0.4 over 1 token, the long one ln 0.6 + 3 ln 0.8 over 4.
    model = chain({0: {7: 0.4, 1: 0.6}, 1: {2: 0.8, 6: 0.2}, 2: {3: 0.8, 6: 0.2}, 3: {7: 0.8, 6: 0.2}}, 8)
    assert generate_ids(model, [[0]], beams(2, 6), eos_id=7)[0].ids == [7]
    assert generate_ids(model, [[0]], beams(2, 6, 1.0), eos_id=7)[0].ids == [1, 2, 3, 7]


def test_search_ends_when_no_running_beam_can_win():
    model = chain({0: {7: 0.9, 1: 0.1}, **{i: {i + 1: 0.5, 1: 0.5} for i in range(1, 6)}}, 8)
    calls = []
    model.embed.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    assert generate_ids(model, [[0]], beams(4, 100), eos_id=7)[0].ids == [7]
    assert len(calls) == 1


def test_a_finished_hypothesis_keeps_its_place():
    model = chain({0: {7: 0.4, 1: 0.6}, 1: {2: 0.9, 3: 0.1}, 2: {7: 1.0}, 3: {7: 1.0}}, 8)
    sizes = []
    model.embed.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    assert generate_ids(model, [[0]], beams(2, 6), eos_id=7)[0].ids == [1, 2, 7]
    assert sizes == [1, 1, 1]


def test_more_beams_than_tokens_to_choose_from():
    model = chain({0: {1: 0.5, 2: 0.5}, 1: {2: 1.0}, 2: {1: 1.0}}, 5)
    result = generate_ids(model, [[0]], beams(16, 3), vocab_size=3)[0]
    assert result.ids in ([1, 2, 1], [2, 1, 2])


# --- ends and text --------------------------------------------------------------------------------


def test_eos_ends_a_row_and_leaves_no_text():
    tokenizer = Bytes()
    model = saying("abc", tokenizer, end=tokenizer.eos_id)
    done, cut = (
        generate(model, tokenizer, ["a", "ab"], greedy(20)),
        generate(model, tokenizer, ["a"], greedy(2)),
    )
    assert [(c.text, c.finish_reason) for c in done] == [("bc", "eos"), ("c", "eos")]
    assert done[0].ids == [*tokenizer.encode("bc"), tokenizer.eos_id]
    assert [(c.text, c.finish_reason) for c in cut] == [("bc", "length")]


def test_finished_rows_leave_the_batch():
    tokenizer = Bytes()
    model = saying("abcdefgh", tokenizer, end=tokenizer.eos_id)
    sizes = []
    model.embed.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    texts = [c.text for c in generate(model, tokenizer, ["g", "a", "abcdef"], greedy(50))]
    assert texts == ["h", "bcdefgh", "gh"]
    assert sizes == [3, 3, 2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("stop", ["END", "D", "xyEN", "y"])
def test_stop_strings_span_tokens_and_are_cut_off(num_beams, stop):
    tokenizer = Bytes()
    model = saying("wxyEND", tokenizer)
    chosen = GenerationConfig(max_new_tokens=5, num_beams=num_beams, stop=("never", stop))
    result = generate(model, tokenizer, ["w"], chosen)[0]
    assert result.text == "xyEND"[: "xyEND".index(stop)]
    assert result.finish_reason == "stop"
    assert tokenizer.decode(result.ids) == "xyEND"[: "xyEND".index(stop) + len(stop)]
    assert result.log_prob == pytest.approx(0.0, abs=1e-6)


def test_the_earliest_stop_string_counts():
    tokenizer = Bytes()
    chosen = GenerationConfig(max_new_tokens=6, stop=("cd", "bcd"))
    assert generate(saying("abcdef", tokenizer), tokenizer, ["a"], chosen)[0].text == ""


def test_a_stop_string_in_the_prompt_or_half_in_it_does_not_stop():
    tokenizer = Bytes()
    model = saying("abcdef", tokenizer)
    chosen = GenerationConfig(max_new_tokens=3, stop=("ab", "bc"))
    result = generate(model, tokenizer, ["ab"], chosen)[0]
    assert (result.text, result.finish_reason) == ("cde", "length")


def test_stop_strings_of_several_bytes_a_character():
    tokenizer = Bytes()
    model = saying("aé→b", tokenizer)
    chosen = GenerationConfig(max_new_tokens=9, stop=("→",))
    assert generate(model, tokenizer, ["a"], chosen)[0].text == "é"


def test_text_is_decoded_after_its_prompt():
    """Where spaces are implied, the ids of the completion alone would decode to "two three"."""
    tokenizer = Words()
    model = saying("one two three four five", tokenizer)
    result = generate(model, tokenizer, ["one"], GenerationConfig(max_new_tokens=5, stop=(" four",)))[0]
    assert (result.text, result.finish_reason) == (" two three", "stop")


def test_a_stop_string_that_only_a_part_of_the_text_shows_does_not_stop():
    tokenizer = Shouting()
    text = "".join(map(chr, range(33, 120)))
    chosen = GenerationConfig(max_new_tokens=80, stop=("abc",))
    result = generate(saying(text, tokenizer), tokenizer, [""], chosen)[0]
    assert (result.text, result.finish_reason) == (text[:80].upper(), "length")


@pytest.mark.parametrize("n", [80, 400])
def test_looking_for_stop_strings_costs_the_same_at_every_length(n):
    tokenizer = Bytes()
    cycle = [*tokenizer.encode("abcdefg"), 3 + ord("a")]
    model = chain({1: {cycle[0]: 1.0}, **{a: {b: 1.0} for a, b in itertools.pairwise(cycle)}}, 259)
    result = generate(model, tokenizer, [""], GenerationConfig(max_new_tokens=n, stop=("never",)))[0]
    assert result.text == ("abcdefg" * n)[:n]
    *during, whole, _ = tokenizer.decoded
    assert whole == n + 1  # with bos
    assert max(during) <= 64 and sum(during) <= 100 * n


def test_a_stop_string_is_found_late_in_a_long_text():
    tokenizer = Bytes()
    text = "".join(map(chr, range(33, 120)))
    chosen = GenerationConfig(max_new_tokens=200, stop=("pqr",))
    result = generate(saying(text, tokenizer), tokenizer, ["!"], chosen)[0]
    assert result.text == text[1 : text.index("pqr")]


def test_the_prompt_is_never_in_the_text():
    tokenizer = Bytes()
    model = scrambled(replace(SMALL, vocab_size=259))
    prompts = ["def f(x):\n", "é→ prompt", "", "x"]
    for prompt, result in zip(prompts, generate(model, tokenizer, prompts, greedy(8)), strict=True):
        new = [id for id in result.ids if id > 2]
        assert result.text == bytes(id - 3 for id in new).decode(errors="replace")
        alone = generate_ids(model, [tokenizer.prompt_ids(prompt)], greedy(8), eos_id=2, vocab_size=259)[0]
        assert result.ids == alone.ids and result.log_prob == pytest.approx(alone.log_prob, abs=1e-4)


def test_repetition_penalty_breaks_a_loop():
    model = chain({0: {1: 0.9, 2: 0.1}, 1: {1: 0.6, 2: 0.4}, 2: {1: 0.6, 3: 0.4}, 3: {3: 1.0}}, 4)
    assert generate_ids(model, [[0]], greedy(4))[0].ids == [1, 1, 1, 1]
    strong = replace(greedy(3), repetition_penalty=50.0)
    assert generate_ids(model, [[0]], strong)[0].ids == [1, 2, 3]
    assert generate_ids(model, [[1, 0]], strong)[0].ids[0] == 2  # the prompt's tokens count
    beam = replace(beams(2, 3), repetition_penalty=50.0)
    assert generate_ids(model, [[0]], beam)[0].ids == [1, 2, 3]


def test_what_a_row_has_seen_is_its_own():
    model = chain({5: {0: 0.9, 1: 0.1}}, 8)
    strong = replace(greedy(1), repetition_penalty=50.0)
    assert [result.ids for result in generate_ids(model, [[5], [6, 7, 5]], strong)] == [
        [0],
        [0],
    ]  # not the padding's
    model, mild = scrambled(MODELS["rotary half"]), replace(greedy(), repetition_penalty=1.5)
    eos = generate_ids(model, PROMPTS, mild)[0].ids[2]  # the first row leaves the batch early
    for chosen in (mild, replace(beams(3, 12), repetition_penalty=1.5)):
        together = generate_ids(model, PROMPTS, chosen, eos)
        for prompt, result in zip(PROMPTS, together, strict=True):
            assert generate_ids(model, [prompt], chosen, eos)[0].ids == result.ids


# --- the model's mode and precision ---------------------------------------------------------------


def test_dropout_is_off_and_each_modules_mode_comes_back():
    model = scrambled(replace(SMALL, dropout=0.5))
    expected = generate_ids(model, PROMPTS, greedy())
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    assert generate_ids(model, PROMPTS, greedy()) == expected
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(RuntimeError, match="stop here"):
        generate_ids(model, PROMPTS, greedy(), stopped=_raise)
    assert [module.training for module in model.modules()] == modes
    assert not any(parameter.is_inference() for parameter in model.parameters())


def _raise(*_) -> bool:
    raise RuntimeError("stop here")


def test_logits_that_are_nan_are_named():
    model = scrambled(SMALL)
    with torch.no_grad():
        model.head.weight[3, 2] = math.nan
    with pytest.raises(ValueError, match="logits are NaN"):
        generate_ids(model, PROMPTS, greedy())


# --- prompts and mistakes -------------------------------------------------------------------------


def test_prompt_ids_start_as_documents_do():
    tokenizer = Bytes()
    assert tokenizer.prompt_ids("ab") == [1, 100, 101]
    tokenizer.bos_id = None
    assert tokenizer.prompt_ids("ab") == [2, 100, 101]  # eos, as GPT-2 does
    tokenizer.eos_id = None
    assert tokenizer.prompt_ids("ab") == [100, 101]


def test_trim_prompt_keeps_the_end_and_bos():
    assert trim_prompt([1, 5, 6, 7], 4, 1) == [1, 5, 6, 7]
    assert trim_prompt([1, 5, 6, 7], 3, 1) == [1, 6, 7]
    assert trim_prompt([1, 5, 6, 7], 1, 1) == [1]
    assert trim_prompt([1, 5, 6, 7], 3, None) == [5, 6, 7]
    assert trim_prompt([4, 5, 6, 7], 2, 1) == [6, 7]
    with pytest.raises(ValueError, match=r"to 0 tokens; lower max_new_tokens"):
        trim_prompt([1, 2], 0, 1)


def test_an_empty_prompt_needs_bos():
    tokenizer = Bytes()
    model = saying("abc", tokenizer)
    assert generate(model, tokenizer, [""], greedy(3))[0].text == "abc"
    assert generate(model, tokenizer, [], greedy(3)) == []
    tokenizer.bos_id = tokenizer.eos_id = None
    with pytest.raises(ValueError, match=r"prompt 1 holds no token and there is no bos; give"):
        generate(model, tokenizer, ["a", ""], greedy(3))


@pytest.mark.parametrize("id", [-1, 40])
def test_ids_outside_the_vocabulary_are_named(id):
    with pytest.raises(
        ValueError, match=rf"prompt 1 holds id {id}, outside the model's vocabulary of 40; use"
    ):
        generate_ids(scrambled(SMALL), [[1], [2, id]], greedy())


def test_a_tokenizer_larger_than_the_model_is_refused():
    with pytest.raises(ValueError, match=r"259 words do not fit the model's vocabulary of 40; use"):
        generate(scrambled(SMALL), Bytes(), ["a"], greedy())


@pytest.mark.parametrize(
    "chosen", [greedy(3), beams(2, 3), GenerationConfig(max_new_tokens=3, temperature=5.0)]
)
def test_rows_of_a_padded_embedding_are_never_chosen(chosen):
    tokenizer = Bytes()
    model = chain({1: {300: 0.9, 100: 0.1}, 100: {300: 0.9, 101: 0.1}, 101: {300: 0.9, 102: 0.1}}, 320)
    result = generate(model, tokenizer, [""], replace(chosen, stop=("\n",)))[0]
    assert max(result.ids) < 259
    assert result.log_prob == pytest.approx(log_prob(model, [1], result.ids), abs=1e-4)


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_a_position_table_is_not_run_past(position):
    model = scrambled(replace(SMALL, position=position, qk_norm=False))
    assert len(generate_ids(model, [[1] * 20, [2]], greedy(12))[0].ids) == 12
    with pytest.raises(
        ValueError, match=r"prompt 1 of 21 tokens and max_new_tokens 12 make 33, .*32 positions; "
    ):
        generate_ids(model, [[2], [1] * 21], greedy(12))


def test_rotary_positions_run_on():
    assert len(generate_ids(scrambled(SMALL), [[1] * 30], greedy(12))[0].ids) == 12


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens is 0; .*at least 1"),
        ({"temperature": -0.5}, r"temperature is -0.5; .*at least 0"),
        ({"temperature": math.nan}, r"temperature is nan; .*finite"),
        ({"temperature": 1.0, "top_k": -1}, r"top_k is -1; .*at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p is 0.0; .*above 0 and at most 1"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p is 1.5; .*above 0 and at most 1"),
        ({"temperature": 1.0, "min_p": -0.1}, r"min_p is -0.1; .*at least 0"),
        ({"temperature": 1.0, "min_p": 1.1}, r"min_p is 1.1; .*at most 1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty is 0.0; .*above 0"),
        ({"num_beams": 0}, r"num_beams is 0; .*at least 1"),
        ({"num_beams": 2, "length_penalty": math.inf}, r"length_penalty is inf; .*finite"),
        ({"stop": "\n\n"}, r"stop is '\\n\\n'; .*list of strings"),
        ({"stop": ("a", "")}, r"stop is \('a', ''\); .*not empty"),
        ({"top_k": 5}, r"top_k is 5 but temperature 0 .*; set temperature above 0 or top_k to 0"),
        ({"top_p": 0.9}, r"top_p is 0.9 but temperature 0 .*; set temperature above 0 or top_p to 1"),
        ({"min_p": 0.1}, r"min_p is 0.1 but temperature 0 .*; set temperature above 0 or min_p to 0"),
        (
            {"temperature": 1.0, "num_beams": 4},
            r"num_beams is 4 but temperature 1.0 .*; set temperature to 0",
        ),
        ({"length_penalty": 1.0}, r"length_penalty is 1.0 but num_beams 1 .*; set num_beams above 1"),
    ],
)
def test_a_wrong_setting_is_one_sentence(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        GenerationConfig(**wrong)
    assert "\n" not in str(error.value)


def test_what_a_model_writes_cannot_steer_the_terminal():
    shown = printable("a\tb\n\x1b[2J\x9b1m\u202e\r caf\u00e9")
    assert shown == "a\tb\n\\x1b[2J\\x9b1m\\u202e\\r caf\u00e9"
