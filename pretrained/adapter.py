"""An adapter as a folder that Hugging Face PEFT opens, and back.

    save_adapter(model, family, "out/adapter", base="bigcode/starcoderbase-1b")
    load_adapter(model, family, "out/adapter")

`adapter_config.json` says what the adapter is, `adapter_model.safetensors` holds it, fp32, under
`base_model.model.` + the published module + what it is, without the adapter's name. A folder is read as if
a stranger had written it; nothing of the model is changed before all of it was found sound.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from changes import Change, LowRank, Rows, Whole, is_embedding, is_linear, sizes
from config import LoraConfig, write_atomically
from lora import Adapted, adapters_of, add_adapter, changes_of, held_modules, wrappers
from pretrained.family import Family
from pretrained.folder import DTYPES, Entry, inner_path, read_bin, read_header, read_json, shown
from pretrained.save import _json
from targets import matches

ADAPTER_CONFIG, WEIGHTS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
# PEFT saves the weights of these two beside their adapters, where they are targets by this very name.
EMBEDDING_NAMES = ("embed_tokens", "lm_head")

# Of adapter_config.json: what it may hold and means nothing here, what must be as it is when left out, and
# starts that leave the base as it is. PEFT writes many keys more with each version; a new one that is set is
# refused by name.
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode",
    "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
}  # fmt: skip
READ = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules",
    "task_type", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
STARTS = (True, False, "gaussian", "eva", "orthogonal", "pissa")


# --- writing -----------------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module,
    family: Family,
    folder: str | Path,
    base: str | None,
    revision: str | None = None,
    name: str = "default",
) -> None:
    """Write one adapter of the model; the folder appears whole.

    A PiSSA start is written as part of the adapter, of twice the rank, so that it is an ordinary one on the
    base as published. Rows of new tokens are written as pairs of their own rank where the head has a bias,
    which PEFT leaves out of such rows' head; elsewhere as `trainable_token_indices`.

    Args:
        model: With the adapter added, and not merged.
        family: Whose names the adapter is written in.
        folder: A new or empty one.
        base: Folder or hub id that the adapter belongs to.
        revision: Its commit, where it has one.
        name: Of the adapter.

    Raises:
        ValueError: There is no such adapter, or the folder is not empty.
    """
    folder = Path(folder)
    if name not in adapters_of(model):
        known = ", ".join(adapters_of(model)) or "none"
        raise ValueError(f"there is no adapter {name!r} to save; the model has {known}")
    changes = changes_of(model, name)
    if not changes:
        raise ValueError("the model's adapters are merged into its weights; call unmerge before saving one")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; give a new folder")
    values, tensors = _written(model, family, name, changes)
    values |= {"base_model_name_or_path": base, "revision": revision}
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        whole = {key: tensor.detach().float().cpu().contiguous().clone() for key, tensor in tensors.items()}
        save_file(whole, temporary / WEIGHTS, metadata={"format": "pt"})
        with open(temporary / WEIGHTS, "rb") as file:
            os.fsync(file.fileno())
        write_atomically(temporary / ADAPTER_CONFIG, _json(values))
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _written(
    model: nn.Module, family: Family, name: str, changes: Mapping[str, Change]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json without the base, and the tensors."""
    adapter = adapters_of(model)[name]
    config, modules = adapter.config, held_modules(model)
    names = {our: family.key(our) for our in modules}
    bases: dict[str, Any] = {our: wrapper.base for our, wrapper in wrappers(model).items()}
    doubled = any(isinstance(c, LowRank) and c.start_a is not None for c in changes.values())
    times = 2 if doubled else 1
    alpha_times = math.sqrt(times) if config.rslora else times
    chosen = [names[our] for our, change in changes.items() if isinstance(change, LowRank)]
    ranks = {key: r * times for key, r in _unambiguous(config.rank_pattern, chosen).items()}
    alphas = {key: a * alpha_times for key, a in _unambiguous(config.alpha_pattern, chosen).items()}
    as_pairs = "head" in bases and bases["head"].bias is not None

    tensors: dict[str, Tensor] = {}
    targets, whole, rows = [], [], {}
    for our, change in changes.items():
        full, key = names[our], PREFIX + names[our]
        bias = getattr(change, "bias", None)
        if isinstance(change, Whole):
            whole.append(full)
            tensors |= {f"{key}.{part}": tensor for part, tensor in change.copy.state_dict().items()}
        elif isinstance(change, LowRank):
            targets.append(full)
            a, b = change.factors()
            if doubled and change.start_a is None:  # an embedding, which has no such start
                a, b = torch.cat((a, torch.zeros_like(a))), torch.cat((b, torch.zeros_like(b)), dim=1)
            tensors |= _pair(key, a, b, change.magnitude, change.of_embedding)
        elif isinstance(change, Rows) and as_pairs:
            targets.append(full)
            n = len(change.ids)
            ranks, alphas = {full: n} | ranks, {full: math.sqrt(n) if config.rslora else n} | alphas
            one_hot = torch.zeros(n, len(change.slots)).index_fill_(1, change.ids.cpu(), 0)
            one_hot[torch.arange(n), change.ids.cpu()] = 1
            delta = change.delta().detach().cpu()
            a, b = (one_hot, delta.t()) if our == "embed" else (delta, one_hot.t())
            magnitude = None
            if config.dora:
                new = bases[our].weight.detach().float().cpu()
                new = new + (b @ a).t() if our == "embed" else new + b @ a
                magnitude = torch.linalg.vector_norm(new, dim=0 if our == "embed" else 1)
            tensors |= _pair(key, a, b, magnitude, our == "embed")
            if config.bias != "none" and bias is None:
                bias = getattr(bases[our], "bias", None)
        elif isinstance(change, Rows) and (our == "embed" or change.rows is not _rows_of(changes, "embed")):
            rows[full.rsplit(".", 1)[-1]] = change.ids.tolist()  # tied, they stand there once
            tensors[f"{key}.token_adapter.trainable_tokens_delta"] = change.rows
        if bias is not None:
            held = f"{key}.base_layer.bias" if full in targets else f"{key}.bias"
            tensors[held] = bias

    able = [names[our] for our, m in modules.items() if is_linear(m) or is_embedding(m)]
    targets = _leaves([full for full in able if full not in whole], targets)
    if not rows and any(leaf in targets for leaf in EMBEDDING_NAMES):
        for our in ("embed", "head"):
            if (
                f"{PREFIX}{names[our]}.lora_A.weight" in tensors
                or f"{PREFIX}{names[our]}.lora_embedding_A" in tensors
            ):
                tensors[f"{PREFIX}{names[our]}.base_layer.weight"] = bases[our].weight
                if getattr(bases[our], "bias", None) is not None:
                    tensors.setdefault(f"{PREFIX}{names[our]}.base_layer.bias", bases[our].bias)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": config.r * times,
        "lora_alpha": _number(config.alpha * alpha_times),
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "rank_pattern": ranks,
        "alpha_pattern": {key: _number(alpha) for key, alpha in alphas.items()},
        "bias": config.bias,
        "modules_to_save": [_suffix(full, list(names.values())) for full in whole] or None,
        "trainable_token_indices": rows or None,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }, tensors


