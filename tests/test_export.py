"""A run as a folder for other tools: what they open gives the run's logits."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commands import command
from lazily import peft
from safetensors.torch import load_file
from test_finetune import base, config, logits, other

from adapters.layers import LowRank
from config import Config, one_sentence
from export import main
from guards.faults import Fault
from guards.llama_server import as_written
from guards.preflight import overrides
from guards.reference.exported_gguf import OpenedGguf
from lora import adapters_disabled
from pretrained import load_pretrained, save_adapter
from training.begin import train
from training.ended import finish_ended
from training.export import export
from training.export_config import ExportConfig
from training.outputs import outputs_made
from training.report import report
from training.run import load_run, open_adapted

pytestmark = pytest.mark.usefixtures("unguarded")

__all__ = ["base", "config"]  # fixtures
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
    model: Any = peft().PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
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
    with pytest.raises(ValueError, match="was trained on a base stored as nf4, not as fp32"):
        export(ExportConfig(str(tmp_path / "other"), base_format="fp32", **both))
    export(ExportConfig(str(tmp_path / "again"), **both))
    assert torch.equal(opened(tmp_path / "again"), opened(tmp_path / "merged"))


def test_a_merge_that_is_requantised_is_judged_by_what_is_written(config: Config, tmp_path: Path) -> None:
    run = train(other(config, max_steps=3, base_format="nf4")).folder
    asked: dict[str, Any] = {"run": str(run), "merge": True, "requantise": True}
    with pytest.raises(
        ValueError, match=r"merged-differs: the largest logit gap is .*; the adapter itself moves"
    ):
        export(ExportConfig(str(tmp_path / "refused"), **asked))
    assert not (tmp_path / "refused").exists()
    said = export(ExportConfig(str(tmp_path / "merged"), tolerance=10, **asked))
    effect = float(re.findall(r"the adapter itself moves a logit by up to ([\d.e+-]+)", said)[0])
    gap = float(re.findall(r"gap ([\d.e+-]+)", said)[0])
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    text = Path(argparse.__file__).read_text()
    written, adapted = load_pretrained(tmp_path / "merged", torch.float32), load_run(run)
    ids = torch.tensor(adapted.tokenizer.encode(text)[: 8 * 64]).view(8, 64)
    with torch.no_grad():
        found, expected = written.model(ids), adapted.model(ids)
        again = load_pretrained(tmp_path / "merged", torch.float32, weight_format="nf4").model(ids)
        with adapters_disabled(adapted.model):
            plain_base = adapted.model(ids)
    assert float((plain_base - expected).abs().max()) == pytest.approx(effect, rel=0.01)
    assert float((found - expected).abs().max()) == pytest.approx(gap, rel=0.01)
    assert float((again - found).abs().max()) < 0.2 * gap
    with pytest.raises(ValueError, match="was not stored in nf4"):
        plain = train(other(config, max_steps=1, run=f"{config.train.run}2")).folder
        export(ExportConfig(str(tmp_path / "no"), str(plain), merge=True, requantise=True))


def test_prompts_and_ends_are_those_of_the_base_and_then_those_of_training(
    config: Config, tmp_path: Path
) -> None:
    """A base as StarCoder's: nothing stands before its prompts, and what was trained started with its eos."""
    base = Path(str(config.train.base))
    state = json.loads((base / "tokenizer.json").read_text())
    (base / "tokenizer.json").write_text(json.dumps(state | {"post_processor": None}))
    names = dict.fromkeys(("bos_token", "eos_token"), "<|eos|>")
    (base / "tokenizer_config.json").write_text(json.dumps(names | {"add_bos_token": False}))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    text = "def f(x):"

    def of_transformers(folder: Path) -> list[int]:
        ids = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == [2, 9]
        return ids

    published = load_pretrained(base).tokenizer
    assert published is not None
    assert published.prompt_ids(text) == of_transformers(base) == published.encode(text)
    trained = train(other(config, max_steps=1))
    started = [2, *published.encode(text)]
    assert int(trained.data.train.document(0)[0]) == 2
    export(ExportConfig(str(tmp_path / "merged"), str(trained.folder), merge=True))
    export(ExportConfig(str(tmp_path / "adapter"), str(trained.folder)))
    opened = [
        load_run(trained.folder).tokenizer,
        load_pretrained(tmp_path / "merged").tokenizer,
        open_adapted(str(base), tmp_path / "adapter").tokenizer,
    ]
    for tokenizer in opened:
        assert tokenizer is not None and tokenizer.eos_ids == (2, 9)
        assert tokenizer.prompt_ids(text) == started
    for folder in (tmp_path / "adapter", tmp_path / "merged", trained.folder / "tokenizer"):
        assert of_transformers(folder) == started


