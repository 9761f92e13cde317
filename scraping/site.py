"""python -m scraping site: take in the code examples of a documentation site.

The pages are those of its sitemap that are on its host and that robots.txt allows; each `<pre>` of a page is
a file `page#number.ext`. In the ledger a page is a file too: it waits until it was read, and is then dropped
with the outcome as its reason, so that a killed run goes on with the pages that wait.
"""

from __future__ import annotations

import re
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urldefrag, urljoin, urlsplit
from xml.parsers import expat

from scraping.documents import path_text
from scraping.examples import examples
from scraping.gitrepo import blob_id
from scraping.ledger import Ledger, ListedFile
from scraping.robots import Robots, parse
from scraping.source import Origin, Selection, finished, known, list_files, open_ledger, report
from scraping.wanted import Wanted
from scraping.webclient import (
    AGENT,
    Client,
    NoAnswer,
    WebRefused,
    WebTooLarge,
    gunzipped,
    joined,
    names_an_address,
)

SITEMAP_BYTES = 50 * 2**20  # sitemaps.org: the largest sitemap that is allowed
ROBOTS_BYTES = 2**20
SITEMAPS = 1000
PAGES = 500_000  # most pages of all sitemaps together
LONGEST_DELAY = 60.0
UNANSWERED = 5  # After this many pages in a row without an answer, the site is down.
READ = "page: read for its examples"
EMPTY = "page: without examples"


@dataclass(frozen=True)
class SiteSettings(Selection):
    """Settings of the command site: a site, and which of its examples are wanted.

    Args:
        min_bytes: Least size of a wanted example.
        url: Address under which the pages are, as in https://fastapi.tiangolo.com/tutorial/
        sitemap: Address of the sitemap; by default those that robots.txt names, or else /sitemap.xml
        repository: Its name in the corpus; by default its host.
        licence: SPDX expression of its examples, as in MIT; empty means unknown, which `clean` drops.
        max_pages: Most pages to read.
        page_bytes: Largest size of a page.
        delay: Seconds from one request to the next; robots.txt may demand more.
        private: Let the host's name stand for an address of a private network.
    """

    min_bytes: int = 1
    url: str = ""
    sitemap: str = ""
    repository: str = ""
    licence: str = ""
    max_pages: int = 10_000
    page_bytes: int = 5 * 2**20
    delay: float = 1.0
    private: bool = False


def run(settings: SiteSettings) -> None:
    """Take in the examples; a mistake of the user, or a site that refuses or is down, raises ValueError."""
    client = client_of(settings)
    if settings.max_pages < 1 or settings.page_bytes < 1 or settings.delay < 0:
        raise ValueError("--max_pages and --page_bytes are 1 or more, and --delay is 0 or more")
    origin = Origin(settings.repository or client.host, "site", settings.url, settings.licence)
    wanted = settings.wanted()
    ledger = open_ledger(settings.folder)
    take_site(ledger, origin, settings, wanted, client)
    report(ledger, origin.name)


