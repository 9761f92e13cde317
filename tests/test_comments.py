"""Comments and docstrings go, and nothing else does."""

from __future__ import annotations

import ast
import io
import tokenize
import warnings
from pathlib import Path

import pytest
from conftest import stdlib_files

from data.comments import drop_comments


def without_docstrings(source: str) -> str:
    """The syntax tree as text, string statements at the head of a body left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source.removeprefix("\ufeff"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            while (
                node.body
                and isinstance(node.body[0], ast.Expr)
                and isinstance(node.body[0].value, ast.Constant)
                and isinstance(node.body[0].value.value, str)
            ):
                del node.body[0]
            if not node.body and not isinstance(node, ast.Module):
                node.body.append(ast.Pass())
    return ast.dump(tree)


def comments(source: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(source.removeprefix("\ufeff")).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('color = "#FF00AA"  # red\n', 'color = "#FF00AA"\n'),
        ("if a == b:  # same?\n    pass\n", "if a == b:\n    pass\n"),
        ("# one\n# two\nx = 1\n    # odd\ny = 2\n", "x = 1\ny = 2\n"),
        ('"""doc"""; x = 1\n', "x = 1\n"),
        ('"""doc""";\nx = 1\n', "x = 1\n"),
        ('"""doc"""\n', ""),
        ('"""doc""";', ""),
        ("# only", ""),
        ("", ""),
        ('def f():\n    """doc"""\n', "def f():\n    pass\n"),
        ('def f(): "doc"\n', "def f(): pass\n"),
        ('def f():"doc";return 1\n', "def f():return 1\n"),
        ('class A:\n    "a"  # c\n\n    # d\n    @p\n    def f(): pass\n',
         "class A:\n    @p\n    def f(): pass\n"),
        ('class A:\n    "a"\n    "b"\n', "class A:\n    pass\n"),
        ('def f():\n    "a" \\\n    "b"\n    return 2\n', "def f():\n    return 2\n"),
        ('def f():\n    (\n    "a"  # why\n    )\n', "def f():\n    pass\n"),
        ('def f():\n    "a"; \\\n    x = 1\n', "def f():\n    x = 1\n"),
        ('def é(): "é"; ü = "é"  # é\n', 'def é(): ü = "é"\n'),
        ("x = 1  # a\r\n# b\r\ny = '''\r\n#no'''\r\n", "x = 1\r\ny = '''\r\n#no'''\r\n"),
        ("x = 1 # a\ry = 2\r", "x = 1\ry = 2\r"),
        ("if x:\n\ty = 1\t# a\n\f\n\tz = 2\n", "if x:\n\ty = 1\n\f\n\tz = 2\n"),
        ("x = 1 \\\n  # c\ny = 2\n", "x = 1\ny = 2\n"),
        ("\\\n# c\n", ""),
        ("f(a,  # first\n  # alone\n  b)\n", "f(a,\n  b)\n"),
        ("#!/usr/bin/env python\n# -*- coding: latin-1 -*-\n# more\nx = 1\n",
         "#!/usr/bin/env python\n# -*- coding: latin-1 -*-\nx = 1\n"),
        ("# a\n# vim: set fileencoding=utf-8\n", "# vim: set fileencoding=utf-8\n"),
        ('"""doc"""\n# coding: utf-8\nx = 1\n', "x = 1\n"),
        ("x = 1\n# coding: utf-8\n", "x = 1\n"),
        ("\ufeff# c\nx = 1\n", "\ufeffx = 1\n"),
        ("def f():\n    x = 1\n    'not a docstring'\n", "def f():\n    x = 1\n    'not a docstring'\n"),
        ("def f():\n    f'no doc {x}'\n", "def f():\n    f'no doc {x}'\n"),
        ("def f():\n    b'no doc'\n", "def f():\n    b'no doc'\n"),
    ],
)  # fmt: skip
def test_cases(source: str, expected: str) -> None:
    result = drop_comments(source)
    assert result == expected
    assert without_docstrings(result) == without_docstrings(source)
    assert drop_comments(result) == result


def test_nine_files_of_the_standard_library() -> None:
    check_files(stdlib_files(9))


@pytest.mark.slow
def test_every_file_of_the_standard_library() -> None:
    check_files(stdlib_files())


def check_files(files: list[Path]) -> None:
    assert len(set(files)) == len(files)
    for path in files:
        try:
            source = path.read_bytes().decode("utf-8")
            before = without_docstrings(source)
        except (SyntaxError, ValueError):
            assert {"test", "tests"} & set(path.parts), path  # deliberately bad files of its test suite
            continue
        result = drop_comments(source)
        assert without_docstrings(result) == before, path
        assert all("coding" in text or text.startswith("#!") for text in comments(result)), path


@pytest.mark.parametrize(
    "source", ["def f(:\n", "print 'x'\n", "x = (\n", "  x\n y\n", "\0", "'\ud800'", "(" * 999]
)
def test_source_that_does_not_parse(source: str) -> None:
    with pytest.raises(ValueError, match="does not parse"):
        drop_comments(source)
