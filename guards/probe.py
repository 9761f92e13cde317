"""Guard of attention: what an output depends on, by its gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from architecture import Decoder
from dataset import IGNORE_INDEX, Batch
from guards.faults import Fault
from guards.subject import (
    SHORTEST_PASS,
    GuardSubject,
    is_shortened,
    of_each_kind,
    through,
    with_nonzero_weights,
)
from modules.dropout import Dropout
from modules.quantized_linear import n_weights

PROBE_FAULTS = {
    "gradient-not-finite": "the gradient of a prediction is not finite",
    "other-row-visible": "a prediction depends on another row of the batch",
    "future-visible": "a prediction depends on a later token",
    "other-document-visible": "a prediction depends on another document packed in its row",
    "padding-visible": "a prediction depends on padding",
    "past-invisible": "a prediction does not depend on the tokens before it",
    "token-invisible": "a prediction does not depend on its own token",
}
PROBE_ELEMENTS = 6e9  # Parameters x tokens of a pass: 0.2 s each on two cores.
SHORTEST_PACKED = 8  # Tokens.
MOST_LABELS = 16  # In a long row, where each costs a row of logits.
PAST_SEEN = 0.9  # Share of earlier tokens: a weight that is rounded to zero may hide some.


class Look(NamedTuple):
    """Predictions of one document that are looked at together: the labels at `places` of a row of a batch."""

    batch: Batch
    row: int
    places: Sequence[int]
    training: bool
    blocks: set[int]  # Those of the model that the pass goes through.


def probe(subject: GuardSubject) -> Iterator[Fault | str]:
    """See that a prediction depends on its own document up to its own token, and on nothing else.

    The gradient of labels' loss with respect to the embedding of every token of the batch must be zero at
    tokens later than all of them, other rows, other documents and padding; that of a single label not zero at
    the token itself and before it. The tokens are real; packed and padded rows are made of them, and rows of
    one document, which need no mask. What must not be seen is looked for in training mode too, since dropout
    takes other kernels, by many labels at once; what must be seen without dropout.
    """
    dropped = any(m.p for m in subject.model.modules() if isinstance(m, Dropout))
    found: set[str] = set()
    lengths = []
    with with_nonzero_weights(subject.model):
        for look in looks(subject, dropped):
            subject.model.train(look.training)
            with through(subject.model, look.blocks):
                gradient = sensitivity(subject, look)
            found |= dependence_faults(look, gradient, subject.config.model.sliding_window)
            lengths.append(look.batch.tokens.size(1))
    for name, evidence in PROBE_FAULTS.items():
        if name in found:
            yield Fault(name, evidence, "check the attention mask and the order of axes (B, T, C)")
    shorter = f" of {lengths[0]} tokens and" if lengths[0] < lengths[-1] else " of"
    packed = "packed and padded" if max(lengths) >= SHORTEST_PACKED else "too short to be packed"
    yield f"predictions of {len(lengths)} passes in rows{shorter} {lengths[-1]}, {packed}"


def looks(subject: GuardSubject, dropped: bool) -> Iterator[Look]:
    """Yield looks at two rows of real tokens, cut to what is affordable, and then at one that is not cut.

    The structure shows in short rows, which go through every block, or through the last of each kind if the
    model is a shortened one; in a long one, which goes through the first of each kind, the kernels for the
    length that trains are run.
    """
    model, tokens = subject.model, subject.micro_batch(0).tokens
    tokens = tokens[[0, -1]] if len(tokens) > 1 else torch.cat((tokens, tokens.roll(1, 1)))
    whole = tokens.size(1)
    length = min(whole, max(SHORTEST_PASS, int(PROBE_ELEMENTS / n_weights(model) / 2)))
    blocks = of_each_kind(model, last=True) if is_shortened(subject) else set(range(len(model.blocks)))
    alone, packed = rows_of(tokens[:, :length])
    middle, end = halves(length)
    if dropped:
        yield Look(alone, 0, range(length // 2), True, blocks)
    yield Look(alone, 0, [min(length - 1, (length // 2) | 1)], False, blocks)  # Odd: swapped axes show.
    yield Look(alone, 1, [length - 1], False, blocks)
    if length >= SHORTEST_PACKED:
        if dropped:
            yield Look(packed, 1, range(middle, max(middle + 1, end - 2)), True, blocks)
        yield Look(packed, 0, [middle // 2], False, blocks)
        yield Look(packed, 1, [end - 1], False, blocks)
    if length < whole:
        alone, packed = rows_of(tokens[:1])
        middle, end = halves(whole)
        blocks = of_each_kind(model)
        yield Look(packed, 0, range(middle, end - 2, 1 + (end - middle) // MOST_LABELS), dropped, blocks)
        yield Look(alone, 0, [whole - 2], False, blocks)


def halves(length: int) -> tuple[int, int]:
    """Return where the first document of a packed row ends, and where the second does; then comes padding."""
    return length // 2, length - length // 8


def rows_of(tokens: Tensor) -> tuple[Batch, Batch]:
    """Return two batches of the tokens (B, T): one document a row, and two documents and padding a row."""
    tokens = tokens.contiguous()
    count = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens).contiguous()
    middle, end = halves(tokens.size(1))
    documents = torch.where(count < middle, 0, torch.where(count < end, 1, -1))
    positions = torch.where(count < middle, count, torch.where(count < end, count - middle, 0))
    return Batch(tokens, tokens, torch.zeros_like(tokens), count), Batch(tokens, tokens, documents, positions)


@contextlib.contextmanager
def frozen(model: Decoder) -> Iterator[None]:
    """Make no gradient of a weight, which would take as long as all else."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def sensitivity(subject: GuardSubject, look: Look) -> Tensor:
    """Return the largest gradient of the labels' loss with respect to each token's embedding: (B, T)."""
    embedded: list[Tensor] = []

    def hold(module: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    batch, places = look.batch, list(look.places)
    labels = torch.full_like(batch.labels, IGNORE_INDEX)
    labels[look.row, places] = batch.labels[look.row, places]
    handle = subject.model.embed.register_forward_hook(hold)
    try:
        with frozen(subject.model), torch.enable_grad():
            # Times 1,024, so that fp16 does not round a small gradient to zero; once, if that is too large.
            for scale in (1024, 1):
                embedded.clear()
                # A new graph: a retained one keeps all that recomputation made in backward.
                objective = subject.loss(batch._replace(labels=labels)).objective
                found = torch.autograd.grad(objective * scale, embedded, allow_unused=True)
                used = [g.abs().amax(-1).float().cpu() for g in found if g is not None]
                gradient = torch.stack(used).amax(0) if used else torch.zeros(batch.tokens.shape)
                if torch.isfinite(gradient).all():
                    break
    finally:
        handle.remove()
    return gradient


def dependence_faults(look: Look, gradient: Tensor, window: int) -> set[str]:
    """Return the names in PROBE_FAULTS of what the gradient (B, T) shows.

    What a single label must see is looked for in evaluation mode only: dropout may hide it.
    """
    if not torch.isfinite(gradient).all():
        return {"gradient-not-finite"}
    documents, row, place = look.batch.document_ids.cpu(), look.row, max(look.places)
    seen = gradient > 0
    faults = set()
    if seen[torch.arange(len(seen)) != row].any():
        faults.add("other-row-visible")
    own, earlier = documents[row] == documents[row, place], torch.arange(seen.size(1)) <= place
    if (seen[row] & (documents[row] < 0)).any():
        faults.add("padding-visible")
    if (seen[row] & ~own & (documents[row] >= 0)).any():
        faults.add("other-document-visible")
    if (seen[row] & own & ~earlier).any():
        faults.add("future-visible")
    if look.training or len(look.places) > 1:
        return faults
    past = own & earlier
    past[place] = False
    if window:
        past[: max(0, place - window + 1)] = False
    if not seen[row, place]:
        faults.add("token-invisible")
    if (seen[row] & past).sum() < PAST_SEEN * past.sum():
        faults.add("past-invisible")
    return faults
