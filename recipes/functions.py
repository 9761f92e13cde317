"""One Python function as text: parse it, tell its names apart, and edit it at the places of its tree."""

from __future__ import annotations

import ast
import symtable
import threading
import warnings
from collections.abc import Iterator
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
Scope = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef | Comprehension

# Only one thread may parse at a time: CPython, as of 3.11.7, counts the depth of all threads' trees in one
# place, and raises a SystemError where the garbage collector lets another thread in (cpython issue 106905).
# Filters of warnings are shared by all threads, too.
_parsing = threading.Lock()


def syntax_tree(text: str, mode: str = "exec") -> Any:
    """Return what `ast.parse` returns, from any thread."""
    with _parsing:
        return ast.parse(text, mode=mode)


DEEPEST = 200  # Most levels of a tree; each takes up to 3 of the 1,000 calls that Python nests.


def unwritable(node: ast.AST) -> str:
    """Return why `ast.dump` and `ast.unparse` cannot write a tree that Python has read; "" if they can.

    A number read in hexadecimal may have more decimal digits than Python writes (4,300), and a sum of a
    thousand terms is a thousand levels deep.
    """
    level = [node]
    for _ in range(DEEPEST):
        for one in level:
            if isinstance(one, ast.Constant) and type(one.value) is int:
                try:
                    str(one.value)
                except ValueError:
                    return "a number of more digits than Python writes"
        level = [child for one in level for child in ast.iter_child_nodes(one)]
    return "code that is nested too deeply" if level else ""


def parsed(source: str) -> Function:
    """Return the tree of a function; raise a ValueError if `source` is not one function."""
    try:
        with _parsing, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(source, "function", "exec", dont_inherit=True)
            body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a Python function: {error}") from None
    if len(body) != 1 or not isinstance(body[0], Function):
        raise ValueError("not one Python function")
    return body[0]


# --- text --------------------------------------------------------------------------------------------


class Edits:
    """A list of replacements in a text, by the positions of its syntax nodes."""

    def __init__(self, source: str) -> None:
        self._data = source.encode()
        self._starts = [0]
        for line in self._data.split(b"\n"):
            self._starts.append(self._starts[-1] + len(line) + 1)
        self._edits: list[tuple[int, int, str]] = []

    def place(self, line: int, column: int) -> int:
        """Return the byte at a line, counted from 1, and a column in bytes, as `ast` counts."""
        return self._starts[line - 1] + column

    def span(self, node: Any) -> tuple[int, int]:
        return self.place(node.lineno, node.col_offset), self.place(node.end_lineno, node.end_col_offset)

    def text(self, start: int, end: int) -> str:
        return self._data[start:end].decode()

    @property
    def size(self) -> int:
        return len(self._data)

    def line(self, number: int) -> tuple[int, int]:
        """Return the beginnings of a line and of the next one."""
        return self._starts[number - 1], min(self._starts[number], len(self._data))

    def indent(self, node: ast.stmt) -> str | None:
        """Return the blanks before a statement that shares no line with another; None if it does."""
        start, end = self.span(node)
        before = self.text(self.line(node.lineno)[0], start)
        after = self.text(end, self.line(node.end_lineno or 0)[1])
        return before if not before.strip() and not after.strip() else None

    def replace(self, start: int, end: int, text: str) -> None:
        self._edits.append((start, end, text))

    def done(self) -> str | None:
        """Return the text with all replacements, the first of those that overlap; None if there are none."""
        if not self._edits:
            return None
        pieces, at = [], 0
        for start, end, text in sorted(self._edits):
            if start >= at:
                pieces += [self._data[at:start], text.encode()]
                at = end
        return b"".join([*pieces, self._data[at:]]).decode()


# --- scopes ------------------------------------------------------------------------------------------


def own_identifiers(node: ast.AST) -> list[str]:
    """Return the variables that a node itself names, without its children, attributes and keywords."""
    match node:
        case ast.Name():
            return [node.id]
        case ast.arg():
            return [node.arg]
        case ast.alias():
            return [(node.asname or node.name).split(".")[0]]
        case ast.Global() | ast.Nonlocal():
            return node.names
        case ast.MatchMapping():
            return [node.rest] if node.rest else []
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.ExceptHandler() | ast.MatchAs() | ast.MatchStar():
            return [node.name] if node.name else []
        case _:
            return []


def identifiers(node: ast.AST) -> list[str]:
    """Return the variables named anywhere in a node, each as often as it is named."""
    return [name for inner in ast.walk(node) for name in own_identifiers(inner)]


def fresh_names(function: Function, stem: str) -> Iterator[str]:
    """Yield those of `stem0`, `stem1`, ... that do not occur in the function."""
    taken, number = set(identifiers(function)), 0
    while True:
        if f"{stem}{number}" not in taken:
            yield f"{stem}{number}"
        number += 1


def plain_locals(function: Function) -> list[str]:
    """Return the local variables whose every occurrence is a `Name` of this variable, by first place.

    Variables are left out that a nested scope binds too, that an import, a handler, a `def` or a pattern
    binds, or that occur inside an f-string, whose places Python before 3.12 does not tell.
    """
    own: dict[str, None] = {}
    # Decorators, defaults and hints are evaluated outside, where a name is another variable.
    outside = [*function.decorator_list, function.args, *([function.returns] if function.returns else [])]
    other = {name for node in outside for name in identifiers(node)}

    def visit(node: ast.AST, nested: bool) -> None:
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            other.add(node.id) if nested else own.setdefault(node.id)
        elif isinstance(node, ast.JoinedStr):
            other.update(identifiers(node))
        elif not isinstance(node, ast.Name):
            other.update(own_identifiers(node))
        for child in ast.iter_child_nodes(node):
            visit(child, nested or isinstance(node, Scope))

    for statement in function.body:
        visit(statement, False)
    return [name for name in own if name not in other]


def globals_of(source: str) -> set[str]:
    """Return the names from outside that a function, its decorators, defaults and hints use."""
    found: set[str] = set()

    def visit(table: symtable.SymbolTable) -> None:
        whole = table.get_type() == "module"
        for symbol in table.get_symbols():
            # For a function called `top`, symtable reports its locals as global and local.
            outer = symbol.is_declared_global() or (symbol.is_global() and not symbol.is_local())
            if symbol.is_referenced() and (whole or outer):
                found.add(symbol.get_name())
        for child in table.get_children():
            visit(child)

    visit(symtable.symtable(source, "function", "exec"))
    return found
