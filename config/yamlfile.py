"""Settings as YAML, as its parser takes them, without what it would drop or mistake without a word.

Every road into the settings passes `parse_yaml`: files, files that a file names, and text on a command line.
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

MAX_BYTES = 2**20  # of a text of settings: YAML is read at about 1 MB/s
MAX_VALUES = 10_000  # that aliases may stand for, all together: nine lines of them make a billion
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_BY_SIXTY = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_SWITCHES = {"yes", "no", "on", "off"}  # true and false to YAML, in any case


def read_yaml(path: Path) -> Any:
    """Return what a YAML file of settings holds.

    Raises:
        ValueError: As `parse_yaml`; or the file is too large.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        raw = file.read(MAX_BYTES + 1)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if len(raw) <= MAX_BYTES:
            raise ValueError(f"{path} is no YAML: {error}") from None
        text = " " * len(raw)  # cut in a character
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Any:
    """Return what a YAML text of settings holds.

    Args:
        name: Of the file, for errors.

    Raises:
        ValueError: It is no YAML or is too large; aliases expand without bound; a mapping has a key twice, of
            which a parser takes the later one without a word, or a key of a group apart from it, which is in
            it too or stands before it; or a number or a key has another reading than the parser's.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"{name} is larger than {MAX_BYTES:,} bytes, the most that settings may take")
    try:
        with suppress(ValueError, RecursionError):
            json.loads(text)
            text = text.replace("\t", " ")  # JSON may be indented by tabs, and holds no others; YAML may not
        loader = yaml.SafeLoader(io.StringIO(text))
        loader.name = name
        loader.yaml_implicit_resolvers = {  # without dates, which are text to the parser: a folder's name
            first: [kind for kind in kinds if kind[0] != "tag:yaml.org,2002:timestamp"]
            for first, kinds in loader.yaml_implicit_resolvers.items()
        }
        node = loader.get_single_node()
        # Before they are built: a merge puts another mapping's keys beside a mapping's own.
        wrong = _endless(node, name) or _key_twice(node, name) or _misread(node, name)
        values = None if node is None or wrong else loader.construct_document(node)
    except (ValueError, yaml.YAMLError, RecursionError) as error:  # ValueError: `!!int a`
        raise ValueError(f"{name} is no YAML: {' '.join(str(error).split())}") from None
    if wrong is not None:
        raise ValueError(wrong)
    names = values if isinstance(values, dict) else {}
    order = list(map(str, names))
    for place, key in enumerate(order):
        group, dot, inner = key.partition(".")
        inside = names.get(group)
        # The parser forgets what comes before its group; what comes after it is fine, if it is not in it too.
        if dot and (group in order[place:] or (isinstance(inside, dict) and inner in inside)):
            raise ValueError(f"{name} has both {group} and {key}; write {inner} inside {group}")
    return values


# --- faults of a tree of nodes, each as a sentence, or None -------------------------------------------


def _endless(root: Any, name: str) -> str | None:
    """Say that aliases (`*a`) stand for more than MAX_VALUES values, or for what they are in."""
    sizes: dict[int, float] = {}  # of each node with all that its aliases stand for

    def size(node: Any) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # while it is counted: a node inside itself has no end
            sizes[id(node)] = 1 + sum(map(size, _children(node)))
        return sizes[id(node)]

    whole = size(root)
    if whole > max(MAX_VALUES, len(sizes)):  # without aliases these are the same number
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
            if isinstance(key.value, str) and key.value != "<<":  # all of which count
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
        wrong = by_base_60(text, place)
        if wrong is not None:
            return f'{wrong}, or "{text}" for text'
        if _OCTAL.fullmatch(text) and int(text, 8) != int(text):
            return (
                f"{place} is {int(text, 8)} to YAML, which takes a leading 0 for base 8, and {int(text)} "
                f"elsewhere; write {int(text, 8)} or {int(text)}"
            )
    return None


def by_base_60(text: str, place: str) -> str | None:
    """Say that a number with a colon is one to base 60 (`1:30`)."""
    if not _BY_SIXTY.fullmatch(text):
        return None
    value = f"{_by_sixty(text):.15g}"
    return f"{place} is {value} to YAML, which takes a colon for base 60; write {value}"


def _by_sixty(text: str) -> float:
    value = 0.0
    for part in text.replace("_", "").lstrip("+-").split(":"):
        value = value * 60 + float(part)
    return -value if text.startswith("-") else value


def _line(node: Any) -> int:
    return node.start_mark.line + 1


def _children(node: Any) -> list[Any]:
    """The nodes right below one; of a mapping keys and values."""
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _nodes(root: Any) -> Iterator[Any]:
    """Every node of a tree once, in the order of the text: an alias is the node that it names."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            waiting += reversed(_children(node))
