"""Rules of a tokenizer.json as the `tokenizers` library applies them, for both classes that stand on it."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable
from typing import Any

import tokenizers

from tokenization.base import content_hash
from tokenization.growth import LONGEST_PIECE, Growth, refuse_steep

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
KIND_KEY = "plumb_kind"  # the key of tokenizer_config.json for the kind of a tokenizer trained here
# A key of tokenizer_config.json: false where the model was trained on prompts whose ends were not healed.
HEALS = "plumb_heals"
SUFFIX_FIRST = "plumb_suffix_first"


def refuse_surrogates(text: str) -> str:
    """Return the text; ValueError for a lone surrogate, which is no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is the lone surrogate {text[error.start]!r}, which this "
            "tokenizer cannot hold: remove it, or use the `code` tokenizer"
        ) from error
    return text


def open_backend(text: str, name: str) -> tokenizers.Tokenizer:
    """Open the text of a tokenizer.json; ValueError, which names the file, if it is broken or unsafe."""
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except BaseException as error:
        raise library_error(error, f"{name} is not a tokenizer of the tokenizers library") from error
    refuse_steep(backend, name)
    return backend


def refuse_long(backend: tokenizers.Tokenizer, growth: Growth, text: str) -> None:
    """Raise ValueError for a text that the rules would make too long; see tokenization/growth.py."""
    normalizer = backend.normalizer
    growth.refuse_long(text, (lambda part: part) if normalizer is None else normalizer.normalize_str)


def refuse_long_pieces(vocabulary: dict[str, int], name: str) -> None:
    """Raise ValueError for a vocabulary with a token of more than LONGEST_PIECE characters."""
    longest = max(map(len, vocabulary), default=0)
    if longest > LONGEST_PIECE:
        raise ValueError(
            f"{name} has a token of {longest:,} characters, and at most {LONGEST_PIECE:,} are known; "
            "take it out"
        )


def start_template(token: str, id: int) -> dict[str, Any]:
    """Return the post_processor of a tokenizer.json that puts one token before a text."""
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }


def rules_fingerprint(backend: tokenizers.Tokenizer, below: int) -> str:
    """Return `Tokenizer.pieces_fingerprint`."""
    parts = json.loads(backend.to_str())
    added = {id: token.content for id, token in backend.get_added_tokens_decoder().items() if id < below}
    rules = _without_offsets([parts[name] for name in ("normalizer", "pre_tokenizer", "model", "decoder")])
    return content_hash("pieces", [rules, sorted(added.items())])


def _without_offsets(part: Any) -> Any:
    """Return a part of tokenizer.json without the settings that change offsets alone, and no ids."""
    if isinstance(part, dict):
        return {key: _without_offsets(value) for key, value in part.items() if key != "trim_offsets"}
    return [_without_offsets(value) for value in part] if isinstance(part, list) else part


def library_error(error: BaseException, what: str) -> BaseException:
    """Return the error to raise: the library raises bare Exception, and PanicException is not even one."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return error
    return ValueError(f"{what}: {' '.join(str(error).split())[:300]}")


def encode_batch(backend: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text, in the library's threads; ValueError where its rules fail on one."""
    try:
        found = backend.encode_batch_fast(
            [refuse_surrogates(text) for text in texts], add_special_tokens=False
        )
    except BaseException as error:
        raise library_error(error, "the rules of this tokenizer fail on a text") from error
    return [one.ids for one in found]


def joined_bytes(texts: list[bytes | None] | None, ids: Iterable[int]) -> bytes | None:
    """Join the texts of some ids; None where one of them is not known."""
    found = [None if texts is None else texts[id] for id in ids]
    return None if None in found else b"".join(text for text in found if text is not None)


def bytes_by_id(
    backend: tokenizers.Tokenizer, vocab_size: int, plain: Container[int] = ()
) -> list[bytes | None] | None:
    """Return the bytes of each id (vocab_size,), None for special tokens.

    Known are byte-level vocabularies, and those that write a space as U+2581; the whole is None where the
    decoder is of another kind.

    Args:
        plain: Ids that the file calls special and that are pieces of text.
    """
    decoder = json.loads(backend.to_str())["decoder"] or {}
    kinds = {part.get("type") for part in decoder.get("decoders", [decoder])}
    if not kinds <= {"ByteLevel"} and not kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return None
    texts: list[bytes | None] = [None] * vocab_size
    for piece, id in backend.get_vocab(with_added_tokens=False).items():
        if kinds == {"ByteLevel"}:
            known = all(char in _BYTE_OF for char in piece)
            texts[id] = bytes(_BYTE_OF[char] for char in piece) if known else None
        elif byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            texts[id] = bytes.fromhex(byte[1])
        else:
            texts[id] = piece.replace("\u2581", " ").encode()
    for id, token in backend.get_added_tokens_decoder().items():
        if id not in plain:
            texts[id] = None if token.special else token.content.encode()
    return texts


def _byte_characters() -> dict[str, int]:
    """Return the byte of each character of a byte-level vocabulary: printable bytes stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_characters()
