"""Qwen2, Qwen2.5-Coder (arXiv:2409.12186): Llama, biases on query, key and value, and windows by layer."""

from config import ModelConfig
from pretrained import llama
from pretrained.family import Family, Values, read_activation, write_activation
from pretrained.rope import ROPE_DEFAULTS, read_rope, write_rope

FULL, SLIDING = "full_attention", "sliding_attention"


def read_windows(values: Values) -> Values:
    """Return the window and its layers: those of `layer_types`, or from `max_window_layers` on."""
    window = values["sliding_window"] if values["use_sliding_window"] else None
    n_layer, types = values["num_hidden_layers"], values["layer_types"]
    if types is None:
        layers = range(values["max_window_layers"], n_layer) if window else ()
    elif len(types) == n_layer and all(kind in (FULL, SLIDING) for kind in types):
        layers = [layer for layer, kind in enumerate(types) if kind == SLIDING]
    else:
        raise ValueError(f"layer_types must name {FULL} or {SLIDING} for each of the {n_layer} layers")
    if len(layers) and not window:
        raise ValueError(f"layer_types names {SLIDING}, but there is no window; set use_sliding_window")
    return {
        "sliding_window": window if window and len(layers) else 0,
        "window_layers": list(layers) if window else [],
    }


def write_windows(config: ModelConfig) -> Values:
    """Return the keys from which `read_windows` gets the window back, but for `max_window_layers`."""
    layers = config.window_layers or tuple(range(config.n_layer)) if config.sliding_window else ()
    return {
        "use_sliding_window": bool(layers),
        "sliding_window": config.sliding_window or None,
        "layer_types": [SLIDING if layer in layers else FULL for layer in range(config.n_layer)],
    }


def read(values: Values) -> Values:
    return {
        **read_windows(values),
        "n_kv_head": values["num_key_value_heads"] or values["num_attention_heads"],
        "head_dim": values["head_dim"] or values["hidden_size"] // values["num_attention_heads"],
        "mlp": read_activation("hidden_act", values["hidden_act"], gated=True),
        "attention_dropout": values["attention_dropout"] or 0.0,
        **read_rope(values),
    }


def write(config: ModelConfig) -> Values:
    windows = write_windows(config)
    return {
        **windows,
        "num_key_value_heads": config.n_kv_head,
        **({"head_dim": config.head_dim} if config.head_dim * config.n_head != config.n_embd else {}),
        "max_window_layers": [*windows["layer_types"], SLIDING].index(SLIDING),
        "hidden_act": write_activation(config.mlp),
        "attention_dropout": config.attention_dropout,
        **write_rope(config),
    }


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
        "attention_dropout": 0.0,
        **ROPE_DEFAULTS,
    },
    names={
        field: key for field, key in llama.FAMILY.names.items() if field not in ("attention_bias", "mlp_bias")
    },
    parts=llama.FAMILY.parts | {"qkv_bias": True},
    modules=llama.FAMILY.modules,
    ignored=llama.FAMILY.ignored,
    read=read,
    write=write,
)
