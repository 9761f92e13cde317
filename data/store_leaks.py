"""How much of a held-out token store also stands in the training store, token by token.

found = store_overlap(store, validation_store, tokenizer)  # cached beside the held-out store
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict

import numpy as np

from data.cache import read_sealed, write_sealed
from data.documents import utf8
from data.fim import in_text_order, known_markers
from data.leaks import PIECE, VERSION, WINDOW, WINDOW_BYTES, Example, Overlap, compare
from data.shingles import Units, mixed
from data.tokenstore import TokenStore
from tokenizer import Tokenizer

HELD_OUT_UNITS = 2**22  # tokens of a store that are compared; of more, whole documents are sampled by name


def store_overlap(train: TokenStore, held_out: TokenStore, tokenizer: Tokenizer) -> Overlap:
    """Compare two stores of a run, token by token.

    The result is cached beside `held_out` as `leaks-TRAIN-HELD_OUT.json`, by the names of the splits, and
    used again for the same stores and VERSION. All training tokens are read. Of a held-out store of more
    than `HELD_OUT_UNITS` tokens, documents are sampled by the SHA-1 of their names up to that number, which
    `Overlap.of_documents` shows.

    Raises:
        ValueError: a store was made by another tokenizer.
    """
    for store in (train, held_out):
        if store.tokenizer_fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"the {store.split} store was made by the tokenizer {store.tokenizer_fingerprint[:12]}, and "
                f"this one is {tokenizer.fingerprint[:12]}: give that one, or build the store again"
            )
    path = held_out.folder / f"leaks-{train.split}-{held_out.split}.json"
    key = _store_key(train, held_out)
    saved = read_sealed(path)
    if saved is not None and saved.pop("key") == key:
        return Overlap(**saved | {"examples": tuple(Example(**e) for e in saved["examples"])})
    found = _compare_stores(train, held_out, tokenizer)
    write_sealed(path, {"key": key} | asdict(found))
    return found


def _store_key(train: TokenStore, held_out: TokenStore) -> str:
    key = hashlib.sha256(f"{VERSION}".encode())
    for store in (train, held_out):
        key.update((store.folder / "index.json").read_bytes())  # It holds the SHA-256 of each file.
        key.update(store.split.encode())
    return key.hexdigest()


def _compare_stores(train: TokenStore, held_out: TokenStore, tokenizer: Tokenizer) -> Overlap:
    """Compare two stores by their tokens, without white space and special tokens; see `store_overlap`."""
    specials = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    specials |= {*(markers := known_markers(tokenizer) or ())}
    blank = [i in specials or tokenizer.decode([i]).isspace() for i in range(held_out.vocab_size)]
    solid = ~np.array(blank)
    values = mixed(np.arange(held_out.vocab_size, dtype=np.uint64))

    def units(store: TokenStore, number: int) -> Units:
        tokens = store.document(number)
        if not store.holds_examples:
            tokens = in_text_order(tokens, markers or None)
        keep = solid[tokens]
        start = int(keep[: int(store.prompt_lengths[number])].sum())
        name = store.names[number]
        # A store knows no groups, though it was split by them. Equal names are no group, since many
        # repositories hold a setup.py; pieces of one name are.
        group = name if PIECE.search(name[-40:]) else ""
        return Units(name, group, values[tokens[keep]], start)

    chosen = np.arange(held_out.n_documents)
    if held_out.n_tokens > HELD_OUT_UNITS:
        order = sorted(chosen.tolist(), key=lambda i: hashlib.sha1(utf8(held_out.names[i])).digest())
        ends = np.cumsum(np.diff(held_out.offsets)[order])
        chosen = np.sort(order[: max(1, int(np.searchsorted(ends, HELD_OUT_UNITS, "right")))])
    held = [units(held_out, int(i)) for i in chosen]
    scored = sum(len(document.ids) - document.start for document in held)
    window = round(WINDOW_BYTES * scored / max(1, int(held_out.byte_lengths[chosen].sum())))
    window = min(max(window, WINDOW // 2), 4 * WINDOW_BYTES)

    def excerpt(number: int, unit: int) -> str:
        tokens = held_out.document(int(chosen[number]))
        first = int(np.flatnonzero(solid[tokens])[unit])
        return tokenizer.decode([i for i in tokens[first : first + window].tolist() if i not in specials])

    stream = (units(train, number) for number in range(train.n_documents))
    return compare(stream, held, held_out.n_documents, window, excerpt)
