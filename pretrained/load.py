"""Published models, loaded from a folder or the Hugging Face hub into `architecture.Decoder`."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import reprlib
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from architecture import Decoder
from config import DROPOUTS, ModelConfig
from config.bars import progress_bar
from data.cache import SUMS, refuse_changed
from modules.quantized_linear import KINDS, replace_linear
from modules.shapes import shapes_only
from pretrained import (
    codegen,
    codegen2,
    gemma,
    gpt_bigcode,
    gpt_neox,
    granite,
    llama,
    mistral,
    phi,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
    stablelm,
    starcoder2,
)
from pretrained.family import Family, Values, from_model, to_model
from pretrained.folder import (
    BIN,
    CONFIG,
    DTYPES,
    INDEX,
    SINGLE,
    TensorEntry,
    inner_path,
    read_json,
    read_tensors,
    stamp,
    wrong_tensors,
)
from tokenizer import (
    GENERATION,
    SENTENCEPIECE_FILE,
    PretrainedTokenizer,
    Tokenizer,
    can_read_sentencepiece,
    end_ids,
    load_tokenizer,
    otherwise_in_transformers,
)

FAMILIES = {
    module.FAMILY.model_type: module.FAMILY
    for module in (
        gpt_bigcode,
        codegen,
        phi,
        llama,
        starcoder2,
        qwen2,
        qwen3,
        mistral,
        phi3,
        stablelm,
        gemma,
        smollm3,
        granite,
        gpt_neox,
        codegen2,
        qwen3_moe,
    )
}
THREADS = min(4, os.cpu_count() or 1)
RUNS = "runs"  # the folder that runs are written to
MARKS = ("config.yaml", CONFIG)  # A run has the one, a published model the other.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TOKENIZER = (
    "tokenizer.json",
    "code_tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
TEXTS = (CONFIG, GENERATION, *TOKENIZER, SENTENCEPIECE_FILE)


@dataclass(frozen=True)
class StoredWeights:
    """The weights on the disk that a model was made of."""

    settings: Values  # those of config.json, in one spelling
    entries: dict[str, TensorEntry]
    stamps: dict[Path, tuple[int, ...]]

    @classmethod
    def of(cls, family: Family, config: ModelConfig, entries: dict[str, TensorEntry]) -> StoredWeights:
        free = {family.names[field] for field in DROPOUTS if field in family.names}
        settings = {key: value for key, value in from_model(family, config).items() if key not in free}
        stamps = {entry.file: stamp(entry.file) for entry in entries.values()}
        return cls({"model_type": family.model_type} | settings, entries, stamps)

    @property
    def folder(self) -> Path:
        """The folder of the files; those of the hub lie in a snapshot of it."""
        return next(iter(self.stamps)).parent

    def refuse_change(self) -> None:
        for path, before in self.stamps.items():
            if stamp(path) != before:
                raise ValueError(f"{path} was changed while or after the model was loaded; load it again")

    def fingerprint(self) -> str:
        self.refuse_change()
        keys = sorted(self.entries)
        with ThreadPoolExecutor(THREADS) as pool:
            digests = pool.map(lambda key: self.entries[key].digest(), keys)
            weights = [
                [key, self.entries[key].dtype, self.entries[key].shape, digest]
                for key, digest in zip(keys, digests, strict=True)
            ]
        self.refuse_change()
        text = json.dumps([self.settings, weights], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Pretrained:
    """A published model with what belongs to it."""

    model: Decoder  # It is in eval mode.
    tokenizer: Tokenizer | None
    family: Family
    source: str  # the requested folder or hub id
    revision: str | None  # the hub's commit; None for a folder
    stored: StoredWeights  # the files as they were when they were read
    eos_ids: tuple[int, ...] = ()  # Each ends a text; the tokenizer has them too.

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what the folder holds: the settings, and each weight's key, dtype, shape and bytes.

        Equal however the weights are cut into files and whichever spelling config.json has. Dropout does not
        count, nor does the dtype in memory, nor what training did to the model since. When first asked, it
        reads the files once more, at about 2 GB/s on two cores.

        Raises:
            ValueError: A file was changed since the model was loaded.
        """
        return self.stored.fingerprint()


