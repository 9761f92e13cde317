"""clone, local and stdlib: a repository gives the same files by every way, and a hostile one does no harm."""

from __future__ import annotations

import contextlib
import http.server
import io
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scraping.__main__ import main
from scraping.documents import path_text
from scraping.gitrepo import GitLimits, blob_id, check_revision, check_url, fetched
from scraping.ledger import Ledger
from scraping.local import read_plain, walk
from scraping.source import Origin, store_files
from scraping.wanted import LFS_POINTER, Wanted

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
GIT_ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    **{f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    **{f"GIT_{who}_DATE": "2020-01-01T00:00:00Z" for who in ("AUTHOR", "COMMITTER")},
}


def git(folder: Path, *words: str, given: bytes = b"") -> bytes:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], input=given, capture_output=True, env=GIT_ENVIRONMENT, check=False
    )
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


STRANGE = [
    b"new\nline.py",
    b"esc\x1b[31m.py",
    b"latin\xe9.py",
    "grün.py".encode(),
    b"-rf.py",
    b"back\\slash.py",
]
LONG = "/".join([*(["d" * 200] * 19), "x" * 150 + ".py"])


def fill(folder: Path) -> None:
    """A small project with everything that a tree may hold."""
    rng = random.Random(0)
    for i in range(40):
        path = folder / f"pkg{i % 4}" / f"m{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(rng.randbytes(rng.choice([15, 1000, 45_000])).hex().encode())
    (folder / "big.py").write_bytes(b"# big\n" * 40_000)
    (folder / "empty.py").write_bytes(b"")
    (folder / "README.md").write_text("hello " * 300)
    (folder / "same.py").write_bytes((folder / "pkg1/m1.py").read_bytes() or b"x")
    (folder / "lfs.py").write_bytes(
        LFS_POINTER + b"oid sha256:" + b"0" * 64 + b"\nsize 12345\n" + b" " * 2000
    )
    (folder / "link.py").symlink_to("pkg1/m1.py")
    (folder / "out.py").symlink_to("/etc/passwd")
    (folder / "loop").symlink_to(".")
    for name in STRANGE:
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(b"strange = 1\n" * 100 + name)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder of repositories, and the address at which git's own daemon serves them."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    base = tmp_path_factory.mktemp("served")
    make_repository(base / "project")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["git", "daemon", "--export-all", f"--base-path={base}", "--listen=127.0.0.1", f"--port={port}"]
    daemon = subprocess.Popen(command, env=GIT_ENVIRONMENT, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield base, f"git://127.0.0.1:{port}"
    finally:
        os.killpg(daemon.pid, signal.SIGKILL)
        daemon.wait()


def make_repository(folder: Path, kind: str = "sha1") -> None:
    folder.mkdir()
    git(folder, "init", "--quiet", f"--object-format={kind}", "--initial-branch=main")
    fill(folder)
    git(folder, "add", "--all")
    # A path of 4,000 bytes, which no file system takes, and a submodule, put straight into the index.
    long = git(folder, "hash-object", "-w", "--stdin", given=b"long = 1\n" * 200).decode().strip()
    other = "1" * len(long)
    lines = f"100644 {long}\t{LONG}\n160000 {other}\tvendored\n"
    git(folder, "update-index", "--index-info", given=lines.encode())
    git(folder, "commit", "--quiet", "--message=one")
    git(folder, "tag", "--annotate", "--message=v1", "v1")
    git(folder, "config", "uploadpack.allowFilter", "true")


class Backend(http.server.BaseHTTPRequestHandler):
    """git's smart HTTP, by the program that git has for it."""

    base: Path

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        size = int(self.headers.get("Content-Length") or 0)
        environment = GIT_ENVIRONMENT | {
            "GIT_PROJECT_ROOT": str(self.base),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
        }
        done = subprocess.run(
            ["git", "http-backend"],
            input=self.rfile.read(size),
            capture_output=True,
            env=environment,
            check=True,
        )
        head, _, body = done.stdout.partition(b"\r\n\r\n")
        lines = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        self.send_response(int(lines.pop("Status", "200").split()[0]))
        for key, value in lines.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def over_http(base: Path) -> Iterator[str]:
    handler = type("Here", (Backend,), {"base": base})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


Manifest = dict[str, tuple[str, str, str | None, str]]


def manifest(folder: Path) -> Manifest:
    """Path -> (state, reason, hash, address of what is stored) of all files in a corpus folder."""
    rows = sqlite3.connect(folder / "ledger.sqlite").execute(
        "SELECT path, state, reason, sha256, address FROM files"
    )
    return {
        path: (state, why, sha, address if state == "stored" else "")
        for path, state, why, sha, address in rows
    }


def documents(folder: Path) -> list:
    return list(Ledger(folder / "ledger.sqlite").files())


def command(*words: object) -> None:
    main([str(word) for word in words])


def sentence(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Return the one line that a failing command prints."""
    with pytest.raises(SystemExit, match="2"):
        command(*words)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and said.strip().isprintable()
    return said.removeprefix("error: ").strip()


# ---------------------------------------------------------------------------------------------
# Equal by every way


@needs_git
def test_clone_archive_and_folder_give_equal_documents(served: tuple[Path, str], tmp_path: Path) -> None:
    base, url = served
    head = git(base / "project", "rev-parse", "HEAD").decode().strip()
    named = ("--repository", "o/project", "--licence", "MIT")
    command("clone", "--folder", tmp_path / "git", "--url", f"{url}/project", *named)
    with over_http(base) as place:
        command(
            "clone", "--folder", tmp_path / "http", "--url", f"{place}/project", "--revision", "v1", *named
        )
    for kind in ("tar.gz", "zip"):
        archive = tmp_path / f"p.{kind}"
        archive.write_bytes(
            git(base / "project", "archive", f"--format={kind}", "--prefix=project-1/", "HEAD")
        )
        command("local", "--folder", tmp_path / kind, "--path", archive, "--strip", 1, *named)
    command("local", "--folder", tmp_path / "work", "--path", base / "project", "--revision", head, *named)

    first = manifest(tmp_path / "git")
    tree = git(base / "project", "ls-tree", "-r", "-z", "--name-only", "HEAD").split(b"\0")[:-1]
    assert sorted(first) == sorted(path_text(path) for path in tree)
    assert {why for _, why, _, _ in first.values()} == {
        "", "LFS pointer", "other extension", "submodule", "symbolic link", "too large", "too small",
    }  # fmt: skip
    for path, (state, _, sha, address) in first.items():
        if state == "stored" and path != LONG:
            name = next(name for name in tree if path_text(name) == path)
            with open(os.path.join(os.fsencode(base / "project"), name), "rb") as file:
                assert blob_id(file.read()) == address and sha
    assert manifest(tmp_path / "http") == first
    assert {file.commit for file in documents(tmp_path / "git")} == {head}
    for way in ("http", "tar.gz", "zip", "work"):
        # An archive of git has no submodule in it, a work tree no path that is too long for it.
        gone = {"http": set(), "work": {LONG, "vendored"}}.get(way, {"vendored"})
        assert manifest(tmp_path / way) == {path: row for path, row in first.items() if path not in gone}, way
        same = [file for file in documents(tmp_path / "git") if file.path not in gone]
        assert documents(tmp_path / way) == same, way
    assert len(documents(tmp_path / "git")) > 20


@needs_git
def test_a_server_without_partial_clone_gives_the_same(served: tuple[Path, str], tmp_path: Path) -> None:
    base, url = served
    shutil.copytree(base / "project/.git", base / "plain.git")
    git(base / "plain.git", "config", "uploadpack.allowFilter", "false")
    for name in ("project", "plain.git"):
        command("clone", "--folder", tmp_path / name, "--url", f"{url}/{name}")
    assert manifest(tmp_path / "plain.git") == manifest(tmp_path / "project")


@needs_git
def test_blobs_that_are_not_wanted_are_not_fetched(served: tuple[Path, str], tmp_path: Path) -> None:
    with fetched(f"{served[1]}/project", "main", tmp_path / "c") as repository:
        files = [file for file in repository.tree() if not file.reason]
        assert repository.sizes() == {}
        some = {file.id for file in files[::2]}
        repository.fetch(some)
        assert set(repository.sizes()) == some
        assert {id for id, data in repository.blobs(sorted(some)) if data is not None} == some
    assert not (tmp_path / "c").exists()


@needs_git
def test_a_repository_named_by_sha256(served: tuple[Path, str], tmp_path: Path) -> None:
    base, url = served
    make_repository(base / "long", "sha256")
    command("clone", "--folder", tmp_path / "long", "--url", f"{url}/long")
    command("clone", "--folder", tmp_path / "short", "--url", f"{url}/project")
    strip = {path: row[:3] for path, row in manifest(tmp_path / "short").items()}
    assert {path: row[:3] for path, row in manifest(tmp_path / "long").items()} == strip
    assert {len(file.commit) for file in documents(tmp_path / "long")} == {64}


# ---------------------------------------------------------------------------------------------
# Once, also when killed


@needs_git
def test_again_changes_nothing_and_another_revision_is_refused(
    served: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, url = served
    repeated = {
        "clone": ("--url", f"{url}/project", "--revision", "v1"),
        "local": ("--path", base / "project", "--revision", "1"),
    }
    for name, words in repeated.items():
        folder = tmp_path / name
        command(name, "--folder", folder, *words)
        before = manifest(folder)
        command(name, "--folder", folder, *words)
        assert manifest(folder) == before
        assert "already; it stays as it is" in capsys.readouterr().out
        said = sentence(capsys, name, "--folder", folder, *words[:3], "main")
        assert "by other settings" in said
        assert manifest(folder) == before


RUN = """
import sys, time
from scraping import ledger, source
source.BATCH_FILES = 1
stored = ledger.Ledger.stored
def slow(self, *words):
    stored(self, *words)
    print("stored", flush=True)
    time.sleep(0.05)
ledger.Ledger.stored = slow
from scraping.__main__ import main
main(sys.argv[1:])
"""


@needs_git
@pytest.mark.parametrize("way", ["clone", "local", "archive"])
def test_killed_runs_go_on_to_the_same_end(way: str, served: tuple[Path, str], tmp_path: Path) -> None:
    base, url = served
    archive = tmp_path / "p.tar"
    archive.write_bytes(git(base / "project", "archive", "HEAD"))
    words = {
        "clone": ["clone", "--url", f"{url}/project"],
        "local": ["local", "--path", str(base / "project")],
        "archive": ["local", "--path", str(archive)],
    }[way]
    command(*words, "--folder", tmp_path / "whole")
    for kills in (1, 6):
        run = subprocess.Popen(
            [sys.executable, "-c", RUN, *words, "--folder", str(tmp_path / "killed")], stdout=subprocess.PIPE
        )
        assert run.stdout is not None
        for _ in range(kills):
            assert run.stdout.readline() == b"stored\n"
        run.kill()
        run.wait()
        run.stdout.close()
        states = [state for state, *_ in manifest(tmp_path / "killed").values()]
        assert states.count("found") and states.count("stored") >= kills
    command(*words, "--folder", tmp_path / "killed")
    assert manifest(tmp_path / "killed") == manifest(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "killed").iterdir() if path.is_dir()] == []


def test_a_file_that_changes_or_goes_between_listing_and_storing_is_dropped(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("a", "b", "c", "d"):
        (folder / f"{name}.py").write_text(name * 2000)
    words = ["local", "--path", str(folder), "--folder", str(tmp_path / "corpus")]
    run = subprocess.Popen([sys.executable, "-c", RUN, *words], stdout=subprocess.PIPE)
    assert run.stdout is not None
    run.stdout.readline()
    run.kill()
    run.wait()
    run.stdout.close()
    (folder / "b.py").write_text("B" * 2000)
    (folder / "c.py").unlink()
    (folder / "c.py").symlink_to("/etc/passwd")
    (folder / "d.py").unlink()
    command(*words)
    assert {path: row[:2] for path, row in manifest(tmp_path / "corpus").items()} == {
        "a.py": ("stored", ""),
        "b.py": ("dropped", "changed since it was listed"),
        "c.py": ("dropped", "cannot be read"),
        "d.py": ("dropped", "gone since it was listed"),
    }


# ---------------------------------------------------------------------------------------------
# Hostile


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ext::sh -c touch% /tmp/pwned", "is no https://"),
        ("file:///etc", "is no https://"),
        ("/etc", "command local"),
        ("-uhttps://example.com/a", "is no https://"),
        ("--upload-pack=touch /tmp/pwned", "is no https://"),
        ("ssh://git@example.com/a", "holds a user name"),
        ("ssh://example.com/a", "is no https://"),
        ("git@example.com:a/b", "holds a user name"),
        ("http::https://example.com/a", "is no https://"),
        ("https://-oProxyCommand=x/a", "is no https://"),
        ("https://example.com/a b", "is no https://"),
        ("https://example.com/a\nb", "is no https://"),
        ("https://user:secret@example.com/a", "holds a user name"),
        ("http://example.com/a", "not encrypted"),
        ("git://example.com/a", "not encrypted"),
        ("http://127.0.0.1.example.com/a", "not encrypted"),
    ],
)
def test_an_address_that_git_may_not_have_is_refused_before_git_starts(
    url: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("git was started"))
    told = sentence(capsys, "clone", f"--url={url}", "--folder", tmp_path / "c")
    assert said in told
    assert "secret" not in told
    assert not (tmp_path / "c").exists()


def test_addresses_that_git_may_have() -> None:
    with pytest.raises(ValueError, match="is no https://"):
        check_url("-uhttps://example.com/a")
    for url in (
        "https://github.com/JetBrains/kotlin",
        "http://localhost:80/a",
        "git://127.0.0.1/a",
        "http://[::1]/a",
    ):
        check_url(url)
    check_url("http://example.com/a", insecure=True)


@pytest.mark.parametrize(
    "revision", ["-v", "--upload-pack=x", "a..b", "a:b", "a^", "a b", "a\nb", "@{u}", "x@{1}", "*"]
)
def test_a_revision_that_is_none_is_refused_before_git_starts(revision: str) -> None:
    with pytest.raises(ValueError, match="cannot name a branch, a tag or a commit"):
        check_revision(revision)
    check_revision("release/1.9-rc#2+b")


@needs_git
def test_what_is_not_there_is_one_sentence(
    served: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, url = served
    (base / "nothing").mkdir()
    git(base / "nothing", "init", "--quiet")
    tree = git(base / "project", "rev-parse", "HEAD^{tree}").decode().strip()
    for name, revision, said in (
        ("project", "nope", "has no branch or tag nope"),
        ("project", "0123456789" * 4, "has no such commit"),
        ("project", tree, "is no commit"),
        ("nothing", "HEAD", "has no HEAD"),
        ("absent", "HEAD", "cannot be fetched"),
    ):
        told = sentence(
            capsys, "clone", "--folder", tmp_path / "c", "--url", f"{url}/{name}", "--revision", revision
        )
        assert said in told
    assert manifest(tmp_path / "c") == {}


@needs_git
def test_nothing_of_a_repository_or_of_the_user_is_run(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, url = served
    folder = base / "hostile"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    trap = tmp_path / "trap"
    run = f"touch {trap}"
    (folder / ".gitattributes").write_text("*.py filter=evil diff=evil merge=evil\n")
    (folder / ".gitmodules").write_text(
        f'[submodule "s"]\n\tpath = s\n\turl = ext::sh -c "{run}"\n\tupdate = !{run}\n'
    )
    (folder / ".gitconfig").write_text(f"[core]\n\tfsmonitor = {run}\n")
    (folder / "a.py").write_text("a = 1\n" * 300)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=one")
    git(folder, "config", "uploadpack.allowFilter", "true")
    # The user's own settings would run it too, were they read.
    home = tmp_path / "home"
    (home / "hooks").mkdir(parents=True)
    for hook in ("post-checkout", "reference-transaction", "post-index-change", "fsmonitor"):
        (home / "hooks" / hook).write_text(f"#!/bin/sh\n{run}\n")
        (home / "hooks" / hook).chmod(0o755)
    (home / ".gitconfig").write_text(
        f"[core]\n\thooksPath = {home}/hooks\n\tfsmonitor = {run}\n\taskPass = {run}\n\tgitProxy = {run}\n"
        f'[filter "evil"]\n\tsmudge = {run}\n\tprocess = {run}\n[credential]\n\thelper = "!{run}"\n'
        f'[url "ext::sh -c {run}"]\n\tinsteadOf = git://\n[protocol "ext"]\n\tallow = always\n'
    )
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_TEMPLATE_DIR", str(home))
    monkeypatch.setenv("GIT_SSH_COMMAND", run)
    monkeypatch.setenv("GIT_PROXY_COMMAND", run)
    monkeypatch.setenv("GIT_ALLOW_PROTOCOL", "ext")
    command("clone", "--folder", tmp_path / "c", "--url", f"{url}/hostile")
    assert manifest(tmp_path / "c")["a.py"][0] == "stored"
    assert not trap.exists()


@needs_git
def test_git_has_limits_of_bytes_of_time_and_of_names(served: tuple[Path, str], tmp_path: Path) -> None:
    url = f"{served[1]}/project"
    with fetched(url, "main", tmp_path / "c") as repository:
        ids = [file.id for file in repository.tree() if not file.reason]
        repository.limits = GitLimits(bytes=100_000)
        with pytest.raises(ValueError, match="holds more than 100,000 bytes"):
            repository.fetch(ids)
        repository.limits = GitLimits(files=10)
        with pytest.raises(ValueError, match="lists more than 10 files"):
            list(repository.tree())
    # A server that takes the connection and says nothing.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"git://127.0.0.1:{silent.getsockname()[1]}/x"
        began = time.monotonic()
        with (
            pytest.raises(ValueError, match=r"took more than 0\.5 seconds"),
            fetched(place, "main", tmp_path / "d", GitLimits(seconds=0.5)),
        ):
            pass
        assert time.monotonic() - began < 10


@needs_git
def test_a_tree_of_trees_that_has_billions_of_files_ends_at_the_limit(
    served: tuple[Path, str], tmp_path: Path
) -> None:
    base, url = served
    folder = base / "bomb"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "config", "uploadpack.allowFilter", "true")
    id = git(folder, "hash-object", "-w", "--stdin", given=b"x").decode().strip()
    kind, mode = "blob", "100644"
    for _ in range(10):
        lines = "".join(f"{mode} {kind} {id}\td{i}\n" for i in range(10))
        id = git(folder, "mktree", given=lines.encode()).decode().strip()
        kind, mode = "tree", "040000"
    commit = git(folder, "commit-tree", id, "-m", "one").decode().strip()
    git(folder, "update-ref", "refs/heads/main", commit)
    with fetched(f"{url}/bomb", "main", tmp_path / "c", GitLimits(files=20_000)) as repository:
        count = 0
        with pytest.raises(ValueError, match="lists more than 20,000 files"):
            for _ in repository.tree():
                count += 1
        assert count == 20_000


@needs_git
def test_a_blob_with_other_bytes_than_its_name_says_is_not_taken(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import scraping.gitrepo as gitrepo

    with fetched(f"{served[1]}/project", "main", tmp_path / "c") as repository:
        file = next(file for file in repository.tree() if not file.reason)
        repository.fetch([file.id])
        assert [data is not None for _, data in repository.blobs([file.id])] == [True]
        monkeypatch.setattr(gitrepo, "blob_id", lambda data, digits: "0" * digits)
        assert [data is not None for _, data in repository.blobs([file.id])] == [False]


# ---------------------------------------------------------------------------------------------
# A folder


def test_a_folder_is_walked_without_leaving_it_or_opening_what_is_no_file(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.py").write_text("secret = 1\n" * 200)
    folder = tmp_path / "project"
    (folder / "sub").mkdir(parents=True)
    fill(folder)
    os.mkfifo(folder / "pipe.py")
    (folder / "away").symlink_to(outside)
    (folder / "secret.py").symlink_to(outside / "secret.py")
    with socket.socket(socket.AF_UNIX) as place:
        here = os.getcwd()
        os.chdir(folder)  # the name of a socket is short
        place.bind("socket.py")
        os.chdir(here)
        (folder / ".git").mkdir()
        (folder / ".git/config.py").write_text("x" * 2000)
        (folder / "sub/.git").write_text("gitdir: /etc")
        (folder / "sub/inside.py").write_text("x" * 2000)
        command("local", "--path", folder, "--folder", tmp_path / "c")
    rows = {path: row[:2] for path, row in manifest(tmp_path / "c").items()}
    assert rows["away"] == rows["secret.py"] == rows["loop"] == ("dropped", "symbolic link")
    assert rows["pipe.py"] == rows["socket.py"] == ("dropped", "device, pipe or socket")
    assert rows["sub"] == ("dropped", "submodule")
    assert not [path for path in rows if path.startswith((".git/", "sub/", "loop/", "away/"))]
    assert {path_text(name) for name in STRANGE} <= {
        path for path, row in rows.items() if row == ("stored", "")
    }
    assert not any(b"secret" in file.data for file in documents(tmp_path / "c"))
    assert read_plain(os.fsencode(folder), b"pipe.py", 10) == "changed since it was listed"
    assert read_plain(os.fsencode(folder), b"secret.py", 10) == "cannot be read"


def test_a_folder_deeper_than_a_name_may_be_is_accounted_for(tmp_path: Path) -> None:
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(30):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
    finally:
        os.chdir(here)
    (found,) = walk(os.fsencode(tmp_path))
    assert found[1:] == (0, "cannot be read") and found[0].startswith(b"d" * 200)
    subprocess.run(["rm", "-rf", str(tmp_path / ("d" * 200))], check=True)


@needs_git
def test_the_walk_goes_in_the_order_of_git(tmp_path: Path) -> None:
    for name in ("a.py", "a/b.py", "a-b.py", "a0.py", "a/.hidden.py", "B.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "--all")
    tree = git(tmp_path, "write-tree").decode().strip()
    listed = git(tmp_path, "ls-tree", "-r", "-z", "--name-only", tree).split(b"\0")[:-1]
    assert [path for path, _, _ in walk(os.fsencode(tmp_path))] == listed


def test_a_broken_archive_stores_nothing_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for i in range(50):
            info = tarfile.TarInfo(f"{i}.py")
            info.size = 3000
            tar.addfile(info, io.BytesIO(random.Random(i).randbytes(3000)))
    path = tmp_path / "cut.tar.gz"
    path.write_bytes(out.getvalue()[:-500])
    said = sentence(capsys, "local", "--path", path, "--folder", tmp_path / "c")
    assert said == f"{path}: the archive is cut short"
    assert manifest(tmp_path / "c") == {}
    path.write_bytes(out.getvalue())
    command("local", "--path", path, "--folder", tmp_path / "c")
    assert {row[0] for row in manifest(tmp_path / "c").values()} == {"stored"}
    assert {file.repository for file in documents(tmp_path / "c")} == {"cut"}


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ("--folder", tmp_path / "c")
    assert "is not there" in sentence(capsys, "local", "--path", tmp_path / "none", *folder)
    assert sentence(capsys, "local", *folder) == "name a folder or an archive with --path"
    assert "--licence is Apache 2, which is no SPDX expression" in sentence(
        capsys, "local", "--path", tmp_path, "--licence", "Apache 2", *folder
    )
    assert not (tmp_path / "c").exists()
    assert "--strip is 1" in sentence(capsys, "local", "--path", tmp_path, "--strip", 1, *folder)
    assert "name each as in .py" in sentence(
        capsys, "local", "--path", tmp_path, "--extensions", "py", *folder
    )
    assert "0 <= min <= max" in sentence(capsys, "local", "--path", tmp_path, "--min_bytes", 10**9, *folder)
    assert "name the repository with --url" in sentence(capsys, "clone", *folder)


# ---------------------------------------------------------------------------------------------
# Whole libraries


def test_every_file_of_the_standard_library_is_accounted_for(tmp_path: Path) -> None:
    import sysconfig

    command("stdlib", "--folder", tmp_path / "c")
    root = Path(sysconfig.get_path("stdlib"))
    expected = {}
    for path in root.rglob("*"):
        inside = path.relative_to(root)
        if {"site-packages", "dist-packages"} & set(inside.parts):
            continue
        if path.is_symlink():
            expected[path_text(os.fsencode(inside))] = "symbolic link"
        elif path.is_file():
            expected[path_text(os.fsencode(inside))] = Wanted().reason(
                os.fsencode(inside), path.stat().st_size
            )
    rows = manifest(tmp_path / "c")
    assert {path: why for path, (_, why, _, _) in rows.items()} == expected
    assert {state for state, why, _, _ in rows.values() if not why} == {"stored"}
    files = documents(tmp_path / "c")
    assert len(files) == sum(not why for why in expected.values()) > 500
    assert all((root / file.path).read_bytes() == file.data for file in files)
    assert {(file.repository, file.licence) for file in files} == {("python/cpython", "PSF-2.0")}


@pytest.mark.slow
@pytest.mark.skipif(
    "PLUMB_AIRFLOW" not in os.environ, reason="PLUMB_AIRFLOW names no archive of apache-airflow-core"
)
def test_every_file_of_airflow_is_accounted_for(tmp_path: Path) -> None:
    import zipfile

    path = Path(os.environ["PLUMB_AIRFLOW"])
    command("local", "--path", path, "--folder", tmp_path / "c", "--licence", "Apache-2.0")
    rows = manifest(tmp_path / "c")
    if path.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(path) as archive:
            held = {i.filename: archive.read(i) for i in archive.infolist() if not i.is_dir()}
    else:
        with tarfile.open(path) as archive:
            held = {i.name: archive.extractfile(i).read() for i in archive.getmembers() if i.isfile()}  # type: ignore[union-attr]
    assert {name: why for name, (_, why, _, _) in rows.items()} == {
        name: Wanted().reason(name.encode(), len(data)) for name, data in held.items()
    }
    files = documents(tmp_path / "c")
    assert {file.path: file.data for file in files} == {
        name: data for name, data in held.items() if rows[name][0] == "stored"
    }


def test_files_that_a_source_leaves_out_are_not_left_waiting(tmp_path: Path) -> None:
    from scraping.ledger import ListedFile
    from scraping.source import list_files

    ledger = Ledger(tmp_path / "ledger.sqlite")
    list_files(
        ledger, Origin("n", "local", "", ""), "", [ListedFile("a.py", "1", 1), ListedFile("b.py", "2", 1)]
    )
    store_files(ledger, "n", lambda waiting: iter([(waiting[0], b"1")]))
    assert ledger.counts() == {("stored", ""): 1, ("dropped", "gone since it was listed"): 1}
    assert ledger.counts("repositories") == {("done", ""): 1}
