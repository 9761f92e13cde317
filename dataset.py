"""Documents -> token store -> batches whose labels have one owner.

    tokenizer = prepare_tokenizer(config.data, config.tokenizer)  # trains it, or reuses the cache
    prepared = prepare_data(config.data, tokenizer)  # reads, splits and tokenises, or reuses the cache
    batches = Batches(prepared.train, batch_size=16, block_size=256, seed=0)
    tokens, labels, document_ids, positions = batches.batch(step)

The splits (data/corpus.py) are tokenised into a store (data/tokenstore.py), in a folder
named after the content of the data, the tokenizer and the settings, so data that changed cannot meet an old
store. Plain texts are laid end to end and cut into rows; examples stand in them with their whole completion
and as much of their prompt as fits, and bear loss on their completions, or on all. The order of training is a
pure function of (seed, epoch, step, rank, world size): the whole position of a run is the integer `step`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import shutil
import uuid
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from config import DataConfig, TokenizerConfig, say
from data.cache import InUse, discard, make_room, say_damaged, seal_folder, verify_folder
from data.corpus import split_documents, training_texts
from data.curriculum import order_of
from data.documents import Report
from data.fim import fim_kept, fim_markers, known_markers
from data.tokenstore import FORMAT, TokenStore, build_store, open_store
from tokenization import healing
from tokenizer import TRAINING_VERSION, BPETokenizer, CodeTokenizer, Tokenizer, load_tokenizer

IGNORE_INDEX = -100
# Starting the processes takes 0.3 to 0.5 s. At 3 MB/s a core two of them are ahead from about 4 MB on.
POOL_PAYS_BYTES = 4_000_000
GAPS_READ = 1000  # documents, for the share of gaps that rows show whole
ROW_STEP = 64  # tokens; a row that no setting names is a multiple of it
GAPS_SEEN = 0.5  # below this share a run warns


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
    with contextlib.suppress(OSError):  # another run made the same one meanwhile
        os.replace(temporary, folder)
    shutil.rmtree(temporary, ignore_errors=True)
    return tokenizer


def _cached_tokenizer(folder: Path) -> Tokenizer | None:
    """The trained tokenizer in a folder of the cache; None where none is, or it is damaged, which is said."""
    if not folder.is_dir():
        return None
    try:
        with InUse(folder):
            verify_folder(folder)
            return load_tokenizer(folder)
    except (OSError, ValueError) as error:
        say_damaged(folder, error)
        with contextlib.suppress(PermissionError):  # a cache that may only be read
            discard(folder)
    return None


@dataclass(frozen=True)
class PreparedData:
    """The stores, the folder they lie in, what became of every document, and the data's fingerprint.

    Without a test split `test` is `validation`; without a validation split both are `train`.
    """

    train: TokenStore
    validation: TokenStore
    test: TokenStore
    folder: Path
    report: Report
    fingerprint: str


def _store_key(config: DataConfig, tokenizer: Tokenizer, fingerprint: str, examples: bool) -> str:
    """Names a store by all that decides its bytes; where the data lies and who does the work do not."""
    settings = dataclasses.asdict(config)
    # Labels and batches are made of the last three, not tokens.
    for name in ("source", "cache", "cache_gb", "workers", "loss_on", "order", "difficulty"):
        del settings[name]
    if not (settings["heal"] and examples):  # Stores from before the setting have this key.
        del settings["heal"]
    special = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    parts = [FORMAT, fingerprint, tokenizer.fingerprint, tokenizer.vocab_size, special, settings]
    if known_markers(tokenizer) is not None and tokenizer.before(gap=True):
        parts.append("start before gaps")  # where nothing stood there once, the key is that of then
    if "heal" in settings:
        parts.append(f"healing {healing.VERSION}")
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _store_folder(config: DataConfig, tokenizer: Tokenizer, fingerprint: str, examples: bool) -> Path:
    return Path(config.cache) / f"tokens-{_store_key(config, tokenizer, fingerprint, examples)[:24]}"


def stored_data(config: DataConfig, tokenizer: Tokenizer, fingerprint: str) -> PreparedData | None:
    """The store in the cache of the data with this fingerprint, without a look at their source.

    None where there is no such store, or it is damaged. Its report has the fingerprint alone.
    """
    config, report = config.resolved(), Report(fingerprint=fingerprint)
    for examples in (False, True):  # only the source itself says what it holds
        with contextlib.suppress(ValueError):
            found = _verified(_store_folder(config, tokenizer, fingerprint, examples), tokenizer, report)
            # Plain text and examples that are not healed have one key.
            if not config.heal or found.train.holds_examples == examples:
                return found
    return None


def _verified(folder: Path, tokenizer: Tokenizer, report: Report) -> PreparedData:
    """The whole of a store, its checksums compared; ValueError if it is damaged or of something else."""
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
    if tokenizer.start_id is None:  # the first bytes of each document would count and never be predicted
        if tokenizer.with_start().start_id is not None:
            raise ValueError("the tokenizer puts nothing before a text; train with its with_start()")
        raise ValueError("the tokenizer has neither bos nor eos; name one in its tokenizer_config.json")
    if config.fim_rate:
        fim_markers(tokenizer, f"--data.fim_rate {config.fim_rate} cannot be had; leave it out")
    config = config.resolved()
    if tokenizer.heals != config.heal:
        tokenizer = copy.copy(tokenizer)  # the caller's own stays as it is
        tokenizer.heals = config.heal
    report, examples = Report(), False
    with tqdm(desc="reading", unit=" documents", disable=None, leave=False) as bar:
        for _, document in split_documents(config, report):
            examples |= document.prompt is not None
            if document.suffix is not None:
                fim_markers(tokenizer, f"{document.where} cannot be learned; give prompt and completion")
            bar.update()
    target = _store_folder(config, tokenizer, report.fingerprint, examples)
    if target.exists():
        try:
            prepared = _verified(target, tokenizer, report)
            make_room(Path(config.cache), config.cache_gb)
            return prepared
        except ValueError as error:
            say_damaged(target, error)
            discard(target)
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
    prepared = _opened(target, report)
    make_room(Path(config.cache), config.cache_gb)
    return prepared


# ---------------------------------------------------------------------------------------------
# Batches


class Batch(NamedTuple):
    """Rows of packed documents, each (B, T) int64.

    tokens: Token ids; padding is `pad_id`, or 0 where the tokenizer has none.
    labels: The next token where it belongs to the same document, else `IGNORE_INDEX`.
    document_ids: Documents of a row numbered from 0; -1 for padding. Attention stays inside equal ids.
    positions: Count from 0 at each document, and at the start of a row that begins inside one.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    document_ids: torch.Tensor
    positions: torch.Tensor


