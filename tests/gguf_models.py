"""Small models of each family that GGUF has, and tokenizers by each of its rules."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from architecture import Decoder
from config import ModelConfig
from tokenization.library import start_template
from tokenizer import PretrainedTokenizer

LLAMA: dict[str, Any] = {"norm": "rms", "norm_weight": True, "mlp": "swiglu", "qk_norm": False}
BIASED: dict[str, Any] = {
    "norm": "layer", "norm_weight": True, "norm_bias": True, "qkv_bias": True, "attention_bias": True,
    "mlp_bias": True, "mlp": "gelu_tanh", "qk_norm": False,
}  # fmt: skip
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_context": 16, "rope_high_freq": 3.0}
YARN = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_context": 32, "rope_beta_fast": 4.0}
LONGROPE: dict[str, Any] = {
    "rope_scaling": "longrope", "rope_context": 300, "block_size": 600, "rope_attention": 1.19,
    "rope_short": tuple(1 + n / 16 for n in range(8)), "rope_long": tuple(2.0 + n for n in range(8)),
}  # fmt: skip
STABLE = {**LLAMA, "norm": "layer", "norm_bias": True, "rotary_dim": 8}
PHI3 = {**LLAMA, "fused_qkv": True, "fused_gate": True}
GEMMA = {**LLAMA, "norm": "rms_offset", "mlp": "geglu_tanh", "embed_scale": 8.0, "tie_embeddings": True}
GRANITE = {
    **LLAMA, "embed_scale": 1.7, "residual_scale": 0.4, "attention_scale": 0.3, "logit_divisor": 1.5,
}  # fmt: skip
NEOX: dict[str, Any] = {
    **BIASED, "fused_qkv": True, "qkv_layout": "heads", "n_kv_head": 4, "rotary_dim": 8,
    "block": "parallel_norms",
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    **LLAMA, "qk_norm": True, "n_experts": 5, "n_chosen": 2, "chosen_sum_to_one": True, "n_inner": 32,
}  # fmt: skip
BIGCODE = BIASED | {"position": "learned", "fused_qkv": True}
PHI = BIASED | {"block": "parallel", "head_bias": True, "rotary_dim": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama biases": ("llama", LLAMA | {"qkv_bias": True, "attention_bias": True, "mlp_bias": True}),
    "llama tied head_dim": ("llama", LLAMA | {"tie_embeddings": True, "head_dim": 24}),
    "llama llama3": ("llama", LLAMA | LLAMA3),
    "llama linear": ("llama", LLAMA | {"rope_scaling": "linear", "rope_factor": 2.0, "rope_theta": 123.0}),
    "bigcode multi-query": ("gpt_bigcode", BIGCODE | {"n_kv_head": 1, "tie_embeddings": True}),
    "bigcode multi-head": ("gpt_bigcode", BIGCODE | {"n_kv_head": 4, "qkv_layout": "heads"}),
    "phi": ("phi", PHI | {"n_kv_head": 4}),
    "phi tied linear": ("phi", PHI | {"tie_embeddings": True, "rope_scaling": "linear", "rope_factor": 2.0}),
    "starcoder2": ("starcoder2", BIASED | {"tie_embeddings": True}),
    "starcoder2 window": ("starcoder2", BIASED | {"sliding_window": 60, "rope_theta": 1e5}),
    "llama yarn": ("llama", LLAMA | YARN),
    "llama longrope": ("llama", LLAMA | LONGROPE),
    "qwen2": ("qwen2", LLAMA | {"qkv_bias": True}),
    "qwen2 yarn": ("qwen2", LLAMA | {"qkv_bias": True} | YARN),
    "qwen2 tied window": (
        "qwen2",
        LLAMA | {"qkv_bias": True, "tie_embeddings": True, "sliding_window": 70, "window_layers": (1,)},
    ),
    "mistral window": ("mistral", LLAMA | {"sliding_window": 70, "head_dim": 24}),
    "qwen3": ("qwen3", LLAMA | {"qk_norm": True, "head_dim": 32}),
    "qwen3 tied yarn": ("qwen3", LLAMA | {"qk_norm": True, "tie_embeddings": True} | YARN),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "qwen3_moe window": ("qwen3_moe", EXPERTS | {"sliding_window": 70, "tie_embeddings": True}),
    "stablelm": ("stablelm", STABLE),
    "stablelm parallel": (
        "stablelm",
        STABLE | {"block": "parallel", "qkv_bias": True, "tie_embeddings": True},
    ),
    "stablelm yarn": ("stablelm", STABLE | YARN),
    "phi3": ("phi3", PHI3 | {"rotary_dim": 12}),
    "phi3 longrope": ("phi3", PHI3 | LONGROPE),
    "phi3 tied window": ("phi3", PHI3 | {"sliding_window": 70, "tie_embeddings": True}),
    "gemma": ("gemma", GEMMA | {"head_dim": 32}),
    "smollm3": ("smollm3", LLAMA | {"tie_embeddings": True, "n_layer": 5, "unrotated_layers": (3,)}),
    "granite": ("granite", GRANITE),
    "granite tied": (
        "granite",
        GRANITE | {"tie_embeddings": True, "attention_scale": 0.25, "mlp_bias": True},
    ),
    "gpt_neox": ("gpt_neox", NEOX | {"mlp": "gelu"}),
    "gpt_neox sequential tied": ("gpt_neox", NEOX | {"block": "sequential", "tie_embeddings": True}),
}


def model_of(settings: dict[str, Any], vocab_size: int) -> Decoder:
    """Return a model of settings, every parameter sampled, ready to evaluate."""
    shape: dict[str, Any] = {
        "block_size": 128,
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 64,
        "n_inner": 96,
    }
    config = ModelConfig(**shape | {"vocab_size": vocab_size, "norm_eps": 1e-5} | settings).resolved()
    model, generator = Decoder(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.25 if parameter.dim() > 1 else 0.4, generator=generator)
    return model.eval()


_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _split(text: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(text), behavior="isolated")


def _words(digits: str) -> str:
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


# By llama.cpp's name the pre-tokenizer that published models have.
RULES: dict[str, Any] = {
    "gpt-2": _GPT2,
    "starcoder": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
    "qwen2": pre_tokenizers.Sequence([_split(_words(r"\p{N}")), _BYTES]),
    "llama-bpe": pre_tokenizers.Sequence([_split(_words(r"\p{N}{1,3}")), _BYTES]),
    "deepseek-coder": pre_tokenizers.Sequence(
        [
            *map(_split, ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")),
            pre_tokenizers.Digits(individual_digits=True),
            _BYTES,
        ]
    ),
}
TEXT = 'def fib(n):\n    return  x2 + 10\n\tfoo_bar = "héllo"  # don\'t, 12345\r\n' * 5
SPECIALS = ("<|end|>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<fim_pad>")


def tokenizer_by(
    rule: str = "gpt-2",
    added: tuple[tokenizers.AddedToken | str, ...] = (),
    starts: bool = False,
    normalizer: normalizers.Normalizer | None = None,
    **changes: Any,
) -> PretrainedTokenizer:
    """Return a small tokenizer whose text is cut by a rule of RULES.

    Args:
        added: Further tokens.
        starts: `<|end|>` stands before every text.
        normalizer: The tokenizer's.
        changes: Parts of tokenizer.json to write in the place of its own.
    """
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=rule == "llama-bpe"))
    backend.pre_tokenizer = RULES[rule]
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.add_special_tokens(list(SPECIALS))
    backend.add_tokens(list(added))
    state = json.loads(backend.to_str())
    if starts:
        end = next(token["id"] for token in state["added_tokens"] if token["content"] == "<|end|>")
        state["post_processor"] = start_template("<|end|>", end)
    for key, value in changes.items():
        state[key] = state[key] | value if isinstance(value, dict) and state[key] else value
    files = {
        "tokenizer.json": json.dumps(state),
        "tokenizer_config.json": json.dumps({"eos_token": "<|end|>"}),
    }
    return PretrainedTokenizer(files)
