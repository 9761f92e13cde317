"""Held-out examples of a run's own data: a prompt, or a gap between two texts, and its completion."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from suites.baselines import copied, nearest
from suites.scoring import SUITES, Example
from suites.stored import text_of_example
from suites.task import Given, Task, held_out
from tokenizer import Tokenizer
from tokenstore import TokenStore

COMPLETION_TOKENS = 512  # most of a prediction, where nothing else is said


def pair_examples(store: TokenStore, tokenizer: Tokenizer, n: int, seed: int = 0) -> list[Example]:
    """At most `n` examples of the store, drawn by `seed`, as they were before tokenisation."""
    draw = np.random.Generator(np.random.PCG64(seed))
    chosen = draw.permutation(store.n_documents)[:n]
    return [text_of_example(store, tokenizer, int(number)) for number in chosen]


def longest_completion(store: TokenStore) -> int:
    """In tokens, its end included."""
    return int((np.diff(store.offsets) - store.prompt_lengths).max())


def task(given: Given) -> Task:
    data, tokenizer, n = held_out(given, "pairs")
    if not data.test.holds_examples:
        raise ValueError(
            "the suite pairs is of prompts and completions, and this run's files are plain text; ask for "
            "next_line"
        )
    examples = pair_examples(data.test, tokenizer, n, given.seed)

    def baselines(examples: Sequence[Example]) -> dict[str, list[str]]:
        texts = {
            "nearest": nearest(examples, data.test, data.train, tokenizer),
            "empty": [""] * len(examples),
        }
        # Where every example has a gap there is nothing to copy.
        return texts if all(e.suffix is not None for e in examples) else {"copy": copied(examples)} | texts

    limit = given.max_new_tokens or min(longest_completion(data.train), COMPLETION_TOKENS)
    return Task(SUITES["pairs"], examples, limit, "examples", baselines)
