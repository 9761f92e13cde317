"""The model of a run: sampled from a seed, or a published one with what trains on top of it.

    settings -> open_base -> with_base_config -> starting_model    where a run begins or goes on
    RUN -> load_run -> model, tokenizer, settings                  to evaluate it or to write text with it

A run with adapters keeps only what it trains. Whoever opens it needs the base again, and it has to be the
same one: the fingerprint of its weights is compared.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import torch
from torch import Tensor

from architecture import Decoder, ParallelBlock, SequentialBlock
from config import BASE_ROW, DROPOUTS, Config, ModelConfig, TrainConfig, write_atomically
from config.yamlfile import read_yaml
from lora import add_adapter
from modules.quantized_linear import INTEGERS, hold
from modules.shapes import shapes_only
from pretrained import Family, Pretrained, load_pretrained
from pretrained.folder import DTYPES, shown
from pretrained.load import TOKENIZER
from pretrained.load_adapter import adapter_base, load_adapter, stored_vocabulary
from pretrained.save import save_tokenizer
from pretrained.save_adapter import save_adapter
from tokenizer import GAPS, BPETokenizer, PretrainedTokenizer, Tokenizer, load_tokenizer
from training.checkpoint import (
    Manifest,
    checkpoints,
    first_whole,
    kept_tensors,
    load_weights,
    read_manifest,
    read_run_file,
    refuse_other_shapes,
    shapes_in,
    step_folders,
    verify,
)
from training.runfolder import found_from_anywhere

LONGEST_BLOCK = 2**20  # Tokens in a run to open: a table of positions is not among its weights.
MOST_NEW_TOKENS = 10_000  # In a stranger's adapter.


def open_base(config: Config, dtype: torch.dtype, device: torch.device | str = "cpu") -> Pretrained | None:
    """Open the published model that `config.train.base` names, in eval mode; None where none is named.

    Args:
        dtype: The number format of the run's matrix products. Frozen weights are stored in it, or as
            `base_format` says; weights that train are stored in fp32.

    Raises:
        ValueError: The model cannot be had.
    """
    train = config.train
    if train.base is None:
        return None
    weight_format = "fp32" if config.lora.r == 0 else resolved_format(train.base_format, dtype)
    return base_stored_as(weight_format, train.base, dtype, device, train.base_revision)


def resolved_format(base_format: str, dtype: torch.dtype) -> str:
    """Return the format for `auto`: that of the run's matrix products, or fp32 where they are in fp16."""
    if base_format != "auto":
        return base_format
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def base_stored_as(
    weight_format: str,
    source: str,
    dtype: torch.dtype,
    device: torch.device | str,
    revision: str | None = None,
    local_only: bool = False,
) -> Pretrained:
    """Open a base whose weights have the values of a format, whatever the machine multiplies.

    Args:
        weight_format: `fp32`; `bf16`, to which all is rounded; or `nf4`, to which the blocks' matrices are
            rounded from bf16, while the rest is bf16.
        dtype: The number format of the matrix products. Where it is not bf16, bf16 matrices are stored as
            such and multiplied in fp32, and the rest becomes fp32.
    """
    if weight_format == "fp32":
        return load_pretrained(source, torch.float32, device, revision, local_only=local_only)
    if weight_format == "bf16" and dtype == torch.bfloat16:
        return load_pretrained(source, torch.bfloat16, device, revision, local_only=local_only)
    base = load_pretrained(source, torch.bfloat16, device, revision, weight_format, local_only)
    if dtype != torch.bfloat16:
        for p in base.model.parameters():
            p.data = p.data.float()
    return base