def loss(model: torch.nn.Module, ids: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(ids)[:, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def test_adapters_become_a_file_for_llama_cpp_once_they_are_merged_and_its_loss_is_said(
    run: Path, config: Config, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="adapters, which a GGUF file does not hold; give --merge too"):
        export(ExportConfig(run=str(run), gguf=str(tmp_path / "x.gguf")))
    adapted = load_run(run)
    ids = torch.tensor(adapted.tokenizer.encode(Path(argparse.__file__).read_text())[: 8 * 64]).view(8, 64)
    for kind in ("q8_0", "q4_0"):
        file = tmp_path / f"{kind}.gguf"
        said = export(ExportConfig(run=str(run), gguf=str(file), type=kind, merge=True))
        assert "largest logit gap" in said and f"gpt_bigcode model in {file}, {kind}" in said
        found, change = map(float, re.findall(r"its loss is ([\d.]+) nats a token, ([+-][\d.]+)", said)[0])
        of_file = as_written(load_pretrained(str(config.train.base)).model, OpenedGguf(file))
        assert found == pytest.approx(loss(of_file, ids), abs=1e-4)
        assert found - change == pytest.approx(loss(adapted.model, ids), abs=1e-3)
    assert sorted(tmp_path.glob("*.gguf")) == [tmp_path / "q4_0.gguf", tmp_path / "q8_0.gguf"]


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
        (["--out", "x", "--run", "a", "--requantise"], "--requantise is for --merge"),
        (["--out", "x", "--run", "no-such-run"], "no-such-run holds no run"),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], sentence: str, tmp_path: Path) -> None:
    done = command("export.py", *words, cwd=tmp_path)
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for path in (Path(__file__) / "x", Path("/proc/x")):
        with pytest.raises(SystemExit), one_sentence():
            path.mkdir()
        said = capsys.readouterr().err
        assert said.startswith(f"error: {path} cannot be used (") and "name another file or folder" in said


def test_a_merge_that_forgets_some_modules_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = LowRank.merge_into

    def wrong(self: LowRank, merged: torch.Tensor, base: torch.nn.Module, share: float) -> None:
        if merged.size(0) > merged.size(1):  # the fused projection alone is merged
            right(self, merged, base, share)

    monkeypatch.setattr(LowRank, "merge_into", wrong)
    with pytest.raises(ValueError, match="merged-differs"):
        export(ExportConfig(str(tmp_path / "merged"), str(run), merge=True))
    assert not (tmp_path / "merged").exists()


def other_alpha(patch: pytest.MonkeyPatch) -> None:
    """Let exporters write another alpha than the run's."""
    right = save_adapter._written

    def wrong(*args: Any) -> Any:
        values, tensors = right(*args)
        return values | {"lora_alpha": 1}, tensors

    patch.setattr(save_adapter, "_written", wrong)


def test_an_adapter_that_is_written_wrong_is_refused_by_the_command_unless_allowed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other_alpha(monkeypatch)
    words = ["--run", str(run), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert said.startswith("error: differs-from-reference: exported adapter, ") and "8 times the ref" in said
    assert said.endswith("To export all the same: --allow differs-from-reference\n")
    assert not (tmp_path / "out").exists()
    main([*words, "--allow", "differs-from-reference"])
    assert capsys.readouterr().err.startswith("ALLOWED differs-from-reference: exported adapter, ")
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    with pytest.raises(SystemExit):
        main([*words[:2], "--out", str(tmp_path / "other"), "--allow", "difers-from-reference"])
    assert "did you mean differs-from-reference?" in capsys.readouterr().err


def test_the_end_of_a_run_whose_adapter_is_written_wrong_makes_the_rest_and_then_says_so(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_alpha(monkeypatch)
    manager = train(other(config, max_steps=3))
    with pytest.raises(Fault, match=r"exported adapter.*To export all the same"):
        report(manager)
    folder = manager.folder
    assert not (folder / "adapter").exists() and (folder / "eval.json").is_file()
    assert outputs_made(folder, 3) == {"scores", "samples", "pictures"}
    allowed = (*config.train.allow, "differs-from-reference")
    assert finish_ended(other(manager.config, resume=True, allow=allowed))
    assert (folder / "adapter").is_dir() and "differs-from-reference" in overrides(folder)
