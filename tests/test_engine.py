"""The engine: whatever else runs, comes or is cached, a request's tokens are those that it gets alone."""

from __future__ import annotations

import math
import random
import threading
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import MODELS, PROMPTS, SMALL, greedy, log_prob, scrambled, uncached_greedy

from architecture import Decoder
from generation import engine as engine_module
from generation import prefixes, reading
from generation.engine import Engine, generate_ids
from generation.prefixes import PAGE, PrefixCache
from generation.requests import Generated, Handle, Request
from generation.scheduling import EngineLimits, QueueFull
from generation.settings import GenerationConfig
from generation.speculation import Lookup
from generation.text import TextRequest, generate
from tokenization.healing import Branch, Prompt
from tokenizer import CodeTokenizer

TEXT = Path(__file__).read_text("utf-8")

LONG = replace(SMALL, block_size=128)
KINDS = {
    "rotary": LONG,
    "rotary, scaled": replace(
        LONG, rope_scaling="llama3", rope_factor=4.0, rope_context=32, rope_low_freq=1.0, rope_high_freq=4.0
    ),
    "dynamic": replace(LONG, rope_scaling="dynamic", rope_factor=2.0, rope_context=128),
    "yarn": replace(LONG, rope_scaling="yarn", rope_factor=4.0, rope_context=32),
    "longrope": replace(
        LONG, rope_scaling="longrope", rope_context=128, rope_short=(1.0, 1.5), rope_long=(2.0, 4.0)
    ),
    "learned": replace(MODELS["learned"], block_size=128),
    "sinusoidal": replace(MODELS["sinusoidal"], block_size=128),
    "none": replace(MODELS["no position"], block_size=128),
    "window": replace(MODELS["grouped-query"], block_size=128, sliding_window=7),
    "multi-query": replace(MODELS["multi-query"], block_size=128),
}


class Anything(Lookup):
    """Proposals of any length, of which many are right and paying is never asked for."""

    def propose(self, most: int) -> list[int]:
        draw = random.Random(len(self.ids))
        guesses = super().propose(most) or [draw.randrange(40) for _ in range(most)]
        return guesses[: draw.randrange(most + 1)]


def run(engine: Engine, most: int = 2000) -> None:
    for _ in range(most):
        if not engine.step():
            return
    raise AssertionError("the engine does not come to an end")


def branches(draw: random.Random) -> tuple[Branch, ...]:
    """Return some ends of a prompt, of one token and of two."""
    allowed = [np.array(sorted(draw.sample(range(40), 5)), np.int64) for _ in range(3)]
    return Branch((), allowed[0]), Branch((draw.randrange(40),), allowed[1]), Branch((3, 9), allowed[2])


def a_request(draw: random.Random, texts: list[list[int]]) -> Request:
    """Return a request at random, whose prompt often begins as another's does."""
    ids = list(draw.choice(texts)[: draw.randrange(1, 60)]) if texts and draw.random() < 0.6 else [1]
    ids += [draw.randrange(40) for _ in range(draw.choice([0, 1, 5, 20]))]
    ids = ids[:80]
    prompt = Prompt(ids, (7,), branches(draw)) if draw.random() < 0.2 else ids
    sampled = {"temperature": draw.choice([0.7, 1.3]), "seed": draw.randrange(3)}
    chosen: dict[str, Any] = draw.choice(
        [{}, {}, sampled, sampled | {"top_k": 5}, sampled | {"top_p": 0.8, "min_p": 0.05}]
    )
    settings = GenerationConfig(
        max_new_tokens=draw.randrange(1, 16), repetition_penalty=draw.choice([1.0, 1.0, 1.4]), **chosen
    )
    stop = draw.randrange(40)
    return Request(
        prompt,
        settings,
        frozenset(draw.sample(range(40), draw.randrange(3))),
        n=draw.choice([1, 1, 1, 3]),
        first_row=draw.randrange(4),
        logprobs=draw.choice([None, None, 0, 3]),
        interactive=draw.random() < 0.5,
        stopped=draw.choice([None, lambda _, ids: stop in ids[-2:]]),
    )


