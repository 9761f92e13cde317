"""Take docstrings out of Python classes: a model reads the rest, and the docstring is its target."""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Class:
    """A class statement.

    Args:
        path: Path of its file.
        name: Its name, with the classes and functions around it: `Outer.Inner`.
        line: Number of its first line, from 1.
        code: Its text from the first decorator on, without its own or any inner docstring; it parses.
        docstring: Its docstring as `inspect.getdoc` returns it; "" where it has none.
    """

    path: str
    name: str
    line: int
    code: str
    docstring: str

    @property
    def id(self) -> str:
        return f"{self.path}:{self.line}"


def classes_of(text: str, path: str) -> Iterator[Class]:
    """Yield every class of a file, nested ones too, in the order of their first lines.

    Args:
        text: The file's text, with line feeds alone as line ends.
        path: The file's path.

    Raises:
        SyntaxError: The file does not parse.
        RecursionError: It is nested too deeply.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a stranger's invalid escapes
        try:
            tree = ast.parse(text)
        except ValueError as error:  # The text has a null byte.
            raise SyntaxError(str(error)) from None
    lines = [f"{line}\n".encode() for line in text.split("\n")]  # `ast` counts line feeds alone.
    for name, node in sorted(_named(tree, ""), key=lambda found: found[1].lineno):
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        code = _without_docstrings(node, lines, first)
        docstring = _docstring(node)
        yield Class(path, name, first, code, inspect.cleandoc(str(docstring.value)) if docstring else "")


def _named(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.ClassDef]]:
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            inner = f"{prefix}{child.name}."
        if isinstance(child, ast.ClassDef):
            yield inner[:-1], child
        yield from _named(child, inner)


def _docstring(node: Documented, place: int = 0) -> ast.Constant | None:
    """Return the text that is the statement at a place of a body, whose first is the docstring."""
    statement = node.body[place] if place < len(node.body) else None
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return statement.value if isinstance(statement.value.value, str) else None
    return None


def _without_docstrings(node: ast.ClassDef, lines: list[bytes], first: int) -> str:
    """Return a class without indentation and docstrings; `pass` where a docstring was the whole body."""
    last = node.end_lineno or node.lineno
    own = dict(enumerate(lines[first - 1 : last], first))
    documented = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for inner in sorted(
        (n for n in ast.walk(node) if isinstance(n, documented) and _docstring(n)),
        key=lambda n: n.body[0].lineno,
        reverse=True,  # The last place first: earlier ones stay valid.
    ):
        expression = inner.body[0]
        start, end = expression.lineno, expression.end_lineno or expression.lineno
        before, after = own[start][: expression.col_offset], own[end][expression.end_col_offset :]
        alone = not before.strip() and not after.split(b"#")[0].strip()
        # A text that is the second statement would become the docstring.
        needless = len(inner.body) > 1 and _docstring(inner, 1) is None
        kept = b"" if alone and needless else before + b"pass" + after
        for line in range(start, end + 1):
            own[line] = b""
        own[start] = kept
    margin = own[first][: len(own[first]) - len(own[first].lstrip())]
    # textwrap.dedent would move nothing where a line inside a string begins further to the left.
    return b"".join(own[line].removeprefix(margin) for line in sorted(own)).decode().rstrip() + "\n"
