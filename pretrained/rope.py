"""Rotary positions of published models: the words of transformers 4 and 5 for them, read and written."""

from __future__ import annotations

import math
import reprlib
from typing import Any

from config import ModelConfig

Values = dict[str, Any]

ROPE_DEFAULTS: Values = {
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": None,
    "original_max_position_embeddings": None,
}
# By rope_type, the fields of its numbers: field -> key, and what a missing key means (None: it is needed).
_NUMBERS: dict[str, dict[str, tuple[str, float | None]]] = {
    "default": {},
    "linear": {"rope_factor": ("factor", None)},
    "dynamic": {"rope_factor": ("factor", None)},
    "llama3": {
        "rope_factor": ("factor", None),
        "rope_low_freq": ("low_freq_factor", None),
        "rope_high_freq": ("high_freq_factor", None),
    },
    "yarn": {
        "rope_factor": ("factor", None),
        "rope_beta_fast": ("beta_fast", 32.0),
        "rope_beta_slow": ("beta_slow", 1.0),
        "rope_attention": ("attention_factor", 0.0),
    },
    "longrope": {"rope_attention": ("attention_factor", 0.0)},
}
# Keys that a type has beside its numbers.
_OF_ALL = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
_MORE = {
    "yarn": {"truncate", "mscale", "mscale_all_dim"},
    "longrope": {"factor", "short_factor", "long_factor"},
}


def rope_of(values: Values) -> Values:
    """Return the object that transformers 5 reads: `rope_scaling`, or else `rope_parameters`."""
    return values["rope_scaling"] or values["rope_parameters"] or {}


