"""site: the examples of a page, what robots.txt forbids, and a site that lies, hangs or leads elsewhere."""

from __future__ import annotations

import contextlib
import gzip
import html
import http.server
import ipaddress
import subprocess
import sys
import threading
import time
import urllib.robotparser
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scraping import robots
from scraping.__main__ import main
from scraping.examples import examples
from scraping.ledger import Ledger
from scraping.site import decoded, read_sitemap
from scraping.webclient import Client, NoAnswer, WebRefused, public

CODE = "def f(x):\n    if x < 1 and 'a' != \"b\":\n        return [x & 1]\n\n    return 2\n"
SPANS = html.escape(CODE, quote=False).replace("def", '<span class="k">def</span>')
# The same code as documentation tools write it.
PAGES = {
    "mkdocs": f'<div class="language-python highlight"><pre><span></span><code><a id="__codelineno-0-1" '
    f'name="x"></a>{SPANS}</code></pre></div>',
    "sphinx": '<div class="highlight-python3 notranslate"><div class="highlight">'
    f"<pre><span></span>{SPANS}</pre></div></div>",
    "docusaurus": '<pre class="prism-code language-py"><code>'
    + "".join(f'<span class="token-line">{html.escape(line)}<br></span>' for line in CODE.split("\n"))
    + '</code></pre><button class="clean-btn">Copy</button>',
    "pandoc": f'<pre class="sourceCode python"><code class="sourceCode">\n{html.escape(CODE)}</code></pre>',
    "github": f'<div class="highlight highlight-source-python"><pre>{SPANS}<button>Copy</button></pre></div>',
    "table": '<table class="highlighttable"><tr><td class="linenos"><div class="linenodiv"><pre>1\n2\n3</pre>'
    f'</div></td><td class="code"><div class="language-python"><pre>{SPANS}</pre></div></td></tr></table>',
    "numbers": "<PRE CLASS=language-python><CODE>"
    + "\n".join(
        f'<span class="linenos">{i} </span>{html.escape(line)}' for i, line in enumerate(CODE.split("\n"))
    )
    + "</CODE></PRE>",
    "lines": '<pre data-x="a > b" class="language-python"><code>'
    + "".join(f'<div class="line">{html.escape(line) or " "}</div>' for line in CODE.rstrip().split("\n"))
    + "</code></pre>",
    "session": '<div class="highlight-pycon"><pre>'
    + "".join(
        f'<span class="gp">{">>> " if i == 0 else "... "}</span>{html.escape(line)}\n'
        for i, line in enumerate(CODE.rstrip().split("\n"))
    )
    + "<span class='go'>[1]</span>\nTrue\n</pre></div>",
    "crlf": f'<pre><code class="lang-py">{html.escape(CODE)}</code></pre>'.replace("\n", "\r\n"),
    "spaces": f'<pre class="lang-py">{html.escape(CODE).replace("    ", "&nbsp; &#160; ")}</pre>',
    "unclosed": f'<!-- <pre>no</pre> --><script>"<pre>no</pre>"</script><p>1 < 2 <pre class=python>{SPANS}',
}


@pytest.mark.parametrize("tool", PAGES)
def test_the_code_of_a_page_comes_back_as_it_was_typed(tool: str) -> None:
    (found,) = examples(f"<html><body><h1>Title</h1><code>inline</code>{PAGES[tool]}")
    expected = CODE.replace("\n\n", "\n \n") if tool == "lines" else CODE
    assert (found.extension, found.text) == (".py", expected)


