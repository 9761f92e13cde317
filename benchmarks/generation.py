"""Compare batches of unequal prompts with transformers' `generate`: tokens a second of both, same weights.

    python benchmarks/generation.py [--turns 3] [--rows 32] [--new 64] [--layers 12] [--width 768]

This is how evaluation generates: prompts of unequal length in one batch, padded on the left. Both sides
continue the same prompts greedily, in turns in one process with the same threads, over weights that
transformers sampled and wrote in the shape of a StarCoder (multi-query, a vocabulary of 49,152). Four cases:

- `functions`: the lengths of code. A prompt is as long as signature and docstring of a function of the
  standard library, and its row ends after as many tokens as its body has, at three characters a token, or at
  four times `--new`;
- `rows end apart`: prompts of 16 to 256 tokens, uniformly distributed, and rows that end anywhere between an
  eighth of the limit and all of it;
- `all run long`: the same prompts, and no row ends before the limit;
- `a suite`: four times as many functions, in the order of an evaluation: `--rows` at a time, long prompts
  first, so that a batch of transformers' has prompts of similar length.

Ours does not compute most of the prompts' padding, and replaces a row that has ended by one that waits;
transformers computes the padding, and goes on with ended rows. `at best` is the possible gain: the tokens of
transformers' rectangles over the requested ones. Only tokens before a row's end are counted, and in fp32 all
of them have to agree. The output has medians over the turns, and the range of the ratio. docs/generate.md has
figures, with their machine.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPTBigCodeConfig, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from architecture import Decoder
from generation.engine import generate_ids
from generation.settings import GenerationConfig
from pretrained import load_pretrained


class EndsAt(StoppingCriteria):
    """A stopping criterion by which each row ends at its own number of new tokens."""

    def __init__(self, prompt_length: int, limits: list[int]):
        self.prompt_length, self.limits = prompt_length, torch.tensor(limits)

    def __call__(self, input_ids, scores, **_):
        return input_ids.size(1) - self.prompt_length >= self.limits


def timed(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def functions(n: int, most: int) -> tuple[list[int], list[int]]:
    """Return the tokens of n prompts (signature and docstring) and of their bodies, of library functions."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text("utf-8")
        lines = text.split("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
                first, start, end = node.lineno - 1, node.body[0].end_lineno, node.end_lineno
                sides = "\n".join(lines[first:start]), "\n".join(lines[start:end])
                found.append(tuple(max(1, len(side) // 3) for side in sides))
    drawn = random.Random(0).sample(found, n)
    return [prompt for prompt, _ in drawn], [min(most, body) for _, body in drawn]


def in_turns(
    theirs: Any, ours: Decoder, prompts: list[list[int]], ends: list[int], rows: int, turns: int
) -> list[tuple[float, float]]:
    """Return the seconds of transformers and of ours, in turns after a warm-up; none if the tokens differ."""

    def batch(prompts: list[list[int]], ends: list[int]) -> list[list[int]]:
        longest, last = max(map(len, prompts)), max(ends)
        ids = theirs.generate(
            torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts]),
            attention_mask=torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]),
            max_new_tokens=last,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            stopping_criteria=StoppingCriteriaList([EndsAt(longest, ends)]),
        )
        return [row[:end] for row, end in zip(ids[:, longest:].tolist(), ends, strict=True)]

    def them() -> list[list[int]]:
        found = []
        with torch.inference_mode():
            for first in range(0, len(prompts), rows):
                found += batch(prompts[first : first + rows], ends[first : first + rows])
        return found

    def we() -> list[list[int]]:
        settings = GenerationConfig(max_new_tokens=max(ends))
        stopped = lambda row, ids: len(ids) >= ends[row]  # noqa: E731
        return [one.ids for one in generate_ids(ours, prompts, settings, stopped=stopped, most_rows=rows)]

    if them() != we():
        return []
    return [(timed(them), timed(we)) for _ in range(turns)]


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
    lengths = draw.integers(16, 257, arguments.rows).tolist()
    apart = draw.integers(arguments.new // 8, arguments.new + 1, arguments.rows).tolist()
    cases = {
        "functions": functions(arguments.rows, 4 * arguments.new),
        "rows end apart": (lengths, apart),
        "all run long": (lengths, [arguments.new] * arguments.rows),
    }
    suite = sorted(zip(*functions(4 * arguments.rows, 4 * arguments.new), strict=True), reverse=True)
    cases["a suite"] = [prompt for prompt, _ in suite], [end for _, end in suite]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ours = load_pretrained(folder, torch.float32).model
        size = sum(parameter.numel() for parameter in ours.parameters()) / 1e6
        print(
            f"{size:.0f}M parameters in fp32, {arguments.rows} rows, {arguments.threads} threads; "
            f"load {os.getloadavg()[0]:.1f}\n\n"
            "| case | prompts | new | transformers, tokens/s | ours, tokens/s | ratio (range) | at best |\n"
            "|---|---|---|---|---|---|---|",
            flush=True,
        )
        for case in arguments.cases.split(",") if arguments.cases else cases:
            lengths, ends = cases[case]
            prompts = [draw.integers(1, 30_000, n).tolist() for n in lengths]
            times = in_turns(theirs, ours, prompts, ends, arguments.rows, arguments.turns)
            if not times:
                sys.exit(f"error: {case}: the tokens differ from transformers'")
            ratios = sorted(a / b for a, b in times)
            speeds = [sum(ends) / median(side) for side in zip(*times, strict=True)]
            shown = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            computed = 0
            for first in range(0, len(ends), arguments.rows):
                batch = slice(first, first + arguments.rows)
                computed += len(ends[batch]) * (max(lengths[batch]) + max(ends[batch]))
            at_best = computed / (sum(lengths) + sum(ends))
            print(
                f"| {case} | {min(lengths)} to {max(lengths)} | {min(ends)} to {max(ends)} | "
                f"{speeds[0]:.1f} | {speeds[1]:.1f} | {shown} | {at_best:.2f} |",
                flush=True,
            )
        print(f"load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = {"turns": 3, "rows": 32, "new": 64, "threads": 2, "layers": 12, "width": 768}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cases", default="", help="between commas")
    main(parser.parse_args())
