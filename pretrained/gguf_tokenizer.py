"""A tokenizer in the words of GGUF, or a sentence that says why it has none.

llama.cpp knows byte-level BPE whose text is first cut by one of a list of rules, each with a name
(`tokenizer.ggml.pre`). Here a rule is recognised by the pre-tokenizer of tokenizer.json, part by part. What
llama.cpp reads otherwise than `tokenizers` does is refused: it raises no error there, and has other ids.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data.fim import known_markers
from tokenizer import Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # Kinds of a token, as llama.h numbers them.
MOST_OVERLAPS = 2000
WAY_OUT = "train with --tokenizer.kind bpe, or serve the model by Plumb"

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGITS, _BYTES, _GPT2 = ("Digits", "True"), ("ByteLevel", "False"), ("ByteLevel", "True")
# The rules by llama.cpp's names (llama-vocab.cpp): their parts, and whether a word that is a token is taken
# whole before any merge.
RULES: dict[str, tuple[tuple[tuple[str, str], ...], bool]] = {
    "gpt-2": ((_GPT2,), False),
    "starcoder": ((_DIGITS, _GPT2), False),
    "qwen2": ((("Split", rf"{_WORDS}|\p{{N}}{_REST}"), _BYTES), False),
    "llama-bpe": ((("Split", rf"{_WORDS}|\p{{N}}{{1,3}}{_REST}"), _BYTES), True),
    "deepseek-coder": (
        (
            ("Split", "[\r\n]"),
            ("Split", r"\s?\p{L}+"),
            ("Split", r"\s?\p{P}+"),
            ("Split", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"),
            _DIGITS,
            _BYTES,
        ),
        False,
    ),
}


@dataclass(frozen=True)
class GgufVocabulary:
    """What a GGUF file says of a tokenizer.

    Args:
        pre: The name of the rule that cuts text.
        tokens: (vocab_size,) texts; those of ordinary pieces in byte-level spelling.
        kinds: (vocab_size,) of NORMAL, CONTROL, USER_DEFINED and UNUSED.
        merges: Pairs with a space between, the first ones first.
        ids: By the key after `tokenizer.ggml.` the ids of single tokens.
        starts: Whether `bos_token_id` stands before every text.
    """

    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    ids: dict[str, int]
    starts: bool


def gguf_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> GgufVocabulary:
    """Return the tokenizer of a model with `vocab_size` rows in the words of GGUF.

    Raises:
        ValueError: llama.cpp would give other ids, or knows no such tokenizer.
    """
    rules = tokenizer.rules()
    if rules is None:
        raise ValueError(
            f"the `{tokenizer.kind}` tokenizer has no form in GGUF, whose readers know BPE by fixed rules; "
            f"{WAY_OUT}"
        )
    pre = _rule(rules)
    if tokenizer.eos_id is None:
        raise ValueError("the tokenizer names no end token, and llama.cpp would end a text at id 11 instead")
    model, added = rules["model"], {token["id"]: token for token in rules["added_tokens"]}
    pieces = {id: piece for piece, id in model["vocab"].items()}
    tokens, kinds, taken = [], [], set(model["vocab"]) | {token["content"] for token in added.values()}
    for id in range(vocab_size):
        token = added.get(id)
        # A folder may name a piece of plain text as its pad token; it stays a piece.
        if token is not None and not (
            id in pieces and tokenizer.bytes_of([id]) is not None and token["special"]
        ):
            tokens.append(token["content"])
            kinds.append(CONTROL if token["special"] else USER_DEFINED)
        elif id in pieces:
            tokens.append(pieces[id])
            kinds.append(NORMAL)
        else:
            tokens.append(_unused(id, taken))
            kinds.append(UNUSED)
    _refuse_added(tokenizer, list(added.values()))
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return GgufVocabulary(
        pre,
        tokens,
        kinds,
        [f"{left} {right}" for left, right in merges],
        _ids(tokenizer),
        bool(tokenizer.before()),
    )


def _unused(id: int, taken: set[str]) -> str:
    """Return a text for a row without a token; llama.cpp refuses a file in which two are alike."""
    text = f"[PAD{id}]"
    while text in taken:
        text += "_"
    taken.add(text)
    return text


def _ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of single tokens by key.

    llama.cpp has three keys of tokens that end a text, and takes 11 for a bos that is not named.
    """
    start = tokenizer.start_id
    bos = start if start is not None else tokenizer.bos_id
    ends = tuple(dict.fromkeys((tokenizer.eos_id, *tokenizer.eos_ids)))
    if len(ends) > 3:
        raise ValueError(
            f"{len(ends)} tokens end a text ({ends}), and GGUF has keys for 3; take some out of "
            "eos_token_id in generation_config.json"
        )
    ids = {"bos_token_id": tokenizer.eos_id if bos is None else bos, "padding_token_id": tokenizer.pad_id}
    ids |= dict(zip(("eos_token_id", "eot_token_id", "eom_token_id"), ends, strict=False))
    markers = known_markers(tokenizer) or ()
    if markers and tokenizer.before() != tokenizer.before(gap=True):
        print(
            "warning: gaps were trained without the start that stands before every other text, and /infill "
            "of llama.cpp puts it before their prompts too",
            file=sys.stderr,
        )
    ids |= dict(zip(("fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id"), markers, strict=False))
    pads = (tokenizer.token_id(token) for token in ("<fim_pad>", "<fim-pad>", "<|fim_pad|>"))
    ids["fim_pad_token_id"] = next((id for id in pads if id is not None), None)
    return {key: id for key, id in ids.items() if id is not None}


