"""Commands and functions in children that are forked from the test's process, which has imported torch.

A child that imports it anew takes three seconds before it does anything. Forking is safe with one thread of
torch, as conftest.py sets it.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from config.files import REPOSITORY


def forked(work: Callable[[], Any], out: Path, err: Path | None = None) -> int:
    """Process id of a child that does `work` and exits as a command would; what it writes goes to files."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        # The bars' own lock is shared with all forks: a child that is killed while it prints would keep it.
        tqdm.set_lock(threading.RLock())
        torch.set_num_threads(1)
        for number, path in ((1, out), (2, err or out)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", encoding="utf-8"), os.fdopen(2, "w", 1, encoding="utf-8")
        work()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def command(script: str, *words: str | Path | int, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python script words` in `cwd`, to its end."""

    def work() -> None:
        os.chdir(cwd)
        sys.argv = [str(REPOSITORY / script), *map(str, words)]
        runpy.run_path(sys.argv[0], run_name="__main__")

    with tempfile.TemporaryDirectory() as name:
        out, err = Path(name, "out"), Path(name, "err")
        code = exit_code(forked(work, out, err))
        return subprocess.CompletedProcess([script, *map(str, words)], code, out.read_text(), err.read_text())
