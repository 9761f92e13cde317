"""GET from one web site that may be hostile: bounded in bytes, time and redirects, and never another machine.

The host's name is resolved once, and the address that was checked is the one that is connected to, so that a
name cannot lead into the private network. There is no proxy in between. For these reasons `github.py` is a
client of its own: it reuses connections, may go through a proxy, and has rate limits to keep.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

AGENT = "plumb"  # the product token, as robots.txt may name it
RETRIED = (429, 500, 502, 503, 504)
TRIES = 3
REDIRECTS = 5
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: an IPv4 address is in the last 32 bits
UNICAST = ipaddress.IPv6Network("2000::/3")  # The assigned part of IPv6; the rest is special or unused.
# iana.org/assignments/iana-ipv4-special-registry and iana-ipv6-special-registry as of 2025, and multicast.
# Blocks inside a larger one are not repeated; the few that are globally reachable hold services, no sites.
SPECIAL = tuple(
    map(
        ipaddress.ip_network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
            *("192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24"),
            *("192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
            *("224.0.0.0/3", "2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20"),
        ),
    )
)
GZIP_BYTES = 2**16  # A gzip file may be larger than its content by this many bytes.
LONGEST_WAIT = 120.0  # longest Retry-After, in seconds, that is waited for


class NoAnswer(Exception):
    """Failure of a site to answer wholly, at each of several attempts."""


class WebRefused(Exception):
    """Refusal of an answer by this client; its text is the reason."""


class WebTooLarge(WebRefused):
    """Refusal of a body that is larger than allowed."""


@dataclass(frozen=True)
class WebAnswer:
    """An answer of status 200, or of another that is no redirect."""

    status: int
    kind: str  # the Content-Type, without parameters
    charset: str
    body: bytes


@dataclass
class Client:
    """A client of one host, which sends one request at a time.

    Args:
        scheme: http or https.
        host: The host as in the address, without its port.
        port: The host's port.
        private: Let the host's name stand for an address of a private network.
        delay: Seconds from the beginning of one request to that of the next.
        seconds: Time for one request, from the connection to the last byte.
        wait: Function that waits for seconds; tests give another.
    """

    scheme: str
    host: str
    port: int
    private: bool = False
    delay: float = 1.0
    seconds: float = 60.0
    wait: Callable[[float], None] = time.sleep
    _last: float = -1e9

    def same_host(self, url: str) -> bool:
        """Return whether an address is on this host, by its scheme or by https instead of http."""
        with contextlib.suppress(ValueError):
            parts = urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
            if parts.hostname != self.host or parts.username is not None:
                return False
            if (parts.scheme, port) == (self.scheme, self.port):
                return True
            return (self.scheme, self.port, parts.scheme, port) == ("http", 80, "https", 443)
        return False

    def get(self, url: str, most: int, allowed: Callable[[str], bool] = lambda path: True) -> WebAnswer:
        """Return the answer at an address of this host, after its redirects.

        Args:
            url: The address.
            most: Most bytes of a body, after decompression.
            allowed: Whether a path with its query may be requested; redirects are checked too.

        Raises:
            WebRefused: the body is larger (WebTooLarge), or a redirect leads elsewhere.
            NoAnswer: the site did not answer.
        """
        for _ in range(REDIRECTS + 1):
            if not self.same_host(url) or not re.fullmatch("[!-~]+", url):
                raise WebRefused("redirect to another host")
            parts = urlsplit(url)
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            if not allowed(path):
                raise WebRefused("robots.txt forbids it")
            answer, target = self._ask(parts.scheme, path, most)
            if not target:
                return answer
            url = joined(url, target)
            if not url:
                raise WebRefused("redirect to no address")
        raise WebRefused("too many redirects")

    def _ask(self, scheme: str, path: str, most: int) -> tuple[WebAnswer, str]:
        said = ""
        for number in range(TRIES):
            self.wait(max(self._last + self.delay - time.monotonic(), 0))
            self._last = time.monotonic()
            pause = float(2**number)
            try:
                answer, headers = self._once(scheme, path, most)
            except (OSError, http.client.HTTPException, zlib.error) as error:
                said = f"{type(error).__name__}: {error}"
            else:
                if answer.status not in RETRIED:
                    moved = answer.status in (301, 302, 303, 307, 308)
                    return answer, headers.get("location", "") if moved else ""
                said = f"status {answer.status}"
                after = headers.get("retry-after", "")
                if after.isascii() and after.isdigit() and len(after) < 9:
                    if float(after) > LONGEST_WAIT:
                        break
                    pause = max(pause, float(after))
            if number + 1 < TRIES:
                self.wait(pause)
        raise NoAnswer("".join(c if c.isprintable() else " " for c in said[:200]))

    def _once(self, scheme: str, path: str, most: int) -> tuple[WebAnswer, dict[str, str]]:
        port = 443 if scheme == "https" and self.scheme == "http" else self.port
        sock = self._connect(port)
        connection = http.client.HTTPConnection(self.host, port)

        late: list[bool] = []

        def end() -> None:  # Ends any wait: a socket's timeout would never end a drip of bytes.
            late.append(True)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self.seconds, end)
        timer.daemon = True
        timer.start()
        try:
            if scheme == "https":
                # `sock` is replaced before the handshake, so that `end` can shut the one that waits.
                context = ssl.create_default_context()
                sock = context.wrap_socket(sock, server_hostname=self.host, do_handshake_on_connect=False)
                sock.do_handshake()
            connection.sock = sock
            usual = port == {"http": 80, "https": 443}[scheme]
            named = f"[{self.host}]" if ":" in self.host else self.host
            connection.putrequest("GET", path, skip_host=True, skip_accept_encoding=True)
            connection.putheader("Host", named if usual else f"{named}:{port}")
            connection.putheader("User-Agent", AGENT)
            connection.putheader("Accept-Encoding", "gzip")
            connection.putheader("Connection", "close")
            connection.endheaders()
            response = connection.getresponse()
            headers = {key.lower(): value for key, value in response.getheaders()}
            body = self._body(response, headers, most) if response.status == 200 else b""
            if late:  # Where there is no Content-Length, a shut socket looks like the body's end.
                raise OSError(f"it took more than {self.seconds:g} seconds")
            charset = response.headers.get_content_charset("")
            return WebAnswer(response.status, response.headers.get_content_type(), charset, body), headers
        finally:
            timer.cancel()
            sock.close()
            connection.close()

    def _body(self, response: http.client.HTTPResponse, headers: dict[str, str], most: int) -> bytes:
        encoding = headers.get("content-encoding", "identity").lower()
        if encoding not in ("identity", "gzip", "x-gzip"):
            raise WebRefused("unknown encoding of the content")
        pieces = iter(lambda: response.read1(2**16), b"")
        parts: list[bytes] = []
        size = 0
        for part in gunzipped(pieces, most) if "gzip" in encoding else pieces:
            parts.append(part)
            size += len(part)
            if size > most:
                raise WebTooLarge("too large a page")
        if response.length:
            raise OSError("the answer is cut short")
        return b"".join(parts)

    def _connect(self, port: int) -> socket.socket:
        places = socket.getaddrinfo(self.host, port, type=socket.SOCK_STREAM)
        error: OSError | None = None
        for family, kind, protocol, _, place in places:
            if not self.private and not public(str(place[0])):
                raise ValueError(
                    f"{self.host} stands for {place[0]}, which is no public address: name that address"
                    " itself, or set --private"
                )
            sock = socket.socket(family, kind, protocol)
            sock.settimeout(min(self.seconds, 30.0))
            try:
                sock.connect(place)
                return sock
            except OSError as problem:
                sock.close()
                error = problem
        raise error or OSError(f"{self.host} has no address")


def joined(base: str, address: str) -> str:
    """Return a server's address joined to its base; "" where it is none, such as `http://[::1/`."""
    try:
        url = urljoin(base, address)
        return url if urlsplit(url).port != 0 else ""
    except ValueError:
        return ""


