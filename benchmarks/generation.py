"""Our batch of unequal prompts beside transformers' `generate`: tokens a second of both, same weights.

    python benchmarks/generation.py [--turns 3] [--rows 32] [--new 64] [--layers 12] [--width 768]

This is how evaluation generates: prompts of 16 to 256 tokens in one batch, padded on the left. Both sides
continue the same prompts greedily, in turns in one process with the same threads, over weights that
transformers drew and wrote in the shape of a StarCoder (multi-query, a vocabulary of 49,152). Two cases:

- `all run long`: no row ends before the limit, so that both compute the same number of tokens;
- `rows end apart`: each row ends at a length of its own, drawn between an eighth of the limit and all of it,
  as completions do. Ours leaves a row that has ended out of the batch; transformers goes on padding it.

Only tokens before a row's end are counted, and in fp32 all of them have to agree. Medians over the turns with
the range of the ratio.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPTBigCodeConfig, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from decoding import generate_ids
from generate import GenerationConfig
from pretrained import load_pretrained


class EndsAt(StoppingCriteria):
    """Each row has ended once it holds its own number of new tokens."""

    def __init__(self, prompt_length: int, limits: list[int]):
        self.prompt_length, self.limits = prompt_length, torch.tensor(limits)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return input_ids.size(1) - self.prompt_length >= self.limits


def timed(function: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shape = GPTBigCodeConfig(
        vocab_size=49_152,
        n_positions=2_048,
        n_embd=arguments.width,
        n_layer=arguments.layers,
        n_head=arguments.width // 64,
        n_inner=4 * arguments.width,
        activation_function="gelu_pytorch_tanh",
        multi_query=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    draw = np.random.Generator(np.random.PCG64(0))
    lengths = draw.integers(16, 257, arguments.rows)
    prompts = [draw.integers(1, 30_000, n).tolist() for n in lengths]
    limits = draw.integers(arguments.new // 8, arguments.new + 1, arguments.rows).tolist()
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ours = load_pretrained(folder, torch.float32).model
        size = sum(parameter.numel() for parameter in ours.parameters()) / 1e6
        print(
            f"{size:.0f}M parameters in fp32, {arguments.rows} rows of {min(lengths)} to {longest} tokens, "
            f"{arguments.new} new ones, {arguments.threads} threads; load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        print(
            "| case | transformers, tokens/s | ours, tokens/s | ratio (range) |\n|---|---|---|---|",
            flush=True,
        )
        for case in ("all run long", "rows end apart"):
            ends = [arguments.new] * arguments.rows if case == "all run long" else limits

            def them(ends: list[int] = ends) -> list[list[int]]:
                with torch.inference_mode():
                    ids = theirs.generate(
                        padded,
                        attention_mask=mask,
                        max_new_tokens=arguments.new,
                        do_sample=False,
                        pad_token_id=0,
                        eos_token_id=None,
                        stopping_criteria=StoppingCriteriaList([EndsAt(longest, ends)]),
                    )
                return [row[:end] for row, end in zip(ids[:, longest:].tolist(), ends, strict=True)]

            def we(ends: list[int] = ends) -> list[list[int]]:
                settings = GenerationConfig(max_new_tokens=arguments.new)
                found = generate_ids(ours, prompts, settings, stopped=lambda row, ids: len(ids) >= ends[row])
                return [result.ids for result in found]

            (_, expected), (_, actual) = timed(them), timed(we)  # which also warms up
            if expected != actual:
                sys.exit(f"error: {case}: the tokens differ from transformers'")
            times = [(timed(them)[0], timed(we)[0]) for _ in range(arguments.turns)]
            ratios = sorted(a / b for a, b in times)
            speeds = [sum(ends) / median(side) for side in zip(*times, strict=True)]
            shown = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(f"| {case} | {speeds[0]:.1f} | {speeds[1]:.1f} | {shown} |", flush=True)
        print(f"load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = {"turns": 3, "rows": 32, "new": 64, "threads": 2, "layers": 12, "width": 768}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    main(parser.parse_args())
