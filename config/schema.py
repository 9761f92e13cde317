"""Settings: frozen dataclasses of plain values, saved with every run.

Each group below is one section of a YAML file and one prefix on the command line
(`--model.n_layer 6`). This module holds data only and imports nothing heavy, so that `--help`
answers at once. Training's own settings (`TrainConfig`) have no prefix: `--max_seconds 60`.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from config.console import one_line
from config.flags import setting
from config.model import ModelConfig
from config.ranges import refuse_out_of_range
from config.typed import typed_group

BASE_ROW = 512  # tokens in a training row of a base where no setting gives them; its context may be 131,072


@dataclass(frozen=True)
class DataConfig:
    """The corpus, and how it is split into training, validation and test files.

    Args:
        source: `stdlib` (the running interpreter's own library), a folder, or a .jsonl, .jsonl.gz or
            .parquet file. A folder that holds such files named train, validation and test is split by them.
        suffixes: Endings of the files that are read from a folder.
        text_field: Field that holds the text of a JSONL or Parquet row; by default `text`, else `content`.
            Without it rows may be examples: prompt and completion; input and output; instruction, input
            (which may be missing) and output; or prefix, suffix and middle.
        group_field: Field whose value keeps documents together in one split (a repository, say). Without it
            each document is its own group, and examples without a name go by their prompt.
        regroup: Find documents that belong together by their text (near duplicates, shared passages) and keep
            them in one split too. `--fix` is short for it. Unset, it is on for `stdlib`, many of whose code
            pages are near copies of each other, and off for a source of one's own.
        validation_one_in: Of the groups that are not test, those are validation where
            `sha1(group) % validation_one_in == 0`. The best checkpoint is chosen by them. 0 validates on the
            training files, which only `--overfit` allows.
        test_one_in: A group is test where `sha256(group) % test_one_in == 0`: the scores at the end are over
            these files, by which nothing was chosen. 0 scores the validation files instead.
        drop_comments: Remove comments and docstrings from Python files before they are tokenised. Examples
            cannot have it.
        skip_undecodable: Leave out, and count, files that are not UTF-8 instead of stopping at the first.
        loss_on: Tokens of an example that are targets in training: its `completion`, or `all` but the first.
            Validation scores completions either way, so that such runs compare.
        heal: Tokenise prompt and completion of an example as one text, and cut it where generation does, so
            that generation requests what was trained (tokenization/healing.py). Runs without this key have
            them apart.
        fim_rate: Share of the plain documents for training that are stored as prefix, suffix and middle, for
            models with such tokens (arXiv:2207.14255).
        order: Order of the training documents in an epoch: `shuffled`, `sequential` (as read), or by how hard
            they are: `easy-first`, `hard-first`, or `hybrid`, sampled from the easiest, whose share grows
            to all.
        difficulty: How hard a document is: `rarity` of its tokens, `entropy` of their distribution, or `loss`
            of an n-gram model that did not see it.
        cache: Folder for trained tokenizers and token stores, keyed by content.
        cache_gb: Bound of the cache, in 10**9 bytes. Entries that were used longest ago are removed to keep
            below it, but none that is open or was used since the run began; 0 is no bound.
        workers: Processes that tokenise; 0 means one for each core.
    """

    source: str = "stdlib"
    suffixes: tuple[str, ...] = (".py",)
    text_field: str | None = None
    group_field: str | None = None
    regroup: bool | None = setting(None, also=("fix",))
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
        """Return the settings with `regroup` decided, which no other code decides."""
        if self.regroup is not None:
            return self
        return replace(self, regroup=self.source == "stdlib")


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer that turns text into ids.

    Args:
        kind: `code` (for source code), `bpe` (byte-level BPE) or `pretrained` (a Hugging Face tokenizer.json
            folder).
        vocab_size: Largest vocabulary that `code` and `bpe` may learn, special tokens included.
        min_count: A piece enters the `code` vocabulary only if it occurs more than this many times.
        path: Folder of a trained or pretrained tokenizer to load instead of training one.
    """

    kind: Literal["code", "bpe", "pretrained"] = "code"
    vocab_size: int = 4096
    min_count: int = 10
    path: str | None = None


@dataclass(frozen=True)
class LoraConfig:
    """Training of a pretrained `base`: low-rank adapters (LoRA, arXiv:2106.09685), or all of its weights.

    Args:
        r: Rank of the adapters; 0 trains the base's own weights instead.
        alpha: Adapters are scaled by alpha / r.
        dropout: Dropout on the adapters' input.
        targets: The modules that get an adapter, by published name (`c_attn`, `q_proj`, `wte`), by role
            (`attention`, `mlp`, `embedding`, `all-linear`) or by a pattern of full names with `*`.
        rank_pattern: Other ranks for modules whose published name ends in the key.
        alpha_pattern: Other alphas, by the same names.
        rslora: Scale by alpha / sqrt(r) instead (arXiv:2312.03732).
        dora: Train the length of each output's weights apart from their direction (arXiv:2402.09353).
        init: `default` (A random, B zero) or `pissa` (the base's largest singular parts, arXiv:2404.02948).
        bias: Biases that train: `none`, `all`, or `lora_only`, those of modules with an adapter.
        train_modules: Modules that are trained as a full copy and saved with the adapter, by published name.
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
    """How the weights move. Rates, betas and eps of AdamW that are not given follow `name`: see `resolved`.

    Args:
        name: `muon` (Muon for the blocks' matrices, AdamW for the rest) or `adamw`.
        lr: Learning rate of AdamW; none given means 0.01 beside Muon, and 1e-3 with `adamw`.
        muon_lr: Learning rate of Muon.
        embedding_lr: AdamW's for token and position embeddings; 0 means lr; none given means 0.3 beside Muon,
            and lr with `adamw`.
        head_lr: AdamW's for the head; 0 means lr; none given means 0.01 beside Muon, and lr with `adamw`.
        weight_decay: Decoupled weight decay of matrices; norms and biases have none.
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
        """Return the settings with the optimizer's own value for each that is not given."""
        own = OPTIMIZER_DEFAULTS.get(self.name, {})
        return replace(self, **{key: value for key, value in own.items() if getattr(self, key) is None})

    def rate_keys(self) -> dict[str, str]:
        """Return the key of the learning rate of each kind of parameters (optim.parameter_groups)."""
        own = self.resolved()
        return {
            "matrices": "muon_lr" if own.name == "muon" else "lr",
            "embeddings": "embedding_lr" if own.embedding_lr else "lr",
            "head": "head_lr" if own.head_lr else "lr",
            "vectors": "lr",
            "adapters": "lr",
        }

    def rates_read(self, kinds: Collection[str]) -> list[str]:
        """Return the full keys of the learning rates at which parameters of these kinds learn, each once."""
        return list(
            dict.fromkeys(f"optimizer.{key}" for kind, key in self.rate_keys().items() if kind in kinds)
        )


# Values by optimizer. AdamW beside Muon moves little but embeddings and head, whose rates are not those of
# matrices; AdamW alone has the values of torch.optim.AdamW.
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
    """Length, precision, validation and folder of a run.

    Args:
        run: Folder of the run; it must be new or empty unless `resume` is set. By default it is a new one
            under `runs`, named after the time.
        resume: Go on from the newest checkpoint in `run`.
        prove_resume: Instead of a run, prove that one that is killed and resumed ends as one that is not.
        plan: Instead of a run, say what memory and time it would take, by a short measurement.
        prepare: Instead of a run, make its tokenizer and its token store.
        overfit: Train on a tiny corpus (recipes/overfit) until it is known by heart, then prove it.
        base: Folder or hub id of a published model to start from; `lora` says which of its weights train, and
            its tokenizer is used unless `tokenizer.path` names another. recipes/finetune.yaml has its
            defaults.
        base_revision: Branch, tag or commit of `base` on the hub; the run's config.yaml names the commit.
        base_format: Format that frozen weights are stored in: `fp32`, `bf16` or `nf4` (4.13 bits,
            arXiv:2305.14314); `auto` is that of the run's matrix products.
        row_length: Tokens in a training row; 0 means model.block_size, and where `base` is given 512 of it,
            or fewer where the longest example needs fewer, in steps of 64.
        seed: Seed of the weights, the order of the data and dropout.
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
        keep: How many of the checkpoints of `save_every` to keep; 0 keeps all.
        log_every: Steps between lines in the logs.
        log: Loggers beside metrics.jsonl: `tensorboard`, `wandb` (offline unless WANDB_MODE says otherwise)
            and `mlflow` (files in the run's folder unless MLFLOW_TRACKING_URI names a server); `[]` is none.
        activation_checkpointing: Recompute each block in backward instead of keeping its activations.
        compile: Use torch.compile; without a compiler, warn and run eagerly.
        allow: Names of faults that may pass; they are recorded in the run and printed with its scores.
        samples: Held-out functions that are completed at the end.
    """

    run: str = ""
    resume: bool = False
    prove_resume: bool = False
    plan: bool = False
    prepare: bool = False
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
    log: tuple[str, ...] = ("tensorboard",)
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
        """Return the config with `OptimizerConfig.resolved`."""
        return replace(self, optimizer=self.optimizer.resolved())

    def to_dict(self) -> dict[str, Any]:
        """Return the layout of YAML files: training's settings at the top, other groups below their name."""
        # YAML has no tuples.
        plain = {
            name: {key: list(v) if isinstance(v, tuple) else v for key, v in group.items()}
            for name, group in dataclasses.asdict(self).items()
        }
        return plain.pop("train") | plain

    @classmethod
    def from_dict(cls, values: Any) -> Config:
        """Return the config of `to_dict`'s layout; no other file is ever read.

        A missing key takes its default, or the value that runs had before the key was there (`BEFORE`).

        Raises:
            ValueError: A key, type or value is not allowed.
        """
        try:
            config = build(_in_rows(values), BEFORE)
            check_ranges(config)
        except ValueError as error:
            raise ValueError(f"the saved config cannot be read: {one_line(str(error))}") from None
        return config


CONFIG_GROUPS: dict[str, type] = {
    "": TrainConfig,
    "data": DataConfig,
    "tokenizer": TokenizerConfig,
    "model": ModelConfig,
    "lora": LoraConfig,
    "optimizer": OptimizerConfig,
}
# Keys that the config.yaml of older runs lacks, with the values that those runs had.
BEFORE: dict[str, Any] = {
    "data.heal": False,
    "data.regroup": False,
    "data.test_one_in": 0,
    "model.base_width": 0,
}


def check_ranges(config: Config) -> None:
    """Raise ValueError for a number outside RANGES, an empty source or a model that cannot be built."""
    refuse_out_of_range(flat(config))
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


def flat(config: Config) -> dict[str, Any]:
    """Return every value by its full key, such as `model.n_layer`."""
    nested = config.to_dict()
    groups = {key: value for key, value in nested.items() if isinstance(value, dict)}
    flat = {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}
    return flat | {key: value for key, value in nested.items() if key not in groups}


def _in_rows(values: Any) -> Any:
    """Convert the values of an older run, whose validation was sized in batches, to rows."""
    if not isinstance(values, dict) or type(batches := values.get("validation_batches")) is not int:
        return values
    rows = values.get("batch_size", TrainConfig.batch_size)
    rest = {key: value for key, value in values.items() if key != "validation_batches"}
    return rest | ({"validation_rows": batches * rows} if type(rows) is int else {})


def build(values: Any, missing: dict[str, Any] | None = None) -> Config:
    """Return the Config of plain values in the layout of `to_dict`.

    Args:
        missing: Values by full key for keys that are left out, instead of their defaults.

    Raises:
        ValueError: A key is unknown, or a value has a wrong type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"it is {reprlib.repr(values)}; it must be a mapping of keys to values")
    missing = missing or {}
    groups = {
        name: typed_group(name, group, values.get(name, {}), missing)
        for name, group in CONFIG_GROUPS.items()
        if name
    }
    train = {key: value for key, value in values.items() if key not in groups}
    return Config(train=typed_group("", TrainConfig, train, missing), **groups)
