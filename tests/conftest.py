"""Tiny data and settings that several test files share."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import shutil
import signal
import sys
import sysconfig
from collections.abc import Generator
from pathlib import Path

import pytest

import sandbox
from config import tested

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; tiny models gain nothing from more
# Of a job in the background, or under nohup: children would inherit that these signals are ignored.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# Compiled tests are kept, whatever the environment says: to compile all of them takes each worker 9 s.
KEEPS_BYTECODE, sys.dont_write_bytecode = not sys.dont_write_bytecode, False

FILES = {
    f"part{i}.py": f"def f{i}(x, y={i}):\n    total = x * {i} + y\n    return total\n\n\nprint(f{i}({i}))\n"
    * 3
    for i in range(24)
}
AWKWARD = ["", "a\r\nb\rc\n", "\ufefftext", "tab\t\f\x00nul", "naïve 日本 🙂", "no newline", "x = 1\n" * 300]

STDLIB = Path(sysconfig.get_path("stdlib"))


def stdlib_files(count: int | None = None) -> list[Path]:
    """Return all files of the interpreter's library, or so many of them, spread evenly.

    Debian's has 668, without tests, others 1,790.
    """
    files = [p for p in sorted(STDLIB.rglob("*.py")) if "site-packages" not in p.parts and p.is_file()]
    return files if count is None else [files[i * len(files) // count] for i in range(count)]


MARKS = "not slow and not gpu"  # Of pyproject.toml: the ordinary tests.
ROOT = Path(__file__).parent.parent
BEFORE = tested.digests(ROOT)  # Of the files that will be tested.

# The reasons for which a test may be left out; skipped for another one, it fails.
WITHOUT_SANDBOX = "generated code runs in a sandbox only"
SKIPS = (
    WITHOUT_SANDBOX,
    "git is not installed",
    "(ipykernel|nbclient|wandb|mlflow) is not installed",
    r"user \d+ has no Python 3\.11",
    "the kernel's headers are not installed",
    "needs a CUDA device",
    "this GPU has no bf16",
    "no glibc here",
    "no chromium to open it with",
    "llama-server is not on the PATH",
    "PLUMB_[A-Z]+ (names no|does not name)",
)


def pytest_collection_finish() -> None:
    """Keep the collector off what the imports made: it took a sixth of test_preflight's processor time."""
    gc.collect()
    gc.freeze()
    sys.dont_write_bytecode = not KEEPS_BYTECODE


def has_gpu() -> bool:
    """Whether torch sees a CUDA device; torch is imported only when this is asked."""
    import torch

    return torch.cuda.is_available()


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Where there is no GPU, end `pytest -m gpu` with one sentence and exit code 0, before tests are read."""
    if config.option.markexpr != "gpu" or has_gpu():
        return None
    print("no CUDA device here: the tests marked gpu are left out")
    return 0


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out a test marked gpu that another selection has taken in."""
    if item.get_closest_marker("gpu") and not has_gpu():
        pytest.skip("needs a CUDA device")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker more than there are processors, since a quarter of the time goes to waiting for children."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture
def isolated() -> sandbox.Isolation:
    """Return what isolates generated code here; a test that needs it is left out where nothing does."""
    try:
        return sandbox.isolation()
    except ValueError as error:
        pytest.skip(str(error))


def _refuse_unlisted_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Fail what was skipped for a reason that is not in SKIPS."""
    if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not any(re.match(known, reason) for known in SKIPS):
            report.outcome = "failed"
            report.longrepr = f"skipped for a reason that is not in SKIPS of tests/conftest.py: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_unlisted_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_unlisted_skip(report)
    return report


def _remember_green(config: pytest.Config, passed: list[pytest.TestReport]) -> None:
    """Record which files the tests that passed own, unless only a part of a test file ran."""
    option = config.option
    partly = option.keyword or option.deselect or getattr(option, "lf", False) or option.collectonly
    if partly or option.markexpr != MARKS or any("::" in arg for arg in config.args):
        return
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    files = None if whole else {report.nodeid.split("::")[0] for report in passed}
    with contextlib.suppress(OSError):  # A checkout that cannot be written.
        tested.remember(BEFORE, files, ROOT)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    """Say in the last line how many tests were left out for want of a sandbox, and the remedy."""
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.exitstatus == 0 and reporter:
        _remember_green(session.config, reporter.stats.get("passed", []))
    skipped = reporter.stats.get("skipped", []) if reporter else []
    reasons = [report.longrepr[2] for report in skipped if isinstance(report.longrepr, tuple)]
    without = [reason.removeprefix("Skipped: ") for reason in reasons if WITHOUT_SANDBOX in reason]
    if reporter and without:
        reporter.write_line(f"{len(without)} tests were left out for one reason: {without[0]}")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of 24 small Python files; with one in four held out, every split has some."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def unguarded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the guards before training, two thirds of a tiny run, but for tests marked guarded.

    For files whose runs are a means: tests/test_preflight.py and others hold what guards do.
    """
    from guards import preflight  # It imports torch.

    if not request.node.get_closest_marker("guarded"):
        monkeypatch.setattr(preflight, "GUARDS", {})


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpora of the planted faults, with their base, made once: tests only add runs, or copy it."""
    from selftest.data import write_base, write_data  # They import torch.

    folder = tmp_path_factory.mktemp("planted")
    write_data(folder)
    write_base(folder)
    return folder


def copy_planted(planted: Path, folder: Path, base: bool = True) -> None:
    """Copy the corpora of `planted` for a test that changes them, and the base; no run and no cache."""
    bases = ("base", "other-base", "more-tokens")
    for path in planted.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
        elif path.name in ("long", "graded") or (base and path.name in bases):
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)


def code_page(name: str, changed: int) -> str:
    """A table as in `encodings/`: 64 lines of a character each, one of which is another one for each page."""
    rows = [f"    '\\u{i:04x}'  #  0x{i:02X} -> CHARACTER NUMBER {i} OF THE TABLE\n" for i in range(64)]
    rows[changed] = f"    '\\u{changed + 999:04x}'  #  0x{changed:02X} -> THE OWN CHARACTER OF {name}\n"
    return f'"""Codec for the code page {name}."""\n\nTABLE = (\n{"".join(rows)})\n'


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library in place of the interpreter's: 40 modules that share nothing, and 24 code pages that are near
    copies of each other, so that a division by name puts them into every split."""
    folder = tmp_path / "library"
    (folder / "encodings").mkdir(parents=True)
    for i in range(40):
        lines = [f"name_{i}_{j} = call_{(i * 37 + j * j) % 1009}({i * j}, word_{i}_{j})" for j in range(40)]
        (folder / f"module{i}.py").write_text("\n".join(lines), encoding="utf-8")
    for i in range(24):
        (folder / "encodings" / f"cp{i}.py").write_text(code_page(f"cp{i}", i), encoding="utf-8")
    path_of = sysconfig.get_path
    monkeypatch.setattr(
        sysconfig, "get_path", lambda name, *rest: str(folder) if name == "stdlib" else path_of(name, *rest)
    )
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty files with unlike texts, some awkward, in two folders."""
    root = tmp_path / "corpus"
    (root / "sub").mkdir(parents=True)
    for n in range(40):
        text = AWKWARD[n] if n < len(AWKWARD) else f"def f{n}():\n    return {n}\n" * (n % 7 + 1)
        (root / ("sub" if n % 2 else ".") / f"file{n}.py").write_bytes(text.encode())
    return root
