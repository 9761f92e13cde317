"""Search all repositories that GitHub knows of, although it gives at most 1,000 results to a query.

A search is cut into slices by the time of creation, and below one second by stars, until each has at most
1,000 results. A slice is a row of the ledger. It is either split, or all its pages are read and its results
entered in the same transaction that marks it done, so that a search that was killed goes on at its slices.

Source: docs.github.com/en/rest/search/search ("up to 1,000 results for each search", "Timeouts and incomplete
results") and docs.github.com/en/search-github, "Understanding the search syntax".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from scraping.documents import UNKNOWN
from scraping.github import GitHub, GitHubAnswer, Malformed
from scraping.ledger import Ledger

RESULTS = 1000  # most results of a query
PAGE = 100  # most results of a page
FILL = 0.7  # A slice is cut to this share of RESULTS, since repositories are not spread evenly over time.
PASSES = 3  # most readings of a slice whose results move from page to page meanwhile
INCOMPLETE_TRIES = 3
MANY_STARS = 2_000_000  # More than any repository has.


@dataclass(frozen=True)
class Slice:
    """Repositories created in [created_from, created_to] (seconds) with stars in [stars_from, stars_to]."""

    created_from: int
    created_to: int
    stars_from: int
    stars_to: int = -1  # -1 means without end

    @property
    def words(self) -> str:
        since, until = (
            datetime.fromtimestamp(t, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            for t in (self.created_from, self.created_to)
        )
        end = "*" if self.stars_to < 0 else self.stars_to
        return f"created:{since}..{until} stars:{self.stars_from}..{end}"

    def split(self, total: int) -> list[Slice]:
        """Return pieces of about FILL * RESULTS results if `total` are spread evenly; [] for a point."""
        seconds = self.created_to - self.created_from + 1
        if seconds > 1:
            pieces = min(seconds, max(2, round(total / (FILL * RESULTS) + 0.5)))
            starts = [self.created_from + seconds * i // pieces for i in range(pieces)]
            ends = [*(start - 1 for start in starts[1:]), self.created_to]
            return [Slice(*span, self.stars_from, self.stars_to) for span in zip(starts, ends, strict=True)]
        if self.stars_to < 0:
            middle = 2 * self.stars_from + 10  # Far from the mean, since few repositories have many stars.
            if middle > MANY_STARS:
                return []
        elif self.stars_to > self.stars_from:
            middle = (self.stars_from + self.stars_to) // 2
        else:
            return []
        at = (self.created_from, self.created_to)
        return [Slice(*at, self.stars_from, middle), Slice(*at, middle + 1, self.stars_to)]


@dataclass(frozen=True)
class Hosted:
    """A repository as a search result names it. `licence` is an SPDX id or UNKNOWN."""

    id: int
    name: str
    branch: str
    licence: str
    clone_url: str


@dataclass(frozen=True)
class Page:
    total: int
    incomplete: bool
    results: list[Hosted]
    next_url: str


def read_page(answer: GitHubAnswer) -> Page:
    """Read a page of results; raise Malformed, KeyError or TypeError for anything else."""
    body = answer.json()
    results = []
    for item in body["items"]:
        found = Hosted(
            int(item["id"]),
            str(item["full_name"]),
            str(item["default_branch"]),
            spdx(item.get("license")),
            str(item.get("clone_url") or ""),
        )
        if not re.fullmatch(r"[\w.-]{1,100}/[\w.-]{1,100}", found.name, re.ASCII) or not found.branch:
            raise Malformed("a result has no name or no branch")
        results.append(found)
    return Page(int(body["total_count"]), bool(body["incomplete_results"]), results, answer.next_url)


def spdx(licence: object) -> str:
    """Return the SPDX id in GitHub's `license` object; UNKNOWN for null and NOASSERTION."""
    name = licence.get("spdx_id") if isinstance(licence, dict) else None
    known = (
        isinstance(name, str) and name != "NOASSERTION" and re.fullmatch(r"[\w.+-]{1,100}", name, re.ASCII)
    )
    return str(name) if known else UNKNOWN


def in_shard(repository: int, shard: tuple[int, int]) -> bool:
    """Return whether a repository belongs to shard (i, n), by the hash of its id, which no rename changes."""
    number, shards = shard
    return int(hashlib.sha256(str(repository).encode()).hexdigest(), 16) % shards == number


