"""A model asked for every example of a suite, and the n-gram model asked the same.

Prompts are built and trimmed by the functions that training uses, and the prompt is never in the prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from architecture import Decoder
from decoding import generate_ids
from fim import fim_end_ids, fim_prompt_ids, trim_fim_prompt
from generate import GenerationConfig, added_text, prompt_ids, trim_prompt
from ngram import NGramModel
from precision import Precision
from suites.scoring import Example, Predictions
from tokenizer import Tokenizer

Cut = Callable[[Example, str], str]  # the part of a completion's text that belongs to the prediction


def uncut(example: Example, text: str) -> str:
    """All of it, up to eos."""
    return text


class Asked(NamedTuple):
    """The prompt of an example, and how many tokens the model may add."""

    ids: list[int]
    limit: int
    ends: frozenset[int]


def asked(tokenizer: Tokenizer, example: Example, max_new_tokens: int, length: int) -> Asked:
    """The prompt as training shows it, in a row of `length` tokens, and the room behind it.

    A completion has `max_new_tokens`, or what a long prompt leaves of the row, but never less than half of
    the row: beyond that the prompt loses what is far from its end, or from its gap. The reference plays no
    part in this, as it does in training, where the whole completion is known.
    """
    room = max(1, length - min(max_new_tokens, length // 2))
    if example.suffix is None:
        ids = trim_prompt(prompt_ids(tokenizer, example.prompt), room, tokenizer.start_id)
        ends = frozenset(() if tokenizer.eos_id is None else (tokenizer.eos_id,))
    else:
        ids = trim_fim_prompt(
            tokenizer, fim_prompt_ids(tokenizer, example.prompt, example.suffix), max(3, room)
        )
        ends = fim_end_ids(tokenizer)
    return Asked(ids, max(1, min(max_new_tokens, length - len(ids))), ends | frozenset(tokenizer.eos_ids))


def complete(
    model: Decoder,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    cut: Cut,
    max_new_tokens: int,
    length: int,
    precision: Precision,
    batch_size: int = 16,
) -> Predictions:
    """Greedy completions, without the prompt, each until `cut` leaves something of it off, or an end.

    Args:
        cut: What of a text is the prediction; once it leaves something off, the text has ended.
        length: Tokens of a row: of a prompt and its completion together.
        batch_size: Examples at a time. It does not change what is predicted.
    """
    prompts = [asked(tokenizer, example, max_new_tokens, length) for example in examples]
    texts, ran_long = [""] * len(examples), 0
    order = sorted(
        range(len(examples)), key=lambda i: (prompts[i].limit, len(prompts[i].ends), len(prompts[i].ids))
    )
    # What shares a batch shares its limit and its ends.
    for (limit, ends), group in groupby(order, key=lambda i: (prompts[i].limit, prompts[i].ends)):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            rows = alike[start : start + batch_size]

            def text_of(row: int, ids: list[int], rows: list[int] = rows) -> str:
                return added_text(tokenizer, prompts[rows[row]].ids, ids)

            def stopped(
                row: int, ids: list[int], rows: list[int] = rows, text_of: Callable = text_of
            ) -> bool:
                if cut is uncut:
                    return False
                text = text_of(row, ids)
                return cut(examples[rows[row]], text) != text

            settings = GenerationConfig(max_new_tokens=limit)
            with precision.autocast():
                results = generate_ids(
                    model, [prompts[i].ids for i in rows], settings, ends, tokenizer.vocab_size, stopped
                )
            for row, (i, result) in enumerate(zip(rows, results, strict=True)):
                ids = result.ids[:-1] if result.finish_reason == "eos" else result.ids
                texts[i] = cut(examples[i], text_of(row, ids))
                ran_long += result.finish_reason == "length"
    return Predictions(texts, ran_long)


def ngram_complete(
    baseline: NGramModel,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    cut: Cut,
    max_new_tokens: int,
    length: int,
) -> Predictions:
    """The same by the n-gram model."""
    prompts = [asked(tokenizer, example, max_new_tokens, length) for example in examples]
    contexts = [np.array(prompt.ids) for prompt in prompts]
    texts, ran_long = [], 0
    continued = baseline.complete(contexts, max(prompt.limit for prompt in prompts)).tolist()
    for example, prompt, ids in zip(examples, prompts, continued, strict=True):
        ids = ids[: prompt.limit]
        end = next((at for at, id in enumerate(ids) if id in prompt.ends), len(ids))
        text = added_text(tokenizer, prompt.ids, ids[:end])
        texts.append(cut(example, text))
        ran_long += end == len(ids) and texts[-1] == text
    return Predictions(texts, ran_long)
