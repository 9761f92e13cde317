"""Compare the speed of quantized linears with the decoder's `Linear` and with bitsandbytes' Linear4bit.

    python benchmarks/quantized.py [--out 8192] [--in 2048] [--layers 4] [--tokens 512 8 1] [--rounds 7]
    python benchmarks/quantized.py --run RUN [--tokens 512]       what each format costs in quality

Timed are the forward pass, and forward with the gradient of the input, on a CPU in fp32, through `layers`
linears one after the other, which together fit no cache, as in a model. Every kind is timed once in each
round, and its median is divided by that of `Linear` in fp32. `decoding` is a forward pass in bf16 without
gradients, by the ways that were measured to be the fastest here (modules/products.py). The time of
quantisation follows, in seconds for 10**9 weights. bitsandbytes is left out where it is not installed.

With `--run` the test files of a run are read by its model in fp32, in bf16 and in each format as `--held`
opens it. The output has bits a weight, over all matrices that are held; the loss on the first TOKENS of each
file, and its distance from fp32's; and how often the likeliest next token is that of fp32, given the same
text.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset import prepare_data
from modules.frozen_linear import FrozenLinear
from modules.linear import Linear
from modules.nf4 import quantize_nf4
from modules.precision import keep_freed_memory
from modules.products import Products, speed_up
from modules.quantized_linear import KINDS, hold
from training.run import load_run

Work = Callable[[], object]


def in_turns(works: dict[str, Work], rounds: int) -> dict[str, float]:
    """Return the median seconds of each function, timed in turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if i:  # the first round warms up
                times[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in times.items()}


def table(title: str, seconds: dict[str, float]) -> None:
    first = next(iter(seconds.values()))
    print(f"\n{title}")
    for name, value in seconds.items():
        print(f"  {name:24}{value * 1e3:10.2f} ms {value / first:8.2f} x")


def of_bitsandbytes(dense: nn.Linear) -> nn.Module:
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    module = Linear4bit(dense.in_features, dense.out_features, bias=False, quant_type="nf4")
    parameter: Any = Params4bit  # pyright does not see the arguments of its __new__
    module.weight = parameter(dense.weight.detach().clone(), requires_grad=False, quant_type="nf4")
    return module.to("cpu")


def quality(path: str, most: int) -> None:
    """Print what each format of the run at `path` costs, on the first `most` tokens of its test files."""
    opened = load_run(path)
    data = prepare_data(opened.config.data, opened.tokenizer)
    most = min(most, opened.config.row_length)
    texts = [data.test.document(i)[:most] for i in range(data.test.n_documents)]
    print(f"{len(texts)} test files of {path}, {sum(len(text) - 1 for text in texts):,} tokens predicted")
    print("| format | bits a weight | loss, nats a token | above fp32 | greedy tokens equal to fp32's |")
    print("|---|---|---|---|---|", flush=True)
    exact: list[Tensor] = []
    base = 0.0
    for name in ("fp32", "bf16", "int8", "int4", "nf4"):
        model = load_run(path).model
        if name in KINDS and name != "bf16":
            hold(model, name)
        if name != "fp32":
            model.bfloat16()
        speed_up(model)
        losses, likeliest = [], []
        with torch.inference_mode():
            for text in texts:
                ids = torch.as_tensor(text, dtype=torch.long)
                logits = model(ids[None, :-1])[0].float()
                losses.append(F.cross_entropy(logits, ids[1:], reduction="none"))
                likeliest.append(logits.argmax(-1))
        loss = torch.cat(losses).double().mean().item()
        exact, base = exact or likeliest, base or loss
        equal = (torch.cat(likeliest) == torch.cat(exact)).double().mean().item()
        linears = [m for m in model.modules() if isinstance(m, FrozenLinear)]
        weights = sum(m.in_features * m.out_features for m in linears)
        stored = sum(t.nbytes for m in linears for t in m.stored)
        bits = 8 * stored / weights if linears else 8 * model.embed.weight.element_size()
        print(f"| {name} | {bits:.2f} | {loss:.4f} | {loss - base:+.4f} | {equal:.2%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=int, default=8192)
    parser.add_argument("--in", type=int, default=2048, dest="in_features")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 8, 1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--run", default="")
    args = parser.parse_args()
    if args.run:
        quality(args.run, args.tokens[0])
        return
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    dense = [Linear(args.in_features, args.out, bias=False) for _ in range(args.layers)]
    linears: dict[str, list[Any]] = {"Linear fp32": [layer.requires_grad_(False) for layer in dense]}
    linears |= {name: [kind.from_linear(layer) for layer in dense] for name, kind in KINDS.items()}
    if find_spec("bitsandbytes"):
        logging.disable(logging.WARNING)
        linears["bitsandbytes nf4"] = [of_bitsandbytes(layer) for layer in dense]
    for name in KINDS:
        print(f"{name}: {linears[name][0].bits_per_weight:.3f} bits a weight")

    decoders: dict[str, list[Any]] = {"Linear bf16": [copy.deepcopy(layer).bfloat16() for layer in dense]}
    for name in ("int8", "int4", "nf4"):
        decoders[name] = [KINDS[name].from_linear(layer) for layer in dense]

    def work(layers: list[Any], x: Tensor) -> Work:
        def forward_and_backward() -> None:
            for layer in layers:
                y = layer(x)
                if x.requires_grad:
                    torch.autograd.grad(y, x, torch.ones_like(y))

        return forward_and_backward

    for tokens in args.tokens:
        x = torch.randn(tokens, args.in_features)
        with torch.no_grad():
            fast = {name: work(layers, x.bfloat16()) for name, layers in decoders.items()}
            for layers in decoders.values():
                Products(nn.Sequential(*layers), torch.bfloat16).choose(tokens)
            table(f"decoding, {tokens} tokens in bf16", in_turns(fast, args.rounds))
        works = {name: work(layers, x) for name, layers in linears.items()}
        with torch.no_grad():
            table(f"forward, {tokens} tokens", in_turns(works, args.rounds))
        if tokens > 1:
            x.requires_grad_(True)
            table(f"forward and backward, {tokens} tokens", in_turns(works, args.rounds))

    weight = dense[0].weight.detach()
    quantise: dict[str, Work] = {"nf4": lambda: quantize_nf4(weight)}
    if "bitsandbytes nf4" in linears:
        from bitsandbytes.functional import quantize_4bit

        quantise["bitsandbytes nf4"] = lambda: quantize_4bit(
            weight, compress_statistics=True, quant_type="nf4"
        )
    seconds = in_turns(quantise, 3)
    print("\nquantisation, seconds for 10**9 weights")
    for name, value in seconds.items():
        print(f"  {name:24}{value * 1e9 / weight.numel():10.1f}")


if __name__ == "__main__":
    main()
