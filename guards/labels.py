"""Guard of the labels: which tokens are targets, and whether those that should be are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.fim import gap_start, known_markers, trim_fim_prompt
from data.tokenstore import TokenStore
from dataset import IGNORE_INDEX, Batch, validation_batches
from generation.text import trim_prompt
from guards.faults import Fault
from guards.subject import GuardSubject
from tokenizer import Tokenizer

LABEL_BATCHES = 8  # Batches of training that are looked at.
EXAMPLES_KNOWN = 100_000  # Examples of a store that are compared.
SHOWN_TOKENS = 24  # Tokens of a row that the line of this guard shows.


def labels(subject: GuardSubject) -> Iterator[Fault | str]:
    """Look at real batches of each split: whether what should be learned is a target, and nothing else."""
    splits = [
        (subject.train, [subject.micro_batch(i) for i in range(LABEL_BATCHES)]),
        (subject.validation, list(subject.validation_batches(2))),
    ]
    if subject.test is not subject.validation:
        rows, length = splits[1][1][0].tokens.shape
        splits.append((subject.test, list(validation_batches(subject.test, rows, length, 2))))
    yield from repeated_batches(splits[0][1][: subject.batches.steps_per_epoch])
    for store, batches in splits:
        whole = Batch(*(torch.cat([batch[i] for batch in batches]).cpu() for i in range(4)))
        training = batches is splits[0][1]
        yield from label_faults(subject, whole, store, training)
        if training:
            yield label_summary(subject, whole)


def repeated_batches(batches: list[Batch]) -> Iterator[Fault]:
    """Yield a fault if half of one epoch's batches repeat another; a few may, where a file repeats itself."""
    distinct = {batch.tokens.cpu().numpy().tobytes() for batch in batches}
    if len(batches) > 1 and len(distinct) <= len(batches) // 2:
        yield Fault(
            "batch-repeated",
            f"the first {len(batches)} batches of training are {len(distinct)} and repetitions of them",
            "each batch of an epoch shows other rows: look for a number that is not counted on",
        )


def label_faults(subject: GuardSubject, batch: Batch, store: TokenStore, training: bool) -> Iterator[Fault]:
    """Yield the faults of rows (B, T); the last label of a row is not compared: its token is in no column."""
    split = "training" if training else store.split
    on_prompts = training and subject.config.data.loss_on == "all"
    if store.holds_examples:
        yield from _example_faults(prompt_errors(store, batch, subject.tokenizer, on_prompts), split)
    eos_id = subject.tokenizer.eos_id
    ends = batch.tokens == (IGNORE_INDEX if eos_id is None else eos_id)
    if store.holds_conversations:  # An end in a prompt is that of an earlier message.
        ends[:, 1:] &= (batch.labels[:, :-1] != IGNORE_INDEX) & (not on_prompts)
        ends[:, 0] = False
    yield from _document_faults(batch, split, ends)
    yield from _target_faults(batch, split, subject.tokenizer)


def _example_faults(errors: PromptErrors, split: str) -> Iterator[Fault]:
    if errors.prompt_not_learned:
        yield Fault(
            "setting-ignored",
            f"data.loss_on is all, and in {errors.prompt_not_learned} examples of {split} some tokens of the "
            "prompt are no targets",
            "labels of a prompt must then be its tokens, but for the first",
        )
    if errors.prompt_learned:
        yield Fault(
            "prompt-bears-loss",
            f"in {errors.prompt_learned} examples of {split} tokens of the prompt are targets",
            "labels of a prompt must be -100, and nothing downstream may write them again",
        )
    if errors.answer_not_learned:
        yield Fault(
            "answer-not-learned",
            f"in {errors.answer_not_learned} examples of {split} some tokens of the completion are no "
            "targets, or it was cut",
            "shorten the prompt from its left, never the answer from its right",
        )


