"""scraping crawl, against a server that answers like GitHub: nothing lost, nothing twice, whatever happens.

The long proof: python -m pytest -m slow tests/test_crawl.py -k proof -s
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from github_server import START, TOKEN, Repo, Server, SharedClock, blob_id, expected, schedule, source, world

import scraping.clone
import scraping.github
import scraping.search
from scraping.crawl import CrawlSettings, Stopped, crawl
from scraping.fetch import CLONE, REQUEST, TARBALL_TRIES, route
from scraping.github import Clock, GitHub, Unanswered
from scraping.ledger import Ledger, ListedFile, claimed_ledger
from scraping.search import Slice, begin, search, spdx
from scraping.status import status_lines

Files = dict[str, tuple[str, bytes | int]]
HERE = Path(__file__).parent
RNG = random.Random(0)
TEXTS = [source(RNG, 1200) for _ in range(40)]


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", TOKEN)


class Place:
    """A server, a clock and a corpus folder; `crawl` crawls in this process."""

    def __init__(self, folder: Path, repos: list[Repo], **options: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.clock = SharedClock(folder / "clock")
        self.server = Server(repos, self.clock, **options)  # type: ignore[arg-type]
        self.folder = folder / "corpus"

    def crawl(self, **changes: object) -> Ledger:
        values = {"folder": str(self.folder), "min_stars": 1, "api": self.server.api, "workers": 2} | changes
        crawl(CrawlSettings(**values), Clock(self.clock.now, self.clock.sleep), threading.Event())  # type: ignore[arg-type]
        return Ledger(Path(str(values["folder"])) / "ledger.sqlite")

    @property
    def rows(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "manifest.jsonl").read_text("utf-8").splitlines()]

    @property
    def stored(self) -> dict[tuple[str, str], str]:
        return {(r["repository"], r["path"]): r["sha256"] for r in self.rows if r["state"] == "stored"}

    @property
    def states(self) -> dict[str, str]:
        """repository, or repository/path -> state and reason."""
        return {
            "/".join([r["repository"], *([r["path"]] if "path" in r else [])]): f"{r['state']}: {r['reason']}"
            for r in self.rows
        }


@pytest.fixture
def place(tmp_path: Path) -> Iterator:
    made: list[Place] = []

    def make(repos: list[Repo], **options: object) -> Place:
        made.append(Place(tmp_path / str(len(made)), repos, **options))
        return made[-1]

    yield make
    for one in made:
        one.server.close()


def plain(id: int, name: str, **changes: object) -> Repo:
    files: Files = {
        f"{folder}m.py": ("100644", TEXTS[(id + i) % 40]) for i, folder in enumerate(("", "a/", "a/b/"))
    }
    return Repo(id, name, **({"files": files} | changes))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------
# The proof


def prove(folder: Path, repositories: int, files: int, faults: int, kills: int, latency: float) -> None:
    """Crawl a world without a fault, then with faults and kills; all that the second must have in common."""
    repos = world(1, repositories, files)
    wanted = expected(repos)
    assert len(wanted) == files
    calm = Place(folder / "calm", repos, cap=60, latency=latency)
    _child(calm, cap=60, page=20)
    assert calm.stored == wanted
    assert calm.server.violations == []
    calm.server.close()

    wild = Place(
        folder / "wild",
        repos,
        cap=60,
        latency=latency,
        seed=3,
        faults=schedule(2, faults, calm.server.count, calm.server.searches),
    )
    rng = random.Random(4)
    kill_at = rng.sample(range(3, int(calm.server.count * 0.95)), kills)
    started = time.monotonic()
    killed = _child(wild, cap=60, page=20, kill_at=kill_at)
    wild.server.close()
    figures = (
        f"{len(wild.stored):,} of {files:,} files in {repositories} repositories, "
        f"{sum(wild.server.injected.values())} faults, {killed} kills, "
        f"{wild.server.count:,} requests, {wild.server.count / calm.server.count:.3f} times the calm run's, "
        f"{len(wild.server.violations)} too early, {wild.server.early} under way when a limit was told, "
        f"{(wild.clock.now() - START) / 3600:.2f} hours of the clock in {time.monotonic() - started:.0f} s"
    )
    print(figures)
    assert killed == kills, figures
    assert sum(wild.server.injected.values()) == faults, figures
    assert wild.stored == wanted
    assert (wild.folder / "manifest.jsonl").read_bytes() == (calm.folder / "manifest.jsonl").read_bytes()
    assert wild.server.violations == []
    assert wild.server.count <= 1.3 * calm.server.count, figures
    assert wild.server.tokens_seen_elsewhere == 0
    assert not any(TOKEN.encode() in path.read_bytes() for path in wild.folder.iterdir())
    # What the files say, too, and not only the hashes in the manifest.
    ledger = Ledger(wild.folder / "ledger.sqlite")
    held = {(f.repository, f.path): hashlib.sha256(f.data).hexdigest() for f in ledger.files()}
    ledger.close()
    assert held == wanted


def _child(place: Place, kill_at: list[int] | None = None, **scale: int) -> int:
    """Crawl in a process of its own, again and again while it is killed; how often that was."""
    settings = {"folder": str(place.folder), "min_stars": 10, "api": place.server.api, "workers": 4} | scale
    child: list[subprocess.Popen] = []

    def kill() -> None:
        place.server.killed()
        os.kill(child[0].pid, signal.SIGKILL)

    place.server.at = dict.fromkeys(kill_at or (), kill)
    killed = 0
    while True:
        command = [sys.executable, str(HERE / "github_server.py"), str(place.folder.parent / "clock")]
        child[:] = [
            subprocess.Popen(
                [*command, json.dumps(settings)],
                cwd=HERE.parent,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        ]
        output = child[0].communicate()[0]
        assert TOKEN not in output
        if child[0].returncode != -signal.SIGKILL:
            assert child[0].returncode == 0, output
            return killed
        killed += 1


def test_faults_and_kills_leave_no_trace(tmp_path: Path) -> None:
    prove(tmp_path, repositories=15, files=300, faults=30, kills=2, latency=0.07)


@pytest.mark.slow
def test_proof_of_10000_files(tmp_path: Path) -> None:
    prove(tmp_path, repositories=300, files=10_000, faults=500, kills=10, latency=0.02)


# ---------------------------------------------------------------------------------------------
# Search


def test_every_repository_is_found_below_the_cap_of_a_query(place) -> None:
    rng = random.Random(5)
    # Most of them in a few weeks, and a crowd in one second.
    created = [rng.randrange(1_420_070_400, 1_690_000_000) for _ in range(300)]
    created += [rng.randrange(1_600_000_000, 1_602_000_000) for _ in range(1500)] + [1_650_000_000] * 1100
    repos = [
        Repo(i, f"o/r{i}", created=c, stars=rng.randrange(1, 900), status=409) for i, c in enumerate(created)
    ]
    here = place(repos)
    ledger = Ledger(here.folder / "ledger.sqlite")
    github = GitHub(here.server.api, TOKEN, ledger, Clock(here.clock.now, here.clock.sleep))
    begin(ledger, Slice(1_420_070_400, 1_700_000_000, 1))
    search(github, ledger, "", (0, 1), 0, lambda until, new: None)
    assert {id for (id,) in ledger.rows("SELECT id FROM hosted")} == set(range(len(repos)))
    assert set(ledger.counts("searches")) == {("split", ""), ("done", "")}
    ledger.close()
    assert here.server.violations == []
    # At the least a page for 100; a crowd in one second takes many cuts to be come upon.
    assert here.server.by_route["search"] < 4 * len(repos) / 100


def test_slices_meet_and_do_not_overlap() -> None:
    rng = random.Random(6)
    points = [(rng.randrange(10), rng.randrange(1, 200)) for _ in range(500)]
    slices = [Slice(0, 9, 1)]
    for _ in range(400):
        piece = slices.pop(rng.randrange(len(slices)))
        slices += piece.split(rng.choice((2, 1500, 40_000))) or [piece]
    for second, stars in points:
        holding = [
            piece
            for piece in slices
            if piece.created_from <= second <= piece.created_to
            and piece.stars_from <= stars
            and (piece.stars_to < 0 or stars <= piece.stars_to)
        ]
        assert len(holding) == 1
    assert any(piece.stars_from == piece.stars_to for piece in slices)


def test_a_slice_in_words() -> None:
    assert Slice(0, 59, 10).words == "created:1970-01-01T00:00:00Z..1970-01-01T00:00:59Z stars:10..*"
    assert Slice(0, 0, 10, 20).words.endswith("stars:10..20")


def test_results_that_never_settle_are_told(place) -> None:
    here = place([plain(i, f"o/r{i}") for i in range(4)], faults=[(n, "drift") for n in range(1, 40)])
    ledger = here.crawl()
    assert ledger.counts("searches") == {("done", "results moved while they were read"): 1}
    ledger.close()
    assert len(here.stored) == 12


def test_results_that_move_from_page_to_page_are_cut_into_pages(place, monkeypatch) -> None:
    monkeypatch.setattr(scraping.search, "PAGE", 3)
    repos = [plain(i, f"o/r{i}", created=1_500_000_000 + 10_000_000 * i) for i in range(9)]
    here = place(repos, faults=[(n, "drift") for n in range(2, 11)])
    ledger = here.crawl()
    counts = ledger.counts("searches")
    ledger.close()
    assert ("split", "") in counts
    assert ("done", "results moved while they were read") not in counts
    assert here.stored == expected(repos)


def test_incomplete_results_are_asked_for_again_and_then_told(place) -> None:
    here = place([plain(i, f"o/r{i}") for i in range(4)], faults=[(2, "incomplete")])
    ledger = here.crawl()
    assert ledger.counts("searches") == {("done", ""): 1}
    assert here.server.by_route["search"] == 2
    ledger.close()
    there = place([plain(i, f"o/r{i}") for i in range(4)], faults=[(n, "incomplete") for n in range(2, 30)])
    ledger = there.crawl()
    assert ledger.counts("searches") == {("done", "incomplete results"): 1}
    ledger.close()
    assert there.states["o/r0"] == "done: "


def test_a_repository_is_known_by_its_id(place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renamed while the search goes on: one id under two names; and its old name taken: two ids, one name."""
    monkeypatch.setattr(scraping.search, "RESULTS", 1)
    old, taker = plain(1, "o/old", created=1_500_000_000), plain(2, "o/old", created=1_600_000_000)
    again = dataclasses.replace(old, id=1, name="o/new", created=1_650_000_000)
    here = place([old, taker], cap=1)
    here.server.repos[3] = again
    ledger = here.crawl()
    ledger.close()
    assert {name for name in here.states if name.count("/") == 1} == {"o/old", "o/old@2"}
    assert len(here.stored) == 6


