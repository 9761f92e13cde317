"""The folders are ordered in floors: a file imports from lower floors, or from its own without a circle.

Imports inside functions and under TYPE_CHECKING count too. Only tests and benchmarks import a command.
"""

from __future__ import annotations

import ast
import functools
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up. A name is a file or a folder at the top level, or one file of such a folder.
FLOORS = (
    "config metrics",
    "tokenizer tokenization",
    "data sandbox",
    "modules scraping reference",
    "architecture dataset",
    "adapters",
    "lora",
    "pretrained",
    "training",
    "generation",
    "guards suites",
    "training.api training.beforehand training.begin training.command training.ended training.export "
    "training.loop training.model_card training.overfit training.plan training.prepare training.report",
    "selftest serving sweeps recipes",
    "trainingmanager eval hyperparam_tune generate serve export functional preflight verbs",
)
WITHOUT_TORCH = 3  # So many of the lowest floors need no torch. Scraping, which needs none either, is higher.
DOORS = set(FLOORS[-1].split())


def modules() -> dict[str, Path]:
    """Return the files of the product by dotted name: those at the top level, and those of its packages."""
    packages = sorted(path.parent for path in ROOT.glob("*/__init__.py"))
    files = [*ROOT.glob("*.py"), *(path for package in packages for path in package.rglob("*.py"))]
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def floor_of(name: str) -> int:
    """Return the floor on which the longest known beginning of a dotted name stands."""
    while True:
        for number, floor in enumerate(FLOORS):
            if name in floor.split():
                return number
        assert "." in name, f"{name} stands on no floor"
        name = name.rpartition(".")[0]


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """Return the dotted names in every import of a file; for `from a import b` both a and a.b."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
            found += (f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(found)


def arrows() -> dict[str, set[str]]:
    """Return by dotted name the files of the product that each file imports."""
    known = modules()
    return {name: {to for to in imported(path) if to in known and to != name} for name, path in known.items()}


def test_every_file_stands_on_a_floor_and_every_floor_has_files() -> None:
    found = {floor_of(name) for name in modules()}
    assert found == set(range(len(FLOORS)))


def test_no_file_imports_from_a_higher_floor() -> None:
    up = [
        f"{name} -> {to}"
        for name, found in arrows().items()
        for to in sorted(found)
        if floor_of(to) > floor_of(name)
    ]
    assert not up


def test_nothing_imports_a_door() -> None:
    assert not [f"{name} -> {to}" for name, found in arrows().items() for to in sorted(found & DOORS)]


def test_there_is_no_circle() -> None:
    graph = {name: {to for to in found if not name.startswith(to + ".")} for name, found in arrows().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_lower_floors_and_scraping_import_no_torch() -> None:
    """Neither themselves nor through a file that they import."""
    found, known = arrows(), modules()
    waiting = [n for n in known if floor_of(n) < WITHOUT_TORCH or n.split(".")[0] == "scraping"]
    reached: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += found[name]
    assert not [n for n in reached if any(to.split(".")[0] == "torch" for to in imported(known[n]))]


def test_the_reference_shares_no_code_with_what_it_checks() -> None:
    """It knows the settings and itself, and nothing but the guard, tests and benchmarks know it."""
    found = arrows()
    of_reference = {name: to for name, to in found.items() if name.split(".")[0] == "reference"}
    assert of_reference
    assert not [
        f"{name} -> {other}"
        for name, to in of_reference.items()
        for other in sorted(to)
        if other.split(".")[0] not in ("config", "reference")
    ]
    assert not [
        f"{name} -> {other}"
        for name, to in found.items()
        for other in sorted(to)
        if other.split(".")[0] == "reference" and not name.startswith(("reference", "guards.reference"))
    ]
