"""Rows of tokens, batches of rows, and the labels of a batch.

    documents = RunDocuments(config.data)  # reads nothing yet
    tokenizer = prepare_tokenizer(documents, config.tokenizer)  # trains it, or reuses the cache
    prepared = prepare_data(documents, tokenizer)  # tokenises, or reuses the cache
    batches = Batches(prepared.train, batch_size=16, block_size=256, seed=0)
    tokens, labels, document_ids, positions = batches.batch(step)

data/prepare.py makes the tokenizer and the token store. Plain texts are laid end to end and cut into rows;
examples stand in rows with their whole completion and as much of their prompt as fits (data/packing.py), and
the tokens of their completions are targets, or all of their tokens. Which rows an update reads is a pure
function of the seed and the update's number: the whole position of a run is that integer, and processes that
share the rows (training/distributed.py) need not tell each other who reads what.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from data.bijection import KEYS, Bijection
from data.curriculum import order_of
from data.packing import (
    GAPS_SEEN,
    ROW_STEP,
    Shown,
    as_shown,
    best_fit,
    fitting_row,
    gaps_in_sight,
    is_trimmed,
    refuse_long_answers,
    shown,
)
from data.prepare import PreparedData, opened_data, prepare_data, prepare_tokenizer, stored_data
from data.tokenstore import TokenStore

__all__ = [
    "GAPS_SEEN",
    "IGNORE_INDEX",
    "ROW_STEP",
    "Batch",
    "Batches",
    "PreparedData",
    "Shown",
    "as_shown",
    "best_fit",
    "fitting_row",
    "gaps_in_sight",
    "is_trimmed",
    "micro_batches_of",
    "next_token_labels",
    "numbered_batches",
    "opened_data",
    "prepare_data",
    "prepare_tokenizer",
    "refuse_long_answers",
    "shown",
    "stored_data",
    "validation_batches",
]

# How rows are dealt to updates. 1: a permutation in memory, dealt by micro-batch, so that an update may begin
# in one epoch and end in the next; runs that were begun so end so. 2: a bijection, dealt by update.
ORDER_VERSION = 2
IGNORE_INDEX = -100  # the label of a token that is no target, as in torch.nn.functional.cross_entropy


class Batch(NamedTuple):
    """Rows of packed documents, each (B, T) int64.

    tokens: Token ids; padding is `pad_id`, or 0 where the tokenizer has none.
    labels: The next token where it belongs to the same document, else `IGNORE_INDEX`.
    document_ids: Documents of a row numbered from 0; -1 for padding. Attention stays inside equal ids.
    positions: Count from 0 at each document, and at the start of a row that begins inside one; 0 for padding.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    document_ids: torch.Tensor
    positions: torch.Tensor


def next_token_labels(
    tokens: np.ndarray, document_ids: np.ndarray, is_prompt: np.ndarray | None = None
) -> np.ndarray:
    """Return labels (B, T) for tokens and document ids (B, T + 1); no other code makes labels.

    A label is the next token, or `IGNORE_INDEX` where that is padding, belongs to another document, or is
    part of a prompt by `is_prompt`, (B, T + 1). So the last token of a prompt predicts the first of its
    completion.
    """
    is_target = (document_ids[:, 1:] == document_ids[:, :-1]) & (document_ids[:, 1:] >= 0)
    if is_prompt is not None:
        is_target &= ~is_prompt[:, 1:]
    return np.where(is_target, tokens[:, 1:], IGNORE_INDEX)


