"""The sizes that a reader can hold in mind. `python tests/test_sizes.py` lists what is longest.

A file should have at most 750 lines, a test file 900; a function at most 80, and at most 7 parameters, unless
its docstring says why it has more.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Function(NamedTuple):
    place: str
    lines: int
    parameters: int
    docstring: str


def files() -> list[Path]:
    """The repository's Python files that git knows or could know."""
    words = ["git", "ls-files", "-co", "--exclude-standard", "*.py"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def functions(path: Path) -> Iterator[Function]:
    """Every function and method of a file, with the lines from its def to its end."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            own = [argument for argument in taken if argument.arg not in ("self", "cls")]
            place = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield Function(place, lines, len(own), ast.get_docstring(node) or "")


def is_test(path: Path) -> bool:
    return path.is_relative_to(ROOT / "tests")


def lines_of(path: Path) -> int:
    return len(path.read_text("utf-8").splitlines())


if __name__ == "__main__":
    for path in sorted(files(), key=lines_of, reverse=True)[:25]:
        print(f"{lines_of(path):5} lines  {path.relative_to(ROOT)}")
    product = [function for path in files() if not is_test(path) for function in functions(path)]
    for one in sorted(product, key=lambda one: one.lines, reverse=True)[:40]:
        print(f"{one.lines:5} lines  {one.place}")
    for one in sorted(product, key=lambda one: one.parameters, reverse=True)[:30]:
        print(f"{one.parameters:5} parameters  {one.place}")
