"""The script of the two commands, on machines made of a few commands; .ci/run runs it on real ones."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from config.files import REPOSITORY

TOOLS = ("sh", "dirname", "cat", "cksum", "cp", "env", "tail", "mkdir", "sed", "true")
OLD = "case $1 in -V) echo Python 3.9.2 ;; *) exit 1 ;; esac"
# A new one, whose environments are copies of itself; what it is asked to do stands in the file `asked`.
NEW = """case "$*" in
    *version_info*) ;;
    -V) echo Python 3.11.2 ;;
    *ensurepip* | "-m pip --version") exit $WITHOUT_PIP ;;
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *) echo "$*" >> asked ;;
esac"""
APT = "apt-get update && apt-get install -y --no-install-recommends"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the script and what it reads, and `bin`, where the machine's commands are put."""
    for name in (
        "plumb",
        "pyproject.toml",
        "requirements.txt",
        "requirements-serve.txt",
        "requirements-dev.txt",
    ):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "bin").mkdir()
    for name in TOOLS:
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    return tmp_path


def run(
    clone: Path, commands: dict[str, str] | None = None, command: str = "train", without_pip: bool = False
) -> tuple[int, list[str]]:
    """Exit code and lines of `./plumb` on a machine with these commands besides TOOLS, each by its script.

    Args:
        command: The verb, and words behind it that have no blanks.
    """
    for name, script in (commands or {}).items():
        path = clone / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    environment = {"PATH": str(clone / "bin"), "WITHOUT_PIP": str(int(without_pip))}
    done = subprocess.run(
        ["sh", "plumb", *command.split()],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()


def test_an_old_python_is_refused_and_a_newer_one_beside_it_is_taken(clone: Path) -> None:
    needed = "plumb: Python 3.11 or newer is needed, and python3 here is Python 3.9.2"
    assert run(clone, {"python3": OLD}) == (2, [needed])
    code, lines = run(clone, {"id": "echo 1000", "python3.12": NEW})
    assert code == 0 and "plumb: making .venv with Python 3.11.2" in lines


@pytest.mark.parametrize(
    ("manager", "packages", "with_packages"),
    [
        ("apt-get", "bubblewrap git python3-venv", APT),
        ("dnf", "bubblewrap git python3-pip", "dnf install -y"),
        ("apk", "bubblewrap git py3-pip", "apk add"),
        ("pacman", "bubblewrap git python-pip", "pacman -Sy --needed --noconfirm"),
        ("none", "bubblewrap git pip", "install by this system's own means:"),
    ],
)
def test_where_nothing_may_be_installed_one_sentence_names_the_command(
    clone: Path, manager: str, packages: str, with_packages: str
) -> None:
    code, lines = run(clone, {"id": "echo 1000", "python3": NEW, manager: "exit 9"}, without_pip=True)
    assert code == 2 and lines == [
        f"plumb: missing here: {packages}; as root, run: {with_packages} {packages}"
    ]


@pytest.mark.parametrize("rights", [{"id": "echo 0"}, {"id": "echo 1000", "sudo": 'shift; exec "$@"'}])
def test_what_is_missing_is_installed_and_each_step_said(clone: Path, rights: dict[str, str]) -> None:
    machine = {"git": "exit 0", "python3": NEW, "apt-get": 'echo "apt-get $*" >> asked'}
    code, lines = run(clone, machine | rights, "test")
    assert code == 0 and lines == [
        f"plumb: installing bubblewrap ({APT} bubblewrap)",
        "plumb: making .venv with Python 3.11.2",
        "plumb: installing requirements-dev.txt into .venv, which takes a minute or more",
    ]
    asked = (clone / "asked").read_text().splitlines()
    assert asked == [
        "apt-get update",
        "apt-get install -y --no-install-recommends bubblewrap",
        "-m pip install -r requirements-dev.txt",
        "-m pytest",
    ]
    for command in ("test", "train"):  # the tests' requirements are training's too
        assert run(clone, command=command) == (0, [])
    assert run(clone, command="docs") == (0, ["plumb: the manual is in site/index.html"])
    more = ["-m pytest", "trainingmanager.py", "-m mkdocs build --strict"]
    assert (clone / "asked").read_text().splitlines() == [*asked, *more]


def test_serving_needs_more_than_training_and_has_what_training_needs(clone: Path) -> None:
    machine = {"git": "exit 0", "bwrap": "exit 0", "python3": NEW}
    for command in ("train", "serve", "train", "serve", "docs", "serve"):
        assert run(clone, machine, command)[0] == 0
    asked = (clone / "asked").read_text().splitlines()
    assert [line.split()[-1] for line in asked if "pip" in line] == [
        "requirements.txt",
        "requirements-serve.txt",
        "requirements-dev.txt",
    ]


def test_the_flag_of_a_verb_takes_no_word_of_the_user(clone: Path) -> None:
    """A word that follows a switch is its value: `--plan runs/X` would be no plan of runs/X."""
    machine = {"git": "exit 0", "bwrap": "exit 0", "python3": NEW}
    for command in ("plan runs/X", "prepare --seed 3", "plan", "train runs/X"):
        assert run(clone, machine, command)[0] == 0
    asked = [line for line in (clone / "asked").read_text().splitlines() if line.startswith("training")]
    assert asked == [
        "trainingmanager.py runs/X --plan",
        "trainingmanager.py --seed 3 --prepare",
        "trainingmanager.py --plan",
        "trainingmanager.py runs/X",
    ]


def test_what_cannot_be_installed_is_named_and_all_else_goes_on(clone: Path) -> None:
    failing = "echo 'E: no network' >&2; exit 100"
    code, lines = run(clone, {"git": "exit 0", "id": "echo 0", "python3": NEW, "apt-get": failing})
    assert code == 0 and lines[:2] == [
        f"plumb: installing bubblewrap ({APT} bubblewrap)",
        "plumb: missing here and could not be installed (E: no network): bubblewrap; as root, run: "
        f"{APT} bubblewrap (all that does not need it works)",
    ]
    assert (clone / "asked").read_text().splitlines()[-1] == "trainingmanager.py"
