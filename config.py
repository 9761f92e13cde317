"""Settings: frozen dataclasses of plain values, saved with every run.

Each group below is one section of a YAML file and one prefix on the command line
(`--model.n_layer 6`). This module holds data only and imports nothing heavy, so that `--help`
answers at once. Training's own settings (`TrainConfig`) have no prefix: `--max_seconds 60`.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import functools
import io
import json
import math
import os
import re
import reprlib
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from terminal import one_line, refuse, shown_safely


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is split into training, validation and test files.

    Args:
        source: `stdlib` (the running interpreter's own library), a folder, or a .jsonl, .jsonl.gz or
            .parquet file. A folder that holds such files named train, validation and test is split by them.
        suffixes: Endings of the files that are read from a folder.
        text_field: Field that holds the text of a JSONL or Parquet row; by default `text`, else `content`.
            Without it rows may be examples: prompt and completion; input and output; instruction, input
            (which may be missing) and output; or prefix, suffix and middle.
        group_field: Field whose value keeps documents together on one side of the split (a repository,
            say). Without it each document is its own group, and examples without a name go by their prompt.
        regroup: Find what belongs together by its text (near duplicates, shared passages) and keep it on one
            side of the split too. `--fix` is short for it. Unset, it is on for `stdlib`, many of whose code
            pages are near copies of each other, and off for a source of one's own.
        validation_one_in: Of the groups that are not test, those are validation where
            `sha1(group) % validation_one_in == 0`. The best checkpoint is chosen by them. 0 validates on the
            training files, which only `--overfit` allows.
        test_one_in: A group is test where `sha256(group) % test_one_in == 0`: the scores at the end are over
            these files, which nothing was chosen by. 0 scores the validation files instead.
        drop_comments: Remove comments and docstrings from Python files before they are tokenised. Not of
            examples.
        skip_undecodable: Leave out, and count, files that are not UTF-8 instead of stopping at the first.
        loss_on: Tokens of an example that bear loss in training: its `completion`, or `all` but the first.
            Validation scores completions either way, so that such runs compare.
        heal: Tokenise prompt and completion of an example as one text, and cut it where generation does, so
            that what is asked for is what was trained (healing.py). Runs without this key have them apart.
        fim_rate: Share of the plain documents for training that are stored as prefix, suffix and middle, for
            models with such tokens (arXiv:2207.14255).
        order: Of the training documents in an epoch: `shuffled`, `sequential` (as read), or by how hard they
            are: `easy-first`, `hard-first`, or `hybrid`, drawn from the easiest, whose share grows to all.
        difficulty: How hard a document is: `rarity` of its tokens, `entropy` of their distribution, or `loss`
            of an n-gram model that did not see it.
        cache: Folder for trained tokenizers and token stores, keyed by content.
        cache_gb: Its bound, in 10**9 bytes: what was used longest ago is removed to keep below it, but
            nothing that is open or was used since the run began; 0 is none.
        workers: Processes that tokenise; 0 means one for each core.
    """

    source: str = "stdlib"
    suffixes: tuple[str, ...] = (".py",)
    text_field: str | None = None
    group_field: str | None = None
    regroup: bool | None = None
    validation_one_in: int = 10
    test_one_in: int = 10
    drop_comments: bool = False
    skip_undecodable: bool = False
    loss_on: Literal["completion", "all"] = "completion"
    heal: bool = True
    fim_rate: float = 0.0
    order: Literal["shuffled", "sequential", "easy-first", "hard-first", "hybrid"] = "shuffled"
    difficulty: Literal["rarity", "entropy", "loss"] = "rarity"
    cache: str = "cache"
    cache_gb: float = 20.0
    workers: int = 0

    def resolved(self) -> DataConfig:
        """The same settings with `regroup` decided. This is the one place that decides it."""
        if self.regroup is not None:
            return self
        return replace(self, regroup=self.source == "stdlib")


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer turns text into ids.

    Args:
        kind: `code` (ours), `bpe` (byte-level BPE) or `pretrained` (a Hugging Face tokenizer.json folder).
        vocab_size: Largest vocabulary that `code` and `bpe` may learn, special tokens included.
        min_count: A piece enters the `code` vocabulary only if it occurs more than this many times.
        path: Folder of a trained or pretrained tokenizer to load instead of training one.
    """

    kind: Literal["code", "bpe", "pretrained"] = "code"
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
        rope_scaling: How rotary frequencies reach past `rope_context`: `none`, `linear` (arXiv:2306.15595),
            `dynamic` (by the text's length, arXiv:2309.00071 appendix B.2) or `llama3` (arXiv:2407.21783).
        rope_factor: How many times further, at least 1.
        rope_context: Tokens of the context the model was first trained on; 0 means block_size.
        rope_low_freq: `llama3` divides frequencies with fewer turns than this in the first context.
        rope_high_freq: `llama3` leaves frequencies with more turns than this as they are.
        sliding_window: A token sees itself and the sliding_window - 1 tokens before it; 0 means all before.
        window_layers: The layers it applies to, from 0; none named means all.
        mlp: `gelu`, `gelu_tanh`, `relu2` or `swiglu`.
        qk_norm: Normalise queries and keys (arXiv:2010.04245).
        fused_qkv: One projection for query, key and value.
        qkv_layout: Its rows: `blocks` (all queries, keys, values), `heads` (query, key, value of each head in
            turn: GPTBigCode) or `shards` (query, value and key of a quarter of the heads at a time: CodeGen).
        qkv_bias: Bias in the query, key and value projections.
        attention_bias: Bias in attention's output projection.
        mlp_bias: Bias in the MLP.
        head_bias: Bias in the head.
        tie_embeddings: The head shares the embedding's weight.
        dropout: After the embedding, on attention weights, and on each block's outputs; none given means 0,
            or that of `base`.
        embed_dropout: After the embedding alone; none given means `dropout`.
        attention_dropout: On attention weights alone; none given means `dropout`.
        attention: `fast` (fused kernels) or `reference` (written out).
        init: `normal`, `xavier` or `zero_output`; see architecture.INITS.
        base_width: The n_embd at which the learning rates and the initialisation were found, which are then
            carried over to this n_embd by maximal update parametrisation (arXiv:2203.03466): AdamW's rates
            for blocks' matrices and the head fall with the width, a drawn head too, and drawn matrices of
            blocks with its square root. Raise n_head with n_embd, so that head_dim stays, and n_inner if set.
            0 takes them as they are.
    """

    vocab_size: int = 0
    block_size: int = 256
    n_layer: int = 4
    n_head: int = 3
    n_kv_head: int = 0
    n_embd: int = 192
    head_dim: int = 0
    n_inner: int = 0
    block: Literal["sequential", "parallel"] = "sequential"
    norm: Literal["rms", "layer"] = "layer"
    norm_eps: float = 1e-6
    norm_weight: bool = False
    norm_bias: bool = False
    position: Literal["rotary", "learned", "sinusoidal", "none"] = "rotary"
    rotary_dim: int = 0
    rotary_layout: Literal["half", "interleaved"] = "half"
    rope_theta: float = 10_000.0
    rope_scaling: Literal["none", "linear", "dynamic", "llama3"] = "none"
    rope_factor: float = 1.0
    rope_context: int = 0
    rope_low_freq: float = 1.0
    rope_high_freq: float = 4.0
    sliding_window: int = 0
    window_layers: tuple[int, ...] = ()
    mlp: Literal["gelu", "gelu_tanh", "relu2", "swiglu"] = "gelu"
    qk_norm: bool = True
    fused_qkv: bool = False
    qkv_layout: Literal["blocks", "heads", "shards"] = "blocks"
    qkv_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    tie_embeddings: bool = False
    dropout: float | None = None
    embed_dropout: float | None = None
    attention_dropout: float | None = None
    attention: Literal["fast", "reference"] = "fast"
    init: Literal["normal", "xavier", "zero_output"] = "zero_output"
    base_width: int = 0

    @property
    def widening(self) -> float:
        """How many times base_width the model is wide."""
        return self.n_embd / self.base_width if self.base_width else 1.0

    def resolved(self) -> ModelConfig:
        """The same with every 0 filled in; ValueError in one sentence for a shape that cannot be built."""
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        for name in (
            "n_kv_head",
            "head_dim",
            "n_inner",
            "rotary_dim",
            "rope_context",
            "sliding_window",
            "base_width",
        ):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"model.{name} is {getattr(self, name)}; it must be at least 1, or 0 for the default"
                )
        for name, kind in _kinds(ModelConfig).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"model.{name} is {getattr(self, name)!r}; it must be one of {get_args(kind)}"
                )
        if not self.norm_eps > 0:
            raise ValueError(f"model.norm_eps is {self.norm_eps}; it must be above 0")
        if self.norm == "rms" and self.norm_bias:
            raise ValueError(
                "model.norm rms has no shift; set model.norm_bias to false or model.norm to layer"
            )
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
        if self.base_width and self.tie_embeddings:
            raise ValueError(
                f"model.base_width is {self.base_width} and model.tie_embeddings true: across widths an "
                "embedding and a head learn at other rates; set model.tie_embeddings to false"
            )
        if not self.rope_factor >= 1:
            raise ValueError(f"model.rope_factor is {self.rope_factor}; it must be at least 1")
        if self.rope_scaling == "dynamic" and rotary_dim < 4:
            raise ValueError(
                f"model.rope_scaling dynamic needs at least 4 rotated dimensions, not {rotary_dim}; "
                "set model.rotary_dim or another scaling"
            )
        if self.rope_scaling == "llama3" and not 0 < self.rope_low_freq < self.rope_high_freq:
            raise ValueError(
                f"model.rope_low_freq {self.rope_low_freq} must be above 0 and below "
                f"model.rope_high_freq {self.rope_high_freq}"
            )
        if any(not 0 <= layer < self.n_layer for layer in self.window_layers):
            raise ValueError(
                f"model.window_layers {list(self.window_layers)} must be among the {self.n_layer} layers "
                f"0 to {self.n_layer - 1}"
            )
        if self.fused_qkv and self.qkv_layout != "blocks" and n_kv_head != self.n_head:
            raise ValueError(
                f"model.qkv_layout {self.qkv_layout} has as many key heads as query heads, not {n_kv_head} "
                f"and {self.n_head}; set model.qkv_layout to blocks"
            )
        if self.fused_qkv and self.qkv_layout == "shards" and self.n_head % 4:
            raise ValueError(
                f"model.qkv_layout shards needs a model.n_head that 4 divides, not {self.n_head}; "
                "set model.qkv_layout to blocks"
            )
        # Where nothing reads it, it stays 0: a run whose saved config sets what nothing reads is refused.
        reaches = self.rope_scaling in ("dynamic", "llama3")
        dropouts = {
            name: (self.dropout or 0.0) if getattr(self, name) is None else getattr(self, name)
            for name in ("dropout", "embed_dropout", "attention_dropout")
        }
        for name, p in dropouts.items():
            if not 0 <= p < 1:
                raise ValueError(f"model.{name} is {p}; it must be at least 0 and below 1")
        return replace(
            self,
            head_dim=head_dim,
            n_kv_head=n_kv_head,
            rotary_dim=rotary_dim if self.position == "rotary" else 0,
            n_inner=self.n_inner or 4 * self.n_embd,
            rope_context=self.rope_context or reaches * self.block_size,
            **dropouts,
        )


