"""Comparison of a GGUF file that was just written with the model and the tokenizer that it was written of.

    save_gguf(model, tokenizer, ..., complete=lambda path: refuse_other_gguf(path, model, tokenizer, allowed))

The reference opens the file by gguf's reader and takes it as llama.cpp does: what the architecture's name
means, which row belongs to which dimension of a head, which rule cuts text. First come the settings, exactly;
then every number of every tensor, within the rounding of its type; then each token, and ids of some texts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import tokenizers
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers
from torch import Tensor

from architecture import Decoder
from config import LoraConfig, ModelConfig
from data.fim import fim_prompt_ids, known_markers
from guards.faults import Fault
from guards.reference.comparison import Comparison, Differs
from guards.reference.exported import REMEDY, judged
from guards.reference.observed import RunWeights
from guards.reference.weights import STEP32, compare_settings
from pretrained.save import JUDGED
from reference.formats import GGUF_BLOCK, gguf_rounding, q4_0_decoded, q8_0_decoded
from reference.positions import frequencies
from tokenizer import Tokenizer

CHUNK = 2**22  # Numbers that are compared at once.
# Settings that a file has in fp32.
NUMBERS = (
    *("norm_eps", "rope_theta", "rope_factor", "rope_beta_fast", "rope_beta_slow"),
    *("embed_scale", "residual_scale", "attention_scale", "logit_divisor"),
)
LISTS = ("rope_short", "rope_long")
TEXTS = (*JUDGED, Path(__file__).read_text("utf-8"))

_SEQUENTIAL = {"block": "sequential", "qk_norm": False, "head_bias": False, "norm_weight": True}
_LLAMA = _SEQUENTIAL | {
    "norm": "rms", "norm_bias": False, "position": "rotary", "rotary_layout": "half", "mlp": "swiglu",
    "fused_qkv": False,
}  # fmt: skip
_STARCODER = _SEQUENTIAL | {
    "norm": "layer", "norm_bias": True, "position": "learned", "mlp": "gelu_tanh", "fused_qkv": True,
    "qkv_layout": "blocks",
}  # fmt: skip
_STARCODER2 = _LLAMA | {"norm": "layer", "norm_bias": True, "mlp": "gelu_tanh"}
# What llama.cpp computes for an architecture.
MEANT: dict[str, dict[str, Any]] = {
    "starcoder": _STARCODER,
    "llama": _LLAMA,
    "phi2": _STARCODER2 | {"block": "parallel", "head_bias": True},
    "starcoder2": _STARCODER2,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"qk_norm": True},
    "qwen3moe": _LLAMA | {"qk_norm": True, "chosen_sum_to_one": True},
    "stablelm": _LLAMA | {"norm": "layer", "norm_bias": True},
    "phi3": _LLAMA | {"fused_qkv": True, "qkv_layout": "blocks", "fused_gate": True},
    "gemma": _LLAMA | {"norm": "rms_offset", "mlp": "geglu_tanh"},
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "gptneox": _STARCODER2 | {"fused_qkv": True, "qkv_layout": "blocks"},
}
_PAIRED = ("llama", "smollm3", "granite")  # The architectures whose rotations pair dimensions 2i and 2i + 1.
_OWN_HEAD = ("phi2", "stablelm", "gptneox")  # Their files have a head even where it is the embedding.
_SIDE_BY_SIDE = {"stablelm": "parallel", "gptneox": "parallel_norms"}  # Where a key says that they are.
_NAMES = {
    "embed": "token_embd", "position": "position_embd", "norm": "output_norm", "head": "output",
    "attention_norm": "attn_norm", "mlp_norm": "ffn_norm", "attention.out": "attn_output",
    "attention.qkv": "attn_qkv", "attention.q": "attn_q", "attention.k": "attn_k", "attention.v": "attn_v",
    "attention.q_norm": "attn_q_norm", "attention.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down", "mlp.gate_up": "ffn_up",
    "mlp.router": "ffn_gate_inp", "mlp.experts.gate": "ffn_gate_exps", "mlp.experts.up": "ffn_up_exps",
    "mlp.experts.down": "ffn_down_exps",
}  # fmt: skip

# The expressions by which llama.cpp cuts text (llama-vocab.cpp), in turn, and whether a word that is a token
# is taken whole.
_ENDINGS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
_OTHERS = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)"
CUT: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((_GPT2,), False),
    "starcoder": (("\\p{N}", _GPT2), False),
    "qwen2": ((_ENDINGS + "|\\p{N}" + _OTHERS,), False),
    "llama-bpe": ((_ENDINGS + "|\\p{N}{1,3}" + _OTHERS,), True),
    "deepseek-coder": (
        ("[\r\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", "\\p{N}"),
        False,
    ),
}


def refuse_other_gguf(
    path: Path, model: Decoder, tokenizer: Tokenizer, allowed: Collection[str]
) -> list[Fault]:
    """Compare a GGUF file with a model in memory and its tokenizer.

    Returns:
        The difference, if there is one that is allowed.

    Raises:
        Fault: They differ.
    """

    def compare(comparison: Comparison) -> None:
        opened = OpenedGguf(path)
        comparison.begin("settings")
        _compare_settings(comparison, model.config, opened)
        comparison.begin("weights")
        _compare_weights(comparison, model, opened)
        comparison.begin("tokens")
        _compare_tokens(comparison, tokenizer, opened)

    return judged("GGUF file", compare, allowed)


class Place(NamedTuple):
    """Where a parameter is in a file.

    Args:
        tensor: The name of the tensor.
        order: Which row of it each row of the parameter is; None as they are.
        expert: Which matrix of a tensor with those of all experts.
    """

    tensor: str
    order: Tensor | None = None
    expert: int | None = None


class OpenedGguf:
    """A GGUF file, whose tensors are read where they lie.

    Attributes:
        values: What its metadata say, by key; those of the architecture without its name.
        tensors: gguf's tensors, by name.
        architecture: A key of MEANT.
    """

    def __init__(self, path: Path):
        reader = gguf.GGUFReader(path)
        self.architecture: str = reader.fields["general.architecture"].contents()
        prefix = f"{self.architecture}."
        self.values = {key.removeprefix(prefix): field.contents() for key, field in reader.fields.items()}
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        if self.architecture not in MEANT:
            raise Differs("general.architecture", f"{self.architecture} is not known", REMEDY)

    def settings(self, own: ModelConfig) -> ModelConfig:
        """Return the settings that the file means.

        Args:
            own: Those of the model, for what no key says: whether equal head and embedding are tied.
        """
        values = self.values
        fields = MEANT[self.architecture] | {
            "vocab_size": len(values["tokenizer.ggml.tokens"]),
            "block_size": values["context_length"],
            "n_embd": values["embedding_length"],
            "n_layer": values["block_count"],
            "n_inner": values["feed_forward_length"],
            "n_head": values["attention.head_count"],
            "n_kv_head": values["attention.head_count_kv"],
            "head_dim": values["attention.key_length"],
            "tie_embeddings": "output.weight" not in self.tensors,
        }
        fields["norm_eps"] = values[f"attention.layer_norm{'_rms' * (fields['norm'] != 'layer')}_epsilon"]
        fused = fields["fused_qkv"]
        for key, name in (
            ("qkv_bias", "attn_qkv" if fused else "attn_q"),
            ("attention_bias", "attn_output"),
            ("mlp_bias", "ffn_up"),
        ):
            fields[key] = f"blk.0.{name}.bias" in self.tensors
        if self.architecture in _SIDE_BY_SIDE:
            side_by_side = values["use_parallel_residual"]
            fields["block"] = _SIDE_BY_SIDE[self.architecture] if side_by_side else "sequential"
        if self.architecture in _OWN_HEAD:
            fields["tie_embeddings"] = own.tie_embeddings
        if self.architecture == "gptneox" and own.mlp == "gelu":
            fields["mlp"] = "gelu"  # A warning says how near tanh's is.
        if self.architecture == "qwen3moe":
            fields |= {"n_experts": values["expert_count"], "n_chosen": values["expert_used_count"]}
            fields["n_inner"] = values["expert_feed_forward_length"]
        if self.architecture == "gemma":
            fields["embed_scale"] = math.sqrt(fields["n_embd"])
        if self.architecture == "smollm3":
            fields["unrotated_layers"] = tuple(range(3, fields["n_layer"], 4))
        if self.architecture == "granite":
            fields |= {
                "embed_scale": values["embedding_scale"],
                "residual_scale": values["residual_scale"],
                "logit_divisor": values["logit_scale"],
                "attention_scale": values["attention.scale"],
            }
        return ModelConfig(**fields | (self._rotation(own) if fields["position"] == "rotary" else {}))

    def _rotation(self, own: ModelConfig) -> dict[str, Any]:
        """Return the settings of rotary positions; what a tensor should say of `own` is compared later."""
        values = self.values
        scaling = {key.rpartition(".")[2]: values[key] for key in values if key.startswith("rope.scaling.")}
        fields = {"rotary_dim": values["rope.dimension_count"], "rope_theta": values["rope.freq_base"]}
        fields |= {"rope_scaling": scaling.get("type", "none"), "rope_factor": scaling.get("factor", 1.0)}
        if fields["rope_scaling"] in ("yarn", "longrope"):
            fields["rope_context"] = scaling["original_context_length"]
            fields["rope_attention"] = scaling["attn_factor"]
        if fields["rope_scaling"] == "yarn":
            fields |= {f"rope_beta_{end}": scaling[f"yarn_beta_{end}"] for end in ("fast", "slow")}
            fields["rope_attention"] *= 0.1 * math.log(fields["rope_factor"]) + 1
        if fields["rope_scaling"] == "longrope":
            for key in ("short", "long"):
                fields[f"rope_{key}"] = tuple(self.rows(f"rope_factors_{key}.weight").tolist())
        if "rope_freqs.weight" in self.tensors:
            of_llama3 = ("rope_scaling", "rope_factor", "rope_context", "rope_low_freq", "rope_high_freq")
            fields |= {key: getattr(own, key) for key in of_llama3}
        return fields

    def rows(self, name: str, start: int = 0, stop: int | None = None, expert: int | None = None) -> Tensor:
        """Return some rows of a tensor, or of an expert's part of it, in fp64, in the file's order."""
        tensor = self.tensors[name]
        stored = tensor.data if expert is None else tensor.data[expert]
        kind, data = tensor.tensor_type.name, torch.from_numpy(np.array(stored[start:stop]))
        if kind in ("F32", "F16"):
            return data.double()
        decoded = {"Q8_0": q8_0_decoded, "Q4_0": q4_0_decoded}[kind]
        size = stored.shape[-1] * GGUF_BLOCK // int(tensor.shape[0])
        return decoded(data.reshape(-1, size)).view(len(data), -1)

    def place(self, name: str, config: ModelConfig) -> Place:
        """Return where a parameter is in the file."""
        module, _, kind = name.rpartition(".")
        layer, inner, expert = "", module, None
        if module.startswith("blocks."):
            _, number, inner = module.split(".", 2)
            layer, inner = f"blk.{number}.", "attention_norm" if inner == "norm" else inner
        if inner.startswith("mlp.experts."):
            _, _, which, part = inner.split(".")
            expert, inner = int(which), f"mlp.experts.{part}"
        return Place(f"{layer}{_NAMES[inner]}.{kind}", self._order(inner, config), expert)

    def parameter(self, name: str, config: ModelConfig) -> Tensor:
        """Return a parameter of the model as the file has it, in fp64."""
        to, order, expert = self.place(name, config)
        found = self.rows(to, expert=expert)
        return (found if order is None else found[order]) - self.added(name)

    def added(self, name: str) -> int:
        """Return what the file adds to every number of a parameter: Gemma has norms of 1 + weight there."""
        return int(MEANT[self.architecture]["norm"] == "rms_offset" and name.endswith("norm.weight"))

    def _order(self, module: str, config: ModelConfig) -> Tensor | None:
        """Return the row of the file for each row of a projection, where they are in another order.

        The files of Llama and its like pair dimension 2i of a head with 2i + 1, the model dimension i with
        i + half. A fused projection of the file has all queries, then all keys, then all values.
        """
        heads = {"attention.q": config.n_head, "attention.k": config.n_kv_head}
        width = config.head_dim
        if self.architecture in _PAIRED and module in heads:
            row = torch.arange(heads[module] * width)
            head, at = row // width, row % width
            return head * width + 2 * (at % (width // 2)) + at // (width // 2)
        if module == "attention.qkv" and config.qkv_layout == "heads":
            row = torch.arange(3 * config.n_head * width)
            head, part, at = row // (3 * width), row // width % 3, row % width
            return part * config.n_head * width + head * width + at
        return None


# --- the stages -------------------------------------------------------------------------------------


def _compare_settings(comparison: Comparison, own: ModelConfig, opened: OpenedGguf) -> None:
    """Compare what the file means with the model's settings, numbers as fp32 has them.

    A window is none in a context that is no longer. Fused rows that the model has by head are compared as
    weights.
    """
    context = min(own.block_size, own.sliding_window or own.block_size)
    if own.rope_scaling == "longrope":  # One of both lists in a context that is no longer.
        context = min(context, own.rope_context // 256 * 256)
    own = replace(own, block_size=context, sliding_window=0, window_layers=(), qkv_layout="blocks")
    try:
        meant = opened.settings(own)
    except (KeyError, ValueError, TypeError) as error:
        raise Differs("the metadata", f"they cannot be read ({error!r})", REMEDY) from None
    scale = own.attention_scale
    if "attention.scale" in opened.values:
        own = replace(own, attention_scale=scale or own.head_dim**-0.5)
    own, meant = _in_fp32(own), _in_fp32(meant)
    if math.isclose(own.rope_attention, meant.rope_attention, rel_tol=8 * STEP32):  # A product of two.
        meant = replace(meant, rope_attention=own.rope_attention)
    compare_settings(comparison, "the file", own, meant, REMEDY)
    comparison.exact("value_length", opened.values["attention.value_length"], own.head_dim, REMEDY)


def _in_fp32(config: ModelConfig) -> ModelConfig:
    """Return settings whose numbers are those of fp32."""
    numbers = {key: float(np.float32(getattr(config, key))) for key in NUMBERS}
    lists = {key: tuple(float(np.float32(n)) for n in getattr(config, key)) for key in LISTS}
    return replace(config, **numbers | lists)


def _compare_weights(comparison: Comparison, model: Decoder, opened: OpenedGguf) -> None:
    """Compare every number of the model with the file's, and that the file has no tensor more."""
    config, weights = model.config, RunWeights(model, model.config, LoraConfig())
    unread = set(opened.tensors)
    if config.rope_scaling == "longrope":  # They were compared as settings.
        unread -= {f"rope_factors_{key}.weight" for key in ("short", "long")}
    for name in dict(model.state_dict()):
        to, order, expert = opened.place(name, config)
        if name == "head.weight" and config.tie_embeddings and to not in opened.tensors:
            continue
        if to not in opened.tensors:
            raise Differs(name, f"the file has no {to}", REMEDY)
        unread.discard(to)
        shape = tuple(model.get_parameter(name).shape)
        expected = shape if expert is None else (config.n_experts, *shape)
        comparison.exact(
            f"{to}, shape", tuple(int(n) for n in opened.tensors[to].shape[::-1]), expected, REMEDY
        )
        _compare_tensor(comparison, weights, opened, name, order is not None)
    if "rope_freqs.weight" in unread:
        unread.discard("rope_freqs.weight")
        plain = frequencies(replace(config, rope_scaling="none"), torch.zeros(1, 1))
        scaled = plain / opened.rows("rope_freqs.weight")
        expected = frequencies(config, torch.zeros(1, 1))
        comparison.close("rope_freqs.weight", scaled, expected, 16 * STEP32, REMEDY)
    comparison.exact("tensors that the model does not have", sorted(unread), [], REMEDY)


