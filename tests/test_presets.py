"""The presets of recipes/*.yaml: each is a command line that trains, and docs/presets.md names it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_serving import post, running

from config import RECIPES, Config, parse_config
from config.files import REPOSITORY
from generation.command import open_model
from generation.settings import GenerationConfig
from generation.text import generate
from pretrained.save import choose_family
from serving.service import Service
from serving.settings import ServeConfig
from training.begin import train
from training.run import load_run

NAMES = ("ba", "de", "ku", "mo", "ri", "sa", "tu")

PRESETS = {
    "tiny": [],
    "small": [],
    "base": [],
    "llama-like": [],
    "fim": [],
}


def preset(name: str, *words: str) -> Config:
    return parse_config(["--config", str(RECIPES / f"{name}.yaml"), *PRESETS[name], *words])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_command_line_and_says_what_it_is_for(name: str) -> None:
    config = preset(name)
    assert config != parse_config(PRESETS[name])
    assert (RECIPES / f"{name}.yaml").read_text("utf-8").startswith(f"# {name}, for ")


@pytest.mark.parametrize("name", ["tiny", pytest.param("small", marks=pytest.mark.slow)])
def test_a_preset_that_is_small_takes_two_steps(name: str, corpus: Path, tmp_path: Path) -> None:
    places = ["--data.source", str(corpus), "--data.cache", str(tmp_path / "cache")]
    words = ["--run", str(tmp_path / "run"), "--data.validation_one_in", "4", "--data.workers", "1"]
    manager = train(preset(name, *places, *words, "--max_steps", "2", "--samples", "0"))
    assert manager.state.step == 2 and manager.model.config.n_layer == preset(name).model.n_layer


def functions(path: Path, n: int) -> None:
    """Functions whose middles their two sides give away."""
    rows = []
    for i in range(n):
        name = NAMES[i % 7]
        rows.append({"text": f"def get_{i}(x):\n    y = x + {name}\n    return {name} * y\n"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def filled(run: str) -> tuple[str, str]:
    """A gap that a run fills, by `generate` and by a server that has nothing but its folder."""
    settings = ServeConfig(model=run, port=0)
    trained = load_run(run)
    tokenizer, config = trained.tokenizer, GenerationConfig(max_new_tokens=8)
    before, after = "def get_77(x):\n    y = x + ", "\n    return sa * y\n"
    (own,) = generate(trained.model, tokenizer, [before], config, suffix=after)
    with running(settings, service=Service(*open_model(settings), "run", settings)) as served:
        body = {"prompt": before, "suffix": after, "max_tokens": 8, "temperature": 0}
        answer = post(served, body)
        assert answer.status_code == 200, answer.text
    return own.text, answer.json()["choices"][0]["text"]


@pytest.mark.parametrize(("kind", "order"), [("code", "psm"), ("bpe", "psm"), ("bpe", "spm")])
def test_a_run_with_gaps_fills_them_in_the_server(kind: str, order: str, tmp_path: Path) -> None:
    own, served = filled(trained_on_gaps(tmp_path, kind, order))
    assert own == served


def test_a_code_tokenizer_has_no_gaps_with_the_suffix_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fim_order spm cannot be had with a `code` tokenizer"):
        trained_on_gaps(tmp_path, "code", "spm")


def trained_on_gaps(folder: Path, kind: str, order: str) -> str:
    functions(folder / "functions.jsonl", 40)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 128}
    words = [word for key, size in sizes.items() for word in (f"--model.{key}", str(size))]
    words += ["--tokenizer.vocab_size", "400", "--max_steps", "2", "--samples", "0"]
    words += ["--tokenizer.kind", kind, "--data.fim_order", order, "--run", str(folder / "run")]
    words += ["--data.source", str(folder / "functions.jsonl"), "--data.cache", str(folder / "cache")]
    train(preset("fim", *words, "--data.workers", "1"))
    return str(folder / "run")


def test_a_model_that_is_like_llama_is_exported_as_llama() -> None:
    model = preset("llama-like", "--model.vocab_size", "32768").model.resolved()
    assert choose_family(model).model_type == "llama"
    with pytest.raises(ValueError):
        choose_family(preset("base", "--model.vocab_size", "32768").model.resolved())


def test_the_manual_has_a_row_for_every_preset() -> None:
    page = (REPOSITORY / "docs" / "presets.md").read_text("utf-8")
    assert set(re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)) == PRESETS.keys()
