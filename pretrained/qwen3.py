"""Qwen3 (arXiv:2505.09388): Qwen2 with norms of queries and keys, and without their biases."""

from dataclasses import replace

from config import ModelConfig
from pretrained import llama, qwen2
from pretrained.family import Values


def read(values: Values) -> Values:
    return qwen2.read(values) | {"qkv_bias": values["attention_bias"]}


def write(config: ModelConfig) -> Values:
    return qwen2.write(config) | {"head_dim": config.head_dim}


FAMILY = replace(
    qwen2.FAMILY,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults=qwen2.FAMILY.defaults | {"head_dim": 128, "attention_bias": False},
    names=qwen2.FAMILY.names | {"attention_bias": "attention_bias"},
    parts=llama.FAMILY.parts | {"qk_norm": True},
    modules=llama.FAMILY.modules
    | {
        "blocks.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
        "blocks.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
    },
    read=read,
    write=write,
)