def client_of(settings: SiteSettings) -> Client:
    """Return a client for the host of the settings' address."""
    try:
        parts = urlsplit(settings.url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port, parts = "", None, urlsplit("")
    if parts.scheme not in ("http", "https") or not re.fullmatch(r"[A-Za-z0-9.:-]+", host) or parts.username:
        # What stands before an @ may be a password, so the message leaves it out.
        said = path_text(settings.url[:200].rpartition("@")[2].encode())
        wrong = f"{said} is no address of a site: " if said else ""
        raise ValueError(f"{wrong}give --url as in https://fastapi.tiangolo.com/")
    port = port or (443 if parts.scheme == "https" else 80)
    private = settings.private or names_an_address(host)
    return Client(parts.scheme, host, port, private, settings.delay)


def take_site(ledger: Ledger, origin: Origin, settings: SiteSettings, wanted: Wanted, client: Client) -> None:
    """Enter a site's examples into the ledger; files that it already has stay."""
    state, _ = known(ledger, origin)
    if finished(ledger, origin.name, state):
        return
    robots = read_robots(client, settings.url)
    if robots.delay > LONGEST_DELAY:
        raise ValueError(
            f"robots.txt of {client.host} asks for {robots.delay:g} seconds between requests, over"
            f" {LONGEST_DELAY:g}: it would take too long, so leave the site out"
        )
    client.delay = max(client.delay, robots.delay)
    if state != "listed":
        list_files(ledger, origin, "", pages(client, settings, robots))
    read_pages(ledger, origin.name, settings, wanted, client, robots)
    ledger.done(origin.name)


def read_robots(client: Client, url: str) -> Robots:
    """Return the site's rules. By RFC 9309, 2.3.1, a 4xx means none; without an answer all is forbidden."""
    try:
        answer = client.get(urljoin(url, "/robots.txt"), ROBOTS_BYTES)
    except WebTooLarge:
        raise ValueError(
            f"robots.txt of {client.host} has more than {ROBOTS_BYTES:,} bytes, so that what it forbids is "
            "not known; nothing is read there"
        ) from None
    except WebRefused:
        return Robots()
    except NoAnswer as error:
        raise ValueError(
            f"{client.host} does not say in robots.txt what may be read ({error}): try later"
        ) from error
    return parse(answer.body.decode("utf-8", "replace"), AGENT) if answer.status == 200 else Robots()


# ---------------------------------------------------------------------------------------------
# Finding the pages


def pages(client: Client, settings: SiteSettings, robots: Robots) -> Iterator[ListedFile]:
    """Yield every address of the sitemaps once, with the reason not to read it.

    Raises:
        ValueError: there is no sitemap, or it is broken or past a limit.
    """
    start = urlsplit(settings.url).path or "/"
    named = [place for place in (joined(settings.url, place) for place in robots.sitemaps) if place]
    named = [settings.sitemap] if settings.sitemap else named or [urljoin(settings.url, "/sitemap.xml")]
    waiting = deque(dict.fromkeys(named))
    seen = set(waiting)
    found: set[str] = set()
    taken = read = 0
    while waiting:
        place = waiting.popleft()
        read += 1
        if read > SITEMAPS:
            raise ValueError(f"{client.host} has more than {SITEMAPS:,} sitemaps")
        if not client.same_host(place):
            continue
        try:
            answer = client.get(place, SITEMAP_BYTES, robots.allows)
        except (WebRefused, NoAnswer) as error:
            raise ValueError(f"the sitemap {path_text(place.encode())} cannot be read: {error}") from error
        if answer.status != 200:
            raise ValueError(
                f"the sitemap {path_text(place.encode())} answers with status {answer.status}: name one with"
                " --sitemap"
            )
        inner, addresses = read_sitemap(answer.body, path_text(place.encode()))
        for address in inner:
            if address not in seen:
                seen.add(address)
                waiting.append(address)
        for address in addresses:
            whole = joined(place, address)
            address = urldefrag(whole)[0] if whole else address
            if address in found:
                continue
            found.add(address)
            if len(found) > PAGES:
                raise ValueError(f"the sitemaps of {client.host} name more than {PAGES:,} pages")
            reason = _page_reason(address, client, start, robots) if whole else "page: no address"
            taken += not reason
            if taken > settings.max_pages:
                reason = reason or "page: past max_pages"
            yield ListedFile(path_text(address.encode("utf-8", "replace")), address, 0, reason)
    if not found:
        raise ValueError(f"the sitemap of {client.host} names no page")


def _page_reason(address: str, client: Client, start: str, robots: Robots) -> str:
    if len(address) > 2000 or not re.fullmatch(r"[!-~]+", address):
        return "page: no address"
    if not client.same_host(address):
        return "page: on another host"
    parts = urlsplit(address)
    if not (parts.path or "/").startswith(start):
        return "page: outside the address"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return "" if robots.allows(path) else "page: robots.txt forbids it"


def read_sitemap(data: bytes, place: str) -> tuple[list[str], list[str]]:
    """Return (sitemaps, pages) that a sitemap names; it may be compressed. No XML entity is expanded.

    Raises:
        ValueError: the sitemap is truncated, too large, or none.
    """
    if data[:2] == b"\x1f\x8b":
        try:
            data = b"".join(gunzipped([data], SITEMAP_BYTES))
        except WebTooLarge:
            raise ValueError(f"the sitemap {place} unpacks to more than {SITEMAP_BYTES:,} bytes") from None
        except (WebRefused, OSError, zlib.error) as error:
            raise ValueError(f"the sitemap {place} is damaged") from error
    found: dict[str, list[str]] = {"sitemap": [], "url": []}
    parents = ["", ""]
    text: list[str] = []
    depth = 0

    def open_element(name: str, _: object) -> None:
        nonlocal depth
        depth += 1
        if depth > 20:
            raise ValueError(f"the sitemap {place} is nested more than 20 deep")
        parents.append(name.rpartition(" ")[2])
        text.clear()

    def close_element(_: str) -> None:
        nonlocal depth
        depth -= 1
        if parents.pop() == "loc" and parents[-1] in found:
            found[parents[-1]].append("".join(text).strip())

    def refuse(*_: object) -> None:
        raise ValueError(f"the sitemap {place} declares a document type, which none needs")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartElementHandler = open_element
    parser.EndElementHandler = close_element
    parser.CharacterDataHandler = text.append
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, LookupError) as error:
        raise ValueError(f"the sitemap {place} is no XML: {error}") from error
    return found["sitemap"], found["url"]