def _compare_tensor(
    comparison: Comparison, weights: RunWeights, opened: OpenedGguf, name: str, ordered: bool
) -> None:
    """Compare a tensor number by number; five arguments, the two sides and what of them."""
    to, _, expert = opened.place(name, weights.model.config)
    kind, added = opened.tensors[to].tensor_type.name, opened.added(name)
    shape = weights.model.get_parameter(name).shape
    file = opened.parameter(name, weights.model.config) if ordered else None
    for start, stop in _chunks(shape[0], math.prod(shape[1:])):
        own = weights.part(name, slice(start, stop)).double().cpu()
        found = opened.rows(to, start, stop, expert) - added if file is None else file[start:stop]
        # Scales and quotients are computed in fp32, and so is what is added.
        allowed = gguf_rounding(own, kind) * (1 + 8 * STEP32) + 8 * STEP32 * own.abs() * (kind[0] == "Q")
        allowed += STEP32 * (own + added).abs() * added
        beyond = ~((found - own).abs() <= allowed)
        if bool(beyond.any()):
            what = f"{int(beyond.sum())} of {beyond.numel()} numbers are not what the model's round to"
            raise Differs(f"{name} as {kind}", what, REMEDY)
        comparison.exact(f"{name} as {kind}", None, None, REMEDY)