def load_pretrained(
    source: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    weight_format: str | None = None,
    local_only: bool = False,
) -> Pretrained:
    """Open a model folder, or fetch one from the hub.

    The library that fetches reads HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE itself. Tensors are read
    into place, or 4 MB at a time where their dtype changes, so that memory holds the weights once.

    Args:
        source: A folder with config.json and weights, or a hub id such as `bigcode/starcoder2-3b`.
        dtype: The parameters' dtype; None takes that of the file.
        device: Where the parameters are made.
        revision: Branch, tag or commit on the hub; `Pretrained.revision` is the commit it meant.
        weight_format: How the blocks' matrices are stored, a key of `quantized_linear.KINDS`: each is frozen,
            and quantised as soon as it is read, so that at most THREADS + 1 stand in full. None leaves them
            as parameters.
        local_only: Take from the hub only what was fetched before.

    Raises:
        ValueError: The source cannot be had, its family is not known, its keys are not exactly those that
            its config asks for, or a file is not sound; one sentence.
    """
    folder, commit = _locate(str(source), revision, local_only)
    linked = commit is not None
    if not linked:
        refuse_changed(folder, f"remove {folder / SUMS} if the change is meant")
    values, family, config = _described(folder, linked)
    eos_ids = _eos_ids(folder, values, config.vocab_size, linked)
    entries = read_tensors(folder, linked)
    if config.n_layer > len(entries):
        raise ValueError(
            f"{folder} has {len(entries)} tensors, too few for the {config.n_layer} layers of {CONFIG}"
        )
    model, stored = _filled_model(folder, family, config, entries, dtype, device, weight_format)
    tokenizer = _tokenizer(folder, config.vocab_size, linked)
    if tokenizer is not None:
        tokenizer.eos_ids = eos_ids
    return Pretrained(model.eval(), tokenizer, family, str(source), commit, stored, eos_ids)


def _filled_model(
    folder: Path,
    family: Family,
    config: ModelConfig,
    entries: dict[str, TensorEntry],
    dtype: torch.dtype | None,
    device: torch.device | str,
    weight_format: str | None,
) -> tuple[Decoder, StoredWeights]:
    """Return the model with the weights of `entries`, by published key, and what the disk has of it."""
    shapes = _shapes(folder, config)
    own = {family.stored_key(name): name for name in shapes}
    head, embed = family.stored_key("head.weight"), family.stored_key("embed.weight")
    tied = config.tie_embeddings
    if tied:
        del own[head]
    entries = {key: entry for key, entry in entries.items() if not re.fullmatch(family.ignored, key)}
    twin = entries.pop(head, None) if tied else None
    if twin and embed not in entries:
        entries[embed], twin = twin, None
    expected = {key: shapes[name] for key, name in own.items()}
    if wrong := wrong_tensors(expected, entries, "unexpected", most=40):
        raise ValueError(f"{folder} does not hold the model of its {CONFIG}: {wrong}")
    model = _on_meta(folder, config)  # Not before: it takes time for each layer.
    dtype = dtype or _one_dtype(folder, entries)
    matrices = _block_matrices(model) if weight_format is not None else set()
    quantized = {key for key in entries if own[key] in matrices}
    _refuse_too_large(folder, entries, dtype, device, weight_format, quantized)
    stored = StoredWeights.of(family, config, entries)
    tensors = {}
    for key, tensor in _read_all(entries, dtype, device):
        if weight_format is not None and key in quantized:
            replace_linear(model, own[key].removesuffix(".weight"), weight_format, tensor)
        else:
            tensors[own[key]] = tensor
    tensors |= {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    stored.refuse_change()
    if tied:
        tensors["head.weight"] = tensors["embed.weight"]
        if twin:
            _refuse_other_twin(twin, tensors["embed.weight"], head, embed)
    model.load_state_dict(tensors, assign=True)
    if tied:
        model.head.weight = model.embed.weight  # Assigning made two parameters of one memory.
    return model, stored


def _block_matrices(model: Decoder) -> set[str]:
    """Names of the weights of the blocks' linears."""
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {f"{name}.weight" for name in linears if "blocks." in name}


def described(source: str, revision: str | None = None) -> tuple[Family, ModelConfig]:
    """Return the family and the shape that a source's config.json tells; from the hub only that file comes.

    Raises:
        ValueError: As `load_pretrained`.
    """
    folder = Path(source)
    is_here = _is_folder(source, revision)
    if not is_here:
        import huggingface_hub

        try:
            folder = Path(huggingface_hub.hf_hub_download(source, CONFIG, revision=revision)).parent
        except Exception as error:  # The network, the hub and the disk have errors of many classes.
            raise _not_fetched(source, error) from error
    return _described(folder, not is_here)[1:]


def without_memory(config: ModelConfig) -> Decoder:
    """Return the model without weights; ValueError if its sizes overflow."""
    return _on_meta(Path(), config)


def _described(folder: Path, linked: bool) -> tuple[Values, Family, ModelConfig]:
    """Return what config.json holds, and the family and shape that it means."""
    values = read_json(folder, CONFIG, linked)
    named = "codegen2" if codegen2.is_codegen2(values) else str(values.get("model_type"))
    family = FAMILIES.get(named)
    if family is None:
        raise ValueError(
            f"{folder / CONFIG} has model_type {reprlib.repr(values.get('model_type'))}; "
            f"known are {', '.join(FAMILIES)}"
        )
    try:
        return values, family, to_model(family, values)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} does not describe a model known here: {error}") from None


