"""What the config.json of a published model means, in the settings of `ModelConfig`.

Two vocabularies are in use: that of GPT-2 (GPTBigCode, CodeGen) and that of Llama (Llama, Qwen2, StarCoder2,
Phi). A key that is not there has the default of transformers' configuration class of that `model_type`, which
is where the defaults below are from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config import ModelConfig
from reference.positions import window_of
from reference.published import family_of

Values = dict[str, Any]
ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu2": "relu2",
}  # fmt: skip
_OF_GPT: Values = {"n_inner": None, "layer_norm_epsilon": 1e-5}
_OF_LLAMA: Values = {
    "num_key_value_heads": None,  # As many as query heads.
    "head_dim": None,  # hidden_size / num_attention_heads.
    "tie_word_embeddings": False,
}
DEFAULTS: dict[str, Values] = {
    "gpt_bigcode": _OF_GPT | {
        "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
        "activation_function": "gelu_pytorch_tanh", "multi_query": True, "tie_word_embeddings": True,
    },
    "codegen": _OF_GPT | {
        "vocab_size": 50400, "n_positions": 2048, "n_embd": 4096, "n_layer": 28, "n_head": 16,
        "activation_function": "gelu_new", "rotary_dim": 64, "tie_word_embeddings": False,
    },
    "llama": _OF_LLAMA | {
        "vocab_size": 32000, "max_position_embeddings": 2048, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "attention_bias": False, "mlp_bias": False,
    },
    "qwen2": _OF_LLAMA | {
        "vocab_size": 151936, "max_position_embeddings": 32768, "hidden_size": 4096,
        "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6, "use_sliding_window": False,
        "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
    },
    "starcoder2": _OF_LLAMA | {
        "vocab_size": 49152, "max_position_embeddings": 4096, "hidden_size": 3072, "intermediate_size": 12288,
        "num_hidden_layers": 30, "num_attention_heads": 24, "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "use_bias": True, "sliding_window": None,
        "tie_word_embeddings": True,
    },
    "phi": _OF_LLAMA | {
        "vocab_size": 51200, "max_position_embeddings": 2048, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 24, "num_attention_heads": 32, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5,
        "qk_layernorm": False, "partial_rotary_factor": 0.5,
    },
    "qwen3": _OF_LLAMA | {
        "vocab_size": 151936, "max_position_embeddings": 32768, "hidden_size": 4096,
        "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
        "attention_bias": False,
    },
    "qwen3_moe": _OF_LLAMA | {
        "vocab_size": 151936, "max_position_embeddings": 32768, "hidden_size": 2048,
        "intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 32,
        "num_key_value_heads": 4, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "use_sliding_window": False, "sliding_window": 4096, "attention_bias": False,
        "moe_intermediate_size": 768, "num_experts": None, "num_local_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": None,
    },
    "mistral": _OF_LLAMA | {
        "vocab_size": 32000, "max_position_embeddings": 131072, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "hidden_act": "silu", "rms_norm_eps": 1e-6, "sliding_window": 4096,
    },
    "phi3": _OF_LLAMA | {
        "vocab_size": 32064, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "sliding_window": None,
    },
    "stablelm": _OF_LLAMA | {
        "vocab_size": 50304, "max_position_embeddings": 4096, "hidden_size": 2560, "intermediate_size": 6912,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu",
        "layer_norm_eps": 1e-5, "use_qkv_bias": False, "qk_layernorm": False, "use_parallel_residual": False,
        "partial_rotary_factor": 0.25,
    },
    "gemma": _OF_LLAMA | {
        "vocab_size": 256000, "max_position_embeddings": 8192, "hidden_size": 3072,
        "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 16, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
        "attention_bias": False, "tie_word_embeddings": True,
    },
    "smollm3": _OF_LLAMA | {
        "vocab_size": 128256, "max_position_embeddings": 32768, "hidden_size": 2048,
        "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 4, "hidden_act": "silu", "rms_norm_eps": 1e-6, "use_sliding_window": False,
        "sliding_window": None, "no_rope_layers": None, "no_rope_layer_interval": 4, "layer_types": None,
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "rope_theta": 2_000_000.0,
    },
    "granite": _OF_LLAMA | {
        "vocab_size": 32000, "max_position_embeddings": 2048, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "attention_bias": False, "mlp_bias": False, "embedding_multiplier": 1.0, "attention_multiplier": 1.0,
        "residual_multiplier": 1.0, "logits_scaling": 1.0,
    },
    "gpt_neox": _OF_LLAMA | {
        "vocab_size": 50432, "max_position_embeddings": 2048, "hidden_size": 6144, "intermediate_size": 24576,
        "num_hidden_layers": 44, "num_attention_heads": 64, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
        "use_parallel_residual": True, "attention_bias": True, "rotary_pct": 0.25,
    },
}  # fmt: skip


DEFAULTS["codegen2"] = DEFAULTS["codegen"]


def settings_of(folder: Path, older: bool = False) -> ModelConfig:
    """Return the resolved settings of a published model.

    Args:
        older: Read rotary positions as transformers 4 does, which has other keys for them than 5.

    Raises:
        ValueError: It has an activation that the decoder does not have.
    """
    stored = json.loads((folder / "config.json").read_text("utf-8"))
    family = family_of(folder)
    values = DEFAULTS[family] | stored
    of_family = {"gpt_bigcode": _gpt_bigcode, "codegen": _codegen, "codegen2": _codegen2}.get(family)
    if of_family is not None:
        return ModelConfig(**of_gpt(values) | of_family(values))
    fields = of_llama(values) | OF_LLAMA[family](values)
    return ModelConfig(**fields | rotary(values, fields["head_dim"], older))


def activation(values: Values, key: str) -> str:
    """Return the `mlp` of an activation's name; ValueError for one that is not known."""
    if values[key] not in ACTIVATIONS:
        raise ValueError(f"{key} is {values[key]!r}, which the reference does not know")
    return ACTIVATIONS[values[key]]


