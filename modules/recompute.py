"""Recomputation in backward: of nothing, of the outputs of cheap modules, or of whole blocks.

A decoder calls `run_block(block, x, context)` for each block and chooses the function once. Results and
gradients are the same bit for bit; only memory and time differ.

A norm or an activation keeps its input for backward, and the linear behind it keeps its own, which is the
output of the former. Both are needed, but one is cheap to compute from the other. For a frozen base with
adapters that is a third of what backward keeps, at 3% of a step. Where all weights train, their gradients
need the inputs of all linears, and whole blocks are recomputed instead (Chen et al. 2016, arXiv:1604.06174).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, x: Tensor, context: Any) -> Tensor:
    """Run a block and keep all that its backward needs."""
    return block(x, context)


def run_checkpointed_block(block: nn.Module, x: Tensor, context: Any) -> Tensor:
    """Run a block and in training keep its input only; backward runs it once more."""
    if not block.training:
        return block(x, context)
    return checkpoint(block, x, context, use_reentrant=False)  # pyright: ignore[reportReturnType]


class _Recipe(NamedTuple):
    """How to compute a tensor again: `module(*inputs)` under the autocast of its first time."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    device: str
    autocast: tuple[bool, torch.dtype]

    def output(self, shape: torch.Size) -> Tensor:
        enabled, dtype = self.autocast
        with torch.no_grad(), torch.autocast(self.device, dtype, enabled=enabled):
            return self.module(*self.inputs).view(shape)


class CheapRecompute:
    """Run blocks, and recompute the outputs of some of their modules in backward.

    Args:
        modules: Norms, activations and other modules whose one output is cheap to compute from their inputs.
            A forward hook on each notes its output. A block that is compiled runs without: its compiler
            decides by itself what to recompute.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        # The outputs by address, with how to compute them again; None outside a block.
        self.noted: dict[int, tuple[weakref.ref[Tensor], _Recipe]] | None = None
        for module in modules:
            module.register_forward_hook(self._note)

    def __call__(self, block: nn.Module, x: Tensor, context: Any) -> Tensor:
        self.noted = {}
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                return block(x, context)
        finally:
            self.noted = None

    def _note(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.compiler.is_compiling() or self.noted is None or not output.requires_grad:
            return
        device = output.device.type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self.noted[output.data_ptr()] = weakref.ref(output), _Recipe(module, inputs, device, autocast)

    def _pack(self, saved: Tensor) -> Tensor | tuple[_Recipe, torch.Size]:
        """Return how to compute a tensor that autograd saves, if it is the output of one of the modules.

        The output must still be alive, or another tensor may lie at its address.
        """
        found = (self.noted or {}).get(saved.data_ptr())
        output = found[0]() if found else None
        if found is None or output is None or saved.numel() != output.numel() or not saved.is_contiguous():
            return saved
        return found[1], saved.shape


def _unpack(packed: Tensor | tuple[_Recipe, torch.Size]) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    recipe, shape = packed
    return recipe.output(shape)
