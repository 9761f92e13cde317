"""Lines and functions of held-out files, and what a model and the n-gram model make of them."""

import ast

import numpy as np
import pytest
import torch
from test_eval import BYTES, FP32, documents_of, prepared, random_model, source

from architecture import Decoder
from config import ModelConfig
from data.ngram import NGramModel
from dataset import PreparedData
from suites import functions
from suites.completing import CompletionSettings, complete, ngram_complete, uncut
from suites.functions import function_examples, sample_completions, through_body
from suites.lines import CONTEXT_LINES, next_line_examples, through_first_line
from suites.scoring import SUITES, Example, Predictions, scored
from tokenizer import BPETokenizer, CodeTokenizer

LENGTH = 128  # Tokens of a row.


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> PreparedData:
    return prepared(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model() -> Decoder:
    return random_model()


# --- examples ----------------------------------------------------------------------------------------


def texts_of(data) -> dict[str, str]:
    return {name: source(int(name[1:-3])) for name in data.test.names}


@pytest.mark.parametrize("room", [60, 120, 10_000])
def test_next_line_examples_stand_in_their_files(data, room):
    examples, texts = next_line_examples(data.test, BYTES, 40, room), texts_of(data)
    assert len(examples) == len({(e.name, e.where) for e in examples}) == 40
    assert {e.name for e in examples} == set(texts)
    for example in examples:
        lines = texts[example.name].split("\n")
        assert lines[example.where - 1] == example.reference
        assert example.reference.strip()
        before = "\n".join(lines[: example.where - 1])
        assert before.rstrip().endswith(example.prompt)
        assert before.rstrip() == example.prompt or before.rstrip()[: -len(example.prompt)].endswith("\n")
        assert example.prompt.count("\n") >= CONTEXT_LINES - 1
        assert len(BYTES.prompt_ids(example.prompt)) <= room


def test_a_prompt_is_cut_no_shorter_than_it_must_be(data):
    for example in next_line_examples(data.test, BYTES, 40, 100):
        text = texts_of(data)[example.name]
        start = text.index(example.prompt)
        if start:
            longer = text[text.rfind("\n", 0, start - 1) + 1 : start] + example.prompt
            assert len(BYTES.prompt_ids(longer)) > 100


def test_examples_depend_on_the_seed_only_and_take_every_file_first(data):
    def chosen(n, seed):
        return next_line_examples(data.test, BYTES, n, 100, seed)

    files = data.test.n_documents
    assert chosen(30, 1) == chosen(30, 1)
    assert chosen(30, 1) != chosen(30, 2)
    assert len({e.name for e in chosen(files, 3)}) == files
    assert next_line_examples(data.test, BYTES, 10**6, 5) == []  # nothing fits
    lines = sum(bool(line.strip()) for text in texts_of(data).values() for line in text.split("\n"))
    assert files < len(chosen(10**6, 1)) < lines


FUNCTIONS = '''\
import functools


def one(): return 1


@functools.cache
def two(
    a: int,
    b=(1,
       2),
) -> int:
    """Multiplies

    them.
    """
    # first
    return a * 2 + \\
        sum(b)


class C:
    async def three(self):

        @functools.wraps
        def four():
            x = self

            return x
        return four

    def five(self): pass; """no
docstring"""
'''


def test_function_bodies_begin_after_signature_and_docstring():
    lines = FUNCTIONS.split("\n")
    found = {
        lines[function].strip(): (lines[function:first][-1].strip(), lines[first:last])
        for function, first, last in functions._bodies(FUNCTIONS)
    }
    assert set(found) == {"def two(", "async def three(self):", "def four():"}
    assert found["def two("] == ("# first", ["    return a * 2 + \\", "        sum(b)"])
    assert found["async def three(self):"][1][0] == "        @functools.wraps"
    assert found["def four():"][1] == ["            x = self", "", "            return x"]
    assert (
        functions._bodies("def broken(:\n") == functions._bodies("\x00") == functions._bodies("\ud800") == []
    )


def test_function_examples_complete_to_valid_python(data):
    examples = function_examples(data.test, BYTES, 6, 10_000)
    assert len({e.name for e in examples}) == 6
    for example in examples:
        assert example.prompt.endswith("'''")
        assert example.prompt[example.start :].startswith("def ")
        ast.parse(f"{example.prompt}\n{example.reference}\n")
        assert example.reference.split("\n")[-1].startswith("    return")
    assert function_examples(data.test, BYTES, 6, 10) == []  # no signature fits


# --- completions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", ""),
        ("\n\n  \n", "\n\n  \n"),
        ("\n    x = 1", "\n    x = 1"),
        ("\n\n    x = 1\n    y", "\n\n    x = 1"),
        ("  # more\nx", "  # more"),
        ("\r\nx\r\ny", "\r\nx\r"),
    ],
)
def test_a_line_ends_where_the_first_one_with_text_does(text, kept):
    assert through_first_line(Example("", 1, "", "x"), text) == kept


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("\n        x\n\n        y", "\n        x\n\n        y"),
        ("\n        x\n    def", "\n        x"),
        ("\n        x\n    ", "\n        x\n    "),
        ("  # more\n            x\nclass", "  # more\n            x"),
    ],
)
def test_a_body_ends_where_the_indentation_does(text, kept):
    assert through_body(Example("", 1, "", "        return"), text) == kept


