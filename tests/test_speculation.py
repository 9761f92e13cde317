"""Speculation: texts are those without it, in fewer passes where it foresees them; else it gives up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from decoders import MODELS, PROMPTS, chain, greedy, scrambled, uncached_greedy
from test_engine import run

from architecture import Decoder
from data.ngram import NGramModel
from generation.engine import Engine, generate_ids
from generation.kvcache import KVCache
from generation.requests import Handle, Request
from generation.rows import LiveRows
from generation.scheduling import EngineLimits
from generation.settings import GenerationConfig
from generation.speculation import MOST_LOST, PATIENCE, Costs, Lookup, NGram, Speculation


class Foreseen:
    """Proposals of a text that is known, each of them wrong from some place on."""

    def __init__(self, text: list[int], right: int):
        self.text, self.right, self.n = text, right, 0

    def extend(self, ids: Sequence[int]) -> None:
        self.n += len(ids)

    def propose(self, most: int) -> list[int]:
        found = self.text[self.n : self.n + most]
        return found[: self.right] + [(id + 1) % 40 for id in found[self.right :]]


def passes(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that has the tokens a row of every pass."""
    read: list[int] = []
    real = model.hidden
    monkeypatch.setattr(model, "hidden", lambda x, *rest: read.append(x.size(1)) or real(x, *rest))
    return read


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("right", [0, 1, 12])
def test_a_text_is_the_same_however_much_of_it_was_foreseen(name, right, monkeypatch):
    monkeypatch.setattr("generation.speculation.FIRST", 12)
    model = scrambled(replace(MODELS[name], block_size=64))
    ids, log_prob = uncached_greedy(model, PROMPTS[0], 40)
    text = [*PROMPTS[0], *ids]
    engine = Engine(model, proposer=lambda: Foreseen(text, right))
    read = passes(model, monkeypatch)
    handle = engine.add(Request(PROMPTS[0], greedy(40), logprobs=0))
    run(engine)
    (found,) = handle.result()
    assert found.ids == ids and found.log_prob == pytest.approx(log_prob, abs=1e-3)
    assert len(found.scores) == 40 and sum(s.log_prob for s in found.scores) == pytest.approx(
        log_prob, abs=1e-3
    )
    assert max(read[1:]) > 1 and (right < 12 or len(read) < 8)


@pytest.mark.parametrize("name", ["learned", "rotary half", "grouped-query"])
def test_rows_that_take_unequal_numbers_share_a_pass(name):
    model = scrambled(replace(MODELS[name], sliding_window=6 if name == "grouped-query" else 0))
    texts = [[*prompt, *uncached_greedy(model, prompt, 20)[0]] for prompt in PROMPTS]
    waiting = iter([Foreseen(text, right) for text, right in zip(texts, (0, 12, 2, 5), strict=True)])
    engine = Engine(model, proposer=lambda: next(waiting))
    handles = [engine.add(Request(prompt, greedy(20))) for prompt in PROMPTS]
    holes = 0
    while engine.step():
        holes += engine.live.cache.holes
    assert bool(holes) != bool(model.config.sliding_window)
    assert [[*one.seat.prompt.ids, *one.result()[0].ids] for one in handles] == texts


def test_a_repetition_penalty_knows_the_tokens_that_were_foreseen():
    """One text has a penalty and its neighbour has none."""
    model = scrambled(MODELS["rotary half"])
    settings = [replace(greedy(30), repetition_penalty=penalty) for penalty in (1.3, 1.0)]
    texts = [[*PROMPTS[0], *generate_ids(model, [PROMPTS[0]], one)[0].ids] for one in settings]
    assert texts[0] != texts[1]
    waiting = iter([Foreseen(text, 12) for text in texts])
    engine = Engine(model, proposer=lambda: next(waiting))
    handles = [engine.add(Request(PROMPTS[0], one)) for one in settings]
    run(engine)
    assert [[*PROMPTS[0], *one.result()[0].ids] for one in handles] == texts


@pytest.mark.parametrize("fault", ["all are kept", "one too few", "holes are seen"])
def test_a_fault_of_taking_would_be_noticed(fault, monkeypatch):
    took, forget = LiveRows.took, KVCache.forget
    if fault == "all are kept":
        monkeypatch.setattr(KVCache, "forget", lambda *_: None)
    elif fault == "one too few":
        monkeypatch.setattr(LiveRows, "took", lambda self, n: took(self, [max(0, x - 1) for x in n]))
    else:
        monkeypatch.setattr(KVCache, "forget", lambda self, n: forget(self, [min(n)] * len(n)))
    with pytest.raises((AssertionError, ValueError)):
        test_rows_that_take_unequal_numbers_share_a_pass("learned")


def test_ends_and_stop_strings_stop_inside_of_what_was_foreseen():
    model = scrambled(MODELS["rotary half"])
    ids = uncached_greedy(model, PROMPTS[0], 20)[0]
    for request, n in (
        (Request(PROMPTS[0], greedy(20), frozenset((ids[6],))), ids.index(ids[6]) + 1),
        (Request(PROMPTS[0], greedy(20), stopped=lambda _, new: len(new) == 5), 5),
        (Request(PROMPTS[0], greedy(9)), 9),
    ):
        engine = Engine(model, proposer=lambda: Foreseen([*PROMPTS[0], *ids], 12))
        handle = engine.add(request)
        run(engine)
        assert handle.result()[0].ids == ids[:n]
        again = engine.add(Request([*PROMPTS[0], *ids[: n - 1]] * 2, greedy(3)))  # what was read is kept
        run(engine)
        assert again.result()[0].ids == uncached_greedy(model, [*PROMPTS[0], *ids[: n - 1]] * 2, 3)[0]