def gate(values: Values) -> str:
    """Return the `mlp` of an MLP with a gate; ValueError for an activation that is not known."""
    if values["hidden_act"] in ("silu", "swish"):
        return "swiglu"
    if activation(values, "hidden_act") != "gelu_tanh":
        raise ValueError(
            f"hidden_act is {values['hidden_act']!r}, which the reference does not know for a gate"
        )
    return "geglu_tanh"


# --- the words of GPT-2 -------------------------------------------------------------------------------


def of_gpt(values: Values) -> Values:
    """Return the fields that GPTBigCode and CodeGen have alike: LayerNorm, a fused projection, no gate."""
    return {
        "vocab_size": values["vocab_size"],
        "block_size": values["n_positions"],
        "n_layer": values["n_layer"],
        "n_head": values["n_head"],
        "n_embd": values["n_embd"],
        "head_dim": values["n_embd"] // values["n_head"],
        "n_inner": values["n_inner"] or 4 * values["n_embd"],
        "norm": "layer",
        "norm_eps": values["layer_norm_epsilon"],
        "norm_weight": True,
        "norm_bias": True,
        "qk_norm": False,
        "fused_qkv": True,
        "mlp": activation(values, "activation_function"),
        "mlp_bias": True,
        "tie_embeddings": values["tie_word_embeddings"],
    }


def _gpt_bigcode(values: Values) -> Values:
    """Return what GPTBigCode has (arXiv:2305.06161): one key and value for all heads, learned positions."""
    return {
        "n_kv_head": 1 if values["multi_query"] else values["n_head"],
        "qkv_layout": "blocks" if values["multi_query"] else "heads",
        "position": "learned",
        "qkv_bias": True,
        "attention_bias": True,
    }


def _codegen(values: Values) -> Values:
    """Return what CodeGen has (arXiv:2203.13474): parallel blocks, and a head with a bias."""
    return {
        "n_kv_head": values["n_head"],
        "block": "parallel",
        "rotary_dim": values["rotary_dim"],
        "rotary_layout": "interleaved",
        "rope_theta": 10_000.0,
        "qkv_layout": "shards",
        "head_bias": True,
    }


