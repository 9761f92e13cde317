"""The rule by which files of a repository are wanted, one for all sources, so that they give equal documents.

A source lists every file it finds, wanted or not, with the reason to drop it: `Wanted.reason` by name and
size before the bytes are fetched, `data_reason` by the bytes after.
"""

from __future__ import annotations

from dataclasses import dataclass

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\n"  # git-lfs/docs/spec.md: always the first line

# Reasons by the kind of what a name stands for, which each source tells by its own means.
SYMBOLIC_LINK = "symbolic link"
SUBMODULE = "submodule"
NO_FILE = "device, pipe or socket"


@dataclass(frozen=True)
class Wanted:
    """A choice of files by name and size.

    Args:
        extensions: Endings of the names of wanted files, as in .py,.kt
        min_bytes: Least size of a wanted file.
        max_bytes: Greatest size of a wanted file.
    """

    extensions: tuple[str, ...] = (".py",)
    min_bytes: int = 1024
    max_bytes: int = 102_400

    def __post_init__(self) -> None:
        if not self.extensions or not all(len(end) > 1 and end.startswith(".") for end in self.extensions):
            raise ValueError(f"extensions are {', '.join(self.extensions) or 'none'}: name each as in .py")
        if not 0 <= self.min_bytes <= self.max_bytes:
            raise ValueError(
                f"min_bytes is {self.min_bytes} and max_bytes is {self.max_bytes}: set 0 <= min <= max"
            )

    def reason(self, path: bytes, size: int) -> str:
        """Return why a file is not wanted; "" if it is."""
        if why := path_reason(path):
            return why
        if not path.endswith(tuple(end.encode() for end in self.extensions)):
            return "other extension"
        if size > self.max_bytes:
            return "too large"
        return "too small" if size < self.min_bytes else ""


def path_reason(path: bytes) -> str:
    """Return why this is no path inside a repository; "" if it is one."""
    odd = b"\0" in path or {b"", b".", b".."} & set(path.split(b"/"))  # b"": absolute
    return "path leaves the repository" if odd else ""


def data_reason(data: bytes) -> str:
    """Return why bytes are not those of a file; "" if they may be."""
    return "LFS pointer" if data.startswith(LFS_POINTER) else ""
