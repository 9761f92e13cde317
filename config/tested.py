"""Which files of the program changed since their tests were last green, and which tests own them.

`tests/conftest.py` calls `remember` at the end of a green run of the tests; a training run prints `changed`.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from config.files import REPOSITORY, program_files, write_atomically

RECORD = Path(".pytest_cache", "v", "plumb", "tested")  # By file the SHA-256 with which its tests passed.
MOST_NAMED = 4


def digests(folder: Path = REPOSITORY) -> dict[str, str]:
    """Return by its name the SHA-256 of each of the program's files."""
    files = program_files(folder)
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def owners(names: Collection[str], folder: Path = REPOSITORY) -> dict[str, set[str]]:
    """Return by the name of a file the test files that import it."""
    modules = {name: name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names}
    found: dict[str, set[str]] = {name: set() for name in names}
    for test in sorted((folder / "tests").glob("test_*.py")):
        imported = imports(test.read_text("utf-8"))
        for name, module in modules.items():
            if module in imported:
                found[name].add(f"tests/{test.name}")
    return found


def imports(source: str) -> set[str]:
    """Return the dotted names that a source imports, and for `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def remember(before: Mapping[str, str], passed: Collection[str] | None, folder: Path = REPOSITORY) -> None:
    """Record the files whose tests have passed.

    Args:
        before: The `digests` at the start of the tests; what has changed since then was not tested.
        passed: The test files, of which every test passed; None is all there are. Before all have passed
            once there is no record.
    """
    if passed is not None and not known(folder):
        return
    same = {name: digest for name, digest in digests(folder).items() if before.get(name) == digest}
    if passed is not None:
        of_files = owners(same, folder)
        same = {name: same[name] for name, own in of_files.items() if own and own <= {*passed}}
    path = folder / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(known(folder) | same, indent=1))


def known(folder: Path = REPOSITORY) -> dict[str, str]:
    """Return the record; {} where there is none that can be read."""
    try:
        return dict(json.loads((folder / RECORD).read_text("utf-8")))
    except (OSError, ValueError):
        return {}


def changed(folder: Path = REPOSITORY) -> str:
    """Return a sentence about the files that changed since their tests passed; "" if there are none.

    It is "" as well where no tests have passed yet, and within the tests.
    """
    tested = known(folder)
    if not tested or "PYTEST_VERSION" in os.environ:
        return ""
    names = [name for name, digest in digests(folder).items() if tested.get(name) != digest]
    if not names:
        return ""
    tests = sorted(set[str]().union(*owners(names, folder).values()))
    return (
        f"code: {len(names)} file{'s' * (len(names) > 1)} changed since their tests were last green: "
        f"{_some(names)}; they are owned by {_some(tests) or 'no test file alone'}: python -m pytest"
        + (f" {' '.join(tests)}" if 0 < len(tests) <= MOST_NAMED else "")
    )


def _some(names: list[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
