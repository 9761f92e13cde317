"""scraping/history.py and recipes/history.py: a checkout's history is read safely, and cut by time."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from histories import AUTHOR, DAY, START, Made, shop

from recipes.history import Cut, Reader, Snapshots, cut
from scraping.history import opened

CODE = "def total(rows):\n    return sum(row.price for row in rows)\n"
TOKEN = "ghp_" + "Wq7XbZ2LmN8kRtY5vCsD3fGhJ6pA4eU1oQ9x"  # It has the form of a token, and is none.


# Settings by which git runs a program.
EVIL = (
    *("core.fsmonitor", "core.pager", "core.sshCommand", "core.editor", "gpg.program", "diff.external"),
    *("diff.evil.textconv", "diff.evil.command", "filter.evil.smudge", "filter.evil.clean"),
    *("credential.helper", "core.alternateRefsCommand"),
)


def states(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return the size, time and bytes of every file below a folder, .git included."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def cut_of(made: Made, since: str = "") -> Cut:
    with opened(made.folder) as history:
        return cut(history, since)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, dict[str, str]]:
    """A history with one of everything that is left out; the commits after T by name."""
    made = Made(tmp_path_factory.mktemp("mixed") / "checkout")
    made.commit({"a.py": CODE, "old_name.py": CODE.replace("total", "moved_total") * 3, "b.py": "x = 1\n"})
    made.commit({"old_name.py": None, "new_name.py": CODE.replace("total", "moved_total") * 3})
    ids = {}
    ids["known"] = made.commit({"a.py": CODE + "\n\ndef first():\n    return 1\n"})
    ids["since"] = made.commit({"b.py": "x = 1\ny = 2\n"})
    ids["secret"] = made.commit(
        {"c.py": f"# by {AUTHOR} <ann@shop.example.org>\nTOKEN = '{TOKEN}'\nport = 80\n"}
    )
    ids["format"] = made.commit({"b.py": "x = 1\n\n\ny    =  2\n"})
    ids["revert"] = made.commit({"b.py": "x = 1\n"}, 'Revert "y"\n\nThis reverts commit 0123456789.')
    ids["rename"] = made.commit(
        {"new_name.py": None, "newest_name.py": CODE.replace("total", "moved_total") * 3}
    )
    made.git("checkout", "--quiet", "-b", "side", ids["since"])
    ids["side"] = made.commit({"d.py": CODE.replace("total", "side_total")})
    made.git("checkout", "--quiet", "main")
    made.git("merge", "--quiet", "--no-ff", "-m", "together", "side")
    ids["mass"] = made.commit({f"many/m{n}.py": f"value_{n} = {n}\n" for n in range(60)})
    ids["odd"] = made.commit({
        "uv.lock.py": "a = 1\n", "package-lock.json": "{}\n", "poetry.lock": "x\n", "vendor/lib.py": CODE,
        "made_pb2.py": CODE, "raw.py": b"\x00\x01" * 50, "big.py": "x = 1\n" * 60_000,
        "e.py": "z = 3\n",
    })  # fmt: skip
    (made.folder / "link.py").symlink_to("/etc/hostname")
    strange = os.fsencode(made.folder) + b"/odd \n\xff\xfe name.py"
    Path(os.fsdecode(strange)).write_text("strange = 1\n")
    ids["names"] = made.commit({})
    return made, ids


def test_the_parts_are_those_of_time_and_what_is_left_out_is_counted(
    mixed: tuple[Made, dict[str, str]],
) -> None:
    made, ids = mixed
    found = cut_of(made, ids["since"])
    assert (found.known, found.since) == (ids["known"], ids["since"])
    assert {*found.tree} == {"a.py", "b.py", "new_name.py"} and "first" in found.tree["a.py"]
    splits = {step.id: step.split for step in found.steps}
    assert splits.pop(ids["since"]) == "validation"
    assert {*splits.values()} == {"test"} and ids["side"] in splits, "a branch that was merged later is test"
    dropped = found.counts.dropped
    assert dropped["commit: merge"] == 1 and dropped["commit: revert"] == 1
    assert dropped["commit: changes more than 50 files of code"] == 1 and ids["mass"] not in splits
    assert dropped["change: formatting alone"] == 1 and dropped["change: of a name or mode alone"] == 1
    assert dropped["change: lock file"] == 2 and dropped["change: vendored"] == 1
    assert dropped["change: generated"] == 1 and dropped["change: binary"] == 1
    assert dropped["change: too large"] == 1 and dropped["change: symbolic link"] == 1
    edits = {edit.path: edit for step in found.steps for edit in step.edits}
    assert "newest_name.py" not in edits, "a renamed file is not new"
    assert "odd \\x0a\\xff\\xfe name.py" in edits, "a name of any bytes is a name"
    assert edits["e.py"].after == ["z = 3", ""] and edits["e.py"].before == []
    assert found.counts.kept == found.counts.found - sum(dropped.values())


def test_secrets_and_names_of_committers_stay_out(mixed: tuple[Made, dict[str, str]]) -> None:
    made, ids = mixed
    (edit,) = (
        edit for step in cut_of(made, ids["since"]).steps for edit in step.edits if edit.path == "c.py"
    )
    text = "\n".join(edit.after)
    assert TOKEN not in text and "<GITHUB_TOKEN>" in text
    assert AUTHOR not in text and "shop.example.org" not in text and "port = 80" in text


def test_a_snapshot_is_the_tree_of_its_commit(mixed: tuple[Made, dict[str, str]]) -> None:
    made, ids = mixed
    with opened(made.folder) as history:
        snapshots, texts = Snapshots(history, Reader(history, ())), dict[str, str | None]()
        for commit in (ids["known"], ids["side"], ids["names"], ids["rename"]):
            texts |= dict(snapshots.move_to(commit))
            here = {path: text for path, text in texts.items() if text is not None}
            assert ("d.py" in here) == (commit in (ids["side"], ids["names"]))
            assert ("many/m7.py" in here) == (commit == ids["names"])
            for name in {"a.py", "b.py"} & here.keys():
                assert here[name] == made.git("cat-file", "blob", f"{commit}:{name}") + "\n"


def test_since_may_be_a_date_and_a_branch(mixed: tuple[Made, dict[str, str]]) -> None:
    made, ids = mixed
    assert cut_of(made, "2023-11-18").since == ids["since"]
    made.git("branch", "--force", "here", ids["since"])
    assert cut_of(made, "here").since == ids["since"] == cut_of(made, ids["since"][:10]).since


def test_the_default_is_a_fifth_and_a_short_history_is_split_by_files(tmp_path: Path) -> None:
    made = shop(tmp_path / "shop", 60)
    found = cut_of(made)
    splits = [step.split for step in found.steps]
    assert splits == ["validation"] * 5 + ["test"] * 12 and not found.by_files
    assert "shop/registry.py" in found.recent
    assert found.together["shop/registry.py"]["shop/bottle_drawer.py"] == 1
    short = Made(tmp_path / "short")
    short.commit({"a.py": CODE})
    assert cut_of(short).by_files and cut_of(short).tree == {"a.py": CODE} and not cut_of(short).steps


def test_what_was_renamed_belongs_with_what_its_old_name_did(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.commit({"old.py": CODE, "friend.py": "x = 1\n"})
    made.commit({"old.py": None, "new.py": CODE})
    for n in range(3):
        made.commit({"z.py": f"n = {n}\n"})
    found = cut_of(made, "HEAD~1")
    assert found.together["new.py"] == {"friend.py": 1} and found.together["friend.py"] == {"new.py": 1}


def test_a_hostile_checkout_runs_nothing_and_is_not_changed(tmp_path: Path) -> None:
    """Every setting by which git runs a program is planted, and the owner's git does run some of them."""
    made, mark = Made(tmp_path / "checkout"), tmp_path / "ran"
    for n in range(4):
        made.commit({"a.py": CODE * (n + 1), ".gitattributes": "*.py diff=evil filter=evil\n"})
    program = tmp_path / "evil"
    program.write_text(f"#!/bin/sh\ntouch {mark}\ncat\n")
    program.chmod(0o755)
    for key in EVIL:
        made.git("config", key, str(program))
    made.git("config", "log.showSignature", "true")
    made.git("config", "remote.origin.url", f"ext::{program}")
    made.git("config", "remote.origin.promisor", "true")
    for hook in ("post-checkout", "reference-transaction", "post-index-change"):
        (made.folder / ".git" / "hooks" / hook).write_bytes(program.read_bytes())
        (made.folder / ".git" / "hooks" / hook).chmod(0o755)
    gone = made.git("rev-parse", "HEAD~1:a.py")
    (made.folder / ".git" / "objects" / gone[:2] / gone[2:]).unlink()  # a partial clone would fetch it
    (made.folder / "a.py").write_text("dirty = True\n")
    before = states(made.folder)
    found = cut_of(made, "HEAD~2")
    assert not mark.exists() and states(made.folder) == before
    assert found.counts.dropped["change: was not here, or damaged: a partial clone has not fetched it"] == 1
    made.git("-c", "protocol.ext.allow=never", "status")
    assert mark.exists(), "the plant works: git itself runs it"


