"""Guard of what is trained on and validated on: rows, targets, positions and their order, derived again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from dataset import Batch
from guards.reference.comparison import Comparison
from guards.reference.text import stored_splits
from guards.subject import GuardSubject
from reference import rows
from reference.checkpoints import order_version_of
from reference.rows import ExampleRows, PlainRows, Row
from reference.stored import FORMAT, Stored

VERSION = 2  # Of the order of rows, in a run that begins.
MOST_ORDERED = 10**7  # Documents and rows whose order is derived.
MOST_COUNTED = 10**6  # Rows of an epoch that are counted, and whose next epoch is derived.
DRAWS = 10**4  # Of the rows of a larger one.
MOST_PACKED = 20_000  # Examples that are packed again.
MOST_TOKENS = 16_384  # Of a batch that are compared; of a larger one so many, in rows sampled anew.
MOST_BATCHES = 8  # Micro-batches of the first two updates.
WHOLE = 50_000  # Tokens of a validation split whose whole pass is compared.
MOST_GRADED = 10**6  # Tokens whose difficulty is measured again.

INDEX = "look at what is written into index.json"
REMEDIES = {
    "tokens": "look at the order of documents, and at what cuts them into rows",
    "labels": "a target is the next token of the same document, and none of its prompt",
    "document ids": "documents of a row are numbered from 0, and padding is -1",
    "positions": "they count from 0 at each document and at the row's start",
}


def compare(subject: GuardSubject, comparison: Comparison) -> None:
    """Compare the rows of the first updates, their order in an epoch, and those of validation."""
    stores = stored_splits(subject)
    _same_index(subject, stores["train"], comparison)
    draw = np.random.Generator(np.random.PCG64())  # Seeded by the system, anew at each start.
    for store in dict.fromkeys((subject.train, subject.validation, subject.test)):
        _same_tables(store, stores[store.split], comparison)
    validation = stores[subject.validation.split]
    targets = _n_targets(validation) / int(validation.byte_lengths.sum())
    comparison.exact(
        "targets of validation by byte", subject.targets_per_byte, targets, "divide tokens by bytes of UTF-8"
    )
    _new_tokens(subject, stores["train"], comparison)
    _training(subject, stores["train"], comparison, draw)
    _validation(subject, validation, comparison, draw)


def _same_index(subject: GuardSubject, stored: Stored, comparison: Comparison) -> None:
    """Compare what the index says of the ids with the tokenizer."""
    comparison.exact(f"format of the token store {stored.folder.name}", stored.index["format"], FORMAT, INDEX)
    keys = ("vocab_size", "pad_id", "dtype", "tokenizer")
    size, pad = subject.tokenizer.vocab_size, subject.tokenizer.pad_id
    right = size, pad, "<u2" if size <= 2**16 else "<u4", subject.tokenizer.fingerprint
    comparison.exact(f"{keys} of the token store", tuple(stored.index[key] for key in keys), right, INDEX)


def _same_tables(store: object, stored: Stored, comparison: Comparison) -> None:
    counts = {
        "tokens": int(stored.offsets[-1]),
        "documents": len(stored),
        "bytes": int(stored.byte_lengths.sum()),
    }
    own = {key: counts[key] for key in stored.counted}
    comparison.exact(f"index of {stored.split}", stored.counted, own, "its tables say otherwise")
    for name, expected in (
        ("n_documents", len(stored)),
        ("n_tokens", int(stored.lengths.sum())),
        ("n_bytes", int(stored.byte_lengths.sum())),
        ("n_targets", _n_targets(stored)),
    ):
        remedy = "the store's tables say otherwise"
        comparison.exact(f"{name} of {stored.split}", getattr(store, name), expected, remedy)


def _n_targets(stored: Stored) -> int:
    """Return the tokens of a split but the first of each document and those of prompts."""
    return int(np.maximum(stored.lengths - np.maximum(stored.prompts, 1), 0).sum())


def _new_tokens(subject: GuardSubject, stored: Stored, comparison: Comparison) -> None:
    """Compare how often new tokens occur in training, of which a warning is made; of a short split."""
    ids = [
        id
        for token in subject.config.lora.new_tokens
        if (id := subject.tokenizer.token_id(token)) is not None
    ]
    if not ids or int(stored.offsets[-1]) > MOST_GRADED:
        return
    counts = Counter(id for number in range(len(stored)) for id in stored.document(number))
    remedy = "count every document of training"
    comparison.exact(
        "new tokens in training", subject.train.occurrences(ids), [counts[id] for id in ids], remedy
    )


# --- training --------------------------------------------------------------------------------------


class Epoch:
    """The rows of an epoch by the reference, and their order; `numbers` is None where it is not derived."""

    def __init__(self, subject: GuardSubject, stored: Stored, number: int, version: int):
        settings = subject.config
        draw = rows.epoch_draw(settings.train.seed, number)
        kind, difficulty = settings.data.order, subject.batches.difficulty
        order = np.arange(len(stored))
        if kind == "shuffled":
            order = rows.shuffled_documents(len(stored), draw)
        elif difficulty is not None:
            order = rows.by_difficulty(difficulty, kind == "hard-first", draw)
        length = settings.row_length
        if stored.holds_examples:
            self.rows = ExampleRows(stored, order, length, settings.data.loss_on == "all")
        else:
            self.rows = PlainRows(stored, order, length)
        self.numbers = np.arange(self.rows.n_rows)
        if kind == "shuffled":
            self.numbers = rows.shuffled_rows(self.rows.n_rows, version, draw)
        elif isinstance(self.rows, ExampleRows):
            self.numbers = self.rows.in_order(order)


class Dealing:
    """How the rows of an epoch go to the micro-batches of this process, by the settings.

    Attributes:
        version: That of a new run, or of the checkpoint that the run goes on from.
        passes: Micro-batches of this process in an update.
        n_steps: Those of an epoch.
    """

    def __init__(self, subject: GuardSubject, stored: Stored):
        train, batches = subject.config.train, subject.batches
        self.version = VERSION if subject.checkpoint is None else order_version_of(subject.checkpoint)
        self.epoch = Epoch(subject, stored, 0, self.version)
        n_rows, self.rank = self.epoch.rows.n_rows, batches.rank
        self.of_update = train.batch_size * (1 if self.version == 1 else train.accumulation)
        self.own = self.of_update // batches.world_size
        self.passes = rows.passes_of_rank(self.of_update, batches.world_size, train.batch_size)
        self.n_steps = rows.updates_of_epoch(n_rows, self.of_update) * self.passes

    def numbers(self, epoch: Epoch, step: int) -> np.ndarray:
        """Return the numbers of the rows in a micro-batch of this process."""
        update, part = divmod(step, self.passes)
        size = self.own // self.passes
        return rows.dealt(epoch.numbers, update * self.of_update + self.rank * self.own + part * size, size)


def _training(
    subject: GuardSubject, stored: Stored, comparison: Comparison, draw: np.random.Generator
) -> None:
    """Compare the rows of the first two updates and of a random one, and the order of an epoch."""
    if reason := _too_much(subject, stored):
        comparison.leave_out("rows of training", reason)
        return
    _same_difficulty(subject, stored, comparison)
    dealing = Dealing(subject, stored)
    epoch, n_steps = dealing.epoch, dealing.n_steps
    found = subject.batches.version, subject.batches.steps_per_epoch
    comparison.exact(
        "version of the order, and micro-batches of an epoch",
        found,
        (dealing.version, n_steps),
        "only rows that fill no last update are left out",
    )
    first = range(min(n_steps, 2 * subject.passes, MOST_BATCHES))
    for step in [*first, int(draw.integers(n_steps)), n_steps - 1]:
        numbers = dealing.numbers(epoch, step)
        _same_batch(f"micro-batch {step}", subject.micro_batch(step), epoch.rows, numbers, comparison, draw)
    _same_order(subject, dealing, comparison, draw)
    if epoch.rows.n_rows <= MOST_COUNTED:
        following = Epoch(subject, stored, 1, dealing.version)
        numbers = dealing.numbers(following, 0)
        stage = f"micro-batch {n_steps}, the first of the second epoch"
        _same_batch(stage, subject.micro_batch(n_steps), following.rows, numbers, comparison, draw)
        subject.batches.rows_of(0)  # The rows of the first epoch are kept again.


def _too_much(subject: GuardSubject, stored: Stored) -> str:
    """Return why the order of training is not derived; "" where it is."""
    n_rows = int(stored.offsets[-1]) // subject.config.row_length
    if len(stored) + n_rows > MOST_ORDERED:
        return f"{len(stored):,} documents in {n_rows:,} rows take too long to order twice"
    if stored.holds_examples and len(stored) > MOST_PACKED:
        return f"{len(stored):,} examples take too long to pack twice"
    if subject.config.data.order == "hybrid":
        return "how data.order hybrid samples is not derived"
    return ""


def _same_difficulty(subject: GuardSubject, stored: Stored, comparison: Comparison) -> None:
    """Measure the difficulty of each document again, where the order goes by it."""
    import torch

    found, kind = subject.batches.difficulty, subject.config.data.difficulty
    if subject.config.data.order in ("shuffled", "sequential"):
        return
    if kind == "loss" or int(stored.offsets[-1]) > MOST_GRADED:
        comparison.leave_out(
            "difficulty of documents", f"{kind} of {int(stored.offsets[-1]):,} tokens takes long"
        )
        return
    expected = torch.from_numpy(rows.rarity(stored) if kind == "rarity" else rows.entropy(stored))
    given = torch.zeros(0) if found is None else torch.from_numpy(found)
    # A mean of fp64 numbers in another order differs by the rounding of its sum.
    tolerance = 1e-16 * max(16, int(stored.lengths.max()))
    comparison.close("difficulty of documents", given, expected, tolerance, f"measure {kind} of the tokens")


def _same_order(
    subject: GuardSubject, dealing: Dealing, comparison: Comparison, draw: np.random.Generator
) -> None:
    """Compare which rows each step of an epoch has: all of them, or many of a large one; count them."""
    epoch, n_steps = dealing.epoch, dealing.n_steps
    n_rows, size = epoch.rows.n_rows, dealing.own // dealing.passes
    steps = (
        range(n_steps) if n_rows <= MOST_COUNTED else draw.integers(n_steps, size=DRAWS // size + 1).tolist()
    )
    found = np.concatenate([subject.batches.rows_of(step) for step in steps])
    once = n_rows < dealing.of_update or n_rows > MOST_COUNTED or int(np.bincount(found).max()) == 1
    comparison.exact(
        "rows of an epoch, each once", once, True, "a row is trained on twice, and another never"
    )
    expected = np.concatenate([dealing.numbers(epoch, step) for step in steps])
    other = np.flatnonzero(found != expected) if len(found) == len(expected) else [0]
    place = int(other[0]) if len(other) else 0
    remedy = _order_remedy(found, subject, n_rows)
    comparison.exact(
        f"order of rows, from row {place} of an epoch on",
        found[place : place + 4].tolist(),
        expected[place : place + 4].tolist(),
        remedy,
    )


def _order_remedy(found: np.ndarray, subject: GuardSubject, n_rows: int) -> str:
    """Return what an order of rows is where it is a known one."""
    if subject.config.data.order == "shuffled" and n_rows > 8 and bool((np.diff(found) == 1).all()):
        return "rows come as they lie, and data.order is shuffled?"
    return "the rows of an epoch are ordered by PCG64([seed, epoch]), after the documents"


# --- validation ------------------------------------------------------------------------------------


def _validation(
    subject: GuardSubject, stored: Stored, comparison: Comparison, draw: np.random.Generator
) -> None:
    """Compare the rows of a validation on the way, spread evenly, and of a whole pass if it is short."""
    length, size = subject.config.row_length, subject.config.train.batch_size
    if stored.holds_examples and len(stored) > MOST_PACKED:
        comparison.leave_out("rows of validation", f"{len(stored):,} examples take too long to pack twice")
        return
    order = np.arange(len(stored))
    made = (ExampleRows if stored.holds_examples else PlainRows)(stored, order, length)
    n_batches = -(-subject.config.train.validation_rows // size)
    shown = rows.spread(made.n_rows, n_batches * size)
    _same_pass("validation", subject, n_batches, (made, shown), comparison, draw)
    if int(stored.offsets[-1]) <= WHOLE:
        whole = rows.spread(made.n_rows, 0)
        n_targets = _same_pass("a whole pass over validation", subject, 0, (made, whole), comparison, draw)
        remedy = "each token but the first of its document and prompts is a target once"
        comparison.exact("targets of a whole pass", n_targets, _n_targets(stored), remedy)


def _same_pass(
    stage: str,
    subject: GuardSubject,
    n_batches: int,
    expected: tuple[PlainRows | ExampleRows, list[int]],
    comparison: Comparison,
    draw: np.random.Generator,
) -> int:
    """Compare the batches of a pass; return how many targets they have."""
    made, shown = expected
    size = subject.config.train.batch_size
    padded = shown + [made.n_rows] * (-len(shown) % size)
    n_targets = n_rows = 0
    for number, batch in enumerate(subject.validation_batches(n_batches)):
        n_rows += len(batch.tokens)
        n_targets += int((batch.labels != rows.NO_TARGET).sum())
        numbers = padded[number * size : (number + 1) * size]
        if len(numbers) == len(batch.tokens):
            _same_batch(f"{stage}, batch {number}", batch, made, np.array(numbers), comparison, draw)
    comparison.exact(f"{stage}: rows", n_rows, len(padded), "rows are left out or doubled")
    return n_targets


# --- one batch -------------------------------------------------------------------------------------


def _same_batch(
    stage: str,
    batch: Batch,
    made: PlainRows | ExampleRows,
    numbers: np.ndarray,
    comparison: Comparison,
    draw: np.random.Generator,
) -> None:
    """Compare the rows of a batch, or of a large one some that are sampled, token by token."""
    size, length = batch.tokens.shape
    shape = (len(numbers), made.length)
    comparison.exact(
        f"{stage}: rows and their tokens", (size, length), shape, "look at batch_size and row_length"
    )
    most = max(1, MOST_TOKENS // length)
    chosen = range(size) if size <= most else sorted(draw.permutation(size)[:most].tolist())
    for place in chosen:
        expected = made.filled(int(numbers[place]))
        found = Row(*(part[place].tolist() for part in batch))
        for what, ours, theirs in zip(REMEDIES, expected, found, strict=True):
            if ours != theirs:
                _raise(f"{stage}, row {place}: {what}", what, theirs, expected, comparison)
    comparison.exact(stage, True, True, "")


def _raise(stage: str, what: str, found: list[int], row: Row, comparison: Comparison) -> None:
    expected = row[list(REMEDIES).index(what)]
    known: dict[str, Callable[[], list[int]]] = {
        "labels are the tokens themselves, not the next ones": lambda: row.tokens,
        "prompts and the first tokens of documents are targets": lambda: [*row.tokens[1:], found[-1]],
        "positions do not begin anew at each document": lambda: list(range(len(expected))),
        "all documents of a row are one": lambda: [min(number, 0) for number in row.documents],
    }
    remedy = next((f"{meaning}?" for meaning, make in known.items() if found == make()), REMEDIES[what])
    place = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    stage = f"{stage} from {place} on"
    comparison.exact(stage, found[place : place + 4], expected[place : place + 4], remedy)
