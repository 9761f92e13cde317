"""GPTBigCode: StarCoder (arXiv:2305.06161). Multi-query or multi-head, learned positions.

`c_attn` is all queries, then one key, then one value with multi-query; without, it is query, key and value of
each head in turn.
"""

from config import ModelConfig
from pretrained.family import Family, Values, read_activation, write_activation


def read(values: Values) -> Values:
    if not values["scale_attn_weights"] or values["add_cross_attention"]:
        raise ValueError(
            "scale_attn_weights must be true and add_cross_attention false; others are not known"
        )
    return {
        "n_kv_head": 1 if values["multi_query"] else values["n_head"],
        "qkv_layout": "blocks" if values["multi_query"] else "heads",
        "n_inner": values["n_inner"] or 0,
        "mlp": read_activation("activation_function", values["activation_function"]),
    }


def write(config: ModelConfig) -> Values:
    return {
        "multi_query": config.qkv_layout == "blocks",
        "n_inner": config.n_inner,
        "activation_function": write_activation(config.mlp),
    }


FAMILY = Family(
    model_type="gpt_bigcode",
    architecture="GPTBigCodeForCausalLM",
    defaults={
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_pytorch_tanh",
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "multi_query": True,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    names={
        "vocab_size": "vocab_size",
        "block_size": "n_positions",
        "n_embd": "n_embd",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "norm_eps": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
        "dropout": "resid_pdrop",
        "embed_dropout": "embd_pdrop",
        "attention_dropout": "attn_pdrop",
    },
    parts={
        "block": "sequential",
        "norm": "layer",
        "norm_weight": True,
        "norm_bias": True,
        "position": "learned",
        "qk_norm": False,
        "fused_qkv": True,
        "qkv_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    modules={
        "embed": "transformer.wte",
        "position": "transformer.wpe",
        "blocks.{}.attention_norm": "transformer.h.{}.ln_1",
        "blocks.{}.attention.qkv": "transformer.h.{}.attn.c_attn",
        "blocks.{}.attention.out": "transformer.h.{}.attn.c_proj",
        "blocks.{}.mlp_norm": "transformer.h.{}.ln_2",
        "blocks.{}.mlp.up": "transformer.h.{}.mlp.c_fc",
        "blocks.{}.mlp.down": "transformer.h.{}.mlp.c_proj",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    },
    ignored=r"transformer\.(h\.\d+\.attn\.)?(bias|masked_bias)",
    read=read,
    write=write,
)
