"""A server on loopback that answers like GitHub's REST API, with faults on a schedule and a clock of its own.

What it does is what docs.github.com/en/rest publishes: search with pages in `Link`, 1,000 results a query and
`incomplete_results`; limits a resource with `x-ratelimit-*`; secondary limits by 403 and 429; ETags, and 304
that do not count; trees that are cut; tarballs by a redirection to another host, which must never see a
token; 409 for an empty repository, 404, 451. It writes down each request, and each one that a limit forbade.

As a program it runs one crawl on the same clock: `python tests/github_server.py CLOCK '{"api": ...}'`.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import fcntl
import hashlib
import io
import json
import mmap
import os
import random
import re
import socket
import socketserver
import struct
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

TOKEN = "ghp_0123456789abcdefghijklmnopqrstuvwxyz"
START = 1_700_000_000.0
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"


class _Exchanges(threading.local):
    """How many requests of this process the client may have sent without having read the answers.

    No server can tell: an answer that it has sent lies there until its thread gets the processor.
    """

    lock = threading.RLock()
    under_way = 0  # Requests of all threads.
    own = 0  # Requests of this thread.

    def add(self, number: int) -> None:
        with self.lock:
            _Exchanges.under_way += number
            self.own += number


EXCHANGES = _Exchanges()


def watch_exchanges() -> None:
    """Let EXCHANGES count what each Gate lets out, from where leave is asked for."""
    import scraping.github

    if scraping.github.Gate.__module__ == __name__:
        return

    class Gate(scraping.github.Gate):
        def enter(self, host: str, resource: str) -> float:
            EXCHANGES.add(1)
            try:
                return super().enter(host, resource)
            except BaseException:
                EXCHANGES.add(-1)
                raise

        def leave(self, host: str, resource: str, sent: float, reply: scraping.github.Reply) -> None:
            try:
                super().leave(host, resource, sent, reply)
            finally:
                EXCHANGES.add(-1)

    scraping.github.Gate = Gate


class SharedClock:
    """A clock that several processes share, and that stands still but for waits and requests.

    When no request is under way and nothing has happened for a few real milliseconds, it goes forward to the
    earliest time that a thread waits for. So a wait of an hour costs nothing, and a thread that does not wait
    as it should is heard while the others do. Under way is what the server answers, and what this process has
    not read: an answer of the last hour's limit that was read in this one would pass for this one's.
    """

    QUIET = 0.003

    def __init__(self, path: Path) -> None:
        watch_exchanges()
        if not path.exists():
            path.write_bytes(struct.pack("ddq", START, 0.0, 0))
        self._file = os.open(path, os.O_RDWR)
        self._map = mmap.mmap(self._file, 24)
        self._lock = EXCHANGES.lock
        self._waits: list[float] = []

    def __del__(self) -> None:
        os.close(self._file)

    def now(self) -> float:
        return struct.unpack_from("d", self._map, 0)[0]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other thread or process changes the clock meanwhile: it would go back."""
        with self._lock:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _set(self, until: float) -> None:
        struct.pack_into("dd", self._map, 0, max(self.now(), until), time.monotonic())

    def advance(self, seconds: float) -> None:
        """Set the clock forward, as work that takes so long does."""
        with self._alone():
            self._set(self.now() + seconds)

    def touch(self, requests: int) -> None:
        """So many more are under way: told by the server alone."""
        with self._alone():
            under_way = struct.unpack_from("q", self._map, 16)[0] + requests
            struct.pack_into("dq", self._map, 8, time.monotonic(), under_way)

    def sleep(self, seconds: float) -> None:
        until = self.now() + seconds
        asking = EXCHANGES.own  # whoever waits in a Gate has sent nothing
        with self._lock:
            self._waits.append(until)
            EXCHANGES.add(-asking)
        try:
            while self.now() < until:
                time.sleep(0.001)
                with self._alone():
                    active, under_way = struct.unpack_from("dq", self._map, 8)
                    quiet = time.monotonic() - active > self.QUIET
                    if not under_way and not EXCHANGES.under_way and quiet and until == min(self._waits):
                        self._set(until)
        finally:
            with self._lock:
                self._waits.remove(until)
                EXCHANGES.add(asking)


