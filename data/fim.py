"""Fill-in-the-middle: the prompt that requests the text between two others (arXiv:2207.14255).

    [prefix] encode(before the gap) [suffix] encode(after the gap) [middle] -> the gap, until an end
    [prefix] [suffix] encode(after the gap) [middle] encode(before the gap) -> the same, the suffix first

The three markers are tokens that the model was trained with; they are found in its tokenizer and put in as
ids. The texts themselves hold no marker: "<fim_prefix>" inside one of them is encoded as plain text. The
start token of other prompts stands before the first marker too, in training as in generation, since other
programs that open the tokenizer's files put it there: `Tokenizer.before`.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import numpy as np

from tokenizer import GAPS, Tokenizer

MARKERS = (
    GAPS,  # StarCoder, StarCoder2, and every tokenizer that is trained here
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
)
# How clients write the gap for models that cannot be opened here, in the order of the text.
FOREIGN = (
    ("<PRE>", "<SUF>", "<MID>"),  # Code Llama
    ("[SUFFIX]", "[PREFIX]"),  # Codestral
    ("<[fim-suffix]>", "<[fim-prefix]>", "<[fim-middle]>"),  # Seed-Coder
)
# Other tokens that such a model writes when the gap is full: another file begins, or the text ends.
ENDS = (
    "<fim_pad>",
    "<fim-pad>",
    "<|fim_pad|>",
    "<|endoftext|>",
    "<file_sep>",
    "<|file_sep|>",
    "<repo_name>",
    "<|repo_name|>",
    "<filename>",
    "<｜end▁of▁sentence｜>",
    "<|EOT|>",
    "<|im_end|>",
)

SALT = b"plumb fill-in-the-middle 1"  # Another salt would cut every document elsewhere.


def known_markers(tokenizer: Tokenizer) -> tuple[int, int, int] | None:
    """Return the ids before the prefix, the suffix and the middle; None if the tokenizer lacks one."""
    for markers in MARKERS:
        prefix, suffix, middle = (tokenizer.token_id(token) for token in markers)
        if prefix is not None and suffix is not None and middle is not None:
            return prefix, suffix, middle
    return None


def fim_markers(
    tokenizer: Tokenizer, so: str = "the model cannot use a suffix; leave it out"
) -> tuple[int, int, int]:
    """Return `known_markers`, or raise.

    Args:
        so: The consequence for the user of having none, and the remedy.

    Raises:
        ValueError: The tokenizer has none, so that the model was not trained to fill gaps.
    """
    if (markers := known_markers(tokenizer)) is not None:
        return markers
    raise ValueError(
        f"the tokenizer has no fill-in-the-middle tokens such as {MARKERS[0][0]}, so {so}, or use a model "
        "such as StarCoder or Qwen2.5-Coder"
    )


def fim_prompt_ids(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """Return the ids that request the text between two others; no other code builds them.

    Raises:
        ValueError: See `fim_markers`.
    """
    before, after, middle = fim_markers(tokenizer)
    start, first, second = tokenizer.before(gap=True), tokenizer.encode(prefix), tokenizer.encode(suffix)
    if tokenizer.suffix_first:
        return [*start, before, after, *second, middle, *first]
    return [*start, before, *first, after, *second, middle]


def between_place(tokenizer: Tokenizer, ids: list[int]) -> int:
    """Return the place of the marker between the two texts of a prompt of `fim_prompt_ids`."""
    return ids.index(fim_markers(tokenizer)[2 if tokenizer.suffix_first else 1])


def fim_kept(n_prefix: Any, n_suffix: Any, room: Any) -> tuple[Any, Any]:
    """Return how many tokens stay of a prefix and of a suffix with `room` for both; numbers or arrays.

    Each loses its tokens far from the gap, the longer one first, of equals the suffix: a prefix on its
    left, a suffix on its right.
    """
    suffix = np.minimum(n_suffix, np.maximum(room - n_prefix, room // 2))
    return np.minimum(n_prefix, room - suffix), suffix


def trim_fim_prompt(tokenizer: Tokenizer, ids: list[int], length: int) -> list[int]:
    """Trim a prompt of `fim_prompt_ids` to `length` tokens by `fim_kept`; its markers and start stay.

    Raises:
        ValueError: `length` is below `fewest_gap_ids`.
    """
    first, *_ = fim_markers(tokenizer)
    start, at = ids.index(first) + 1, between_place(tokenizer, ids)
    if length < start + 2:
        raise ValueError(
            f"a prompt with a gap cannot be trimmed to {length} tokens; it has three markers"
            + (" and a start" if start > 1 else "")
        )
    if tokenizer.suffix_first:
        suffix, prefix = ids[start + 1 : at], ids[at + 1 :]
        n_prefix, n_suffix = fim_kept(len(prefix), len(suffix), length - start - 2)
        return [*ids[: start + 1], *suffix[:n_suffix], ids[at], *prefix[len(prefix) - n_prefix :]]
    prefix, suffix = ids[start:at], ids[at + 1 : -1]
    n_prefix, n_suffix = fim_kept(len(prefix), len(suffix), length - start - 2)
    return [*ids[:start], *prefix[len(prefix) - n_prefix :], ids[at], *suffix[:n_suffix], ids[-1]]


def fewest_gap_ids(tokenizer: Tokenizer) -> int:
    """Return the tokens of a prompt with a gap whose two texts are empty."""
    return len(tokenizer.before(gap=True)) + 3


def gap_start(ids: Any, markers: tuple[int, int, int] | None) -> int | None:
    """Return the place of the first marker in the ids of a document, 0 or 1; None without a gap."""
    if markers is None:
        return None
    return next((place for place in range(min(2, len(ids))) if ids[place] == markers[0]), None)


def gap_of(text: str, rate: float) -> tuple[int, int] | None:
    """Return the characters (start, end) of a document that become its middle; None if it gets no gap.

    A hash of the text alone samples the share `rate` of the documents and the two places, uniformly
    (arXiv:2207.14255, section 3): order, processes and machine do not matter, and a higher rate cuts the same
    documents at the same places, and more. CR LF and surrogate pairs are not cut in two.

    The hash is the SHA-256 of SALT and the text. Its first 8 bytes, a big-endian number, are below
    rate * 2**64; the next two numbers of 8 bytes, modulo the number of characters and one, are the places.
    """
    digest = hashlib.sha256(SALT + text.encode("utf-8", "surrogatepass")).digest()
    draw, *places = (int.from_bytes(digest[at : at + 8], "big") for at in (0, 8, 16))
    if not text or draw >= rate * 2**64:
        return None
    start, end = sorted(_between_characters(text, place % (len(text) + 1)) for place in places)
    return start, end


def _between_characters(text: str, place: int) -> int:
    left, right = text[place - 1 : place], text[place : place + 1]
    pair = "\ud800" <= left <= "\udbff" and "\udc00" <= right <= "\udfff"
    return place - 1 if pair or left + right == "\r\n" else place


def in_text_order(ids: np.ndarray, markers: tuple[int, int, int] | None) -> np.ndarray:
    """Return the ids (n,) of a plain document; one with a gap is put together again, without markers.

    The eos of a document with a gap then stands before its suffix.
    """
    return np.concatenate(parts_in_text_order(ids, markers))


def text_of_document(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Return the text of a plain document's ids (n,); each part of one with a gap is decoded alone."""
    parts = parts_in_text_order(ids, known_markers(tokenizer))
    return "".join(tokenizer.decode(part.tolist()) for part in parts)