def test_completions_are_greedy_alone_and_in_a_batch(data, model):
    examples = next_line_examples(data.test, BYTES, 12, 100)
    cut, n = through_first_line, 12
    five, one = (CompletionSettings(n, LENGTH, FP32, batch_size) for batch_size in (5, 1))
    made = complete(model, BYTES, examples, cut, five)
    assert made == complete(model, BYTES, examples, cut, one)
    for example, completion in zip(examples[:4], made.texts[:4], strict=True):
        ids = before = BYTES.prompt_ids(example.prompt)
        with torch.no_grad():
            while len(ids) < len(before) + n and BYTES.eos_id not in ids:
                ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
        text = BYTES.decode(ids)
        assert text.startswith(example.prompt)  # The prediction leaves the prompt out.
        assert completion == cut(example, text[len(example.prompt) :])


def scores_of(examples, texts) -> dict:
    """Return the interval of each metric; empty answers stand by as the baseline."""
    systems = {"model": Predictions(texts), "empty": Predictions([""] * len(examples))}
    return scored(SUITES["next_line"], examples, systems)["scores"]["model"]


def test_the_baseline_completes_what_it_was_trained_on(data):
    examples = next_line_examples(data.test, BYTES, 30, 120)

    def scores(documents, order: int) -> dict:
        baseline = NGramModel(documents, BYTES.vocab_size, order=order)
        made = ngram_complete(baseline, BYTES, examples, through_first_line, 40, 10_000)
        return scores_of(examples, made.texts)

    knows, weak = scores(documents_of(data.test), 12), scores(documents_of(data.train), 1)
    for name in SUITES["next_line"].metrics:
        assert weak[name]["mean"] + 20 < knows[name]["mean"]


def test_a_limit_that_was_run_into_is_counted(data, model):
    examples = next_line_examples(data.test, BYTES, 12, 100)
    made = complete(model, BYTES, examples, through_first_line, CompletionSettings(2, LENGTH, FP32))
    long = 0
    for example, text in zip(examples, made.texts, strict=True):
        ids = BYTES.prompt_ids(example.prompt)
        for _ in range(2):
            ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
        added = BYTES.decode(ids)[len(example.prompt) :]
        long += BYTES.eos_id not in ids and through_first_line(example, added) == added
        assert added.startswith(text)
    assert made.ran_long == long > 0
    baseline = NGramModel(documents_of(data.train), BYTES.vocab_size)
    short, enough = (
        ngram_complete(baseline, BYTES, examples, through_first_line, n, 10_000) for n in (1, 200)
    )
    assert short.ran_long is not None and enough.ran_long is not None
    assert short.ran_long > enough.ran_long == 0
    assert all(len(text) <= 1 for text in short.texts)


def test_a_prompt_in_the_prediction_is_no_match(data):
    examples = next_line_examples(data.test, BYTES, 20, 100)
    itself = scores_of(examples, [f"\n  {e.reference}  \r" for e in examples])
    assert itself["exact_match"]["mean"] == itself["edit_similarity"]["mean"] == 100
    planted = scores_of(examples, [f"{e.prompt}\n{e.reference}" for e in examples])
    assert planted["exact_match"]["mean"] == 0
    assert planted["edit_similarity"]["high"] < 60


def test_samples_show_signature_reference_and_completion(data, model):
    samples = sample_completions(model, BYTES, data.test, 128, FP32, n=2)
    assert samples == sample_completions(model, BYTES, data.test, model.config.block_size, FP32, n=2)
    assert len(samples) == 2
    for sample in samples:
        assert sample.prompt.startswith("def ")
        assert sample.reference in texts_of(data)[sample.name]
        assert sample.prompt not in sample.completion


@pytest.mark.parametrize("block_size", [2, 3])
def test_a_tiny_block_has_no_samples_and_does_not_crash(data, block_size):
    shape = ModelConfig(BYTES.vocab_size, block_size=block_size, n_layer=1, n_head=1, n_embd=8)
    assert sample_completions(Decoder(shape).eval(), BYTES, data.test, block_size, FP32) == []


def test_the_n_gram_model_heals_a_prompts_end_too() -> None:
    """A line break and the indentation behind it are one token, which these prompts cut in two."""
    text = "".join(f"def add{i}(a, b):\n    return a + b\n" for i in range(9))
    for tokenizer in (BPETokenizer.train([text] * 9, 300), CodeTokenizer.train([text] * 9, 300, 2)):
        document = np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])
        baseline = NGramModel([document], tokenizer.vocab_size)
        examples = [Example("a", 0, f"def add1(a, b):{end}", "x") for end in ("", "\n", "\n  ")]
        bare, broken, half = ngram_complete(baseline, tokenizer, examples, uncut, 12, 64).texts
        assert bare.startswith("\n    return a + b\n")
        assert broken.startswith("    return a + b\n") and half.startswith("  return a + b\n")
