"""The manual: its links hold, its generated pages are fresh, its commands exist, and its code runs.

The language of a block of code in docs/ says what becomes of it here: `python` and `sh` blocks are run,
`bash` blocks are run by the slow tests, `yaml` blocks are parsed as settings, the flags in `console` blocks
are compared with those of the command, the lines in `diff` blocks must follow each other in their files, and
`text` is output, which is left alone.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import yaml
from commands import command
from test_floors import FLOORS
from torch.distributed import run as torchrun

from architecture import Decoder
from config import Config, LoraConfig, ModelConfig
from guards.preflight import GUARDS
from lora import add_adapter
from metrics.registry import BY_MODEL, METRICS
from pretrained import load_pretrained, save_pretrained
from pretrained.load import FAMILIES
from pretrained.save_adapter import save_adapter
from recipes.__main__ import RECIPES
from scraping.__main__ import COMMANDS
from scraping.clean import STAGES
from selftest.data import write_base, write_long_prompts
from suites.tasks import TASKS
from sweeps.settings import parse_settings
from tokenizer import BPETokenizer, CodeTokenizer
from training.checkpoint import save_checkpoint
from verbs import verbs

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LANGUAGES = {"python", "sh", "bash", "console", "yaml", "diff", "text"}
DOORS = (
    "trainingmanager",
    "eval",
    "generate",
    "serve",
    "export",
    "functional",
    "hyperparam_tune",
    "recipes/base",
)
VERBS = verbs()
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
WITH_LINKS = [*(ROOT / name for name in OUTSIDE), *PAGES]
LIST = ["git", "ls-files", "-co", "--exclude-standard", "*.py", "*.yaml", ".github/*.yml"]
LISTED = subprocess.run(LIST, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
FILES = {name: ROOT / name for name in LISTED if (ROOT / name).is_file()}
NAMES_IN_FILE = r"((?:`[\w.]+`(?:,? and |, )?)+) in\s+`([\w/]+\.py)`"
PROGRAM = r"(?:python (?:-m )?|\./plumb )(\w[\w./]*)"  # a script, a package or a verb


class Block(NamedTuple):
    """A fenced block of code of one page."""

    page: str
    number: int  # among those of its page
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}-{self.number}"


def blocks(*languages: str) -> list[Block]:
    """Return the blocks of all pages that have one of these languages."""
    found = []
    for page in PAGES:
        fenced = re.findall(r"^```(.*)\n((?:.*\n)*?)```$", page.read_text("utf-8"), re.MULTILINE)
        name = str(page.relative_to(DOCS))
        found += [Block(name, number, *parts) for number, parts in enumerate(fenced, 1)]
    return [block for block in found if not languages or block.language in languages]


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*\n(?:.*\n)*?```$", "", page.read_text("utf-8"), flags=re.MULTILINE)


# --- the front page, and links -----------------------------------------------------------------------


def test_the_front_page_is_one_screen_and_has_the_two_commands():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.encode()) <= 10_000
    assert {"    ./plumb train", "    ./plumb test"} <= set(text.splitlines())


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and mkdocs both make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(slugs) == len(set(slugs)), f"{page.name} has two headings of one name"
    # Where a mark is dropped between two spaces, GitHub writes two hyphens and mkdocs one.
    return {slug for slug in slugs if "--" not in slug}


@pytest.mark.parametrize("page", WITH_LINKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_and_anchor_resolves(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{target} is no file"
        assert file.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(file), f"{target} is no heading of {file.name}"


def test_every_page_is_in_the_contents():
    contents = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]
    listed = re.findall(r"[\w/-]+\.md", json.dumps(contents))
    assert sorted(listed) == sorted([*(str(page.relative_to(DOCS)) for page in PAGES), *OUTSIDE[1:]])


@pytest.mark.parametrize("page", WITH_LINKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_of_the_repository_that_is_named_exists(page: Path):
    folders = "|".join({path.split("/")[0] for path in FILES if "/" in path})
    pattern = rf"(?<![\w/.])(?:{folders})/[a-z0-9_/]+\.(?:py|yaml)\b"
    named = re.findall(pattern, page.read_text("utf-8"))
    assert [name for name in named if name not in FILES] == []


@functools.cache
def defined_in(path: str) -> set[str]:
    """Return the names that a file defines at its top level, and `Class.name` for those in a class."""
    found = set()
    text = FILES[path].read_text("utf-8") if path.endswith(".py") and path in FILES else ""
    for node in ast.parse(text).body:
        for name in names_of(node):
            found.add(name)
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                found |= {f"{name}.{own}" for own in names_of(inner)}
    return found


def names_of(node: ast.stmt) -> list[str]:
    """Return the names that a definition or an assignment gives."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


