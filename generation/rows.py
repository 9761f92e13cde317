"""Rows under way: prompts that were read, their cache, and the logits of their next tokens.

Prompts of unequal length share a batch by padding on the left. Padding is document -1, which nothing else
sees, and each row counts its positions from its own first token, so a batch gives what single prompts give.

A prompt whose end was dropped (`tokenization/healing.py`) has a row for each of its branches until its first
token is chosen, from all of them at once: a branch counts as much as the model gives to its tokens.

Shapes: n rows, V words.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from architecture import ABSOLUTE_POSITIONS, Decoder
from generation.kvcache import KVCache
from generation.sampling import adjust_logits, penalize_repetition
from generation.settings import GenerationConfig
from tokenization.healing import Branch, Prompt

# Waiting prompts are read when this share of all places is free: each time costs a pass and a copied cache.
FREE_PLACES = 0.25
SPARE_COLUMNS = 64  # columns of the cache that rows may waste on padding while prompts wait
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


def most_tokens(prompt: Prompt, settings: GenerationConfig) -> int:
    """Return the most tokens after the ids that stay; those for a dropped end do not count as new."""
    longest = max((len(branch.ids) for branch in prompt.branches), default=0)
    return max(len(prompt.dropped) + settings.max_new_tokens, longest + 1)


class _Part(NamedTuple):
    """Rows (n) that were read together and have no place among the others yet.

    hidden: (n, C) hidden states of their last tokens.
    prompts: The number of each row's prompt.
    branches: The branch of each row, None where its prompt has none.
    weights: (n,) float64, the log-probability of the branch's tokens.
    """

    cache: KVCache
    hidden: Tensor
    prompts: list[int]
    branches: list[Branch | None]
    weights: Tensor


class LiveRows:
    """The rows under way: the next token's logits, and all that is reordered with the rows.

    `requested` has all prompts, `prompts` the number of each row's prompt, and `waiting` the numbers of
    prompts without a row yet. Rows of one prompt are side by side. `branches` has the branch of each row
    whose first token is still to be chosen.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Prompt],
        settings: GenerationConfig,
        vocab_size: int | None,
        most_rows: int | None = None,
    ):
        self.model, self.settings, self.requested = model, settings, prompts
        self.vocab_size = model.config.vocab_size if vocab_size is None else vocab_size
        self.device = model.embed.weight.device
        self.most_rows = most_rows or len(prompts)
        self.prompts: list[int] = []
        self.waiting = list(range(len(prompts)))
        self.cache = KVCache(model.config.n_layer, self._columns())
        self.positions = torch.zeros(0, 1, dtype=torch.long, device=self.device)  # (n, 1), last tokens read
        self.seen: Tensor | None = None
        if settings.repetition_penalty != 1:
            self.seen = torch.zeros(0, model.config.vocab_size, dtype=torch.bool, device=self.device)
        self.branches: dict[int, Branch] = {}
        self.weights: dict[int, Tensor] = {}  # log-probability of a row's branch, as in _Part
        self._choose_from(self._admit(self.most_rows))

    def limit(self, prompt: int) -> int:
        """Return the number of new tokens at which a text ends."""
        return most_tokens(self.requested[prompt], self.settings)

    def _columns(self) -> int:
        """Return the columns of the cache: the longest text's, and spare ones where prompts wait."""
        config = self.model.config
        longest = max(len(p.ids) + max((len(b.ids) for b in p.branches), default=0) for p in self.requested)
        needed = longest + max(map(self.limit, self.waiting))
        end = needed + (SPARE_COLUMNS if len(self.requested) > self.most_rows else 0)
        if config.position in ABSOLUTE_POSITIONS:
            return min(end, config.block_size)
        if config.rotates_by_length:
            end = min(end, config.rope_context)
        return max(needed, end)

    def _admit(self, n: int) -> Tensor:
        """Read the first n waiting prompts as further rows; return their last hidden states (rows, C).

        Equal prompts, such as those of several samples, are read once.
        """
        numbers, self.waiting = self.waiting[:n], self.waiting[n:]
        equal: dict[tuple[int, ...], list[int]] = {}
        for number in numbers:
            equal.setdefault(tuple(self.requested[number].ids), []).append(number)
        unique = list(equal)
        # On a GPU a small pass costs as much as a larger one.
        passes = [list(range(len(unique)))]
        if self.device.type == "cpu":
            passes = read_together([len(ids) for ids in unique])
        single = all(branch.ids == () for number in numbers for branch in self.requested[number].branches)
        alone = len(passes) == 1 and not self.cache.length and single  # needs no cache of its own
        parts: list[_Part] = []
        for together in passes:
            texts = [list(unique[i]) for i in together]
            cache = self.cache if alone else KVCache(self.model.config.n_layer, max(map(len, texts)))
            read = self.model.hidden(*pad_left(texts, self.device), cache)[:, -1]
            rows = [row for row, i in enumerate(together) for _ in equal[unique[i]]]
            if len(rows) > len(together):
                cache.select(rows)
            parts += self._branched(
                cache, read[rows], [number for i in together for number in equal[unique[i]]]
            )
        if not alone:
            self.cache.join([part.cache for part in parts])
        return self._seated(parts, single)

    def _branched(self, cache: KVCache, hidden: Tensor, prompts: list[int]) -> list[_Part]:
        """Make a row for each branch of the prompts that were read, and read the branch's tokens."""
        by_length: dict[int, list[tuple[int, Branch | None]]] = defaultdict(list)
        for row, number in enumerate(prompts):
            for branch in self.requested[number].branches or (None,):
                by_length[len(branch.ids) if branch else 0].append((row, branch))
        parts = []
        for length, pairs in by_length.items():
            rows, branches = [row for row, _ in pairs], [branch for _, branch in pairs]
            part = cache
            if len(by_length) > 1 or length:
                part = KVCache(self.model.config.n_layer, cache.length + length)
                part.join([cache])
                part.select(rows)
            last, weights = hidden[rows], hidden.new_zeros(len(rows), dtype=torch.float64)
            if length:
                ids = torch.tensor([branch.ids for branch in branches if branch], device=self.device)
                starts = torch.tensor([[len(self.requested[prompts[row]].ids)] for row in rows])
                positions = (starts + torch.arange(length)).to(self.device)
                read = self.model.hidden(ids, positions, torch.zeros_like(ids), part)
                before = torch.cat((last[:, None], read[:, :-1]), dim=1)
                chances = F.log_softmax(self.model.head(before), dim=-1, dtype=torch.float64)
                last, weights = read[:, -1], chances.gather(2, ids[:, :, None]).sum(dim=(1, 2))
            parts.append(_Part(part, last, [prompts[row] for row in rows], branches, weights))
        return parts

    def _seated(self, parts: Sequence[_Part], in_order: bool) -> Tensor:
        """Append the rows that joined the cache to the others; return their hidden states (rows, C)."""
        first, hidden = len(self.prompts), torch.cat([part.hidden for part in parts])
        prompts = [number for part in parts for number in part.prompts]
        branches = [branch for part in parts for branch in part.branches]
        weights = torch.cat([part.weights for part in parts])
        if not in_order:
            order = sorted(range(len(prompts)), key=lambda row: prompts[row])
            self.cache.select([*range(first), *(first + row for row in order)])
            prompts, branches = [prompts[row] for row in order], [branches[row] for row in order]
            weights, hidden = weights[order], hidden[order]
        self.prompts += prompts
        for row, branch in enumerate(branches):
            if branch is not None:
                self.branches[first + row], self.weights[first + row] = branch, weights[row]
        texts = [
            self.requested[number].ids + list(branch.ids if branch else ())
            for number, branch in zip(prompts, branches, strict=True)
        ]
        lengths = torch.tensor([len(ids) for ids in texts], device=self.device)
        self.positions = torch.cat((self.positions, lengths[:, None] - 1))
        if self.seen is not None:
            seen = self.seen.new_zeros(len(texts), self.seen.size(1))
            for row, ids in enumerate(texts):  # The tokens read hold padding too, which was not seen.
                seen[row, ids] = True
            self.seen = torch.cat((self.seen, seen))
        return hidden

    def _choose_from(self, hidden: Tensor) -> None:
        """Compute logits from the last tokens' hidden states (n, C); branches allow some of the tokens."""
        logits = self.model.head(hidden).float()
        self.log_total = logits.logsumexp(dim=-1, keepdim=True)  # (n, 1), NaN if any of the row is
        if not self.log_total.isfinite().all():
            raise ValueError("the model's logits are NaN; its weights hold NaN or its precision overflowed")
        self.own_logits = logits  # (n, V), as the model has them
        if self.vocab_size < logits.size(1) or self.branches:
            logits = logits.clone()
            logits[:, self.vocab_size :] = -math.inf
        for row, branch in self.branches.items():
            allowed = torch.zeros_like(logits[row], dtype=torch.bool)
            allowed[torch.from_numpy(branch.allowed).to(self.device)] = True
            logits[row].masked_fill_(~allowed, -math.inf)
        self.logits = adjust_logits(logits, self.seen, self.settings)  # (n, V), to choose from
        # log p of a branch, given that the text begins with the prompt
        self.given = {row: self.weights[row] for row in self.branches}
        for rows in self._together():
            index = torch.tensor(rows, device=self.device)
            weights = torch.stack([self.weights[row] for row in rows])
            chances = weights + logits[index].logsumexp(dim=-1) - self.log_total[index, 0]
            for row in rows:
                self.given[row] = self.weights[row] - chances.logsumexp(dim=0)
            if len(rows) > 1:
                own = self.own_logits[index]
                if self.seen is not None:
                    own = penalize_repetition(own, self.seen[index], self.settings.repetition_penalty)
                joint = (weights[:, None] + F.log_softmax(own, dim=-1)).masked_fill(
                    logits[index].isinf(), -math.inf
                )
                adjusted = adjust_logits(joint.float().view(1, -1), None, self.settings)
                self.logits[index] = adjusted.view_as(own)

    def _together(self) -> list[list[int]]:
        """Group the rows whose first token is to be chosen by their prompt."""
        of_prompts: dict[int, list[int]] = defaultdict(list)
        for row in self.branches:
            of_prompts[self.prompts[row]].append(row)
        return list(of_prompts.values())

    def choices(self) -> tuple[Tensor, list[int]]:
        """Return logits (prompts, W) from which one token a prompt is chosen, and each prompt's first row.

        W is V, or V for each row of the prompt with most rows, one row's columns after the other's.
        """
        rows = [row for row, number in enumerate(self.prompts) if not row or self.prompts[row - 1] != number]
        if len(rows) == len(self.prompts):
            return self.logits, rows
        ends = [*rows[1:], len(self.prompts)]
        n = max(end - row for row, end in zip(rows, ends, strict=True))
        logits = self.logits.new_full((len(rows), n, self.logits.size(1)), -math.inf)
        for place, (row, end) in enumerate(zip(rows, ends, strict=True)):
            logits[place, : end - row] = self.logits[row:end]
        return logits.flatten(1), rows

    def log_scores(self) -> Tensor:
        """Return log-probabilities (n, V), float64, normalised over a row, or all branches of one prompt."""
        scores = F.log_softmax(self.logits, dim=-1, dtype=torch.float64)
        for rows in self._together():
            own = self.logits[rows].double()
            scores[rows] = own - own.logsumexp(dim=(0, 1))
        return scores

    def log_probs(self, rows: Tensor, ids: Tensor) -> list[float]:
        """Return the log-probability of one id a row under the model itself, before any setting."""
        found = self.own_logits[rows, ids].double() - self.log_total[rows, 0]
        given = (
            [float(self.given.get(row, 0.0)) for row in rows.tolist()] if self.given else [0.0] * len(rows)
        )
        return [one + other for one, other in zip(found.tolist(), given, strict=True)]

    def advance(self, rows: list[int], ids: list[int]) -> None:
        """Keep `rows`, in this order, and read one token id for each; prompts that wait take free places."""
        self.branches, self.weights = {}, {}
        if rows != list(range(len(self.prompts))):
            index = torch.tensor(rows, dtype=torch.long, device=self.device)
            self.cache.select(rows)
            self.prompts = [self.prompts[row] for row in rows]
            self.positions = self.positions[index]
            if self.seen is not None:
                self.seen = self.seen[index]
        hidden = []
        if rows:
            if self.cache.length == self.cache.max_length:
                self.cache.join(())
            tokens = torch.tensor(ids, device=self.device)[:, None]
            if self.seen is not None:
                self.seen.scatter_(1, tokens, True)
            self.positions = self.positions + 1
            none = torch.zeros_like(tokens)
            hidden.append(self.model.hidden(tokens, self.positions, none, self.cache)[:, -1])
        free = self.most_rows - len(rows)
        if self.waiting and (not rows or free >= FREE_PLACES * self.most_rows):
            hidden.append(self._admit(free))
        self._choose_from(torch.cat(hidden))
