"""recipes/foretold.py and recipes/line_search.py: what was written next, foretold, scored and searched."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from histories import FAIL, drawer

from architecture import Decoder
from config import LoraConfig, ModelConfig
from data.context import RepositoryFiles
from data.fim import fim_prompt_ids
from data.ngram import NGramModel
from lora import add_adapter
from modules.precision import choose_device, choose_precision
from recipes.foretold import (
    WRONG,
    Answers,
    Case,
    all_answers,
    best_threshold,
    difference,
    gains,
    is_right,
    measures,
)
from recipes.line_search import searched
from recipes.written import Written, gaps_of
from suites.evaluated import EvaluatedModel
from tokenizer import BPETokenizer


def case(middle: str, file: str = "a.py", kind: str = "line") -> Case:
    return Case(f"{file}:1.line", kind, middle, ("# b.py\nx = ", "\ny\n"), ("x = ", "\ny\n"), (middle, 0.5))


@pytest.fixture(scope="module")
def evaluated() -> EvaluatedModel:
    tokenizer = BPETokenizer.train([FAIL, drawer("apple", 1)], 400)
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=32, block_size=256
    ).resolved()
    model = Decoder(shape)
    add_adapter(model, LoraConfig(r=2, targets=("all-linear",)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    precision = choose_precision(choose_device("cpu"), "fp32")
    return EvaluatedModel(model.eval(), tokenizer, 256, True, "none", precision)


def test_losses_are_those_of_what_was_written_with_its_end(evaluated: EvaluatedModel) -> None:
    cases = [case("return 1"), case("fail_shop('no', 1)", "b.py"), case("    a\n    b", kind="block")]
    tokenizer = evaluated.tokenizer
    baseline = NGramModel([np.array(tokenizer.encode(FAIL))], tokenizer.vocab_size)
    found, counts = all_answers(evaluated, baseline, cases, with_losses=True)
    for name, shown in (("learned, with context", True), ("learned", False)):
        for i, one in enumerate(cases):
            prompt = fim_prompt_ids(tokenizer, *(one.shown if shown else one.alone))
            after = [*tokenizer.encode(one.middle), tokenizer.eos_id or 0]
            with torch.no_grad():
                logits = evaluated.model(torch.tensor([[*prompt, *after]]))[0, len(prompt) - 1 : -1]
            own = F.cross_entropy(logits.float(), torch.tensor(after), reduction="sum").item()
            nats = found[name].nats
            assert nats is not None and nats[i] == pytest.approx(own, rel=1e-4) and counts[i] == len(after)
    assert found["base"].nats is not None and found["learned"].nats is not None
    assert not np.allclose(found["base"].nats, found["learned"].nats), "the adapter is off for the base"
    assert found["nearest line"].nats is None and found["nearest line"].texts == [one.middle for one in cases]
    for name, answers in found.items():
        assert np.all((answers.sure >= 0) & (answers.sure <= 1))
        assert name == "nearest line" or "\n" not in answers.texts[0] + answers.texts[1], "a line ends"


def test_a_threshold_shows_what_saves_and_hides_what_costs() -> None:
    cases = [case("x" * 20), case("y" * 30), case("z" * 40), case("w" * 5)]
    texts = ["x" * 20, "wrong", "z" * 40, ""]
    gain = gains(texts, cases)
    assert gain.tolist() == [19, -WRONG, 39, 0]
    sure = np.array([0.9, 0.5, 0.4, 0.8])
    assert best_threshold(sure, gain) == 0.4, "39 more are worth one that is wrong"
    assert best_threshold(sure, gains(["x" * 20, "wrong", "wrong", ""], cases)) == 0.9
    assert best_threshold(sure, gains(["no", "wrong", "", ""], cases)) is None
    assert best_threshold(np.array([0.5, 0.5]), np.array([3.0, -WRONG])) is None, "equals are shown together"
    answers = Answers(texts, sure)
    saved = measures(answers, cases, np.ones(4), 0.4)["saved"]
    assert saved[:, 0].sum() / saved[:, 1].sum() == pytest.approx(100 * (19 - WRONG + 39) / 95)
    assert measures(answers, cases, np.ones(4), None)["saved"][:, 0].sum() == 0
    assert is_right("a  \n", case("a")) and not is_right("  a", case("a")), "indentation counts"


def test_differences_are_of_files_and_not_of_cases() -> None:
    """Forty cases of one file that all go one way are one witness."""
    many = [case("a", "one.py") for _ in range(40)]
    ours, theirs = (np.column_stack([np.full(40, loss), np.ones(40)]) for loss in (1.0, 2.0))
    alone = difference(ours, theirs, many, lower=True)
    assert alone["mean"] == -1.0 and alone["verdict"] == "" and alone["low"] == -math.inf
    spread = [case("a", f"{number}.py") for number in range(40)]
    apart = difference(ours, theirs, spread, lower=True)
    assert apart["verdict"] == "better" and apart["files"] == 40
    assert difference(theirs, ours, spread, lower=True)["verdict"] == "worse"


def test_the_search_answers_with_what_stands_at_the_most_like_place() -> None:
    files = RepositoryFiles()
    files.put("shop/fail.py", FAIL)
    files.put("shop/apple_drawer.py", drawer("apple", 1))
    text = drawer("bottle", 1)
    asked = {(gap.line, gap.kind): gap for gap in gaps_of("shop/bottle_drawer.py", text)}
    line = searched(files, asked[6, "line"])
    assert line.text == "        self.m_apples = m_apples" and line.score > 0.5
    block = searched(files, asked[9, "block"])
    assert block.text.split("\n")[0] == "        if wanted not in self.m_apples:"
    assert block.text.split("\n")[-1] == "        return self.m_apples.pop(wanted)"
    rest = Written("new.py", "", 1, "rest", "from shop.fail import ", "", "")
    assert searched(files, rest).text == "fail_shop"
    assert searched(RepositoryFiles(), rest) == ("", 0.0)


def test_cases_are_read_as_they_were_written(tmp_path: Path) -> None:
    from recipes.foretold import read_cases

    row = (
        '{"prefix": "p", "suffix": "s", "middle": "m", "path": "a/b.py:c0ffee.3.rest", "kind": "rest", '
        '"commit": "c0ffee", "alone": ["q", "t"], "searched": ["n", 0.25]}\n'
    )
    (tmp_path / "test.jsonl").write_text(row)
    (found,) = read_cases(tmp_path / "test.jsonl")
    assert found == Case("a/b.py:c0ffee.3.rest", "rest", "m", ("p", "s"), ("q", "t"), ("n", 0.25))
    assert found.file == "a/b.py"
    (tmp_path / "test.jsonl").write_text(row.replace("searched", "sought"))
    with pytest.raises(ValueError, match="older version"):
        read_cases(tmp_path / "test.jsonl")
