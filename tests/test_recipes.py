"""Recipes: their datasets, and the one command from data to table, which does nothing twice."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml

from architecture import Decoder
from config import Config, DataConfig
from config.files import REPOSITORY
from data.cache import verify_folder
from data.fim import fim_prompt_ids, gap_start, known_markers
from data.nearby import nearest_of
from dataset import prepare_data
from modules.precision import choose_device, choose_precision
from pretrained import load_pretrained, save_pretrained
from recipes import kotlin, summaries
from recipes.__main__ import RECIPES, main
from recipes.base_config import BaseConfig
from recipes.building import Counts, plain_documents, split_items, write_dataset
from recipes.classes import classes_of
from recipes.files import read_files
from recipes.pipeline import done, parse_words, samples
from recipes.small_base import FIM_RATE, make_base, model_of
from recipes.training import finish
from scraping.documents import ScrapedDocument
from tokenizer import BPETokenizer

pytestmark = pytest.mark.usefixtures("unguarded")

WORDS = "holds the things that a shop of this kind keeps in its many drawers, and counts them whenever asked"


def module(number: int) -> str:
    """A file with one class that is an example of the summaries, and one that is not."""
    return f'''import os


class Store{number}(dict):
    """Store number {number} {WORDS} to."""

    size = {number}

    def count(self):
        """SECRET {number}: {WORDS}."""
        return len(self) + {number}


class Bare{number}:
    pass
'''


KOTLIN = """/*
 * Copyright 2020 Somebody. Use of this source code is governed by the Apache 2.0 license.
 */

package shop

fun total{i}(prices: List<Int>): Int {{
    var sum = {i}
    for (price in prices) {{
        sum += price * {i}
    }}
    return sum
}}
"""


@pytest.fixture
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train([module(i) for i in range(9)] + [KOTLIN.format(i=i) for i in range(9)], 400)


def tiny(family: str, tokenizer: BPETokenizer, folder: Path, block_size: int = 160) -> Path:
    """A base whose weights are drawn."""
    torch.manual_seed(0)
    shape = BaseConfig(family, n_layer=1, n_head=4, n_embd=16, block_size=block_size)  # pyright: ignore[reportArgumentType]
    model = Decoder(replace(model_of(shape), vocab_size=tokenizer.vocab_size, init="normal"))
    save_pretrained(model, tokenizer, folder, family)
    return folder


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    for i in range(20):
        (folder / f"m{i:02}.py").write_text(module(i), "utf-8")
    return folder


def rows_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text("utf-8").splitlines()]
        for split in ("train", "validation", "test")
    }


# --- the dataset -------------------------------------------------------------------------------------


def test_counts_stand_in_the_card_and_an_empty_side_is_refused(tmp_path: Path) -> None:
    counts = Counts("files", found=7)
    counts.drop("too short", 3)
    splits = {"train": [{"text": "a"}] * 2, "validation": [{"text": "b"}], "test": [{"text": "c"}]}
    write_dataset(tmp_path, splits, counts, "Title", "What it is.")
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "-3  too short" in card and "4  files kept" in card and "train 2, validation 1, test 1" in card
    with pytest.raises(ValueError, match=r"the test set would be empty: 4 of 7 files .* too short, 3\)"):
        write_dataset(tmp_path, splits | {"test": []}, counts, "Title", "")
    counts.drop("too long", 5)
    with pytest.raises(ValueError, match="do not add up"):
        write_dataset(tmp_path, splits, counts, "Title", "")


def test_what_splits_a_source_is_named_where_a_side_is_empty(tmp_path: Path) -> None:
    for split, text in {"train": "a", "validation": "b", "test": None}.items():
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": text}) if text else "", "utf-8")
    with pytest.raises(
        ValueError, match=r"text for test in none; .*test\.jsonl has 0 lines .*: add documents"
    ):
        plain_documents(str(tmp_path))
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    part = json.dumps({"text": "a", "path": "a.py", "cluster": "c"}).encode()
    (corpus / "part.jsonl").write_bytes(part)
    parts = [{"file": "part.jsonl", "sha256": hashlib.sha256(part).hexdigest()}]
    (corpus / "corpus.json").write_text(json.dumps({"parts": parts, "fingerprint": "0"}), "utf-8")
    with pytest.raises(
        ValueError, match=r"the 1 documents of .* are split by their groups, and give 1 train"
    ):
        plain_documents(str(corpus))


def test_a_split_is_drawn_whole_and_depends_on_its_seed_alone() -> None:
    splits = split_items(range(124), 42, 0.2, 0.1)
    assert {name: len(items) for name, items in splits.items()} == {"test": 25, "validation": 10, "train": 89}
    assert sorted(i for items in splits.values() for i in items) == list(range(124))
    assert splits == split_items(range(124), 42, 0.2, 0.1) != split_items(range(124), 43, 0.2, 0.1)


def test_a_file_is_read_from_wherever_it_lies(repository: Path, tmp_path: Path) -> None:

    lines = [json.dumps({"path": p.name, "text": p.read_text("utf-8")}) for p in sorted(repository.iterdir())]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), "utf-8")
    shutil.make_archive(str(tmp_path / "packed"), "zip", repository)
    found = [
        [(one.path, one.text) for one in read_files(str(source), ".py") if isinstance(one, ScrapedDocument)]
        for source in (repository, tmp_path / "rows.jsonl", tmp_path / "packed.zip")
    ]
    assert len(found[0]) == 20 and found[0] == found[1] == found[2]
    with pytest.raises(ValueError, match=r"holds no \.kt file"):
        read_files(str(repository), ".kt")
    with pytest.raises(ValueError, match="is no address of a repository"):
        read_files(str(repository), ".py", "v1")


# --- classes -----------------------------------------------------------------------------------------

ODD = '''
def outer():
    @decorated
    class A(B):
        "own" ; x = 1
        class Inner: "inner"
        def f(self):
            """in f"""
        async def g(self):
            r"""in g
