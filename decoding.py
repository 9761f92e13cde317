"""Ids from a model: the KV cache, sampling, beam search. `generate.py` makes text of it.

    padded prompts -> one forward -> a token a step -> the ids of each continuation

The cache belongs to generation: `KVCache` is made here, passed to the model, and gone when the text is done.
Prompts of unequal length share a batch by padding on the left. Padding is document -1, which nothing else
sees, and each row counts its positions from its own first token, so a batch gives what single prompts give.

A model with a learned or sinusoidal position table refuses to run past it. Rotary positions have no such end,
but the model was trained on `block_size` of them only. Nothing is trimmed here: a caller who wants to stay
inside calls `generate.trim_prompt` first.

Shapes: n rows still running, V words.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architecture import ABSOLUTE_POSITIONS, Decoder

if TYPE_CHECKING:  # it is defined where a command line can be read before torch is imported
    from generate import GenerationConfig

Stopped = Callable[[int, list[int]], bool]  # (index of the prompt, ids generated so far) -> has it ended


class Generated(NamedTuple):
    """What one prompt was continued with.

    ids: The generated tokens, the closing eos included.
    log_prob: Sum of their natural-log probabilities under the model itself, before any setting changed them.
    finish_reason: `eos`, `stop` (a stop string) or `length` (max_new_tokens).
    """

    ids: list[int]
    log_prob: float
    finish_reason: str


# --- the cache ------------------------------------------------------------------------------------


class KVCache:
    """Keys and values (B, H_kv, max_length, D) of each layer, and document ids (B, max_length).

    The memory is taken once, at the first call, when the model shows its shape, dtype and device.

    Args:
        n_layer: Layers of the model.
        max_length: Most tokens a row will hold, padding included.
    """

    def __init__(self, n_layer: int, max_length: int):
        self.max_length = max_length
        self.length = 0  # counts this call's tokens as soon as `extend_documents` has run
        self._start = 0
        self._mixed = False  # whether some row holds more than one document, as padded rows do
        self._documents: Tensor | None = None
        self._keys: list[Tensor | None] = [None] * n_layer
        self._values: list[Tensor | None] = [None] * n_layer

    def extend_documents(self, document_ids: Tensor) -> Tensor | None:
        """Append (B, T) document ids; returns (B, length), or None where each row holds one document.

        Comes before the call's `update`s. Where it is None no mask has to be made.

        Raises:
            ValueError: The tokens do not fit.
        """
        self._start, self.length = self.length, self.length + document_ids.size(1)
        if self.length > self.max_length:
            raise ValueError(
                f"{self.length} tokens do not fit a cache of {self.max_length}; give it a larger max_length"
            )
        self._documents = self._extended(self._documents, document_ids, 1)
        if not self._mixed:
            self._mixed = not torch.equal(document_ids, self._documents[:, :1].expand_as(document_ids))
        return self._documents[:, : self.length] if self._mixed else None

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, H_kv, T, D); returns all so far, (B, H_kv, length, D)."""
        self._keys[layer] = keys = self._extended(self._keys[layer], k, 2)
        self._values[layer] = values = self._extended(self._values[layer], v, 2)
        return keys.narrow(2, 0, self.length), values.narrow(2, 0, self.length)

    def select(self, rows: Tensor) -> None:
        """Keep these rows (n,) in this order: drops finished rows, copies and reorders beams."""

        def selected(x: Tensor | None, dim: int) -> Tensor | None:
            """Of new memory; what nothing was written to is not copied."""
            if x is None:
                return None
            new = x.new_empty(len(rows), *x.shape[1:])
            torch.index_select(x.narrow(dim, 0, self.length), 0, rows, out=new.narrow(dim, 0, self.length))
            return new

        self._documents = selected(self._documents, 1)
        if self._mixed and self._documents is not None:  # the padded rows may be the ones that left
            read = self._documents[:, : self.length]
            self._mixed = not torch.equal(read, read[:, :1].expand_as(read))
        for layer in range(len(self._keys)):
            self._keys[layer] = selected(self._keys[layer], 2)
            self._values[layer] = selected(self._values[layer], 2)

    def join(self, parts: Sequence[KVCache]) -> None:
        """Take the rows of other caches, one after the other, in the place of none.

        What they hold ends in one column; before a shorter one stands padding, document -1.
        """
        self.length = max(part.length for part in parts)

        def joined(buffers: Sequence[Tensor | None], dim: int, fill: int) -> Tensor:
            there = [buffer for buffer in buffers if buffer is not None]
            shape = [sum(map(len, there)), *there[0].shape[1:]]
            shape[dim] = self.max_length
            own, row = there[0].new_full(shape, fill), 0
            for buffer, part in zip(there, parts, strict=True):
                place = own[row : row + len(buffer)].narrow(dim, self.length - part.length, part.length)
                place.copy_(buffer.narrow(dim, 0, part.length))
                row += len(buffer)
            return own

        self._documents = joined([part._documents for part in parts], 1, -1)
        read = self._documents[:, : self.length]
        self._mixed = not torch.equal(read, read[:, :1].expand_as(read))
        for layer in range(len(self._keys)):
            self._keys[layer] = joined([part._keys[layer] for part in parts], 2, 0)
            self._values[layer] = joined([part._values[layer] for part in parts], 2, 0)

    def _extended(self, buffer: Tensor | None, x: Tensor, dim: int) -> Tensor:
        if buffer is None:
            buffer = x.new_zeros(*x.shape[:dim], self.max_length, *x.shape[dim + 1 :])
        buffer.narrow(dim, self._start, x.size(dim)).copy_(x)
        return buffer


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
    before = probabilities.cumsum(dim=-1) - probabilities
    before[:, 0] = 0.0  # the most likely token stays, whatever the rounding
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


