"""Lines of held-out files, each to be predicted from what stands before it.

The prompt is a file up to the end of a line, its line break left off, and the prediction is the first line
written after it. With the line break in the prompt, a tokenizer that joins it to the indentation ("\\n    "
is one token) would have to go on from a token that no indented line ever follows: with such prompts the
n-gram model has 2.5% of the lines of the standard library right, and with those of this suite 10%.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np

from data.tokenstore import TokenStore
from suites.baselines import last_lines, nearest_place, places_of
from suites.gaps import line_spans
from suites.scoring import SUITES, Example
from suites.task import Given, Task, held_out
from tokenizer import Tokenizer

CONTEXT_LINES = 3  # The fewest lines of a prompt.
LINE_TOKENS = 64  # The most tokens of a predicted line.


def next_line_examples(
    store: TokenStore, tokenizer: Tokenizer, n: int, room: int, seed: int = 0
) -> list[Example]:
    """Sample lines to predict: one from each file, then a second one, until there are `n`, or no more.

    A line qualifies if it is not blank and CONTEXT_LINES lines before it fit into `room`; there is no upper
    bound on its own length. The prompt ends where the last line before it that is not blank does.

    Args:
        store: The documents; they are decoded, so that files are not read again.
        n: Most examples.
        room: Tokens that a prompt may have, bos included.
        seed: The same store, seed and `n` give the same examples.
    """
    draw = np.random.Generator(np.random.PCG64(seed))
    files = [_lines_of(store, tokenizer, int(i), room, draw) for i in draw.permutation(store.n_documents)]
    examples: list[Example] = []
    while files and len(examples) < n:
        turn = [(file, next(file, None)) for file in files[: n - len(examples)]]
        rest = files[n - len(examples) :]
        examples += [example for _, example in turn if example]
        files = rest + [file for file, example in turn if example]
    return examples


def _lines_of(
    store: TokenStore, tokenizer: Tokenizer, number: int, room: int, draw: np.random.Generator
) -> Iterator[Example]:
    lines = tokenizer.decode(store.document(number).tolist()).split("\n")
    for i in draw.permutation(len(lines)):
        if lines[i].strip():
            before = "\n".join(lines[:i]).rstrip()
            prompt = fitting(before, tokenizer, room)
            if prompt.count("\n") + 1 >= CONTEXT_LINES:
                yield Example(store.names[number], int(i) + 1, prompt, lines[i])


def fitting(text: str, tokenizer: Tokenizer, room: int) -> str:
    """Return the last whole lines of `text` that make a prompt of at most `room` tokens; "" if none does."""
    # More than 8 characters a token never fit in practice, and encoding them takes time.
    start = max(0, len(text) - 8 * room)
    starts = [0] if start == 0 else []
    while (start := text.find("\n", start) + 1) > 0:
        starts.append(start)

    def fits(start: int) -> bool:
        return len(tokenizer.prompt_ids(text[start:])) <= room

    first = bisect_left(starts, True, key=fits)
    # A shorter text can have one or two tokens more, where the cut splits what was one token.
    while first < len(starts) and not fits(starts[first]):
        first += 1
    return text[starts[first] :] if first < len(starts) else ""


def through_first_line(example: Example, text: str) -> str:
    """Return the text up to the end of the first line that is not blank."""
    end = text.find("\n", len(text) - len(text.lstrip()))
    return text if end < 0 else text[:end]


def divided(length: int, max_new_tokens: int) -> tuple[int, int]:
    """Divide a row into tokens of a completion, half of it at most, and of its prompt; each at least 1."""
    max_new_tokens = max(1, min(max_new_tokens, length // 2))
    return max_new_tokens, max(1, length - max_new_tokens)


def task(given: Given) -> Task:
    """Return the task of the suite next_line; ValueError where there is no run, or its files are examples."""
    data, tokenizer, n = held_out(given, "next_line")
    if data.test.holds_examples:
        raise ValueError(
            "the suite next_line is of plain files, and this run's are prompts and completions; ask for pairs"
        )
    max_new_tokens, room = divided(given.length, given.max_new_tokens or LINE_TOKENS)
    examples = next_line_examples(data.test, tokenizer, n, room, given.seed)

    def baselines(examples: Sequence[Example]) -> dict[str, list[str]]:
        return {
            "copy": last_lines(examples),
            "nearest": nearest_place(examples, places_of(data.train, tokenizer, line_spans)),
            "empty": [""] * len(examples),
        }

    return Task(
        SUITES["next_line"],
        examples,
        max_new_tokens,
        f"lines with {CONTEXT_LINES} lines before them that fit {room} tokens",
        baselines,
        through_first_line,
    )
