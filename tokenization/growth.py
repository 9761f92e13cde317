"""How much longer the rules of a tokenizer.json may make a text: bounded before any text is given to them.

A normalizer that replaces "a" by "aa", 32 times in a row, makes 4 GB of one letter, and the library ends the
process. So each rule has a growth, the most bytes that it makes of one; those of rules in a row multiply.
A chain that is too steep is refused when its file is opened, and a text that might become too long for a
steep one when it comes: see `refuse_steep` and `Growth.refuse_long`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import tokenizers

STEEPEST = 2**16  # bytes that the rules may make of one byte
GENTLE = 16  # growth up to which no text is measured: Llama 2 has 12, byte-level BPE 3
LONGEST = 2**26  # bytes that a text may become where it grows more than that; the library keeps 16 for each
LONGEST_PIECE = 2**16  # bytes of one entry of a vocabulary, or of the affix that is put to each
STEEPEST_DECODER = 64

# Unicode Standard Annex 15 has the forms' growth in UTF-8. A rule that is not named keeps a text's length.
_GROWTH = {
    "NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 2, "BertNormalizer": 6, "ByteLevel": 3,
    "Metaspace": 4,
}  # fmt: skip


class Growth(NamedTuple):
    """The most bytes that a tokenizer's normalizers, and its pre-tokenizers, make of one."""

    normalizer: int
    pre_tokenizer: int

    def refuse_long(self, text: str, normalize: Callable[[str], str]) -> None:
        """Refuse a text that these rules make too long.

        Args:
            normalize: The normalizers themselves, which are run piece by piece to measure the text.

        Raises:
            ValueError: It becomes more than GENTLE times as long as it is, and longer than LONGEST.
        """
        n, steepness = len(text) * 4, self.normalizer * self.pre_tokenizer
        if steepness <= GENTLE or n * steepness <= LONGEST:
            return
        n = len(text.encode())
        step = max(1, LONGEST // steepness // 4)
        grown = 0
        for start in range(0, len(text), step):
            grown += len(normalize(text[start : start + step]).encode()) * self.pre_tokenizer
            if grown > max(LONGEST, GENTLE * n):
                raise ValueError(
                    f"the rules of this tokenizer make more than {grown:,} bytes of a text of {n:,}, and "
                    f"{GENTLE} times as many, or {LONGEST:,}, are the most; cut it, or take another tokenizer"
                )


def refuse_steep(backend: tokenizers.Tokenizer, name: str) -> Growth:
    """Return the growth of a tokenizer's rules.

    Args:
        name: The name of its file, for the error.

    Raises:
        ValueError: The rules may make too much of a byte, or choose pieces by chance.
    """
    growth = Growth(_growth(_state(backend.normalizer)), _growth(_state(backend.pre_tokenizer)))
    decoder = _growth(_state(backend.decoder))
    for what, found, most in (
        ("normalizer and pre_tokenizer", growth.normalizer * growth.pre_tokenizer, STEEPEST),
        ("decoder", decoder, STEEPEST_DECODER),
    ):
        if found > most:
            shown = f"{found:,}" if found < 10**15 else "10**15 or more"
            raise ValueError(
                f"the {what} of {name} may make {shown} bytes of one, and at most {most:,} are known; take "
                "the rules out that insert text"
            )
    model: Any = backend.model
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(getattr(model, key, None) or "") > LONGEST_PIECE:
            raise ValueError(f"the {key} of {name} is longer than {LONGEST_PIECE:,} characters; take it out")
    if getattr(model, "dropout", None):
        raise ValueError(
            f"{name} has a BPE dropout of {model.dropout:g}, with which a text gets other ids at each call; "
            'set "dropout" to null in it'
        )
    return growth


def _state(part: Any) -> Any:
    return None if part is None else json.loads(part.__getstate__())


def _growth(part: Any) -> int:
    """Return the most bytes that a part of tokenizer.json makes of one, exact up to STEEPEST."""
    if not isinstance(part, dict):
        return 1
    kind, total = part.get("type"), 1
    if kind == "Sequence":
        for inner in next((value for key, value in part.items() if isinstance(value, list)), []):
            total = min(total * _growth(inner), 10**15)
        return total
    if kind == "Prepend":  # It is put before each stretch between added tokens, perhaps of one byte.
        return 1 + len(part["prepend"].encode())
    if kind == "Replace":
        return _replace_growth(part["pattern"], len(part["content"].encode()))
    if kind == "Precompiled":
        return _precompiled_growth(part["precompiled_charsmap"])
    return _GROWTH.get(str(kind), 1)


def _replace_growth(pattern: dict[str, str], size: int) -> int:
    """Return the growth by a replacement of `size` bytes; a regular expression may match at every place."""
    length = len(pattern.get("String", "").encode())
    return max(1, -(-size // length)) if length else 1 + 2 * size


def _precompiled_growth(charsmap: str) -> int:
    """Return the longest text in a map of SentencePiece: a trie's size, the trie, and texts that end in 0."""
    data = base64.b64decode(charsmap)
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return max([1, *map(len, texts.split(b"\0"))])