@dataclass(frozen=True)
class LoraConfig:
    """What trains of a pretrained `base`: low-rank adapters (LoRA, arXiv:2106.09685), or all of it.

    Args:
        r: Rank of the adapters; 0 trains the base's own weights instead.
        alpha: Adapters are scaled by alpha / r.
        dropout: On the adapters' input.
        targets: The modules that get an adapter, by published name (`c_attn`, `q_proj`, `wte`), by role
            (`attention`, `mlp`, `embedding`, `all-linear`) or by a pattern of full names with `*`.
        rank_pattern: Other ranks for modules whose published name ends in the key.
        alpha_pattern: Other alphas, likewise.
        rslora: Scale by alpha / sqrt(r) instead (arXiv:2312.03732).
        dora: Train the length of each output's weights apart from their direction (arXiv:2402.09353).
        init: `default` (A random, B zero) or `pissa` (the base's largest singular parts, arXiv:2404.02948).
        bias: Biases that train: `none`, `all`, or `lora_only`, those of modules with an adapter.
        train_modules: Modules that are trained whole and saved with the adapter, by published name.
        new_tokens: Tokens that are added to the tokenizer; of embedding and head only their rows train.
        lr_ratio: B's learning rate over A's (LoRA+, arXiv:2402.12354).
    """

    r: int = 0
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    init: Literal["default", "pissa"] = "default"
    bias: Literal["none", "all", "lora_only"] = "none"
    train_modules: tuple[str, ...] = ()
    new_tokens: tuple[str, ...] = ()
    lr_ratio: float = 1.0


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights move. What is not given of AdamW's rates, betas and eps follows `name`: see `resolved`.

    Args:
        name: `muon` (Muon for the blocks' matrices, AdamW for the rest) or `adamw`.
        lr: Learning rate of AdamW; none given means 0.01 beside Muon, and 1e-3 with `adamw`.
        muon_lr: Learning rate of Muon.
        embedding_lr: AdamW's for token and position embeddings; 0 means lr; none given means 0.3 beside Muon,
            and lr with `adamw`.
        head_lr: AdamW's for the head; 0 means lr; none given means 0.01 beside Muon, and lr with `adamw`.
        weight_decay: Decoupled, on matrices; never on norms and biases.
        beta1: AdamW's decay of the gradient's mean; none given means 0.8 beside Muon, and 0.9 with `adamw`.
        beta2: AdamW's decay of the gradient's square; none given means 0.95 beside Muon, and 0.999 with
            `adamw`.
        eps: Added to AdamW's denominator; none given means 1e-10 beside Muon, and 1e-8 with `adamw`.
        grad_clip: Largest gradient norm, all parameters together; 0 turns clipping off.
        schedule: `wsd`, `cosine`, `linear` or `constant`, after the warmup.
        warmup_steps: Steps over which the learning rate rises from 0.
        cooldown: Share of the run over which `wsd` decays.
        min_lr_factor: Where the schedules end, as a share of the learning rate.
        label_smoothing: Share of each target spread over the vocabulary; reported losses stay unsmoothed.
        z_loss: Weight of the squared log of the softmax's denominator, which keeps logits from drifting
            (arXiv:2204.02311; 1e-4 there); reported losses stay without.
    """

    name: Literal["muon", "adamw"] = "muon"
    lr: float | None = None
    muon_lr: float = 0.02
    embedding_lr: float | None = None
    head_lr: float | None = None
    weight_decay: float = 0.0
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    grad_clip: float = 1.0
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    warmup_steps: int = 20
    cooldown: float = 0.5
    min_lr_factor: float = 0.02
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def resolved(self) -> OptimizerConfig:
        """The same with every value that is not given as the optimizer has it."""
        own = OPTIMIZER_DEFAULTS.get(self.name, {})
        return replace(self, **{key: value for key, value in own.items() if getattr(self, key) is None})

    def rate_keys(self) -> dict[str, str]:
        """The key of the learning rate of each kind of parameters (optim.parameter_groups)."""
        own = self.resolved()
        return {
            "matrices": "muon_lr" if own.name == "muon" else "lr",
            "embeddings": "embedding_lr" if own.embedding_lr else "lr",
            "head": "head_lr" if own.head_lr else "lr",
            "vectors": "lr",
            "adapters": "lr",
        }

    def rates_read(self, kinds: Collection[str]) -> list[str]:
        """The full keys of the learning rates that parameters of these kinds learn at, each once."""
        return list(
            dict.fromkeys(f"optimizer.{key}" for kind, key in self.rate_keys().items() if kind in kinds)
        )


# What follows the optimizer. AdamW beside Muon moves little but embeddings and head, which take other rates
# than matrices; alone it has the values of torch.optim.AdamW.
OPTIMIZER_DEFAULTS: dict[str, dict[str, float]] = {
    "muon": {
        "lr": 0.01,
        "embedding_lr": 0.3,
        "head_lr": 0.01,
        "beta1": 0.8,
        "beta2": 0.95,
        "eps": 1e-10,
    },
    "adamw": {
        "lr": 1e-3,
        "embedding_lr": 0.0,  # Zero follows lr.
        "head_lr": 0.0,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
    },
}


@dataclass(frozen=True)
class TrainConfig:
    """How long, how often, in which precision, and where it is written.

    Args:
        run: Folder of the run; it must be new or empty unless `resume` is set. By default a new one, named
            after the time, under `runs`.
        resume: Go on from the newest checkpoint in `run`.
        prove_resume: Instead of a run, prove that one that is killed and resumed ends as one that never was.
        plan: Instead of a run, say what memory and time it would take, by a short measurement.
        overfit: Train on a tiny corpus (recipes/overfit) until it is known by heart, then prove it.
        base: Folder or hub id of a published model to start from; `lora` says what of it trains, and its
            tokenizer is used unless `tokenizer.path` names another. Its defaults are recipes/finetune.yaml.
        base_revision: Branch, tag or commit of `base` on the hub; the run's config.yaml names the commit.
        base_format: How frozen weights are held: `fp32`, `bf16` or `nf4` (4.13 bits, arXiv:2305.14314);
            `auto` is the number format of the run's matrix products.
        row_length: Tokens in a training row; 0 means model.block_size, and where `base` is given 512 of it,
            or fewer where the longest example needs fewer, in steps of 64.
        seed: Of the weights, the order of the data and dropout.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: `auto` (what the hardware computes natively), `bf16`, `fp16` or `fp32`.
        eval_precision: Precision of validation; `auto` is the training precision.
        batch_size: Rows in a micro-batch.
        accumulation: Micro-batches in a step.
        max_seconds: Wall-clock budget of the training loop, its validations included; 0 is none, or 300 where
            no other budget is set either.
        max_steps: Budget in updates; 0 is none.
        max_epochs: Budget in passes over the data; 0 is none.
        validate_every: Steps between validations; 0 validates only at the end.
        validation_rows: Rows in each validation, spread evenly over the validation files, the same ones for
            any batch size; the best checkpoint is chosen by them. The scores at the end read all test files.
        patience: Stop after this many validations without a better loss; 0 never does.
        save_every: Steps between checkpoints that are kept for good; 0 keeps only the best and the last.
        keep: How many of those to keep; 0 keeps all.
        log_every: Steps between lines in the logs.
        activation_checkpointing: Recompute each block in backward instead of keeping its activations.
        compile: Use torch.compile; where no compiler is, warn and run eager.
        allow: Names of faults that may pass; they are recorded in the run and printed with its scores.
        samples: Held-out functions that are completed at the end.
    """

    run: str = ""
    resume: bool = False
    prove_resume: bool = False
    plan: bool = False
    overfit: bool = False
    base: str | None = None
    base_revision: str | None = None
    base_format: Literal["auto", "fp32", "bf16", "nf4"] = "auto"
    row_length: int = 0
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    eval_precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    batch_size: int = 8
    accumulation: int = 1
    max_seconds: float = 0.0
    max_steps: int = 0
    max_epochs: float = 0.0
    validate_every: int = 100
    validation_rows: int = 64
    patience: int = 0
    save_every: int = 0
    keep: int = 0
    log_every: int = 10
    activation_checkpointing: bool = False
    compile: bool = False
    allow: tuple[str, ...] = ()
    samples: int = 3


@dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def row_length(self) -> int:
        """Tokens in a training row."""
        return self.train.row_length or self.model.block_size

    def with_optimizer_defaults(self) -> Config:
        """The same with what is not given of the optimizer's settings as the optimizer has it."""
        return replace(self, optimizer=self.optimizer.resolved())

    def to_dict(self) -> dict[str, Any]:
        """The layout of the YAML files: training's settings at the top, the other groups below their name."""
        plain = {
            name: {
                key: list(v) if isinstance(v, tuple) else v for key, v in group.items()
            }  # YAML has no tuples
            for name, group in dataclasses.asdict(self).items()
        }
        return plain.pop("train") | plain

    @classmethod
    def from_dict(cls, values: Any) -> Config:
        """The inverse of `to_dict`; a missing key takes its default, or what runs did before it was there
        (`BEFORE`), and no other file is ever read.

        Raises:
            ValueError: A key, type or value is not allowed; one sentence.
        """
        try:
            config = _build(_in_rows(values), BEFORE)
            check_ranges(config)
        except ValueError as error:
            raise ValueError(f"the saved config cannot be read: {one_line(str(error))}") from None
        return config


RECIPES = Path(__file__).parent / "recipes"
CONFIG_GROUPS: dict[str, type] = {
    "": TrainConfig,
    "data": DataConfig,
    "tokenizer": TokenizerConfig,
    "model": ModelConfig,
    "lora": LoraConfig,
    "optimizer": OptimizerConfig,
}
# Keys that came after runs had been saved, with what those runs did: their config.yaml lacks them.
BEFORE: dict[str, Any] = {
    "data.heal": False,
    "data.regroup": False,
    "data.test_one_in": 0,
    "model.base_width": 0,
}
_LARGEST = {int: 2**63 - 1, float: sys.float_info.max}
# Key: least, most, and which of the two is itself refused. None is no bound but the type's own; what depends
# on several keys is in ModelConfig.resolved. The model's upper bounds only keep out what no machine holds.
RANGES: dict[str, tuple[float | None, float | None, Literal["", "above", "below"]]] = {
    "seed": (0, None, ""),
    "row_length": (0, 2**24, ""),
    "batch_size": (1, None, ""),
    "accumulation": (1, None, ""),
    "max_seconds": (0, None, ""),
    "max_steps": (0, None, ""),
    "max_epochs": (0, None, ""),
    "validate_every": (0, None, ""),
    "validation_rows": (1, None, ""),
    "patience": (0, None, ""),
    "save_every": (0, None, ""),
    "keep": (0, None, ""),
    "log_every": (1, None, ""),
    "samples": (0, None, ""),
    "data.validation_one_in": (0, None, ""),
    "data.test_one_in": (0, None, ""),
    "data.fim_rate": (0, 1, ""),
    "data.cache_gb": (0, None, ""),
    "data.workers": (0, None, ""),
    "tokenizer.vocab_size": (1, 2**24, ""),
    "tokenizer.min_count": (0, None, ""),
    "model.vocab_size": (0, 2**24, ""),
    "model.block_size": (2, 2**24, ""),
    "model.n_layer": (1, 10_000, ""),
    "model.n_head": (1, 2**20, ""),
    "model.n_embd": (1, 2**20, ""),
    "model.head_dim": (0, 2**20, ""),
    "model.n_inner": (0, 2**22, ""),
    "model.rope_theta": (0, None, "above"),
    "model.rope_context": (0, 2**32, ""),
    "model.sliding_window": (0, 2**32, ""),
    "lora.r": (0, 2**16, ""),
    "lora.alpha": (0, None, "above"),
    "lora.dropout": (0, 1, "below"),
    "lora.lr_ratio": (0, None, "above"),
    "optimizer.lr": (0, None, ""),
    "optimizer.muon_lr": (0, None, ""),
    "optimizer.embedding_lr": (0, None, ""),
    "optimizer.head_lr": (0, None, ""),
    "optimizer.weight_decay": (0, None, ""),
    "optimizer.beta1": (0, 1, "below"),
    "optimizer.beta2": (0, 1, "below"),
    "optimizer.eps": (0, None, "above"),
    "optimizer.grad_clip": (0, None, ""),
    "optimizer.warmup_steps": (0, None, ""),
    "optimizer.cooldown": (0, 1, ""),
    "optimizer.min_lr_factor": (0, 1, ""),
    "optimizer.label_smoothing": (0, 1, "below"),
    "optimizer.z_loss": (0, None, ""),
}


def parse_config(argv: Sequence[str] | None = None, description: str = "") -> Config:
    """The Config of a command line: defaults, then each `--config FILE.yaml`, then single flags.

    A mistake prints one sentence and exits with 2: an unknown key (with the nearest known one), a value of
    the wrong type or out of range, a model that cannot be built, and a key that is set but that nothing
    would read.
    """
    parser = make_parser(CONFIG_GROUPS, description)
    words = _switches(argv)
    if any(word == "--overfit" and after.lower() in ("true", "yes", "on") for word, after in pairwise(words)):
        words = ["--config", str(RECIPES / "overfit.yaml"), *words]
    words, rate = _without_rate(words)
    values = parser.parse_args(words).clone(with_meta=False).as_dict()
    if values["base"] is not None:  # said in a flag or in a file
        words = ["--config", str(RECIPES / "finetune.yaml"), *words]
        values = parser.parse_args(words).clone(with_meta=False).as_dict()
    values.pop("config", None)
    try:
        config = _build(values)
        if rate:
            acting = config.optimizer.rates_read(possible_kinds(config))
            raise ValueError(f"{rate} is no flag; did you mean {' or '.join(acting)}?")
        sourced = any(word.split("=")[0] == "--data.source" for word in words)
        if config.train.overfit and config.data.source == DataConfig.source and not sourced:
            config = replace(config, data=replace(config.data, source=str(RECIPES / "overfit")))
        check_ranges(config)
        held = config.train.base_format
        if config.train.base is not None and config.lora.r == 0 and held in ("bf16", "nf4"):
            raise ValueError(
                f"base_format is {held} and lora.r is 0, by which all of the base would train, and weights "
                "can only in fp32: set lora.r to 1 or more to train adapters, or remove base_format"
            )
        given = [word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")]
        for key, reason in unused_keys(config, given):
            raise ValueError(f"{key} is set, but {reason}; remove it")
        return config
    except ValueError as error:
        return parser.error(str(error))  # exits


def _without_rate(words: list[str]) -> tuple[list[str], str]:
    """The words without `--lr`, and that flag or "": which key is meant follows from the rest."""
    place = next(
        (n for n, word in enumerate(words) if word.split("=")[0] in ("--lr", "--learning_rate")), None
    )
    if place is None:
        return words, ""
    has_value = "=" not in words[place] and not "".join(words[place + 1 : place + 2]).startswith("--")
    return words[:place] + words[place + 1 + has_value :], words[place].split("=")[0]


def check_ranges(config: Config) -> None:
    """ValueError in one sentence for a number outside RANGES, an empty source or a model without a shape."""
    for key, value in _flat(config).items():
        if type(value) not in _LARGEST:
            continue
        largest = _LARGEST[type(value)]
        least, most, refused = RANGES.get(key, (None, None, ""))
        if not abs(value) <= largest:  # also not a number
            bound = "finite" if isinstance(value, float) else f"at most {largest}"
        elif least is not None and (value < least or (refused == "above" and value == least)):
            bound = f"{'above' if refused == 'above' else 'at least'} {least}"
        elif most is not None and (value > most or (refused == "below" and value == most)):
            bound = f"{'below' if refused == 'below' else 'at most'} {most}"
        else:
            continue
        raise ValueError(f"{key} is {value}; it must be {bound}")
    for name in ("targets", "train_modules", "new_tokens"):
        if not all(getattr(config.lora, name)):
            raise ValueError(f"lora.{name} is {list(getattr(config.lora, name))}; none of them may be empty")
    for name in ("rank_pattern", "alpha_pattern"):
        for module, value in getattr(config.lora, name).items():
            if not 0 < value < math.inf:
                raise ValueError(f"lora.{name}.{module} is {value}; it must be above 0")
    if not config.data.source:
        raise ValueError("data.source is ''; it must be `stdlib`, a folder or a file")
    # A base brings its own block_size, which is compared as soon as it is known.
    if config.row_length > config.model.block_size and config.train.base is None:
        raise ValueError(
            f"row_length is {config.row_length}; it must be at most model.block_size, "
            f"{config.model.block_size}"
        )
    replace(config.model, vocab_size=config.model.vocab_size or 1).resolved()


def possible_kinds(config: Config) -> set[str]:
    """The kinds of parameters that train (optim.parameter_groups); with a base, all that may be."""
    model, lora, kinds = config.model, config.lora, set(OptimizerConfig().rate_keys())
    if config.train.base is None:
        vectors = (model.norm_weight, model.norm_bias, model.qkv_bias, model.attention_bias, model.mlp_bias)
        absent = {
            "adapters": True,
            "head": model.tie_embeddings,
            "vectors": not (any(vectors) or model.head_bias),
        }
        return {kind for kind in kinds if not absent.get(kind)}
    if lora.r and not lora.train_modules and not lora.new_tokens:
        return {"adapters", "vectors"}
    return kinds if lora.r else kinds - {"adapters"}


def unread_rates(
    optimizer: OptimizerConfig, kinds: Collection[str], given: Collection[str] = ()
) -> Iterator[tuple[str, str]]:
    """Learning rates that are set although no parameter learns at them, each with the reason.

    Args:
        kinds: Of the parameters that train.
        given: Full keys that the user named, whose value counts as set whatever it is. Elsewhere a value that
            the optimizer would have without it does not: a run's config.yaml holds every key.
    """
    read = {*optimizer.rates_read(kinds)}
    read |= {
        f"optimizer.{key}_lr"
        for kind, key in (("embeddings", "embedding"), ("head", "head"))
        if kind in kinds
    }
    for name in ("lr", "muon_lr", "embedding_lr", "head_lr"):
        key, value = f"optimizer.{name}", getattr(optimizer, name)
        # Runs wrote the values beside Muon for every optimizer, before what is not given followed it.
        tables = [OPTIMIZER_DEFAULTS[own] for own in ("muon", optimizer.name)]
        unset = {table.get(name, OptimizerConfig.muon_lr) for table in tables}
        if name in ("embedding_lr", "head_lr"):
            unset.add(0.0)  # Zero follows lr.
        if key in read or value is None or (value in unset and key not in given):
            continue
        acting = optimizer.rates_read(kinds)
        named = " and ".join(filter(None, [", ".join(acting[:-1]), *acting[-1:]])) or "none"
        yield key, f"no parameter of this run learns at it; what acts is {named}"


def unused_keys(config: Config, given: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Keys that differ from their default although nothing reads them, each with the reason.

    Args:
        given: As of `unread_rates`.
    """
    model, optimizer, tokenizer, train = config.model, config.optimizer, config.tokenizer, config.train
    trained = tokenizer.path is None and train.base is None
    adapted = train.base is not None and config.lora.r > 0
    rules = {
        "data.difficulty": (config.data.order not in ("shuffled", "sequential"), "data.order goes by none"),
        "data.fim_rate": (not trained, "only base or tokenizer.path brings tokens for it"),
        "tokenizer.kind": (
            trained or tokenizer.kind == "pretrained",
            "tokenizer.path or base brings a finished tokenizer",
        ),
        "tokenizer.vocab_size": (trained, "tokenizer.path or base brings a finished tokenizer"),
        "tokenizer.min_count": (
            trained and tokenizer.kind == "code",
            "only a new `code` tokenizer counts pieces",
        ),
        "base_revision": (train.base is not None, "base is not"),
        "base_format": (adapted, "without base and lora.r nothing is frozen"),
        "lora.r": (train.base is not None, "base is not"),
        **{
            f"lora.{f.name}": (adapted, "lora.r is 0" if train.base else "base is not")
            for f in dataclasses.fields(LoraConfig)
            if f.name != "r"
        },
        "model.base_width": (train.base is None, "base brings weights of its own"),
        "model.rotary_dim": (model.position == "rotary", "model.position is not rotary"),
        "model.rotary_layout": (model.position == "rotary", "model.position is not rotary"),
        "model.rope_theta": (model.position == "rotary", "model.position is not rotary"),
        "model.rope_scaling": (model.position == "rotary", "model.position is not rotary"),
        "model.rope_factor": (model.rope_scaling != "none", "model.rope_scaling is none"),
        "model.rope_context": (
            model.rope_scaling in ("dynamic", "llama3"),
            "model.rope_scaling is neither dynamic nor llama3",
        ),
        "model.rope_low_freq": (model.rope_scaling == "llama3", "model.rope_scaling is not llama3"),
        "model.rope_high_freq": (model.rope_scaling == "llama3", "model.rope_scaling is not llama3"),
        "model.window_layers": (model.sliding_window > 0, "model.sliding_window is 0"),
        "model.qkv_layout": (model.fused_qkv, "model.fused_qkv is false"),
        "optimizer.cooldown": (optimizer.schedule == "wsd", "optimizer.schedule is not wsd"),
        "optimizer.min_lr_factor": (optimizer.schedule != "constant", "optimizer.schedule is constant"),
        "keep": (train.save_every > 0, "save_every is 0"),
        "patience": (train.validate_every > 0 or train.save_every > 0, "validate_every and save_every are 0"),
    }
    default, values = _flat(Config()), _flat(config)
    for key, (is_read, reason) in rules.items():
        if not is_read and values[key] != default[key]:
            yield key, reason
    for key, reason in unread_rates(optimizer, possible_kinds(config), given):
        if key == "optimizer.muon_lr" and optimizer.name != "muon":
            reason = f"optimizer.name is not muon, and {reason}"
        if key == "optimizer.head_lr" and model.tie_embeddings and train.base is None:
            reason = f"model.tie_embeddings leaves no separate head, and {reason}"
        yield key, reason


# How torch words it: on CUDA, on Windows, on Linux.
_MEMORY_IS_FULL = ("out of memory", "not enough memory", "allocate memory")


def memory_is_full(error: BaseException) -> bool:
    """Whether that is what an error says, Python's own or torch's."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _MEMORY_IS_FULL)


@contextmanager
def one_sentence() -> Iterator[None]:
    """A user's mistake, a full disk or full memory ends the command with one sentence and exit code 2.

    An interrupt exits with 130. Set PLUMB_TRACEBACK=1 to see where it came from.
    """
    with shown_safely():
        try:
            yield
        except (ValueError, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
            full = memory_is_full(error)
            if os.environ.get("PLUMB_TRACEBACK") or (isinstance(error, RuntimeError) and not full):
                raise
            if isinstance(error, KeyboardInterrupt):
                print("interrupted", file=sys.stderr)
                sys.exit(130)
            refuse(_sentence_of(error))


def _sentence_of(error: BaseException) -> str:
    """What is said of an error that ends a command."""
    if memory_is_full(error):
        return "memory is full; a smaller batch_size, model or corpus needs less"
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{error.filename} cannot be used ({error.strerror}); name a folder you may write to"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename} cannot be used ({error.strerror}); name another file or folder"
    return str(error)


MOST_BYTES = 2**28  # The most bytes of a document or of a row of it, which is tokenised whole.


def bounded_lines(lines: io.BufferedIOBase, path: Path) -> Iterator[bytes]:
    """The lines of an open file; ValueError for one that is too long to be held.

    Without a bound a gz of a megabyte, or a sparse file, may be one line that no memory holds.
    """
    for number, line in enumerate(iter(lambda: lines.readline(MOST_BYTES + 1), b""), 1):
        if len(line) > MOST_BYTES:
            raise ValueError(
                f"{path} line {number} has more than {MOST_BYTES:,} bytes, the most of a row: check that it "
                "is the file you mean, or write its text in several rows"
            )
        yield line


class RepeatedKey(ValueError):
    """An object of JSON has a key twice, of which a parser takes the later one without a word."""


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, for json's `object_pairs_hook`; RepeatedKey if a key is in two of them."""
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise RepeatedKey(f"the key {reprlib.repr(twice)} stands twice in it")
    return values


def parse_line(line: str, where: str) -> Any:
    """The value of a line of JSONL; ValueError that names `where`, the file and the line, and the column."""
    at = ""
    try:
        # json would count the line end, and say line 2 column 1.
        return json.loads(line.rstrip("\r\n"), object_pairs_hook=unrepeated)
    except RepeatedKey as error:
        raise ValueError(f"{where} has two readings: {error}; leave one out") from None
    except json.JSONDecodeError as error:
        at, reason = f" at column {error.colno}", error.msg.split(" (")[0]
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:  # a number of thousands of digits
        reason = str(error).split(";")[0]
    raise ValueError(f"{where} is not JSON{at}: {reason}; write the row as one object in one line")


def say(text: str) -> None:
    """Print. A reader (`| head`) or a terminal that went away does not end the command."""
    try:
        print(text, flush=True)
    except OSError:  # what is still in the buffer would fail once more at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def refuse_unwritable(folder: str | Path, setting: str, unless: str | None = None) -> None:
    """ValueError if a folder can neither be written to nor be made; nothing of the try is left.

    Args:
        setting: What names it, for the sentence.
        unless: A pattern of what may make it useful all the same, as a cache that is only read.
    """
    whole = Path(os.path.abspath(folder))
    there = next(path for path in (whole, *whole.parents) if os.path.exists(path))
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".plumb-"):
            return
    except OSError as error:
        if unless is not None and there == whole and next(whole.glob(unless), None) is not None:
            return
        raise ValueError(
            f"{setting} {folder} cannot be written to ({there}: {error.strerror}); name a folder that you "
            "may write to"
        ) from None


def write_atomically(path: Path, text: str) -> None:
    """Write under a temporary name in the same folder, flush to the disk, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _flat(config: Config) -> dict[str, Any]:
    nested = config.to_dict()
    groups = {key: value for key, value in nested.items() if isinstance(value, dict)}
    flat = {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}
    return flat | {key: value for key, value in nested.items() if key not in groups}


def _in_rows(values: Any) -> Any:
    """The same of a run saved when a validation's size was given in batches."""
    if not isinstance(values, dict) or type(batches := values.get("validation_batches")) is not int:
        return values
    rows = values.get("batch_size", TrainConfig.batch_size)
    rest = {key: value for key, value in values.items() if key != "validation_batches"}
    return rest | ({"validation_rows": batches * rows} if type(rows) is int else {})


def _build(values: Any, missing: dict[str, Any] | None = None) -> Config:
    """The Config of plain values laid out as by `to_dict`; ValueError for an unknown key or a wrong type.

    `missing` has values by full key for keys that are left out, instead of their defaults.
    """
    if not isinstance(values, dict):
        raise ValueError(f"it is {reprlib.repr(values)}; it must be a mapping of keys to values")
    missing = missing or {}
    groups = {
        key: _group(key, CONFIG_GROUPS[key], values.get(key, {}), missing) for key in CONFIG_GROUPS if key
    }
    train = {key: value for key, value in values.items() if key not in groups}
    return Config(train=_group("", TrainConfig, train, missing), **groups)


@functools.cache
def _kinds(group: type) -> dict[str, Any]:
    return get_type_hints(group)


def _group(name: str, group: type, values: Any, missing: dict[str, Any]) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{name} is {reprlib.repr(values)}; it must be a mapping of keys to values")
    kinds = _kinds(group)
    typed = {key: missing[full] for key in kinds if (full := f"{name}.{key}".lstrip(".")) in missing}
    for key, value in values.items():
        full = f"{name}.{key}".lstrip(".")
        if key not in kinds:
            raise ValueError(f"{full} is not a known key")
        typed[key] = _typed(full, value, kinds[key])
    return group(**typed)


def _typed(key: str, value: Any, kind: Any) -> Any:
    """The value as its field holds it: a whole number may be a float's value, a list a tuple's."""
    if float in (kind, *get_args(kind)) and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if get_origin(kind) is tuple:
        value = tuple(value) if isinstance(value, list) else value
        fits = isinstance(value, tuple) and all(type(item) is get_args(kind)[0] for item in value)
    elif get_origin(kind) is Literal:
        fits = type(value) is str and value in get_args(kind)
    elif get_origin(kind) is dict:
        if not isinstance(value, dict) or any(type(name) is not str for name in value):
            raise ValueError(f"{key} is {reprlib.repr(value)}; it must be a mapping of names to values")
        return {name: _typed(f"{key}.{name}", v, get_args(kind)[1]) for name, v in value.items()}
    else:
        fits = type(value) in (get_args(kind) or (kind,))  # exactly: True is no int
    if not fits:
        raise ValueError(f"{key} is {reprlib.repr(value)}; it must be {_wanted(kind)}")
    return value


def _switches(argv: Sequence[str] | None) -> list[str]:
    """`--overfit` alone means `--overfit true`, and so does `--overfit=true`; `--allow a,b` is a list.

    `--fix`, what a guard against leaks asks for, is `--data.regroup`.
    """
    switches = {f"--{f.name}" for f in dataclasses.fields(TrainConfig) if f.type == "bool"}
    switches.add("--data.regroup")
    lists = {
        f"--{name}.{f.name}".replace("--.", "--")
        for name, group in CONFIG_GROUPS.items()
        for f in dataclasses.fields(group)
        if f.type == "tuple[str, ...]"
    }
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        name, *value = word.split("=", 1)
        if name == "--fix":
            name = "--data.regroup"
        words += [name, *value] if name in switches | lists else [word]
    spelled = []
    for word, following in pairwise([*words, "--"]):
        if spelled and spelled[-1] in lists and not word.startswith("["):
            word = json.dumps(word.split(","))  # quoted: to YAML a leading * is no text
        spelled.append(word)
        if word in switches and following.startswith("-"):
            spelled.append("true")
    return spelled


def make_parser(groups: dict[str, type], description: str) -> Any:
    """A jsonargparse parser for dataclasses, each below its prefix, whose errors are one sentence."""
    from jsonargparse import ActionConfigFile, ArgumentParser, set_loader  # pyright: ignore
    from yaml import YAMLError

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            if message.startswith("Unexpected config:"):  # and then the whole file
                message = "a --config file must be a YAML mapping of keys to values"
            if _FAULT in message:  # behind what the parser was about
                message = message.rpartition(_FAULT)[2]
            refuse(f"{_in_our_words(message, groups)}{_suggestion(message, groups)}")

        def parse_args(self, *args: Any, **options: Any) -> Any:
            from yamlfile import read_yaml

            words = args[0] if args and args[0] is not None else sys.argv[1:]
            flags = ("--config", *(f"--{name}" for name in groups if name))  # a group may have a file too
            for word, after in pairwise([*words, ""]):
                flag, equals, value = word.partition("=")
                file = value if equals else after
                if flag in flags and os.path.isfile(file):  # Otherwise the word holds the values themselves.
                    try:
                        read_yaml(Path(file))
                    except ValueError as error:
                        self.error(str(error))
                    except OSError:  # which the parser tells
                        pass
            try:
                return super().parse_args(*args, **options)
            except (ValueError, TypeError, OSError, RecursionError) as error:  # a file that is no YAML
                self.error(f"the settings cannot be read: {error}")

    set_loader("settings", _load_settings, (ValueError, RecursionError, YAMLError))
    parser = Parser(description=description, allow_abbrev=False, parser_mode="settings")
    parser.add_argument("--config", action=ActionConfigFile, help="A YAML file; flags after it override it.")
    for name, group in groups.items():
        parser.add_class_arguments(group, name or None)
    return parser


_FAULT = "the settings cannot be taken: "


def _load_settings(text: str, path: str = "") -> Any:
    """What a text is to the parser: of a file, of a file that it names, or on the command line.

    Raises:
        ValueError: As `parse_yaml`. Where the parser wants text, it then takes the text as it is.
    """
    from jsonargparse import get_loader

    from yamlfile import parse_yaml

    name = str(path) or "the settings given"
    try:
        values = parse_yaml(text, name)
        named = values.get("config") if isinstance(values, dict) else None
        if named is not None and not isinstance(named, str):
            raise ValueError(f"config in {name} is {reprlib.repr(named)}; it must be one file's name")
    except ValueError as error:
        raise ValueError(f"{_FAULT}{error}") from None
    return get_loader("yaml")(text)


def _in_our_words(message: str, groups: dict[str, type]) -> str:
    """An error of jsonargparse in one line; a value that does not fit its key with what would."""
    line = one_line(message)
    found = re.search(
        r'Parser key "([\w.]+)": (?:Expected|Does not validate) .*?(?:Got|Given) value: ?(.*)$', line
    )
    kinds = {
        f"{name}.{key}".lstrip("."): kind
        for name, group in groups.items()
        for key, kind in _kinds(group).items()
    }
    if found is None or found[1] not in kinds:
        return line
    kind, value = kinds[found[1]], found[2]
    near = ""
    if get_origin(kind) is Literal:
        near = "".join(difflib.get_close_matches(value.lower(), get_args(kind), n=1))
    meant = f"; did you mean {near}?" if near else ""
    # Of a list or mapping the parser names what is wrong inside, or that it is neither.
    inside = get_origin(kind) in (list, tuple, dict) and not re.search("<class '(list|tuple|dict)'>", line)
    is_or_holds = "holds" if inside else "is"
    shown = value or repr("")
    return f"{line[: found.start()]}{found[1]} {is_or_holds} {shown}; it must be {_wanted(kind)}{meant}"


def _wanted(kind: Any) -> str:
    """What a key of this type takes, in words."""
    inner = [argument for argument in get_args(kind) if argument not in (type(None), ...)]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(inner)}"
    if get_origin(kind) in (tuple, list):
        return f"a list, each {_wanted(inner[0])}"
    if get_origin(kind) is dict:
        return f"a mapping of names, each to {_wanted(inner[1])}, spelled {{NAME: VALUE}}"
    if inner:  # or None
        return _wanted(inner[0])
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(kind, str(kind))


def _suggestion(message: str, groups: dict[str, type]) -> str:
    """`; did you mean ...` for the first word of an error that is nearly a key."""
    known = [
        f"{name}.{f.name}".lstrip(".") for name, group in groups.items() for f in dataclasses.fields(group)
    ]
    group = re.search(r"Group '(\w+)' does not accept option '([\w.]+)'", message)
    flag = re.search(r"(?:unrecognized arguments: --|[Oo]ption '|Key ')([\w.]+)", message)
    if group:
        wrong = f"{group[1]}.{group[2]}"
    elif flag:
        wrong = flag[1]
    else:
        return ""
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6) or [
        key for key in known if key.split(".")[-1] == wrong.split(".")[-1]
    ]
    return f"; did you mean {near[0]}?" if near else ""