def next_token_labels(
    tokens: np.ndarray, document_ids: np.ndarray, is_prompt: np.ndarray | None = None
) -> np.ndarray:
    """The one place where labels are made: (B, T + 1) tokens and document ids -> (B, T) labels.

    A label is the next token, or `IGNORE_INDEX` where that is padding, belongs to another document, or is of
    a prompt by `is_prompt`, (B, T + 1). So the last token of a prompt predicts the first of its completion.
    """
    bears = (document_ids[:, 1:] == document_ids[:, :-1]) & (document_ids[:, 1:] >= 0)
    if is_prompt is not None:
        bears &= ~is_prompt[:, 1:]
    return np.where(bears, tokens[:, 1:], IGNORE_INDEX)


def _counted(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... in each of the pieces of these lengths, laid end to end."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _filled(
    store: TokenStore,
    block_size: int,
    count: np.ndarray,
    start: np.ndarray,
    source: np.ndarray,
    length: np.ndarray,
    prompt_length: np.ndarray | None = None,
    left_out: tuple[tuple[np.ndarray, np.ndarray], ...] = (),
) -> Batch:
    """The batch of pieces of documents, `count` (B,) in each row; the other arrays have one entry a piece.

    Args:
        store: Where the tokens are.
        block_size: T.
        count: Pieces in each row.
        start: Where a piece begins in its row of T + 1.
        source: Where it begins in the store.
        length: Its tokens.
        prompt_length: How many of them are a prompt that bears no loss.
        left_out: Pairs of a place in the piece and how many of the store's tokens are left out there.
    """
    B, T = len(count), block_size
    row = np.repeat(np.arange(B), count)
    number, position = _counted(count), _counted(length)
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
    shown = (tokens[:, :-1], labels, document_ids[:, :-1], positions[:, :-1])
    return Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in shown))


