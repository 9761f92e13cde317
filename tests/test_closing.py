"""The last lines of a run: each verdict from curves that ask for it, and a command that works."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from config.console import command_of, for_shell, printable
from suites.closing import closing_lines, flags_of, shown_examples, verdict


def curves(train: list[float], held_out: list[float], epochs: float) -> list[dict[str, float]]:
    """Rows of a run of 100 steps: training losses and validation losses, both evenly spread."""
    rows = []
    for losses, tag in ((train, "train/loss"), (held_out, "eval/loss")):
        for number, loss in enumerate(losses, 1):
            step = 100 * number // len(losses)
            epoch = {"train/epoch": epochs * step / 100} if tag == "train/loss" else {}
            rows.append({"step": step, tag: loss, **epoch})
    return rows


@pytest.mark.parametrize("name", ["a b", "it's", "\x1b[2J", "a'\\\x07é日\u202e", "\udcff", "new\nline\x01"])
def test_a_command_with_any_name_in_it_is_printed_safely_and_means_the_name(name):
    word = for_shell(name)
    assert printable(word) == word
    if shutil.which("bash"):
        said = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True).stdout
        assert said == name.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            curves([5, 3, 1.3], [4, 2.9, 2.8], 3.5),
            "loss 1.30 against validation 2.80 after 3.5 epochs: memorising",
        ),
        (curves([5, 3, 1.3], [4, 2.6, 2.8], 1.5), "best at step 66 (2.60); change first: more data"),
        (curves([5, 3, 2.5], [4, 3, 2.8, 2.6, 2.5], 3.5), "validation still falls; change first: train"),
        (curves([5, 2, 1.3], [4, 3, 2.9, 2.8], 1.5), "not memorising, and validation still falls"),
        (curves([5, 3, 2.5], [4, 2.51, 2.5, 2.5, 2.5], 3.5), "levelled off; change first: more data, or --m"),
        (
            curves([5, 3, 2.5], [2.5], 0.5),
            "not memorising; to see whether it still improves: --validate_every 10",
        ),
        (curves([5, 3, 1.3], [2.8], 3.5), "after 3.5 epochs: memorising; change first: more data"),
        ([{"step": 1, "train/loss": 3.0, "train/epoch": 0.1}], "nothing was logged"),
    ],
)
def test_the_verdict_follows_from_the_curves(rows: list[dict[str, float]], says: str) -> None:
    assert says in verdict(rows, "runs/x", adapted=False)


def test_of_adapters_their_own_settings_are_named() -> None:
    memorising = verdict(curves([5, 3, 1.3], [4, 2.9, 2.8], 3.5), "r", adapted=True)
    assert "--lora.dropout 0.1" in memorising and "--model" not in memorising


def test_the_command_asks_for_the_shortest_prompt_as_a_shell_reads_it(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in curves([3, 2], [3, 2], 1)))
    samples = [{"prompt": "x" * 150}, {"prompt": "it's\n", "suffix": "b c"}]
    line = closing_lines(folder, False, flags_of(samples))[-1]
    words = ["complete", *shlex.split(command_of("generate.py")), "--run", str(folder)]
    assert shlex.split(line) == [*words, "--prompt", "it's\n", "--suffix", "b c"]
    assert flags_of([{"prompt": "x" * 201}]) == "--prompt_file FILE"
    assert flags_of([]) == "--prompt_file FILE"


def test_three_of_the_users_own_examples_are_shown() -> None:
    samples = [
        {"name": f"n{i}", "prompt": f"p{i}", "predictions": {"model": f"m{i}"}, "reference": f"r{i}"}
        for i in range(7)
    ]
    shown = shown_examples({"samples": samples}, 3)
    assert [line for line in shown.splitlines() if line[:1] == "m"] == ["m0", "m2", "m4"]
    assert shown.startswith("--- n0\np0\n--- the model goes on\nm0\n--- the example goes on\nr0\n")
    fewer = shown_examples({"samples": samples[:2]}, 3)
    assert [line for line in fewer.splitlines() if line[:1] == "m"] == ["m0", "m1"]