def test_what_is_searched_for(place) -> None:
    here = place(
        [
            plain(1, "o/yes", stars=50, licence="MIT"),
            plain(2, "o/kotlin", stars=50, language="Kotlin"),
            plain(3, "o/few", stars=49),
            plain(4, "o/old", stars=50, created=1_000_000_000),
            plain(5, "o/gpl", stars=50, licence="GPL-3.0"),
        ]
    )
    here.crawl(min_stars=50, licence="mit").close()
    assert {row["repository"] for row in here.rows} == {"o/yes"}
    assert here.rows[0]["licence"] == "MIT"


def test_a_search_that_github_refuses_is_one_sentence(place) -> None:
    here = place([plain(1, "o/r")])
    with pytest.raises(ValueError, match=r"/search/repositories was refused: 422 Validation Failed$"):
        here.crawl(language="Pyhton")


@pytest.mark.parametrize(
    ("licence", "known"),
    [
        (None, ""),
        ({"spdx_id": "NOASSERTION"}, ""),
        ({"spdx_id": None}, ""),
        ({"spdx_id": "MIT"}, "MIT"),
        ("MIT", ""),
    ],
)
def test_a_licence_is_known_or_not(licence: object, known: str) -> None:
    assert spdx(licence) == known


def test_shards_share_out_the_repositories(place) -> None:
    here = place([plain(i, f"o/r{i}") for i in range(12)])
    parts = []
    for number in range(3):
        folder = f"{here.folder}-{number}"
        here.crawl(folder=folder, shard=f"{number}/3").close()
        rows = [json.loads(line) for line in (Path(folder) / "manifest.jsonl").read_text().splitlines()]
        parts.append({row["repository"] for row in rows})
    assert sum(len(part) for part in parts) == 12
    assert len(set().union(*parts)) == 12
    assert all(parts)