@pytest.mark.parametrize("page", WITH_LINKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_function_that_is_named_with_its_file_is_in_it(page: Path):
    """The form is `name` in `folder/file.py`, also with several names before one file."""
    missing = []
    for names, path in re.findall(NAMES_IN_FILE, page.read_text("utf-8")):
        for name in re.findall(r"`([\w.]+)`", names):
            if name not in defined_in(path):
                now = [other for other in FILES if name in defined_in(other)]
                missing.append(f"{name} is not in {path}; it is in {' and '.join(now) or 'no file'}")
    assert missing == []


def test_the_table_of_floors_has_every_floor_in_its_order():
    """A folder whose files lie on two floors has a second row, which says so."""
    text = (DOCS / "architecture.md").read_text("utf-8")
    listed: list[str] = []
    for cell in reversed(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)):
        upper = "." if cell.endswith("(upper floor)") else ""
        listed += [name + upper for name in re.findall(r"`(\w+)(?:/|\.py)`", cell)]
    floors = [[re.sub(r"\..*", ".", name) for name in floor.split()] for floor in FLOORS]
    assert sorted(listed) == sorted({name for floor in floors for name in floor})
    order = [number for name in listed for number, floor in enumerate(floors) if name in floor]
    assert order == sorted(order)


def hunks(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the file and the stripped lines of each part of a diff; `+...` stands for lines left out."""
    path, lines = "", []
    for line in [*text.splitlines(), "+..."]:
        if line.startswith("+++ ") or line == "+...":
            if lines:
                yield path, lines
            path, lines = (line[4:] if line != "+..." else path), []
        else:
            assert line[:1] in ("+", " "), f"{line!r} is neither added nor context"
            lines.append(line[1:].strip())


@pytest.mark.parametrize("block", blocks("diff"), ids=str)
def test_lines_of_a_diff_follow_each_other_in_the_file_that_it_names(block: Block):
    for path, lines in hunks(block.text):
        whole = [line.strip() for line in (ROOT / path).read_text("utf-8").splitlines()]
        found = any(whole[start : start + len(lines)] == lines for start in range(len(whole)))
        assert found, f"{path} does not have these lines in a row: {lines}"


NAMED: dict[str, Collection[str]] = {
    "metrics.md": METRICS.keys() | BY_MODEL.keys(),
    "scrape/clean.md": STAGES,
    "evaluate.md": TASKS,
    "guards.md": GUARDS,
    "models.md": FAMILIES,
    "recipes/index.md": RECIPES,
}


@pytest.mark.parametrize("page", NAMED)
def test_what_can_be_added_is_named_on_its_page(page: str):
    text = (DOCS / page).read_text("utf-8")
    missing = [name for name in NAMED[page] if not re.search(rf"(?<![\w+]){re.escape(name)}(?![\w+])", text)]
    assert missing == []


def test_every_recipe_has_a_page():
    pages = {path.stem for path in (DOCS / "recipes").iterdir()}
    assert pages == {*RECIPES, "index"}


def test_every_paper_that_the_code_names_is_among_the_sources():
    def papers(text: str) -> set[str]:
        return set(re.findall(r"(?:arXiv:|, )(\d{4}\.\d{4,5})\b", text))

    listed = papers((DOCS / "sources.md").read_text("utf-8"))
    others = [path for path in FILES.values() if not path.is_relative_to(ROOT / "tests")]
    named = set().union(
        *(papers(path.read_text("utf-8")) for path in [*others, *PAGES] if path.name != "sources.md")
    )
    assert sorted(named - listed) == []


# --- pages that are made from the code ---------------------------------------------------------------


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generated", DOCS / "generated.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATED = generator()


@pytest.mark.parametrize("page", GENERATED.PAGES)
def test_generated_pages_are_fresh(page: str):
    fresh = (DOCS / page).read_text("utf-8") == GENERATED.PAGES[page]()
    assert fresh, f"docs/{page} is stale: run `python docs/generated.py`"


# --- commands ----------------------------------------------------------------------------------------


def test_blocks_have_a_language_that_says_what_becomes_of_them():
    assert [str(block) for block in blocks() if block.language not in LANGUAGES] == []


def commands_in(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yield the program, its words and its flags, for each command of ours in a block."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        for part in re.split(r"\s#|[|;&]", line):
            if found := re.search(PROGRAM, part):
                words = part[found.end() :]
                yield found[1], words, re.findall(r"(?<![\w-])--[A-Za-z][\w.]*", words)


@functools.cache
def known_flags(program: str, words: tuple[str, ...]) -> set[str]:
    """Return the flags that a command's help or, of a benchmark, its source names."""
    script = program if program.endswith(".py") else f"{program}/__main__.py"
    if not script.startswith(("benchmarks/", "tests/")):
        done = command(script, *words, "--help", cwd=ROOT)
        assert done.returncode == 0, done.stderr
        text = done.stdout
    else:
        text = (ROOT / script).read_text("utf-8")
    return set(re.findall(r"--[A-Za-z][\w.]*", text))


def flags_of(program: str, words: str) -> set[str]:
    """Return the flags that this command line may have."""
    own = VERBS[program].program.removeprefix("-m ").split()[0] if program in VERBS else program
    verb: tuple[str, ...] = ()
    if own in ("scraping", "recipes"):
        verb = tuple(words.split()[:1])
    if own == "recipes" and verb == ("$recipe",):
        verb = ("completion",)
    if own == "generate.py" and "--recipe" in words:
        verb = ("--recipe", "refactor")
    known = known_flags(own, verb) | {"--help"} | {"--recipe"}.intersection(verb)
    trains = own in ("hyperparam_tune.py", "recipes", "benchmarks/canaries.py")
    return known | known_flags("trainingmanager.py", ()) if trains else known


def test_every_flag_of_a_command_is_known_to_it():
    unknown, seen = [], 0
    for block in blocks("sh", "bash", "console"):
        for program, words, flags in commands_in(block.text):
            if program in ("pytest", "test", "docs"):
                continue
            seen += 1
            rest = set(flags) - flags_of(program, words) if flags else set()
            unknown += [f"{block}: {program} {flag}" for flag in sorted(rest)]
    assert unknown == [] and seen > 50


def test_every_flag_in_the_text_is_known_to_a_command():
    known = set().union(*(known_flags(f"{door}.py", ()) for door in (*DOORS, "preflight")))
    known |= set().union(*(known_flags("scraping", (command,)) for command in COMMANDS))
    known |= set().union(*(known_flags("recipes", (recipe,)) for recipe in RECIPES))
    known |= known_flags("generate.py", ("--recipe", "refactor")) | {"--help", "--recipe"}
    known |= {"--version", "--print_completion", "--strict"}  # flags of ./plumb and mkdocs
    known |= torchrun.get_args_parser()._option_string_actions.keys()
    for file in [*(ROOT / "benchmarks").glob("*.py"), ROOT / "tests" / "hostile.py"]:
        known |= known_flags(str(file.relative_to(ROOT)), ())
    for page in [ROOT / "README.md", *PAGES]:
        spans = re.findall(r"`[^`\n]+`", prose(page))
        flags = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[A-Za-z][\w.]*", span)}
        groups = {flag for flag in flags if any(name.startswith(f"{flag}.") for name in known)}
        assert sorted(flags - known - groups) == [], page.name


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_settings_in_the_manual_parse(block: Block, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(block.text, "utf-8")
    settings = parse_settings(["--config", str(tmp_path / "mine.yaml")])
    assert settings.space.plain and settings.config.train.max_steps == 500


# --- code that runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the blocks of Python name: published models, an adapter, and a run."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "long").mkdir()
    write_long_prompts(folder / "rows.jsonl")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        (folder / "long" / f"part{number}.py").write_text(row["prompt"] + row["completion"])
    (folder / "code").symlink_to(folder / "long")
    write_base(folder)
    for name in ("bigcode/starcoderbase-1b", "bigcode/starcoder2-3b"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(folder / "base")
    found = load_pretrained(str(folder / "base"))
    add_adapter(found.model, LoraConfig(r=2, targets=("c_attn",)), found.family.key)
    save_adapter(found.model, found.family, folder / "a" / "strangers" / "adapter", "base", None)
    write_run(folder / "runs" / "NAME")
    of_code = CodeTokenizer.train(["def fib(n):\n    return n\n"] * 20, 300)
    shape = ModelConfig(
        of_code.vocab_size, n_layer=1, norm="rms", norm_weight=True, mlp="swiglu", qk_norm=False
    )
    save_pretrained(Decoder(shape), of_code, folder / "exported")
    return folder


def write_run(folder: Path) -> None:
    """Write the folder of a run whose model has random weights."""
    tokenizer = BPETokenizer.train(["def fib(n):\n    return n\n"] * 4, 300)
    torch.manual_seed(0)
    shape = ModelConfig(tokenizer.vocab_size, block_size=64, n_layer=1, n_head=2, n_embd=16)
    model = Decoder(shape)
    tokenizer.save(folder / "tokenizer")
    config = replace(Config(), model=model.config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict()), "utf-8")
    prints = {"data": "0" * 64, "tokenizer": tokenizer.fingerprint, "code": "0" * 64}
    (folder / "fingerprints.json").write_text(json.dumps(prints), "utf-8")
    save_checkpoint(folder / "checkpoints", 1, model, {}, 2.5, keep=False)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_of_the_manual_runs(block: Block, world: Path, tmp_path: Path):
    # No fork: a run computes signatures by threads, for which a fork of a process with such threads waits.
    (tmp_path / "block.py").write_text(block.text, "utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(tmp_path)}
    run = [sys.executable, str(tmp_path / "block.py")]
    done = subprocess.run(run, cwd=world, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_in_a_clone(block: Block, clone: Path) -> None:
    """Run a block as a user would, in a folder that looks like a clone."""
    for path in ROOT.iterdir():
        if path.name not in (".git", ".venv", "cache", "runs", "corpus"):
            (clone / path.name).symlink_to(path)
    (clone / "bin").mkdir()
    python = clone / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    path = f"{python.parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    shell = ["bash", "-euc", block.text]
    done = subprocess.run(shell, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_commands_of_the_manual_run(block: Block, tmp_path: Path):
    run_in_a_clone(block, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_long_commands_of_the_manual_run(block: Block, tmp_path: Path):
    run_in_a_clone(block, tmp_path)
