"""Settings that a run would not read, each with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

from config.schema import OPTIMIZER_DEFAULTS, Config, LoraConfig, OptimizerConfig, flat


def possible_kinds(config: Config) -> set[str]:
    """Return the kinds of parameters that train (optim.parameter_groups); with a base, all that may."""
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
    """Yield learning rates that are set although no parameter learns at them, each with the reason.

    Args:
        kinds: Kinds of the parameters that train.
        given: Full keys that the user named, whose values count as set. Other values count only where they
            differ from the optimizer's own: a run's config.yaml holds every key.
    """
    read = {*optimizer.rates_read(kinds)}
    read |= {
        f"optimizer.{key}_lr"
        for kind, key in (("embeddings", "embedding"), ("head", "head"))
        if kind in kinds
    }
    for name in ("lr", "muon_lr", "embedding_lr", "head_lr"):
        key, value = f"optimizer.{name}", getattr(optimizer, name)
        # Older runs wrote Muon's values for every optimizer.
        tables = [OPTIMIZER_DEFAULTS[own] for own in ("muon", optimizer.name)]
        unset = {table.get(name, OptimizerConfig.muon_lr) for table in tables}
        if name in ("embedding_lr", "head_lr"):
            unset.add(0.0)  # Zero follows lr.
        if key in read or value is None or (value in unset and key not in given):
            continue
        acting = optimizer.rates_read(kinds)
        named = " and ".join(filter(None, [", ".join(acting[:-1]), *acting[-1:]])) or "none"
        yield key, f"no parameter of this run learns at it; what acts is {named}"


def left_of_other_optimizer(optimizer: OptimizerConfig, given: Collection[str]) -> dict[str, float]:
    """The values that are another optimizer's defaults, and neither this one's nor given as flags."""
    own = OPTIMIZER_DEFAULTS[optimizer.name]
    others = (values for name, values in OPTIMIZER_DEFAULTS.items() if name != optimizer.name)
    return {
        key: value
        for values in others
        for key, value in values.items()
        if f"optimizer.{key}" not in given and getattr(optimizer, key) == value != own[key]
    }


def unused_keys(config: Config, given: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Yield keys that differ from their default although nothing reads them, each with the reason.

    Args:
        given: See `unread_rates`.
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
    default, values = flat(Config()), flat(config)
    for key, (is_read, reason) in rules.items():
        # Of these no value means "off", so that to ask for the default one is a mistake, too.
        asked_in_vain = key.startswith("tokenizer.") and key in given
        if not is_read and (asked_in_vain or values[key] != default[key]):
            yield key, reason
    for key, reason in unread_rates(optimizer, possible_kinds(config), given):
        if key == "optimizer.muon_lr" and optimizer.name != "muon":
            reason = f"optimizer.name is not muon, and {reason}"
        if key == "optimizer.head_lr" and model.tie_embeddings and train.base is None:
            reason = f"model.tie_embeddings leaves no separate head, and {reason}"
        yield key, reason
