"""Comparison of how prompts are read: their ids, and what may stand in the place of a healed end.

A text of the source is cut anywhere. The reference's tokenizer writes the whole of it, and what it writes
over the cut must be among the tokens that generation may choose, with the probability that the model gives
them.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from architecture import Decoder
from generation.engine import Generated, generate_ids
from generation.rows import rows_of
from generation.settings import GenerationConfig
from generation.text import as_prompt
from guards.reference.comparison import Comparison
from guards.reference.reader import Reader
from reference.generation import chances_of_covers
from reference.tokens import read_tokenizer
from tokenization.healing import Prompt

CUTS = 12
SHORT, LONG = 20, 90  # Characters of a prompt; before a cut, and of the text around it.
MOST_BRANCHES = 24  # Of a prompt whose chances are compared.
COMPARED = 3  # Prompts whose chances are compared.
REMEDY = (
    "compare tokenization/healing.py, generation/reading.py and generation/rows.py with "
    "reference/generation.py"
)


class Generating(Protocol):
    """What generates: a model, its tokenizer, and texts out of which prompts are cut."""

    @property
    def model(self) -> Decoder: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def first_documents(self) -> Sequence[Any]: ...


class Cut(NamedTuple):
    """A prompt, its ids as the run makes them, and what the reference writes up to its end or past it."""

    text: str
    prompt: Prompt
    cover: list[int]


def compare_prompts(subject: Generating, comparison: Comparison, reader: Reader, room: int) -> None:
    """Compare prompts that are cut out of the first documents.

    Args:
        room: Most tokens of a prompt.
    """
    with tempfile.TemporaryDirectory() as folder:
        subject.tokenizer.save(Path(folder))
        tokens = read_tokenizer(Path(folder))
    if tokens is None or not tokens.has_words or subject.tokenizer.bytes_of([]) is None:
        comparison.leave_out("the ends of prompts", "the tokenizer knows no words")
        return
    cuts = [
        cut
        for text, place in _texts(subject)
        if len((cut := _cut(subject, tokens, text, place)).cover) <= room
    ]
    missed = 0
    for number, cut in enumerate(cuts, 1):
        start = subject.tokenizer.prompt_ids("")
        expected = [*start, *tokens.encode(cut.text)]
        comparison.exact(f"prompt {number}, ids", subject.tokenizer.prompt_ids(cut.text), expected, REMEDY)
        if not subject.tokenizer.heals:
            continue
        comparison.exact(f"prompt {number}, ids of its healed parts", cut.prompt.whole, expected, REMEDY)
        compare_texts(subject, comparison, f"prompt {number}", cut)
        missed += cut.cover not in covers(cut.prompt)
    # One may be written so rarely that healing does not know it.
    comparison.exact("tokens at the ends of prompts that could not be chosen", max(0, missed - 1), 0, REMEDY)
    compare_healed(subject, comparison, reader, [cut.prompt for cut in cuts if cut.prompt.branches])


def _texts(subject: Generating) -> list[tuple[str, int]]:
    """Return pieces of the first documents, and a place in each."""
    draw = np.random.Generator(np.random.PCG64())
    texts = [document.text for document in subject.first_documents if len(document.text) > 2]
    found = []
    for text in (texts[draw.integers(len(texts))] for _ in range(CUTS if texts else 0)):
        first = int(draw.integers(max(1, len(text) - LONG)))
        piece = text[first : first + LONG]
        found.append((piece, int(draw.integers(min(SHORT, len(piece) - 1), len(piece)))))
    return found


def _cut(subject: Generating, tokens: Any, text: str, place: int) -> Cut:
    whole, end = tokens.encode(text), len(text[:place].encode("utf-8", "surrogatepass"))
    reach = (n for n in range(1, len(whole)) if len(subject.tokenizer.bytes_of(whole[:n]) or b"") >= end)
    start = subject.tokenizer.prompt_ids("")
    ids = subject.tokenizer.prompt_ids(text[:place])
    return Cut(text[:place], as_prompt(subject.tokenizer, ids), [*start, *whole[: next(reach, len(whole))]])


def covers(prompt: Prompt) -> list[list[int]]:
    """Return all token sequences with which a text that begins with the prompt may begin."""
    if not prompt.branches:
        return [prompt.whole]
    return [[*prompt.ids, *branch.ids, id] for branch in prompt.branches for id in branch.allowed.tolist()]


def compare_texts(subject: Generating, comparison: Comparison, stage: str, cut: Cut) -> None:
    """See that the text of some covers begins with the prompt, and does not without its last token.

    What all covers begin with is not dropped.
    """
    start, text = len(subject.tokenizer.prompt_ids("")), cut.text.encode("utf-8", "surrogatepass")
    shared = {branch.ids[:1] for branch in cut.prompt.branches}
    kept = len(shared) != 1 or shared == {()}
    comparison.exact(f"{stage}, what all its ends begin with stays", kept or shared, True, REMEDY)
    for branch in cut.prompt.branches:
        for id in (int(branch.allowed[0]), int(branch.allowed[-1])):
            ids = [*cut.prompt.ids, *branch.ids, id][start:]
            whole, before = (subject.tokenizer.bytes_of(part) or b"" for part in (ids, ids[:-1]))
            is_cover = whole.startswith(text) and not before.startswith(text)
            comparison.exact(f"{stage}, text of what may end it", is_cover or whole, True, REMEDY)


def compare_healed(
    subject: Generating, comparison: Comparison, reader: Reader, prompts: list[Prompt]
) -> None:
    """Compare the chances of what ends the prompts, all read together, and a continuation of each."""
    prompts = sorted(prompts, key=lambda prompt: len(prompt.branches))[:COMPARED]
    prompts = [prompt for prompt in prompts if len(prompt.branches) <= MOST_BRANCHES]
    if not prompts:
        comparison.leave_out("the chances of what ends a prompt", "there are none, or too many for each")
        return
    # A prompt with nothing to heal between those that have.
    together = [prompts[0], Prompt(prompts[0].whole), *prompts[1:]]
    settings, words = GenerationConfig(max_new_tokens=2), subject.tokenizer.vocab_size
    live = rows_of(subject.model, together, settings, words)
    choices, firsts = live.choices()
    V = live.logits.size(1)
    found = generate_ids(subject.model, together, settings, None, words)
    numbers = [live.prompts[row] for row in firsts]
    comparison.exact("prompts that have a row", sorted(numbers), [*range(len(together))], REMEDY)
    for place, (row, number) in enumerate(zip(firsts, numbers, strict=True)):
        prompt, one, stage = together[number], found[number], f"what ends prompt {number + 1}"
        expected = expected_chances(reader, prompt, words)
        of_rows = choices[place].double().cpu().softmax(-1).view(-1, V)[: len(expected)]
        right = torch.zeros_like(of_rows)
        # Branches of one length are read together, so their rows may be in another order.
        places = {live.branches[row + i].ids if prompt.branches else (): i for i in range(len(expected))}
        for ids, p in zip([branch.ids for branch in prompt.branches] or [()], expected, strict=True):
            right[places[ids], :words] = p
        off = float((of_rows - right).abs().max()) / float(right.max())
        tolerance = off if reader.explains(off / 2, 4) else 0.0
        comparison.close(f"{stage}, chances", of_rows, right, tolerance, REMEDY)
        compare_continuation(comparison, reader, stage, prompt, one, expected)


def expected_chances(reader: Reader, prompt: Prompt, words: int) -> list[torch.Tensor]:
    """Return the chances (words,) of the last tokens of each branch, or of the next token."""
    if not prompt.branches:
        return [reader.logits(prompt.ids)[-1][:words].softmax(-1)]
    branches = []
    for branch in prompt.branches:
        logits, weight = reader.logits([*prompt.ids, *branch.ids]), 0.0
        if branch.ids:
            before = logits[len(prompt.ids) - 1 : -1].log_softmax(-1)
            weight = float(before.gather(1, torch.tensor(branch.ids)[:, None]).sum())
        branches.append((weight, logits[-1], branch.allowed.tolist()))
    return [chances[:words] for chances in chances_of_covers(branches)]


def compare_continuation(
    comparison: Comparison,
    reader: Reader,
    stage: str,
    prompt: Prompt,
    one: Generated,
    expected: list[torch.Tensor],
) -> None:
    """Compare a greedy continuation, whose first tokens are the likeliest cover.

    Its log-probability is that of a text of which it is known that it begins with the prompt.
    """
    begun = [list(branch.ids) for branch in prompt.branches] or [[]]
    fits = (
        place
        for place, (ids, p) in enumerate(zip(begun, expected, strict=True))
        if one.ids[: len(ids)] == ids and len(one.ids) > len(ids) and float(p[one.ids[len(ids)]]) > 0
    )
    place = next(fits, None)
    comparison.exact(f"{stage}, it is one that may", place is not None, True, REMEDY)
    assert place is not None
    n = len(begun[place])
    chance, best = float(expected[place][one.ids[n]]), max(float(p.max()) for p in expected)
    is_best = chance == best or reader.explains(math.log(best / chance), 2 * n + 2)
    comparison.exact(f"{stage}, the likeliest", is_best or chance, True, REMEDY)
    after = reader.logits([*prompt.ids, *one.ids])[len(prompt.ids) - 1 : -1].log_softmax(-1)
    of_ids = after.gather(1, torch.tensor(one.ids)[:, None])[:, 0]
    first = math.log(chance) if prompt.branches else float(of_ids[n])
    total = first + float(of_ids[n + 1 :].sum())
    reader.close(comparison, f"{stage}, log-probability", one.log_prob, total, len(one.ids) + 2 * n + 2)
