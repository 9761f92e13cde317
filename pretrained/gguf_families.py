"""How llama.cpp computes the families that it has: what each needs, and the names of its tensors.

What it would compute otherwise, without an error, is refused.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from config import ModelConfig
from pretrained.family import Family
from pretrained.save import choose_family

# Our module -> GGUF's, in all of the families; `{}` stands for the layer's number. The experts of a layer are
# one tensor.
MODULES = {
    "embed": "token_embd",
    "position": "position_embd",
    "blocks.{}.norm": "blk.{}.attn_norm",
    "blocks.{}.attention_norm": "blk.{}.attn_norm",
    "blocks.{}.attention.qkv": "blk.{}.attn_qkv",
    "blocks.{}.attention.q": "blk.{}.attn_q",
    "blocks.{}.attention.k": "blk.{}.attn_k",
    "blocks.{}.attention.v": "blk.{}.attn_v",
    "blocks.{}.attention.q_norm": "blk.{}.attn_q_norm",
    "blocks.{}.attention.k_norm": "blk.{}.attn_k_norm",
    "blocks.{}.attention.out": "blk.{}.attn_output",
    "blocks.{}.mlp_norm": "blk.{}.ffn_norm",
    "blocks.{}.mlp.gate": "blk.{}.ffn_gate",
    "blocks.{}.mlp.up": "blk.{}.ffn_up",
    "blocks.{}.mlp.gate_up": "blk.{}.ffn_up",
    "blocks.{}.mlp.down": "blk.{}.ffn_down",
    "blocks.{}.mlp.router": "blk.{}.ffn_gate_inp",
    "blocks.{}.mlp.experts.gate": "blk.{}.ffn_gate_exps",
    "blocks.{}.mlp.experts.up": "blk.{}.ffn_up_exps",
    "blocks.{}.mlp.experts.down": "blk.{}.ffn_down_exps",
    "norm": "output_norm",
    "head": "output",
}


CONTEXT_STEP = 256  # llama.cpp makes a context longer, to a multiple of this.


class GgufFamily(NamedTuple):
    """How llama.cpp computes a family.

    Args:
        name: llama.cpp's name of it.
        needs: ModelConfig fields, each with the values that it knows.
        scalings: The rotary scalings that it computes.
        any_width: A head may have another width than n_embd / n_head.
        pairs: Rotates dimensions 2i and 2i + 1 together, so that rows of q and k are written in that order.
        own_head: Has a head of its own even where it is tied.
        says_parallel: A key says whether attention and MLP stand side by side.
        unrotated_every: Every so many layers, one is without rotation; 0 means none.
    """

    name: str
    needs: dict[str, tuple[Any, ...]]
    scalings: tuple[str, ...] = ("none", "linear", "yarn")
    any_width: bool = False
    pairs: bool = False
    own_head: bool = False
    says_parallel: bool = False
    unrotated_every: int = 0

    def unrotated_layers(self, n_layer: int) -> tuple[int, ...]:
        """Return the layers that it does not rotate."""
        every = self.unrotated_every
        return tuple(range(every - 1, n_layer, every)) if every else ()


_TANH = {"mlp": ("gelu_tanh",)}
_SWIGLU = {"mlp": ("swiglu",)}
_NO_BIAS = {"qkv_bias": (False,), "attention_bias": (False,), "mlp_bias": (False,)}
_BY_NUMBERS = ("none", "linear", "yarn", "llama3", "longrope")
_LLAMA = GgufFamily("llama", _SWIGLU, _BY_NUMBERS, any_width=True, pairs=True)
_QWEN3 = GgufFamily("qwen3", _SWIGLU | _NO_BIAS, any_width=True)
GGUF_FAMILIES = {
    "gpt_bigcode": GgufFamily("starcoder", _TANH),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "phi": GgufFamily("phi2", _TANH | {"qk_norm": (False,)}, own_head=True),
    "phi3": GgufFamily("phi3", _SWIGLU, ("none", "longrope")),
    "starcoder2": GgufFamily(
        "starcoder2", _TANH | {"qkv_bias": (True,), "attention_bias": (True,), "mlp_bias": (True,)}
    ),
    "qwen2": GgufFamily("qwen2", _SWIGLU),
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3._replace(name="qwen3moe", needs=_QWEN3.needs | {"chosen_sum_to_one": (True,)}),
    "stablelm": GgufFamily("stablelm", _SWIGLU, own_head=True, says_parallel=True),
    "gemma": GgufFamily(
        "gemma", {"mlp": ("geglu_tanh",), "tie_embeddings": (True,)} | _NO_BIAS, any_width=True
    ),
    "smollm3": GgufFamily("smollm3", _SWIGLU | _NO_BIAS, any_width=True, pairs=True, unrotated_every=4),
    "granite": GgufFamily("granite", _SWIGLU, any_width=True, pairs=True),
    # llama.cpp has tanh's GELU alone, and every published model of this family the exact one.
    "gpt_neox": GgufFamily(
        "gptneox",
        {"mlp": ("gelu", "gelu_tanh"), "qkv_bias": (True,), "attention_bias": (True,)},
        own_head=True,
        says_parallel=True,
    ),
}


def form_of(config: ModelConfig, model_type: str | None) -> tuple[Family, GgufFamily]:
    """Return the family of a model and llama.cpp's form of it; ValueError says what has none."""
    family = choose_family(config, model_type)
    form = GGUF_FAMILIES.get(family.model_type)
    if form is None:
        raise ValueError(
            f"no form of a {family.model_type} model that llama.cpp opens is known here; export it "
            "with --out FOLDER, or train one with the parts of " + ", ".join(GGUF_FAMILIES)
        )
    lacking = [
        f"model.{key} {getattr(config, key)}"
        for key, values in form.needs.items()
        if getattr(config, key) not in values
    ]
    if config.position == "rotary" and config.rope_scaling not in form.scalings:
        lacking.append(f"model.rope_scaling {config.rope_scaling}")
    if config.rope_scaling == "yarn" and not config.rope_truncate:
        lacking.append("model.rope_truncate False")
    if config.rope_scaling == "longrope" and config.rope_context < CONTEXT_STEP:
        lacking.append(f"model.rope_context {config.rope_context} (below {CONTEXT_STEP})")
    if set(config.unrotated_layers) != set(form.unrotated_layers(config.n_layer)):
        lacking.append(f"model.unrotated_layers {list(config.unrotated_layers)}")
    if config.head_dim * config.n_head != config.n_embd and not form.any_width:
        lacking.append(
            f"model.head_dim {config.head_dim} with {config.n_head} heads of a width {config.n_embd}"
        )
    if lacking:
        raise ValueError(
            f"llama.cpp's {form.name} has no {', no '.join(lacking)}: export the model with --out FOLDER, or "
            "train one without"
        )
    if config.mlp == "gelu":
        print(
            f"warning: llama.cpp's {form.name} computes GELU by tanh, from which this model's differs by at "
            "most 0.0005",
            file=sys.stderr,
        )
    return family, form
