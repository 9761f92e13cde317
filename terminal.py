"""What reaches the terminal: text in which a stranger's characters are seen and not obeyed. No torch.

Names of files, fields of rows, keys of settings, ids of models and addresses may hold anything, and they
stand in sentences, warnings, bars and tables. So there is one owner, and no place that prints has to think of
it: while a command runs, `shown_safely` stands before the standard output and the standard error. Text that
is meant for other programs, a completion or a diff, is written to the buffer below.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any, NoReturn, TextIO, cast

# A bar of tqdm goes to the start of its line, before and after its text, and up to it, in a write alone.
_LINES_UP = re.compile(r"(?:\x1b\[A)+")
_AROUND = re.compile(r"(\r*)(.*?)(\r*)", re.DOTALL)


def printable(text: str) -> str:
    """`text` with each character that is not seen, but line breaks and tabs, named as Python would: \\x1b."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """`text` in one line that can be printed."""
    return printable(" ".join(text.split()))


def refuse(sentence: str) -> NoReturn:
    """End the command with one sentence on the standard error, and exit code 2."""
    print(f"error: {one_line(sentence)}", file=sys.stderr)
    sys.exit(2)


class _Safe:
    """A text stream that writes what `printable` makes of a text; all else is the stream's own."""

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


@contextlib.contextmanager
def shown_safely() -> Iterator[None]:
    """While it lasts, nothing that is printed, warned of or shown in a bar steers the terminal."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Safe(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
