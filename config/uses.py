"""When a run reads a setting: conditions that stand beside the fields of schema.py and model.py.

Those of the learning rates depend on what trains: config/rules.py has them.
"""

from __future__ import annotations

from typing import Any

from config.setting import Use


def _trains_tokenizer(config: Any) -> bool:
    return config.tokenizer.path is None and config.train.base is None


GRADED = Use(
    "data.order goes by difficulty",
    lambda config: config.data.order not in ("shuffled", "sequential"),
    "data.order goes by none",
)
OWN_TOKENIZER = Use(
    "a tokenizer is trained: neither base nor tokenizer.path is given",
    _trains_tokenizer,
    "tokenizer.path or base brings a finished tokenizer",
)
OWN_OR_PRETRAINED = Use(
    "a tokenizer is trained, or `pretrained` opened",
    lambda config: _trains_tokenizer(config) or config.tokenizer.kind == "pretrained",
    OWN_TOKENIZER.otherwise,
)
OWN_CODE_TOKENIZER = Use(
    "a tokenizer of the kind `code` is trained",
    lambda config: _trains_tokenizer(config) and config.tokenizer.kind == "code",
    "only a new `code` tokenizer counts pieces",
)

FROM_BASE = Use("base is given", lambda config: config.train.base is not None, "base is not")
WITH_ADAPTER = Use("lora.r is above 0", lambda config: config.lora.r > 0, "lora.r is 0")
ADAPTED = (FROM_BASE, WITH_ADAPTER)
FROZEN_BASE = Use(
    "base is given and lora.r is above 0",
    lambda config: config.train.base is not None and config.lora.r > 0,
    "without base and lora.r nothing is frozen",
)
FROM_SCRATCH = Use(
    "base is not given", lambda config: config.train.base is None, "base brings weights of its own"
)

ROTARY = Use(
    "model.position is rotary",
    lambda config: config.model.position == "rotary",
    "model.position is not rotary",
)
ROPE_SCALED = Use(
    "model.rope_scaling is linear, dynamic, llama3 or yarn",
    lambda config: config.model.rope_scaling not in ("none", "longrope"),
    "model.rope_scaling has no factor",
)
# Scalings that know the context the model was first trained on.
CONTEXT_SCALINGS = ("dynamic", "llama3", "yarn", "longrope")
ROPE_BY_CONTEXT = Use(
    "model.rope_scaling is dynamic, llama3, yarn or longrope",
    lambda config: config.model.rope_scaling in CONTEXT_SCALINGS,
    "model.rope_scaling has no first context",
)
ROPE_LLAMA3 = Use(
    "model.rope_scaling is llama3",
    lambda config: config.model.rope_scaling == "llama3",
    "model.rope_scaling is not llama3",
)
ROPE_YARN = Use(
    "model.rope_scaling is yarn",
    lambda config: config.model.rope_scaling == "yarn",
    "model.rope_scaling is not yarn",
)
ROPE_LONG = Use(
    "model.rope_scaling is longrope",
    lambda config: config.model.rope_scaling == "longrope",
    "model.rope_scaling is not longrope",
)
ROPE_SHARPENED = Use(
    "model.rope_scaling is yarn or longrope",
    lambda config: config.model.rope_scaling in ("yarn", "longrope"),
    "model.rope_scaling is neither yarn nor longrope",
)
WINDOWED = Use(
    "model.sliding_window is above 0",
    lambda config: config.model.sliding_window > 0,
    "model.sliding_window is 0",
)
GATED = Use(
    "model.mlp is swiglu or geglu_tanh",
    lambda config: config.model.mlp in ("swiglu", "geglu_tanh"),
    "model.mlp has no gate",
)
ROUTED = Use("model.n_experts is above 0", lambda config: config.model.n_experts > 0, "model.n_experts is 0")
FUSED_QKV = Use("model.fused_qkv is true", lambda config: config.model.fused_qkv, "model.fused_qkv is false")

WSD = Use(
    "optimizer.schedule is wsd",
    lambda config: config.optimizer.schedule == "wsd",
    "optimizer.schedule is not wsd",
)
SCHEDULED = Use(
    "optimizer.schedule is not constant",
    lambda config: config.optimizer.schedule != "constant",
    "optimizer.schedule is constant",
)

SAVES_ON_THE_WAY = Use("save_every is above 0", lambda config: config.train.save_every > 0, "save_every is 0")
VALIDATES_ON_THE_WAY = Use(
    "validate_every or save_every is above 0",
    lambda config: config.train.validate_every > 0 or config.train.save_every > 0,
    "validate_every and save_every are 0",
)
