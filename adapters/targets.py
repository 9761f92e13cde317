"""The modules that a setting means, by published name, role or pattern; to match nothing is an error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Roles read our own names. The head has none: a head that trains by accident costs what the rest does.
ROLES: dict[str, Callable[[str], bool]] = {
    "attention": lambda name: ".attention." in f".{name}.",
    "mlp": lambda name: ".mlp." in f".{name}.",
    "embedding": lambda name: name == "embed",
    "all-linear": lambda name: name.startswith("blocks."),
}

# What the families call the same part; a name that fits two parts, as c_proj, means both.
_SYNONYMS = (
    {
        "c_attn",
        "qkv_proj",
        "qkv",
        "query_key_value",
        "Wqkv",
        "W_pack",
        "q_proj",
        "k_proj",
        "v_proj",
        "q_attn",
    },
    {"c_proj", "out_proj", "o_proj", "dense", "wo", "out"},
    {"c_fc", "fc_in", "fc1", "up_proj", "gate_proj", "dense_h_to_4h", "w1", "w3"},
    {"c_proj", "fc_out", "fc2", "down_proj", "dense_4h_to_h", "w2"},
    {"wte", "embed_tokens", "word_embeddings", "embed_in", "embed"},
    {"lm_head", "embed_out", "head", "output"},
    {"ln_f", "norm", "final_layernorm"},
)


def matches(published: str, wanted: str) -> bool:
    """Say whether a published name is meant by a leaf, a dotted suffix of it, or a pattern with `*`."""
    if "*" in wanted:  # Part by part in linear time, since the pattern may be a stranger's.
        first, *inner, last = wanted.split("*")
        at = len(first)
        for part in inner:
            at = published.find(part, at) + len(part)
            if at < len(part):
                return False
        return published.startswith(first) and published.endswith(last) and at + len(last) <= len(published)
    return published == wanted or published.endswith(f".{wanted}")


def select_targets(
    modules: Mapping[str, str], wanted: Sequence[str], setting: str = "lora.targets"
) -> list[str]:
    """Return our names of the modules that are meant, in the order of `modules`.

    Args:
        modules: Our name -> published name, of the modules that may be chosen.
        wanted: Published leaf names or dotted suffixes, roles (`attention`, `mlp`, `embedding`,
            `all-linear`: every linear of the blocks), or patterns with `*` of full published names.
        setting: The setting that names them, for the error.

    Raises:
        ValueError: One of them matches nothing; it lists what there is and what was probably meant.
    """
    chosen: set[str] = set()
    absent = []
    for name in wanted:
        role = ROLES.get(name)
        found = {our for our, full in modules.items() if (role(our) if role else matches(full, name))}
        chosen |= found
        if not found:
            absent.append(name)
    if absent:
        raise ValueError(absent_sentence(list(modules.values()), absent, setting))
    return [our for our in modules if our in chosen]


def absent_sentence(published: Sequence[str], absent: list[str], setting: str) -> str:
    leaves = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in published))
    likely: set[str] = set()
    for name in absent:
        leaf = name.rsplit(".", 1)[-1]
        same = {other for group in _SYNONYMS if leaf in group for other in group if other in leaves}
        likely |= same or set(difflib.get_close_matches(leaf, leaves, n=2))
    meant = [leaf for leaf in leaves if leaf in likely]
    hint = f"; probably meant: {', '.join(meant)}" if meant else ""
    return f"{setting}: the model has no {', no '.join(absent)}; it has {', '.join(leaves)}{hint}"


# --- patterns: a value of its own for some modules -----------------------------------------------------


def pattern_value(patterns: Mapping[str, Any], published: str, default: Any) -> Any:
    """Return the value of the first key that the name ends in, as PEFT chooses it."""
    return next((value for key, value in patterns.items() if matches(published, key)), default)


def as_peft_pattern(
    patterns: Mapping[str, Any], names: Sequence[str], own: Mapping[str, Any]
) -> dict[str, Any]:
    """Translate patterns for PEFT, which forgets the order of keys and takes them for regular expressions.

    They stay as they are where they are plain and no module is meant twice; else each name is written out.

    Args:
        patterns: Keys as `matches` takes them; the first that fits counts.
        names: Published names of the modules that they are for.
        own: Name -> value for further modules, which the patterns do not mean.
    """
    plain = not any("*" in key for key in patterns)
    meant = [sum(matches(name, key) for key in patterns) + (name in own) for name in (*names, *own)]
    if plain and all(times < 2 for times in meant):
        return {**own, **patterns}
    absent = object()
    of_each = {name: pattern_value(patterns, name, absent) for name in names}
    return {**own, **{name: value for name, value in of_each.items() if value is not absent}}


_PEFT_KEY = re.compile(r"\^?(?:[\w-]|\\\.|\.\*?)+\$?", re.ASCII)


def peft_key(text: str) -> re.Pattern[str]:
    """Compile a key of PEFT's patterns for `fullmatch`: PEFT matches `(.*\\.)?(key)$` from the start.

    It matches in linear time whatever a stranger wrote: what follows a `.*` is tried at its first place only.

    Raises:
        ValueError: It is more than a name with `.` or `.*` in it.
    """
    if len(text) > 200 or not _PEFT_KEY.fullmatch(text):
        raise ValueError(f"{text[:200]!r}; only names, and .* in them, are known")
    parts = text.removeprefix("^").removesuffix("$").split(".*")
    inner = "".join(f"(?>.*?{part})" for part in parts[1:-1])
    last = f".*{parts[-1]}" if len(parts) > 1 else ""
    return re.compile(("" if text.startswith("^") else r"(?:.*\.)?") + parts[0] + inner + last)
