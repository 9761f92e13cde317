"""A client of GitHub's REST API that keeps to its rate limits and checks every answer.

    client = GitHub("https://api.github.com", token, ledger)
    sha = client.get("/repos/python/cpython/commits/main", lambda answer: answer.body.decode())

What GitHub publishes about its limits and answers is at docs.github.com/en/rest/using-the-rest-api, pages
"Rate limits for the REST API", "Best practices" and "Troubleshooting"; the rules below follow them:

- no request goes out while `x-ratelimit-remaining` is 0 and `x-ratelimit-reset` is still to come, for each
  resource (`core`, `search`) on its own;
- after a secondary limit (403 or 429) none goes out before `Retry-After`, or else for at least a minute,
  twice as long each time that the limit is hit again;
- requests go out evenly, below 900 a minute, and as many at a time as the caller has threads;
- the ledger stores these times, so that a process that takes over from a killed one keeps to them too.

A request that fails by accident (5xx, 202, a reset, a body that is truncated, slow or no JSON, or that `read`
refuses) is repeated, after a longer wait each time. One that GitHub refuses (404, 409, 410, 451, ...) raises
`GitHubRefused`.

The token goes to the API's own origin alone, and into no message.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol, TypeVar
from urllib.parse import urljoin, urlsplit

JSON = "application/vnd.github+json"
RAW = "application/vnd.github.raw+json"  # a blob's bytes: docs.github.com/en/rest/git/blobs
SHA = "application/vnd.github.sha"  # a commit's id alone: docs.github.com/en/rest/commits/commits
API_VERSION = "2022-11-28"
USER_AGENT = "plumb-scraping"  # Requests without one are refused: "Troubleshooting", User agent required.

POINTS = 900  # Requests a minute; a GET is one point: "Rate limits", Calculating points.
PACE = 60 / (0.9 * POINTS)  # seconds between requests, which do not arrive as evenly as they go out
MAX_CONCURRENT = 100  # "Rate limits", About secondary rate limits
SECONDARY_WAIT = 60.0  # seconds after the first secondary limit
SECONDARY_TRIES = 8  # "throw an error after a specific number of retries"
LONGEST_WAIT = 86_400.0  # Seconds; a limit's hour is 3,600.
TRIES = 8
BACKOFF = 1.0  # seconds before the second attempt, twice as long each time, at most MAX_BACKOFF
MAX_BACKOFF = 60.0
CONNECT_SECONDS, SILENCE_SECONDS = 10.0, 30.0  # GitHub gives up on a request after 10: "Timeouts"
GRACE_SECONDS, SLOWEST = 30.0, 10_000  # After GRACE_SECONDS, a body with fewer bytes a second is given up.
MAX_REDIRECTS = 5
MAX_JSON = 64 * 2**20  # Bytes; a tree is truncated at 7 MB: docs.github.com/en/rest/git/trees.
CHUNK = 2**16
ANSWER_SECONDS = 0.5
WINDOW_SLACK = 2.0  # Seconds; two closer resets are one, rounded by two answers to whole seconds.

T = TypeVar("T")


class GitHubRefused(ValueError):
    """The server's refusal: a status of 4xx that another attempt will not change."""

    def __init__(self, url: str, status: int, message: str) -> None:
        super().__init__(f"{url} was refused: {status} {message}".strip())
        self.status = status
        self.message = message


class Unanswered(ValueError):
    """Failure of the server to answer, at each of several attempts."""


class Malformed(Exception):
    """A body that is not as published; `read` raises it to have the request repeated."""


class GitHubTooLarge(ValueError):
    """A body that is larger than the caller allows."""