def alone(model: Decoder, request: Request) -> list[list[int]]:
    ids = [request.prompt] * request.n
    stopped = request.stopped
    found = generate_ids(model, ids, request.settings, request.ends, None, stopped, request.first_row)
    return [one.ids for one in found]


def schedule(
    model: Decoder, seed: int, n: int, limits: EngineLimits, proposer: Any = None
) -> tuple[list[Handle], Engine]:
    """Add n requests at random steps, cancel some, and run until all have ended."""
    draw, engine = random.Random(seed), Engine(model, None, limits, proposer)
    handles, texts, cancelled = list[Handle](), list[list[int]](), set[Handle]()
    while len(handles) < n or not all(handle.done for handle in handles):
        while len(handles) < n and draw.random() < 0.4:
            handles.append(engine.add(a_request(draw, texts)))
            texts.append(handles[-1].seat.prompt.whole)
        if handles and draw.random() < 0.05:
            cancelled.add(one := draw.choice(handles))
            one.cancel()
        engine.step()
        texts += [
            handle.seat.prompt.ids + result.ids
            for handle in handles[-3:]
            for result in handle.results
            if result
        ]
        for handle in cancelled:
            assert handle.done and not any(text.number in engine.texts for text in handle.texts)
    return handles, engine


@pytest.mark.parametrize(
    ("kind", "seed"),
    [  # Of each kind one seed, and each seed with some kinds; the other pairs are slow.
        pytest.param(kind, seed, marks=[] if number % 3 == seed else pytest.mark.slow)
        for number, kind in enumerate(KINDS)
        for seed in range(3)
    ],
)
def test_random_schedules_give_what_each_request_gets_alone(kind, seed, monkeypatch):
    model = scrambled(KINDS[kind], seed)
    monkeypatch.setattr(engine_module, "PIECE", random.Random(seed).choice([3, 16, 256]))
    monkeypatch.setattr(engine_module, "LARGE_PIECE", 40)
    monkeypatch.setattr(prefixes, "PAGE", [2, 5, 16][seed])
    monkeypatch.setattr(engine_module, "A_PASS", 4)
    page = 2 * 2 * model.config.n_kv_head * 4 * 4 * [2, 5, 16][seed]
    limits = EngineLimits(most_rows=[4, 8, 32][seed], prefix_bytes=[0, 30 * page, 1000 * page][seed])
    handles, engine = schedule(model, seed, 20, limits, [None, Lookup, Anything][seed])
    compare(model, handles)
    assert engine.bytes == 0 and engine.prefixes.bytes <= limits.prefix_bytes
    assert seed == 0 or any(handle.known for handle in handles)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_schedules_of_fifty_requests(seed, monkeypatch):
    monkeypatch.setattr(engine_module, "PIECE", [5, 30, 256][seed % 3])
    monkeypatch.setattr(prefixes, "PAGE", [3, 16][seed % 2])
    kind = list(KINDS.values())[seed % len(KINDS)]
    model = scrambled(kind, seed)
    handles, _ = schedule(model, 100 + seed, 50, EngineLimits(most_rows=[3, 8, 32][seed % 3]), Anything)
    compare(model, handles)


def compare(model: Decoder, handles: list[Handle]) -> None:
    for handle in handles:
        for found, expected in zip(handle.result(), alone(model, handle.request), strict=True):
            n = len(found.ids) if found.finish_reason == "cancelled" else None
            assert found.ids == expected[:n]
            if handle.request.logprobs is not None and found.ids:
                own = log_prob(model, handle.seat.prompt.ids, found.ids)
                assert sum(score.log_prob for score in found.scores) == pytest.approx(own, abs=1e-3)
                assert [score.id for score in found.scores] == found.ids


# --- the parts of a request -----------------------------------------------------------------------------