def test_languages_name_the_extension_and_what_names_none_is_text() -> None:
    page = "".join(
        f'<pre><code class="{name}">x</code></pre>'
        for name in ("language-kotlin", "lang-C++", "hljs language-json", "brush: js", "language-klingon", "")
    )
    assert [found.extension for found in examples(page)] == [".kt", ".cpp", ".json", ".js", ".txt", ".txt"]
    assert examples("<pre> \n </pre><pre></pre><p>no code</p>") == []
    assert [found.text for found in examples("<pre>In [1]: a = 1\n   ...: b\nOut[1]: 2\n</pre>")] == [
        "a = 1\nb\n"
    ]


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=300))
def test_any_text_in_a_pre_comes_back(text: str) -> None:
    found = examples(f'<div><pre class="language-python"><code>{html.escape(text)}</code></pre></div>')
    lines = (
        html.unescape(html.escape(text))
        .replace("\r\n", "\n")
        .replace("\r", "\n")
        .replace("\xa0", " ")
        .split("\n")
    )
    while lines and not lines[0].strip():
        del lines[0]
    while lines and not lines[-1].strip():
        del lines[-1]
    if not (lines and lines[0].startswith((">>> ", "In ["))):
        assert "".join(f.text for f in found) == "".join(f"{line}\n" for line in lines)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(["<", ">", "</", "pre", "<pre>", "</pre>", "<div ", "=", '"', "'", "<!--", "a", " "])
    )
)
def test_no_page_raises(parts: list[str]) -> None:
    examples("".join(parts))


HOSTILE = {
    "opens": "<pre " * 100_000,
    "lesser": "<" * 500_000,
    "quotes": "<a b='" * 80_000,
    "more quotes": "<a b=\"'" * 80_000,
    "ends": "</" * 250_000,
    "comments": "<!--" * 500_000,
    "declarations": "<!" * 250_000,
    "boxes": "<div>" * 100_000 + "</td>" * 50_000,
    "hidden": "<pre>" + "<button><i>" * 50_000 + "</b>" * 50_000,
    "spaces": "<pre class" + " " * 1_250_000,
    "attributes": "<pre " + "class=" * 80_000 + ">",
    "entities": "<pre>" + "&#" + "9" * 1_250_000 + ";&amp" * 1000 + "</pre>",
    "scripts": "<script>" * 250_000,
    "lines": "<pre>" + "\n" * 1_250_000 + "</pre>",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_page_takes_time_that_grows_with_its_length(name: str) -> None:
    began = time.process_time()
    examples(HOSTILE[name])
    assert time.process_time() - began < 3


def test_a_page_is_decoded_by_what_is_said_of_it() -> None:
    assert decoded("é".encode("latin-1"), "iso-8859-1") == "é"
    assert decoded(b"<meta charset='latin-1'>\xe9", "") == "<meta charset='latin-1'>é"
    assert (
        decoded("é".encode(), "") == decoded("é".encode(), "no-such") == decoded("é".encode(), "zlib") == "é"
    )
    assert decoded(b"\xff", "utf-8") == "\ufffd"


# ---------------------------------------------------------------------------------------------
# robots.txt

ROBOTS = """
User-agent: *
Disallow: /
Sitemap: https://example.com/map.xml

User-agent: other
User-agent: Plumb
Disallow: /private/
Allow: /private/open
Disallow: /*.pdf$
Disallow: /a%2fb  # a comment
Disallow: /caf%C3%A9
Crawl-delay: 2.5
"""


def test_the_longest_rule_of_the_own_group_wins() -> None:
    found = robots.parse(ROBOTS, "plumb")
    assert found.delay == 2.5
    assert found.sitemaps == ("https://example.com/map.xml",)
    verdicts = {
        "/": True,
        "/private/": False,
        "/private/x": False,
        "/private/open/x": True,
        "/x.pdf": False,
        "/x.pdf?y": True,
        "/a/b": True,
        "/a%2Fb": False,
        "/café": False,
        "/caf%c3%a9/x": False,
        "/privat%65/": False,
    }
    assert {path: found.allows(path) for path in verdicts} == verdicts
    assert not robots.parse(ROBOTS, "nobody").allows("/x")
    assert robots.parse("", "plumb").allows("/x")
    assert robots.parse("User-agent: *\nDisallow:\n", "plumb").allows("/x")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["/a", "/b", "/a/b", "/"]), min_size=1, max_size=1),
    st.sampled_from(["/", "/a", "/a/b/c", "/b", "/c"]),
    st.booleans(),
)
def test_of_one_plain_rule_the_library_says_the_same(rules: list[str], path: str, own: bool) -> None:
    text = f"User-agent: {'plumb' if own else '*'}\n" + "".join(f"Disallow: {rule}\n" for rule in rules)
    library = urllib.robotparser.RobotFileParser()
    library.parse(text.splitlines())
    assert robots.parse(text, "plumb").allows(path) == library.can_fetch("plumb", f"http://h{path}")


