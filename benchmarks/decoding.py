"""Compare greedy decoding with transformers' `generate`: tokens a second of both, with the same weights.

    python benchmarks/decoding.py [--turns 5] [--formats bfloat16 int8] [--rows 1 8] [--limit]

The shape is that of a StarCoder of 117M parameters: 12 layers x 768, multi-query, a vocabulary of 49,152.
transformers samples and writes the weights once, and both read that folder. They take turns in one process
with the same threads; each turn continues the same prompts of 64 tokens by `--new` greedy tokens. In fp32 all
tokens have to agree. The output has medians over the turns, with the range of the ratio; the column after it
compares the fastest tenth of all single steps, which other processes disturb least.

On a machine that others use too, `--processor` counts the processor's seconds, of one thread.

With `int8`, `int4` and `nf4` ours holds its matrices so, and transformers computes in bf16.

In bf16 two texts differ for good after the first token where they round differently, which comes soon with
random weights, so the number of equal tokens means little. With `--gap` both read the same text, ours in
fp32, token by token through their caches, and the last columns tell how far their logits are from those of
fp32: the root of the mean square over the standard deviation of the logits of a step, and how often the
likeliest token is that of fp32.

`--limit` also prints, at one row, the time of each side's step beside its lower bounds: the bytes of all
weights over the rate at which all threads together read memory (sums of chunks that fit no cache), and the
step's matrix products alone, one after another, as each side computes them. What remains is what all layers
cost beside their products. The fastest-tenth step of transformers over our products is the ratio if that took
no time.

llama.cpp on the same shape, with random weights: write a GGUF with its `gguf` package (architecture
`starcoder`, the sizes of SHAPE), `llama-quantize` it to Q8_0 and Q4_0, and run `llama-bench -t 2 -p 0 -n 128`
on each, in turns with this benchmark.

docs/figures.md has figures, with their machine.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoModelForCausalLM, GPTBigCodeConfig
from transformers.utils import logging

from architecture import Decoder
from generation.engine import generate_ids
from generation.kvcache import KVCache
from generation.settings import GenerationConfig
from modules.linear import Linear
from modules.products import MeasuredProducts, speed_up
from modules.quantized_linear import KINDS, hold
from pretrained import load_pretrained

PROMPT, NEW = 64, 128
CLOCK = time.perf_counter
SHAPE = GPTBigCodeConfig(
    vocab_size=49_152,
    n_positions=8_192,
    n_embd=768,
    n_layer=12,
    n_head=12,
    n_inner=3_072,
    activation_function="gelu_pytorch_tanh",
    multi_query=True,
    bos_token_id=None,
    eos_token_id=None,
)


def timed(function: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    """Return a function's seconds and its result."""
    started = CLOCK()
    result = function()
    return CLOCK() - started, result


class Steps:
    """A clock of the seconds between a module's calls: the steps of decoding, without the prompt's."""

    def __init__(self, module: torch.nn.Module):
        self.seconds: list[float] = []
        self.started: list[float] = []
        module.register_forward_pre_hook(lambda *_: self.started.append(CLOCK()))

    def end(self) -> None:
        """End a text, so that the time until the next one is not counted."""
        self.seconds += [b - a for a, b in pairwise(self.started[1:])]
        self.started.clear()

    def quiet(self) -> float:
        """Return the slowest time of the fastest tenth."""
        return sorted(self.seconds)[len(self.seconds) // 10]


def fastest(actions: list[Callable[[], object]], turns: int) -> float:
    """Return the sum of each action's fastest time in several turns, since other processes only add to it."""
    best = [math.inf] * len(actions)
    for _ in range(turns):
        for i, action in enumerate(actions):
            started = CLOCK()
            action()
            best[i] = min(best[i], CLOCK() - started)
    return sum(best)


def print_limit(model: Decoder, steps: tuple[float, float], theirs: Decoder, turns: int = 60) -> None:
    """Print lower bounds of a step of one row beside `steps`, the seconds of transformers and of ours.

    Args:
        model: Ours, whose products have been chosen.
        theirs: The same in the dtype of transformers, whose products are `F.linear`'s.
    """
    held = model.head.weight if isinstance(model.head, Linear) else None
    looked_up = [model.position, None if held is model.embed.weight else model.embed]  # a row of each is read
    aside = {id(p) for m in looked_up if m is not None for p in m.parameters()}
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    read = sum(t.nbytes for key, t in tensors.items() if key not in aside)

    def products(model: Decoder, plain: bool) -> list[Callable[[], object]]:
        linears = [m for m in model.modules() if isinstance(m, MeasuredProducts)]
        inputs = [torch.randn(1, m.in_features).to(model.embed.weight.dtype) for m in linears]
        return [partial(m.plain if plain else m, x) for m, x in zip(linears, inputs, strict=True)]

    chunks = torch.ones(2**26, dtype=torch.int64).chunk(32)  # 16 MiB each, of 512 MiB
    with torch.inference_mode():
        rate = 2**29 / fastest([chunk.sum for chunk in chunks], turns)
        alone = fastest(products(theirs, plain=True), turns), fastest(products(model, plain=False), turns)
    at_least = read / rate
    print(f"  a step reads {read / 1e6:,.0f} MB; memory gives {rate / 1e9:.1f} GB/s: {at_least * 1e3:.1f} ms")
    for side, step, seconds in zip(("transformers", "ours"), steps, alone, strict=True):
        print(
            f"  {side}: a quiet step {step * 1e3:.1f} ms, its products alone {seconds * 1e3:.1f} ms, "
            f"all else {(step - seconds) * 1e3:.1f} ms"
        )
    print(
        f"  memory's share of our step {at_least / steps[1]:.0%}; at most {steps[0] / alone[1]:.2f} times "
        f"transformers with these products, {steps[0] / at_least:.2f} times at the speed of memory",
        flush=True,
    )


def gaps(
    logits: Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]], texts: torch.Tensor, exact: torch.Tensor
) -> tuple[float, float]:
    """Return the distance of logits from `exact` (rows, NEW, V), and how often the likeliest token is equal.

    Args:
        logits: Function of tokens (rows, T) and a cache that returns logits (rows, V) after the last token,
            and the cache.
        texts: Tokens (rows, PROMPT + NEW); every token after the prompt is read in a step of its own.
        exact: The logits of fp32.
    """
    found, state = [], None
    for start, stop in pairwise([0, *range(PROMPT, PROMPT + NEW)]):
        step, state = logits(texts[:, start:stop], state)
        found.append(step.float())
    found = torch.stack(found, dim=1)
    gap = (found - exact).square().mean().sqrt() / exact.std(dim=-1).mean()
    return gap.item(), (found.argmax(-1) == exact.argmax(-1)).float().mean().item()