def _suffixes(of_embedding: bool) -> tuple[str, str]:
    return ("lora_embedding_A", "lora_embedding_B") if of_embedding else ("lora_A.weight", "lora_B.weight")


def _pair(key: str, a: Tensor, b: Tensor, magnitude: Tensor | None, of_embedding: bool) -> dict[str, Tensor]:
    suffixes = _suffixes(of_embedding)
    pair = {f"{key}.{suffixes[0]}": a, f"{key}.{suffixes[1]}": b}
    return pair if magnitude is None else pair | {f"{key}.lora_magnitude_vector": magnitude}


def _rows_of(changes: Mapping[str, Change], our: str) -> nn.Parameter | None:
    change = changes.get(our)
    return change.rows if isinstance(change, Rows) else None


def _number(value: float) -> float:
    return int(value) if value == int(value) else value


def _unambiguous(patterns: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The same without need of an order, which PEFT forgets, and in its words: regular expressions."""
    of_each = {name: [key for key in patterns if matches(name, key)] for name in names}
    if all(len(keys) < 2 for keys in of_each.values()):
        return {key.replace("*", ".*"): value for key, value in patterns.items()}
    return {name: patterns[keys[0]] for name, keys in of_each.items() if keys}


def _leaves(able: list[str], chosen: list[str]) -> list[str]:
    """The last parts of the names, where they mean exactly these modules; else the whole names."""
    leaves = list(dict.fromkeys(full.rsplit(".", 1)[-1] for full in chosen))
    meant = {full for full in able if full.rsplit(".", 1)[-1] in leaves}
    return leaves if meant == set(chosen) else chosen


def _suffix(full: str, names: list[str]) -> str:
    """The last part, if no other name ends in it: PEFT compares ends of names, not parts."""
    leaf = full.rsplit(".", 1)[-1]
    return leaf if [other for other in names if other.endswith(leaf)] == [full] else full


# --- reading -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """A tensor that a file must hold, and where it goes."""

    shape: tuple[int, ...]
    our: str
    part: str


def load_adapter(
    model: nn.Module, family: Family, folder: str | Path, name: str = "default", trainable: bool = False
) -> LoraConfig:
    """Add the adapter of a folder to a base model; it alone is active, as after `lora.add_adapter`.

    Args:
        model: A base of the family, with or without other adapters.
        folder: With adapter_config.json and adapter_model.safetensors, or .bin, of which nothing is run.
        name: What it is called here.
        trainable: Train it on.

    Raises:
        ValueError: The folder holds no LoRA adapter, one that asks for something not known here, or one that
            does not fit this model; one sentence, and the model is as it was.
    """
    folder = Path(folder)
    values = read_json(folder, ADAPTER_CONFIG, linked=False)
    path = inner_path(
        folder, WEIGHTS if (folder / WEIGHTS).exists() or not (folder / BIN).exists() else BIN, False
    )
    entries = read_bin(path) if path.name == BIN else read_header(path)
    try:
        _refuse_unknown(values)
        config, rows, expected = _described(values, model, family, entries)
    except ValueError as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG} cannot be used: {error}") from None
    was_for = (
        f"{folder} does not fit this model; it was written for {shown(values.get('base_model_name_or_path'))}"
    )
    _refuse_other_keys(expected, entries, was_for)
    tensors = {key: _filled(entries[key]) for key in expected if key in entries}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path} holds {key} with values that are not finite; the adapter is broken")
    _refuse_other_base(model, expected, tensors, was_for)
    add_adapter(model, config, family.key, name, rows)
    changes: dict[str, Any] = dict(changes_of(model, name))
    with torch.no_grad():
        for key, tensor in tensors.items():
            where = expected[key]
            if where.part not in ("base", ""):
                changes[where.our].get_parameter(where.part).copy_(tensor)
    for change in changes.values():
        change.requires_grad_(trainable)
    return config


def adapter_base(folder: str | Path) -> tuple[str | None, str | None]:
    """The base that an adapter's folder names, and its revision; ValueError if they are no texts."""
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


def _described(
    values: Mapping[str, Any], model: nn.Module, family: Family, entries: Mapping[str, Entry]
) -> tuple[LoraConfig, list[int], dict[str, Expected]]:
    """The config, the token ids whose rows train, and the tensors that follow from both."""
    modules = held_modules(model)
    names = {our: family.key(our) for our in modules}
    bases: dict[str, Any] = {our: m.base if isinstance(m, Adapted) else m for our, m in modules.items()}
    r, alpha = _rank(values.get("r", 8), "r"), _alpha(values.get("lora_alpha", 8), "lora_alpha")
    bias = _read(values, "bias", "none", (str,))
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias is {shown(bias)}; known are none, all and lora_only")
    saved = _texts(_read(values, "modules_to_save", [], (list,)), "modules_to_save")
    whole = [our for our, full in names.items() if any(_ends(full, text) for text in saved)]
    for text in saved:
        if not any(_ends(full, text) for full in names.values()):
            raise ValueError(f"modules_to_save has {shown(text)}, which this model lacks")
    able = {
        our: full
        for our, full in names.items()
        if our not in whole and (is_linear(bases[our]) or is_embedding(bases[our]))
    }
    targets = _targets(values, able, entries)
    if not targets:
        raise ValueError(
            f"target_modules {shown(values.get('target_modules'))} match no module of this model, which has "
            f"{', '.join(dict.fromkeys(full.rsplit('.', 1)[-1] for full in able.values()))}"
        )
    chosen = {our: names[our] for our in targets}
    may = _patterns(values, "rank_pattern", chosen, r, _rank)
    ranks = {our: _one_rank(may[our], entries, PREFIX + names[our]) for our in targets}
    alphas = {}
    for our, found in _patterns(values, "alpha_pattern", chosen, alpha, _alpha).items():
        if len(found) > 1:
            raise ValueError(
                f"alpha_pattern gives {names[our]} both {found[0]:g} and {found[1]:g}, and PEFT forgets the "
                "order of its keys; name each module once"
            )
        alphas[our] = found[0]
    rows, row_modules = _rows(values, bases, names)
    dora = _read(values, "use_dora", False, (bool,))
    dropout = _read(values, "lora_dropout", 0.0, (int, float))
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout is {shown(dropout)}; it must be at least 0 and below 1")

    expected: dict[str, Expected] = {}
    for our, full in names.items():
        base, key = bases[our], PREFIX + full
        has_bias = getattr(base, "bias", None) is not None
        trains_bias = has_bias and (bias == "all" or (bias == "lora_only" and our in targets))
        if our in whole:
            for part, tensor in _parts(base):
                expected[f"{key}.{part}"] = Expected(tuple(tensor.shape), our, f"copy.{part}")
            continue
        if our in targets:
            size_out, size_in = sizes(base)
            n = ranks[our]
            a, b = _suffixes(is_embedding(base))
            expected[f"{key}.{a}"] = Expected((n, size_in), our, "a")
            expected[f"{key}.{b}"] = Expected((size_out, n), our, "b")
            if dora:
                expected[f"{key}.lora_magnitude_vector"] = Expected((size_out,), our, "magnitude")
            # The base's own, to be compared and not to be loaded; whether they are there is up to the writer.
            if f"{key}.base_layer.weight" in entries:
                expected[f"{key}.base_layer.weight"] = Expected(tuple(base.weight.shape), our, "base")
            if has_bias and not trains_bias and f"{key}.base_layer.bias" in entries:
                expected[f"{key}.base_layer.bias"] = Expected(tuple(base.bias.shape), our, "base")
        if our in row_modules:
            shape = (len(rows), base.weight.size(1))
            expected[f"{key}.token_adapter.trainable_tokens_delta"] = Expected(shape, our, "rows")
        if trains_bias:
            held = f"{key}.base_layer.bias" if our in targets else f"{key}.bias"
            expected[held] = Expected(tuple(base.bias.shape), our, "bias")
    # PEFT writes a trained copy's bias twice more where all biases train.
    for our in whole if bias == "all" else []:
        for extra in ("modules_to_save.bias", "original_module.bias"):
            key = f"{PREFIX}{names[our]}.{extra}"
            if key in entries:
                expected[key] = Expected(tuple(entries[key].shape), our, "")
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
    return config, rows, expected


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
    """Whether the module, or one that it lies in, has a name that ends so; PEFT compares without dots."""
    parts = full.split(".")
    return any(".".join(parts[:n]).endswith(text) for n in range(1, len(parts) + 1))


def _targets(values: Mapping[str, Any], able: Mapping[str, str], entries: Mapping[str, Entry]) -> list[str]:
    """Our names of the modules that have a low-rank pair.

    By their names where the config has plain ones, so that a missing tensor is noticed. A regular expression
    of a stranger is not run, since one can be written that never ends; then the tensors say it.
    """
    wanted = values.get("target_modules")
    further = any(values.get(key) for key in ("exclude_modules", "layers_pattern"))
    further = further or values.get("layers_to_transform") is not None
    if wanted == "all-linear" and not further:
        return [our for our in able if our.startswith("blocks.")]
    if isinstance(wanted, str) or further:
        return [
            our
            for our, full in able.items()
            if any(f"{PREFIX}{full}.{_suffixes(kind)[0]}" in entries for kind in (False, True))
        ]
    texts = _texts(wanted, "target_modules")
    return [our for our, full in able.items() if any(full == t or full.endswith(f".{t}") for t in texts)]


def _patterns(
    values: Mapping[str, Any], key: str, targets: Mapping[str, str], default: Any, check: Any
) -> dict[str, list[Any]]:
    """The values that each target may have: those of the keys its name ends in, or else the default.

    PEFT takes the first key in its order when it trains, but sorts them when it saves.
    """
    patterns = _read(values, key, {}, (dict,))
    compiled = []
    for text, value in patterns.items():
        plain = text.removeprefix("^").replace("\\.", ".").replace(".*", "*")
        if not re.fullmatch(r"[\w.*-]{1,200}", plain) or plain.count("*") > 4:
            raise ValueError(f"{key} has {shown(text)}; only names, and .* in them, are known")
        regex = ".*".join(re.escape(part) for part in plain.split("*"))
        compiled.append((re.compile(rf"(.*\.)?{regex}"), check(value, f"{key} of {shown(text)}")))
    return {
        our: list(dict.fromkeys(value for regex, value in compiled if regex.fullmatch(full))) or [default]
        for our, full in targets.items()
    }


def _one_rank(values: list[int], entries: Mapping[str, Entry], key: str) -> int:
    """Of the ranks a module may have, the one that its tensors have; ValueError if those have another."""
    for first, second in (_suffixes(False), _suffixes(True)):
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
) -> tuple[list[int], list[str]]:
    """The ids whose rows train, and the modules whose rows stand in the file."""
    key = "trainable_token_indices"
    found = _read(values, key, [], (list, dict))
    found = {names["embed"]: found} if isinstance(found, list) else found
    if not found or not any(found.values()):
        return [], []
    modules = {
        our: ids for our in ("embed", "head") for text, ids in found.items() if names[our].endswith(text)
    }
    ids = modules.get("embed")
    size = bases["embed"].weight.size(0)
    whole = isinstance(ids, list) and all(type(n) is int and 0 <= n < size for n in ids)
    if len(modules) != len(found) or not whole or any(other != ids for other in modules.values()):
        raise ValueError(
            f"{key} is {shown(found)}; known are ids below {size} of {names['embed']}, "
            f"and the same of {names['head']}"
        )
    tied = bases["head"].weight is bases["embed"].weight
    if bases["head"].bias is not None and (tied or "head" in modules):
        raise ValueError(
            f"{key} also means {names['head']}, and PEFT computes such rows without its bias; "
            "train the rows anew, or save them as modules_to_save"
        )
    assert ids is not None
    return ids, ["embed"] if tied else list(modules)