def _document_faults(batch: Batch, split: str, ends: Tensor) -> Iterator[Fault]:
    """Yield what is wrong at the borders of documents: padding, labels across them, ids and positions.

    Args:
        ends: Which tokens end a document (B, T), bool.
    """
    _, labels, documents, positions = batch
    is_target, padding = labels != IGNORE_INDEX, documents < 0
    inner, same = is_target[:, :-1], _in_one_document(documents)
    if (is_target & padding).any() or (inner & padding[:, 1:]).any():
        share = float((is_target & padding).sum() / is_target.sum())
        yield Fault(
            "padding-bears-loss",
            f"{share:.1%} of the labels of {split} are of padding",
            "labels of padding must be -100: padding is what the document id -1 says, not the pad id",
        )
    crosses = inner & ~same & ~padding[:, 1:]
    if crosses.any():
        yield Fault(
            "label-crosses-documents",
            f"{int(crosses.sum())} labels of {split} are the first token of another document",
            "a document's last token has no label",
        )
    joined = same & ends[:, :-1] & (positions[:, :-1] > 0)
    if joined.any():
        yield Fault(
            "documents-not-separated",
            f"{int(joined.sum())} tokens of {split} follow the end of a document and carry its id",
            "give each document of a row an id of its own, or it sees the one before it",
        )
    expected = torch.where(same, positions[:, :-1] + 1, 0)
    jumps = (positions[:, 1:] != expected) & ~padding[:, 1:]
    if jumps.any():
        yield Fault(
            "positions-not-counted",
            f"{int(jumps.sum())} positions of {split} are not the one before plus 1, nor 0 in a new document",
            "count the positions of each document from 0",
        )


def _target_faults(batch: Batch, split: str, tokenizer: Tokenizer) -> Iterator[Fault]:
    """Yield what is wrong with the targets inside documents: other tokens, none at all, ends and starts."""
    tokens, labels, documents, _ = batch
    eos_id, bos_id = tokenizer.eos_id, tokenizer.bos_id
    is_target, same = labels != IGNORE_INDEX, _in_one_document(documents)
    inner, following = is_target[:, :-1], tokens[:, 1:]
    wrong = inner & same & (labels[:, :-1] != following)
    if wrong.any():
        yield Fault(
            "labels-not-next-token",
            f"{int(wrong.sum())} of {int((inner & same).sum())} labels of {split} are not the next token",
            "labels are made from the very ids that the model reads, shifted by one, in dataset.py only",
        )
    has_text = same.any(1)
    silent = has_text & ~is_target.any(1)
    if silent.any():
        yield Fault(
            "row-without-loss",
            f"{int(silent.sum())} of {int(has_text.sum())} rows of {split} with text have no target at all",
            "shorten the prompt from its left, never the answer from its right",
        )
    ends = same & (following == eos_id) if eos_id is not None else torch.zeros_like(same)
    if ends.any() and not (is_target & (labels == eos_id)).any():
        yield Fault(
            "end-never-learned",
            f"none of {int(ends.sum())} ends of a document in {split} is a target",
            "do not mask the end with the padding: generation would never stop",
        )
    doubled = same & (tokens[:, :-1] == bos_id) & (following == bos_id)
    if bos_id is not None and bos_id != eos_id and doubled.any():
        yield Fault(
            "start-doubled",
            f"{int(doubled.sum())} documents of {split} begin with two start tokens",
            "either the tokenizer adds it or the data path does, not both",
        )


def _in_one_document(documents: Tensor) -> Tensor:
    """Return whether each token but the last and the one after it are of one document: (B, T - 1)."""
    return (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)


class PromptErrors(NamedTuple):
    """How many examples have wrong targets."""

    prompt_learned: int  # A token of the prompt is a target, and should be none.
    answer_not_learned: int  # A token of the completion is no target, or the example was cut.
    prompt_not_learned: int  # Prompts are learned too, and a token of this one is no target.


