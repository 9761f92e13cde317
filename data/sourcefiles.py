"""The files of a source: which of those in a folder are read, and in which order."""

from __future__ import annotations

import json
import os
import re
import sysconfig
from pathlib import Path

from config import DataConfig
from data.documents import SPLITS

# Files of rows that give the split themselves, also in shards (train-00000-of-00002.parquet).
SPLIT_FILE = re.compile(rf"({'|'.join(SPLITS)})(-\d+-of-\d+)?\.(jsonl|jsonl\.gz|parquet)")
CORPUS = "corpus.json"  # the file that describes a corpus built by `scraping`
STDLIB_LEFT_OUT = frozenset(
    {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "__pycache__"}
)


def source_files(config: DataConfig) -> tuple[Path, list[str]]:
    """Return the folder of a source, and the names in it of the files that are read, in their order.

    Raises:
        ValueError: A folder, or the corpus.json in it, cannot be read.
    """
    source = Path(config.source)
    if config.source == "stdlib":
        folder = Path(sysconfig.get_path("stdlib"))
        return folder, _names_below(folder, STDLIB_LEFT_OUT, config.suffixes)
    if (source / CORPUS).is_file():
        return source, [CORPUS, *(name for name, _ in corpus_parts(source)[1])]
    if given := split_files(source):
        return source, [path.name for _, path in given]
    if source.is_dir():
        return source, _names_below(source, frozenset(), config.suffixes)
    return source.parent, [source.name]


def split_files(source: Path) -> list[tuple[str, Path]]:
    """Return (split, file) of a folder that gives the split itself, test first; none of any other source."""
    if not source.is_dir():
        return []
    names = sorted(path.name for path in source.iterdir() if path.is_file())
    found = [(match[1], source / name) for name in names if (match := SPLIT_FILE.fullmatch(name))]
    splits = {split for split, _ in found}
    if "train" not in splits or len(splits) == 1:
        return []
    return sorted(found, key=lambda file: SPLITS.index(file[0]), reverse=True)


def corpus_parts(folder: Path) -> tuple[str, list[tuple[str, str]]]:
    """Return the fingerprint of a corpus, and the name and the SHA-256 of each of its parts.

    Raises:
        ValueError: Its corpus.json cannot be read, or is none.
    """
    path = folder / CORPUS
    try:
        corpus = json.loads(path.read_text("utf-8"))
        parts = [(str(part["file"]), str(part["sha256"])) for part in corpus["parts"]]
        return str(corpus["fingerprint"]), parts
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a corpus: {error}") from None


def _names_below(root: Path, left_out: frozenset[str], suffixes: tuple[str, ...]) -> list[str]:
    """Return the relative POSIX paths of the files below a folder whose names end so, sorted.

    Hidden folders, symbolic links to folders and links that leave the root are skipped.
    """
    real_root, endings = root.resolve(), tuple(suffixes)
    names: list[str] = []
    pending = [""]
    while pending:
        inner = pending.pop()
        try:
            with os.scandir(root / inner) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        if not entry.name.startswith(".") and entry.name not in left_out:
                            pending.append(f"{inner}{entry.name}/")
                    elif entry.name.endswith(endings) and _is_inside(entry, real_root):
                        names.append(inner + entry.name)
        except OSError as error:
            raise ValueError(f"the folder {error.filename} cannot be read: {error.strerror}") from error
    return sorted(names)


def _is_inside(entry: os.DirEntry[str], real_root: Path) -> bool:
    """Return whether an entry of a folder is a file, and not a link that leaves the root."""
    if not entry.is_symlink():
        return entry.is_file(follow_symlinks=False)
    path = Path(entry.path)
    return path.is_file() and path.resolve().is_relative_to(real_root)
