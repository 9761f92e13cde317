"""Prompts that are read, a piece at a time, before they have rows among those under way (generation/rows.py).

Prompts of unequal length share a pass by padding on the left. Padding is document -1, which nothing else
sees, and each row counts its positions from its own first token, so a batch gives what single prompts give.

A prompt whose end was dropped (`tokenization/healing.py`) has a row for each of its branches until its first
token is chosen, from all of them at once: a branch counts as much as the model gives to its tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from architecture import Decoder
from generation.kvcache import KVCache
from generation.sampling import Score, scores_of
from tokenization.healing import Branch, Prompt

A_PASS = 128  # tokens that a CPU computes in the time that one more pass costs by reading all weights


def pad_left(
    prompts: Sequence[list[int]], device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, positions and document ids, each (B, longest prompt), for `Decoder.forward`.

    Padding stands on the left, so that the last column is the last token of every row. It is document -1 and
    holds token 0, which no prompt token sees; a prompt is document 0 and its positions count from 0.
    """
    lengths = torch.tensor([len(ids) for ids in prompts])
    longest = int(lengths.max())
    tokens = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    positions = torch.arange(longest) - (longest - lengths)[:, None]
    document_ids = torch.where(positions < 0, -1, 0)
    return tokens.to(device), positions.clamp(min=0).to(device), document_ids.to(device)