def test_scores_of_prompt_and_text_are_the_models_own():
    model = scrambled(MODELS["rotary half"])
    engine = Engine(model)
    hot = GenerationConfig(max_new_tokens=4, temperature=2.0, top_k=3, repetition_penalty=1.5)
    handle = engine.add(Request(PROMPTS[0], hot, logprobs=2, echo=True))
    run(engine)
    (found,) = handle.result()
    scores, ids = [*handle.prompt_scores, *found.scores], [*PROMPTS[0], *found.ids]
    with torch.no_grad():
        log_probs = model(torch.tensor([ids]))[0].double().log_softmax(-1)
    assert [score.id for score in scores] == ids[1:]
    for place, score in enumerate(scores):
        assert score.log_prob == pytest.approx(float(log_probs[place, score.id]), abs=1e-4)
        best = log_probs[place].topk(2)
        assert [id for id, _ in score.likeliest] == best.indices.tolist()
        assert [p for _, p in score.likeliest] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_prompt_is_scored_alike_in_pieces(monkeypatch):
    model = scrambled(MODELS["learned"])
    whole = Engine(model).add(Request(PROMPTS[3], greedy(2), logprobs=0, echo=True, read_only=True))
    monkeypatch.setattr(engine_module, "PIECE", 3)
    engine = Engine(model)
    handle = engine.add(replace(whole.request))
    run(engine)
    expected = log_prob(model, PROMPTS[3][:1], PROMPTS[3][1:])
    assert sum(score.log_prob for score in handle.prompt_scores) == pytest.approx(expected, abs=1e-4)
    assert handle.result() == [Generated([], 0.0, "length")]


def test_samples_share_one_reading_and_differ(monkeypatch):
    model = scrambled(MODELS["multi-query"])
    engine, read = Engine(model), []
    real = reading.pad_left
    monkeypatch.setattr(reading, "pad_left", lambda rows, *rest: read.append(len(rows)) or real(rows, *rest))
    handle = engine.add(Request(PROMPTS[0], GenerationConfig(max_new_tokens=6, temperature=1.5), n=4))
    run(engine)
    assert read == [1] and len({tuple(found.ids) for found in handle.result()}) == 4


def test_a_long_prompt_holds_up_neither_texts_nor_a_cancellation(monkeypatch):
    monkeypatch.setattr(engine_module, "PIECE", 8)
    model = scrambled(LONG)
    engine = Engine(model)
    first = engine.add(Request(PROMPTS[0], greedy(30)))
    engine.step()
    long = engine.add(Request([1] * 90, greedy(3)))
    before = engine.bytes
    for step in range(5):
        engine.step()
        assert len(first.texts[0].ids) == step + 2
    assert engine.readings and engine.bytes > before
    long.cancel()
    engine.step()
    assert long.done and long.result()[0].finish_reason == "cancelled"
    assert not engine.readings and engine.bytes == before
    run(engine)
    assert first.result()[0].ids == uncached_greedy(model, PROMPTS[0], 30)[0]


def test_rows_that_leave_give_their_memory_back():
    engine = Engine(scrambled(SMALL))
    handles = [engine.add(Request([1, i], greedy(20))) for i in range(8)]
    engine.step()
    full = engine.bytes
    for handle in handles[1:]:
        handle.cancel()
    engine.step()
    assert engine.bytes <= full / 4
    handles[0].cancel()
    assert not engine.step() and engine.bytes == 0


def test_interactive_requests_come_first_then_the_older():
    engine = Engine(scrambled(SMALL), limits=EngineLimits(most_rows=1))
    ended: list[str] = []
    for name, interactive in {"a": False, "b": False, "c": True, "d": True}.items():
        request = Request(
            [1], greedy(2), interactive=interactive, on_done=lambda *_, name=name: ended.append(name)
        )
        engine.add(request)
    run(engine)
    assert ended == ["c", "d", "a", "b"]


