"""An adapter of Hugging Face PEFT, or one written here, on a model.

    load_adapter(model, family, "out/adapter")

`adapter_config.json` says what the adapter is, `adapter_model.safetensors` holds it under
`base_model.model.` + the published module + what it is, without the adapter's name. A folder is read as if
a stranger had written it; nothing of the model is changed before all of it was found sound.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters.layers import is_embedding, is_linear, sizes
from adapters.targets import peft_key
from config import LoraConfig
from lora import adapter_layers, add_adapter, base_of, held_modules
from pretrained.family import Family
from pretrained.folder import (
    TensorEntry,
    inner_path,
    read_bin,
    read_header,
    read_json,
    shown,
    wrong_tensors,
)

ADAPTER_CONFIG, WEIGHTS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."

# Keys of adapter_config.json that mean nothing here, keys that are read, and starts that leave the base as it
# is. PEFT writes more keys with each version; a new one that is set is refused by name. PEFT itself sets
# fan_in_fan_out to false where the targets are linears, as all known here are.
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out",
    "inference_mode", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
}  # fmt: skip
READ = {
    "alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "modules_to_save", "peft_type", "r",
    "rank_pattern", "target_modules", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
LONGEST_PATTERN = 2000  # characters
STARTS = (True, False, "gaussian", "eva", "orthogonal", "pissa")


@dataclass(frozen=True)
class PeftSettings:
    """The settings of an adapter_config.json for a model, modules by our names."""

    config: LoraConfig
    ranks: dict[str, int]  # A module with a rank has a low-rank pair.
    whole: list[str]
    rows: dict[str, list[int]]  # ids whose rows train
    lora_bias: bool  # Each pair has a bias of its own, which its scale multiplies.
    ties: bool  # Embedding and head share their weights, and so whatever was trained of them.


@dataclass(frozen=True)
class TensorPlace:
    """The place of a tensor of the file: the parameter that it is loaded into or compared with."""

    shape: tuple[int, ...]
    our: str
    part: str


def load_adapter(
    model: nn.Module, family: Family, folder: str | Path, name: str = "default", trainable: bool = False
) -> LoraConfig:
    """Add the adapter of a folder to a base model; it alone is active, as after `lora.add_adapter`.

    Args:
        model: A base of the family, with or without other adapters, and with the vocabulary of the base that
            the adapter was trained on: see `stored_vocabulary`.
        folder: With adapter_config.json and adapter_model.safetensors, or .bin, of which nothing is run.
        name: The adapter's name here.
        trainable: Let it train on.

    Raises:
        ValueError: The folder holds no LoRA adapter, one that asks for something not known here, or one that
            does not fit this model; one sentence, and the model is as it was.
    """
    folder = Path(folder)
    values = read_json(folder, ADAPTER_CONFIG, linked=False)
    entries = _entries(folder)
    names = {our: family.key(our) for our in held_modules(model)}
    bases: dict[str, Any] = {our: base_of(module) for our, module in held_modules(model).items()}
    try:
        _refuse_unknown(values)
        settings = _settings(values, bases, names, entries)
    except ValueError as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG} cannot be used: {error}") from None
    loaded, compared = _places(settings, bases, names, entries)
    was_for = (
        f"{folder} does not fit this model; it was written for {shown(values.get('base_model_name_or_path'))}"
    )
    shapes = {key: place.shape for key, place in (loaded | compared).items()}
    if wrong := wrong_tensors(shapes, entries, "left over", most=8):
        raise ValueError(f"{was_for}: {wrong}; open it on that base, or copy both of its files anew")
    tensors = {key: entries[key].read(torch.float32, "cpu") for key in loaded | compared}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{entries[key].file} holds {key} with values that are not finite; the adapter is broken"
            )
    for key, place in compared.items():
        _refuse_other_base(getattr(bases[place.our], place.part), key, tensors[key], was_for)
    config = settings.config
    tied = settings.ties and {"embed", "head"} <= {*settings.ranks, *settings.whole}
    if tied and trainable and "embed" in settings.ranks:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} cannot be used: ensure_weight_tying makes the pairs of embedding and "
            "head one, which can be used here and not trained on; merge the adapter, and train a new one"
        )
    starts = _starts(settings.ranks, bases, names) if config.init == "pissa" else {}
    add_adapter(model, replace(config, init="default"), family.key, name, settings.rows, any_rank=True)
    layers: dict[str, Any] = dict(adapter_layers(model, name))
    if tied and "embed" in settings.whole:
        layers["head"].copy.weight = layers["embed"].copy.weight
    with torch.no_grad():
        for our, (u, s, vh) in starts.items():
            root = (s / layers[our].scale).sqrt()
            layers[our].start_a, layers[our].start_b = root[:, None] * vh, u * root
        for key, place in loaded.items():
            parameter = layers[place.our].get_parameter(place.part)
            if settings.lora_bias and place.part == "bias":
                parameter.add_(tensors[key], alpha=layers[place.our].scale)
            else:
                parameter.copy_(tensors[key])
    for layer in layers.values():
        layer.requires_grad_(trainable)
    return config


def stored_vocabulary(folder: str | Path, family: Family) -> dict[str, TensorEntry]:
    """Return embedding and head of the base, where the folder has them, by our parameter names.

    PEFT writes both beside an adapter whose base was resized. Such a base is to be grown by their last rows
    before the adapter is loaded: `training.run.open_adapted` does so.
    """
    entries, found = _entries(Path(folder)), {}
    for our in ("embed", "head"):
        for part in ("weight", "bias"):
            inner = ("original_module.", "base_layer.", "token_adapter.base_layer.", "")
            keys = [f"{PREFIX}{family.key(our)}.{within}{part}" for within in inner]
            found |= {f"{our}.{part}": entries[key] for key in keys[::-1] if key in entries}
    return found


def pair_suffixes(of_embedding: bool) -> tuple[str, str]:
    """Return what PEFT calls the two tensors of a low-rank pair."""
    return ("lora_embedding_A", "lora_embedding_B") if of_embedding else ("lora_A.weight", "lora_B.weight")


def _entries(folder: Path) -> dict[str, TensorEntry]:
    name = WEIGHTS if (folder / WEIGHTS).exists() or not (folder / BIN).exists() else BIN
    path = inner_path(folder, name, False)
    return read_bin(path) if name == BIN else read_header(path)


def adapter_base(folder: str | Path) -> tuple[str | None, str | None]:
    """Return the base that an adapter's folder names, and its revision; ValueError if they are no texts."""
    values = read_json(Path(folder), ADAPTER_CONFIG, linked=False)
    found = values.get("base_model_name_or_path"), values.get("revision")
    if not all(text is None or isinstance(text, str) for text in found):
        raise ValueError(f"{Path(folder) / ADAPTER_CONFIG} names the base {shown(found)}; it must be a text")
    return found


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"peft_type is {shown(kind)}; only LORA is known")
    if values.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(f"task_type is {shown(values['task_type'])}; only CAUSAL_LM is known")
    other = [key for key in values if key not in READ | IGNORED and values[key]]
    if other:
        raise ValueError(
            f"{other[0]} is {shown(values[other[0]])}, which is not known here; only plain LoRA is"
        )
    start = values.get("init_lora_weights", True)
    if not any(start is known or start == known for known in STARTS if type(start) is type(known)):
        raise ValueError(
            f"init_lora_weights is {shown(start)}, a start that changes the base; let PEFT convert the "
            "adapter (save_pretrained with path_initial_model_for_weight_conversion) and use that"
        )


