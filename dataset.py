"""Documents -> token store -> batches whose labels have one owner.

    prepared = prepare_data(config, tokenizer)  # reads, splits and tokenises, or reuses the cache
    batches = Batches(prepared.train, batch_size=16, block_size=256, seed=0)
    tokens, labels, document_ids, positions = batches.batch(step)

The two sides of the split (corpus.py) are tokenised into memory-mapped shards, in a folder
named after the content of the data, the tokenizer and the settings, so data that changed cannot meet an old
store. The order of training is a pure function of (seed, epoch, step, rank, world size): the
whole position of a run is the integer `step`.

Nothing here imports torch until the first batch: worker processes import this module to tokenise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import sys
import uuid
import warnings
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from io import BufferedRandom
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from config import DataConfig
from corpus import SPLITS, Document, Report, split_documents, utf8

if TYPE_CHECKING:
    import torch

    from tokenizer import Tokenizer

IGNORE_INDEX = -100
FORMAT = 1  # part of the cache key: raise it whenever the same data would be stored as other bytes
SHARD_TOKENS = 2**27
CHUNK_CHARACTERS = 2**18  # of text handed to a worker at a time
# Starting the processes takes 0.3 to 0.5 s. At 3 MB/s a core two of them are ahead from about 4 MB on.
POOL_PAYS_BYTES = 4_000_000


# ---------------------------------------------------------------------------------------------
# Token store: index.json, shards train-00000.bin, and a table of starts, byte lengths and names a split


class TokenStore:
    """The tokens of one split, memory-mapped. Pickles as its place on the disk; maps open at first use.

    The tokens are one virtual stream, the concatenation of the shards; a document never straddles two.

    Attributes:
        n_tokens, n_documents, n_bytes: Totals; `n_bytes` counts the UTF-8 bytes of the texts.
        offsets: (n_documents + 1,) int64, where each document starts in the stream, and its end.
        byte_lengths: (n_documents,) int64, UTF-8 bytes of each document.
        vocab_size, pad_id: Of the tokenizer that made it.
        tokenizer_fingerprint, fingerprint: Of the tokenizer, and of the data.

    Raises:
        ValueError: the folder holds no store of this format, or a file is missing or cut.
    """

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder), split
        try:
            index = json.loads((self.folder / "index.json").read_text("utf-8"))
            if index["format"] != FORMAT:
                raise ValueError(f"the store has format {index['format']}, and this program reads {FORMAT}")
            self._files: list[dict[str, Any]] = index["splits"][split]["files"]
            for file in self._files:
                size = (self.folder / file["name"]).stat().st_size
                if size != file["size"]:
                    raise ValueError(f"{file['name']} has {size} bytes of {file['size']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{folder} is not a whole token store ({problem}): build it again") from error
        self.dtype = np.dtype(index["dtype"])
        self.vocab_size: int = index["vocab_size"]
        self.pad_id: int | None = index["pad_id"]
        self.tokenizer_fingerprint: str = index["tokenizer"]
        self.fingerprint: str = index["data"]
        self.offsets: np.ndarray = np.load(self.folder / f"{split}-offsets.npy")
        self.byte_lengths: np.ndarray = np.load(self.folder / f"{split}-bytes.npy")
        self.n_tokens, self.n_documents = int(self.offsets[-1]), len(self.byte_lengths)
        self.n_bytes = int(self.byte_lengths.sum())

    def __reduce__(self):  # a numpy memmap would pickle as all of its data
        return TokenStore, (self.folder, self.split)

    def verify(self) -> None:
        """Read every file and compare its SHA-256. Raises ValueError naming the first that differs."""
        for file in self._files:
            with open(self.folder / file["name"], "rb") as data:
                if hashlib.file_digest(data, "sha256").hexdigest() != file["sha256"]:
                    raise ValueError(f"{self.folder / file['name']} was changed on the disk: build it again")

    @cached_property
    def names(self) -> list[str]:
        with open(self.folder / f"{self.split}-names.jsonl", "rb") as lines:
            return [json.loads(line) for line in lines]

    @cached_property
    def _shards(self) -> tuple[list[np.ndarray], np.ndarray]:
        paths = [self.folder / file["name"] for file in self._files if file["name"].endswith(".bin")]
        # Plain arrays over the maps: indexing np.memmap itself pays for its subclass at every call.
        maps = [np.asarray(np.memmap(path, self.dtype, "r")) for path in paths]
        return maps, np.cumsum([0, *map(len, maps)])

    def gather(self, where: np.ndarray) -> np.ndarray:
        """Tokens at places (N,) of the stream, as int64 (N,)."""
        maps, starts = self._shards
        if len(maps) == 1:
            return maps[0][where].astype(np.int64)
        shard = np.searchsorted(starts, where, "right") - 1
        tokens = np.empty(len(where), np.int64)
        for number in np.unique(shard):
            chosen = shard == number
            tokens[chosen] = maps[number][where[chosen] - starts[number]]
        return tokens

    def document(self, number: int) -> np.ndarray:
        """Tokens of one document, special tokens included, int64."""
        return self.gather(np.arange(self.offsets[number], self.offsets[number + 1]))


def open_store(folder: str | Path) -> tuple[TokenStore, TokenStore]:
    """The train and the validation store of a folder. Raises ValueError when it is not whole."""
    return TokenStore(folder, "train"), TokenStore(folder, "validation")


class _SplitWriter:
    """Writes the files of one split; `files` lists name, size and SHA-256 of each one finished."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.offsets, self.byte_lengths = array("q", [0]), array("q")
        self.files: list[dict[str, Any]] = []
        self.shard: BufferedRandom | None = None
        self.names: BufferedRandom = open(folder / f"{split}-names.jsonl", "w+b")  # noqa: SIM115

    def add(self, document: Document, tokens: np.ndarray) -> None:
        if self.shard and self.shard.tell() // self.dtype.itemsize + len(tokens) > self.shard_tokens:
            self._finish(self.shard)
            self.shard = None
        if self.shard is None:
            self.shard = open(self.folder / f"{self.split}-{len(self.files):05d}.bin", "w+b")  # noqa: SIM115
        self.shard.write(tokens.data)
        self.offsets.append(self.offsets[-1] + len(tokens))
        self.byte_lengths.append(len(utf8(document.text)))
        self.names.write(json.dumps(document.name).encode() + b"\n")

    def _finish(self, file: BufferedRandom) -> None:
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.files.append({"name": Path(file.name).name, "size": size, "sha256": digest})
        file.close()

    def finish(self) -> None:
        if self.shard:
            self._finish(self.shard)
        self._finish(self.names)
        for name, values in (("offsets", self.offsets), ("bytes", self.byte_lengths)):
            with open(self.folder / f"{self.split}-{name}.npy", "w+b") as file:
                np.save(file, np.array(values, np.int64))
                self._finish(file)

    def close(self) -> None:
        for file in filter(None, (self.shard, self.names)):
            with contextlib.suppress(OSError):  # on a full disk close writes its buffer, and fails, again
                file.close()


