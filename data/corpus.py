"""Documents of a corpus: reading, dropping duplicates, and splitting.

    for split, document in split_documents(config):  # split is one of SPLITS

A source is the running interpreter's standard library, a folder, a corpus that `python -m scraping build`
wrote, or a JSONL(.gz) or Parquet file, whose rows hold plain text, examples (a prompt and its completion) or
conversations, of which each answer is an example.
Documents are streamed, exact duplicates are dropped, and each group goes whole to one split *before*
anything is cut into windows, so that no text stands in two splits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from config import MOST_BYTES, DataConfig
from data import leaks
from data.cache import file_sha256, read_sealed, write_sealed
from data.comments import drop_comments
from data.documents import SPLITS, Document, FileState, ReadFile, Report, utf8
from data.fim import gap_of
from data.rows import decoded, jsonl_rows, listed, parquet_rows, texts_of
from data.sourcefiles import CORPUS, corpus_parts, source_files, split_files

ROW_FILES = (".jsonl", ".jsonl.gz", ".parquet")


# ---------------------------------------------------------------------------------------------
# Reading


def refuse_unreadable(config: DataConfig) -> None:
    """Raise ValueError for a source and settings that cannot be right, before a document is opened."""
    if config.store is not None:
        raise ValueError(f"{config.store} holds tokens and no texts; name the --data.source instead")
    source = Path(config.source)
    is_file = source.name.endswith(ROW_FILES) and source.is_file()
    if config.source != "stdlib" and not source.is_dir() and not is_file:
        problem = "is not a kind that can be read" if source.exists() else "does not exist"
        raise ValueError(
            f"the corpus {config.source} {problem}: set --data.source to a folder, a .jsonl, .jsonl.gz or "
            ".parquet file, or stdlib"
        )
    for split, n in {"validation": config.validation_one_in, "test": config.test_one_in}.items():
        if n < 0:
            raise ValueError(f"--data.{split}_one_in is {n}, and must be at least 2")
    given = dict(split_files(source))
    if given and config.regroup:
        raise ValueError(
            f"--data.regroup is set, and {config.source} gives the split itself, in files named "
            f"{' and '.join(split for split in SPLITS if split in given)}; leave it out, or name one file"
        )
    if config.fim_rate and not config.validation_one_in:
        raise ValueError(
            f"--data.fim_rate is {config.fim_rate}, and --data.validation_one_in 0 validates on the training "
            "files, which it would cut; leave one of them out"
        )
    if is_file or given or (source / CORPUS).is_file():
        return
    for name in ("text_field", "group_field"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"--data.{name} {getattr(config, name)} names a field of JSONL or Parquet rows, and "
                f"{config.source} is read as files"
            )


def read_documents(config: DataConfig, report: Report | None = None) -> Iterator[Document]:
    """Yield the documents of `config.source` in a fixed order: files by relative POSIX path, rows as stored.

    A folder with files named by SPLIT_FILE for training and for another split is read as these files, those
    of test first: where splits share a text, it is training that loses it.

    Text is byte exact: UTF-8 decoded strictly, line ends and a leading BOM kept. Of a folder, hidden folders,
    symbolic links to folders and links that leave the folder are skipped. `report` collects the counts.

    Raises:
        ValueError: the source is missing, of an unknown kind or empty, or something in it cannot be read.
    """
    refuse_unreadable(config)
    report = Report() if report is None else report
    source = Path(config.source)
    if (source / CORPUS).is_file():
        documents = _read_corpus(source, config, report)
    elif given := split_files(source):
        documents = itertools.chain.from_iterable(
            _read_rows(path, path.name, config, report, split) for split, path in given
        )
    elif config.source == "stdlib" or source.is_dir():
        documents = _read_folder(config, report)
    else:
        documents = _read_rows(source, source.name, config, report)
    python_files = 0
    for document in documents:
        report.documents += 1
        if config.drop_comments and document.prompt is not None:
            raise ValueError(
                f"--data.drop_comments is set, and {config.source} holds examples: half a program does not "
                "parse; leave it out"
            )
        if config.fim_rate and document.prompt is not None:
            raise ValueError(
                f"--data.fim_rate is {config.fim_rate}, and {config.source} holds examples, which say "
                "themselves what is asked for; leave it out"
            )
        if config.loss_on == "all" and document.prompt is None:
            raise ValueError(
                f"--data.loss_on is all, and {config.source} holds plain text, whose tokens are all "
                "targets anyway; leave it out"
            )
        if config.drop_comments and document.name.endswith(".py"):
            python_files += 1
            document = _without_comments(document, report)
        yield document
    if report.documents == 0:
        raise ValueError(_nothing_read(config, report))
    if config.drop_comments and python_files == 0:
        raise ValueError(
            f"--data.drop_comments is set, but none of the {report.documents} documents of {config.source} "
            "is named *.py"
        )


def _nothing_read(config: DataConfig, report: Report) -> str:
    """Return the sentence for a source without a document: what it holds instead, and the remedy."""
    source = Path(config.source)
    left_out = f" ({report.undecodable} left out that are not UTF-8)" if report.undecodable else ""
    files = config.source == "stdlib" or source.is_dir()
    kind = f" with a name ending in {' or '.join(config.suffixes)}" if files else ""
    empty = f": {'; '.join(report.without_rows)}" if report.without_rows else ""
    others = _other_endings(source) if source.is_dir() and not left_out else []
    there = ", ".join(f"{count} with {ending}" for ending, count in others)
    remedy = f"set --data.suffixes {others[0][0]}" if others else "write some there"
    if others and others[0][0] in (".jsonl", ".gz", ".parquet"):
        remedy = "name one file of rows itself"
    return (
        f"the corpus {config.source} holds no document{kind}{left_out}{empty}"
        f"{f' but {there}' if there else ''}: {remedy}, or name another --data.source"
    )


def _read_corpus(folder: Path, config: DataConfig, report: Report) -> Iterator[Document]:
    """Yield the rows of the parts in corpus.json, whose SHA-256 is compared first; a cluster is a group."""
    path = folder / CORPUS
    _read_file(path, CORPUS, report)
    report.corpus, parts = corpus_parts(folder)
    rows = dataclasses.replace(config, text_field="text", group_field=config.group_field or "cluster")
    for name, sha256 in parts:
        part = folder / name
        if not part.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} lists {part}, which lies outside of its folder: it is not read")
        try:
            found = file_sha256(part)
        except OSError as error:
            raise ValueError(f"{part}, which {path} lists, cannot be read: {error.strerror}") from None
        if found != sha256:
            raise ValueError(
                f"{part} has the SHA-256 {found[:12]}, and {path} says {sha256[:12]}: build the corpus again"
            )
        yield from _read_rows(part, name, rows, report)


def _without_comments(document: Document, report: Report) -> Document:
    try:
        return dataclasses.replace(document, text=drop_comments(document.text))
    except ValueError:
        report.unparsed += 1
        return document


def _other_endings(root: Path) -> list[tuple[str, int]]:
    """Return the three commonest endings of the files below a folder, each with its number of files."""
    endings: Counter[str] = Counter()
    for _, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        endings.update(Path(name).suffix for name in files if Path(name).suffix)
    return endings.most_common(3)


def _read_folder(config: DataConfig, report: Report) -> Iterator[Document]:
    root, names = source_files(config)
    for name in names:
        path = root / name
        text = decoded(_read_file(path, name, report), str(path), 0, config, report)
        if text is not None:
            yield Document(name, text, name, where=str(path))


def _read_file(path: Path, name: str, report: Report) -> bytes:
    """Return the bytes of one file of the source, and note what it was like.

    Raises:
        ValueError: It is too large for one document, or changed while it was read.
    """
    with open(path, "rb") as file:
        before = FileState.of(os.fstat(file.fileno()))
        if before.size > MOST_BYTES:  # A sparse file may have any size on a small disk.
            raise ValueError(
                f"{path} has {before.size:,} bytes, and a document may have {MOST_BYTES:,}: cut it into "
                "several files, or leave it out of the folder"
            )
        data = file.read()
        _refuse_change(path, before, FileState.of(os.fstat(file.fileno())))
    report.files[name] = ReadFile(before, hashlib.sha256(data).hexdigest())
    return data


def _refuse_change(path: Path, before: FileState, after: FileState) -> None:
    if after != before:
        raise ValueError(f"{path} changed while it was read: start again")


def _read_rows(
    path: Path, name: str, config: DataConfig, report: Report, split: str | None = None
) -> Iterator[Document]:
    """Yield the documents of one file of rows, and note at its end what the file was like."""
    before = FileState.of(os.stat(path))
    yield from _documents_of(path, config, report, split)
    sha256 = file_sha256(path)  # Only now: a file that is refused may have any size.
    _refuse_change(path, before, FileState.of(os.stat(path)))
    report.files[name] = ReadFile(before, sha256)


def _documents_of(path: Path, config: DataConfig, report: Report, split: str | None) -> Iterator[Document]:
    rows = parquet_rows if path.suffix == ".parquet" else jsonl_rows
    first: tuple[str, str] | None = None
    for number, row in rows(path, config, report):
        where = f"{path} {'row' if path.suffix == '.parquet' else 'line'} {number}"
        found = texts_of(row, config, where)
        _, prompt, suffix, messages = found[0]
        kind = "plain text" if prompt is None else "an example" if messages is None else "a conversation"
        first = first or (where, kind)
        if kind != first[1]:
            raise ValueError(f"{where} holds {kind}, and {first[0]} {first[1]}: put them into two files")
        names = (row.get(key) for key in ("path", "name"))
        name = next((value for value in names if isinstance(value, str) and value), "")
        if name and isinstance(row.get("repository"), str):  # Many repositories hold a setup.py.
            name = f"{row['repository']}/{name}"
        # All answers of a conversation begin as its first one does.
        group = name or (prompt or "") + (suffix or "") or str(number)
        if config.group_field is not None:
            if row.get(config.group_field) is None:
                raise ValueError(
                    f"{where} has nothing in the field {config.group_field} of --data.group_field; it has "
                    f"{listed(row)}"
                )
            group = str(row[config.group_field])
        prompts = row.get("prompts")
        for text in found:
            yield Document(
                name or str(number),
                text.text,
                group,
                text.prompt,
                text.suffix,
                where=where,
                split=split,
                prompts=prompts if kind == "an example" and isinstance(prompts, dict) else None,
                messages=text.messages,
            )


def split_of(group: str, validation_one_in: int, test_one_in: int = 0) -> str:
    """Return the split of a group, by its name alone: `test` for about one in `test_one_in`, of the others
    `validation` for about one in `validation_one_in` (none for 0), else `train`.

    There are two hashes, so that another `validation_one_in` moves nothing into or out of test, and
    `test_one_in` changes nothing between the two other splits.
    """
    digest = hashlib.sha256(utf8(group)).hexdigest()
    if test_one_in and int(digest, 16) % test_one_in == 0:
        return "test"
    digest = hashlib.sha1(utf8(group), usedforsecurity=False).hexdigest()
    if validation_one_in and int(digest, 16) % validation_one_in == 0:
        return "validation"
    return "train"


class EmptySplit(ValueError):
    """A split is left without a document; `given`: the source's own files leave it so."""

    def __init__(self, sentence: str, given: bool):
        super().__init__(sentence)
        self.given = given


