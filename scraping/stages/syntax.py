"""Drop files that do not parse: Python by this interpreter, Kotlin and Java by tree-sitter's grammars.

The child process that runs the parsers bounds their recursion and memory.
"""

from __future__ import annotations

import ast
import functools
import re
import resource
import symtable
import warnings
from typing import Any

from scraping.documents import Drop, ScrapedDocument
from scraping.stages import Stage, suffix

VERSION = 1

PYTHON = frozenset({"py", "pyi", "pyw"})
# Messages of Python 3.11 to 3.14 for statements of Python 2, and such statements in the line that they name.
SAYS_2 = re.compile(
    r"Missing parentheses in call to '(?:print|exec)'|multiple exception types must be parenthesized"
    r"|except expressions without parentheses|leading zeros in decimal integer literals"
)
LINE_2 = re.compile(
    r"""^\s*(?:print\s+[\w"'%(\[{`]|print\s*>>|exec\s+[\w"']|except\s+[\w.()\s,]+,\s*\w+\s*:|raise\s+[\w.]+\s*,)"""
    r"""|\b\d+[lL]\b|<>|\b[uU][rR]["']|`\w|\b0\d+\b""",
    re.MULTILINE,
)
FILE_2 = re.compile(
    r"""^\s*(?:print\s+["'%\w]|print\s*>>|except\s+[\w.]+\s*,\s*\w+\s*:|raise\s+[\w.]+\s*,\s*["'])|\.has_key\(""",
    re.MULTILINE,
)
# From Python 3.14 on `except OSError, e:` names two types (PEP 758). Types begin with a capital letter, the names
# that Python 2 gives to caught exceptions do not.
CAUGHT_2 = re.compile(r"^\s*except\s+[\w.]+\s*,\s*[a-z_]\w*\s*:", re.MULTILINE)


def build(max_errors: float) -> Stage:
    """Build the stage; `max_errors` is the largest share of a Kotlin or Java file with unknown grammar."""

    def syntax(document: ScrapedDocument) -> ScrapedDocument | Drop:
        kind = suffix(document.path)
        if kind in PYTHON:
            return problem(document.text) or document
        if kind in GRAMMARS:
            share = unparsed_share(document.text, kind)
            if share > max_errors:
                return Drop(
                    "syntax error", f"{share:.0%} of it is not understood, of at most {max_errors:.0%}"
                )
        return document

    return syntax


@functools.lru_cache(maxsize=2)  # two stages need the same text's result
def problem(text: str) -> Drop | None:
    """Return why this interpreter cannot parse a text; None if it can. A full memory is a MemoryError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            symtable.symtable(text, "<file>", "exec")  # it parses, twice as fast as ast.parse
            if CAUGHT_2.search(text):  # It may stand in a string.
                ast.parse(text, feature_version=(3, 13))
    except RecursionError:
        return Drop("nested too deeply", "RecursionError")
    except MemoryError:
        if not _stack_is_full(text):
            raise
        return Drop("nested too deeply", "the parser's stack is full")
    except SyntaxError as error:
        line = text.split("\n")[error.lineno - 1 : error.lineno] if error.lineno else []
        if SAYS_2.search(error.msg) or LINE_2.search("".join(line)) or FILE_2.search(text):
            return Drop("python 2", f"line {error.lineno}")
        # A message may quote the file, which must not reach the record.
        said = re.sub(r"'[^']{4,}'", "'...'", error.msg)
        return Drop("syntax error", f"line {error.lineno}: {said[:100]}")
    except ValueError as error:
        return Drop("syntax error", type(error).__name__)
    return None


def _stack_is_full(text: str) -> bool:
    """Return whether a MemoryError means deep nesting, for which Python's parser raises it too.

    Only long texts exhaust the memory: the parser takes less than 500 bytes for a byte of source.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return limit == resource.RLIM_INFINITY or 500 * len(text) < limit


def _kotlin() -> Any:
    import tree_sitter_kotlin

    return tree_sitter_kotlin.language()


def _java() -> Any:
    import tree_sitter_java

    return tree_sitter_java.language()


GRAMMARS = {"kt": _kotlin, "kts": _kotlin, "java": _java}


@functools.lru_cache
def _parser(kind: str) -> Any:
    import tree_sitter

    return tree_sitter.Parser(tree_sitter.Language(GRAMMARS[kind]()))


# Whole nodes inside an error count as understood, since an error's own range is often the file.
WHOLE = re.compile(r"declaration|comment|import|package")


def unparsed_share(text: str, kind: str) -> float:
    """Return the share of a text's bytes that the grammar of `kind` could not place."""
    data = text.encode()
    wrong = 0
    nodes = [_parser(kind).parse(data).root_node]
    while nodes:
        node = nodes.pop()
        if node.is_missing:
            wrong += 1
        elif not node.has_error:
            continue
        elif not node.is_error:
            nodes += node.children
        elif node.child_count == 0:
            wrong += node.end_byte - node.start_byte
        else:
            for child in node.children:
                if WHOLE.search(child.type):
                    nodes.append(child)
                else:
                    wrong += child.end_byte - child.start_byte
    return min(1.0, wrong / max(1, len(data)))
