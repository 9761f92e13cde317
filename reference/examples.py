"""The ids of a document: where it starts and ends, what is its prompt, where its gap is.

A plain text is [start] + ids + [end]; with a gap to fill it is [start] [prefix] ids [suffix] ids [middle] ids
[end], or with the suffix first [start] [prefix] [suffix] ids [middle] ids ids [end], where the prefix stands
before what fills the gap (arXiv:2207.14255). A prompt and its completion are one text, and the prompt ends,
for generation and in training, where the tokens end that no continuation could change: token healing
(arXiv:2410.09303).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterator
from itertools import chain, islice
from typing import NamedTuple

from config import DataConfig
from reference.library import BYTES, LibraryTokens
from reference.text import SourceDocument, utf8
from reference.tokens import CodeTokens

Tokens = CodeTokens | LibraryTokens

# The spellings of the markers before a prefix, a suffix and a middle.
MARKERS = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)
GAP_SALT = b"plumb fill-in-the-middle 1"  # What the hash of a gap begins with; see data/fim.py.
NEXT = " \t\n\r.,:;()[]{}='\"_#aAzZ059é"  # Characters that may follow a prompt.
FURTHER = " \naA0"  # Characters that may follow these.
MOST_TRIED = 10_000  # Continuations; so many take 0.2 s.
MOST_CONTINUATIONS = 400  # Pieces that are tried for one end of a prompt.
MOST_PIECE = 24  # Characters of the longest end that is tried.


class Written(NamedTuple):
    """The ids of a document, and what the store's tables say of it."""

    ids: list[int]
    n_prompt: int = 0
    suffix_place: int = 0
    n_bytes: int = 0


def gap_of(text: str, rate: float) -> tuple[int, int] | None:
    """Return the characters (start, end) that a document loses to its gap; None without one.

    The first 8 bytes of SHA-256 of GAP_SALT and the text, a share of 2**64, are below `rate`; the next two
    numbers of 8 bytes, modulo the characters and one, are the places. What is one character on the disk, or
    one line end, is not cut in two.
    """
    digest = hashlib.sha256(GAP_SALT + utf8(text)).digest()
    share, *drawn = (int.from_bytes(digest[i : i + 8], "big") for i in (0, 8, 16))
    if not text or share >= rate * 2**64:
        return None
    places = []
    for number in drawn:
        place = number % (len(text) + 1)
        around = text[max(0, place - 1) : place + 1] if place else ""
        is_pair = len(around) == 2 and "\ud800" <= around[0] <= "\udbff" and "\udc00" <= around[1] <= "\udfff"
        places.append(place - (around == "\r\n" or is_pair))
    return min(places), max(places)


def markers_of(tokens: Tokens) -> tuple[int, int, int] | None:
    """Return the ids before a prefix, a suffix and a middle; None if the tokenizer has none."""
    if isinstance(tokens, CodeTokens):
        return tokens.gaps
    for spelled in MARKERS:
        first, second, third = (tokens.id_of(token) for token in spelled)
        if first is not None and second is not None and third is not None:
            return first, second, third
    return None


def plain(document: SourceDocument, tokens: Tokens, data: DataConfig, split: str, gap_lead: int) -> Written:
    """Return the ids of a plain text, of which training cuts a share into gaps."""
    n_bytes = len(utf8(document.text))
    gap = gap_of(document.text, data.fim_rate) if data.fim_rate and split == "train" else None
    if gap is None:
        return Written(_bounded(tokens, tokens.encode(document.text)), n_bytes=n_bytes)
    text, (start, end) = document.text, gap
    prompt, _ = _gap_prompt(text[:start], text[end:], tokens, data, gap_lead)
    return Written([*prompt, *tokens.encode(text[start:end]), *_end(tokens)], n_bytes=n_bytes)


def gap_example(document: SourceDocument, tokens: Tokens, data: DataConfig, gap_lead: int) -> Written:
    """Return the ids of an example that fills a gap, of which the middle is learned."""
    prompt, place = _gap_prompt(document.prompt or "", document.suffix or "", tokens, data, gap_lead)
    ids = [*prompt, *tokens.encode(document.text), *_end(tokens)]
    return Written(ids, len(prompt), place, len(utf8(document.text)))


def apart(document: SourceDocument, tokens: Tokens) -> Written:
    """Return the ids of prompt and completion, each a text of its own."""
    prompt = [*_start(tokens), *(tokens.encode(document.prompt) if document.prompt else [])]
    completion = [*tokens.encode(document.text), *_end(tokens)]
    return Written([*prompt, *completion], len(prompt), n_bytes=len(utf8(document.text)))


