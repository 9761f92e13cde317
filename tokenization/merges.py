"""Pieces of words, learned by byte-pair merges (Sennrich et al. 2016, arXiv:1508.07909)."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from itertools import pairwise

from tokenization.code_pieces import MAX_PIECE

_SPARE = 1.25  # pieces learned for each one kept: later merges leave some idle, which are dropped
HEAD, TAIL, PLAIN = "^", "-", "="  # The first character of a symbol says its kind while pieces are learned.


def learn_pieces(symbols: Counter[str], room: int, min_count: int) -> tuple[list[str], list[str]]:
    """Return (single characters, pieces that merges make of them), each with its kind as first character.

    Args:
        symbols: How often each word or plain unit occurs, by its kind and its text.
        room: Pieces that the vocabulary has room for. There are at most so many single characters, and more
            merges by `_SPARE`, because the caller drops those that it ends up not using.
        min_count: A piece occurs more often than this.
    """
    single: Counter[str] = Counter()
    for symbol, count in symbols.items():
        for char in _characters(symbol):
            single[char] += count
    frequent = [
        char for char, count in sorted(single.items(), key=lambda x: (-x[1], x[0])) if count > min_count
    ]
    # ASCII characters of plain units need no piece: their bytes have tokens. Other single characters get an
    # eighth of the room, lest thousands of ideographs leave none for words.
    ascii_plain = {char for char in frequent if char[0] == PLAIN and char[1] < "\x80"}
    wide = [c for c in frequent if c[1] >= "\x80" and not "\ud800" <= c[1] <= "\udfff"][: room // 8]
    kept = [char for char in frequent if char[0] != PLAIN][: room - len(wide)] + wide
    known = ascii_plain.union(kept)

    sequences: list[list[str]] = []
    counts: list[int] = []
    for symbol, count in symbols.items():
        run: list[str] = []
        for char in [*_characters(symbol), ""]:
            if char in known:
                run.append(char)
                continue
            if len(run) > 1:
                sequences.append(run)
                counts.append(count)
            run = []
    return kept, _merge(sequences, counts, max(0, int(room * _SPARE) - len(kept)), min_count)


def _characters(symbol: str) -> list[str]:
    """Return the characters of a symbol as pieces: a head's first one is a head, and the others are tails."""
    kind = symbol[0]
    rest = TAIL if kind == HEAD else kind
    return [kind + symbol[1], *(rest + char for char in symbol[2:])]


def _merge(sequences: list[list[str]], counts: list[int], room: int, min_count: int) -> list[str]:
    """Join the commonest adjacent pair, again and again, and return the pieces made; changes `sequences`.

    A merge updates counts from the sequences that it touches alone, so the work follows the number of
    changes. The heap holds stale counts too: an entry counts only if it agrees with the current total.
    """
    totals: Counter[tuple[str, str]] = Counter()
    places: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for index, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
        for pair in pairwise(sequence):
            totals[pair] += count
            places[pair].add(index)
    heap = [(-total, pair) for pair, total in totals.items()]
    heapq.heapify(heap)
    made: dict[str, None] = {}  # An ordered set, since two pairs can make the same piece.
    while heap and len(made) < room:
        negative, pair = heapq.heappop(heap)
        left, right = pair
        if -negative != totals[pair] or len(left) + len(right) - 2 > MAX_PIECE:
            continue
        if -negative <= min_count:
            break
        piece = left + right[1:]
        made[piece] = None
        changes: defaultdict[tuple[str, str], int] = defaultdict(int)
        for index in places.pop(pair):
            sequence, count = sequences[index], counts[index]
            end = len(sequence) - 1
            at = 0
            while at < end:
                if sequence[at] != left or sequence[at + 1] != right:
                    at += 1
                    continue
                changes[pair] -= count
                if at:
                    before = sequence[at - 1]
                    changes[before, left] -= count
                    changes[before, piece] += count
                    places[before, piece].add(index)
                if at + 1 < end:
                    after = sequence[at + 2]
                    changes[right, after] -= count
                    changes[piece, after] += count
                    places[piece, after].add(index)
                sequence[at : at + 2] = [piece]
                at += 1
                end -= 1
        for other, change in changes.items():
            totals[other] += change
            if change and totals[other] > min_count:
                heapq.heappush(heap, (-totals[other], other))
    return list(made)
