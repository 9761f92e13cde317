"""Check whether settings found at a small width transfer to larger ones: `python benchmarks/widths.py`.

This is the coordinate check (Yang et al. 2022, arXiv:2203.03466, appendix D): models of several widths, with
heads of one size, make the same few updates, and the change of the outputs of each block and of the head is
measured on one batch. The slope of its logarithm against that of the width is 0 where learning rates and
initialisation are scaled by the width (`model.base_width`), and not where they stay as they are.

With `--rates` each width is trained at several learning rates, with and without `base_width`: the best rate
of the smallest should be that of the largest. docs/sweep.md has figures, with their machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from architecture import Decoder
from config import DataConfig, ModelConfig, OptimizerConfig, TokenizerConfig
from dataset import Batch, Batches, prepare_data, prepare_tokenizer
from training.loss import token_loss
from training.optim import build_optimizers
from training.random_state import seed_everything

WIDTHS = (64, 128, 256, 512)
HEAD_DIM = 32
STEPS = 8
ROWS, LENGTH = 8, 128


def widened(model: ModelConfig, width: int, base_width: int) -> ModelConfig:
    return replace(model, n_embd=width, n_head=width // HEAD_DIM, base_width=base_width)


def outputs(model: Decoder, batch: Batch) -> list[Tensor]:
    """Return what each block adds to the residual stream, (B, T, C), and the logits, (B, T, V)."""
    found: list[Tensor] = []

    def keep(module: torch.nn.Module, args: tuple, output: Tensor) -> None:
        found.append(output)

    hooks = [block.register_forward_hook(keep) for block in model.blocks]
    with torch.no_grad():
        logits = model(batch.tokens, batch.positions, batch.document_ids)
    for hook in hooks:
        hook.remove()
    return [*found, logits]


def trained(
    config: ModelConfig, optimizer: OptimizerConfig, batches: Sequence[Batch]
) -> tuple[list[float], list[float]]:
    """Return the root mean squares of the changes of `outputs` on the first batch, and each update's loss."""
    seed_everything(0)
    model = Decoder(config)
    optimizers = build_optimizers(model, optimizer, width_mult=config.width_mult)
    before, losses = outputs(model, batches[0]), []
    for batch in batches:
        loss = token_loss(model, batch)
        (loss.objective / loss.tokens).backward()
        losses.append(loss.cross_entropy.item() / loss.tokens)
        for o in optimizers:
            o.step()
            o.zero_grad()
    changes = zip(outputs(model, batches[0]), before, strict=True)
    return [float((a - b).square().mean().sqrt()) for a, b in changes], losses


def slopes(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    batches: Sequence[Batch],
    widths: Sequence[int],
    carried: bool,
) -> list[float]:
    """Return the slope of the logarithm of each output's change against the width's, by least squares."""
    changes = [
        trained(widened(model, width, widths[0] if carried else 0), optimizer, batches)[0] for width in widths
    ]
    return np.polyfit(np.log2(widths), np.log2(np.array(changes)), 1)[0].tolist()


def rates(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    batches: Sequence[Batch],
    widths: Sequence[int],
    factors: Sequence[float],
) -> None:
    """Print the loss of the last tenth of the updates by width and by learning rate, in two ways."""
    for carried in (False, True):
        print(f"\nloss, {'rates carried over' if carried else 'rates as they are'}, {len(batches)} updates")
        print(f"{'width':>8}" + "".join(f"{f'lr x {f:g}':>12}" for f in factors))
        for width in widths:
            row = []
            for factor in factors:
                names = ("lr", "muon_lr", "embedding_lr", "head_lr")
                scaled = replace(optimizer, **{name: getattr(optimizer, name) * factor for name in names})
                config = widened(model, width, widths[0] if carried else 0)
                _, losses = trained(config, scaled, batches)
                row.append(float(np.mean(losses[-max(1, len(losses) // 10) :])))
            print(f"{width:8}" + "".join(f"{loss:11.3f}{'*' if loss == min(row) else ' '}" for loss in row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", default="stdlib", help="as data.source")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--rates", type=int, default=0, metavar="UPDATES", help="train so long at each rate")
    given = parser.parse_args()
    tokenizer = prepare_tokenizer(DataConfig(given.source), TokenizerConfig(vocab_size=2000))
    store = prepare_data(DataConfig(given.source), tokenizer).train
    model = ModelConfig(tokenizer.vocab_size, LENGTH, n_layer=2)
    order = Batches(store, ROWS, LENGTH, seed=0)
    batches = [order.batch(step) for step in range(max(STEPS, given.rates))]
    plain = OptimizerConfig(lr=3e-3, embedding_lr=3e-2, head_lr=3e-3, beta1=0.8, beta2=0.95, eps=1e-10)
    for name in ("adamw", "muon"):
        optimizer = replace(plain, name=name)
        for init in ("zero_output", "normal", "xavier"):
            for carried in (False, True):
                found = slopes(replace(model, init=init), optimizer, batches[:STEPS], given.widths, carried)
                shown = "  ".join(f"{slope:+.2f}" for slope in found)
                print(
                    f"{name:6} {init:12} {'carried over' if carried else 'as they are':13} {shown}",
                    flush=True,
                )
        if given.rates:
            rates(model, optimizer, batches, given.widths, (0.125, 0.25, 0.5, 1, 2, 4, 8))


if __name__ == "__main__":
    main()
