"""Runs of mutants in children, each forked from a process that has imported torch and nothing of the product.

A child imports the product with one module mutated (0.6 s of processor time, where torch takes 2), does one
run in a folder of its own, compares what it left, and writes a result. It may write nowhere else, may start
no process, and is ended when it takes too much time or memory. The parent must never train: the threads that
a run leaves behind do not survive a fork, and a child would wait for them forever.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

import torch

from benchmarks import mutant_runs, mutant_traces
from config import REPOSITORY

PROCESSOR_SECONDS = 40  # Ten times what the longest run takes.
WALL_SECONDS = 400  # A run that waits for ever takes no processor time.
MEMORY = 6 << 30
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.truncate",
    "os.link",
    "os.symlink",
    "shutil.rmtree",
)
STARTING = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
    "os.kill",
    "os.fork",
)


class Escape(BaseException):
    """A mutant tried to write outside its folder, to start a process or to end one."""


@dataclass(frozen=True)
class MutatedModule:
    """A module of the product in the place of its file's: its dotted name and its code."""

    name: str
    code: CodeType


class _Loader(importlib.machinery.SourceFileLoader):
    code: CodeType

    def get_code(self, fullname: str) -> CodeType:
        return self.code


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, module: MutatedModule):
        self.module = module

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module.name:
            return None
        file = self.module.code.co_filename
        loader = _Loader(fullname, file)
        loader.code = self.module.code
        folder = [str(Path(file).parent)] if file.endswith("__init__.py") else None
        return importlib.util.spec_from_file_location(
            fullname, file, loader=loader, submodule_search_locations=folder
        )


def dotted(file: Path) -> str:
    """Return the name by which a file of the product is imported."""
    return ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


# --- in the child -----------------------------------------------------------------------------------


def run_once(name: str, guarded: bool, expected: Path | None) -> dict[str, Any]:
    """Do one run in the current folder, and say how it ended.

    Args:
        name: A name of RUNS.
        guarded: Let the guards look; they leave no trace. Without them every fault may pass.
        expected: The trace of the unmutated run; None writes this run's to the file `trace`, beside it.
    """
    from guards.faults import Fault

    try:
        if not guarded:
            without_guards()
        mutant_runs.RUNS[name](not guarded)
    except Fault as fault:
        return {"ended": "named", "by": fault.name}
    except (KeyboardInterrupt, Escape):
        raise
    except BaseException as error:
        kind = "refused" if isinstance(error, ValueError) and _is_said(error) else "crash"
        traceback.print_exc()
        return {"ended": kind, "by": f"{type(error).__name__}: {error}"[:300]}
    sys.stdout.flush()
    sys.stderr.flush()
    found = mutant_traces.trace(Path("."), Path("..", "printed").read_text("utf-8", "replace"))
    if expected is None:
        torch.save(found, Path("..", "trace"))
        return {"ended": "same"}
    apart = mutant_traces.difference(found, torch.load(expected, weights_only=True))
    if apart is None:
        return {"ended": "same"}
    return {"ended": "rounding" if apart.is_rounding else "differs", "by": apart.what[:400]}


def _is_said(error: ValueError) -> bool:
    """Return whether it was raised by the product itself, in a sentence, and not by Python or a library."""
    frames = traceback.extract_tb(error.__traceback__)
    file = Path(frames[-1].filename)
    return file.is_relative_to(REPOSITORY) and ".venv" not in file.parts


def confine(folder: Path) -> None:
    """Let this process write in one folder only, and neither start nor end another."""
    allowed = (str(folder.resolve()), "/dev/null", "/dev/tty")

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not (isinstance(flags, int) and flags & WRITING):
                return
            paths = [path]
        elif event in CHANGING:
            paths = [one for one in arguments if isinstance(one, str | bytes | os.PathLike)]
        elif event in STARTING:
            raise Escape(event)
        else:
            return
        for path in paths:
            whole = os.path.abspath(os.fsdecode(path))
            if not whole.startswith(allowed):
                raise Escape(f"{event} {whole}")

    sys.addaudithook(watch)