def test_sampled_tokens_have_the_models_distribution():
    chances = {3: 0.5, 4: 0.3, 5: 0.2}
    model = chain({2: chances, 3: chances, 4: chances, 5: chances}, 8)
    settings = GenerationConfig(max_new_tokens=4, temperature=1.0, seed=5)
    expected = [one.ids for one in generate_ids(model, [[2, 3, 3, 3, 3]] * 300, settings)]
    engine = Engine(model, None, EngineLimits(most_rows=300), lambda: Foreseen([2, *[3] * 40], 40))
    handle = engine.add(Request([2, 3, 3, 3, 3], settings, n=300))
    run(engine)
    found = [one.ids for one in handle.result()]
    assert found == expected  # one random number a token, as without
    counts = Counter(id for ids in found for id in ids)
    apart = max(abs(counts[id] / 1200 - p) for id, p in chances.items())
    assert apart < math.sqrt(math.log(2e6) / 2400)  # a false alarm in a million


# --- what proposes, and whether it pays -----------------------------------------------------------------


def test_lookup_proposes_what_followed_last():
    lookup = Lookup()
    lookup.extend([1, 2, 3, 4, 5, 1, 2, 3])
    assert lookup.propose(3) == [4, 5, 1] and lookup.propose(1) == [4]
    lookup.extend([9, 1, 2, 3])
    assert lookup.propose(2) == [9, 1]  # the last time
    lookup.extend([7, 8])
    assert lookup.propose(4) == []


def test_the_ngram_model_proposes_its_likeliest_text():
    model = NGramModel([np.array([1, 2, 3, 4, 5, 6] * 9)], 8, order=3)
    ngram = NGram(model)
    ngram.extend([7, 7, 7, 1, 2])
    assert ngram.propose(4) == [3, 4, 5, 6]
    decoder = chain({a: {a % 6 + 1: 1.0} for a in range(1, 7)}, 8)
    engine = Engine(decoder, proposer=lambda: NGram(model))
    handle = engine.add(Request([1, 2], greedy(30)))
    steps = 0
    while engine.step():
        steps += 1
    assert handle.result()[0].ids == [(2 + i) % 6 + 1 for i in range(30)] and steps < 12


def test_it_stops_where_nothing_is_foreseen_and_says_so(monkeypatch):
    model = scrambled(MODELS["rotary half"])
    monkeypatch.setattr(Costs, "note", lambda *_: None)
    ids = uncached_greedy(model, PROMPTS[0], 128)[0]
    engine = Engine(model, proposer=lambda: Foreseen([*PROMPTS[0], *ids], 0))
    read = passes(model, monkeypatch)
    handle: Handle = engine.add(Request(PROMPTS[0], greedy(128)))
    run(engine)
    speculation = handle.texts[0].speculation
    assert speculation is not None and speculation.taken == 0
    assert "off for" in str(speculation) and f"0 of {speculation.proposed} proposed" in str(speculation)
    assert sum(n > 1 for n in read[1:]) <= 12 and speculation.pause > 2 * PATIENCE


def test_what_passes_cost_decides_whether_a_share_pays():
    costs = Costs()
    assert costs.of(1, 5) == pytest.approx(0.4)
    for seconds in (0.02, 0.01, 0.03):  # other processes only add
        costs.note(1, 1, seconds)
    costs.note(1, 5, 0.03)
    assert 0.7 < costs.of(1, 5) < 2.0
    dear, cheap = (Speculation(Lookup, [1, 2, 3]) for _ in range(2))
    for _ in range(6):
        dear.learn(4, 1, 2.0)
        cheap.learn(4, 1, 0.3)
    assert dear.wait > 2 >= cheap.wait
    # What was lost is no more than a share of the tokens that follow without proposals.
    useless = Speculation(Lookup, [1, 2, 3])
    useless.learn(3, 0, 90.0)
    assert useless.wait == 3 / MOST_LOST and useless.propose([4], 5) == []


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", MODELS)
def test_texts_of_the_setting_are_those_without_it(name, temperature, monkeypatch):
    model = scrambled(replace(MODELS[name], block_size=96))
    settings = GenerationConfig(max_new_tokens=40, temperature=temperature, seed=3)
    prompts = [[*prompt, *prompt, *prompt] for prompt in PROMPTS]
    plain = generate_ids(model, prompts, settings)
    found = generate_ids(model, prompts, replace(settings, speculate="lookup"))
    assert [one.ids for one in found] == [one.ids for one in plain]
    assert all(" proposed tokens were taken" in one.speculation for one in found)
    assert not any(one.speculation for one in plain)


def test_beams_are_not_speculated():
    with pytest.raises(ValueError, match="num_beams is 2 but speculate lookup"):
        GenerationConfig(num_beams=2, speculate="lookup")