@dataclass(frozen=True)
class GitHubAnswer:
    """A whole body, empty if it was written to a file; headers by their names in lower case."""

    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def next_url(self) -> str:
        """Return the address of the next page; "" on the last.

        Pages are followed, not counted, as "Using pagination" asks.

        Raises:
            Malformed: the link is no address.
        """
        found = re.search(r'<([^<>]*)>\s*;[^<>,]*rel="next"', self.headers.get("link", ""))
        url = found.group(1) if found else ""
        try:
            _origin(url)
        except ValueError:
            raise Malformed("the link to the next page leads nowhere") from None
        return url

    def json(self) -> Any:
        """Return the parsed body; raise Malformed if it is not JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            raise Malformed("the body is not JSON") from None


class Memory(Protocol):
    """The storage that outlives a client; `scraping.ledger.Ledger` is one."""

    def remember(self, key: str, etag: str, body: bytes) -> None: ...
    def recall(self, key: str) -> tuple[str, bytes] | None: ...
    def limited(self, name: str, until: float) -> None: ...
    def limits(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class Clock:
    """A clock: seconds since 1970, and a way to wait."""

    now: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep


@dataclass
class _Bucket:
    """The state of one resource of the primary limit."""

    remaining: float = float("inf")
    limit: float = float("inf")
    resets: float = 0.0  # A time of the local clock.
    window: float = 0.0  # A time of the server's clock, which tells the window that an answer is from.
    in_flight: int = 0
    refilled: bool = False  # whether a new window began since the last answer


@dataclass
class Reply:
    """The outcome of one exchange, which may have broken off.

    Args:
        status: 0 if none came.
        headers: Headers by their names in lower case.
        trouble: Why the body is not whole; None if it is.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    trouble: Exception | None = None

    @property
    def limited(self) -> bool:
        """Return whether a limit refused the request. Some 403 are none: the resource itself is forbidden."""
        if self.status == 403 and self.trouble is None:
            message = _message(self.body).lower()
            spent = self.headers.get("x-ratelimit-remaining") == "0"
            return "retry-after" in self.headers or spent or "rate limit" in message or "abuse" in message
        return self.status in (403, 429) or (self.status == 503 and "retry-after" in self.headers)


class Gate:
    """A gate at which each request waits until the limits allow it."""

    def __init__(self, clock: Clock, memory: Memory, told: Callable[[str, float], None]) -> None:
        self._clock = clock
        self._memory = memory
        self._told = told
        self._lock = threading.Lock()
        self._buckets: dict[str, _Bucket] = {}
        self._next = 0.0
        self._blocked = memory.limits()
        self._strikes: dict[str, int] = {}

    def enter(self, host: str, resource: str) -> float:
        """Wait for this host and, if there is one, this resource; return the time of the request."""
        while True:
            with self._lock:
                now = self._clock.now()
                why, opens = self._opens(host, resource, now)
                if opens <= now:
                    if resource:
                        bucket = self._buckets.setdefault(resource, _Bucket())
                        bucket.in_flight += 1
                        bucket.remaining -= 1
                        # Requests go out evenly, so that a process that takes over need not know of the last
                        # minute's.
                        self._next = now + PACE
                    return now
            if opens - now > LONGEST_WAIT:
                raise Unanswered(f"{host} wants no request for {opens - now:,.0f} seconds; run again then")
            if opens - now > 1:
                self._told(why, opens - now)
            self._clock.sleep(opens - now)

    def _opens(self, host: str, resource: str, now: float) -> tuple[str, float]:
        waits = [("secondary limit", self._blocked.get(host, 0.0))]
        if resource:
            waits.append((f"limit of {resource}", self._blocked.get(resource, 0.0)))
            bucket = self._buckets.setdefault(resource, _Bucket())
            if bucket.remaining <= 0:
                if now < bucket.resets:
                    waits.append((f"limit of {resource}", bucket.resets))
                elif bucket.refilled and bucket.in_flight:
                    waits.append((f"answer about the limit of {resource}", now + ANSWER_SECONDS))
                else:  # a new window, of which nothing is known before its first answer
                    # Requests that went out in the last window may arrive in this one.
                    bucket.remaining, bucket.refilled = bucket.limit - bucket.in_flight, True
                    if bucket.remaining <= 0:
                        waits.append((f"answer about the limit of {resource}", now + ANSWER_SECONDS))
            waits.append((f"{POINTS} a minute", self._next))
        return max(waits, key=lambda wait: wait[1])

    def leave(self, host: str, resource: str, sent: float, reply: Reply) -> None:
        """Record the reply to a request that `enter` let out; raise Unanswered if limits refuse every one."""
        with self._lock:
            if resource:
                bucket = self._buckets[resource]
                bucket.in_flight -= 1
                if reply.status == 304:
                    bucket.remaining += 1  # This one did not count: "Best practices", conditional requests.
                self._read(reply.headers, reply.headers.get("x-ratelimit-resource") or resource)
            if reply.limited:
                self._refuse(host, resource, sent, reply)
            elif 0 < reply.status < 400:
                self._strikes.pop(host, None)

    def learn(self, headers: dict[str, str], resource: str) -> None:
        """Learn what is left of a resource from GitHub; an earlier process may have had another token."""
        with self._lock:
            if headers.get("x-ratelimit-remaining") != "0":
                self._blocked.pop(resource, None)
            self._read(headers, resource)

    def _read(self, headers: dict[str, str], resource: str) -> None:
        remaining, limit, reset = (
            _number(headers.get(f"x-ratelimit-{name}")) for name in ("remaining", "limit", "reset")
        )
        if remaining is None or reset is None:
            return
        now = self._clock.now()
        # The reset is by the server's clock, which may differ from ours. Its `Date` is cut to a second, so
        # that the computed time is late by up to a second, never early.
        date = _date(headers.get("date"))
        resets = now + max(0.0, reset - date) if date else reset
        bucket = self._buckets.setdefault(resource, _Bucket())
        # The server's clock tells the window, since an answer may be read long after it was sent. By the
        # local clock it could be the first of the next window, with requests left that were used since.
        if reset < bucket.window - WINDOW_SLACK:
            return  # An answer of the next window overtook this one.
        # Requests under way may not be counted in `remaining` yet; they are subtracted to be safe.
        remaining -= bucket.in_flight
        if reset > bucket.window + WINDOW_SLACK:
            bucket.remaining, bucket.window = remaining, reset
        else:
            bucket.remaining = min(bucket.remaining, remaining)
        bucket.resets = max(bucket.resets, resets)
        bucket.refilled = False
        bucket.limit = limit if limit is not None else float("inf")
        if bucket.remaining <= 0 and self._blocked.get(resource, 0.0) < bucket.resets:
            self._block(resource, bucket.resets)

    def _refuse(self, host: str, resource: str, sent: float, reply: Reply) -> None:
        now = self._clock.now()
        retry_after = _retry_after(reply.headers, now)
        if retry_after is None and _number(reply.headers.get("x-ratelimit-remaining")) == 0 and resource:
            name = reply.headers.get("x-ratelimit-resource") or resource
            if now < self._buckets.setdefault(name, _Bucket()).resets:
                return  # This is the primary limit, which `learn` has read.
        # A request that went out before the limit was known is no strike.
        if sent >= self._blocked.get(host, 0.0):
            self._strikes[host] = self._strikes.get(host, 0) + 1
        strikes = self._strikes.get(host, 1)
        if strikes > SECONDARY_TRIES:
            raise Unanswered(f"{host} refused {strikes} requests in a row by its limits; run again later")
        wait = SECONDARY_WAIT * 2 ** (strikes - 1) if retry_after is None else retry_after
        if now + wait > self._blocked.get(host, 0.0):
            self._block(host, now + wait)

    def _block(self, name: str, until: float) -> None:
        self._blocked[name] = until
        self._memory.limited(name, until)