def with_base_config(config: Config, base: Pretrained, tokenizer: Tokenizer, dtype: torch.dtype) -> Config:
    """Return the settings with what the base decides filled in.

    That is the model's shape, its commit, a row's length, and how frozen weights are stored, so that whoever
    opens the run stores them alike.

    Raises:
        ValueError: The settings ask for another model.
    """
    own, requested = base.model.config, config.model
    grown, named = tokenizer.vocab_size - own.vocab_size, len(config.lora.new_tokens)
    if named < grown:
        raise ValueError(
            f"the tokenizer has {grown} ids more than {config.train.base}, and lora.new_tokens names "
            f"{named}; name every token that it adds, or leave --tokenizer.path out"
        )
    if tokenizer.vocab_size > own.vocab_size and config.lora.new_tokens:
        own = replace(own, vocab_size=tokenizer.vocab_size)
    refuse_other_model(config, own, ("vocab_size",))
    for key in DROPOUTS:  # Where one is not given, `dropout` stands for it.
        value = getattr(requested, key) if getattr(requested, key) is not None else requested.dropout
        own = own if value is None else replace(own, **{key: value})
    row_length = config.train.row_length or min(BASE_ROW, own.block_size)
    revision = base.revision or config.train.base_revision
    place = found_from_anywhere(str(config.train.base))
    train = replace(config.train, base=place, row_length=row_length, base_revision=revision)
    if config.lora.r and train.base_format == "auto":
        train = replace(train, base_format=resolved_format(train.base_format, dtype))
    return replace(config, model=own, train=train)


def refuse_other_model(config: Config, own: ModelConfig, more: tuple[str, ...] = ()) -> None:
    """Raise a ValueError if the settings ask for another model than the base, or for rows that are too long.

    Args:
        own: The base's shape.
        more: Further keys to compare: without its tokenizer the size of the vocabulary is not known.
    """
    default = ModelConfig()
    for key, value in vars(config.model).items():
        if key in DROPOUTS or (key == "vocab_size" and key not in more):
            continue
        if value != getattr(default, key) and value != getattr(own, key):
            raise ValueError(
                f"model.{key} is {value}, and {config.train.base} brings its own, {getattr(own, key)}; "
                f"leave model.{key} out"
            )
    if config.train.row_length > own.block_size:
        raise ValueError(
            f"row_length is {config.train.row_length}, and {config.train.base} has a context of "
            f"{own.block_size} tokens; set --row_length to at most {own.block_size}"
        )


def starting_tokenizer(config: Config, base: Pretrained) -> Tokenizer:
    """Return the tokenizer of the base, or of `tokenizer.path`, with a start and `lora.new_tokens`.

    Raises:
        ValueError: There is no tokenizer, it is that of another model, or it can take no new tokens.
    """
    path = config.tokenizer.path
    tokenizer = base.tokenizer if path is None else load_tokenizer(Path(path))
    if tokenizer is None:
        raise ValueError(f"{config.train.base} holds no tokenizer; name its folder with --tokenizer.path")
    if base.tokenizer is not None:
        _refuse_other_tokenizer(tokenizer, base.tokenizer, str(path), str(config.train.base))
    tokenizer = tokenizer.with_start()
    # Those for a gap keep their ids, which every tokenizer that is trained here sets aside: their rows train.
    new = [t for t in config.lora.new_tokens if t not in GAPS or tokenizer.token_id(t) is None]
    if not new:
        return tokenizer
    if isinstance(tokenizer, BPETokenizer):  # The base was trained here.
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(Path(folder))
            tokenizer = PretrainedTokenizer.load(Path(folder))
        tokenizer.bare_gaps = False  # No gap was trained without the start: older ones have no markers.
    if not isinstance(tokenizer, PretrainedTokenizer):
        raise ValueError(
            f"lora.new_tokens cannot be added to a `{tokenizer.kind}` tokenizer; leave them out, or name a "
            "Hugging Face tokenizer with --tokenizer.path"
        )
    # Tokens that the tokenizer of `tokenizer.path` has added have their ids already, and are new to the base.
    known = None if base.tokenizer is None else base.tokenizer.vocab_size
    there = [] if known is None else [t for t in new if (tokenizer.token_id(t) or 0) >= known]
    return tokenizer.with_tokens(token for token in new if token not in there)


def as_begun(tokenizer: Tokenizer, folder: Path) -> None:
    """Let texts with a gap start, and answers end, as in the run in a folder, which goes on."""
    path = folder / "tokenizer"
    own = read_run_file(path, lambda at: load_tokenizer(at, as_saved=True)) if path.is_dir() else None
    tokenizer.bare_gaps = own is not None and own.bare_gaps
    if own is not None:
        tokenizer.eos_ids = own.eos_ids or tokenizer.eos_ids


