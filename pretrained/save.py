"""A model written as a folder that transformers opens: the inverse of loading."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from architecture import Decoder
from config import ModelConfig, write_atomically
from data.fim import known_markers
from modules.frozen_linear import FrozenLinear
from modules.tensorfiles import save_tensors
from pretrained.family import Family, from_model, lacks
from pretrained.folder import CONFIG, INDEX, SINGLE
from pretrained.load import FAMILIES
from tokenization import code_pieces
from tokenization.classes import JUDGED
from tokenizer import GENERATION, CodeTokenizer, Tokenizer, opened_by_transformers

# The `code` tokenizer has no tokenizer.json: the pieces of a word, and whether a marker of its case stands
# before them, are decided together, by the fewest ids, which no model of the `tokenizers` library does. Where
# transformers finds no tokenizer.json, it makes an empty one, for some families without a word. All families
# refuse this file, with an error that shows the sentence.
UNREADABLE = {
    "version": "none: this model has Plumb's code tokenizer; open it with trust_remote_code=True, which runs "
    "tokenization_code.py of its folder, or with pretrained.load_pretrained",
    "added_tokens": [],
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}
# The modules that open it all the same, and their names in the folder.
MODULES = {"code_transformers.py": "tokenization_code.py", "code_pieces.py": "code_pieces.py"}
CODE_CONFIG = {
    "tokenizer_class": "PlumbCodeTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_code.PlumbCodeTokenizer", None]},
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": False,
}


def refuse_full(folder: Path) -> None:
    """Refuse a folder that is neither new nor empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; give a new folder")


def save_pretrained(
    model: Decoder,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    family: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    complete: Callable[[Path], object] | None = None,
    metadata: dict[str, str] | None = None,
) -> Family:
    """Write config.json, weights and tokenizer, and return the family they are written in.

    The folder appears whole: everything is written beside it under a hidden name, flushed and renamed.

    Args:
        model: Loaded or trained here; its parameters are written as they are, in their dtype.
        tokenizer: Its files and special ids go with the model. AutoTokenizer opens all, `code` by a module in
            the folder, with trust_remote_code=True.
        folder: A new or empty one.
        family: A `model_type`; None takes the first that can express the model.
        max_shard_bytes: A tensor that would pass it starts a new file.
        complete: Called with the folder before it gets its name; an error that it raises leaves nothing.
        metadata: What the headers of the files of weights say besides their format.

    Raises:
        ValueError: No family has the model's parts, named in the sentence, AutoTokenizer would give other
            ids than the tokenizer, or the folder is not empty.
    """
    folder = Path(folder)
    if any(isinstance(module, FrozenLinear) for module in model.modules()):
        raise ValueError("the model is stored in fewer bits; call dequantize_linears before saving it")
    chosen = choose_family(model.config, family)
    refuse_full(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        ids: dict[str, Any] = {
            f"{name}_token_id": getattr(tokenizer, f"{name}_id", None) for name in ("bos", "eos", "pad")
        }
        if tokenizer is not None and tokenizer.eos_ids:
            ids["eos_token_id"] = list(tokenizer.eos_ids) if tokenizer.eos_ids[1:] else tokenizer.eos_ids[0]
        head: dict[str, Any] = {"architectures": [chosen.architecture], "model_type": chosen.model_type}
        dtype = str(model.embed.weight.dtype).removeprefix("torch.")
        values = head | from_model(chosen, model.config) | ids | {"dtype": dtype, "use_cache": True}
        write_atomically(temporary / CONFIG, _json(values))
        if tokenizer is not None:
            save_tokenizer(tokenizer, temporary)
        write_atomically(temporary / GENERATION, _json(ids))
        _save_weights(_tensors(model, chosen), temporary, max_shard_bytes, metadata or {})
        if complete is not None:
            complete(temporary)
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return chosen


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer's files, with which AutoTokenizer gives its ids, beside the config.json there.

    Where the class that the files name would build another one, they name the class that takes tokenizer.json
    as it is.

    Raises:
        ValueError: AutoTokenizer opens the tokenizer of the model_type whatever the files name.
    """
    tokenizer.save(folder)
    if tokenizer.before() != tokenizer.before(gap=True) and known_markers(tokenizer) is not None:
        print(
            "warning: gaps were trained without the start that stands before every other text, and "
            "AutoTokenizer puts it before their prompts too; elsewhere encode those with "
            "add_special_tokens=False",
            file=sys.stderr,
        )
    if isinstance(tokenizer, CodeTokenizer):
        write_atomically(folder / "tokenizer.json", _json(UNREADABLE))
        write_atomically(folder / "tokenizer_config.json", _json(CODE_CONFIG))
        for name, there in MODULES.items():
            write_atomically(folder / there, Path(code_pieces.__file__).with_name(name).read_text("utf-8"))
        return
    if _is_same(tokenizer, opened_by_transformers(folder)):
        return
    path = folder / "tokenizer_config.json"
    before = path.read_text("utf-8") if path.exists() else "{}"
    write_atomically(path, _json(json.loads(before) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    theirs = opened_by_transformers(folder)
    if _is_same(tokenizer, theirs):
        return
    write_atomically(path, before)
    for text in JUDGED:
        mine, others = ([found.start_id, *found.encode(text)] for found in (tokenizer, theirs))
        if mine != others:
            family = json.loads((folder / CONFIG).read_text("utf-8"))["model_type"]
            raise ValueError(
                f"AutoTokenizer opens every tokenizer beside a {family} model as {family}'s own, which gives "
                f"{len(others)} ids of {text!r} where this one gives {len(mine)}, or others; train with that "
                f"of a published {family} model, with the `code` tokenizer, or with another family's parts"
            )


def _is_same(tokenizer: Tokenizer, other: Tokenizer) -> bool:
    both = [(found.start_id, found.pieces_fingerprint(tokenizer.vocab_size)) for found in (tokenizer, other)]
    return both[0] == both[1]


def choose_family(config: ModelConfig, model_type: str | None = None) -> Family:
    """Return the family that a model is written in; ValueError names what the nearest one lacks."""
    if model_type is not None and model_type not in FAMILIES:
        raise ValueError(f"the family {model_type!r} is not known; known are {', '.join(FAMILIES)}")
    candidates = FAMILIES if model_type is None else {model_type: FAMILIES[model_type]}
    lacking = {name: lacks(family, config) for name, family in candidates.items()}
    nearest = min(lacking, key=lambda name: len(lacking[name]))
    if lacking[nearest]:
        who = "no published family" if model_type is None else model_type
        near = f"; the nearest, {nearest}," if model_type is None else "; it"
        raise ValueError(
            f"{who} can express this model{near} has no {', no '.join(lacking[nearest])}: "
            "keep it as a checkpoint of a run, or train one with the parts of a family"
        )
    return FAMILIES[nearest]


def _tensors(model: Decoder, family: Family) -> dict[str, Tensor]:
    """Return the parameters by published name; a tied head is left out."""
    state = model.state_dict()
    names = [name for name in state if not (name == "head.weight" and model.config.tie_embeddings)]
    return {family.stored_key(name): state[name] for name in names}


def _save_weights(
    tensors: dict[str, Tensor], folder: Path, max_shard_bytes: int, metadata: dict[str, str]
) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    total = sum(tensor.nbytes for tensor in tensors.values())
    where = {}
    for i, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        where |= dict.fromkeys(shard, name)
        save_tensors(shard, folder / name, metadata)
    if len(shards) > 1:
        write_atomically(folder / INDEX, _json({"metadata": {"total_size": total}, "weight_map": where}))


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"
