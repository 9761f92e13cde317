"""Comparison of a validation's scores, and of the checkpoint that was saved with it, with the reference."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dataset import IGNORE_INDEX, Batch
from guards.faults import Fault
from guards.reference import said
from guards.reference.comparison import Comparison, Differs
from guards.reference.effective import config_of, weights_of
from guards.reference.stored import compare_stored, exact
from guards.subject import GuardSubject
from modules.quantized_linear import n_weights
from reference import checkpoints, scores
from reference.forward import Rows, logits_of, nll_of
from training.log import say

PRODUCTS = 1.5e9  # Weights x tokens of the rows that are scored again, in fp64: 0.3 s on two cores.
TARGETS = 10**6  # Of a validation with more, the targets are not counted again.
SURE = 3  # Validations after which no checkpoint may be missing.
DOCUMENTS = 16  # Whose bytes are counted again.


class Begun:
    """The state of a run when this part of it begins.

    Attributes:
        step: The step of the checkpoint that it goes on from; 0 for a new run.
        there: The steps of the checkpoints that are there.
        manifests: By step what checkpoints say that were there after the last validation.
        saves: How many there were in this part.
    """

    def __init__(self, subject: GuardSubject):
        state = subject.state
        self.step, self.best_loss = state.step, state.best_loss
        self.without_better = state.validations_without_better
        self.manifests = by_step(subject)
        self.there, self.saves = {*self.manifests}, 0


def _manifests(subject: GuardSubject) -> Iterator[dict[str, Any]]:
    """Yield the manifests of the run's checkpoints; an older one may be damaged."""
    for folder in (subject.folder / "checkpoints").glob("step-*"):
        with contextlib.suppress(OSError, ValueError):
            yield checkpoints.manifest_of(folder)


def by_step(subject: GuardSubject) -> dict[int, dict[str, Any]]:
    """Return by step what the checkpoints say that are there."""
    return {manifest["step"]: manifest for manifest in _manifests(subject)}


def faults(
    subject: GuardSubject, values: Mapping[str, float], begun: Begun, whole: bool = True
) -> Iterator[Fault]:
    """Compare the newest checkpoint and its scores, and yield the first difference.

    Args:
        values: What was logged of the validation.
        whole: Compare its scores too.
    """
    comparison = Comparison()
    try:
        if whole:
            compare_scores(subject, comparison, values)
            compare_bytes(subject, comparison, values)
        said.compare_log(subject, comparison, values, begun.step)
        compare_checkpoint(subject, comparison, values)
        compare_best(subject, comparison, begun)
        compare_kept(subject, comparison, begun)
    except Differs as difference:
        yield Fault("differs-from-reference", comparison.evidence(difference), difference.remedy)
    for sentence in comparison.left_out:
        say(sentence)


def compare_scores(subject: GuardSubject, comparison: Comparison, values: Mapping[str, float]) -> None:
    """Compare the loss of some rows of validation, and the perplexity of what was logged."""
    n, model = n_weights(subject.model), subject.model
    (batch, *_) = subject.validation_batches(1)
    rows = int(PRODUCTS / n / batch.tokens.size(1))
    if not rows:
        comparison.leave_out("the validation's loss", f"a row of a model of {n:,} weights takes too long")
    else:
        some = Batch(*(t[:rows].cpu() for t in batch))
        found = subject.score([some])
        with torch.no_grad():
            config = config_of(model, subject.config.model)
            texts = Rows(some.tokens, some.positions, some.document_ids)
            logits = logits_of(config, weights_of(model, {}), texts)
        # Each block rounds the stream of its number format about twelve times, up and down alike.
        rounding = torch.finfo(subject.eval_precision.dtype).eps * math.sqrt(12 * len(model.blocks) + 12)
        comparison.close(
            f"loss of {len(some.tokens)} rows of validation",
            torch.tensor(found.loss),
            nll_of(logits, some.labels).mean(),
            2 * rounding + 1e-6,
            "what validation computes: its targets, its mode, or what it divides by",
        )
        shares = {1: found.top1, 5: found.top5}
        compare_hits(comparison, logits, some.labels, shares, float(logits.abs().amax()) * (rounding + 1e-6))
    comparison.close(
        "perplexity",
        torch.tensor(values["eval/perplexity"]).double(),
        torch.tensor(scores.perplexity(values["eval/loss"])).double(),
        1e-6,
        "e to the loss",
    )


