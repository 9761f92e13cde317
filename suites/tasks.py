"""The table of suites by name; each is defined by a file of its own."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from suites import codexglue, gaps, lines, pairs, programs
from suites.scoring import SUITES, TOGETHER, TOKENS
from suites.task import Given, Task

TASKS: dict[str, Callable[[Given], Task]] = {
    "next_line": lines.task,
    "pairs": pairs.task,
    "examples": pairs.file_task,
    "fim_line": gaps.line_task,
    "fim_lines": gaps.lines_task,
    "fim_span": gaps.span_task,
    "codexglue_method": codexglue.method_task,
    "codexglue_line": codexglue.line_task,
    "humaneval": programs.humaneval_task,
    "mbpp": programs.mbpp_task,
    "humaneval_infilling": programs.infilling_task,
}
assert set(TASKS) == set(SUITES)
OF_FILES = {"examples", "codexglue_method", "codexglue_line", "humaneval", "mbpp", "humaneval_infilling"}


def suite_names(requested: str) -> tuple[str, ...]:
    """Return the suites that `requested` names, between commas; `fim` stands for its three.

    Raises:
        ValueError: No suite has a name, or one is named twice.
    """
    names: list[str] = []
    for name in filter(None, map(str.strip, requested.split(","))):
        known = [TOKENS, *TASKS, *TOGETHER]
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f", did you mean {near[0]}" if near else ""
            raise ValueError(f"no suite is called {name!r}{meant}; there are {', '.join(known)}")
        names += TOGETHER.get(name, (name,))
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise ValueError(f"the suite {twice[0]} is named twice; name it once")
    return tuple(names)
