"""Python source without its comments and docstrings, found by Python's own tokenizer and parser."""

from __future__ import annotations

import ast
import re
import tokenize
import warnings
from itertools import takewhile

_CODING = re.compile(r"[ \t\f]*#.*?coding[:=][ \t]*[-\w.]+")  # PEP 263
_LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT)
_Place = tuple[int, int]  # line from 0, character from 0


def drop_comments(source: str) -> str:
    """Return Python source without its comments and docstrings.

    Comments are found by `tokenize` and docstrings by `ast`, so `"#FF00AA"` stays. A body that held nothing
    but its docstring gets `pass`. String statements that follow a docstring go too: the first would become
    the docstring. A `#!` line and a PEP 263 coding line stay, because they say how the file is run and read.
    Line ends are kept as they are. Otherwise the result has the same syntax tree.

    Raises:
        ValueError: The source is not Python that this interpreter can parse.
    """
    mark = "\ufeff" if source.startswith("\ufeff") else ""
    # To the parser a line ends at \n, \r\n or \r, and at no other of str.splitlines' ends.
    lines = re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", source.removeprefix(mark))
    plain = [line.rstrip("\r\n") + "\n" * (line[-1] in "\r\n") for line in lines]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The strings of a corpus may hold invalid escapes.
            tree = ast.parse("".join(plain))
        tokens = list(tokenize.generate_tokens(iter([*plain, ""]).__next__))
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise ValueError(f"comments cannot be dropped from source that does not parse: {error}") from error

    cuts = _docstring_cuts(tree, tokens, plain) + _comment_cuts(tokens, plain)
    out: list[str] = [mark]
    at: _Place = (0, 0)
    for start, end, replacement in sorted(cuts):
        if start >= at:
            out += [_between(lines, at, start), replacement]
        at = max(at, end)
    return "".join([*out, _between(lines, at, (len(lines), 0))])


_Cut = tuple[_Place, _Place, str]  # start, end, replacement


def _place(row: int, column: int) -> _Place:
    return row - 1, column


def _between(lines: list[str], start: _Place, end: _Place) -> str:
    if start >= end:
        return ""
    if start[0] == end[0]:
        return lines[start[0]][start[1] : end[1]]
    first = lines[start[0]][start[1] :]
    last = lines[end[0]][: end[1]] if end[0] < len(lines) else ""
    return "".join([first, *lines[start[0] + 1 : end[0]], last])


def _docstring_cuts(tree: ast.Module, tokens: list[tokenize.TokenInfo], lines: list[str]) -> list[_Cut]:
    """Cut each docstring up to the next statement, which takes its place and its indentation."""
    code = [token for token in tokens if token.type not in (*_LAYOUT, tokenize.INDENT, tokenize.DEDENT)]
    index = {_place(*token.start): number for number, token in enumerate(code)}
    cuts: list[_Cut] = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        strings = list(takewhile(_is_string, node.body))
        if not strings:
            continue
        start = _ast_place(strings[0].lineno, strings[0].col_offset, lines)
        final = strings[-1]
        assert final.end_lineno is not None and final.end_col_offset is not None
        end = _ast_place(final.end_lineno, final.end_col_offset, lines)
        if len(strings) == len(node.body) and not isinstance(node, ast.Module):
            cuts.append((start, end, "pass"))
            continue
        number = index[start]
        while _place(*code[number].start) < end or code[number].string == ";":
            number += 1
        cuts.append((start, _place(*code[number].start), ""))
    return cuts


def _is_string(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _ast_place(row: int, byte_column: int, lines: list[str]) -> _Place:
    """Convert a place of ast, whose columns are UTF-8 bytes, to characters, as tokenize counts."""
    return row - 1, len(lines[row - 1].encode()[:byte_column].decode())


def _comment_cuts(tokens: list[tokenize.TokenInfo], lines: list[str]) -> list[_Cut]:
    cuts: list[_Cut] = []
    before = None  # the token before, without those of indentation
    depth = 0  # f-strings around a token: `{x=  # why}` is text too (tokenize marks them from Python 3.12 on)
    for token in tokens:
        if token.type == tokenize.COMMENT and not depth and not _is_kept(token, lines):
            row, column = _place(*token.start)
            if before is not None and before.type not in _LAYOUT:
                cuts.append((_place(*before.end), (row, column + len(token.string)), ""))
            else:
                start, floor = row, 0 if before is None else before.end[0]
                # A line of a lone backslash would otherwise be continued by the line after the comment.
                while start > floor and lines[start - 1].endswith("\\\n"):
                    start -= 1
                cuts.append(((start, 0), (row + 1, 0), ""))
        name = tokenize.tok_name[token.type]
        depth += (name == "FSTRING_START") - (name == "FSTRING_END")
        if token.type not in (tokenize.INDENT, tokenize.DEDENT):
            before = token
    return cuts


def _is_kept(token: tokenize.TokenInfo, lines: list[str]) -> bool:
    row = token.start[0]
    if row == 1 and token.start[1] == 0 and token.string.startswith("#!"):
        return True
    first = lines[0].strip(" \t\f\n")
    return (row == 1 or (row == 2 and first[:1] in ("", "#"))) and _CODING.match(lines[row - 1]) is not None