def _refuse_other_tokenizer(tokenizer: Tokenizer, own: Tokenizer, path: str, base: str) -> None:
    """Refuse a tokenizer whose ids mean other text than the base's own, which may have tokens added to it."""
    ours, its = (found.pieces_fingerprint(own.vocab_size) for found in (tokenizer, own))
    if ours != its:
        raise ValueError(
            f"the tokenizer in {path} is not that of {base}: its pieces have fingerprint {ours[:12]}, the "
            f"base's own {its[:12]}, so that its {tokenizer.vocab_size} ids mean other text than the "
            f"{own.vocab_size} that the base was trained on; leave --tokenizer.path out"
        )


def starting_model(config: Config, base: Pretrained | None, tokenizer: Tokenizer) -> Decoder:
    """Return the model before its first update: sampled weights, or the base with its fresh adapters.

    Args:
        config: The settings, with a base those of `with_base_config`, whose vocabulary has the new tokens.
        tokenizer: The tokenizer with the new tokens.
    """
    if base is None:
        return Decoder(config.model)
    set_dropout(base.model, config.model)
    if config.model.vocab_size > base.model.config.vocab_size:
        grow_vocabulary(base.model, config.model.vocab_size)
    if config.lora.r:
        ids = [tokenizer.token_id(token) for token in config.lora.new_tokens]
        new_rows = [id for id in ids if id is not None]
        assert len(new_rows) == len(ids), "starting_tokenizer adds them"
        add_adapter(base.model, config.lora, base.family.key, new_rows=new_rows)
    return base.model


def set_dropout(model: Decoder, config: ModelConfig) -> None:
    """Give the model the dropout of `config` in the place of its own."""
    own = {key: getattr(config, key) for key in DROPOUTS}
    model.config = replace(model.config, **own)
    model.dropout.p = own["embed_dropout"]
    for block in model.blocks:
        assert isinstance(block, SequentialBlock | ParallelBlock)
        block.dropout.p, block.attention.dropout.p = own["dropout"], own["attention_dropout"]


@torch.no_grad()
def grow_vocabulary(model: Decoder, size: int, grown: Mapping[str, Tensor] | None = None) -> None:
    """Add rows to embedding and head.

    Args:
        size: The number of rows afterwards.
        grown: By name the parameters as they should be, whose last rows are taken. Where one is not given,
            each new row is the mean of those that were there (Hewitt 2021).
    """

    def longer(name: str) -> torch.nn.Parameter:
        old = model.get_parameter(name)
        rows = old.float().mean(0, keepdim=True).expand(size - len(old), *old.shape[1:])
        if grown and name in grown:
            rows = grown[name][len(old) :]
        return torch.nn.Parameter(torch.cat((old, rows.to(old))))

    tied = model.head.weight is model.embed.weight
    model.embed.weight = longer("embed.weight")
    model.head.weight = model.embed.weight if tied else longer("head.weight")
    if model.head.bias is not None:
        model.head.bias = longer("head.bias")
    model.embed.num_embeddings = model.head.out_features = size
    model.config = replace(model.config, vocab_size=size)
    model.grown = True


@dataclass(frozen=True)
class TrainedRun:
    """A trained model with what belongs to it."""

    model: Decoder
    tokenizer: Tokenizer
    config: Config
    step: int
    fingerprints: dict[str, str]
    folder: Path
    family: Family | None  # The family of the base that its adapters need; None without adapters.
    weights: str  # SHA-256 of the checkpoint's manifest, which has those of its files, and of the base's.
    base_folder: Path | None  # The files of that base, on this machine.


def hold_run(run: TrainedRun, held: str) -> None:
    """Store the matrices of a run's model in fewer bits, in place, unless `held` is `full`.

    Raises:
        ValueError: The run has adapters, which belong to weights stored otherwise.
    """
    if held == "full":
        return
    if run.family is not None:
        raise ValueError(
            f"{run.folder} is a run with adapters, which were trained on weights stored as "
            f"{run.config.train.base_format}; leave --held {held} out"
        )
    hold(run.model, held)


def run_folder(path: str | Path) -> tuple[Path, str | None]:
    """Return the folder of a run, and the name of the checkpoint inside it where `path` is one's.

    Raises:
        ValueError: The folder holds no run.
    """
    path = Path(path)
    one = path.name if path.parent.name == "checkpoints" else None
    folder = path.parent.parent if one else path
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{path} holds no run (no config.yaml); give the folder that training wrote")
    return folder, one


