"""A run as a folder for other tools: what they open gives the run's logits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from test_finetune import base, config, logits, other

from config import Config
from export import ExportConfig, export
from lora import LowRank
from runmodel import load_run, open_adapted
from trainingmanager import train

__all__ = ["base", "config"]  # fixtures
HOUSE = Path(__file__).parent.parent
TOKENS = torch.arange(24).view(2, 12)


def opened(folder: Path) -> torch.Tensor:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.fixture
def run(config: Config) -> Path:
    return train(other(config, max_steps=3)).folder


def test_an_adapter_opens_in_peft_on_its_base(run: Path, config: Config, tmp_path: Path) -> None:
    assert "belongs to" in export(ExportConfig(str(tmp_path / "adapter"), str(run)))
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(str(config.train.base))
    model: Any = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    with torch.no_grad():
        found = model.eval()(TOKENS).logits
    torch.testing.assert_close(found, logits(load_run(run).model), rtol=1e-5, atol=1e-6)
    ours = open_adapted(str(config.train.base), tmp_path / "adapter")
    assert torch.equal(logits(ours.model), logits(load_run(run).model))


def test_merged_weights_open_in_transformers(run: Path, config: Config, tmp_path: Path) -> None:
    said = export(ExportConfig(str(tmp_path / "merged"), str(run), merge=True))
    assert "largest logit gap" in said and "greedy agreement 100.00%" in said and "gpt_bigcode" in said
    expected = logits(load_run(run).model)
    torch.testing.assert_close(opened(tmp_path / "merged"), expected, rtol=1e-4, atol=1e-5)
    export(ExportConfig(str(tmp_path / "adapter"), str(run)))
    both = {"base": config.train.base, "adapter": str(tmp_path / "adapter"), "merge": True}
    export(ExportConfig(str(tmp_path / "again"), **both))
    assert torch.equal(opened(tmp_path / "again"), opened(tmp_path / "merged"))


def test_an_adapter_of_a_4_bit_base_is_merged_into_that_base_and_no_other(
    config: Config, tmp_path: Path
) -> None:
    run = train(other(config, max_steps=3, base_format="nf4")).folder
    export(ExportConfig(str(tmp_path / "merged"), str(run), merge=True))
    expected = logits(load_run(run).model)
    torch.testing.assert_close(opened(tmp_path / "merged"), expected, rtol=1e-4, atol=1e-5)
    export(ExportConfig(str(tmp_path / "adapter"), str(run)))
    both = {"base": config.train.base, "adapter": str(tmp_path / "adapter"), "merge": True}
    with pytest.raises(ValueError, match="was trained on a base held in nf4, not in fp32"):
        export(ExportConfig(str(tmp_path / "other"), base_format="fp32", **both))
    export(ExportConfig(str(tmp_path / "again"), **both))
    assert torch.equal(opened(tmp_path / "again"), opened(tmp_path / "merged"))


def test_a_merge_that_is_not_what_was_trained_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="merged-differs"):
        export(ExportConfig(str(tmp_path / "merged"), str(run), merge=True, tolerance=1e-12))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--out", "x"], "give one of --run FOLDER and --base MODEL"),
        (["--out", "x", "--run", "a", "--base", "b"], "give one of --run FOLDER and --base MODEL"),
        (["--out", "x", "--base", "b"], "--base and --adapter belong together"),
        (["--out", "x", "--base", "b", "--adapter", "c"], "is for --merge"),
        (["--out", "x", "--run", "no-such-run"], "no-such-run holds no run"),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], sentence: str) -> None:
    done = subprocess.run(
        [sys.executable, str(HOUSE / "export.py"), *words], capture_output=True, text=True, cwd=HOUSE
    )
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1


def test_a_merge_that_forgets_some_modules_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = LowRank.merge_into

    def wrong(self: LowRank, merged: torch.Tensor, weight: torch.Tensor, share: float) -> None:
        if weight.size(0) > weight.size(1):  # the fused projection alone is merged
            right(self, merged, weight, share)

    monkeypatch.setattr(LowRank, "merge_into", wrong)
    with pytest.raises(ValueError, match="merged-differs"):
        export(ExportConfig(str(tmp_path / "merged"), str(run), merge=True))
    assert not (tmp_path / "merged").exists()