def _encode(tokenizer: Tokenizer, documents: list[Document], dtype: np.dtype) -> list[np.ndarray]:
    """Token ids of each document between bos and eos; a tokenizer without bos starts with its eos.

    Raises:
        ValueError: an id outside the vocabulary, or text that does not come back: its bits per byte would
            mean nothing.
    """
    before = [] if tokenizer.start_id is None else [tokenizer.start_id]
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    encoded = []
    for document in documents:
        encoding = tokenizer.encode(document.text)
        ids = np.array([*before, *encoding, *after], np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
            wrong = int(ids.max()) if ids.min() >= 0 else int(ids.min())
            raise ValueError(
                f"the tokenizer gave the id {wrong} in {document.name}, outside its vocabulary of "
                f"{tokenizer.vocab_size}"
            )
        if (text := tokenizer.decode(encoding)) != document.text:
            same = len(os.path.commonprefix([text, document.text]))  # noqa: RUF071
            raise ValueError(
                f"the tokenizer loses text: {document.name} comes back different from character {same} on, "
                f"{text[same : same + 20]!r} instead of {document.text[same : same + 20]!r}; use another one"
            )
        encoded.append(ids.astype(dtype))
    return encoded


_worker_tokenizer: Tokenizer  # set in each worker process, so that it is not pickled with every chunk


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer


def _encode_in_worker(documents: list[Document], dtype: np.dtype) -> list[np.ndarray]:
    return _encode(_worker_tokenizer, documents, dtype)


@contextlib.contextmanager
def _main_hidden(tokenizer: Tokenizer) -> Iterator[None]:
    """Keep processes that start now from importing the caller's main module, as `spawn` makes them do.

    A training script would bring torch into every worker (8 MB on two cores: 6.4 s, against 2.9 s without it
    and 2.8 s in one process), and a script without an `if __name__ == "__main__":` would run again in each.
    """
    main = sys.modules["__main__"]
    if type(tokenizer).__module__ != "__main__":  # else its class can only be found there
        sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _encode_all(
    documents: Iterable[tuple[str, Document]], tokenizer: Tokenizer, workers: int, dtype: np.dtype
) -> Iterator[tuple[str, Document, np.ndarray]]:
    """Encode in order, in processes when there are several workers; only a few chunks are in memory."""
    chunks = _chunks(documents)
    if workers == 1:
        for sides, chunk in chunks:
            yield from zip(sides, chunk, _encode(tokenizer, chunk, dtype), strict=True)
        return
    # Not fork: the caller may have started torch's threads, and a forked child inherits their locks.
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (tokenizer,)) as pool:
        pending: deque = deque()
        try:
            for sides, chunk in chunks:
                with _main_hidden(tokenizer):  # submit is what starts processes
                    pending.append((sides, chunk, pool.submit(_encode_in_worker, chunk, dtype)))
                if len(pending) > 2 * workers:
                    sides, chunk, future = pending.popleft()
                    yield from zip(sides, chunk, future.result(), strict=True)
            for sides, chunk, future in pending:
                yield from zip(sides, chunk, future.result(), strict=True)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"one of {workers} tokenising processes died, perhaps for memory: try --data.workers 1"
            ) from error