def _chunks(n_rows: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK // width)
    for start in range(0, n_rows, step):
        yield start, min(n_rows, start + step)


# --- the tokenizer ------------------------------------------------------------------------------------


def opened_tokenizer(opened: OpenedGguf) -> tokenizers.Tokenizer:
    """Return a tokenizer of the library that takes a file's tokens, merges and rule as llama.cpp does."""
    values = opened.values
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in values.get("tokenizer.ggml.merges", [])]
    expressions, whole = CUT[values["tokenizer.ggml.pre"]]
    model = models.BPE({token: id for id, token in enumerate(tokens)}, merges, ignore_merges=whole)
    backend = tokenizers.Tokenizer(model)
    cuts: list[Any] = [pre_tokenizers.Split(Regex(text), behavior="isolated") for text in expressions]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    user_defined = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 4]
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in user_defined])
    return backend


def _compare_tokens(comparison: Comparison, tokenizer: Tokenizer, opened: OpenedGguf) -> None:
    """Compare what each token spells, what stands before a text and ends it, and the ids of texts."""
    values, key = opened.values, "tokenizer.ggml.{}_token_id".format
    backend, kinds = opened_tokenizer(opened), values["tokenizer.ggml.token_type"]
    rules = tokenizer.rules() or {}
    named = {id: piece for piece, id in rules["model"]["vocab"].items()}
    kind_of = dict.fromkeys(named, 1)
    for token in rules["added_tokens"]:
        id, named[token["id"]] = token["id"], token["content"]
        # A special token that spells text is a piece that the folder names as its pad token.
        is_text = tokenizer.bytes_of([id]) is not None
        kind_of[id] = (1 if is_text else 3) if token["special"] else 4
    for id, token in enumerate(values["tokenizer.ggml.tokens"]):
        expected = named.get(id, token), kind_of.get(id, 5)
        comparison.exact(f"token {id}", (token, kinds[id]), expected, REMEDY)
    ends = [values[key(name)] for name in ("eos", "eot", "eom") if key(name) in values]
    own_ends = {id for id in (tokenizer.eos_id, *tokenizer.eos_ids) if id is not None}
    comparison.exact("tokens that end a text", set(ends), own_ends, REMEDY)
    start = [values[key("bos")]] if values["tokenizer.ggml.add_bos_token"] else []
    for number, text in enumerate(TEXTS, 1):
        ids = start + backend.encode(text, add_special_tokens=False).ids
        comparison.exact(f"ids of text {number}", ids, tokenizer.prompt_ids(text), REMEDY)
    if known_markers(tokenizer) is not None and not tokenizer.bare_gaps:
        before, after, middle = (values[key(f"fim_{name}")] for name in ("pre", "suf", "mid"))
        left, right = (backend.encode(text, add_special_tokens=False).ids for text in ("a = ", "\nb"))
        ids = [*start, before, *left, after, *right, middle]
        comparison.exact("ids of a gap", ids, fim_prompt_ids(tokenizer, "a = ", "\nb"), REMEDY)
