"""Settings: files, flags, and mistakes in one sentence."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from config import Config, ModelConfig, parse_config, unused_keys

HOUSE = Path(__file__).parent.parent


def test_flags_override_files_and_files_override_defaults(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("model:\n  n_layer: 7\n  n_head: 2\nmax_steps: 5\n")
    second.write_text("model:\n  n_layer: 8\n")
    config = parse_config(["--config", str(first), "--config", str(second), "--max_steps", "6"])
    assert (config.model.n_layer, config.model.n_head, config.train.max_steps) == (8, 2, 6)
    assert config.model.n_embd == ModelConfig().n_embd


def test_a_saved_config_comes_back_equal() -> None:
    config = parse_config(["--model.n_layer", "3", "--data.suffixes", "[.py,.kt]", "--max_seconds", "12"])
    assert config.data.suffixes == (".py", ".kt")
    assert Config.from_dict(config.to_dict()) == config


def test_overfit_is_a_switch_and_flags_still_override_its_settings() -> None:
    config = parse_config(["--overfit", "--max_steps", "3"])
    assert config.train.overfit and config.train.max_steps == 3
    assert config.data.validation_one_in == 0 and Path(config.data.source).is_dir()
    assert not parse_config(["--overfit", "false"]).train.overfit


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model.n_layr", "3"], "did you mean model.n_layer?"),
        (["--n_layer", "3"], "did you mean model.n_layer?"),
        (["--max_secnds", "3"], "did you mean max_seconds?"),
        (["--model.n_layer", "3.5"], "Expected a <class 'int'>"),
        (["--model.mlp", "gulu"], "'gelu_tanh'"),
        (["--config", "/no/such.yaml"], "/no/such.yaml"),
        (["--model.position", "learned", "--model.rope_theta", "5"], "model.position is not rotary"),
        (["--optimizer.name", "adamw", "--optimizer.muon_lr", "1"], "optimizer.name is not muon"),
        (["--tokenizer.kind", "bpe", "--tokenizer.min_count", "1"], "only a new `code` tokenizer counts"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(words)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in printed
    assert printed.startswith("error: ") and printed.count("\n") == 1


def test_typos_in_a_file_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "typo.yaml"
    file.write_text("optimizer:\n  warmup_step: 3\n")
    with pytest.raises(SystemExit):
        parse_config(["--config", str(file)])
    assert "did you mean optimizer.warmup_steps?" in capsys.readouterr().err


def test_the_defaults_have_no_unused_key() -> None:
    assert list(unused_keys(Config())) == []


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"n_embd": 10, "n_head": 3}, ("10", "3")),
        ({"n_head": 4, "n_kv_head": 3}, ("4", "3")),
        ({"rotary_dim": 6, "n_embd": 8, "n_head": 2}, ("6", "4")),
        ({"n_layer": 0}, ("0", "1")),
        ({"dropout": 1.0}, ("1.0", "1")),
        ({"vocab_size": -1}, ("-1", "1")),
    ],
)
def test_a_shape_that_cannot_be_built_names_both_numbers(settings: Any, numbers: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        replace(ModelConfig(vocab_size=8), **settings).resolved()
    assert all(number in str(error.value) for number in numbers)


@pytest.mark.parametrize("command", ["trainingmanager.py", "eval.py"])
def test_help_and_typos_answer_without_torch(command: str) -> None:
    """An answer in half a second needs torch to stay out: its import alone takes longer."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{command!r}, '--help']\n"
        f"try: runpy.run_path({str(HOUSE / command)!r}, run_name='__main__')\n"
        "except SystemExit as stop: print('exit', stop.code, {'torch', 'numpy'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=HOUSE, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("exit 0 set()")
