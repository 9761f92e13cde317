"""A run whose training is done is resumed: what is missing is made, and a retry loop ends."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import FILES

from config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
    parse_config,
)
from training import command, report
from training.begin import train
from training.checkpoint import checkpoints
from training.ended import ended
from training.outputs import OUTPUTS, RECORD
from training.run import load_run
from trainingmanager import command_line, main

pytestmark = pytest.mark.usefixtures("unguarded")

OLDER = Path(__file__).parent / "files_of_cf0629c"
LEFT = [OUTPUTS[name] for name in ("scores", "samples", "pictures")]


def small() -> Config:
    return Config(
        data=DataConfig("corpus", validation_one_in=4, test_one_in=4, workers=1),
        tokenizer=TokenizerConfig(vocab_size=300, min_count=2),
        model=ModelConfig(block_size=64, n_layer=1, n_head=2, n_embd=8),
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(
            run="run", max_steps=4, batch_size=4, validate_every=2, log_every=1, samples=1, device="cpu"
        ),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, a cache, and a run that was killed when its training was done."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "corpus").mkdir()
    for name, text in FILES.items():
        (folder / "corpus" / name).write_text(text, encoding="utf-8")
    before = Path.cwd()
    os.chdir(folder)
    train(small())
    os.chdir(before)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run, with its corpus and its cache in the working folder."""
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return Path("run")


def resume(folder: str | Path, *words: str) -> None:
    """`python trainingmanager.py --resume --run folder words`, which has to exit with 0."""
    with pytest.raises(SystemExit) as ended_with:
        main(parse_config(command_line(["--resume", "--run", str(folder), *words])))
    if ended_with.value.code:
        raise ended_with.value


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_was_killed_before_its_scores_is_finished_and_then_left_alone(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not any((run / file).exists() for file in LEFT)
    resume(run)
    out = capsys.readouterr().out
    assert "is done, at step 4; to train on, raise what ended it" in out
    assert "best checkpoint, step 4, on all test files" in out
    assert all((run / file).exists() for file in LEFT)
    before = contents(run)
    resume(run)
    assert contents(run) == before
    assert "nothing is missing" in capsys.readouterr().out


def test_an_undisturbed_end_leaves_nothing_to_make(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    config = small()
    with pytest.raises(SystemExit, match="0"):
        main(replace(config, train=replace(config.train, run=str(tmp_path / "run"))))
    capsys.readouterr()
    resume(tmp_path / "run")
    assert "nothing is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cut", "missing", "said"),
    [
        ("write_results", LEFT[:2], "made now: scores, samples\n"),
        ("samples_of", LEFT[1:2], "made now: samples\n"),
        ("closing_lines", [], "nothing is missing"),
    ],
)
def test_what_was_made_before_a_kill_is_not_made_again(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cut: str,
    missing: list[str],
    said: str,
) -> None:
    def killed(*_: Any) -> None:
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(report, cut, killed)
        with pytest.raises(SystemExit, match="137"):
            resume(run)
    before = contents(run)
    assert [file for file in LEFT if file not in before] == missing
    capsys.readouterr()
    resume(run)
    assert said in capsys.readouterr().out
    after = contents(run)
    assert all(file in after for file in LEFT)
    assert all(after[file] == before[file] for file in LEFT[:2] if file not in missing)


def test_a_store_in_the_cache_is_enough_where_the_source_is_gone(run: Path) -> None:
    shutil.rmtree("corpus")
    resume(run)
    assert all((run / file).exists() for file in LEFT)


@pytest.mark.parametrize("words", [("--device", "tpu"), ("--allow", "future-visibel")])
def test_a_mistake_in_the_command_is_refused_and_no_reason_to_end_a_retry_loop(
    run: Path, words: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended_with:
        resume(run, *words)
    assert ended_with.value.code == 2 and words[1] in capsys.readouterr().err


def test_a_damaged_file_of_the_run_is_no_reason_to_end_a_retry_loop(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "tokenizer" / "code_tokenizer.json").write_text("{", "utf-8")
    with pytest.raises(SystemExit) as ended_with:
        resume(run)
    assert ended_with.value.code == 2 and "code_tokenizer.json is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize("gone", ["gone", "changed"])
def test_what_cannot_be_made_is_said_and_a_retry_loop_ends(
    run: Path, gone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("cache")
    if gone == "gone":
        shutil.rmtree("corpus")
    else:
        Path("corpus", "part0.py").write_text("x = 1\n")
    resume(run)  # This asserts that the exit code is 0.
    err = capsys.readouterr().err.splitlines()
    assert len([line for line in err if line.startswith("warning: the training is whole")]) == 1
    assert "its scores and samples cannot be made" in err[-1]
    assert ("does not exist" if gone == "gone" else "have fingerprint") in err[-1]
    assert [(run / file).exists() for file in LEFT] == [False, False, True]


def test_a_raised_budget_trains_on_and_makes_all_of_it_anew(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume(run)
    first = contents(run)
    with monkeypatch.context() as patch:
        patch.setattr(command, "report", lambda *_: None)  # killed there
        resume(run, "--max_steps", "6")
    assert checkpoints(run / "checkpoints")[-1].step == 6
    assert contents(run)["eval.json"] == first["eval.json"]
    resume(run)
    assert json.loads((run / "eval.json").read_text("utf-8"))["step"] == 6
    assert json.loads((run / RECORD).read_text())["made"] == ["scores", "samples", "pictures"]


def test_settings_that_a_run_may_not_change_are_refused_at_its_end_too(run: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        resume(run, "--seed", "1")
    assert not (run / "eval.json").exists()


def test_a_run_whose_patience_ended_is_done(run: Path) -> None:
    config = small()
    run_ = replace(config.train, run="impatient", max_steps=40, patience=1, validate_every=1)
    optimizer = replace(config.optimizer, head_lr=3.0, embedding_lr=30.0, warmup_steps=0)
    manager = train(replace(config, train=run_, optimizer=optimizer))
    assert manager.state.step < 40
    last = ended(run_, manager.folder)
    assert last is not None and last.step == manager.state.step
    assert ended(replace(run_, patience=9), manager.folder) is None


def test_the_proof_of_an_overfit_run_is_made_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small()
    data = replace(config.data, validation_one_in=0, test_one_in=0)
    config = replace(config, data=data, train=replace(config.train, run="known", overfit=True, max_steps=2))
    with pytest.raises(SystemExit, match="1"):
        main(config)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        main(replace(config, train=replace(config.train, resume=True)))
    assert "check 1, every token is predicted: FAILED" in capsys.readouterr().out


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(OLDER, tmp_path / "older")
    monkeypatch.chdir(tmp_path / "older")
    return tmp_path / "older" / "adapter"


def test_an_older_run_has_what_is_there(older: Path) -> None:
    before = contents(older)
    resume("adapter")
    after = contents(older)
    assert after.keys() - before.keys() == {RECORD, *(f for f in after if f.startswith("curves/"))}
    assert all(after[file] == before[file] for file in before)
    shutil.rmtree(older / "adapter")
    resume("adapter", "--base", "base")
    again = contents(older)
    assert again.keys() == after.keys() and again["eval.json"] == before["eval.json"]
    assert load_run("adapter").config.train.base == str(older.parent / "base")  # noted, since it has moved


def test_an_adapter_whose_base_is_gone_is_said_to_be_missing(
    older: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(older / "adapter")
    (older / "eval.json").unlink()
    resume("adapter")
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith(
        "warning: the training is whole, and its adapter and scores and samples cannot be made: "
    )
    assert (older / "curves" / "loss.png").is_file()