def one_text(document: SourceDocument, tokens: Tokens, n_prompt: int) -> Written:
    """Return the ids of prompt and completion as one text, of which `n_prompt` tokens are the prompt."""
    prompt = document.prompt or ""
    ids = _bounded(tokens, tokens.encode(prompt + document.text))
    kept = text_length(tokens, prompt, ids[len(_start(tokens)) : n_prompt])
    n_bytes = -1 if kept is None else len(utf8(prompt[kept:] + document.text))
    return Written(ids, n_prompt, 0, n_bytes)


def text_length(tokens: Tokens, prompt: str, kept: list[int]) -> int | None:
    """Return how many characters of a prompt its first ids spell; None if they end inside a character."""
    for end in range(len(prompt), max(-1, len(prompt) - 2 * max(16, len(prompt))), -1):
        if tokens.encode(prompt[:end]) == kept:
            return end
    return None


def too_late(prompt: str, tokens: Tokens, n_kept: int, pieces: list[str], others: list[str]) -> str | None:
    """Return a continuation that changes one of the first `n_kept` ids of a prompt; None if none is known.

    Args:
        pieces: The texts of the vocabulary, sorted.
        others: Further continuations, such as completions.
    """
    own = tokens.encode(prompt)[:n_kept]
    tried = chain(others, _continuations(prompt, pieces))
    return next((text for text in tried if tokens.encode(prompt + text)[:n_kept] != own), None)


def too_early(prompt: str, tokens: Tokens, n_kept: int, pieces: list[str]) -> bool:
    """Return whether the id after the first `n_kept` of a prompt stays, whatever continues it.

    The prompt's last token is dropped wherever a longer piece begins with it. Of the tokenizer for source
    code nothing is said: its markers and implied spaces go with the piece that they belong to.
    """
    own = tokens.encode(prompt)
    kept = text_length(tokens, prompt, own[:n_kept])
    if isinstance(tokens, CodeTokens) or n_kept == len(own) or kept is None:
        return False
    last = prompt[kept:]
    if n_kept == len(own) - 1 and any(piece.startswith(last) and piece != last for piece in pieces):
        return False
    tried = (text + more for text in chain(NEXT, _continuations(prompt, pieces)) for more in ("", *FURTHER))
    return all(
        tokens.encode(prompt + text)[: n_kept + 1] == own[: n_kept + 1] for text in islice(tried, MOST_TRIED)
    )


def _continuations(prompt: str, pieces: list[str]) -> Iterator[str]:
    """Yield what pieces add to a prompt that begin with its end, in the cases that its end allows."""
    for length in range(1, min(len(prompt), MOST_PIECE) + 1):
        end = prompt[-length:]
        for written in {end, end.lower()}:
            first = bisect_left(pieces, written)
            for piece in pieces[first : first + MOST_CONTINUATIONS]:
                if not piece.startswith(written):
                    break
                yield piece[length:]
                if end[-1].isupper():
                    yield piece[length:].upper()


def piece_texts(tokens: Tokens) -> list[str]:
    """Return the texts of a vocabulary's pieces, sorted, in lower case where cases share their pieces."""
    if isinstance(tokens, CodeTokens):
        words = [*tokens.heads, *tokens.tails]
        return sorted({*words, *(" " + word for word in tokens.heads), *tokens.plain})
    byte = {character: number for number, character in enumerate(BYTES)}
    texts = set()
    for piece in tokens.library.get_vocab(with_added_tokens=False):
        if all(character in byte for character in piece):
            text = bytes(byte[character] for character in piece).decode("utf-8", "ignore")
        else:
            text = piece.replace("\u2581", " ")
        texts |= {text, text.lower()} - {""}
    return sorted(texts)


def _start(tokens: Tokens) -> list[int]:
    start = tokens.end if tokens.start is None else tokens.start
    return [] if start is None else [start]


def _end(tokens: Tokens) -> list[int]:
    return [] if tokens.end is None else [tokens.end]


def _bounded(tokens: Tokens, ids: list[int]) -> list[int]:
    return [*_start(tokens), *ids, *_end(tokens)]


def _gap_prompt(
    prefix: str, suffix: str, tokens: Tokens, data: DataConfig, gap_lead: int
) -> tuple[list[int], int]:
    """Return the ids before a middle, and the place of the marker between the two texts."""
    markers = markers_of(tokens)
    if markers is None:
        raise ValueError("the tokenizer has no markers of a gap")
    before, between, after = markers
    if data.fim_order == "spm":
        ids = [*_start(tokens)[:gap_lead], before, between, *tokens.encode(suffix)]
        return [*ids, after, *tokens.encode(prefix)], len(ids)
    ids = [*_start(tokens)[:gap_lead], before, *tokens.encode(prefix)]
    return [*ids, between, *tokens.encode(suffix), after], len(ids)
