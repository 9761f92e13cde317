"""Generation on published families: cached = uncached, batched = single, stop strings, beams, streaming.

The models are those of the parity tests, small and with every parameter scrambled.
"""

import pytest
import torch
from decoders import Bytes
from test_pretrained import gap, pairs, tokens_of, two_of_each_family  # noqa: F401

from generation.engine import generate_ids
from generation.kvcache import KVCache
from generation.reading import pad_left
from generation.settings import GenerationConfig
from generation.text import generate

LENGTHS = (20, 13, 7)
SHORT = (12, 9, 5)  # Dynamic scaling takes no cache past its context.


class Letters(Bytes):
    """A token a letter: of the model's ids, the one as text."""

    bos_id = eos_id = None

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size

    def encode(self, text):
        return [ord(letter) - 161 for letter in text]

    def decode(self, ids):
        return "".join(chr(161 + id) for id in ids)


def prompts_of(model, lengths=(9, 4, 6)) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(tokens_of(model), lengths, strict=True)]


def n_new(model) -> int:
    return 3 if model.config.rotates_by_length else 10


@pytest.mark.parametrize(
    "padded", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["padded", "unpadded"]
)
@pytest.mark.parametrize("name", two_of_each_family())
def test_one_token_at_a_time_equals_reading_at_once(name, padded, pairs):  # noqa: F811
    model = pairs(name).ours
    lengths = SHORT if model.config.rotates_by_length else LENGTHS
    rows = prompts_of(model, lengths if padded else lengths[:1] * 3)
    cache, steps = (
        KVCache(model.config.n_layer, lengths[0]),
        zip(*(x.split(1, 1) for x in pad_left(rows)), strict=True),
    )
    with torch.inference_mode():
        read = torch.cat([model(*step, cache) for step in steps], dim=1)
        for row, ids in enumerate(rows):
            assert gap(read[row, -len(ids) :], model(torch.tensor([ids]))[0]) < 1e-5


@pytest.mark.parametrize("name", two_of_each_family())
def test_batches_and_beams_are_those_of_single_prompts(name, pairs):  # noqa: F811
    model = pairs(name).ours
    prompts, n = prompts_of(model), n_new(model)
    end = generate_ids(model, prompts, GenerationConfig(max_new_tokens=n))[0].ids[1]  # one row ends early
    for width in (1, 3):
        settings = GenerationConfig(max_new_tokens=n, num_beams=width)
        together = generate_ids(model, prompts, settings, end)
        assert together[0].finish_reason == "eos" or width > 1
        for prompt, result in zip(prompts, together, strict=True):
            (alone,) = generate_ids(model, [prompt], settings, end)
            assert alone.ids == result.ids
            assert alone.log_prob == pytest.approx(result.log_prob, abs=1e-3)


@pytest.mark.parametrize("name", two_of_each_family())
def test_stop_strings_over_several_tokens(name, pairs):  # noqa: F811
    model = pairs(name).ours
    tokenizer = Letters(model.config.vocab_size)
    texts, n = [tokenizer.decode(ids) for ids in prompts_of(model)], n_new(model)
    free = generate(model, tokenizer, texts, GenerationConfig(max_new_tokens=n))
    stop = (free[1].text[1:3], free[0].text[n - 2 :] + "x")  # two tokens, and one that only begins
    settings = GenerationConfig(max_new_tokens=n, stop=stop)
    for text, whole, result in zip(texts, free, generate(model, tokenizer, texts, settings), strict=True):
        cut = whole.text.find(stop[0])
        assert result.text == (whole.text if cut < 0 else whole.text[:cut])
        assert result.finish_reason == ("length" if cut < 0 else "stop")
        parts: list[str] = []
        (alone,) = generate(model, tokenizer, [text], settings, on_text=parts.append)
        assert "".join(parts) == alone.text == result.text and alone.ids == result.ids
