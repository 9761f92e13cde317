"""Qwen3 with experts in every layer, so Qwen3-Coder-30B-A3B (arXiv:2505.09388)."""

from dataclasses import replace

from config import ModelConfig
from pretrained import qwen3
from pretrained.family import Values

BY_LAYER = ("layer_types", "max_window_layers")  # Keys of Qwen3 that this family does not read.


def read(values: Values) -> Values:
    experts, also = values["num_experts"], values["num_local_experts"]
    if experts is not None and also is not None and experts != also:
        raise ValueError(
            f"num_experts is {experts} and num_local_experts {also}; take out the one that is wrong"
        )
    if values["mlp_only_layers"] or values["decoder_sparse_step"] != 1:
        raise ValueError(
            f"mlp_only_layers is {values['mlp_only_layers']} and decoder_sparse_step "
            f"{values['decoder_sparse_step']}; only models with experts in every layer are known"
        )
    # One window, in all layers.
    alike = qwen3.read(values | {"layer_types": None, "max_window_layers": 0})
    return alike | {"n_experts": experts or also or 128}


def write(config: ModelConfig) -> Values:
    alike = {key: value for key, value in qwen3.write(config).items() if key not in BY_LAYER}
    return alike | {"num_experts": config.n_experts}


FAMILY = replace(
    qwen3.FAMILY,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    defaults={key: value for key, value in qwen3.FAMILY.defaults.items() if key not in BY_LAYER}
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "head_dim": None,
        "moe_intermediate_size": 768,
        "num_experts": None,
        "num_local_experts": None,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    },
    names=qwen3.FAMILY.names
    | {
        "n_inner": "moe_intermediate_size",
        "n_chosen": "num_experts_per_tok",
        "chosen_sum_to_one": "norm_topk_prob",
    },
    modules={name: key for name, key in qwen3.FAMILY.modules.items() if ".mlp." not in name}
    | {
        "blocks.{}.mlp.router": "model.layers.{}.mlp.gate",
        "blocks.{}.mlp.experts.{}.gate": "model.layers.{}.mlp.experts.{}.gate_proj",
        "blocks.{}.mlp.experts.{}.up": "model.layers.{}.mlp.experts.{}.up_proj",
        "blocks.{}.mlp.experts.{}.down": "model.layers.{}.mlp.experts.{}.down_proj",
    },
    read=read,
    write=write,
)
