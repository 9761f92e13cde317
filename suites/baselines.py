"""Baselines that need no model: the input again, and the training completion of the nearest prompt.

A model's score means something only as far as it exceeds theirs. No torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from rapidfuzz import fuzz

from data.fim import text_of_document
from data.shingles import Units, Words, batches, mixed
from data.tokenstore import TokenStore
from suites.scoring import Example
from suites.stored import text_of_example
from tokenizer import Tokenizer

# The most training examples, or places in training files, that are compared; they are spread evenly.
NEIGHBOURS = 20_000
FILES = 2_000  # The most training files in which places are looked for.
AROUND = 300  # Characters before a place, and after it.
PERMUTATIONS = 128
SHORTLIST = 8  # Neighbours with the most shared tokens, of which the nearest by edit similarity is taken.

# Yields spans of a text, as (start, end), in the order of a random generator.
Spans = Callable[[str, np.random.Generator], Iterator[tuple[int, int]]]


def last_lines(examples: Sequence[Example]) -> list[str]:
    """Answer each example with the last line of its prompt."""
    return [example.prompt.rsplit("\n", 1)[-1] for example in examples]


def copied(examples: Sequence[Example]) -> list[str]:
    """Answer each example with its input again; an example with a gap has none, and "" for an answer.

    Prompts may wrap their input in words. So there are several copies: the whole prompt, the lines or the
    characters in which it differs from other prompts, its longest and its last line, its last paragraph, and
    the input of Alpaca's template. The copy that is most like the references, over all of them, is taken: a
    weaker baseline would flatter the model.
    """
    prompts = ["" if example.suffix is not None else example.prompt for example in examples]
    lines = [[line for line in prompt.split("\n") if line.strip()] or [""] for prompt in prompts]
    copies = [
        prompts,
        _without_shared_lines(prompts),
        _without_shared_ends(prompts),
        [max(of_prompt, key=len) for of_prompt in lines],
        [of_prompt[-1] for of_prompt in lines],
        [prompt.strip("\n").rpartition("\n\n")[2] for prompt in prompts],
    ]
    between = "\n\n### Input:\n", "\n\n### Response:"
    if all(mark in prompt for prompt in prompts for mark in between):
        copies.append([p.split(between[0], 1)[1].rsplit(between[1], 1)[0] for p in prompts])

    def likeness(copy: list[str]) -> float:
        return sum(fuzz.ratio(c, e.reference) for c, e in zip(copy, examples, strict=True))

    return max(copies, key=likeness)


def _without_shared_lines(prompts: list[str]) -> list[str]:
    """Return the prompts without the lines at both ends that all of them have."""
    rows = [prompt.split("\n") for prompt in prompts]
    before = len(os.path.commonprefix(rows))  # noqa: RUF071
    after = len(os.path.commonprefix([row[before:][::-1] for row in rows]))  # noqa: RUF071
    return ["\n".join(row[before : len(row) - after]) for row in rows]


def _without_shared_ends(prompts: list[str]) -> list[str]:
    """Return the prompts without the characters at both ends that all of them have."""
    before = len(os.path.commonprefix(prompts))  # noqa: RUF071
    after = len(os.path.commonprefix([prompt[before:][::-1] for prompt in prompts]))  # noqa: RUF071
    return [prompt[before : len(prompt) - after] for prompt in prompts]


def nearest(
    examples: Sequence[Example], held_out: TokenStore, train: TokenStore, tokenizer: Tokenizer
) -> list[str]:
    """Answer each example with the completion that training had for the prompt most like its own.

    Args:
        examples: Examples of `held_out`, whose `where` is their number there.
    """
    values = mixed(np.arange(train.vocab_size, dtype=np.uint64))

    def signatures(store: TokenStore, numbers: np.ndarray) -> np.ndarray:
        prompts = (store.document(number)[: int(store.prompt_lengths[number])] for number in numbers.tolist())
        return _signatures(values[ids] for ids in prompts)

    known = _spread(train.n_documents, NEIGHBOURS)
    return _answers(
        examples,
        signatures(held_out, np.array([example.where for example in examples])),
        signatures(train, known),
        lambda i: text_of_example(train, tokenizer, int(known[i])),
        lambda example: example.prompt + (example.suffix or ""),
    )


def nearest_place(examples: Sequence[Example], known: Sequence[Example]) -> list[str]:
    """Answer each example with the text at the place in training whose surroundings are most like its own.

    The words and marks in AROUND characters before are compared and, where the example has a gap, after.

    Args:
        known: Places, as `places_of` returns them. Without any, every answer is "".
    """
    if not known:
        return [""] * len(examples)
    words, gaps = Words(), any(example.suffix is not None for example in examples)

    def around(example: Example) -> str:
        after = (example.suffix or "").lstrip()[:AROUND] if gaps else ""
        return example.prompt.rstrip()[-AROUND:] + "\n" + after

    def signatures(places: Sequence[Example]) -> np.ndarray:
        return _signatures(words.ids(around(place)) for place in places)

    return _answers(examples, signatures(examples), signatures(known), known.__getitem__, around)


def places_of(store: TokenStore, tokenizer: Tokenizer, spans: Spans) -> list[Example]:
    """Return up to NEIGHBOURS places in files of the store, as examples whose reference is a gap's text.

    A store of examples gives its own examples.
    """
    if store.holds_examples:
        chosen = _spread(store.n_documents, NEIGHBOURS).tolist()
        return [text_of_example(store, tokenizer, number) for number in chosen]
    draw = np.random.Generator(np.random.PCG64(0))
    numbers = _spread(store.n_documents, FILES).tolist()
    places: list[Example] = []
    for number in numbers:
        text = text_of_document(tokenizer, store.document(number))
        for start, end in islice(spans(text, draw), -(-NEIGHBOURS // len(numbers))):
            before, after = text[max(0, start - 2 * AROUND) : start], text[end : end + 2 * AROUND]
            places.append(Example(store.names[number], start + 1, before, text[start:end], after))
    return places


def _spread(n: int, most: int) -> np.ndarray:
    """Return at most `most` of the numbers below n, at equal distances."""
    return np.arange(0, n, max(1, -(-n // most)))


def _signatures(rows: Iterable[np.ndarray]) -> np.ndarray:
    """Return MinHash signatures, (n, PERMUTATIONS), of texts as arrays of hashed units, (length,) uint64.

    A text without units has a signature of its own.
    """
    none = np.zeros(1, np.uint64)
    units = (Units("", "", ids if len(ids) else none, 0) for ids in rows)
    return np.concatenate([batch.signatures(1, 1, PERMUTATIONS)[1] for batch in batches(units)])


def _answers(
    examples: Sequence[Example],
    ours: np.ndarray,
    theirs: np.ndarray,
    known: Callable[[int], Example],
    text: Callable[[Example], str],
) -> list[str]:
    """Answer each example with the reference of its nearest neighbour.

    Signatures find a shortlist, and edit similarity the nearest of it, the first in order among equals.

    Args:
        ours: (examples, PERMUTATIONS), the signatures of the examples.
        theirs: (neighbours, PERMUTATIONS), those of the neighbours.
        known: Returns a neighbour by its number.
        text: Returns the text of an example that is compared.
    """
    answers = []
    for example, signature in zip(examples, ours, strict=True):
        shared = (theirs == signature).sum(1)
        near = [known(int(i)) for i in np.argsort(-shared, kind="stable")[:SHORTLIST]]
        own = text(example)
        answers.append(max(near, key=lambda other: fuzz.ratio(own, text(other))).reference)
    return answers
