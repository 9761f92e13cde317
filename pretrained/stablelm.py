"""StableLM, Stable Code (arXiv:2404.01226): Llama with LayerNorm and partial rotation, some parallel."""

from dataclasses import replace

from config import ModelConfig
from pretrained import llama
from pretrained.family import Values, read_activation, write_activation
from pretrained.rope import ROPE_DEFAULTS, partial_of, read_rope, read_rotary_dim, write_rope


def read(values: Values) -> Values:
    if values["qk_layernorm"]:
        raise ValueError("qk_layernorm is true: a norm with a scale of its own for each head is not known")
    if values["hidden_dropout"]:
        raise ValueError(
            f"hidden_dropout is {values['hidden_dropout']}; dropout of the MLP alone is not known"
        )
    head_dim = values["hidden_size"] // values["num_attention_heads"]
    return {
        "block": "parallel" if values["use_parallel_residual"] else "sequential",
        "n_kv_head": values["num_key_value_heads"] or values["num_attention_heads"],
        "head_dim": head_dim,
        "rotary_dim": read_rotary_dim(values, head_dim),
        "mlp": read_activation("hidden_act", values["hidden_act"], gated=True),
        "attention_dropout": values["attention_dropout"] or 0.0,
        **read_rope(values),
    }


def write(config: ModelConfig) -> Values:
    factor = partial_of(config)
    return {
        "use_parallel_residual": config.block == "parallel",
        "num_key_value_heads": config.n_kv_head,
        "hidden_act": write_activation(config.mlp),
        "attention_dropout": config.attention_dropout,
        "partial_rotary_factor": factor,
        **write_rope(config, factor),
    }


FAMILY = replace(
    llama.FAMILY,
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    defaults={
        "vocab_size": 50304,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "partial_rotary_factor": 0.25,
        **ROPE_DEFAULTS,
    },
    names={
        "vocab_size": "vocab_size",
        "block_size": "max_position_embeddings",
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "norm_eps": "layer_norm_eps",
        "qkv_bias": "use_qkv_bias",
        "tie_embeddings": "tie_word_embeddings",
    },
    parts={
        "norm": "layer",
        "norm_weight": True,
        "norm_bias": True,
        "position": "rotary",
        "rotary_layout": "half",
        "qk_norm": False,
    },
    modules=llama.FAMILY.modules | {"blocks.{}.norm": "model.layers.{}.input_layernorm"},
    read=read,
    write=write,
)
