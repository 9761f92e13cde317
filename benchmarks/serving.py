"""Measure the engine as a server uses it: requests together, a newcomer, a prefix read once, a cancellation.

    python benchmarks/serving.py [--turns 3] [--dtype float32] [--cases together,newcomer]

The shape is that of a StarCoder of 117M parameters (12 layers x 768, multi-query, a vocabulary of 49,152),
with random weights. Every figure is a ratio of two times of one run, the median over the turns:

- `together`: 32 requests of 64 tokens, prompts of 64, one after another over the same together;
- `newcomer`: the time from `add` to the first token of a request with a prompt of 128 tokens, which comes
  while 8 texts are written, less its prefill alone, in steps of those 8 texts;
- `prefix`: an editor's completion of 1,024 tokens before the cursor, and then a second one 12 tokens further,
  by the time to the first token: without a suffix and with one of 64 tokens in the order prefix, suffix,
  middle; and with one of 1,024 tokens, in that order and in the order suffix, prefix, middle;
- `speculation`: passes of 4, 8 and 13 tokens over one of 1 token, after 256; and the time of 128 tokens by a
  step each over that with proposals, once all wrong and once all right;
- `cancel`: the time that reading 4,096 tokens takes, over the time from `cancel` to the end of the step in
  which such a prompt is gone.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from architecture import Decoder
from config import ModelConfig
from generation.engine import Engine
from generation.kvcache import KVCache
from generation.requests import Handle, Request
from generation.settings import GenerationConfig
from modules.products import speed_up

SHAPE = ModelConfig(
    vocab_size=49_152,
    block_size=8_192,
    n_layer=12,
    n_embd=768,
    n_head=12,
    n_kv_head=1,
    n_inner=3_072,
    position="learned",
    norm="layer",
    norm_weight=True,
    norm_bias=True,
    qk_norm=False,
    mlp="gelu_tanh",
    fused_qkv=True,
    qkv_bias=True,
    attention_bias=True,
    mlp_bias=True,
    tie_embeddings=True,
    init="normal",
)
LINE = 12  # tokens by which the second completion is further


def ids(n: int, seed: int) -> list[int]:
    return torch.randint(4, 30_000, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(engine: Engine) -> float:
    """Step until nothing is left; returns the seconds."""
    started = time.perf_counter()
    while engine.step():
        pass
    return time.perf_counter() - started


def first_token(engine: Engine, request: Request) -> tuple[float, Handle]:
    """Return the seconds from `add` to a request's first token, and its handle."""
    started = time.perf_counter()
    handle = engine.add(request)
    while not handle.texts[0].ids:
        engine.step()
    return time.perf_counter() - started, handle


def together(model: Decoder) -> tuple[float, ...]:
    """Return the seconds of 32 requests, one after another and together."""
    requests = [Request(ids(64, seed), GenerationConfig(max_new_tokens=64)) for seed in range(32)]
    times = []
    for size in (1, len(requests)):
        engine, seconds = Engine(model), 0.0
        for first in range(0, len(requests), size):
            for request in requests[first : first + size]:
                engine.add(request)
            seconds += run(engine)
        times.append(seconds)
    return tuple(times)


def newcomer(model: Decoder) -> tuple[float, ...]:
    """Return the seconds to a newcomer's first token, of its prefill alone, and of a step of 8 texts."""
    engine = Engine(model)
    for seed in range(8):
        engine.add(Request(ids(100, seed), GenerationConfig(max_new_tokens=400)))
    while not all(text.ids for text in engine.texts.values()) or not engine.texts:
        engine.step()
    steps = []
    for _ in range(12):
        started = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - started)
    asked = GenerationConfig(max_new_tokens=1)
    with torch.inference_mode():
        started = time.perf_counter()
        model.head(model.hidden(torch.tensor([ids(128, 98)]))[:, -1])
        prefill = time.perf_counter() - started
    waited, _ = first_token(engine, Request(ids(128, 99), asked))
    return waited, prefill, median(steps)


def prefix(model: Decoder, n_suffix: int, suffix_first: bool) -> tuple[float, ...]:
    """Return the seconds to the first token of a completion and of one that is a line further."""
    engine, markers = Engine(model), (1, 2, 3)
    before, after = ids(1_024 + LINE, 7), ids(n_suffix, 8)
    times = []
    for text in (before[:-LINE], before):
        prompt = [markers[0], *text]
        if suffix_first:
            prompt = [markers[0], markers[1], *after, markers[2], *text]
        elif after:
            prompt = [markers[0], *text, markers[1], *after, markers[2]]
        seconds, handle = first_token(engine, Request(prompt, GenerationConfig(max_new_tokens=8)))
        handle.cancel()
        run(engine)
        times.append(seconds)
    return tuple(times)


