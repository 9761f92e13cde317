"""Files of settings: YAML as its parser takes it, without what it would drop without a word."""

from __future__ import annotations

import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: Path) -> Any:
    """What a YAML file of settings holds.

    Raises:
        ValueError: It is no YAML; or a mapping has a key twice, of which a parser takes the later one without
            a word; or a key of a group apart from it, which is in it too or stands before it.
        OSError: It cannot be read.
    """
    try:
        text = path.read_text("utf-8")
        with suppress(ValueError, RecursionError):
            json.loads(text)
            text = text.replace("\t", " ")  # JSON may be indented by tabs, and holds no others; YAML may not
        loader = yaml.SafeLoader(io.StringIO(text))
        loader.name = str(path)
        loader.yaml_implicit_resolvers = {  # without dates, which are text to the parser: a folder's name
            first: [kind for kind in kinds if kind[0] != "tag:yaml.org,2002:timestamp"]
            for first, kinds in loader.yaml_implicit_resolvers.items()
        }
        node = loader.get_single_node()
        found = _key_twice(node)  # first: a merge puts another mapping's keys beside a mapping's own
        values = None if node is None else loader.construct_document(node)
    except (ValueError, yaml.YAMLError, RecursionError) as error:  # ValueError: `!!int a`, undecodable bytes
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if found is not None:
        raise ValueError(f"{found[0]} is twice in {path}, again in line {found[1]}; leave one out")
    names = values if isinstance(values, dict) else {}
    order = list(map(str, names))
    for place, key in enumerate(order):
        group, dot, name = key.partition(".")
        inside = names.get(group)
        # The parser forgets what comes before its group; what comes after it is fine, if it is not in it too.
        if dot and (group in order[place:] or (isinstance(inside, dict) and name in inside)):
            raise ValueError(f"{path} has both {group} and {key}; write {name} inside {group}")
    return values


def _key_twice(root: Any) -> tuple[str, int] | None:
    """The first key that a mapping of a YAML tree has for the second time, and its line."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or not isinstance(getattr(node, "value", None), list):
            continue
        seen.add(id(node))  # an alias is the node that it names
        keys = set()
        for pair in node.value:
            key, *rest = pair if isinstance(pair, tuple) else (None, pair)
            waiting += rest
            if key is not None and isinstance(key.value, str) and key.value != "<<":  # all of which count
                if (key.tag, key.value) in keys:
                    return key.value, key.start_mark.line + 1
                keys.add((key.tag, key.value))
    return None