def test_no_network_is_reached(mixed: tuple[Made, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refused)
    made, ids = mixed
    with opened(made.folder) as history:
        assert cut(history, ids["since"]).steps
        assert history._environment(network=True)["GIT_ALLOW_PROTOCOL"] == "none"


@pytest.mark.parametrize(
    ("since", "said"),
    [
        ("2020-01-01", "is before the first commit, of 2023-11-14"),
        ("2024-13-41", "is no date"),
        ("nowhere", "is no commit, branch or tag here"),
        ("HEAD", "leaves 12 commits of the main line before it and 0 after"),
        ("--exec=evil", "cannot name a branch"),
    ],
)
def test_a_wrong_moment_is_refused(mixed: tuple[Made, dict[str, str]], since: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cut_of(mixed[0], since)


def test_folders_without_a_usable_history_are_refused(tmp_path: Path) -> None:
    made = Made(tmp_path / "one")
    with pytest.raises(ValueError, match="has no commit yet"):
        cut_of(made)
    made.commit({"a.py": CODE})
    made.commit({"a.py": CODE * 2})
    made.git("clone", "--quiet", "--depth=1", f"file://{made.folder}", str(tmp_path / "shallow"))
    with pytest.raises(ValueError, match=r"is a shallow clone.*--unshallow"), opened(tmp_path / "shallow"):
        pass
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no git repository"), opened(tmp_path / "none"):
        pass


def test_a_work_tree_and_a_bare_repository_are_read_too(tmp_path: Path) -> None:
    made = Made(tmp_path / "one")
    id = made.commit({"a.py": CODE})
    made.git("worktree", "add", "--quiet", "--detach", str(tmp_path / "two"))
    made.git("clone", "--quiet", "--bare", str(made.folder), str(tmp_path / "bare.git"))
    for place in ("two", "bare.git"):
        with opened(tmp_path / place) as history:
            assert history.commit == id and cut(history).tree == {"a.py": CODE}


def test_a_commit_that_was_forced_away_is_not_read(tmp_path: Path) -> None:
    made = shop(tmp_path, 30)
    gone = made.git("rev-parse", "HEAD")
    made.git("reset", "--quiet", "--hard", "HEAD~1")
    made.commit({"other.py": CODE})
    assert gone not in {step.id for step in cut_of(made).steps}
    with pytest.raises(ValueError, match="is not in the history of HEAD"):
        cut_of(made, gone)


def test_the_moments_are_those_of_the_fixture(mixed: tuple[Made, dict[str, str]]) -> None:
    with opened(mixed[0].folder) as history:
        times = [one.time for one in history.commits(history.ids(mixed[1]["since"]))]
    assert times == [START + n * DAY for n in range(4)]
