"""Answers that no model gives: the input again, and what training had for the nearest prompt.

A score means what it has above these. No torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from rapidfuzz import fuzz

from shingles import Units, batches, mixed
from suites.scoring import Example
from suites.stored import text_of_example
from tokenizer import Tokenizer
from tokenstore import TokenStore

NEIGHBOURS = 20_000  # training examples that are looked at, evenly spread
PERMUTATIONS = 128
SHORTLIST = 8  # by shared tokens, of which the nearest by edit similarity is taken


def last_lines(examples: Sequence[Example]) -> list[str]:
    """The line before, again."""
    return [example.prompt.rsplit("\n", 1)[-1] for example in examples]


def copied(examples: Sequence[Example]) -> list[str]:
    """The input again. Of an example with a gap there is none, and it has "".

    Prompts may wrap their input in words that are all alike. So there are up to three copies: the whole
    prompt, what differs from prompt to prompt in whole lines, and the input of Alpaca's template. The one
    that is most like the references, over all of them, is taken: a weaker baseline would flatter.
    """
    prompts = ["" if example.suffix is not None else example.prompt for example in examples]
    copies = [prompts, _without_shared_lines(prompts)]
    between = "\n\n### Input:\n", "\n\n### Response:"
    if all(mark in prompt for prompt in prompts for mark in between):
        copies.append([p.split(between[0], 1)[1].rsplit(between[1], 1)[0] for p in prompts])

    def likeness(copy: list[str]) -> float:
        return sum(fuzz.ratio(c, e.reference) for c, e in zip(copy, examples, strict=True))

    return max(copies, key=likeness)


def _without_shared_lines(prompts: list[str]) -> list[str]:
    """Each without the lines at both ends that all of them have."""
    rows = [prompt.split("\n") for prompt in prompts]
    before = len(os.path.commonprefix(rows))  # noqa: RUF071
    after = len(os.path.commonprefix([row[before:][::-1] for row in rows]))  # noqa: RUF071
    return ["\n".join(row[before : len(row) - after]) for row in rows]


def nearest(
    examples: Sequence[Example], held_out: TokenStore, train: TokenStore, tokenizer: Tokenizer
) -> list[str]:
    """For each example the completion that training had for the prompt most like its own.

    MinHash over the sets of tokens finds a shortlist, edit similarity of the prompts the nearest of it. The
    first in order stays among equals.

    Args:
        examples: Of `held_out`, where `where` is their number.
    """
    values = mixed(np.arange(train.vocab_size, dtype=np.uint64))

    def signatures(store: TokenStore, numbers: np.ndarray) -> np.ndarray:
        prompts = (store.document(number)[: int(store.prompt_lengths[number])] for number in numbers.tolist())
        units = (Units("", "", values[ids], 0) for ids in prompts)
        # Every prompt has a token, its start, so that none is left out.
        rows = [batch.signatures(1, 1, PERMUTATIONS)[1] for batch in batches(units)]
        return np.concatenate(rows)

    known = np.arange(0, train.n_documents, -(-train.n_documents // NEIGHBOURS))
    theirs = signatures(train, known)
    ours = signatures(held_out, np.array([example.where for example in examples]))
    answers = []
    for example, signature in zip(examples, ours, strict=True):
        shared = (theirs == signature).sum(1)
        near = [
            text_of_example(train, tokenizer, int(i))
            for i in known[np.argsort(-shared, kind="stable")[:SHORTLIST]]
        ]
        asked = example.prompt + (example.suffix or "")
        best = max(near, key=lambda other: fuzz.ratio(asked, other.prompt + (other.suffix or "")))
        answers.append(best.reference)
    return answers
