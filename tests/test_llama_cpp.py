"""GGUF files asked of the real llama.cpp, whose server has to be on the PATH (docs/export.md says how)."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf_models import LLAMA, MODELS, RULES, model_of, tokenizer_by

from guards.faults import Fault
from guards.llama_server import SERVER, refuse_other_answers
from pretrained import save_gguf
from tokenizer import Tokenizer

pytestmark = pytest.mark.slow
SMALL = tokenizer_by(starts=True)


@pytest.fixture(autouse=True)
def server() -> None:
    if shutil.which(SERVER) is None:
        pytest.skip(f"{SERVER} is not on the PATH")


def asked(
    settings: dict[str, Any],
    path: Path,
    kind: str = "f16",
    tokenizer: Tokenizer = SMALL,
    family: str | None = None,
) -> None:
    """Write a file and ask llama.cpp alone."""
    model = model_of(settings, tokenizer.vocab_size + 3)
    save_gguf.save_gguf(
        model,
        tokenizer,
        path,
        kind,
        family,
        complete=lambda hidden: refuse_other_answers(hidden, model, tokenizer, ()),
    )


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", MODELS)
def test_ids_and_greedy_tokens_are_those_of_the_model(
    name: str, kind: str, tmp_path: Path, capsys: Any
) -> None:
    asked(MODELS[name][1], tmp_path / f"{name}.gguf", kind, family=MODELS[name][0])
    equal, n = re.findall(r"chose (\d+) of (\d+) greedy", capsys.readouterr().out)[0]
    assert int(n) - int(equal) <= 3


@pytest.mark.parametrize("rule", RULES)
def test_ids_of_texts_are_equal_by_each_rule(rule: str, tmp_path: Path, capsys: Any) -> None:
    added = ("    ", "\t\t", "new_word", *(" " * n for n in (31, 7, 2)))
    asked(LLAMA, tmp_path / "x", tokenizer=tokenizer_by(rule, added=added, starts=rule == "llama-bpe"))
    assert "ids exactly" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama", "bigcode multi-head"])
def test_rows_in_the_order_of_the_model_are_another_model_in_llama_cpp(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is what a file without an error and with nonsense would be."""
    monkeypatch.setattr(save_gguf, "_order", lambda *args: None)
    monkeypatch.setattr("guards.reference.exported_gguf.OpenedGguf._order", lambda *args: None)
    with pytest.raises(Fault, match=r"llama\.cpp, greedy token \d+ of \d+: its logit is .* below"):
        asked(MODELS[name][1], tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_another_rule_is_seen_in_the_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrained.gguf_tokenizer._rule", lambda rules: "llama-bpe")
    with pytest.raises(Fault, match=r"llama\.cpp, ids of text 1"):
        asked(LLAMA, tmp_path / "x")


def test_a_file_that_llama_cpp_does_not_open_says_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = save_gguf._tensors
    monkeypatch.setattr(
        save_gguf, "_tensors", lambda *args: {k: v for k, v in right(*args).items() if "attn_q" not in k}
    )
    with pytest.raises(Fault, match=r"it does not open the file: .*"):
        asked(LLAMA, tmp_path / "x")
