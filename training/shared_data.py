"""Tokenizer and token store of a run that several processes share: prepared once, and opened by the others.

Rank 0 sends what it has prepared, and the others open its store in constant time: nobody reads the corpus or
hashes the store again. Where the store is not there, since a machine has a disk of its own, the first process
of that machine prepares it again, from the same data by the same tokenizer.
"""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path

from config import Config
from data.documents import Report
from data.run_documents import RunDocuments
from dataset import PreparedData, opened_data, prepare_data
from tokenizer import Tokenizer, load_tokenizer
from training.distributed import World


def send(world: World, config: Config, tokenizer: Tokenizer, data: PreparedData) -> None:
    """Tell the other processes the settings, now that all are decided, the tokenizer and the store."""
    if world.size == 1:
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        files = {path.name: base64.b64encode(path.read_bytes()).decode() for path in Path(folder).iterdir()}
    world.told(
        {
            "config": config.to_dict(),
            "tokenizer": files,
            "bare_gaps": tokenizer.bare_gaps,
            "store": str(data.folder),
            "data": data.fingerprint,
            "corpus": data.report.corpus,
        }
    )


def receive(world: World) -> tuple[Config, Tokenizer, PreparedData]:
    """Return the settings, the tokenizer and the data that rank 0 has prepared.

    Raises:
        ValueError: This machine has other data.
    """
    known = world.told()
    config = Config.from_dict(known["config"])
    with tempfile.TemporaryDirectory() as folder:
        for name, text in known["tokenizer"].items():
            Path(folder, name).write_bytes(base64.b64decode(text))
        tokenizer = load_tokenizer(Path(folder), as_saved=True)
    tokenizer.bare_gaps = known["bare_gaps"]
    tokenizer.heals, tokenizer.suffix_first = config.data.heal, config.data.fim_order == "spm"
    node, store = world.rank - world.local_rank, Path(known["store"])
    if node > 0:  # The first process of another machine, which may have a disk of its own.
        if world.rank == node and not store.is_dir():
            store = prepare_data(RunDocuments(config.data), tokenizer).folder
        store = Path(world.told(str(store), node))
    return (
        config,
        tokenizer,
        opened_data(store, tokenizer, Report(fingerprint=known["data"], corpus=known["corpus"])),
    )
