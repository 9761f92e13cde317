"""One commit of a git repository from a stranger: its tree and its blobs, never a work tree.

    with fetched(url, "main", folder) as repository:
        for file in repository.tree():
            file.path, file.id, file.reason
        repository.fetch(ids)
        for id, data in repository.blobs(ids):
            ...

A bare repository without history takes the trees first and then the wanted blobs in one batch (git's
partial clone). Nothing is checked out, so no hook, filter, submodule or attribute of it is ever looked at.
The settings of the user and of the system are not read, and no credential is asked for or sent. git itself
runs with limits of time, memory and bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from scraping.documents import path_text
from scraping.wanted import NO_FILE, SUBMODULE, SYMBOLIC_LINK

URL = re.compile(r"(https|http|git)://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9][A-Za-z0-9.-]*)(:[0-9]{1,5})?(/[!-~]*)")
LOOPBACK = re.compile(r"localhost|127(\.[0-9]{1,3}){3}|\[::1\]")
REVISION = re.compile(r"\w[\w.+/@#=,%!-]*")
ID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
KINDS = {b"10": "", b"12": SYMBOLIC_LINK, b"16": SUBMODULE}  # by the first digits of a mode
PROTOCOLS = {"https": "https", "http": "http:https", "git": "git"}  # that git may use, redirects included
CHUNK = 2**16
# Passed on to git, for those who reach the world through a proxy or with certificates of their own.
ENVIRONMENT = (
    "PATH",
    "http_proxy",
    "https_proxy",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "no_proxy",
    "SSL_CERT_FILE",
)


@dataclass(frozen=True)
class GitLimits:
    """What one repository may cost.

    Args:
        files: Names in its tree.
        name_bytes: Of all names together.
        bytes: Of one pack on the disk; there are two, of trees and of blobs.
        memory: Of git, in bytes of address space.
        seconds: For each command of git.
    """

    files: int = 500_000
    name_bytes: int = 2**27
    bytes: int = 2**32
    memory: int = 2**32
    seconds: float = 3600.0


@dataclass(frozen=True)
class TreeFile:
    """A name in a tree: `reason` says why it is no file, "" if it is one."""

    path: bytes
    id: str
    reason: str = ""


def blob_id(data: bytes, digits: int = 40) -> str:
    """The name that git gives these bytes, in a repository whose names have so many hexadecimal digits."""
    return (hashlib.sha1 if digits == 40 else hashlib.sha256)(b"blob %d\0" % len(data) + data).hexdigest()


def check_url(url: str, insecure: bool = False) -> None:
    """Raises ValueError unless it is an address of a kind that git may be given.

    Args:
        insecure: Let `http://` and `git://`, which anybody on the way can change, go to other machines too.
    """
    if "@" in url:  # first, so that no message repeats a password
        raise ValueError(
            "the address holds a user name: only what anybody may read is fetched, by https://host/path"
        )
    found = URL.fullmatch(url)
    if not found:
        told = "; a folder or an archive is read by the command local" if Path(url).exists() else ""
        raise ValueError(
            f"{path_text(os.fsencode(url[:200]))} is no https://host/path, which clone takes{told}"
        )
    if found[1] != "https" and not LOOPBACK.fullmatch(found[2]) and not insecure:
        raise ValueError(
            f"{url} is not encrypted, and anybody on the way can change it: use https://, or --insecure"
        )


def check_revision(revision: str) -> None:
    """Raises ValueError unless it can name a branch, a tag or a commit."""
    if not REVISION.fullmatch(revision) or ".." in revision or "@{" in revision:
        raise ValueError(f"{path_text(os.fsencode(revision[:200]))} cannot name a branch, a tag or a commit")


class GitRepository:
    """A bare repository in a folder; made by `fetched`."""

    def __init__(self, url: str, folder: Path, limits: GitLimits) -> None:
        self.url = url
        self.folder = folder
        self.limits = limits
        self.commit = ""

    def tree(self) -> Iterator[TreeFile]:
        """Every name of the commit's tree that is not a folder, in git's order.

        Raises:
            ValueError: it is past a limit or damaged.
        """
        count = size = 0
        with self._git("ls-tree", "-r", "-z", "--full-tree", self.commit) as out:
            for line in _split(out, b"\0"):
                count, size = count + 1, size + len(line)
                if count > self.limits.files or size > self.limits.name_bytes:
                    raise ValueError(
                        f"{self.url} lists more than {self.limits.files:,} files"
                        f" or {self.limits.name_bytes:,} bytes of names"
                    )
                what, path = line.split(b"\t", 1)
                mode, _, id = what.split(b" ")
                yield TreeFile(path, id.decode(), KINDS.get(mode[:2], NO_FILE))

    def sizes(self) -> dict[str, int]:
        """Blob ids that are here, and how many bytes each has."""
        found = {}
        # Asking for one object by its id would fetch it, alone.
        wanted = "--batch-check=%(objecttype) %(objectname) %(objectsize)"
        with self._git("cat-file", "--batch-all-objects", "--unordered", wanted) as out:
            for line in _split(out, b"\n"):
                kind, id, size = line.decode().split()
                if kind == "blob":
                    found[id] = int(size)
        return found

    def fetch(self, ids: Iterable[str]) -> None:
        """Fetch the blobs that are not here yet, all at once. What the server does not have is not here then.

        Raises:
            ValueError: the server does not answer, or it is past a limit.
        """
        here = self.sizes()
        missing = sorted({id for id in ids if id not in here})
        assert all(ID.fullmatch(id) for id in missing)
        if missing:
            flags = (
                "--quiet",
                "--no-tags",
                "--no-write-fetch-head",
                "--recurse-submodules=no",
                "--filter=blob:none",
            )
            lines = "".join(f"{id}\n" for id in missing)
            with self._git("fetch", *flags, "--stdin", "origin", lines=lines, network=True):
                pass

    def blobs(self, ids: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
        """(id, bytes) of blobs that are here, in the order asked; None where the bytes have another id."""
        lines = "".join(f"{id}\n" for id in ids)
        with self._git("cat-file", "--batch", lines=lines) as out:
            for id in lines.split():
                head = out.readline(200).split()
                if not head:  # git was ended, and what follows the block says why
                    return
                if len(head) != 3 or head[0] != id.encode() or head[1] != b"blob":
                    raise ValueError(f"{self.url} has a damaged blob {id}")
                data = out.read(int(head[2]))
                out.read(1)
                yield id, data if blob_id(data, len(id)) == id else None

    def _start(self, revision: str) -> None:
        """Resolve the revision, and take its commit with the trees."""
        if ID.fullmatch(revision):
            id = revision
        else:
            places = ["HEAD"] if revision == "HEAD" else [f"refs/heads/{revision}", f"refs/tags/{revision}"]
            with self._git("ls-remote", "--quiet", self.url, *places, network=True, inside=False) as out:
                lines = [line.decode("utf-8", "replace").split("\t") for line in _split(out, b"\n")]
            refs = {name: id for id, name in lines if ID.fullmatch(id)}
            id = next((refs[place] for place in places if place in refs), "")
            if not id:
                raise ValueError(
                    f"{self.url} has no branch or tag {revision}; a commit is named by all of its digits"
                    if revision != "HEAD"
                    else f"{self.url} has no HEAD: it is empty, or a branch must be named"
                )
        kind = "sha1" if len(id) == 40 else "sha256"
        with self._git(
            "init",
            "--quiet",
            "--bare",
            "--template=",
            f"--object-format={kind}",
            str(self.folder),
            inside=False,
        ):
            pass
        with self._git("config", "remote.origin.url", self.url):
            pass
        flags = ("--quiet", "--depth=1", "--no-tags", "--no-write-fetch-head", "--recurse-submodules=no")
        with self._git("fetch", *flags, "--filter=blob:none", "origin", id, network=True):
            pass
        with self._git("rev-parse", "--verify", "--quiet", f"{id}^{{commit}}", says="is no commit") as out:
            self.commit = out.read(200).decode().strip()

    @contextlib.contextmanager
    def _git(
        self, *words: str, lines: str = "", network: bool = False, inside: bool = True, says: str = ""
    ) -> Iterator[IO[bytes]]:
        """Run git under the limits; its output is the value. Whatever it started ends with the block."""
        settings = {
            "core.hooksPath": "/dev/null",
            "core.fsmonitor": "false",
            "core.bigFileThreshold": "1m",  # greater blobs are written to the disk as they come
            "core.packedGitWindowSize": "64m",
            "core.packedGitLimit": "512m",
            "credential.helper": "",
            "fetch.negotiationAlgorithm": "noop",
            "fetch.unpackLimit": "1",  # a pack, never a file for each object
            "gc.auto": "0",
            "maintenance.auto": "false",
            "http.lowSpeedLimit": "1000",
            "http.lowSpeedTime": "60",
            "protocol.version": "2",
        }
        command = ["git", *(word for key, value in settings.items() for word in ("-c", f"{key}={value}"))]
        command += [f"--git-dir={self.folder}"] if inside else []
        command += words
        # A shell sets the limits: preexec_fn is not safe in a process with threads.
        kib = self.limits.memory // 1024
        # Without the signal, git says that a write was too large.
        guard = f'trap "" XFSZ; ulimit -f {self.limits.bytes // 512}; ulimit -v {kib} 2>/dev/null; exec "$@"'
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        environment |= {
            "HOME": str(self.folder),
            "LC_ALL": "C",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ASKPASS": "true",
            "GIT_LFS_SKIP_SMUDGE": "1",
            # Over every setting; a command that reads may not fetch what is missing, one by one.
            "GIT_ALLOW_PROTOCOL": PROTOCOLS[self.url.split(":")[0]] if network else "none",
        }
        base = self.folder.parent
        with open(base / "stdin", "w+") as given, open(base / "stderr", "w+b") as errors:
            given.write(lines)
            given.seek(0)
            process = subprocess.Popen(
                ["sh", "-c", guard, "sh", *command],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                cwd=base,
                start_new_session=True,
            )
            assert process.stdout is not None
            with _deadline(process, self.limits.seconds) as late, process.stdout:
                yield process.stdout
                process.stdout.read()
                code = process.wait()
            if code:
                errors.seek(max(errors.seek(0, os.SEEK_END) - 4096, 0))
                raise ValueError(f"{self.url} {says or self._why(code, bool(late), errors.read())}")

    def _why(self, code: int, late: bool, errors: bytes) -> str:
        if late:
            return f"took more than {self.limits.seconds:g} seconds"
        if b"File too large" in errors:
            return f"holds more than {self.limits.bytes:,} bytes"
        if b"not our ref" in errors:
            return "has no such commit"
        told = [line for line in errors.decode("utf-8", "replace").splitlines() if line.startswith("fatal: ")]
        said = told[-1].removeprefix("fatal: ")[:200] if told else f"git ended with {code}"
        return "cannot be fetched: " + "".join(c if c.isprintable() else " " for c in said)


@contextlib.contextmanager
def _deadline(process: subprocess.Popen, seconds: float) -> Iterator[list[bool]]:
    """End a process and all that it started with the block, or late, as the list then tells."""
    late: list[bool] = []

    def end() -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    def too_late() -> None:
        late.append(True)
        end()

    timer = threading.Timer(seconds, too_late)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
        end()
        process.wait()


def _split(out: IO[bytes], separator: bytes) -> Iterator[bytes]:
    """What ends in a separator, piece by piece."""
    rest = b""
    while chunk := out.read(CHUNK):
        *whole, rest = (rest + chunk).split(separator)
        yield from whole


def refuse_without_git() -> None:
    """ValueError where git is not installed."""
    if shutil.which("git") is None:
        raise ValueError("git is not installed, and to clone needs it: install the system's package git")


@contextlib.contextmanager
def fetched(
    url: str, revision: str, folder: Path, limits: GitLimits | None = None, insecure: bool = False
) -> Iterator[GitRepository]:
    """The commit that a branch, a tag or an id names, with its trees; gone when the block ends.

    Args:
        folder: A folder that is made for it; what a kill left of it is removed first.

    Raises:
        ValueError: the address, the revision or the server refuses, or a limit is passed; one sentence.
    """
    check_url(url, insecure)
    check_revision(revision)
    refuse_without_git()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        repository = GitRepository(url, (folder / "bare").resolve(), limits or GitLimits())
        repository._start(revision)
        yield repository
    finally:
        shutil.rmtree(folder, ignore_errors=True)
