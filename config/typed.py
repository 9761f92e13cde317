"""Plain values of YAML and JSON as the fields of a dataclass; a value of another type is refused."""

from __future__ import annotations

import functools
import reprlib
import sys
from typing import Any, Literal, get_args, get_origin, get_type_hints


@functools.cache
def field_types(group: type) -> dict[str, Any]:
    """Return the type of each field of a dataclass."""
    return get_type_hints(group)


def typed_group(name: str, group: type, values: Any, missing: dict[str, Any]) -> Any:
    """Return the dataclass of a group's values; ValueError for an unknown key or a wrong type.

    Args:
        missing: Values by full key for keys that `values` lacks, instead of their defaults.
    """
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
    """Return the value as its field has it: a float may be given as a whole number, a tuple as a list."""
    if float in (kind, *get_args(kind)) and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if get_origin(kind) is tuple:
        if get_args(kind)[0] is float and isinstance(value, list | tuple):
            return tuple(typed_value(f"{key}, an item,", item, float) for item in value)
        value = tuple(value) if isinstance(value, list) else value
        fits = isinstance(value, tuple) and all(type(item) is get_args(kind)[0] for item in value)
    elif get_origin(kind) is Literal:
        fits = type(value) is str and value in get_args(kind)
    elif get_origin(kind) is dict:
        if not isinstance(value, dict) or any(type(name) is not str for name in value):
            raise ValueError(f"{key} is {reprlib.repr(value)}; it must be a mapping of names to values")
        return {name: typed_value(f"{key}.{name}", v, get_args(kind)[1]) for name, v in value.items()}
    else:
        fits = type(value) in (get_args(kind) or (kind,))  # An exact type, since True is no int.
    if not fits:
        raise ValueError(f"{key} is {reprlib.repr(value)}; it must be {wanted(kind)}")
    return value


def wanted(kind: Any) -> str:
    """Describe the values of a type in words."""
    inner = [argument for argument in get_args(kind) if argument not in (type(None), ...)]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(inner)}"
    if get_origin(kind) in (tuple, list):
        return f"a list, each {wanted(inner[0])}"
    if get_origin(kind) is dict:
        return f"a mapping of names, each to {wanted(inner[1])}, spelled {{NAME: VALUE}}"
    if inner:  # The other is None.
        return wanted(inner[0])
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(kind, str(kind))
