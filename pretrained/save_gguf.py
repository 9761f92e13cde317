"""A model written as a GGUF file, which llama.cpp and what is built on it open.

    save_gguf(model, tokenizer, "model.gguf", "q8_0")

It is written as the family whose parts it has, where llama.cpp computes the same function; what it would
compute otherwise, without an error, is refused.

    f16     every matrix in 16 bits
    q8_0    blocks of 32 numbers of a row: a scale in 16 bits, and 8 bits a number
    q4_0    the same with 4 bits a number; embedding and head are q8_0

Norms, biases and tables of positions stay fp32, as in the files that llama.cpp's own converter writes, and a
matrix whose rows are no multiple of 32 stays f16.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from architecture import Decoder
from config import ModelConfig
from modules.frozen_linear import FrozenLinear
from modules.positions import ROPE_SCALINGS, rotary_frequency
from modules.tensorfiles import flush
from pretrained.family import Family
from pretrained.gguf_families import CONTEXT_STEP, MODULES, GgufFamily, form_of
from pretrained.gguf_tokenizer import GgufVocabulary, gguf_vocabulary
from tokenizer import Tokenizer

BLOCK = 32  # Numbers that share a scale, in both quantised types.
LARGEST = 65504.0  # The largest number that 16 bits hold.
Metadata = dict[str, str | int | float | bool]
FILE_TYPES = {"f16": 1, "q8_0": 7, "q4_0": 2}  # general.file_type, as ggml numbers them


def save_gguf(
    model: Decoder,
    tokenizer: Tokenizer,
    path: str | Path,
    file_type: str = "f16",
    family: str | None = None,
    complete: Callable[[Path], object] | None = None,
) -> Family:
    """Write a model with its tokenizer as one file, and return the family that it is written as.

    The file appears whole: it is written under a hidden name beside it, flushed and renamed. One matrix at a
    time is converted.

    Args:
        model: Loaded or trained here, without adapters.
        tokenizer: Its pieces, rules and special ids go into the file.
        path: A new file.
        file_type: A key of FILE_TYPES.
        family: A `model_type`; None takes the first that can express the model.
        complete: Called with the file before it gets its name; an error that it raises leaves nothing.

    Raises:
        ValueError: llama.cpp has no such model or tokenizer, a number does not fit into 16 bits, the file is
            there already, or the package gguf is not installed.
    """
    path = Path(path)
    if any(isinstance(module, FrozenLinear) for module in model.modules()):
        raise ValueError("the model is stored in fewer bits; call dequantize_linears before saving it")
    chosen, form = form_of(model.config, family)
    vocabulary = gguf_vocabulary(tokenizer, model.config.vocab_size)
    if os.path.lexists(path):
        raise ValueError(f"{path} is there already; name a new file")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(temporary, model, form, vocabulary, file_type, path.stem)
        flush(temporary)
        if complete is not None:
            complete(temporary)
        os.rename(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return chosen


def library() -> Any:
    """Return the package gguf; ValueError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ValueError(
            "a GGUF file takes the package gguf, which is not installed; `pip install gguf` gives it"
        ) from None
    return gguf


