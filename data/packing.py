"""The part of each example that a row shows, and the examples that share a row."""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from config import DataConfig
from data.corpus import split_documents
from data.fim import fim_kept
from data.tokenstore import TokenStore

GAPS_READ = 1000  # documents that are read for the share of gaps that rows show whole
GAPS_SEEN = 0.5  # below this share a run warns
ROW_STEP = 64  # tokens; a row length that no setting gives is a multiple of it


class Shown(NamedTuple):
    """The part of each example of a store that its row shows, all (n_documents,) int64.

    length: The tokens that are shown.
    prompt_length: How many of them are prompt.
    left: Tokens of the prompt that are left out at `left_place`, after its start or its first marker.
    left_place: The place among the tokens that are shown before which they are left out.
    right: Tokens of a suffix that are left out at `right_place`, its end.
    right_place: The place where they are left out, likewise.
    """

    length: np.ndarray
    prompt_length: np.ndarray
    left: np.ndarray
    left_place: np.ndarray
    right: np.ndarray
    right_place: np.ndarray


def shown(store: TokenStore, block_size: int) -> Shown:
    """Trim examples to rows: a longer one loses a part of its prompt, never of its completion.

    No other code trims. A row holds `block_size` + 1 tokens, of which the last is a target only. The prompt
    keeps its start token and its last tokens, id for id as `generation.text.trim_prompt` does; one with a gap
    keeps its markers and what is nearest to the gap, as `data.fim.trim_fim_prompt` does.

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
    if store.suffix_first:
        n_prefix, n_suffix = prompt - store.suffix_places - 1, store.suffix_places - 2 - lead
    prefix_kept, suffix_kept = fim_kept(n_prefix, n_suffix, n_prefix + n_suffix - excess)
    left = np.where(is_fim, n_prefix - prefix_kept, excess)
    right = np.where(is_fim, n_suffix - suffix_kept, 0)
    left_place, right_place = lead + 1, prompt - excess - 1
    if store.suffix_first:
        right_place = lead + 2 + suffix_kept
        left_place = np.where(is_fim, right_place + 1, left_place)
    return Shown(length - excess, prompt - excess, left, left_place, right, right_place)


def fitting_row(stores: Iterable[TokenStore], most: int) -> int:
    """Return a row's tokens, so that the longest example is whole: a multiple of ROW_STEP, at most `most`.

    Plain texts are cut into rows of any length, so theirs is `most`.
    """
    lengths = [np.diff(store.offsets) if store.holds_examples else np.array([most + 1]) for store in stores]
    longest = max((int(of_one.max()) for of_one in lengths if len(of_one)), default=0)
    return min(most, -(-max(longest - 1, 1) // ROW_STEP) * ROW_STEP)  # The last token is a target only.


def is_trimmed(store: TokenStore, block_size: int) -> np.ndarray:
    """Return the examples whose prompt is cut in a row, (n_documents,) bool; plain texts never are."""
    return store.holds_examples & (np.diff(store.offsets) > block_size + 1)


def gaps_in_sight(store: TokenStore, markers: tuple[int, int, int], block_size: int) -> float:
    """Return the share of tokens in plain documents' gaps whose row shows all three markers; 1 without gaps.

    With the suffix first, the prefix counts with the gap, since it stands behind all markers too.
    It is the mean over all places where rows may be cut, and over `GAPS_READ` documents, evenly spread. A row
    that shows the first marker shows all three.
    """
    numbers = np.flatnonzero(np.diff(store.offsets))
    numbers = numbers[np.diff(store.offsets)[numbers] > store.gap_lead]
    numbers = numbers[store.gather(store.offsets[numbers] + store.gap_lead) == markers[0]]
    in_sight = tokens = 0
    for number in numbers[:: max(1, len(numbers) // GAPS_READ)].tolist():
        ids = store.document(number)
        places = np.arange(int(np.flatnonzero(ids == markers[2])[0]) + 1, len(ids))
        places -= store.gap_lead  # The start token, before the first marker, need not be in the row.
        # A target is equally likely at each of a row's block_size places; from `place` on it sees the marker.
        in_sight += np.maximum(0, 1 - (places - 1) / block_size).sum()
        tokens += len(places)
    return float(in_sight / tokens) if tokens else 1.0


def as_shown(store: TokenStore, number: int, rows: Shown) -> np.ndarray:
    """Return the tokens of one document as rows show them, int64; an example is trimmed."""
    ids = store.document(number)
    for places, counts in sorted(
        ((rows.left_place, rows.left), (rows.right_place, rows.right)), key=lambda pair: pair[0][number]
    ):
        place, n = int(places[number]), int(counts[number])
        ids = np.delete(ids, slice(place, place + n))
    return ids


class _LongAnswers(ValueError):
    """Examples (n,) by number whose completion does not fit a row beside the kept part of their prompt."""

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
    """Raise ValueError, with file and line, for an example whose completion does not fit a row.

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
    """Pack pieces, longest first, each into the fullest row that has room; return (row, start) of each.

    Of rows that are equally full it is the one that was filled last. Rows are numbered as they are begun.

    Args:
        lengths: (pieces,) from the longest on, none longer than `size`.
        size: Length of a row.
    """
    row, start = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    rooms: list[int] = []  # the distinct free lengths of rows, ascending
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
