"""CodeXGLUE's method generation and line completion, from their published files (arXiv:2102.04664).

Rows of method generation are {"signature", "docstring", "body"}, with markers for line breaks, indentation
and literals. A model is shown signature and docstring as Python, the markers replaced. Bodies are scored as
one line, so that both forms compare. Rows of line completion are {"input", "gt"}: tokens between spaces,
which a model is shown as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from metrics.texts import codexglue_line
from suites.baselines import copied
from suites.functions import body_spans
from suites.gaps import line_spans
from suites.scoring import SUITES, Example
from suites.task import Given, Task, nearest_in_training, rows_of, texts_of

METHOD_TOKENS, LINE_TOKENS = 512, 100  # The most tokens of a body, and of a line.
_LINE_ENDS = re.compile(r"<EOL>|\n|</s>")


def method_task(given: Given) -> Task:
    """Return the task of method generation; ValueError where its file cannot be used."""
    name = "codexglue_method"
    examples = []
    for number, (where, row) in enumerate(rows_of(given, name)):
        signature, docstring, body = texts_of(where, row, "signature", "docstring", "body")
        prompt = f'{codexglue_line(signature.replace("<EOL>", chr(10)))}\n    """{docstring.strip()}"""\n'
        examples.append(Example(str(row.get("id", where)), number, prompt, body))

    def baselines(examples: Sequence[Example]) -> dict[str, list[str]]:
        return {
            "copy": copied(examples),
            **nearest_in_training(given, examples, body_spans),
            "empty": [""] * len(examples),
        }

    return Task(
        SUITES[name],
        examples,
        max(1, min(given.max_new_tokens or METHOD_TOKENS, given.length // 2)),
        "methods",
        baselines,
        through_method,
    )


def through_method(example: Example, text: str) -> str:
    """Return the text up to the first line that is not indented, if the body is indented."""
    lines = text.split("\n")
    first = next((i for i, line in enumerate(lines) if line.strip()), None)
    if first is None or not lines[first][0].isspace():
        return text
    for i, line in enumerate(lines[first:], first):
        if line.strip() and not line[0].isspace():
            return "\n".join(lines[:i])
    return text


def line_task(given: Given) -> Task:
    """Return the task of line completion; ValueError where its file cannot be used."""
    name = "codexglue_line"
    examples = []
    for number, (where, row) in enumerate(rows_of(given, name)):
        before, line = texts_of(where, row, "input", "gt")
        examples.append(Example(str(row.get("id", where)), number, before.strip(), line))

    def baselines(examples: Sequence[Example]) -> dict[str, list[str]]:
        before = [[part for part in _LINE_ENDS.split(e.prompt) if part.strip()] for e in examples]
        return {
            "copy": [parts[-1] if parts else "" for parts in before],
            **nearest_in_training(given, examples, line_spans),
            "empty": [""] * len(examples),
        }

    return Task(
        SUITES[name],
        examples,
        max(1, min(given.max_new_tokens or LINE_TOKENS, given.length // 2)),
        "lines",
        baselines,
        through_line,
    )


def through_line(example: Example, text: str) -> str:
    """Return the text up to the end of the first line that is not blank, by its marker or a line break."""
    for end in _LINE_ENDS.finditer(text):
        if _LINE_ENDS.sub("", text[: end.start()]).strip():
            return text[: end.start()]
    return text