def _read(values: Mapping[str, Any], key: str, default: Any, kinds: tuple[type, ...]) -> Any:
    value = values.get(key, default)
    value = default if value is None else value
    if type(value) not in kinds:
        raise ValueError(
            f"{key} is {shown(value)}; it must be {' or '.join(kind.__name__ for kind in kinds)}"
        )
    return value


def _texts(value: Any, key: str) -> list[str]:
    if not isinstance(value, list) or not all(
        isinstance(text, str) and 0 < len(text) <= 300 for text in value
    ):
        raise ValueError(f"{key} is {shown(value)}; it must be a list of names")
    return value


def _settings(
    values: Mapping[str, Any],
    bases: Mapping[str, Any],
    names: Mapping[str, str],
    entries: Mapping[str, TensorEntry],
) -> PeftSettings:
    """Return what adapter_config.json means for a model; ValueError for what is not known here."""
    r, alpha = _rank(values.get("r", 8), "r"), _alpha(values.get("lora_alpha", 8), "lora_alpha")
    bias = _read(values, "bias", "none", (str,))
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias is {shown(bias)}; known are none, all and lora_only")
    ties = _read(values, "ensure_weight_tying", False, (bool,))
    ties = ties and bases["head"].weight is bases["embed"].weight
    whole = _whole_modules(values, names, entries, ties)
    targets = _target_modules(values, bases, names, whole, ties)
    chosen = {our: names[our] for our in targets}
    may = _patterns(values, "rank_pattern", chosen, r, _rank)
    ranks = {our: _one_rank(may[our], entries, PREFIX + names[our]) for our in targets}
    alphas = _alphas(values, chosen, alpha)
    rows = _rows(values, bases, names)
    for our in rows:
        if our in targets:
            raise ValueError(f"{names[our]} is a target and has trainable_token_indices; only one is known")
    dora = _read(values, "use_dora", False, (bool,))
    lora_bias = _read(values, "lora_bias", False, (bool,))
    if lora_bias:
        _refuse_lora_bias(bias, dora, {names[our]: bases[our] for our in targets})
        bias = "lora_only"  # A pair's own bias is added to that of its linear.
    dropout = _read(values, "lora_dropout", 0.0, (int, float))
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout is {shown(dropout)}; it must be at least 0 and below 1")

    config = LoraConfig(
        r=r,
        alpha=alpha,
        dropout=float(dropout),
        targets=tuple(names[our] for our in targets),
        rank_pattern={names[our]: n for our, n in ranks.items() if n != r},
        alpha_pattern={names[our]: value for our, value in alphas.items() if value != alpha},
        rslora=_read(values, "use_rslora", False, (bool,)),
        dora=dora,
        init="pissa" if values.get("init_lora_weights") == "pissa" else "default",
        bias=bias,
        train_modules=tuple(names[our] for our in whole),
    )
    return PeftSettings(config, ranks, whole, rows, lora_bias, ties)