def parts_in_text_order(ids: np.ndarray, markers: tuple[int, int, int] | None) -> tuple[np.ndarray, ...]:
    """Return the ids of a plain document, or of one with a gap its prefix, middle and suffix, as in the text.

    Each part decodes to its text, and all at once may not: a `code` tokenizer implies spaces between words.
    With the suffix first nothing stands before its marker, and the prefix before the middle, so that the same
    parts are put together.
    """
    start = gap_start(ids, markers)
    if markers is None or start is None:
        return (ids,)
    first, second = (int(np.flatnonzero(ids == id)[0]) for id in markers[1:])
    return ids[start + 1 : first], ids[second + 1 :], ids[first + 1 : second]


def fim_end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids that end a middle: eos, the markers, and the begin of another file or text."""
    ends = {tokenizer.token_id(token) for token in ENDS} | {tokenizer.eos_id, *fim_markers(tokenizer)}
    return frozenset(id for id in ends if id is not None)


def marked_prompt_ids(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """Return the ids of a prompt whose gap is written out in the text; None where its text has no markers.

    Many clients write the three markers into the text of a prompt. A text that has those of the model, in
    their order, is read with them and with the other tokens of `ENDS` as ids, and all else in it is plain.

    Raises:
        ValueError: The markers are those of another family.
    """
    known = known_markers(tokenizer)
    for markers in FOREIGN:
        if text.lstrip().startswith(markers[0]) and all(token in text for token in markers):
            raise ValueError(_other_family(tokenizer, markers))
    for markers in MARKERS:
        places = [text.rfind(token) for token in markers]
        if min(places) < 0 or places != sorted(places):
            continue
        if known != tuple(tokenizer.token_id(token) for token in markers):
            raise ValueError(_other_family(tokenizer, markers))
        spelled = {token: tokenizer.token_id(token) for token in (*markers, *ENDS)}
        special = {token: id for token, id in spelled.items() if id is not None}
        prefix, suffix = text[len(markers[0]) : places[1]], text[places[1] + len(markers[1]) : places[2]]
        if tokenizer.suffix_first and text == "".join([markers[0], prefix, markers[1], suffix, markers[2]]):
            return fim_prompt_ids(tokenizer, prefix, suffix)  # Written in the order of other models.
        ids = tokenizer.before(gap=True)
        for piece in re.split(f"({'|'.join(map(re.escape, special))})", text):
            ids += [special[piece]] if piece in special else tokenizer.encode(piece) if piece else []
        return ids
    return None


def _other_family(tokenizer: Tokenizer, markers: tuple[str, ...]) -> str:
    own = next((own for own in MARKERS if all(tokenizer.token_id(x) is not None for x in own)), None)
    needed = f"send {' '.join(own)}" if own else "the model knows none: send the text before the gap alone"
    return f"the prompt has the markers {' '.join(markers)} of another family; {needed}"
