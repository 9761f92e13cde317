"""recipes/refactor.py and refactoring.py: pairs that compile and agree, splits, and a file refactored."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import sysconfig
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_recipes import tiny

from config.files import REPOSITORY
from data.corpus import split_of
from recipes import refactor, refactoring
from recipes.__main__ import main
from recipes.degradations import STRATEGIES
from recipes.functions import parsed
from recipes.refactor import (
    HEADER,
    RefactorSettings,
    behaviour_table,
    build,
    constants_of,
    kept_behaviour,
    pieces,
    prompt_of,
    shape_of,
)
from recipes.refactoring import Rewrite, diff, refactored
from recipes.refactoring import main as refactor_file
from tokenizer import BPETokenizer

pytestmark = pytest.mark.usefixtures("unguarded")

isolated = pytest.mark.usefixtures("isolated")


def module(n: int) -> str:
    return (
        f"LIMIT = {n + 2}\n\n\n"
        f"def scaled{n}(xs: list[int], k: int = {n}) -> list[int]:\n"
        f'    """Each of them {n} times as much."""\n'
        f"    doubled = [x * k + {n} for x in xs if x != LIMIT]\n"
        "    return doubled + [len(xs)]\n\n\n"
        f"class Box{n}:\n"
        f"    def put{n}(self, item: str) -> bool:\n"
        f"        known = item in self.items_{n}\n"
        f"        self.items_{n}.append(item)\n"
        "        return not known\n"
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """10 modules of 2 functions each, and one that holds another's function under another name."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for n in range(10):
        (folder / f"e{n}.py").write_text(module(n))
    names = [f"e{n}.py" for n in range(10)]
    test = next(n for n, name in enumerate(names) if split_of(name, 10, 10) == "test")
    copy = (
        module(test).split("class")[0].replace(f"scaled{test}", "taken_over").replace('"""Each', '"""Every')
    )
    name = next(f"copy{n}.py" for n in range(99) if split_of(f"copy{n}.py", 10, 10) == "train")
    (folder / name).write_text(copy)
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "latin.py").write_bytes(b"x = '\xe9'\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train([module(n) for n in range(9)], 400)


def rows(folder: Path) -> dict[str, list[dict]]:
    splits = ("train", "validation", "test")
    return {split: [json.loads(line) for line in open(folder / f"{split}.jsonl")] for split in splits}


# --- functions of a file ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["textwrap.py", "shlex.py", "dataclasses.py", "asyncio/queues.py"])
def test_functions_are_taken_out_and_put_back_byte_for_byte(name: str) -> None:
    text = (Path(sysconfig.get_path("stdlib")) / name).read_text("utf-8")
    found = pieces(text)
    assert len(found) > 10
    lines = text.split("\n")
    for piece in found:
        assert parsed(piece.source).name == piece.name.rpartition(".")[2]
        back = [piece.indent + line if line.strip() else line for line in piece.source.split("\n")[:-1]]
        assert back == lines[piece.first - 1 : piece.last]


def test_what_cannot_be_indented_again_stays_and_is_counted() -> None:
    text = (
        "class A:\n"
        "    def a(self):\n        return '''over\n        lines'''\n"
        "    def b(self):\n        '''A docstring\n        over lines.'''\n        return 1\n"
        "    def c(self): return 1; x = 2\n"
        "    if True:\n        @property\n        def d(self):\n"
        "            def inner():\n                pass\n"
        "def e(): return f'''\nmargin {1}'''\n"
    )
    skipped: Counter[str] = Counter()
    assert [(p.name, p.indent) for p in pieces(text, skipped)] == [
        ("A.b", "    "),
        ("A.c", "    "),
        ("A.d", "        "),
        ("e", ""),
    ]
    assert skipped == {"text over several lines, which cannot be indented": 1}
    with pytest.raises(ValueError, match="does not parse"):
        pieces("def f(:\n")
    assert pieces("def f():\r\n    return 1\r\n", skipped) == [] and skipped["unusual line ends"] == 1


def test_a_function_that_no_tree_can_show_is_left_out(tmp_path: Path, tokenizer: BPETokenizer) -> None:
    """Python reads both; to write them out it has neither the digits nor the depth."""
    skipped: Counter[str] = Counter()
    long = f"def f(a):\n    b = a\n    return b + 0x{'F' * 5000}\n"
    deep = f"def g(a):\n    b = a\n    return {' + '.join(['b'] * 1500)}\n"
    assert pieces(f"{long}{deep}def h():\n    return {' + '.join('b' * 99)}\n", skipped)[0].name == "h"
    assert skipped == {"a number of more digits than Python writes": 1, "code that is nested too deeply": 1}
    for n in range(10):
        (tmp_path / f"e{n}.py").write_text(f"{module(n)}\n\n{long}\n\n{deep}")
    counts = build(
        RefactorSettings(source=str(tmp_path), check_behaviour=False), tokenizer, tmp_path / "dataset"
    )
    assert counts.kept == 20 and all(counts.dropped[reason] == 10 for reason in skipped)


def test_constants_are_numbers_that_are_bound_once() -> None:
    text = "A = 1\nB = 2\nB += 1\nC = 'x'\nD = True\nE = 0.5\nF = 3\ndef f():\n    global F\n    F = 4\n"
    assert constants_of(text) == {"A": 1, "E": 0.5}
    faster = "A = 5\nB = 6\nC = 1e999\ntry:\n    from _fast import A\nexcept ImportError:\n    pass\n"
    assert constants_of(faster) == {"B": 6}
    assert constants_of(f"{faster}from _faster import *\n") == {}
    long = f"P = 0x{'F' * 512}\nQ = 0x{'F' * 5000}\nR = {10**20}\nS = {10**20 - 1}\nT = 1e300\n"
    assert constants_of(long) == {"S": 10**20 - 1, "T": 1e300}


def test_a_copy_is_told_by_its_code_and_not_by_its_name_or_docstring() -> None:
    one = "def f(x: int) -> int:\n    '''Doc.'''\n    return x + 1\n"
    assert shape_of(one) == shape_of("def g(x):\n    return x + 1  # why\n")
    assert shape_of(one) != shape_of("def f(x):\n    return x + 2\n")


# --- the dataset -----------------------------------------------------------------------------------


@isolated
def test_pairs_compile_agree_and_keep_to_one_side(
    source: Path, tokenizer: BPETokenizer, tmp_path: Path
) -> None:
    counts = build(RefactorSettings(source=str(source)), tokenizer, tmp_path / "dataset")
    made = rows(tmp_path / "dataset")
    assert (counts.found, counts.dropped) == (21, {"a copy of another": 1})
    paths = {split: {row["path"] for row in own} for split, own in made.items()}
    assert all(split_of(path, 10, 10) == split for split, own in paths.items() for path in own)
    assert "taken_over" not in {row["function"] for own in made.values() for row in own}
    assert {row["strategy"] for row in made["train"]} == set(STRATEGIES)
    for row in [row for own in made.values() for row in own]:
        code = row["prompt"].removeprefix(f"{HEADER}\n\n")
        assert (
            parsed(code).name == parsed(row["completion"]).name and code.strip() != row["completion"].strip()
        )
        assert row["prompt"] == prompt_of(code)
    runs = {row["function"] for row in made["test"] if "context" in row}
    assert runs and all(name.startswith("scaled") for name in runs)  # methods are not run
    assert all("context" not in row for row in made["train"])
    card = (tmp_path / "dataset" / "README.md").read_text()
    assert "Of 13 documents 1 do not parse, and 1 are not UTF-8. Of 20 functions 10 could be run" in card
    assert "| loops | 10 | 10 | 0 |" in card


@isolated
def test_a_rewrite_that_changes_what_is_computed_is_left_out(
    source: Path, tokenizer: BPETokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No look at the tree shows this one: both sides compile and take the same names."""
    monkeypatch.setitem(
        STRATEGIES, "redundant", lambda code, _: code.replace("return doubled", "return doubled[1:]")
    )
    build(
        RefactorSettings(source=str(source), strategies=("redundant", "hints")),
        tokenizer,
        tmp_path / "dataset",
    )
    made = rows(tmp_path / "dataset")
    assert {row["strategy"] for own in made.values() for row in own} == {"hints"}
    assert "| redundant | 10 | 0 | 10 |" in (tmp_path / "dataset" / "README.md").read_text()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"strategies": ("nmaes",)}, "--strategies names nmaes; there are names, hints"),
        ({"max_tokens": 20}, r"set would be empty: .* longer than 20 tokens with their prompt"),
        ({"min_lines": 50}, r"set would be empty: .* shorter than 50 lines"),
        ({"functions": 1}, "set would be empty"),
        ({"source": "nowhere"}, "--source nowhere does not exist: give stdlib, a folder or a file"),
    ],
)
def test_bad_settings_are_one_sentence(
    source: Path, tokenizer: BPETokenizer, tmp_path: Path, values: dict, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        settings: Any = {"source": str(source), "check_behaviour": False} | values
        build(RefactorSettings(**settings), tokenizer, tmp_path / "dataset")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"text": "x = 1\n"}, "holds no Python function: give Python files"),
        ({"text": "def f(:\n"}, "holds no Python function, and 40 of 40 documents do not parse"),
        ({"prompt": "a", "completion": "b"}, "holds examples and no plain code"),
    ],
)
def test_a_source_without_functions_is_refused(
    tokenizer: BPETokenizer, tmp_path: Path, row: dict, sentence: str
) -> None:
    path = tmp_path / "rows.jsonl"
    different = (
        {key: value + f"# {n}\n" for key, value in row.items()} | {"name": f"{n}"} for n in range(40)
    )
    path.write_text("".join(json.dumps(one) + "\n" for one in different))
    with pytest.raises(ValueError, match=sentence):
        build(RefactorSettings(source=str(path)), tokenizer, tmp_path / "dataset")


def test_a_source_too_small_for_three_sides_is_refused(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(TEXT)
    sentence = (
        "the test set would be empty: the 1 documents of .* split by their names, and give 1 train, 0 val"
    )
    with pytest.raises(ValueError, match=sentence):
        build(RefactorSettings(source=str(tmp_path)), tokenizer, tmp_path / "dataset")


def test_without_a_sandbox_a_usable_source_is_refused_before_it_takes_time(
    source: Path, tokenizer: BPETokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(refactor, "constants_of", lambda _: pytest.fail("functions were degraded"))
    settings = RefactorSettings(source=str(source))
    for asked in (
        lambda: refactor.files_of(settings),  # before a small base is trained
        lambda: build(settings, tokenizer, tmp_path / "dataset"),
        lambda: refactor.check_isolation(settings),  # This runs where the dataset is there already.
    ):
        with pytest.raises(ValueError, match=r"bubblewrap is not installed.* --check_behaviour false"):
            asked()
    refactor.check_isolation(RefactorSettings(check_behaviour=False))


# --- what predictions are worth, and a file refactored ---------------------------------------------


@isolated
def test_behaviour_kept_is_all_for_copying_and_nothing_for_what_does_not_parse() -> None:
    original = "def f(xs: list[int]):\n    return [x * 2 for x in xs]\n"
    copy = original.replace("x * 2", "2 * x")
    wrong = original.replace("x * 2", "x * 3")
    cases = [(original, "", {"model": copy if n else wrong, "copy": copy, "empty": ""}) for n in range(4)]
    cases.append(("def f(self):\n    return 1\n", "", dict.fromkeys(("model", "copy", "empty"), "def f(")))
    found = kept_behaviour(cases, ["model", "copy", "empty"])
    lines = behaviour_table(found, 5).splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [
        ["model", "75.0"],
        ["copy", "100.0"],
        ["empty", "0.0"],
    ]
    assert [line.split()[-1] for line in lines[2:]] == ["4", "4", "4"]  # the method is not counted


TEXT = (
    "import re\n\n\ndef twice(xs: list):\n    return [x * 2 for x in xs]\n\n\n"
    "class Box:\n    def put(self, item):\n        self.item = item\n        return item\n\n\n"
    "def other(n: int):\n    return n + 1\n"
)


LOOP = "def twice(xs: list):\n    r = []\n    for x in xs:\n\n        r.append(x * 2)\n    return r\n"


@isolated
def test_answers_take_their_functions_place_only_if_they_hold() -> None:
    wanted = {
        "twice": f"{LOOP}\n\n",
        "put": "def put(self, item):\n    self.item = item\n    return self.item",
        "other": "def other(n: int):\n    return 1 + n\n",
    }
    expected = (
        f"import re\n\n\n{LOOP}\n\n"
        "class Box:\n    def put(self, item):\n        self.item = item\n        return self.item\n\n\n"
        "def other(n: int):\n    return 1 + n\n"
    )
    result, became = refactored(TEXT, lambda prompts: [Rewrite(code) for code in wanted.values()])
    assert result == expected
    assert became == {"changed, and does the same when run": 2, "changed, and not run": 1}
    for answers in [
        ["", "def put(self, item):\n    return item +", "def n(n):\n    return n + 1\n"],
        ["def twice(xs: list):\n    return xs\n", "x = 1", "def other(n: int):\n    return n + 1\n"],
        [TEXT, "def put(self, item):\n    return '''a\nb'''\n", "def other(n):\n    return n - 1\n"],
    ]:
        result, became = refactored(TEXT, lambda prompts, answers=answers: [Rewrite(a) for a in answers])
        assert result == TEXT and became.total() == 3
        assert not any(name.startswith("changed") for name in became)
    asked: list[str] = []
    refactored(TEXT, lambda prompts: asked.extend(prompts) or [Rewrite("")] * len(prompts))
    assert asked[1] == f"{HEADER}\n\ndef put(self, item):\n    self.item = item\n    return item\n\n"


METHOD = (
    "LIMIT = 2\n\n\nclass Box:\n    @cached\n    def put(self, item, /, *more, size=1, **rest):\n"
    "        yield item\n"
)


@pytest.mark.parametrize(
    ("head", "body", "told"),
    [
        ("def put(self, item: int, /, *more, size: int = 1, **rest):", "yield item + LIMIT", "changed, and"),
        ("def put(self, item, *more, size=1, **rest):", "yield item + 1", "has other parameters"),
        ("def put(self, it, /, *more, size=1, **rest):", "yield it", "has other parameters"),
        ("def put(item, self, /, *more, size=1, **rest):", "yield item + 1", "has other parameters"),
        ("def put(self, item, size=1, /, *more, **rest):", "yield item + 1", "has other parameters"),
        ("def put(self, item, /, *more, size=1):", "yield item + 1", "has other parameters"),
        ("def put(self, item, /, *more, size=2, **rest):", "yield item + 1", "has other defaults"),
        ("def put(self, item, /, *more, size, **rest):", "yield item + 1", "has other defaults"),
        ("def put(self, item=1, /, *more, size=1, **rest):", "yield item + 1", "has other defaults"),
        ("def put(self, item, /, *more, size=1, **rest):", "return [(yield_ := item)]", "gives a value"),
        ("async def put(self, item, /, *more, size=1, **rest):", "yield item + 1", "gives a value"),
        ("def put(self, item, /, *more, size=1, **rest):", "yield item + MISSING", "takes a name"),
        ("def put(self, item, /, *more, size=1, **rest):", f"yield 0x{'f' * 5000}", "more digits than"),
        ("def put(self, item, /, *more, size=1, **rest):", "\r    yield item + 1", "unusual line ends"),
    ],
)
def test_an_answer_that_cannot_be_run_keeps_the_way_it_is_called(head: str, body: str, told: str) -> None:
    code = f"@cached\n{head}\n    {body}\n"
    result, became = refactored(METHOD, lambda prompts: [Rewrite(code)], False)
    assert told in "".join(became) and (result != METHOD) == told.startswith("changed")
    _, became = refactored(METHOD, lambda prompts: [Rewrite(code.removeprefix("@cached\n"))], False)
    assert not any(name.startswith("changed") for name in became)
    starred = f"from lib import *\n{METHOD}"
    result, became = refactored(starred, lambda prompts: [Rewrite(code)], False)
    assert (result != starred) == (told.startswith("changed") or told == "takes a name")


def test_an_answer_that_was_cut_off_is_not_taken() -> None:
    """It may parse all the same, and then the end of the function would be gone."""
    code = textwrap.dedent(METHOD.split("class Box:\n")[1]).replace("yield item", "yield item + 1")
    for problem, changed in (("", True), ("the answer is cut off", False)):
        result, _ = refactored(METHOD, lambda prompts, problem=problem: [Rewrite(code, problem)], False)
        assert (result != METHOD) == changed


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", ["", "    # \u2028 the last line has no end"])
def test_a_file_keeps_its_mark_and_line_ends_and_its_diff_applies(
    tmp_path: Path, end: str, mark: str, last: str
) -> None:
    def spelled(text: str) -> str:
        return mark + text.replace("\n", end) + last

    before = "def f(n):\n    return n + 1\n\n\nclass A:\n\tdef m(self):\n\t\treturn 1\n"
    answers = ["def f(n):\n    m = n + 1\n    return m\n", "def m(self):\n\treturn 2\n"]
    after = before.replace("return n + 1", "m = n + 1\n    return m").replace("return 1", "return 2")
    result, became = refactored(spelled(before), lambda prompts: [Rewrite(a) for a in answers], False)
    assert became == {"changed, and not run": 2} and result == spelled(after)
    path = tmp_path / "f.py"
    path.write_bytes(spelled(before).encode())
    made = diff(spelled(before), result, "f.py").encode()
    subprocess.run(["git", "apply", "-p0", "--unsafe-paths"], input=made, cwd=tmp_path, check=True)
    assert path.read_bytes() == spelled(after).encode()


def test_a_file_of_one_line_gets_line_feeds() -> None:
    answer = Rewrite("def f(n):\n    return n + 1")
    assert refactored("def f(n): return n + 2", lambda prompts: [answer], False)[0] == answer.code


def test_what_is_written_keeps_its_mode_and_stays_where_a_link_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import recipes.refactoring

    place, link = tmp_path / "place.py", tmp_path / "link.py"
    place.write_text("def f(n):\n    return n + 1\n")
    place.chmod(0o750)
    link.symlink_to(place)
    answer = "def f(n):\n    return 1 + n\n"
    monkeypatch.setattr(recipes.refactoring, "_model", lambda settings: lambda prompts: [Rewrite(answer)])
    words = ["--recipe", "refactor", "--model", "any", "--check_behaviour", "false", "--file", str(link)]
    refactor_file(words)
    assert place.read_text() != answer
    refactor_file([*words, "--write"])
    assert link.is_symlink() and place.read_text() == answer and place.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def f(:\n", "cannot be refactored: it does not parse: invalid syntax, line 1"),
        ("x = 1\n", "holds no function that can be refactored"),
        ("\ufeffx = 1\n", "holds no function that can be refactored"),
        ("def f():\r    return 1\n", "; 1 cannot be taken out: unusual line ends"),
        (f"def f():\n    return 0x{'f' * 5000}\n", "; 1 cannot be taken out: a number of more digits than"),
        (None, "cannot be used (No such file or directory)"),
    ],
)
def test_the_command_refuses_a_file_in_one_sentence(tmp_path: Path, text: str | None, sentence: str) -> None:
    path = tmp_path / "file.py"
    if text is not None:
        path.write_bytes(text.encode())
    words = ["generate.py", "--recipe", "refactor", "--model", "nowhere", "--file", str(path)]
    done = subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    assert sentence in done.stderr and done.stderr.count("\n") == 1
    if text is not None:
        assert path.read_bytes() == text.encode()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "no --model is given, and there is no run of the recipe in runs/refactor/run: train one by"),
        (["--adapter", "a"], "no --model is given, and --adapter is for a published one"),
    ],
)
def test_the_command_without_a_model_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.py").write_text(TEXT)
    with pytest.raises(SystemExit) as ended:
        refactor_file(["--recipe", "refactor", "--file", "file.py", *words])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and sentence in said and said.count("\n") == 1


def test_without_a_sandbox_the_command_says_so_before_a_model_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(refactoring, "_model", lambda _: pytest.fail("a model was opened"))
    file = tmp_path / "file.py"
    for text, sentence in (("x = 1\n", "holds no function"), (TEXT, "bubblewrap is not installed")):
        file.write_text(text)
        with pytest.raises(SystemExit) as ended:
            refactor_file(["--recipe", "refactor", "--model", "nowhere", "--file", str(file)])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and sentence in said and said.count("\n") == 1


def test_every_prompt_is_made_by_one_function() -> None:
    """The header stands in the source of one module, once."""
    packages = [path.parent for path in REPOSITORY.glob("*/__init__.py")]
    files = [*REPOSITORY.glob("*.py"), *(path for package in packages for path in package.rglob("*.py"))]
    assert {Path(refactor.__file__), REPOSITORY / "training" / "loop.py"} <= {*files}
    for path in files:
        texts = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
        held = sum(isinstance(text, str) and HEADER in text for text in texts)
        assert held == (path == Path(refactor.__file__))


@isolated
def test_the_whole_recipe_and_a_file_refactored_by_its_model(
    source: Path,
    tokenizer: BPETokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny("gpt_bigcode", tokenizer, tmp_path / "base", 320)
    flags = (
        "--strategies [names,loops] --max_tokens 320 --row_length 320 --eval_samples 4 --max_steps 2 "
        "--accumulation 1 --allow worse-than-unigram,split-leaks --samples 0 --validate_every 0 "
        "--patience 0 --data.workers 1"
    )
    assert main(["refactor", "--base", str(base), "--source", str(source), *flags.split()]) == 0
    report = (tmp_path / "runs/refactor/report.txt").read_text()
    kept = {line.split()[0]: line.split()[1] for line in report.split("behaviour kept")[1].splitlines()[2:7]}
    assert kept["copy"] == "100.0" and kept["model"] == "0.0"  # the base is drawn: it writes no Python
    config = (tmp_path / "runs/refactor/run/config.yaml").read_text()
    for setting in ("r: 16", "alpha: 32", "dropout: 0.08", "warmup_steps: 500", "weight_decay: 0.02"):
        assert setting in config
    assert (tmp_path / "runs/refactor/adapter/adapter_config.json").is_file()
    file = tmp_path / "file.py"
    file.write_text(TEXT)
    capsys.readouterr()
    words = ["--recipe", "refactor", "--file", str(file), "--write"]  # the model is the recipe's own run
    refactor_file([*words, "--max_new_tokens", "12"])
    said = capsys.readouterr()
    assert said.out == "" and "3 functions: 0 changed, 3 kept as they were" in said.err
    assert file.read_text() == TEXT


def test_a_base_of_another_family_is_refused(
    source: Path, tokenizer: BPETokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny("codegen", tokenizer, tmp_path / "base", 1024)
    with pytest.raises(SystemExit) as exit:
        main(["refactor", "--base", str(base), "--source", str(source), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.count("\n") == 1
    assert "is of the family codegen" in said and "no c_attn, no c_proj" in said and "qkv_proj" in said
