"""Several processes share an evaluation: numbers and texts are those of one, and the first writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ranks import changed, on_ranks, shared, small_run

import eval as command
from config import one_sentence
from suites import completing, evaluate
from suites.kept import Kept
from suites.settings import EvalConfig
from training.begin import train
from training.command import run_to_its_end

pytestmark = pytest.mark.usefixtures("unguarded")

# What differs between two evaluations of one run, whoever makes them.
OF_THE_CALL = ("command", "settings", "kept")


def evaluated(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "eval.json").read_text("utf-8"))
    return {key: value for key, value in found.items() if key not in OF_THE_CALL}


def assert_alike(found: Any, expected: Any) -> None:
    """Texts and counts are equal, and sums but for the order in which numbers are added."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_alike(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-12)
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("size", "more"),
    [
        (2, {}),
        (3, {"temperature": 0.8, "samples_per_example": 2, "suite": "pairs"}),
        (4, {"samples": 2, "suite": "pairs", "batch_size": 64}),  # There is work for two of them.
    ],
)
def test_an_evaluation_is_that_of_one_process(tmp_path: Path, size: int, more: dict[str, Any]) -> None:
    config = small_run(tmp_path)
    run = train(config).folder
    settings = EvalConfig(str(run), device="cpu", precision="fp32", batch_size=2, max_new_tokens=8)
    settings = replace(settings, cache=config.data.cache)
    settings = replace(settings, **more)
    evaluate.write_evaluation(replace(settings, out=str(tmp_path / "one")))
    of_some = replace(settings, out=str(tmp_path / "some"))
    ended = on_ranks(size, shared(lambda world: evaluate.write_evaluation(of_some, world)), tmp_path)
    assert [end.code for end in ended] == [0] * size, ended
    assert not any(end.out or end.err for end in ended[1:])
    assert "written to" in ended[0].out
    assert_alike(evaluated(tmp_path / "some"), evaluated(tmp_path / "one"))
    assert not [*Path(config.data.cache, "predictions").glob("*")], "predictions that were kept are removed"


def test_a_run_of_several_processes_ends_with_the_scores_of_one(tmp_path: Path) -> None:
    config = changed(small_run(tmp_path), samples=0)
    ended = on_ranks(2, lambda: run_to_its_end(config), tmp_path)
    assert [end.code for end in ended] == [0, 0], ended
    assert not ended[1].out and "best checkpoint, step" in ended[0].out
    run = Path(config.train.run)
    expected = evaluate.evaluate(
        EvalConfig(
            str(run), device="cpu", precision="fp32", source=config.data.source, cache=config.data.cache
        )
    )
    found = evaluated(run)
    for key in ("model", "documents", "n-gram", "suite"):
        assert_alike(found[key], json.loads(json.dumps(expected[key])))


def test_each_text_is_made_by_one_process_and_what_was_kept_by_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation that was interrupted goes on from what the first process finds on its disk."""
    config = small_run(tmp_path)
    run = train(config).folder
    settings = EvalConfig(
        str(run), device="cpu", precision="fp32", suite="pairs", cache=config.data.cache, max_new_tokens=4
    )
    evaluate.write_evaluation(replace(settings, out=str(tmp_path / "one")))
    made = [[sample["predictions"]["model"]] for sample in evaluated(tmp_path / "one")["suite"]["samples"]]
    real = completing.generate_ids
    reads = Kept.read

    def noted(model: Any, prompts: Any, *others: Any, **named: Any) -> Any:
        with open(tmp_path / f"made-{os.environ['RANK']}", "a", encoding="utf-8") as file:
            file.write("x\n" * len(prompts))
        return real(model, prompts, *others, **named)

    def first_three(kept: Kept, n_examples: int, draws: int) -> Any:
        assert os.environ["RANK"] == "0"
        return reads(kept, n_examples, draws) | {(i, 0): (made[i][0], "eos") for i in range(3)}

    monkeypatch.setattr(completing, "generate_ids", noted)
    monkeypatch.setattr(Kept, "read", first_three)
    of_two = replace(settings, out=str(tmp_path / "two"))
    ended = on_ranks(2, shared(lambda world: evaluate.write_evaluation(of_two, world)), tmp_path)
    assert [end.code for end in ended] == [0, 0], ended
    counts = [len((tmp_path / f"made-{rank}").read_text().split()) for rank in (0, 1)]
    assert sum(counts) == len(made) - 3 and abs(counts[0] - counts[1]) <= 2, counts
    found = [sample["predictions"]["model"] for sample in evaluated(tmp_path / "two")["suite"]["samples"]]
    assert [[text] for text in found] == made


def words(*given: str) -> Callable[[], None]:
    return lambda: command.main(list(given))


def test_a_mistake_is_said_once_and_what_one_process_does_is_refused(tmp_path: Path) -> None:
    cases = {
        ("--checkpoint", str(tmp_path / "nope")): "nope",
        ("--rescore", "x.json"): "torchrun started 2 processes, and this is a command of one",
        ("--compare", "a", "b"): "torchrun started 2 processes, and this is a command of one",
    }
    for number, (given, said) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()

        def call(given: tuple[str, ...] = given) -> None:
            with one_sentence(shares=True):
                command.main([*given])

        ended = on_ranks(2, call, folder)
        assert {end.code for end in ended} == {2}, ended
        told = [line for end in ended for line in end.err.splitlines()]
        assert len(told) == 1 and said in told[0], ended


def test_a_pipe_is_read_by_one_process(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    settings = EvalConfig(None, model="x", suite="examples", suite_file=str(tmp_path / "pipe"), device="cpu")

    def call(world: Any) -> None:
        with pytest.raises(ValueError, match="a pipe can be read by one process alone"):
            evaluate.evaluate(settings, world=world)

    assert {end.code for end in on_ranks(2, shared(call), tmp_path)} == {0}