def _refuse_other_keys(expected: Mapping[str, Expected], entries: Mapping[str, Entry], was_for: str) -> None:
    wrong = [f"{key} is missing" for key in expected if key not in entries]
    wrong += [f"{shown(key)} is left over" for key in entries if key not in expected]
    wrong += [
        f"{key} is {entries[key].dtype}{list(entries[key].shape)}, {list(what.shape)} of floats is expected"
        for key, what in expected.items()
        if key in entries and (entries[key].shape != what.shape or entries[key].dtype not in DTYPES)
    ]
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"{was_for}: {'; '.join(wrong[:8])}{more}")


def _refuse_other_base(
    model: nn.Module, expected: Mapping[str, Expected], tensors: Mapping[str, Tensor], was_for: str
) -> None:
    """Refuse an adapter that carries other weights of the base than the model has."""
    modules = held_modules(model)
    for key, tensor in tensors.items():
        if expected[key].part != "base":
            continue
        module = modules[expected[key].our]
        base: Any = module.base if isinstance(module, Adapted) else module
        own = getattr(base, key.rpartition(".")[2])
        if not isinstance(own, nn.Parameter):
            continue  # stored in fewer bits, so that it cannot be equal
        gap = (tensor - own.detach().float().cpu()).abs().max()
        if gap > 0.01 * tensor.abs().max():
            raise ValueError(
                f"{was_for}: {key} differs by {gap:.2g} from this model's; load that very base, with the "
                "vocabulary the adapter was trained with"
            )


def _filled(entry: Entry) -> Tensor:
    tensor = torch.empty(entry.shape)
    for first, chunk in entry.chunks():
        tensor.view(-1)[first : first + len(chunk)].copy_(chunk)
    return tensor
