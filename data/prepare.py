"""The tokenizer and the token store of a run's data, made once and cached.

    documents = RunDocuments(config.data)  # reads nothing yet
    tokenizer = prepare_tokenizer(documents, config.tokenizer)  # trains it, or reuses the cache
    prepared = prepare_data(documents, tokenizer)  # tokenises, or reuses the cache

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
from data.cache import InUse, discard, make_room, say_damaged, seal_folder, verify_folder
from data.corpus import training_texts
from data.documents import Document, Report
from data.fim import fim_markers, known_markers
from data.run_documents import RunDocuments
from data.storefolder import REMEDY, TOKENS, is_hashed, note_hashed, stored_tokenizer, with_stored
from data.tokenstore import FORMAT, TokenStore, build_store, open_store
from tokenization import healing
from tokenization.chat import template_fingerprint, with_template
from tokenizer import TRAINING_VERSION, BPETokenizer, CodeTokenizer, Tokenizer, load_tokenizer

# Starting the processes takes 0.3 to 0.5 s. At 3 MB/s a core two of them are ahead from about 4 MB on.
POOL_PAYS_BYTES = 4_000_000
KINDS = ("texts", "examples", "conversations")


def refuse_unlearnable(settings: TokenizerConfig) -> None:
    """Raise ValueError where the settings of a tokenizer that is to be trained cannot be right."""
    if settings.kind == "pretrained":
        raise ValueError(
            "tokenizer.kind is pretrained, but tokenizer.path is not set; name the tokenizer's folder"
        )
    kind = CodeTokenizer if settings.kind == "code" else BPETokenizer
    kind.refuse_small(settings.vocab_size)


def prepare_tokenizer(data: DataConfig | RunDocuments, settings: TokenizerConfig) -> Tokenizer:
    """Load `settings.path`, or train on the training files, cached by all that decides the result."""
    documents = data if isinstance(data, RunDocuments) else RunDocuments(data)
    if documents.config.store is not None:
        return load_tokenizer(stored_tokenizer(documents.config.store), as_saved=True)
    if settings.path is not None:
        return load_tokenizer(Path(settings.path)).with_start()
    if documents.record.first_chat:
        raise ValueError(
            f"{documents.record.first_chat} is a conversation, and a tokenizer that is trained here has no "
            "chat template to write it by; name a --base that was tuned for chat, or its tokenizer by "
            "--tokenizer.kind pretrained and --tokenizer.path, or give prompt and completion"
        )
    refuse_unlearnable(settings)
    name = documents.tokenizer_name(f"{TRAINING_VERSION} {settings!r}")
    folder = Path(documents.config.cache) / "tokenizers" / name
    tokenizer = _cached_tokenizer(folder)
    if tokenizer is not None:
        return tokenizer
    say(f"training a {settings.kind} tokenizer of up to {settings.vocab_size} ids")
    texts = training_texts(documents)
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

    Without a test split `test` is `validation`; without a validation split both are `train`. The first
    documents for training are there as they were read, but not where only the store was opened.
    """

    train: TokenStore
    validation: TokenStore
    test: TokenStore
    folder: Path
    report: Report
    fingerprint: str
    first_documents: tuple[Document, ...] = ()


def _store_key(config: DataConfig, tokenizer: Tokenizer, fingerprint: str, kind: str) -> str:
    """Name a store by all that decides its bytes, which the place of the data and the workers do not.

    Args:
        kind: What the documents are, one of KINDS.
    """
    settings = dataclasses.asdict(config)
    # The last three decide labels and batches, and no tokens.
    for name in (
        "source",
        "store",
        "cache",
        "cache_gb",
        "workers",
        "loss_on",
        "order",
        "difficulty",
        "verify",
    ):
        del settings[name]
    if not (settings["heal"] and kind == "examples"):  # Stores from before the setting have this key.
        del settings["heal"]
    if settings["fim_order"] == "psm":
        del settings["fim_order"]
    special = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    parts = [FORMAT, fingerprint, tokenizer.fingerprint, tokenizer.vocab_size, special, settings]
    if known_markers(tokenizer) is not None and tokenizer.before(gap=True):
        parts.append("start before gaps")  # Stores without a start there keep the key that they had.
    if "heal" in settings:
        parts.append(f"healing {healing.VERSION}")
    if kind == "conversations":
        parts.append(f"chat {template_fingerprint(tokenizer)}")
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _store_folder(config: DataConfig, tokenizer: Tokenizer, fingerprint: str, kind: str) -> Path:
    if config.store is not None:
        return Path(config.store) / TOKENS
    return Path(config.cache) / f"tokens-{_store_key(config, tokenizer, fingerprint, kind)[:24]}"


def stored_data(config: DataConfig, tokenizer: Tokenizer, fingerprint: str) -> PreparedData | None:
    """Return the cached store of the data with this fingerprint; their source is not read.

    None where there is no such store, or it is damaged. Its report has the fingerprint alone.
    """
    config, report = with_stored(config).resolved(), Report(fingerprint=fingerprint)
    for kind in KINDS:  # Only the source itself says what it holds.
        with contextlib.suppress(ValueError):  # Without a chat template there are no conversations.
            found = _verified(_store_folder(config, tokenizer, fingerprint, kind), tokenizer, report)
            # Plain text and examples that are not healed have one key.
            if not config.heal or found.train.holds_examples == (kind != "texts"):
                return found
    return None


