"""Rows of tokens made of documents, their targets, and the order in which they are trained on.

    order, numbers = epoch_order(...)             # orders the documents, and the rows that they make
    rows = PlainRows(stored, order, length)       # ExampleRows does it for examples
    tokens, labels, documents, positions = rows.filled(numbers[0])

Plain texts are laid end to end and cut: of rows of T tokens, row r shows the tokens rT to rT + T - 1 of this
stream, and its last target is the token rT + T, with which the next row begins. Examples are never cut into
two rows: several share one, longest first, each in the fullest row that has room (best-fit decreasing;
Coffman, Garey and Johnson 1984).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from reference.stored import Stored

NO_TARGET = -100  # The label of what is not a target, as in torch's cross entropy.


class Row(NamedTuple):
    """One row of T tokens: ids, the next token where it is a target, document numbers, positions."""

    tokens: list[int]
    labels: list[int]
    documents: list[int]
    positions: list[int]


def filled(pieces: list[tuple[list[int], int]], length: int, pad: int) -> Row:
    """Put pieces side by side into a row of `length` tokens and the target after it.

    A token is the target of the one before it unless it is the first of its piece or one of its prompt.

    Args:
        pieces: The ids of each piece, and how many of them are prompt.
    """
    row = Row([pad] * (length + 1), [NO_TARGET] * length, [-1] * (length + 1), [0] * (length + 1))
    begin = 0
    for number, (ids, n_prompt) in enumerate(pieces):
        for place, id in enumerate(ids):
            row.tokens[begin + place] = id
            row.documents[begin + place] = number
            row.positions[begin + place] = place
            if place >= max(n_prompt, 1):
                row.labels[begin + place - 1] = id
        begin += len(ids)
    return Row(row.tokens[:-1], row.labels, row.documents[:-1], row.positions[:-1])


class PlainRows:
    """The documents of a store in an order, laid end to end and cut."""

    def __init__(self, stored: Stored, order: np.ndarray, length: int):
        self.stored, self.order, self.length = stored, order, length
        self.begin = np.concatenate(([0], np.cumsum(stored.lengths[order])))
        self.n_rows = -(-(int(self.begin[-1]) - 1) // length)

    def filled(self, number: int) -> Row:
        """Return a row by its number; one behind the last is padding."""
        begin, end = number * self.length, min((number + 1) * self.length + 1, int(self.begin[-1]))
        if number >= self.n_rows:
            return filled([], self.length, self.stored.pad)
        place = int(np.searchsorted(self.begin, begin, "right")) - 1
        pieces = []
        while place < len(self.order) and self.begin[place] < end:
            starts, ends = int(self.begin[place]), int(self.begin[place + 1])
            if starts < ends:
                first, last = max(begin, starts) - starts, min(end, ends) - starts
                pieces.append((self.stored.document(int(self.order[place]), first, last), 0))
            place += 1
        return filled(pieces, self.length, self.stored.pad)


class ExampleRows:
    """The examples of a store, each whole in one row, or trimmed at its prompt where it is too long."""

    def __init__(self, stored: Stored, order: np.ndarray, length: int, loss_on_prompts: bool = False):
        self.stored, self.length, self.loss_on_prompts = stored, length, loss_on_prompts
        room = length + 1
        lengths = np.minimum(stored.lengths, room)
        longest_first = order[np.argsort(-lengths[order], kind="stable")]
        self.examples = best_fit([(int(number), int(lengths[number])) for number in longest_first], room)
        self.n_rows = len(self.examples)

    def filled(self, number: int) -> Row:
        """Return a row by its number; one behind the last is padding."""
        pieces = []
        for example in self.examples[number] if number < self.n_rows else []:
            ids, n_prompt = trimmed(self.stored, example, self.length + 1)
            pieces.append((ids, 0 if self.loss_on_prompts else n_prompt))
        return filled(pieces, self.length, self.stored.pad)

    def in_order(self, order: np.ndarray) -> np.ndarray:
        """Return the rows by the mean place of their examples in an order that is kept."""
        place = np.argsort(order)
        return np.argsort([np.mean(place[examples]) for examples in self.examples], kind="stable")


def best_fit(pieces: list[tuple[int, int]], size: int) -> list[list[int]]:
    """Pack (number, length), longest first, each into the fullest row with room; return the numbers by row.

    Of rows that are equally full, it is the one that was filled last.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    for number, length in pieces:
        room = min((room for room, there in with_room.items() if there and room >= length), default=None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, size
        else:
            row = with_room[room].pop()
        rows[row].append(number)
        with_room.setdefault(room - length, []).append(row)
    return rows


def trimmed(stored: Stored, number: int, room: int) -> tuple[list[int], int]:
    """Return the ids of an example in a row, and how many of them are prompt.

    What is too long loses the beginning of its prompt, after the start token. A gap loses what is farthest
    from it, of prefix and suffix the longer one first, and of equals the suffix.
    """
    ids, n_prompt = stored.document(number), int(stored.prompts[number])
    excess = max(0, len(ids) - room)
    if not stored.suffixes[number]:
        return ids[:1] + ids[1 + excess :], n_prompt - excess
    first, marker = stored.gap_lead + 1, int(stored.suffixes[number])
    prefix, suffix = ids[first:marker], ids[marker + 1 : n_prompt - 1]
    if stored.suffix_first:  # [prefix] [suffix] ids [middle] ids
        prefix, suffix = ids[marker + 1 : n_prompt], ids[first + 1 : marker]
    for _ in range(excess):
        if len(suffix) >= len(prefix):
            suffix = suffix[:-1]
        else:
            prefix = prefix[1:]
    shown = [*ids[:first], *prefix, ids[marker], *suffix, *ids[n_prompt - 1 :]]
    if stored.suffix_first:
        shown = [*ids[: first + 1], *suffix, ids[marker], *prefix, *ids[n_prompt:]]
    return shown, n_prompt - excess


def epoch_draw(seed: int, epoch: int) -> np.random.Generator:
    """Return the generator of an epoch: PCG64, seeded by the run's seed and the epoch's number."""
    return np.random.Generator(np.random.PCG64([seed, epoch]))


def shuffled_documents(n_documents: int, draw: np.random.Generator) -> np.ndarray:
    """Return the epoch's order of documents, the first thing drawn."""
    return draw.permutation(n_documents)


def by_difficulty(difficulty: np.ndarray, hardest_first: bool, draw: np.random.Generator) -> np.ndarray:
    """Return the documents from the easiest on, or from the hardest; equals stay in a shuffled order."""
    shuffled = shuffled_documents(len(difficulty), draw)
    easiest_first = shuffled[np.argsort(difficulty[shuffled], kind="stable")]
    return easiest_first[::-1] if hardest_first else easiest_first


def rarity(stored: Stored) -> np.ndarray:
    """Return each document's mean surprise, -ln of its tokens' frequency in training, (documents,)."""
    documents = [np.array(stored.document(number), np.int64) for number in range(len(stored))]
    counts = np.bincount(np.concatenate(documents))
    surprise = -np.log(np.maximum(counts, 1) / counts.sum())
    return np.array([surprise[ids].mean() if len(ids) else 0.0 for ids in documents])


def entropy(stored: Stored) -> np.ndarray:
    """Return the entropy of the tokens of each document, in nats, (documents,)."""
    counts = [np.unique(stored.document(number), return_counts=True)[1] for number in range(len(stored))]
    shares = [count / max(1, count.sum()) for count in counts]
    return np.array([-(share * np.log(share)).sum() for share in shares])


def shuffled_rows(n_rows: int, version: int, draw: np.random.Generator) -> np.ndarray:
    """Return the epoch's order of rows, drawn after the documents.

    By version 1 it is a permutation. By version 2 row i stands where a Feistel network of four rounds takes
    it: numbers of an even count of bits, the fewest that hold all rows, are cut into halves L and R; each
    round makes them R and L xor f(R + key), of which the low bits count, with f the mixer of SplitMix64 and
    the keys PCG64's next words. A number that is no row's is taken through the network again.
    """
    if version == 1:
        return draw.permutation(n_rows)
    half = 1
    while 4**half < n_rows:
        half += 1
    size, words = 2**half, draw.bit_generator.random_raw(4)  # pyright: ignore
    network = np.arange(size * size, dtype=np.uint64)
    left, right = np.divmod(network, np.uint64(size))
    for word in words:
        z = right + np.uint64(word)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        left, right = right, left ^ (z % np.uint64(size))
    network = (left * np.uint64(size) + right).astype(np.int64)
    order = network[:n_rows]
    while (order >= n_rows).any():
        order = np.where(order >= n_rows, network[order], order)
    return order


def updates_of_epoch(n_rows: int, rows_of_update: int) -> int:
    """Return how many updates an epoch has: what fills no last one is left out, unless it fills none."""
    return max(1, n_rows // rows_of_update)


def passes_of_rank(rows_of_update: int, world_size: int, batch_size: int) -> int:
    """Return the passes of each process in an update: of equal sizes up to `batch_size`, as few as can be."""
    own = rows_of_update // world_size
    return min(n for n in range(1, own + 1) if own % n == 0 and own <= n * batch_size)


def dealt(numbers: np.ndarray, first: int, n: int) -> np.ndarray:
    """Return n rows of an epoch from a place on; an epoch with fewer rows than are asked for repeats them."""
    return np.take(numbers, np.arange(first, first + n), mode="wrap")


def spread(n_rows: int, n_shown: int) -> list[int]:
    """Return the rows of a validation that shows `n_shown` of them, evenly spread; 0 shows all."""
    n_shown = min(n_shown, n_rows) or n_rows
    return [i * n_rows // n_shown for i in range(n_shown)]
