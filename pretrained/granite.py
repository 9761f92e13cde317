"""Granite 3 (arXiv:2405.04324 has its code models): Llama with four multipliers."""

from dataclasses import replace

from config import ModelConfig
from pretrained import llama
from pretrained.family import Values


def read(values: Values) -> Values:
    return llama.read(values) | {"attention_scale": values["attention_multiplier"]}


def write(config: ModelConfig) -> Values:
    return llama.write(config) | {
        "attention_multiplier": config.attention_scale or config.head_dim**-0.5,
    }


FAMILY = replace(
    llama.FAMILY,
    model_type="granite",
    architecture="GraniteForCausalLM",
    defaults=llama.FAMILY.defaults
    | {
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
    },
    names=llama.FAMILY.names
    | {
        "embed_scale": "embedding_multiplier",
        "logit_divisor": "logits_scaling",
        "residual_scale": "residual_multiplier",
    },
    read=read,
    write=write,
)
