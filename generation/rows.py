"""Rows under way: texts that were read, their cache, and the logits of their next tokens.

Each row has the settings of its own text. Rows leave, move and join while others go on; all of them are read
and looked at in one pass.

Shapes: n rows, V words.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from architecture import ABSOLUTE_POSITIONS, Decoder
from generation.kvcache import KVCache
from generation.reading import Asked, Part, Reading, pad_left, passes_of
from generation.sampling import Score, adjust_logits, penalize_repetition, scores_of
from generation.settings import GenerationConfig
from tokenization.healing import Branch, Prompt

SPARE_COLUMNS = 64  # columns of the cache that rows may waste on padding


class Seat(NamedTuple):
    """What a row needs of its text."""

    prompt: Prompt
    settings: GenerationConfig

    @property
    def limit(self) -> int:
        """The most tokens after the ids that stay; those for a dropped end do not count as new."""
        longest = max((len(branch.ids) for branch in self.prompt.branches), default=0)
        return max(len(self.prompt.dropped) + self.settings.max_new_tokens, longest + 1)

    @property
    def longest(self) -> int:
        """The most tokens that the text may have, its prompt included."""
        return len(self.prompt.ids) + self.limit


class LiveRows:
    """The rows under way: the next token's logits, and all that is reordered with the rows.

    `prompts` has the number of each row's text, and `seats` its prompt and settings. Rows of one text are
    side by side. `branches` has the branch of each row whose first token is still to be chosen.

    Args:
        vocab_size: Ids from here on are never chosen; None is the model's own.
    """

    def __init__(self, model: Decoder, vocab_size: int | None = None):
        self.model = model
        self.vocab_size = model.config.vocab_size if vocab_size is None else vocab_size
        self.device = model.embed.weight.device
        self.prompts: list[int] = []
        self.seats: dict[int, Seat] = {}
        self.branches: dict[int, Branch] = {}
        self.chances: dict[int, Tensor] = {}  # log-probabilities of a row's branch's tokens
        self._empty()

    def _empty(self) -> None:
        self.cache = KVCache(self.model.config.n_layer, 0)
        self.hidden: Tensor | None = None  # (n, T, C), of the tokens that the last pass read
        self.every: Tensor | None = None  # (n, T, V), the logits after them, once they were looked at
        self.proposed: list[list[int]] = []  # The proposed tokens that the last pass read of each row.
        # (n, 1), the position of each text's last token that was read.
        self.positions = torch.zeros(0, 1, dtype=torch.long, device=self.device)
        self.seen: Tensor | None = None  # (n, V), the tokens of rows that have a repetition penalty

    # --- rows that come, go and go on ---------------------------------------------------------------------

    def seat(self, parts: Sequence[Part], seats: Mapping[int, Seat]) -> None:
        """Take rows that were read behind the others; `seats` has their texts by number."""
        first = len(self.prompts)
        prompts = [number for part in parts for number in part.prompts]
        branches = [branch for part in parts for branch in part.branches]
        chances = [row for part in parts for row in part.chances]
        hidden = torch.cat([part.hidden for part in parts])
        self.seats.update((number, seats[number]) for number in prompts)
        texts = [
            [*seats[number].prompt.ids, *(branch.ids if branch else ())]
            for number, branch in zip(prompts, branches, strict=True)
        ]
        lengths = torch.tensor([len(ids) for ids in texts], device=self.device)
        self.positions = torch.cat((self.positions, lengths[:, None] - 1))
        columns = self._columns([*self.prompts, *prompts])
        if not first and len(parts) == 1 and parts[0].cache.max_length >= columns:
            self.cache = parts[0].cache
        else:
            self.cache.join([part.cache for part in parts], columns)
        hidden = hidden[:, None]
        if self.hidden is not None:
            # A row's tokens end in the last column of a pass.
            hidden = F.pad(hidden, (0, 0, self.hidden.size(1) - 1, 0))
            hidden = torch.cat((self.hidden, hidden))
        self.hidden = hidden
        self.prompts += prompts
        self.proposed += [[] for _ in prompts]
        for row, branch in enumerate(branches, first):
            if branch is not None:
                self.branches[row], self.chances[row] = branch, chances[row - first]
        self._note_seen(texts)
        # Branches of one length were read together; a text's rows come side by side again.
        order = sorted(range(first, len(self.prompts)), key=lambda row: self.prompts[row])
        if len(branches) > len(set(prompts)) and order != list(range(first, len(self.prompts))):
            self._select([*range(first), *order])

    def _note_seen(self, texts: list[list[int]]) -> None:
        """Note the tokens of new rows where some row has a repetition penalty."""
        first = len(self.prompts) - len(texts)
        if self.seen is None:
            if all(self.seats[number].settings.repetition_penalty == 1 for number in self.prompts):
                return
            V = self.model.config.vocab_size
            self.seen = torch.zeros(first, V, dtype=torch.bool, device=self.device)
        seen = self.seen.new_zeros(len(texts), self.seen.size(1))
        for row, ids in enumerate(texts):  # The tokens read hold padding too, which was not seen.
            seen[row, ids] = True
        self.seen = torch.cat((self.seen, seen))

    def _columns(self, prompts: Sequence[int]) -> int:
        """Return the columns of the cache, for rows whose positions are known and that all end in one."""
        config = self.model.config
        lengths = (self.positions[:, 0] + 1).tolist()
        longest = max(self.seats[number].longest for number in prompts)
        left = (self.seats[number].longest - n for number, n in zip(prompts, lengths, strict=True))
        end = min(max(lengths) + max(left), longest + SPARE_COLUMNS)
        if config.position in ABSOLUTE_POSITIONS:
            end = min(end, config.block_size)
        elif config.rotates_by_length:
            end = min(end, config.rope_context)
        return max(longest, end)

    def keep(self, rows: list[int]) -> None:
        """Keep `rows`, in this order; memory that most rows have left is given back."""
        if rows == list(range(len(self.prompts))):
            return
        self._select(rows)
        self.seats = {number: self.seats[number] for number in dict.fromkeys(self.prompts)}
        if not rows:
            self._empty()
        elif self.cache.places > 2 * len(rows):
            self.cache.join((), self._columns(self.prompts))

    def _select(self, rows: list[int]) -> None:
        index = torch.tensor(rows, dtype=torch.long, device=self.device)
        if rows:
            self.cache.select(rows)
        self.prompts = [self.prompts[row] for row in rows]
        self.proposed = [self.proposed[row] for row in rows]
        self.branches = {i: self.branches[row] for i, row in enumerate(rows) if row in self.branches}
        self.chances = {i: self.chances[row] for i, row in enumerate(rows) if row in self.chances}
        self.positions = self.positions[index]
        if self.hidden is not None:
            self.hidden = self.hidden[index]
        if self.seen is not None:
            self.seen = self.seen[index]

    def read(self, ids: Sequence[int], proposed: Sequence[list[int]] = ()) -> None:
        """Read one token id for each row, the last that was chosen for it, and those proposed after it.

        What does not fit the columns of the cache is not proposed.
        """
        self.branches, self.chances = {}, {}
        if not ids:
            return
        most = max((len(one) for one in proposed), default=0)
        if self.cache.length + most >= self.cache.max_length:
            self.cache.join(())
        room = self.cache.max_length - self.cache.length - 1
        self.proposed = [one[:room] for one in proposed] or [[] for _ in ids]
        texts = [[id, *more] for id, more in zip(ids, self.proposed, strict=True)]
        if self.seen is not None:
            self.seen.scatter_(1, torch.tensor(ids, device=self.device)[:, None], True)
        tokens, offsets, documents = pad_left(texts, self.device)
        positions = self.positions + 1 + offsets
        self.positions = self.positions + 1
        self.hidden = self.model.hidden(tokens, positions, documents, self.cache)
        self.cache.holes |= any(len(one) != len(texts[0]) for one in texts)

    def took(self, counts: Sequence[int]) -> None:
        """Keep so many proposed tokens of each row (n,), and forget the others."""
        taken = torch.tensor(counts, device=self.device)
        self.positions = self.positions + taken[:, None]
        self.cache.forget([len(one) - n for one, n in zip(self.proposed, counts, strict=True)])
        if self.model.config.sliding_window:  # It counts columns, and a row that joined has taken none.
            self.cache.close_holes()

    # --- what may follow ----------------------------------------------------------------------------------

    def look(self) -> list[int]:
        """Compute logits from the last tokens' hidden states; branches allow some of the tokens.

        Returns the rows whose logits are NaN or infinite; what is chosen for them means nothing.
        """
        assert self.hidden is not None, "there are no rows"
        self.every = self.model.head(self.hidden)
        assert self.every is not None
        logits = self._after(range(len(self.prompts)), 0)
        self.log_total = logits.logsumexp(dim=-1, keepdim=True)  # (n, 1), NaN if any of the row is
        finite = self.log_total[:, 0].isfinite()
        broken = [] if finite.all() else (~finite).nonzero()[:, 0].tolist()
        self.own_logits = logits  # (n, V), as the model has them
        if self.vocab_size < logits.size(1) or self.branches or broken:
            logits = logits.clone()
            logits[broken] = 0.0
            logits[:, self.vocab_size :] = -torch.inf
        for row, branch in self.branches.items():
            allowed = torch.zeros_like(logits[row], dtype=torch.bool)
            allowed[torch.from_numpy(branch.allowed).to(self.device)] = True
            logits[row].masked_fill_(~allowed, -torch.inf)
        self.logits = self._adjusted(logits)  # (n, V), to choose from
        # log p of a branch, given that the text begins with the prompt
        weights = {row: chances.sum() for row, chances in self.chances.items()}
        self.given = dict(weights)
        for rows in self._together():
            index = torch.tensor(rows, device=self.device)
            weight = torch.stack([weights[row] for row in rows])
            chances = weight + logits[index].logsumexp(dim=-1) - self.log_total[index, 0]
            for row in rows:
                self.given[row] = weights[row] - chances.logsumexp(dim=0)
            if len(rows) > 1:
                settings = self.seats[self.prompts[rows[0]]].settings
                own = self.own_logits[index]
                if self.seen is not None:
                    own = penalize_repetition(own, self.seen[index], settings.repetition_penalty)
                joint = (weight[:, None] + F.log_softmax(own, dim=-1)).masked_fill(
                    logits[index].isinf(), -torch.inf
                )
                adjusted = adjust_logits(joint.float().view(1, -1), None, settings)
                self.logits[index] = adjusted.view_as(own)
        return broken

    def look_on(self, rows: Sequence[int], place: int) -> list[int]:
        """Look at what follows the first `place` proposed tokens of some rows, the last of which was taken.

        All that `look` computes is then of these rows alone. Returns those whose logits are NaN, by place.
        """
        if self.seen is not None:
            for row in rows:
                self.seen[row, self.proposed[row][place - 1]] = True
        logits = self._after(rows, place)
        self.log_total = logits.logsumexp(dim=-1, keepdim=True)
        finite = self.log_total[:, 0].isfinite()
        broken = (~finite).nonzero()[:, 0].tolist()
        self.own_logits, logits, self.given = logits, logits.clone(), {}
        logits[broken] = 0.0
        logits[:, self.vocab_size :] = -torch.inf
        self.logits = self._adjusted(logits, rows)
        return broken

    def _after(self, rows: Sequence[int], place: int) -> Tensor:
        """Return the model's logits (rows, V) after the first `place` proposed tokens of rows."""
        assert self.every is not None
        if self.every.size(1) == 1:
            return self.every[:, 0].float()
        index = [self.every.size(1) - 1 - len(self.proposed[row]) + place for row in rows]
        return self.every[list(rows), index].float()

    def _adjusted(self, logits: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Return logits as the settings of each row change them; rows that share settings go together."""
        alike: dict[tuple[float, ...], list[int]] = defaultdict(list)
        prompts = self.prompts if rows is None else [self.prompts[row] for row in rows]
        seen = self.seen if rows is None or self.seen is None else self.seen[list(rows)]
        for row, number in enumerate(prompts):
            alike[self.seats[number].settings.choosing].append(row)
        if len(alike) == 1:
            return adjust_logits(logits, seen, self.seats[prompts[0]].settings)
        logits = logits.clone()
        for same in alike.values():
            settings = self.seats[prompts[same[0]]].settings
            index = torch.tensor(same, device=self.device)
            own = None if seen is None else seen[index]
            logits[index] = adjust_logits(logits[index], own, settings)
        return logits

    def _together(self) -> list[list[int]]:
        """Group the rows whose first token is to be chosen by their text."""
        of_prompts: dict[int, list[int]] = defaultdict(list)
        for row in self.branches:
            of_prompts[self.prompts[row]].append(row)
        return list(of_prompts.values())

    def choices(self) -> tuple[Tensor, list[int]]:
        """Return logits (texts, W) from which one token a text is chosen, and each text's first row.

        W is V, or V for each row of the text with most rows, one row's columns after the other's.
        """
        rows = [row for row, number in enumerate(self.prompts) if not row or self.prompts[row - 1] != number]
        if len(rows) == len(self.prompts):
            return self.logits, rows
        ends = [*rows[1:], len(self.prompts)]
        n = max(end - row for row, end in zip(rows, ends, strict=True))
        logits = self.logits.new_full((len(rows), n, self.logits.size(1)), -torch.inf)
        for place, (row, end) in enumerate(zip(rows, ends, strict=True)):
            logits[place, : end - row] = self.logits[row:end]
        return logits.flatten(1), rows

    def log_scores(self) -> Tensor:
        """Return log-probabilities (n, V), float64, normalised over a row, or all branches of one text."""
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

    def scores(self, row: int, id: int, n: int) -> Iterator[Score]:
        """Yield the scores of a row's branch's tokens, which have no others beside them, and of `id`."""
        if row in self.branches:
            yield from map(Score, self.branches[row].ids, self.chances[row].tolist())
        yield from scores_of(self.own_logits[row : row + 1], torch.tensor([id], device=self.device), n)


def rows_of(
    model: Decoder,
    prompts: Sequence[Prompt],
    settings: GenerationConfig,
    vocab_size: int | None = None,
) -> LiveRows:
    """Read prompts, whose numbers count from 0, and look at what may follow.

    Raises:
        ValueError: The model's logits are NaN.
    """
    live = LiveRows(model, vocab_size)
    seats = {number: Seat(prompt, settings) for number, prompt in enumerate(prompts)}
    parts = []
    groups = passes_of([Asked(number, seat.prompt) for number, seat in seats.items()], live.device)
    for group in groups:
        columns = max(seat.longest for seat in seats.values()) if len(groups) == 1 else 0
        reading = Reading(model, group, columns)
        reading.read(reading.tokens)
        parts += reading.parts()
    live.seat(parts, seats)
    refuse_broken(live.look())
    return live


def refuse_broken(rows: Sequence[int], place: str = "") -> None:
    """Refuse rows whose logits are NaN."""
    if rows:
        raise ValueError(nan_sentence(place))


def nan_sentence(place: str = "") -> str:
    """Return what is said of logits that are NaN or infinite; `place` begins with a blank."""
    return f"the model's logits are NaN{place}; its weights hold NaN or its precision overflowed"
