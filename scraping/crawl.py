"""python -m scraping crawl: find repositories on GitHub, and fetch their files.

    GITHUB_TOKEN=... python -m scraping crawl --language Python --min_stars 100 --created_after 2015-01-01

First all repositories are found (`scraping.search`), then threads take one each (`scraping.fetch`). The
ledger has each step in one transaction: after a kill the same command goes on. At the end `manifest.jsonl`
says what became of every repository and file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from scraping.fetch import HostedRepository, fetch, recheck
from scraping.github import MAX_CONCURRENT, Clock, GitHub, Unanswered
from scraping.ledger import Ledger, claimed_ledger
from scraping.search import Slice, begin, search
from scraping.shards import parse_shard
from scraping.source import Selection
from scraping.status import status_lines

PAGE_ROWS = 1000  # of the ledger in memory
FAILURES = 10  # repositories in a row after which a crawl gives up


@dataclass(frozen=True)
class CrawlSettings(Selection):
    """What is crawled, and where it goes. The token is read from the variable GITHUB_TOKEN.

    Args:
        language: Of the repositories, by GitHub's own judgement; "" means any.
        min_stars: The fewest stars of a repository.
        created_after: A date, or a time as in 2015-01-01T00:00:00Z.
        created_before: The same; "" means when the crawl began.
        licence: GitHub's keyword for a licence, as in `mit` or `apache-2.0`; "" means any or none.
        max_repositories: Stop after so many; 0 means all.
        workers: Repositories that are fetched at a time, at most 100.
        shard: `i/n`: the repositories that belong to part i of n, counted from 0; each part has a folder of
            its own.
        recheck: Fetch nothing, and ask of every repository that was fetched whether it is still there: what
            may not be kept for legal reasons is removed.
        api: Of GitHub, or of an Enterprise Server: https://HOST/api/v3
    """

    language: str = "Python"
    min_stars: int = 100
    created_after: str = "2015-01-01"
    created_before: str = ""
    licence: str = ""
    max_repositories: int = 0
    workers: int = 4
    shard: str = "0/1"
    recheck: bool = False
    api: str = "https://api.github.com"


FREE = ("folder", "max_repositories", "workers", "recheck")  # may change from run to run of one crawl


def run(settings: CrawlSettings) -> None:
    """Crawl until all is done; ValueError if something is left, which the same command goes on with."""
    stop = threading.Event()

    def sleep(seconds: float) -> None:
        if stop.wait(seconds):
            raise Stopped

    crawl(settings, Clock(sleep=sleep), stop)


def crawl(settings: CrawlSettings, clock: Clock, stop: threading.Event) -> None:
    """See `run`. The clock's `sleep` may raise Stopped once `stop` is set."""
    from tqdm import tqdm

    shard = parse_shard(settings.shard)
    wanted = settings.wanted()
    whole = Slice(
        _seconds("created_after", settings.created_after),
        _seconds("created_before", settings.created_before) if settings.created_before else int(clock.now()),
        settings.min_stars,
    )
    if whole.created_from > whole.created_to:
        raise ValueError(
            f"created_after is {settings.created_after} and created_before is"
            f" {settings.created_before or 'now'}: set them the other way round"
        )
    if not 1 <= settings.workers <= MAX_CONCURRENT:
        raise ValueError(f"workers is {settings.workers}; GitHub allows 1 to {MAX_CONCURRENT}")
    if settings.min_stars < 0 or settings.max_repositories < 0:
        raise ValueError("min_stars and max_repositories may not be negative")
    folder = Path(settings.folder)
    with claimed_ledger(folder) as ledger:
        _refuse_changes(ledger, settings)
        for left in folder.glob("git-*"):  # by a kill
            shutil.rmtree(left, ignore_errors=True)
        token = os.environ.get("GITHUB_TOKEN", "").strip()
        if not token:
            print("warning: without GITHUB_TOKEN, GitHub allows 60 requests an hour", file=sys.stderr)
        client = GitHub(settings.api, token, ledger, clock)
        client.learn_limits()
        if settings.recheck:
            states, job = ("done",), recheck
        else:
            _search(client, ledger, settings, whole, shard)
            states, job = ("found", "listed"), fetch
        todo = repositories(ledger, states, settings.max_repositories)
        count = sum(1 for _ in repositories(ledger, states, settings.max_repositories))
        with tqdm(desc=job.__name__, total=count, unit="repo", disable=None, dynamic_ncols=True) as bar:
            client.told = lambda why, seconds: bar.set_postfix_str(_until(why, seconds))
            failed = _in_threads(
                lambda repository: job(client, ledger, wanted, repository, folder),
                todo,
                settings.workers,
                stop,
                bar.update,
            )
        write_manifest(ledger, folder / "manifest.jsonl")
        print("\n".join(status_lines(ledger)))
        if failed:
            raise ValueError(
                f"{len(failed)} repositories are left, the first because {failed[0]}; run it again"
            )