def example_in_row(
    store: TokenStore, number: int, length: int, tokenizer: Tokenizer
) -> tuple[np.ndarray, int]:
    """Return what a row of `length` tokens should show of an example: ids, int64, and how many are prompt.

    The code that trims the prompts of evaluation says so here, not the code that makes the rows.
    """
    ids, n_prompt = store.document(number), int(store.prompt_lengths[number])
    if len(ids) <= length:
        return ids, n_prompt
    prompt, room = ids[:n_prompt].tolist(), length - (len(ids) - n_prompt)
    if not store.holds_conversations and gap_start(prompt, known_markers(tokenizer)) is not None:
        prompt = trim_fim_prompt(tokenizer, prompt, room)
    else:
        prompt = trim_prompt(prompt, room, prompt[0] if store.holds_conversations else tokenizer.start_id)
    return np.append(prompt, ids[n_prompt:]).astype(np.int64), len(prompt)


def prompt_errors(
    store: TokenStore, batch: Batch, tokenizer: Tokenizer, on_prompts: bool = False
) -> PromptErrors:
    """Compare the targets in rows (B, T) with those that their examples should have.

    An example is known by its ids: what the store says of it does not come through the batch.

    Args:
        on_prompts: Whether prompts are learned too.
    """
    n_known = min(store.n_documents, EXAMPLES_KNOWN)
    rows = (example_in_row(store, i, batch.tokens.size(1) + 1, tokenizer) for i in range(n_known))
    known = {ids.tobytes(): n_prompt for ids, n_prompt in rows}
    prompt_learned = answer_not_learned = prompt_not_learned = 0
    for tokens, labels, documents, _ in zip(*(t.numpy() for t in batch), strict=True):
        for number in np.unique(documents[documents >= 0]):
            places = np.flatnonzero(documents == number)
            ids = tokens[places]
            if places[-1] == len(tokens) - 1 and labels[-1] != IGNORE_INDEX:
                ids = np.append(ids, labels[-1])  # The example's last token is only the row's last label.
            n_prompt = known.get(ids.tobytes())
            if n_prompt is None:
                answer_not_learned += n_known == store.n_documents
                continue
            learned = np.flatnonzero(labels[places] != IGNORE_INDEX) + 1  # Places of targets in the example.
            learned = learned[learned < len(ids)]  # Padding or another example follows.
            answer = np.arange(max(1, n_prompt), len(ids))
            prompt_learned += not on_prompts and bool(np.setdiff1d(learned, answer).size)
            answer_not_learned += bool(np.setdiff1d(answer, learned).size)
            prompt_not_learned += on_prompts and bool(np.setdiff1d(np.arange(1, n_prompt), learned).size)
    return PromptErrors(prompt_learned, answer_not_learned, prompt_not_learned)


def label_summary(subject: GuardSubject, batch: Batch) -> str:
    """Return shares of targets and padding, and a piece of a row with its targets in brackets."""
    is_target = batch.labels != IGNORE_INDEX
    text = batch.document_ids >= 0
    eos_id = IGNORE_INDEX if subject.tokenizer.eos_id is None else subject.tokenizer.eos_id
    ends = int((is_target & (batch.labels == eos_id)).sum())
    row = int((is_target & text).sum(1).argmax())
    first = int(is_target[row].long().argmax())
    window = slice(max(0, first - SHOWN_TOKENS // 2), first + SHOWN_TOKENS)
    return (
        f"{is_target.sum() / text.sum():.1%} of {int(text.sum()):,} tokens are targets, {ends} ends of a "
        f"document among them, {int((~text).sum())} are padding; in [brackets] what is learned: "
        f"{marked(subject.tokenizer, batch.tokens[row][window], is_target[row][window])}"
    )


def marked(tokenizer: Tokenizer, tokens: Tensor, is_target: Tensor) -> str:
    """Return the text of a row (T,) with its targets in brackets; the token after the row is not shown."""
    learned = [False, *is_target[:-1].tolist()]
    pieces, ids = [], tokens.tolist()
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or learned[end] != learned[start]:
            text = repr(tokenizer.decode(ids[start:end]))[1:-1]
            pieces.append(f"[{text}]" if learned[start] else text)
            start = end
    return "".join(pieces)
