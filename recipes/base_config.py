"""The settings of a small base, and the command line that gives them; torch is not needed to read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import config
from config.console import refuse


@dataclass(frozen=True)
class BaseConfig:
    """Settings of a small base: its family, its size and its training.

    Args:
        family: The `model_type` whose parts it has. `gpt_bigcode` gets fill-in-the-middle tokens, and half of
            its training documents are cut for them.
        max_seconds: Training time.
        out: Folder to write; by default one in `cache` that is named after these settings.
        source: The training text, as for --data.source.
        vocab_size: Most tokens of its tokenizer.
        n_layer: Number of blocks.
        n_head: Number of query heads, a multiple of 4.
        n_embd: Width.
        block_size: Context, all of which is trained.
        batch_size: Rows of `block_size` tokens in a step.
        seed: Seed of its weights and of the order of the data.
        cache: Folder for tokenizers, token stores and bases.
    """

    family: Literal["gpt_bigcode", "codegen", "phi", "llama"]
    max_seconds: float = 180.0
    out: str = ""
    source: str = "stdlib"
    vocab_size: int = 4096
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    block_size: int = 512
    batch_size: int = 2
    seed: int = 0
    cache: str = "cache"


def parse_settings(argv: list[str]) -> BaseConfig:
    """Return the BaseConfig of a command line; a mistake prints one sentence and exits with 2."""
    settings = config.parse_settings(
        BaseConfig, argv, "Train a small base of a published family's architecture."
    )
    if not settings.max_seconds > 0:
        refuse(f"--max_seconds is {settings.max_seconds}; it must be above 0")
    if settings.n_head < 1 or settings.n_head % 4:
        refuse(f"--n_head is {settings.n_head}; it must be a multiple of 4")
    if settings.n_embd < 1 or settings.n_embd % settings.n_head:
        refuse(f"--n_embd is {settings.n_embd}; it must be a multiple of --n_head, {settings.n_head}")
    return settings
