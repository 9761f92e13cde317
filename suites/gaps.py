"""Gaps in held-out plain files: a model is shown what stands before and after, and fills what was taken out.

Three kinds, each a suite, after the single-line, multi-line and random-span tasks of arXiv:2207.14255: one
line, a few lines in a row, and a piece between any two characters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from data.fim import fim_markers
from suites.baselines import Spans, last_lines, nearest_place, places_of
from suites.scoring import SUITES, Example
from suites.task import Given, Task, held_out

LINE_TOKENS, GAP_TOKENS = 64, 256  # The most tokens of a line, and of several lines or a piece.
MOST_LINES = 8
MOST_CHARACTERS = 300  # The most characters of a piece.
CONTEXT_TOKENS = 4  # Characters that are taken for a token where prompts are cut before they are encoded.


def line_spans(text: str, draw: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Yield the spans of lines that are not blank, without their line break."""
    starts = _line_starts(text)
    for i in draw.permutation(len(starts) - 1):
        start, end = starts[i], starts[i + 1] - 1
        if text[start:end].strip():
            yield start, end


def several_spans(text: str, draw: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Yield spans of two to MOST_LINES lines, the first and last not blank, without the last line break."""
    starts = _line_starts(text)
    filled = [bool(text[a:b].strip()) for a, b in pairwise(starts)]
    for i in draw.permutation(len(filled)):
        last = i + int(draw.integers(1, MOST_LINES))
        if filled[i] and last < len(filled) and filled[last]:
            yield starts[i], starts[last + 1] - 1


def piece_spans(text: str, draw: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Yield spans of at most MOST_CHARACTERS between any two characters.

    No span begins or ends inside a CR LF or a surrogate pair.
    """
    for start in draw.permutation(len(text)).tolist():
        end = start + int(draw.integers(1, MOST_CHARACTERS + 1))
        if end <= len(text) and text[start:end].strip() and _between(text, start) and _between(text, end):
            yield start, end


def _line_starts(text: str) -> list[int]:
    """Return the places where lines start, and the one after the text as if it ended with a line break."""
    lengths = np.array([len(line) + 1 for line in text.split("\n")])
    return [0, *np.cumsum(lengths).tolist()]


def _between(text: str, place: int) -> bool:
    around = text[max(0, place - 1) : place + 1]
    return around != "\r\n" and not (len(around) == 2 and "\udc00" <= around[1] <= "\udfff")


def gap_examples(given: Given, name: str, spans: Spans) -> list[Example]:
    """Sample one gap from each file, then a second one, until there are enough, or no more.

    A prompt holds as much of the file around the gap, in characters, as rows may show; it is trimmed to
    tokens when it is completed. `where` is the character at which the gap starts, from 1.
    """
    data, tokenizer, n = held_out(given, name)
    if data.test.holds_examples:
        raise ValueError(
            f"the suite {name} takes gaps out of plain files, and this run's are prompts and completions; "
            "leave it out, or ask for pairs"
        )
    fim_markers(tokenizer, f"the suite {name} cannot be evaluated; leave it out")
    draw = np.random.Generator(np.random.PCG64(given.seed))
    reach = 2 * CONTEXT_TOKENS * given.length

    def of_file(number: int) -> Iterator[Example]:
        text = tokenizer.decode(data.test.document(number).tolist())
        for start, end in spans(text, draw):
            before, after = text[max(0, start - reach) : start], text[end : end + reach]
            yield Example(data.test.names[number], start + 1, before, text[start:end], after)

    files = [of_file(int(number)) for number in draw.permutation(data.test.n_documents)]
    examples: list[Example] = []
    while files and len(examples) < n:
        turn = [(file, next(file, None)) for file in files[: n - len(examples)]]
        rest = files[n - len(examples) :]
        examples += [example for _, example in turn if example]
        files = rest + [file for file, example in turn if example]
    return examples


def _task(given: Given, name: str, spans: Spans, limit: int) -> Task:
    examples = gap_examples(given, name, spans)
    data, tokenizer, _ = held_out(given, name)

    def baselines(examples: Sequence[Example]) -> dict[str, list[str]]:
        before = [replace(e, prompt=e.prompt.rstrip("\n")) for e in examples]
        return {
            "copy": last_lines(before),
            "nearest": nearest_place(examples, places_of(data.train, tokenizer, spans)),
            "empty": [""] * len(examples),
        }

    return Task(
        SUITES[name],
        examples,
        max(1, min(given.max_new_tokens or limit, given.length // 2)),
        "gaps",
        baselines,
    )


def line_task(given: Given) -> Task:
    return _task(given, "fim_line", line_spans, LINE_TOKENS)


def lines_task(given: Given) -> Task:
    return _task(given, "fim_lines", several_spans, GAP_TOKENS)


def span_task(given: Given) -> Task:
    return _task(given, "fim_span", piece_spans, GAP_TOKENS)