def _eos_ids(folder: Path, values: Values, vocab_size: int, linked: bool) -> tuple[int, ...]:
    """Return the ids that end a text: those of generation_config.json, or else of config.json."""
    if (folder / GENERATION).exists():
        other = read_json(folder, GENERATION, linked)
        if other.get("eos_token_id") is not None:
            return end_ids(other, folder / GENERATION, vocab_size)
    return end_ids(values, folder / CONFIG, vocab_size)


def _on_meta(folder: Path, config: ModelConfig) -> Decoder:
    """Return the model without memory; ValueError if its sizes overflow."""
    try:
        with shapes_only():
            return Decoder(config)
    except (RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / CONFIG} asks for tensors that nothing holds: {reason}") from None


def _shapes(folder: Path, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return every parameter's shape by name; only the first layer is made, since all are alike."""
    one = _on_meta(folder, replace(config, n_layer=1, window_layers=(), unrotated_layers=()))
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in one.state_dict().items():
        inner = name.removeprefix("blocks.0.")
        names = [name] if inner == name else [f"blocks.{layer}.{inner}" for layer in range(config.n_layer)]
        found |= dict.fromkeys(names, tuple(tensor.shape))
    return found


def _locate(source: str, revision: str | None, local_only: bool) -> tuple[Path, str | None]:
    """Return the folder, and the commit if it came from the hub."""
    if _is_folder(source, revision):
        return Path(source), None
    import huggingface_hub

    try:
        weights = [SINGLE, INDEX, "model-*-of-*.safetensors"]
        folder = Path(
            huggingface_hub.snapshot_download(
                source,
                revision=revision,
                allow_patterns=[*TEXTS, *weights],
                local_files_only=local_only,
            )
        )
        commit = _commit(folder)
        if not any((folder / name).exists() for name in (SINGLE, INDEX)):
            weights = [BIN, f"{BIN}.index.json", "pytorch_model-*-of-*.bin"]
            huggingface_hub.snapshot_download(
                source, revision=commit, allow_patterns=weights, local_files_only=local_only
            )
    except Exception as error:  # The network, the hub and the disk have errors of many classes.
        raise _not_fetched(source, error) from error
    return folder, commit


def _is_folder(source: str, revision: str | None) -> bool:
    """Say whether a source is a folder, and not a hub id; ValueError if it can be neither."""
    path = Path(source)
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"{source} is a folder, which has no revision {revision}; leave the revision out"
            )
        return True
    beside = sorted({found.parent.name for name in MARKS for found in path.parent.glob(f"*/{name}")})
    if path.parent != Path() and (beside or path.parent.name == RUNS):  # Nobody means the hub by it.
        near = difflib.get_close_matches(path.name, beside, 3, 0.0)
        there = f"in {path.parent} there are {', '.join(near)}" if near else f"{path.parent} holds none"
        raise ValueError(f"there is no folder {source}; {there}")
    if not HUB_ID.fullmatch(source):
        raise ValueError(f"{source} is neither a folder nor a hub id such as bigcode/starcoder2-3b")
    return False


def _not_fetched(source: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300]
    return ValueError(
        f"{source} could not be fetched ({reason}); check the name, network and HF_TOKEN, or use a folder"
    )


def _commit(snapshot: Path) -> str:
    """Return the commit that a downloaded folder holds, by the library that laid it out."""
    import huggingface_hub

    for repo in huggingface_hub.scan_cache_dir().repos:
        for revision in repo.revisions:
            if revision.snapshot_path.resolve() == snapshot.resolve():
                return revision.commit_hash
    raise ValueError(f"{snapshot} is not in the hub's cache")


