"""scraping/github.py: limits are kept to the second, accidents are tried again, the token stays at home."""

from __future__ import annotations

import email.utils
import io
import json
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from github_server import ANYWHERE, START, TOKEN, Repo, Server, SharedClock, _Host

from scraping.github import (
    PACE,
    SECONDARY_TRIES,
    TRIES,
    Clock,
    Gate,
    GitHub,
    GitHubAnswer,
    GitHubRefused,
    GitHubTooLarge,
    Malformed,
    Reply,
    Unanswered,
)
from scraping.ledger import Ledger

Script = list[tuple[int, dict[str, str], bytes]]


class Time:
    """A clock for one thread."""

    def __init__(self, skew: float = 0.0) -> None:
        self.server = START
        self.skew = skew

    def now(self) -> float:
        return self.server + self.skew

    def sleep(self, seconds: float) -> None:
        self.server += seconds


class Scripted:
    """A host that gives its answers in turn, the last one for ever, and keeps what it was asked, and when."""

    def __init__(self, clock: Time, script: Script) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.times: list[float] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 2**16  # Else the second small packet of an answer waits for 40 ms.

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                status, headers, body = script.pop(0) if len(script) > 1 else script[0]
                outer.asked.append((self.path, dict(self.headers.items())))
                outer.times.append(clock.server)
                self.send_response_only(status)
                date = email.utils.formatdate(clock.server, usegmt=True)
                for name, value in ({"Date": date, "Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        self.host = _Host(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.host.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.host.server_port}"

    @property
    def waits(self) -> list[float]:
        """Seconds between one request and the next."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    yield ledger
    ledger.close()


@pytest.fixture
def host() -> Iterator[Callable[..., Scripted]]:
    made = []

    def make(clock: Time, *script: tuple[int, dict[str, str], bytes]) -> Scripted:
        made.append(Scripted(clock, list(script)))
        return made[-1]

    yield make
    for scripted in made:
        scripted.host.shutdown()
        scripted.host.server_close()


def client(url: str, memory: Ledger, clock: Time, token: str = TOKEN) -> GitHub:
    return GitHub(url, token, memory, Clock(clock.now, clock.sleep))


def text(answer: GitHubAnswer) -> str:
    return answer.body.decode()


def limits(remaining: int, reset: float, resource: str = "core") -> dict[str, str]:
    return {
        "X-RateLimit-Limit": "5000",
        "X-RateLimit-Remaining": str(remaining),
        "X-RateLimit-Reset": str(int(reset)),
        "X-RateLimit-Resource": resource,
    }


# --- limits ---


@pytest.mark.parametrize("skew", [0.0, 5000.0, -5000.0])
def test_nothing_goes_out_between_the_last_request_and_the_reset(memory: Ledger, host, skew: float) -> None:
    clock = Time(skew)
    api = host(
        clock, (200, limits(1, START + 100), b"a"), (200, limits(0, START + 100), b"b"), (200, {}, b"c")
    )
    github = client(api.url, memory, clock)
    assert [github.get("/x", text) for _ in range(3)] == ["a", "b", "c"]
    assert api.waits[0] == pytest.approx(PACE)
    assert START + 100 <= api.times[2] <= START + 102


def test_search_and_the_rest_have_limits_of_their_own(memory: Ledger, host) -> None:
    clock = Time()
    spent = limits(0, START + 60, "search")
    api = host(clock, (200, spent, b"a"), (200, limits(50, START + 3600), b"b"), (200, {}, b"c"))
    github = client(api.url, memory, clock)
    for path in ("/search/repositories?q=a", "/x", "/search/repositories?q=b"):
        github.get(path, text)
    assert api.times[1] < START + 1
    assert api.times[2] >= START + 60


def test_a_request_past_the_limit_waits_for_the_reset(memory: Ledger, host) -> None:
    clock = Time()
    api = host(clock, (403, limits(0, START + 500), b"{}"), (200, limits(4999, START + 4100), b"a"))
    assert client(api.url, memory, clock).get("/x", text) == "a"
    assert 500 <= api.waits[0] <= 502


SECONDARY = b'{"message": "You have exceeded a secondary rate limit."}'


@pytest.mark.parametrize(
    ("status", "headers", "least"),
    [
        (403, {"Retry-After": "37"}, 37),
        (429, {"Retry-After": "37"}, 37),
        (429, {"Retry-After": email.utils.formatdate(START + 90, usegmt=True)}, 89),
        (503, {"Retry-After": "37"}, 37),
        (403, {}, 60),
        (429, {}, 60),
        (403, limits(4000, START + 3000), 60),
    ],
)
def test_a_secondary_limit_is_waited_for(
    memory: Ledger, host, status: int, headers: dict, least: int
) -> None:
    clock = Time()
    api = host(clock, (status, headers, SECONDARY), (200, {}, b"a"))
    assert client(api.url, memory, clock).get("/x", text) == "a"
    assert least <= api.waits[0] <= least + 2


def test_a_limit_that_stays_is_waited_for_twice_as_long_each_time_and_then_given_up(
    memory: Ledger, host
) -> None:
    clock = Time()
    api = host(clock, (403, {}, SECONDARY))
    with pytest.raises(Unanswered, match="refused 9 requests in a row by its limits"):
        client(api.url, memory, clock).get("/x", text)
    assert len(api.times) == SECONDARY_TRIES + 1
    assert api.waits == [60.0 * 2**i for i in range(SECONDARY_TRIES)]


def test_a_limit_holds_every_thread_and_the_next_process(memory: Ledger, host) -> None:
    clock = Time()
    api = host(clock, (403, {"Retry-After": "300"}, SECONDARY), (200, {}, b"a"))
    first = client(api.url, memory, clock)

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    first.clock = Clock(clock.now, interrupted)
    first._gate._clock = first.clock
    with pytest.raises(KeyboardInterrupt):
        first.get("/x", text)
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        clock.sleep(seconds)

    def other() -> None:
        first._gate._clock = Clock(clock.now, sleep)
        first.get("/y", text)

    start = clock.server
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert waited == [300.0]
    clock.server = start  # Now it is as if the process had been killed instead.
    client(api.url, memory, clock).get("/z", text)
    assert api.times[-1] == start + 300


def test_a_new_process_asks_what_is_left(memory: Ledger, host) -> None:
    clock = Time()
    rates = {
        "core": {"limit": 60, "remaining": 0, "reset": int(START) + 700},
        "search": {"limit": 10, "remaining": 9, "reset": int(START) + 60},
    }
    api = host(clock, (200, {}, json.dumps({"resources": rates}).encode()), (200, {}, b"a"))
    github = client(api.url, memory, clock)
    github.learn_limits()
    github.get("/search/repositories?q=a", text)
    github.get("/x", text)
    assert api.times[1] < START + 1
    assert START + 700 <= api.times[2] <= START + 702


def test_another_token_does_not_wait_for_the_limit_of_the_last(memory: Ledger, host) -> None:
    memory.limited("core", START + 3000)
    clock = Time()
    rates = {"resources": {"core": {"limit": 60, "remaining": 60, "reset": int(START) + 3600}}}
    api = host(clock, (200, {}, json.dumps(rates).encode()), (200, {}, b"a"))
    github = client(api.url, memory, clock)
    github.learn_limits()
    github.get("/x", text)
    assert api.times[1] < START + 1


def test_requests_go_out_below_900_a_minute(memory: Ledger, host) -> None:
    clock = Time()
    api = host(clock, (200, {}, b"a"))
    github = client(api.url, memory, clock)
    for _ in range(50):
        github.get("/x", text)
    assert min(api.waits) >= 60 / 900


def test_threads_never_spend_more_than_is_left(tmp_path: Path, memory: Ledger) -> None:
    clock = SharedClock(tmp_path / "clock")
    server = Server([Repo(1, "a/b")], clock, core=20)
    github = GitHub(server.api, TOKEN, memory, Clock(clock.now, clock.sleep))
    github.learn_limits()
    threads = [
        threading.Thread(target=lambda: [github.get("/repositories/1", text) for _ in range(10)])
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.close()
    assert server.violations == []
    assert clock.now() - START >= 2 * 3600
    assert server.by_route["repository"] == 50


def test_a_wait_of_days_is_refused(memory: Ledger, host) -> None:
    clock = Time()
    api = host(clock, (429, {"Retry-After": "99999999"}, b""))
    with pytest.raises(Unanswered, match="wants no request for 99,999,999 seconds; run again then"):
        client(api.url, memory, clock).get("/x", text)


# --- accidents ---


@pytest.mark.parametrize("kind", [*ANYWHERE, "202", "malformed", "redirect"])
def test_an_accident_is_asked_for_again(tmp_path: Path, memory: Ledger, kind: str) -> None:
    clock = SharedClock(tmp_path / "clock")
    repo = Repo(1, "a/b", files={f"f{i}.py": ("100644", b"x" * i) for i in range(50)})
    server = Server([repo], clock, [(1, kind)])
    why = []
    github = GitHub(
        server.api, TOKEN, memory, Clock(clock.now, clock.sleep), told=lambda *said: why.append(said)
    )
    url = f"/repositories/1/git/trees/{repo.root}"
    paths = github.get(url, lambda answer: {row["path"] for row in answer.json()["tree"]})
    server.close()
    assert paths == set(repo.files)
    assert server.injected == {kind: 1}
    assert server.count == 2
    if kind == "drip":  # Nobody waits for its end.
        assert re.match(r"only \d bytes came in [34]\d seconds", why[0][0])


def test_what_keeps_failing_is_given_up_later_each_time(memory: Ledger, host) -> None:
    clock = Time()
    api = host(clock, (502, {}, b"<html>"))
    with pytest.raises(
        Unanswered, match=r"/x failed 8 times, the last time because the status was 502; run again"
    ):
        client(api.url, memory, clock).get("/x?secret=1", text)
    assert len(api.times) == TRIES
    for attempt, wait in enumerate(api.waits):
        assert min(60, 2**attempt) <= wait <= 1.5 * min(60, 2**attempt)
    assert len({wait / 2**i for i, wait in enumerate(api.waits)}) > 5  # jitter


@pytest.mark.parametrize(
    "body", [b"{}", b"[]", b"null", b'{"a": ', b"\xff\xfe", b"[" * 100_000, b'{"a": {}}']
)
def test_a_body_that_is_not_as_published_is_asked_for_again(memory: Ledger, host, body: bytes) -> None:
    clock = Time()
    api = host(clock, (200, {}, body), (200, {}, b'{"a": {"b": 3}}'))
    assert client(api.url, memory, clock).get("/x", lambda answer: answer.json()["a"]["b"] + 1) == 4


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "Not Found"),
        (410, "Gone"),
        (451, "DMCA"),
        (422, "No"),
        (403, "Repository access blocked"),
        (409, "Git Repository is empty."),
    ],
)
def test_a_considered_no_is_an_outcome(memory: Ledger, host, status: int, message: str) -> None:
    clock = Time()
    api = host(clock, (status, limits(3, START + 9), json.dumps({"message": message + "\x1b[2J"}).encode()))
    with pytest.raises(GitHubRefused) as refusal:
        client(api.url, memory, clock).get("/x", text)
    assert (refusal.value.status, refusal.value.message) == (status, message + " [2J")
    assert len(api.times) == 1


@pytest.mark.parametrize("status", [403, 404, 451])
def test_a_no_that_github_did_not_say_is_an_accident(memory: Ledger, host, status: int) -> None:
    clock = Time()
    api = host(clock, (status, {}, b"<html>Your company's proxy</html>"), (200, {}, b"a"))
    assert client(api.url, memory, clock).get("/x", text) == "a"


def test_a_403_that_is_cut_may_be_a_limit(memory: Ledger, host) -> None:
    clock = Time()
    api = host(clock, (403, {"Content-Length": "99", "Connection": "close"}, SECONDARY[:20]), (200, {}, b"a"))
    assert client(api.url, memory, clock).get("/x", text) == "a"
    assert api.waits[0] >= 60


def test_a_repository_that_is_being_made_is_asked_for_again(memory: Ledger, host) -> None:
    clock = Time()
    api = host(clock, (409, {}, b'{"message": "Git Repository is being created."}'), (200, {}, b"a"))
    assert client(api.url, memory, clock).get("/x", text) == "a"


def test_a_body_has_a_cap_packed_or_not(memory: Ledger, host) -> None:
    clock = Time()
    bomb = zlib.compressobj(wbits=31)
    packed = bomb.compress(b"\0" * 50_000_000) + bomb.flush()
    api = host(clock, (200, {"Content-Encoding": "gzip"}, packed), (200, {}, b"x" * 1001))
    for _ in range(2):
        with pytest.raises(GitHubTooLarge, match="/x has more than 1,000 bytes"):
            client(api.url, memory, clock).get("/x", text, cap=1000)


def test_a_file_holds_the_last_try_alone(memory: Ledger, host) -> None:
    clock = Time()
    api = host(clock, (200, {}, b"a long body"), (200, {}, b"short"))
    file = io.BytesIO()

    def read(answer: GitHubAnswer) -> bytes:
        if len(file.getvalue()) > 5:
            raise Malformed("too long")
        return file.getvalue()

    assert client(api.url, memory, clock).get("/x", read, into=file) == b"short"


def test_what_goes_out_late_in_a_window_may_arrive_in_the_next(memory: Ledger) -> None:
    """Three requests, as many as a window allows, are under way when it ends: no fourth before an answer."""
    time, answered = Time(), []
    gate = Gate(Clock(time.now, lambda seconds: sleep(seconds)), memory, lambda why, seconds: None)

    def sleep(seconds: float) -> None:
        time.sleep(seconds)
        if time.now() >= START + 70 and not answered:
            told = {"x-ratelimit-remaining": "2", "x-ratelimit-reset": str(int(START) + 120)}
            answered.append(time.now())
            gate.leave("h", "core", START, Reply(200, told | {"x-ratelimit-limit": "3"}))

    told = {"x-ratelimit-remaining": "3", "x-ratelimit-limit": "3", "x-ratelimit-reset": str(int(START) + 60)}
    gate.learn(told, "core")
    for _ in range(3):
        assert gate.enter("h", "core") < START + 60
    sent = gate.enter("h", "core")
    assert answered and sent >= answered[0]
    assert sent >= START + 120  # Both requests that the answer left may still arrive.


def dated(time: Time, remaining: int, reset: float) -> dict[str, str]:
    told = {"x-ratelimit-remaining": str(remaining), "x-ratelimit-reset": str(int(reset))}
    return told | {"x-ratelimit-limit": "7", "date": email.utils.formatdate(int(time.now()), usegmt=True)}


@pytest.mark.parametrize("late", [0.0, 1.5, 3.0, 40.0])
def test_an_answer_that_is_read_late_is_of_the_window_that_it_was_sent_in(
    memory: Ledger, late: float
) -> None:
    """On a busy machine, or behind a long body: what it says is left has been used since."""
    time = Time()
    gate = Gate(Clock(time.now, time.sleep), memory, lambda why, seconds: None)
    gate.learn(dated(time, 7, START + 3600), "core")
    sent = [gate.enter("h", "core") for _ in range(5)]
    first = dated(time, 6, START + 3600)
    for left in (5, 4, 3, 2):
        gate.leave("h", "core", sent[0], Reply(200, dated(time, left, START + 3600)))
    time.sleep(late)
    gate.leave("h", "core", sent[0], Reply(200, first))
    # Two are left, and one may be counted twice, as it was under way.
    assert sum(gate.enter("h", "core") < START + 3600 for _ in range(4)) in (1, 2)


# --- ETags ---


def test_what_has_not_changed_is_not_sent_again_and_does_not_count(tmp_path: Path, memory: Ledger) -> None:
    clock = SharedClock(tmp_path / "clock")
    server = Server([Repo(1, "a/b")], clock, core=3)
    github = GitHub(server.api, TOKEN, memory, Clock(clock.now, clock.sleep))
    answers = [github.get("/repositories/1", text, keep=True)]
    github = GitHub(server.api, TOKEN, memory, Clock(clock.now, clock.sleep))
    answers += [github.get("/repositories/1", text, keep=True) for _ in range(5)]
    assert clock.now() < START + 60
    used = server.windows["core"].used
    server.repos[1].stars = 7
    assert json.loads(github.get("/repositories/1", text, keep=True))["stargazers_count"] == 7
    server.close()
    assert answers == answers[:1] * 6
    assert used == 1


# --- redirections and the token ---


def test_redirections_take_the_token_to_the_api_alone(
    memory: Ledger, host, monkeypatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    clock = Time()
    other = host(clock, (302, {"Location": "/there"}, b""), (200, {}, b"found"))
    api = host(clock, (301, {"Location": "/y"}, b""), (307, {"Location": other.url + "/far"}, b""))
    assert client(api.url, memory, clock).get("/x", text) == "found"
    assert [path for path, _ in api.asked + other.asked] == ["/x", "/y", "/far", "/there"]
    assert [headers.get("Authorization") for _, headers in api.asked] == [f"Bearer {TOKEN}"] * 2
    assert [headers.get("Authorization") for _, headers in other.asked] == [None, None]
    assert api.asked[0][1]["X-GitHub-Api-Version"] == "2022-11-28"
    assert "plumb" in api.asked[0][1]["User-Agent"]


@pytest.mark.parametrize(
    "location", ["", "file:///etc/passwd", "ftp://x/y", "http://", "http://[::1/", "http://h:x/"]
)
def test_a_redirection_to_nowhere_is_an_accident(memory: Ledger, host, location: str) -> None:
    clock = Time()
    api = host(clock, (302, {"Location": location}, b""), (200, {}, b"a"))
    assert client(api.url, memory, clock).get("/x", text) == "a"


def test_a_next_page_at_no_address_is_an_accident(memory: Ledger, host) -> None:
    clock = Time()
    links = ({"Link": f'<{url}>; rel="next"'} for url in ("http://[::1/", "http://h:x/", "http://h/2"))
    api = host(clock, *((200, headers, b"") for headers in links))
    found = client(api.url, memory, clock).get("/x", lambda answer: answer.next_url)
    assert found == "http://h/2" and len(api.asked) == 3


def test_redirections_end(memory: Ledger, host) -> None:
    clock = Time()
    api = host(clock, (301, {"Location": "/x"}, b""))
    with pytest.raises(Unanswered, match="more than 5 redirections"):
        client(api.url, memory, clock).get("/x", text, tries=2)


def test_encryption_is_not_given_up(memory: Ledger) -> None:
    github = GitHub("https://api.github.com", TOKEN, memory)
    assert github._target("https://api.github.com/x", "/y") == "https://api.github.com/y"
    with pytest.raises(Malformed):
        github._target("https://api.github.com/x", "http://api.github.com/y")


def test_the_token_is_in_no_message(memory: Ledger, host, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    clock = Time()
    api = host(clock, (401, {}, b'{"message": "Bad credentials"}'))
    github = client(api.url, memory, clock)
    messages = [repr(github)]
    with pytest.raises(ValueError, match=r"refuses the token \(Bad credentials\); set GITHUB_TOKEN") as error:
        github.get("/x", text)
    messages.append(str(error.value))
    with pytest.raises(Unanswered, match="failed 2 times") as error:
        client("http://127.0.0.1:9", memory, clock).get("/x", text, tries=2)
    messages.append(repr(error.value) + repr(error.value.__cause__) + repr(error.value.__context__))
    with pytest.raises(ValueError, match="a character that no token has") as error:
        client(api.url, memory, clock, token=TOKEN + "\nHost: evil")
    messages.append(str(error.value))
    with pytest.raises(ValueError, match="a token is sent by https only") as error:
        client("http://api.github.com", memory, clock)
    messages.append(str(error.value))
    assert not any(TOKEN in message for message in [*messages, caplog.text])
    assert not any(TOKEN.encode() in path.read_bytes() for path in memory.path.parent.iterdir())


@pytest.mark.parametrize("url", ["api.github.com", "ftp://api.github.com", "https://"])
def test_an_api_that_is_no_url_is_refused(memory: Ledger, url: str) -> None:
    with pytest.raises(ValueError, match="it must be a URL such as https://api"):
        GitHub(url, "", memory)
