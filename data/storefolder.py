"""A store that was prepared once, for runs that need not read the corpus: `--prepare --data.store STORE`.

    STORE/store.json     the settings that decide the tokens, and what is known of the documents
    STORE/tokenizer/     the tokenizer, with checksums
    STORE/tokens/        the token store (data/tokenstore.py)

A run with `--data.store STORE` takes these settings, opens the tokens in constant time, and is the run that
reads the corpus itself. The tokens are hashed when a machine sees the folder for the first time; afterwards
their names, sizes, times and inodes are compared with those of that time, as for a source.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from config import DataConfig
from data.cache import read_sealed, sealed, unsealed, verify_folder, write_sealed
from data.documents import FileState
from data.recorded import SETTLED_NS, WITH_CTIME, SourceRecord, as_plain, file_system, from_plain

MANIFEST, TOKENIZER, TOKENS = "store.json", "tokenizer", "tokens"
VERSION = 1
# Settings that are a run's own, whatever store it reads.
OWN = ("store", "cache", "cache_gb", "workers", "loss_on", "order", "difficulty", "verify")
REMEDY = "copy it anew, or make it again with ./plumb prepare"


def refuse_taken(store: str) -> None:
    """Raise ValueError where no store can be written: something else is there, or the folder is closed."""
    folder = Path(store)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"--data.store {store} is there already, and is not written over; name a new folder")


def write_store(config: DataConfig, record: SourceRecord, tokenizer: Path, tokens: Path) -> Path:
    """Copy a tokenizer's folder and the tokens of a run's data to `config.store`, whole or not at all.

    Args:
        record: What is known of the documents; the names of the files that were read are left out.
    """
    assert config.store is not None
    target = Path(config.store)
    refuse_taken(config.store)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        shutil.copytree(tokenizer, temporary / TOKENIZER)
        shutil.copytree(tokens, temporary / TOKENS)
        report = dataclasses.replace(record.report, files={})
        known = as_plain(dataclasses.replace(record, report=report, tokenizers={}))
        settings = dataclasses.asdict(dataclasses.replace(config, source=_whole_path(config.source)))
        (temporary / MANIFEST).write_text(
            sealed({"version": VERSION, "data": settings, "record": known}), "utf-8"
        )
        if target.is_dir():
            target.rmdir()
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _whole_path(source: str) -> str:
    return source if source == "stdlib" else str(Path(source).resolve())


def _manifest(store: str) -> dict[str, Any]:
    path = Path(store) / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"--data.store {store} holds no {MANIFEST}; make it with ./plumb prepare --data.store {store}"
        )
    try:
        found = unsealed(path.read_text("utf-8"))
        if not isinstance(found, dict) or found["version"] != VERSION:
            raise ValueError(f"it is of another version than {VERSION}")
        return found
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be used ({error}); {REMEDY}") from None


def with_stored(config: DataConfig) -> DataConfig:
    """Return the settings with those of the store that it names; they themselves without one.

    Raises:
        ValueError: There is no store, or a setting was given that it was not made with.
    """
    if config.store is None:
        return config
    try:
        stored = DataConfig(**_with_tuples(_manifest(config.store)["data"]))
    except (TypeError, KeyError) as error:
        raise ValueError(f"{Path(config.store) / MANIFEST} cannot be used ({error}); {REMEDY}") from None
    plain = DataConfig()
    for field in dataclasses.fields(DataConfig):
        name = field.name
        own, theirs = getattr(config, name), getattr(stored, name)
        mine = _whole_path(own) if name == "source" else own
        if name not in OWN and own != getattr(plain, name) and mine != theirs:
            raise ValueError(
                f"--data.{name} is {own}, and {config.store} was made with {theirs}; leave it out, or make "
                "another store"
            )
    return dataclasses.replace(stored, **{name: getattr(config, name) for name in OWN})


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a dataclass from JSON, which has lists for tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def stored_record(store: str) -> SourceRecord:
    """Return what is known of a store's documents; ValueError if it is damaged."""
    try:
        return from_plain(_manifest(store)["record"])
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"{Path(store) / MANIFEST} cannot be used ({error}); {REMEDY}") from None


def stored_tokenizer(store: str) -> Path:
    """Return the folder of a store's tokenizer, whose checksums are compared; ValueError if it is damaged."""
    folder = Path(store) / TOKENIZER
    try:
        verify_folder(folder)
    except ValueError as error:
        raise ValueError(f"{error}; {REMEDY}") from None
    return folder


# --- hashed once a machine ---------------------------------------------------------------------------


def is_hashed(config: DataConfig) -> bool:
    """Return whether the tokens were hashed on this machine, and have not been changed since."""
    assert config.store is not None
    if config.verify or file_system(Path(config.store)) not in WITH_CTIME:
        return False
    saved = read_sealed(_path(config))
    return saved is not None and saved == _states(config.store)


def note_hashed(config: DataConfig) -> None:
    """Record in the cache that the tokens have been hashed, unless a file was changed just before."""
    assert config.store is not None
    states = _states(config.store)
    if all(state[3] < time.time_ns() - SETTLED_NS for state in states):
        write_sealed(_path(config), states)


def _path(config: DataConfig) -> Path:
    key = json.dumps([VERSION, os.path.realpath(config.store or "")])
    return Path(config.cache) / f"store-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _states(store: str) -> list[list[Any]]:
    """Return the name, size, times and inode of each file of the tokens."""
    paths = sorted((Path(store) / TOKENS).iterdir())
    return [[path.name, *FileState.of(os.stat(path))] for path in paths if path.is_file()]