def load_run(
    path: str | Path, which: Literal["best", "last"] = "best", base: str | None = None
) -> TrainedRun:
    """Open a run folder, or one checkpoint inside it, for evaluation; the model is in eval mode, on the CPU.

    A damaged checkpoint is passed over, and named on stderr, unless `path` asks for that one.

    Args:
        path: The folder of the run, or of the checkpoint.
        which: `best` by validation loss, or `last`.
        base: Where the base of a run with adapters is now, if it moved; its fingerprint has to match.

    Raises:
        ValueError: There is no run or no checkpoint, a file is damaged, or weights and config disagree.
    """
    path = Path(path)
    folder, one = run_folder(path)
    config = read_run_file(folder / "config.yaml", _config)
    fingerprints = read_run_file(folder / "fingerprints.json", _fingerprints)
    found = step_folders(folder / "checkpoints")[::-1]
    if one:
        found = [path for path in found if path.name == one]
    if which == "best":
        losses = {m.folder: m.loss for m in checkpoints(folder / "checkpoints")}
        # Unreadable manifests first, so that they are named: any of them may have been the best. The sort is
        # stable: the later of two equals is ahead, and without a validation the newest.
        found.sort(key=lambda path: _preference(losses, path))
    if not any((folder / "manifest.json").exists() for folder in found):
        raise ValueError(f"{path} holds no finished checkpoint; train for longer, or look in another run")
    if one:
        manifest = read_manifest(found[0])
        verify(manifest)
    else:
        manifest = first_whole(found, path)
    tokenizer = read_run_file(folder / "tokenizer", lambda path: load_tokenizer(path, as_saved=True))
    if tokenizer.fingerprint != fingerprints["tokenizer"]:
        raise ValueError(
            f"{folder / 'tokenizer'} is not the tokenizer that the run was trained with: its fingerprint is "
            f"{tokenizer.fingerprint[:12]}, and that of training was {fingerprints['tokenizer'][:12]}; "
            "restore it from a copy"
        )
    tokenizer = tokenizer.with_start()
    tokenizer.heals, tokenizer.suffix_first = config.data.heal, config.data.fim_order == "spm"
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"{folder / 'tokenizer'} has {tokenizer.vocab_size} ids, and the model of config.yaml beside it "
            f"{config.model.vocab_size}; restore both from a copy"
        )
    if base is not None:
        config = replace(config, train=replace(config.train, base=found_from_anywhere(base)))
    opened = _base_of_run(config, fingerprints) if config.lora.r else None
    if opened is None:
        _refuse_giant(config.model, manifest)
    model = starting_model(config, opened, tokenizer)
    load_weights(model, manifest)
    family = None if opened is None else opened.family
    known = (manifest.folder / "manifest.json").read_bytes() + fingerprints.get("base", "").encode()
    weights = hashlib.sha256(known).hexdigest()
    place = None if opened is None else opened.stored.folder
    model = model.eval()
    return TrainedRun(model, tokenizer, config, manifest.step, fingerprints, folder, family, weights, place)


# --- adapters outside of their run ----------------------------------------------------------------

BASE_FILE = "base.json"  # Beside PEFT's two files, with what PEFT does not record of the base.


def export_adapter(
    run: TrainedRun, folder: str | Path, complete: Callable[[Path], object] = lambda folder: None
) -> None:
    """Write the run's adapter as a folder that PEFT opens; ValueError if the run has none.

    The tokenizer lies beside it: it has the new tokens, and puts before a prompt what was trained there.

    Args:
        complete: Called with the folder before it gets its name; an error that it raises leaves nothing.
    """
    train = run.config.train
    if run.family is None:
        raise ValueError(f"{run.folder} has no adapter to write; its model is exported whole")

    def write_more(folder: Path) -> None:
        known = {"fingerprint": run.fingerprints["base"], "base_format": train.base_format}
        write_atomically(folder / BASE_FILE, json.dumps(known, indent=1))
        save_tokenizer(run.tokenizer, folder)
        complete(folder)

    save_adapter(run.model, run.family, folder, train.base, train.base_revision, complete=write_more)


