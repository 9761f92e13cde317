"""SmolLM3: Llama whose every fourth layer has no rotation (NoPE, arXiv:2501.18795), and windows by layer."""

from dataclasses import replace

from config import ModelConfig
from pretrained import llama, qwen2
from pretrained.family import Values
from pretrained.rope import read_rope


def read(values: Values) -> Values:
    n_layer, rotated = values["num_hidden_layers"], values["no_rope_layers"]
    if rotated is None:
        interval = values["no_rope_layer_interval"]
        rotated = [int((layer + 1) % interval != 0) for layer in range(n_layer)]
    if len(rotated) < n_layer or any(type(flag) is not int or flag not in (0, 1) for flag in rotated):
        raise ValueError(f"no_rope_layers must say 1, or 0 for no rotation, for each of the {n_layer} layers")
    still = [layer for layer in range(n_layer) if not rotated[layer]]
    if values["layer_types"] is None:  # Windows are where rotations are not.
        windowed = still if values["use_sliding_window"] and values["sliding_window"] else []
        types = [qwen2.SLIDING if layer in windowed else qwen2.FULL for layer in range(n_layer)]
        values = values | {"layer_types": types}
    fields = llama.read(values) | read_rope(values, theta=2_000_000.0) | qwen2.read_windows(values)
    return fields | {"unrotated_layers": still}


def write(config: ModelConfig) -> Values:
    return (
        llama.write(config)
        | qwen2.write_windows(config)
        | {"no_rope_layers": [int(layer not in config.unrotated_layers) for layer in range(config.n_layer)]}
    )


FAMILY = replace(
    llama.FAMILY,
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    defaults=llama.FAMILY.defaults
    | {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "layer_types": None,
    },
    read=read,
    write=write,
)