def _chunks(documents: Iterable[tuple[str, Document]]) -> Iterator[tuple[list[str], list[Document]]]:
    sides: list[str] = []
    chunk: list[Document] = []
    size = 0
    for side, document in documents:
        sides.append(side)
        chunk.append(document)
        size += len(document.text)
        if size >= CHUNK_CHARACTERS:
            yield sides, chunk
            sides, chunk, size = [], [], 0
    if chunk:
        yield sides, chunk


def build_store(
    folder: str | Path,
    documents: Iterable[tuple[str, Document]],
    tokenizer: Tokenizer,
    *,
    fingerprint: str = "",
    workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    total_bytes: int | None = None,
) -> None:
    """Write (side, document) pairs as a store into a new folder; `index.json` comes last and makes it one.

    Each document is [bos] + encode(text) + [eos]; a special token the tokenizer lacks is left out. Ids take 2
    bytes for vocabularies up to 65,536 and 4 above. A shard holds at most `shard_tokens`, or one document.

    Raises:
        ValueError: the tokenizer gave an id outside its vocabulary.
        OSError: the folder exists or cannot be written, or the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    writers = {side: _SplitWriter(folder, side, dtype, shard_tokens) for side in SPLITS}
    # disable=None: silent where stderr is not a terminal.
    bar = tqdm(total=total_bytes, desc="tokenising", unit="B", unit_scale=True, disable=None, leave=False)
    try:
        with bar:
            for side, document, tokens in _encode_all(documents, tokenizer, workers, dtype):
                writers[side].add(document, tokens)
                bar.update(writers[side].byte_lengths[-1])
        for writer in writers.values():
            writer.finish()
    finally:
        for writer in writers.values():
            writer.close()
    index = {
        "format": FORMAT,
        "dtype": dtype.str,
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad_id,
        "tokenizer": tokenizer.fingerprint,
        "data": fingerprint,
        "splits": {
            side: {
                "tokens": writer.offsets[-1],
                "documents": len(writer.byte_lengths),
                "bytes": sum(writer.byte_lengths),
                "files": writer.files,
            }
            for side, writer in writers.items()
        },
    }
    with open(folder / "index.json.tmp", "w", encoding="utf-8") as file:
        json.dump(index, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.rename(folder / "index.json.tmp", folder / "index.json")


@dataclass(frozen=True)
class PreparedData:
    """Both stores, the folder they lie in, what became of every document, and the data's fingerprint."""

    train: TokenStore
    validation: TokenStore
    folder: Path
    report: Report
    fingerprint: str


