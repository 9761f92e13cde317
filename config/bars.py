"""Progress bars: every bar of the repository is made here, so that one place decides who sees bars.

A bar is drawn on a terminal and in the cell of a notebook. A log and a pipe get none: each of its states
would be a line there. No torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from config.console import unwrapped


def is_watched() -> bool:
    """Return whether somebody watches the standard error: on a terminal, or in the cell of a notebook.

    A Jupyter kernel's stream says that it is no terminal, though the cell obeys a carriage return like one.
    """
    stream = unwrapped(sys.stderr)
    return stream.isatty() or type(stream).__module__.partition(".")[0] == "ipykernel"


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """Return tqdm's bar with these options, which is silent where nobody watches."""
    return tqdm(iterable, disable=not is_watched(), **options)
