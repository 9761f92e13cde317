"""Families of published models, and their config.json translated to ModelConfig and back.

A family is data: the names it gives to settings and modules, the parts that all its models have, and two
small functions for what no renaming says. Saving is safe because it is checked by loading: a model can be
written in a family's words if and only if those words, read again, give the same ModelConfig.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from config import SETTINGS, Config, ModelConfig

Values = dict[str, Any]  # the keys and values of a config.json


@dataclass(frozen=True)
class Family:
    """One Hugging Face `model_type`.

    Args:
        model_type: Its name in config.json.
        architecture: The class that transformers opens it with.
        defaults: What a key that config.json lacks means; transformers leaves out what is default.
        names: ModelConfig field -> key of config.json, where the value is the same.
        parts: ModelConfig fields that are the same in all models of the family.
        modules: Our module -> the published one; `{}` stands for the number of a layer, and of an expert.
        ignored: Pattern of keys that hold no parameter: masks and tables that old files carry.
        read: config.json -> the other ModelConfig fields.
        write: ModelConfig -> the other keys of config.json.
        stored: Published module -> its name in files, where that is another.
        own_code: Classes of `auto_map`, with their modules, that compute what `architecture` does.
    """

    model_type: str
    architecture: str
    defaults: Values
    names: dict[str, str]
    parts: Values
    modules: dict[str, str]
    ignored: str
    read: Callable[[Values], Values]
    write: Callable[[ModelConfig], Values]
    stored: dict[str, str] = field(default_factory=dict)
    own_code: tuple[str, ...] = ()

    def key(self, name: str) -> str:
        """Return the published name of a parameter or module of ours: `head.weight` -> `lm_head.weight`."""
        numbers = re.findall(r"\.(\d+)\.", name)
        general = re.sub(r"\.\d+\.", ".{}.", name)
        module, _, suffix = general.rpartition(".")
        published = self.modules.get(general) or f"{self.modules[module]}.{suffix}"
        return published.format(*numbers)

    def stored_key(self, name: str) -> str:
        """Return the name that a parameter of ours has in files: the published one or that of `stored`."""
        module, _, suffix = self.key(name).rpartition(".")
        return f"{self.stored.get(module, module)}.{suffix}"


# Keys that may be null, with their kind; another key's kind is that of its default.
OPTIONAL: dict[str, type] = {
    "attention_dropout": float,
    "head_dim": int,
    "hidden_activation": str,
    "layer_types": list,
    "n_inner": int,
    "mlp_only_layers": list,
    "no_rope_layers": list,
    "num_experts": int,
    "num_local_experts": int,
    "num_key_value_heads": int,
    "original_max_position_embeddings": int,
    "partial_rotary_factor": float,
    "rotary_emb_base": float,
    "rotary_pct": float,
    "rope_parameters": dict,
    "rope_scaling": dict,
    "rope_theta": float,
    "sliding_window": int,
    "use_bidirectional_attention": bool,
}


def to_model(family: Family, values: Values) -> ModelConfig:
    """Return the resolved ModelConfig of a config.json.

    Raises:
        ValueError: A value has the wrong type, is out of range, or asks for a part the decoder lacks.
    """
    if values.get("quantization_config") is not None:
        raise ValueError("it is quantised (quantization_config); use the folder of the original weights")
    _refuse_own_code(family, values)
    _refuse_foreign(family, values)
    values = family.defaults | {key: value for key, value in values.items() if key in family.defaults}
    for key, value in values.items():
        _check(key, value, family.defaults[key])
    n_layer, most = family.names["n_layer"], SETTINGS["model.n_layer"].at_most
    if most is not None and values[n_layer] > most:  # Checked before anything is made for each layer.
        raise ValueError(f"{n_layer} is {values[n_layer]}; it must be at most {most}")
    fields = family.parts | {field: values[key] for field, key in family.names.items()}
    fields |= family.read(values)
    try:
        return Config.from_dict({"model": fields}).model.resolved()
    except ValueError as error:
        raise ValueError(str(error).removeprefix("the saved config cannot be read: ")) from None


# Classes of auto_map that bear on the numbers that a language model gives.
_OWN_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")


def _refuse_own_code(family: Family, values: Values) -> None:
    """Refuse a model whose mathematics stand in code of its folder: CodeGen2 calls itself `codegen`."""
    named = values.get("auto_map")
    own = {key: named[key] for key in _OWN_CLASSES if named.get(key)} if isinstance(named, dict) else named
    if isinstance(own, dict):
        # On the hub, a repository may stand before the module: `owner/name--modeling_phi3.Phi3ForCausalLM`.
        own = {key: name for key, name in own.items() if str(name).rpartition("--")[2] not in family.own_code}
    if own:
        raise ValueError(
            f"auto_map names code of its own, {reprlib.repr(own)}, which is never run, and model_type "
            f"{family.model_type} does not say what that code computes; where it is known to compute what "
            f"{family.architecture} of transformers does, take auto_map out of config.json in a copy "
            "(of CodeGen2, set model_type to codegen2)"
        )


# Keys that change what is computed in the families that read them, and the values at which they do not.
_CHANGING: dict[str, tuple[Any, ...]] = {
    "alibi": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "layer_types": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "no_rope_layers": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "qk_layernorm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "sliding_window": (),
    "use_bidirectional_attention": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
}


def _refuse_foreign(family: Family, values: Values) -> None:
    """Refuse a key of another family that would change what is computed, if the model read it."""
    for key in sorted(_CHANGING.keys() & values.keys() - family.defaults.keys()):
        value = values[key]
        is_full = (
            key == "layer_types" and isinstance(value, list) and {*map(str, value)} <= {"full_attention"}
        )
        is_unused = key == "sliding_window" and values.get("use_sliding_window") is False
        if value is not None and value not in _CHANGING[key] and not is_full and not is_unused:
            raise ValueError(
                f"{key} is {reprlib.repr(value)}, which changes what is computed, and a {family.model_type} "
                "model has no such key; take it out of a copy's config.json if it was trained without it"
            )


def from_model(family: Family, config: ModelConfig) -> Values:
    """Return the config.json of a ModelConfig in a family's words; `lacks` says whether they say it all."""
    return {key: getattr(config, field) for field, key in family.names.items()} | family.write(config)


