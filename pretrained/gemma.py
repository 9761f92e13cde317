"""Gemma, CodeGemma (arXiv:2403.08295): norms of 1 + weight, a scaled embedding, GeGLU, wide heads."""

from dataclasses import replace

from config import ModelConfig
from pretrained import llama
from pretrained.family import Values

TANH = "gelu_pytorch_tanh"  # What its files call `gelu` is this, too.


def read(values: Values) -> Values:
    if values["use_bidirectional_attention"]:
        raise ValueError("use_bidirectional_attention is true; only attention to earlier tokens is known")
    if values["hidden_activation"] not in (None, TANH):
        raise ValueError(f"hidden_activation is {values['hidden_activation']!r}; known is {TANH}")
    act = TANH if values["hidden_act"] == "gelu" else values["hidden_act"]
    return llama.read(values | {"hidden_act": act}) | {"embed_scale": values["hidden_size"] ** 0.5}


def write(config: ModelConfig) -> Values:
    return llama.write(config)


FAMILY = replace(
    llama.FAMILY,
    model_type="gemma",
    architecture="GemmaForCausalLM",
    defaults={key: value for key, value in llama.FAMILY.defaults.items() if key != "mlp_bias"}
    | {
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": TANH,
        "hidden_activation": None,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": None,
    },
    names={field: key for field, key in llama.FAMILY.names.items() if field != "mlp_bias"},
    parts=llama.FAMILY.parts | {"norm": "rms_offset"},
    read=read,
    write=write,
)
