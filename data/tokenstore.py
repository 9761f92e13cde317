"""The token store: shards of ids on the disk, and for each split a table of starts, byte lengths and names.

    FOLDER/index.json, and for each split train-00000.bin ..., train-offsets.npy, train-bytes.npy,
    train-names.jsonl and, of examples only, train-prompts.npy, train-suffixes.npy and train-cuts.npy

A store is built in parallel; `index.json` comes last and makes the folder a store. It has the SHA-256 of
each file and of itself. An older index lacks its own: `refuse_other_index` compares its values. Nothing here
imports torch: worker processes import this module to tokenise.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import weakref
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property
from io import BufferedRandom, BytesIO
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from config.bars import progress_bar
from data.cache import InUse
from data.documents import SPLITS, Document, utf8
from data.fim import between_place, fim_prompt_ids
from tokenization.chat import ASSISTANT, ConversationError, Message, answered_ids
from tokenization.healing import healed
from tokenizer import Tokenizer

FORMAT = 2  # a part of the cache key: raise it when the same data would be stored as other bytes
SHARD_TOKENS = 2**27
READ_AT_ONCE = 2**22  # tokens
READ_THROUGH = 2**8  # tokens; places that are no further apart are read in one piece
CHUNK_CHARACTERS = 2**18  # text that a worker gets at a time


class _Shard:
    """A file of tokens that is open for reading.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, size: int):
        """Open a file whose size in bytes, by the store's index, is `size`."""
        self.path, self.size = path, size
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read_into(self, buffer: memoryview, place: int) -> int:
        """Read bytes from `place` on into `buffer`; return how many there are up to the end of the file.

        Raises:
            ValueError: the file has become shorter.
        """
        try:
            n = os.preadv(self._descriptor, [buffer], place)
            while n < len(buffer) and place + n < self.size:  # This is rare: one call reads at most 2 GiB.
                if not (more := os.preadv(self._descriptor, [buffer[n:]], place + n)):
                    left = os.fstat(self._descriptor).st_size
                    raise ValueError(
                        f"{self.path} was cut while it was in use: it has {left:,} bytes of {self.size:,}; "
                        "start again, or go on with a run by --resume: the store is built again"
                    )
                n += more
        except OSError as error:  # The error of a descriptor has no file name.
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        return n


class Encoded(NamedTuple):
    """A document's tokens, and its row in the tables of a store.

    ids: Token ids, special tokens included.
    prompt_length: How many of them are prompt.
    suffix_place: The place of the marker before a suffix; 0 without one.
    cut: `TokenStore.cuts` of the document.
    dropped_bytes: Bytes of the prompt's end that is written with the completion.
    """

    ids: np.ndarray
    prompt_length: int
    suffix_place: int
    cut: int
    dropped_bytes: int