# ---------------------------------------------------------------------------------------------
# Files


def test_the_cheapest_way_is_taken() -> None:
    assert route(files=1, wanted_bytes=5000, tree_bytes=6000) == "blobs"
    assert route(files=2, wanted_bytes=5000, tree_bytes=6000) == "tarball"
    assert route(files=20, wanted_bytes=5000, tree_bytes=500 * 2**20) == "blobs"
    assert route(files=2000, wanted_bytes=10**7, tree_bytes=500 * 2**20) == "git"
    assert route(files=2000, wanted_bytes=10**7, tree_bytes=500 * 2**20, tried=["git"]) == "tarball"
    assert route(files=10**6, wanted_bytes=10**9, tree_bytes=2**40, tried=["git"]) == "blobs"
    assert CLONE > REQUEST


def test_files_of_one_name_and_branches_of_one_name_are_different_files(place) -> None:
    """Once, threads wrote files that were named after the branch: 11,000 of 97,711 were gone."""
    repos = [plain(i, f"o/r{i}", branch=("main", "m.py", "a/m.py")[i % 3]) for i in range(30)]
    here = place(repos, core=7)
    window = here.server.windows["core"]
    window.roll(here.clock.now())
    window.used = 7  # Another program used them just before.
    ledger = here.crawl(workers=8)
    assert ledger.counts() == {("stored", ""): 90}
    ledger.close()
    assert here.server.violations == []  # eight threads know from the start that nothing is left
    assert here.stored == expected(repos)