def gunzipped(pieces: Iterable[bytes], most: int) -> Iterator[bytes]:
    """Yield the content of a gzip file, whose members follow each other (RFC 1952, 2.2), in bounded parts.

    Raises:
        WebTooLarge: the content has more than `most` bytes, or the file far more of empty members.
        WebRefused: something else follows a member.
        OSError: the file is truncated.
        zlib.error: the file is damaged.
    """
    engine = zlib.decompressobj(wbits=31)
    read = size = members = 0
    for piece in pieces:
        read += len(piece)
        if read > most + GZIP_BYTES:
            raise WebTooLarge("too large a page")
        while piece:
            if engine.eof:
                engine = zlib.decompressobj(wbits=31)
                members += 1
            try:
                part = engine.decompress(piece, most + 1 - size)
            except zlib.error:
                if members:
                    raise WebRefused("other bytes follow its gzip content") from None
                raise
            piece = engine.unconsumed_tail or engine.unused_data
            size += len(part)
            if size > most:
                raise WebTooLarge("too large a page")
            yield part
    if not engine.eof:
        raise OSError("the answer is cut short")


def public(address: str) -> bool:
    """Return whether an IP address is one of the public internet.

    IANA's registries of special-purpose addresses decide, not `ipaddress.is_global`, which changes from one
    Python to the next. An IPv4 address inside an IPv6 one counts as the former for NAT64 alone, by which
    networks without IPv4 reach all of it. No site needs the other forms: mapped, compatible, 6to4, Teredo.
    """
    place = ipaddress.ip_address(address.split("%")[0])
    if place in NAT64:
        place = ipaddress.IPv4Address(int(place) & 0xFFFFFFFF)
    if isinstance(place, ipaddress.IPv6Address) and place not in UNICAST:
        return False
    return not any(place in block for block in SPECIAL)


def names_an_address(host: str) -> bool:
    """Return whether a host is `localhost` or a literal IP address."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return True
    return host == "localhost"