def test_the_newest_request_of_an_editor_begins_first_and_before_nobody_elses():
    engine = Engine(scrambled(SMALL), limits=EngineLimits(most_rows=1))
    ended: list[str] = []

    def ask(name: str, editor: str | None, **more: Any) -> None:
        done = lambda sample, made: ended.append(name)  # noqa: E731
        engine.add(Request([1, 2], greedy(2), editor=editor, on_done=done, **more))

    ask("running", "a")
    engine.step()
    for name, editor in (("a1", "a"), ("b1", "b"), ("none1", None), ("a2", "a"), ("none2", None)):
        ask(name, editor)
    ask("late", "a", interactive=False)
    ask("a3", "a")
    run(engine)
    assert ended == ["running", "a3", "b1", "none1", "a2", "none2", "a1", "late"]


def test_a_slots_newer_request_replaces_older_ones_but_no_equal_prompt():
    engine = Engine(scrambled(SMALL))
    others = [engine.add(Request([1, 2], greedy(4), slot=slot)) for slot in (None, "other")]
    old = engine.add(Request([1, 2], greedy(4), slot="a"))
    engine.step()
    new = [engine.add(Request([1, 2, 3], greedy(4), slot="a")) for _ in range(3)]
    run(engine)
    assert old.result()[0].finish_reason == "replaced" and len(old.result()[0].ids) == 1
    assert all(one.result()[0].finish_reason == "length" for one in [*new, *others])


def test_a_deadline_and_a_callers_own_stop_end_texts_where_they_are():
    model = scrambled(SMALL)
    engine, wanted = Engine(model), [True]
    timed = engine.add(Request(PROMPTS[0], greedy(20), seconds=100.0))
    stopped = engine.add(Request(PROMPTS[2], greedy(20), should_stop=lambda: not wanted[0]))
    for _ in range(3):
        engine.step()
    assert time.monotonic() < timed.deadline <= time.monotonic() + 100
    timed.deadline = time.monotonic()
    wanted[0] = False
    run(engine)
    assert timed.result()[0].finish_reason == "time" and stopped.result()[0].finish_reason == "cancelled"
    assert timed.result()[0].ids == uncached_greedy(model, PROMPTS[0], 3)[0]


def test_requests_may_be_added_from_other_threads():
    model = scrambled(SMALL)
    engine, handles = Engine(model), list[Handle]()
    threads = [
        threading.Thread(target=lambda p=p: handles.append(engine.add(Request(p, greedy(5)))))
        for p in PROMPTS
    ]
    for thread in threads:
        thread.start()
    while len(handles) < len(PROMPTS) or not all(handle.done for handle in handles):
        engine.step()
    for handle in handles:
        assert handle.result()[0].ids == uncached_greedy(model, handle.seat.prompt.ids, 5)[0]


