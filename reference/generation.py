"""Generation written out: the chances of the next token, a draw from them, and the search by beams.

    logits (V,) -> penalty, temperature, top-k, top-p, min-p -> chances (V,) -> a token

Here every text is read anew for each of its tokens; there is no cache, no padding and no batch. All in fp64.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Rules(NamedTuple):
    """How tokens are chosen: the settings of generation by their names, at values that change nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def penalised(logits: Tensor, seen: Collection[int], penalty: float) -> Tensor:
    """Return logits (V,) where those of tokens in the text so far are less likely (arXiv:1909.05858).

    A positive logit is divided by the penalty; a negative one is multiplied, which also makes it less likely.
    """
    found = logits.clone()
    ids = torch.tensor([*{*seen}])
    found[ids] = torch.where(logits[ids] < 0, logits[ids] * penalty, logits[ids] / penalty)
    return found


def chances(logits: Tensor, rules: Rules) -> Tensor:
    """Return the probability (V,) of each token after the penalty, where tokens are sampled.

    Each rule works on what the one before left, whose probabilities then sum to one again.
    """
    p = (logits / rules.temperature).softmax(-1)
    if rules.top_k:
        p = only(p, p >= p.sort(descending=True).values[min(rules.top_k, len(p)) - 1])
    if rules.top_p < 1:
        p = only(p, nucleus(p, rules.top_p))
    if rules.min_p > 0:
        p = only(p, p >= rules.min_p * p.max())
    return p


def only(p: Tensor, kept: Tensor) -> Tensor:
    """Return the probabilities of tokens if they are among those kept."""
    p = p.where(kept, 0.0)
    return p / p.sum()


def nucleus(p: Tensor, share: float) -> Tensor:
    """Return which tokens (V,) are the fewest that together have a share of all (arXiv:1904.09751).

    The token with which they reach it is one of them.
    """
    falling = p.argsort(descending=True, stable=True)
    total, fewest = 0.0, 0
    for chance in p[falling].tolist():
        total, fewest = total + chance, fewest + 1
        if total >= share:
            break
    kept = torch.zeros_like(p, dtype=torch.bool)
    kept[falling[:fewest]] = True
    return kept


def draws(seed: int, row: int) -> Iterator[float]:
    """Yield the random numbers in [0, 1) of the prompt with this number, one a token.

    torch's generator for a CPU takes a seed of 32 bits: the first of SHA-256 of both numbers.
    """
    digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    while True:
        yield float(torch.rand((), generator=generator, dtype=torch.float64))


def interval(p: Tensor, id: int) -> tuple[float, float]:
    """Return the random numbers by which a token is drawn: the parts of [0, 1) in the order of ids."""
    return float(p[:id].sum()), float(p[: id + 1].sum())


class Text(NamedTuple):
    """The new tokens of a text that a search by beams looks at.

    log_prob: The sum of their natural-log probabilities.
    ended: Nothing follows.
    """

    ids: tuple[int, ...] = ()
    log_prob: float = 0.0
    ended: bool = False

    def rank(self, length_penalty: float) -> float:
        """Return what texts are ordered by."""
        return self.log_prob / len(self.ids) ** length_penalty


def beam_search(
    log_probs: Callable[[tuple[int, ...]], Tensor], width: int, length: int, ends: Collection[int]
) -> tuple[list[Text], float]:
    """Return the ended texts that a search by beams finds, and the least gap at which it dropped one.

    At each step the likeliest continuations of all running texts stay: so many that with those that have
    ended they are `width` (arXiv:1409.0473). A text ends with an end, or at its length.

    Args:
        log_probs: Takes new tokens, and returns the log-probabilities (V,) of the next one.
    """
    running, ended, gap = [Text()], list[Text](), math.inf
    while running and len(ended) < width:
        found = []
        for text in running:
            likeliest = log_probs(text.ids).sort(descending=True, stable=True)
            # Of one text no more than these stay, or are the next after those that do.
            for more, id in zip(
                likeliest.values[: width + 1].tolist(), likeliest.indices.tolist(), strict=False
            ):
                ids = (*text.ids, id)
                found.append(Text(ids, text.log_prob + more, id in ends or len(ids) == length))
        found.sort(key=lambda text: -text.log_prob)
        places = width - len(ended)
        if len(found) > places:
            gap = min(gap, found[places - 1].log_prob - found[places].log_prob)
        ended += [text for text in found[:places] if text.ended]
        running = [text for text in found[:places] if not text.ended]
    return ended, gap


def chances_of_covers(branches: Collection[tuple[float, Tensor, Collection[int]]]) -> list[Tensor]:
    """Return for each branch of a healed prompt the probability (V,) of its last tokens (arXiv:2410.09303).

    Given that the text begins with the prompt, its tokens begin with one of the covers, each as likely as the
    model says: p(cover) / the sum over all.

    Args:
        branches: Of each, the log-probability of its tokens, the logits (V,) after them, and the last tokens
            that are allowed.
    """
    joint = []
    for weight, logits, allowed in branches:
        of_branch = torch.full_like(logits, -math.inf)
        ids = torch.tensor(sorted(allowed))
        of_branch[ids] = weight + logits.log_softmax(-1)[ids]
        joint.append(of_branch)
    total = torch.stack(joint).flatten().logsumexp(0)
    return [(of_branch - total).exp() for of_branch in joint]