def _rule(rules: dict[str, Any]) -> str:
    """Return llama.cpp's name of the rule by which a tokenizer.json cuts text."""
    model, normalizer = rules["model"], rules["normalizer"]
    unusual = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    other = [key for key in unusual if model.get(key)] or [
        kind for kind in [model.get("type")] if kind != "BPE"
    ]
    if other:
        raise ValueError(
            f"the tokenizer is no byte-level BPE (its model has {other[0]}), and others are not written "
            f"as GGUF; {WAY_OUT}"
        )
    if normalizer not in (None, {"type": "NFC"}):
        raise ValueError(
            f"the tokenizer normalises text by {normalizer.get('type')}, which llama.cpp does not; {WAY_OUT}"
        )
    if normalizer is not None:
        print(
            "warning: the tokenizer brings text into the form NFC, and llama.cpp does not: text with "
            "combining characters, such as e and U+0301, has other ids there",
            file=sys.stderr,
        )
    wanted = tuple(_parts(rules["pre_tokenizer"])), bool(model.get("ignore_merges"))
    for name, rule in RULES.items():
        if rule == wanted:
            return name
    kinds = ", ".join(kind for kind, _ in wanted[0]) or "none"
    raise ValueError(
        f"text is cut by a pre-tokenizer ({kinds}) that is none of those with a name in llama.cpp which are "
        f"known here ({', '.join(RULES)}); {WAY_OUT}"
    )


def _parts(part: Any) -> Iterator[tuple[str, str]]:
    """Yield the kind and the one setting of each part of a pre-tokenizer; what is unusual is unknown."""
    part = part or {}
    kind = str(part.get("type"))
    if kind == "Sequence":
        for inner in part["pretokenizers"]:
            yield from _parts(inner)
        return
    regex = part.get("pattern", {}).get("Regex")
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        yield kind, str(part.get("use_regex", True))
    elif kind == "Digits":
        yield kind, str(part["individual_digits"])
    elif kind == "Split" and regex and part["behavior"] == "Isolated" and not part["invert"]:
        yield kind, regex
    else:
        yield f"{kind} of another kind", ""


# --- added tokens ---------------------------------------------------------------------------------


def _refuse_added(tokenizer: Tokenizer, added: list[dict[str, Any]]) -> None:
    """Refuse added tokens that llama.cpp would recognise elsewhere in a text."""
    for token in added:
        flags = [flag for flag in ("single_word", "lstrip", "rstrip") if token[flag]]
        if flags:
            raise ValueError(
                f"the added token {token['content'][:40]!r} is {flags[0]}, which GGUF cannot say; {WAY_OUT}"
            )
    words = {token["content"]: token["id"] for token in added if not token["special"]}
    by_length = sorted(words, key=len, reverse=True)
    for text in _overlaps(by_length):
        parts = _longest_first(text, [word for word in by_length if word in text])
        expected = [
            id for part in parts for id in ([words[part]] if part in words else tokenizer.encode(part))
        ]
        if tokenizer.encode(text) != expected:
            raise ValueError(
                f"the added tokens in {text[:60]!r} overlap: here the first one counts, and in llama.cpp the "
                f"longest; {WAY_OUT}"
            )


def _overlaps(words: list[str]) -> list[str]:
    """Return the texts in which the end of one word is the beginning of another."""
    beginning: defaultdict[str, list[str]] = defaultdict(list)
    for word in words:
        for end in range(1, len(word)):
            beginning[word[:end]].append(word)
    texts: dict[str, None] = {}
    for word in words:
        for start in range(1, len(word)):
            for other in beginning.get(word[start:], ()):
                texts[word[:start] + other] = None
                if len(texts) > MOST_OVERLAPS:
                    raise ValueError(f"more than {MOST_OVERLAPS:,} pairs of added tokens overlap; {WAY_OUT}")
    return list(texts)


def _longest_first(text: str, words: list[str]) -> list[str]:
    """Return the parts into which llama.cpp divides a text: by each word in turn, from left to right."""
    parts = [text]
    for word in words:
        found: list[str] = []
        for part in parts:
            if part in words:
                found.append(part)
                continue
            for number, piece in enumerate(part.split(word)):
                found += ([word] if number else []) + ([piece] if piece else [])
        parts = found
    return parts
