"""Compare the speed of quantized linears with the decoder's `Linear` and with bitsandbytes' Linear4bit.

    python benchmarks/quantized.py [--out 8192] [--in 2048] [--layers 4] [--tokens 512 8 1] [--rounds 7]

Timed are the forward pass, and forward with the gradient of the input, on a CPU in fp32, through `layers`
linears one after the other, which together fit no cache, as in a model. Every kind is timed once in each
round, and its median is divided by that of `Linear` in fp32. The time of quantisation follows, in seconds for
10**9 weights. bitsandbytes is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modules.linear import Linear
from modules.nf4 import quantize_nf4
from modules.precision import keep_freed_memory
from modules.quantized_linear import KINDS

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=int, default=8192)
    parser.add_argument("--in", type=int, default=2048, dest="in_features")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 8, 1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
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

    def work(layers: list[Any], x: Tensor) -> Work:
        def forward_and_backward() -> None:
            for layer in layers:
                y = layer(x)
                if x.requires_grad:
                    torch.autograd.grad(y, x, torch.ones_like(y))

        return forward_and_backward

    for tokens in args.tokens:
        x = torch.randn(tokens, args.in_features)
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
