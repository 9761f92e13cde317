"""Pieces of words: merges that update counts equal merges that count everything anew at each step."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from tokenization.code import CodeTokenizer
from tokenization.merges import MAX_PIECE, _merge


def merged_anew(sequences: list[list[str]], counts: list[int], room: int, min_count: int) -> list[str]:
    """The pieces of `_merge`, with all pairs counted at each step."""
    made: dict[str, None] = {}
    while len(made) < room:
        totals: Counter[tuple[str, str]] = Counter()
        for sequence, count in zip(sequences, counts, strict=True):
            for pair in pairwise(sequence):
                totals[pair] += count
        short = {pair: n for pair, n in totals.items() if len("".join(pair)) - 2 <= MAX_PIECE}
        pair = min(short, key=lambda pair: (-short[pair], pair), default=("", ""))
        if short.get(pair, 0) <= min_count:
            break
        piece = pair[0] + pair[1][1:]
        made[piece] = None
        for sequence in sequences:
            at = 0
            while at + 1 < len(sequence):
                if tuple(sequence[at : at + 2]) == pair:
                    sequence[at : at + 2] = [piece]
                at += 1
    return list(made)


@pytest.mark.parametrize("seed", range(40))
def test_updated_counts_are_those_of_counting_anew(seed: int) -> None:
    """Few letters and long words: pairs overlap, come again in one word, and make equal pieces."""
    draw = random.Random(seed)
    letters = "ab" if seed % 2 else "abc"
    words = ["^" + "".join(draw.choices(letters, k=draw.randint(2, 14))) for _ in range(draw.randint(1, 25))]
    sequences = [[word[:2], *(f"-{char}" for char in word[2:])] for word in words]
    sequences.append(["-a"] * draw.randint(2, 3 * MAX_PIECE))
    counts = [draw.randint(1, 6) for _ in sequences]
    room, min_count = draw.choice((5, 1000)), draw.randint(0, 3)
    expected = merged_anew([list(sequence) for sequence in sequences], counts, room, min_count)
    assert _merge(sequences, counts, room, min_count) == expected


def test_ids_of_arrays_decode_as_ids() -> None:
    text = "def MAX_SIZE(getHTTP, x1): return 'É' # x_Y\n" * 9
    tokenizer = CodeTokenizer.train([text], 320)
    ids = tokenizer.encode(text)
    for array in (np.array(ids, np.uint16), np.array(ids), np.array(ids).tolist()):
        assert tokenizer.decode(array) == text
