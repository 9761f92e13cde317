"""The sizes that a reader can hold in mind. `python tests/test_sizes.py` lists what is longest.

A file has at most 750 lines, a test file 900; a function at most 80, and at most 7 parameters, unless its
docstring says why it has more (it names their number: "nine parameters, as ...").
"""

from __future__ import annotations

import ast
import functools
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LINES, TEST_LINES, FUNCTION_LINES, PARAMETERS = 750, 900, 80, 7
NUMBERS = {8: "eight", 9: "nine", 10: "ten", 11: "eleven", 12: "twelve"}


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


@functools.cache
def functions(path: Path) -> tuple[Function, ...]:
    """Return every function of a file, with its lines; the docstring of a class speaks for its __init__."""
    tree, found = ast.parse(path.read_text("utf-8")), list[Function]()
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    of_class = {id(child): ast.get_docstring(node) or "" for node in classes for child in node.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            own = [argument for argument in taken if argument.arg not in ("self", "cls")]
            place = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            docstring = ast.get_docstring(node) or ""
            if node.name == "__init__":
                docstring += of_class.get(id(node), "")
            found.append(Function(place, lines, len(own), docstring))
    return tuple(found)


def is_test(path: Path) -> bool:
    return path.is_relative_to(ROOT / "tests")


def lines_of(path: Path) -> int:
    return len(path.read_text("utf-8").splitlines())


def test_files_are_short() -> None:
    most = {path: TEST_LINES if is_test(path) else LINES for path in files()}
    assert not [f"{path.relative_to(ROOT)} {lines_of(path)}" for path in most if lines_of(path) > most[path]]


def test_functions_are_short() -> None:
    found = [function for path in files() if not is_test(path) for function in functions(path)]
    assert not [f"{one.place} {one.lines} lines" for one in found if one.lines > FUNCTION_LINES]


def test_functions_take_few_parameters() -> None:
    found = [function for path in files() if not is_test(path) for function in functions(path)]
    many = [one for one in found if one.parameters > PARAMETERS]
    unexplained = [one for one in many if NUMBERS[one.parameters] not in one.docstring.lower()]
    assert not [f"{one.place} {one.parameters} parameters" for one in unexplained]


if __name__ == "__main__":
    for path in sorted(files(), key=lines_of, reverse=True)[:25]:
        print(f"{lines_of(path):5} lines  {path.relative_to(ROOT)}")
    product = [function for path in files() if not is_test(path) for function in functions(path)]
    for one in sorted(product, key=lambda one: one.lines, reverse=True)[:40]:
        print(f"{one.lines:5} lines  {one.place}")
    for one in sorted(product, key=lambda one: one.parameters, reverse=True)[:30]:
        print(f"{one.parameters:5} parameters  {one.place}")
