"""The class that transformers 5 opens a tokenizer's folder with, and the parts that it builds anew.

    name = transformers_class(tokenizer_class, model_type, text of tokenizer.json)
    state = built_anew(state, name, tokenizer_config)

Most classes take tokenizer.json as it is. Those of BUILDERS take its vocabulary, merges, added tokens and
what stands before a text, and write the other parts themselves: where the file says otherwise, AutoTokenizer
gives other ids than the file would. Which class it is depends on tokenizer_config.json and on the model
beside it (transformers 5.23, `AutoTokenizer.from_pretrained`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

AS_THE_FILE = "TokenizersBackend"  # reads every part of tokenizer.json
_GENERIC = (AS_THE_FILE, "PythonBackend", "PreTrainedTokenizer")

# What a model_type opens where tokenizer_config.json names no class. Llama has none.
_REGISTERED = {
    "gpt_bigcode": AS_THE_FILE,
    "codegen": "GPT2Tokenizer",
    "phi": "GPT2Tokenizer",
    "starcoder2": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "mistral": AS_THE_FILE,
    "phi3": AS_THE_FILE,
    "stablelm": AS_THE_FILE,
    "gemma": "GemmaTokenizer",
    "granite": AS_THE_FILE,
    "gpt_neox": "GPTNeoXTokenizer",
}
# These model types open their class whatever tokenizer_config.json names.
_WHATEVER_IS_NAMED = ("qwen2", "phi3")

_QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Texts that the classes of transformers cut differently, by spaces, digits, accents and contractions.
JUDGED = (
    "def f(x2024, y=0x1F):\n    return [\"don't\", 'WE\\'LL']  # 12345 67.8\r\n\n\t9",
    "# caf\u00e9 cafe\u0301 \u65e5\u672c \ufb01",
    "  leading",
    "\u2581word",
    "\n\n  x",
    " ",
)

# The special tokens of a class where the folder names none.
DEFAULT_TOKENS = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "CodeLlamaTokenizer": {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "prefix_token": "▁<PRE>",
        "middle_token": "▁<MID>",
        "suffix_token": "▁<SUF>",
        "eot_token": "▁<EOT>",
        "fill_token": "<FILL_ME>",
    },
    "GemmaTokenizer": {
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
}


def transformers_class(named: str | None, model_type: str | None, text: str) -> str:
    """Return the class that AutoTokenizer takes, without `Fast`; AS_THE_FILE where the file alone decides.

    Args:
        named: `tokenizer_class` of tokenizer_config.json, or else of config.json.
        model_type: `model_type` of the config.json beside it.
        text: The text of tokenizer.json.
    """
    name = None if named is None else named.removesuffix("Fast")
    registered = _REGISTERED.get(model_type or "")
    if model_type in _WHATEVER_IS_NAMED or name is None:
        return registered or AS_THE_FILE
    if name in _GENERIC or registered == AS_THE_FILE:
        return AS_THE_FILE
    if name == "LlamaTokenizer" and '"ByteLevel"' in text:
        return AS_THE_FILE  # Llama 3 files name this class and are byte-level.
    return name


def built_anew(state: dict[str, Any], name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return tokenizer.json as the class `name` builds it; `state` itself where that changes nothing.

    Args:
        state: The object in tokenizer.json.
        config: The object in tokenizer_config.json.
    """
    model = state.get("model")
    if name not in BUILDERS or not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        return state
    backend = tokenizers.Tokenizer(models.BPE())
    flags = BUILDERS[name](backend, config)
    made = json.loads(backend.to_str())
    parts = {part: made[part] for part in ("normalizer", "pre_tokenizer", "decoder")}
    flags = {"dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False} | flags
    flags |= {"continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}
    same_flags = all((model.get(key) or None) == (value or None) for key, value in flags.items())
    if same_flags and all(state.get(part) == parts[part] for part in parts):
        return state
    return state | parts | {"model": {"type": "BPE"} | model | flags}


def _gpt2(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> dict[str, Any]:
    prefix = bool(config.get("add_prefix_space"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    return {}


def _gpt_neox(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> dict[str, Any]:
    backend.normalizer = normalizers.NFC()
    return _gpt2(backend, config)


def _qwen2(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> dict[str, Any]:
    prefix = bool(config.get("add_prefix_space"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_PIECES), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return {}


def _llama(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> dict[str, Any]:
    """Put a space before a text's first word ("first"), in legacy files after specials too ("always")."""
    prefix = config.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    _metaspace(backend, "never" if not prefix else "always" if config.get("legacy") else "first", prefix)
    return {"fuse_unk": True, "byte_fallback": True}


def _code_llama(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> dict[str, Any]:
    prefix = config.get("add_prefix_space")
    _metaspace(backend, "never" if prefix is not None and not prefix else "first", True)
    return {"fuse_unk": True, "byte_fallback": True, "unk_token": _unknown(config)}


def _gemma(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> dict[str, Any]:
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous", invert=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return {"fuse_unk": True, "byte_fallback": True, "unk_token": _unknown(config)}


def _unknown(config: dict[str, Any]) -> Any:
    unknown = config.get("unk_token", "<unk>")
    return unknown.get("content") if isinstance(unknown, dict) else unknown


def _metaspace(backend: tokenizers.Tokenizer, scheme: Any, strips: bool) -> None:
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(content=" ", left=1)] if strips else parts)


BUILDERS: dict[str, Callable[[tokenizers.Tokenizer, dict[str, Any]], dict[str, Any]]] = {
    "GPT2Tokenizer": _gpt2,
    "CodeGenTokenizer": _gpt2,
    "GPTNeoXTokenizer": _gpt_neox,
    "Qwen2Tokenizer": _qwen2,
    "LlamaTokenizer": _llama,
    "CodeLlamaTokenizer": _code_llama,
    "GemmaTokenizer": _gemma,
}