def _prepare(folder: Path) -> None:
    work = folder / "work"
    work.mkdir(parents=True)
    os.chdir(folder)
    descriptor = os.open("printed", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", encoding="utf-8"), os.fdopen(2, "w", encoding="utf-8")
    tempfile.tempdir = str(work)
    # torch makes this folder when parts of it are imported; by default it lies beside all others in /tmp.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path.cwd() / "inductor")
    sys.dont_write_bytecode = True  # Of modules that nobody has imported yet.
    os.fsync = lambda descriptor: None  # What is written is read by this process only.
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, 1 << 28))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def without_guards() -> None:
    from guards import preflight

    preflight.GUARDS.clear()


def covered(name: str) -> dict[str, list[int]]:
    """Do one run without the guards, and return the lines of functions that it executed, by file."""
    lines: dict[str, set[int]] = {}
    root, ignored = f"{REPOSITORY}{os.sep}", f"{REPOSITORY}{os.sep}.venv"

    def local(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            lines[frame.f_code.co_filename].add(frame.f_lineno)
        return local

    def entered(frame: FrameType, event: str, argument: object) -> Any:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if not file.startswith(root) or file.startswith(ignored) or not frame.f_code.co_flags & 2:
            return None  # The bodies of modules and classes have no fast locals (flag 2).
        if function != "<module>":
            lines.setdefault(file, set()).add(frame.f_lineno)
        return local

    import training.begin

    assert training.begin
    without_guards()
    threading.settrace(entered)
    sys.settrace(entered)
    try:
        mutant_runs.RUNS[name](True)
    finally:
        sys.settrace(None)
    return {file.removeprefix(root): sorted(found) for file, found in lines.items()}


# --- in the parent ----------------------------------------------------------------------------------


@dataclass
class Child:
    """A child under way."""

    process: int
    folder: Path
    began: float


def start(folder: Path, work: Callable[[], dict[str, Any]], module: MutatedModule | None = None) -> Child:
    """Fork a child that does `work`, which returns its result, in a new folder and with a module mutated."""
    sys.stdout.flush()
    sys.stderr.flush()
    shutil.rmtree(folder, ignore_errors=True)
    process = os.fork()
    if process:
        return Child(process, folder, time.monotonic())
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        torch.set_num_threads(1)
        _prepare(folder)
        confine(folder)
        if module is not None:
            sys.meta_path.insert(0, _Finder(module))
        os.chdir("work")
        result = _result_of(work)
        (folder / "result").write_text(json.dumps(result), "utf-8")
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(0)


def _result_of(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except Escape as escape:
        traceback.print_exc()
        return {"ended": "crash", "by": f"it left its folder: {escape}"}
    except BaseException as error:  # While it imported the product, or wrote its result.
        traceback.print_exc()
        return {"ended": "crash", "by": f"{type(error).__name__}: {error}"[:300]}


def result_of(child: Child) -> dict[str, Any] | None:
    """Return the result of a child that ended, with its processor time; None while it is under way."""
    done, status, used = os.wait4(child.process, os.WNOHANG)
    if not done:
        if time.monotonic() - child.began < WALL_SECONDS:
            return None
        os.kill(child.process, signal.SIGKILL)
        _, status, used = os.wait4(child.process, 0)
    seconds = used.ru_utime + used.ru_stime
    try:
        result = json.loads((child.folder / "result").read_text("utf-8"))
    except (OSError, ValueError):
        killed = os.WIFSIGNALED(status)
        hung = killed and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        number = os.WTERMSIG(status) if killed else 0
        result = {"ended": "crash", "by": "it does not end" if hung else f"killed by signal {number}"}
    return result | {"seconds": round(seconds, 2)}


def finished(child: Child) -> dict[str, Any]:
    """Wait for a child; return its result."""
    while (result := result_of(child)) is None:
        time.sleep(0.01)
    return result