def prompt_ids(rows: int) -> torch.Tensor:
    """Return random prompts, (rows, PROMPT)."""
    return torch.randint(30_000, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))


def by_transformers(model: Any, prompts: torch.Tensor) -> list[list[int]]:
    """Return the greedy continuations of prompts (rows, PROMPT)."""
    with torch.inference_mode():
        ids = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    return ids[:, PROMPT:].tolist()


def by_ours(model: Decoder, prompts: torch.Tensor) -> list[list[int]]:
    """Return the greedy continuations of prompts (rows, PROMPT)."""
    settings = GenerationConfig(max_new_tokens=NEW)
    return [result.ids for result in generate_ids(model, prompts.tolist(), settings)]


def distances(folder: str, theirs: Any, ours: Decoder, prompts: torch.Tensor) -> str:
    """Return how far both are from fp32 on one text, as columns of the table."""

    def their_logits(tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        found = theirs(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return found.logits[:, -1], found.past_key_values

    def our_logits(tokens: torch.Tensor, cache: KVCache | None) -> tuple[torch.Tensor, KVCache]:
        cache = cache or KVCache(ours.config.n_layer, PROMPT + NEW)
        return ours.head(ours.hidden(tokens, cache=cache)[:, -1]), cache

    exact = load_pretrained(folder, torch.float32).model
    texts = torch.cat((prompts, torch.tensor(by_ours(exact, prompts))), dim=1)
    with torch.inference_mode():
        reference = exact.head(exact.hidden(texts[:, :-1])[:, PROMPT - 1 :])
        found = [gaps(side, texts, reference) for side in (their_logits, our_logits)]
    return f"{found[0][0]:.4f}, {found[1][0]:.4f} | {found[0][1]:.1%}, {found[1][1]:.1%}"


def compare(folder: str, format: str, rows: int, asked: argparse.Namespace) -> None:
    """Print the row of the table for one format and number of rows."""
    dtype = torch.float32 if format == "float32" else torch.bfloat16
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    held = format if format in KINDS else None
    ours = load_pretrained(folder, dtype, weight_format=held).model
    if held is not None:
        hold(ours, held)
    speed_up(ours)
    prompts = prompt_ids(rows)
    them, we = partial(by_transformers, theirs, prompts), partial(by_ours, ours, prompts)
    (_, expected), (_, actual) = timed(them), timed(we)  # this also warms up both
    sides = Steps(theirs.get_input_embeddings()), Steps(ours.embed)
    times = []
    for _ in range(asked.turns):
        times.append((timed(them)[0], timed(we)[0]))
        for side in sides:
            side.end()
    quiet = sides[0].quiet() / sides[1].quiet()
    pairs = zip(chain(*expected), chain(*actual), strict=True)
    equal = sum(x == y for x, y in pairs) / (rows * NEW)
    if dtype == torch.float32 and equal < 1:
        sys.exit(f"error: in fp32 {1 - equal:.1%} of the tokens differ from transformers'")
    ratios = sorted(a / b for a, b in times)
    speeds = [rows * NEW / median(side) for side in zip(*times, strict=True)]
    gap = distances(folder, theirs, ours, prompts) if asked.gap and dtype != torch.float32 else " | "
    print(
        f"| {format} | {rows} | {speeds[0]:.1f} | {speeds[1]:.1f} | {median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}) | {quiet:.2f} | {equal:.1%} | {gap} |",
        flush=True,
    )
    if asked.limit and rows == 1:
        plain = load_pretrained(folder, dtype).model
        print_limit(ours, (sides[0].quiet(), sides[1].quiet()), plain)


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(asked.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(SHAPE).save_pretrained(folder)
        print(
            "| format | rows | transformers, tokens/s | ours, tokens/s | ratio (range) "
            "| of quiet steps | equal tokens | gap to fp32, theirs, ours | its tokens |"
        )
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        for format in asked.formats:
            for rows in asked.rows:
                compare(folder, format, rows, asked)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new", type=int, default=NEW)
    formats = ["float32", "bfloat16", "int8", "int4", "nf4"]
    parser.add_argument("--formats", nargs="+", choices=formats, default=formats)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--limit", action="store_true")
    parser.add_argument("--gap", action="store_true")
    parser.add_argument("--processor", action="store_true")
    arguments = parser.parse_args()
    NEW = arguments.new
    if arguments.processor:
        CLOCK, arguments.threads = time.process_time, 1
    main(arguments)
