"""The tokenizer and the token store of a run, made without it: `python trainingmanager.py --prepare`.

A run with the same settings then finds both in the cache. With `--data.store STORE` they are copied to a
folder of their own, which a run with the same flag opens instead of a source, here or on another machine.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from config import Config
from data.cache import seal_folder
from data.run_documents import RunDocuments
from data.storefolder import write_store
from dataset import prepare_data
from training.announcements import say_data
from training.beforehand import refuse_mistakes
from training.begin import with_fitting_row, with_tokenizer
from training.run import open_base


def prepare(config: Config) -> str:
    """Make what the run's first lines tell of; return a line that says where it is.

    Raises:
        ValueError: What `train` refuses of the settings, the base and the data.
    """
    if config.train.resume:
        raise ValueError("--prepare is for a run that begins, and --resume goes on with one; leave one out")
    precision = refuse_mistakes(replace(config, train=replace(config.train, prepare=True)))
    store = config.data.store
    config = replace(config, data=replace(config.data, store=None).resolved())
    base = open_base(config, precision.dtype)
    row_may_shrink = base is not None and not config.train.row_length
    documents = RunDocuments(config.data)
    config, tokenizer = with_tokenizer(Path(), config, base, precision.dtype, documents)
    tokenizer.heals, tokenizer.suffix_first = config.data.heal, config.data.fim_order == "spm"
    data = prepare_data(documents, tokenizer)
    if row_may_shrink:
        config = with_fitting_row(config, data)
    say_data(config, data, tokenizer, warn=True)
    place = data.folder
    if store is not None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(Path(folder))
            seal_folder(Path(folder))
            own = replace(config.data, store=store)
            place = write_store(own, documents.record, Path(folder), data.folder)
    return f"prepared: {tokenizer.vocab_size:,} ids; the tokens are in {place}"
