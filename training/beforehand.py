"""The mistakes in a run's settings that are refused before the first document of its corpus is opened.

    precision = refuse_mistakes(config)  # The precision of the run, or a ValueError in one sentence.

To read and tokenise a corpus may take many minutes, and to load the weights of a base some. A mistake that
needs neither is told before: nothing is read of the corpus, and of a base only its config.json.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from config import Config, LoraConfig, refuse_unwritable
from data.corpus import refuse_unreadable
from data.prepare import refuse_unlearnable
from data.storefolder import refuse_taken, with_stored
from guards.faults import refuse_unknown_faults
from lora import add_adapter
from modules.precision import Precision, choose_device, choose_precision, evaluation_precision
from pretrained.load import described, without_memory
from training.loggers import refuse_unusable
from training.run import refuse_other_model, resolved_format

MOST_LAYERS = 1000  # The most blocks that are made to name modules: a config.json may claim any number.


def refuse_mistakes(config: Config, made_here: bool = False) -> Precision:
    """Judge the settings of a run by themselves and against its base's config.json; return its precision.

    Args:
        made_here: The data, and perhaps the base, are still to be made: a recipe makes them.

    Raises:
        ValueError: A name, a device, a folder or a setting is known to be wrong; one sentence.
    """
    train = config.train
    refuse_unknown_faults(train.allow)
    refuse_unusable(train.log)
    if config.data.validation_one_in == 0 and not train.overfit:
        raise ValueError(
            "--data.validation_one_in 0 would validate on the training files; only --overfit may"
        )
    if config.model.n_experts and train.base is None:
        raise ValueError(
            f"--model.n_experts is {config.model.n_experts}, and nothing here balances experts that are "
            "trained from scratch; give --base a model that has them"
        )
    learns = train.base is None and config.tokenizer.path is None and not made_here
    if learns and (config.data.store is None or train.prepare):
        refuse_unlearnable(config.tokenizer)
    precision = choose_precision(choose_device(train.device), train.precision)
    weight_dtype = torch.float32
    if train.base is not None and config.lora.r:
        base_format = resolved_format(train.base_format, precision.dtype)
        weight_dtype = torch.float32 if base_format == "fp32" else precision.dtype
    evaluation_precision(precision, train.eval_precision, weight_dtype)
    refuse_unwritable(config.data.cache, "--data.cache", unless="tokens-*")
    if not made_here:
        refuse_other_source(config)
        refuse_other_base(config)
    return precision


def refuse_other_source(config: Config) -> None:
    """Raise a ValueError for data that cannot be read, or a prepared store that is missing or in the way."""
    data = config.data
    if data.store is None or config.train.prepare:
        refuse_unreadable(replace(data, store=None))
        if data.store is not None:
            refuse_taken(data.store)
            refuse_unwritable(data.store, "--data.store", unless="*")
    else:
        with_stored(data)


def refuse_other_base(config: Config) -> None:
    """Raise a ValueError if the settings do not go with the config.json of the base that they name."""
    if config.train.base is None:
        return
    family, own = described(config.train.base, config.train.base_revision)
    refuse_other_model(config, own)
    if config.lora.r and own.n_layer <= MOST_LAYERS:
        # The settings of the adapters' weights are left out: they take time, and no name depends on them.
        plain = LoraConfig()
        names = replace(config.lora, init=plain.init, dora=plain.dora, dropout=plain.dropout)
        add_adapter(without_memory(own), names, family.key)
