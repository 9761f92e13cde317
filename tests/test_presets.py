"""The presets of recipes/*.yaml: each is a command line that trains, and docs/presets.md names it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from config import RECIPES, Config, parse_config
from config.files import REPOSITORY
from pretrained.save import choose_family
from training.begin import train

PRESETS = {
    "tiny": [],
    "small": [],
    "base": [],
    "llama-like": [],
    "fim": ["--base", "some/model"],
}


def preset(name: str, *words: str) -> Config:
    return parse_config(["--config", str(RECIPES / f"{name}.yaml"), *PRESETS[name], *words])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_command_line_and_says_what_it_is_for(name: str) -> None:
    config = preset(name)
    assert config != parse_config(PRESETS[name])
    assert (RECIPES / f"{name}.yaml").read_text("utf-8").startswith(f"# {name}, for ")


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_a_preset_that_is_small_takes_two_steps(name: str, corpus: Path, tmp_path: Path) -> None:
    places = ["--data.source", str(corpus), "--data.cache", str(tmp_path / "cache")]
    words = ["--run", str(tmp_path / "run"), "--data.validation_one_in", "4", "--data.workers", "1"]
    manager = train(preset(name, *places, *words, "--max_steps", "2", "--samples", "0"))
    assert manager.state.step == 2 and manager.model.config.n_layer == preset(name).model.n_layer


def test_a_preset_for_gaps_needs_a_tokenizer_that_has_the_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--config", str(RECIPES / "fim.yaml")])
    assert "only base or tokenizer.path brings tokens for it" in capsys.readouterr().err
    for words in (PRESETS["fim"], ["--tokenizer.path", "some/tokenizer"]):
        assert parse_config(["--config", str(RECIPES / "fim.yaml"), *words]).data.fim_rate == 0.5


def test_a_model_that_is_like_llama_is_exported_as_llama() -> None:
    model = preset("llama-like", "--model.vocab_size", "32768").model.resolved()
    assert choose_family(model).model_type == "llama"
    with pytest.raises(ValueError):
        choose_family(preset("base", "--model.vocab_size", "32768").model.resolved())


def test_the_manual_has_a_row_for_every_preset() -> None:
    page = (REPOSITORY / "docs" / "presets.md").read_text("utf-8")
    assert set(re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)) == PRESETS.keys()
