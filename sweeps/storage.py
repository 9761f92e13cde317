"""Where a study is kept: a journal file by default, any Optuna URL, or its gRPC proxy.

The journal is Optuna's own format, so its tools open it. Optuna's locks for it are files: one that a killed
process leaves behind stops everybody for 30 s, and half a line at its end can never be read past. Here the
lock is the kernel's, and half a line, of a full disk say, is cut off before the next one is written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

JOURNAL = "journal.log"
KINDS = "journal:FILE, sqlite:///FILE, postgresql://..., mysql://... or grpc://HOST:PORT"
DRIVERS = {  # of a database: the package, and what a URL that names it begins with
    "postgresql": ("psycopg2-binary", "postgresql+psycopg2://"),
    "mysql": ("pymysql", "mysql+pymysql://"),
    "mariadb": ("pymysql", "mariadb+pymysql://"),
}
CONNECT_SECONDS = 10
FULL = re.compile(f"{os.strerror(errno.ENOSPC)}|{os.strerror(errno.EDQUOT)}|disk is full", re.IGNORECASE)
PATIENCE_SECONDS = 300.0  # that a worker goes on asking a storage that is down
T = TypeVar("T")


class Journal(JournalFileBackend):
    """Optuna's journal file, of which a line is there as a whole or not at all."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        super().__init__(str(path))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
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
    """The storage of a URL; without one the journal in the study's folder.

    Raises:
        ValueError: It is none that is known, or cannot be reached.
    """
    import sqlalchemy.exc

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for kind in (ExperimentalWarning, FutureWarning):  # that parts of it may change
        warnings.filterwarnings("ignore", category=kind, module="optuna|sweeps")
    if url and "://" not in url and not url.startswith("journal:"):
        raise ValueError(f"--storage {url} is no URL; write {KINDS}")
    if re.fullmatch(r"sqlite(\+\w+)?://(/|/:memory:)?(\?.*)?", url):
        raise ValueError(
            f"--storage {url} is kept in the memory of one process, and every worker is one; write sqlite:///FILE"
        )
    with told(url, folder):
        try:
            return _opened(url, folder)
        except ImportError as error:
            lacking = getattr(error.__cause__, "name", None) or _first_line(error)
            raise ValueError(
                f"the storage {shown(url, folder)} cannot be opened: its driver {lacking} is not installed; "
                f"{_driver_advice(url, lacking)}"
            ) from None
        except sqlalchemy.exc.ArgumentError as error:
            raise ValueError(
                f"the storage {shown(url, folder)} cannot be opened ({_first_line(error)}); write {KINDS}"
            ) from None
        except (ValueError, AssertionError, LookupError, TypeError) as error:  # no journal
            raise ValueError(
                f"the storage {shown(url, folder)} cannot be opened ({_first_line(error)}); name another"
            ) from None


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

        host, _, port = url.removeprefix("grpc://").rstrip("/").partition(":")
        if port and not port.isdecimal():
            raise ValueError(f"its port {port} is no number")
        proxy = GrpcStorageProxy(host=host, port=int(port or 13000))
        proxy.wait_server_ready(timeout=CONNECT_SECONDS)
        return proxy
    # SQLite waits for its lock 5 s by default, which many workers may take together.
    options = {"connect_args": {"timeout": 120}} if url.startswith("sqlite") else {}
    tries = 5
    while True:
        try:
            return optuna.storages.get_storage(RDBStorage(url, engine_kwargs=options))
        except failures() as error:
            # Commands that begin at once all make the tables, and the later ones find some there.
            tries -= 1
            if not tries or not re.search("already exists|unique", str(error), re.IGNORECASE):
                raise
        time.sleep(1)


def shown(url: str, folder: Path) -> str:
    """The storage as messages name it, without its password."""
    return _without_password(url) if url else str(folder / JOURNAL)


def _without_password(url: str) -> str:
    """Too much is hidden rather than too little: a password may hold every sign that ends one.

    An @ is no password's end only where it stands after `HOST/DATABASE?NAME=`, with no / after it.
    """
    found = re.search(r"(?:@[^/?@]*|://[^/?:@]*:\d+)(/[^/?@]*\?\w+=[^@]*@[^/]*)$", url)
    options = found[1] if found else ""
    return re.sub(r"(://[^/:]*):.*@", r"\1:***@", url.removesuffix(options)) + options


def failures() -> tuple[type[BaseException], ...]:
    """What a storage raises that is down or full."""
    import grpc
    import sqlalchemy.exc

    return (StorageInternalError, sqlalchemy.exc.SQLAlchemyError, grpc.RpcError, OSError)


@contextlib.contextmanager
def told(url: str, folder: Path) -> Iterator[None]:
    """A storage that is down or full, or a disk that is, is told in one sentence, as a ValueError."""
    try:
        yield
    except Exception as error:  # no Ctrl-C, which may have cut off the imports of `failures`
        if not isinstance(error, failures()):
            raise
        what = f"the storage {shown(url, folder)} cannot be used ({_first_line(error)})"
        again, other = "start the same command again when it is back", ", or name another --storage"
        # Of a checkpoint, say, with words of its own; a proxy that is down has a kind of its own.
        if type(error) is OSError and error.errno is None:
            what, other = _first_line(error).split(";")[0], ""
        elif isinstance(error, OSError) and error.filename is not None:
            what = f"{error.filename} cannot be used ({_first_line(error)})"
        if FULL.search(str(error)):
            again = "free some space and start the same command again"
        raise ValueError(f"{what}; the study is as it was: {again}{other}") from None


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
    details = getattr(cause, "details", None)
    text = str(details() if callable(details) else cause).strip() or type(cause).__name__
    return re.sub(r"\S+://\S+", lambda word: _without_password(word[0]), text.splitlines()[0])


def patiently(call: Callable[[], T], seconds: float = PATIENCE_SECONDS) -> T:
    """What `call` returns; a storage that is down is asked again for a while, longer apart each time."""
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
