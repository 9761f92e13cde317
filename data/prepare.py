"""The tokenizer and the token store of a run's data, made once and cached.

    tokenizer = prepare_tokenizer(config.data, config.tokenizer)  # trains it, or reuses the cache
    prepared = prepare_data(config.data, tokenizer)  # reads, splits and tokenises, or reuses the cache

The splits (data/corpus.py) are tokenised into a store (data/tokenstore.py), in a folder named after the
content of the data, the tokenizer and the settings, so data that changed cannot meet an old store.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from config import DataConfig, TokenizerConfig, say
from config.bars import progress_bar
from data.cache import InUse, discard, make_room, say_damaged, seal_folder, verify_folder
from data.corpus import split_documents, training_texts
from data.documents import Report
from data.fim import fim_markers, known_markers
from data.tokenstore import FORMAT, TokenStore, build_store, open_store
from tokenization import healing
from tokenizer import TRAINING_VERSION, BPETokenizer, CodeTokenizer, Tokenizer, load_tokenizer

# Starting the processes takes 0.3 to 0.5 s. At 3 MB/s a core two of them are ahead from about 4 MB on.
POOL_PAYS_BYTES = 4_000_000


def prepare_tokenizer(data: DataConfig, settings: TokenizerConfig) -> Tokenizer:
    """Load `settings.path`, or train on the training files, cached by all that decides the result."""
    if settings.path is not None:
        return load_tokenizer(Path(settings.path)).with_start()
    if settings.kind == "pretrained":
        raise ValueError(
            "tokenizer.kind is pretrained, but tokenizer.path is not set; name the tokenizer's folder"
        )
    key = hashlib.sha256(f"{TRAINING_VERSION} {settings!r}".encode())
    for text in training_texts(data):
        key.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    folder = Path(data.cache) / "tokenizers" / key.hexdigest()[:32]
    tokenizer = _cached_tokenizer(folder)
    if tokenizer is not None:
        return tokenizer
    say(f"training a {settings.kind} tokenizer of up to {settings.vocab_size} ids")
    texts = training_texts(data)
    if settings.kind == "code":
        tokenizer = CodeTokenizer.train(texts, settings.vocab_size, settings.min_count)
    else:
        tokenizer = BPETokenizer.train(texts, settings.vocab_size)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)  # A killed process with this number may have left it.
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        say(f"the tokenizer is kept in memory: {folder.parent} may only be read")
        return tokenizer
    tokenizer.save(temporary)
    seal_folder(temporary)
    tokenizer = load_tokenizer(temporary)
    with contextlib.suppress(OSError):  # Another run may have made the same one meanwhile.
        os.replace(temporary, folder)
    shutil.rmtree(temporary, ignore_errors=True)
    return tokenizer


def _cached_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer in a folder of the cache; None without one, or with a warning if it is damaged."""
    if not folder.is_dir():
        return None
    try:
        with InUse(folder):
            verify_folder(folder)
            return load_tokenizer(folder)
    except (OSError, ValueError) as error:
        say_damaged(folder, error)
        with contextlib.suppress(PermissionError):  # The cache may be read-only.
            discard(folder)
    return None


@dataclass(frozen=True)
class PreparedData:
    """The stores, their folder, the report on every document, and the data's fingerprint.

    Without a test split `test` is `validation`; without a validation split both are `train`.
    """

    train: TokenStore
    validation: TokenStore
    test: TokenStore
    folder: Path
    report: Report
    fingerprint: str


def _store_key(config: DataConfig, tokenizer: Tokenizer, fingerprint: str, examples: bool) -> str:
    """Name a store by all that decides its bytes, which the place of the data and the workers do not."""
    settings = dataclasses.asdict(config)
    # The last three decide labels and batches, and no tokens.
    for name in ("source", "cache", "cache_gb", "workers", "loss_on", "order", "difficulty"):
        del settings[name]
    if not (settings["heal"] and examples):  # Stores from before the setting have this key.
        del settings["heal"]
    special = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    parts = [FORMAT, fingerprint, tokenizer.fingerprint, tokenizer.vocab_size, special, settings]
    if known_markers(tokenizer) is not None and tokenizer.before(gap=True):
        parts.append("start before gaps")  # Stores without a start there keep the key that they had.
    if "heal" in settings:
        parts.append(f"healing {healing.VERSION}")
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _store_folder(config: DataConfig, tokenizer: Tokenizer, fingerprint: str, examples: bool) -> Path:
    return Path(config.cache) / f"tokens-{_store_key(config, tokenizer, fingerprint, examples)[:24]}"