def _check_prompts(model: Decoder, prompts: Sequence[list[int]], settings: GenerationConfig) -> None:
    V, block_size = model.config.vocab_size, model.config.block_size
    for i, ids in enumerate(prompts):
        if not ids:
            raise ValueError(f"prompt {i} holds no token and there is no bos; give at least one character")
        if not 0 <= min(ids) <= max(ids) < V:
            wrong = next(id for id in ids if not 0 <= id < V)
            raise ValueError(
                f"prompt {i} holds id {wrong}, outside the model's vocabulary of {V}; "
                "use the tokenizer the model was trained with"
            )
        total = len(ids) + settings.max_new_tokens
        if model.config.position in ABSOLUTE_POSITIONS and total > block_size:
            raise ValueError(
                f"prompt {i} of {len(ids)} tokens and max_new_tokens {settings.max_new_tokens} make {total}, "
                f"more than the model's {block_size} positions; lower max_new_tokens or shorten the prompt"
            )


# --- decoding -------------------------------------------------------------------------------------


def generate_ids(
    model: Decoder,
    prompts: Sequence[list[int]],
    settings: GenerationConfig,
    eos_id: int | Collection[int] | None = None,
    vocab_size: int | None = None,
    stopped: Stopped | None = None,
    first_row: int | Sequence[int] = 0,
) -> list[Generated]:
    """Continue each list of ids, in one batch. `settings.stop` is text: here `stopped` takes its place.

    Args:
        model, settings: As for `generate`.
        first_row: The seed's row of the first prompt, those of the others following; or each prompt's own.
        prompts: Ids, bos included.
        eos_id: The token that ends a text, or several.
        vocab_size: Ids from here on are never chosen; an embedding may be padded with rows no text has.
        stopped: Asked after each token whether the text has ended.

    Raises:
        ValueError: A prompt is empty, holds an id outside the vocabulary or does not fit the model's
            positions, or the model's logits are NaN.
    """
    if not prompts:
        return []
    _check_prompts(model, prompts, settings)
    ends = frozenset(() if eos_id is None else (eos_id,) if isinstance(eos_id, int) else eos_id)
    with _evaluating(model), torch.inference_mode():
        run = _Run(model, prompts, settings, vocab_size)
        if settings.num_beams > 1:
            return _beam_search(run, settings, ends, stopped)
        return _token_by_token(run, settings, ends, stopped, first_row)


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


