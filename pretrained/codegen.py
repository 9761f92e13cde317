"""CodeGen (arXiv:2203.13474): parallel blocks, partial rotary positions in interleaved pairs, biased head.

`qkv_proj` is four shards, one a core it was trained on, of query, value and key of a quarter of the heads.
"""

from config import ModelConfig
from pretrained.family import Family, Values, read_activation, write_activation


def read(values: Values) -> Values:
    return {
        "n_inner": values["n_inner"] or 0,
        "mlp": read_activation("activation_function", values["activation_function"]),
    }


def write(config: ModelConfig) -> Values:
    return {
        "n_ctx": config.block_size,
        "n_inner": config.n_inner,
        "activation_function": write_activation(config.mlp, "gelu_new"),
    }


FAMILY = Family(
    model_type="codegen",
    architecture="CodeGenForCausalLM",
    defaults={
        "vocab_size": 50400,
        "n_positions": 2048,
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "rotary_dim": 64,
        "n_inner": None,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
    },
    names={
        "vocab_size": "vocab_size",
        "block_size": "n_positions",
        "n_embd": "n_embd",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "rotary_dim": "rotary_dim",
        "norm_eps": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
        "dropout": "resid_pdrop",
        "embed_dropout": "embd_pdrop",
        "attention_dropout": "attn_pdrop",
    },
    parts={
        "block": "parallel",
        "norm": "layer",
        "norm_weight": True,
        "norm_bias": True,
        "position": "rotary",
        "rotary_layout": "interleaved",
        "rope_theta": 10_000.0,
        "qk_norm": False,
        "fused_qkv": True,
        "qkv_layout": "shards",
        "mlp_bias": True,
        "head_bias": True,
    },
    modules={
        "embed": "transformer.wte",
        "blocks.{}.norm": "transformer.h.{}.ln_1",
        "blocks.{}.attention.qkv": "transformer.h.{}.attn.qkv_proj",
        "blocks.{}.attention.out": "transformer.h.{}.attn.out_proj",
        "blocks.{}.mlp.up": "transformer.h.{}.mlp.fc_in",
        "blocks.{}.mlp.down": "transformer.h.{}.mlp.fc_out",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    },
    ignored=r"transformer\.h\.\d+\.attn\.(bias|masked_bias|causal_mask|embed_positions)",
    read=read,
    write=write,
)
