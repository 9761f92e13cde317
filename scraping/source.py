"""What every source does with the files it found: they are listed in the ledger, and then stored or dropped.

A command lists first and stores after. What is killed in between goes on with the files that wait, and what
is finished changes nothing when it is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from scraping.ledger import Ledger, ListedFile
from scraping.stages.licences import PERMISSIVE, allowed
from scraping.status import status_lines
from scraping.wanted import Wanted, data_reason

BATCH_BYTES = 2**23  # stored in one transaction
BATCH_FILES = 500


@dataclass(frozen=True)
class Selection:
    """Settings that the commands which read files share.

    Args:
        folder: Of the corpus: its ledger is `folder/ledger.sqlite`.
        extensions: How a wanted file's name ends, as in .py,.kt
        min_bytes: The least size of a wanted file.
        max_bytes: The greatest.
    """

    folder: str = "corpus"
    extensions: tuple[str, ...] = Wanted.extensions
    min_bytes: int = Wanted.min_bytes
    max_bytes: int = Wanted.max_bytes

    def wanted(self) -> Wanted:
        return Wanted(tuple(self.extensions), self.min_bytes, self.max_bytes)


@dataclass(frozen=True)
class Origin:
    """A repository as a command was asked for it.

    Args:
        name: `owner/name`, or the name of a folder, site or package.
        kind: The command.
        revision: As it was asked for.
        licence: SPDX expression; "" is unknown.

    Raises:
        ValueError: the licence is none of SPDX's. Told here, since the ledger would keep it.
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
    """(state, pinned commit) of a repository in the ledger; ("", "") if it is not there.

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
    """Whether nothing is left to do for a repository in this state; says so."""
    if state in ("done", "dropped"):
        print(f"{ledger.path} holds {name} already; it stays as it is")
        return True
    return False


def list_files(ledger: Ledger, origin: Origin, pinned: str, entries: Iterable[ListedFile]) -> None:
    """Write a repository and its files into the ledger."""
    entries = list(entries)  # before anything is written: the source may still turn out broken
    ledger.found(origin.name, origin.kind, origin.revision, origin.licence)
    ledger.listed(origin.name, pinned, entries)


def store_files(
    ledger: Ledger, name: str, read: Callable[[list[ListedFile]], Iterator[tuple[ListedFile, bytes | str]]]
) -> None:
    """Store the files of a repository that wait, or drop them; then it is done.

    Args:
        read: Of files that wait: each with its bytes or the reason why there are none. One that it leaves out
            is dropped as gone.
    """
    from tqdm import tqdm

    waiting = {entry.path: entry for entry in ledger.waiting(name)}
    batch: list[tuple[str, bytes]] = []
    size = 0
    with tqdm(total=len(waiting), desc=name, unit=" files", disable=None) as bar:
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
    """A source gave no file; the ledger has what was found of it, and why it was left out."""


def report(ledger: Ledger, name: str) -> None:
    """Print what the ledger knows, and close it; NothingStored if the repository `name` gave no file."""
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