def _codegen2(values: Values) -> Values:
    """Return what CodeGen2 has (arXiv:2305.02309): CodeGen 1 in eight shards, a core each."""
    return _codegen(values) | {"qkv_layout": "shards8"}


# --- the words of Llama -------------------------------------------------------------------------------


def of_llama(values: Values) -> Values:
    """Return the fields that Llama and what is built like it have alike."""
    heads = values["num_attention_heads"]
    return {
        "vocab_size": values["vocab_size"],
        "block_size": values["max_position_embeddings"],
        "n_layer": values["num_hidden_layers"],
        "n_head": heads,
        "n_kv_head": values["num_key_value_heads"] or heads,
        "n_embd": values["hidden_size"],
        "head_dim": values["head_dim"] or values["hidden_size"] // heads,
        "n_inner": values["intermediate_size"],
        "norm_weight": True,
        "qk_norm": False,
        "tie_embeddings": values["tie_word_embeddings"],
    }


def _llama(values: Values) -> Values:
    """Return what Llama has (arXiv:2302.13971): RMSNorm and SwiGLU; its bias is one of all projections."""
    bias = values["attention_bias"]
    return _rms_and_gate(values) | {"qkv_bias": bias, "attention_bias": bias, "mlp_bias": values["mlp_bias"]}


def _qwen2(values: Values) -> Values:
    """Return what Qwen2 has (arXiv:2409.12186): a bias of queries, keys and values, windows by layer."""
    window = values["sliding_window"] if values["use_sliding_window"] else None
    types = values["layer_types"]
    if types is None:
        first = values["max_window_layers"] if window else values["num_hidden_layers"]
        layers = tuple(range(first, values["num_hidden_layers"]))
    else:
        layers = tuple(layer for layer, kind in enumerate(types) if kind == "sliding_attention")
    windows = {"sliding_window": window or 0 if layers else 0, "window_layers": layers}
    return _rms_and_gate(values) | windows | {"qkv_bias": True}


def _rms_and_gate(values: Values) -> Values:
    return {"norm": "rms", "norm_eps": values["rms_norm_eps"], "mlp": gate(values)}


def _starcoder2(values: Values) -> Values:
    """Return what StarCoder2 has (arXiv:2402.19173): LayerNorm, no gate, and one window in all layers."""
    bias = values["use_bias"]
    return {
        "norm": "layer",
        "norm_eps": values["norm_epsilon"],
        "norm_bias": True,
        "sliding_window": values["sliding_window"] or 0,
        "mlp": activation(values, "hidden_act"),
        **dict.fromkeys(("qkv_bias", "attention_bias", "mlp_bias"), bias),
    }


def _phi(values: Values) -> Values:
    """Return what Phi has (arXiv:2306.11644): parallel blocks, and biases everywhere."""
    return {
        "block": "parallel",
        "norm": "layer",
        "norm_eps": values["layer_norm_eps"],
        "norm_bias": True,
        "qk_norm": values["qk_layernorm"],
        "mlp": activation(values, "hidden_act"),
        **dict.fromkeys(("qkv_bias", "attention_bias", "mlp_bias", "head_bias"), True),
    }


def _qwen3(values: Values) -> Values:
    """Return what Qwen3 has (arXiv:2505.09388): Qwen2, normalised queries and keys, one bias."""
    bias = values["attention_bias"]
    return _qwen2(values) | {"qk_norm": True, "qkv_bias": bias, "attention_bias": bias}


def _qwen3_moe(values: Values) -> Values:
    """Return what Qwen3's mixtures of experts have: Qwen3, one window in all layers, and experts there."""
    if values["mlp_only_layers"] or values["decoder_sparse_step"] != 1:
        raise ValueError("some layers have no experts, which the reference does not know")
    return _qwen3(values | {"layer_types": None, "max_window_layers": 0}) | {
        "n_inner": values["moe_intermediate_size"],
        "n_experts": values["num_experts"] or values["num_local_experts"],
        "n_chosen": values["num_experts_per_tok"],
        "chosen_sum_to_one": values["norm_topk_prob"],
    }