far to the left
            """ # with a note
            return """kept
text"""
        def h(self):
            "first"
            "second"
'''


def test_no_docstring_stays_in_a_class_and_it_still_parses() -> None:
    found = {one.name: one for one in classes_of(ODD, "odd.py")}
    assert list(found) == ["outer.A", "outer.A.Inner"]
    assert (found["outer.A"].docstring, found["outer.A.Inner"].docstring) == ("own", "inner")
    assert found["outer.A"].code.startswith("@decorated\nclass A(B):\n") and found["outer.A"].line == 3
    for one in found.values():
        for node in ast.walk(ast.parse(one.code)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                assert ast.get_docstring(node) is None
    code = found["outer.A"].code
    assert "kept\ntext" in code and "x = 1" in code and "in g" not in code and "far to the left" not in code


def test_a_class_without_its_docstrings_computes_what_it_did() -> None:
    (one, _) = classes_of(module(3), "m.py")
    scope: dict[str, Any] = {}
    exec(one.code, scope)  # our own text
    assert scope["Store3"](a=1).count() == 4 and scope["Store3"].__doc__ is None
    assert "SECRET" not in one.code and WORDS not in one.code


@pytest.mark.parametrize("prompt", ["verbose", "simple"])
def test_a_long_class_loses_its_end_and_never_the_instruction(prompt: Any, tokenizer: BPETokenizer) -> None:
    long = "class Long:\n    x = 0\n" + "".join(f"    value_{i} = {i}\n" for i in range(300))
    (one,) = classes_of(long, "long.py")
    settings = summaries.SummariesSettings(prompt=prompt, input_tokens=120)
    made = summaries.fitted_prompt(one, [], settings, tokenizer)
    assert len(tokenizer.encode(made)) < 120 and made.endswith("\n\nDocstring:\n")
    begins = "Your task is to write a docstring that summarizes the following Python class.\nClass Long:\n"
    assert made.startswith(begins if prompt == "verbose" else "Class class Long:")
    code = made.removesuffix("\n\nDocstring:\n").split("class Long:", 1)[1]
    assert one.code.split("class Long:", 1)[1].startswith(code + "\n") and "value_0" in code  # whole lines
    with pytest.raises(ValueError, match="no room for code in 20 tokens"):
        summaries.fitted_prompt(one, ["word " * 50], replace(settings, input_tokens=20), tokenizer)


def test_rows_hold_classes_with_enough_words_and_no_docstring_in_a_prompt(
    repository: Path, tokenizer: BPETokenizer, tmp_path: Path
) -> None:
    settings = summaries.SummariesSettings(source=str(repository), prompt="verbose", related=1)
    (repository / "broken.py").write_text("class A(:\n", "utf-8")
    (repository / "latin.py").write_bytes(b"x = '\xe9'\n")
    counts = summaries.build(settings, tokenizer, tmp_path / "made" / "dataset")
    assert (counts.found, counts.dropped) == (40, {"no docstring": 20})
    card = (tmp_path / "made" / "dataset" / "README.md").read_text("utf-8")
    assert "1 files do not parse, and 1 are no text." in card
    splits = rows_of(tmp_path / "made" / "dataset")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 14, "validation": 2, "test": 4}
    shown = {row["completion"] for row in splits["train"]}
    for split, rows in splits.items():
        for row in rows:
            assert "SECRET" not in row["prompt"] and row["completion"] not in row["prompt"]
            assert row["prompt"] == row["prompts"]["related"]
            assert not [
                text for text in shown if text in row["prompts"]["verbose"] + row["prompts"]["simple"]
            ]
            others = {text for text in shown if text in row["prompt"]}
            assert len(others) == 1, "one related class of the training split"
            assert split == "train" or row["completion"] not in shown
    plain = summaries.SummariesSettings(source=str(repository), prompt="simple")
    summaries.build(plain, tokenizer, tmp_path / "plain" / "dataset")
    for row in rows_of(tmp_path / "plain" / "dataset")["test"]:
        assert (
            row["prompt"] == row["prompts"]["simple"] != row["prompts"]["verbose"]
            and len(row["prompts"]) == 2
        )
    few = summaries.SummariesSettings(source=str(repository), min_words=30, prompt="simple")
    with pytest.raises(ValueError, match=r"test set would be empty: 0 of 40 .* fewer than 30 words, 20\)"):
        summaries.build(few, tokenizer, tmp_path / "few" / "dataset")


@pytest.mark.parametrize(
    ("docstring", "reason"),
    [
        ("Deprecated: use Other. " + WORDS, "note or a reference"),
        (f"Runs.\n\n:param a: {WORDS}\n:param b: {WORDS}\n    {WORDS}", "lists of parameters"),
        (f"The Pool Runner class.\n\n{WORDS}", "name alone"),
        (f"Runs what waits.\n\n{WORDS}\n\n:param a: {WORDS}", ""),
    ],
)
def test_poor_docstrings_are_told_from_good_ones(docstring: str, reason: str) -> None:
    (one, _) = classes_of(module(1), "m.py")
    found = summaries.poor(replace(one, name="PoolRunner", docstring=docstring))
    assert reason in found and bool(reason) == bool(found)


def test_what_is_nearest_shares_the_rare_words() -> None:
    texts = ["class Pool: worker pool size", "class Cache: worker cache size", "class Other: worker"]
    assert nearest_of(["worker cache of size"], texts, 2) == [[1, 0]]


# --- windows -----------------------------------------------------------------------------------------


def test_windows_are_the_text_and_end_with_its_lines(tokenizer: BPETokenizer) -> None:
    text = "".join(KOTLIN.format(i=i).split("*/\n\n")[1] for i in range(30)) + 'val s = "é ß 😀"\n' * 9
    found = list(kotlin.windows_of(text, "a.kt", 60, tokenizer))
    place = 0
    for window in found:
        place = text.index(window.prompt + window.completion, place)  # Windows come in order, byte for byte.
        end = place + len(window.prompt + window.completion)
        assert text[end : end + 1] in ("\n", "")
        assert len(tokenizer.encode(window.prompt)) <= 60 and window.completion.strip()
        place = end
    assert sum(len(w.prompt + w.completion) for w in found) > 0.9 * len(text)
    assert any(not w.prompt.endswith("\n") and "\n" in w.prompt for w in found)
    assert found == list(kotlin.windows_of(text, "a.kt", 60, tokenizer))
    assert found != list(kotlin.windows_of(text, "b.kt", 60, tokenizer))


def test_a_kotlin_file_stands_on_one_side_without_its_header(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    rows = [{"path": f"f{i}.kt", "text": KOTLIN.format(i=i)} for i in range(12)]
    twin = KOTLIN.format(i=99)
    rows += [{"path": f"twin{i}.kt", "text": twin} for i in range(6)]
    rows += [
        {"path": "absurd.kt", "text": "val a = 1\n" * 40 + 'val s = "' + "\\uD83C\\uDF10-" * 70 + '"\n'},
        {"path": "short.kt", "text": "val a = 1\n"},
        {
            "path": "made.kt",
            "text": "// This file was automatically generated. Do not edit.\n" + KOTLIN.format(i=77),
        },
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    counts = kotlin.build(
        kotlin.KotlinSettings(source=str(source), window=40), tokenizer, tmp_path / "made" / "dataset"
    )
    assert (counts.found, counts.dropped) == (21, {"absurd literal": 1, "too short": 1, "generated": 1})
    splits = rows_of(tmp_path / "made" / "dataset")
    paths = {split: {row["path"] for row in rows} for split, rows in splits.items()}
    assert not paths["train"] & paths["test"] and not paths["train"] & paths["validation"]
    assert sum(map(len, paths.values())) == 13, "of equal files one"
    texts = [row["prompt"] + row["completion"] for rows in splits.values() for row in rows]
    assert len(texts) == len(set(texts)) and not any("Copyright" in text for text in texts)
    completions = {row["completion"] for rows in splits.values() for row in rows}
    assert not completions & {row["prompt"] for rows in splits.values() for row in rows}


# --- small bases -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    ["gpt_bigcode", *(pytest.param(name, marks=pytest.mark.slow) for name in ("codegen", "phi", "llama"))],
)
def test_a_small_base_opens_in_transformers_with_equal_logits(
    family: Any, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = BaseConfig(
        family, 0.3, str(tmp_path / "base"), str(corpus), 320, 1, 4, 32, 64, cache=str(tmp_path / "cache")
    )
    folder = make_base(settings)
    said = capsys.readouterr()
    assert "warning" not in said.err, "of settings that nobody chose"
    assert ("of files longer than a row of 64 tokens" in said.out) == (family == "gpt_bigcode")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "cache", "corpus"}
    found = load_pretrained(folder)
    assert found.family.model_type == family and found.tokenizer is not None
    assert (known_markers(found.tokenizer) is not None) == (family == "gpt_bigcode")
    text = "def f1(x):\n    return <fim_middle>"
    ids = found.tokenizer.encode(text)
    assert found.tokenizer.decode(ids) == text and max(ids) < 320
    other = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        ours, theirs = found.model(torch.tensor([ids])), other(torch.tensor([ids])).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (
        AutoTokenizer.from_pretrained(folder)("def f1(x):").input_ids[-3:]
        == found.tokenizer.encode("def f1(x):")[-3:]
    )
    if family == "gpt_bigcode":  # another program asks for what stands in a gap as training did
        spelled = "<fim_prefix>def f(<fim_suffix>):<fim_middle>"
        asked = fim_prompt_ids(found.tokenizer, "def f(", "):")
        assert AutoTokenizer.from_pretrained(folder)(spelled).input_ids == asked
        data = DataConfig(source=str(corpus), cache=settings.cache, fim_rate=FIM_RATE)
        store, markers = prepare_data(data, found.tokenizer).train, known_markers(found.tokenizer)
        starts = [gap_start(store.document(n), markers) for n in range(store.n_documents)]
        assert set(starts) == {None, 1} and store.gap_lead == 1
        assert {int(store.document(n)[0]) for n in range(store.n_documents)} == {asked[0]}
    assert "gaps were trained without the start" not in capsys.readouterr().err
    assert make_base(settings) == folder and "is there already" in capsys.readouterr().out


def test_a_base_has_its_name_only_with_its_checksums(tmp_path, tokenizer, monkeypatch):
    """A process that is killed between the two would leave what is taken for an older base."""
    tiny("llama", tokenizer, tmp_path / "trained")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.py").write_text("a = 1\n", "utf-8")
    monkeypatch.setattr("recipes.small_base.finish", lambda *_, **__: None)
    monkeypatch.setattr("recipes.small_base.load_run", lambda _: load_pretrained(tmp_path / "trained"))
    settings = BaseConfig("llama", out=str(tmp_path / "base"), source=str(tmp_path / "corpus"))
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr("recipes.small_base.seal_folder", Mock(side_effect=KeyboardInterrupt))
        make_base(settings)
    assert not (tmp_path / "base").exists()
    verify_folder(make_base(settings))
    assert {path.name for path in tmp_path.iterdir()} == {"trained", "corpus", "base"}


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture
def words(repository: Path, tokenizer: BPETokenizer, tmp_path: Path) -> list[str]:
    base = tiny("llama", tokenizer, tmp_path / "base")
    flags = f"summaries --base {base} --source {repository} --prompt simple --out {tmp_path / 'out'}"
    flags += " --input_tokens 100 --docstring_tokens 60 --row_length 160 --max_steps 2 --eval_samples 4"
    return [
        *flags.split(),
        "--allow",
        "worse-than-unigram,split-leaks",
        "--data.cache",
        str(tmp_path / "cache"),
    ]


def test_a_recipe_runs_whole_and_then_does_nothing_twice(
    words: list[str],
    tokenizer: BPETokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    words += ["--eval_samples", "3", "--sampling_seed", "1"]  # the same three of four, drawn and not
    assert main(words) == 0
    printed = capsys.readouterr().out
    report = (out / "report.txt").read_text("utf-8")
    assert report in printed and report.count("\n--- ") >= 3 * 4
    assert "\ntime      0:" in printed and ", training 0:" in printed
    for name in ("dataset/README.md", "adapter/adapter_config.json", "merged/config.json", "run/eval.json"):
        assert (out / name).is_file(), name
    for said in (
        "finetuned with simple prompt",
        "baseline with simple prompt",
        "not distinguishable",
        "loss",
    ):
        assert said in report
    record = json.loads((out / "run" / "summaries.json").read_text("utf-8"))
    assert json.loads((out / "run" / "eval.json").read_text("utf-8"))["suite"]["seed"] == 1
    assert len(record["references"]) == 3 and record["greedy"]["base"] != record["sampled"]["base"]
    assert load_pretrained(out / "merged").family.model_type == "llama"

    from training import loop

    monkeypatch.setattr(loop.TrainingManager, "update", None)  # Training again would break.
    before = {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*")) if path.is_file()}
    assert main(words) == 0
    after = {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*")) if path.is_file()}
    assert {p for p in after if before.get(p) != after[p]} <= set((out / "run" / "curves").iterdir())
    assert report in capsys.readouterr().out

    with pytest.raises(SystemExit) as ended:
        main([*words, "--min_words", "12"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "begun with min_words 20, and now it is 12" in error

    # Not the old run's scores under another name, be it other settings or another base.
    torch.manual_seed(1)
    other = replace(load_pretrained(tmp_path / "base").model.config, init="normal")
    save_pretrained(Decoder(other), tokenizer, tmp_path / "other", "llama")
    formats = {True: "bf16", False: "fp32"}
    native = choose_precision(choose_device("auto"), "auto").dtype == torch.bfloat16
    for flag, value, sentence in (
        ("--optimizer.lr", "0.5", "was finished with optimizer.lr 0.0002, and now it is 0.5; set it back"),
        (
            "--precision",
            formats[not native],
            f"was finished on a base stored as {formats[native]}, and with --precision",
        ),
        ("--base", str(tmp_path / "other"), "the base changed since"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*words, flag, value])
        assert ended.value.code == 2 and sentence in capsys.readouterr().err
    scored = (out / "report.txt").stat().st_mtime_ns
    assert main([*words, "--eval_precision", "fp32", "--compile", "true"]) == 0
    assert "compile was False when" in capsys.readouterr().err
    assert (out / "report.txt").stat().st_mtime_ns > scored, "not scored anew"
    assert main(words) == 0
    shutil.move(tmp_path / "base", tmp_path / "moved")
    words += ["--base", str(tmp_path / "moved")]
    shutil.rmtree(out / "merged")
    assert main([*words, "--eval_samples", "4"]) == 0, "what opens the run looks for the base where it was"
    assert (out / "merged" / "config.json").is_file()
    monkeypatch.undo()
    assert main([*words, "--max_steps", "3", "--validation_rows", "1"]) == 0
    assert re.search(r"validation_rows was \d+ so far and is 1 now", capsys.readouterr().err)


@pytest.mark.slow
def test_a_recipe_that_was_killed_goes_on(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import loop

    update = loop.TrainingManager.update

    def killed(self: Any) -> Any:
        if self.state.step == 1:
            raise KeyboardInterrupt
        return update(self)

    words += ["--save_every", "1"]
    monkeypatch.setattr(loop.TrainingManager, "update", killed)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 130
    dataset = (tmp_path / "out" / "dataset" / "train.jsonl").stat().st_mtime_ns
    monkeypatch.setattr(loop.TrainingManager, "update", update)
    assert main(words) == 0
    assert (tmp_path / "out" / "dataset" / "train.jsonl").stat().st_mtime_ns == dataset
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "out/run/metrics.jsonl").read_text().splitlines()
    ]
    assert sorted(set(steps)) == [1, 2], "the first step was not taken again"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["--source", "nowhere"], "nowhere is not there"),
        (["--source", "EMPTY"], "holds no .py file"),
        (["--source", "BARE"], "the test set would be empty: 0 of 1 classes"),
        (["--source", "BROKEN"], "holds no Python class, and 1 files that do not parse"),
        (["--base", "OTHER"], "is of the family gpt_bigcode, which this recipe's settings do not fit"),
        (["--row_length", "100"], "let an example have 160 tokens"),
        (["--min_wrods", "3"], "min_wrods"),
        (["--run", "elsewhere"], "--run is the recipe's own; give --out"),
        (["--data.source=x"], "--data.source is the recipe's own; give --source"),
        (["--related"], "--related has no value; write --related VALUE"),
        (
            ["--plan"],
            "--plan is no part of a recipe; ask for it by python trainingmanager.py --plan --config",
        ),
    ],
)
def test_a_mistake_is_one_sentence(
    words: list[str],
    changes: list[str],
    sentence: str,
    tokenizer: BPETokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in (("EMPTY", None), ("BARE", "class A:\n    pass\n"), ("BROKEN", "class A(:\n")):
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "a.py").write_text(text, "utf-8")
    if "OTHER" in changes:
        tiny("gpt_bigcode", tokenizer, tmp_path / "OTHER")
    placed = [str(tmp_path / word) if word.isupper() else word for word in changes]
    with pytest.raises(SystemExit) as ended:
        main([*words, *placed])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(lines) == 1 and sentence in lines[0]
    assert not (tmp_path / "out" / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("kotlin --source EMPTY", "EMPTY holds no .kt file"),
        ("summaries --source EMPTY", "EMPTY holds no .py file"),
        ("fastapi --source EMPTY", "EMPTY holds no .py file"),
        (
            "refactor --source EMPTY",
            "EMPTY holds no document with a name ending in .py: write some there, or name another --source",
        ),
        ("kotlin --source EMPTY --window 9", "--window is 9; it must be at least 32 tokens"),
        ("kotlin --source EMPTY --base_seconds 0", "--base_seconds is 0.0; it must be above 0"),
        ("kotlin", "no source is named"),
        (
            "completion --base EMPTY",
            "--base is given, and the recipe completion trains from scratch; leave it out",
        ),
        ("completion --source nowhere", "--source nowhere does not exist: give stdlib, a folder or archive"),
        (
            "completion --source METHODS.jsonl",
            "METHODS.jsonl is a file of rows: give stdlib, a folder or archive",
        ),
        ("completion --source EMPTY", "EMPTY holds no .py file of 1 to 100 KiB: name another --source"),
        ("completion --source EMPTY --top_p 2", "top_p is 2.0"),
        ("kotlin --source EMPTY --methods nowhere", "nowhere"),
        ("kotlin --source EMPTY --methods METHODS", "METHODS line 1"),
        ("kotlin --source EMPTY --per_file -3", "--per_file is -3; it must be at least 0"),
        ("summaries --source EMPTY --top_p 2", "--top_p is 2.0; it must be above 0 and at most 1"),
        ("summaries --source EMPTY --temperature 0", "would be the greedy ones again"),
        ("refactor --eval_samples 1", "an interval needs at least 2"),
    ],
)
def test_what_cannot_be_built_from_is_told_before_a_base_takes_minutes(
    recipe: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import recipes.small_base

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipes.small_base, "make_base", None)
    (tmp_path / "EMPTY").mkdir()
    for name in ("METHODS", "METHODS.jsonl"):
        (tmp_path / name).write_text('{"signature": "def f():"}\n', "utf-8")
    with pytest.raises(SystemExit) as ended:
        main(recipe.split())
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert ended.value.code == 2 and len(lines) == 1 and sentence in lines[0]


@pytest.mark.parametrize("name", RECIPES)
def test_help_does_not_wait_for_torch(name: str) -> None:
    words = [sys.executable, "-X", "importtime", "-m", "recipes", name, "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "--out OUT" in done.stdout and "recipes.pipeline" in imported and "torch" not in imported


def test_small_models_have_settings_of_their_own_and_flags_override_them() -> None:
    def asked(line: str) -> tuple[Any, Any]:
        found = parse_words("refactor", line.split())
        return found.settings, found.config()

    settings, config = asked("")
    assert (settings.functions, config.train.max_steps, config.optimizer.lr) == (300, 80, 1e-3)
    settings, config = asked("--functions 7 --max_epochs 2 --eval_samples=9")
    assert (settings.functions, settings.eval_samples, config.optimizer.lr) == (7, 9, 1e-3)
    assert (config.train.max_steps, config.train.max_epochs) == (0, 2), (
        "a budget that is given stands for itself"
    )
    settings, config = asked("--base elsewhere")
    assert (settings.functions, config.train.max_epochs, config.optimizer.lr) == (0, 5, 2e-5)
    for line in ("--strategies names,loops", "--strategies=names,loops", "--strategies [names,loops]"):
        assert asked(line)[0].strategies == ("names", "loops")
    for line in ("--check_behaviour --seed 1", "--seed 1 --check_behaviour=true", "--check_behaviour false"):
        settings, config = asked(line)
        assert settings.check_behaviour != ("false" in line) and config.train.seed == ("seed" in line)
    for name in RECIPES:  # each of them is a flag
        parse_words(name, [])


def test_kotlin_ends_with_its_table_and_both_prompts_with_theirs(
    words: list[str], tokenizer: BPETokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"path": f"f{i}.kt", "text": KOTLIN.format(i=i)} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    methods = [
        {"signature": "def f ( a ) :", "docstring": f"Adds {i} .", "body": f"return a + {i} <EOL>"}
        for i in range(3)
    ]
    (tmp_path / "methods.jsonl").write_text("\n".join(map(json.dumps, methods)), "utf-8")
    base = tiny("phi", tokenizer, tmp_path / "phi", 96)
    flags = f"kotlin --base {base} --source {tmp_path / 'rows.jsonl'} --out {tmp_path / 'kotlin'} --window 40"
    flags += f" --row_length 96 --max_steps 1 --eval_samples 2 --methods {tmp_path / 'methods.jsonl'}"
    flags += " --allow worse-than-unigram"
    assert main([*flags.split(), "--data.cache", str(tmp_path / "cache")]) == 0
    report = (tmp_path / "kotlin" / "report.txt").read_text("utf-8")
    for said in ("Kotlin test set, base", "Kotlin test set, tuned", "CodeXGLUE method generation, tuned"):
        assert said in report
    words[words.index("simple")] = "both"
    assert main(words) == 0
    report = (tmp_path / "out" / "report.txt").read_text("utf-8")
    for system in ("baseline", "finetuned"):
        for prompt in ("verbose", "simple"):
            assert f"{system} with {prompt} prompt" in report


def test_an_unknown_recipe_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sumaries"]) == 2 and "did you mean summaries?" in capsys.readouterr().err
    assert main(["--base", "x", "kotlin"]) == 2
    assert "--base comes before the recipe's name; write" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"base": 3}'])
def test_a_damaged_record_of_what_was_done_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "asked.json").write_text(text, "utf-8")
    with pytest.raises(
        ValueError, match=r"asked\.json is damaged .*remove it, and the run is looked at anew"
    ):
        finish(replace(Config(), train=replace(Config().train, run=str(tmp_path))))
    (tmp_path / "steps.json").write_text(text, "utf-8")
    if text[-1:] == "}":
        assert done(tmp_path) == {"base": 3}
        return
    with pytest.raises(ValueError, match=r"steps\.json is damaged; remove .*, or name another --out"):
        done(tmp_path)


def test_a_base_of_before_near_copies_were_grouped_is_finished_as_it_was(tmp_path: Path) -> None:
    """The base's config.yaml says how it was split, and its recipe has no flag for that."""
    config = replace(Config(), train=replace(Config().train, run=str(tmp_path)))
    by_name = replace(config, data=replace(config.data, regroup=False)).to_dict()
    del by_name["data"]["heal"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(by_name), "utf-8")
    (tmp_path / "asked.json").write_text(json.dumps(by_name), "utf-8")
    assert finish(config) is False
    with pytest.raises(ValueError, match=r"finished with data.regroup False, and now it is True"):
        finish(replace(config, data=replace(config.data, regroup=True)))


def test_a_text_of_blanks_is_no_empty_place_in_the_report() -> None:
    sample = {"id": "a:1", "prompt": "p", "reference": "r", "predictions": {"base": "\n \n", "model": ""}}
    assert samples([sample]) == "--- a:1\np\n--- base\n(3 blanks)\n--- tuned\n(nothing)\n--- the reference\nr"


def test_prompts_that_were_trained_unequally_are_not_compared_silently() -> None:
    texts = ["keeps the pool", "counts what it holds"]
    both = {"base": texts[::-1], "model": texts}
    records = {
        name: {"step": 9, "references": texts, "files": ["a.py", "b.py"], "greedy": both, "sampled": both}
        for name in ("verbose", "simple")
    }
    assert "NOTE" not in summaries.table(records, summaries.SummariesSettings())
    records["simple"] = records["simple"] | {"step": 3}
    assert "different steps (verbose 9, simple 3)" in summaries.table(records, summaries.SummariesSettings())
