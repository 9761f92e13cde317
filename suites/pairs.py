"""Held-out examples of a run's own data: a prompt, or a gap between two texts, and its completion."""

from __future__ import annotations

import numpy as np

from generate import added_text
from suites.scoring import Example
from tokenizer import Tokenizer
from tokenstore import TokenStore


def pair_examples(store: TokenStore, tokenizer: Tokenizer, n: int, seed: int = 0) -> list[Example]:
    """At most `n` examples of the store, drawn by `seed`, as they were before tokenisation."""
    draw = np.random.Generator(np.random.PCG64(seed))
    chosen = draw.permutation(store.n_documents)[:n]
    return [text_of_example(store, tokenizer, int(number)) for number in chosen]


def text_of_example(store: TokenStore, tokenizer: Tokenizer, number: int) -> Example:
    """One example of the store; its texts come back as they were, which the store made sure of."""
    ids = store.document(number).tolist()
    prompt_length, gap = int(store.prompt_lengths[number]), int(store.suffix_places[number])
    reference = added_text(tokenizer, ids[:prompt_length], ids[prompt_length:])
    suffix = None
    asked = ids[:prompt_length]
    if gap:
        asked, suffix = ids[1:gap], tokenizer.decode(ids[gap + 1 : prompt_length - 1])
    return Example(store.names[number], number, tokenizer.decode(asked), reference, suffix)


def longest_completion(store: TokenStore) -> int:
    """In tokens, its end included."""
    return int((np.diff(store.offsets) - store.prompt_lengths).max())
