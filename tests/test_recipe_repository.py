"""recipes/repository.py: rows of a tree, and of what was written next, with other files of that moment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from histories import FAIL, Made, drawer, shop

from data.context import RepositoryFiles, beside, context_of, imported, outline
from recipes.building import Counts
from recipes.history import Edit, Step
from recipes.repository import RepositorySettings, build, check, longest, room_of
from recipes.written import LIMIT_TOKENS, Known, Written, cases_of, chosen, gaps_of
from tokenizer import BPETokenizer

KOTLIN = """import shop.Fail

class Drawer(val n: Int) {
    fun take(wanted: String): Int {
        return n
    }
}
"""


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train([FAIL, drawer("apple", 1), drawer("bottle", 2)], 500)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return shop(tmp_path_factory.mktemp("shop") / "checkout", 60)


def added(made: Made, before: str, after: str) -> set[str]:
    """Return the paths that a later commit has and an earlier one lacks."""
    one, other = ({*made.git("ls-tree", "-r", "--name-only", id).split()} for id in (before, after))
    return other - one


def step(before: str, after: str) -> Step:
    edit = Edit("a.py", before.split("\n") if before else [], after.split("\n"))
    return Step("c" * 40, "p" * 40, "test", [edit])


def test_a_case_put_together_is_the_file_without_what_is_typed_later() -> None:
    before = "import os\n\n\ndef a():\n    return 1\n"
    after = "import os\n\n\ndef a():\n    first = 1000\n    second = 2000\n    return 1\n"
    cases = [*cases_of(step(before, after), Known(()), Counts("hunks"))]
    whole = {case.kind: case for case in cases if case.line == 5}
    assert whole["block"].prefix + whole["block"].middle + whole["block"].suffix == after
    line = whole["line"]
    assert line.middle == "    first = 1000" and line.prefix + line.middle + line.suffix == after.replace(
        "    second = 2000\n", ""
    )
    rest = whole["rest"]
    assert rest.prefix + rest.middle + rest.suffix == line.prefix + line.middle + line.suffix
    (second,) = (case for case in cases if case.line == 6 and case.kind == "line")
    assert second.prefix + second.middle + second.suffix == after, "the line before it is typed already"


def test_replaced_lines_are_gone_and_formatting_and_moves_are_counted() -> None:
    counts = Counts("hunks")
    (line, rest) = cases_of(step("a = 1000\nb = 2\n", "a = 3000\nb = 2\n"), Known(()), counts)
    assert (line.prefix, line.middle, line.suffix) == ("", "a = 3000", "\nb = 2\n") and rest.kind == "rest"
    assert not [*cases_of(step("call(a,\n  b)\nx\n", "call(a, b)\nx\n"), Known(()), counts)]
    assert not [*cases_of(step("", drawer("apple", 1)), Known([drawer("apple", 1)]), counts)]
    assert counts.dropped == {
        "hunk: formatting alone": 1,
        "hunk: moved or copied from what is learned": 1,
    }


@pytest.mark.parametrize(("path", "text"), [("a.py", drawer("apple", 1)), ("Drawer.kt", KOTLIN)])
def test_gaps_put_together_are_the_file(path: str, text: str) -> None:
    gaps = [*gaps_of(path, text)]
    assert {gap.kind for gap in gaps} == {"line", "rest", "block"}
    assert all(gap.prefix + gap.middle + gap.suffix + "\n" == text for gap in gaps)
    blocks = {gap.middle.strip().split("\n")[0] for gap in gaps if gap.kind == "block"}
    assert ("return n" if path.endswith("kt") else "self.m_apples = m_apples") in blocks


def test_cases_are_spread_over_kinds_and_commits_and_no_case_is_there_twice() -> None:
    cases = [
        Written("a.py", f"{commit}", n, kind, f"{commit}{n}", f"m{n}", "")
        for commit in range(5)
        for n in range(20)
        for kind in ("line", "rest")
    ]
    found = chosen([*cases, cases[0]], 20)
    assert len({one.name for one in found}) == 20 == len(found)
    assert {one.commit for one in found} == {"0", "1", "2", "3", "4"}


def test_other_files_are_those_that_are_imported_changed_together_and_near(tokenizer: BPETokenizer) -> None:
    files = RepositoryFiles()
    files.put("shop/fail.py", FAIL)
    files.put("shop/apple_drawer.py", drawer("apple", 1))
    files.put("other/fail.py", "def fail_other():\n    pass\n")
    prefix = "from shop.fail import fail_shop\n\n\ndef lose_apple(wanted):\n    "
    assert files.imports_of("shop/new.py", prefix) == ["shop/fail.py"]
    shown = context_of(files, "shop/new.py", prefix, "", tokenizer, 200)
    assert "# def fail_shop(code, detail):" in shown and "take_apple" in shown
    assert all(line.startswith("#") for line in shown.splitlines())
    files.put("shop/fail.py", None)
    files.put("shop/apple_drawer.py", "x = 1\n")
    again = context_of(files, "shop/new.py", prefix, "", tokenizer, 200)
    assert "fail_shop" not in again and "take_apple" not in again


@pytest.mark.parametrize("budget", [0, 7, 20, 64])
def test_other_files_keep_to_their_budget(tokenizer: BPETokenizer, budget: int) -> None:
    files = RepositoryFiles()
    files.put("long.py", "wanted_apple = '" + "apple " * 500 + "'\n")  # One line that no budget has room for.
    files.put("shop/apple_drawer.py", drawer("apple", 1))
    text = drawer("apple", 2)
    shown = context_of(files, "a.py", text, text, tokenizer, budget)
    assert len(tokenizer.encode(shown)) <= budget and bool(shown) == (budget > 20)
    prefix, suffix = beside(tokenizer, shown, text, text, 128)
    assert prefix.startswith(shown) and text.endswith(prefix.removeprefix(shown)) and text.startswith(suffix)
    assert len(tokenizer.encode(prefix)) + len(tokenizer.encode(suffix)) <= 128 + 4


def test_declarations_and_imports_of_several_languages() -> None:
    assert outline("a.kt", KOTLIN) == ["class Drawer(val n: Int)", "    fun take(wanted: String): Int"]
    assert outline("a.py", FAIL)[1] == "def fail_shop(code, detail):"
    assert outline("a.go", "package a\n\nfunc Take(n int) int {\n") == ["func Take(n int) int"]
    assert imported("import { a } from './shop/fail'\n") == [("shop", "fail")]
    assert imported("from shop.fail import a, b as c\n") == [("shop", "fail", "a"), ("shop", "fail", "b")]


def test_the_dataset_has_no_line_of_the_future_in_what_is_learned(
    made: Made, tokenizer: BPETokenizer, tmp_path: Path
) -> None:
    settings = RepositorySettings(
        str(tmp_path), source=str(made.folder), context_tokens=64, row_tokens=300, rows=200, cases=60
    )
    counts = build(settings, tokenizer, tmp_path / "dataset")
    said = json.loads((tmp_path / "repository.json").read_text())
    rows = {
        split: [
            json.loads(line) for line in (tmp_path / "dataset" / f"{split}.jsonl").read_text().splitlines()
        ]
        for split in ("train", "validation", "test")
    }
    after = added(made, said["known"], said["head"])
    learned = "".join(row["prefix"] + row["middle"] + row["suffix"] for row in rows["train"])
    assert after and not [path for path in after if path.removesuffix(".py").rpartition("/")[2] in learned]
    assert len(rows["test"]) == 60 and counts.kept >= 200
    assert any(row["prefix"].startswith("# shop/") for row in rows["test"])
    assert not any(
        row["middle"].strip() in row["suffix"] for row in rows["test"] if "def take" in row["middle"]
    )
    for row in rows["test"]:
        n = sum(len(tokenizer.encode(row[key])) for key in ("prefix", "suffix"))
        assert n <= room_of(settings, tokenizer) + 8 and len(tokenizer.encode(row["middle"])) < LIMIT_TOKENS
        future = added(made, row["commit"], said["head"])
        assert not [path for path in future if f"# {path}\n" in row["prefix"]], "of that moment, not of today"


def test_mistakes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkout is named"):
        check(RepositorySettings())
    with pytest.raises(ValueError, match="is an address"):
        check(RepositorySettings(source="https://example.org/a.git"))
    with pytest.raises(ValueError, match="holds no git repository"):
        check(RepositorySettings(source=str(tmp_path)))
    with pytest.raises(ValueError, match="--row_tokens is 100"):
        longest(RepositorySettings(row_tokens=100))
