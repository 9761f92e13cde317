"""Format Python by autopep8 or ruff; a file whose meaning the tool would change stays as it is."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import os
import shutil
import subprocess
import sys
import warnings

from scraping.documents import ScrapedDocument
from scraping.stages import Note, Stage, suffix

VERSION = 1

# autopep8's own defaults, and E402, whose correction would move imports above code that they depend on.
LEFT_ALONE = ("E226", "E24", "W50", "W690", "E402")


def build(tool: str, note: Note) -> Stage:
    """Build the stage: `tool` is `autopep8` or `ruff`, and `note` counts files formatted and unformatted."""
    layout = {"autopep8": _autopep8, "ruff": _ruff}[tool]

    def formatting(document: ScrapedDocument) -> ScrapedDocument:
        if suffix(document.path) not in ("py", "pyi"):
            return document
        try:
            formatted = layout(document.text)
            same = _meaning(formatted) == _meaning(document.text)
        except (SyntaxError, ValueError, RecursionError, IndexError, AttributeError, TypeError, KeyError):
            note("kept unformatted: the tool failed")  # the kinds that a tool raises on source it misreads
            return document
        if not same:
            note("kept unformatted: the syntax tree would change")
            return document
        if formatted == document.text:
            return document
        note("formatted")
        return dataclasses.replace(document, text=formatted)

    return formatting


def check(tool: str) -> None:
    """Raise a ValueError if the tool is not installed."""
    if tool == "ruff" and ruff() is None:
        raise ValueError(
            "--format ruff needs the program ruff, which is not installed: pip install ruff, or take autopep8"
        )


@functools.lru_cache
def ruff() -> str | None:
    """Return the path of the program ruff, beside this interpreter or on the PATH; None if there is none."""
    return shutil.which(
        "ruff", path=os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", "")))
    )


def _autopep8(text: str) -> str:
    import autopep8

    return autopep8.fix_code(text, options={"ignore": LEFT_ALONE})


def _ruff(text: str) -> str:
    program = ruff()
    assert program, "looked for before the first file"
    # --isolated: no settings file of a folder above may decide a corpus's layout.
    command = [program, "format", "--isolated", "--no-cache", "--quiet", "--stdin-filename", "file.py", "-"]
    done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise ValueError("ruff could not format it")
    return done.stdout


def _meaning(text: str) -> str:
    """Return the syntax tree without docstrings' indentation and trailing space, which ruff changes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                value = first.value
                if isinstance(value.value, str):
                    lines = inspect.cleandoc(value.value).split("\n")
                    value.value = "\n".join(line.rstrip() for line in lines).strip()
    return ast.dump(tree)