def test_many_stars_take_little_time() -> None:
    found = robots.parse("User-agent: *\nDisallow: /" + "*a" * 2000 + "b$\n", "plumb")
    began = time.process_time()
    assert found.allows("/" + "a" * 2000)
    assert time.process_time() - began < 1


# ---------------------------------------------------------------------------------------------
# Sitemaps


def sitemap(*places: str, kind: str = "url") -> bytes:
    outer = "urlset" if kind == "url" else "sitemapindex"
    inner = "".join(
        f"<{kind}><loc> {html.escape(place)}\n</loc><lastmod>x</lastmod></{kind}>" for place in places
    )
    return f'<?xml version="1.0"?><{outer} xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">{inner}</{outer}>'.encode()


def test_a_sitemap_may_be_compressed_and_name_others() -> None:
    assert read_sitemap(sitemap("http://h/a?b=1&c=2"), "m") == ([], ["http://h/a?b=1&c=2"])
    data = sitemap("http://h/m", kind="sitemap")
    assert read_sitemap(gzip.compress(data), "m") == (["http://h/m"], [])
    assert read_sitemap(gzip.compress(data[:50]) + gzip.compress(data[50:]), "m") == (["http://h/m"], [])


LAUGHS = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">' + "".join(
    f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ((LAUGHS + "]><urlset><url><loc>&i;</loc></url></urlset>").encode(), "declares a document type"),
        (b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><urlset/>', "declares a document type"),
        (b"<urlset><url>" * 2 + b"<a>" * 100_000, "nested more than 20 deep"),
        (b"<urlset><url>", "is no XML"),
        (b"<!doctype html><html>", "is no XML"),
        (b"", "is no XML"),
        (b"<urlset>&lt;&unknown;</urlset>", "is no XML"),
        (gzip.compress(b" " * (51 * 2**20)), "unpacks to more than 52,428,800 bytes"),
        (gzip.compress(sitemap("http://h/a"))[:-9], "is damaged"),
        (gzip.compress(sitemap("http://h/a")) + b"more", "is damaged"),
        (gzip.compress(sitemap("http://h/a")) + gzip.compress(b"<"), "is no XML"),
        (gzip.compress(b"") + gzip.compress(b" " * (51 * 2**20)), "unpacks to more than 52,428,800 bytes"),
    ],
)
def test_a_hostile_sitemap_is_one_sentence(data: bytes, said: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=said):
        read_sitemap(data, "m")
    assert time.process_time() - began < 3


# ---------------------------------------------------------------------------------------------
# A site

Reply = tuple[int, dict[str, str], bytes]


class Site:
    """A web site on this machine: what each path answers, and what was asked for and when."""

    def __init__(self) -> None:
        self.replies: dict[str, Reply | Callable[[http.server.BaseHTTPRequestHandler], None]] = {}
        self.asked: list[str] = []
        self.times: list[float] = []
        self.address = ""

    def page(self, path: str, *codes: str, kind: str = "text/html; charset=utf-8") -> None:
        blocks = "".join(
            f'<pre><code class="language-python">{html.escape(code)}</code></pre>' for code in codes
        )
        self.replies[path] = (200, {"Content-Type": kind}, f"<html>{blocks}</html>".encode())

    def map(self, *paths: str) -> None:
        places = (path if "://" in path else f"{self.address}{path}" for path in paths)
        self.replies["/sitemap.xml"] = (200, {}, sitemap(*places))


@pytest.fixture
def site() -> Iterator[Site]:
    here = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            here.asked.append(self.path)
            here.times.append(time.monotonic())
            reply = here.replies.get(self.path, (404, {}, b""))
            if callable(reply):
                with contextlib.suppress(OSError):
                    reply(self)
                return
            status, headers, body = reply
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        here.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield here
        server.shutdown()


