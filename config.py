"""Settings: frozen dataclasses of plain values, saved with every run.

Each group below is one section of a YAML file and one prefix on the command line
(`--model.n_layer 6`). This module holds data only and imports nothing heavy, so that `--help`
answers at once. Training's own settings (`TrainConfig`) have no prefix: `--max_seconds 60`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints


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
            0 validates on the training files, which only `--overfit` allows.
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
    mlp: Literal["gelu", "gelu_tanh", "relu2", "swiglu"] = "gelu"
    qk_norm: bool = True
    fused_qkv: bool = False
    qkv_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    dropout: float = 0.0
    attention: Literal["fast", "reference"] = "fast"
    init: Literal["normal", "xavier", "zero_output"] = "zero_output"

    def resolved(self) -> ModelConfig:
        """The same with every 0 filled in; ValueError in one sentence for a shape that cannot be built."""
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("n_kv_head", "head_dim", "n_inner", "rotary_dim"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"model.{name} is {getattr(self, name)}; it must be at least 1, or 0 for the default"
                )
        for name, kind in get_type_hints(ModelConfig).items():
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
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout is {self.dropout}; it must be at least 0 and below 1")
        n_inner = self.n_inner or 4 * self.n_embd
        return replace(self, head_dim=head_dim, n_kv_head=n_kv_head, rotary_dim=rotary_dim, n_inner=n_inner)


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights move.

    Args:
        name: `muon` (Muon for the blocks' matrices, AdamW for the rest) or `adamw`.
        lr: Learning rate of AdamW.
        muon_lr: Learning rate of Muon.
        embedding_lr: AdamW's for token and position embeddings; 0 means lr.
        head_lr: AdamW's for the head; 0 means lr.
        weight_decay: Decoupled, on matrices; never on norms and biases.
        beta1: AdamW's decay of the gradient's mean.
        beta2: AdamW's decay of the gradient's square.
        eps: Added to AdamW's denominator.
        grad_clip: Largest gradient norm, all parameters together; 0 turns clipping off.
        schedule: `wsd`, `cosine`, `linear` or `constant`, after the warmup.
        warmup_steps: Steps over which the learning rate rises from 0.
        cooldown: Share of the run over which `wsd` decays.
        min_lr_factor: Where the schedules end, as a share of the learning rate.
        label_smoothing: Share of each target spread over the vocabulary; reported losses stay unsmoothed.
    """

    name: Literal["muon", "adamw"] = "muon"
    lr: float = 0.01
    muon_lr: float = 0.02
    embedding_lr: float = 0.3
    head_lr: float = 0.01
    weight_decay: float = 0.0
    beta1: float = 0.8
    beta2: float = 0.95
    eps: float = 1e-10
    grad_clip: float = 1.0
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    warmup_steps: int = 20
    cooldown: float = 0.5
    min_lr_factor: float = 0.02
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class TrainConfig:
    """How long, how often, in which precision, and where it is written.

    Args:
        run: Folder of the run; it must be new or empty unless `resume` is set. By default a new one, named
            after the time, under `runs`.
        resume: Go on from the newest checkpoint in `run`.
        overfit: Train on a tiny corpus (recipes/overfit) until it is known by heart, then prove it.
        seed: Of the weights, the order of the data and dropout.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: `auto` (what the hardware computes natively), `bf16`, `fp16` or `fp32`.
        eval_precision: Precision of validation; `auto` is the training precision.
        batch_size: Rows in a micro-batch.
        accumulation: Micro-batches in a step.
        max_seconds: Wall-clock budget of the training loop, its validations included; 0 is none.
        max_steps: Budget in updates; 0 is none.
        max_epochs: Budget in passes over the data; 0 is none.
        validate_every: Steps between validations; 0 validates only at the end.
        validation_batches: Batches in each validation on the way; the last one always reads all.
        patience: Stop after this many validations without a better loss; 0 never does.
        save_every: Steps between checkpoints that are kept for good; 0 keeps only the best and the last.
        keep: How many of those to keep; 0 keeps all.
        log_every: Steps between lines in the logs.
        activation_checkpointing: Recompute each block in backward instead of keeping its activations.
        compile: Use torch.compile; where no compiler is, warn and run eager.
        samples: Held-out functions that are completed at the end.
    """

    run: str = ""
    resume: bool = False
    overfit: bool = False
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
    validation_batches: int = 8
    patience: int = 0
    save_every: int = 0
    keep: int = 0
    log_every: int = 10
    activation_checkpointing: bool = False
    compile: bool = False
    samples: int = 3


@dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """The layout of the YAML files: training's settings at the top, the other groups below their name."""
        plain = dataclasses.asdict(self)
        plain["data"]["suffixes"] = list(self.data.suffixes)  # YAML knows no tuples
        return plain.pop("train") | plain

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of `to_dict`. ValueError for keys or types that it does not know."""
        parser = make_parser(CONFIG_GROUPS, "", exit_on_error=False)
        try:
            return _to_config(parser.instantiate(parser.parse_object(values)))
        except Exception as error:  # jsonargparse's and argparse's errors share no base class of their own
            raise ValueError(f"the saved config cannot be read: {_one_line(str(error))}") from None


RECIPES = Path(__file__).parent / "recipes"
CONFIG_GROUPS: dict[str, type] = {
    "": TrainConfig,
    "data": DataConfig,
    "tokenizer": TokenizerConfig,
    "model": ModelConfig,
    "optimizer": OptimizerConfig,
}


def parse_config(argv: Sequence[str] | None = None, description: str = "") -> Config:
    """The Config of a command line: defaults, then each `--config FILE.yaml`, then single flags.

    A mistake prints one sentence and exits with 2: an unknown key (with the nearest known one), a value of
    the wrong type, and a key that is set but that nothing would read.
    """
    parser = make_parser(CONFIG_GROUPS, description)
    words = _switches(argv)
    if any(word == "--overfit" and after == "true" for word, after in pairwise(words)):
        preset = ["--config", str(RECIPES / "overfit.yaml"), "--data.source", str(RECIPES / "overfit")]
        words = preset + words
    config = _to_config(parser.instantiate(parser.parse_args(words)))
    for key, reason in unused_keys(config):
        parser.error(f"{key} is set, but {reason}; remove it")
    return config


def unused_keys(config: Config) -> Iterator[tuple[str, str]]:
    """Keys that differ from their default although nothing reads them, each with the reason."""
    model, optimizer, tokenizer, train = config.model, config.optimizer, config.tokenizer, config.train
    trained = tokenizer.path is None
    rules = {
        "tokenizer.vocab_size": (trained, "tokenizer.path loads a finished tokenizer"),
        "tokenizer.min_count": (
            trained and tokenizer.kind == "code",
            "only a new `code` tokenizer counts pieces",
        ),
        "model.rotary_dim": (model.position == "rotary", "model.position is not rotary"),
        "model.rotary_layout": (model.position == "rotary", "model.position is not rotary"),
        "model.rope_theta": (model.position == "rotary", "model.position is not rotary"),
        "optimizer.muon_lr": (optimizer.name == "muon", "optimizer.name is not muon"),
        "optimizer.cooldown": (optimizer.schedule == "wsd", "optimizer.schedule is not wsd"),
        "keep": (train.save_every > 0, "save_every is 0"),
        "validation_batches": (train.validate_every > 0, "validate_every is 0"),
        "patience": (train.validate_every > 0, "validate_every is 0"),
    }
    default, values = _flat(Config()), _flat(config)
    for key, (is_read, reason) in rules.items():
        if not is_read and values[key] != default[key]:
            yield key, reason


@contextmanager
def one_sentence() -> Iterator[None]:
    """A user's mistake, or a full disk, ends the command with one sentence and exit code 2, no traceback.

    Set PLUMB_TRACEBACK=1 to see where it came from.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("PLUMB_TRACEBACK"):
            raise
        print(f"error: {_one_line(str(error))}", file=sys.stderr)
        sys.exit(2)


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


def _to_config(namespace: Any) -> Config:
    train = {f.name: namespace[f.name] for f in dataclasses.fields(TrainConfig)}
    groups = {name: namespace[name] for name in CONFIG_GROUPS if name}
    return Config(train=TrainConfig(**train), **groups)


def _switches(argv: Sequence[str] | None) -> list[str]:
    """`--overfit` alone means `--overfit true`."""
    switches = {f.name for f in dataclasses.fields(TrainConfig) if f.type == "bool"}
    words = list(sys.argv[1:] if argv is None else argv)
    spelled = []
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        spelled.append(word)
        if word.removeprefix("--") in switches and following.startswith("-"):
            spelled.append("true")
    return spelled


def _one_line(text: str) -> str:
    return " ".join(text.split())


def make_parser(groups: dict[str, type], description: str, **options: Any) -> Any:
    """A jsonargparse parser for dataclasses, each below its prefix, whose errors are one sentence."""
    from jsonargparse import ActionConfigFile, ArgumentParser  # pyright: ignore[reportPrivateImportUsage]

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            if not self.exit_on_error:
                raise ValueError(message)
            print(f"error: {_one_line(message)}{_suggestion(message, groups)}", file=sys.stderr)
            sys.exit(2)

    parser = Parser(description=description, **options)
    parser.add_argument("--config", action=ActionConfigFile, help="A YAML file; flags after it override it.")
    for name, group in groups.items():
        parser.add_class_arguments(group, name or None)
    return parser


def _suggestion(message: str, groups: dict[str, type]) -> str:
    """`; did you mean ...` for the first word of an error that is nearly a key."""
    known = [
        f"{name}.{f.name}".lstrip(".") for name, group in groups.items() for f in dataclasses.fields(group)
    ]
    group = re.search(r"Group '(\w+)' does not accept option '([\w.]+)'", message)
    flag = re.search(r"(?:unrecognized arguments: --|does not accept option '|Key ')([\w.]+)", message)
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
