"""Generation for a suite: draws, stop strings, memory that is full, and evaluations that end early."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_eval import BYTES, FP32, REPOSITORY, data, here, model, run
from test_suites import PAIRS

from architecture import Decoder
from config import ModelConfig
from generation.settings import GenerationConfig
from generation.text import generate
from suites import completing
from suites import evaluate as evaluation
from suites.completing import CompletionSettings, complete, draw_number, free_memory, rows_at_a_time, uncut
from suites.kept import Kept
from suites.rescoring import differences
from suites.scoring import Example, Predictions, scored
from suites.tables import suite_table
from training.checkpoint import save_checkpoint

__all__ = ["data", "model", "run"]  # fixtures
EXAMPLES = [Example(f"f{i}.py", i, "def f" + "(x, " * (i % 5) + f"{i})", f"x + {i}") for i in range(9)]
SAMPLED = GenerationConfig(temperature=1.2, top_p=0.9, seed=5)


def made(
    decoder: Decoder,
    examples: Sequence[Example] = EXAMPLES,
    kept: Kept | None = None,
    on_done: Callable[[int], Any] = lambda n: None,
    **more: Any,
) -> Predictions:
    return complete(decoder, BYTES, examples, uncut, CompletionSettings(12, 128, FP32, **more), kept, on_done)


# --- draws and stop strings ----------------------------------------------------------------------------


def test_a_draw_depends_on_its_seed_and_example_and_on_nothing_beside_it(model):
    whole = made(model, generation=SAMPLED, draws=3)
    assert len(set(made(model).texts)) > 3  # The compared texts are not all alike.
    assert whole.draws == made(model, generation=SAMPLED, draws=3, batch_size=1).draws
    assert whole.draws == made(model, generation=SAMPLED, draws=3, batch_size=7).draws
    assert whole.texts == made(model, generation=SAMPLED).texts
    assert len({tuple(texts) for texts in whole.draws}) == 3
    assert made(model, generation=replace(SAMPLED, seed=6)).texts != whole.texts
    # Nor on which others are asked, and in which order.
    few = made(model, EXAMPLES[5:2:-1], generation=SAMPLED, draws=2)
    assert few.draws == [texts[5:2:-1] for texts in whole.draws[:2]]
    # It is what generation draws for a row of that number.
    number = draw_number(EXAMPLES[0], 0)
    alone = generate(
        model, BYTES, [EXAMPLES[0].prompt], replace(SAMPLED, max_new_tokens=12), first_row=number
    )
    assert alone[0].text == whole.texts[0]
    assert made(model).more == []


def test_a_text_ends_before_the_first_stop_string(model):
    whole = made(model)
    stops = tuple({text[4:6] for text in whole.texts if len(text) > 6})[:2]
    cut = made(model, generation=GenerationConfig(stop=stops))
    ended = 0
    for text, kept in zip(whole.texts, cut.texts, strict=True):
        ends = [text.find(stop) for stop in stops if stop in text]
        assert kept == text[: min(ends, default=None)]
        ended += bool(ends)
    assert ended > 0
    assert (cut.ran_long or 0) < (whole.ran_long or 0) <= len(EXAMPLES)


def test_scores_of_draws_are_their_mean_with_a_spread():
    wanted = [e.reference for e in EXAMPLES]
    wrong = [f"{text}?" for text in wanted]
    draws = Predictions(wanted, 0, [wrong, wrong, wanted])
    systems = {"model": draws, "empty": Predictions([""] * len(wanted))}
    record = scored(PAIRS, EXAMPLES, systems, ["exact_match", "chrf"])
    found = record["scores"]["model"]["exact_match"]
    assert found["mean"] == pytest.approx(50)
    assert found["spread"] == pytest.approx(57.735, abs=1e-3)  # The draws score 100, 0, 0 and 100.
    assert "spread" not in record["scores"]["empty"]["exact_match"]
    assert record["samples"][2]["more"] == {"model": [wrong[2], wrong[2], wanted[2]]}
    assert f"50.0 ±57.7 [{found['low']:.1f}" in suite_table(record | {"draws": 4})
    assert "4 draws each" in suite_table(record | {"draws": 4})
    saved = json.loads(json.dumps(record))
    assert list(differences(saved)) == []
    saved["samples"][2]["more"]["model"][0] = wanted[2]
    assert any("exact_match" in said for said in differences(saved))


def test_draws_that_all_pass_or_all_fail_keep_the_interval_of_shares():
    texts = [e.reference if e.where % 3 else "" for e in EXAMPLES]
    empty = Predictions(["?"] * len(texts))
    one = scored(PAIRS, EXAMPLES, {"model": Predictions(texts), "empty": empty}, ["exact_match"])
    two = scored(PAIRS, EXAMPLES, {"model": Predictions(texts, 0, [texts]), "empty": empty}, ["exact_match"])
    own = dict(two["scores"]["model"]["exact_match"])
    assert own.pop("spread") == 0
    assert own == one["scores"]["model"]["exact_match"]


# --- memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "full",
    [
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        lambda: MemoryError(),
        None,  # Torch's own error on a CPU.
    ],
)
def test_a_batch_that_memory_has_no_room_for_is_halved_and_predicts_the_same(model, monkeypatch, full):
    whole, sizes = made(model), []
    real = completing.generate_ids

    def narrow(decoder, prompts, *rest):
        most_rows = rest[-2]
        sizes.append(min(most_rows, len(prompts)))
        if sizes[-1] > 2:
            if full is not None:
                raise full()
            torch.empty(2**60)
        return real(decoder, prompts, *rest)

    monkeypatch.setattr(completing, "generate_ids", narrow)
    assert made(model) == whole
    assert sizes == [9, 4, 2]
    assert made(model, batch_size=5) == whole


def test_one_row_that_does_not_fit_and_other_errors_are_raised(model, monkeypatch):
    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(completing, "generate_ids", never)
    with pytest.raises(torch.OutOfMemoryError):
        made(model)

    def wrong(*_):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(completing, "generate_ids", wrong)
    with pytest.raises(RuntimeError, match="shapes"):
        made(model)


def test_rows_at_a_time_follow_the_memory_and_the_length(model, monkeypatch):
    assert free_memory() > 2**20
    shape = ModelConfig(1000, block_size=4096, n_layer=4, n_head=8, n_embd=128)
    with torch.device("meta"):
        large = Decoder(shape)
    large.to_empty(device="cpu")
    cache = 2 * 4 * 128 * 4  # bytes of a token's keys and values
    for free, longest in ((2**30, 1024), (2**30, 4096), (2**26, 64)):
        monkeypatch.setattr(completing, "free_memory", lambda free=free: free)
        rows = rows_at_a_time(large, longest)
        assert rows == 1 or rows * longest * cache <= free // 4
        assert rows <= rows_at_a_time(large, longest // 4) <= completing.MOST_ROWS["cpu"]
    assert rows_at_a_time(large, 10**9) == 1


# --- interruptions -------------------------------------------------------------------------------------


def test_predictions_are_appended_and_a_line_that_was_cut_is_no_prediction(tmp_path: Path):
    kept = Kept(tmp_path / "new", "pairs-model", {"weights": "a"})
    assert kept.read(3, 2) == {}
    kept.add({(0, 0): ("ß\ud800\n", "eos"), (2, 1): ("", "length")})
    with open(kept.path, "ab") as file:
        file.write(b'{"example": 1, "draw": 0, "te')
    again = Kept(tmp_path / "new", "pairs-model", {"weights": "a"})
    assert again.read(3, 2) == {(0, 0): ("ß\ud800\n", "eos"), (2, 1): ("", "length")}
    assert again.reused == 2
    again.add({(1, 0): ("x", "stop")})
    assert again.read(3, 2)[1, 0] == ("x", "stop")
    assert again.read(2, 1) == {(0, 0): ("ß\ud800\n", "eos"), (1, 0): ("x", "stop")}
    kept.path.write_bytes(kept.path.read_bytes() + b'[]\nnull\n{"example": 0, "draw": 0, "text": 3}\n\xff\n')
    assert len(again.read(3, 2)) == 3
    assert Kept(tmp_path / "new", "pairs-model", {"weights": "b"}).read(3, 2) == {}


def test_what_had_ended_when_memory_was_full_is_not_asked_again(model, monkeypatch):
    whole, ended_rows = made(model), []
    real = completing.generate_ids

    def full(decoder, prompts, *rest):
        *others, ended = rest

        def counted(row, result):
            ended(row, result)
            ended_rows.append(row)
            if len(ended_rows) == 5:
                raise MemoryError

        return real(decoder, prompts, *others, on_done=counted)

    monkeypatch.setattr(completing, "generate_ids", full)
    assert made(model) == whole
    assert len(ended_rows) == 9


def interrupting(monkeypatch, after: int) -> list[int]:
    """Ctrl-C as soon as so many texts have ended. What is returned holds a number for each that has."""
    real, ended_rows = completing.generate_ids, []

    def interrupted(decoder, prompts, *rest):
        *others, ended = rest

        def counted(row, result):
            ended(row, result)
            ended_rows.append(row)
            if len(ended_rows) == after:
                raise KeyboardInterrupt

        return real(decoder, prompts, *others, on_done=counted)

    monkeypatch.setattr(completing, "generate_ids", interrupted)
    return ended_rows


def test_killed_equals_uninterrupted_and_only_the_rest_is_asked(model, tmp_path: Path, monkeypatch):
    whole = made(model, generation=SAMPLED, draws=2, batch_size=4)
    ended_rows = interrupting(monkeypatch, 7)

    def kept() -> Kept:
        return Kept(tmp_path, "pairs-model", {"weights": "a"})

    with pytest.raises(KeyboardInterrupt):
        made(model, generation=SAMPLED, draws=2, batch_size=4, kept=kept())
    assert made(model, generation=SAMPLED, draws=2, batch_size=4, kept=kept()) == whole
    assert len(ended_rows) == 18
    assert made(model, generation=SAMPLED, draws=2, kept=kept()) == whole
    assert len(ended_rows) == 18


def test_an_evaluation_goes_on_and_another_setting_or_checkpoint_starts_anew(run, model, monkeypatch, capsys):
    settings = here(run, samples=6, max_new_tokens=8, precision="fp32", batch_size=2, suite="next_line")
    whole = evaluation.evaluate(replace(settings, cache=str(run.parent / "another")))
    ended_rows = interrupting(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        evaluation.write_evaluation(settings)
    assert f"what was predicted is kept in {run.parent / 'cache' / 'predictions'}" in capsys.readouterr().err
    for changed, asked in (
        ({"max_new_tokens": 9}, 6),
        ({"seed": 1}, 6),
        ({"temperature": 0.5}, 6),
        ({"stop": ("=",)}, 6),
        ({"samples": 5}, 5),
        ({"checkpoint": str(run / "checkpoints" / "step-00000007")}, 2),  # the very one, by another name
    ):
        ended_rows[:] = [0] * 4
        evaluation.evaluate(replace(settings, **changed))
        assert len(ended_rows) == 4 + asked, changed
    told = capsys.readouterr().err
    assert "next_line, model: 4 of 6 texts are those of an interrupted evaluation" in told
    assert "next_line, model: 6 texts\n" in told
    result = evaluation.evaluate(settings)
    assert result["suite"] == whole["suite"]
    evaluation.write_results(result, settings)
    assert "kept" not in json.loads((run / "eval.json").read_text("utf-8"))
    ended_rows[:] = [0] * 4
    evaluation.evaluate(settings)  # A finished evaluation is made again.
    assert len(ended_rows) == 4 + 6
    evaluation.evaluate(settings)
    ended_rows[:] = [0] * 4
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.weight[0] += 1
    save_checkpoint(run / "checkpoints", 8, other, {}, 1.0, keep=False)
    evaluation.evaluate(settings)
    assert len(ended_rows) == 4 + 6


@pytest.mark.slow
def test_killed_by_the_system_equals_uninterrupted(run):
    """The real command, killed as soon as some predictions are on the disk."""
    words = ("--samples", "40", "--max_new_tokens", "24", "--precision", "fp32", "--batch_size", "2")

    def command(cache: str) -> list[str]:
        return [
            sys.executable,
            "eval.py",
            "--checkpoint",
            str(run),
            "--cache",
            str(run.parent / cache),
            *words,
        ]

    done = subprocess.run(command("one"), cwd=REPOSITORY, capture_output=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    whole = json.loads((run / "eval.json").read_text("utf-8"))
    process = subprocess.Popen(
        command("two"), cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    predictions = run.parent / "two" / "predictions"
    while process.poll() is None and not list(predictions.glob("eval-*.jsonl")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run(
        command("two"), cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False
    )
    assert "of an interrupted evaluation" in done.stderr
    again = json.loads((run / "eval.json").read_text("utf-8"))
    for one in (whole, again):
        del one["command"], one["settings"]
    assert again == whole
