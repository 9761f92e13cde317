"""Examples of a prompt, or a gap between two texts, and its completion.

They are held-out examples of a run's own data, or those of a file, which any model can complete.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from config import DataConfig
from data.corpus import read_documents
from data.documents import Document
from data.tokenstore import TokenStore
from suites.baselines import copied, nearest
from suites.gaps import line_spans
from suites.scoring import SUITES, Example
from suites.stored import text_of_example
from suites.task import Given, Task, held_out, nearest_in_training, sampled
from tokenization.chat import DAY_OF_DATA, ConversationError, many_asked_ids
from tokenization.turn_end import end_turns
from tokenizer import Tokenizer

COMPLETION_TOKENS = 512  # The most tokens of a prediction, where --max_new_tokens does not say.


def pair_examples(store: TokenStore, tokenizer: Tokenizer, n: int, seed: int = 0) -> list[Example]:
    """Sample at most `n` examples of the store by `seed`, as they were before tokenisation."""
    draw = np.random.Generator(np.random.PCG64(seed))
    chosen = draw.permutation(store.n_documents)[:n]
    return [text_of_example(store, tokenizer, int(number)) for number in chosen]


def longest_completion(store: TokenStore) -> int:
    """Return the tokens of the store's longest completion, its end included."""
    return int((np.diff(store.offsets) - store.prompt_lengths).max())


def file_examples(file: str) -> list[Document]:
    """Read the rows of a file of examples, in any form that training takes (`data.rows.texts_of`).

    Raises:
        ValueError: It cannot be read, or holds plain text.
    """
    if not Path(file).exists():
        raise ValueError(f"{file} cannot be read: No such file or directory")
    if not file.endswith((".jsonl", ".jsonl.gz", ".parquet")) or not Path(file).is_file():
        raise ValueError(f"{file} is no .jsonl, .jsonl.gz or .parquet file; give one with rows of examples")
    try:
        documents = list(read_documents(DataConfig(source=file)))
    except ValueError as error:  # Its sentence names training's flags.
        said = str(error).replace("--data.source", "--suite_file")
        raise ValueError(re.sub(r"(,| or|, or|:) set --data\.[^,;]*", "", said)) from None
    if documents[0].prompt is None:
        raise ValueError(
            f"{file} holds plain text, and the suite examples is of prompts and completions; give both"
        )
    return documents


def task(given: Given) -> Task:
    """Return the task of the suite pairs; ValueError where there is no run, or its files are plain text."""
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
        # There is nothing to copy where every example has a gap.
        return texts if all(e.suffix is not None for e in examples) else {"copy": copied(examples)} | texts

    limit = given.max_new_tokens or min(longest_completion(data.train), COMPLETION_TOKENS)
    return Task(SUITES["pairs"], examples, limit, "examples", baselines)


def asked_examples(
    examples: list[Example], documents: Sequence[Document], tokenizer: Tokenizer
) -> list[Example]:
    """Return examples of conversations with the ids that ask for their answers, and their text.

    Raises:
        ValueError: The model's tokenizer has no chat template, or the template refuses.
    """
    end_turns(tokenizer)
    try:
        asked = many_asked_ids(tokenizer, [d.messages or () for d in documents], DAY_OF_DATA)
    except ConversationError as error:
        raise ValueError(f"{documents[error.number].where}: {error}") from None
    return [
        replace(example, prompt=tokenizer.decode(ids), ids=tuple(ids))
        for example, ids in zip(examples, asked, strict=True)
    ]


def file_task(given: Given) -> Task:
    """Return the task of the suite examples; ValueError where its file cannot be used."""
    if given.file is None:
        raise ValueError("the suite examples takes its examples from a file; name it with --suite_file")
    rows = sampled(list(enumerate(file_examples(given.file))), given)
    examples = [Example(d.name, number, d.prompt or "", d.text, d.suffix) for number, d in rows]
    if rows[0][1].messages is not None and given.tokenizer is not None:
        examples = asked_examples(examples, [d for _, d in rows], given.tokenizer)

    def baselines(examples: Sequence[Example]) -> dict[str, list[str]]:
        texts = nearest_in_training(given, examples, line_spans) | {"empty": [""] * len(examples)}
        return texts if all(e.suffix is not None for e in examples) else {"copy": copied(examples)} | texts

    limit = max(1, min(given.max_new_tokens or COMPLETION_TOKENS, given.length // 2))
    return Task(SUITES["examples"], examples, limit, "examples", baselines)