# ---------------------------------------------------------------------------------------------
# Repositories


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """A repository at one commit.

    Args:
        files: path -> (mode, data); a number as data stands for so many bytes that nobody asks for.
        status: 200, or how every request for it is answered.
        archived: path -> data in the tarball where it is not that of the commit; None leaves it out.
    """

    id: int
    name: str
    created: int = 1_500_000_000
    stars: int = 100
    licence: str | None = "MIT"
    branch: str = "main"
    language: str = "Python"
    status: int = 200
    files: dict[str, tuple[str, bytes | int]] = field(default_factory=dict)
    archived: dict[str, bytes | None] = field(default_factory=dict)
    clone_url: str = ""

    def __post_init__(self) -> None:
        self.trees: dict[str, list[tuple[str, str, str, int]]] = {}
        self.blobs: dict[str, bytes] = {}
        nested: dict = {}
        for path, (mode, data) in self.files.items():
            *folders, name = path.split("/")
            folder = nested
            for step in folders:
                folder = folder.setdefault(step, {})
            folder[name] = (mode, data)
        self.root = self._tree(nested)
        self.commit = hashlib.sha1(f"commit {self.id} {self.root}".encode()).hexdigest()

    def _tree(self, folder: dict) -> str:
        rows = []
        for name, value in sorted(folder.items()):
            if isinstance(value, dict):
                rows.append(("040000", name, self._tree(value), 0))
                continue
            mode, data = value
            if isinstance(data, int):
                address, size = hashlib.sha1(f"{self.id} {name} {data}".encode()).hexdigest(), data
            else:
                address, size = blob_id(data), len(data)
                self.blobs[address] = data
            rows.append((mode, name, address, size))
        body = b"".join(
            f"{mode.lstrip('0')} {name}\0".encode() + bytes.fromhex(a) for mode, name, a, _ in rows
        )
        tree = hashlib.sha1(b"tree %d\0" % len(body) + body).hexdigest()
        self.trees[tree] = rows
        return tree

    def below(self, tree: str, prefix: str = "") -> Iterable[tuple[str, str, str, int]]:
        for mode, name, address, size in self.trees[tree]:
            yield mode, prefix + name, address, size
            if mode == "040000":
                yield from self.below(address, f"{prefix}{name}/")

    def tarball(self) -> bytes:
        top = f"{self.name.replace('/', '-')}-{self.commit[:7]}"
        out = io.BytesIO()
        headers = {"comment": self.commit}
        with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1, pax_headers=headers) as tar:
            for path, (mode, data) in sorted(self.files.items()):
                data = self.archived.get(path, data)
                if not isinstance(data, bytes):
                    continue
                info = tarfile.TarInfo(f"{top}/{path}")
                if mode == "120000":
                    info.type, info.linkname = tarfile.SYMTYPE, data.decode()
                    tar.addfile(info)
                else:
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        return out.getvalue()

    def item(self) -> dict:
        created = datetime.fromtimestamp(self.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        licence = {"key": (self.licence or "").lower(), "spdx_id": self.licence} if self.licence else None
        return {
            "id": self.id,
            "full_name": self.name,
            "default_branch": self.branch,
            "license": licence,
            "stargazers_count": self.stars,
            "created_at": created,
            "clone_url": self.clone_url,
        }


WORDS = tuple(f"word{letter}" for letter in "abcdefghijklmnop")


def source(rng: random.Random, size: int) -> bytes:
    """Lines of Python of about so many bytes."""
    lines = []
    length = 0
    while length < size:
        line = f"{rng.choice(WORDS)}_{rng.randrange(10**6)} = {rng.choice(WORDS)}({rng.randrange(10**9)})"
        lines.append(line)
        length += len(line) + 1
    return ("\n".join(lines) + "\n").encode()


def world(seed: int, repositories: int, files: int) -> list[Repo]:
    """So many repositories with so many wanted files between them, and some that give none.

    Every second has a big file beside its few sources, so that its files are fetched one by one; the others
    are fetched whole. Some have what a tarball leaves out or changes, a pointer of LFS, links, files of other
    sizes, files that other repositories have too.
    """
    rng = random.Random(seed)
    repos = []
    left = files
    common = [source(rng, 1500) for _ in range(20)]
    for number in range(repositories):
        rest = repositories - number
        few = number % 2 == 0
        count = (
            left
            if rest == 1
            else min(left - rest + 1, max(1, rng.randrange(12, 25) if few else 2 * left // rest - 18))
        )
        left -= count
        tree: dict[str, tuple[str, bytes | int]] = {}
        for i in range(count):
            folder = "/".join(rng.choice(WORDS) for _ in range(rng.randrange(4)))
            data = rng.choice(common) if rng.random() < 0.02 else source(rng, rng.randrange(1100, 3000))
            tree[f"{folder}/m{i}.py".lstrip("/")] = ("100755" if rng.random() < 0.1 else "100644", data)
        archived: dict[str, bytes | None] = {}
        if number % 4 == 1:  # export-ignore, export-subst
            archived = dict(zip(tree, (None, b"# $Format:%H$\n" * 200), strict=False))
        if few:
            tree["data.bin"] = ("100644", 500 * 2**20)
        if number % 5 == 3:
            tree |= {
                "tiny.py": ("100644", b"x = 1\n"),
                "huge.py": ("100644", 300_000),
                "lfs.py": ("100644", LFS + b"ext-0 " + b"x" * 1200 + b"\n"),
                "link.py": ("120000", b"m0.py"),
                "module.py": ("160000", 0),
                "README.md": ("100644", b"read me"),
                "odd name\n\x07é.py": ("100644", b"e"),
            }
        repos.append(
            Repo(
                1000 + 7 * number,
                f"owner{number % 40}/repo{number}",
                created=1_420_070_400 + rng.randrange(250_000_000),
                stars=rng.randrange(10, 5000),
                licence=rng.choice(("MIT", "Apache-2.0", "NOASSERTION", None)),
                branch=rng.choice(("main", "master", "release/1.x")),
                files=tree,
                archived=archived,
            )
        )
    gone = [(404, 3), (409, 3), (451, 2)] if repositories >= 100 else [(404, 1), (409, 1), (451, 1)]
    for status, count in gone:
        for i in range(count):
            created = 1_420_070_400 + rng.randrange(250_000_000)
            repos.append(
                Repo(900_000 + 10 * status + i, f"gone/r{status}-{i}", created=created, status=status)
            )
    return repos


def expected(repos: list[Repo], least: int = 1024, most: int = 102_400) -> dict[tuple[str, str], str]:
    """(repository, path) -> SHA-256 of every file that a crawl of .py has to store."""
    return {
        (repo.name, path): hashlib.sha256(data).hexdigest()
        for repo in repos
        if repo.status == 200
        for path, (mode, data) in repo.files.items()
        if isinstance(data, bytes)
        and path.endswith(".py")
        and mode in ("100644", "100755")
        and least <= len(data) <= most
        and not data.startswith(b"version https://git-lfs")
    }


# ---------------------------------------------------------------------------------------------
# Faults

ANSWERLESS = ("reset", "500", "502", "503")
ANYWHERE = ("500", "502", "503", "reset", "truncate", "chunked", "drip")
ON_API = (*ANYWHERE, "secondary", "silent", "429", "202", "malformed", "redirect")
ON_BYTES = (*ANYWHERE, "corrupt")
ON_SEARCH = ("incomplete", "drift")


def schedule(seed: int, count: int, requests: int, searches: int) -> list[tuple[int, str]]:
    """`count` faults as (number of the request, kind), spread over so many requests, of which the first
    `searches` are searches. A fault that does not fit its request waits for the next that it fits.
    """
    rng = random.Random(seed)
    some = max(2, count // 50)
    faults = [(rng.randrange(1, searches), kind) for kind in ON_SEARCH for _ in range(some)]
    kinds = [k for k in (*ON_API, *ON_BYTES) if k != "drip"] + ["drip"]
    faults += [(rng.randrange(1, int(requests * 0.9)), rng.choice(kinds)) for _ in range(count - 2 * some)]
    return sorted(faults)


@dataclass
class _Window:
    limit: int
    seconds: float
    resets: float = 0.0
    used: int = 0

    def roll(self, now: float) -> None:
        if now >= self.resets:
            self.resets = float(int(now + self.seconds))
            self.used = 0


class _Host(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        # HTTPServer's own method asks for the name of 127.0.0.1.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that was killed


class Server:
    """The API, and the host of the tarballs.

    Args:
        faults: See `schedule`.
        cap: Results to a query.
        tree_limit: Entries of a recursive tree.
        at: number of a request -> what to call while it is answered.
        latency: Seconds of the clock that a request takes.
    """

    def __init__(
        self,
        repos: list[Repo],
        clock: SharedClock,
        faults: Iterable[tuple[int, str]] = (),
        cap: int = 1000,
        tree_limit: int = 100_000,
        core: int = 5000,
        at: dict[int, Callable[[], None]] | None = None,
        seed: int = 0,
        latency: float = 0.07,
    ) -> None:
        self.latency = latency
        self.repos = {repo.id: repo for repo in repos}
        self.clock = clock
        self.faults = list(faults)
        self.cap, self.tree_limit = cap, tree_limit
        self.at = at or {}
        self.rng = random.Random(seed)
        self.windows = {"core": _Window(core, 3600), "search": _Window(30, 60)}
        self.count = self.searches = 0
        self.by_route: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self.violations: list[str] = []
        self.early = 0  # requests that were under way when a limit was told
        self.tokens_seen_elsewhere = 0
        self.blocked_until = 0.0
        self.blocked_at = 0.0  # real time
        self.told: set[object] = set()
        self.minute: list[float] = []
        self.lock = threading.RLock()
        self.hosts = [self._host("api"), self._host("codeload")]
        self.api, self.codeload = (f"http://127.0.0.1:{host.server_port}" for host in self.hosts)

    def _host(self, kind: str) -> _Host:
        server = self

        class Handler(_Handler):
            pass

        Handler.server_, Handler.kind = server, kind
        host = _Host(("127.0.0.1", 0), Handler)
        threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return host

    def close(self) -> None:
        for host in self.hosts:
            host.shutdown()
            host.server_close()

    def killed(self) -> None:
        """The client was killed: one that comes after it knows what it was told by then."""
        with self.lock:
            if time.monotonic() - self.blocked_at > 0.2:
                self.told.add("everyone")

    def fault(self, fits: tuple[str, ...]) -> str:
        with self.lock:
            for number, (ordinal, kind) in enumerate(self.faults):
                if ordinal > self.count:
                    break
                if kind in fits:
                    del self.faults[number]
                    self.injected[kind] += 1
                    return kind
        return ""

    def block(self, seconds: float, who: object) -> None:
        with self.lock:
            until = self.clock.now() + seconds
            if self.clock.now() >= self.blocked_until:
                self.told = set()
            self.blocked_until = max(self.blocked_until, until)
            self.blocked_at = time.monotonic()
            self.told.add(who)


class _Handler(BaseHTTPRequestHandler):
    server_: Server
    kind: str
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server_
        server.clock.touch(1)
        try:
            with server.lock:
                server.count += 1
                number = server.count
                server.clock.advance(server.latency)
            strike = server.at.pop(number, None)
            stage = server.rng.randrange(3) if strike else 0
            if strike and stage == 0:
                strike()
            self.cut = strike if stage == 1 else None
            self.answer()
            if strike and stage == 2:
                time.sleep(server.rng.random() * 0.01)
                strike()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            server.clock.touch(-1)

    # --- what is sent ---

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, fault: str = "") -> None:
        headers = dict(headers or {})
        now = self.server_.clock.now()
        lines = [f"HTTP/1.1 {status} {self.responses.get(status, ('Status',))[0]}"]
        headers["Date"] = email.utils.formatdate(int(now), usegmt=True)
        if fault == "chunked":
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers["Content-Length"] = str(len(body))
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode()
        out = self.wfile
        if self.cut:  # the client is killed while it reads
            out.write(head + body[: len(body) // 2])
            out.flush()
            self.cut()
        half = body[: len(body) // 2]
        if fault == "truncate":
            out.write(head + half)
            self.close_connection = True
        elif fault == "chunked":
            out.write(head + b"%x\r\n" % (len(half) + 10) + half)
            self.close_connection = True
        elif fault == "drip":
            out.write(head)
            for i in range(12):
                self.server_.clock.advance(10)
                out.write(body[i : i + 1])
                out.flush()
                time.sleep(0.002)
            self.close_connection = True
        elif fault != "":
            raise AssertionError(fault)
        else:
            out.write(head + (b"" if status == 304 else body))
        out.flush()

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
        self.rfile = self.wfile = io.BytesIO()

    def error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps({"message": message}).encode(), headers)

    def common(self, fault: str) -> bool:
        """Faults before any answer."""
        if fault in ANSWERLESS[1:]:
            headers = {"Retry-After": "7"} if fault == "503" and self.server_.rng.random() < 0.5 else {}
            self.send(int(fault), b"<html>Unicorn!</html>", headers)
        elif fault == "reset":
            self.reset()
        else:
            return False
        return True

    # --- what is asked ---

    def answer(self) -> None:
        server = self.server_
        if self.kind == "codeload":
            server.by_route["codeload"] += 1
            if self.headers.get("Authorization"):
                server.tokens_seen_elsewhere += 1
            fault = server.fault(ON_BYTES)
            if self.common(fault):
                return
            repo = server.repos[int(self.path.split("/")[1])]
            body = repo.tarball()
            if fault == "corrupt":
                body = (
                    body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 255]) + body[len(body) // 2 + 1 :]
                )
            self.send(200, body, {"Content-Type": "application/x-gzip"}, fault if fault in ANYWHERE else "")
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" or not self.headers.get("User-Agent"):
            self.error(401, "Bad credentials")
            return
        if self.limited():
            return
        path = urlsplit(self.path).path
        resource = "search" if path.startswith("/search/") else "core"
        if path == "/rate_limit":
            server.by_route["rate_limit"] += 1
            self.send(200, json.dumps({"resources": self.rates()}).encode())
            return
        fits = (*ON_API, *ON_SEARCH) if resource == "search" else ON_API
        blob = "/git/blobs/" in path
        fault = server.fault((*(f for f in fits if f != "malformed"), "corrupt") if blob else fits)
        if fault in ANSWERLESS:
            self.spend(
                resource
            )  # Before the client knows: afterwards it would perhaps be in the next window.
        if self.common(fault):
            return
        if fault in ("secondary", "silent", "429"):
            self.spend(resource)
            seconds = server.rng.randrange(5, 100)
            server.block(60 if fault == "silent" else seconds, self.client_address)
            headers = self.limits(resource) | ({} if fault == "silent" else {"Retry-After": str(seconds)})
            message = (
                "You have exceeded a secondary rate limit. Please wait a few minutes before you try again."
            )
            self.error(429 if fault == "429" else 403, message, headers)
            return
        if fault == "202":
            self.spend(resource)
            self.send(202, b"{}", self.limits(resource))
            return
        if fault == "redirect":
            self.spend(resource)
            status = server.rng.choice((301, 302, 307, 308))
            self.send(status, b"", self.limits(resource) | {"Location": server.api + self.path})
            return
        status, body, headers = self.content(path, fault)
        etag = '"' + hashlib.sha256(body).hexdigest()[:32] + '"'
        if status == 200 and self.headers.get("If-None-Match") == etag:
            self.send(304, b"", self.limits(resource) | {"ETag": etag})
            return
        self.spend(resource)
        if status == 200:
            headers = headers | {"ETag": etag}
        if fault == "malformed":
            body = server.rng.choice(
                (body[: len(body) // 2], b"{}", b"[]", b"<html></html>", b'{"message": "?"}')
            )
        if fault == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send(status, body, headers | self.limits(resource), fault if fault in ANYWHERE else "")

    def rates(self) -> dict[str, dict[str, int]]:
        rates = {}
        with self.server_.lock:
            for name, window in self.server_.windows.items():
                window.roll(self.server_.clock.now())
                left = max(0, window.limit - window.used)
                rates[name] = {"limit": window.limit, "remaining": left, "reset": int(window.resets)}
        return rates

    def limits(self, resource: str) -> dict[str, str]:
        rates = self.rates()[resource]
        return {f"X-RateLimit-{k.title()}": str(v) for k, v in rates.items()} | {
            "X-RateLimit-Resource": resource
        }

    def spend(self, resource: str) -> None:
        with self.server_.lock:
            self.server_.windows[resource].used += 1

    def limited(self) -> bool:
        """Refuse what comes too early, and write it down."""
        server = self.server_
        resource = "search" if self.path.startswith("/search/") else "core"
        with server.lock:
            now = server.clock.now()
            window = server.windows[resource]
            window.roll(now)
            server.minute = [t for t in server.minute if t > now - 60] + [now]
            if len(server.minute) > 900 + 1:
                server.violations.append(f"{len(server.minute)} requests in a minute at {now}")
            wait = server.blocked_until - now
            if wait > server.latency:  # This request itself has taken so long.
                if self.client_address in server.told or "everyone" in server.told:
                    server.violations.append(f"{wait:.1f} s before a secondary limit ends: {self.path}")
                server.early += 1
                server.told.add(self.client_address)
            over = self.path != "/rate_limit" and window.used >= window.limit
            if over:
                server.violations.append(f"over the limit of {resource}: {self.path}")
        if wait > server.latency:
            headers = self.limits(resource) | {"Retry-After": str(int(wait) + 1)}
            self.error(403, "You have exceeded a secondary rate limit.", headers)
        elif over:
            self.error(403, "API rate limit exceeded for user ID 1.", self.limits(resource))
        return wait > server.latency or over

    def content(self, path: str, fault: str) -> tuple[int, bytes, dict[str, str]]:
        server = self.server_
        if path == "/search/repositories":
            server.by_route["search"] += 1
            return self.search(fault)
        found = re.fullmatch(r"/repositories/(\d+)(?:/(commits|git/trees|git/blobs|tarball)/([^/]+))?", path)
        repo = server.repos.get(int(found.group(1))) if found else None
        if found is None or repo is None:
            return 404, b'{"message": "Not Found"}', {}
        what, name = found.group(2) or "repository", unquote(found.group(3) or "")
        server.by_route[what] += 1
        messages = {404: "Not Found", 409: "Git Repository is empty.", 451: "Repository access blocked"}
        if repo.status != 200:
            return repo.status, json.dumps({"message": messages.get(repo.status, "No")}).encode(), {}
        if what == "repository":
            return 200, json.dumps(repo.item()).encode(), {}
        if what == "commits":
            if name != f"heads/{repo.branch}":
                return 422, json.dumps({"message": f"No commit found for SHA: {name}"}).encode(), {}
            return 200, repo.commit.encode(), {}
        if what == "tarball":
            return 302, b"", {"Location": f"{server.codeload}/{repo.id}/legacy.tar.gz/{name}"}
        if what == "git/blobs":
            if name not in repo.blobs:
                return 404, b'{"message": "Not Found"}', {}
            data = repo.blobs[name]
            if self.headers.get("Accept") == "application/vnd.github.raw+json":
                return 200, data, {}
            encoded = {"content": base64.encodebytes(data).decode(), "encoding": "base64"}
            return 200, json.dumps(encoded).encode(), {}
        tree = repo.root if name == repo.commit else name
        if tree not in repo.trees:
            return 404, b'{"message": "Not Found"}', {}
        rows = list(repo.below(tree) if "recursive" in self.path else repo.trees[tree])
        cut = "recursive" in self.path and len(rows) > server.tree_limit
        kinds = {"040000": "tree", "160000": "commit"}
        body = {
            "sha": tree,
            "truncated": cut,
            "tree": [
                {"path": p, "mode": m, "sha": a, "type": kinds.get(m, "blob")}
                | ({"size": size} if m not in kinds else {})
                for m, p, a, size in (rows[: server.tree_limit] if cut else rows)
            ],
        }
        return 200, json.dumps(body).encode(), {}

    def search(self, fault: str) -> tuple[int, bytes, dict[str, str]]:
        server = self.server_
        server.searches = server.count
        query = parse_qs(urlsplit(self.path).query)
        words = query["q"][0]
        page, size = int(query.get("page", ["1"])[0]), int(query.get("per_page", ["30"])[0])
        if page * size > server.cap + size - 1:
            message = f"Only the first {server.cap} search results are available"
            return 422, json.dumps({"message": message}).encode(), {}
        since, until = re.findall(r"created:(\S+)\.\.(\S+)", words)[0]
        since, until = (datetime.fromisoformat(t).timestamp() for t in (since, until))
        low, high = re.findall(r"stars:(\d+)\.\.(\d+|\*)", words)[0]
        language = re.findall(r'language:"?([^" ]*)', words)
        if language and language[0] not in ("Python", "Kotlin"):
            return 422, b'{"message": "Validation Failed"}', {}
        licence = re.findall(r'license:"?([^" ]*)', words)
        hits = [
            repo
            for repo in server.repos.values()
            if since <= repo.created <= until
            and int(low) <= repo.stars
            and (high == "*" or repo.stars <= int(high))
            and (not language or repo.language == language[0])
            and (not licence or (repo.licence or "").lower() == licence[0])
        ]
        hits.sort(key=lambda repo: (-repo.stars, repo.id))
        if fault == "incomplete":  # The answer holds what was found before the time was over.
            hits = hits[: len(hits) // 2]
        total = len(hits)
        shown = hits[: server.cap][(page - 1) * size : page * size]
        if fault == "drift":
            if shown and server.rng.random() < 0.5:
                shown = shown[1:]  # one has moved to a page that was read before
            else:
                total += 1
        body = {
            "total_count": total,
            "incomplete_results": fault == "incomplete",
            "items": [repo.item() for repo in shown],
        }
        headers = {}
        if page * size < min(total, server.cap):
            q = quote(words)
            headers["Link"] = (
                f'<{server.api}/search/repositories?q={q}&per_page={size}&page={page + 1}>; rel="next", '
                f'<{server.api}/search/repositories?q={q}&per_page={size}&page=99>; rel="last"'
            )
        return 200, json.dumps(body).encode(), headers


def main(clock_path: str, settings: str) -> None:
    """One crawl, on a clock that the server has too, with the limits of search scaled as the server's are."""
    import scraping.crawl
    import scraping.search
    from config import one_sentence
    from scraping.github import Clock

    values = json.loads(settings)
    scraping.search.RESULTS = values.pop("cap", 1000)
    scraping.search.PAGE = values.pop("page", 100)
    clock = SharedClock(Path(clock_path))
    with one_sentence():
        scraping.crawl.crawl(
            scraping.crawl.CrawlSettings(**values), Clock(clock.now, clock.sleep), threading.Event()
        )


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main(*sys.argv[1:])