class _GgufTensor(NamedTuple):
    """A tensor of the file.

    Args:
        values: The model's; of the first expert where there are `others`.
        order: Which row of the model's each row is; None as they are.
        kind: A name of gguf.GGMLQuantizationType.
        others: The same matrix of a layer's other experts, which follow.
    """

    values: Tensor
    order: Tensor | None
    kind: str
    others: tuple[Tensor, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        n = 1 + len(self.others)
        return (n, *self.values.shape) if self.others else tuple(self.values.shape)

    def stored(self, name: str, gguf: Any) -> np.ndarray[Any, Any]:
        """Return the numbers as they are written; ValueError for one that 16 bits do not hold."""
        if self.others:
            each = (self.values, *self.others)
            return np.stack([self._replace(values=one, others=()).stored(name, gguf) for one in each])
        values = self.values.detach().cpu().float()
        largest = float(values.abs().max()) if values.numel() else 0.0
        most = math.inf if self.kind == "F32" else LARGEST
        if not largest <= most:  # What is not a number does not pass.
            raise ValueError(
                f"{name} has numbers up to {largest:g}, and {self.kind} holds up to {LARGEST:g}; export the "
                "model with --out FOLDER"
            )
        values = values if self.order is None else values[self.order]
        return gguf.quantize(values.contiguous().numpy(), gguf.GGMLQuantizationType[self.kind])


def _write(
    path: Path, model: Decoder, form: GgufFamily, vocabulary: GgufVocabulary, file_type: str, name: str
) -> None:
    """Write the whole file; six arguments, what is in it and where."""
    gguf = library()
    tensors = _tensors(model, form, file_type)
    kept = sum(tensor.kind == "F16" for tensor in tensors.values())
    if kept and file_type != "f16":
        print(f"{kept} matrices are written in f16: their rows are no multiple of {BLOCK}", file=sys.stderr)
    writer = gguf.GGUFWriter(path, form.name)
    puts = {
        str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool
    }  # fmt: skip
    try:
        for key, value in _metadata(model.config, form, file_type, name).items():
            puts[type(value)](key, value)
        _add_vocabulary(writer, vocabulary)
        for to, tensor in tensors.items():
            kind, shape = gguf.GGMLQuantizationType[tensor.kind], tensor.shape
            block, size = gguf.GGML_QUANT_SIZES[kind]
            n_bytes = math.prod(shape) // block * size
            writer.add_tensor_info(to, shape, np.dtype(np.float32), n_bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for to, tensor in tensors.items():
            writer.write_tensor_data(tensor.stored(to, gguf))
    finally:
        writer.close()


def _metadata(config: ModelConfig, form: GgufFamily, file_type: str, name: str) -> Metadata:
    """Return what a file says of a model's shape, by key."""
    eps = "attention.layer_norm_epsilon" if config.norm == "layer" else "attention.layer_norm_rms_epsilon"
    of_form: Metadata = {
        "vocab_size": config.vocab_size,
        "context_length": _context(config, form),
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.n_inner,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.n_kv_head,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        eps: config.norm_eps,
    }
    if config.position == "rotary":
        of_form |= {"rope.dimension_count": config.rotary_dim, "rope.freq_base": float(config.rope_theta)}
        of_form |= _scaling(config)
    if form.says_parallel:
        of_form["use_parallel_residual"] = config.block != "sequential"
    if config.n_experts:
        of_form |= {"expert_count": config.n_experts, "expert_used_count": config.n_chosen}
        of_form["expert_feed_forward_length"] = config.n_inner
    if form.name == "granite":
        of_form |= {
            "embedding_scale": float(config.embed_scale),
            "residual_scale": float(config.residual_scale),
            "logit_scale": float(config.logit_divisor),
            "attention.scale": float(config.attention_scale or config.head_dim**-0.5),
        }
    general: Metadata = {
        "general.type": "model",
        "general.name": _shown(name),
        "general.file_type": FILE_TYPES[file_type],
        "general.quantization_version": 2,
    }
    return general | {f"{form.name}.{key}": value for key, value in of_form.items()}


def _shown(name: str) -> str:
    """Return a file's name as the model's, without what llama.cpp reads in one.

    By `phi-3` and `modern-bert` it would take spaces behind special tokens away, and where a vocabulary has
    not that model's tokens, refuse the file.
    """
    name = re.sub(r"[^\w .-]", "_", name)[:100]
    return re.sub(r"(?i)(phi|modern)-?(?=3|bert)", r"\1 ", name)


def _context(config: ModelConfig, form: GgufFamily) -> int:
    """Return the context of a file, which is one in which llama.cpp computes what the model does.

    It has no window in these families, which hides nothing in a context of that many tokens, and it chooses
    the list of longrope by its context, where the model does by the length of a text.
    """
    context = min(config.block_size, config.sliding_window or config.block_size)
    if context < config.block_size:
        print(
            f"warning: llama.cpp's {form.name} has no sliding window, so that the file says a context of "
            f"{context} tokens, not {config.block_size}; in that many both are equal",
            file=sys.stderr,
        )
    first = config.rope_context // CONTEXT_STEP * CONTEXT_STEP
    if config.rope_scaling == "longrope" and first < context:
        print(
            f"warning: llama.cpp rotates short texts too by the list for long ones, where its context is "
            f"above {config.rope_context} tokens, so that the file says a context of {first}, in which both "
            f"are equal; for longer texts give it --override-kv {form.name}.context_length=int:{context}",
            file=sys.stderr,
        )
        return first
    return context


def _scaling(config: ModelConfig) -> Metadata:
    """Return what a file says of a rotary scaling; llama3 is a tensor, and says nothing."""
    found: Metadata = {"type": config.rope_scaling}
    if config.rope_scaling == "linear":
        found |= {"factor": float(config.rope_factor), "original_context_length": config.block_size}
    elif config.rope_scaling == "yarn":
        usual = 0.1 * math.log(config.rope_factor) + 1  # llama.cpp has this factor of its own.
        found |= {
            "factor": float(config.rope_factor),
            "original_context_length": config.rope_context,
            "yarn_beta_fast": float(config.rope_beta_fast),
            "yarn_beta_slow": float(config.rope_beta_slow),
            "attn_factor": config.rope_attention / usual,
        }
    elif config.rope_scaling == "longrope":
        found |= {"original_context_length": config.rope_context, "attn_factor": config.rope_attention}
    else:
        return {}
    return {f"rope.scaling.{key}": value for key, value in found.items()}


def _add_vocabulary(writer: Any, vocabulary: GgufVocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for key, id in vocabulary.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{key}", id)
    writer.add_add_bos_token(vocabulary.starts)
    writer.add_bool("tokenizer.ggml.add_eos_token", False)


def _tensors(model: Decoder, form: GgufFamily, file_type: str) -> dict[str, _GgufTensor]:
    """Return the tensors of a file by their names there."""
    config, found = model.config, {}
    for name, values in model.state_dict().items():
        if name == "head.weight" and config.tie_embeddings and not form.own_head:
            continue
        module, _, kind = name.rpartition(".")
        general = re.sub(r"\.experts\.\d+\.", ".experts.", re.sub(r"^blocks\.\d+\.", "blocks.{}.", module))
        layer = module.split(".")[1] if module.startswith("blocks.") else ""
        to = f"{MODULES[general].format(layer)}.{kind}"
        part = module.rpartition(".")[2]
        if to in found:  # The next expert's.
            found[to] = found[to]._replace(others=(*found[to].others, values))
            continue
        if config.norm == "rms_offset" and part.endswith("norm"):
            values = values.float() + 1
        found[to] = _GgufTensor(values, _order(config, form, part), _type_of(part, values, file_type))
    return found | _frequencies(config)


def _frequencies(config: ModelConfig) -> dict[str, _GgufTensor]:
    """Return the tensors by whose numbers llama.cpp divides the rotary frequencies."""
    found: dict[str, Tensor] = {}
    if config.position == "rotary" and config.rope_scaling == "llama3":
        frequency = rotary_frequency(config.rotary_dim, config.rope_theta)
        found["rope_freqs"] = frequency / ROPE_SCALINGS["llama3"](frequency, config, torch.zeros(()))
    elif config.position == "rotary" and config.rope_scaling == "longrope":
        found["rope_factors_short"] = torch.tensor(config.rope_short)
        found["rope_factors_long"] = torch.tensor(config.rope_long)
    return {f"{name}.weight": _GgufTensor(values, None, "F32") for name, values in found.items()}


def _order(config: ModelConfig, form: GgufFamily, part: str) -> Tensor | None:
    """Return which row of a projection each row of the file is; None where they are the same."""
    width, half = config.head_dim, config.head_dim // 2
    if part == "qkv" and config.qkv_layout == "heads":  # Query, key and value of a head -> of all heads.
        return torch.arange(config.n_head * 3 * width).view(config.n_head, 3, width).transpose(0, 1).flatten()
    if part in ("q", "k") and form.pairs:  # Dimension i beside i + half.
        n = config.n_head if part == "q" else config.n_kv_head
        return torch.arange(n * width).view(n, 2, half).transpose(1, 2).flatten()
    return None


def _type_of(part: str, values: Tensor, file_type: str) -> str:
    """Return the type of a tensor; embedding and head suffer most from 4 bits."""
    if values.dim() < 2 or part in ("position", "router"):
        return "F32"
    if file_type == "f16" or values.size(-1) % BLOCK:
        return "F16"
    return "Q8_0" if part in ("embed", "head") else file_type.upper()