def open_adapted(
    source: str, adapter: str | Path, base_format: str = "auto", device: torch.device | str = "cpu"
) -> Pretrained:
    """Open a published model with an adapter on it, and the adapter's tokenizer where its folder has one.

    Args:
        source: Folder or hub id of the base.
        adapter: A PEFT folder.
        base_format: The format of the weights that the adapter was trained on; `auto` is what its folder
            says, or fp32.

    Raises:
        ValueError: One of the two cannot be opened, or the adapter was trained on another base, or on one
            that was stored in another format.
    """
    trained = trained_format(adapter)
    weight_format = (trained or "fp32") if base_format == "auto" else base_format
    if (trained or weight_format) != weight_format:
        raise ValueError(
            f"{adapter} was trained on a base stored as {trained}, not as {weight_format}; on other weights "
            "it means something else: leave --base_format out"
        )
    return with_adapter(open_base_of(adapter, source, weight_format, device), source, adapter)


def trained_format(adapter: str | Path) -> str | None:
    """Return the format of the weights that an adapter was trained on; None where its folder does not say."""
    return _known_base(adapter).get("base_format")


def open_base_of(
    adapter: str | Path, source: str, weight_format: str, device: torch.device | str
) -> Pretrained:
    """Open the base of an adapter, at the revision that the adapter names, stored in a format.

    Args:
        weight_format: One of `base_stored_as`, or of INTEGERS, which are rounded from fp32 and computed in
            bf16.
    """
    named, revision = adapter_base(adapter)
    revision = revision if named == source else None
    if weight_format not in INTEGERS:
        return base_stored_as(weight_format, source, torch.float32, device, revision)
    base = load_pretrained(source, torch.float32, device, revision, weight_format)
    hold(base.model, weight_format)
    base.model.to(torch.bfloat16)
    return base


def with_adapter(
    base: Pretrained, source: str, adapter: str | Path, name: str = "default", grows: bool = True
) -> Pretrained:
    """Put an adapter on its opened base; returns the base with the adapter's tokenizer.

    Args:
        source: What the base was opened from.
        name: The adapter's name in the model.
        grows: Whether the base may get rows for new tokens of the adapter.

    Raises:
        ValueError: The adapter cannot be opened, was trained on another base, or has tokens of its own.
    """
    known, (named, _) = _known_base(adapter), adapter_base(adapter)
    if base.fingerprint != known.get("fingerprint", base.fingerprint):
        raise ValueError(
            f"{source} is not the base that {adapter} was trained on: its weights have fingerprint "
            f"{base.fingerprint[:12]}, and those had {known['fingerprint'][:12]}; restore it, or give the "
            "folder of that base"
        )
    if grows:
        _grow_as_stored(base, adapter)
    if any((Path(adapter) / name).exists() for name in TOKENIZER[:3]):
        tokenizer = load_tokenizer(Path(adapter), as_saved=bool(known))
        tokenizer.eos_ids = tokenizer.eos_ids or base.eos_ids
        room = base.model.config.vocab_size
        if room < tokenizer.vocab_size and not grows:
            raise ValueError(
                f"{adapter} has {tokenizer.vocab_size - room} tokens that its base has not, and that other "
                "adapters would share; merge it by export.py, and open the model alone"
            )
        if room < tokenizer.vocab_size <= room + MOST_NEW_TOKENS:
            grow_vocabulary(base.model, tokenizer.vocab_size)
        base = replace(base, tokenizer=tokenizer)
    load_adapter(base.model, base.family, adapter, name)
    if not known and not _is_named(source, named):
        print(
            f"warning: {adapter} was written for {shown(named)}, and {source} is not called so; on other "
            "weights than those it was trained on, an adapter means nothing",
            file=sys.stderr,
        )
    return base


def _grow_as_stored(base: Pretrained, adapter: str | Path) -> None:
    """Grow the vocabulary by the rows that the adapter's folder holds of a base that was resized.

    Rows that do not fit are left for `load_adapter` to refuse.
    """
    model, stored = base.model, stored_vocabulary(adapter, base.family)
    if model.config.tie_embeddings and "head.weight" in stored:
        stored = {"embed.weight": stored["head.weight"]} | stored
    own = model.state_dict()
    size = max((entry.shape[0] for entry in stored.values() if entry.shape), default=0)
    fits = all(
        name in own and entry.shape == (size, *own[name].shape[1:]) and entry.dtype in DTYPES
        for name, entry in stored.items()
    )
    if fits and 0 < size - model.config.vocab_size <= MOST_NEW_TOKENS:
        rows = {name: entry.read(torch.float32, "cpu") for name, entry in stored.items()}
        grow_vocabulary(model, size, rows)


