"""GPT-NeoX, Pythia (arXiv:2204.06745): attention and MLP side by side, each with a norm; partial rotation."""

from config import ModelConfig
from pretrained.family import Family, Values, read_activation, write_activation
from pretrained.rope import ROPE_DEFAULTS, partial_of, read_rope, read_rotary_dim, write_rope


def read(values: Values) -> Values:
    head_dim = values["hidden_size"] // values["num_attention_heads"]
    older = {"rope_theta": values["rotary_emb_base"], "partial_rotary_factor": values["rotary_pct"]}
    return {
        "block": "parallel_norms" if values["use_parallel_residual"] else "sequential",
        "head_dim": head_dim,
        "rotary_dim": read_rotary_dim(values | older, head_dim),
        "attention_bias": values["attention_bias"],
        "embed_dropout": values["hidden_dropout"],
        "mlp": read_activation("hidden_act", values["hidden_act"]),
        "attention_dropout": values["attention_dropout"] or 0.0,
        **read_rope(values | older),
    }


def write(config: ModelConfig) -> Values:
    factor = partial_of(config)
    rope = write_rope(config, factor)
    return {
        "use_parallel_residual": config.block == "parallel_norms",
        "hidden_act": write_activation(config.mlp),
        "attention_dropout": config.attention_dropout,
        "rotary_pct": factor,
        "rotary_emb_base": rope.pop("rope_theta"),
        **rope,
    }


FAMILY = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    defaults={
        "vocab_size": 50432,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "attention_bias": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "rotary_emb_base": None,
        "rotary_pct": 0.25,
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
        "qkv_bias": "attention_bias",
        "tie_embeddings": "tie_word_embeddings",
        "dropout": "hidden_dropout",
    },
    parts={
        "norm": "layer",
        "norm_weight": True,
        "norm_bias": True,
        "position": "rotary",
        "rotary_layout": "half",
        "qk_norm": False,
        "fused_qkv": True,
        "qkv_layout": "heads",
        "mlp_bias": True,
    },
    modules={
        "embed": "gpt_neox.embed_in",
        "blocks.{}.attention_norm": "gpt_neox.layers.{}.input_layernorm",
        "blocks.{}.attention.qkv": "gpt_neox.layers.{}.attention.query_key_value",
        "blocks.{}.attention.out": "gpt_neox.layers.{}.attention.dense",
        "blocks.{}.mlp_norm": "gpt_neox.layers.{}.post_attention_layernorm",
        "blocks.{}.mlp.up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
        "blocks.{}.mlp.down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "norm": "gpt_neox.final_layer_norm",
        "head": "lm_head",
    },
    stored={"lm_head": "embed_out"},
    ignored=r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    read=read,
    write=write,
)
