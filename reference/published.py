"""Published models: the names that they give to their weights, and the files that have them.

The names are those of transformers' model classes.

`{}` stands for the number of a block, and of an expert. All matrices are (outputs, inputs), as they are here,
and a fused projection keeps the order of its rows, which `model.qkv_layout` names.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

_LLAMA = {
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
}
PUBLISHED: dict[str, dict[str, str]] = {
    "gpt_bigcode": {
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
    "codegen": {
        "embed": "transformer.wte",
        "blocks.{}.norm": "transformer.h.{}.ln_1",
        "blocks.{}.attention.qkv": "transformer.h.{}.attn.qkv_proj",
        "blocks.{}.attention.out": "transformer.h.{}.attn.out_proj",
        "blocks.{}.mlp.up": "transformer.h.{}.mlp.fc_in",
        "blocks.{}.mlp.down": "transformer.h.{}.mlp.fc_out",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    },
    "phi": {
        "embed": "model.embed_tokens",
        "blocks.{}.norm": "model.layers.{}.input_layernorm",
        "blocks.{}.attention.q": "model.layers.{}.self_attn.q_proj",
        "blocks.{}.attention.k": "model.layers.{}.self_attn.k_proj",
        "blocks.{}.attention.v": "model.layers.{}.self_attn.v_proj",
        "blocks.{}.attention.out": "model.layers.{}.self_attn.dense",
        "blocks.{}.attention.q_norm": "model.layers.{}.self_attn.q_layernorm",
        "blocks.{}.attention.k_norm": "model.layers.{}.self_attn.k_layernorm",
        "blocks.{}.mlp.up": "model.layers.{}.mlp.fc1",
        "blocks.{}.mlp.down": "model.layers.{}.mlp.fc2",
        "norm": "model.final_layernorm",
        "head": "lm_head",
    },
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "starcoder2": {key: name for key, name in _LLAMA.items() if not key.startswith("blocks.{}.mlp.")}
    | {
        "blocks.{}.mlp.up": "model.layers.{}.mlp.c_fc",
        "blocks.{}.mlp.down": "model.layers.{}.mlp.c_proj",
    },
    "qwen3": _LLAMA
    | {
        "blocks.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
        "blocks.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
    },
    "qwen3_moe": {key: name for key, name in _LLAMA.items() if not key.startswith("blocks.{}.mlp.")}
    | {
        "blocks.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
        "blocks.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
        "blocks.{}.mlp.router": "model.layers.{}.mlp.gate",
        "blocks.{}.mlp.experts.{}.gate": "model.layers.{}.mlp.experts.{}.gate_proj",
        "blocks.{}.mlp.experts.{}.up": "model.layers.{}.mlp.experts.{}.up_proj",
        "blocks.{}.mlp.experts.{}.down": "model.layers.{}.mlp.experts.{}.down_proj",
    },
    "mistral": _LLAMA,
    "phi3": _LLAMA
    | {
        "blocks.{}.attention.qkv": "model.layers.{}.self_attn.qkv_proj",
        "blocks.{}.mlp.gate_up": "model.layers.{}.mlp.gate_up_proj",
    },
    "stablelm": _LLAMA | {"blocks.{}.norm": "model.layers.{}.input_layernorm"},
    "gemma": _LLAMA,
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "gpt_neox": {
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
}


PUBLISHED["codegen2"] = PUBLISHED["codegen"]
# Modules that files call otherwise than the classes do.
STORED: dict[str, dict[str, str]] = {"gpt_neox": {"lm_head": "embed_out"}}


def family_of(folder: Path) -> str:
    """Return the `model_type` of a published model.

    CodeGen2's folders say `codegen` and name code of their own, as CodeGen 1's do not.
    """
    values = json.loads((folder / "config.json").read_text("utf-8"))
    is_second = values["model_type"] == "codegen" and "AutoModelForCausalLM" in (values.get("auto_map") or ())
    return "codegen2" if is_second else values["model_type"]


def published_name(family: str, module: str) -> str:
    """Return the published name of a module, such as `blocks.3.mlp.up`, in the words of a `model_type`."""
    parts = module.split(".")
    if parts[0] != "blocks":
        return PUBLISHED[family][module]
    general = ".".join("{}" if part.isdigit() else part for part in parts)
    return PUBLISHED[family][general].format(*(part for part in parts if part.isdigit()))


class PublishedWeights:
    """The tensors in the folder of a published model, read where they lie.

    Args:
        folder: It has `config.json`, and either `model.safetensors` or an index of several such files.

    Attributes:
        family: The `model_type`.
    """

    def __init__(self, folder: Path):
        self.family: str = family_of(folder)
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        if single.exists():
            with safe_open(single, framework="pt") as file:
                self.files = dict.fromkeys(file.keys(), single)
        else:
            names = json.loads(index.read_text("utf-8"))["weight_map"]
            self.files = {key: folder / name for key, name in names.items()}

    def key(self, name: str) -> str:
        """Return the published key of a parameter; a tied table may be stored under the head's name."""
        module, _, kind = name.rpartition(".")
        renamed, found = STORED.get(self.family, {}), published_name(self.family, module)
        if name == "embed.weight" and f"{found}.{kind}" not in self.files:
            found = PUBLISHED[self.family]["head"]
        return f"{renamed.get(found, found)}.{kind}"

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return some rows of a parameter by our name, in the file's own number format."""
        key = self.key(name)
        with safe_open(self.files[key], framework="pt") as file:
            return file.get_slice(key)[start:stop]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter as its file has it."""
        key = self.key(name)
        with safe_open(self.files[key], framework="pt") as file:
            return tuple(file.get_slice(key).get_shape())
