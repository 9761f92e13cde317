"""Guard of the paths: validation scores as training does, and prompts begin as documents do."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from data.fim import fim_prompt_ids, known_markers
from generation.text import as_prompt
from guards.faults import Fault
from guards.subject import GuardSubject, affordable, tolerance_of, with_nonzero_weights
from tokenization.chat import DAY_OF_DATA, asked_ids

PART = 0.25  # Share of the tokens of a pass.
OTHER_PRECISION_TOLERANCE = 2e-2  # Relative, where validation has another precision than training.


def same_path(subject: GuardSubject) -> Iterator[Fault | str]:
    """Compare the losses of training and validation on one batch, and prompts with stored documents."""
    batch = affordable(subject, subject.micro_batch(0), PART)
    with with_nonzero_weights(subject.model), torch.no_grad():
        subject.model.eval()
        trained = subject.loss(batch)
        if not trained.tokens:  # The guard of labels names that, and somebody may have allowed it.
            return
        mean = trained.cross_entropy.item() / trained.tokens
        scores = subject.score([batch])
    same = subject.precision.dtype == subject.eval_precision.dtype
    tolerance = tolerance_of(subject.precision) if same else OTHER_PRECISION_TOLERANCE
    if not math.isclose(scores.loss, mean, rel_tol=tolerance):
        yield Fault(
            "validation-differs",
            f"one batch has loss {mean:.4f} by training's function and {scores.loss:.4f} by validation's",
            "let both call the same function",
        )
    markers = known_markers(subject.tokenizer)
    for held_out in dict.fromkeys((subject.validation, subject.test)):
        if markers is None or held_out.holds_examples:
            continue
        lead = held_out.gap_lead
        begin = held_out.gather(held_out.offsets[:-1][np.diff(held_out.offsets) > lead] + lead)
        if n_gaps := int((begin == markers[0]).sum()):
            yield Fault(
                "validation-differs",
                f"{n_gaps} {held_out.split} files are stored with a gap, so that other text would be scored",
                "data.fim_rate is for training files only",
            )
    yield from prompt_faults(subject)


def prompt_faults(subject: GuardSubject) -> Iterator[Fault]:
    """Compare what generation would read with what training read, id for id, in the first documents."""
    for number, document in enumerate(subject.first_documents):
        if document.messages is not None:
            prompt = asked_ids(subject.tokenizer, document.messages, DAY_OF_DATA)
        elif document.fim_parts is not None:
            prompt = fim_prompt_ids(subject.tokenizer, *document.fim_parts[:2])
        elif document.prompt is not None:
            prompt = as_prompt(subject.tokenizer, subject.tokenizer.prompt_ids(document.prompt)).ids
        else:
            prompt = subject.tokenizer.prompt_ids(document.text)
        read = subject.train.document(number)[: len(prompt)].tolist()
        if prompt != read:
            at = next(i for i in range(len(prompt)) if prompt[i : i + 1] != read[i : i + 1])
            yield Fault(
                "prompt-differs",
                f"{document.name!r} is stored as {read[at : at + 4]} from token {at} on, and a prompt of its "
                f"text is {prompt[at : at + 4]}",
                "build prompts by one function in training, evaluation and generation",
            )
            return
