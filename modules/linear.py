"""`Linear`: nn.Linear whose products of few rows are fast on a CPU, which is where decoding spends its time.

A step of decoding multiplies every weight by as many rows as texts are under way. At one row the time is that
of reading the weights, if the kernel does no more than read them: oneDNN, to which `F.linear` goes, first
brings the whole weight into an order of its own. `Linear` has these ways besides, among which
`modules/products.py` chooses by their time:

    own        bf16: torch's own kernel, a dot product for each output
    packed     oneDNN's product of a second copy of the weight, in oneDNN's order from the start
    tiles      products of 64 rows of the weight each, which are not reordered
    widened    bf16 on a CPU without an instruction for it: some rows at a time made fp32

Training and everything that takes gradients, autocast and other devices use `F.linear` itself. Sums are in
fp32 everywhere; results differ by rounding only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.products import MeasuredProducts, Product, Way, in_onednns_order, onednn_product

MOST_ROWS_OWN = 4  # Each row takes as long again.
MOST_ROWS_TILES = 64
TILE_OUTPUTS = 64  # outputs of one product of a tile
BLOCK, LARGE_BLOCK = 2**20, 2**22  # elements made fp32 at a time, for few rows and for many


class Linear(MeasuredProducts, nn.Linear):
    """x (..., in) -> x weight^T + bias, (..., out)."""

    def forward(self, input: Tensor) -> Tensor:
        product = self.measured(input)
        return F.linear(input, self.weight, self.bias) if product is None else product(input)

    def plain(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def weight_rows(self, index: Tensor) -> Tensor:
        return self.weight[index].double()

    def ways(self, rows: int, dtype: torch.dtype) -> dict[str, Way]:
        if self.weight.dtype != dtype or dtype not in (torch.float32, torch.bfloat16):
            return {}
        found: dict[str, Way] = {}
        few = rows <= MOST_ROWS_TILES
        if dtype == torch.bfloat16 and rows <= MOST_ROWS_OWN:
            found["own"] = Way(lambda: self._by(own_kernel))
        if few and not self.weight.is_inference():  # such a weight does not count its changes
            found["packed"] = Way(self._packed, self.extra("packed", self.weight.nbytes))
        if few and rows > 1:
            found["tiles"] = Way(lambda: self._by(few_rows))
        if dtype == torch.bfloat16:
            found["widened"] = Way(lambda: self._by(widened))
        return found

    def _by(self, function: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Product:
        return lambda x: function(x, self.weight, self.bias)

    def _packed(self) -> Product:
        """Return oneDNN's product of a copy, which is given up as soon as the weight changes."""
        weight, version = self.weight, self.weight._version
        multiply = onednn_product(self.copied("packed", lambda: in_onednns_order(weight.detach())))

        def product(x: Tensor) -> Tensor:
            if self.weight is not weight or weight._version != version:
                self.forget()
                return self.plain(x)
            return multiply(x, self.bias)

        return product


def own_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `F.linear` without oneDNN, which is off for the whole process meanwhile."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        return F.linear(x, weight, bias)
    finally:
        torch._C._set_mkldnn_enabled(before)


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x (..., in) by weight (out, in), TILE_OUTPUTS of its rows at a time: (..., out)."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.size(-1))
    blocks = len(weight) // TILE_OUTPUTS
    in_blocks, rest = weight[: blocks * TILE_OUTPUTS], weight[blocks * TILE_OUTPUTS :]
    y = torch.bmm(
        rows.expand(blocks, *rows.shape), in_blocks.unflatten(0, (blocks, TILE_OUTPUTS)).transpose(1, 2)
    )
    y = y.transpose(0, 1).reshape(len(rows), blocks * TILE_OUTPUTS)
    if len(rest):
        y = torch.cat((y, F.linear(rows, rest)), dim=1)
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], len(weight))


def widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply bf16 x (..., in) by bf16 weight (out, in), made fp32 in parts: (..., out), rounded once."""
    n_out, n_in = weight.shape
    rows = x.reshape(math.prod(x.shape[:-1]), n_in).float()
    few = len(rows) <= MOST_ROWS_TILES
    product = few_rows if few else F.linear
    step = min(n_out, max(1, (BLOCK if few else LARGE_BLOCK) // n_in))
    block = torch.empty(step, n_in, dtype=torch.float32)
    y = torch.empty(len(rows), n_out, dtype=weight.dtype)
    for start in range(0, n_out, step):
        part = weight[start : start + step]
        added = None if bias is None else bias[start : start + step].float()
        y[:, start : start + step] = product(rows, block[: len(part)].copy_(part), added)
    return y.view(*x.shape[:-1], n_out)
