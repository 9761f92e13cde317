"""Comparison of a tokenizer that was trained for the run with what the reference learns from its texts."""

from __future__ import annotations

import numpy as np

from data.fim import in_text_order, known_markers
from guards.reference.comparison import Comparison
from guards.subject import GuardSubject
from reference import learning
from reference.library import ByteLevelTokens
from reference.stored import Stored
from reference.tokens import N_GAPS, N_SPECIAL, CodeTokens

CHARACTERS = 200_000  # Of the training texts from which merges are learned again: 0.5 s.
FIRST_BYTE = N_SPECIAL + N_GAPS  # of byte-level BPE
SYMBOLS = 1e6  # Symbols that are gone through, over all merges: 0.3 s.


def compare(
    subject: GuardSubject,
    comparison: Comparison,
    stored: Stored,
    tokens: CodeTokens | ByteLevelTokens | object,
) -> None:
    """Compare kind and size of the tokenizer, and for byte-level BPE its merges, from the first on.

    Which pieces a `code` tokenizer learns is not derived.
    """
    settings = subject.config.tokenizer
    if settings.path is not None or subject.base_folder is not None or subject.start != "fresh":
        return
    kinds = {"code": CodeTokens, "bpe": ByteLevelTokens}
    found = next((kind for kind, made in kinds.items() if isinstance(tokens, made)), "another")
    comparison.exact("kind of the tokenizer", found, settings.kind, "which tokenizer is trained")
    size, least = subject.tokenizer.vocab_size, FIRST_BYTE + 256
    fits = least <= size <= settings.vocab_size
    stage, remedy = "size of the tokenizer", f"from {least} ids to tokenizer.vocab_size"
    comparison.exact(stage, size, size if fits else settings.vocab_size, remedy)
    if isinstance(tokens, ByteLevelTokens):
        _same_merges(subject, comparison, stored, tokens)


def _same_merges(
    subject: GuardSubject, comparison: Comparison, stored: Stored, tokens: ByteLevelTokens
) -> None:
    """Compare ids and merges with those that the training texts give."""
    ids = {character: FIRST_BYTE + number for number, character in enumerate(learning.alphabet())}
    own = {character: tokens.vocabulary.get(character) for character in ids}
    comparison.exact("ids of the bytes", own, ids, "special tokens first, then bytes by their characters")
    if int(stored.byte_lengths.sum()) > CHARACTERS or stored.holds_examples:
        comparison.leave_out("the tokenizer's merges", "the training texts are long, or examples")
        return
    documents = [stored.document(number) for number in range(len(stored))]
    markers = known_markers(subject.tokenizer)
    texts = [subject.tokenizer.decode(in_text_order(np.array(ids), markers)) for ids in documents]
    expected, left = learning.merges(texts, FIRST_BYTE), SYMBOLS
    merges = sorted(tokens.ranks, key=tokens.ranks.__getitem__)
    size, number = subject.config.tokenizer.vocab_size - FIRST_BYTE - 256, -1
    for number in range(size):
        pair = next(expected, None)
        stage, remedy = f"merge {number} of the tokenizer", "the commonest pair is joined first"
        comparison.exact(stage, merges[number] if number < len(merges) else None, pair, remedy)
        left -= sum(len(text) for text in texts)
        if pair is None or left < 0:
            break
    if left < 0 and number + 1 < size:
        comparison.leave_out("later merges of the tokenizer", f"{number + 1} were learned again")