def _one_dtype(folder: Path, entries: dict[str, TensorEntry]) -> torch.dtype:
    names = sorted({entry.dtype for entry in entries.values()})
    if len(names) > 1:
        raise ValueError(f"{folder} holds tensors of {' and '.join(names)}; say which dtype to load them in")
    return DTYPES[names[0]]


def _refuse_too_large(
    folder: Path,
    entries: dict[str, TensorEntry],
    dtype: torch.dtype,
    device: torch.device | str,
    weight_format: str | None,
    matrices: set[str],
) -> None:
    """Refuse what no memory holds: a sparse file of any size takes no room on a disk.

    The tensors of the keys `matrices` are stored as `weight_format` says.
    """
    needed = 0
    for key, entry in entries.items():
        if weight_format is not None and key in matrices and weight_format in KINDS:
            n_out, n_in = entry.shape
            buffers = KINDS[weight_format].layout(n_in, n_out).values()
            needed += sum(math.prod(shape) * kind.itemsize for shape, kind in buffers)
        else:
            needed += math.prod(entry.shape) * dtype.itemsize
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.device(device).type == "cpu" and needed > there:
        form = weight_format or str(dtype)[6:]
        raise ValueError(
            f"{folder} needs {needed / 1e9:.0f} GB of memory in {form} and this machine has "
            f"{there / 1e9:.0f} GB; load it in a smaller dtype or on a larger machine"
        )


def _read_all(
    entries: dict[str, TensorEntry], dtype: torch.dtype, device: torch.device | str
) -> Iterator[tuple[str, Tensor]]:
    """Yield (key, tensor) in the order of the files.

    Two threads fill new memory 1.6 times as fast as one; they run no further ahead than one tensor each.
    """
    items = sorted(entries.items(), key=lambda item: (str(item[1].file), item[1].start))
    total = sum(math.prod(entry.shape) for entry in entries.values()) * dtype.itemsize
    bar = progress_bar(total=total, desc="load", unit="B", unit_scale=True, leave=False, delay=1)
    with bar, ThreadPoolExecutor(THREADS) as pool:
        under_way: deque[tuple[str, Future[Tensor]]] = deque()
        for key, entry in items:
            if len(under_way) == THREADS:
                first, done = under_way.popleft()
                yield first, done.result()
            under_way.append((key, pool.submit(entry.read, dtype, device)))
            bar.update(math.prod(entry.shape) * dtype.itemsize)
        for first, done in under_way:
            yield first, done.result()


def _refuse_other_twin(twin: TensorEntry, embedding: Tensor, head: str, embed: str) -> None:
    same = twin.shape == tuple(embedding.shape) and twin.dtype in DTYPES
    flat = embedding.view(-1)
    if not same or not all(
        torch.equal(flat[first : first + len(chunk)], chunk.to(flat.device, flat.dtype))
        for first, chunk in twin.chunks()
    ):
        raise ValueError(
            f"{twin.file} has a {head} that is not its {embed}, and {CONFIG} ties the two; "
            "set tie_word_embeddings to false"
        )


def _tokenizer(folder: Path, vocab_size: int, linked: bool) -> Tokenizer | None:
    if not any((folder / name).exists() for name in TOKENIZER[:3]):
        if not (folder / SENTENCEPIECE_FILE).exists():
            return None
        if not can_read_sentencepiece():
            print(
                f"warning: the tokenizer in {folder} is {SENTENCEPIECE_FILE} alone, and the packages that "
                "read it are not installed, so the model has none; python -m pip install sentencepiece "
                "protobuf",
                file=sys.stderr,
            )
            return None
    for name in (*TOKENIZER, SENTENCEPIECE_FILE):
        if (folder / name).exists():
            inner_path(folder, name, linked)
    tokenizer = load_tokenizer(folder)
    if isinstance(tokenizer, PretrainedTokenizer) and (said := otherwise_in_transformers(folder, tokenizer)):
        print(f"warning: {said}", file=sys.stderr)
    if tokenizer.vocab_size <= vocab_size:
        return tokenizer
    try:
        if not isinstance(tokenizer, PretrainedTokenizer):
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids and the model has {vocab_size}; "
                "one of the two belongs to another model"
            )
        fits = tokenizer.within(vocab_size)
    except ValueError as error:
        raise ValueError(f"in {folder}: {error}") from None
    print(
        f"warning: the tokenizer in {folder} has {tokenizer.vocab_size} ids and the model {vocab_size} rows; "
        "the tokens added beyond them are left out, and their spelling is text",
        file=sys.stderr,
    )
    return fits