# --- bad input: one sentence for one request ------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([]), r"the prompt holds no token"),
        (Request([1, 40]), r"the prompt holds id 40, outside the model's vocabulary of 40"),
        (Request([1], GenerationConfig(num_beams=2)), r"num_beams is 2, but an engine takes no beams"),
        (Request([1], n=0), r"n is 0; it must be at least 1"),
        (Request([1], greedy(4), n=9), r"n is 9, and the engine has 8 places; lower n"),
        (Request([1], logprobs=-1), r"logprobs is -1; it must be at least 0"),
        (Request([1], echo=True), r"echo scores the prompt, and logprobs is None; set"),
        (Request([1], greedy(4), n=2, read_only=True), r"read_only generates nothing, and n is 2"),
        (
            Request([1] * 30, greedy(100), n=4),
            r"4 rows of up to 130 tokens take 0\.1 MB .* engine's 0\.1 MB; shorten the prompt or lower",
        ),
        (Request([1], greedy(4)), r"2 requests wait, as many as may; send it again"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_the_others_go_on(request_, words):
    model = scrambled(SMALL)
    engine = Engine(model, limits=EngineLimits(most_rows=8, most_waiting=2, most_bytes=110_000))
    good = [engine.add(Request(prompt, greedy(5))) for prompt in PROMPTS[:2]]
    with pytest.raises(ValueError, match=words) as error:
        engine.add(request_)
    assert "\n" not in str(error.value) and isinstance(error.value, QueueFull) == ("wait" in words)
    run(engine)
    assert [one.result()[0].ids for one in good] == [uncached_greedy(model, p, 5)[0] for p in PROMPTS[:2]]


def test_memory_is_a_bound_that_waiting_requests_keep():
    model = scrambled(SMALL)
    engine = Engine(model, limits=EngineLimits(most_bytes=60_000))
    handles = [engine.add(Request([1 + i] * (5 + i), greedy(12))) for i in range(9)]
    most, rows = 0, 0
    while engine.step():
        most, rows = max(most, engine.bytes), max(rows, len(engine.live.prompts))
    assert most <= 60_000 and 1 < rows < 9
    assert all(one.result()[0].finish_reason == "length" for one in handles)


def test_a_long_request_makes_the_rows_of_short_ones_as_long():
    """Two rows of 10 + 64 columns take 37,888 bytes, and as long as the long request needs them 48,128."""
    engine = Engine(scrambled(SMALL), limits=EngineLimits(most_bytes=40_000))
    short = engine.add(Request([1, 2], greedy(8)))
    engine.step()
    long = engine.add(Request([3] * 20, greedy(10)))
    engine.step()
    assert engine.queue.waiting == [long] and not short.done
    run(engine)
    assert short.done and long.done


@pytest.mark.parametrize("at_start", [True, False])
def test_nan_ends_the_request_that_met_it_with_its_place(at_start):
    model = scrambled(MODELS["learned"])
    engine = Engine(model)
    good = engine.add(Request([1, 2, 3], greedy(6)))
    with torch.no_grad():
        model.embed.weight.data[39] = math.nan  # tied: the head would be NaN for all
        model.head.weight = torch.nn.Parameter(model.head.weight.clone().nan_to_num(0.0))
    bad = engine.add(Request([4, 39 if at_start else 5], greedy(6)))
    if not at_start:
        engine.step()
        bad.texts[0].ids[-1] = 5
        model.get_parameter("position.weight").data[4] = math.nan  # the next place of the longer text alone
    for _ in range(8):
        engine.step()
    with pytest.raises(ValueError, match=r"logits are NaN after \d tokens of the text; its weights"):
        (bad if at_start else good).result()
    if at_start:
        assert good.result()[0].finish_reason == "length" and len(good.result()[0].ids) == 6
    again = engine.add(Request([4, 39], greedy(2)))
    run(engine)
    assert again.error is not None and not again.known  # nothing of it was kept


def test_an_error_of_one_callback_ends_one_request():
    model = scrambled(SMALL)
    engine = Engine(model)

    def fails(*_):
        raise RuntimeError("its own")

    bad = [
        engine.add(Request(PROMPTS[0], greedy(5), stopped=fails)),
        engine.add(Request(PROMPTS[0], greedy(5), on_done=fails)),
        engine.add(Request(PROMPTS[0], greedy(5), should_stop=fails)),
    ]
    good = engine.add(Request(PROMPTS[0], greedy(5)))
    run(engine)
    assert good.result()[0].ids == uncached_greedy(model, PROMPTS[0], 5)[0]
    for handle in bad:
        with pytest.raises(RuntimeError, match="its own"):
            handle.result()
    assert not engine.texts and engine.bytes == 0


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"training mode, where dropout would act; call model\.eval"):
        Engine(scrambled(SMALL).train())


# --- text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heal", [False, True])
def test_texts_of_an_engine_are_those_that_generate_makes(heal):
    tokenizer = CodeTokenizer.train([TEXT] * 3, 300)
    config = replace(KINDS["rotary"], vocab_size=tokenizer.vocab_size)
    model, engine = scrambled(config), Engine(scrambled(config), tokenizer.vocab_size)
    settings = GenerationConfig(max_new_tokens=12, temperature=0.9, stop=("e", "\n"), seed=4, heal=heal)
    parts: dict[tuple[str, int], str] = defaultdict(str)

    def add(text: str, n: int) -> TextRequest:
        def on_text(sample: int, part: str) -> None:
            parts[text, sample] += part

        asked = TextRequest(tokenizer, text, settings, on_text=on_text, n=n, first_row=2)
        engine.add(asked.request)
        engine.step()
        return asked

    prompts = {"def name(": 1, "def n": 3, "    return self.": 2, "": 1}
    asked = {text: add(text, n) for text, n in prompts.items()}
    run(engine)
    for text, one in asked.items():
        expected = generate(model, tokenizer, [text] * prompts[text], settings, first_row=2)
        for sample, (found, other) in enumerate(zip(one.completions, expected, strict=True)):
            assert found is not None and found.ids == other.ids and found.text == other.text
            assert found.finish_reason == other.finish_reason and parts[text, sample] == found.text


