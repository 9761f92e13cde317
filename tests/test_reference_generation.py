"""Generation against the reference: agreement, faults that are named, and no trace."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bare_subjects import bare_subject, decoder
from decoders import scramble
from test_reference_forward import SHAPES

from architecture import Decoder
from data.documents import Document
from generation import engine, reading, rows, sampling, text
from generation.kvcache import KVCache
from generation.prefixes import PrefixCache
from generation.rows import LiveRows
from generation.settings import GenerationConfig
from guards import subject
from guards.reference import generation
from guards.reference.comparison import Comparison, Differs
from guards.reference.effective import config_of, weights_of
from reference.generation import Rules, beam_search, chances, draws, interval, nucleus, penalised
from selftest.data import function
from tokenization import healing
from tokenizer import BPETokenizer, CodeTokenizer, Tokenizer

TEXTS = ["".join(function(random.Random(8 * n + i)) for i in range(8)) for n in range(40)]
TOKENIZERS: dict[str, Tokenizer] = {
    "code": CodeTokenizer.train(TEXTS, 600),
    "bpe": BPETokenizer.train(TEXTS, 600),
}


def served(model: Decoder) -> Comparison:
    """Compare a model that is asked one request after another."""
    comparison, config = Comparison(), config_of(model, model.config)
    comparison.begin("generation")
    scramble(model)
    with torch.no_grad():
        generating = generation.Generating(model, config, None, (), is_served=True)
        generation.compare_model(generating, comparison, lambda: weights_of(model, {}))
    return comparison


def compared(model: Decoder, tokenizer: Tokenizer | None = None) -> Comparison:
    comparison = Comparison()
    comparison.begin("generation")
    documents = tuple(Document(str(n), text, str(n)) for n, text in enumerate(TEXTS))
    generation.compare(bare_subject(model, tokenizer=tokenizer, first_documents=documents), comparison)
    return comparison


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_the_engine_agrees(shape: dict[str, Any], dtype: torch.dtype) -> None:
    comparison = compared(decoder(**shape).to(dtype))
    assert not comparison.left_out
    stages = [stage for stage, _ in comparison.stages]
    assert "prompt 5, sampled, end" in stages and any("chances of a token, temp" in s for s in stages)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("seed", range(4))
def test_the_ends_of_prompts_agree(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    tokenizer = TOKENIZERS[name]
    stages = [stage for stage, _ in compared(decoder(vocab_size=tokenizer.vocab_size), tokenizer).stages]
    assert "what ends prompt 1, chances" in stages and "what ends prompt 2, log-probability" in stages


def test_what_is_not_compared_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "too short" in compared(decoder(n_layer=1, n_head=1, block_size=4)).left_out[0]
    monkeypatch.setattr(generation, "MOST_PRODUCTS", 1e4)
    few = compared(decoder())
    assert "greedy decoding was not compared" in few.left_out[0] and len(few.stages) > 20
    monkeypatch.setattr(subject, "LARGE", 1000)
    assert "generation was not compared" in compared(decoder()).left_out[0]


def test_nothing_is_left_behind() -> None:
    model = decoder()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    compared(model)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# --- the textbook -------------------------------------------------------------------------------------


def test_chances_of_a_row_by_hand() -> None:
    p = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
    found = chances(p.log(), Rules(temperature=1.0, top_k=3, top_p=0.7))
    # Of the three, 4/9 and 3/9 are the fewest that reach 0.7.
    torch.testing.assert_close(found, torch.tensor([4 / 7, 3 / 7, 0, 0]).double())
    torch.testing.assert_close(
        chances(p.log(), Rules(temperature=0.5, min_p=0.5)),  # Squares: 16, 9, 4, 1.
        torch.tensor([16 / 25, 9 / 25, 0, 0]).double(),
    )
    assert nucleus(p, 0.7).tolist() == [True, True, False, False]
    logits = torch.tensor([2.0, -2.0, 1.0]).double()
    assert penalised(logits, [0, 1, 1], 2.0).tolist() == [1.0, -4.0, 1.0]


def test_a_nucleus_that_ends_among_nearly_equal_tokens_is_not_compared() -> None:
    """Rounding decides which of them is its last, as in a model that has hardly been trained."""
    scores = torch.tensor([2.0, 1.0, 1.0 + 1e-7, 1.0 - 1e-7, -3.0]).double()
    assert float(chances(scores, Rules(1.0))[[0, 2]].sum()) < 0.7
    for rules in (Rules(1.0, top_p=0.7), Rules(1.0, top_k=4, top_p=0.7), Rules(1.0, top_k=2)):
        assert not generation.keeps_the_same(scores, rules, 1e-6)
        assert generation.keeps_the_same(scores, rules, 1e-9)
    for rules in (Rules(1.0, top_p=0.95), Rules(1.0, top_k=4), Rules(1.0, top_p=0.4)):
        assert generation.keeps_the_same(scores, rules, 1e-6)


def test_random_numbers_are_the_products_own() -> None:
    numbers = draws(3, 7)
    generator = sampling.row_generator(3, 7)
    for _ in range(3):
        assert next(numbers) == float(torch.rand(1, generator=generator, dtype=torch.float64))
    low, high = interval(torch.tensor([0.25, 0.5, 0.25]).double(), 1)
    assert (low, high) == (0.25, 0.75)


def test_as_many_beams_as_texts_find_the_best_text() -> None:
    table = torch.randn(4, 4).double().log_softmax(-1)
    texts, gap = beam_search(lambda ids: table[ids[-1] if ids else 0], 64, 3, ())
    every = [
        float(table[0, a] + table[a, b] + table[b, c]) for a in range(4) for b in range(4) for c in range(4)
    ]
    assert len(texts) == 64 and gap == math.inf
    assert max(text.log_prob for text in texts) == pytest.approx(max(every))


# --- faults that nobody planted -------------------------------------------------------------------------

Fault = Callable[[pytest.MonkeyPatch], None]


def in_place_of(owner: Any, name: str, wrong: Callable[..., Any]) -> Fault:
    """Return a fault: a function that is called instead, with the true one before its own arguments."""
    true = getattr(owner, name)
    return lambda patch: patch.setattr(owner, name, lambda *args, **named: wrong(true, *args, **named))


def without(**settings: Any) -> Fault:
    """Return a fault: `adjust_logits` does not see a setting."""

    def wrong(true: Any, logits: Any, seen: Any, given: GenerationConfig) -> Any:
        own = {name: getattr(given, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        if given.temperature == 0:
            return true(logits, seen, given)
        own["repetition_penalty"] = given.repetition_penalty
        return true(logits, seen, GenerationConfig(**own | settings))

    return in_place_of(rows, "adjust_logits", wrong)


def padding_seen(true: Any, prompts: Any, device: Any = None) -> Any:
    tokens, positions, documents = true(prompts, device)
    return tokens, positions, documents.clamp(min=0)


def counted_with_padding(true: Any, prompts: Any, device: Any = None) -> Any:
    tokens, positions, documents = true(prompts, device)
    return tokens, torch.arange(tokens.size(1)).expand_as(positions), documents


def unmoved(true: Any, self: KVCache, rows: Any) -> None:
    true(self, sorted(rows))


def of_the_last(true: Any, self: LiveRows, rows: Any, ids: Any) -> list[float]:
    return [x / 2 for x in true(self, rows, ids)]


def halved(true: Any, self: LiveRows) -> Any:
    scores = true(self)
    scores[1::2] -= 20
    return scores


ENGINE: dict[str, tuple[str, Fault]] = {
    "padding is seen": ("prompt 2, greedy", in_place_of(reading, "pad_left", padding_seen)),
    "positions count padding": ("prompt 2, greedy", in_place_of(reading, "pad_left", counted_with_padding)),
    "rows do not move": ("prompt|beams", in_place_of(KVCache, "select", unmoved)),
    "log-probabilities halved": ("log-probability", in_place_of(LiveRows, "log_probs", of_the_last)),
    "top-k ignored": ("chances of a token", without(top_k=0)),
    "top-p ignored": ("chances of a token", without(top_p=1.0)),
    "min-p ignored": ("chances of a token", without(min_p=0.0)),
    "temperature ignored": ("chances of a token", without(temperature=1.0)),
    "penalty ignored": ("chances of a token", without(repetition_penalty=1.0)),
    "negative logits divided": (
        "scores of tokens",
        in_place_of(
            sampling,
            "penalize_repetition",
            lambda true, logits, seen, penalty: logits.where(~seen, logits / penalty),
        ),
    ),
    "the nucleus lacks its last token": (
        "chances of (a token|equal tokens)",
        in_place_of(sampling, "keep_top_p", lambda true, logits, p: true(logits, p * 0.6)),
    ),
    "one seed for all rows": (
        "draws from them|prompt .*sampled",
        in_place_of(engine, "row_generator", lambda true, seed, row: true(seed, 0)),
    ),
    "the likeliest is drawn": (
        "prompt .*sampled, token",
        in_place_of(engine, "sample", lambda true, logits, generators: logits.argmax(-1)),
    ),
    "the first of those kept is drawn": (
        "prompt .*sampled, token",
        in_place_of(engine, "sample", lambda true, logits, generators: logits.isfinite().int().argmax(-1)),
    ),
    "the next token is drawn": (
        "prompt .*sampled, token",
        in_place_of(
            engine,
            "sample",
            lambda true, logits, generators: (true(logits, generators) + 1) % logits.size(1),
        ),
    ),
    "ties at the last of top-k are dropped": (
        "chances of equal tokens, .*top_k",
        in_place_of(
            sampling,
            "keep_top_k",
            lambda true, logits, k: true(logits - 1e-3 * torch.arange(logits.size(1)), k),
        ),
    ),
    "every second beam is lost": ("beams", in_place_of(LiveRows, "log_scores", halved)),
}


@pytest.mark.parametrize("fault", ENGINE)
def test_a_fault_of_the_engine_is_named(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named, plant = ENGINE[fault]
    torch.manual_seed(0)
    model = decoder()
    plant(monkeypatch)
    with pytest.raises(Differs, match=named):
        for _ in range(8):  # A search by beams may be decided by nothing that the fault changes.
            compared(model)


@pytest.mark.parametrize("shape", [{}, {"position": "learned"}, {"sliding_window": 9}], ids=str)
def test_requests_one_after_another_agree(shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    known, taken = list[int](), list[bool]()
    find, proposed = PrefixCache.find, engine.Engine._was_proposed

    def found(self: PrefixCache, ids: Any) -> Any:
        known.append(self.known(ids))
        return find(self, ids)

    def was_proposed(self: engine.Engine, row: int, place: int) -> bool:
        taken.append(proposed(self, row, place))
        return taken[-1]

    monkeypatch.setattr(PrefixCache, "find", found)
    monkeypatch.setattr(engine.Engine, "_was_proposed", was_proposed)
    stages = [stage for stage, _ in served(decoder(**shape)).stages]
    assert "prompt 2, of a later request, 1 foreseen, token 4" in stages and known == [32, 32, 20]
    assert sum(taken) == (1 if "sliding_window" in shape else 2)  # Rows with a window speculate alone.


def negative(true: Any, self: PrefixCache, ids: Any) -> Any:
    held = true(self, ids)
    return None if held is None else held * -1


def taken_unseen(true: Any, self: engine.Engine, row: int, place: int) -> bool:
    return place < len(self.live.proposed[row])


SERVED: dict[str, Fault] = {
    "keys and values of another sign": in_place_of(PrefixCache, "find", negative),
    "what was foreseen is taken": in_place_of(engine.Engine, "_was_proposed", taken_unseen),
}


@pytest.mark.parametrize("fault", SERVED)
def test_a_fault_between_requests_is_named(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = decoder()
    SERVED[fault](monkeypatch)
    with pytest.raises(Differs, match=r"of a (first|later) request"):
        served(model)


def with_another(tokenizer: Tokenizer, ids: list[int]) -> healing.Prompt:
    """Return the healed prompt, whose branches allow one more token: byte 0, which no prompt ends in."""
    found = healing.healed(tokenizer, ids)
    more = (branch._replace(allowed=np.insert(branch.allowed, 0, 3)) for branch in found.branches)
    return found._replace(branches=tuple(more))


def dropping_more(tokenizer: Tokenizer, ids: list[int]) -> healing.Prompt:
    """Return the healed prompt, of which one more token is dropped that all branches begin with."""
    found = healing.healed(tokenizer, ids)
    if not found.branches:
        return found
    *kept, last = found.ids
    branches = tuple(branch._replace(ids=(last, *branch.ids)) for branch in found.branches)
    return healing.Prompt(kept, (last, *found.dropped), branches)


PROMPTS: dict[str, tuple[str, Fault]] = {
    "another token is allowed": (
        "text of what may end it",
        lambda patch: patch.setattr(text, "healed", with_another),
    ),
    "no longer token is known": (
        "could not be chosen|ids of its healed parts",
        lambda patch: patch.setattr(text, "healed", lambda tokenizer, ids: healing.Prompt(ids)),
    ),
    "what all ends begin with is dropped": (
        "what all its ends begin with stays",
        lambda patch: patch.setattr(text, "healed", dropping_more),
    ),
    "one token too many is dropped": (
        "ids of its healed parts",
        lambda patch: patch.setattr(
            text,
            "healed",
            lambda tokenizer, ids: healing.healed(tokenizer, ids)._replace(
                ids=healing.healed(tokenizer, ids).ids[:-1]
            ),
        ),
    ),
    "branches weigh alike": (
        "what ends prompt",
        in_place_of(reading, "branched", lambda true, *args: [
            part._replace(chances=part.chances * 0) for part in true(*args)]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", PROMPTS)
def test_a_fault_at_the_end_of_prompts_is_named(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named, plant = PROMPTS[fault]
    torch.manual_seed(0)
    tokenizer = TOKENIZERS["code"]
    model = decoder(vocab_size=tokenizer.vocab_size)
    plant(monkeypatch)
    with pytest.raises(Differs, match=named):
        for _ in range(12):
            compared(model, tokenizer)
