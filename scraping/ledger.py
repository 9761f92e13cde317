"""The ledger: every repository and file that was found, its state, its bytes, and why it was dropped.

One SQLite file in WAL mode. A file's bytes and its state change in one transaction, so that a kill at any
instant leaves nothing counted twice and nothing lost:

    found -> stored | dropped (with a reason)          a file
    found -> listed -> done | dropped (with a reason)  a repository

`found == stored + dropped + waiting` is true at all times, and `counts` shows it. `claimed_ledger` keeps a
second crawl out of the same file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import sqlite3
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
CREATE TABLE IF NOT EXISTS hosted (  -- repositories of a crawl, as the server knows them
    id INTEGER PRIMARY KEY,          -- stays when a repository is renamed
    name TEXT NOT NULL UNIQUE REFERENCES repositories(name),
    branch TEXT NOT NULL,
    clone_url TEXT NOT NULL,
    bytes INTEGER NOT NULL DEFAULT 0, -- of all files at the pinned commit, wanted or not
    others INTEGER NOT NULL DEFAULT 0 -- files there of other extensions, which are counted and not listed
) STRICT;
CREATE TABLE IF NOT EXISTS searches ( -- slices of a crawl's search; both ends of a range are in it
    created_from INTEGER NOT NULL,    -- seconds since 1970
    created_to INTEGER NOT NULL,
    stars_from INTEGER NOT NULL,
    stars_to INTEGER NOT NULL,        -- -1: no end
    state TEXT NOT NULL DEFAULT 'found', -- then split or done
    reason TEXT NOT NULL DEFAULT '',  -- why results may be missing
    PRIMARY KEY (created_from, created_to, stars_from, stars_to)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS crawl (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT; -- settings it began with
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, etag TEXT NOT NULL, body BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS limits (name TEXT PRIMARY KEY, until REAL NOT NULL) STRICT; -- no request before
"""


def fingerprint_line(name: str, path: str, pinned: str, licence: str, sha256: str) -> bytes:
    """Return the line that a stored file adds to the fingerprint of a shard's input."""
    return json.dumps([name, path, pinned, licence, sha256]).encode() + b"\n"


@dataclass(frozen=True)
class ListedFile:
    """A file that a repository lists; with a `reason`, it is dropped before it is fetched."""

    path: str
    address: str
    size: int
    reason: str = ""