# --- the prefix cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_goes_on_reads_only_what_is_new(kind, monkeypatch):
    model = scrambled(KINDS[kind])
    engine, read = Engine(model), []
    first = engine.add(Request([1 + i % 30 for i in range(60)], greedy(20)))
    run(engine)
    text = first.seat.prompt.ids + first.result()[0].ids
    real = model.hidden
    monkeypatch.setattr(model, "hidden", lambda x, *rest: read.append(x.numel()) or real(x, *rest))
    second = engine.add(Request([*text, 5, 6], greedy(8)))
    run(engine)
    assert second.known == PAGE * ((len(text) - 1) // PAGE) and read[0] == len(text) + 2 - second.known
    assert second.result()[0].ids == uncached_greedy(model, [*text, 5, 6], 8)[0]


def test_equal_prompts_that_come_while_one_is_read_wait_for_it(monkeypatch):
    monkeypatch.setattr(engine_module, "PIECE", 16)
    monkeypatch.setattr(engine_module, "A_PASS", 8)
    model = scrambled(LONG)
    engine, read = Engine(model), []
    real = model.hidden
    monkeypatch.setattr(model, "hidden", lambda x, *rest: read.append(x.numel()) or real(x, *rest))
    handles = [engine.add(Request([2] * 80, greedy(2)))]
    engine.step()
    handles += [engine.add(Request([2] * 80, greedy(2))) for _ in range(2)]
    run(engine)
    assert sum(read) < 80 + 3 * 18
    assert all(one.result()[0].ids == handles[0].result()[0].ids for one in handles)


def test_pages_are_found_by_their_tokens_and_the_least_used_go_first():
    def held(start: int, end: int) -> torch.Tensor:
        return torch.arange(start, end).float().expand(1, 2, 1, -1).unsqueeze(-1)  # 8 bytes a token

    cache = PrefixCache(5 * PAGE * 8)
    a, b = list(range(3 * PAGE)), [*range(PAGE), *[99] * (2 * PAGE)]
    cache.keep(a, held)
    cache.keep(b, held)  # shares its first page
    assert cache.bytes == 5 * PAGE * 8
    assert cache.known(a) == 3 * PAGE - 1 and cache.known([*b, 7]) == 3 * PAGE
    assert cache.known([*a[: PAGE + 5], 77, 78]) == PAGE + 5  # a part of a page
    assert cache.known([5]) == 0 and cache.find([5, 6]) is None
    found = cache.find([*a[: PAGE + 5], 77])
    assert found is not None and found[0, 0, 0, :, 0].tolist() == [*range(PAGE + 5)]
    cache.keep([50] * PAGE, held)
    assert cache.bytes == 5 * PAGE * 8
    assert cache.known([*b, 7]) == 3 * PAGE and cache.known([*a, 7]) == 2 * PAGE  # a's last page went
    cache.keep([60] * 9 * PAGE, held)  # more than all
    assert cache.bytes == 5 * PAGE * 8 and cache.known([*[60] * 9 * PAGE, 1]) == 5 * PAGE
    cache.keep([70] * PAGE, lambda start, end: held(start, end) * math.nan)
    assert cache.known([70] * PAGE) == 0


def test_pages_that_hold_something_else_would_be_noticed(monkeypatch):
    real = PrefixCache.find
    monkeypatch.setattr(PrefixCache, "find", lambda *args: torch.as_tensor(real(*args)).roll(1, 4))
    with pytest.raises(AssertionError):
        test_a_request_that_goes_on_reads_only_what_is_new("rotary", monkeypatch)