def _whole_modules(
    values: Mapping[str, Any], names: Mapping[str, str], entries: Mapping[str, TensorEntry], ties: bool
) -> list[str]:
    """Return our names of the modules of which a full copy was trained or is in the folder."""
    saved = _texts(_read(values, "modules_to_save", [], (list,)), "modules_to_save")
    whole = [our for our, full in names.items() if any(_ends(full, text) for text in saved)]
    for text in saved:
        if not any(_ends(full, text) for full in names.values()):
            raise ValueError(f"modules_to_save has {shown(text)}, which this model lacks")
    # Where the base was resized, embedding and head lie whole beside the adapter.
    resized = [our for our in ("embed", "head") if f"{PREFIX}{names[our]}.weight" in entries]
    whole += [our for our in resized if our not in whole]
    if ties and {"embed", "head"} & {*whole}:
        whole = [our for our in names if our in {*whole, "embed", "head"}]
    return whole


def _target_modules(
    values: Mapping[str, Any],
    bases: Mapping[str, Any],
    names: Mapping[str, str],
    whole: list[str],
    ties: bool,
) -> list[str]:
    """Return our names of the targets; embedding and head are both targets, if one is and they are tied."""
    able = {
        our: full
        for our, full in names.items()
        if our not in whole and (is_linear(bases[our]) or is_embedding(bases[our]))
    }
    targets = _targets(values, able)
    if ties and {"embed", "head"} & {*targets}:
        targets = [our for our in able if our in {*targets, "embed", "head"}]
    if not targets:
        raise ValueError(
            f"target_modules {shown(values.get('target_modules'))} match no module of this model, which has "
            f"{', '.join(dict.fromkeys(full.rsplit('.', 1)[-1] for full in able.values()))}"
        )
    return list(targets)


