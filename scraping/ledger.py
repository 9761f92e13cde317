"""The ledger: every repository and file that was found, its state, its bytes, and why it was dropped.

One SQLite file in WAL mode. A file's bytes and its state change in one transaction, so that a kill at any
instant leaves nothing counted twice and nothing lost:

    found -> stored | dropped (with a reason)          a file
    found -> listed -> done | dropped (with a reason)  a repository

`found == stored + dropped + waiting` holds at all times, and `counts` shows it.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scraping.documents import RawFile

SCHEMA = """
CREATE TABLE IF NOT EXISTS repositories (
    name TEXT PRIMARY KEY,
    origin TEXT NOT NULL,            -- the source's kind: crawl, clone, local, site, stdlib
    revision TEXT NOT NULL,          -- as it was asked for: a branch, a tag, a commit, a version
    pinned TEXT NOT NULL DEFAULT '', -- the commit that it was read at
    licence TEXT NOT NULL,           -- SPDX expression, '' is unknown
    state TEXT NOT NULL DEFAULT 'found',
    reason TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE IF NOT EXISTS files (
    repository TEXT NOT NULL REFERENCES repositories(name),
    path TEXT NOT NULL,
    address TEXT NOT NULL,           -- what names its bytes at the source: a git blob's id, as a rule
    size INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'found',
    reason TEXT NOT NULL DEFAULT '',
    sha256 TEXT REFERENCES contents(sha256),
    PRIMARY KEY (repository, path)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS contents (sha256 TEXT PRIMARY KEY, data BLOB NOT NULL) STRICT;
CREATE INDEX IF NOT EXISTS files_by_address ON files (address);
CREATE INDEX IF NOT EXISTS files_by_content ON files (sha256);
"""


@dataclass(frozen=True)
class Entry:
    """A file that a repository lists. `reason`, if there is one, drops it before it is fetched."""

    path: str
    address: str
    size: int
    reason: str = ""


class Ledger:
    """See the module. One object for all threads of a process; several processes may read.

    Raises:
        ValueError: the file is not a ledger, or the disk refuses it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=60)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("PRAGMA foreign_keys=ON")
            self._db.executescript(SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise ValueError(f"{path} cannot be used as a ledger: {error}") from error

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of what is written inside, or nothing of it."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    # --- what sources write ---

    def found(self, name: str, origin: str, revision: str, licence: str) -> None:
        """A repository is known; one that already is stays as it is."""
        with self.transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO repositories (name, origin, revision, licence) VALUES (?, ?, ?, ?)",
                (name, origin, revision, licence),
            )

    def listed(self, name: str, pinned: str, entries: Iterable[Entry]) -> None:
        """The files of a repository at the commit `pinned`, all at once."""
        with self.transaction() as db:
            db.executemany(
                "INSERT INTO files (repository, path, address, size, state, reason)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (
                    (name, e.path, e.address, e.size, "dropped" if e.reason else "found", e.reason)
                    for e in entries
                ),
            )
            db.execute("UPDATE repositories SET state = 'listed', pinned = ? WHERE name = ?", (pinned, name))

    def stored(self, name: str, files: Iterable[tuple[str, bytes]]) -> None:
        """Bytes of files (path, data) that were waiting."""
        with self.transaction() as db:
            for path, data in files:
                sha256 = hashlib.sha256(data).hexdigest()
                db.execute("INSERT OR IGNORE INTO contents VALUES (?, ?)", (sha256, zlib.compress(data, 1)))
                db.execute(
                    "UPDATE files SET state = 'stored', sha256 = ? WHERE repository = ? AND path = ?",
                    (sha256, name, path),
                )

    def dropped(self, name: str, path: str, reason: str) -> None:
        """A file goes, with its reason."""
        with self.transaction() as db:
            db.execute(
                "UPDATE files SET state = 'dropped', reason = ? WHERE repository = ? AND path = ?",
                (reason, name, path),
            )

    def done(self, name: str, reason: str = "") -> None:
        """A repository is finished: no file is `found` any more; or, with a reason, dropped whole."""
        with self.transaction() as db:
            state = "dropped" if reason else "done"
            db.execute("UPDATE repositories SET state = ?, reason = ? WHERE name = ?", (state, reason, name))

    # --- what the rest reads ---

    def waiting(self, name: str) -> list[Entry]:
        """Files of a repository that are neither stored nor dropped, by path."""
        rows = self._db.execute(
            "SELECT path, address, size FROM files WHERE repository = ? AND state = 'found' ORDER BY path",
            (name,),
        )
        return [Entry(*row) for row in rows]

    def files(self, shard: tuple[int, int] = (0, 1)) -> Iterator[RawFile]:
        """Stored files by repository and path: those of shard `i` of `n`, by the repository's hash."""
        number, shards = shard
        names = self._db.execute("SELECT name, pinned, licence FROM repositories ORDER BY name").fetchall()
        for name, pinned, licence in names:
            if int(hashlib.sha256(name.encode()).hexdigest(), 16) % shards != number:
                continue
            rows = self._db.execute(
                "SELECT path, data FROM files JOIN contents USING (sha256)"
                " WHERE repository = ? AND state = 'stored' ORDER BY path",
                (name,),
            )
            for path, data in rows:
                yield RawFile(name, path, pinned, licence, zlib.decompress(data))

    def counts(self, table: str = "files") -> dict[tuple[str, str], int]:
        """(state, reason) -> how many, of `files` or `repositories`; they add up to what was found."""
        assert table in ("files", "repositories")
        rows = self._db.execute(f"SELECT state, reason, count(*) FROM {table} GROUP BY 1, 2 ORDER BY 1, 2")
        return {(state, reason): count for state, reason, count in rows}
