"""Sampled texts of a run and its base for the examples of a scored suite, each by the same seed."""

from __future__ import annotations

from typing import Any

from generate import GenerationConfig, generate, prompt_ids, trim_prompt
from lora import adapters_disabled
from runmodel import Run


def sampled(
    run: Run, suite: dict[str, Any], temperature: float, top_p: float, seed: int, batch_size: int = 16
) -> dict[str, list[str]]:
    """`base` and `model` -> one text for each sample of a suite's record, with its limit of new tokens."""
    length = run.config.row_length
    room = length - suite["max_new_tokens"]
    for sample in suite["samples"]:
        ids = prompt_ids(run.tokenizer, sample["prompt"])
        assert trim_prompt(ids, room, run.tokenizer.start_id) == ids, "longest() keeps prompts short enough"
    settings = GenerationConfig(suite["max_new_tokens"], temperature=temperature, top_p=top_p, seed=seed)
    prompts = [sample["prompt"] for sample in suite["samples"]]

    def texts() -> list[str]:
        return [
            completion.text
            for start in range(0, len(prompts), batch_size)
            for completion in generate(
                run.model, run.tokenizer, prompts[start : start + batch_size], settings, first_row=start
            )
        ]

    own = texts()
    with adapters_disabled(run.model):
        return {"base": texts(), "model": own}
