"""Speculation: tokens that are proposed cheaply, and verified by the model in one pass (arXiv:2211.17192).

    last token, proposed tokens -> one pass -> a choice at each place, for as long as it is what was proposed

A choice is made as ever, with the random number that the place would have had, and a proposal is taken if it
is what was chosen. So a text is that without speculation, greedy or sampled: for proposals that are certain
of their token this is rejection sampling, which takes a token as often as the model gives it.

Proposals come from what the text already says (`Lookup`: code repeats itself; arXiv:2304.04487) or from an
n-gram model of the user's files (`NGram`). A pass over several tokens takes longer than a step, which is
measured while it runs; a text whose proposals bring less than they cost stops proposing, and tries again ever
more rarely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from data.ngram import NGramModel

SHORTEST = 3  # tokens that have to stand in the text before a proposal follows them
MOST = 12  # tokens that are proposed at a time
FIRST = 3  # the same at first
PATIENCE = 16  # tokens without a proposal, at least, after a text's did not pay; twice as many each time
COST = 0.1  # what verifying a token costs until it was measured, as a share of a step
LATEST = 0.3  # share of the newest measurement in a mean
MOST_LOST = 0.04  # of a text's steps, what proposals that did not pay may have cost


class Proposer(Protocol):
    """What proposes tokens of one text."""

    def extend(self, ids: Sequence[int]) -> None:
        """Take the tokens by which the text has grown; at first its prompt's."""
        ...

    def propose(self, most: int) -> list[int]:
        """Return what may follow, at most so many tokens."""
        ...


class Lookup:
    """What followed the text's last tokens where they stood before."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # the place after the last time that tokens stood there

    def extend(self, ids: Sequence[int]) -> None:
        """Take the tokens by which the text has grown."""
        for id in ids:
            self.after[tuple(self.ids[-SHORTEST:])] = len(self.ids)
            self.ids.append(id)

    def propose(self, most: int) -> list[int]:
        """Return what followed the last tokens when they stood there before."""
        place = self.after.get(tuple(self.ids[-SHORTEST:]))
        return [] if place is None else self.ids[place : place + most]


class NGram:
    """The likeliest tokens of an n-gram model."""

    def __init__(self, model: NGramModel) -> None:
        self.model, self.ids = model, list[int]()

    def extend(self, ids: Sequence[int]) -> None:
        """Take the tokens by which the text has grown."""
        self.ids = [*self.ids, *ids][-self.model.order :]

    def propose(self, most: int) -> list[int]:
        """Return the likeliest continuation, token by token."""
        return self.model.complete([np.array(self.ids)], most)[0].tolist()


PROPOSERS: dict[str, Callable[[], Proposer] | None] = {"none": None, "lookup": Lookup}


class Costs:
    """What passes over several tokens of so many rows take, by measurements while they run."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[int, int], float] = {}

    def note(self, rows: int, length: int, seconds: float) -> None:
        """Note what one pass took. Other processes only add to it, so that less counts at once."""
        mean = self.seconds.get((rows, length), seconds)
        self.seconds[rows, length] = min(seconds, mean + LATEST * (seconds - mean))

    def of(self, rows: int, length: int) -> float:
        """Return by how much a pass is longer than one over a token a row, in such passes."""
        step, whole = self.seconds.get((rows, 1)), self.seconds.get((rows, length))
        return COST * (length - 1) if step is None or whole is None else max(0.0, whole / step - 1)


class Speculation:
    """The proposals of one text, and whether they pay.

    Attributes:
        proposed: Tokens that were proposed so far.
        taken: Those of them that the model chose too.
    """

    def __init__(self, make: Callable[[], Proposer], prompt: Sequence[int]):
        self.proposer = make()
        self.proposer.extend(prompt)
        self.proposed = self.taken = 0
        # `gain` is what a recent proposal brought: tokens, less what verifying them cost, in steps.
        self.length, self.gain = FIRST, 0.5
        # Two tokens without any at first: what a step takes has to be known.
        self.wait, self.pause, self.lost = 2, PATIENCE, 0.0

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        """Return proposals after new tokens, none where they do not pay."""
        self.proposer.extend(ids)
        self.wait -= len(ids)
        if self.wait > 0 or most < 1:
            return []
        return self.proposer.propose(min(most, self.length))

    def learn(self, proposed: int, taken: int, cost: float) -> None:
        """Note how many of a pass's proposals were taken, and propose more, fewer or none.

        Args:
            cost: What they cost, in steps.
        """
        self.proposed += proposed
        self.taken += taken
        cost = min(cost, proposed)  # A pass that took longer was held up by other processes.
        self.length = min(MOST, 2 * self.length) if taken == proposed else max(1, taken + 1)
        self.gain += LATEST * (taken - cost - self.gain)
        self.lost = max(0.0, self.lost + cost - taken)
        if self.gain < 0:
            self.wait = max(self.pause, math.ceil(self.lost / MOST_LOST))
            self.gain, self.length, self.lost = 0.0, FIRST, 0.0
            self.pause *= 2

    def __str__(self) -> str:
        said = f"{self.taken} of {self.proposed} proposed tokens were taken"
        return said + (f"; off for {self.wait} tokens, since they did not pay" if self.wait > 0 else "")
