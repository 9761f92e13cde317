"""Llama and what is built like it (arXiv:2302.13971, arXiv:2407.21783): RMSNorm, SwiGLU, grouped queries."""

from config import ModelConfig
from pretrained.family import Family, Values, read_activation, write_activation
from pretrained.rope import ROPE_DEFAULTS, read_rope, write_rope


def read(values: Values) -> Values:
    return {
        "n_kv_head": values["num_key_value_heads"] or values["num_attention_heads"],
        "head_dim": values["head_dim"] or values["hidden_size"] // values["num_attention_heads"],
        "qkv_bias": values["attention_bias"],
        "mlp": read_activation("hidden_act", values["hidden_act"], gated=True),
        "attention_dropout": values["attention_dropout"] or 0.0,
        **read_rope(values),
    }


def write(config: ModelConfig) -> Values:
    return {
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "hidden_act": write_activation(config.mlp),
        "attention_dropout": config.attention_dropout,
        **write_rope(config),
    }


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        **ROPE_DEFAULTS,
    },
    names={
        "vocab_size": "vocab_size",
        "block_size": "max_position_embeddings",
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
        "attention_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
    },
    parts={
        "block": "sequential",
        "norm": "rms",
        "norm_weight": True,
        "position": "rotary",
        "rotary_layout": "half",
        "qk_norm": False,
    },
    modules={
        "embed": "model.embed_tokens",
        "blocks.{}.attention_norm": "model.layers.{}.input_layernorm",
        "blocks.{}.attention.q": "model.layers.{}.self_attn.q_proj",
        "blocks.{}.attention.k": "model.layers.{}.self_attn.k_proj",
        "blocks.{}.attention.v": "model.layers.{}.self_attn.v_proj",
        "blocks.{}.attention.out": "model.layers.{}.self_attn.o_proj",
        "blocks.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
        "blocks.{}.mlp.gate": "model.layers.{}.mlp.gate_proj",
        "blocks.{}.mlp.up": "model.layers.{}.mlp.up_proj",
        "blocks.{}.mlp.down": "model.layers.{}.mlp.down_proj",
        "norm": "model.norm",
        "head": "lm_head",
    },
    ignored=r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    read=read,
    write=write,
)