class _Run:
    """The rows under way: the next token's logits, and all that must be reordered when rows are."""

    def __init__(
        self, model: Decoder, prompts: Sequence[list[int]], settings: GenerationConfig, vocab_size: int | None
    ):
        self.model, self.settings = model, settings
        self.vocab_size = model.config.vocab_size if vocab_size is None else vocab_size
        self.device = model.embed.weight.device
        lengths = torch.tensor([len(ids) for ids in prompts], device=self.device)
        self.cache = KVCache(model.config.n_layer, int(lengths.max()) + settings.max_new_tokens)
        self.positions = lengths[:, None] - 1  # (n, 1), of the last token read
        self.seen: Tensor | None = None
        if settings.repetition_penalty != 1:
            V = model.config.vocab_size
            self.seen = torch.zeros(len(prompts), V, dtype=torch.bool, device=self.device)
            for row, ids in enumerate(prompts):  # not from `tokens`: the padding's token was not seen
                self.seen[row, ids] = True
        self._choose_from(self._read_prompts(prompts))

    def _read_prompts(self, prompts: Sequence[list[int]]) -> Tensor:
        """Hidden states (n, C) of their last tokens. Equal ones, as the draws of one have, are read once."""
        unique = list(dict.fromkeys(map(tuple, prompts)))
        # On a GPU a pass that is small costs as much as a larger one.
        passes = [list(range(len(unique)))]
        if self.device.type == "cpu":
            passes = read_together([len(ids) for ids in unique])
        if len(passes) == 1 and len(unique) == len(prompts):
            return self.model.hidden(*pad_left(prompts, self.device), self.cache)[:, -1]
        hidden = self._read_apart([[list(unique[row]) for row in rows] for rows in passes])
        places = {unique[row]: place for place, row in enumerate(itertools.chain(*passes))}
        index = torch.tensor([places[tuple(ids)] for ids in prompts], device=self.device)
        self.cache.select(index)
        return hidden[index]

    def _read_apart(self, passes: Sequence[list[list[int]]]) -> Tensor:
        """The same of prompts that are read in several passes, one after the other, into one cache."""
        hidden, parts = [], []
        for asked in passes:
            part = KVCache(self.model.config.n_layer, max(map(len, asked)))
            hidden.append(self.model.hidden(*pad_left(asked, self.device), part)[:, -1])
            parts.append(part)
        self.cache.join(parts)
        return torch.cat(hidden)

    def _choose_from(self, hidden: Tensor) -> None:
        """Logits of the last tokens' hidden states (n, C)."""
        logits = self.model.head(hidden).float()
        self.log_total = logits.logsumexp(dim=-1, keepdim=True)  # (n, 1), NaN if any of the row is
        if not self.log_total.isfinite().all():
            raise ValueError("the model's logits are NaN; its weights hold NaN or its precision overflowed")
        self.own_logits = logits  # (n, V), as the model has them
        if self.vocab_size < logits.size(1):
            logits = logits.clone()
            logits[:, self.vocab_size :] = -math.inf
        self.logits = adjust_logits(logits, self.seen, self.settings)  # (n, V), to choose from

    def log_probs(self, rows: Tensor, ids: Tensor) -> list[float]:
        """Of these ids, one of each row, under the model itself: before any setting changed its logits."""
        return (self.own_logits[rows, ids].double() - self.log_total[rows, 0]).tolist()

    def advance(self, rows: list[int], ids: list[int]) -> None:
        """Keep `rows`, in this order, and read one token id for each."""
        if rows != list(range(len(self.logits))):
            index = torch.tensor(rows, device=self.device)
            self.cache.select(index)
            self.positions = self.positions[index]
            if self.seen is not None:
                self.seen = self.seen[index]
        tokens = torch.tensor(ids, device=self.device)[:, None]
        if self.seen is not None:
            self.seen.scatter_(1, tokens, True)
        self.positions = self.positions + 1
        hidden = self.model.hidden(tokens, self.positions, torch.zeros_like(tokens), self.cache)
        self._choose_from(hidden[:, -1])


def _token_by_token(
    run: _Run,
    settings: GenerationConfig,
    ends: Collection[int],
    stopped: Stopped | None,
    first_row: int | Sequence[int],
) -> list[Generated]:
    """Greedy decoding or sampling; a finished row leaves the batch at once."""
    n_prompts = len(run.logits)
    own_rows = range(first_row, first_row + n_prompts) if isinstance(first_row, int) else first_row
    generators = [row_generator(settings.seed, row) for row in own_rows]
    ids: list[list[int]] = [[] for _ in range(n_prompts)]
    log_prob, reason = [0.0] * n_prompts, ["length"] * n_prompts
    prompts = list(range(n_prompts))  # of the rows under way
    for step in range(1, settings.max_new_tokens + 1):
        if settings.temperature == 0:
            chosen = run.logits.argmax(dim=-1)
        else:
            chosen = sample(run.logits, [generators[prompt] for prompt in prompts])
        gained = run.log_probs(torch.arange(len(chosen), device=run.device), chosen)
        rows = []
        for row, (prompt, id) in enumerate(zip(prompts, chosen.tolist(), strict=True)):
            ids[prompt].append(id)
            log_prob[prompt] += gained[row]
            if id in ends:
                reason[prompt] = "eos"
            elif stopped is not None and stopped(prompt, ids[prompt]):
                reason[prompt] = "stop"
            else:
                rows.append(row)
        if not rows or step == settings.max_new_tokens:
            break
        prompts = [prompts[row] for row in rows]
        run.advance(rows, [ids[prompt][-1] for prompt in prompts])
    return [Generated(*result) for result in zip(ids, log_prob, reason, strict=True)]


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
    last, alpha = settings.max_new_tokens, settings.length_penalty
    running = [_Beam(prompt, [], 0.0, 0.0, "length") for prompt in range(len(run.logits))]
    finished: list[list[_Beam]] = [[] for _ in running]

    def rank(beam: _Beam) -> float:
        return beam.score / len(beam.ids) ** alpha

    def most(beam: _Beam) -> float:
        """No continuation ranks higher: scores only fall, so the best is to end now or as late as can be."""
        return max(beam.score / last**alpha, beam.score / (len(beam.ids) + 1) ** alpha)

    for step in range(1, last + 1):
        # Log-probabilities: sums of raw logits would rank beams by each model's arbitrary offset.
        scores = F.log_softmax(run.logits, dim=-1, dtype=torch.float64)
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
                elif step == last:
                    finished[prompt].append(beam)
                else:
                    parents.append(parent)
                    alive.append(beam)
            to_beat = max(map(rank, finished[prompt]), default=-math.inf)
            if any(most(beam) > to_beat for beam in alive):
                rows += parents
                beams += alive
        running = beams
        if not running:
            break
        run.advance(rows, [beam.ids[-1] for beam in running])
    winners = [max(beams, key=rank) for beams in finished]
    return [Generated(beam.ids, beam.log_prob, beam.reason) for beam in winners]
