"""Ids from a model: sampling, beam search, many prompts at a time. generation/text.py makes text of them.

    padded prompts -> one forward -> a token a step -> the ids of each continuation

A row that has ended leaves the batch at once; where there are more prompts than rows, others take the places
that became free (generation/rows.py).

A model with a learned or sinusoidal position table refuses to run past it. Rotary positions have no such end,
but the model was trained on `block_size` of them only. Nothing is trimmed here: a caller who wants to stay
inside calls `generation.text.trim_prompt` first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from architecture import Decoder
from generation.rows import LiveRows, most_tokens
from generation.sampling import row_generator, sample
from generation.settings import GenerationConfig
from modules.positions import ABSOLUTE_POSITIONS
from tokenization.healing import Prompt

Stopped = Callable[[int, list[int]], bool]  # (index of the prompt, ids so far) -> the text has ended


class Generated(NamedTuple):
    """The continuation of one prompt.

    ids: The generated tokens, with the closing eos and with those for a dropped end of the prompt.
    log_prob: Sum of their natural-log probabilities under the model itself, before any setting changes them,
        given that the text begins with the prompt.
    finish_reason: `eos`, `stop` (a stop string) or `length` (max_new_tokens).
    """

    ids: list[int]
    log_prob: float
    finish_reason: str


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

    There are nine parameters, because each caller sets others of the six optional ones.

    Args:
        model: The decoder; its mode is left as it was found.
        prompts: Ids, bos included; or the Prompts that `tokenization.healing.healed` makes of them.
        settings: How to choose tokens.
        eos_id: The token that ends a text, or several.
        vocab_size: Ids from here on are never chosen; an embedding may be padded with rows no text has.
        stopped: Called after each token; True ends the text.
        first_row: The seed's row of the first prompt, from which the others count on; or each prompt's own.
        most_rows: Prompts under way at a time; further ones wait, in their order, until places are free. None
            is all, as a beam search needs. It does not change what is generated.
        on_done: Called with the index of a prompt and its continuation, as soon as it has ended.

    Raises:
        ValueError: A prompt is empty, holds an id outside the vocabulary or does not fit the model's
            positions, or the model's logits are NaN.
    """
    if not prompts:
        return []
    requested = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
    _check_prompts(model, requested, settings)
    ends = frozenset(() if eos_id is None else (eos_id,) if isinstance(eos_id, int) else eos_id)
    with _evaluating(model), torch.inference_mode():
        if settings.num_beams > 1:
            assert most_rows is None and on_done is None, "beams of all prompts are under way together"
            return _beam_search(LiveRows(model, requested, settings, vocab_size), settings, ends, stopped)
        live = LiveRows(model, requested, settings, vocab_size, most_rows)
        return _token_by_token(live, settings, ends, stopped, first_row, on_done)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluate, then restore each module's own mode: `model.train()` would also switch frozen parts."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


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
        total = len(prompt.ids) + most_tokens(prompt, settings)
        if model.config.position in ABSOLUTE_POSITIONS and total > block_size:
            raise ValueError(
                f"prompt {i} of {len(ids)} tokens and max_new_tokens {settings.max_new_tokens} make {total}, "
                f"more than the model's {block_size} positions; lower max_new_tokens or shorten the prompt"
            )


def _token_by_token(
    live: LiveRows,
    settings: GenerationConfig,
    ends: Collection[int],
    stopped: Stopped | None,
    first_row: int | Sequence[int],
    on_done: Callable[[int, Generated], None] | None,
) -> list[Generated]:
    """Decode greedily, or sample; a finished row leaves the batch at once."""
    n_prompts = len(live.requested)
    own_rows = range(first_row, first_row + n_prompts) if isinstance(first_row, int) else first_row
    # A generator takes 2.5 kB; a greedy choice needs none.
    generators = [row_generator(settings.seed, row) for row in own_rows if settings.temperature]
    ids: list[list[int]] = [[] for _ in range(n_prompts)]
    log_prob = [0.0] * n_prompts
    done: dict[int, Generated] = {}
    while True:
        logits, firsts = live.choices()
        if settings.temperature == 0:
            chosen = logits.argmax(dim=-1)
        else:
            chosen = sample(logits, [generators[live.prompts[row]] for row in firsts])
        index = torch.tensor(firsts, device=live.device) + chosen // live.logits.size(1)
        chosen = chosen % live.logits.size(1)
        gained, rows = live.log_probs(index, chosen), []
        for row, id, log_p in zip(index.tolist(), chosen.tolist(), gained, strict=True):
            prompt = live.prompts[row]
            ids[prompt] += [*live.branches[row].ids, id] if row in live.branches else [id]
            log_prob[prompt] += log_p
            reason = ""
            if id in ends:
                reason = "eos"
            elif stopped is not None and stopped(prompt, ids[prompt]):
                reason = "stop"
            elif len(ids[prompt]) >= live.limit(prompt):
                reason = "length"
            else:
                rows.append(row)
            if reason:
                done[prompt] = Generated(ids[prompt], log_prob[prompt], reason)
                if on_done is not None:
                    on_done(prompt, done[prompt])
        if not rows and not live.waiting:
            return [done[prompt] for prompt in range(n_prompts)]
        rows = _close_gaps(rows)
        live.advance(rows, [ids[live.prompts[row]][-1] for row in rows])