def _alphas(values: Mapping[str, Any], chosen: Mapping[str, str], alpha: float) -> dict[str, float]:
    """Return the alpha of each target (our name -> published); ValueError where the patterns give two."""
    alphas = {}
    for our, found in _patterns(values, "alpha_pattern", chosen, alpha, _alpha).items():
        if len(found) > 1:
            raise ValueError(
                f"alpha_pattern gives {chosen[our]} both {found[0]:g} and {found[1]:g}, and PEFT forgets the "
                "order of its keys; name each module once"
            )
        alphas[our] = found[0]
    return alphas


def _refuse_lora_bias(bias: str, dora: bool, targets: Mapping[str, Any]) -> None:
    """Refuse a bias beside each pair where PEFT knows none, or where no bias of the base takes it up."""
    without = [full for full, base in targets.items() if getattr(base, "bias", None) is None]
    if bias != "none" or dora or without:
        what = f"{without[0]} has no bias" if without else f"bias is {shown(bias)} and use_dora {dora}"
        raise ValueError(
            f"lora_bias is True, and {what}; known is lora_bias alone, on linears that have a bias"
        )


def _places(
    settings: PeftSettings,
    bases: Mapping[str, Any],
    names: Mapping[str, str],
    entries: Mapping[str, TensorEntry],
) -> tuple[dict[str, TensorPlace], dict[str, TensorPlace]]:
    """Return the tensors to load, all of which must be there, and those of the base to compare.

    The latter, and copies of the former, are there or not, as the writer chose.
    """
    loaded: dict[str, TensorPlace] = {}
    compared: dict[str, TensorPlace] = {}
    tied = bases["head"].weight is bases["embed"].weight
    for our, full in names.items():
        base, key = bases[our], PREFIX + full
        is_target, bias = our in settings.ranks, getattr(base, "bias", None)
        within = "original_module"
        if our in settings.whole:
            for part, tensor in _parts(base):
                loaded[f"{key}.{part}"] = place = TensorPlace(tuple(tensor.shape), our, f"copy.{part}")
                if f"{key}.modules_to_save.{part}" in entries:
                    loaded[f"{key}.modules_to_save.{part}"] = place
        elif is_target:
            within = "base_layer"
            (size_out, size_in), r = sizes(base), settings.ranks[our]
            a, b = pair_suffixes(is_embedding(base))
            loaded[f"{key}.{a}"] = TensorPlace((r, size_in), our, "a")
            loaded[f"{key}.{b}"] = TensorPlace((size_out, r), our, "b")
            if settings.config.dora:
                loaded[f"{key}.lora_magnitude_vector"] = TensorPlace((size_out,), our, "magnitude")
        elif our in settings.rows:
            within, ids = "token_adapter.base_layer", settings.rows[our]
            rows = f"{key}.token_adapter.trainable_tokens_delta"
            once = our == "head" and tied and ids == settings.rows.get("embed")
            if not once or rows in entries:
                loaded[rows] = TensorPlace((len(ids), base.weight.size(1)), our, "rows")
        trained = settings.config.bias == "all" or (settings.config.bias == "lora_only" and is_target)
        if trained and bias is not None and our not in settings.whole:
            bias_key = f"{key}.base_layer.bias" if is_target else f"{key}.bias"
            bias_key = f"{key}.lora_B.bias" if settings.lora_bias else bias_key
            loaded[bias_key] = TensorPlace(tuple(bias.shape), our, "bias")
        for part in ("weight", "bias"):
            own = f"{key}.{within}.{part}"
            if own in entries and own not in loaded and getattr(base, part, None) is not None:
                compared[own] = TensorPlace(tuple(getattr(base, part).shape), our, part)
    return loaded, compared


def _parts(base: nn.Module) -> list[tuple[str, Tensor]]:
    parts = [("weight", base.weight), ("bias", getattr(base, "bias", None))]
    return [(part, tensor) for part, tensor in parts if isinstance(tensor, Tensor)]


