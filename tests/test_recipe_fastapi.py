"""recipes/fastapi.py: lines around a gap, of pages that share nothing with those of another split."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_recipes import tiny

from adapters.layers import TrainableRows
from config import Config
from data.fim import fim_prompt_ids, known_markers
from pretrained import load_pretrained
from recipes.__main__ import main
from recipes.fastapi import (
    FastapiSettings,
    build,
    grouped,
    lines_of,
    longest,
    page_of,
    prompt_of,
    row_of,
    splits_of,
)
from tokenization import bpe
from tokenizer import GAPS, BPETokenizer, PretrainedTokenizer
from training.run import starting_model, starting_tokenizer

pytestmark = pytest.mark.usefixtures("unguarded")

FILE = (
    "from fastapi import FastAPI\n\napp = FastAPI()\n\n\n@app.get('/')\ndef root(\n):\n    return {'a': 1}\n"
)


def page(n: int) -> str:
    """A file that shares no run of words with those of other pages, but for what every tutorial has."""
    lines = "".join(f"    value_{n}_{i} = make_{n * i}(item{n + i}, {n}{i})\n" for i in range(12))
    return f"from fastapi import FastAPI\n\napp = FastAPI()\n\n\n@app.get('/{n}')\ndef get_{n}():\n{lines}"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """30 pages of 2 variants each; the page `copied` has what the page `p07` has."""
    rows = [(f"p{n:02}/tutorial00{v}.py", page(n) + "# second\n" * v) for n in range(30) for v in range(2)]
    rows.append(("copied/tutorial001.py", page(7)))
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"path": p, "text": t}) + "\n" for p, t in rows))
    return path


@pytest.fixture(scope="module")
def plain() -> BPETokenizer:
    """As one from before every tokenizer had tokens for gaps."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bpe, "GAPS", ())
        return BPETokenizer.train([page(n) for n in range(5)], 400)


