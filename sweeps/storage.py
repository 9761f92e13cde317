"""The storage of a study: a journal file by default, any Optuna URL, or its gRPC proxy.

The journal has Optuna's own format, so that its tools open it. Optuna's locks for it are files: one that a
killed process leaves behind stops everybody for 30 s, and half a line at the journal's end can never be read
past. Here the lock is the kernel's, and half a line, as a full disk leaves, is cut off before the next write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote_plus

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

JOURNAL = "journal.log"
KINDS = "journal:FILE, sqlite:///FILE, postgresql://..., mysql://... or grpc://HOST:PORT"
# The package that a database needs, and the beginning of a URL that names it.
DRIVERS = {
    "postgresql": ("psycopg2-binary", "postgresql+psycopg2://"),
    "mysql": ("pymysql", "mysql+pymysql://"),
    "mariadb": ("pymysql", "mariadb+pymysql://"),
}
DATABASES = ("sqlite", "postgresql", "mysql", "mariadb", "oracle", "mssql", "cockroachdb")
# An address that cannot be parsed is not shown at all: any part may be a password.
UNPARSED = "that --storage names"
# Kinds and names of options reveal nothing of a password, and drivers use them in their messages.
KNOWN_WORDS = frozenset(
    ("password", "passwd", "sslpassword", "user", "host", "port", "database", "sqlite3", *DATABASES)
)
WORD = r"[^\W_]+"
LONG_WORD = 4  # Characters from which on a word of an address is hidden inside other words too.
CONNECT_SECONDS = 10
TABLES_SECONDS = 120.0  # Seconds that commands which begin at once may take together to make the tables.
FULL = re.compile(f"{os.strerror(errno.ENOSPC)}|{os.strerror(errno.EDQUOT)}|disk is full", re.IGNORECASE)
PATIENCE_SECONDS = 300.0  # Seconds for which a worker tries again to reach a storage that is down.
GRPC = re.compile(r"grpc://([\w.-]+|\[[\da-fA-F:.]+\])(?::(\d{1,5}))?/?")
MADE_BY_ANOTHER = re.compile("already exists|unique|duplicate", re.IGNORECASE)  # SQLite, PostgreSQL, MySQL
T = TypeVar("T")


class Journal(JournalFileBackend):
    """Optuna's journal file, in which a line is whole or absent."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        super().__init__(str(path))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write lines and flush them to the disk; what a kill left of a line, or a full disk, is cut off."""
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with (
            open(self.path.with_name(f".{self.path.name}.lock"), "a", encoding="utf-8") as lock,
            open(self.path, "r+b", buffering=0) as file,
        ):
            fcntl.flock(lock, fcntl.LOCK_EX)
            end = _end_of_last_line(file)
            file.truncate(end)
            file.seek(end)
            try:
                if file.write(text) != len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise


