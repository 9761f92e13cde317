"""Which files changed since their tests were green: what is recorded, and what a start says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from config import tested
from config.files import REPOSITORY


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project with three files of which two have tests, outside of any test run."""
    monkeypatch.delenv("PYTEST_VERSION")
    for name, text in {
        "door.py": "import room.inner",
        "room/__init__.py": "",
        "room/inner.py": "x = 1",
        "tests/test_inner.py": "def test():\n    from room import inner\n    assert inner.x",
        "tests/test_both.py": "import door\nimport room.inner",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    return tmp_path


def green(project: Path, passed: set[str] | None) -> None:
    tested.remember(tested.digests(project), passed, project)


def test_nothing_is_said_before_tests_have_passed_and_while_nothing_changed(project: Path) -> None:
    green(project, {"tests/test_inner.py", "tests/test_both.py"})
    assert tested.changed(project) == "" and not (project / tested.RECORD).exists()
    green(project, None)
    assert tested.changed(project) == ""


def test_a_changed_file_is_named_with_the_tests_that_own_it(project: Path) -> None:
    green(project, None)
    (project / "room" / "inner.py").write_text("x = 2", "utf-8")
    assert tested.changed(project) == (
        "code: 1 file changed since their tests were last green: room/inner.py; they are owned by "
        "tests/test_both.py, tests/test_inner.py: python -m pytest tests/test_both.py tests/test_inner.py"
    )


def test_a_file_is_tested_when_all_its_tests_have_passed(project: Path) -> None:
    green(project, None)
    for name in ("room/inner.py", "door.py"):
        (project / name).write_text("x = 3", "utf-8")
    green(project, {"tests/test_inner.py"})
    assert "2 files changed" in tested.changed(project)
    green(project, {"tests/test_both.py"})
    assert "1 file changed" in tested.changed(project) and "room/inner.py" in tested.changed(project)
    green(project, {"tests/test_both.py", "tests/test_inner.py"})
    assert tested.changed(project) == ""


def test_what_changed_during_the_tests_was_not_tested(project: Path) -> None:
    green(project, None)
    before = tested.digests(project)
    (project / "door.py").write_text("x = 3", "utf-8")
    tested.remember(before, None, project)
    assert "door.py" in tested.changed(project)


def test_a_broken_record_and_the_tests_themselves_are_quiet(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    green(project, None)
    (project / "door.py").write_text("x = 3", "utf-8")
    assert tested.changed(project)
    monkeypatch.setenv("PYTEST_VERSION", "9")
    assert tested.changed(project) == ""
    monkeypatch.delenv("PYTEST_VERSION")
    (project / tested.RECORD).write_text("[", "utf-8")
    assert tested.changed(project) == ""


@pytest.mark.parametrize(("words", "recorded"), [((), True), (("-k", "one"), False), (("-x",), True)])
def test_a_run_of_test_files_is_recorded_unless_it_was_of_a_part(
    words: tuple[str, ...], recorded: bool, project: Path
) -> None:
    """The very conftest.py of this project, on the small one."""
    for name in ("conftest.py", "test_inner.py"):
        text = (REPOSITORY / "tests" / name).read_text("utf-8") if name == "conftest.py" else None
        (project / "tests" / name).write_text(text or "from room import inner\ndef test_one(): pass", "utf-8")
    (project / "tests" / "test_both.py").unlink()
    (project / "pyproject.toml").write_text((REPOSITORY / "pyproject.toml").read_text("utf-8"), "utf-8")
    for package in ("config", "sandbox"):
        (project / package).symlink_to(REPOSITORY / package)
    green(project, None)
    (project / "room" / "inner.py").write_text("x = 2", "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/test_inner.py", *words]
    ended = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (tested.changed(project) == "") == recorded
