"""A model that a command opens against its files: agreement, faults that are named, and its memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bare_subjects import decoder

import generate
import generation.command as command
import modules.positions as positions
import serve
import serving.command
from generation.settings import CommandConfig
from guards.faults import Fault
from guards.reference.comparison import Comparison
from guards.reference.opened import FOLDER, Opened, compare_opened, examine
from pretrained import FAMILIES, save_pretrained
from selftest.data import write_data
from selftest.run import small_config
from tokenizer import BPETokenizer
from training.begin import train

TEXTS = ["def total(values):\n    return sum(values) / len(values)\n", "class Value:\n    pass\n"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with two checkpoints, and a published model."""
    folder = tmp_path_factory.mktemp("opened")
    write_data(folder)
    settings = {"max_steps": 4, "validate_every": 2, "samples": 0, "save_every": 2}
    run = Path(train(small_config(folder, {"train": settings})).folder)
    tokenizer = BPETokenizer.train(TEXTS * 9, 280)
    torch.manual_seed(0)
    parts = FAMILIES["llama"].parts | {"n_kv_head": 2, "mlp": "swiglu", "vocab_size": tokenizer.vocab_size}
    save_pretrained(decoder(**parts, init="normal"), tokenizer, folder / "llama")
    return {"run": run, "published": folder / "llama"}


def asked(model: Path, cache: Path, **settings: Any) -> CommandConfig:
    own: dict[str, Any] = {"max_new_tokens": 3, "device": "cpu", "prompt": (TEXTS[0],)}
    own |= {"model": str(model), "cache": str(cache)} | settings
    return CommandConfig(**own)


@pytest.mark.parametrize("name", ["run", "published"])
@pytest.mark.parametrize("changes", [{}, {"dtype": "bf16"}, {"held": "int8"}, {"held": "int4"}], ids=str)
def test_the_first_use_agrees_and_the_second_says_nothing(
    models: dict[str, Path],
    name: str,
    changes: dict[str, Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    settings = asked(models[name], tmp_path, **changes)
    command.write_completions(settings, examine)
    said = capfd.readouterr().err
    assert "a second opinion agrees: " in said and "generation to" in said
    assert ("another weight format changes them" in said) == ("held" in changes)
    assert "weights exactly" in said or "held" in changes
    command.write_completions(settings, examine)
    assert "second opinion" not in capfd.readouterr().err
    command.write_completions(asked(models[name], tmp_path, dtype="fp32"), examine)
    said = capfd.readouterr().err
    assert ("second opinion" in said) == bool(changes)  # Another number format is another model.


def test_a_file_that_changed_is_compared_again(
    models: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(models["published"], tmp_path / "copy")
    for _ in range(2):
        command.write_completions(asked(copy, tmp_path), examine)
    capfd.readouterr()
    (copy / "model.safetensors").touch()
    command.write_completions(asked(copy, tmp_path), examine)
    assert "second opinion" in capfd.readouterr().err


def test_scores_beside_a_run_change_no_model(
    models: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(models["run"], tmp_path / "copy")
    command.write_completions(asked(copy, tmp_path), examine)
    assert "second opinion" in capfd.readouterr().err
    (copy / "eval.json").write_text("{}")
    command.write_completions(asked(copy, tmp_path), examine)
    assert "second opinion" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["run", "published"])
def test_logits_of_zero_agree(models: dict[str, Path], name: str) -> None:
    """Where no logit tells tokens apart, only the sum of their chances rounds."""
    model, tokenizer = command.open_model(asked(models[name], Path()))
    with torch.no_grad():
        model.head.weight.zero_()
        comparison = Comparison()
        compare_opened(Opened(Path("no folder"), model, tokenizer), TEXTS, comparison)
    assert comparison.agreed["generation"] < 1e-6


def test_a_cache_that_cannot_be_written_is_no_error(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("no folder")
    command.write_completions(asked(models["published"], tmp_path), examine)


def transposed(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(settings: Any) -> Any:
        found = right(settings)
        with torch.no_grad():
            out = found[0].blocks[0].attention.out.weight
            out.copy_(out.t().clone())
        return found

    return wrong


def no_rotation(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, at, dtype: right(self, torch.zeros_like(at), dtype)


FAULTS: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "a matrix transposed": (command, "open_model", transposed, r"blocks.0.attention.out.weight as stored"),
    "no positions": (positions.RotaryTables, "__call__", no_rotation, "greedy"),
}


@pytest.mark.parametrize("name", ["run", "published"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_model_is_named(
    models: dict[str, Path],
    name: str,
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    owner, attribute, wrong, stage = FAULTS[fault]
    monkeypatch.setattr(owner, attribute, wrong(getattr(owner, attribute)))
    if name == "run":  # Its own matrices of the last layer of a block are zero at first.
        stage = "as stored in step-|greedy"
    with pytest.raises(Fault, match=f"differs-from-reference: .*({stage})"):
        command.write_completions(asked(models[name], tmp_path), examine)
    passing = asked(models[name], tmp_path, allow=("differs-from-reference",))
    command.write_completions(passing, examine)
    assert "ALLOWED differs-from-reference" in capfd.readouterr().err
    assert not (tmp_path / FOLDER).exists()  # What was allowed is not remembered as agreement.


def test_another_checkpoint_than_the_one_asked_for_is_named(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = sorted((models["run"] / "checkpoints").iterdir())
    right = command.load_run
    monkeypatch.setattr(command, "load_run", lambda path, which: right(steps[0]))
    with pytest.raises(Fault, match=f"as stored in {steps[-1].name}"):
        command.write_completions(asked(models["run"], tmp_path, which="last"), examine)


@pytest.mark.parametrize(
    ("door", "opens", "own"),
    [(generate, command, ["--prompt", "x"]), (serve, serving.command, ["--port", "0"])],
    ids=["generate", "serve"],
)
def test_the_command_ends_in_one_sentence(
    door: ModuleType,
    opens: ModuleType,
    own: list[str],
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(opens, "opened", transposed(opens.opened))
    with pytest.raises(SystemExit) as ended:
        door.main(["--model", str(models["published"]), "--cache", str(tmp_path), *own])
    assert ended.value.code == 2
    assert "To use it all the same: --allow differs-from-reference" in capsys.readouterr().err