def _is_named(source: str, named: str | None) -> bool:
    """Return whether a source is the base that an adapter names, if any, or a folder of that name."""
    return not named or source == named or Path(source).resolve().name == Path(named).name


def _known_base(adapter: str | Path) -> dict[str, str]:
    """Return what an adapter's folder says of the base, beside PEFT's files."""
    path = Path(adapter) / BASE_FILE
    return read_run_file(path, _base_file) if path.exists() else {}


def _base_file(path: Path) -> dict[str, str]:
    values = json.loads(path.read_text("utf-8"))
    formats = get_args(get_type_hints(TrainConfig)["base_format"])
    if not isinstance(values, dict) or values.get("base_format") not in formats[1:]:  # The first is auto.
        raise ValueError(f"base_format must be one of {', '.join(formats[1:])}")
    return {"base_format": values["base_format"], "fingerprint": str(values.get("fingerprint"))}


# --- helpers --------------------------------------------------------------------------------------


def _preference(losses: dict[Path, float | None], path: Path) -> tuple[bool, float]:
    loss = losses.get(path)
    return path in losses, math.inf if loss is None else loss


def _config(path: Path) -> Config:
    config = Config.from_dict(read_yaml(path))
    if config.model.block_size > LONGEST_BLOCK:
        raise ValueError(f"model.block_size is {config.model.block_size}, and {LONGEST_BLOCK} is the most")
    return replace(config, model=config.model.resolved())


def _fingerprints(path: Path) -> dict[str, str]:
    values = json.loads(path.read_text("utf-8"))
    names = ("data", "tokenizer", "code")
    if not isinstance(values, dict) or not all(isinstance(values.get(name), str) for name in names):
        raise ValueError(f"it must hold a string for each of {', '.join(names)}")
    return {name: str(values[name]) for name in (*names, "base") if name in values}


def _base_of_run(config: Config, fingerprints: dict[str, str]) -> Pretrained:
    """Open the base of a run with adapters; ValueError if it is not the one that they were trained on."""
    train = config.train
    if train.base is None:
        raise ValueError("config.yaml has lora.r but no base; restore it from a copy")
    weight_format = resolved_format(train.base_format, torch.float32)
    # The run may be a stranger's: it does not make this machine fetch anything.
    try:
        base = base_stored_as(
            weight_format, train.base, torch.float32, "cpu", train.base_revision, local_only=True
        )
    except ValueError as error:
        raise ValueError(
            f"the base of the run cannot be opened: {error}; if it moved, say with --base"
        ) from None
    if base.fingerprint != fingerprints.get("base"):
        raise ValueError(
            f"{train.base} is not the base that the run was trained on: its weights have fingerprint "
            f"{base.fingerprint[:12]}, and the run's had {fingerprints.get('base', 'none')[:12]}; restore it"
        )
    own, grown = base.model.config, config.model.vocab_size - base.model.config.vocab_size
    free = {key: getattr(config.model, key) for key in (*DROPOUTS, "vocab_size", "attention", "init")}
    if replace(own, **free) != config.model or not 0 <= grown <= len(config.lora.new_tokens):
        raise ValueError(f"config.yaml describes another model than {train.base}; restore it from a copy")
    return base


def _refuse_giant(config: ModelConfig, manifest: Manifest) -> None:
    """Raise a ValueError if `config` is not that of the manifest's weights, before its model takes memory."""
    shapes = read_run_file(manifest.folder / "model.safetensors", shapes_in)
    elements = sum(math.prod(shape) for shape in shapes.values())
    try:
        # Even without memory a model takes time for each of its layers, and sizes may overflow.
        if config.n_layer > len(shapes) or config.vocab_size * config.n_embd > elements:
            raise ValueError(f"{len(shapes)} tensors of {elements} elements in all are not enough for it")
        with shapes_only():
            own = kept_tensors(Decoder(config))
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{manifest.folder} was made by another config ({reason}); "
            "use the settings in its run's config.yaml"
        ) from error
    refuse_other_shapes(own, shapes, manifest.folder)
