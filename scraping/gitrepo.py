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
KINDS = {b"10": "", b"12": SYMBOLIC_LINK, b"16": SUBMODULE}  # First digits of a mode -> why it is no file.
# Scheme of an address -> the protocols that git may use, redirects included.
PROTOCOLS = {"https": "https", "http": "http:https", "git": "git"}
CHUNK = 2**16
GIT_CONFIG = {
    "core.hooksPath": "/dev/null",
    "core.fsmonitor": "false",
    "core.bigFileThreshold": "1m",  # Larger blobs are written to the disk as they come.
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
# Variables that git inherits, for networks with a proxy or certificates of their own.
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
    """Limits on one repository.

    Args:
        files: Number of names in its tree.
        name_bytes: Bytes of all names together.
        bytes: Bytes of one pack on the disk; there are two, of trees and of blobs.
        memory: Address space of git, in bytes.
        seconds: Time of each command of git.
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
    """Return the id that git gives these bytes, of 40 hexadecimal digits (SHA-1) or 64 (SHA-256)."""
    return (hashlib.sha1 if digits == 40 else hashlib.sha256)(b"blob %d\0" % len(data) + data).hexdigest()


def check_url(url: str, insecure: bool = False) -> None:
    """Raise a ValueError unless it is an address that git may be given.

    Args:
        insecure: Allow `http://` and `git://`, which anybody on the way can change, to other machines too.
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
    """Raise a ValueError unless it can name a branch, a tag or a commit."""
    if not REVISION.fullmatch(revision) or ".." in revision or "@{" in revision:
        raise ValueError(f"{path_text(os.fsencode(revision[:200]))} cannot name a branch, a tag or a commit")


class GitRepository:
    """A bare repository in a folder of its own, beside which git's input and errors are kept.

    `fetched` makes one of a server's commit, `scraping.history.opened` one that reads a checkout's objects.
    """

    failed = "cannot be fetched"

    def __init__(self, url: str, folder: Path, limits: GitLimits) -> None:
        self.url = url
        self.folder = folder
        self.limits = limits
        self.commit = ""

    def tree(self) -> Iterator[TreeFile]:
        """Yield every name of the commit's tree that is not a folder, in git's order.

        Raises:
            ValueError: the tree is past a limit or damaged.
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
        """Return the ids of the blobs that are here, with their sizes in bytes."""
        found = {}
        # All objects are listed, since asking git for one by its id would fetch it.
        wanted = "--batch-check=%(objecttype) %(objectname) %(objectsize)"
        with self._git("cat-file", "--batch-all-objects", "--unordered", wanted) as out:
            for line in _split(out, b"\n"):
                kind, id, size = line.decode().split()
                if kind == "blob":
                    found[id] = int(size)
        return found

    def fetch(self, ids: Iterable[str]) -> None:
        """Fetch the blobs that are not here yet, all at once; those that the server lacks stay missing.

        Raises:
            ValueError: the server does not answer, or the pack is past a limit.
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
        """Yield (id, bytes) of blobs that are here, in this order; None where the bytes do not fit the id."""
        lines = "".join(f"{id}\n" for id in ids)
        with self._git("cat-file", "--batch", lines=lines) as out:
            for id in lines.split():
                head = out.readline(200).split()
                if not head:  # Git was ended; `_git` raises the reason after the block.
                    return
                if len(head) != 3 or head[0] != id.encode() or head[1] != b"blob":
                    raise ValueError(f"{self.url} has a damaged blob {id}")
                data = out.read(int(head[2]))
                out.read(1)
                yield id, data if blob_id(data, len(id)) == id else None

    def _start(self, revision: str) -> None:
        """Resolve the revision, and fetch its commit with the trees."""
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
        """Run git under the limits and yield its output; git and its children end with the block.

        Args:
            words: The command's words.
            lines: Its standard input.
            network: Whether it may reach the server.
            inside: Whether it works in this repository's folder.
            says: The error's text, by default the one of git.

        Raises:
            ValueError: git failed, or passed a limit.
        """
        command = ["git", *(word for key, value in GIT_CONFIG.items() for word in ("-c", f"{key}={value}"))]
        command += [f"--git-dir={self.folder}"] if inside else []
        command += words
        # A shell sets the limits, since preexec_fn is not safe in a process with threads. Without the signal
        # XFSZ, git itself reports that a write was too large.
        kib = self.limits.memory // 1024
        guard = f'trap "" XFSZ; ulimit -f {self.limits.bytes // 512}; ulimit -v {kib} 2>/dev/null; exec "$@"'
        base = self.folder.parent
        with open(base / "stdin", "w+") as given, open(base / "stderr", "w+b") as errors:
            given.write(lines)
            given.seek(0)
            process = subprocess.Popen(
                ["sh", "-c", guard, "sh", *command],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=self._environment(network),
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

    def _environment(self, network: bool) -> dict[str, str]:
        """Return git's environment, in which no settings or credentials of the user or system count."""
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        return environment | {
            "HOME": str(self.folder),
            "LC_ALL": "C",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ASKPASS": "true",
            "GIT_LFS_SKIP_SMUDGE": "1",
            # It overrides every setting: a command that reads may not fetch missing objects one by one.
            "GIT_ALLOW_PROTOCOL": PROTOCOLS[self.url.split(":")[0]] if network else "none",
        }

    def _why(self, code: int, late: bool, errors: bytes) -> str:
        """Return the reason of a failure, from git's exit status and the end of its error output."""
        if late:
            return f"took more than {self.limits.seconds:g} seconds"
        if b"File too large" in errors:
            return f"holds more than {self.limits.bytes:,} bytes"
        if b"not our ref" in errors:
            return "has no such commit"
        told = [line for line in errors.decode("utf-8", "replace").splitlines() if line.startswith("fatal: ")]
        said = told[-1].removeprefix("fatal: ")[:200] if told else f"git ended with {code}"
        return f"{self.failed}: " + "".join(c if c.isprintable() else " " for c in said)


@contextlib.contextmanager
def _deadline(process: subprocess.Popen, seconds: float) -> Iterator[list[bool]]:
    """End a process and its children with the block, or after `seconds`; the list is then no longer empty."""
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
    """Yield the pieces of a stream that end in a separator."""
    rest = b""
    while chunk := out.read(CHUNK):
        *whole, rest = (rest + chunk).split(separator)
        yield from whole


def refuse_without_git() -> None:
    """Raise a ValueError where git is not installed."""
    if shutil.which("git") is None:
        raise ValueError("git is not installed, and to clone needs it: install the system's package git")


@contextlib.contextmanager
def fetched(
    url: str, revision: str, folder: Path, limits: GitLimits | None = None, insecure: bool = False
) -> Iterator[GitRepository]:
    """Fetch the commit that a branch, a tag or an id names, with its trees; it is gone when the block ends.

    Args:
        folder: A folder that is created for it; the remains of a killed run are removed first.

    Raises:
        ValueError: the address or the revision is wrong, the server refuses, or a limit is passed.
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
