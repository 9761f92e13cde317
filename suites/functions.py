"""Held-out Python functions and a model's completions of them, to look at."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from architecture import Decoder
from data.tokenstore import TokenStore
from modules.positions import longest_generated
from modules.precision import Precision
from suites.completing import CompletionSettings, complete
from suites.lines import divided, fitting
from suites.scoring import Example
from tokenizer import Tokenizer

FUNCTION_LINES = range(2, 16)  # The numbers of lines that the body of a sample may have.


def function_examples(
    store: TokenStore, tokenizer: Tokenizer, n: int, room: int, seed: int = 0
) -> list[Example]:
    """Return at most `n` Python functions to complete, one from a file; none where no file is Python.

    The prompt holds the whole signature and ends with it, or with the docstring where there is one; the
    reference is the rest of the body, of as many lines as FUNCTION_LINES allows. The arguments are those of
    `next_line_examples`.
    """
    draw = np.random.Generator(np.random.PCG64(seed))
    examples: list[Example] = []
    for number in draw.permutation(store.n_documents):
        if len(examples) == n:
            break
        text = tokenizer.decode(store.document(int(number)).tolist())
        lines, bodies = text.split("\n"), _bodies(text)
        for i in draw.permutation(len(bodies)):
            function, first, last = bodies[i]
            prompt = fitting("\n".join(lines[:first]).rstrip(), tokenizer, room)
            shown = "\n".join(lines[function:first]).rstrip()
            if prompt.endswith(shown):
                name, reference = store.names[int(number)], "\n".join(lines[first:last])
                examples.append(Example(name, first + 1, prompt, reference, start=len(prompt) - len(shown)))
                break
    return examples


def body_spans(text: str, draw: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Yield the spans of function bodies in a Python file, from the line after signature and docstring."""
    lines, bodies = text.split("\n"), _bodies(text)
    for i in draw.permutation(len(bodies)):
        _, first, last = bodies[i]
        start = sum(len(line) + 1 for line in lines[:first])
        yield start, start + len("\n".join(lines[first:last]))


def _bodies(text: str) -> list[tuple[int, int, int]]:
    """Return three line numbers, counted from 0, of each function whose body FUNCTION_LINES admits.

    They are those of its `def`, of its body after the docstring, and of the line after the body.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Invalid escapes in the corpus are no mistake of the user's.
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    if "\r" in text or "\f" in text:  # Python may count the lines of such a text differently.
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            has_docstring = ast.get_docstring(node, clean=False) is not None
            body = node.body[1:] if has_docstring else node.body
            last = node.end_lineno or 0
            if body:
                before = node.body[0].end_lineno if has_docstring else _signature_end(node)
                first = min(_first_line(statement) for statement in body) - 1
                if (before or 0) <= first and last - first in FUNCTION_LINES:
                    found.append((node.lineno - 1, first, last))
    return found


def _signature_end(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    parts = [*ast.walk(node.args), *([node.returns] if node.returns else [])]
    return max([node.lineno, *(getattr(part, "end_lineno", None) or 0 for part in parts)])


def _first_line(statement: ast.stmt) -> int:
    """Return a statement's first line, counted from 1; its decorators stand above its `lineno`."""
    decorators = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(decorator.lineno for decorator in decorators)])


def through_body(example: Example, text: str) -> str:
    """Return the text up to the first line that is indented less than the reference's first line."""
    lines = text.split("\n")
    indent = len(example.reference) - len(example.reference.lstrip())
    for i, line in enumerate(lines[1:], 1):
        if line.strip() and len(line) - len(line.lstrip()) < indent:
            return "\n".join(lines[:i])
    return text


@dataclass(frozen=True)
class CompletedFunction:
    """A held-out function and a model's completion of it; `prompt` begins with the `def`."""

    name: str
    line: int
    prompt: str
    reference: str
    completion: str


def sample_completions(
    model: Decoder,
    tokenizer: Tokenizer,
    store: TokenStore,
    length: int,
    precision: Precision,
    n: int = 3,
    seed: int = 0,
) -> list[CompletedFunction]:
    """Complete held-out Python functions greedily, to look at.

    Args:
        length: Most tokens of a prompt and its completion.
        store, n, seed: The arguments of `function_examples`.
    """
    length = longest_generated(model.config, length)
    max_new_tokens, room = divided(length, 128)
    examples = function_examples(store, tokenizer, n, room, seed)
    settings = CompletionSettings(max_new_tokens, length, precision)
    completions = complete(model, tokenizer, examples, through_body, settings).texts
    return [
        CompletedFunction(e.name, e.where, e.prompt[e.start :], e.reference, completion)
        for e, completion in zip(examples, completions, strict=True)
    ]
