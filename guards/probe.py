"""Guard: what an output depends on, by gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from architecture import Dropout
from dataset import IGNORE_INDEX, Batch
from guards.subject import Fault, Subject, awake
from quantize import n_weights


def probe(subject: Subject) -> Iterator[Fault | str]:
    """By gradient: a prediction depends on its own document up to its own token, and on nothing else.

    The gradient of one label's loss with respect to the embedding of every token of the batch must be zero at
    later tokens, other rows, other documents and padding, and not zero at the token itself and before it. The
    tokens are real; packed and padded rows are made of them, and rows of one document, which need no mask.
    What must not be seen is looked for in training mode, since dropout takes other kernels, and what must be
    seen without dropout.
    """
    batches = probe_batches(subject)
    modes = (True, False) if any(m.p for m in subject.model.modules() if isinstance(m, Dropout)) else (False,)
    found: set[str] = set()
    with awake(subject.model):
        for training in modes:
            subject.model.train(training)
            for batch, places in batches:
                for row, place in places:
                    gradient = sensitivity(subject, batch, row, place)
                    window = subject.config.model.sliding_window
                    found |= dependence_faults(batch, row, place, gradient, window, dropped=training)
    for name, evidence in PROBE_FAULTS.items():
        if name in found:
            yield Fault(name, evidence, "check the attention mask and the order of axes (B, T, C)")
    predictions = len(modes) * sum(len(places) for _, places in batches)
    length = batches[0][0].tokens.size(1)
    packed = "packed and padded" if len(batches) > 1 else "too short to be packed"
    yield f"{predictions} predictions in rows of {length}, {packed}"


PROBE_FAULTS = {
    "gradient-not-finite": "the gradient of a prediction is not finite",
    "other-row-visible": "a prediction depends on another row of the batch",
    "future-visible": "a prediction depends on a later token",
    "other-document-visible": "a prediction depends on another document packed in its row",
    "padding-visible": "a prediction depends on padding",
    "past-invisible": "a prediction does not depend on the tokens before it",
    "token-invisible": "a prediction does not depend on its own token",
}
PROBE_ELEMENTS = 6e9  # parameters x tokens of a prediction: 0.2 s each on two cores
PAST_SEEN = 0.9  # of the tokens before it; a weight that is rounded to zero may hide some


def probe_batches(subject: Subject) -> list[tuple[Batch, list[tuple[int, int]]]]:
    """Batches of two rows of real tokens, each with the predictions (row, place) to look at."""
    tokens = subject.micro_batch(0).tokens
    tokens = tokens[[0, -1]] if len(tokens) > 1 else torch.cat((tokens, tokens.roll(1, 1)))
    length = min(tokens.size(1), max(32, int(PROBE_ELEMENTS / n_weights(subject.model) / 2)))
    tokens = tokens[:, :length].contiguous()
    count = torch.arange(length, device=tokens.device).expand(2, length)
    alone = Batch(tokens, tokens, torch.zeros_like(tokens), count.contiguous())
    batches = [(alone, [(0, (length // 2) | 1), (1, length - 1)])]  # odd: swapped axes show
    if length >= 8:
        middle, end = length // 2, length - length // 8  # of the first document, of the second
        documents = torch.where(count < middle, 0, torch.where(count < end, 1, -1))
        positions = torch.where(count < middle, count, torch.where(count < end, count - middle, 0))
        packed = Batch(tokens, tokens, documents, positions)
        batches.append((packed, [(0, middle // 2), (1, middle + 1), (1, end - 1)]))
    return batches


def sensitivity(subject: Subject, batch: Batch, row: int, place: int) -> Tensor:
    """(B, T): the largest gradient of one label's loss with respect to each token's embedding."""
    embedded: list[Tensor] = []

    def hold(module: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    labels = torch.full_like(batch.labels, IGNORE_INDEX)
    labels[row, place] = batch.labels[row, place]
    handle = subject.model.embed.register_forward_hook(hold)
    try:
        with torch.enable_grad():
            objective = subject.loss(batch._replace(labels=labels)).objective
    finally:
        handle.remove()
    # Times 1,024, so that fp16 does not round a small gradient to zero; once, if that is too large for it.
    for scale in (1024, 1):
        gradients = torch.autograd.grad(objective * scale, embedded, allow_unused=True, retain_graph=True)
        used = [g.abs().amax(-1).float().cpu() for g in gradients if g is not None]
        gradient = torch.stack(used).amax(0) if used else torch.zeros(batch.tokens.shape)
        if torch.isfinite(gradient).all():
            break
    return gradient


def dependence_faults(
    batch: Batch, row: int, place: int, gradient: Tensor, window: int, dropped: bool
) -> set[str]:
    """The names in PROBE_FAULTS that the gradient (B, T) of the prediction at (row, place) shows.

    With `dropped`, dropout may have hidden what else would be seen.
    """
    if not torch.isfinite(gradient).all():
        return {"gradient-not-finite"}
    documents = batch.document_ids.cpu()
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
    past = own & earlier
    past[place] = False
    if window:
        past[: max(0, place - window + 1)] = False
    if not dropped and not seen[row, place]:
        faults.add("token-invisible")
    if not dropped and (seen[row] & past).sum() < PAST_SEEN * past.sum():
        faults.add("past-invisible")
    return faults