class _Rows:
    """The documents of a store in a given order, end to end, cut into rows of T tokens and the one after.

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
        self.source = store.offsets[order]  # (documents,) where each starts in the store
        self.begin = np.concatenate(([0], np.cumsum(np.diff(store.offsets)[order])))  # and in this order
        self.n_rows = -(-(store.n_tokens - 1) // block_size)

    def as_documents_go(self, order: np.ndarray) -> np.ndarray:
        """(n_rows,) the rows as the documents they were cut from go: as they are."""
        return np.arange(self.n_rows)

    def first_documents(self, rows: np.ndarray) -> np.ndarray:
        """(B,) the place in the order of each row's document 0."""
        return np.searchsorted(self.begin, rows * self.block_size, "right") - 1

    def batch(self, rows: np.ndarray) -> Batch:
        """Rows (B,) by number, which may repeat; numbers from `n_rows` on give rows of padding."""
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
        return _filled(self.store, T, count, begin - row_start, source, length)


class Shown(NamedTuple):
    """What a row shows of each example of a store, all (n_documents,) int64.

    length: Its tokens in the row.
    prompt_length: How many of them are prompt.
    left: Tokens of the prompt that are left out before `left_place`: after its start, or its first marker.
    right: Tokens that are left out before `right_place`, which counts in the row: the end of a suffix.
    """

    length: np.ndarray
    prompt_length: np.ndarray
    left: np.ndarray
    left_place: np.ndarray
    right: np.ndarray
    right_place: np.ndarray


def shown(store: TokenStore, block_size: int) -> Shown:
    """The one place that trims: an example longer than a row loses of its prompt, never of its completion.

    A row holds `block_size` + 1 of its tokens: the last is a target only. The prompt keeps its start token
    and its last tokens, id for id as `generation.text.trim_prompt` does; one with a gap keeps its markers
    and what is nearest to the gap, as `fim.trim_fim_prompt` does.

    Raises:
        ValueError: the completion of an example does not fit; see `refuse_long_answers`.
    """
    length, prompt = np.diff(store.offsets), store.prompt_lengths
    excess = np.where(is_trimmed(store, block_size), length - (block_size + 1), 0)
    is_fim = store.suffix_places > 0
    lead = np.where(is_fim, store.gap_lead, 0)
    kept = np.minimum(prompt, np.where(is_fim, 3 + lead, 1))
    if len(unfit := np.flatnonzero(prompt - excess < kept)):
        raise _LongAnswers(store, unfit, (length - prompt)[unfit], kept[unfit], block_size)
    n_prefix = store.suffix_places - 1 - lead
    n_suffix = prompt - store.suffix_places - 2
    prefix_kept, suffix_kept = fim_kept(n_prefix, n_suffix, n_prefix + n_suffix - excess)
    left = np.where(is_fim, n_prefix - prefix_kept, excess)
    right = np.where(is_fim, n_suffix - suffix_kept, 0)
    return Shown(length - excess, prompt - excess, left, lead + 1, right, prompt - excess - 1)


