"""The closing lines of a run: whether it memorised, what to change first, and how to complete a prompt.

    print("\\n".join(closing_lines(folder, config.lora.r > 0, "--prompt 'def main():'")))

The verdict is read from the run's metrics.jsonl. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from config.console import command_of, for_shell

RECENT = 0.1  # The share of the logged steps whose mean loss stands for the end of the run.
ROSE = 0.02  # Nats by which validation must have risen since its best to count as risen.
# The ratio of validation loss to training loss from which a run that has read its data twice memorises.
APART = 1.25
STILL_FALLS = 0.01  # The share by which validation fell over the last fifth of a run that should be longer.
LONGEST = 200  # Characters of the longest prompt that is shown in a command.


def closing_lines(folder: Path, adapted: bool, flags: str) -> list[str]:
    """Return the two closing lines of a run.

    Args:
        folder: The run's folder, with its metrics.jsonl.
        adapted: Whether adapters trained, whose settings have other names.
        flags: The flags of a prompt, as `flags_of` returns them.
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    run = for_shell(str(folder))
    return [
        f"verdict      {verdict(rows, run, adapted)}",
        f"complete     {command_of('generate.py')} --run {run} {flags}",
    ]


def verdict(rows: Sequence[Mapping[str, float]], run: str, adapted: bool) -> str:
    """Compare training and validation loss in one sentence, and say what to change first.

    Args:
        rows: The logged values, a mapping of tags for each step.
        run: The folder, quoted for a shell.
        adapted: Whether adapters trained.
    """
    trained = [row for row in rows if "train/loss" in row]
    validated = [(int(row["step"]), row["eval/loss"]) for row in rows if "eval/loss" in row]
    if not trained or not validated:
        return "nothing was logged to judge by"
    recent = trained[-max(1, round(RECENT * len(trained))) :]
    train = sum(row["train/loss"] for row in recent) / len(recent)
    epochs, (last, held_out) = trained[-1]["train/epoch"], validated[-1]
    best_step, best = min(validated, key=lambda pair: pair[1])
    facts = f"training loss {train:.2f} against validation {held_out:.2f} after {epochs:.1f} epochs"
    dropout = "--lora.dropout 0.1" if adapted else "--model.dropout 0.1"
    if held_out > best + ROSE:
        return (
            f"{facts}: memorising, validation was best at step {best_step:,} ({best:.2f}); change first: "
            f"more data, else {dropout} or --patience 3"
        )
    if epochs > 2 and held_out > APART * train:
        return f"{facts}: memorising; change first: more data, else {dropout} or fewer epochs"
    before = [loss for step, loss in validated if step <= 0.8 * last]
    if not before:
        often = max(1, last // 10)
        return f"{facts}: not memorising; to see whether it still improves: --validate_every {often}"
    if before[-1] > (1 + STILL_FALLS) * held_out:
        longer = f"--resume --run {run} and a larger budget"
        return f"{facts}: not memorising, and validation still falls; change first: train longer ({longer})"
    larger = "--lora.r" if adapted else "--model.n_layer and --model.n_embd"
    return f"{facts}: not memorising, and validation has levelled off; change first: more data, or {larger}"


def shown_examples(record: Mapping[str, Any], n: int) -> str:
    """Return prompt, completion and reference of `n` of a suite's examples, spread evenly over them."""
    samples = record["samples"]
    n = min(n, len(samples))
    chosen = [samples[i * len(samples) // n] for i in range(n)]
    return "\n".join(
        f"--- {sample['name']}\n{sample['prompt']}\n--- the model goes on\n{sample['predictions']['model']}\n"
        f"--- the example goes on\n{sample['reference']}\n"
        for sample in chosen
    )


def flags_of(samples: Sequence[Mapping[str, Any]], chat: bool = False) -> str:
    """Return flags of `generate.py` for the sample with the shortest prompt; a file where that is long.

    Args:
        chat: The samples are of conversations, whose prompts were written by a template.
    """
    if chat:
        return "--chat --prompt_file FILE"
    shortest = min(samples, key=lambda sample: len(sample["prompt"]), default=None)
    if shortest is None or len(shortest["prompt"]) > LONGEST:
        return "--prompt_file FILE"
    suffix = f" --suffix {for_shell(shortest['suffix'])}" if shortest.get("suffix") is not None else ""
    return f"--prompt {for_shell(shortest['prompt'])}{suffix}"
