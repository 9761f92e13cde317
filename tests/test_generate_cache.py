"""Exactness pairs for the cache: cached = uncached, batched = single, waiting = alone."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from decoders import MODELS, PROMPTS, greedy, scrambled, uncached_greedy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from architecture import Decoder
from generation import reading
from generation import rows as rows_under_way
from generation.engine import generate_ids
from generation.kvcache import KVCache
from generation.reading import pad_left, read_together
from generation.settings import GenerationConfig
from modules import linear
from modules.products import Product


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


@pytest.mark.parametrize("name", ["learned", "grouped-query"])
@pytest.mark.parametrize("way", ["tiles", "packed"])
def test_products_of_few_rows_give_the_same_tokens(name, way, monkeypatch):
    """Each way of a product in the place of the plain one: fp32, batched and single, cached and not."""
    monkeypatch.setattr(linear, "TILE_OUTPUTS", 8)
    rows: set[int] = set()

    def measured(self: linear.Linear, x: torch.Tensor) -> Product | None:
        n = x.numel() // x.size(-1)
        found = self.ways(n, x.dtype)
        if way not in found or torch.is_grad_enabled():
            return None
        rows.add(n)
        return found[way].make()

    monkeypatch.setattr(linear.Linear, "measured", measured)
    test_batched_cached_greedy_equals_single_uncached(name)
    test_cached_logits_equal_uncached_at_every_position(name)
    assert {len(PROMPTS), len(PROMPTS[-1])} <= rows  # rows of a step, and of a prompt


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
    monkeypatch.setattr(reading, "read_together", lambda n: passes.append(1) or read_together(n, a_pass=2))
    window = 5 if name == "grouped-query" else 0
    model = scrambled(replace(MODELS[name], sliding_window=window))
    settings = GenerationConfig(max_new_tokens=8, repetition_penalty=1.3)
    unequal = [PROMPTS[3], *PROMPTS, PROMPTS[0]]
    assert len(read_together([len(ids) for ids in PROMPTS], 2)) == 3
    assert sum(unequal.count(ids) > 1 for ids in unequal) == 4  # These are read once.
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
    monkeypatch.setattr(rows_under_way, "SPARE_COLUMNS", spare)  # With 1 the cache is packed again and again.
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
        reading, "pad_left", lambda rows, *rest: read.append(len(rows)) or pad_left(rows, *rest)
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