def stored_data(config: DataConfig, tokenizer: Tokenizer, fingerprint: str) -> PreparedData | None:
    """Return the cached store of the data with this fingerprint; their source is not read.

    None where there is no such store, or it is damaged. Its report has the fingerprint alone.
    """
    config, report = config.resolved(), Report(fingerprint=fingerprint)
    for examples in (False, True):  # Only the source itself says which of the two it holds.
        with contextlib.suppress(ValueError):
            found = _verified(_store_folder(config, tokenizer, fingerprint, examples), tokenizer, report)
            # Plain text and examples that are not healed have one key.
            if not config.heal or found.train.holds_examples == examples:
                return found
    return None


def _verified(folder: Path, tokenizer: Tokenizer, report: Report) -> PreparedData:
    """Open a store and compare its checksums; ValueError if it is damaged or of other data."""
    prepared = _opened(folder, report)
    for store in {prepared.train, prepared.validation, prepared.test}:
        store.refuse_other_index(tokenizer, report.fingerprint)
        store.verify()
    return prepared


def _opened(folder: Path, report: Report) -> PreparedData:
    train, validation, test = open_store(folder)
    # Without a split (validation_one_in 0, for overfitting) validation reads what was trained on.
    validation = validation if validation.n_documents else train
    test = test if test.n_documents else validation
    return PreparedData(train, validation, test, folder, report, report.fingerprint)


def prepare_data(config: DataConfig, tokenizer: Tokenizer) -> PreparedData:
    """Read, split and tokenise the corpus into a store under `config.cache`, or reuse the one that is there.

    The corpus is read twice: once for the key, which covers every byte, and once to tokenise it. A store that
    is reused has its SHA-256 compared first; one that is damaged is built again, with a warning. Builders
    that run at once each write a folder of their own, and the first to finish gives its to all.

    Raises:
        ValueError: as `split_documents` and `build_store`; or the corpus changed while it was read, or holds
            gaps that the tokenizer has no markers for.
        OSError: the cache cannot be written, or the disk is full; nothing half-written stays.
    """
    if tokenizer.start_id is None:  # The first bytes of a document would count and never be predicted.
        if tokenizer.with_start().start_id is not None:
            raise ValueError("the tokenizer puts nothing before a text; train with its with_start()")
        raise ValueError("the tokenizer has neither bos nor eos; name one in its tokenizer_config.json")
    if config.fim_rate:
        fim_markers(tokenizer, f"--data.fim_rate {config.fim_rate} cannot be had; leave it out")
    config = config.resolved()
    if tokenizer.heals != config.heal:
        tokenizer = copy.copy(tokenizer)  # The caller's own stays as it is.
        tokenizer.heals = config.heal
    report, examples = _read_once(config, tokenizer)
    target = _store_folder(config, tokenizer, report.fingerprint, examples)
    if target.exists():
        try:
            prepared = _verified(target, tokenizer, report)
            make_room(Path(config.cache), config.cache_gb)
            return prepared
        except ValueError as error:
            say_damaged(target, error)
            discard(target)
    _build(target, config, tokenizer, report)
    prepared = _opened(target, report)
    make_room(Path(config.cache), config.cache_gb)
    return prepared


def _read_once(config: DataConfig, tokenizer: Tokenizer) -> tuple[Report, bool]:
    """Read the corpus for its report and fingerprint, and whether it holds examples."""
    report, examples = Report(), False
    with progress_bar(desc="reading", unit=" documents", leave=False) as bar:
        for _, document in split_documents(config, report):
            examples |= document.prompt is not None
            if document.suffix is not None:
                fim_markers(tokenizer, f"{document.where} cannot be learned; give prompt and completion")
            bar.update()
    return report, examples


def _build(target: Path, config: DataConfig, tokenizer: Tokenizer, report: Report) -> None:
    """Tokenise the corpus that `report` is of into a store, and give it its name when it is whole."""
    total_bytes = sum(report.kept_bytes.values())
    workers = (config.workers or os.cpu_count() or 1) if total_bytes >= POOL_PAYS_BYTES else 1
    # Not tempfile: its folders are closed to other users, and the cache may be shared.
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        again = Report()
        build_store(
            temporary,
            split_documents(config, again),
            tokenizer,
            fingerprint=report.fingerprint,
            workers=workers,
            total_bytes=total_bytes,
        )
        if again.fingerprint != report.fingerprint:
            raise ValueError(f"the corpus {config.source} changed while it was read: start again")
        os.rename(temporary, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                f"no space left for the token store in {config.cache}: free some, or set --data.cache to "
                "a folder on another disk"
            ) from error
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else another builder was first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