def test_the_clock_stands_while_an_answer_waits_for_its_thread(tmp_path: Path) -> None:
    """Else an answer about one hour's limit is read in the next hour, and believed to be about that."""
    clock = SharedClock(tmp_path / "clock")
    ledger = Ledger(tmp_path / "ledger.sqlite")
    gate = scraping.github.Gate(Clock(clock.now, clock.sleep), ledger, lambda why, seconds: None)
    sent = gate.enter("host", "core")
    other = threading.Thread(target=clock.sleep, args=(3600.0,))
    other.start()
    other.join(0.2)  # A few milliseconds used to be enough.
    assert other.is_alive() and clock.now() == START
    gate.leave("host", "core", sent, scraping.github.Reply(200))
    other.join()
    assert clock.now() == START + 3600
    ledger.close()


def test_the_order_of_completion_does_not_matter(place) -> None:
    repos = world(9, 12, 150)
    one, many = place(repos), place(repos)
    one.crawl(workers=1).close()
    many.crawl(workers=8).close()
    assert (one.folder / "manifest.jsonl").read_bytes() == (many.folder / "manifest.jsonl").read_bytes()


def test_bytes_that_another_repository_has_are_not_fetched_again(place) -> None:
    files: Files = {"m.py": ("100644", TEXTS[0]), "copy.py": ("100644", TEXTS[0])}
    here = place([Repo(i, f"o/r{i}", files=files) for i in (1, 2, 3)])
    here.crawl(workers=1).close()
    assert here.server.by_route["tarball"] + here.server.by_route["git/blobs"] == 1
    assert len(here.stored) == 6


def test_an_address_that_another_source_gave_is_not_believed(place) -> None:
    repo = plain(1, "o/r")
    here = place([repo])
    ledger = Ledger(here.folder / "ledger.sqlite")
    ledger.found("x", "local", "", "")
    ledger.listed("x", "", [ListedFile("m.py", blob_id(TEXTS[1]), 3)])
    ledger.stored("x", [("m.py", b"abc")])
    ledger.close()
    here.crawl().close()
    assert {file: sha for file, sha in here.stored.items() if file[0] == "o/r"} == expected([repo])


