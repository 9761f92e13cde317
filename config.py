"""Settings: frozen dataclasses of plain values, saved with every run.

Each group below is one section of a YAML file and one prefix on the command line
(`--model.n_layer 6`). This module holds data only and imports nothing heavy, so that `--help`
answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


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


@dataclass(frozen=True)
class ModelConfig:
    """The decoder's shape and parts. `resolved()` fills in what is 0 and refuses what cannot be built.

    Args:
        vocab_size: Rows of the embedding; 0 takes the tokenizer's.
        block_size: Tokens in a training row, and the most positions a learned or sinusoidal table holds.
        n_layer: Blocks.
        n_head: Query heads.
        n_kv_head: Key and value heads, a divisor of n_head; 0 means n_head, 1 is multi-query.
        n_embd: Width of the residual stream.
        head_dim: Width of a head; 0 means n_embd / n_head.
        n_inner: Width of the MLP; 0 means 4 n_embd.
        block: `sequential` or `parallel`.
        norm: `rms` or `layer`.
        norm_eps: Added to the variance.
        norm_weight: Norms have a learned scale.
        norm_bias: Norms have a learned shift.
        position: `rotary`, `learned`, `sinusoidal` or `none`.
        rotary_dim: Leading dimensions of a head that are rotated; 0 means all.
        rotary_layout: `half` (Llama) or `interleaved` (CodeGen) pairs.
        rope_theta: Base of the rotary frequencies.
        mlp: `gelu`, `gelu_tanh`, `relu2` or `swiglu`.
        qk_norm: Normalise queries and keys (arXiv:2010.04245).
        fused_qkv: One projection for query, key and value.
        qkv_bias: Bias in the query, key and value projections.
        attention_bias: Bias in attention's output projection.
        mlp_bias: Bias in the MLP.
        tie_embeddings: The head shares the embedding's weight.
        dropout: After the embedding, on attention weights, and on each block's outputs.
        attention: `fast` (fused kernels) or `reference` (written out).
        init: `normal`, `xavier` or `zero_output`; see architecture.INITS.
    """

    vocab_size: int = 0
    block_size: int = 256
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 0
    n_embd: int = 256
    head_dim: int = 0
    n_inner: int = 0
    block: str = "sequential"
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_weight: bool = False
    norm_bias: bool = False
    position: str = "rotary"
    rotary_dim: int = 0
    rotary_layout: str = "half"
    rope_theta: float = 10_000.0
    mlp: str = "relu2"
    qk_norm: bool = True
    fused_qkv: bool = False
    qkv_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    dropout: float = 0.0
    attention: str = "fast"
    init: str = "zero_output"

    def resolved(self) -> ModelConfig:
        """The same with every 0 filled in; ValueError in one sentence for a shape that cannot be built."""
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(
                f"model.n_embd {self.n_embd} is not a multiple of model.n_head {self.n_head}; "
                "change one of them or set model.head_dim"
            )
        head_dim = self.head_dim or self.n_embd // self.n_head
        n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % n_kv_head:
            raise ValueError(f"model.n_head {self.n_head} is not a multiple of model.n_kv_head {n_kv_head}")
        rotary_dim = self.rotary_dim or head_dim
        if self.position == "rotary" and (rotary_dim > head_dim or rotary_dim % 2):
            raise ValueError(
                f"model.rotary_dim {rotary_dim} must be even and at most the head's {head_dim} dimensions"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout is {self.dropout}; it must be at least 0 and below 1")
        n_inner = self.n_inner or 4 * self.n_embd
        return replace(self, head_dim=head_dim, n_kv_head=n_kv_head, rotary_dim=rotary_dim, n_inner=n_inner)