def _close_gaps(rows: list[int]) -> list[int]:
    """Order rows so that as many as possible keep their place, for `KVCache.select`."""
    behind = [row for row in rows if row >= len(rows)]
    staying = set(rows)
    return [place if place in staying else behind.pop() for place in range(len(rows))]


class _Beam(NamedTuple):
    prompt: int
    ids: list[int]
    log_prob: float  # under the model
    score: float  # log-probability after the repetition penalty; `log_prob` without one
    reason: str


def _beam_search(
    live: LiveRows, settings: GenerationConfig, ends: Collection[int], stopped: Stopped | None
) -> list[Generated]:
    """Return the best of `num_beams` hypotheses a prompt, by score / length ** length_penalty (eos counts).

    A finished hypothesis keeps its place: the search goes on with one beam fewer (Bahdanau et al. 2014,
    arXiv:1409.0473), so that one beam is exactly greedy decoding, whatever the length penalty. It ends when
    no place is left, or when no running beam can beat the best finished one.
    """
    alpha = settings.length_penalty
    begun = [list(live.branches[row].ids) if row in live.branches else [] for row in range(len(live.prompts))]
    starts = zip(live.prompts, begun, strict=True)
    running = [_Beam(prompt, ids, 0.0, 0.0, "length") for prompt, ids in starts]
    finished: list[list[_Beam]] = [[] for _ in live.requested]

    def rank(beam: _Beam) -> float:
        return beam.score / len(beam.ids) ** alpha

    def most(beam: _Beam) -> float:
        """Bound the ranks of all continuations: scores only fall, so the best ends now or at the limit."""
        return max(beam.score / live.limit(beam.prompt) ** alpha, beam.score / (len(beam.ids) + 1) ** alpha)

    while running:
        # Log-probabilities: sums of raw logits would rank beams by each model's arbitrary offset.
        scores = live.log_scores()
        scores += scores.new_tensor([beam.score for beam in running])[:, None]
        V = scores.size(1)
        rows, beams = [], []
        for prompt, group in itertools.groupby(range(len(running)), key=lambda row: running[row].prompt):
            first, *others = group
            end = first + 1 + len(others)
            width = min(settings.num_beams - len(finished[prompt]), (end - first) * V)
            best, index = scores[first:end].flatten().topk(width)
            gained = live.log_probs(first + index // V, index % V)
            parents, alive = [], []
            for score, i, log_prob in zip(best.tolist(), index.tolist(), gained, strict=True):
                if score == -math.inf:  # Fewer tokens are allowed than there are beams.
                    break
                parent, id = first + i // V, i % V
                ids = [*running[parent].ids, id]
                beam = _Beam(prompt, ids, running[parent].log_prob + log_prob, score, "length")
                if id in ends:
                    finished[prompt].append(beam._replace(reason="eos"))
                elif stopped is not None and stopped(prompt, ids):
                    finished[prompt].append(beam._replace(reason="stop"))
                elif len(ids) >= live.limit(prompt):
                    finished[prompt].append(beam)
                else:
                    parents.append(parent)
                    alive.append(beam)
            to_beat = max(map(rank, finished[prompt]), default=-math.inf)
            if any(most(beam) > to_beat for beam in alive):
                rows += parents
                beams += alive
        if running := beams:
            live.advance(rows, [beam.ids[-1] for beam in running])
    winners = [max(beams, key=rank) for beams in finished]
    return [Generated(beam.ids, beam.log_prob, beam.reason) for beam in winners]
