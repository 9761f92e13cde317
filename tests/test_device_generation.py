"""Generation on each device: batched and cached, against one prompt at a time on the CPU, without a cache."""

from __future__ import annotations

import pytest
from decoders import MODELS, PROMPTS, beams, greedy, scrambled, uncached_greedy
from devices import DEVICES

from architecture import Decoder
from generation.engine import generate_ids
from generation.settings import GenerationConfig

SAMPLING = {
    "plain": GenerationConfig(max_new_tokens=12, temperature=1.0, seed=5),
    "shaped": GenerationConfig(
        max_new_tokens=12, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=6
    ),
}


def on(device: str, name: str) -> Decoder:
    return scrambled(MODELS[name]).to(device)


@DEVICES
@pytest.mark.parametrize("name", MODELS)
def test_greedy_ids_are_those_without_a_cache(name: str, device: str) -> None:
    model = scrambled(MODELS[name])
    expected = [uncached_greedy(model, prompt, 12) for prompt in PROMPTS]
    for most_rows in (None, 2):
        done = generate_ids(on(device, name), PROMPTS, greedy(12), most_rows=most_rows)
        assert [one.ids for one in done] == [ids for ids, _ in expected]
        for one, (_, log_prob) in zip(done, expected, strict=True):
            assert one.log_prob == pytest.approx(log_prob, rel=1e-4)


@DEVICES
@pytest.mark.parametrize("how", SAMPLING)
@pytest.mark.parametrize("name", ["rotary half", "learned", "multi-query"])
def test_a_seed_means_the_same_on_every_device(name: str, how: str, device: str) -> None:
    settings = SAMPLING[how]
    alone = [
        generate_ids(scrambled(MODELS[name]), [prompt], settings, first_row=row)[0].ids
        for row, prompt in enumerate(PROMPTS)
    ]
    assert [one.ids for one in generate_ids(on(device, name), PROMPTS, settings)] == alone
    assert alone != [one.ids for one in generate_ids(scrambled(MODELS[name]), PROMPTS, greedy(12))]


@DEVICES
def test_beams_of_several_prompts_are_those_of_each_alone(device: str) -> None:
    alone = [generate_ids(scrambled(MODELS["learned"]), [prompt], beams(3))[0].ids for prompt in PROMPTS]
    assert [one.ids for one in generate_ids(on(device, "learned"), PROMPTS, beams(3))] == alone
