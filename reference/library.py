"""Tokenizers with a tokenizer.json: GPT-2's byte-level BPE written out, and all others by their reader."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
# GPT-2's pattern over classes of characters: letters, numbers, white space, and o for all others.
GPT2 = re.compile(r" ?L+| ?N+| ?o+|[s ]+(?![^s ])|[s ]+")
WHITE_SPACE = {*"\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000", *map(chr, range(0x2000, 0x200B))}


class LibraryTokens:
    """A tokenizer.json, read by the library of that format; a special token's spelling is text."""

    def __init__(self, folder: Path):
        import tokenizers

        self.json = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        self.library = tokenizers.Tokenizer.from_str(json.dumps(self.json))
        self.library.encode_special_tokens = True
        self.config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                self.config |= json.loads((folder / name).read_text("utf-8"))

    @property
    def has_words(self) -> bool:
        """Whether text is cut into words before it is written, so that what is far does not matter."""
        return self.json.get("pre_tokenizer") is not None

    def special(self, key: str) -> int | None:
        """Return the id of a token that the folder names, such as eos_token."""
        token = self.config.get(key)
        return self.id_of(token["content"] if isinstance(token, dict) else token) if token else None

    def id_of(self, token: str) -> int | None:
        """Return the id of a token by its spelling."""
        return self.library.token_to_id(token)

    @cached_property
    def start(self) -> int | None:
        """What the file itself puts before a text."""
        return next(iter(self.library.encode("").ids), None)

    @cached_property
    def end(self) -> int | None:
        """The end of a text."""
        return self.special("eos_token")

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text alone."""
        return self.library.encode(text, add_special_tokens=False).ids


class ByteLevelTokens(LibraryTokens):
    """Byte-level BPE (GPT-2): words by a pattern, their bytes as characters, merged by rank."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        model = self.json["model"]
        self.vocabulary: dict[str, int] = model["vocab"]
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(pairs)}
        self.word = cache(self._word)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text alone."""
        return [id for word in words_of(text) for id in self.word(word)]

    def _word(self, word: str) -> list[int]:
        symbols = [BYTES[byte] for byte in word.encode()]
        while len(symbols) > 1:
            pairs = list(pairwise(symbols))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            merged, place = [], 0
            while place < len(symbols):
                step = 2 if place < len(pairs) and pairs[place] == best else 1
                merged.append("".join(symbols[place : place + step]))
                place += step
            symbols = merged
        return [self.vocabulary[symbol] for symbol in symbols]


def words_of(text: str) -> Iterator[str]:
    """Yield the words of a text by GPT-2's pattern."""
    classes = "".join(map(_class, text))
    place = 0
    while place < len(text):
        end = next((place + len(c) for c in CONTRACTIONS if text.startswith(c, place)), 0)
        if not end:
            match = GPT2.match(classes, place)
            assert match is not None  # Every character has a class.
            end = match.end()
        yield text[place:end]
        place = end


@cache
def _class(character: str) -> str:
    if character in WHITE_SPACE:
        return " " if character == " " else "s"
    kind = unicodedata.category(character)[0]
    return kind if kind in "LN" else "o"


def _byte_characters() -> list[str]:
    """Return the character of each byte: itself if it is printable, else the next from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


BYTES = _byte_characters()
