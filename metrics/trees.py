"""Syntax trees of Python, Kotlin and Java, and whether a text parses.

Texts are untrusted: a hostile one costs a few seconds, and never the process.
"""

from __future__ import annotations

import ast
import importlib
import re
import time
import warnings
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

# Bytes of a text beyond which no parser reads it. The largest module of the standard library has 0.8 MB.
LONGEST = 2**20
# Bytes of a text beyond which its tree is not taken apart, which takes 40 times as long as parsing.
LONGEST_TREE = 2**17
PATIENCE = 2.0  # Seconds of CPU that tree-sitter may take; 128 kB of code take it 0.1.
OPEN_ANGLES = 200  # The most open `<` in a statement of Java or Kotlin.
_CHUNK = 2**16

LANGUAGES = ("python", "kotlin", "java")


def check_language(language: str) -> str:
    """Return the language itself.

    Raises:
        ValueError: The language has no grammar here.
    """
    if language not in LANGUAGES:
        raise ValueError(f"no grammar of {language!r} is here; there are {', '.join(LANGUAGES)}")
    return language


@lru_cache
def _parser(language: str) -> Any:
    from tree_sitter import Language, Parser

    module = importlib.import_module(f"tree_sitter_{check_language(language)}")
    return Parser(Language(module.language()))


def parses(text: str, language: str) -> bool:
    """Return whether the whole text is a program of the language.

    Python is read by this interpreter's own parser; Kotlin and Java by tree-sitter, without an error
    anywhere. Only the grammar counts: a `return` outside a function parses. An indented piece of a body does
    not; put it behind its prompt first. The empty text parses. Texts longer than LONGEST do not, and neither
    does Python that is nested too deep for its parser.
    """
    data = _utf8(text)
    if len(data) > LONGEST:
        return False
    if check_language(language) == "python":
        return _python_parses(text)
    parsed = _parsed(data, language)
    return parsed is not None and not parsed.root_node.has_error


def _parsed(data: bytes, language: str) -> Any | None:
    """Return tree-sitter's tree, or None if it takes longer than PATIENCE or has more than OPEN_ANGLES.

    Where a text can be read in several ways, as `A<A<A<...` in Java, time and memory grow with the square of
    its length: 200 of them, 150 times over, take 0.3 s and 136 MB, 40,000 take 16 GB before they are stopped.
    """
    if language != "python" and _open_angles(data) > OPEN_ANGLES:
        return None
    parser = _parser(language)
    end = time.thread_time() + PATIENCE
    try:
        return parser.parse(
            lambda offset, _: data[offset : offset + _CHUNK],
            encoding="utf8",
            progress_callback=lambda *_: time.thread_time() > end,
        )
    except ValueError:  # A parse that was stopped raises it.
        parser.reset()  # Without this the next parse would go on with the text of this one.
        return None


def _open_angles(data: bytes) -> int:
    """Return the most `<` in a statement that no `>` has closed."""
    most = now = 0
    for mark in re.findall(rb"[<>;{}]", data):
        now = now + 1 if mark == b"<" else max(0, now - 1) if mark == b">" else 0
        most = max(most, now)
    return most


def _python_parses(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Other people's strings hold invalid escapes.
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")  # Half a surrogate pair cannot be encoded.


# Nodes of the grammars that declare a name, and among them those that are looked into for more.
DECLARES = re.compile(
    r"(?:function|class|method|interface|object|enum|constructor|record)_(?:defin|declar)|companion"
)
HOLDS = re.compile(r"class|interface|object|enum|record|companion")
SIGNATURE = 200  # characters


def signatures(text: str, language: str) -> list[str] | None:
    """Return a line for each declaration outside of functions: what stands before its body.

    It is None for a text that is longer than LONGEST_TREE, or takes the parser longer than PATIENCE.
    """
    data = _utf8(text)
    if len(data) > LONGEST_TREE or (parsed := _parsed(data, language)) is None:
        return None
    found: list[str] = []
    waiting = [(node, 0) for node in reversed(parsed.root_node.children)]
    while waiting:
        node, depth = waiting.pop()
        if node.type == "decorated_definition":
            waiting += [(child, depth) for child in reversed(node.children)]
        if not DECLARES.search(node.type):
            continue
        body = node.child_by_field_name("body") or next(
            (child for child in node.children if child.type.endswith(("body", "block"))), None
        )
        end = node.end_byte if body is None else body.start_byte
        said = " ".join(data[node.start_byte : end].decode("utf-8", "replace").split())
        found.append("    " * depth + said[:SIGNATURE].rstrip(" {"))
        if body is not None and HOLDS.match(node.type) and depth < SIGNATURE:
            waiting += [(child, depth + 1) for child in reversed(body.children)]
    return found


@dataclass
class Tree:
    """A syntax tree as lists with an entry for each node: parents before children, in the order of the text.

    The root is node 0. Comments are left out, and in Python strings that are statements, docstrings among
    them.

    Args:
        data: The text, in UTF-8.
        kinds: The kind of each node; a missing one has "MISSING " before it.
        named: Whether a node is more than a keyword or a mark.
        roles: The field of its parent that a node stands in; 0 for none.
        spans: The bytes of a node, from and to.
        children: The numbers of a node's children.
        ends: The number after that of a node's last descendant.
    """

    data: bytes
    kinds: list[str] = field(default_factory=list)
    named: list[bool] = field(default_factory=list)
    roles: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    children: list[list[int]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def text(self, i: int) -> str:
        start, stop = self.spans[i]
        return self.data[start:stop].decode("utf-8", "replace")


COMMENTS = frozenset({"comment", "line_comment", "block_comment", "multiline_comment"})


def parse(text: str, language: str) -> Tree | None:
    """Return the tree of any text, errors and all.

    It is None for a text that is longer than LONGEST_TREE, or that takes the parser longer than PATIENCE.
    """
    data = _utf8(text)
    if len(data) > LONGEST_TREE:
        return None
    parsed = _parsed(data, language)
    if parsed is None:
        return None
    cursor = parsed.walk()
    tree = Tree(data)
    kinds, named, roles, spans, children, ends = (
        tree.kinds,
        tree.named,
        tree.roles,
        tree.spans,
        tree.children,
        tree.ends,
    )
    python, ancestors, number = language == "python", [], 0
    while True:
        node = cursor.node
        kind = node.type
        docstring = python and kind == "expression_statement" and _is_string(node)
        if not (docstring or kind in COMMENTS):
            span = node.byte_range
            kinds.append("MISSING " + kind if span[0] == span[1] and node.is_missing else kind)
            named.append(node.is_named)
            roles.append(cursor.field_id or 0)
            spans.append(span)
            children.append([])
            ends.append(number + 1)
            if ancestors:
                children[ancestors[-1]].append(number)
            number += 1
            if cursor.goto_first_child():
                ancestors.append(number - 1)
                continue
        while not cursor.goto_next_sibling():
            if not cursor.goto_parent():
                return tree
            ends[ancestors.pop()] = number


def _is_string(statement: Any) -> bool:
    return statement.child_count == 1 and statement.child(0).type == "string"