def _store_key(config: DataConfig, tokenizer: Tokenizer, fingerprint: str) -> str:
    """Names a store by all that decides its bytes; where the data lies and who does the work do not."""
    settings = dataclasses.asdict(config)
    for name in ("source", "cache", "workers"):
        del settings[name]
    special = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    parts = [FORMAT, fingerprint, tokenizer.fingerprint, tokenizer.vocab_size, special, settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _opened(folder: Path, report: Report) -> PreparedData:
    train, validation = open_store(folder)
    # Without a split (validation_one_in 0, for overfitting) validation reads what was trained on.
    validation = validation if validation.n_documents else train
    return PreparedData(train, validation, folder, report, report.fingerprint)


def prepare_data(config: DataConfig, tokenizer: Tokenizer) -> PreparedData:
    """Read, split and tokenise the corpus into a store under `config.cache`, or reuse the one that is there.

    The corpus is read twice: once for the key, which covers every byte, and once to tokenise it. A store that
    is reused has its SHA-256 compared first; one that is damaged is built again, with a warning. Builders
    that run at once each write a folder of their own, and the first to finish gives its to all.

    Raises:
        ValueError: as `split_documents` and `build_store`; or the corpus changed while it was read.
        OSError: the cache cannot be written, or the disk is full; nothing half-written stays.
    """
    if tokenizer.start_id is None:  # the first bytes of each document would count and never be predicted
        raise ValueError("the tokenizer has neither bos nor eos; name one in its tokenizer_config.json")
    report = Report()
    with tqdm(desc="reading", unit=" documents", disable=None, leave=False) as bar:
        for _ in split_documents(config, report):
            bar.update()
    target = Path(config.cache) / f"tokens-{_store_key(config, tokenizer, report.fingerprint)[:24]}"
    if target.exists():
        try:
            prepared = _opened(target, report)
            prepared.train.verify()
            prepared.validation.verify()
            return prepared
        except ValueError as error:
            warnings.warn(f"{error}; doing so now", stacklevel=2)
            shutil.rmtree(target)
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
    return _opened(target, report)


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


def next_token_labels(tokens: np.ndarray, document_ids: np.ndarray) -> np.ndarray:
    """The one place where labels are made: (B, T + 1) tokens and document ids -> (B, T) labels.

    A label is the next token, or `IGNORE_INDEX` where that is padding or belongs to another document.
    """
    same = (document_ids[:, 1:] == document_ids[:, :-1]) & (document_ids[:, 1:] >= 0)
    return np.where(same, tokens[:, 1:], IGNORE_INDEX)


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

    def batch(self, rows: np.ndarray) -> Batch:
        """Rows (B,) by number, which may repeat; numbers from `n_rows` on give rows of padding."""
        import torch

        B, T = len(rows), self.block_size
        start = rows * T
        stop = np.minimum(start + T + 1, self.store.n_tokens)
        first = np.searchsorted(self.begin, start, "right") - 1
        last = np.searchsorted(self.begin, stop - 1, "right") - 1
        count = np.where(rows < self.n_rows, last - first + 1, 0)
        # One entry for each piece of a document in a row, then one for each token of a piece.
        row = np.repeat(np.arange(B), count)
        number = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        document = first[row] + number
        begin = np.maximum(self.begin[document], start[row])
        length = np.minimum(self.begin[document + 1], stop[row]) - begin
        position = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        source = np.repeat(self.source[document] + begin - self.begin[document], length) + position
        place = np.repeat(row * (T + 1) + begin - start[row], length) + position

        tokens = np.full(B * (T + 1), self.store.pad_id or 0)
        document_ids = np.full(B * (T + 1), -1)
        positions = np.zeros(B * (T + 1), np.int64)
        tokens[place] = self.store.gather(source)
        document_ids[place] = np.repeat(number, length)
        positions[place] = position
        tokens, document_ids, positions = (a.reshape(B, T + 1) for a in (tokens, document_ids, positions))
        labels = next_token_labels(tokens, document_ids)
        shown = (tokens[:, :-1], labels, document_ids[:, :-1], positions[:, :-1])
        return Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in shown))