def rows(folder: Path) -> dict[str, str]:
    """Path -> state, or reason."""
    ledger = Ledger(folder / "ledger.sqlite")
    with ledger.transaction() as db:
        return {
            path: why or state for path, state, why in db.execute("SELECT path, state, reason FROM files")
        }


def take(site: Site, folder: Path, *words: str, path: str = "/") -> dict[str, str]:
    main(["site", "--url", f"{site.address}{path}", "--folder", str(folder), "--delay", "0", *words])
    return {path.replace(site.address, ""): what for path, what in rows(folder).items()}


def test_a_site_becomes_files_and_every_page_has_its_reason(site: Site, tmp_path: Path) -> None:
    site.page("/doc/", "a = 1", "b = 2")
    site.page("/doc/two?v=1", CODE)
    site.page("/doc/none")
    site.page("/doc/plain", "x", kind="text/plain")
    site.page("/doc/secret", "x")
    site.page("/blog", "x")
    site.replies["/doc/moved"] = (301, {"Location": "/doc/target"}, b"")
    site.page("/doc/target", "moved = 1")
    site.replies["/doc/away"] = (302, {"Location": "http://169.254.169.254/x"}, b"")
    site.replies["/doc/round"] = (302, {"Location": "/doc/round"}, b"")
    site.replies["/doc/into"] = (302, {"Location": "/doc/secret"}, b"")
    site.replies["/robots.txt"] = (200, {}, b"User-agent: *\nDisallow: /doc/secret\n")
    paths = [
        "/doc/",
        "/doc/two?v=1",
        "/doc/none",
        "/doc/plain",
        "/doc/secret",
        "/blog",
        "/doc/moved",
        "/doc/gone",
    ]
    site.map(
        *paths, "/doc/away", "/doc/round", "/doc/into", "/doc/#part", "/doc/a b", "https://elsewhere.org/x"
    )
    found = take(site, tmp_path, "--licence", "MIT", path="/doc/")
    assert found == {
        "/doc/": "page: read for its examples",
        "doc/#1.py": "stored",
        "doc/#2.py": "stored",
        "/doc/two?v=1": "page: read for its examples",
        "doc/two?v=1#1.py": "stored",
        "/doc/none": "page: without examples",
        "/doc/plain": "page: no HTML",
        "/doc/secret": "page: robots.txt forbids it",
        "/blog": "page: outside the address",
        "/doc/moved": "page: read for its examples",
        "doc/moved#1.py": "stored",
        "/doc/gone": "page: status 404",
        "/doc/away": "page: redirect to another host",
        "/doc/round": "page: too many redirects",
        "/doc/into": "page: robots.txt forbids it",
        "/doc/a b": "page: no address",
        "https://elsewhere.org/x": "page: on another host",
    }
    files = list(Ledger(tmp_path / "ledger.sqlite").files())
    assert [file.data.decode() for file in files] == ["a = 1\n", "b = 2\n", "moved = 1\n", CODE]
    assert {(file.repository, file.licence) for file in files} == {("127.0.0.1", "MIT")}
    assert "/doc/secret" not in site.asked and "/blog" not in site.asked
    asked = list(site.asked)
    assert take(site, tmp_path, "--licence", "MIT", path="/doc/") == found
    assert site.asked == asked


def test_sitemaps_that_robots_names_are_read_with_those_inside(site: Site, tmp_path: Path) -> None:
    site.replies["/robots.txt"] = (200, {}, f"Sitemap: {site.address}/index.xml\n".encode())
    inner = [f"{site.address}/m1.xml.gz", f"{site.address}/index.xml", "http://elsewhere.org/m.xml"]
    site.replies["/index.xml"] = (200, {}, sitemap(*inner, kind="sitemap"))
    site.replies["/m1.xml.gz"] = (200, {}, gzip.compress(sitemap(f"{site.address}/a", f"{site.address}/b")))
    site.page("/a", "a = 1")
    site.page("/b", "b = 1")
    found = take(site, tmp_path, "--max_pages", "1")
    assert found == {"/a": "page: read for its examples", "a#1.py": "stored", "/b": "page: past max_pages"}
    assert site.asked == ["/robots.txt", "/index.xml", "/m1.xml.gz", "/a"]