def _mistral(values: Values) -> Values:
    """Return what Mistral has (arXiv:2310.06825): RMSNorm, SwiGLU, no bias, and one window in all layers."""
    return _rms_and_gate(values) | {"sliding_window": values["sliding_window"] or 0}


def _phi3(values: Values) -> Values:
    """Return what Phi-3 has (arXiv:2404.14219): Mistral with fused projections."""
    return _mistral(values) | {"fused_qkv": True, "qkv_layout": "blocks", "fused_gate": True}


def _stablelm(values: Values) -> Values:
    """Return what StableLM has (arXiv:2404.01226): LayerNorm, SwiGLU, and blocks of either kind."""
    if values["qk_layernorm"]:
        raise ValueError("qk_layernorm is true, whose norms of each head the reference does not know")
    return {
        "block": "parallel" if values["use_parallel_residual"] else "sequential",
        "norm": "layer",
        "norm_eps": values["layer_norm_eps"],
        "norm_bias": True,
        "qkv_bias": values["use_qkv_bias"],
        "mlp": gate(values),
    }


def _gemma(values: Values) -> Values:
    """Return what Gemma has (arXiv:2403.08295): scales of 1 + weight, rows times sqrt(C), GeGLU by a tanh.

    Its activation is the approximation also where its files say `gelu`.
    """
    if values["hidden_act"] != "gelu" and gate(values) != "geglu_tanh":
        raise ValueError(
            f"hidden_act is {values['hidden_act']!r}, which the reference does not know for Gemma"
        )
    fields = _llama(values | {"hidden_act": "gelu_new", "mlp_bias": False})
    return fields | {"norm": "rms_offset", "embed_scale": math.sqrt(values["hidden_size"])}


def _smollm3(values: Values) -> Values:
    """Return what SmolLM3 has: Llama, no rotation in every fourth layer (arXiv:2501.18795) or those named.

    If there is a window, it is in the layers without a rotation, or in those named.
    """
    layers = range(values["num_hidden_layers"])
    flags = values["no_rope_layers"] or [(i + 1) % values["no_rope_layer_interval"] for i in layers]
    still = tuple(i for i in layers if not flags[i])
    window = values["sliding_window"] if values["use_sliding_window"] else None
    types = values["layer_types"] or ["sliding_attention" if window and i in still else "" for i in layers]
    windowed = tuple(i for i in layers if types[i] == "sliding_attention")
    windows = {"sliding_window": window or 0 if windowed else 0, "window_layers": windowed}
    return _llama(values) | windows | {"unrotated_layers": still}


def _granite(values: Values) -> Values:
    """Return what Granite has: Llama, factors of embedding, scores and residuals, a divisor of logits."""
    return _llama(values) | {
        "embed_scale": values["embedding_multiplier"],
        "attention_scale": values["attention_multiplier"],
        "residual_scale": values["residual_multiplier"],
        "logit_divisor": values["logits_scaling"],
    }


def _gpt_neox(values: Values) -> Values:
    """Return what GPT-NeoX has (arXiv:2204.06745): two norms side by side, heads fused, biases."""
    return {
        "block": "parallel_norms" if values["use_parallel_residual"] else "sequential",
        "norm": "layer",
        "norm_eps": values["layer_norm_eps"],
        "norm_bias": True,
        "fused_qkv": True,
        "qkv_layout": "heads",
        "qkv_bias": values["attention_bias"],
        "attention_bias": values["attention_bias"],
        "mlp": activation(values, "hidden_act"),
        "mlp_bias": True,
    }


OF_LLAMA: dict[str, Callable[[Values], Values]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "starcoder2": _starcoder2,
    "phi": _phi,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "mistral": _mistral,
    "phi3": _phi3,
    "stablelm": _stablelm,
    "gemma": _gemma,
    "smollm3": _smollm3,
    "granite": _granite,
    "gpt_neox": _gpt_neox,
}


