"""Time and memory of each kind of stored linear beside nn.Linear and bitsandbytes' Linear4bit, in one run.

    python benchmarks/quantized.py [--out 8192] [--in 2048] [--tokens 512 1] [--rounds 9] [--threads 2]

Forward, and forward with the gradient of the input, of one linear on a CPU in fp32; every kind is timed once in
each round, and its median is set against nn.Linear's. The quantisation of one such weight is timed the same way,
as seconds for a thousand million weights. bitsandbytes is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from precision import keep_freed_memory
from quantize import KINDS, quantize_nf4

Work = Callable[[], object]


def in_turns(works: dict[str, Work], rounds: int) -> dict[str, float]:
    """Median seconds of each."""
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


def modules(dense: nn.Linear) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {"nn.Linear fp32": dense}
    found |= {name: kind.from_linear(dense) for name, kind in KINDS.items()}
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError:
        return found
    logging.disable(logging.WARNING)
    theirs = Linear4bit(dense.in_features, dense.out_features, bias=False, quant_type="nf4")
    theirs.weight = Params4bit(dense.weight.detach().clone(), requires_grad=False, quant_type="nf4")
    return found | {"bitsandbytes nf4": theirs.to("cpu")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=int, default=8192)
    parser.add_argument("--in", type=int, default=2048, dest="in_features")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    dense = nn.Linear(args.in_features, args.out, bias=False).requires_grad_(False)
    linears = modules(dense)
    for name in KINDS:
        print(f"{name}: {linears[name].bits_per_weight:.3f} bits a weight")

    def run(module: nn.Module, x: Tensor, backward: bool) -> Work:
        def work() -> None:
            y = module(x)
            if backward:
                torch.autograd.grad(y, x, torch.ones_like(y))

        return work

    for tokens in args.tokens:
        x = torch.randn(tokens, args.in_features)
        with torch.no_grad():
            works = {name: run(module, x, False) for name, module in linears.items()}
            table(f"forward, {tokens} tokens", in_turns(works, args.rounds))
        if tokens > 1:
            x.requires_grad_(True)
            works = {name: run(module, x, True) for name, module in linears.items()}
            table(f"forward and backward, {tokens} tokens", in_turns(works, args.rounds))

    weight = dense.weight.detach()
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
