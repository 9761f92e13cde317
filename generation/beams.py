"""Beam search over rows under way.

A search is a call of its own: all of its beams are under way together, and it shares no step with requests.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from typing import NamedTuple

from generation.requests import Generated, Stopped
from generation.rows import LiveRows, refuse_broken
from generation.settings import GenerationConfig


class _Beam(NamedTuple):
    prompt: int
    ids: list[int]
    log_prob: float  # under the model
    score: float  # log-probability after the repetition penalty; `log_prob` without one
    reason: str


def beam_search(
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
    finished: list[list[_Beam]] = [[] for _ in live.seats]

    def rank(beam: _Beam) -> float:
        return beam.score / len(beam.ids) ** alpha

    def most(beam: _Beam) -> float:
        """Bound the ranks of all continuations: scores only fall, so the best ends now or at the limit."""
        return max(
            beam.score / live.seats[beam.prompt].limit ** alpha, beam.score / (len(beam.ids) + 1) ** alpha
        )

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
                elif len(ids) >= live.seats[prompt].limit:
                    finished[prompt].append(beam)
                else:
                    parents.append(parent)
                    alive.append(beam)
            to_beat = max(map(rank, finished[prompt]), default=-math.inf)
            if any(most(beam) > to_beat for beam in alive):
                rows += parents
                beams += alive
        if running := beams:
            live.keep(rows)
            live.read([beam.ids[-1] for beam in running])
            refuse_broken(live.look())
    winners = [max(beams, key=rank) for beams in finished]
    return [Generated(beam.ids, beam.log_prob, beam.reason) for beam in winners]