def split_documents(config: DataConfig, report: Report | None = None) -> Iterator[tuple[str, Document]]:
    """Yield (split, document) without exact duplicates: of equal texts the first in order stays.

    Each text has one copy and each group one split: so no text stands in two splits. Where the source
    gives the split, training documents are split further only for a split that it does not have. Examples
    are equal if both prompt and completion are. Keeps one SHA-256 a text in memory, and the texts only to
    regroup them. `fim_rate` gives a share of the training documents a gap, and no others.

    Raises:
        ValueError: the errors of `read_documents`.
        EmptySplit: a split is left without a document.
    """
    config = config.resolved()
    one_in = {"validation": config.validation_one_in, "test": config.test_one_in}
    given = dict(split_files(Path(config.source)))
    one_in |= dict.fromkeys(given.keys() & one_in.keys(), 0)
    report = Report() if report is None else report
    content = hashlib.sha256()
    documents = _without_duplicates(config, report)
    if config.regroup:
        kept = list(documents)
        groups = _regrouped(config, kept)
        report.groups = len(set(groups))
        documents = (
            (dataclasses.replace(document, group=group), digest, size)
            for (document, digest, size), group in zip(kept, groups, strict=True)
        )
    for document, digest, size in documents:
        split = document.split or "train"
        if split == "train":
            split = split_of(document.group, one_in["validation"], one_in["test"])
        told = [split] if split == "test" or document.split else []
        content.update(json.dumps([document.name, document.group, digest.hex(), *told]).encode())
        report.kept[split] += 1
        report.kept_bytes[split] += size
        if config.fim_rate and split == "train":
            gap = gap_of(document.text, config.fim_rate)
            report.gaps += gap is not None
            document = dataclasses.replace(document, gap=gap)
        yield split, document
    wanted = ["train", *given, *(split for split, n in one_in.items() if n)]
    if empty := [split for split in SPLITS if split in wanted and not report.kept_bytes[split]]:
        counts = [f"{report.kept[split]} {split}" for split in SPLITS]
        flags = [
            f"--data.{split}_one_in {n}" for split, n in one_in.items() if n and empty[0] in ("train", split)
        ]
        way = "raise" if empty[0] == "train" else "lower"
        change = f"{way} {' or '.join(flags)}, or " if flags and empty[0] not in given else ""
        without = "".join(f"; {said}" for said in report.without_rows)
        raise EmptySplit(
            f"the split of {config.source} leaves {', '.join(counts)} documents, and text for {empty[0]} in "
            f"none{without}: {change}add documents",
            empty[0] in given,
        )
    report.fingerprint = content.hexdigest()


