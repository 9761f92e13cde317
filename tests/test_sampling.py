"""The choice of tokens: logits, samples and beams."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from decoders import MODELS, PROMPTS, SMALL, beams, chain, greedy, log_prob, scrambled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from generation.beams import beam_search
from generation.engine import generate_ids
from generation.rows import rows_of
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
from tokenization.healing import Prompt

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


@pytest.mark.parametrize("rows", [600, pytest.param(3_000, marks=pytest.mark.slow)])
def test_rows_of_a_batch_sample_the_models_distribution(rows):
    model = chain({0: {1: 0.5, 2: 0.3, 3: 0.2}}, 4)
    prompts = [[0]] * rows
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
        results = beam_search(
            rows_of(model, list(map(Prompt, prompts)), one), one, () if eos is None else (eos,), None
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