def _verified(folder: Path, tokenizer: Tokenizer, report: Report) -> PreparedData:
    """Open a store and compare its checksums; ValueError if it is damaged or of other data."""
    prepared = _opened(folder, report)
    for store in {prepared.train, prepared.validation, prepared.test}:
        store.refuse_other_index(tokenizer, report.fingerprint)
        store.verify()
    return prepared


def _prepared_before(config: DataConfig, tokenizer: Tokenizer, report: Report) -> PreparedData:
    """Open the tokens of `config.store`, and compare their checksums if this machine has not done so before.

    Raises:
        ValueError: They are damaged, or those of another tokenizer.
    """
    assert config.store is not None
    folder = Path(config.store) / TOKENS
    try:
        made_by = open_store(folder)[0].tokenizer_fingerprint
        if made_by != tokenizer.fingerprint:
            raise ValueError(
                f"{config.store} holds the tokens of the tokenizer {made_by[:12]}, and this run's is "
                f"{tokenizer.fingerprint[:12]}, that of its base"
            )
        if is_hashed(config):
            return opened_data(folder, tokenizer, report)
        prepared = _verified(folder, tokenizer, report)
    except (OSError, ValueError) as error:
        raise ValueError(f"{' '.join(str(error).split())}; {REMEDY}") from None
    note_hashed(config)
    return prepared


def opened_data(folder: Path, tokenizer: Tokenizer, report: Report) -> PreparedData:
    """Open a store that another process has just prepared, in constant time; its checksums are not compared.

    Raises:
        ValueError: It is not whole, or of other data or another tokenizer than this process has.
    """
    prepared = _opened(folder, report)
    for store in {prepared.train, prepared.validation, prepared.test}:
        store.refuse_other_index(tokenizer, report.fingerprint)
    return prepared


def _opened(folder: Path, report: Report) -> PreparedData:
    train, validation, test = open_store(folder)
    # Without a split (validation_one_in 0, for overfitting) validation reads what was trained on.
    validation = validation if validation.n_documents else train
    test = test if test.n_documents else validation
    return PreparedData(train, validation, test, folder, report, report.fingerprint)


def prepare_data(data: DataConfig | RunDocuments, tokenizer: Tokenizer) -> PreparedData:
    """Tokenise the documents of a run into a store under `cache`, or reuse the one that is there.

    A store that is reused has its SHA-256 compared first; one that is damaged is built again, with a warning.
    Builders that run at once each write a folder of their own, and the first to finish gives its to all. The
    texts are released at the end.

    Args:
        data: The settings, or the documents, if something else of the run reads them too.

    Raises:
        ValueError: as `split_documents` and `build_store`; or the corpus changed while it was read, or holds
            gaps that the tokenizer has no markers for.
        OSError: the cache cannot be written, or the disk is full; nothing half-written stays.
    """
    documents = data if isinstance(data, RunDocuments) else RunDocuments(data)
    config = documents.config
    if tokenizer.start_id is None:  # The first bytes of a document would count and never be predicted.
        if tokenizer.with_start().start_id is not None:
            raise ValueError("the tokenizer puts nothing before a text; train with its with_start()")
        raise ValueError("the tokenizer has neither bos nor eos; name one in its tokenizer_config.json")
    if config.fim_rate:
        fim_markers(tokenizer, f"--data.fim_rate {config.fim_rate} cannot be had; leave it out")
    if config.fim_order == "spm" and tokenizer.kind == "code":
        raise ValueError(
            "--data.fim_order spm cannot be had with a `code` tokenizer, which implies the space between a "
            "prefix and a middle that are one word; leave it out, or use --tokenizer.kind bpe"
        )
    own = config.heal, config.fim_order == "spm"
    if (tokenizer.heals, tokenizer.suffix_first) != own:
        tokenizer = copy.copy(tokenizer)  # The caller's own stays as it is.
        tokenizer.heals, tokenizer.suffix_first = own
    record = documents.record
    if record.first_gap:
        fim_markers(tokenizer, f"{record.first_gap} cannot be learned; give prompt and completion")
    if record.first_chat:
        try:
            with_template(tokenizer)
        except ValueError as error:
            raise ValueError(f"{record.first_chat} is a conversation: {error}") from None
    kind = "conversations" if record.first_chat else "examples" if record.holds_examples else "texts"
    target = _store_folder(config, tokenizer, documents.fingerprint, kind)
    prepared = None
    if config.store is not None:
        prepared = _prepared_before(config, tokenizer, record.report)
    elif target.exists():
        try:
            prepared = _verified(target, tokenizer, record.report)
        except ValueError as error:
            say_damaged(target, error)
            discard(target)
    if prepared is None:
        _build(target, documents, tokenizer)
        prepared = _opened(target, record.report)
    documents.release()
    make_room(Path(config.cache), config.cache_gb)
    return dataclasses.replace(prepared, first_documents=tuple(record.first_documents))


def _build(target: Path, documents: RunDocuments, tokenizer: Tokenizer) -> None:
    """Tokenise documents into a store, and give it its name when it is whole."""
    config = documents.config
    total_bytes = sum(documents.record.report.kept_bytes.values())
    workers = (config.workers or os.cpu_count() or 1) if total_bytes >= POOL_PAYS_BYTES else 1
    # Not tempfile: its folders are closed to other users, and the cache may be shared.
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        build_store(
            temporary,
            documents,
            tokenizer,
            fingerprint=documents.fingerprint,
            workers=workers,
            total_bytes=total_bytes,
        )
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
