"""`Linear`: nn.Linear whose products of few rows are fast on a CPU, which is where decoding spends its time.

A step of decoding multiplies every weight by as many rows as texts are under way. At one row the time is that
of reading the weights, if torch's own kernel reads them: in fp32 at the speed of memory, in bf16 on AVX2 at
half of it (`benchmarks/decoding.py --limit`). With more rows the libraries behind `F.linear` lose time, in
fp32 since they pack the whole weight first. Shares of its time on two cores, without native bf16, on
3072 x 768 and 49152 x 768:

    fp32, 8 rows    0.6 and 0.4 (AVX-512), 0.5 and 0.5 (AVX2)    products of 64 rows of the weight: `few_rows`
    fp32, 32 rows   0.9 and 0.6 (AVX2); 4096 x 4096: 0.6         the same
    bf16, 8 rows    0.7 and 0.5 (AVX2)                           so from blocks made fp32: `emulated_bf16`

Training and everything that takes gradients, autocast and other devices use `F.linear` itself. Sums are in
fp32 everywhere; results differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.precision import has_native_bf16

EMULATED_BF16 = not has_native_bf16(torch.device("cpu"))
MAX_ROWS_WIDE = 16  # out < in: up to this many rows the tiled product beats F.linear
MAX_ROWS_TALL = 64  # out >= in: up to this many rows it does
TILE_OUTPUTS = 64  # outputs of one product of a tile
MIN_ELEMENTS = 2**20  # smaller weights stay in the cache, and packing them costs little
MAX_ROWS_DOT = 3  # up to this many rows dot products are fastest; each row takes as long again
BLOCK, LARGE_BLOCK = 2**20, 2**22  # elements converted to fp32 at a time, for few rows and for many


class Linear(nn.Linear):
    """x (..., in) -> x weight^T + bias, (..., out)."""

    def forward(self, input: Tensor) -> Tensor:
        x, weight, bias = input, self.weight, self.bias
        if torch.is_grad_enabled() or x.device.type != "cpu" or not weight.is_contiguous():
            return F.linear(x, weight, bias)
        if x.dtype != weight.dtype:  # F.linear refuses them with its own error.
            return F.linear(x, weight, bias)
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return F.linear(x, weight, bias)
        rows = x.numel() // x.size(-1)
        if weight.dtype == torch.bfloat16 and EMULATED_BF16 and rows:
            if rows <= MAX_ROWS_DOT:
                return dotted_bf16(x, weight, bias)
            y = emulated_bf16(x.reshape(rows, -1), weight, bias)
        elif weight.dtype == torch.float32 and 1 < rows <= few_of(weight):
            y = few_rows(x.reshape(rows, -1), weight, bias)
        else:
            return F.linear(x, weight, bias)
        return y.view(*x.shape[:-1], -1)


def few_of(weight: Tensor) -> int:
    """Return up to how many rows `few_rows` is faster with this weight (out, in)."""
    if weight.numel() < MIN_ELEMENTS:
        return 0
    return MAX_ROWS_TALL if weight.size(0) >= weight.size(1) else MAX_ROWS_WIDE


def dotted_bf16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `F.linear` in bf16 by torch's own kernel, a dot product for each output.

    On a CPU with AVX-512 `F.linear` prefers oneDNN, which emulates bf16 arithmetic. torch's kernel makes fp32
    of what it reads, rounds once with the bias in, and is the fastest at one row. (`torch.addmv` is the same
    product 8 times as slow: its kernel has no bias.)
    """
    with _torch_kernels():
        return F.linear(x, weight, bias)


@contextmanager
def _torch_kernels() -> Iterator[None]:
    """Switch oneDNN off inside, for the whole process: torch has no such switch for one call."""
    backend = torch.backends.mkldnn
    before = backend.enabled
    backend.enabled = False
    try:
        yield
    finally:
        backend.enabled = before


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x (n, in) by weight (out, in), TILE_OUTPUTS of its rows at a time: (n, out)."""
    blocks = len(weight) // TILE_OUTPUTS
    in_blocks, rest = weight[: blocks * TILE_OUTPUTS], weight[blocks * TILE_OUTPUTS :]
    y = torch.bmm(x.expand(blocks, *x.shape), in_blocks.unflatten(0, (blocks, TILE_OUTPUTS)).transpose(1, 2))
    y = y.transpose(0, 1).reshape(len(x), -1)
    if len(rest):
        y = torch.cat((y, F.linear(x, rest)), dim=1)
    return y if bias is None else y.add_(bias)


def emulated_bf16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply bf16 x (n, in) by bf16 weight (out, in) on a CPU without an instruction for it: (n, out)."""
    n_out, n_in = weight.shape
    few = len(x) <= MAX_ROWS_WIDE
    product = few_rows if few else F.linear
    step = min(n_out, max(1, (BLOCK if few else LARGE_BLOCK) // n_in))
    block = torch.empty(step, n_in)
    x, y = x.float(), torch.empty(len(x), n_out, dtype=weight.dtype)
    for start in range(0, n_out, step):
        part = weight[start : start + step]
        added = None if bias is None else bias[start : start + step].float()
        y[:, start : start + step] = product(x, block[: len(part)].copy_(part), added)
    return y