class Batches:
    """The training batches of one rank; `batch(step)` depends on nothing but its arguments and the settings.

    Every epoch draws a new order of the documents, lays them end to end, cuts them into rows and deals the
    rows, in a drawn order, to (step, rank, row of the batch). In an epoch each token is a target exactly
    once, but for the first of each document, and for the rows that do not fill a last global batch of
    `batch_size * world_size`. A store with fewer rows than one global batch repeats them to fill it, and an
    epoch is then one step. Ranks together hold the rows that one rank would with their summed batch size.

    Raises:
        ValueError: a size below 1, a rank outside the world, or a store of less than two tokens.
    """

    def __init__(
        self,
        store: TokenStore,
        batch_size: int,
        block_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size}, rank {rank}, world_size {world_size}: a batch needs a row, and a "
                "rank lies between 0 and world_size - 1"
            )
        self.store, self.batch_size, self.block_size, self.seed = store, batch_size, block_size, seed
        self.rank, self.world_size = rank, world_size
        self._epoch = 0
        self._rows, self._order = self._shuffled(0)
        self.steps_per_epoch = max(1, self._rows.n_rows // (batch_size * world_size))

    def _shuffled(self, epoch: int) -> tuple[_Rows, np.ndarray]:
        # PCG64 by name: numpy may change the generator behind `default_rng`.
        draw = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        rows = _Rows(self.store, draw.permutation(self.store.n_documents), self.block_size)
        return rows, draw.permutation(rows.n_rows)

    def batch(self, step: int) -> Batch:
        """The batch of a global step, counted from 0 over all epochs."""
        epoch, step = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._rows, self._order = self._shuffled(epoch)
            self._epoch = epoch
        row = (step * self.world_size + self.rank) * self.batch_size + np.arange(self.batch_size)
        return self._rows.batch(self._order[row % len(self._order)])


def validation_batches(store: TokenStore, batch_size: int, block_size: int) -> Iterator[Batch]:
    """Every batch of one pass in order. Each token but the first of its document is a target exactly once.

    The end of the last row and the missing rows of the last batch are padding with `IGNORE_INDEX` labels, so
    all batches have one shape.

    Raises:
        ValueError: a size below 1, or a store of less than two tokens.
    """
    if batch_size < 1:
        raise ValueError(f"a validation batch of {batch_size} rows: it needs at least 1")
    rows = _Rows(store, np.arange(store.n_documents), block_size)
    for start in range(0, rows.n_rows, batch_size):
        yield rows.batch(np.arange(start, start + batch_size))