def _counted(lengths: np.ndarray) -> np.ndarray:
    """Count 0, 1, ... in each of the pieces of these lengths, laid end to end."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


class _Pieces(NamedTuple):
    """Pieces of documents that fill a batch; all arrays but `per_row` have one entry a piece.

    per_row: (B,) the number of pieces in each row.
    start: Where a piece begins in its row of T + 1.
    source: Where it begins in the store.
    length: Its tokens.
    prompt_length: How many of them are a prompt, whose tokens are no targets; None where all are targets.
    left_out: Pairs (place in the piece, how many tokens of the store are left out there).
    """

    per_row: np.ndarray
    start: np.ndarray
    source: np.ndarray
    length: np.ndarray
    prompt_length: np.ndarray | None = None
    left_out: tuple[tuple[np.ndarray, np.ndarray], ...] = ()


def _filled(store: TokenStore, block_size: int, pieces: _Pieces) -> Batch:
    """Gather the tokens of `pieces` into a batch of rows of `block_size` = T tokens."""
    per_row, start, source, length, prompt_length, left_out = pieces
    B, T = len(per_row), block_size
    row = np.repeat(np.arange(B), per_row)
    number, position = _counted(per_row), _counted(length)
    place = np.repeat(row * (T + 1) + start, length) + position

    tokens = np.full(B * (T + 1), store.pad_id or 0)
    document_ids = np.full(B * (T + 1), -1)
    positions = np.zeros(B * (T + 1), np.int64)
    where = np.repeat(source, length) + position
    for at, skipped in left_out:
        where += np.where(position >= np.repeat(at, length), np.repeat(skipped, length), 0)
    tokens[place] = store.gather(where)
    document_ids[place] = np.repeat(number, length)
    positions[place] = position
    tokens, document_ids, positions = (a.reshape(B, T + 1) for a in (tokens, document_ids, positions))
    is_prompt = None
    if prompt_length is not None:
        is_prompt = np.zeros(B * (T + 1), bool)
        is_prompt[place] = position < np.repeat(prompt_length, length)
        is_prompt = is_prompt.reshape(B, T + 1)
    labels = next_token_labels(tokens, document_ids, is_prompt)
    arrays = (tokens[:, :-1], labels, document_ids[:, :-1], positions[:, :-1])
    return Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


class _Rows:
    """The documents of a store in a given order, laid end to end and cut into rows of T + 1 tokens.

    Row r holds the tokens rT to rT + T, so rows share one token and each token is a target in one row only.
    The last row may be short.
    """

    def __init__(self, store: TokenStore, order: np.ndarray, block_size: int):
        if block_size < 1 or store.n_tokens < 2:
            raise ValueError(
                f"rows of {block_size} tokens cannot be cut from the {store.n_tokens} of the {store.split} "
                "store: both a row and a store need a token and its next one"
            )
        self.store, self.block_size = store, block_size
        self.source = store.offsets[order]  # (documents,) start of each in the store
        self.begin = np.concatenate(([0], np.cumsum(np.diff(store.offsets)[order])))  # (documents + 1,)
        self.n_rows = -(-(store.n_tokens - 1) // block_size)

    def in_document_order(self, order: np.ndarray) -> np.ndarray:
        """Return the numbers of the rows, (n_rows,), in the order of their documents, which is their own."""
        return np.arange(self.n_rows)

    def first_documents(self, rows: np.ndarray) -> np.ndarray:
        """Return the place in the order of each row's document 0, (B,)."""
        return np.searchsorted(self.begin, rows * self.block_size, "right") - 1

    def batch(self, rows: np.ndarray) -> Batch:
        """Return rows by number, (B,), which may repeat; numbers from `n_rows` on give rows of padding."""
        T = self.block_size
        start = rows * T
        stop = np.minimum(start + T + 1, self.store.n_tokens)
        first = np.searchsorted(self.begin, start, "right") - 1
        last = np.searchsorted(self.begin, stop - 1, "right") - 1
        count = np.where(rows < self.n_rows, last - first + 1, 0)
        # One entry for each piece of a document in a row.
        document = np.repeat(first, count) + _counted(count)
        row_start, row_stop = np.repeat(start, count), np.repeat(stop, count)
        begin = np.maximum(self.begin[document], row_start)
        length = np.minimum(self.begin[document + 1], row_stop) - begin
        source = self.source[document] + begin - self.begin[document]
        return _filled(self.store, T, _Pieces(count, begin - row_start, source, length))


class _ExampleRows:
    """The examples of a store in rows of T + 1 tokens, several to a row, each trimmed by `shown`.

    Lengths alone decide which lengths share a row; `order` decides among examples of equal length. So every
    order makes the same number of rows, and every epoch has the same number of steps.
    """

    def __init__(self, store: TokenStore, order: np.ndarray, block_size: int, loss_on_prompts: bool = False):
        self.store, self.block_size, self.loss_on_prompts = store, block_size, loss_on_prompts
        self.shown = shown(store, block_size)
        lengths = self.shown.length
        order = order[np.argsort(-lengths[order], kind="stable")]
        row, start = best_fit(lengths[order], block_size + 1)
        by_row = np.argsort(row, kind="stable")
        self.documents, self.start = order[by_row], start[by_row]
        self.count = np.bincount(row)
        self.n_rows = len(self.count)
        self.first = np.cumsum(self.count) - self.count

    def first_documents(self, rows: np.ndarray) -> np.ndarray:
        """Return the place in `documents` of each row's document 0, (B,)."""
        return self.first[np.minimum(rows, self.n_rows - 1)]

    def batch(self, rows: np.ndarray) -> Batch:
        """Return rows by number, (B,), which may repeat; numbers from `n_rows` on give rows of padding."""
        known = np.minimum(rows, self.n_rows - 1)
        count = np.where(rows < self.n_rows, self.count[known], 0)
        piece = np.repeat(self.first[known], count) + _counted(count)
        document = self.documents[piece]
        example = Shown(*(part[document] for part in self.shown))
        pieces = _Pieces(
            count,
            self.start[piece],
            self.store.offsets[document],
            example.length,
            None if self.loss_on_prompts else example.prompt_length,
            ((example.left_place, example.left), (example.right_place, example.right)),
        )
        return _filled(self.store, self.block_size, pieces)

    def in_document_order(self, order: np.ndarray) -> np.ndarray:
        """Return the numbers of the rows, (n_rows,), by the mean place of their documents in `order`."""
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        return np.argsort(np.add.reduceat(place[self.documents], self.first) / self.count, kind="stable")


