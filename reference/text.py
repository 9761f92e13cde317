"""Documents read from the bytes of a source: what is read, what a row means, and which split it is in.

    names = file_names(settings)               # lists those of a folder, in order
    text = decoded((root_of(settings) / names[0]).read_bytes())
    for document in documents_of_rows(settings): ...

Text is what the bytes say in UTF-8: line ends, a byte order mark and trailing spaces stay. Files come by
their relative POSIX path, rows as they are stored. The split of a document is decided by a hash of its
group's name alone, so it needs no list of the others.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config import DataConfig

SPLITS: tuple[str, ...] = ("train", "validation", "test")
# The standard library's own tests, what is installed beside it, and copies of programs that it holds.
NOT_LIBRARY = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "__pycache__"}
ROW_FILE = re.compile(r".*\.(jsonl|jsonl\.gz|parquet)")
GIVEN_SPLIT = re.compile(r"(train|validation|test)(-\d+-of-\d+)?\.(jsonl|jsonl\.gz|parquet)")
# The fields of an example, the completion last, by the field that tells its kind.
EXAMPLES = {
    "completion": ("prompt", "completion"),
    "instruction": ("instruction", "input", "output"),
    "output": ("input", "output"),
    "middle": ("prefix", "suffix", "middle"),
}
# The templates of Alpaca's train.py, with an input and without one (github.com/tatsu-lab/stanford_alpaca).
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@dataclass(frozen=True)
class SourceDocument:
    """A plain text, or an example, whose `text` completes `prompt`; with a `suffix` it fills the gap between.

    Of a conversation each answer is an example, and `turns` are the (role, content) before it.

    Attributes:
        name: The file's path in its folder, or the row's path or name, or the number of its line.
        group: Documents of one group are in one split.
        given: The split that the source's file is named by; "" for all others.
    """

    name: str
    text: str
    group: str
    prompt: str | None = None
    suffix: str | None = None
    given: str = ""
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def content(self) -> bytes:
        """The hash of what makes two documents equal: the text, and of an example all of its parts."""
        parts = json.dumps(
            [self.text, self.prompt, self.suffix, self.turns]
        )  # ASCII, lone surrogates included.
        return hashlib.sha256(parts.encode()).digest()


def decoded(data: bytes) -> str | None:
    """Return the text of bytes in UTF-8, every character kept; None if they are not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def utf8(text: str) -> bytes:
    """Return the bytes of a text; JSON may hold halves of surrogate pairs, which have bytes of their own."""
    return text.encode("utf-8", "surrogatepass")


def split_of(group: str, data: DataConfig, given: set[str]) -> str:
    """Return the split of a group by its name: SHA-256 decides what is test, SHA-1 what validates.

    Args:
        given: Splits that the source has files for; none else is put into them.
    """
    name = utf8(group)
    rules = (("test", data.test_one_in, hashlib.sha256), ("validation", data.validation_one_in, hashlib.sha1))
    for split, one_in, digest in rules:
        if one_in and split not in given and int(digest(name).hexdigest(), 16) % one_in == 0:
            return split
    return "train"


def root_of(data: DataConfig) -> Path:
    """Return the folder or the file of a source."""
    return Path(sysconfig.get_path("stdlib") if data.source == "stdlib" else data.source)


def row_files(data: DataConfig) -> list[tuple[str, Path]]:
    """Return (given split, path) of the files of rows, in order; none of a folder that is read as files.

    A folder may name its files by split, test first, or be a corpus of `scraping build`, with its parts.
    """
    source = root_of(data)
    if source.is_file():
        return [("", source)]
    if (source / "corpus.json").is_file():
        corpus = json.loads((source / "corpus.json").read_text("utf-8"))
        return [("", source / part["file"]) for part in corpus["parts"]]
    given = sorted(path for path in source.iterdir() if path.is_file() and GIVEN_SPLIT.fullmatch(path.name))
    splits = {path.name: re.split(r"[-.]", path.name)[0] for path in given}
    if "train" not in splits.values() or len({*splits.values()}) == 1:
        return []
    return [(split, path) for split in reversed(SPLITS) for path in given if splits[path.name] == split]


def file_names(data: DataConfig) -> list[str]:
    """Return the relative POSIX paths of a folder's files, sorted.

    Left out are hidden folders, links to folders, links that lead out of the folder and, of the standard
    library, the folders of NOT_LIBRARY.
    """
    root = root_of(data)
    skipped = NOT_LIBRARY if data.source == "stdlib" else set()
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not (f.startswith(".") or f in skipped)]
        for name in files:
            path = Path(folder, name)
            inside = not path.is_symlink() or path.resolve().is_relative_to(root.resolve())
            if name.endswith(tuple(data.suffixes)) and inside and path.is_file():
                found.append(path.relative_to(root).as_posix())
    return sorted(found)


def documents_of_rows(data: DataConfig) -> Iterator[SourceDocument]:
    """Yield the document of each row of the source's files, in order."""
    corpus = (root_of(data) / "corpus.json").is_file()
    text_field = "text" if corpus else data.text_field
    group_field = data.group_field or ("cluster" if corpus else None)
    for given, path in row_files(data):
        for number, row in _rows(path):
            yield from _documents(row, number, text_field, group_field, given)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a file, each with its number, from 1; those that are not UTF-8 are left out."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        batches = parquet.ParquetFile(path).iter_batches(batch_size=256)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
        return
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = decoded(line)
            if text is not None and text.strip():
                yield number, json.loads(text)


def _documents(
    row: dict[str, Any], number: int, text_field: str | None, group_field: str | None, given: str
) -> Iterator[SourceDocument]:
    """Yield what a row means: a text, an example by its fields, or each answer of a conversation."""
    if text_field is None and "messages" in row:
        turns = tuple((turn["role"], turn["content"]) for turn in row["messages"])
        texts = [content for _, content in turns]
        answers = [place for place, (role, _) in enumerate(turns) if role == "assistant"]
        for place in answers:
            document = SourceDocument(
                "", texts[place], "", "\n".join(texts[:place]), None, given, turns[:place]
            )
            begins = "\n".join(texts[: answers[0]])  # The answers of a conversation are one group.
            yield _named(document, row, number, group_field, begins)
    else:
        yield _document(row, number, text_field, group_field, given)


def _document(
    row: dict[str, Any], number: int, text_field: str | None, group_field: str | None, given: str
) -> SourceDocument:
    """Return what a row means: a text, or an example by the fields that it has."""
    prompt = suffix = None
    kind = next((fields for key, fields in EXAMPLES.items() if key in row), None)
    if text_field is not None or kind is None:
        text = row[text_field or ("text" if "text" in row else "content")]
    else:
        text = row[kind[-1]]
        if kind[0] == "instruction":
            template = WITH_INPUT if row.get("input") else WITHOUT_INPUT
            prompt = template.format(instruction=row["instruction"], input=row.get("input"))
        else:
            prompt, suffix = row[kind[0]], row["suffix"] if kind[0] == "prefix" else None
    document = SourceDocument("", text, "", prompt, suffix, given)
    return _named(document, row, number, group_field, (prompt or "") + (suffix or ""))


def _named(
    document: SourceDocument, row: dict[str, Any], number: int, group_field: str | None, begins: str
) -> SourceDocument:
    """Return a document with its name and its group; `begins` is the group of a row without a name."""
    name = next((row[key] for key in ("path", "name") if isinstance(row.get(key), str) and row[key]), "")
    if name and isinstance(row.get("repository"), str):
        name = f"{row['repository']}/{name}"
    group = name or begins or str(number) if group_field is None else str(row[group_field])
    return replace(document, name=name or str(number), group=group)
