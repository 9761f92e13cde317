"""Each command tells a mistake before it opens the first document, or reads the first weight."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_eval import prepared, random_model, run_of

import export
import functional
import generate
import hyperparam_tune
import recipes.__main__
import recipes.base_config
import recipes.refactoring
import recipes.small_base
import trainingmanager
from architecture import Decoder
from config import ModelConfig, one_sentence, parse_config
from generation.command import write_completions
from pretrained import save_pretrained
from scraping.__main__ import main as scrape
from suites import evaluate as evaluation
from suites.settings import parse_settings as eval_settings
from tokenizer import BPETokenizer
from training.export import export as write_export

# Nothing below these may be opened while a mistake is looked for; audit hooks stay for the process's life.
GUARDED: list[Path] = []
OPENED: list[str] = []


def _note(event: str, arguments: tuple) -> None:
    is_file = event in ("open", "sqlite3.connect") and isinstance(arguments[0], str | bytes | os.PathLike)
    if GUARDED and is_file:
        path = Path(os.path.abspath(os.fsdecode(arguments[0])))
        if any(path.is_relative_to(guarded) for guarded in GUARDED):
            OPENED.append(str(path))


sys.addaudithook(_note)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of files, a ledger, a run with its corpus, a small base and problems with their samples."""
    folder = tmp_path_factory.mktemp("early")
    data = prepared(folder)  # folder/corpus
    (folder / "other").mkdir()
    run_of(folder / "other", data, random_model())
    tokenizer = BPETokenizer.train(["def f(x):\n    return x\n"], 300)
    torch.manual_seed(0)
    shape = ModelConfig(tokenizer.vocab_size, 2048, n_layer=1, n_head=2, n_embd=8, qk_norm=False)
    shape = replace(shape, norm="rms", norm_weight=True, norm_eps=1e-5, mlp="swiglu")
    save_pretrained(Decoder(shape), tokenizer, folder / "base")
    problem = {"task_id": 1, "code": "x = 1", "test_list": ["assert True"], "text": ""}
    (folder / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    (folder / "samples").mkdir()
    (folder / "samples" / "s.jsonl").write_text(json.dumps({"task_id": 1, "completion": "x = 1"}) + "\n")
    (folder / "file").write_text("")
    (folder / "scraped" / "clean").mkdir(parents=True)
    for name in ("ledger.sqlite", "clean/part-00000-of-00001.parquet"):
        (folder / "scraped" / name).write_text("")
    (folder / "samples.jsonl").write_text("[]\n")
    return folder


def train(words: list[str]) -> None:
    trainingmanager.main(parse_config(trainingmanager.command_line(words)))


def score(words: list[str]) -> None:
    with one_sentence():
        evaluation.write_evaluation(eval_settings(words))


def sweep(words: list[str]) -> None:
    hyperparam_tune.main(words)


def write(words: list[str]) -> None:
    with one_sentence():
        write_completions(generate.parse_settings(words))


def put(words: list[str]) -> None:
    with one_sentence():
        write_export(export.parse_settings(words))


def judge(words: list[str]) -> None:
    with one_sentence():
        functional.evaluate(functional.parse_settings(words))


def recipe(words: list[str]) -> None:
    sys.exit(recipes.__main__.main(words))


def refactor(words: list[str]) -> None:
    recipes.refactoring.main(words)


def base(words: list[str]) -> None:
    with one_sentence():
        recipes.small_base.make_base(recipes.base_config.parse_settings(words))


NOT_A_FOLDER = "file/below"  # Nobody may write to it, not even root.
OF_TRAINING = {
    "--allow split-leak": "did you mean split-leaks?",
    "--allow nan-los": "names no fault; docs/faults.md lists them",
    "--device gpu": "device 'gpu' is not known",
    "--precision fp16": "precision fp16 was asked for on a CPU",
    "--eval_precision fp16": "precision fp16 was asked for on a CPU",
    f"--data.cache {NOT_A_FOLDER}": "file/below",
}
OF_BASE = {
    "--model.n_layer 7": "model.n_layer is 7, and base brings its own, 1",
    "--row_length 4096": "a context of 2048 tokens",
    "--lora.r 4 --lora.targets nope": "nope",
    "--lora.r 4 --lora.train_modules nope": "nope",
    "--lora.r 4 --lora.rank_pattern {nope:2}": "nope",
    "--lora.r 4 --base_format bf16 --precision bf16 --eval_precision fp32": "eval_precision is fp32",
}
FEW = {key: OF_TRAINING[key] for key in ("--allow split-leak", "--eval_precision fp16")}
FEW_OF_BASE = FEW | {key: OF_BASE[key] for key in ("--model.n_layer 7", "--lora.r 4 --lora.targets nope")}
# Command and words -> what is wrong, and what its sentence says.
MISTAKES: dict[tuple[Callable, str], dict[str, str]] = {
    (train, "--data.source corpus --run r"): OF_TRAINING
    | {
        f"--run {NOT_A_FOLDER}": "file/below",
        "--tokenizer.path nope": "nope",
        "--tokenizer.path base --model.vocab_size 2": "does not hold the tokenizer's",
        "--data.validation_one_in 0": "only --overfit may",
        "--tokenizer.vocab_size 100": "vocab_size 100 is below",
        "--tokenizer.kind pretrained": "tokenizer.path is not set",
        "--tokenizer.kind bpe --tokenizer.vocab_size 100": "vocab_size 100 is below",
        "--model.n_embd 63 --model.n_head 3": "a head has 21 dimensions",
        "--resume --run corpus": "holds no run to resume",
        "--data.group_field x": "is read as files",
    },
    (train, "--data.source corpus --plan"): FEW,
    (train, "--data.source corpus --prove_resume"): FEW,
    (train, "--data.source corpus --base base --run r"): FEW | OF_BASE,
    (train, "--data.source corpus --base base --plan"): FEW_OF_BASE,
    (train, "--data.source nope --base base"): {"": "nope does not exist"},
    (train, "--resume --run other/run"): {
        "--seed 5": "seed was 0 when",
        "--model.n_layer 1": "model.n_layer was 2 when",
        "--allow split-leak": "did you mean split-leaks?",
    },
    (sweep, "--data.source corpus --seconds 5 --study s"): OF_TRAINING
    | {"--objectives nope": "nope", "--storage nosuch://me:secret@x": "no kind of storage is called"},
    (score, "--checkpoint other/run --device cpu"): {
        "--device gpu": "device 'gpu' is not known",
        "--precision fp16": "on a CPU",
        "--suite nope": "nope",
        "--metrics nope": "nope",
        "--prompts a,a": "names a twice",
        "--temperature 1 --top_p 2": "top_p is 2.0",
        "--top_k 3": "top_k is 3",
        "--suite mbpp --suite_file nope": "nope",
        "--suite examples": "examples",
        "--suite examples --suite_file nope.jsonl": "nope.jsonl",
        "--suite next_line --predictions nope": "nope cannot be read",
        "--suite next_line --predictions samples.jsonl": "samples.jsonl line 1",
        "--metrics semantic --embedding_model nope": "nope",
        "--metrics semantic --embedding_model base --embedding_layer 9": "9",
        f"--out {NOT_A_FOLDER}": "file/below",
        f"--cache {NOT_A_FOLDER}": "file/below",
        "--source nope": "nope does not exist",
        "--allow nope": "nope",
    },
    (write, "--model base --prompt x"): {
        "--device gpu": "device 'gpu' is not known",
        "--which last": "for runs",
        "--top_k 3": "top_k is 3",
        "--prompt_file nope": "nope",
        "--adapter nope": "nope",
    },
    (put, "--base base --adapter other --merge"): {
        f"--out {NOT_A_FOLDER}": "file/below",
        "--out corpus": "corpus is not empty",
        "--out new --text nope": "nope, whose text should judge the merge, cannot be read",
    },
    (refactor, "--recipe refactor --model base --file problems.jsonl"): {
        "--file nope": "nope",
        "--batch_size 0": "batch_size is 0",
    },
    (put, "--run other/run"): {
        f"--out {NOT_A_FOLDER}": "file/below",
        "--out corpus": "corpus",
        "--out new --merge": "no adapters",
    },
    (judge, "--problems problems.jsonl --samples samples/s.jsonl"): {
        "--k 0": "k",
        "--workers -1": "workers",
        "--allow nope": "allow",
    },
    (recipe, "completion --source corpus --out out"): FEW
    | {
        f"--out {NOT_A_FOLDER}": "file/below",
        "--eval_samples 1": "eval_samples",
        "--source nope": "nope",
    },
    (recipe, "summaries --source corpus --out out --base base"): OF_TRAINING | OF_BASE,
    (recipe, "refactor --source corpus --out out --base base"): FEW_OF_BASE,
    (recipe, "kotlin --source corpus --out out --base base"): FEW_OF_BASE,
    (recipe, "fastapi --source corpus --out out --base base"): FEW_OF_BASE,
    (recipe, "kotlin --source corpus --out out"): FEW,
    (base, "--source corpus --family phi"): {
        "--max_seconds 0": "max_seconds",
        f"--out {NOT_A_FOLDER}": "file/below",
        f"--cache {NOT_A_FOLDER}": "file/below",
        "--out made --source nope": "nope does not exist",
        "--out made --n_head 3": "n_head is 3",
        "--out made --n_embd 30": "n_embd is 30",
    },
    (scrape, "local --path corpus --folder ledger"): {
        "--licence nope": "no SPDX expression",
        f"--folder {NOT_A_FOLDER}": "file/below",
        "--extensions py": "py",
        "--min_bytes 9 --max_bytes 1": "min_bytes",
        "--strip 1": "strip",
        "--path nope": "nope is not there",
    },
    (scrape, "stdlib --folder ledger"): {"--extensions py": "py", f"--folder {NOT_A_FOLDER}": "file/below"},
    (scrape, "clone --url https://a.example/b/c --folder ledger"): {
        "--url file:///x": "file:///x",
        "--url=": "--url",
        "--licence nope": "no SPDX expression",
        "--revision a..b": "a..b",
        f"--folder {NOT_A_FOLDER}": "file/below",
    },
    (scrape, "site --url https://a.example/b --folder ledger"): {
        "--url ftp://x": "ftp://x",
        "--licence nope": "no SPDX expression",
        "--delay -1": "--delay",
        f"--folder {NOT_A_FOLDER}": "file/below",
    },
    (scrape, "crawl --folder ledger"): {
        "--created_after x": "created_after",
        "--workers 0": "workers is 0",
        "--shard 2/2": "shard",
        f"--folder {NOT_A_FOLDER}": "file/below",
    },
    (scrape, "status"): {"--folder nope": "nope holds no ledger.sqlite"},
    (scrape, "clean --folder scraped"): {
        "--skip nope": "--skip names nope",
        "--shard 1/1": "shard",
        "--licences nope": "nope",
        "--min_lines -1": "--min_lines is -1",
        "--memory_mb 1": "--memory_mb is 1",
        "--format black": "format",
        "--folder nope": "nope holds no ledger.sqlite",
    },
    (scrape, "dedup --folder scraped"): {
        "--threshold 2": "--threshold is 2",
        "--shingle 0": "--shingle is 0",
        "--step nope": "step",
        "--shard 0/1": "leave it out",
        "--step signature --shard 0/5": "is of 5, and clean made 1 parts",
        "--step bucket --shard 5/5": "shard",
        "--folder nope": "nope",
    },
    (scrape, "build --folder scraped"): {
        "--benchmarks nope": "nope cannot be read",
        "--form csv": "form",
        "--near both": "near",
        "--shard 0/5": "is of 5, and clean made 1 parts",
        "--folder nope": "nope",
    },
}
CASES = [
    pytest.param(command, f"{words} {mistake}", said, id=f"{command.__name__} {words} {mistake}"[:120])
    for (command, words), mistakes in MISTAKES.items()
    for mistake, said in mistakes.items()
]


@pytest.mark.parametrize(("command", "words", "said"), CASES)
def test_a_mistake_is_told_before_the_corpus_is_opened(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, command, words, said
):
    monkeypatch.chdir(place)
    monkeypatch.setattr("training.state.DEFAULT_SECONDS", 0.1)
    before = sorted(path.name for path in place.iterdir())
    del OPENED[:]
    weights = () if command is score else ("base/model.safetensors",)  # there it is what judges a text
    GUARDED[:] = [place / name for name in ("corpus", "other/corpus", "samples", "scraped", *weights)]
    try:
        with pytest.raises(SystemExit) as ended:
            command(words.split())
    finally:
        GUARDED.clear()
    found = capsys.readouterr()
    print(found.out, found.err, OPENED)
    assert ended.value.code == 2
    assert said in found.err.splitlines()[-1] and found.err.splitlines()[-1].startswith("error: ")
    assert not OPENED, words
    assert sorted(path.name for path in place.iterdir()) == before, "nothing is left behind"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (scrape, "clone --url https://a.example/b/c --folder ledger"),
        (recipe, "kotlin --source https://a.example/b/c --out out"),
    ],
)
def test_a_system_package_that_is_missing_is_told_before_anything_is_made(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, command, words
):
    monkeypatch.chdir(place)
    monkeypatch.setenv("PATH", str(place))
    before = sorted(path.name for path in place.iterdir())
    with pytest.raises(SystemExit, match="2"):
        command(words.split())
    assert "git is not installed" in capsys.readouterr().err
    assert sorted(path.name for path in place.iterdir()) == before


def test_results_that_cannot_be_written_are_told_before_a_program_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(place)
    monkeypatch.setattr("sandbox.judge", None)
    with open(place / "samples" / "s.jsonl", "rb") as samples, pytest.raises(SystemExit, match="2"):
        # Nobody makes a file in that folder, whoever asks.
        judge(["--problems", "problems.jsonl", "--samples", f"/proc/self/fd/{samples.fileno()}"])
    assert "/proc/self/fd cannot be written to" in capsys.readouterr().err