def begin(ledger: Ledger, whole: Slice) -> None:
    """Enter the whole range as the first slice of a ledger that has none."""
    with ledger.transaction() as db:
        if not db.execute("SELECT 1 FROM searches LIMIT 1").fetchone():
            _add(db, [whole])


def search(
    client: GitHub,
    ledger: Ledger,
    words: str,
    shard: tuple[int, int],
    enough: int,
    told: Callable[[int, int], None],
) -> None:
    """Read slice after slice until all are done, or until the ledger has `enough` repositories (0: no end).

    Args:
        words: The words that all queries have in common, as in `language:Python`.
        told: Called after each slice with the time of creation up to which all repositories are found, and
            with the number of new ones.

    Raises:
        Unanswered: GitHub fails, and keeps failing.
    """
    while not enough or ledger.rows("SELECT count(*) FROM hosted")[0][0] < enough:
        rows = ledger.rows(
            "SELECT created_from, created_to, stars_from, stars_to FROM searches"
            " WHERE state = 'found' ORDER BY 1, 2, 3 LIMIT 1"
        )
        if not rows:
            return
        piece = Slice(*rows[0])
        results, reason, pieces = _read_slice(client, f"{words} {piece.words}".strip(), piece)
        with ledger.transaction() as db:
            new = [result for result in results if in_shard(result.id, shard) and _is_new(ledger, result)]
            _add(db, pieces)
            db.execute(
                "UPDATE searches SET state = ?, reason = ? WHERE created_from = ? AND created_to = ?"
                " AND stars_from = ? AND stars_to = ?",
                ("split" if pieces else "done", reason, *rows[0]),
            )
        if not pieces:
            told(piece.created_to, len(new))


def _add(db: Any, pieces: list[Slice]) -> None:
    db.executemany(
        "INSERT INTO searches (created_from, created_to, stars_from, stars_to) VALUES (?, ?, ?, ?)",
        [(p.created_from, p.created_to, p.stars_from, p.stars_to) for p in pieces],
    )


def _is_new(ledger: Ledger, result: Hosted) -> bool:
    """Enter a repository; return False if its id is known, under whatever name."""
    if ledger.rows("SELECT 1 FROM hosted WHERE id = ?", result.id):
        return False
    name = result.name
    if ledger.rows("SELECT 1 FROM repositories WHERE name = ?", name):
        # The name was given up and taken by another repository, or the other came by `clone`.
        name = f"{name}@{result.id}"
    ledger.found(name, "crawl", result.branch, result.licence)
    with ledger.transaction() as db:
        db.execute(
            "INSERT INTO hosted (id, name, branch, clone_url) VALUES (?, ?, ?, ?)",
            (result.id, name, result.branch, result.clone_url),
        )
    return True


def _read_slice(client: GitHub, words: str, piece: Slice) -> tuple[list[Hosted], str, list[Slice]]:
    """Return (results, why some may be missing, the slices that have to be read instead)."""
    results: dict[int, Hosted] = {}
    totals: set[int] = set()
    incomplete = False
    for _ in range(PASSES):
        url = "/search/repositories?" + urlencode({"q": words, "sort": "stars", "per_page": PAGE})
        seen: set[int] = set()
        totals, incomplete = set(), False
        while url:
            page = _complete_page(client, url)
            incomplete |= page.incomplete
            totals.add(page.total)
            if page.total > RESULTS and (pieces := piece.split(page.total)):
                return list(results.values()), "", pieces
            seen |= {result.id for result in page.results}
            results |= {result.id: result for result in page.results}
            url = page.next_url
        if max(totals) > RESULTS:
            return list(results.values()), f"more than {RESULTS:,} results that cannot be told apart", []
        # Results that move from page to page while they are read are read twice or not at all.
        if len(totals) == 1 and len(seen) == max(totals) and not incomplete:
            return list(results.values()), "", []
    # In a slice of one page, results cannot move; and GitHub finds a smaller slice in less time.
    pieces = piece.split(max(totals)) if max(totals) > PAGE else []
    reason = "incomplete results" if incomplete else "results moved while they were read"
    return list(results.values()), "" if pieces else reason, pieces


def _complete_page(client: GitHub, url: str) -> Page:
    page = client.get(url, read_page)
    for attempt in range(1, INCOMPLETE_TRIES):
        if not page.incomplete:
            break
        client.pause(attempt, "the results are incomplete")
        page = client.get(url, read_page)
    return page
