"""How a byte-level BPE tokenizer is learned from texts: the commonest pair is joined, again and again.

Sennrich et al. 2016 (arXiv:1508.07909) over the bytes of words (GPT-2): the ids are the special tokens, the
256 bytes in the order of their characters, and then what each merge makes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise

from reference.library import BYTES, words_of

Pair = tuple[str, str]


def alphabet() -> list[str]:
    """Return the characters that stand for the bytes, in the order of their ids."""
    return sorted(BYTES)


def merges(texts: Iterable[str], first_id: int) -> Iterator[Pair]:
    """Yield the pairs that are joined, the commonest first.

    Of pairs that are as common, it is the one whose ids are lower, those of its first part first.

    Args:
        first_id: The id of the first byte.
    """
    words = Counter(word for text in texts for word in words_of(text))
    written = {word: [BYTES[byte] for byte in word.encode()] for word in words}
    ids = {character: first_id + number for number, character in enumerate(alphabet())}
    while True:
        counts: Counter[Pair] = Counter()
        for word, symbols in written.items():
            for pair in pairwise(symbols):
                counts[pair] += words[word]
        if not counts:
            return
        best = min(counts, key=lambda pair: (-counts[pair], ids[pair[0]], ids[pair[1]]))
        yield best
        ids.setdefault("".join(best), first_id + len(ids))
        written = {word: joined(symbols, best) for word, symbols in written.items()}


def joined(symbols: list[str], pair: Pair) -> list[str]:
    """Return symbols with each such pair, from the left, made one."""
    found: list[str] = []
    for symbol in symbols:
        if found and (found[-1], symbol) == pair:
            found[-1] += symbol
        else:
            found.append(symbol)
    return found
