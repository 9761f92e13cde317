"""Text for the terminal, in which untrusted characters are shown and never obeyed. No torch.

Names of files, fields of rows, keys of settings, ids of models and addresses may hold anything, and they
stand in sentences, warnings, bars and tables. Code that prints need not think of it: while a command runs,
`shown_safely` wraps the standard output and the standard error. Text for other programs, a completion or a
diff, is written to the buffer below.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from config.files import REPOSITORY

# tqdm writes carriage returns before and after a bar's text, and moves up to the bar's line in a write alone.
_LINES_UP = re.compile(r"(?:\x1b\[A)+")
_AROUND = re.compile(r"(\r*)(.*?)(\r*)", re.DOTALL)


def printable(text: str) -> str:
    """Name each invisible character as Python does, \\x1b, but for line breaks and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def command_of(script: str) -> str:
    """Return the words with which the user's shell runs a script of this program, to print before its flags.

    They are `python generate.py` where the shell's `python` is this interpreter and the program lies in the
    working directory; else the path of either, so that what is printed runs where it is pasted.
    """
    found, own = shutil.which("python"), Path(sys.executable)
    is_own = found is not None and Path(found).parent.resolve() == own.parent.resolve()
    python = "python" if is_own else _from_here(own)
    return f"{for_shell(python)} {for_shell(_from_here(REPOSITORY / script))}"


def _from_here(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def for_shell(text: str) -> str:
    """`text` as one word of a command that can be printed and pasted into a shell, which is bash, ksh or zsh.

    A name with characters that are not seen is written as `$'...'`, where `\\x1b` is the byte.
    """
    if printable(text) == text:
        return shlex.quote(text)
    spelled = []
    for c in text:
        errors = "surrogateescape" if "\udc80" <= c <= "\udcff" else "surrogatepass"
        seen = c.isprintable() and c not in "\\'"
        spelled += [c] if seen else [f"\\x{byte:02x}" for byte in c.encode("utf-8", errors)]
    return f"$'{''.join(spelled)}'"


def one_line(text: str) -> str:
    """Return `text` in one line that can be printed."""
    return printable(" ".join(text.split()))


def refuse(sentence: str) -> NoReturn:
    """End the command with one sentence on the standard error, and exit code 2."""
    print(f"error: {one_line(sentence)}", file=sys.stderr)
    sys.exit(2)


class _Safe:
    """A text stream that writes `printable` texts, and is the wrapped stream in all else."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        found = _AROUND.fullmatch(text)
        assert found is not None, "every text matches"
        is_move = _LINES_UP.fullmatch(text) is not None
        self._stream.write(text if is_move else found[1] + printable(found[2]) + found[3])
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def unwrapped(stream: TextIO) -> TextIO:
    """Return the stream that `shown_safely` wrapped, or the stream itself."""
    while isinstance(stream, _Safe):
        stream = stream._stream
    return stream


@contextlib.contextmanager
def shown_safely() -> Iterator[None]:
    """Keep all that is printed, warned of or shown in a bar from steering the terminal."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Safe(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


# The words of torch on CUDA, on Windows and on Linux, and of a library of CUDA that finds no memory to start.
_MEMORY_IS_FULL = ("out of memory", "not enough memory", "allocate memory", "status_alloc_failed")
_GPU_IS_FULL = re.compile(
    r"Tried to allocate (\S+ \w+)\. GPU (\d+) has a total capac\w+ of (\S+ \w+) of which (\S+ \w+) is free"
)


def memory_is_full(error: BaseException) -> bool:
    """Whether an error of Python or torch says that memory is full."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _MEMORY_IS_FULL)


def under_torchrun() -> bool:
    """Return whether torchrun started this process, be it the only one."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def refuse_ranks() -> None:
    """End a command of one process that torchrun started several times; the first one says so.

    Raises:
        ValueError: There are several processes, and this is the first.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if not under_torchrun() or size == "1":
        return
    if os.environ.get("RANK") != "0":
        sys.exit(2)
    raise ValueError(
        f"torchrun started {size} processes, and this is a command of one; call it without torchrun. What "
        "several processes share is the training of trainingmanager.py, without --plan, --prepare and "
        "--prove_resume, and the scores of eval.py"
    )


@contextlib.contextmanager
def one_sentence(shares: bool = False) -> Iterator[None]:
    """End the command with one sentence and exit code 2 for a user's mistake, a full disk or full memory.

    An interrupt exits with 130. PLUMB_TRACEBACK=1 shows the traceback instead.

    Args:
        shares: Whether several processes may share what the command does.
    """
    with shown_safely():
        try:
            if not shares:
                refuse_ranks()
            yield
        except (ValueError, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
            full = memory_is_full(error)
            if os.environ.get("PLUMB_TRACEBACK") or (isinstance(error, RuntimeError) and not full):
                raise
            if isinstance(error, KeyboardInterrupt):
                print("interrupted", file=sys.stderr)
                sys.exit(130)
            refuse(_sentence_of(error))


def _sentence_of(error: BaseException) -> str:
    """Return the sentence for an error that ends a command."""
    if memory_is_full(error):
        if found := _GPU_IS_FULL.search(str(error)):
            more, gpu, total, free = found.groups()
            return (
                f"the memory of GPU {gpu} is full: {more} more were needed, and {free} of its {total} are "
                "free; a smaller batch_size or model needs less"
            )
        return "memory is full; a smaller batch_size, model or corpus needs less"
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{error.filename} cannot be used ({error.strerror}); name a folder you may write to"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename} cannot be used ({error.strerror}); name another file or folder"
    return str(error)


def say(text: str) -> None:
    """Print. A reader (`| head`) or a terminal that went away does not end the command."""
    try:
        print(text, flush=True)
    except OSError:  # The buffer's rest would fail once more at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
