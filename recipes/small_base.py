"""The training of a small base: its shape, its tokenizer, and a folder that opens in transformers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
    check_ranges,
    refuse_unwritable,
)
from data.cache import refuse_changed, seal_folder
from guards.reference.exported import refuse_other_model
from pretrained import FAMILIES, save_pretrained
from pretrained.family import to_model
from pretrained.save import refuse_full
from recipes.base_config import BaseConfig
from recipes.training import finish
from training.beforehand import refuse_mistakes
from training.run import load_run

FIM_RATE = 0.5  # StarCoder's rate (arXiv:2305.06161)

# Settings of the published models' config.json that differ from the family's defaults.
PUBLISHED = {
    "gpt_bigcode": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "codegen": {},
    "phi": {},
    "llama": {"tie_word_embeddings": True, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5},  # Llama-3.2-1B
}


def model_of(settings: BaseConfig) -> ModelConfig:
    """Return the family's shape at a small size: heads and feed-forward in the published proportions."""
    family = FAMILIES[settings.family]
    names = {field: family.names[field] for field in ("n_layer", "n_head", "n_embd", "block_size")}
    small: dict[str, object] = {key: getattr(settings, field) for field, key in names.items()}
    small |= {key: 4 * settings.n_embd for field, key in family.names.items() if field == "n_inner"}
    if "n_kv_head" in family.names and settings.family == "llama":
        small[family.names["n_kv_head"]] = settings.n_head // 4
    if settings.family == "codegen":
        small["rotary_dim"] = settings.n_embd // settings.n_head // 2
    return to_model(family, PUBLISHED[settings.family] | small | {"vocab_size": 1})


def make_base(settings: BaseConfig) -> Path:
    """Train the base, or go on with one that was interrupted; return its folder. A finished one stays.

    Raises:
        ValueError: The settings, the source or the folder do not fit.
        SystemExit: A signal stopped it; the next call goes on.
    """
    spelled = json.dumps({k: v for k, v in asdict(settings).items() if k not in ("out", "cache")})
    name = f"{settings.family}-{hashlib.sha256(spelled.encode()).hexdigest()[:12]}"
    folder = Path(settings.out) if settings.out else Path(settings.cache) / "bases" / name
    if (folder / "config.json").is_file():
        refuse_changed(folder, f"remove {folder} to train another")
        print(f"base: {folder} is there already")
        return folder
    refuse_full(folder)
    refuse_unwritable(folder, "--out" if settings.out else "--cache")
    run = folder.with_name(f"{folder.name}-run")
    data = DataConfig(source=settings.source, cache=settings.cache)
    refuse_mistakes(Config(data=data))
    tokenizer = TokenizerConfig(kind="bpe", vocab_size=settings.vocab_size)
    if settings.family == "gpt_bigcode":
        print(
            f"{FIM_RATE:.0%} of the documents are cut for filling in: of files longer than a row of "
            f"{settings.block_size} tokens the base learns the markers' places, and to fill a gap by what is "
            "tuned on it"
        )
        data = replace(data, fim_rate=FIM_RATE)
    model = replace(model_of(settings), vocab_size=0)
    tied = model.tie_embeddings
    config = Config(
        data=data,
        tokenizer=tokenizer,
        model=model,
        # A tied head takes the head's learning rate.
        optimizer=OptimizerConfig(embedding_lr=0.01 if tied else None),
        train=TrainConfig(
            run=str(run),
            seed=settings.seed,
            max_seconds=settings.max_seconds,
            batch_size=settings.batch_size,
        ),
    )
    check_ranges(config)
    finish(config, is_preset=True)
    trained = load_run(run)
    # A base without checksums counts as one of an older Plumb, so it gets its name when it has them.
    unsealed = folder.with_name(f".{folder.name}.unsealed")
    shutil.rmtree(unsealed, ignore_errors=True)
    model, tokenizer = trained.model, trained.tokenizer
    save_pretrained(
        model,
        tokenizer,
        unsealed,
        settings.family,
        complete=lambda hidden: refuse_other_model(hidden, model, ()),
    )
    seal_folder(unsealed)
    if folder.exists():
        folder.rmdir()
    os.replace(unsealed, folder)
    shutil.rmtree(run, ignore_errors=True)
    return folder