def _rank(value: Any, key: str) -> int:
    if type(value) is not int or not 1 <= value <= 2**16:
        raise ValueError(f"{key} is {shown(value)}; a rank is a whole number from 1 to {2**16}")
    return value


def _alpha(value: Any, key: str) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{key} is {shown(value)}; it must be a number above 0")
    return float(value)


def _ends(full: str, text: str) -> bool:
    """Say whether the module, or one that it lies in, has a name that ends so; PEFT compares without dots."""
    parts = full.split(".")
    return any(".".join(parts[:n]).endswith(text) for n in range(1, len(parts) + 1))


def _targets(values: Mapping[str, Any], able: Mapping[str, str]) -> list[str]:
    """Return our names of the modules that have a low-rank pair, as PEFT chooses them by the config alone.

    What the tensors say is compared with it, since PEFT passes over a tensor that no target has, and gives a
    target without tensors a pair that changes nothing.
    """
    wanted, layers = values.get("target_modules"), values.get("layers_to_transform")
    if isinstance(wanted, str):
        if layers is not None or values.get("layers_pattern"):
            raise ValueError(
                f"target_modules is {shown(wanted)}, beside which PEFT knows no layers_to_transform; write "
                "the names as a list"
            )
        inside = {our for our in able if our.startswith("blocks.")}
        chosen = inside if wanted == "all-linear" else _matching(wanted, able, "target_modules")
    else:
        chosen = _named(wanted, able, "target_modules")
        if layers not in (None, []):
            chosen &= _in_layers(layers, values.get("layers_pattern"), able)
        elif values.get("layers_pattern"):
            raise ValueError("layers_pattern is set and layers_to_transform is not; PEFT refuses that too")
    excluded = values.get("exclude_modules")
    if excluded:
        of_kind = _matching if isinstance(excluded, str) else _named
        chosen -= of_kind(excluded, able, "exclude_modules")
    return [our for our in able if our in chosen]


def _named(wanted: Any, able: Mapping[str, str], key: str) -> set[str]:
    texts = _texts(wanted, key)
    return {our for our, full in able.items() if any(full == t or full.endswith(f".{t}") for t in texts)}


def _matching(pattern: str, able: Mapping[str, str], key: str) -> set[str]:
    """Return the modules whose whole name a regular expression matches.

    RE2 matches, which takes linear time whatever a stranger wrote; where it does not know what Python's re
    knows, or reads it otherwise, the pattern is refused.
    """
    import pyarrow
    import pyarrow.compute

    names, re2 = pyarrow.array(list(able.values()), pyarrow.string()), pyarrow.compute
    options = re2.MatchSubstringOptions(f"^(?:{pattern})$")
    try:
        if len(pattern) > LONGEST_PATTERN or "{," in pattern or "[[" in pattern:
            raise ValueError("it is too long, or is read in two ways")
        re.compile(pattern)
        found = re2.call_function("match_substring_regex", [names], options)
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        raise ValueError(
            f"{key} is {shown(pattern)}, a regular expression that is not known here ({reason}); write the "
            "names as a list"
        ) from None
    return {our for our, is_meant in zip(able, found.to_pylist(), strict=True) if is_meant}


def _in_layers(layers: Any, patterns: Any, able: Mapping[str, str]) -> set[str]:
    """Return the modules of some layers; `patterns` names the list of layers, of which a model has one."""
    wanted = layers if isinstance(layers, list) else [layers]
    if not all(type(layer) is int for layer in wanted):
        raise ValueError(f"layers_to_transform is {shown(layers)}; it must be a number or a list of numbers")
    lists = [patterns] if isinstance(patterns, str) else patterns or []
    if not isinstance(lists, list) or not all(
        isinstance(text, str) and re.fullmatch(r"\w+", text, re.ASCII) for text in lists
    ):
        raise ValueError(f"layers_pattern is {shown(patterns)}; it must be the name of the list of layers")
    numbered = {our: re.search(r"\.(\w+)\.(\d+)\.", full) for our, full in able.items()}
    return {
        our
        for our, found in numbered.items()
        if found and int(found[2]) in wanted and (not lists or found[1] in lists)
    }