def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "text/html")
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def reset(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.connection.close()


def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x" * 2**16)


def flaky(times: int, status: int, **headers: str) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    left = [times]

    def reply(handler: http.server.BaseHTTPRequestHandler) -> None:
        left[0] -= 1
        handler.send_response(status if left[0] >= 0 else 200)
        for key, value in headers.items():
            handler.send_header(key.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return reply


def client(site: Site, waits: list[float] | None = None, seconds: float = 20.0) -> Client:
    port = int(site.address.rpartition(":")[2])
    wait = (lambda pause: None) if waits is None else (lambda pause: waits.append(pause) if pause else None)
    return Client("http", "127.0.0.1", port, private=True, delay=0, seconds=seconds, wait=wait)


def test_what_never_ends_is_ended_and_what_fails_is_asked_again(site: Site) -> None:
    site.replies["/drip"] = drip
    began = time.monotonic()
    with pytest.raises(NoAnswer):
        client(site, seconds=0.3).get(f"{site.address}/drip", 1000)
    assert time.monotonic() - began < 5
    site.replies["/reset"] = reset
    with pytest.raises(NoAnswer):
        client(site).get(f"{site.address}/reset", 1000)
    assert site.asked.count("/reset") == 3
    site.replies["/endless"] = endless
    with pytest.raises(WebRefused, match="too large a page"):
        client(site).get(f"{site.address}/endless", 10**6)
    site.replies["/short"] = (200, {"Content-Length": "99"}, b"x")
    with pytest.raises(NoAnswer, match="cut short"):
        client(site, seconds=1).get(f"{site.address}/short", 1000)
    waits: list[float] = []
    site.replies["/busy"] = flaky(2, 503, Retry_After="7")
    assert client(site, waits).get(f"{site.address}/busy", 10).status == 200
    assert waits == [7.0, 7.0]
    site.replies["/later"] = flaky(9, 429, Retry_After="9999")
    with pytest.raises(NoAnswer, match="status 429"):
        client(site).get(f"{site.address}/later", 10)
    assert site.asked.count("/later") == 1


def test_a_compressed_page_is_counted_as_it_unpacks(site: Site) -> None:
    bomb = gzip.compress(b"x" * 10**7)
    site.replies["/bomb"] = (200, {"Content-Encoding": "gzip"}, bomb)
    with pytest.raises(WebRefused, match="too large a page"):
        client(site).get(f"{site.address}/bomb", 10**6)
    site.replies["/good"] = (200, {"Content-Encoding": "gzip"}, gzip.compress(b"hello"))
    assert client(site).get(f"{site.address}/good", 10**6).body == b"hello"
    packed = {"Content-Encoding": "gzip"}
    # A gzip file may have several members: all are read, and none goes past the limit.
    site.replies["/two"] = (200, packed, gzip.compress(b"hello") + gzip.compress(b"") + gzip.compress(b"!"))
    assert client(site).get(f"{site.address}/two", 10).body == b"hello!"
    for path, body in (
        ("/late bomb", gzip.compress(b"hello") + bomb),
        ("/empty", gzip.compress(b"") * 200_000),
        ("/rest", gzip.compress(b"hello") + b"x" * 10**7),
    ):
        site.replies[path.replace(" ", "%20")] = (200, packed, body)
        with pytest.raises(WebRefused, match=r"too large a page|other bytes follow its gzip content"):
            client(site).get(f"{site.address}{path.replace(' ', '%20')}", 10**6)
        assert site.asked[-2] != site.asked[-1]  # It is asked for once.
    site.replies["/cut"] = (200, packed, gzip.compress(b"hello") + gzip.compress(b"hello")[:-3])
    with pytest.raises(NoAnswer, match="cut short"):
        client(site).get(f"{site.address}/cut", 100)
    site.replies["/odd"] = (200, {"Content-Encoding": "br"}, b"x")
    with pytest.raises(WebRefused, match="unknown encoding"):
        client(site).get(f"{site.address}/odd", 10)


@pytest.mark.parametrize("location", ["http://[::1/", "//[", "http://h:x/", "http://127.0.0.1:99999/"])
def test_a_page_that_leads_to_no_address_costs_itself_alone(
    site: Site, tmp_path: Path, location: str
) -> None:
    site.page("/good", "a = 1")
    site.replies["/bad"] = (301, {"Location": location}, b"")
    site.map("/bad", "/good", "http://[::1/")
    site.replies["/robots.txt"] = (200, {}, f"Sitemap: {location}\nSitemap: /sitemap.xml\n".encode())
    found = take(site, tmp_path)
    assert (found["/bad"], found["good#1.py"]) == ("page: redirect to no address", "stored")
    assert found["http://[::1/"] == "page: no address"
    assert take(site, tmp_path) == found


# All blocks of iana.org/assignments/iana-ipv4-special-registry and iana-ipv6-special-registry (2025-10), and
# multicast, which has registries of its own; at last two blocks that were given up.
SPECIAL_BLOCKS = [
    "0.0.0.0/8", "0.0.0.0/32", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
    "172.16.0.0/12", "192.0.0.0/24", "192.0.0.0/29", "192.0.0.8/32", "192.0.0.9/32", "192.0.0.10/32",
    "192.0.0.170/32", "192.0.0.171/32", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24",
    "192.88.99.0/24", "192.88.99.2/32", "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15",
    "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4", "255.255.255.255/32", "224.0.0.0/4", "::1/128",
    "::/128", "::ffff:0:0/96", "64:ff9b:1::/48", "100::/64", "100:0:0:1::/64", "2001::/23", "2001::/32",
    "2001:1::1/128", "2001:1::2/128", "2001:1::3/128", "2001:2::/48", "2001:3::/32", "2001:4:112::/48",
    "2001:10::/28", "2001:20::/28", "2001:30::/28", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48",
    "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10", "ff00::/8", "::/96", "fec0::/10",
]  # fmt: skip
WRAPPED = {  # An IPv4 address inside an IPv6 one: RFC 4291 (twice), 3056, 4380, 6052, 8215.
    "mapped": lambda v4: 0xFFFF << 32 | v4,
    "compatible": lambda v4: v4,
    "6to4": lambda v4: 0x2002 << 112 | v4 << 80 | 1,
    "Teredo": lambda v4: 0x20010000 << 96 | 0x41D0E640 << 64 | v4 ^ 0xFFFFFFFF,
    "Teredo's server": lambda v4: 0x20010000 << 96 | v4 << 64 | 0x7E2D07DF,
    "NAT64": lambda v4: 0x64FF9B << 96 | v4,
    "local NAT64": lambda v4: 0x64FF9B0001 << 80 | v4,
}


def first_middle_last(block: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    network = ipaddress.ip_network(block)
    return [network[n] for n in (0, network.num_addresses // 2, network.num_addresses - 1)]


@pytest.mark.parametrize("block", SPECIAL_BLOCKS)
def test_no_special_address_is_public(block: str) -> None:
    for address in first_middle_last(block):
        assert not public(str(address))
        if isinstance(address, ipaddress.IPv4Address):
            for form, wrap in WRAPPED.items():
                assert not public(str(ipaddress.IPv6Address(wrap(int(address))))), form
    assert not public(f"{first_middle_last('fe80::/10')[1]}%eth0")


def test_public_addresses_are_public_and_next_to_special_ones_too() -> None:
    for address in ("140.82.121.3", "2606:50c0:8000::153", "64:ff9b::8c52:7903", "2001:4860:4860::8888"):
        assert public(address)
    for address in ("1.0.0.0", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "172.32.0.0"):
        assert public(address)
    for address in ("192.0.1.0", "198.17.255.255", "198.20.0.0", "223.255.255.255", "2001:200::", "2003::"):
        assert public(address)
    for form in ("mapped", "compatible", "6to4", "Teredo"):  # No site needs these forms.
        assert not public(str(ipaddress.IPv6Address(WRAPPED[form](int(ipaddress.IPv4Address("8.8.8.8"))))))


def test_a_name_that_stands_for_a_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    for address in ("10.0.0.1", "169.254.169.254", "fe80::1", "::127.0.0.1", "64:ff9b:1::a00:1"):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda *_, a=address, f=family, **__: [(f, socket.SOCK_STREAM, 6, "", (a, 80))],
        )
        monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
        with pytest.raises(ValueError, match="which is no public address"):
            Client("http", "docs.example.com", 80).get("http://docs.example.com/", 10)


def test_requests_keep_the_distance_that_robots_asks_for(site: Site, tmp_path: Path) -> None:
    site.replies["/robots.txt"] = (200, {}, b"User-agent: *\nCrawl-delay: 0.3\n")
    site.page("/a", "a = 1")
    site.page("/b", "b = 1")
    site.map("/a", "/b")
    take(site, tmp_path)
    between = [later - earlier for earlier, later in zip(site.times[1:], site.times[2:], strict=False)]
    assert len(between) == 2 and min(between) > 0.25


def error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit, match="2"):
        main(["site", *words])
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_a_site_that_goes_away_leaves_its_pages_waiting(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scraping.webclient.TRIES", 1)
    names = [f"/p{i}" for i in range(9)]
    for name in names:
        site.page(name, f"x = '{name}'")
    site.map(*names)
    pages = dict(site.replies)
    for name in names[2:]:
        site.replies[name] = reset
    words = ("--url", site.address, "--folder", str(tmp_path), "--delay", "0")
    assert "left 5 pages in a row without an answer" in error(capsys, *words)
    assert sorted(rows(tmp_path).values()).count("found") == 7
    site.replies |= pages
    site.replies["/p4"] = reset
    main(["site", *words])
    after = {path.replace(site.address, ""): what for path, what in rows(tmp_path).items()}
    assert after.pop("/p4") == "page: no answer"
    assert sorted(after.values()) == ["page: read for its examples"] * 8 + ["stored"] * 8


RUN = """
import sys
from scraping import ledger, site
def end(*_):
    print("here", flush=True)
    sys.stdin.read()
setattr(*{"listed": (ledger.Ledger, "stored"), "stored": (ledger.Ledger, "dropped")}[sys.argv[1]], end)
from scraping.__main__ import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize("after", ["listed", "stored"])
def test_a_run_killed_inside_a_page_goes_on(after: str, site: Site, tmp_path: Path) -> None:
    site.page("/a", "a = 1", "b = 2", "c = 3")
    site.page("/b", "d = 4")
    site.map("/a", "/b")
    words = ["site", "--url", site.address, "--folder", str(tmp_path / "killed"), "--delay", "0"]
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, after, *words], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    assert run.stdout is not None and run.stdin is not None
    assert run.stdout.readline() == b"here\n"
    run.kill()
    run.wait()
    run.stdout.close()
    run.stdin.close()
    assert len(rows(tmp_path / "killed")) == 5
    main(words)
    take(site, tmp_path / "whole")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert sorted(rows(tmp_path / "whole").values()).count("stored") == 4


def test_mistakes_and_refusals_are_one_sentence(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ("--folder", str(tmp_path), "--delay", "0")
    for url in (
        "",
        "ftp://h/",
        "file:///etc",
        "http://",
        "http://a b/",
        "http://user:secret@h/",
        "http://h:99999/",
    ):
        said = error(capsys, "--url", url, *folder)
        assert "give --url as in https:" in said and "secret" not in said
    here = ("--url", site.address, *folder)
    assert "answers with status 404: name one with --sitemap" in error(capsys, *here)
    site.replies["/robots.txt"] = (200, {}, b"User-agent: *\nCrawl-delay: 3600\n")
    assert "asks for 3600 seconds between requests" in error(capsys, *here)
    site.replies["/robots.txt"] = (200, {}, b"#" * 2**20 + b"\nUser-agent: *\nDisallow: /\n")
    assert "has more than 1,048,576 bytes, so that what it forbids is not known" in error(capsys, *here)
    site.replies["/robots.txt"] = (503, {"Retry-After": "9999"}, b"")
    assert "does not say in robots.txt what may be read" in error(capsys, *here)
    site.replies["/robots.txt"] = (404, {}, b"")
    site.map()
    assert "names no page" in error(capsys, *here)
    assert rows(tmp_path) == {}