def _search(
    client: GitHub, ledger: Ledger, settings: CrawlSettings, whole: Slice, shard: tuple[int, int]
) -> None:
    """Find the repositories; the bar goes over the days on which they were created."""
    from tqdm import tqdm

    begin(ledger, whole)
    day = 86_400
    days = (whole.created_to - whole.created_from) / day
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}{postfix}"
    with tqdm(
        desc="search", total=days, unit=" days", disable=None, dynamic_ncols=True, bar_format=form
    ) as bar:
        count = 0

        def told(until: int, new: int) -> None:
            nonlocal count
            count += new
            bar.set_postfix_str(f"{count:,} new repositories")
            bar.update((until - whole.created_from) / day - bar.n)

        client.told = lambda why, seconds: bar.set_postfix_str(_until(why, seconds))
        search(client, ledger, _words(settings), shard, settings.max_repositories, told)


def _until(why: str, seconds: float) -> str:
    return f"{why}, until {datetime.now() + timedelta(seconds=seconds):%H:%M:%S}"


class Stopped(Exception):
    """The crawl ends; nothing is wrong with what was under way."""


def _in_threads(
    job: Callable[[HostedRepository], None],
    items: Iterator[HostedRepository],
    workers: int,
    stop: threading.Event,
    done: Callable[[], Any],
) -> list[str]:
    """Do all; why those that were given up failed.

    Raises:
        Whatever a job raised, other than Unanswered. FAILURES of these in a row are raised, too.
    """
    lock = threading.Lock()
    failed: list[str] = []
    raised: list[BaseException] = []
    in_a_row = 0

    def work() -> None:
        nonlocal in_a_row
        while not stop.is_set():
            with lock:
                item = next(items, None)
            if item is None:
                return
            try:
                job(item)
            except Unanswered as error:
                with lock:
                    failed.append(str(error))
                    in_a_row += 1
                    if in_a_row >= FAILURES:
                        raised.append(error)
                        stop.set()
                continue
            except Stopped:
                return
            except BaseException as error:
                with lock:
                    raised.append(error)
                stop.set()
                return
            with lock:
                in_a_row = 0
                done()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:  # an interrupt, too: what is under way ends at its next wait or file
        stop.set()
        for thread in threads:
            thread.join(5)
    if raised:
        raise raised[0]
    return failed


def repositories(ledger: Ledger, states: tuple[str, ...], limit: int) -> Iterator[HostedRepository]:
    """Of the first `limit` by id (0: all), those in these states, as they are when their turn comes."""
    last = -1
    for start in range(0, limit or sys.maxsize, PAGE_ROWS):
        rows = ledger.rows(
            "SELECT id, name, branch, clone_url, bytes, state, pinned"
            " FROM hosted JOIN repositories USING (name) WHERE id > ? ORDER BY id LIMIT ?",
            last,
            min(PAGE_ROWS, (limit or sys.maxsize) - start),
        )
        if not rows:
            return
        last = rows[-1][0]
        found = (HostedRepository(*row) for row in rows)
        yield from (repository for repository in found if repository.state in states)


# ---------------------------------------------------------------------------------------------
# The crawl's settings


def _words(settings: CrawlSettings) -> str:
    words = {"language": settings.language, "license": settings.licence}
    for key, value in words.items():
        if '"' in value:
            raise ValueError(f"{key} is {value}; write it without quotation marks")
    return " ".join(
        f'{key}:"{value}"' if " " in value else f"{key}:{value}" for key, value in words.items() if value
    )


def _seconds(name: str, text: str) -> int:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{name} is {text}; write a date such as 2015-01-01") from None
    return int(time.replace(tzinfo=time.tzinfo or UTC).timestamp())


def _refuse_changes(ledger: Ledger, settings: CrawlSettings) -> None:
    """ValueError if this ledger began with other settings: its counts would add up to neither."""
    now = {key: json.dumps(value) for key, value in dataclasses.asdict(settings).items() if key not in FREE}
    before = dict(ledger.rows("SELECT key, value FROM crawl"))
    for key, value in now.items():
        if before and before.get(key) != value:
            raise ValueError(
                f"{key} was {before.get(key)} when the crawl in {settings.folder} began and is {value} now; "
                "set it back, or name another --folder"
            )
    with ledger.transaction() as db:
        db.executemany("INSERT OR IGNORE INTO crawl VALUES (?, ?)", now.items())


def write_manifest(ledger: Ledger, path: Path) -> None:
    """`Ledger.manifest`, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        for line in ledger.manifest():
            file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
