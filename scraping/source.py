"""The steps that all sources share: files are listed in the ledger, and then stored or dropped.

A command that was killed between the two steps goes on with the files that wait, and a command that has
finished changes nothing when it is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from scraping.ledger import Ledger, ListedFile
from scraping.stages.licences import PERMISSIVE, allowed
from scraping.status import status_lines
from scraping.wanted import Wanted, data_reason

BATCH_BYTES = 2**23  # Files of about this size are stored in one transaction.
BATCH_FILES = 500


@dataclass(frozen=True)
class Selection:
    """Settings that the commands which read files share.

    Args:
        folder: The corpus's folder: its ledger is `folder/ledger.sqlite`.
        extensions: Endings of the names of wanted files, as in .py,.kt
        min_bytes: Least size of a wanted file.
        max_bytes: Greatest size of a wanted file.
    """

    folder: str = "corpus"
    extensions: tuple[str, ...] = Wanted.extensions
    min_bytes: int = Wanted.min_bytes
    max_bytes: int = Wanted.max_bytes

    def wanted(self) -> Wanted:
        return Wanted(tuple(self.extensions), self.min_bytes, self.max_bytes)


@dataclass(frozen=True)
class Origin:
    """A repository as the user of a command named it.

    Args:
        name: `owner/name`, or the name of a folder, site or package.
        kind: Name of the command.
        revision: The requested revision.
        licence: SPDX expression; "" is unknown.

    Raises:
        ValueError: the licence is none of SPDX's; it is refused before the ledger could record it.
    """

    name: str
    kind: str
    revision: str
    licence: str

    def __post_init__(self) -> None:
        if self.licence and allowed(self.licence, frozenset(map(str.lower, PERMISSIVE))) is None:
            raise ValueError(
                f"--licence is {self.licence}, which is no SPDX expression such as Apache-2.0 or MIT OR"
                " Apache-2.0 (https://spdx.org/licenses); leave it out if it is not known"
            )


def open_ledger(folder: str) -> Ledger:
    return Ledger(Path(folder) / "ledger.sqlite")


def known(ledger: Ledger, origin: Origin) -> tuple[str, str]:
    """Return (state, pinned commit) of a repository in the ledger; ("", "") if it is not there.

    Raises:
        ValueError: it is there from another source, or at another revision.
    """
    with ledger.transaction() as db:
        row = db.execute(
            "SELECT state, pinned, origin, revision, licence FROM repositories WHERE name = ?", (origin.name,)
        ).fetchone()
    if row is None:
        return "", ""
    state, pinned, *was = row
    if was != [origin.kind, origin.revision, origin.licence]:
        said = ", ".join(value or "none" for value in was)
        raise ValueError(
            f"{ledger.path} holds {origin.name} by other settings (command, revision, licence: {said}); take"
            " another --folder, or another --repository to have both"
        )
    return state, pinned


def finished(ledger: Ledger, name: str, state: str) -> bool:
    """Return whether nothing is left to do for a repository in this state, and print so."""
    if state in ("done", "dropped"):
        print(f"{ledger.path} holds {name} already; it stays as it is")
        return True
    return False


def list_files(ledger: Ledger, origin: Origin, pinned: str, entries: Iterable[ListedFile]) -> None:
    """Write a repository and its files into the ledger."""
    entries = list(entries)  # the source may turn out broken, so all of it is read before anything is written
    ledger.found(origin.name, origin.kind, origin.revision, origin.licence)
    ledger.listed(origin.name, pinned, entries)


def store_files(
    ledger: Ledger, name: str, read: Callable[[list[ListedFile]], Iterator[tuple[ListedFile, bytes | str]]]
) -> None:
    """Store or drop the files of a repository that wait, and mark the repository done.

    Args:
        read: Yields each waiting file with its bytes, or with the reason why there are none. A file that it
            leaves out is dropped as gone.
    """
    from config.bars import progress_bar

    waiting = {entry.path: entry for entry in ledger.waiting(name)}
    batch: list[tuple[str, bytes]] = []
    size = 0
    with progress_bar(total=len(waiting), desc=name, unit=" files") as bar:
        for entry, data in read(list(waiting.values())):
            del waiting[entry.path]
            bar.update()
            reason = data if isinstance(data, str) else data_reason(data)
            if reason or isinstance(data, str):
                ledger.dropped(name, entry.path, reason)
                continue
            batch.append((entry.path, data))
            size += len(data)
            if size >= BATCH_BYTES or len(batch) >= BATCH_FILES:
                ledger.stored(name, batch)
                batch, size = [], 0
        ledger.stored(name, batch)
        for path in waiting:
            ledger.dropped(name, path, "gone since it was listed")
    ledger.done(name)


class NothingStored(ValueError):
    """Failure of a source that gave no file; the ledger has the files that were found, with their reasons."""


def report(ledger: Ledger, name: str) -> None:
    """Print the ledger's counts, and close it; raise NothingStored if the repository `name` gave no file."""
    print("\n".join(status_lines(ledger)))
    rows = ledger.rows(
        "SELECT state, reason, count(*) FROM files WHERE repository = ? GROUP BY 1, 2 ORDER BY 3 DESC", name
    )
    ledger.close()
    if not any(state == "stored" for state, _, _ in rows):
        why = ", ".join(f"{count:,} {reason or state}" for state, reason, count in rows)
        raise NothingStored(
            f"{name} gave no file, and {f'of those found there are {why}' if why else 'none was found'}; "
            "ask for others with --extensions, --min_bytes or --max_bytes, with another --folder or "
            "--repository, since this ledger keeps what it found; or name another source"
        )