def test_trees_that_are_cut_are_walked(place) -> None:
    files: Files = {
        f"{'abc'[i % 3]}/{'xyz'[i // 3 % 3]}/m{i}.py": ("100644", TEXTS[i % 40] + b"#%d\n" % i)
        for i in range(90)
    }
    files |= {"top.py": ("100644", TEXTS[0])}
    repo = Repo(1, "o/r", files=files)
    here = place([repo], tree_limit=15)
    here.crawl().close()
    assert here.stored == expected([repo])
    assert here.server.by_route["git/trees"] == 2 + 3 * 2 + 9


def test_a_tree_of_trees_without_end_is_dropped(place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scraping.fetch.MAX_TREES", 40)
    repo = plain(1, "o/bomb")
    inner = repo.root
    for i in range(8):  # 10^8 files with 9 objects more
        outer = hashlib.sha1(b"%d" % i).hexdigest()
        repo.trees[outer] = [("040000", f"d{n}", inner, 0) for n in range(10)]
        inner = outer
    repo.root = inner
    repo.below = lambda tree, prefix="": [("100644", "x", "0" * 40, 0)] * 50  # type: ignore[method-assign]
    here = place([repo, plain(2, "o/fine")], tree_limit=20)
    here.crawl().close()
    assert here.states["o/bomb"] == "dropped: tree too large"
    assert here.states["o/fine"] == "done: "


def test_an_archive_that_differs_from_the_commit_is_made_good(place) -> None:
    repo = plain(1, "o/r")
    same_size = repo.files["a/b/m.py"][1]
    assert isinstance(same_size, bytes)
    repo.archived = {"m.py": None, "a/m.py": b"$Format$" * 200, "a/b/m.py": same_size[:-2] + b"?\n"}
    here = place([repo])
    here.crawl().close()
    assert here.server.by_route["git/blobs"] == 3
    assert here.stored == expected([repo])


def test_a_tarball_that_never_comes_whole_is_done_without(place) -> None:
    repo = plain(1, "o/r")
    repo.tarball = lambda: b"no archive" * 100  # type: ignore[method-assign]
    here = place([repo])
    here.crawl().close()
    assert here.server.by_route["tarball"] == TARBALL_TRIES
    assert here.server.by_route["git/blobs"] == 3
    assert here.stored == expected([repo])


def test_files_that_are_none_have_their_reasons(place) -> None:
    repos = world(1, 5, 60)
    here = place(repos)
    ledger = here.crawl()
    assert "4  more of other extensions" in status_lines(ledger)[-1]
    ledger.close()
    reasons = {
        path.removeprefix("owner3/repo3/"): state
        for path, state in here.states.items()
        if path.startswith("owner3/repo3/") and "dropped" in state
    }
    assert reasons == {
        "tiny.py": "dropped: too small",
        "huge.py": "dropped: too large",
        "lfs.py": "dropped: LFS pointer",
        "link.py": "dropped: symbolic link",
        "module.py": "dropped: submodule",
        "odd name\\x0a\\x07é.py": "dropped: too small",
    }


def test_names_that_json_cannot_tell_apart_are_all_kept(place) -> None:
    """The API shows every byte that is no UTF-8 with one sign."""
    repo = plain(1, "o/r")
    tree = repo.root
    for number in (1, 2):
        data = TEXTS[number] + b"#"
        repo.blobs[blob_id(data)] = data
        repo.trees[tree].append(("100644", "\ufffd.py", blob_id(data), len(data)))
    here = place([repo])
    here.crawl().close()
    assert len(here.stored) == 5


def test_the_default_branch_may_have_changed_since_the_search(place) -> None:
    repo = plain(1, "o/r")
    here = place([repo])
    item = repo.item() | {"default_branch": "old"}
    calls = []
    repo.item = lambda: item if not calls and not calls.append(1) else item | {"default_branch": "main"}  # type: ignore[method-assign]
    here.crawl().close()
    assert here.stored == expected([repo])


# ---------------------------------------------------------------------------------------------
# What goes


def test_what_may_not_be_kept_is_removed_with_its_bytes(place) -> None:
    shared = TEXTS[1] + b"shared\n"
    repos = [plain(1, "o/bad", files={"m.py": ("100644", TEXTS[0]), "s.py": ("100644", shared)})]
    repos += [plain(2, "o/good", files={"s.py": ("100644", shared)}), plain(3, "o/gone")]
    here = place(repos)
    here.crawl().close()
    packed = zlib.compress(TEXTS[0], 1)
    assert packed in (here.folder / "ledger.sqlite").read_bytes()
    used = here.server.windows["core"].used
    here.server.repos[1].status, here.server.repos[3].status = 451, 404
    ledger = here.crawl(recheck=True)
    assert here.server.windows["core"].used == used + 2  # o/good answered 304, which does not count
    assert here.states["o/bad"] == "dropped: unavailable for legal reasons"
    assert here.states["o/bad/m.py"] == "dropped: unavailable for legal reasons"
    assert here.states["o/good/s.py"] == here.states["o/gone/m.py"] == "stored: "
    assert {file.data for file in ledger.files()} == {shared, *(data for _, data in repos[2].files.values())}
    ledger.close()
    assert not any(packed in path.read_bytes() for path in here.folder.iterdir())
    rows = [r for r in here.rows if r["repository"] == "o/bad" and "path" in r]
    assert [row["sha256"] for row in rows] == [None, None]


@pytest.mark.parametrize(
    ("status", "reason"), [(404, "not found"), (410, "gone"), (451, "unavailable for legal reasons")]
)
def test_a_repository_that_goes_while_it_is_fetched(place, status: int, reason: str) -> None:
    files: Files = {f"m{i}.py": ("100644", TEXTS[i]) for i in range(6)}
    files["data.bin"] = ("100644", 2**29)
    repo, other = Repo(1, "o/r", files=files), plain(20, "o/fine")
    here = place([repo, other])

    def go() -> None:
        repo.status = status

    here.server.at = {7: go}
    here.server.rng = random.Random(1)
    ledger = here.crawl(workers=1)
    counts = ledger.counts()
    ledger.close()
    stored = 3 if status == 451 else counts["stored", ""]
    assert counts == {("stored", ""): stored, ("dropped", reason): 9 - stored}
    assert stored < 9
    assert here.states["o/fine"] == "done: "
    if status != 451:  # the rest of its files is not asked for one by one
        assert here.server.by_route["git/blobs"] == stored - 3 + 1


def test_a_failure_leaves_its_repository_for_the_next_run(place) -> None:
    repo, other = plain(1, "o/r"), plain(2, "o/fine")
    here = place([repo, other])
    commit, repo.commit = repo.commit, "no commit"
    with pytest.raises(
        ValueError, match=r"^1 repositories are left, the first because .*/repositories/1/comm"
    ):
        here.crawl()
    assert here.states["o/r"] == "found: "
    assert here.states["o/fine"] == "done: "
    repo.commit = commit
    here.crawl().close()
    assert here.stored == expected([repo, other])


def test_a_server_that_is_down_ends_the_crawl(place) -> None:
    repos = [plain(i, f"o/r{i}", status=500) for i in range(30)]
    here = place(repos)
    with pytest.raises(Unanswered, match="failed 8 times"):
        here.crawl(workers=1)
    assert here.server.count < 100


def test_a_full_disk_is_said_and_what_is_there_stays(place, monkeypatch: pytest.MonkeyPatch) -> None:
    repos = [plain(i, f"o/r{i}") for i in range(4)]
    here = place(repos)
    calls = []
    stored = Ledger.stored

    def full(self: Ledger, name: str, files: list) -> None:
        calls.append(name)
        if len(calls) == 2:
            with self.transaction() as db:
                db.execute("PRAGMA max_page_count=1")
                stored(self, name, [(path, os.urandom(2**20)) for path, _ in files])
        stored(self, name, files)

    monkeypatch.setattr(Ledger, "stored", full)
    with pytest.raises(ValueError, match="cannot be written: database or disk is full"):
        here.crawl(workers=1)
    monkeypatch.undo()
    monkeypatch.setenv("GITHUB_TOKEN", TOKEN)
    here.crawl().close()
    assert here.stored == expected(repos)


# ---------------------------------------------------------------------------------------------
# The command


def test_an_interrupt_ends_the_threads_where_they_wait(place) -> None:
    here = place([plain(i, f"o/r{i}") for i in range(20)], faults=[(10, "secondary")])
    stop = threading.Event()

    def sleep(seconds: float) -> None:
        if seconds > 4:
            stop.set()
            raise Stopped
        here.clock.sleep(seconds)

    settings = CrawlSettings(folder=str(here.folder), min_stars=1, api=here.server.api)
    crawl(settings, Clock(here.clock.now, sleep), stop)
    states = {row["state"] for row in here.rows}
    assert "found" in states
    here.crawl(workers=4).close()
    assert len(here.stored) == 60
    assert here.server.violations == []


def test_alone_not_one_request_comes_before_a_limit_ends(place) -> None:
    limits = [(n, kind) for n in range(3, 60, 6) for kind in ("secondary", "silent", "429")]
    here = place(world(9, 6, 60), faults=limits, core=40)
    here.crawl(workers=1).close()
    assert sum(here.server.injected.values()) > 15
    assert (here.server.early, here.server.violations) == (0, [])
    assert here.clock.now() - START > 3600


def test_the_command_is_interrupted_while_it_waits_and_then_goes_on(place) -> None:
    repos = [plain(i, f"o/r{i}") for i in range(6)]
    here = place(repos, faults=[(9, "secondary")], latency=0.0)
    flags = ["--folder", str(here.folder), "--min_stars", "1", "--api", here.server.api]
    command = [sys.executable, "-m", "scraping", "crawl", *flags]
    with subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        while not here.server.blocked_at:
            time.sleep(0.01)
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        assert child.communicate(timeout=20) == (b"", b"interrupted\n")
        assert child.returncode == 130
    ledger = Ledger(here.folder / "ledger.sqlite")
    assert next(iter(ledger.limits().values())) > time.time()
    with ledger.transaction() as db:
        db.execute("DELETE FROM limits")  # It is as if the time had passed.
    ledger.close()
    here.server.blocked_until = 0.0
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=True)
    assert "18  stored" in done.stdout
    assert done.stderr == ""
    assert here.stored == expected(repos)