def _patterns(
    values: Mapping[str, Any], key: str, targets: Mapping[str, str], default: Any, check: Any
) -> dict[str, list[Any]]:
    """Return the values that each target may have: those of the keys its name ends in, or else the default.

    PEFT takes the first key in its order when it trains, but sorts them when it saves.
    """
    found = []
    for text, value in _read(values, key, {}, (dict,)).items():
        try:
            pattern = peft_key(text)
        except ValueError as error:
            raise ValueError(f"{key} has {error}") from None
        found.append((pattern, check(value, f"{key} of {shown(text)}")))
    return {
        our: list(dict.fromkeys(value for pattern, value in found if pattern.fullmatch(full))) or [default]
        for our, full in targets.items()
    }


def _one_rank(values: list[int], entries: Mapping[str, TensorEntry], key: str) -> int:
    """Return which of the ranks that a module may have its tensors have; ValueError for another."""
    for first, second in (pair_suffixes(False), pair_suffixes(True)):
        a, b = (entries.get(f"{key}.{suffix}") for suffix in (first, second))
        if a is None or b is None or not len(a.shape) == len(b.shape) == 2 or a.shape[0] != b.shape[1]:
            continue
        if a.shape[0] not in values:
            raise ValueError(
                f"its rank is {' or '.join(map(str, values))}, and the tensors of {key.removeprefix(PREFIX)} "
                f"have rank {a.shape[0]}; the two files are not of one adapter"
            )
        return a.shape[0]
    return values[0]


def _rows(
    values: Mapping[str, Any], bases: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, list[int]]:
    """Return the ids whose rows train, by module; those of a tied embedding are the head's too."""
    key = "trainable_token_indices"
    found = _read(values, key, [], (list, dict))
    found = {names["embed"]: found} if isinstance(found, list) else found
    if not found or not any(found.values()):
        return {}
    rows = {our: ids for our in ("embed", "head") for text, ids in found.items() if names[our].endswith(text)}
    size = bases["embed"].weight.size(0)
    for ids in rows.values():
        if not isinstance(ids, list) or not ids or any(type(n) is not int or not 0 <= n < size for n in ids):
            rows = {}
            break
    if len(rows) != len(found):
        raise ValueError(
            f"{key} is {shown(found)}; known are ids below {size} of {names['embed']} and {names['head']}"
        )
    if "embed" in rows and bases["head"].weight is bases["embed"].weight:
        rows.setdefault("head", rows["embed"])
    if bases["head"].bias is not None and "head" in rows:
        raise ValueError(
            f"{key} also means {names['head']}, and PEFT computes such rows without its bias; "
            "train the rows anew, or save them as modules_to_save"
        )
    return rows


def _refuse_other_base(own: Any, key: str, tensor: Tensor, was_for: str) -> None:
    """Refuse an adapter that carries other weights of the base than the model has."""
    if not isinstance(own, nn.Parameter):
        return  # It is stored in fewer bits, and cannot be equal.
    gap = (tensor - own.detach().float().cpu()).abs().max()
    if gap > 0.01 * tensor.abs().max():
        raise ValueError(
            f"{was_for}: {key} differs by {gap:.2g} from this model's; load that very base, with the "
            "vocabulary the adapter was trained with"
        )


def _starts(
    ranks: Mapping[str, int], bases: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return the largest singular parts of each linear with a pair: PEFT takes them off a base for PiSSA.

    They come from the very call of PEFT, whatever the size. An approximation is good enough to begin with,
    since what it took is written down; a file's start has to be the one that the adapter was trained from.
    """
    starts = {}
    for our, r in ranks.items():
        if is_embedding(bases[our]):
            continue
        u, s, vh = torch.linalg.svd(bases[our].weight.detach().float(), full_matrices=False)
        if r > len(s):
            raise ValueError(
                f"the adapter has a PiSSA start of rank {r}, but {names[our]} has {len(s)} singular parts; "
                "it is not for this base"
            )
        starts[our] = u[:, :r].clone(), s[:r].clone(), vh[:r].clone()
    return starts