class TokenStore:
    """The tokens of one split, on the disk. It pickles as its path; files of tokens open at first use.

    The tokens are one virtual stream, the concatenation of the shards; a document never straddles two.

    Attributes:
        n_tokens, n_documents, n_bytes: Totals; `n_bytes` is the sum of `byte_lengths`.
        offsets: (n_documents + 1,) int64, where each document starts in the stream, and its end.
        byte_lengths: (n_documents,) int64, UTF-8 bytes of each text. An example has those of its completion,
            and of the prompt's end that is written with it: bits per byte are over targets alone.
        holds_examples: Whether the documents are examples, each a prompt and its completion.
        prompt_lengths: (n_documents,) int64, leading tokens that are prompt, the start token included; 0 for
            plain text. The end that healing drops (tokenization/healing.py) is part of the completion.
        cuts: (n_documents,) int64, characters of the prompt of an example that is tokenised as one text; -1
            where prompt and completion are apart.
        suffix_places: (n_documents,) int64, the place of the marker between the two texts of an example
            that fills a gap; 0 for all others.
        vocab_size, pad_id: Those of the tokenizer that made the store.
        gap_lead: Tokens that stand before the first marker of a document with a gap, 0 or 1.
        suffix_first: Whether of the two texts around a gap the suffix comes first.
        holds_conversations: Whether the examples are answers, whose ids a chat template wrote.
        tokenizer_fingerprint, fingerprint: The fingerprints of the tokenizer and of the data.

    Raises:
        ValueError: the folder holds no store of this format, or a file is missing or cut, or a table changed.
    """

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder), split
        try:
            self._in_use = InUse(self.folder)
            index = _read_index(self.folder / "index.json")
            self._files: list[dict[str, Any]] = index["splits"][split]["files"]
            for file in self._files:
                size, _ = (self.folder / file["name"]).stat().st_size, file["sha256"]
                if size != file["size"]:
                    raise ValueError(f"{file['name']} has {size} bytes of {file['size']}")
            self.offsets = self._table("offsets")
            self.byte_lengths = self._table("bytes")
            self.prompt_lengths = self._table("prompts")
            self.suffix_places = self._table("suffixes")
            self.cuts = self._table("cuts", absent=-1)
            self.dtype = np.dtype(index["dtype"])
            self.vocab_size: int = index["vocab_size"]
            self.pad_id: int | None = index["pad_id"]
            self.gap_lead: int = index.get("gap_lead", 0)
            self.suffix_first: bool = index.get("suffix_first", False)
            self.holds_conversations: bool = index.get("conversations", False)
            self.tokenizer_fingerprint: str = index["tokenizer"]
            self.fingerprint: str = index["data"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{folder} is not a whole token store ({problem}): build it again") from error
        self.n_tokens, self.n_documents = int(self.offsets[-1]), len(self.byte_lengths)
        self.n_bytes = int(self.byte_lengths.sum())
        self.holds_examples = f"{split}-prompts.npy" in {file["name"] for file in self._files}

    def __reduce__(self):  # Open files do not pickle.
        return TokenStore, (self.folder, self.split)

    def _table(self, name: str, absent: int = 0) -> np.ndarray:
        """Read one of the split's arrays, int64, and compare its SHA-256; all `absent` if there is none."""
        name = f"{self.split}-{name}.npy"
        for file in self._files:
            if file["name"] == name:
                data = (self.folder / name).read_bytes()
                if hashlib.sha256(data).hexdigest() != file["sha256"]:
                    raise ValueError(f"{name} was changed on the disk")
                return np.load(BytesIO(data))
        if name.endswith(("-offsets.npy", "-bytes.npy")):
            raise KeyError(name)
        return np.full(len(self.byte_lengths), absent, np.int64)

    def refuse_other_index(self, tokenizer: Tokenizer, fingerprint: str) -> None:
        """Raise ValueError if the store is of another tokenizer or of data with another fingerprint."""
        wanted = {
            "data": fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "pad_id": tokenizer.pad_id,
            "dtype": dtype_of(tokenizer.vocab_size),
        }
        found = (self.fingerprint, self.tokenizer_fingerprint, self.vocab_size, self.pad_id, self.dtype)
        for (name, value), is_there in zip(wanted.items(), found, strict=True):
            if is_there != value:
                raise ValueError(
                    f"{self.folder / 'index.json'} says that {name} is {is_there}, and here it is {value}"
                )

    def verify(self) -> None:
        """Read every file and compare its SHA-256. Raises ValueError naming the first that differs."""
        for file in self._files:
            with open(self.folder / file["name"], "rb") as data:
                if hashlib.file_digest(data, "sha256").hexdigest() != file["sha256"]:
                    raise ValueError(f"{self.folder / file['name']} was changed on the disk: build it again")

    @property
    def n_targets(self) -> int:
        """Targets in one pass: all tokens but the first of each document and those of prompts."""
        return int(np.maximum(np.diff(self.offsets) - np.maximum(self.prompt_lengths, 1), 0).sum())

    @cached_property
    def names(self) -> list[str]:
        with open(self.folder / f"{self.split}-names.jsonl", "rb") as lines:
            return [json.loads(line) for line in lines]

    @cached_property
    def _shards(self) -> tuple[list[_Shard], np.ndarray]:
        files = [file for file in self._files if file["name"].endswith(".bin")]
        shards = [_Shard(self.folder / file["name"], file["size"]) for file in files]
        return shards, np.cumsum([0, *(shard.size // self.dtype.itemsize for shard in shards)])

    def _read(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Read the tokens of the stream from `low` to `high`, (pieces,) each, one piece after the other."""
        shards, starts = self._shards
        ends = np.cumsum(high - low)
        found = np.empty(int(ends[-1]), self.dtype)
        view, size = found.view(np.uint8).data, self.dtype.itemsize
        number = np.searchsorted(starts, low, "right") - 1
        rows = (number, (low - starts[number]) * size, (ends - high + low) * size, ends * size)
        for shard, place, begin, end in zip(*(row.tolist() for row in rows), strict=True):
            while (n := shards[shard].read_into(view[begin:end], place)) < end - begin:
                begin, place, shard = begin + n, 0, shard + 1  # The piece goes on in the next shard.
        return found

    def gather(self, where: np.ndarray) -> np.ndarray:
        """Return the tokens at places (N,) of the stream, as int64 (N,).

        They are read and not mapped: a file that is cut while it is mapped ends the process silently.

        Raises:
            ValueError: a shard is shorter than it was.
        """
        if not len(where):
            return np.empty(0, np.int64)
        step = np.diff(where)
        apart = np.flatnonzero((step < 0) | (step > READ_THROUGH))
        first, last = np.append(0, apart + 1), np.append(apart, len(where) - 1)
        low, high = where[first], where[last] + 1
        found = self._read(low, high)
        # Places that repeat, or tokens between places that were read too
        if np.count_nonzero(step != 1) > len(apart):
            lengths = high - low
            found = found[where - np.repeat(low - np.cumsum(lengths) + lengths, last - first + 1)]
        return found.astype(np.int64)

    def occurrences(self, ids: Sequence[int]) -> list[int]:
        """Count each of some ids, at least one, in a pass over the stream; the last ids cost the least."""
        low = min(ids)
        counts = np.zeros(self.vocab_size - low, np.int64)
        for start in range(0, self.n_tokens, READ_AT_ONCE):
            stop = min(start + READ_AT_ONCE, self.n_tokens)
            part = self._read(np.array([start]), np.array([stop]))
            counts += np.bincount(part[part >= low] - low, minlength=len(counts))
        return [int(counts[id - low]) for id in ids]

    def document(self, number: int) -> np.ndarray:
        """Return the tokens of one document, special tokens included, int64."""
        return self.gather(np.arange(self.offsets[number], self.offsets[number + 1]))


def dtype_of(vocab_size: int) -> np.dtype:
    """Return the type of ids on the disk."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


# The keys of an older index, which has no checksum of itself.
INDEX_KEYS = {"format", "dtype", "vocab_size", "pad_id", "gap_lead", "tokenizer", "data", "splits"}


def _read_index(path: Path) -> dict[str, Any]:
    index = json.loads(path.read_text("utf-8"))
    if index["format"] != FORMAT:
        raise ValueError(f"the store has format {index['format']}, and this program reads {FORMAT}")
    own = index.pop("sha256", None)
    without = own is None and set(index) <= INDEX_KEYS  # An older index has no checksum.
    if not without and own != _index_sha256(index):
        raise ValueError("index.json was changed on the disk")
    return index


def _index_sha256(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index).encode()).hexdigest()


def open_store(folder: str | Path) -> tuple[TokenStore, TokenStore, TokenStore]:
    """Return the train, the validation and the test store of a folder; ValueError if it is not whole."""
    return TokenStore(folder, "train"), TokenStore(folder, "validation"), TokenStore(folder, "test")


class _SplitWriter:
    """The files of one split while they are written; `files` lists those that are finished."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.offsets, self.byte_lengths = array("q", [0]), array("q")
        self.prompt_lengths, self.suffix_places, self.cuts = array("q"), array("q"), array("q")
        self.files: list[dict[str, Any]] = []
        self.shard: BufferedRandom | None = None
        self.names: BufferedRandom = open(folder / f"{split}-names.jsonl", "w+b")  # noqa: SIM115

    def add(self, document: Document, encoded: Encoded) -> None:
        tokens = encoded.ids
        if self.shard and self.shard.tell() // self.dtype.itemsize + len(tokens) > self.shard_tokens:
            self._finish(self.shard)
            self.shard = None
        if self.shard is None:
            self.shard = open(self.folder / f"{self.split}-{len(self.files):05d}.bin", "w+b")  # noqa: SIM115
        self.shard.write(tokens.data)
        self.offsets.append(self.offsets[-1] + len(tokens))
        self.byte_lengths.append(len(utf8(document.text)) + encoded.dropped_bytes)
        if document.prompt is not None:
            self.prompt_lengths.append(encoded.prompt_length)
            self.suffix_places.append(encoded.suffix_place)
            self.cuts.append(encoded.cut)
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
        tables = {"offsets": self.offsets, "bytes": self.byte_lengths}
        if self.prompt_lengths:
            tables["prompts"] = self.prompt_lengths
        if any(self.suffix_places):
            tables["suffixes"] = self.suffix_places
        if any(cut >= 0 for cut in self.cuts):
            tables["cuts"] = self.cuts
        for name, values in tables.items():
            with open(self.folder / f"{self.split}-{name}.npy", "w+b") as file:
                np.save(file, np.array(values, np.int64))
                self._finish(file)

    def close(self) -> None:
        for file in filter(None, (self.shard, self.names)):
            with contextlib.suppress(
                OSError
            ):  # On a full disk close writes its buffer again, and fails again.
                file.close()


def _encode(tokenizer: Tokenizer, documents: list[Document], dtype: np.dtype) -> list[Encoded]:
    """Encode each document, of which either all are answers of conversations or none is.

    Raises:
        ValueError: as `_encode_answers` and `_encode_texts`.
    """
    if documents[0].messages is not None:
        return _encode_answers(tokenizer, documents, dtype)
    return _encode_texts(tokenizer, documents, dtype)


def _encode_answers(tokenizer: Tokenizer, documents: list[Document], dtype: np.dtype) -> list[Encoded]:
    """Encode the answers of conversations by the tokenizer's chat template, which writes start and end.

    Raises:
        ValueError: the template or the tokenizer does not take one of them.
    """
    conversations = [(*(d.messages or ()), Message(ASSISTANT, d.text)) for d in documents]
    try:
        found = answered_ids(tokenizer, conversations)
    except ConversationError as error:
        where = documents[error.number].where or documents[error.number].name
        raise ValueError(f"{where} cannot be tokenised: {error}") from None
    return [Encoded(np.array([*asked, *answer], dtype), len(asked), 0, -1, 0) for asked, answer in found]


def _encode_texts(tokenizer: Tokenizer, documents: list[Document], dtype: np.dtype) -> list[Encoded]:
    """Encode each document, between bos and eos; a tokenizer without bos starts with its eos.

    Prompt and completion of an example are encoded as one text, and its prompt is the tokens that stay of a
    healed prompt (tokenization/healing.py): all tokens after them belong to the completion, those for the end
    of the prompt's text included, since generation makes them too. Where prompts are not healed, or the ids
    of the one text begin differently, the two are encoded apart. An example that fills a gap begins with
    `fim_prompt_ids` unchanged.

    Raises:
        ValueError: an id is outside the vocabulary, or text does not come back, apart or as prompt and
            completion together: its bits per byte would mean nothing.
    """
    before, gap_lead = tokenizer.before(), len(tokenizer.before(gap=True))
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    encoded = []
    for document in documents:
        name = document.where or document.name
        prompt, suffix, text = document.fim_parts or (document.prompt or "", None, document.text)
        suffix_place, cut, dropped = 0, -1, 0
        try:
            text_ids = tokenizer.encode(text)
            if suffix is not None:
                prompt_ids = fim_prompt_ids(tokenizer, prompt, suffix)
                suffix_place = between_place(tokenizer, prompt_ids)
            else:
                prompt_ids = [*before, *(tokenizer.encode(prompt) if prompt else [])]
                one_text = _as_one_text(tokenizer, document, prompt_ids)
                if one_text is not None:
                    kept, text_ids, dropped = one_text
                    cut, prompt_ids = len(prompt), prompt_ids[:kept]
        except ValueError as error:
            raise ValueError(f"{name} cannot be tokenised: {error}") from None
        ids = np.array([*prompt_ids, *text_ids, *after], np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
            wrong = int(ids.max()) if ids.min() >= 0 else int(ids.min())
            raise ValueError(
                f"the tokenizer gave the id {wrong} in {name}, outside its vocabulary of "
                f"{tokenizer.vocab_size}"
            )
        if cut >= 0:
            _refuse_loss(tokenizer, _without_start(tokenizer, ids.tolist()), prompt + text, name)
            encoded.append(Encoded(ids.astype(dtype), len(prompt_ids), suffix_place, cut, dropped))
            continue
        _refuse_loss(tokenizer, text_ids, text, name)
        if suffix is not None:
            parts = prompt_ids[gap_lead + 1 : suffix_place], prompt_ids[suffix_place + 1 : -1]
            if tokenizer.suffix_first:
                parts = prompt_ids[suffix_place + 1 :], prompt_ids[gap_lead + 2 : suffix_place]
            _refuse_loss(tokenizer, parts[0], prompt, f"the prefix of {name}")
            _refuse_loss(tokenizer, parts[1], suffix, f"the suffix of {name}")
        elif prompt:
            own = _without_start(tokenizer, prompt_ids)
            _refuse_loss(tokenizer, own, prompt, f"the prompt of {name}")
        if suffix is not None or prompt:
            # Generation decodes the two in one piece; CodeTokenizer implies a space between two words.
            shown = tokenizer.decode(prompt_ids)
            if tokenizer.decode([*prompt_ids, *text_ids]) != shown + text:
                raise ValueError(
                    f"the prompt of {name} ends with {shown[-20:]!r} and its completion starts "
                    f"with {text[:20]!r}, which the tokenizer does not keep together: put a space or a line "
                    "break between them into the data, or use --tokenizer.kind bpe"
                )
        encoded.append(Encoded(ids.astype(dtype), len(prompt_ids), suffix_place, cut, dropped))
    return encoded


def _as_one_text(
    tokenizer: Tokenizer, document: Document, prompt_ids: list[int]
) -> tuple[int, list[int], int] | None:
    """Encode prompt and completion of an example as one text; None where they have to be encoded apart.

    Returns (number of tokens that stay of the prompt, ids after them, bytes of the prompt in those).
    """
    if not tokenizer.heals or document.prompt is None:
        return None
    requested = healed(tokenizer, prompt_ids)
    ids = tokenizer.prompt_ids(document.prompt + document.text)
    kept = len(requested.ids)
    text = tokenizer.decode(_without_start(tokenizer, ids))
    if ids[:kept] != requested.ids or text != document.prompt + document.text:
        return None
    if not requested.dropped:
        return kept, ids[kept:], 0
    stays = tokenizer.bytes_of(requested.ids[tokenizer.start_id is not None :])
    if stays is None:  # The number of bytes that are targets is not known.
        return None
    return kept, ids[kept:], len(utf8(document.prompt)) - len(stays)


def _without_start(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Return ids without the start; one that a base's folder names nowhere decodes to its own characters."""
    return ids[1:] if ids and ids[0] == tokenizer.start_id else ids


def _refuse_loss(tokenizer: Tokenizer, ids: list[int], text: str, name: str) -> None:
    if (back := tokenizer.decode(ids)) != text:
        same = len(os.path.commonprefix([back, text]))  # noqa: RUF071
        raise ValueError(
            f"the tokenizer loses text: {name} comes back different from character {same} on, "
            f"{back[same : same + 20]!r} instead of {text[same : same + 20]!r}; use another one"
        )


_worker_tokenizer: Tokenizer  # set once in each worker, and not pickled with every chunk


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer


def _encode_in_worker(documents: list[Document], dtype: np.dtype) -> list[Encoded]:
    return _encode(_worker_tokenizer, documents, dtype)


@contextlib.contextmanager
def _main_hidden(tokenizer: Tokenizer) -> Iterator[None]:
    """Keep processes that start now from importing the caller's main module, as `spawn` makes them do.

    A training script would bring torch into every worker (8 MB on two cores: 6.4 s, against 2.9 s without it
    and 2.8 s in one process), and a script without an `if __name__ == "__main__":` would run again in each.
    """
    main = sys.modules["__main__"]
    if type(tokenizer).__module__ != "__main__":  # A class of __main__ can only be found there.
        sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _encode_all(
    documents: Iterable[tuple[str, Document]], tokenizer: Tokenizer, workers: int, dtype: np.dtype
) -> Iterator[tuple[str, Document, Encoded]]:
    """Encode in order, in processes when there are several workers; only a few chunks are in memory."""
    chunks = _chunks(documents)
    if workers == 1:
        for splits, chunk in chunks:
            yield from zip(splits, chunk, _encode(tokenizer, chunk, dtype), strict=True)
        return
    # Not fork: the caller may have started torch's threads, and a forked child inherits their locks.
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (tokenizer,)) as pool:
        pending: deque = deque()
        try:
            for splits, chunk in chunks:
                with _main_hidden(tokenizer):  # submit is what starts processes
                    pending.append((splits, chunk, pool.submit(_encode_in_worker, chunk, dtype)))
                if len(pending) > 2 * workers:
                    splits, chunk, future = pending.popleft()
                    yield from zip(splits, chunk, future.result(), strict=True)
            for splits, chunk, future in pending:
                yield from zip(splits, chunk, future.result(), strict=True)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"one of {workers} tokenising processes died, perhaps for memory: try --data.workers 1"
            ) from error


def _chunks(documents: Iterable[tuple[str, Document]]) -> Iterator[tuple[list[str], list[Document]]]:
    splits: list[str] = []
    chunk: list[Document] = []
    size = 0
    for split, document in documents:
        splits.append(split)
        chunk.append(document)
        size += len(document.text) + len(document.prompt or "") + len(document.suffix or "")
        if size >= CHUNK_CHARACTERS:
            yield splits, chunk
            splits, chunk, size = [], [], 0
    if chunk:
        yield splits, chunk


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
    """Write (split, document) pairs as a store into a new folder; `index.json` comes last and makes it one.

    A document is [bos] + encode(text) + [eos], and an example [bos] + encode(prompt + text) + [eos], or where
    it is not healed [bos] + encode(prompt) + encode(text) + [eos]; a special token that is lacking is left
    out. With a gap it is fim_prompt_ids(prefix, suffix) + encode(middle) + [eos]. Answers of conversations
    are as `answered_ids` writes them. Ids take 2 bytes for vocabularies up to 65,536 and 4 above.
    A shard holds at most `shard_tokens`, or one document.

    Raises:
        ValueError: the tokenizer gave an id outside its vocabulary.
        OSError: the folder exists or cannot be written, or the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    dtype = dtype_of(tokenizer.vocab_size)
    writers = {split: _SplitWriter(folder, split, dtype, shard_tokens) for split in SPLITS}
    conversations = False
    bar = progress_bar(total=total_bytes, desc="tokenising", unit="B", unit_scale=True, leave=False)
    try:
        with bar, InUse(folder):
            for split, document, encoded in _encode_all(documents, tokenizer, workers, dtype):
                conversations |= document.messages is not None
                writers[split].add(document, encoded)
                given = (document.prompt or "") + (document.suffix or "")
                bar.update(writers[split].byte_lengths[-1] + len(utf8(given)))
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
        "gap_lead": len(tokenizer.before(gap=True)),
        "tokenizer": tokenizer.fingerprint,
        "data": fingerprint,
        "splits": {
            split: {
                "tokens": writer.offsets[-1],
                "documents": len(writer.byte_lengths),
                "bytes": sum(writer.byte_lengths),
                "files": writer.files,
            }
            for split, writer in writers.items()
        },
    }
    if tokenizer.suffix_first:
        index["suffix_first"] = True
    if conversations:
        index["conversations"] = True
    with open(folder / "index.json.tmp", "w", encoding="utf-8") as file:
        json.dump(index | {"sha256": _index_sha256(index)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.rename(folder / "index.json.tmp", folder / "index.json")
