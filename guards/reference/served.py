"""Comparison of requests that come one after another, as to a server, with the reference.

What an earlier request has in common with a prompt is not read again, and tokens that are foreseen are
verified together. Neither may change a text, whatever of it was foreseen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from architecture import Decoder
from generation.engine import Engine, evaluating
from generation.prefixes import PAGE
from generation.requests import Generated, Request
from generation.scheduling import EngineLimits
from generation.settings import GenerationConfig
from guards.reference.comparison import Comparison

LONGEST, SHARED = 40, 20  # Tokens of the first prompt, and those with which a shorter one begins alike.
OWN = 4  # Tokens of a prompt after what it shares.


class Foreseen:
    """Proposals of a text that is known, wrong from some place on; of another text all are wrong.

    Args:
        text: The ids that are known, the prompt's included.
        right: How many of a proposal are right.
    """

    def __init__(self, text: list[int], right: int, words: int):
        self.text, self.right, self.words = text, right, words
        self.ids: list[int] = []

    def extend(self, ids: Sequence[int]) -> None:
        """Take the tokens by which the text has grown."""
        self.ids += ids

    def propose(self, most: int) -> list[int]:
        """Return what follows, and then tokens that do not."""
        n = len(self.ids)
        is_known = self.ids == self.text[:n]
        found = self.text[n : n + most] if is_known else [0] * most
        right = self.right if is_known else 0
        return [*found[:right], *((id + 1) % self.words for id in found[right:])]


def compare_served(
    model: Decoder,
    comparison: Comparison,
    words: int,
    room: int,
    compare: Callable[[str, list[list[int]], list[Generated]], None],
    settings: GenerationConfig,
) -> None:
    """Compare texts of an engine that has read their beginnings before, and foresees much, little or nothing.

    Six arguments: the model and what may be generated, and the comparison of texts.

    Args:
        words: The ids that may be chosen are those below.
        room: Most tokens of a text.
        compare: Compares continuations of prompts with the reference's reading of them.
    """
    size = min(LONGEST, room - settings.max_new_tokens)
    if size < PAGE + OWN:
        comparison.leave_out("what earlier requests have read", f"texts of {room} tokens are too short")
        return
    first = torch.randint(words, (size,)).tolist()
    shared = min(SHARED, size - OWN)
    other = [*first[:shared], (first[shared] + 1) % words, *torch.randint(words, (OWN - 1,)).tolist()]
    with evaluating(model):
        engine = Engine(model, words, EngineLimits(), lambda: Foreseen([], 0, words))
        (alone,) = _written(engine, [first], settings)
        compare("of a first request", [first], [alone])
        for right, prompts in ((settings.max_new_tokens, [first]), (1, [first, other])):
            engine.proposer = partial(Foreseen, [*first, *alone.ids], right, words)
            compare(f"of a later request, {right} foreseen", prompts, _written(engine, prompts, settings))


def _written(engine: Engine, prompts: list[list[int]], settings: GenerationConfig) -> list[Generated]:
    """Return the continuations of prompts that are asked for together."""
    handles = [engine.add(Request(prompt, settings)) for prompt in prompts]
    while engine.step():
        pass
    return [found for handle in handles for found in handle.result()]
