"""Settings that a run would not read, each with the reason."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from config.schema import OPTIMIZER_DEFAULTS, SETTINGS, Config, OptimizerConfig, flat


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
    model, optimizer = config.model, config.optimizer
    default, values = flat(Config()), flat(config)
    for key, known in SETTINGS.items():
        reason = known.unread_because(config)
        # Of a tokenizer's no value means "off", so that to request the default one is a mistake, too.
        requested_in_vain = key.startswith("tokenizer.") and key in given
        if reason and (requested_in_vain or values[key] != default[key]):
            yield key, reason
    for key, reason in unread_rates(optimizer, possible_kinds(config), given):
        if key == "optimizer.muon_lr" and optimizer.name != "muon":
            reason = f"optimizer.name is not muon, and {reason}"
        if key == "optimizer.head_lr" and model.tie_embeddings and config.train.base is None:
            reason = f"model.tie_embeddings leaves no separate head, and {reason}"
        yield key, reason
