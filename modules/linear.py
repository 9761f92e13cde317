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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.precision import has_native_bf16

EMULATED_BF16 = not has_native_bf16(torch.device("cpu"))
FEW_ROWS, WIDE_ROWS = (
    16,
    64,
)  # up to which packing does not pay: of a weight of less out than in, and of others
OUTPUTS = 64  # of one product of few rows
LEAST = 2**20  # elements of a weight: smaller ones stay in the cache, and packing them costs little
DOT_ROWS = 3  # for which dot products are fastest; each more takes as long again
BLOCK, LARGE_BLOCK = 2**20, 2**22  # elements that are made fp32 at a time, for few rows and for many


class Linear(nn.Linear):
    """x (..., in) -> x weight^T + bias, (..., out)."""

    def forward(self, input: Tensor) -> Tensor:
        x, weight, bias = input, self.weight, self.bias
        if torch.is_grad_enabled() or x.device.type != "cpu" or not weight.is_contiguous():
            return F.linear(x, weight, bias)
        if x.dtype != weight.dtype:  # which it refuses
            return F.linear(x, weight, bias)
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return F.linear(x, weight, bias)
        rows = x.numel() // x.size(-1)
        if weight.dtype == torch.bfloat16 and EMULATED_BF16 and rows:
            if rows <= DOT_ROWS:
                return dotted_bf16(x, weight, bias)
            y = emulated_bf16(x.reshape(rows, -1), weight, bias)
        elif weight.dtype == torch.float32 and 1 < rows <= few_of(weight):
            y = few_rows(x.reshape(rows, -1), weight, bias)
        else:
            return F.linear(x, weight, bias)
        return y.view(*x.shape[:-1], -1)


def few_of(weight: Tensor) -> int:
    """Rows up to which `few_rows` is faster with this weight (out, in); 0 if at no number."""
    if weight.numel() < LEAST:
        return 0
    return WIDE_ROWS if weight.size(0) >= weight.size(1) else FEW_ROWS


def dotted_bf16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` in bf16 by torch's own kernel, a dot product for each output.

    On a CPU with AVX-512 `F.linear` prefers oneDNN, which emulates bf16 arithmetic. torch's kernel makes fp32
    of what it reads, rounds once with the bias in, and is the fastest at one row. (`torch.addmv` is the same
    product 8 times as slow: its kernel has no bias.)
    """
    backend = torch.backends.mkldnn
    before = backend.enabled
    backend.enabled = False
    try:
        return F.linear(x, weight, bias)
    finally:
        backend.enabled = before


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (n, in) times weight (out, in), OUTPUTS of its rows at a time: (n, out)."""
    blocks = len(weight) // OUTPUTS
    in_blocks, rest = weight[: blocks * OUTPUTS], weight[blocks * OUTPUTS :]
    y = torch.bmm(x.expand(blocks, *x.shape), in_blocks.unflatten(0, (blocks, OUTPUTS)).transpose(1, 2))
    y = y.transpose(0, 1).reshape(len(x), -1)
    if len(rest):
        y = torch.cat((y, F.linear(x, rest)), dim=1)
    return y if bias is None else y.add_(bias)


def emulated_bf16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (n, in) times weight (out, in), both bf16, where the CPU has no instruction for it: (n, out)."""
    n_out, n_in = weight.shape
    few = len(x) <= FEW_ROWS
    product = few_rows if few else F.linear
    step = min(n_out, max(1, (BLOCK if few else LARGE_BLOCK) // n_in))
    block = torch.empty(step, n_in)
    x, y = x.float(), torch.empty(len(x), n_out, dtype=weight.dtype)
    for start in range(0, n_out, step):
        part = weight[start : start + step]
        added = None if bias is None else bias[start : start + step].float()
        y[:, start : start + step] = product(x, block[: len(part)].copy_(part), added)
    return y