def _rows_of(
    store: TokenStore, order: np.ndarray, block_size: int, loss_on_prompts: bool = False
) -> _Rows | _ExampleRows:
    if store.holds_examples:
        return _ExampleRows(store, order, block_size, loss_on_prompts)
    return _Rows(store, order, block_size)


def micro_batches_of(batch_size: int, accumulation: int, world_size: int) -> int:
    """Return into how many micro-batches each rank divides its rows of an update: the fewest that are equal.

    Args:
        batch_size: The most rows of a micro-batch.
        accumulation: With `batch_size` it gives the rows of an update, which all ranks share.
        world_size: The number of ranks.

    Raises:
        ValueError: The rows cannot be shared evenly.
    """
    rows = batch_size * accumulation
    if rows % world_size:
        raise ValueError(
            f"an update has {rows} rows (batch_size {batch_size} x accumulation {accumulation}), which "
            f"{world_size} processes cannot share evenly; take a multiple of {world_size}"
        )
    own = rows // world_size
    return next(n for n in range(1, own + 1) if own % n == 0 and own // n <= batch_size)


class Batches:
    """The training batches of one rank; `batch(number)` depends on nothing but the arguments.

    Every epoch shuffles the documents, makes rows of them, and deals the rows, shuffled too, to updates; if
    `order` is not `shuffled`, the rows follow the order of their documents. In an epoch each token is a
    target exactly once, but for the first of each document, for prompts unless `loss_on_prompts`, and for the
    rows that do not fill a last update. A store with fewer rows than one update repeats them to fill it, and
    an epoch is then one update.

    An update has `batch_size * accumulation` rows, however many ranks share them. Each rank reads a range of
    them, in as few equal micro-batches as `batch_size` allows (`micro_batches_of`); of one rank that is
    `accumulation` micro-batches of `batch_size` rows.

    The generator of an epoch is numpy's PCG64, seeded by [seed, epoch]. It draws a permutation of the
    documents, and then the keys of the order of rows (data/bijection.py). Other orders keep the rows as they
    are; those of examples go by the mean place of their documents.

    There are ten arguments, because an update's rows depend on each of them and each is a setting of its own.

    Args:
        store: The documents or examples.
        batch_size: Rows of a micro-batch, at most.
        block_size: Tokens of a row.
        seed: Seed of the shuffling.
        rank: This process, of `world_size`.
        world_size: Processes that train together.
        loss_on_prompts: Prompts of examples are targets too.
        order: `order` of DataConfig.
        difficulty: (n_documents,), for an `order` that goes by difficulty.
        accumulation: Micro-batches of an update, where one process reads them all.

    Attributes:
        per_update: The micro-batches of this rank in an update.
        steps_per_epoch: The micro-batches of this rank in an epoch.
        version: See ORDER_VERSION.

    Raises:
        ValueError: a size below 1, a rank outside the world, rows that the ranks cannot share evenly, a store
            of less than two tokens, or an example whose completion does not fit a row.
    """

    def __init__(
        self,
        store: TokenStore,
        batch_size: int,
        block_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        loss_on_prompts: bool = False,
        order: str = "shuffled",
        difficulty: np.ndarray | None = None,
        accumulation: int = 1,
    ):
        if min(batch_size, accumulation) < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size}, accumulation {accumulation}, rank {rank}, world_size "
                f"{world_size}: a batch needs a row, and a rank lies between 0 and world_size - 1"
            )
        self.store, self.batch_size, self.block_size, self.seed = store, batch_size, block_size, seed
        self.rank, self.world_size, self.loss_on_prompts = rank, world_size, loss_on_prompts
        self.order, self.difficulty, self.accumulation = order, difficulty, accumulation
        self.version = ORDER_VERSION
        self._begin()

    def _begin(self) -> None:
        """Make the rows of the first epoch, and what is counted by them."""
        self.per_update = micro_batches_of(self.batch_size, self.accumulation, self.world_size)
        self.rows_per_update = self.batch_size * self.accumulation
        self._epoch = 0
        self._rows, self._order = self._arranged(0)
        if self.version == 1:
            self.steps_per_epoch = max(1, self._rows.n_rows // self.batch_size)
        else:
            self.steps_per_epoch = max(1, self._rows.n_rows // self.rows_per_update) * self.per_update

    def altered(self, **attributes: Any) -> Batches:
        """Return batches that differ by some attributes, such as `order`.

        Raises:
            ValueError: The older order of rows is asked for by one of several ranks.
        """
        other = copy.copy(self)
        vars(other).update(attributes)
        if other.version == 1 and other.world_size > 1:
            raise ValueError(
                f"the run was begun when one process read all rows of an update, and is to go on with "
                f"{other.world_size}; go on with 1"
            )
        other._begin()
        return other

    def _arranged(self, epoch: int) -> tuple[_Rows | _ExampleRows, np.ndarray | Bijection]:
        # PCG64 by name: numpy may change the generator behind `default_rng`.
        draw = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        order = np.arange(self.store.n_documents)
        if self.difficulty is not None:
            order = order_of(self.difficulty, self.order, draw)
        elif self.order == "shuffled":
            order = draw.permutation(self.store.n_documents)
        rows = _rows_of(self.store, order, self.block_size, self.loss_on_prompts)
        if self.order != "shuffled":
            return rows, rows.in_document_order(order)
        if self.version == 1:
            return rows, draw.permutation(rows.n_rows)
        return rows, Bijection(rows.n_rows, draw.bit_generator.random_raw(KEYS))  # pyright: ignore

    def epoch(self, updates: int) -> float:
        """Return how many passes over the data so many updates make."""
        return updates * self.per_update / self.steps_per_epoch

    def first_row(self, number: int) -> int:
        """Return the place, among the rows of its update, of the first row of a micro-batch of this rank."""
        own = self.rows_per_update // self.world_size
        return self.rank * own + number % self.per_update * (own // self.per_update)

    def batch(self, number: int) -> Batch:
        """Return a micro-batch of this rank, counted from 0 over all epochs."""
        numbers = self.rows_of(number)  # It makes the rows of the batch's epoch.
        return self._rows.batch(numbers)

    def rows_of(self, number: int) -> np.ndarray:
        """Return the numbers of the rows in a micro-batch of this rank, (B,), in their epoch."""
        epoch, step = divmod(number, self.steps_per_epoch)
        if self.version == 1:
            first, size = step * self.batch_size, self.batch_size
        else:
            first = step // self.per_update * self.rows_per_update + self.first_row(step)
            size = self.rows_per_update // self.world_size // self.per_update
        return self._dealt(epoch, first + np.arange(size))

    def whole(self, update: int) -> Batch:
        """Return the rows of an update that all ranks read together."""
        epoch, step = divmod(update, self.steps_per_epoch // self.per_update)
        first = step * self.rows_per_update
        numbers = self._dealt(epoch, first + np.arange(self.rows_per_update))
        return self._rows.batch(numbers)

    def _dealt(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Return the numbers of the rows at places of an epoch's order, whose rows are made."""
        if epoch != self._epoch:
            self._rows, self._order = self._arranged(epoch)
            self._epoch = epoch
        return self._order[places % len(self._order)]


def validation_batches(
    store: TokenStore,
    batch_size: int,
    block_size: int,
    limit: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Return the batches of one pass in order, or of `limit` of its rows, spread evenly; no others are made.

    Of n rows, row number floor(i * n / limit) is the i-th that is shown. Of several processes each gets every
    `world_size`-th batch, from that of its rank on.
    In a whole pass each token is a target exactly once, but for the first of its document and prompts. The
    end of a row and the missing rows of the last batch are padding with `IGNORE_INDEX` labels, so all batches
    have one shape. Which rows are shown does not depend on how many share a batch.

    Raises:
        ValueError: a size below 1, a store of less than two tokens, or an example whose completion does not
            fit a row.
    """
    if batch_size < 1 or limit < 0:
        raise ValueError(
            f"a validation of {limit} rows in batches of {batch_size}: a batch needs at least 1 row, and 0 "
            "rows means all"
        )
    return (batch for batch, _ in numbered_batches(store, batch_size, block_size, limit, rank, world_size))


def numbered_batches(
    store: TokenStore,
    batch_size: int,
    block_size: int,
    limit: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield `validation_batches`, each with the number (B, T) of each token's document in the store.

    The numbers of padding mean nothing; labels tell which tokens are padding.
    """
    rows = _rows_of(store, np.arange(store.n_documents), block_size)
    order = rows.documents if isinstance(rows, _ExampleRows) else np.arange(store.n_documents)
    n_shown = min(limit, rows.n_rows) or rows.n_rows
    numbers = np.arange(n_shown) * rows.n_rows // n_shown
    missing = np.full(-n_shown % batch_size, rows.n_rows)
    for chosen in np.concatenate((numbers, missing)).reshape(-1, batch_size)[rank::world_size]:
        batch = rows.batch(chosen)
        place = rows.first_documents(chosen)[:, None] + batch.document_ids.numpy()
        yield batch, order[np.clip(place, 0, len(order) - 1)]