def fitting_row(stores: Iterable[TokenStore], most: int) -> int:
    """Tokens of a row in which the longest example is whole: a multiple of ROW_STEP, at most `most`.

    Of plain texts, which are cut into rows of any length, it is `most`.
    """
    lengths = [np.diff(store.offsets) if store.holds_examples else np.array([most + 1]) for store in stores]
    longest = max((int(of_one.max()) for of_one in lengths if len(of_one)), default=0)
    return min(most, -(-max(longest - 1, 1) // ROW_STEP) * ROW_STEP)  # the last token is a target only


def is_trimmed(store: TokenStore, block_size: int) -> np.ndarray:
    """(n_documents,) bool: the examples that lose of their prompt in a row. Plain texts are cut instead."""
    return store.holds_examples & (np.diff(store.offsets) > block_size + 1)


def gaps_in_sight(store: TokenStore, markers: tuple[int, int, int], block_size: int) -> float:
    """Share of the tokens that fill a gap of a plain document whose row shows its first marker, and so all
    three: expected over where rows are cut. 1 without gaps; of `GAPS_READ` evenly spread.
    """
    numbers = np.flatnonzero(np.diff(store.offsets))
    numbers = numbers[np.diff(store.offsets)[numbers] > store.gap_lead]
    numbers = numbers[store.gather(store.offsets[numbers] + store.gap_lead) == markers[0]]
    seen = tokens = 0
    for number in numbers[:: max(1, len(numbers) // GAPS_READ)].tolist():
        ids = store.document(number)
        places = np.arange(int(np.flatnonzero(ids == markers[2])[0]) + 1, len(ids))
        places -= store.gap_lead  # what stands before the first marker need not be seen
        # A target stands at each of a row's block_size places alike; at `place` or later it sees the marker.
        seen += np.maximum(0, 1 - (places - 1) / block_size).sum()
        tokens += len(places)
    return float(seen / tokens) if tokens else 1.0


def as_shown(store: TokenStore, number: int, rows: Shown) -> np.ndarray:
    """Tokens of one document as rows show them, int64: of an example, trimmed."""
    parts = rows.left, rows.left_place, rows.right, rows.right_place
    left, start, right, place = (int(part[number]) for part in parts)
    ids = np.delete(store.document(number), slice(start, start + left))
    return np.delete(ids, slice(place, place + right))


class _LongAnswers(ValueError):
    """Examples (n,) by number whose completion does not fit a row beside what is kept of their prompt."""

    def __init__(
        self, store: TokenStore, numbers: np.ndarray, completion: np.ndarray, kept: np.ndarray, T: int
    ):
        self.number = int(numbers[0])
        others = f", the first of {len(numbers):,}" if len(numbers) > 1 else ""
        self.problem = (
            f"has a completion of {completion[0]:,} tokens with its end{others}, and a row of {T:,} has room "
            f"for {T + 1 - kept[0]:,}: set --row_length to "
            f"{(completion + kept).max() - 1} or more (and --model.block_size, where no base brings its "
            "own), or make it shorter"
        )
        super().__init__(f"{store.names[self.number]!r} {self.problem}")


def refuse_long_answers(config: DataConfig, store: TokenStore, block_size: int) -> None:
    """ValueError in one sentence, with file and line, for an example whose completion does not fit a row.

    The file is read again to find the line, which the store does not hold: rows that were left out as
    duplicates may move without any document changing.
    """
    try:
        shown(store, block_size)
    except _LongAnswers as error:
        documents = (document for split, document in split_documents(config) if split == store.split)
        where = next(itertools.islice(documents, error.number, None)).where
        raise ValueError(f"{where} {error.problem}") from None


def best_fit(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack pieces, longest first, each into the fullest row that has room: (row, start) of each piece.

    Args:
        lengths: (pieces,) from the longest on, none above `size`.
        size: Of a row.
    """
    row, start = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    rooms: list[int] = []  # those that some row has, ascending
    rows_with: dict[int, list[int]] = defaultdict(list)  # rows by their room
    n_rows = 0
    for piece, length in enumerate(lengths.tolist()):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, chosen, n_rows = size, n_rows, n_rows + 1
        else:
            room = rooms[at]
            chosen = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[at]
        left = room - length
        if not rows_with[left]:
            insort(rooms, left)
        rows_with[left].append(chosen)
        row[piece], start[piece] = chosen, size - room
    return row, start


class _ExampleRows:
    """The examples of a store in rows of T tokens and the one after, several to a row, each `shown` in one.

    Lengths alone decide which lengths share a row; `order` decides among examples of equal length. So every
    order makes the same number of rows, and an epoch has the same number of steps.
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
        """(B,) the place in `documents` of each row's document 0."""
        return self.first[np.minimum(rows, self.n_rows - 1)]

    def batch(self, rows: np.ndarray) -> Batch:
        """Rows (B,) by number, which may repeat; numbers from `n_rows` on give rows of padding."""
        known = np.minimum(rows, self.n_rows - 1)
        count = np.where(rows < self.n_rows, self.count[known], 0)
        piece = np.repeat(self.first[known], count) + _counted(count)
        document = self.documents[piece]
        example = Shown(*(part[document] for part in self.shown))
        return _filled(
            self.store,
            self.block_size,
            count,
            self.start[piece],
            self.store.offsets[document],
            example.length,
            None if self.loss_on_prompts else example.prompt_length,
            ((example.left_place, example.left), (example.right_place, example.right)),
        )

    def as_documents_go(self, order: np.ndarray) -> np.ndarray:
        """(n_rows,) the rows by the mean place of their documents in `order`."""
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        return np.argsort(np.add.reduceat(place[self.documents], self.first) / self.count, kind="stable")


def _rows_of(
    store: TokenStore, order: np.ndarray, block_size: int, loss_on_prompts: bool = False
) -> _Rows | _ExampleRows:
    if store.holds_examples:
        return _ExampleRows(store, order, block_size, loss_on_prompts)
    return _Rows(store, order, block_size)


class Batches:
    """The training batches of one rank; `batch(step)` depends on nothing but its arguments and the settings.

    Every epoch draws a new order of the documents, makes rows of them, and deals the rows, in a drawn order,
    to (step, rank, row of the batch); if `order` is not `shuffled`, the rows go as their documents do. In an
    epoch each token is a target exactly once, but for the first of each document, for prompts unless
    `loss_on_prompts`, and for the rows that do not fill a last global batch of `batch_size * world_size`. A
    store with fewer rows than one global batch repeats them to fill it, and an epoch is then one step. Ranks
    together hold the rows that one rank would with their summed batch size.

    Raises:
        ValueError: a size below 1, a rank outside the world, a store of less than two tokens, or an example
            whose completion does not fit a row.
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
    ):
        """`order` is that of DataConfig, `difficulty` (n_documents,) for those that are by it."""
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size}, rank {rank}, world_size {world_size}: a batch needs a row, and a "
                "rank lies between 0 and world_size - 1"
            )
        self.store, self.batch_size, self.block_size, self.seed = store, batch_size, block_size, seed
        self.rank, self.world_size, self.loss_on_prompts = rank, world_size, loss_on_prompts
        self.order, self.difficulty = order, difficulty
        self._epoch = 0
        self._rows, self._order = self._arranged(0)
        self.steps_per_epoch = max(1, self._rows.n_rows // (batch_size * world_size))

    def _arranged(self, epoch: int) -> tuple[_Rows | _ExampleRows, np.ndarray]:
        # PCG64 by name: numpy may change the generator behind `default_rng`.
        draw = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        order = np.arange(self.store.n_documents)
        if self.difficulty is not None:
            order = order_of(self.difficulty, self.order, draw)
        elif self.order == "shuffled":
            order = draw.permutation(self.store.n_documents)
        rows = _rows_of(self.store, order, self.block_size, self.loss_on_prompts)
        if self.order == "shuffled":
            return rows, draw.permutation(rows.n_rows)
        return rows, rows.as_documents_go(order)

    def batch(self, step: int) -> Batch:
        """The batch of a global step, counted from 0 over all epochs."""
        epoch, step = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._rows, self._order = self._arranged(epoch)
            self._epoch = epoch
        row = (step * self.world_size + self.rank) * self.batch_size + np.arange(self.batch_size)
        return self._rows.batch(self._order[row % len(self._order)])


def validation_batches(
    store: TokenStore, batch_size: int, block_size: int, limit: int = 0
) -> Iterator[Batch]:
    """The batches of one pass in order, or of `limit` of its rows, spread evenly; others are not made.

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
    return (batch for batch, _ in numbered_batches(store, batch_size, block_size, limit))


def numbered_batches(
    store: TokenStore, batch_size: int, block_size: int, limit: int = 0
) -> Iterator[tuple[Batch, np.ndarray]]:
    """`validation_batches`, each with the numbers in the store (B, T) of its tokens' documents.

    Of padding the numbers mean nothing; its labels say what it is.
    """
    rows = _rows_of(store, np.arange(store.n_documents), block_size)
    order = rows.documents if isinstance(rows, _ExampleRows) else np.arange(store.n_documents)
    n_shown = min(limit, rows.n_rows) or rows.n_rows
    numbers = np.arange(n_shown) * rows.n_rows // n_shown
    missing = np.full(-n_shown % batch_size, rows.n_rows)
    for chosen in np.concatenate((numbers, missing)).reshape(-1, batch_size):
        batch = rows.batch(chosen)
        place = rows.first_documents(chosen)[:, None] + batch.document_ids.numpy()
        yield batch, order[np.clip(place, 0, len(order) - 1)]