def _number(text: str | None) -> float | None:
    return float(text) if text and re.fullmatch(r"\d{1,15}", text) else None


def _date(text: str | None) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(text).timestamp() if text else None
    except ValueError:
        return None


def _retry_after(headers: dict[str, str], now: float) -> float | None:
    """Return the seconds that Retry-After asks for; RFC 9110, section 10.2.3, allows a date too."""
    text = headers.get("retry-after")
    seconds = _number(text)
    if seconds is None and (until := _date(text)) is not None:
        seconds = max(0.0, until - (_date(headers.get("date")) or now))
    return seconds


@dataclass
class GitHub:
    """A client of GitHub's REST API: one object for all threads.

    Args:
        api: `https://api.github.com`, or `https://HOST/api/v3` of an Enterprise Server.
        token: "" sends none, at 60 requests an hour.
        memory: Stores ETags and limits.
        clock: The clock of the waits.
        seed: The seed of the waits' jitter.
        told: Called with the reason and the seconds for which a request waits.

    Raises:
        ValueError: the api is none that a token may be sent to, or the token is none.
    """

    api: str
    token: str = field(repr=False)
    memory: Memory
    clock: Clock = Clock()
    seed: int = 0
    told: Callable[[str, float], None] = lambda why, seconds: None

    def __post_init__(self) -> None:
        parts = urlsplit(self.api)
        local = parts.hostname in ("127.0.0.1", "::1", "localhost")
        if parts.scheme not in ("https", "http") or not parts.hostname:
            raise ValueError(f"api is {self.api}; it must be a URL such as https://api.github.com")
        if self.token and parts.scheme == "http" and not local:
            raise ValueError(
                f"api is {self.api}: a token is sent by https only; use https, or unset GITHUB_TOKEN"
            )
        # A header with a line break would end up in an exception's text, with the token in it.
        if not re.fullmatch(r"[!-~]*", self.token):
            raise ValueError("GITHUB_TOKEN holds a character that no token has; set it again, or unset it")
        self.api = self.api.rstrip("/")
        self._origin = _origin(self.api)
        self._gate = Gate(self.clock, self.memory, lambda why, seconds: self.told(why, seconds))
        self._random = random.Random(self.seed)
        self._random_lock = threading.Lock()
        self._local = threading.local()

    def learn_limits(self) -> None:
        """Request what is left of the limits, before the first request of a process."""

        def read(answer: GitHubAnswer) -> None:
            date = {"date": answer.headers.get("date", "")}
            for name, values in answer.json()["resources"].items():
                headers = {f"x-ratelimit-{key}": str(values[key]) for key in ("remaining", "limit", "reset")}
                self._gate.learn(headers | date, name)

        try:
            self.get("/rate_limit", read)
        except GitHubRefused as refusal:
            if refusal.status != 404:  # an Enterprise Server without limits: docs.github.com, "Rate limits"
                raise

    def get(
        self,
        path: str,
        read: Callable[[GitHubAnswer], T],
        accept: str = JSON,
        cap: int = MAX_JSON,
        tries: int = TRIES,
        keep: bool = False,
        into: BinaryIO | None = None,
    ) -> T:
        """Return what `read` makes of the answer.

        Args:
            path: A path below the api, or a whole URL that the server gave.
            read: A function that may raise Malformed, KeyError, TypeError or AttributeError for a body that
                is not as published; the request is then repeated.
            accept: The media type.
            cap: Most bytes of the body.
            tries: Attempts before it gives up.
            keep: Store the answer, and request next time only whether it has changed.
            into: A file that the body is written to, from its beginning.

        Raises:
            GitHubRefused: GitHub refuses the request.
            GitHubTooLarge: the body has more than `cap` bytes.
            Unanswered: every attempt failed.
            ValueError: the token is refused.
        """
        url = path if "://" in path else self.api + path
        key = f"{accept} {url}"
        known = self.memory.recall(key) if keep else None
        trouble = ""
        for attempt in range(tries):
            if attempt:
                self.pause(attempt, trouble)
            try:
                answer, etag = self._follow(url, accept, known, cap, into)
                found = read(answer)
            except (Malformed, KeyError, TypeError, AttributeError) as error:
                trouble = str(error) if isinstance(error, Malformed) else "the body is not as published"
                continue
            if keep and etag:
                self.memory.remember(key, etag, answer.body)
            return found
        raise Unanswered(
            f"{_shown(url)} failed {tries} times, the last time because {trouble}; run again later"
        )

    def pause(self, attempt: int, why: str) -> None:
        """Wait before another attempt: longer each time, with a random part, so that threads spread out."""
        with self._random_lock:
            seconds = min(MAX_BACKOFF, BACKOFF * 2 ** (attempt - 1)) * self._random.uniform(1.0, 1.5)
        self.told(why, seconds)
        self.clock.sleep(seconds)

    def _follow(
        self, url: str, accept: str, known: tuple[str, bytes] | None, cap: int, into: BinaryIO | None
    ) -> tuple[GitHubAnswer, str]:
        """Return the answer after all redirections, and its ETag; raise Malformed for an accident."""
        for _ in range(MAX_REDIRECTS):
            reply = self._once(url, accept, known[0] if known else "", cap, into)
            if reply.status == 304 and known:
                return GitHubAnswer(known[1]), known[0]
            if reply.status in (301, 302, 303, 307, 308):
                url = self._target(url, reply.headers.get("location", ""))
                continue
            if reply.status == 200:
                if reply.trouble:
                    raise reply.trouble
                return GitHubAnswer(reply.body, reply.headers), reply.headers.get("etag", "")
            if not 400 <= reply.status < 500:
                raise reply.trouble or Malformed(f"the status was {reply.status}")
            message = _message(reply.body)
            if reply.status == 401 and _origin(url) == self._origin:
                raise ValueError(
                    f"{self.api} refuses the token ({message}); set GITHUB_TOKEN to a valid one, or unset it"
                )
            if reply.status == 408 or (reply.status == 409 and "empty" not in message.lower()):
                raise Malformed(f"the status was {reply.status} {message}")  # GitHub is still at work on it
            if not message and _origin(url) == self._origin:  # a proxy or a portal answered, not GitHub
                raise Malformed(f"the status was {reply.status} without a message")
            raise GitHubRefused(_shown(url), reply.status, message)
        raise Malformed(f"there were more than {MAX_REDIRECTS} redirections")

    def _target(self, url: str, location: str) -> str:
        """Return the target of a redirection; it never leads from https to http."""
        schemes = ("https",) if url.startswith("https:") else ("https", "http")
        with contextlib.suppress(ValueError):  # raised for `http://[::1/` and for a port that is no number
            target = urljoin(url, location)
            scheme, host, _ = _origin(target)
            if location and scheme in schemes and host:
                return target
        raise Malformed("a redirection leads nowhere")

    def _once(self, url: str, accept: str, etag: str, cap: int, into: BinaryIO | None) -> Reply:
        """Exchange once when the limits allow it, and again as long as they refuse it."""
        home = _origin(url) == self._origin
        parts = urlsplit(url)
        resource = ("search" if parts.path.endswith("/search/repositories") else "core") if home else ""
        if parts.path.endswith("/rate_limit"):  # It counts for no limit: "Rate limits", Checking the status.
            resource = ""
        headers = {"Accept": accept, "User-Agent": USER_AGENT}
        if home:
            headers["X-GitHub-Api-Version"] = API_VERSION
            if etag:
                headers["If-None-Match"] = etag
        while True:
            sent = self._gate.enter(parts.netloc, resource)
            reply = Reply()
            try:
                self._exchange(reply, url, headers, self.token if home else "", cap, into)
            finally:
                self._gate.leave(parts.netloc, resource, sent, reply)
            if not reply.limited:
                return reply

    def _exchange(
        self, reply: Reply, url: str, headers: dict[str, str], token: str, cap: int, into: BinaryIO | None
    ) -> None:
        """Send the request, and fill in `reply` as the answer comes."""
        import requests
        import urllib3

        session = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()

        # The token is no header here, since requests would let a line of ~/.netrc replace the header, and
        # would add one for another host.
        def auth(request: Any) -> Any:
            if token:
                request.headers["Authorization"] = f"Bearer {token}"
            return request

        started = self.clock.now()
        try:
            with session.get(
                url,
                headers=headers,
                auth=auth,
                stream=True,
                allow_redirects=False,
                timeout=(CONNECT_SECONDS, SILENCE_SECONDS),
            ) as response:
                reply.status = response.status_code
                reply.headers = {name.lower(): value for name, value in response.headers.items()}
                if reply.status != 200:
                    into, cap = None, MAX_JSON
                if into is None:
                    reply.body = b"".join(self._body(response.raw, url, started, cap))
                else:
                    into.seek(0)
                    into.truncate()
                    into.writelines(self._body(response.raw, url, started, cap))
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            # The error's own text stays out, since it quotes the request.
            reply.trouble = Malformed(f"the connection failed ({type(error).__name__})")
        except (Malformed, GitHubTooLarge) as error:
            reply.trouble = error
        except ValueError:  # requests parses the address of a redirection that it is not to follow
            reply.trouble = Malformed("a redirection leads nowhere")

    def _body(self, raw: Any, url: str, started: float, cap: int) -> Iterator[bytes]:
        """Yield the pieces of a body; raise GitHubTooLarge or, for one that is too slow, Malformed."""
        got = 0
        # iter_content would wait for a whole chunk, and so for ever where bytes come singly.
        while piece := raw.read1(CHUNK, decode_content=True):
            got += len(piece)
            if got > cap:
                raise GitHubTooLarge(f"{_shown(url)} has more than {cap:,} bytes")
            seconds = self.clock.now() - started
            whole = raw.length_remaining == 0
            if not whole and seconds > GRACE_SECONDS and got < seconds * SLOWEST:
                raise Malformed(f"only {got:,} bytes came in {seconds:.0f} seconds")
            yield piece


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _shown(url: str) -> str:
    """Return a URL for a message without its query, which is secret in a link to a private archive."""
    return url.split("?")[0]


def _message(body: bytes) -> str:
    """Return the server's message as one short line."""
    try:
        text = str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        text = ""
    return "".join(c if c.isprintable() else " " for c in text)[:200]