def _regrouped(config: DataConfig, kept: list[tuple[Document, bytes, int]]) -> list[str]:
    """Return the group of each document by its text, cached: other settings split by the same groups."""
    key = hashlib.sha256(f"{leaks.VERSION}".encode())
    for document, digest, _ in kept:
        key.update(json.dumps([document.name, document.group, digest.hex()]).encode())
    path = Path(config.cache) / f"groups-{key.hexdigest()[:32]}.json"
    groups = read_sealed(path)
    if groups is None:
        groups = leaks.regroup([document for document, _, _ in kept])
        write_sealed(path, groups)
    return groups


def _without_duplicates(config: DataConfig, report: Report) -> Iterator[tuple[Document, bytes, int]]:
    """Yield each text once, with its SHA-256, those of prompt and suffix, and its size in UTF-8 bytes."""
    seen: set[bytes] = set()
    for document in read_documents(config, report):
        data = utf8(document.text)
        digest = hashlib.sha256(data).digest()
        for part in (document.prompt, document.suffix):
            if part is not None:
                data += utf8(part)
                digest += hashlib.sha256(utf8(part)).digest()
        if document.messages is not None:  # The same texts may be said by others.
            digest += hashlib.sha256(json.dumps(document.messages).encode()).digest()
        if digest in seen:
            report.duplicates += 1
            continue
        seen.add(digest)
        yield document, digest, len(data)


def training_texts(documents: Iterable[tuple[str, Document]]) -> Iterator[str]:
    """Yield the texts of the train split, in order: what a tokenizer may learn from.

    The prompt, the suffix and the completion of an example come apart, as they are tokenised.
    """
    for split, document in documents:
        if split == "train":
            parts = (document.prompt, document.suffix, document.text)
            yield from (part for part in parts if part is not None)
