"""One run asked in several wordings, and all that an evaluation says of it, through the real command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_eval import BYTES, command, random_model

from config import Config, DataConfig
from config.files import code_fingerprint
from data.corpus import split_documents
from data.documents import Document
from dataset import prepare_data
from suites import evaluate as evaluation
from suites.baselines import copied
from suites.pairs import pair_examples
from suites.prompts import variant_names, with_prompts
from suites.scoring import Example
from suites.settings import EvalConfig
from training.checkpoint import save_checkpoint


def row(number: int) -> dict[str, Any]:
    draw = np.random.default_rng(number)
    name = f"class_{number}_{draw.integers(1000)}"
    return {
        "path": f"{name}.py",
        "prompt": f"class {name}:\n",
        "prompts": {"verbose": f"Summarise this class:\nclass {name}: ...\n", "simple": f"class {name}:\n"},
        "completion": f"A class called {name}.",
    }


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(60)), "utf-8")
    settings = DataConfig(
        str(tmp_path / "rows.jsonl"),
        validation_one_in=4,
        test_one_in=4,
        cache=str(tmp_path / "cache"),
        workers=1,
    )
    data, model, folder = prepare_data(settings, BYTES), random_model(), tmp_path / "run"
    BYTES.save(folder / "tokenizer")
    config = replace(Config(), data=settings, model=model.config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict()), "utf-8")
    prints = {"data": data.fingerprint, "tokenizer": BYTES.fingerprint, "code": code_fingerprint()}
    (folder / "fingerprints.json").write_text(json.dumps(prints), "utf-8")
    save_checkpoint(folder / "checkpoints", 7, model, {}, 2.5, keep=False)
    return folder


def data_of(run: Path) -> tuple[DataConfig, Any]:
    config = DataConfig(
        str(run.parent / "rows.jsonl"),
        validation_one_in=4,
        test_one_in=4,
        cache=str(run.parent / "cache"),
        workers=1,
    )
    return config, prepare_data(config, BYTES)


def held_out(config: DataConfig, data: Any) -> Iterator[Document]:
    return (document for split, document in split_documents(config) if split == data.test.split)


def test_each_example_gets_the_wording_of_its_own_row(run):
    config, data = data_of(run)
    examples = pair_examples(data.test, BYTES, 9, seed=1)
    worded = with_prompts(examples, held_out(config, data), ["verbose", "simple"])
    assert [e.prompt for e in worded["simple"]] == [e.prompt for e in examples]
    for plain, verbose in zip(examples, worded["verbose"], strict=True):
        words = plain.prompt.replace(":", ": ...")
        assert verbose == replace(plain, prompt=f"Summarise this class:\n{words}")


def test_wordings_change_neither_the_data_nor_the_split(run):
    config, data = data_of(run)
    path = Path(config.source)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    path.write_text("".join(json.dumps({**one, "prompts": 3}) + "\n" for one in rows), "utf-8")
    assert prepare_data(config, BYTES).fingerprint == data.fingerprint
    examples = pair_examples(data.test, BYTES, 4)
    with pytest.raises(
        ValueError, match=r"rows.jsonl line \d+ has no prompt called 'simple' .*\(it has none\)"
    ):
        with_prompts(examples, held_out(config, data), ["simple"])


def test_names_are_between_commas_and_once_each():
    assert variant_names(" a, b,") == ["a", "b"]
    assert variant_names("") == []
    with pytest.raises(ValueError, match="names a twice"):
        variant_names("a,b,a")


def test_the_command_asks_in_each_wording_and_prints_the_difference(run):
    words = ["--checkpoint", run, "--samples", 6, "--max_new_tokens", 12, "--precision", "fp32"]
    words += ["--cache", run.parent / "cache", "--prompts", "verbose,simple", "--memorisation", "true"]
    done = command(*words, "--metrics", "chrf,semantic", "--embedding_layer", 1)
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "eval.json").read_text("utf-8"))
    records = result["prompts"]
    assert list(records) == ["verbose", "simple"]
    # Asked as in training, an example has the very prediction of the suite.
    assert records["simple"]["samples"] == result["suite"]["samples"]
    assert records["verbose"]["samples"][0]["prompt"].startswith("Summarise this class:\n")
    # What is copied is what was asked.
    for record in records.values():
        asked = [Example("", 0, s["prompt"], s["reference"]) for s in record["samples"]]
        assert [s["predictions"]["copy"] for s in record["samples"]] == copied(asked)
    said = done.stdout
    assert "verbose model" in said
    assert "chrf: simple model less verbose model is " in said
    assert "in training: 0 of 6 references are completions of training" in said
    assert "longest run in training" in said
    assert "hidden states of the model itself, weights" in result["suite"]["signatures"]["semantic"]
    assert len(result["suite"]["measured"]["semantic"]["model"]) == 6
    page = (run / "eval.html").read_text("utf-8")
    assert page.count("<article ") == 18
    assert "<b>semantic</b>" in page
    again = command("--rescore", run / "eval.json")
    assert again.returncode == 0, again.stdout
    compared = command("--compare", f"{run}:verbose", f"{run}:simple")
    assert "chrf: B simple model less A verbose model is " in compared.stdout, compared.stderr
    # How many ran on is told of each wording, and two evaluations are compared wording by wording.
    (long,) = [one for one in said.split("\n\n") if "verbose model" in one]
    shares = [f"{records[name]['ran_long']['model']:.1%}" for name in ("verbose", "simple")]
    assert (
        next(one for one in long.splitlines() if one.startswith("ran into the limit")).split()[4:] == shares
    )
    both = command("--compare", run, run / "eval.json").stdout
    for name in ("verbose", "simple"):
        assert f"\nprompt {name}:\n" in both
        assert f"A {name} model" in both


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompts": "verbose,terse"}, "no prompt called 'terse'"),
        ({"prompts": "verbose,verbose"}, "names verbose twice"),
        ({"metrics": "semantic", "embedding_layer": 9}, "embedding_layer is 9, and the model has 2 layers"),
        ({"metrics": "semantic", "embedding_model": "nowhere"}, "nowhere"),
    ],
)
def test_mistakes_are_said(run, settings, said):
    asked = EvalConfig(
        str(run), cache=str(run.parent / "cache"), samples=4, max_new_tokens=4, precision="fp32"
    )
    with pytest.raises(ValueError, match=said):
        evaluation.evaluate(replace(asked, **settings))
    assert not (run / "eval.json").exists()
