"""A Python program without its comments and docstrings (`data.drop_comments`)."""

from __future__ import annotations

import ast
import io
import re
import tokenize
import warnings
from collections.abc import Iterator
from itertools import accumulate, takewhile

LINES = (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT)
LAYOUT = (*LINES, tokenize.INDENT, tokenize.DEDENT)
CODING = re.compile(r"[ \t\f]*#.*?coding[:=][ \t]*[-\w.]+")  # PEP 263
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def parsed(text: str) -> ast.Module | None:
    """Return the syntax tree of a program; None if this interpreter cannot parse it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Texts may hold invalid escapes.
            tree = ast.parse(_plain(text))
        _tokens(text)
        return tree
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
        return None


def without_comments(text: str, tree: ast.Module) -> str:
    """Return a program without comments and docstrings; all other characters stay, line ends too.

    A comment behind code goes with the white space before it, one on a line of its own with the line and with
    lines of a lone backslash above it. A docstring, and the strings that follow it, go up to the next
    statement, which takes their place; a body that held no more gets `pass`. First lines stay that say how
    the program is run and read.

    Args:
        tree: What `parsed` gives of it.
    """
    mark = text[: text.startswith("\ufeff")]
    lines = re.split(r"(?<=\n)|(?<=\r)(?!\n)", text.removeprefix(mark))
    starts = [0, *accumulate(map(len, lines))]
    whole = "".join(lines)
    tokens = _tokens(text)
    gone = bytearray(len(whole) + 1)  # Whether each character goes.
    put = dict[int, str]()

    def place(at: tuple[int, int]) -> int:
        return starts[min(at[0] - 1, len(starts) - 1)] + at[1]

    def drop(first: int, last: int) -> None:
        gone[first:last] = b"\1" * (last - first)

    for first, last, is_all in _docstrings(tree):
        begin, end = (place((row, _characters(lines[row - 1], column))) for row, column in (first, last))
        if is_all:
            put[begin] = "pass"
        else:
            code = (t for t in tokens if t.type not in LAYOUT and t.string != ";" and place(t.start) >= end)
            end = place(next(code).start)
        drop(begin, end)
    before, inside = tokens[0], 0
    for token in tokens:
        if token.type == tokenize.COMMENT and not inside and not _says_how(token, lines):
            row = token.start[0]
            if token is not tokens[0] and before.type not in LINES:
                drop(place(before.end), place(token.end))
            else:
                above = 0 if token is tokens[0] else before.end[0]
                while row - 1 > above and lines[row - 2].rstrip("\r\n").endswith("\\"):
                    row -= 1
                drop(starts[row - 1], starts[token.start[0]])
        name = tokenize.tok_name[token.type]
        inside += (name == "FSTRING_START") - (name == "FSTRING_END")
        before = before if token.type in (tokenize.INDENT, tokenize.DEDENT) else token
    return mark + "".join(
        put.get(i, "") + (whole[i : i + 1] if not gone[i] else "") for i in range(len(gone))
    )


def _docstrings(tree: ast.Module) -> Iterator[tuple[tuple[int, int], tuple[int, int], bool]]:
    """Yield where each body's first strings begin and end, as (row, byte), and whether it holds no more."""
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and node.body and _is_string(node.body[0]):
            strings = list(takewhile(_is_string, node.body))
            first, last = strings[0], strings[-1]
            end = last.end_lineno or last.lineno, last.end_col_offset or 0
            is_all = len(strings) == len(node.body) and not isinstance(node, ast.Module)
            yield (first.lineno, first.col_offset), end, is_all


def _says_how(token: tokenize.TokenInfo, lines: list[str]) -> bool:
    """Return whether a comment is a `#!` line, or names the encoding (PEP 263)."""
    row, column = token.start
    if (row, column) == (1, 0) and token.string.startswith("#!"):
        return True
    is_early = row == 1 or (row == 2 and lines[0].strip()[:1] in ("", "#"))
    return is_early and CODING.match(lines[row - 1]) is not None


def _characters(line: str, n_bytes: int) -> int:
    """Return how many characters a line's first bytes are; the parser counts bytes."""
    return len(line.encode()[:n_bytes].decode())


def _tokens(text: str) -> list[tokenize.TokenInfo]:
    return list(tokenize.generate_tokens(io.StringIO(_plain(text)).readline))


def _plain(text: str) -> str:
    """Return a text without its byte order mark, each line end as the parser reads it."""
    return re.sub(r"\r\n|\r", "\n", text.removeprefix("\ufeff"))


def _is_string(statement: ast.stmt) -> bool:
    constant = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(constant, ast.Constant) and isinstance(constant.value, str)
