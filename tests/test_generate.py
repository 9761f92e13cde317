"""Text of a model: ends, stop strings, the model's mode, prompts and mistakes."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from decoders import (
    MODELS,
    PROMPTS,
    SMALL,
    Bytes,
    Shouting,
    Words,
    beams,
    chain,
    greedy,
    log_prob,
    saying,
    scrambled,
)

from config.console import printable
from generation.engine import generate_ids
from generation.settings import GenerationConfig
from generation.text import generate, trim_prompt

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
    assert whole == n + 1  # bos included
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
    # Token 0 of the padding was not seen.
    assert [result.ids for result in generate_ids(model, [[5], [6, 7, 5]], strong)] == [[0], [0]]
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