# ---------------------------------------------------------------------------------------------
# Reading the pages


def read_pages(
    ledger: Ledger, name: str, settings: SiteSettings, wanted: Wanted, client: Client, robots: Robots
) -> None:
    """Read the pages that wait, and store their examples.

    Raises:
        ValueError: the site does not answer any more; the pages that were not read go on waiting.
    """
    from config.bars import progress_bar

    unanswered: list[tuple[str, str]] = []
    waiting = [entry for entry in ledger.waiting(name) if client.same_host(entry.address)]
    for page in progress_bar(waiting, desc=name, unit=" pages"):
        try:
            answer = client.get(page.address, settings.page_bytes, robots.allows)
        except NoAnswer as error:
            unanswered.append((page.path, str(error)))
            if len(unanswered) == UNANSWERED:
                raise ValueError(
                    f"{client.host} left {UNANSWERED} pages in a row without an answer ({error}): run again"
                    " later, and it goes on"
                ) from error
            continue
        except WebRefused as error:
            reason = f"page: {error}"
        else:
            reason = f"page: status {answer.status}" if answer.status != 200 else ""
            if not reason and answer.kind not in ("text/html", "application/xhtml+xml"):
                reason = "page: no HTML"
            if not reason:
                reason = _take_page(ledger, name, page.address, decoded(answer.body, answer.charset), wanted)
        for path, _ in unanswered:
            ledger.dropped(name, path, "page: no answer")
        unanswered = []
        ledger.dropped(name, page.path, reason)
    for path, _ in unanswered:
        ledger.dropped(name, path, "page: no answer")
    # A run that was killed inside a page may have listed examples which the page has no more.
    for entry in ledger.waiting(name):
        ledger.dropped(name, entry.path, "gone since it was listed")


def _take_page(ledger: Ledger, name: str, address: str, text: str, wanted: Wanted) -> str:
    """Store a page's examples and return the page's outcome; a second call changes nothing."""
    parts = urlsplit(address)
    place = parts.path.lstrip("/") + (f"?{parts.query}" if parts.query else "")
    entries, files = [], []
    for number, example in enumerate(examples(text), 1):
        data = example.text.encode("utf-8", "replace")
        path = f"{place}#{number}{example.extension}"
        reason = wanted.reason(path.encode(), len(data))
        entries.append(ListedFile(path, blob_id(data), len(data), reason))
        if not reason:
            files.append((path, data))
    what = READ if entries else EMPTY
    states: dict[str, str] = {}  # path -> state of the examples that a killed run has listed
    with ledger.transaction() as db:
        for entry in entries:
            query = "SELECT path, state FROM files WHERE repository = ? AND path = ?"
            states.update(db.execute(query, (name, entry.path)).fetchall())
    ledger.listed(name, "", [entry for entry in entries if entry.path not in states])
    ledger.stored(name, [file for file in files if states.get(file[0], "found") == "found"])
    return what


def decoded(body: bytes, charset: str) -> str:
    """Decode a page by the server's charset, or its own, or as UTF-8; replace bytes that do not fit."""
    if not charset:
        said = re.search(
            rb"""<meta[^>]{0,200}charset\s{0,9}=\s{0,9}["']?([\w.:-]{1,40})""", body[:4096], re.IGNORECASE
        )
        charset = said.group(1).decode("ascii", "replace") if said else "utf-8"
    try:
        return body.decode(charset, "replace")
    except (LookupError, ValueError):  # codecs from bytes to bytes, such as zlib, are a LookupError
        return body.decode("utf-8", "replace")
