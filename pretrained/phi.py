"""Phi-1, Phi-1.5, Phi-2 (arXiv:2306.11644): parallel blocks, partial rotary positions, biases everywhere."""

from config import ModelConfig
from pretrained.family import Family, Values, read_activation, write_activation
from pretrained.rope import ROPE_DEFAULTS, partial_of, read_rope, read_rotary_dim, write_rope


def read(values: Values) -> Values:
    usual = values["hidden_size"] // values["num_attention_heads"]
    head_dim = values["head_dim"] or usual
    if values["qk_layernorm"] and head_dim != usual:
        raise ValueError(
            f"qk_layernorm norms {usual} dimensions of a head (hidden_size / num_attention_heads), "
            f"but head_dim is {head_dim}; leave one of the two out"
        )
    return {
        "n_kv_head": values["num_key_value_heads"] or values["num_attention_heads"],
        "head_dim": head_dim,
        "rotary_dim": read_rotary_dim(values, head_dim),
        "mlp": read_activation("hidden_act", values["hidden_act"]),
        "attention_dropout": values["attention_dropout"] or 0.0,
        **read_rope(values),
    }


def write(config: ModelConfig) -> Values:
    factor = partial_of(config)
    return {
        "num_key_value_heads": config.n_kv_head,
        **({"head_dim": config.head_dim} if config.head_dim * config.n_head != config.n_embd else {}),
        "hidden_act": write_activation(config.mlp, "gelu_new"),
        "attention_dropout": config.attention_dropout,
        "partial_rotary_factor": factor,
        **write_rope(config, factor),
    }


FAMILY = Family(
    model_type="phi",
    architecture="PhiForCausalLM",
    defaults={
        "vocab_size": 51200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attention_dropout": 0.0,
        "hidden_act": "gelu_new",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "qk_layernorm": False,
        "partial_rotary_factor": 0.5,
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
        "qk_norm": "qk_layernorm",
        "tie_embeddings": "tie_word_embeddings",
        "dropout": "resid_pdrop",
        "embed_dropout": "embd_pdrop",
    },
    parts={
        "block": "parallel",
        "norm": "layer",
        "norm_weight": True,
        "norm_bias": True,
        "position": "rotary",
        "rotary_layout": "half",
        "qkv_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "head_bias": True,
    },
    modules={
        "embed": "model.embed_tokens",
        "blocks.{}.norm": "model.layers.{}.input_layernorm",
        "blocks.{}.attention.q": "model.layers.{}.self_attn.q_proj",
        "blocks.{}.attention.k": "model.layers.{}.self_attn.k_proj",
        "blocks.{}.attention.v": "model.layers.{}.self_attn.v_proj",
        "blocks.{}.attention.out": "model.layers.{}.self_attn.dense",
        "blocks.{}.attention.q_norm": "model.layers.{}.self_attn.q_layernorm",
        "blocks.{}.attention.k_norm": "model.layers.{}.self_attn.k_layernorm",
        "blocks.{}.mlp.up": "model.layers.{}.mlp.fc1",
        "blocks.{}.mlp.down": "model.layers.{}.mlp.fc2",
        "norm": "model.final_layernorm",
        "head": "lm_head",
    },
    ignored=r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    read=read,
    write=write,
)
