"""What must hold of a Python program without its comments and docstrings (`data.drop_comments`)."""

from __future__ import annotations

import ast
import io
import re
import tokenize
import warnings

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


def without_docstrings(tree: ast.Module) -> str:
    """Return the tree of a program without docstrings, as text; a body that held no more has `pass`.

    Strings that follow a docstring go with it, since the first of them would become the docstring.
    """
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED):
            while node.body and _is_string(node.body[0]):
                del node.body[0]
            if not node.body and not isinstance(node, ast.Module):
                node.body = [ast.Pass()]
    return ast.dump(tree)


def comments(text: str) -> list[str]:
    """Return the comments of a program but for those of its first lines that say how it is run and read."""
    found = [token for token in _tokens(text) if token.type == tokenize.COMMENT]
    return [t.string for t in found if not (t.start[0] <= 2 and ("#!" in t.string or "coding" in t.string))]


def _tokens(text: str) -> list[tokenize.TokenInfo]:
    return list(tokenize.generate_tokens(io.StringIO(_plain(text)).readline))


def _plain(text: str) -> str:
    """Return a text without its byte order mark, each line end as the parser reads it."""
    return re.sub(r"\r\n|\r", "\n", text.removeprefix("\ufeff"))


def _is_string(statement: ast.stmt) -> bool:
    constant = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(constant, ast.Constant) and isinstance(constant.value, str)