def test_a_second_crawl_in_a_folder_is_refused(place) -> None:
    here = place([plain(1, "o/r")])
    with (
        claimed_ledger(here.folder),
        pytest.raises(ValueError, match=r"another crawl is under way in .*corpus"),
    ):
        here.crawl()
    here.crawl().close()


def test_a_crawl_keeps_the_settings_it_began_with(place) -> None:
    here = place([plain(i, f"o/r{i}") for i in range(5)])
    here.crawl(max_repositories=2).close()
    assert len(here.stored) == 6
    with pytest.raises(
        ValueError, match=r'language was "Python" when the crawl in .* began and is "Kotlin" now'
    ):
        here.crawl(language="Kotlin")
    here.crawl(max_repositories=4, workers=3).close()
    assert len(here.stored) == 12


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shard": "4/4"}, "--shard is '4/4'; it must be i/n, with i from 0 to n - 1"),
        ({"shard": "-1/4"}, "--shard is '-1/4'"),
        ({"created_after": "soon"}, "created_after is soon; write a date"),
        ({"created_after": "2030-01-01"}, "set them the other way round"),
        ({"workers": 101}, "workers is 101; GitHub allows 1 to 100"),
        ({"workers": 0}, "workers is 0"),
        ({"extensions": ("py",)}, "name each as in .py"),
        ({"min_bytes": 9, "max_bytes": 8}, "min_bytes is 9 and max_bytes is 8"),
        ({"api": "github"}, "api is github; it must be a URL"),
    ],
)
def test_a_mistake_is_one_sentence(place, changes: dict, says: str) -> None:
    here = place([])
    with pytest.raises(ValueError, match=re.escape(says)):
        here.crawl(**changes)


