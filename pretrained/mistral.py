"""Mistral (arXiv:2310.06825), Codestral, Devstral: Llama with one sliding window in all layers."""

from dataclasses import replace

from config import ModelConfig
from pretrained import llama
from pretrained.family import Values

BIASES = ("attention_bias", "mlp_bias")  # Llama's keys, which Mistral does not have.


def read(values: Values) -> Values:
    return llama.read(values | {"attention_bias": False}) | {"sliding_window": values["sliding_window"] or 0}


def write(config: ModelConfig) -> Values:
    return llama.write(config) | {"sliding_window": config.sliding_window or None}


FAMILY = replace(
    llama.FAMILY,
    model_type="mistral",
    architecture="MistralForCausalLM",
    defaults={key: value for key, value in llama.FAMILY.defaults.items() if key not in BIASES}
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    names={field: key for field, key in llama.FAMILY.names.items() if key not in BIASES},
    read=read,
    write=write,
)