def _end_of_last_line(file: Any) -> int:
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        at = file.read(end - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def open_storage(url: str, folder: Path) -> BaseStorage:
    """Open the storage of a URL; without one the journal in the study's folder.

    Raises:
        ValueError: The kind of storage is unknown, or it cannot be reached.
    """
    import sqlalchemy.exc

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Optuna warns that parts of it may change. SQLAlchemy warns of unknown options of an address and quotes
    # them: they may be passwords.
    for kind in (ExperimentalWarning, FutureWarning, sqlalchemy.exc.SAWarning):
        warnings.filterwarnings("ignore", category=kind, module="optuna|sweeps")
    if url and "://" not in url and not url.startswith("journal:"):
        raise ValueError(f"--storage is no URL; write {KINDS}")
    if url.startswith("journal:") and "://" in url.removeprefix("journal://"):
        raise ValueError(f"what stands after journal: in --storage is a URL and no file; write {KINDS}")
    if re.fullmatch(r"sqlite(\+\w+)?://(/|/:memory:)?(\?.*)?", url):
        raise ValueError(
            "--storage sqlite:// is kept in the memory of one process, and every worker is one; write "
            "sqlite:///FILE"
        )
    name = shown(url, folder)
    with told(url, folder):
        try:
            return _opened(url, folder)
        except ImportError as error:
            lacking = getattr(error.__cause__, "name", None) or _first_line(error, url)
            raise ValueError(
                f"the storage {name} cannot be opened: its driver {lacking} is not installed; "
                f"{_driver_advice(url, lacking)}"
            ) from None
        except sqlalchemy.exc.NoSuchModuleError:
            raise ValueError(
                f"the storage {name} cannot be opened (no kind of storage is called what stands before ://); "
                f"write {KINDS}"
            ) from None
        except (ValueError, AssertionError, LookupError, TypeError, sqlalchemy.exc.ArgumentError) as error:
            reason, advice = _first_line(error, url), "name another"  # Usually the file is no journal.
            if name == UNPARSED and not url.startswith("journal:"):
                reason = (
                    "it is no address with a host and a database, or a sign of its password is not encoded"
                )
                advice = f"write {KINDS}, and / : @ ? of a password as %2F %3A %40 %3F"
            raise ValueError(f"the storage {name} cannot be opened ({reason}); {advice}") from None


def _driver_advice(url: str, lacking: str) -> str:
    package, begins = DRIVERS.get(re.split(r"\+|://", url)[0], (lacking, ""))
    if url.startswith(begins):
        return f"install it: pip install {package}"
    return f"pip install {package}, and let the URL begin with {begins}"


def _opened(url: str, folder: Path) -> BaseStorage:
    if not url or url.startswith("journal:"):
        path = Path(url.removeprefix("journal:").removeprefix("//")) if url else folder / JOURNAL
        return JournalStorage(Journal(path))
    if url.startswith("grpc://"):
        from optuna.storages import GrpcStorageProxy

        found = GRPC.fullmatch(url)
        if found is None:
            raise ValueError("it is none of the form grpc://HOST:PORT with a number as its port")
        proxy = GrpcStorageProxy(host=found[1], port=int(found[2] or 13000))
        proxy.wait_server_ready(timeout=CONNECT_SECONDS)
        return proxy
    # By default SQLite waits 5 s for its lock, and many workers together may need longer.
    options = {"connect_args": {"timeout": 120}} if url.startswith("sqlite") else {}
    give_up = time.monotonic() + TABLES_SECONDS
    while True:
        try:
            return optuna.storages.get_storage(RDBStorage(url, engine_kwargs=options))
        except failures() as error:
            # Commands that begin at once all make the tables, and the second one fails where a table exists.
            # That may happen at each table in turn, so the time is bounded and not the number of tries.
            if time.monotonic() > give_up or not MADE_BY_ANOTHER.search(str(error)):
                raise
        time.sleep(0.05 * random.random())  # Two commands that met once then do not meet at the next table.


def shown(url: str, folder: Path) -> str:
    """Return the name of a storage in messages: kind, host and database of an address that could be parsed.

    User, password, port and options are left out, as one may stand where another was meant to. An address
    whose parts are in doubt, by an @ too many, counts as one that could not be parsed.
    """
    import sqlalchemy.exc
    from sqlalchemy.engine import make_url

    if not url:
        return str(folder / JOURNAL)
    if url.startswith("journal:"):
        return UNPARSED if re.search("@|://|\\?", url.removeprefix("journal://")) else url
    if url.startswith("grpc://"):
        return url if GRPC.fullmatch(url) else UNPARSED
    try:
        parsed = make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return UNPARSED
    kind, host, database = parsed.drivername.split("+")[0], parsed.host or "", parsed.database or ""
    # SQLAlchemy takes an @ behind a / or ? for the end of a password, wherever the writer meant it to end.
    in_doubt = not re.fullmatch(r"[^@/?#]*@?[^@/?#]*([/?][^@]*)?", url.partition("://")[2])
    in_doubt |= not re.fullmatch(r"[\w.,%:-]*", host)
    # A database with other characters is part of a password, or of a user's name with a slash in it.
    plain = r"[^@?#;&=]*" if kind == "sqlite" else r"[\w.$-]*"
    if kind not in DATABASES or in_doubt or not re.fullmatch(plain, database):
        return UNPARSED
    host = f"[{host}]" if ":" in host else host
    return f"{kind}://{host}" + (f"/{database}" if database else "")


def _scrubbed(text: str, url: str) -> str:
    """Return a message of a parser or driver without the parts of the address that `shown` leaves out."""
    name = shown(url, Path())
    if url:
        text = text.replace(url, name)
    text = re.sub(r"\S+://\S+", lambda word: name if word[0] == name else "***", text)
    hidden = (_words(url) | _words(unquote_plus(url))) - _words(name) - KNOWN_WORDS
    long = [word for word in hidden if len(word) >= LONG_WORD]

    def word_or_stars(found: re.Match[str]) -> str:
        word = found[0].lower()
        inside = len(word) >= LONG_WORD and any(word in other or other in word for other in long)
        return "***" if word not in KNOWN_WORDS and (word in hidden or inside) else found[0]

    return re.sub(WORD, word_or_stars, text)


def _words(text: str) -> set[str]:
    return {word.lower() for word in re.findall(WORD, text)}


def failures() -> tuple[type[BaseException], ...]:
    """Return the errors that a storage raises when it is down or full."""
    import grpc
    import sqlalchemy.exc

    return (StorageInternalError, sqlalchemy.exc.SQLAlchemyError, grpc.RpcError, OSError)


@contextlib.contextmanager
def told(url: str, folder: Path) -> Iterator[None]:
    """Turn the error of a storage or disk that is down or full into a ValueError of one sentence."""
    try:
        yield
    except Exception as error:  # A Ctrl-C passes: it may have cut off the imports of `failures`.
        if not isinstance(error, failures()):
            raise
        what = f"the storage {shown(url, folder)} cannot be used ({_first_line(error, url)})"
        again, other = "start the same command again when it is back", ", or name another --storage"
        # An OSError without a number has a sentence of its own, as that of a checkpoint. A proxy that is down
        # raises another type.
        if type(error) is OSError and error.errno is None:
            what, other = _first_line(error, url).split(";")[0], ""
        elif isinstance(error, OSError) and error.filename is not None:
            what = f"{_scrubbed(str(error.filename), url)} cannot be used ({_first_line(error, url)})"
        if FULL.search(str(error)):
            again = "free some space and start the same command again"
        raise ValueError(f"{what}; the study is as it was: {again}{other}") from None


def _first_line(error: BaseException, url: str) -> str:
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
    details = getattr(cause, "details", None)
    text = str(details() if callable(details) else cause).strip() or type(cause).__name__
    return _scrubbed(text.splitlines()[0], url)


def patiently(call: Callable[[], T], seconds: float = PATIENCE_SECONDS) -> T:
    """Return what `call` returns; try again at growing intervals while the storage is down."""
    give_up, pause = time.monotonic() + seconds, 0.5
    down = failures()
    while True:
        try:
            return call()
        except down:
            if time.monotonic() + pause > give_up:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 30.0)
