"""Comparison of a tokenizer that was trained for the run with what the reference learns from its texts.

Of long texts the reference learns a sample, and the run's own trainer does too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from data.fim import text_of_document
from guards.reference.comparison import Comparison
from guards.subject import GuardSubject
from reference import code_learning, learning
from reference.library import ByteLevelTokens
from reference.stored import Stored
from reference.tokens import N_GAPS, N_SPECIAL, CodeTokens, read_tokenizer
from tokenizer import BPETokenizer, CodeTokenizer

# Characters of the training texts from which all is learned again: 0.2 s for code, 0.5 s for BPE.
CHARACTERS = {"code": 40_000, "bpe": 200_000}
FIRST_BYTE = N_SPECIAL + N_GAPS  # of byte-level BPE
SYMBOLS = 1e6  # Symbols that are gone through, over all merges: 0.3 s.
SAMPLE = 10_000  # Characters of longer texts: 0.05 s.
PIECES_OF_SAMPLE = 300
REMEDY = "the commonest pair is joined first; look at how pieces are learned"
Tokens = CodeTokens | ByteLevelTokens


def compare(
    subject: GuardSubject,
    comparison: Comparison,
    stored: Stored,
    tokens: CodeTokens | ByteLevelTokens | object,
) -> None:
    """Compare kind and size of the tokenizer, and what it has learned, from the first piece on."""
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
    assert isinstance(tokens, Tokens)
    if isinstance(tokens, CodeTokens):
        comparison.exact("its tokens for gaps", tokens.gaps is not None, True, "each new tokenizer has three")
    else:
        ids = {character: FIRST_BYTE + number for number, character in enumerate(learning.alphabet())}
        own = {character: tokens.vocabulary.get(character) for character in ids}
        comparison.exact("ids of the bytes", own, ids, "special tokens first, then bytes by their characters")
    _same_pieces(subject, comparison, stored, tokens)


def _same_pieces(subject: GuardSubject, comparison: Comparison, stored: Stored, tokens: Tokens) -> None:
    """Compare the pieces with those that the training texts give, or a sample of these."""
    settings = subject.config.tokenizer
    if (stored.suffixes > 0).any():
        comparison.leave_out("the tokenizer's pieces", "examples with gaps were trained on")
    elif int(stored.offsets[-1]) and _characters(stored) <= CHARACTERS[settings.kind]:
        texts = tuple(text for number in range(len(stored)) for text in _texts(subject, stored, number))
        _same_learned(comparison, tokens, texts, settings.vocab_size, settings.min_count)
    else:
        texts = tuple(_sampled(subject, stored))
        size = min(settings.vocab_size, code_learning.FIRST_PIECE + N_GAPS + PIECES_OF_SAMPLE)
        if isinstance(tokens, CodeTokens):
            again = CodeTokenizer.train(texts, size, settings.min_count)
        else:
            again = BPETokenizer.train(texts, size)
        with tempfile.TemporaryDirectory() as folder:
            again.save(Path(folder))
            read = read_tokenizer(Path(folder))
        assert isinstance(read, Tokens)
        _same_learned(comparison, read, texts, size, settings.min_count)


def _same_learned(
    comparison: Comparison, tokens: Tokens, texts: tuple[str, ...], size: int, min_count: int
) -> None:
    if isinstance(tokens, ByteLevelTokens):
        _same_merges(comparison, tokens, texts, size)
        return
    expected = CodeTokens(_learned(texts, size, min_count))
    for kind in ("heads", "tails", "plain"):
        own, theirs = [*getattr(tokens, kind)], [*getattr(expected, kind)]
        place = next((i for i, (a, b) in enumerate(zip(own, theirs, strict=False)) if a != b), None)
        if place is not None:
            comparison.exact(f"{kind} of the tokenizer, from {place} on", own[place], theirs[place], REMEDY)
        comparison.exact(f"{kind} of the tokenizer", own, theirs, REMEDY)
    remedy = "the commonest case of a head is its usual one"
    comparison.exact("usual cases of heads", tokens.usual, expected.usual, remedy)


@lru_cache(4)  # Runs of one process may train on the same texts.
def _learned(texts: tuple[str, ...], size: int, min_count: int) -> dict[str, list[str]]:
    return code_learning.learned(texts, size, min_count)


def _same_merges(comparison: Comparison, tokens: ByteLevelTokens, texts: tuple[str, ...], size: int) -> None:
    """Compare merges with those that the texts give, as many as there is time for."""
    expected, left = learning.merges(texts, FIRST_BYTE), SYMBOLS
    merges = sorted(tokens.ranks, key=tokens.ranks.__getitem__)
    size, number = size - FIRST_BYTE - 256, -1
    for number in range(size):
        pair = next(expected, None)
        stage, remedy = f"merge {number} of the tokenizer", "the commonest pair is joined first"
        comparison.exact(stage, merges[number] if number < len(merges) else None, pair, remedy)
        left -= sum(len(text) for text in texts)
        if pair is None or left < 0:
            break
    if left < 0 and number + 1 < size:
        comparison.leave_out("later merges of the tokenizer", f"{number + 1} were learned again")


# --- training texts ------------------------------------------------------------------------------------


def _characters(stored: Stored) -> int:
    """Return at least as many characters as the training texts have: a token of a prompt may be long."""
    prompts = int(stored.prompts.sum()) if stored.holds_examples else 0
    return int(stored.byte_lengths.sum()) + prompts * 8


def _texts(subject: GuardSubject, stored: Stored, number: int) -> Iterator[str]:
    """Yield the texts of a document: of an example the prompt and the completion."""
    ids, prompt, cut = stored.document(number), int(stored.prompts[number]), int(stored.cuts[number])
    if cut >= 0:
        whole = subject.tokenizer.decode(ids)
        yield from (whole[:cut], whole[cut:])
    elif prompt:
        yield from (subject.tokenizer.decode(part) for part in (ids[:prompt], ids[prompt:]))
    else:
        yield text_of_document(subject.tokenizer, np.array(ids))


def _sampled(subject: GuardSubject, stored: Stored) -> Iterator[str]:
    """Yield texts of training, sampled anew at each start, of SAMPLE characters together."""
    room = SAMPLE
    for number in np.random.Generator(np.random.PCG64()).permutation(len(stored)):
        for text in _texts(subject, stored, int(number)):
            yield text[:room]
            room -= len(text)
            if room <= 0:
                return
