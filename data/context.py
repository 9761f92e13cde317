"""Other files beside the one that is written: what a prompt says of them.

commented([("a.py", "def f(): ..."), ...]) -> "# a.py\\n# def f(): ...\\n" before the prefix
"""

from __future__ import annotations

from collections.abc import Sequence

# The sign of a comment by the end of a file's name; Python's where it is not known.
SIGNS = {
    "//": (
        ".c",
        ".cc",
        ".cpp",
        ".cs",
        ".go",
        ".h",
        ".java",
        ".js",
        ".kt",
        ".kts",
        ".rs",
        ".swift",
        ".ts",
        ".tsx",
    ),
    "--": (".hs", ".lua", ".sql"),
    ";": (".el", ".lisp"),
}
MOST_CHARACTERS = 8192


def commented(pieces: Sequence[tuple[str, str]], most: int = MOST_CHARACTERS) -> str:
    """Return pieces of other files as lines of comments, each under the name of its file.

    Args:
        pieces: (name of the file, text); the last are the newest.
        most: Characters; older pieces that go beyond are left out.
    """
    found: list[str] = []
    left = most
    for name, text in reversed(pieces):
        sign = next((sign for sign, ends in SIGNS.items() if name.endswith(ends)), "#")
        lines = [" ".join(name.split()), *text.splitlines()]
        shown = "".join(f"{sign} {line}".rstrip() + "\n" for line in lines)
        if len(shown) > left:
            break
        left -= len(shown)
        found.insert(0, shown)
    return "".join(found)