def read_rope(values: Values, theta: float = 10_000.0) -> Values:
    """Return rope_* fields from transformers 5's `rope_parameters`, or 4's `rope_theta` and the like.

    Args:
        theta: What the family takes where there is none.

    Raises:
        ValueError: A key or a value is not known, or a number is missing.
    """
    rope = rope_of(values)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("rope_parameters differ between layers; one set for all layers is known")
    if not isinstance(kind, str) or kind not in _NUMBERS:
        raise ValueError(f"rope_type is {reprlib.repr(kind)}; known are {', '.join(_NUMBERS)}")
    known = _OF_ALL | _MORE.get(kind, set()) | {key for key, _ in _NUMBERS[kind].values()}
    if unknown := sorted(key for key, value in rope.items() if key not in known and value is not None):
        raise ValueError(f"rope_type {kind} has no {unknown[0]}, which is {reprlib.repr(rope[unknown[0]])}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and "partial_rotary_factor" not in values:
        raise ValueError(f"partial_rotary_factor is {reprlib.repr(rope['partial_rotary_factor'])}; use 1.0")
    own_theta = rope.get("rope_theta", values["rope_theta"])
    fields: Values = {"rope_theta": theta if own_theta is None else own_theta}
    missing: Values = {}
    for field, (key, usual) in _NUMBERS[kind].items():
        if usual is not None and rope.get(key) is None:
            missing[field] = usual
        else:
            fields[field] = rope.get(key)
    for key, value in fields.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(
                f"{key} of rope_type {kind} is {reprlib.repr(value)}; it must be a number above 0"
            )
    fields |= missing
    fields["rope_scaling"] = "none" if kind == "default" else kind
    if kind == "dynamic":
        fields["rope_context"] = values["max_position_embeddings"]
    if kind in ("llama3", "yarn", "longrope"):
        fields["rope_context"] = (
            values["original_max_position_embeddings"]
            or rope.get("original_max_position_embeddings")
            or values["max_position_embeddings"]
        )
    more = {"yarn": _read_yarn, "longrope": _read_longrope}.get(kind)
    return fields if more is None else fields | more(rope, fields)


def _read_yarn(rope: Values, fields: Values) -> Values:
    """Return whether the ramp is rounded, and attention's factor, which two keys may say as a quotient."""
    truncate = rope.get("truncate", True)
    if type(truncate) is not bool:
        raise ValueError(f"truncate of rope_type yarn is {reprlib.repr(truncate)}; it must be true or false")
    found: Values = {"rope_truncate": truncate}
    scales = [rope.get(key) for key in ("mscale", "mscale_all_dim")]
    if any(value is not None and type(value) not in (int, float) for value in scales):
        raise ValueError(
            f"mscale and mscale_all_dim of rope_type yarn are {reprlib.repr(scales)}; use numbers"
        )
    above, below = (value or 0.0 for value in scales)
    if above and below and not fields["rope_attention"]:
        log = math.log(max(1.0, fields["rope_factor"]))
        found["rope_attention"] = (0.1 * above * log + 1) / (0.1 * below * log + 1)
    return found


def _read_longrope(rope: Values, fields: Values) -> Values:
    """Return both lists of divisors, and the factor of attention where `factor` decides it."""
    found: Values = {}
    for field, key in (("rope_short", "short_factor"), ("rope_long", "long_factor")):
        numbers = rope.get(key)
        if not isinstance(numbers, list) or any(type(number) not in (int, float) for number in numbers):
            raise ValueError(
                f"{key} of rope_type longrope is {reprlib.repr(numbers)}; a list of numbers is needed"
            )
        found[field] = numbers
    factor, context = rope.get("factor"), fields["rope_context"]
    if factor is not None and (type(factor) not in (int, float) or not 0 < factor < math.inf):
        raise ValueError(
            f"factor of rope_type longrope is {reprlib.repr(factor)}; it must be a number above 0"
        )
    if type(context) is not int or context < 2:
        raise ValueError(
            f"original_max_position_embeddings is {reprlib.repr(context)}; it must be at least 2"
        )
    if factor is not None and not fields["rope_attention"]:
        found["rope_attention"] = math.sqrt(1 + math.log(max(1.0, factor)) / math.log(context))
    return found


def write_rope(config: ModelConfig, partial: float | None = None) -> Values:
    """Return the keys of transformers 4 and of 5: each takes its default in silence without its own."""
    kind = "default" if config.rope_scaling == "none" else config.rope_scaling
    rope: Values = {"rope_type": kind, "rope_theta": config.rope_theta}
    if partial is not None:
        rope["partial_rotary_factor"] = partial
    rope |= {key: getattr(config, field) for field, (key, _) in _NUMBERS[kind].items()}
    if kind in ("llama3", "yarn", "longrope"):
        rope["original_max_position_embeddings"] = config.rope_context
    if kind == "yarn":
        rope["truncate"] = config.rope_truncate
    if kind == "longrope":
        rope |= {"short_factor": list(config.rope_short), "long_factor": list(config.rope_long)}
    values: Values = {"rope_theta": config.rope_theta, "rope_parameters": rope}
    return values if kind == "default" else values | {"rope_scaling": rope}


def read_rotary_dim(values: Values, head_dim: int) -> int:
    """Return how many dimensions of a head `partial_rotary_factor` rotates.

    Raises:
        ValueError: It leaves fewer than two, or more than there are.
    """
    factor = rope_of(values).get("partial_rotary_factor", values["partial_rotary_factor"])
    factor = 1.0 if factor is None else factor
    if type(factor) not in (int, float) or not 2 <= head_dim * factor <= head_dim:
        raise ValueError(
            f"partial_rotary_factor is {factor}; of {head_dim} dimensions of a head it must leave at least 2"
        )
    return int(head_dim * factor)


def partial_of(config: ModelConfig) -> float:
    """Return the `partial_rotary_factor` from which `read_rotary_dim` gets the rotated dimensions back."""
    factor = config.rotary_dim / config.head_dim
    if int(config.head_dim * factor) < config.rotary_dim:  # It is rounded down when read.
        factor = math.nextafter(factor, 1)
    return factor
