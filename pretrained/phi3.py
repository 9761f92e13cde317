"""Phi-3 and Phi-4 (arXiv:2404.14219, arXiv:2503.01743): fused projections, partial rotation, longrope."""

from dataclasses import replace

from config import ModelConfig
from pretrained import mistral
from pretrained.family import Values
from pretrained.rope import partial_of, read_rotary_dim, rope_of, write_rope

OLD_NAMES = ("su", "yarn")  # What first folders call longrope, whose two lists they have.


def read(values: Values) -> Values:
    rope = rope_of(values)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in OLD_NAMES:
        values = values | {"rope_scaling": rope | {"rope_type": "longrope"}}
    elif kind not in ("default", "longrope"):
        raise ValueError(f"rope_type is {kind!r}; a phi3 model has default or longrope")
    fields = mistral.read(values)
    return fields | {"rotary_dim": read_rotary_dim(values, fields["head_dim"])}


def write(config: ModelConfig) -> Values:
    factor = partial_of(config)
    return (
        mistral.write(config)
        | {
            # It stands above that of rope_scaling, and is 4096 where it is missing.
            "original_max_position_embeddings": config.rope_context or config.block_size,
            "partial_rotary_factor": factor,
        }
        | write_rope(config, factor)
    )


_PARTS = ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up")
_SEPARATE = tuple(f"blocks.{{}}.{part}" for part in _PARTS)

FAMILY = replace(
    mistral.FAMILY,
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    defaults=mistral.FAMILY.defaults
    | {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "sliding_window": None,
        "partial_rotary_factor": 1.0,
    },
    names=mistral.FAMILY.names | {"dropout": "resid_pdrop", "embed_dropout": "embd_pdrop"},
    parts=mistral.FAMILY.parts | {"fused_qkv": True, "qkv_layout": "blocks", "fused_gate": True},
    modules={our: name for our, name in mistral.FAMILY.modules.items() if our not in _SEPARATE}
    | {
        "blocks.{}.attention.qkv": "model.layers.{}.self_attn.qkv_proj",
        "blocks.{}.mlp.gate_up": "model.layers.{}.mlp.gate_up_proj",
    },
    own_code=("configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM", "modeling_phi3.Phi3Model"),
    read=read,
    write=write,
)