def read_together(lengths: Sequence[int], a_pass: int = A_PASS) -> list[list[int]]:
    """Group prompts by number into passes, so that as little padding as possible is computed.

    A pass costs its number of prompts times the longest of them, in tokens, and `a_pass`. The result is the
    cheapest way to cut the prompts, sorted by length, into passes.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best, cut = [0] + [0] * len(order), [0] * (len(order) + 1)  # least cost, and last cut, of the first n
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        costs = [best[start] + (end - start) * longest + a_pass for start in range(end)]
        best[end] = min(costs)
        cut[end] = costs.index(best[end])
    passes, end = [], len(order)
    while end:
        passes.append(order[cut[end] : end])
        end = cut[end]
    return passes


class Asked(NamedTuple):
    """A prompt to read, by the number of its text.

    scored: The likeliest tokens to name in the place of each of its tokens; None scores none of them.
    """

    number: int
    prompt: Prompt
    scored: int | None = None


class Part(NamedTuple):
    """Rows (n) that were read together and have no place among the others yet.

    hidden: (n, C) hidden states of their last tokens.
    prompts: The number of each row's text.
    branches: The branch of each row, None where its prompt has none.
    chances: (n, tokens of a branch) float64, the log-probabilities of the branch's tokens.
    """

    cache: KVCache
    hidden: Tensor
    prompts: list[int]
    branches: list[Branch | None]
    chances: Tensor


def passes_of(asked: Sequence[Asked], device: torch.device) -> list[list[Asked]]:
    """Return prompts in the groups that are read together; equal ones, such as samples, share a group."""
    equal: dict[tuple[int, ...], list[Asked]] = {}
    scored = [[one] for one in asked if one.scored is not None]
    for one in asked:
        if one.scored is None:
            equal.setdefault(tuple(one.prompt.ids), []).append(one)
    unique = list(equal)
    # On a GPU a small pass costs as much as a larger one.
    passes = [list(range(len(unique)))] if unique else []
    if device.type == "cpu":
        passes = read_together([len(ids) for ids in unique])
    return scored + [[one for i in together for one in equal[unique[i]]] for together in passes]


class Reading:
    """Prompts that are read together, equal ones once.

    Args:
        asked: The prompts; one that is scored stands alone.
        columns: Most tokens that a row will hold, where the cache goes on as that of the rows under way.
        held: Keys and values of the first tokens of a single prompt, as `KVCache.fill` takes them.
    """

    def __init__(self, model: Decoder, asked: Sequence[Asked], columns: int = 0, held: Tensor | None = None):
        self.model, self.asked = model, list(asked)
        self.texts = list(dict.fromkeys(tuple(one.prompt.ids) for one in asked))
        longest = max(map(len, self.texts))
        self.cache = KVCache(model.config.n_layer, max(columns, longest))
        self.padded = pad_left([list(ids) for ids in self.texts], model.embed.weight.device)
        self.scores: list[Score] = []  # Of the tokens after the first, where they are scored.
        if held is not None:
            self.cache.fill(held)
            self.padded = tuple(x[:, held.size(3) :] for x in self.padded)
        self.hidden: Tensor | None = None

    @property
    def tokens(self) -> int:
        """The tokens that are still to be read, padding included."""
        return self.padded[0].numel()

    def read(self, most: int) -> bool:
        """Read at most about `most` tokens; returns whether all are read."""
        size = max(1, most // len(self.texts))
        piece = tuple(x[:, :size] for x in self.padded)
        self.padded = tuple(x[:, size:] for x in self.padded)
        tokens, positions, document_ids = piece
        hidden = self.model.hidden(tokens, positions, document_ids, self.cache)
        self.hidden = hidden[:, -1]
        if self.asked[0].scored is not None:
            following = torch.cat((tokens[0, 1:], self.padded[0][0, :1]))
            logits = self.model.head(hidden[0, : len(following)])
            self.scores += scores_of(logits.float(), following, self.asked[0].scored)
        return not self.padded[0].size(1)

    def drop(self, numbers: Collection[int]) -> bool:
        """Leave out the texts of these numbers; returns whether any are left."""
        self.asked = [one for one in self.asked if one.number not in numbers]
        wanted = {tuple(one.prompt.ids) for one in self.asked}
        rows = [row for row, ids in enumerate(self.texts) if ids in wanted]
        if rows and len(rows) < len(self.texts):
            self.texts = [self.texts[row] for row in rows]
            self.padded = tuple(x[rows] for x in self.padded)
            if self.cache.rows:
                self.cache.select(rows)
        return bool(rows)

    def parts(self) -> list[Part]:
        """Return the rows of all that was read."""
        assert self.hidden is not None, "nothing was read yet"
        of_text = {ids: row for row, ids in enumerate(self.texts)}
        rows = [of_text[tuple(one.prompt.ids)] for one in self.asked]
        if rows != list(range(len(self.texts))):
            self.cache.select(rows)
        return branched(self.model, self.cache, self.hidden[rows], self.asked)


def branched(model: Decoder, cache: KVCache, hidden: Tensor, asked: Sequence[Asked]) -> list[Part]:
    """Make a row for each branch of the prompts that were read, and read the branch's tokens."""
    by_length: dict[int, list[tuple[int, Branch | None]]] = defaultdict(list)
    for row, one in enumerate(asked):
        for branch in one.prompt.branches or (None,):
            by_length[len(branch.ids) if branch else 0].append((row, branch))
    parts = []
    for length, pairs in by_length.items():
        rows, branches = [row for row, _ in pairs], [branch for _, branch in pairs]
        part = cache
        if len(by_length) > 1 or length:
            part = KVCache(model.config.n_layer, cache.length + length)
            part.join([cache])
            part.select(rows)
            part.join(())  # The padding before shorter prompts would count as positions that they have taken.
        last, chances = hidden[rows], hidden.new_zeros(len(rows), length, dtype=torch.float64)
        if length:
            ids = torch.tensor([branch.ids for branch in branches if branch], device=hidden.device)
            starts = torch.tensor([[len(asked[row].prompt.ids)] for row in rows])
            positions = (starts + torch.arange(length)).to(hidden.device)
            read = model.hidden(ids, positions, torch.zeros_like(ids), part)
            before = torch.cat((last[:, None], read[:, :-1]), dim=1)
            every = F.log_softmax(model.head(before), dim=-1, dtype=torch.float64)
            last, chances = read[:, -1], every.gather(2, ids[:, :, None])[:, :, 0]
        parts.append(Part(part, last, [asked[row].number for row in rows], branches, chances))
    return parts