class Ledger:
    """The ledger of a corpus: one object for all threads of a process; several processes may read it.

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
            is_other = type(error) is sqlite3.DatabaseError  # Cut, overwritten, or another kind of file.
            remedy = "; restore it from a copy, or fetch again into another --folder" if is_other else ""
            raise ValueError(f"{path} cannot be used as a ledger: {error}{remedy}") from error

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Write all that the block writes, or nothing of it; an inner transaction is part of the outer one.

        Raises:
            ValueError: the disk is full, or refuses.
        """
        with self._lock:
            if self._db.in_transaction:
                yield self._db
                return
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):  # such as a full disk
                    raise ValueError(f"{self.path} cannot be written: {error}") from error
                if type(error) is sqlite3.DatabaseError:
                    raise self._damaged(str(error)) from error
                raise

    def _damaged(self, what: str) -> ValueError:
        return ValueError(
            f"the ledger {self.path} is damaged ({what}); restore it from a copy, or fetch again into another"
            " --folder"
        )

    def _read(self, query: str, *values: Any) -> Iterator[Any]:
        """Yield the rows of a query; raise a ValueError where the file is damaged."""
        try:
            # `map` keeps the cursor from being closed with this generator, perhaps after its database was.
            yield from map(tuple, self._db.execute(query, values))
        except sqlite3.OperationalError as error:
            raise ValueError(f"{self.path} cannot be read: {error}") from error
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.ProgrammingError):
                raise
            raise self._damaged(str(error)) from error

    def _unpacked(self, sha256: str, data: bytes | None, what: str) -> bytes:
        """Return the bytes of a file; raise a ValueError where they are not those that were stored."""
        try:
            found = zlib.decompress(data or b"")
        except zlib.error as error:
            raise self._damaged(f"the bytes of {what} cannot be unpacked: {error}") from error
        if hashlib.sha256(found).hexdigest() != sha256:
            raise self._damaged(f"the bytes of {what} have another SHA-256 than {sha256[:12]}")
        return found

    # --- what sources write ---

    def found(self, name: str, origin: str, revision: str, licence: str) -> None:
        """Enter a repository; one that is known already stays as it is."""
        with self.transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO repositories (name, origin, revision, licence) VALUES (?, ?, ?, ?)",
                (name, origin, revision, licence),
            )

    def listed(self, name: str, pinned: str, entries: Iterable[ListedFile]) -> None:
        """Enter the files of a repository at the commit `pinned`, all at once."""
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
        """Store the bytes of files (path, data) that were waiting."""
        with self.transaction() as db:
            for path, data in files:
                sha256 = hashlib.sha256(data).hexdigest()
                db.execute("INSERT OR IGNORE INTO contents VALUES (?, ?)", (sha256, zlib.compress(data, 1)))
                db.execute(
                    "UPDATE files SET state = 'stored', sha256 = ? WHERE repository = ? AND path = ?",
                    (sha256, name, path),
                )

    def dropped(self, name: str, path: str, reason: str) -> None:
        """Drop a file for a reason."""
        with self.transaction() as db:
            db.execute(
                "UPDATE files SET state = 'dropped', reason = ? WHERE repository = ? AND path = ?",
                (reason, name, path),
            )

    def done(self, name: str, reason: str = "") -> None:
        """Finish a repository, none of whose files is `found` any more; with a reason, drop it whole."""
        with self.transaction() as db:
            state = "dropped" if reason else "done"
            db.execute("UPDATE repositories SET state = ?, reason = ? WHERE name = ?", (state, reason, name))

    def removed(self, name: str, reason: str) -> None:
        """Remove a repository that may not be kept: drop its files, and delete bytes that no other file has.

        The bytes are overwritten on the disk too, as far as SQLite can.
        """
        with self._lock:
            self._db.execute("PRAGMA secure_delete=ON")
            with self.transaction() as db:
                rows = db.execute(
                    "SELECT DISTINCT sha256 FROM files WHERE repository = ? AND state = 'stored'", (name,)
                ).fetchall()
                db.execute(
                    "UPDATE files SET state = 'dropped', reason = ?, sha256 = NULL"
                    " WHERE repository = ? AND state != 'dropped'",
                    (reason, name),
                )
                db.executemany(
                    "DELETE FROM contents WHERE sha256 = ?1"
                    " AND NOT EXISTS (SELECT 1 FROM files WHERE sha256 = ?1)",
                    rows,
                )
                self.done(name, reason)
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    # --- what a client of a server keeps ---

    def remember(self, key: str, etag: str, body: bytes) -> None:
        """Store an answer, with the tag by which the server tells whether it has changed."""
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", (key, etag, zlib.compress(body, 1)))

    def recall(self, key: str) -> tuple[str, bytes] | None:
        """Return the (tag, body) of an answer; None where it is damaged, since it can be requested again."""
        rows = self.rows("SELECT etag, body FROM answers WHERE key = ?", key)
        with contextlib.suppress(zlib.error):
            return (rows[0][0], zlib.decompress(rows[0][1])) if rows else None
        return None

    def forget(self, prefix: str) -> None:
        """Delete the answers whose key begins with `prefix`."""
        with self.transaction() as db:
            db.execute("DELETE FROM answers WHERE key >= ? AND key < ?", (prefix, prefix + "\U0010ffff"))

    def limited(self, name: str, until: float) -> None:
        """Store the time before which no request of a kind may go out, so that it outlives the process."""
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO limits VALUES (?, ?)", (name, until))

    def limits(self) -> dict[str, float]:
        """Return the last time that `limited` stored for each kind of request."""
        return dict(self.rows("SELECT name, until FROM limits"))

    # --- what the rest reads ---

    def rows(self, query: str, *values: Any) -> list[Any]:
        """Return all rows of a query, which sees another thread's transaction whole or not at all."""
        with self._lock:
            return list(self._read(query, *values))

    def waiting(self, name: str) -> list[ListedFile]:
        """Return the files of a repository that are neither stored nor dropped, by path."""
        rows = self.rows(
            "SELECT path, address, size FROM files WHERE repository = ? AND state = 'found' ORDER BY path",
            name,
        )
        return [ListedFile(*row) for row in rows]

    def by_address(self, address: str) -> bytes | None:
        """Return the bytes of any stored file with this address; None if there is none."""
        rows = self.rows(
            "SELECT path, sha256, data FROM files JOIN contents USING (sha256)"
            " WHERE address = ? AND state = 'stored' LIMIT 1",
            address,
        )
        return self._unpacked(rows[0][1], rows[0][2], repr(rows[0][0])) if rows else None

    def files(self, shard: tuple[int, int] = (0, 1)) -> Iterator[RawFile]:
        """Yield the stored files of shard `i` of `n`, in the order of repository and path.

        Raises:
            ValueError: the bytes of one are not those that were stored.
        """
        for name, pinned, licence in self._repositories(shard):
            rows = self._read(
                "SELECT path, files.sha256, data FROM files LEFT JOIN contents USING (sha256)"
                " WHERE repository = ? AND state = 'stored' ORDER BY path",
                name,
            )
            for path, sha256, data in rows:
                yield RawFile(
                    name, path, pinned, licence, self._unpacked(sha256, data, f"{path!r} of {name!r}")
                )

    def outline(self, shard: tuple[int, int] = (0, 1)) -> tuple[int, str]:
        """Return the number of files of `files(shard)`, and a SHA-256 of their `fingerprint_line`s."""
        fingerprint = hashlib.sha256()
        count = 0
        for name, pinned, licence in self._repositories(shard):
            rows = self._read(
                "SELECT path, sha256 FROM files WHERE repository = ? AND state = 'stored' ORDER BY path", name
            )
            for path, sha256 in rows:
                fingerprint.update(fingerprint_line(name, path, pinned, licence, sha256))
                count += 1
        return count, fingerprint.hexdigest()

    def not_stored(self, shard: tuple[int, int] = (0, 1)) -> dict[str, int]:
        """Return the number of a shard's files that were found but not stored, by reason."""
        counts: Counter[str] = Counter()
        for name, _, _ in self._repositories(shard):
            query = "SELECT iif(state = 'found', 'not fetched yet', reason) AS why, count(*) FROM files"
            query += " WHERE repository = ? AND state != 'stored' GROUP BY why"
            counts.update(dict(self._read(query, name)))
            rows = self._read("SELECT others FROM hosted WHERE name = ? AND others > 0", name)
            for (others,) in rows:
                counts["other extension"] += others
        return dict(sorted(counts.items()))

    def _repositories(self, shard: tuple[int, int]) -> list[tuple[str, str, str]]:
        """Return (name, pinned, licence) of a shard's repositories, by name; the name's hash is the shard."""
        number, shards = shard
        rows = list(self._read("SELECT name, pinned, licence FROM repositories ORDER BY name"))
        return [
            row for row in rows if int(hashlib.sha256(row[0].encode()).hexdigest(), 16) % shards == number
        ]

    def counts(self, table: str = "files") -> dict[tuple[str, str], int]:
        """Return the number of files, repositories or searches by (state, reason); the sum is all found."""
        assert table in ("files", "repositories", "searches")
        rows = self.rows(f"SELECT state, reason, count(*) FROM {table} GROUP BY 1, 2 ORDER BY 1, 2")
        return {(state, reason): count for state, reason, count in rows}

    def manifest(self) -> Iterator[str]:
        """Yield a line of JSON for every repository, followed by those of its files, in order of their names.

        The lines record what was found and its state, and nothing of when and in which order it was found.
        """
        names = self.rows("SELECT name, pinned, licence, state, reason FROM repositories ORDER BY name")
        for name, pinned, licence, state, reason in names:
            yield _line(repository=name, pinned=pinned, licence=licence, state=state, reason=reason)
            rows = self._read(
                "SELECT path, address, sha256, state, reason FROM files WHERE repository = ? ORDER BY path",
                name,
            )
            for path, address, sha256, state, reason in rows:
                yield _line(
                    repository=name,
                    path=path,
                    pinned=pinned,
                    address=address,
                    sha256=sha256,
                    state=state,
                    reason=reason,
                )


def _line(**values: str | None) -> str:
    return json.dumps(values, ensure_ascii=False)


@contextmanager
def claimed_ledger(folder: Path) -> Iterator[Ledger]:
    """Open the ledger of a corpus folder for this process alone. The kernel frees the lock after a kill.

    Raises:
        ValueError: another process has the lock, or the folder cannot be used.
    """
    ledger = Ledger(folder / "ledger.sqlite")
    try:
        # The file stays: if it were removed, two processes could hold locks on two files of one name.
        with open(folder / "ledger.lock", "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another crawl is under way in {folder}; wait for it, or name another --folder"
                ) from None
            yield ledger
    finally:
        ledger.close()