def cancel(model: Decoder) -> tuple[float, ...]:
    """Return the seconds of reading a long prompt, and from a cancellation to its end."""
    engine, asked = Engine(model), GenerationConfig(max_new_tokens=1)
    whole, _ = first_token(engine, Request(ids(4_096, 1), asked))
    handle = engine.add(Request(ids(4_096, 2), asked))
    engine.step()
    started = time.perf_counter()
    handle.cancel()
    engine.step()
    assert handle.done and not engine.bytes
    return whole, time.perf_counter() - started


class Foreseen:
    """Proposals of a known text, all of them right or all wrong."""

    def __init__(self, text: list[int], right: bool):
        self.text, self.right, self.n = text, right, 0

    def extend(self, ids: Sequence[int]) -> None:
        self.n += len(ids)

    def propose(self, most: int) -> list[int]:
        found = self.text[self.n : self.n + most]
        return found if self.right else [id + 1 for id in found]


def passes(model: Decoder, sizes: Sequence[int] = (1, 4, 8, 13)) -> tuple[float, ...]:
    """Return the seconds of passes of so many tokens, each with its logits."""
    times = []
    with torch.inference_mode():
        for size in sizes:
            seconds = []
            for _ in range(9):
                cache = KVCache(model.config.n_layer, 300)
                model.hidden(torch.tensor([ids(256, 3)]), cache=cache)
                started = time.perf_counter()
                model.head(model.hidden(torch.tensor([ids(size, 4)]), cache=cache))
                seconds.append(time.perf_counter() - started)
            times.append(median(seconds))
    return tuple(times)


def speculation(model: Decoder, text: list[int], right: bool) -> tuple[float, ...]:
    """Return the seconds of 128 tokens without and with proposals."""
    times = []
    for proposer in (None, lambda: Foreseen(text, right)):
        engine = Engine(model, proposer=proposer)
        engine.add(Request(text[:64], GenerationConfig(max_new_tokens=128)))
        times.append(run(engine))
    return tuple(times)


def repeated(case: Callable[[], tuple[float, ...]], turns: int) -> list[tuple[float, ...]]:
    return [case() for _ in range(turns)]


def shown(ratios: list[float]) -> str:
    ratios = sorted(ratios)
    return f"{median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = Decoder(SHAPE).to(getattr(torch, arguments.dtype)).eval()
    speed_up(model)
    first_token(Engine(model), Request(ids(64, 0), GenerationConfig(max_new_tokens=4)))  # warms up
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{size:.0f}M parameters in {arguments.dtype}, {arguments.threads} threads", end="; ")
    print(f"load {os.getloadavg()[0]:.1f}\n\n| | ratio (range) | seconds |\n|---|---|---|", flush=True)

    def row(name: str, ratios: list[float], times: list[tuple[float, ...]]) -> None:
        seconds = ", ".join(f"{median(one):.3f}" for one in zip(*times, strict=True))
        print(f"| {name} | {shown(ratios)} | {seconds} |", flush=True)

    for case in arguments.cases.split(","):
        if case == "together":
            times = repeated(lambda: together(model), arguments.turns)
            row("32 requests, one after another over together", [a / b for a, b in times], times)
        elif case == "newcomer":
            times = repeated(lambda: newcomer(model), arguments.turns)
            over = [(waited - prefill) / step for waited, prefill, step in times]
            row("a newcomer's first token less its prefill, in steps of 8 texts", over, times)
        elif case == "prefix":
            for n_suffix, first in ((0, False), (64, False), (1_024, False), (1_024, True)):
                times = repeated(lambda n=n_suffix, first=first: prefix(model, n, first), arguments.turns)
                order = "suffix, prefix, middle" if first else "prefix, suffix, middle"
                name = f"first over second completion, {n_suffix:,} tokens after the cursor, {order}"
                row(name, [a / b for a, b in times], times)
        elif case == "speculation":
            times = repeated(lambda: passes(model), arguments.turns)
            for place, size in enumerate((4, 8, 13), 1):
                row(f"a pass of {size} tokens over one of 1", [one[place] / one[0] for one in times], times)
            engine = Engine(model)
            handle = engine.add(Request(ids(64, 5), GenerationConfig(max_new_tokens=128)))
            run(engine)
            text = [*ids(64, 5), *handle.result()[0].ids]
            for right in (False, True):
                times = repeated(
                    lambda text=text, right=right: speculation(model, text, right), arguments.turns
                )
                name = f"128 tokens by steps over proposals that are all {'right' if right else 'wrong'}"
                row(name, [a / b for a, b in times], times)
        else:
            times = repeated(lambda: cancel(model), arguments.turns)
            row("reading 4,096 tokens over ending them", [a / b for a, b in times], times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--cases", default="together,newcomer,prefix,speculation,cancel")
    main(parser.parse_args())