def compare_hits(
    comparison: Comparison, logits: Tensor, labels: Tensor, shares: Mapping[int, float], slack: float
) -> None:
    """Compare how many targets are among the k largest logits; rounding decides between those that are near.

    Args:
        shares: By k the share of the targets that validation found there.
        slack: How far rounding moves a logit.
    """
    for k, found in shares.items():
        least, most = (scores.hits(logits, labels, k, by) for by in (-slack, slack))
        hits = round(found * int((labels != IGNORE_INDEX).sum()))
        stage = f"targets among the {k} largest logits of these rows"
        remedy = "how a target's rank is counted"
        comparison.exact(stage, hits if not least <= hits <= most else True, True, remedy)


def compare_bytes(subject: GuardSubject, comparison: Comparison, values: Mapping[str, float]) -> None:
    """Compare bits per byte, with targets counted by labels and bytes by what documents decode to."""
    store = subject.validation
    if store.offsets[-1] > TARGETS or store.holds_examples:
        comparison.leave_out(
            "bits per byte", "the validation is large, or of examples, of which a part counts"
        )
        return
    batches = subject.validation_batches(0)
    targets = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)
    step = max(1, store.n_documents // DOCUMENTS)
    for number in range(0, store.n_documents, step):
        ids = store.document(number).tolist()
        # A start that the base's folder names nowhere decodes to its own characters.
        text = subject.tokenizer.decode(ids[1:] if ids[:1] == [subject.tokenizer.start_id] else ids)
        comparison.exact(
            f"bytes of document {number} of validation",
            int(store.byte_lengths[number]),
            len(text.encode()),
            "the bytes that the token store counts",
        )
    comparison.close(
        "bits per byte",
        torch.tensor(values["eval/bits_per_byte"]).double(),
        torch.tensor(
            scores.bits_per_byte(values["eval/loss"], targets, int(store.byte_lengths.sum()))
        ).double(),
        1e-6,
        "the targets, or the bytes that their bits are divided by",
    )


def compare_checkpoint(subject: GuardSubject, comparison: Comparison, values: Mapping[str, float]) -> None:
    """Compare the checkpoint of this step with what is in memory, and its manifest with what was logged."""
    newest = checkpoints.folder_of(subject.folder / "checkpoints", subject.state.step)
    if newest is None:
        remedy = "what is saved after a validation"
        raise Differs(f"checkpoint of step {subject.state.step}", "it is not there", remedy)
    manifest = checkpoints.manifest_of(newest)
    expected = {"step": subject.state.step, "loss": values["eval/loss"]}
    found = {key: manifest[key] for key in expected}
    comparison.exact(f"manifest of {newest.name}", found, expected, "what is written of a validation")
    state = compare_stored(subject, comparison, newest)
    # Guards draw nothing from the run's own generators.
    own = {"torch": torch.get_rng_state(), "python": torch.tensor(random.getstate()[1])}
    saved = {"torch": state["random"]["torch"], "python": state["random"]["python"][1]}
    for name, value in own.items():
        exact(comparison, f"random state of {name} as stored in {newest.name}", value, saved[name])


def compare_best(subject: GuardSubject, comparison: Comparison, begun: Begun) -> None:
    """Compare the best of the checkpoints that are there with the best of all validations in the log.

    Files of an earlier part of the run may have been removed on purpose before this one began.
    """
    lines = said.logged(subject, 0)
    losses = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    found = scores.best_of((manifest["step"], manifest["loss"]) for manifest in _manifests(subject))
    known = [(step, loss) for step, loss in losses.items() if step > begun.step or step in begun.there]
    comparison.exact("best checkpoint", found, scores.best_of(known), "which checkpoints are removed")
    since = [loss for step, loss in losses.items() if step > begun.step]
    comparison.exact(
        "best loss, and the validations without a better one, which patience counts",
        (subject.state.best_loss, subject.state.validations_without_better),
        scores.without_better(since, begun.best_loss, begun.without_better),
        "how a validation is compared with the best",
    )


def compare_kept(subject: GuardSubject, comparison: Comparison, begun: Begun) -> None:
    """Compare which checkpoints are there with those that stay of the ones before and the new one.

    Later on files may be missing, that somebody has removed.
    """
    train, there, step = subject.config.train, by_step(subject), subject.state.step
    marked = bool(train.save_every) and step % train.save_every == 0
    comparison.exact(f"whether step {step} is to be kept", there[step]["keep"], marked, "train.save_every")
    stays = checkpoints.kept(begun.manifests | {step: there[step]}, train.keep)
    found = {*there} if begun.saves < SURE else {*there} | stays
    comparison.exact("steps of checkpoints", sorted(found), sorted(stays), "which checkpoints are removed")
