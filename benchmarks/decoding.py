"""Compare greedy decoding with transformers' `generate`: tokens a second of both, with the same weights.

    python benchmarks/decoding.py [--turns 5] [--dtypes float32] [--rows 1 8] [--limit]

The shape is that of a StarCoder of 117M parameters: 12 layers x 768, multi-query, a vocabulary of 49,152.
transformers samples and writes the weights once, and both read that folder. They take turns in one process
with the same threads; each turn continues the same prompts of 64 tokens by 128 greedy tokens. In fp32 all
tokens have to agree. The output has medians over the turns, with the range of the ratio; the column after it
compares the fastest tenth of all single steps, which other processes disturb least.

In bf16 two texts differ for good after the first token where they round differently, which comes soon with
random weights, so the number of equal tokens means little. Instead both read the same text, ours in fp32,
token by token through their caches, and the last columns tell how far their logits are from those of fp32:
the root of the mean square over the standard deviation of the logits of a step, and how often the likeliest
token is that of fp32.

`--limit` also prints, at one row, the time of each side's step beside its lower bounds: the bytes of all
weights over the rate at which all threads together read memory (sums of chunks that fit no cache), and the
step's matrix products alone, one after another, as each side computes them. The fastest-tenth step of
transformers over our products is the ratio if the rest of our step took no time.

docs/generate.md has figures, with their machine.
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
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPTBigCodeConfig
from transformers.utils import logging

from architecture import Decoder
from generation.engine import generate_ids
from generation.kvcache import KVCache
from generation.settings import GenerationConfig
from modules.linear import Linear
from pretrained import load_pretrained

PROMPT, NEW = 64, 128
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
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


class Steps:
    """A clock of the seconds between a module's calls: the steps of decoding, without the prompt's."""

    def __init__(self, module: torch.nn.Module):
        self.seconds: list[float] = []
        self.started: list[float] = []
        module.register_forward_pre_hook(lambda *_: self.started.append(time.perf_counter()))

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
            started = time.perf_counter()
            action()
            best[i] = min(best[i], time.perf_counter() - started)
    return sum(best)


def print_limit(model: Decoder, steps: tuple[float, float], turns: int = 60) -> None:
    """Print lower bounds of a step of one row beside `steps`, the seconds of transformers and of ours."""
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    read = sum(sizes.values()) - sizes["position.weight"]  # a step reads one row of it
    linears = [m for m in model.modules() if isinstance(m, Linear)]
    inputs = [torch.randn(1, m.in_features).to(m.weight.dtype) for m in linears]
    pairs = list(zip(linears, inputs, strict=True))
    chunks = torch.ones(2**26, dtype=torch.int64).chunk(32)  # 16 MiB each, of 512 MiB
    with torch.inference_mode():
        rate = 2**29 / fastest([chunk.sum for chunk in chunks], turns)
        theirs = fastest([partial(F.linear, x, m.weight, m.bias) for m, x in pairs], turns)
        ours = fastest([partial(m, x) for m, x in pairs], turns)
    at_least = read / rate
    print(f"  a step reads {read / 1e6:,.0f} MB; memory gives {rate / 1e9:.1f} GB/s: {at_least * 1e3:.1f} ms")
    for side, step, products in zip(("transformers", "ours"), steps, (theirs, ours), strict=True):
        print(
            f"  {side}: a quiet step {step * 1e3:.1f} ms, its products alone {products * 1e3:.1f} ms "
            f"({read / products / 1e9:.1f} GB/s)"
        )
    print(
        f"  at most {steps[0] / ours:.2f} times transformers with these products, "
        f"{steps[0] / at_least:.2f} times at the speed of memory",
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


def main(turns: int, threads: int, limit: bool, dtypes: list[str], batches: list[int]) -> None:
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(SHAPE).save_pretrained(folder)
        print(
            "| dtype | rows | transformers, tokens/s | ours, tokens/s | ratio (range) "
            "| of quiet steps | equal tokens | gap to fp32, theirs, ours | its tokens |"
        )
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        for dtype in (getattr(torch, name) for name in dtypes):
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
            ours = load_pretrained(folder, dtype).model

            def their_logits(
                tokens: torch.Tensor, cache: Any, model: Any = theirs
            ) -> tuple[torch.Tensor, Any]:
                found = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                return found.logits[:, -1], found.past_key_values

            def our_logits(
                tokens: torch.Tensor, cache: KVCache | None, model: Decoder = ours
            ) -> tuple[torch.Tensor, KVCache]:
                cache = cache or KVCache(model.config.n_layer, PROMPT + NEW)
                return model.head(model.hidden(tokens, cache=cache)[:, -1]), cache

            for rows in batches:
                prompts = torch.randint(30_000, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))

                def them(prompts: torch.Tensor = prompts, model: object = theirs) -> list[list[int]]:
                    with torch.inference_mode():
                        ids = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
                            prompts,
                            attention_mask=torch.ones_like(prompts),
                            max_new_tokens=NEW,
                            do_sample=False,
                            pad_token_id=0,
                            eos_token_id=None,
                        )
                    return ids[:, PROMPT:].tolist()

                def we(prompts: torch.Tensor = prompts, model: Decoder = ours) -> list[list[int]]:
                    settings = GenerationConfig(max_new_tokens=NEW)
                    return [result.ids for result in generate_ids(model, prompts.tolist(), settings)]

                (_, expected), (_, actual) = timed(them), timed(we)  # this also warms up both
                sides = Steps(theirs.get_input_embeddings()), Steps(ours.embed)
                times = []
                for _ in range(turns):
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
                shown = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {quiet:.2f}"
                distances = " | "
                if dtype != torch.float32:
                    exact = load_pretrained(folder, torch.float32).model
                    with torch.inference_mode():
                        settings = GenerationConfig(max_new_tokens=NEW)
                        ids = [result.ids for result in generate_ids(exact, prompts.tolist(), settings)]
                        texts = torch.cat((prompts, torch.tensor(ids)), dim=1)
                        reference = exact.head(exact.hidden(texts[:, :-1])[:, PROMPT - 1 :])
                        found = [gaps(side, texts, reference) for side in (their_logits, our_logits)]
                    distances = f"{found[0][0]:.4f}, {found[1][0]:.4f} | {found[0][1]:.1%}, {found[1][1]:.1%}"
                name = str(dtype).removeprefix("torch.")
                print(
                    f"| {name} | {rows} | {speeds[0]:.1f} | {speeds[1]:.1f} | {shown} | {equal:.1%} "
                    f"| {distances} |",
                    flush=True,
                )
                if limit and rows == 1:
                    print_limit(ours, (sides[0].quiet(), sides[1].quiet()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--limit", action="store_true")
    arguments = parser.parse_args()
    main(arguments.turns, arguments.threads, arguments.limit, arguments.dtypes, arguments.rows)