def rotary(values: Values, head_dim: int, older: bool) -> Values:
    """Return the fields of rotary positions (arXiv:2104.09864).

    transformers 5 has one object, `rope_parameters`, and prefers `rope_scaling`, if it is there. Version 4
    has `rope_scaling`, and beside it `rope_theta` and `partial_rotary_factor`, which 5 falls back to.
    """
    rope = values.get("rope_scaling") or (not older and values.get("rope_parameters")) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = values.get("rope_theta") or values.get("rotary_emb_base") or 10_000.0  # GPT-NeoX's words.
    share = values.get("partial_rotary_factor") or values.get("rotary_pct") or 1.0
    if not older:
        theta, share = rope.get("rope_theta", theta), rope.get("partial_rotary_factor", share)
    fields: Values = {"rope_theta": theta, "rotary_dim": int(head_dim * share)}
    if kind == "default":
        return fields
    context = values["max_position_embeddings"]
    if kind in ("llama3", "yarn", "longrope"):
        own = rope.get("original_max_position_embeddings")
        context = values.get("original_max_position_embeddings") or own or context
    fields |= {"rope_scaling": kind, "rope_context": context}
    if kind == "longrope":
        reached = rope.get("factor") or values["max_position_embeddings"] / context
        usual = math.sqrt(1 + math.log(reached) / math.log(context)) if reached > 1 else 1.0
        lists = {f"rope_{name}": tuple(map(float, rope[f"{name}_factor"])) for name in ("short", "long")}
        return fields | lists | {"rope_attention": rope.get("attention_factor") or usual}
    fields["rope_factor"] = rope["factor"]
    if kind == "llama3":
        fields |= {"rope_low_freq": rope["low_freq_factor"], "rope_high_freq": rope["high_freq_factor"]}
    if kind == "yarn":
        fields |= {
            "rope_beta_fast": rope.get("beta_fast") or 32.0,
            "rope_beta_slow": rope.get("beta_slow") or 1.0,
            "rope_truncate": rope.get("truncate", True),
            "rope_attention": rope.get("attention_factor") or yarn_attention(rope),
        }
    return fields


def yarn_attention(rope: Values) -> float:
    """Return YaRN's factor of queries and keys (arXiv:2309.00071, section 3.4): 0.1 ln(factor) + 1.

    Two keys, where both are there, multiply its logarithm in a numerator and in a denominator (DeepSeek).
    """
    log = 0.1 * math.log(rope["factor"]) if rope["factor"] > 1 else 0.0
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    return (above * log + 1) / (below * log + 1) if above and below else log + 1


def behaviour(config: ModelConfig) -> Values:
    """Return the fields of settings that bear on a model's logits, windows by layer, each in one spelling."""
    unread = {"init", "attention", "base_width", "dropout", "embed_dropout", "attention_dropout"}
    if config.position != "rotary":
        unread |= {"rotary_dim", "rotary_layout", "rope_theta", "rope_scaling", "unrotated_layers"}
    scaling = config.rope_scaling if config.position == "rotary" else "none"
    if scaling in ("none", "longrope"):
        unread |= {"rope_factor"}
    if scaling in ("none", "linear"):
        unread |= {"rope_context"}
    if scaling != "llama3":
        unread |= {"rope_low_freq", "rope_high_freq"}
    if scaling != "yarn":
        unread |= {"rope_beta_fast", "rope_beta_slow", "rope_truncate"}
    if scaling not in ("yarn", "longrope"):
        unread |= {"rope_attention"}
    if scaling != "longrope":
        unread |= {"rope_short", "rope_long"}
    if config.mlp not in ("swiglu", "geglu_tanh"):
        unread |= {"fused_gate"}
    if not config.n_experts:
        unread |= {"n_chosen", "chosen_sum_to_one"}
    if not config.fused_qkv:
        unread |= {"qkv_layout"}
    found = {key: value for key, value in vars(config).items() if key not in unread}
    del found["sliding_window"], found["window_layers"]
    return found | {"windows": [window_of(config, layer) for layer in range(config.n_layer)]}
