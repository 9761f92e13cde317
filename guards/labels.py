"""Guard: which tokens bear loss."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from data.fim import gap_start, known_markers, trim_fim_prompt
from data.tokenstore import TokenStore
from dataset import IGNORE_INDEX, Batch, validation_batches
from generation.text import trim_prompt
from guards.subject import Fault, Subject
from tokenizer import Tokenizer

LABEL_BATCHES = 8
SHOWN_TOKENS = 24


def labels(subject: Subject) -> Iterator[Fault | str]:
    """On real batches: which tokens bear loss, and whether those that should do and the others do not."""
    sides = [
        (subject.train, [subject.micro_batch(i) for i in range(LABEL_BATCHES)]),
        (subject.validation, list(subject.validation_batches(2))),
    ]
    if subject.test is not subject.validation:
        rows, length = sides[1][1][0].tokens.shape
        sides.append((subject.test, list(validation_batches(subject.test, rows, length, 2))))
    yield from repeated_batches(sides[0][1][: subject.batches.steps_per_epoch])
    for store, batches in sides:
        whole = Batch(*(torch.cat([batch[i] for batch in batches]).cpu() for i in range(4)))
        training = batches is sides[0][1]
        yield from label_faults(subject, whole, store, training)
        if training:
            yield label_summary(subject, whole)


def repeated_batches(batches: list[Batch]) -> Iterator[Fault]:
    """Of one epoch; a few may be equal, where a file repeats itself."""
    distinct = {batch.tokens.cpu().numpy().tobytes() for batch in batches}
    if len(batches) > 1 and len(distinct) <= len(batches) // 2:
        yield Fault(
            "batch-repeated",
            f"the first {len(batches)} batches of training are {len(distinct)} and repetitions of them",
            "each batch of an epoch shows other rows: look for a number that is not counted on",
        )


def label_faults(subject: Subject, batch: Batch, store: TokenStore, training: bool) -> Iterator[Fault]:
    """Faults of rows (B, T); the last label of a row is not compared, since its token is in no column."""
    tokens, labels, documents, positions = batch
    eos_id, bos_id = subject.tokenizer.eos_id, subject.tokenizer.bos_id
    side = "training" if training else store.split
    bears = labels != IGNORE_INDEX
    padding = documents < 0
    same = (documents[:, 1:] == documents[:, :-1]) & ~padding[:, 1:]
    inner, targets = bears[:, :-1], tokens[:, 1:]
    everywhere = training and subject.config.data.loss_on == "all"
    over, short, under = (
        prompt_errors(store, batch, subject.tokenizer, everywhere) if store.holds_examples else (0, 0, 0)
    )
    if under:
        yield Fault(
            "setting-ignored",
            f"data.loss_on is all, and {under} examples of {side} bear no loss on some of their prompt",
            "labels of a prompt must then be its tokens, but for the first",
        )
    if over:
        yield Fault(
            "prompt-bears-loss",
            f"{over} examples of {side} bear loss on their prompt",
            "labels of a prompt must be -100, and nothing downstream may write them again",
        )
    if short:
        yield Fault(
            "answer-not-learned",
            f"{short} examples of {side} bear no loss on some of their completion, or were cut",
            "shorten the prompt from its left, never the answer from its right",
        )
    if (bears & padding).any() or (inner & padding[:, 1:]).any():
        share = float((bears & padding).sum() / bears.sum())
        yield Fault(
            "padding-bears-loss",
            f"{share:.1%} of the labels of {side} are of padding",
            "labels of padding must be -100: padding is what the document id -1 says, not the pad id",
        )
    crosses = inner & ~same & ~padding[:, 1:]
    if crosses.any():
        yield Fault(
            "label-crosses-documents",
            f"{int(crosses.sum())} labels of {side} are the first token of another document",
            "a document's last token has no label",
        )
    joined = same & (tokens[:, :-1] == eos_id) & (positions[:, :-1] > 0)
    if eos_id is not None and joined.any():
        yield Fault(
            "documents-not-separated",
            f"{int(joined.sum())} tokens of {side} follow the end of a document and carry its id",
            "give each document of a row an id of its own, or it sees the one before it",
        )
    expected = torch.where(same, positions[:, :-1] + 1, 0)
    jumps = (positions[:, 1:] != expected) & ~padding[:, 1:]
    if jumps.any():
        yield Fault(
            "positions-not-counted",
            f"{int(jumps.sum())} positions of {side} are not the one before plus 1, nor 0 in a new document",
            "count the positions of each document from 0",
        )
    wrong = inner & same & (labels[:, :-1] != targets)
    if wrong.any():
        yield Fault(
            "labels-not-next-token",
            f"{int(wrong.sum())} of {int((inner & same).sum())} labels of {side} are not the next token",
            "labels are made from the very ids that the model reads, shifted by one, in dataset.py only",
        )
    has_text = same.any(1)
    silent = has_text & ~bears.any(1)
    if silent.any():
        yield Fault(
            "row-without-loss",
            f"{int(silent.sum())} of {int(has_text.sum())} rows of {side} with text bear no loss at all",
            "shorten the prompt from its left, never the answer from its right",
        )
    ends = same & (targets == eos_id) if eos_id is not None else torch.zeros_like(same)
    if ends.any() and not (inner & ends).any():
        yield Fault(
            "end-never-learned",
            f"none of {int(ends.sum())} ends of a document in {side} bears loss",
            "do not mask the end with the padding: generation would never stop",
        )
    doubled = same & (tokens[:, :-1] == bos_id) & (targets == bos_id)
    if bos_id is not None and bos_id != eos_id and doubled.any():
        yield Fault(
            "start-doubled",
            f"{int(doubled.sum())} documents of {side} begin with two start tokens",
            "either the tokenizer adds it or the data path does, not both",
        )


EXAMPLES_KNOWN = 100_000  # of a store; in a larger one the others are not compared


def example_in_row(
    store: TokenStore, number: int, length: int, tokenizer: Tokenizer
) -> tuple[np.ndarray, int]:
    """What a row that holds `length` tokens should show of an example, int64, and how many are prompt.

    Not by the code that makes the rows, but by the one that trims the prompts of evaluation.
    """
    ids, n_prompt = store.document(number), int(store.prompt_lengths[number])
    if len(ids) <= length:
        return ids, n_prompt
    prompt, room = ids[:n_prompt].tolist(), length - (len(ids) - n_prompt)
    if gap_start(prompt, known_markers(tokenizer)) is not None:
        prompt = trim_fim_prompt(tokenizer, prompt, room)
    else:
        prompt = trim_prompt(prompt, room, tokenizer.start_id)
    return np.append(prompt, ids[n_prompt:]).astype(np.int64), len(prompt)


def prompt_errors(
    store: TokenStore, batch: Batch, tokenizer: Tokenizer, everywhere: bool = False
) -> tuple[int, int, int]:
    """Examples in rows (B, T) with loss on their prompt, with too little on their completion, and, where
    prompts bear loss too (`everywhere`), with too little on their prompt.

    An example is known by its ids: what the store says of it does not come through the batch.
    """
    n_known = min(store.n_documents, EXAMPLES_KNOWN)
    rows = (example_in_row(store, i, batch.tokens.size(1) + 1, tokenizer) for i in range(n_known))
    known = {ids.tobytes(): n_prompt for ids, n_prompt in rows}
    over = short = under = 0
    for tokens, labels, documents, _ in zip(*(t.numpy() for t in batch), strict=True):
        for number in np.unique(documents[documents >= 0]):
            places = np.flatnonzero(documents == number)
            ids = tokens[places]
            if places[-1] == len(tokens) - 1 and labels[-1] != IGNORE_INDEX:
                ids = np.append(ids, labels[-1])  # the row ends with the last token's label
            prompt_length = known.get(ids.tobytes())
            if prompt_length is None:
                short += n_known == store.n_documents
                continue
            learned = np.flatnonzero(labels[places] != IGNORE_INDEX) + 1  # places of targets in the example
            learned = learned[learned < len(ids)]  # what follows is padding or another example
            wanted = np.arange(max(1, prompt_length), len(ids))
            over += not everywhere and bool(np.setdiff1d(learned, wanted).size)
            short += bool(np.setdiff1d(wanted, learned).size)
            under += everywhere and bool(np.setdiff1d(np.arange(1, prompt_length), learned).size)
    return over, short, under


def label_summary(subject: Subject, batch: Batch) -> str:
    bears = batch.labels != IGNORE_INDEX
    text = batch.document_ids >= 0
    eos_id = IGNORE_INDEX if subject.tokenizer.eos_id is None else subject.tokenizer.eos_id
    ends = int((bears & (batch.labels == eos_id)).sum())
    row = int((bears & text).sum(1).argmax())
    first = int(bears[row].long().argmax())
    window = slice(max(0, first - SHOWN_TOKENS // 2), first + SHOWN_TOKENS)
    return (
        f"{bears.sum() / text.sum():.1%} of {int(text.sum()):,} tokens bear loss, {ends} ends of a document "
        f"among them, {int((~text).sum())} are padding; in [brackets] what is learned: "
        f"{marked(subject.tokenizer, batch.tokens[row][window], bears[row][window])}"
    )


def marked(tokenizer: Tokenizer, tokens: Tensor, bears: Tensor) -> str:
    """The text of a row (T,), targets that bear loss in brackets; the token after the row is not shown."""
    learned = [False, *bears[:-1].tolist()]
    pieces, ids = [], tokens.tolist()
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or learned[end] != learned[start]:
            text = repr(tokenizer.decode(ids[start:end]))[1:-1]
            pieces.append(f"[{text}]" if learned[start] else text)
            start = end
    return "".join(pieces)
