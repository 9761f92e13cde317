"""A run from its settings to its last checkpoint: `train`.

What has to be known before a run may begin is settled here in order, the cheapest first: a mistake is refused
before the work that it would waste.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from architecture import Decoder
from config import Config, write_atomically
from config.files import code_fingerprint
from config.schema import flat
from config.yamlfile import read_yaml
from data.run_documents import RunDocuments
from data.storefolder import with_stored
from dataset import PreparedData, fitting_row, micro_batches_of, prepare_data, prepare_tokenizer
from guards.faults import Fault
from guards.preflight import TOGETHER, preflight, record_overrides
from guards.ranks import disagreement
from lora import trainable_table
from modules.precision import Precision, keep_freed_memory, release_freed_memory
from modules.quantized_linear import n_weights
from pretrained import Pretrained
from tokenization.turn_end import end_turns
from tokenizer import Tokenizer, load_tokenizer
from training.announcements import checked_groups, say_data, say_groups
from training.beforehand import refuse_mistakes
from training.checkpoint import read_run_file
from training.distributed import ALONE, World, of_rank
from training.loop import UNOBSERVED, Observer, TrainingManager
from training.random_state import seed_everything
from training.run import as_begun, open_base, starting_model, starting_tokenizer, with_base_config
from training.runfolder import claimed_folder, refuse_changes, refuse_other_data, with_data_resolved
from training.shared_data import receive, send
from training.signals import RESUMABLE_MARK


class Prepared(NamedTuple):
    """The settings of a run, now that all are decided, and what it needs beside its model."""

    config: Config
    tokenizer: Tokenizer
    data: PreparedData
    base: Pretrained | None


def train(
    config: Config, observer: Observer = UNOBSERVED, is_preset: bool = False, world: World = ALONE
) -> TrainingManager:
    """Train one whole run, from settings to the last checkpoint; print what is decided on the way.

    Args:
        observer: Functions to call after each step, where one may end the run, and after each save.
        is_preset: The settings are a recipe's own, which says itself what they are like: no warning that a
            user could not act on.
        world: The processes that share the run; each calls this function.

    Raises:
        ValueError: The settings, the data or the folder do not fit; nothing that was there is touched.
        OSError: The disk is full or read-only; older checkpoints stay.
    """
    precision = of_rank(refuse_mistakes(config), world)
    config = replace(config, data=with_stored(config.data))
    micro_batches_of(config.train.batch_size, config.train.accumulation, world.size)
    with claimed_folder(config) if world.is_first else contextlib.nullcontext() as folder:
        folder = Path(world.told(folder and str(folder)))
        return _train_in(folder, with_data_resolved(config, folder), precision, observer, is_preset, world)


def _train_in(
    folder: Path, config: Config, precision: Precision, observer: Observer, is_preset: bool, world: World
) -> TrainingManager:
    """Train in a folder that is claimed; each of the nine steps refuses what does not fit, in a ValueError.

    1. Open the base, if the run has one.
    2. Choose the tokenizer, and with it the model's whole shape.
    3. Read the data.
    4. Compare both with those of the run that goes on.
    5. Print what is trained on.
    6. Make the model: sampled weights, or the base with its adapters.
    7. Make the optimizers, and restore the state of the run that goes on.
    8. Let the guards look at all of it.
    9. Write down what the run is, and train.

    Of several processes the first does all of it, and hands the others what it has after the fifth step.
    """
    resumes = config.train.resume
    disagreed = disagreements(config, world)
    print(f"precision: {precision.reason}")
    if world.is_first:
        prepared, fingerprints = prepared_in(folder, config, precision, is_preset)
        send(world, prepared.config, prepared.tokenizer, prepared.data)
    else:
        config, tokenizer, data = receive(world)
        base = open_base(config, precision.dtype, precision.device)
        prepared, fingerprints = Prepared(config, tokenizer, data, base), {}
    config, tokenizer, data, base = prepared
    model = make_model(config, base, tokenizer, precision.device)
    manager = TrainingManager(config, model, data, precision, folder, observer, world)
    if resumes:
        manager.resume()
    start = "resumed" if resumes else "fresh" if base is None else "loaded"
    known_ids = None if base is None or base.tokenizer is None else base.tokenizer.vocab_size
    subject = manager.subject(tokenizer, start, known_ids, None if base is None else base.stored.folder)
    passed = disagreed
    if world.is_first:
        with manager.alone():
            passed += preflight(subject, config.train.allow)
    world.told(None)  # The guards have looked at the run, and found it as it should be.
    if world.size > 1:
        passed += preflight(subject, config.train.allow, TOGETHER)
    release_freed_memory()
    if world.is_first:
        write_down(manager, tokenizer, fingerprints, passed)
    manager.fit(subject, warn=not is_preset)
    return manager


def disagreements(config: Config, world: World) -> list[Fault]:
    """Return in what the processes differ that should be alike, if that is allowed.

    Raises:
        Fault: It is not.
    """
    if world.size == 1:
        return []
    known = {"code": code_fingerprint()[:12], "torch": str(torch.__version__)} | flat(config)
    faults = list(disagreement(world, known))
    for fault in faults:
        if fault.name not in config.train.allow:
            raise fault
    return faults


def prepared_in(
    folder: Path, config: Config, precision: Precision, is_preset: bool
) -> tuple[Prepared, dict[str, str]]:
    """Make what a run needs beside its model, the first five steps; return its fingerprints too."""
    resumes = config.train.resume
    base = open_base(config, precision.dtype, precision.device)
    row_may_shrink = base is not None and not config.train.row_length and not resumes
    documents = RunDocuments(config.data)
    config, tokenizer = with_tokenizer(folder, config, base, precision.dtype, documents)
    data = prepare_data(documents, tokenizer)
    if row_may_shrink:
        config = with_fitting_row(config, data)
    fingerprints = fingerprints_of(tokenizer, data, base)
    if resumes:
        refuse_other_data(folder, config, fingerprints)
    say_data(config, data, tokenizer, warn=not is_preset)
    return Prepared(config, tokenizer, data, base), fingerprints


def with_tokenizer(
    folder: Path, config: Config, base: Pretrained | None, dtype: torch.dtype, documents: RunDocuments
) -> tuple[Config, Tokenizer]:
    """Return the settings with the model's whole shape, and the tokenizer, which decides its vocabulary.

    The tokenizer heals prompts as the settings say; it ends answers of conversations where the server will,
    and those, and the starts of texts with a gap, are as the run that goes on had them.

    Args:
        folder: The run's folder. A run that goes on is compared with its settings there.
        base: The published model that the run begins with, whose shape it takes.
        dtype: The number format of the run's matrix products.
        documents: The run's documents, of which a tokenizer may have to be made.

    Raises:
        ValueError: The settings do not go with the base, the tokenizer or the run that goes on.
    """
    resumes = config.train.resume
    shape_is_known = base is None and config.model.vocab_size > 0
    if resumes and shape_is_known:  # Before the corpus is read, of which a tokenizer may have to be made.
        refuse_changes(folder, replace(config, model=config.model.resolved()))
    own = folder / "tokenizer"
    if base is None and resumes and config.tokenizer.path is None and own.is_dir():
        # Another version of Plumb trained it, perhaps, and would train another one today.
        tokenizer = read_run_file(own, lambda at: load_tokenizer(at, as_saved=True))
    elif base is None:
        tokenizer = prepare_tokenizer(documents, config.tokenizer)
    else:
        row_is_unset = not config.train.row_length
        tokenizer = starting_tokenizer(config, base)
        config = with_base_config(config, base, tokenizer, dtype)
        if not config.lora.r:  # Before the data are read: what trains is the base as it is.
            checked_groups(config, base.model)
        if resumes and row_is_unset:
            config = with_row_of(folder, config)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size {vocab_size} does not hold the tokenizer's {tokenizer.vocab_size} ids; "
            "leave model.vocab_size out, or take a smaller tokenizer"
        )
    config = replace(config, model=replace(config.model, vocab_size=vocab_size).resolved())
    if resumes and not shape_is_known:
        refuse_changes(folder, config)
    if resumes:
        as_begun(tokenizer, folder)
    elif documents.record.first_chat:
        end_turns(tokenizer)  # Before the answers are written, which end as those of the server do.
    tokenizer.heals, tokenizer.suffix_first = config.data.heal, config.data.fim_order == "spm"
    return config, tokenizer


def with_row_of(folder: Path, config: Config) -> Config:
    """Return the settings with the rows that the run in the folder was begun with."""
    row = Config.from_dict(read_yaml(folder / "config.yaml")).train.row_length or config.row_length
    return replace(config, train=replace(config.train, row_length=row))


def with_fitting_row(config: Config, data: PreparedData) -> Config:
    """Return the settings with rows only as long as the examples need, at most as long as they were."""
    row = fitting_row((data.train, data.validation, data.test), config.row_length)
    if row < config.row_length:
        print(f"rows: {row} tokens, which hold every example whole; --row_length sets another length")
    return replace(config, train=replace(config.train, row_length=row))


def fingerprints_of(tokenizer: Tokenizer, data: PreparedData, base: Pretrained | None) -> dict[str, str]:
    """Return the fingerprints of all that a run is made of, by name; fingerprints.json keeps them."""
    fingerprints = {
        "data": data.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "code": code_fingerprint(),
    }
    if data.report.corpus:
        fingerprints["corpus"] = data.report.corpus
    if base is not None:
        fingerprints["base"] = base.fingerprint
    return fingerprints


def make_model(
    config: Config, base: Pretrained | None, tokenizer: Tokenizer, device: torch.device
) -> Decoder:
    """Seed everything, make the model on the device, and print its size and what of it trains."""
    seed_everything(config.train.seed)
    model = starting_model(config, base, tokenizer).to(device)
    print(f"model: {n_weights(model):,} parameters on {device}")
    if base is not None:
        print(trainable_table(model, base.family.key))
    release_freed_memory()  # What reading the data and the weights freed is not needed again.
    keep_freed_memory()
    say_groups(config, model)
    return model


def write_down(
    manager: TrainingManager, tokenizer: Tokenizer, fingerprints: dict[str, str], passed: list[Fault]
) -> None:
    """Write what the run is into its folder: tokenizer, fingerprints, settings, and the faults let pass.

    It comes after the guards: a run that one of them refuses leaves its folder as it was, free for the next
    try.
    """
    config, folder = manager.config, manager.folder
    if not config.train.resume:
        tokenizer.save(folder / "tokenizer")
        write_atomically(folder / "fingerprints.json", json.dumps(fingerprints, indent=1))
    saved = config.to_dict() | {"run": str(folder), "resume": False}
    write_atomically(folder / "config.yaml", yaml.safe_dump(saved, sort_keys=False))
    record_overrides(folder, passed)
    (folder / RESUMABLE_MARK).unlink(missing_ok=True)
