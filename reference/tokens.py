"""Tokenizers written out: from the tokenizer's own files to the ids of a text.

    tokenizer = read_tokenizer(folder)
    ids = [tokenizer.start, *tokenizer.encode(text), tokenizer.end]

`CodeTokens` is the tokenizer for source code; those with a tokenizer.json are in reference/library.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from reference.library import ByteLevelTokens, LibraryTokens
from reference.text import utf8

N_SPECIAL = 3  # <|pad|>, <|bos|>, <|eos|>: the ids 0, 1 and 2 of the tokenizers that Plumb trains.
N_GAPS = 3  # Tokens for gaps: the last ids of the tokenizer for source code; 3, 4 and 5 of byte-level BPE.
CHUNK = 64  # Characters of a long run that are written together.
IDENTIFIER = re.compile(r"([A-Za-z0-9]+(?:_[A-Za-z0-9]+)*)")
# What stands between identifiers, cut into units, each tried in this order.
BETWEEN = re.compile(
    r"""\ *[!-/:-@\[-`{-~]+(?:\ [!-/:-@\[-`{-~]+)*(?:\ (?!\ ))?  # Punctuation and the spaces beside it.
    |(?:\r?\n)+[ \t]*                                            # Line breaks and the indentation after them.
    |\ +|[^\x00-\x7f]+|[\x00-\x1f\x7f]                           # Spaces; not ASCII; one control character.
    """,
    re.VERBOSE,
)
# Words of an identifier: capitals, a word that may begin with one, digits, an underscore.
WORD = re.compile(
    rf"[A-Z]{{1,{CHUNK}}}(?![a-z])|[A-Z]?[a-z]{{1,{CHUNK}}}|[0-9]{{1,{CHUNK}}}|_",
)
SPACED, ALONE, BETWEEN_WORDS = "spaced identifier", "identifier", "between identifiers"


class CodeTokens:
    """The tokenizer for source code (tokenization/code.py says what it is).

    The ids are 3 specials, 256 bytes, 7 markers, then the pieces of the file: heads, tails, plain. Three more
    for gaps, prefix, suffix and middle, are last; older files have none.
    """

    start, end = 1, 2
    has_words = True  # Text is cut before it is written, so that what is far does not matter.

    def __init__(self, state: dict[str, Any]):
        heads, tails, plain = state["heads"], state["tails"], state["plain"]
        low = N_SPECIAL + 256
        self.markers = {"low": low, "cap": low + 1, "up": low + 2}
        self.joined = {"low": low + 3, "cap": low + 4, "up": low + 5}
        self.snake = low + 6
        first = low + 7
        self.heads = {piece.lower(): first + i for i, piece in enumerate(heads)}
        self.usual = {first + i: case_of(piece) for i, piece in enumerate(heads)}
        first += len(heads)
        self.tails = {piece: first + i for i, piece in enumerate(tails)}
        first += len(tails)
        self.plain = {piece: first + i for i, piece in enumerate(plain)}
        first += len(plain)
        self.gaps = (first, first + 1, first + 2) if state.get("gaps") else None
        self.identifier = cache(self._identifier)
        self.between = cache(self._between)

    def encode(self, text: str) -> list[int]:
        """Return the ids: those of identifiers, and of the units between them.

        A single space between two identifiers is implied by the second, which then has one fewer unit.
        """
        ids: list[int] = []
        for unit, place in units(text):
            ids += self.between(unit) if place == BETWEEN_WORDS else self.identifier(unit, place == SPACED)
        return ids

    def _between(self, unit: str) -> list[int]:
        return [id for chunk in chunks(unit) for id in self.other(chunk)]

    def other(self, chunk: str) -> list[int]:
        """Return the ids of a text that is no identifier, of at most CHUNK characters."""
        return fewest(chunk, self.plain, self.plain, 1, lambda _: 0)

    def _identifier(self, text: str, after_space: bool) -> list[int]:
        ids: list[int] = []
        for word, joined, capitals in words(text):
            written = [self.snake] if word == "_" else self.word(word, joined, capitals)
            if not ids and after_space and written[0] < self.markers["low"]:
                ids.append(N_SPECIAL + ord(" "))  # Bytes imply no space.
            ids += written
        return ids

    def word(self, word: str, joined: bool, capitals: bool) -> list[int]:
        """Return the ids of a word: the marker of its case, where that is not the expected one, and pieces.

        Args:
            joined: Whether a letter or digit stands before it.
            capitals: Whether an underscore after a capital does.
        """
        case, letters = case_of(word), word.isalpha()
        free = joined or capitals or not letters  # The head's usual case does not matter.
        first = self.tails if joined and not letters else self.heads
        ids = fewest(
            word.lower(), first, self.tails, 2 * CHUNK, lambda id: int(not free and self.usual[id] != case)
        )
        if min(ids) <= self.snake:
            return [N_SPECIAL + byte for byte in word.encode()]  # Bytes have no case.
        if not letters:
            return ids
        if joined:
            return [self.joined[case], *ids]
        expected = "up" if capitals else self.usual[ids[0]]
        return ids if case == expected else [self.markers[case], *ids]


def units(text: str) -> Iterator[tuple[str, str]]:
    """Yield the identifiers of a text and the units between them, each with what it is.

    An identifier is SPACED after one space that stands between it and another one, else ALONE.
    """
    parts = IDENTIFIER.split(text)  # What is between stands at even places.
    for place, part in enumerate(parts):
        if place % 2:
            yield part, SPACED if place > 1 and parts[place - 1] == " " else ALONE
        elif part != " " or place in (0, len(parts) - 1):
            yield from ((unit, BETWEEN_WORDS) for unit in BETWEEN.findall(part))


def words(identifier: str) -> Iterator[tuple[str, bool, bool]]:
    """Yield the words of an identifier, whether each is joined to another, and whether it follows `A_`."""
    before = ""
    for word in WORD.findall(identifier):
        yield word, before != "" and before[-1] != "_", before[-1:] == "_" and before[:-1][-1:].isupper()
        before = before[-1:] + word


def chunks(unit: str) -> list[str]:
    """Return a unit in pieces of at most CHUNK characters."""
    return [unit[i : i + CHUNK] for i in range(0, len(unit), CHUNK)]


def fewest(text: str, first: dict[str, int], rest: dict[str, int], byte_cost: int, extra: Any) -> list[int]:
    """Return the fewest pieces that make a text; at a tie the longer piece comes first.

    Args:
        first: The pieces that may begin it, with their ids.
        rest: Those that may follow.
        byte_cost: The cost of a byte, where a character has no piece.
        extra: The further cost of a first piece, by its id.
    """
    best: list[tuple[int, list[int]]] = [(0, [])] * (len(text) + 1)  # Of the text from each place on.
    for place in range(len(text) - 1, -1, -1):
        pieces = rest if place else first
        found = [N_SPECIAL + byte for byte in utf8(text[place])]
        choices = [(byte_cost * len(found) + best[place + 1][0], -1, 1, found)]
        for end in range(place + 1, min(len(text), place + CHUNK) + 1):
            id = pieces.get(text[place:end])
            if id is not None:
                cost = 1 + best[end][0] + (0 if place else extra(id))
                choices.append((cost, place - end, 0, [id]))
        cost, size, _, found = min(choices)
        best[place] = (cost, found + best[place - size][1])
    return best[0][1]


def case_of(word: str) -> str:
    """Return low, cap or up; a capital alone is up, and what ends in no letter is low."""
    if word.islower() or not word[-1].isalpha():
        return "low"
    return "up" if word.isupper() else "cap"


def read_tokenizer(folder: Path) -> CodeTokens | LibraryTokens | None:
    """Read the tokenizer in a folder; None if it is of no kind that has a file."""
    code = folder / "code_tokenizer.json"
    if code.is_file():
        return CodeTokens(json.loads(code.read_text("utf-8")))
    if not (folder / "tokenizer.json").is_file():
        return None
    tokens = LibraryTokens(folder)
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if tokens.json["normalizer"] is None and tokens.json["pre_tokenizer"] == plain and _is_own(tokens):
        return ByteLevelTokens(folder)
    return tokens


def _is_own(tokens: LibraryTokens) -> bool:
    """Return whether Plumb trained it: a published one may have added tokens that texts hold."""
    return tokens.config.get("plumb_kind") == "bpe"
