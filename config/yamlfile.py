"""Settings as YAML; a text whose parser would silently drop or mistake a part of it is refused.

All settings pass through `parse_yaml`: files, files that a file names, and text on a command line.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 2**20  # the longest text of settings: YAML is read at about 1 MB/s
MAX_VALUES = 10_000  # values that all aliases together may stand for: nine lines of them make a billion
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_BY_SIXTY = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_SWITCHES = {"yes", "no", "on", "off"}  # true and false to YAML, in any case


def read_yaml(path: Path) -> Any:
    """Return the values in a YAML file of settings.

    Raises:
        ValueError: The errors of `parse_yaml`; or the file is too large.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        raw = file.read(MAX_BYTES + 1)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if len(raw) <= MAX_BYTES:
            raise ValueError(f"{path} is no YAML: {error}; save it as UTF-8") from None
        text = " " * len(raw)  # The cut is inside a character; the length alone will be refused.
    return parse_yaml(text, str(path))


def _place_of(error: Exception) -> str:
    """Return where a text is no YAML, as far as the parser says it, and why."""
    mark = getattr(error, "problem_mark", None)
    at = f" at line {mark.line + 1} column {mark.column + 1}" if mark else ""
    return f"{at}: {' '.join(str(getattr(error, 'problem', None) or error).split())}"


def parse_yaml(text: str, name: str) -> Any:
    """Return the values in a YAML text of settings.

    Args:
        name: The name of the file, for errors.

    Raises:
        ValueError: It is no YAML or is too large; aliases expand without bound; a mapping has a key twice, of
            which a parser silently takes the later one, or a key `group.key` before the group or in it too;
            or a number or a key has another reading than the parser's.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"{name} is larger than {MAX_BYTES:,} bytes, the most that settings may take")
    try:
        with suppress(ValueError, RecursionError):
            json.loads(text)
            text = text.replace("\t", " ")  # JSON may be indented by tabs, YAML may not.
        loader = yaml.SafeLoader(io.StringIO(text))
        loader.name = name
        loader.yaml_implicit_resolvers = {  # Dates are left out: they are text to the parser.
            first: [kind for kind in kinds if kind[0] != "tag:yaml.org,2002:timestamp"]
            for first, kinds in loader.yaml_implicit_resolvers.items()
        }
        node = loader.get_single_node()
        # The checks come before the values: a merge (<<) puts another mapping's keys beside a mapping's own.
        wrong = _endless(node, name) or _key_twice(node, name) or _misread(node, name)
        values = None if node is None or wrong else loader.construct_document(node)
    except (ValueError, yaml.YAMLError, RecursionError) as error:  # ValueError: `!!int a`
        raise ValueError(f"{name} is no YAML{_place_of(error)}; correct it there") from None
    if wrong is not None:
        raise ValueError(wrong)
    names = values if isinstance(values, dict) else {}
    order = list(map(str, names))
    for place, key in enumerate(order):
        group, dot, inner = key.partition(".")
        inside = names.get(group)
        # The parser forgets such a key before its group, and takes one after it if the group lacks it.
        if dot and (group in order[place:] or (isinstance(inside, dict) and inner in inside)):
            raise ValueError(f"{name} has both {group} and {key}; write {inner} inside {group}")
    return values


# --- faults of a tree of nodes, each as a sentence, or None -------------------------------------------


def _endless(root: Any, name: str) -> str | None:
    """Say that aliases (`*a`) stand for more than MAX_VALUES values, or for what they are in."""
    sizes: dict[int, float] = {}  # the values that a node stands for with its aliases, by id

    def size(node: Any) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # A node that contains itself meets this while it is counted.
            sizes[id(node)] = 1 + sum(map(size, _children(node)))
        return sizes[id(node)]

    whole = size(root)
    if whole > max(MAX_VALUES, len(sizes)):  # Without aliases `whole` is the number of nodes.
        return f"{name} cannot be read: its aliases stand for more than {MAX_VALUES:,} values; write them out"
    # Where a number is wanted, the parser reads a text as YAML once more.
    texts = [node.value for node in _nodes(root) if isinstance(node, yaml.ScalarNode) and "*" in node.value]
    for text in texts:
        with suppress(yaml.YAMLError, RecursionError):
            inner = yaml.compose(text, yaml.SafeLoader)
            if not isinstance(inner, yaml.ScalarNode) and (wrong := _endless(inner, name)):
                return wrong
    return None


def _key_twice(root: Any, name: str) -> str | None:
    """Name the first key that a mapping has for the second time."""
    for node in _nodes(root):
        keys = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key.value, str) and key.value != "<<":  # Several merges all count.
                if (key.tag, key.value) in keys:
                    return f"{key.value} is twice in {name}, again in line {_line(key)}; leave one out"
                keys.add((key.tag, key.value))
    return None


def _misread(root: Any, name: str) -> str | None:
    """Name the first number that has two readings (`010`, `1:30`), or key that is true or false (`on`)."""
    for node in _nodes(root):
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.style is None and str(key.value).lower() in _SWITCHES:
                truth = str(key.value.lower() in ("yes", "on")).lower()
                return (
                    f"the key {key.value} in line {_line(key)} of {name} is {truth} to YAML; write it in "
                    f'quotes, "{key.value}"'
                )
        if not isinstance(node, yaml.ScalarNode) or node.style is not None or node.tag not in _NUMBERS:
            continue
        text, place = node.value, f"{node.value} in line {_line(node)} of {name}"
        wrong = two_readings(text, place)
        if wrong is not None:
            return f'{wrong}, or "{text}" for text' if ":" in text else wrong
    return None


def two_readings(text: str, place: str) -> str | None:
    """Say that a number is one to base 60 (`1:30`) or to base 8 (`010`) in YAML, and another elsewhere."""
    if _BY_SIXTY.fullmatch(text):
        value = f"{_by_sixty(text):.15g}"
        return f"{place} is {value} to YAML, which takes a colon for base 60; write {value}"
    if _OCTAL.fullmatch(text) and int(text, 8) != int(text):
        return (
            f"{place} is {int(text, 8)} to YAML, which takes a leading 0 for base 8, and {int(text)} "
            f"elsewhere; write {int(text, 8)} or {int(text)}"
        )
    return None


def _by_sixty(text: str) -> float:
    value = 0.0
    for part in text.replace("_", "").lstrip("+-").split(":"):
        value = value * 60 + float(part)
    return -value if text.startswith("-") else value


def _line(node: Any) -> int:
    return node.start_mark.line + 1


def _children(node: Any) -> list[Any]:
    """Return the nodes right below one; those of a mapping are its keys and values."""
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _nodes(root: Any) -> Iterator[Any]:
    """Yield every node of a tree once, in the order of the text: an alias is the node that it names."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            waiting += reversed(_children(node))
