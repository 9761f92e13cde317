"""What an adapter loses on weights of another format than those that it was trained on: measured, and told.

The text is Python's own standard library, which every machine has: an adapter for another language is no
worse a measure of rounding there, since the same text is read both ways.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from architecture import Decoder
from config import DataConfig
from data.sourcefiles import source_files
from serving.settings import FORMAT_DIFFERS, ServeConfig
from tokenizer import Tokenizer

N_FILES, N_TOKENS = 16, 256


@torch.inference_mode()
def token_losses(model: Decoder, tokenizer: Tokenizer) -> Tensor:
    """Return the mean loss of each of N_FILES files, (N_FILES), in nats a token of its first N_TOKENS."""
    folder, names = source_files(DataConfig(source="stdlib"))
    names = [name for name in names if Path(folder, name).stat().st_size > 4 * N_TOKENS]
    chosen = [names[i * len(names) // N_FILES] for i in range(N_FILES)]
    losses = []
    for name in chosen:
        ids = tokenizer.prompt_ids(Path(folder, name).read_text("utf-8", "replace")[: 16 * N_TOKENS])
        row = torch.tensor([ids[: min(N_TOKENS, model.config.block_size)]], device=model.embed.weight.device)
        logits = model.head(model.hidden(row[:, :-1])).float()
        losses.append(F.cross_entropy(logits[0], row[0, 1:]))
    return torch.stack(losses).double().cpu()


def refuse_other_format(served: str, losses: Tensor, change: Tensor, settings: ServeConfig) -> None:
    """Refuse an adapter on another format, with what it loses, unless --allow names it.

    Args:
        served: The adapter, the format that it was trained on, and the one that it would be served on.
        losses: On the one that it was trained on, (N_FILES).
        change: What each becomes more.

    Raises:
        ValueError: It is not allowed.
    """
    error = change.std().item() / math.sqrt(len(change))
    told = (
        f"{FORMAT_DIFFERS}: {served}: its loss on {len(losses)} files of Python's standard library is "
        f"{losses.mean():.4f} nats a token on the first, and changes by {change.mean():+.4f} (standard error "
        f"{error:.4f}) on the other"
    )
    if FORMAT_DIFFERS not in settings.allow:
        raise ValueError(
            f"{told}; leave --held out, or serve it apart. To serve it all the same: --allow {FORMAT_DIFFERS}"
        )
    print(f"ALLOWED {told}", file=sys.stderr)
