"""Settings: frozen dataclasses of plain values, saved with every run.

Each group below is one section of a YAML file and one prefix on the command line
(`--model.n_layer 6`). This module holds data only and imports nothing heavy, so that `--help`
answers at once. Training's own settings (`TrainConfig`) have no prefix: `--max_seconds 60`.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from config.console import one_line
from config.model import ModelConfig
from config.setting import (
    ALWAYS_THERE,
    FREE,
    REFUSED,
    WARNED,
    Setting,
    refuse_out_of_range,
    setting,
    settings_of,
)
from config.typed import field_types, typed_group
from config.uses import (
    ADAPTED,
    FROM_BASE,
    FROZEN_BASE,
    GRADED,
    OWN_CODE_TOKENIZER,
    OWN_OR_PRETRAINED,
    OWN_TOKENIZER,
    SAVES_ON_THE_WAY,
    SCHEDULED,
    VALIDATES_ON_THE_WAY,
    WSD,
)

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
            (which may be missing) and output; prefix, suffix and middle; or messages, a conversation.
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
        fim_rate: Share of the plain documents for training that are stored as prefix, suffix and middle
            (arXiv:2207.14255). The tokenizer needs tokens for them, as every one has that is trained here.
        fim_order: Order in which a gap is shown: `psm` is prefix, suffix, middle; `spm` is suffix, prefix,
            middle, of which an engine that has read an earlier prompt reads only what was typed since.
        order: Order of the training documents in an epoch: `shuffled`, `sequential` (as read), or by how hard
            they are: `easy-first`, `hard-first`, or `hybrid`, sampled from the easiest, whose share grows
            to all.
        difficulty: How hard a document is: `rarity` of its tokens, `entropy` of their distribution, or `loss`
            of an n-gram model that did not see it.
        cache: Folder for trained tokenizers and token stores, keyed by content.
        cache_gb: Bound of the cache, in 10**9 bytes. Entries that were used longest ago are removed to keep
            below it, but none that is open or was used since the run began; 0 is no bound.
        workers: Processes that tokenise; 0 means one for each core.
        verify: Read all files of the source, even where their names, sizes and times are as recorded.
        store: A folder that `--prepare` has written, with the tokenizer and the tokens; a run that is given
            it needs no source, and takes the settings that the tokens were made with. With `--prepare` the
            folder to write, which then has the short name `--out`.
    """

    source: str = setting("stdlib", on_resume=FREE)
    suffixes: tuple[str, ...] = setting((".py",), on_resume=REFUSED)
    text_field: str | None = setting(None, on_resume=REFUSED)
    group_field: str | None = setting(None, on_resume=REFUSED)
    regroup: bool | None = setting(None, also=("fix",), before=False, always_hashed=True, on_resume=REFUSED)
    validation_one_in: int = setting(10, at_least=0, on_resume=REFUSED)
    test_one_in: int = setting(10, at_least=0, before=0, on_resume=REFUSED)
    drop_comments: bool = setting(False, on_resume=REFUSED)
    skip_undecodable: bool = setting(False, on_resume=REFUSED)
    loss_on: Literal["completion", "all"] = setting("completion", on_resume=REFUSED)
    heal: bool = setting(True, before=False, on_resume=REFUSED)
    fim_rate: float = setting(0.0, at_least=0, at_most=1, on_resume=REFUSED)
    fim_order: Literal["psm", "spm"] = setting("psm", before="psm", on_resume=REFUSED)
    order: Literal["shuffled", "sequential", "easy-first", "hard-first", "hybrid"] = setting(
        "shuffled", on_resume=REFUSED
    )
    difficulty: Literal["rarity", "entropy", "loss"] = setting("rarity", used=(GRADED,), on_resume=REFUSED)
    cache: str = setting("cache", on_resume=FREE)
    cache_gb: float = setting(20.0, at_least=0, on_resume=FREE)
    workers: int = setting(0, at_least=0, on_resume=FREE)
    verify: bool = setting(False, on_resume=FREE)
    store: str | None = setting(None, on_resume=FREE)

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

    kind: Literal["code", "bpe", "pretrained"] = setting("code", used=(OWN_OR_PRETRAINED,), on_resume=REFUSED)
    vocab_size: int = setting(4096, at_least=1, at_most=2**24, used=(OWN_TOKENIZER,), on_resume=REFUSED)
    min_count: int = setting(10, at_least=0, used=(OWN_CODE_TOKENIZER,), on_resume=REFUSED)
    path: str | None = setting(None, on_resume=FREE)


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
        new_tokens: Tokens that are added to the tokenizer, where it has not set them aside for gaps; of
            embedding and head only their rows train.
        lr_ratio: B's learning rate over A's (LoRA+, arXiv:2402.12354).
    """

    r: int = setting(0, at_least=0, at_most=2**16, used=(FROM_BASE,), on_resume=REFUSED)
    alpha: float = setting(32.0, above=0, used=ADAPTED, on_resume=REFUSED)
    dropout: float = setting(0.0, at_least=0, below=1, used=ADAPTED, on_resume=REFUSED)
    targets: tuple[str, ...] = setting(("all-linear",), used=ADAPTED, on_resume=REFUSED)
    rank_pattern: dict[str, int] = setting({}, above=0, used=ADAPTED, on_resume=REFUSED)
    alpha_pattern: dict[str, float] = setting({}, above=0, used=ADAPTED, on_resume=REFUSED)
    rslora: bool = setting(False, used=ADAPTED, on_resume=REFUSED)
    dora: bool = setting(False, used=ADAPTED, on_resume=REFUSED)
    init: Literal["default", "pissa"] = setting("default", used=ADAPTED, on_resume=REFUSED)
    bias: Literal["none", "all", "lora_only"] = setting("none", used=ADAPTED, on_resume=REFUSED)
    train_modules: tuple[str, ...] = setting((), used=ADAPTED, on_resume=REFUSED)
    new_tokens: tuple[str, ...] = setting((), used=ADAPTED, on_resume=REFUSED)
    lr_ratio: float = setting(1.0, above=0, used=ADAPTED, on_resume=REFUSED)


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

    # AdamW beside Muon moves little but embeddings and head, whose rates are not those of matrices; AdamW
    # alone has the values of torch.optim.AdamW.
    name: Literal["muon", "adamw"] = setting("muon", on_resume=REFUSED)
    lr: float | None = setting(
        None, at_least=0, by_optimizer={"muon": 0.01, "adamw": 1e-3}, on_resume=REFUSED
    )
    muon_lr: float = setting(0.02, at_least=0, on_resume=REFUSED)
    embedding_lr: float | None = setting(
        None, at_least=0, by_optimizer={"muon": 0.3, "adamw": 0.0}, on_resume=REFUSED
    )
    head_lr: float | None = setting(
        None, at_least=0, by_optimizer={"muon": 0.01, "adamw": 0.0}, on_resume=REFUSED
    )
    weight_decay: float = setting(0.0, at_least=0, on_resume=REFUSED)
    beta1: float | None = setting(
        None, at_least=0, below=1, by_optimizer={"muon": 0.8, "adamw": 0.9}, on_resume=REFUSED
    )
    beta2: float | None = setting(
        None, at_least=0, below=1, by_optimizer={"muon": 0.95, "adamw": 0.999}, on_resume=REFUSED
    )
    eps: float | None = setting(None, above=0, by_optimizer={"muon": 1e-10, "adamw": 1e-8}, on_resume=REFUSED)
    grad_clip: float = setting(1.0, at_least=0, on_resume=REFUSED)
    schedule: Literal["wsd", "cosine", "linear", "constant"] = setting("wsd", on_resume=REFUSED)
    warmup_steps: int = setting(20, at_least=0, on_resume=REFUSED)
    cooldown: float = setting(0.5, at_least=0, at_most=1, used=(WSD,), on_resume=REFUSED)
    min_lr_factor: float = setting(0.02, at_least=0, at_most=1, used=(SCHEDULED,), on_resume=REFUSED)
    label_smoothing: float = setting(0.0, at_least=0, below=1, on_resume=REFUSED)
    z_loss: float = setting(0.0, at_least=0, on_resume=REFUSED)

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


OPTIMIZER_DEFAULTS: dict[str, dict[str, float]] = {
    name: {
        key: known.by_optimizer[name]
        for key, known in settings_of(OptimizerConfig).items()
        if known.by_optimizer
    }
    for name in get_args(field_types(OptimizerConfig)["name"])
}


@dataclass(frozen=True)
class TrainConfig:
    """Length, precision, validation and folder of a run.

    Args:
        run: Folder of the run; it must be new or empty unless `resume` is set. By default it is a new one
            under `runs`, named after the time.
        resume: Go on from the newest checkpoint in `run`; `--resume auto` begins the run where there is none.
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

    run: str = setting("", on_resume=FREE)
    resume: bool = setting(False, on_resume=FREE)
    prove_resume: bool = setting(False, on_resume=FREE)
    plan: bool = setting(False, on_resume=FREE)
    prepare: bool = setting(False, on_resume=FREE)
    overfit: bool = setting(False, on_resume=REFUSED)
    base: str | None = setting(None, on_resume=FREE)
    base_revision: str | None = setting(None, used=(FROM_BASE,), on_resume=FREE)
    base_format: Literal["auto", "fp32", "bf16", "nf4"] = setting(
        "auto", used=(FROZEN_BASE,), on_resume=REFUSED
    )
    row_length: int = setting(0, at_least=0, at_most=2**24, on_resume=REFUSED)
    seed: int = setting(0, at_least=0, on_resume=REFUSED)
    device: str = setting("auto", on_resume=WARNED)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting("auto", on_resume=WARNED)
    eval_precision: Literal["auto", "bf16", "fp16", "fp32"] = setting("auto", on_resume=WARNED)
    batch_size: int = setting(8, at_least=1, on_resume=REFUSED)
    accumulation: int = setting(1, at_least=1, on_resume=REFUSED)
    max_seconds: float = setting(0.0, at_least=0, on_resume=WARNED)
    max_steps: int = setting(0, at_least=0, on_resume=WARNED)
    max_epochs: float = setting(0.0, at_least=0, on_resume=WARNED)
    validate_every: int = setting(100, at_least=0, on_resume=FREE)
    validation_rows: int = setting(64, at_least=1, on_resume=WARNED)
    patience: int = setting(0, at_least=0, used=(VALIDATES_ON_THE_WAY,), on_resume=FREE)
    save_every: int = setting(0, at_least=0, on_resume=FREE)
    keep: int = setting(0, at_least=0, used=(SAVES_ON_THE_WAY,), on_resume=FREE)
    log_every: int = setting(10, at_least=1, on_resume=FREE)
    log: tuple[str, ...] = setting(("tensorboard",), on_resume=FREE)
    activation_checkpointing: bool = setting(False, on_resume=WARNED)
    compile: bool = setting(False, on_resume=WARNED)
    allow: tuple[str, ...] = setting((), on_resume=FREE)
    samples: int = setting(3, at_least=0, on_resume=FREE)


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
# What is known of each setting, by its full key, such as `model.n_layer`.
SETTINGS: dict[str, Setting] = {
    f"{name}.{key}".lstrip("."): known
    for name, group in CONFIG_GROUPS.items()
    for key, known in settings_of(group).items()
}
# Keys that the config.yaml of older runs lacks, with the values that those runs had.
BEFORE: dict[str, Any] = {
    key: known.before for key, known in SETTINGS.items() if known.before is not ALWAYS_THERE
}


def check_ranges(config: Config) -> None:
    """Raise ValueError for a number out of its range, an empty source or a model that cannot be built."""
    for name in CONFIG_GROUPS:
        refuse_out_of_range(name, getattr(config, name or "train"))
    for name in ("targets", "train_modules", "new_tokens"):
        if not all(getattr(config.lora, name)):
            raise ValueError(f"lora.{name} is {list(getattr(config.lora, name))}; none of them may be empty")
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
    values: dict[str, Any] = {}
    for key, value in config.to_dict().items():
        values |= (
            {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
        )
    return values


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