def lacks(family: Family, config: ModelConfig) -> list[str]:
    """Return what of a resolved ModelConfig the family cannot say; nothing where it can be written in it."""
    wanted = _meaning(config)
    said, unsaid = family.parts, []
    try:
        said = _meaning(to_model(family, from_model(family, config)))
    except ValueError as error:
        unsaid = [f"way to say it ({error})"]
    differ = [key for key in wanted if said.get(key, wanted[key]) != wanted[key]]
    return [f"model.{key} {wanted[key]}" for key in differ] + unsaid


def _meaning(config: ModelConfig) -> Values:
    """Return the fields that bear on what the model computes, each in one spelling."""
    fields = asdict(config)
    unread = {"init", "attention", "base_width"}
    if config.position != "rotary":
        unread |= {"rotary_dim", "rotary_layout", "unrotated_layers"} | {
            key for key in fields if key.startswith("rope_")
        }
    read_by = {
        "rope_factor": ("linear", "dynamic", "llama3", "yarn"),
        "rope_context": ("dynamic", "llama3", "yarn", "longrope"),
        **dict.fromkeys(("rope_low_freq", "rope_high_freq"), ("llama3",)),
        **dict.fromkeys(("rope_beta_fast", "rope_beta_slow", "rope_truncate"), ("yarn",)),
        "rope_attention": ("yarn", "longrope"),
        **dict.fromkeys(("rope_short", "rope_long"), ("longrope",)),
    }
    unread |= {key for key, scalings in read_by.items() if config.rope_scaling not in scalings}
    if config.mlp not in ("swiglu", "geglu_tanh"):
        unread |= {"fused_gate"}
    if not config.n_experts:
        unread |= {"n_chosen", "chosen_sum_to_one"}
    if not config.fused_qkv:
        unread |= {"qkv_layout"}
    every = tuple(range(config.n_layer)) if config.sliding_window else ()
    fields["window_layers"] = tuple(sorted(set(config.window_layers))) or every
    return {key: value for key, value in fields.items() if key not in unread}


def _check(key: str, value: Any, default: Any) -> None:
    kind = OPTIONAL.get(key) or type(default)
    if value is None and key in OPTIONAL:
        return
    if type(value) not in ((int, float) if kind is float else (kind,)):
        raise ValueError(f"{key} is {reprlib.repr(value)}; it must be {kind.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} is {value}; it must be finite")
    # 0 means "the default" in ModelConfig; in a published file it is a mistake.
    least = 0 if key == "max_window_layers" else 1
    if type(value) is int and kind is int and not least <= value < 2**63:
        raise ValueError(f"{key} is {reprlib.repr(value)}; it must be at least {least} and below 2**63")


# --- activations ----------------------------------------------------------------------------------

# Spellings of transformers; those in a row differ in rounding only.
_PLAIN = {"gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh")}
_PLAIN |= {"gelu": ("gelu", "gelu_python"), "relu2": ("relu2",)}
_GATED = {"swiglu": ("silu", "swish")}
_GATED |= {"geglu_tanh": _PLAIN["gelu_tanh"]}


def read_activation(key: str, value: str, gated: bool = False) -> str:
    """Return ModelConfig.mlp for an activation's name; ValueError for one that the decoder lacks."""
    known = _GATED if gated else _PLAIN
    for mlp, spellings in known.items():
        if value in spellings:
            return mlp
    names = ", ".join(name for spellings in known.values() for name in spellings)
    raise ValueError(f"{key} is {reprlib.repr(value)}; known are {names}")


def write_activation(mlp: str, usual: str = "") -> str:
    """Return a name of the activation: the family's usual one, where it means the same."""
    spellings = (_PLAIN | _GATED)[mlp]
    return usual if usual in spellings else spellings[0]
