"""StarCoder2 (arXiv:2402.19173): grouped queries, rotary positions, a sliding window, LayerNorm, no gate."""

from config import ModelConfig
from pretrained.family import Family, Values, read_activation, write_activation
from pretrained.rope import ROPE_DEFAULTS, read_rope, write_rope


def read(values: Values) -> Values:
    return {
        "n_kv_head": values["num_key_value_heads"] or values["num_attention_heads"],
        "head_dim": values["head_dim"] or values["hidden_size"] // values["num_attention_heads"],
        "qkv_bias": values["use_bias"],
        "attention_bias": values["use_bias"],
        "sliding_window": values["sliding_window"] or 0,
        "mlp": read_activation("hidden_act", values["hidden_act"]),
        "attention_dropout": values["attention_dropout"] or 0.0,
        **read_rope(values),
    }


def write(config: ModelConfig) -> Values:
    return {
        "num_key_value_heads": config.n_kv_head,
        **({"head_dim": config.head_dim} if config.head_dim * config.n_head != config.n_embd else {}),
        "sliding_window": config.sliding_window or None,
        "hidden_act": write_activation(config.mlp),
        "attention_dropout": config.attention_dropout,
        **write_rope(config),
    }


FAMILY = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    defaults={
        "vocab_size": 49152,
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "head_dim": None,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "norm_epsilon": 1e-5,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "use_bias": True,
        "tie_word_embeddings": True,
        **ROPE_DEFAULTS,
    },
    names={
        "vocab_size": "vocab_size",
        "block_size": "max_position_embeddings",
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "norm_eps": "norm_epsilon",
        "mlp_bias": "use_bias",
        "tie_embeddings": "tie_word_embeddings",
        "dropout": "residual_dropout",
        "embed_dropout": "embedding_dropout",
    },
    parts={
        "block": "sequential",
        "norm": "layer",
        "norm_weight": True,
        "norm_bias": True,
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
        "blocks.{}.mlp.up": "model.layers.{}.mlp.c_fc",
        "blocks.{}.mlp.down": "model.layers.{}.mlp.c_proj",
        "norm": "model.norm",
        "head": "lm_head",
    },
    ignored=r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    read=read,
    write=write,
)
