"""Ids from a model: sampling, beam search, many prompts at a time. `generate.py` makes text of it.

    padded prompts -> one forward -> a token a step -> the ids of each continuation

A row that has ended leaves the batch at once; where there are more prompts than rows, others take the places
that became free.

Prompts of unequal length share a batch by padding on the left. Padding is document -1, which nothing else
sees, and each row counts its positions from its own first token, so a batch gives what single prompts give.

A prompt whose end was dropped (`tokenization/healing.py`) has a row for each of its branches until its first
token is chosen, from all of them at once: a branch counts as much as the model gives to its tokens.

A model with a learned or sinusoidal position table refuses to run past it. Rotary positions have no such end,
but the model was trained on `block_size` of them only. Nothing is trimmed here: a caller who wants to stay
inside calls `generation.text.trim_prompt` first.

Shapes: n rows still running, V words.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architecture import ABSOLUTE_POSITIONS, Decoder
from generation.kvcache import KVCache
from tokenization.healing import Branch, Prompt

if TYPE_CHECKING:  # it is defined where a command line can be read before torch is imported
    from generation.settings import GenerationConfig

# Where prompts wait: places that have to be free before some of them are read, as a share of all, since each
# time costs a pass and a copy of the cache; and columns of the cache that rows may waste on padding.
FREE_PLACES = 0.25
SPARE_COLUMNS = 64

Stopped = Callable[[int, list[int]], bool]  # (index of the prompt, ids generated so far) -> has it ended


class Generated(NamedTuple):
    """What one prompt was continued with.

    ids: The generated tokens, the closing eos included; where the prompt's end was dropped, those for it too.
    log_prob: Sum of their natural-log probabilities under the model itself, before any setting changed them,
        given that the text begins with the prompt.
    finish_reason: `eos`, `stop` (a stop string) or `length` (max_new_tokens).
    """

    ids: list[int]
    log_prob: float
    finish_reason: str


# --- logits to logits -----------------------------------------------------------------------------
# Each takes logits (n, V) and returns new ones; a token that may not be chosen has -inf.


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits of `seen` tokens divided by the penalty, or times it where negative (CTRL, arXiv:1909.05858).

    Args:
        logits: (n, V).
        seen: (n, V), True for tokens of the row's prompt and text so far.
        penalty: Above 1 makes them less likely. The paper only divides, which would make a negative logit
            more likely.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest of a row, and all that tie with the last (Fan et al. 2018, arXiv:1805.04833)."""
    last = logits.topk(min(k, logits.size(-1)), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < last, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The fewest tokens whose probabilities reach p (nucleus sampling, arXiv:1904.09751)."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1, dtype=torch.float64)
    before = probabilities.cumsum(dim=-1) - probabilities  # of the most likely one exactly 0: it stays
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(dropped, -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Tokens at least p times as likely as the most likely one (Nguyen et al. 2024, arXiv:2407.01082)."""
    probabilities = logits.softmax(dim=-1, dtype=torch.float64)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), -math.inf)


def adjust_logits(logits: Tensor, seen: Tensor | None, settings: GenerationConfig) -> Tensor:
    """Repetition penalty, temperature, top-k, top-p, min-p: the order of transformers' `generate`.

    Each works on what the one before has left: the nucleus is that of the k tokens, for instance. At
    temperature 0 there is only the penalty.
    """
    if seen is not None:
        logits = penalize_repetition(logits, seen, settings.repetition_penalty)
    if settings.temperature > 0:
        logits = logits / settings.temperature
        if settings.top_k:
            logits = keep_top_k(logits, settings.top_k)
        if settings.top_p < 1:
            logits = keep_top_p(logits, settings.top_p)
        if settings.min_p > 0:
            logits = keep_min_p(logits, settings.min_p)
    return logits


def row_generator(seed: int, row: int) -> torch.Generator:
    """The random numbers of one row, whatever rows are beside it.

    A trap: the CPU generator reads only the low 32 bits of its seed, so `seed << 32 | row` would
    ignore `seed`.
    """
    digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def sample(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token (n,) a row from softmax(logits (n, V)), by inverting the cumulative distribution.

    One number is drawn from each generator, on the CPU, so that a seed means the same on every device.
    """
    cumulative = logits.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    draws = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
    # right=True steps over tokens of probability 0, also for a draw of exactly 0.
    return torch.searchsorted(cumulative, draws.to(logits.device) * cumulative[:, -1:], right=True)[:, 0]


# --- prompts --------------------------------------------------------------------------------------


def pad_left(
    prompts: Sequence[list[int]], device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and document ids, each (B, longest prompt), for `Decoder.forward`.

    Padding stands on the left, so that the last column is the last token of every row. It is document -1 and
    holds token 0, which no prompt token sees; a prompt is document 0 and its positions count from 0.
    """
    lengths = torch.tensor([len(ids) for ids in prompts])
    longest = int(lengths.max())
    tokens = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    positions = torch.arange(longest) - (longest - lengths)[:, None]
    document_ids = torch.where(positions < 0, -1, 0)
    return tokens.to(device), positions.clamp(min=0).to(device), document_ids.to(device)


# Tokens that a CPU computes in the time by which one more pass of the model is slower: it reads all weights.
A_PASS = 128


def read_together(lengths: Sequence[int], a_pass: int = A_PASS) -> list[list[int]]:
    """Numbers of the prompts that are read in one pass, so that as little padding as can be is computed.

    Each pass costs its prompts times the longest of them, in tokens, and `a_pass`. The best of all ways to
    cut the prompts, sorted by their length, into passes.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best, cut = [0] + [0] * len(order), [0] * (len(order) + 1)  # of the first so many of them
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


def _check_prompts(model: Decoder, prompts: Sequence[Prompt], settings: GenerationConfig) -> None:
    V, block_size = model.config.vocab_size, model.config.block_size
    for i, prompt in enumerate(prompts):
        ids = prompt.whole
        if not ids:
            raise ValueError(f"prompt {i} holds no token and there is no bos; give at least one character")
        if not 0 <= min(ids) <= max(ids) < V:
            wrong = next(id for id in ids if not 0 <= id < V)
            raise ValueError(
                f"prompt {i} holds id {wrong}, outside the model's vocabulary of {V}; "
                "use the tokenizer the model was trained with"
            )
        total = len(prompt.ids) + _most_tokens(prompt, settings)
        if model.config.position in ABSOLUTE_POSITIONS and total > block_size:
            raise ValueError(
                f"prompt {i} of {len(ids)} tokens and max_new_tokens {settings.max_new_tokens} make {total}, "
                f"more than the model's {block_size} positions; lower max_new_tokens or shorten the prompt"
            )


def _most_tokens(prompt: Prompt, settings: GenerationConfig) -> int:
    """That may be generated after the ids that stay: those that were dropped do not count."""
    longest = max((len(branch.ids) for branch in prompt.branches), default=0)
    return max(len(prompt.dropped) + settings.max_new_tokens, longest + 1)


# --- decoding -------------------------------------------------------------------------------------


def generate_ids(
    model: Decoder,
    prompts: Sequence[list[int] | Prompt],
    settings: GenerationConfig,
    eos_id: int | Collection[int] | None = None,
    vocab_size: int | None = None,
    stopped: Stopped | None = None,
    first_row: int | Sequence[int] = 0,
    most_rows: int | None = None,
    on_done: Callable[[int, Generated], None] | None = None,
) -> list[Generated]:
    """Continue each list of ids. `settings.stop` is text: here `stopped` takes its place.

    Args:
        model, settings: As for `generate`.
        first_row: The seed's row of the first prompt, those of the others following; or each prompt's own.
        prompts: Ids, bos included; or what `healing.healed` makes of them.
        eos_id: The token that ends a text, or several.
        vocab_size: Ids from here on are never chosen; an embedding may be padded with rows no text has.
        stopped: Asked after each token whether the text has ended.
        most_rows: Prompts under way at a time; further ones wait, in their order, until places are free. None
            for all, as a beam search has it. It does not change what is generated.
        on_done: Called with the index of a prompt and what came of it, as soon as it has ended.

    Raises:
        ValueError: A prompt is empty, holds an id outside the vocabulary or does not fit the model's
            positions, or the model's logits are NaN.
    """
    if not prompts:
        return []
    asked = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
    _check_prompts(model, asked, settings)
    ends = frozenset(() if eos_id is None else (eos_id,) if isinstance(eos_id, int) else eos_id)
    with _evaluating(model), torch.inference_mode():
        if settings.num_beams > 1:
            assert most_rows is None and on_done is None, "beams of all prompts are under way together"
            return _beam_search(_Run(model, asked, settings, vocab_size), settings, ends, stopped)
        run = _Run(model, asked, settings, vocab_size, most_rows)
        return _token_by_token(run, settings, ends, stopped, first_row, on_done)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, then each module's own mode again: `model.train()` would wake frozen parts too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Part(NamedTuple):
    """Rows (n) that were read together and have no place among the others yet.

    hidden: (n, C), of their last tokens.
    branches: Of each row, None where its prompt has none.
    weights: (n,) float64, the log-probability of its branch's tokens.
    """

    cache: KVCache
    hidden: Tensor
    prompts: list[int]
    branches: list[Branch | None]
    weights: Tensor


class _Run:
    """The rows under way: the next token's logits, and all that must be reordered when rows are.

    `prompts` has the number of each row's prompt; `waiting` the numbers of those that have no row yet. Rows
    of one prompt are side by side. `branches` has the branch of each row whose first token is to be chosen.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Prompt],
        settings: GenerationConfig,
        vocab_size: int | None,
        most_rows: int | None = None,
    ):
        self.model, self.settings, self.asked = model, settings, prompts
        self.vocab_size = model.config.vocab_size if vocab_size is None else vocab_size
        self.device = model.embed.weight.device
        self.most_rows = most_rows or len(prompts)
        self.prompts: list[int] = []
        self.waiting = list(range(len(prompts)))
        self.cache = KVCache(model.config.n_layer, self._columns())
        self.positions = torch.zeros(0, 1, dtype=torch.long, device=self.device)  # of the last token read
        self.seen: Tensor | None = None
        if settings.repetition_penalty != 1:
            self.seen = torch.zeros(0, model.config.vocab_size, dtype=torch.bool, device=self.device)
        self.branches: dict[int, Branch] = {}
        self.weights: dict[int, Tensor] = {}  # of these rows, as in _Part
        self._choose_from(self._admit(self.most_rows))

    def limit(self, prompt: int) -> int:
        """The number of new tokens at which a text ends."""
        return _most_tokens(self.asked[prompt], self.settings)

    def _columns(self) -> int:
        """Of the cache: for the longest text, and some to waste where rows begin at different times."""
        config = self.model.config
        longest = max(len(p.ids) + max((len(b.ids) for b in p.branches), default=0) for p in self.asked)
        needed = longest + max(map(self.limit, self.waiting))
        end = needed + (SPARE_COLUMNS if len(self.asked) > self.most_rows else 0)
        if config.position in ABSOLUTE_POSITIONS:
            return min(end, config.block_size)
        if config.rope_scaling == "dynamic":
            end = min(end, config.rope_context)
        return max(needed, end)

    def _admit(self, n: int) -> Tensor:
        """Read the first n prompts that wait: hidden states (rows, C) of their last tokens, as further rows.

        Equal prompts, as the draws of one have, are read once.
        """
        numbers, self.waiting = self.waiting[:n], self.waiting[n:]
        equal: dict[tuple[int, ...], list[int]] = {}
        for number in numbers:
            equal.setdefault(tuple(self.asked[number].ids), []).append(number)
        unique = list(equal)
        # On a GPU a pass that is small costs as much as a larger one.
        passes = [list(range(len(unique)))]
        if self.device.type == "cpu":
            passes = read_together([len(ids) for ids in unique])
        single = all(branch.ids == () for number in numbers for branch in self.asked[number].branches)
        alone = len(passes) == 1 and not self.cache.length and single  # then it needs no cache of its own
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
        """A row for each branch of the prompts that were read, its tokens read too."""
        by_length: dict[int, list[tuple[int, Branch | None]]] = defaultdict(list)
        for row, number in enumerate(prompts):
            for branch in self.asked[number].branches or (None,):
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
                starts = torch.tensor([[len(self.asked[prompts[row]].ids)] for row in rows])
                positions = (starts + torch.arange(length)).to(self.device)
                read = self.model.hidden(ids, positions, torch.zeros_like(ids), part)
                before = torch.cat((last[:, None], read[:, :-1]), dim=1)
                chances = F.log_softmax(self.model.head(before), dim=-1, dtype=torch.float64)
                last, weights = read[:, -1], chances.gather(2, ids[:, :, None]).sum(dim=(1, 2))
            parts.append(_Part(part, last, [prompts[row] for row in rows], branches, weights))
        return parts

    def _seated(self, parts: Sequence[_Part], in_order: bool) -> Tensor:
        """Count the rows that joined the cache among the others; their hidden states (rows, C)."""
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
            self.asked[number].ids + list(branch.ids if branch else ())
            for number, branch in zip(prompts, branches, strict=True)
        ]
        lengths = torch.tensor([len(ids) for ids in texts], device=self.device)
        self.positions = torch.cat((self.positions, lengths[:, None] - 1))
        if self.seen is not None:
            seen = self.seen.new_zeros(len(texts), self.seen.size(1))
            for row, ids in enumerate(texts):  # not from the tokens read: that of padding was not seen
                seen[row, ids] = True
            self.seen = torch.cat((self.seen, seen))
        return hidden

    def _choose_from(self, hidden: Tensor) -> None:
        """Logits of the last tokens' hidden states (n, C)."""
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
        self.given = {
            row: self.weights[row] for row in self.branches
        }  # log p, given that the prompt is there
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
        """The rows whose first token is to be chosen, those of one prompt together."""
        of_prompts: dict[int, list[int]] = defaultdict(list)
        for row in self.branches:
            of_prompts[self.prompts[row]].append(row)
        return list(of_prompts.values())

    def choices(self) -> tuple[Tensor, list[int]]:
        """Logits (prompts, W) from which one token of each prompt is chosen, and the row of its first column;
        the columns of each row follow those of the row before it."""
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
        """Log-probabilities (n, V), float64, of each row, or of all branches of one prompt together."""
        scores = F.log_softmax(self.logits, dim=-1, dtype=torch.float64)
        for rows in self._together():
            own = self.logits[rows].double()
            scores[rows] = own - own.logsumexp(dim=(0, 1))
        return scores

    def log_probs(self, rows: Tensor, ids: Tensor) -> list[float]:
        """Of these ids, one of each row, under the model itself: before any setting changed its logits."""
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


def _token_by_token(
    run: _Run,
    settings: GenerationConfig,
    ends: Collection[int],
    stopped: Stopped | None,
    first_row: int | Sequence[int],
    on_done: Callable[[int, Generated], None] | None,
) -> list[Generated]:
    """Greedy decoding or sampling; a finished row leaves the batch at once."""
    n_prompts = len(run.asked)
    own_rows = range(first_row, first_row + n_prompts) if isinstance(first_row, int) else first_row
    # Each takes 2.5 kB; a greedy choice draws nothing.
    generators = [row_generator(settings.seed, row) for row in own_rows if settings.temperature]
    ids: list[list[int]] = [[] for _ in range(n_prompts)]
    log_prob = [0.0] * n_prompts
    done: dict[int, Generated] = {}
    while True:
        logits, firsts = run.choices()
        if settings.temperature == 0:
            chosen = logits.argmax(dim=-1)
        else:
            chosen = sample(logits, [generators[run.prompts[row]] for row in firsts])
        index = torch.tensor(firsts, device=run.device) + chosen // run.logits.size(1)
        chosen = chosen % run.logits.size(1)
        gained, rows = run.log_probs(index, chosen), []
        for row, id, log_p in zip(index.tolist(), chosen.tolist(), gained, strict=True):
            prompt = run.prompts[row]
            ids[prompt] += [*run.branches[row].ids, id] if row in run.branches else [id]
            log_prob[prompt] += log_p
            reason = ""
            if id in ends:
                reason = "eos"
            elif stopped is not None and stopped(prompt, ids[prompt]):
                reason = "stop"
            elif len(ids[prompt]) >= run.limit(prompt):
                reason = "length"
            else:
                rows.append(row)
            if reason:
                done[prompt] = Generated(ids[prompt], log_prob[prompt], reason)
                if on_done is not None:
                    on_done(prompt, done[prompt])
        if not rows and not run.waiting:
            return [done[prompt] for prompt in range(n_prompts)]
        rows = _close_gaps(rows)
        run.advance(rows, [ids[run.prompts[row]][-1] for row in rows])


def _close_gaps(rows: list[int]) -> list[int]:
    """The rows in an order in which as many as can be keep their place, for `KVCache.select`."""
    behind = [row for row in rows if row >= len(rows)]
    staying = set(rows)
    return [place if place in staying else behind.pop() for place in range(len(rows))]


class _Beam(NamedTuple):
    prompt: int
    ids: list[int]
    log_prob: float  # under the model
    score: float  # log-probability after the repetition penalty; without one, `log_prob`
    reason: str


def _beam_search(
    run: _Run, settings: GenerationConfig, ends: Collection[int], stopped: Stopped | None
) -> list[Generated]:
    """The best of `num_beams` hypotheses a prompt, by score / length ** length_penalty (eos counts).

    A finished hypothesis keeps its place: the search goes on with one beam fewer (Bahdanau et al. 2014,
    arXiv:1409.0473), so that one beam is exactly greedy decoding, whatever the length penalty. It ends when
    no place is left, or when no running beam can beat the best finished one.
    """
    alpha = settings.length_penalty
    begun = [list(run.branches[row].ids) if row in run.branches else [] for row in range(len(run.prompts))]
    running = [_Beam(prompt, ids, 0.0, 0.0, "length") for prompt, ids in zip(run.prompts, begun, strict=True)]
    finished: list[list[_Beam]] = [[] for _ in run.asked]

    def rank(beam: _Beam) -> float:
        return beam.score / len(beam.ids) ** alpha

    def most(beam: _Beam) -> float:
        """No continuation ranks higher: scores only fall, so the best is to end now or as late as can be."""
        return max(beam.score / run.limit(beam.prompt) ** alpha, beam.score / (len(beam.ids) + 1) ** alpha)

    while running:
        # Log-probabilities: sums of raw logits would rank beams by each model's arbitrary offset.
        scores = run.log_scores()
        scores += scores.new_tensor([beam.score for beam in running])[:, None]
        V = scores.size(1)
        rows, beams = [], []
        for prompt, group in itertools.groupby(range(len(running)), key=lambda row: running[row].prompt):
            first, *others = group
            end = first + 1 + len(others)
            width = min(settings.num_beams - len(finished[prompt]), (end - first) * V)
            best, index = scores[first:end].flatten().topk(width)
            gained = run.log_probs(first + index // V, index % V)
            parents, alive = [], []
            for score, i, log_prob in zip(best.tolist(), index.tolist(), gained, strict=True):
                if score == -math.inf:  # fewer tokens allowed than beams
                    break
                parent, id = first + i // V, i % V
                ids = [*running[parent].ids, id]
                beam = _Beam(prompt, ids, running[parent].log_prob + log_prob, score, "length")
                if id in ends:
                    finished[prompt].append(beam._replace(reason="eos"))
                elif stopped is not None and stopped(prompt, ids):
                    finished[prompt].append(beam._replace(reason="stop"))
                elif len(ids) >= run.limit(prompt):
                    finished[prompt].append(beam)
                else:
                    parents.append(parent)
                    alive.append(beam)
            to_beat = max(map(rank, finished[prompt]), default=-math.inf)
            if any(most(beam) > to_beat for beam in alive):
                rows += parents
                beams += alive
        if running := beams:
            run.advance(rows, [beam.ids[-1] for beam in running])
    winners = [max(beams, key=rank) for beams in finished]
    return [Generated(beam.ids, beam.log_prob, beam.reason) for beam in winners]
