"""Read files of one language from a source, by the scraper's own sources.

A source is a folder, an archive (.whl, .zip, .tar.gz, ...), the address of a git repository, or JSONL(.gz)
whose rows have `path` and `text`. None of its code is ever run or imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
from pathlib import Path

from config import DataConfig
from data.corpus import read_documents
from scraping.documents import Drop, ScrapedDocument
from scraping.stages import encoding

MOST_BYTES = 2**24  # largest size of a file
ROWS = (".jsonl", ".jsonl.gz", ".parquet")


def check_source(source: str, extension: str, revision: str = "") -> None:
    """Raise a ValueError for a source that cannot be one, before anything takes time."""
    if not source:
        raise ValueError(
            f"no source is named: give --source a folder, archive, .jsonl or repository of {extension} files"
        )
    if "://" not in source and not Path(source).exists():
        raise ValueError(f"{source} is not there: give --source a folder, archive, .jsonl or repository")
    if "://" in source:
        from scraping.gitrepo import refuse_without_git

        refuse_without_git()
    elif revision:
        raise ValueError(
            f"--revision is {revision}, and {source} is no address of a repository; leave it out"
        )


def content_of(path: Path) -> str:
    """Return a fingerprint of a file, or of a folder by the names, sizes and times of all below it."""
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for folder, folders, files in os.walk(path):
        folders.sort()
        for name in sorted(files):
            state = os.lstat(os.path.join(folder, name))
            inner = os.path.relpath(os.path.join(folder, name), path)
            digest.update(os.fsencode(f"{inner} {state.st_size} {state.st_mtime_ns}\n"))
    return digest.hexdigest()


def read_files(
    source: str, extension: str, revision: str = "", under: str = "", work: Path | None = None
) -> list[ScrapedDocument | tuple[str, Drop]]:
    """Return the files with this extension as documents, by path; a file that is no text as (path, Drop).

    Args:
        source: A source as above.
        extension: Ending of the names, as in `.kt`.
        revision: A branch, tag or commit of a git repository.
        under: Read only paths that begin with this.
        work: Folder in which a clone is stored, so that it is fetched once; by default nothing stays.

    Raises:
        ValueError: The source cannot be read, or has no file of that language.
    """
    check_source(source, extension, revision)
    if source.endswith(ROWS):
        rows = read_documents(DataConfig(source=source))
        found = [
            ScrapedDocument(row.text, "", row.name, "", "") for row in rows if row.name.endswith(extension)
        ]
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            if work is not None and "://" in source:  # Each source has a ledger in a folder of its own.
                folder = work / hashlib.sha256(f"{source} {revision}".encode()).hexdigest()[:12]
            found = _scraped(source, extension, revision, str(folder))
    found = [one for one in found if _path(one).startswith(under)]
    if not any(isinstance(one, ScrapedDocument) for one in found):
        place = f"{source} below {under}" if under else source
        raise ValueError(f"{place} holds no {extension} file that can be read; name another --source")
    return sorted(found, key=_path)


def _path(one: ScrapedDocument | tuple[str, Drop]) -> str:
    return one.path if isinstance(one, ScrapedDocument) else one[0]


def _scraped(
    source: str, extension: str, revision: str, folder: str
) -> list[ScrapedDocument | tuple[str, Drop]]:
    from scraping import clone, local
    from scraping.source import NothingStored, open_ledger

    wanted = {"folder": folder, "extensions": (extension,), "min_bytes": 0, "max_bytes": MOST_BYTES}
    said = io.StringIO()
    # What they count is counted again by the recipe, and what they lack is said in its own flags.
    with contextlib.redirect_stdout(said), contextlib.suppress(NothingStored):
        if "://" in source:
            clone.run(
                clone.CloneSettings(url=source, revision=revision or clone.CloneSettings.revision, **wanted)
            )
        else:
            local.run(local.LocalSettings(path=source, **wanted))
    ledger = open_ledger(folder)
    decoded = encoding.build(latin1=False, line_ends="lf", note=lambda what: None)
    try:
        texts = [(file.path, decoded(file)) for file in ledger.files()]
    finally:
        ledger.close()
    return [(path, text) if isinstance(text, Drop) else text for path, text in texts]
