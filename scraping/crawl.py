"""python -m scraping crawl: find repositories on GitHub, and fetch their files.

    GITHUB_TOKEN=... python -m scraping crawl --language Python --min_stars 100 --created_after 2015-01-01

First all repositories are found (`scraping.search`), then threads fetch one each (`scraping.fetch`). Each
step is one transaction of the ledger, so that the same command goes on after a kill. At the end
`manifest.jsonl` records every repository and file with its state.
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

PAGE_ROWS = 1000  # rows of the ledger that are in memory at a time
FAILURES = 10  # A crawl gives up after this many repositories in a row without an answer.


@dataclass(frozen=True)
class CrawlSettings(Selection):
    """Settings of the command crawl. The token is read from the environment variable GITHUB_TOKEN.

    Args:
        language: The repositories' language, by GitHub's own judgement; "" means any.
        min_stars: The fewest stars of a repository.
        created_after: A date, or a time as in 2015-01-01T00:00:00Z.
        created_before: A date or time likewise; "" means when the crawl began.
        licence: GitHub's keyword for a licence, as in `mit` or `apache-2.0`; "" means any or none.
        max_repositories: Stop after this many; 0 means all.
        workers: Number of repositories that are fetched at a time, at most 100.
        shard: `i/n`: the repositories that belong to part i of n, counted from 0; each part has a folder of
            its own.
        recheck: Fetch nothing, but look whether every repository that was fetched is still there, and remove
            what may not be kept for legal reasons.
        api: Address of GitHub's API, or of an Enterprise Server's: https://HOST/api/v3
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


# Settings that may change between the runs of one crawl.
FREE = ("folder", "max_repositories", "workers", "recheck")


def run(settings: CrawlSettings) -> None:
    """Crawl until all is done; raise a ValueError if repositories are left for another run."""
    stop = threading.Event()

    def sleep(seconds: float) -> None:
        if stop.wait(seconds):
            raise Stopped

    crawl(settings, Clock(sleep=sleep), stop)


def crawl(settings: CrawlSettings, clock: Clock, stop: threading.Event) -> None:
    """Crawl as `run` does, by a clock whose `sleep` may raise Stopped once `stop` is set."""
    from config.bars import progress_bar

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
        for left in folder.glob("git-*"):  # left by a run that was killed
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
        with progress_bar(desc=job.__name__, total=count, unit="repo", dynamic_ncols=True) as bar:
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
    """Find the repositories, under a progress bar over the days on which they were created."""
    from config.bars import progress_bar

    begin(ledger, whole)
    day = 86_400
    days = (whole.created_to - whole.created_from) / day
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}{postfix}"
    with progress_bar(desc="search", total=days, unit=" days", dynamic_ncols=True, bar_format=form) as bar:
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
    """The crawl ends, and the work under way is given up without a fault of its own."""


def _in_threads(
    job: Callable[[HostedRepository], None],
    items: Iterator[HostedRepository],
    workers: int,
    stop: threading.Event,
    done: Callable[[], Any],
) -> list[str]:
    """Do the job on all items; return the messages of those that failed by Unanswered.

    Raises:
        Unanswered: FAILURES items in a row failed by it.
        BaseException: whatever else a job raised.
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
    finally:  # After an interrupt too: each job ends at its next wait or file.
        stop.set()
        for thread in threads:
            thread.join(5)
    if raised:
        raise raised[0]
    return failed


def repositories(ledger: Ledger, states: tuple[str, ...], limit: int) -> Iterator[HostedRepository]:
    """Yield those of the first `limit` repositories by id (0: all) that are in these states at their turn."""
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
    """Raise a ValueError if this ledger began with other settings: its counts would fit neither."""
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
    """Write `Ledger.manifest` to a file, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        for line in ledger.manifest():
            file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