def test_the_command_says_it_in_one_sentence(place) -> None:
    here = place([plain(1, "o/r")])
    flags = [
        "--folder",
        str(here.folder),
        "--min_stars",
        "1",
        "--api",
        here.server.api,
        "--extensions",
        ".py,.kt",
    ]
    command = [sys.executable, "-m", "scraping", "crawl", *flags]
    wrong = subprocess.run(
        command,
        cwd=HERE.parent,
        env=os.environ | {"GITHUB_TOKEN": "ghp_wrong"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert wrong.returncode == 2
    assert re.fullmatch(
        r"error: \S+ refuses the token \(Bad credentials\); set GITHUB_TOKEN .*\n", wrong.stderr
    )
    assert "ghp_wrong" not in wrong.stdout + wrong.stderr


# ---------------------------------------------------------------------------------------------
# A real repository


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Repo]:
    """A git repository with attributes that change archives, and a `git daemon` that serves it."""
    work = tmp_path / "work"
    work.mkdir()
    files: dict[str, bytes] = {
        ".gitattributes": b"left_out.py export-ignore\nversion.py export-subst\ncrlf.py text eol=crlf\n",
        "left_out.py": TEXTS[0],
        "version.py": TEXTS[1] + b"# $Format:%H$\n",
        "crlf.py": TEXTS[2],
        "a/b/c.py": TEXTS[3],
        "caf\u00e9 \U0001f600.py": TEXTS[4],
        "small.py": b"x",
        "read.md": TEXTS[5],
        "latin.py": TEXTS[6] + b"\xe9\xff\0",
        **{f"many/m{i}.py": TEXTS[i] + b"#%d" % i for i in range(20)},
    }
    for name, data in files.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(data)
    (work / "link.py").symlink_to("a/b/c.py")

    def git(*words: str) -> bytes:
        quiet = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
        names = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
        return subprocess.run(
            ["git", *names, "-C", str(work), *words], env=os.environ | quiet, check=True, capture_output=True
        ).stdout

    git("init", "--quiet")
    git("config", "uploadpack.allowFilter", "true")
    git("config", "uploadpack.allowAnySHA1InWant", "true")
    git("config", "core.autocrlf", "false")
    git("add", "-A")
    git("commit", "--quiet", "-m", "first")
    commit = git("rev-parse", "HEAD").decode().strip()
    repo = Repo(
        1,
        "o/real",
        files={
            **{name: ("100644", data) for name, data in files.items()},
            "link.py": ("120000", b"a/b/c.py"),
        },
    )
    assert repo.root == git("rev-parse", "HEAD^{tree}").decode().strip()  # the server's trees are git's
    repo.commit = commit
    archive = git("archive", "--format=tar.gz", "--prefix=o-real-abc/", "HEAD")
    repo.tarball = lambda: archive  # type: ignore[method-assign]
    port = _free_port()
    repo.clone_url = f"git://127.0.0.1:{port}/work"
    flags = ["--export-all", "--reuseaddr", f"--base-path={tmp_path}", "--listen=127.0.0.1", f"--port={port}"]
    with subprocess.Popen(
        ["git", "daemon", *flags, str(tmp_path)], stderr=subprocess.DEVNULL, start_new_session=True
    ) as daemon:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.02)
        yield repo
        os.killpg(daemon.pid, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_real_repository_is_the_same_by_every_way(place, real: Repo, monkeypatch) -> None:
    seen, ways = [], []
    for way in ("tarball", "blobs", "git"):
        here = place([real])

        def route(files: int, *sizes: object, way: str = way) -> str:
            ways.append((way, files))
            return way if way not in sizes[-1] else "blobs"  # type: ignore[operator]

        monkeypatch.setattr("scraping.fetch.route", route)
        ledger = here.crawl()
        seen.append(list(ledger.files()))
        ledger.close()
        assert list(here.folder.glob("git-*")) == []
    settings = scraping.clone.CloneSettings(
        folder=str(here.folder.parent / "cloned"),
        url=real.clone_url,
        repository="o/real",
        revision="main",
        licence="MIT",
    )
    scraping.clone.run(settings)
    ledger = Ledger(here.folder.parent / "cloned" / "ledger.sqlite")
    seen.append(list(ledger.files()))
    ledger.close()
    assert seen[0] == seen[1] == seen[2] == seen[3]
    assert {(file.repository, file.path) for file in seen[0]} == set(expected([real]))
    # An archive leaves three to the next way: one is left out, two are changed. The others leave nothing.
    assert ways == [("tarball", 26), ("tarball", 3), ("blobs", 26), ("git", 26)]
