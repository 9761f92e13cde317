"""What is judged of a run before the first document of its corpus is opened.

    precision = refuse_mistakes(config)  # The precision of the run, or a ValueError in one sentence.

To read and tokenise a corpus may take many minutes, and the weights of a base some. A mistake that neither
is needed for is told before: of the corpus nothing is read, and of a base its config.json.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from config import Config, LoraConfig, refuse_unwritable
from data.corpus import refuse_unreadable
from guards.faults import refuse_unknown_faults
from lora import add_adapter
from modules.precision import Precision, choose_device, choose_precision, evaluation_precision
from pretrained.load import described, without_memory
from training.run import refuse_other_model, resolved_format

MOST_LAYERS = 1000  # The most blocks that are made to name modules: a config.json may claim any number.


def refuse_mistakes(config: Config, made_here: bool = False) -> Precision:
    """The precision of a run, whose settings are judged by themselves and against its base's config.json.

    Args:
        made_here: The data, and perhaps the base, are still to be made: a recipe makes them.

    Raises:
        ValueError: A name, a device, a folder or a setting can be known not to do; one sentence.
    """
    train = config.train
    refuse_unknown_faults(train.allow)
    if config.data.validation_one_in == 0 and not train.overfit:
        raise ValueError(
            "--data.validation_one_in 0 would validate on the training files; only --overfit may"
        )
    precision = choose_precision(choose_device(train.device), train.precision)
    held = torch.float32
    if train.base is not None and config.lora.r:
        base_format = resolved_format(train.base_format, precision.dtype)
        held = torch.float32 if base_format == "fp32" else precision.dtype
    evaluation_precision(precision, train.eval_precision, held)
    refuse_unwritable(config.data.cache, "--data.cache", unless="tokens-*")
    if not made_here:
        refuse_unreadable(config.data)
        refuse_other_base(config)
    return precision


def refuse_other_base(config: Config) -> None:
    """ValueError if the settings do not go with the config.json of the base that they name, if any."""
    if config.train.base is None:
        return
    family, own = described(config.train.base, config.train.base_revision)
    refuse_other_model(config, own)
    if config.lora.r and own.n_layer <= MOST_LAYERS:
        # What decides the adapters' weights is left out: it takes time, and no name depends on it.
        plain = LoraConfig()
        names = replace(config.lora, init=plain.init, dora=plain.dora, dropout=plain.dropout)
        add_adapter(without_memory(own), names, family.key)