@pytest.fixture(scope="module")
def marked(plain: BPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> PretrainedTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    plain.save(folder)
    return PretrainedTokenizer.load(folder).with_tokens(("<fim_prefix>", "<fim_suffix>", "<fim_middle>"))


def test_markers_that_a_base_has_set_aside_keep_their_ids_and_their_rows_train(tmp_path: Path) -> None:
    own = BPETokenizer.train([page(n) for n in range(5)], 400)
    base = load_pretrained(str(tiny("codegen", own, tmp_path / "base")))
    config = Config.from_dict({"base": str(tmp_path / "base"), "lora": {"r": 2, "new_tokens": GAPS}})
    tokenizer = starting_tokenizer(config, base)
    assert known_markers(tokenizer) == known_markers(own) and tokenizer.vocab_size == own.vocab_size
    model = starting_model(replace(config, model=base.model.config), base, tokenizer)
    rows = [m.ids.tolist() for m in model.modules() if isinstance(m, TrainableRows)]
    assert rows == [[own.token_id(token) for token in GAPS]] * 2  # of the embedding and of the head


def rows(folder: Path) -> dict[str, list[dict]]:
    splits = ("train", "validation", "test")
    return {split: [json.loads(line) for line in open(folder / f"{split}.jsonl")] for split in splits}


def test_a_line_is_the_files_to_the_blank_and_its_context_is_what_stands_there() -> None:
    found = list(lines_of("a.py", FILE, before=2, after=1))
    assert [(line.number, line.middle) for line in found] == [
        (1, "from fastapi import FastAPI"),
        (3, "\napp = FastAPI()"),
        (6, "\n@app.get('/')"),
        (7, "\ndef root("),
        (9, "\n    return {'a': 1}"),
    ]
    assert (found[3].prefix, found[3].suffix) == ("\n@app.get('/')", "\n):")
    assert all(line.prefix + line.middle + line.suffix in FILE for line in found)
    whole = lines_of("a.py", FILE, before=15, after=10)
    assert all(line.prefix + line.middle + line.suffix == FILE.rstrip("\n") for line in whole)


def test_a_page_is_a_folder_of_the_documentation_or_an_address() -> None:
    assert (
        page_of("docs_src/first_steps/tutorial001.py")
        == page_of("first_steps/tutorial001.py")
        == "first_steps"
    )
    assert page_of("clone/docs_src/app/sub/main.py") == "app"
    assert page_of("site.org/tutorial/bodies/index.html#3.py") == "site.org/tutorial/bodies/index.html"
    assert page_of("main.py") == "main.py"


def test_groups_hold_pages_together_that_share_their_text() -> None:
    files = [("p1/a.py", page(1)), ("p1/b.py", page(2)), ("p3/a.py", page(3)), ("p4/a.py", page(2))]
    groups = grouped(files)
    assert groups[0] == groups[1] == groups[3] != groups[2]


def test_held_out_sides_are_filled_by_names_alone_and_never_by_a_giant() -> None:
    groups, sizes = [f"g{n}" for n in range(100)], [10] * 100
    splits = splits_of(groups, sizes)
    assert Counter(splits.values()) == {"train": 80, "validation": 10, "test": 10}
    assert splits == splits_of(groups[::-1], sizes)
    giant = splits_of([*groups, "giant"], [*sizes, 5000])
    assert giant["giant"] == "train"


@pytest.mark.parametrize("with_markers", [True, False])
def test_no_window_of_a_held_out_page_is_trained_on(
    source: Path, plain: BPETokenizer, marked: PretrainedTokenizer, tmp_path: Path, with_markers: bool
) -> None:
    counts = build(
        FastapiSettings(source=str(source)), marked if with_markers else plain, tmp_path / "dataset"
    )
    made = rows(tmp_path / "dataset")
    assert counts.found == counts.kept + sum(counts.dropped.values()) and counts.kept == sum(
        map(len, made.values())
    )
    assert counts.dropped["in a variant of the file"] > 100
    pages = {split: {row["page"] for row in own} for split, own in made.items()}
    assert not pages["train"] & pages["test"] and not pages["train"] & pages["validation"]
    assert not pages["validation"] & pages["test"]
    split_of_page = {page: split for split, own in pages.items() for page in own}
    assert split_of_page.get("copied", split_of_page["p07"]) == split_of_page["p07"]
    fields = ("prefix", "suffix", "middle") if with_markers else ("prompt", "completion")
    windows = {split: {tuple(row[field] for field in fields) for row in own} for split, own in made.items()}
    assert all(len(windows[split]) == len(made[split]) for split in made)
    assert not windows["train"] & (windows["test"] | windows["validation"])
    assert any(row[fields[-1]].startswith("\n    value_") for row in made["test"])  # indentation is kept


def test_the_prompt_of_a_row_is_the_one_that_is_asked_with(
    plain: BPETokenizer, marked: PretrainedTokenizer
) -> None:
    line = list(lines_of("a.py", FILE, 15, 10))[1]
    row, n = row_of(line, True, marked)
    assert known_markers(plain) is None and known_markers(marked) is not None
    assert (
        n == len(fim_prompt_ids(marked, row["prefix"], row["suffix"])) + len(marked.encode(row["middle"])) + 1
    )
    row, n = row_of(line, False, plain)
    assert row["prompt"] == prompt_of(line.prefix, line.suffix) and row["prompt"].endswith(line.prefix)
    assert line.suffix.strip("\n") in row["prompt"]  # the model sees what follows
    assert n == len(plain.encode(row["prompt"])) + len(plain.encode(row["completion"])) + 2


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"source": ""}, "no source is named"),
        ({"source": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"lines_before": 0}, "--lines_before is 0; it must be at least 1"),
        ({"max_tokens": 20}, "set would be empty: .* of .* lines are left"),
    ],
)
def test_bad_input_is_one_sentence(
    source: Path, plain: BPETokenizer, tmp_path: Path, values: dict, sentence: str
) -> None:
    settings: Any = {"source": str(source)} | values
    with pytest.raises(ValueError, match=sentence) as error:
        if "max_tokens" not in values:
            longest(FastapiSettings(**settings))  # before a small base is trained
        build(FastapiSettings(**settings), plain, tmp_path / "dataset")
    assert "\n" not in str(error.value)


def test_a_source_without_python_is_refused(plain: BPETokenizer, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "main.kt").write_text("fun main() {}\n")
    with pytest.raises(ValueError, match=r"holds no \.py file"):
        build(FastapiSettings(source=str(tmp_path / "docs")), plain, tmp_path / "dataset")


def test_the_whole_recipe_on_a_base_in_four_bits(
    source: Path, plain: BPETokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Two places of each head turn, so that no layout shows.
    base = tiny("codegen", plain, tmp_path / "base", 512)
    flags = (
        "--eval_samples 6 --max_steps 2 --batch_size 2 --accumulation 1 --samples 0 --validate_every 1 "
        "--patience 0 --allow worse-than-unigram,setting-ignored --base_format nf4 --data.workers 1"
    )
    assert main(["fastapi", "--base", str(base), "--source", str(source), *flags.split()]) == 0
    out = tmp_path / "runs/fastapi"
    assert "lines that training has nowhere" in (out / "report.txt").read_text()
    assert all((out / f"run/curves/{name}.png").is_file() for name in ("loss", "grad_norm", "accuracy"))
    adapter = json.loads((out / "adapter/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (8, 32)
    assert {"wte", "qkv_proj", "out_proj", "fc_in", "fc_out"} <= set(adapter["target_modules"])
    config = (out / "run/config.yaml").read_text()
    assert "base_format: nf4" in config and "<fim_prefix>" in config
