"""Plain values, as YAML and JSON have them, made the fields of a dataclass; another type is refused."""

from __future__ import annotations

import functools
import reprlib
import sys
from typing import Any, Literal, get_args, get_origin, get_type_hints


@functools.cache
def field_types(group: type) -> dict[str, Any]:
    return get_type_hints(group)


def typed_group(name: str, group: type, values: Any, missing: dict[str, Any]) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{name} is {reprlib.repr(values)}; it must be a mapping of keys to values")
    kinds = field_types(group)
    typed = {key: missing[full] for key in kinds if (full := f"{name}.{key}".lstrip(".")) in missing}
    for key, value in values.items():
        full = f"{name}.{key}".lstrip(".")
        if key not in kinds:
            raise ValueError(f"{full} is not a known key")
        typed[key] = typed_value(full, value, kinds[key])
    return group(**typed)


def typed_value(key: str, value: Any, kind: Any) -> Any:
    """The value as its field holds it: a whole number may be a float's value, a list a tuple's."""
    if float in (kind, *get_args(kind)) and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if get_origin(kind) is tuple:
        value = tuple(value) if isinstance(value, list) else value
        fits = isinstance(value, tuple) and all(type(item) is get_args(kind)[0] for item in value)
    elif get_origin(kind) is Literal:
        fits = type(value) is str and value in get_args(kind)
    elif get_origin(kind) is dict:
        if not isinstance(value, dict) or any(type(name) is not str for name in value):
            raise ValueError(f"{key} is {reprlib.repr(value)}; it must be a mapping of names to values")
        return {name: typed_value(f"{key}.{name}", v, get_args(kind)[1]) for name, v in value.items()}
    else:
        fits = type(value) in (get_args(kind) or (kind,))  # exactly: True is no int
    if not fits:
        raise ValueError(f"{key} is {reprlib.repr(value)}; it must be {wanted(kind)}")
    return value


def wanted(kind: Any) -> str:
    """What a key of this type takes, in words."""
    inner = [argument for argument in get_args(kind) if argument not in (type(None), ...)]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(inner)}"
    if get_origin(kind) in (tuple, list):
        return f"a list, each {wanted(inner[0])}"
    if get_origin(kind) is dict:
        return f"a mapping of names, each to {wanted(inner[1])}, spelled {{NAME: VALUE}}"
    if inner:  # or None
        return wanted(inner[0])
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(kind, str(kind))
