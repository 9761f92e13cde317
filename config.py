"""Settings: frozen dataclasses of plain values, saved with every run.

Each group below is one section of a YAML file and one prefix on the command line
(`--model.n_layer 6`). This module holds data only and imports nothing heavy, so that `--help`
answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is split into training and validation files.

    Args:
        source: `stdlib` (the running interpreter's own library), a folder, or a .jsonl, .jsonl.gz or
            .parquet file.
        suffixes: Endings of the files that are read from a folder.
        text_field: Field that holds the text of a JSONL or Parquet row; by default `text`, else `content`.
        group_field: Field whose value keeps documents together on one side of the split (a repository,
            say). Without it each document is its own group.
        validation_one_in: A group is validation where `sha1(group) % validation_one_in == 0`.
        drop_comments: Remove comments and docstrings from Python files before they are tokenised.
        skip_undecodable: Leave out, and count, files that are not UTF-8 instead of stopping at the first.
        cache: Folder for trained tokenizers and token stores, keyed by content.
        workers: Processes that tokenise; 0 means one for each core.
    """

    source: str = "stdlib"
    suffixes: tuple[str, ...] = (".py",)
    text_field: str | None = None
    group_field: str | None = None
    validation_one_in: int = 10
    drop_comments: bool = False
    skip_undecodable: bool = False
    cache: str = "cache"
    workers: int = 0


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer turns text into ids.

    Args:
        kind: `code` (ours), `bpe` (byte-level BPE) or `pretrained` (a Hugging Face tokenizer.json folder).
        vocab_size: Largest vocabulary that `code` and `bpe` may learn, special tokens included.
        min_count: A piece enters the `code` vocabulary only if it occurs more than this many times.
        path: Folder of a trained or pretrained tokenizer to load instead of training one.
    """

    kind: str = "code"
    vocab_size: int = 4096
    min_count: int = 10
    path: str | None = None
