"""Guards that run before every training: each names a silent fault, shows its evidence, and says what to do.

    findings = preflight(subject, allowed)  # raises Fault, or returns what was allowed
    python preflight.py --selftest          # plants each fault in a small healthy run and sees it caught

A guard takes a `Subject`, the very objects that will train, and yields a `Fault` for each thing that is wrong
and a string for each thing worth printing. It leaves weights, modes and random states as it found them, so
that a run with guards equals one without them bit for bit.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from architecture import ABSOLUTE_POSITIONS, Decoder, Dropout
from config import Config, ModelConfig, write_atomically
from corpus import split_documents
from dataset import IGNORE_INDEX, Batch, validation_batches
from decoding import generate_ids
from fim import fim_prompt_ids, known_markers, trim_fim_prompt
from generate import GenerationConfig, generate, prompt_ids, trim_prompt
from leaks import store_overlap
from lora import Adapted, Bias, Rows, changes_of
from loss import Scores, TokenLoss
from precision import Precision
from quantize import n_weights
from tokenizer import Tokenizer
from tokenstore import TokenStore

FAULTS = (
    "accumulation-ignored answer-not-learned batch-differs-from-single beams-not-by-probability clip-ignored "
    "documents-not-separated dropout-ignored end-never-learned evaluation-not-repeatable "
    "first-loss-not-finite first-loss-too-high first-loss-too-low frozen-parameter-moved future-visible "
    "gradient-not-finite "
    "id-outside-vocabulary label-crosses-documents labels-not-next-token objective-not-the-loss "
    "other-document-visible other-row-visible padding-bears-loss padding-visible parameter-without-gradient "
    "past-invisible positions-not-counted prompt-bears-loss prompt-differs prompt-in-prediction "
    "row-without-loss sampling-not-repeatable schedule-ignored score-not-plain-loss setting-ignored "
    "split-leaks start-doubled token-invisible token-never-trained too-few-positions validation-differs "
    "vocabulary-too-large worse-than-unigram"
)


class Fault(ValueError):
    """One thing that is wrong, under a name that `--allow` takes."""

    def __init__(self, name: str, evidence: str, remedy: str):
        assert name in FAULTS.split(), name
        self.name, self.evidence, self.remedy = name, evidence, remedy
        super().__init__(f"{name}: {evidence}; {remedy}. To train all the same: --allow {name}")


@dataclass(frozen=True)
class Subject:
    """What is about to train. The functions are the ones that training itself calls, not others like them."""

    config: Config
    model: Decoder
    tokenizer: Tokenizer
    train: TokenStore
    validation: TokenStore
    test: TokenStore  # the validation store, where there is no such side
    micro_batch: Callable[[int], Batch]  # of training, by number, on the device, after every transform
    validation_batches: Callable[[int], Iterable[Batch]]  # that many, spread evenly
    loss: Callable[[Batch], TokenLoss]  # of training, label smoothing included
    score: Callable[[Iterable[Batch]], Scores]  # of validation
    precision: Precision
    eval_precision: Precision
    optimizers: list[torch.optim.Optimizer]
    start: str  # "fresh" weights, "loaded" ones, or "resumed" ones
    known_ids: int | None = None  # of the base's own tokenizer; None without a base


Guard = Callable[[Subject], Iterator["Fault | str"]]


# --- probe: what an output depends on ----------------------------------------------------------------


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


@contextlib.contextmanager
def awake(model: Decoder) -> Iterator[None]:
    """Small random numbers in matrices that are all zero: a fresh model's blocks hand nothing on.

    They are zero again afterwards, and the modes are what they were.
    """
    modes = {module: module.training for module in model.modules()}
    asleep = [p for p in model.parameters() if p.dim() > 1 and p.requires_grad and not p.any()]
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            for p in asleep:
                p.normal_(std=p.size(-1) ** -0.5)
        yield
    finally:
        with torch.no_grad():
            for p in asleep:
                p.zero_()
        for module, training in modes.items():
            module.training = training


# --- start: sizes and the first loss -----------------------------------------------------------------

SPARE_IDS = 128  # rows of the embedding beyond the tokenizer's ids: padding to a round number is healthy,
SPARE_SHARE = 0.025  # and so are CodeGen's and Phi's 51,200 rows for 50,295 ids
PASS_ELEMENTS = 3e10  # parameters x tokens of a forward pass: 0.3 s on two cores
SHORTEST_PASS = 16  # tokens
UNIGRAM_TOKENS = 1_000_000  # that are counted, evenly spread
FIRST_LOSS_ABOVE, FIRST_LOSS_BELOW = 1.5, 0.75  # nats; healthy initialisations stay within 0.3 of ln V


def start(subject: Subject) -> Iterator[Fault | str]:
    """Ids fit the vocabulary, rows fit the positions, and the first loss is that of knowing nothing."""
    model, tokenizer = subject.config.model, subject.tokenizer
    spare = model.vocab_size - tokenizer.vocab_size
    if spare > max(SPARE_IDS, SPARE_SHARE * tokenizer.vocab_size):
        yield Fault(
            "vocabulary-too-large",
            f"model.vocab_size is {model.vocab_size} and the tokenizer has {tokenizer.vocab_size} ids",
            "leave model.vocab_size out to take the tokenizer's",
        )
    batches = [subject.micro_batch(0), *subject.validation_batches(2)]
    largest = max(int(batch.tokens.max()) for batch in batches)
    if largest >= model.vocab_size:
        yield Fault(
            "id-outside-vocabulary",
            f"the data hold the id {largest} and the embedding has {model.vocab_size} rows",
            "use the tokenizer that the model was made for",
        )
        return
    yield from untrained_tokens(subject)
    furthest = max(int(batch.positions.max()) for batch in batches)
    if model.position in ABSOLUTE_POSITIONS and furthest >= model.block_size:
        yield Fault(
            "too-few-positions",
            f"a row reaches position {furthest} and the model has {model.block_size}",
            "raise model.block_size or shorten the rows",
        )
        return
    held_out = [affordable(subject, batch, whole_rows=True) for batch in batches[1:]]
    loss, uniform = subject.score(held_out).loss, math.log(model.vocab_size)
    yield f"loss {loss:.3f} on two validation batches; ln(vocabulary) is {uniform:.3f}"
    if not math.isfinite(loss):
        yield Fault("first-loss-not-finite", f"the first loss is {loss}", "check the weights and --precision")
    elif subject.start == "fresh" and loss > uniform + FIRST_LOSS_ABOVE:
        yield Fault(
            "first-loss-too-high",
            f"the first loss is {loss:.2f}, and knowing nothing costs ln({model.vocab_size}) = {uniform:.2f}",
            "scale the initialisation of the embedding and the head down",
        )
    elif subject.start == "fresh" and loss < uniform - FIRST_LOSS_BELOW:
        yield Fault(
            "first-loss-too-low",
            f"a model that was never trained has loss {loss:.2f}, and knowing nothing costs {uniform:.2f}",
            "look for labels that can be seen in the inputs",
        )
    elif subject.start == "loaded" and loss > (bound := least_knowledge(subject, held_out)):
        known = "nothing" if bound == uniform else "token frequencies alone"
        yield Fault(
            "worse-than-unigram",
            f"the loaded weights have loss {loss:.2f}, and knowing {known} costs {bound:.2f}",
            "check that weights, config and tokenizer belong together",
        )


def untrained_tokens(subject: Subject) -> Iterator[Fault]:
    """Tokens of the data that the base never saw, whose rows of the embedding will not train either."""
    known, embed = subject.known_ids, subject.model.embed
    if known is None or any(p.requires_grad and p.dim() > 1 for p in embed.parameters(recurse=False)):
        return
    trained: set[int] = set()
    for change in changes_of(subject.model, "default").values() if isinstance(embed, Adapted) else ():
        if isinstance(change, Rows):
            trained |= set(change.ids.tolist())
    if isinstance(embed, Adapted) and not all(isinstance(c, Rows | Bias) for c in embed.adapters.values()):
        return
    seen = np.unique(counted_tokens(subject.train))
    new = [int(id) for id in seen[seen >= known] if int(id) not in trained]
    if new:
        yield Fault(
            "token-never-trained",
            f"the data hold {subject.tokenizer.decode(new[:1])!r} (id {new[0]}), which is not among the "
            f"base's {known} ids, and its row of the embedding is frozen",
            "name it in --lora.new_tokens, so that its rows train, or take the base's own tokenizer",
        )


def counted_tokens(train: TokenStore) -> np.ndarray:
    """Up to UNIGRAM_TOKENS of the training tokens, evenly spread."""
    return train.gather(np.arange(0, train.n_tokens, -(-train.n_tokens // UNIGRAM_TOKENS)))


def affordable(subject: Subject, batch: Batch, whole_rows: bool = False) -> Batch:
    """The first rows: all of them for small models, for those of 1B and more a part of one, with labels."""
    tokens = int(PASS_ELEMENTS / n_weights(subject.model))
    length = batch.tokens.size(1)
    if whole_rows or tokens >= length:
        return Batch(*(t[: max(1, tokens // length)] for t in batch))
    bearing = (batch.labels != IGNORE_INDEX).nonzero()
    row, place = bearing[0].tolist() if len(bearing) else (0, 0)
    size = max(SHORTEST_PASS, tokens)
    start = max(0, min(place - size // 2, length - size))
    return Batch(*(t[row : row + 1, start : start + size] for t in batch))


def least_knowledge(subject: Subject, held_out: Iterable[Batch]) -> float:
    """What loaded weights must do better than: token frequencies, and on answers, whose form a base cannot
    know before it is tuned ("yes" or "no"), knowing nothing.
    """
    if subject.train.holds_examples:
        return math.log(subject.config.model.vocab_size)
    return unigram_loss(subject.train, held_out)


def unigram_loss(train: TokenStore, batches: Iterable[Batch]) -> float:
    """Nats a label of a model that knows the frequencies of the training tokens, each plus one, and no more.

    Not those of the labels themselves: of a thousand tokens they cost 2 nats less than of the language.
    """
    counts = np.bincount(counted_tokens(train), minlength=train.vocab_size) + 1.0
    labels = torch.cat([batch.labels[batch.labels != IGNORE_INDEX] for batch in batches]).cpu().numpy()
    return float(np.log(counts.sum()) - np.log(counts[labels]).mean())


# --- labels: which tokens bear loss ------------------------------------------------------------------

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
    for store, batches in sides:
        whole = Batch(*(torch.cat([batch[i] for batch in batches]).cpu() for i in range(4)))
        training = batches is sides[0][1]
        yield from label_faults(subject, whole, store, training)
        if training:
            yield label_summary(subject, whole)


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
    elif short:
        yield Fault(
            "answer-not-learned",
            f"{short} examples of {side} bear no loss on some of their completion, or were cut",
            "shorten the prompt from its left, never the answer from its right",
        )
    elif (bears & padding).any() or (inner & padding[:, 1:]).any():
        share = float((bears & padding).sum() / bears.sum())
        yield Fault(
            "padding-bears-loss",
            f"{share:.1%} of the labels of {side} are of padding",
            "labels of padding must be -100: padding is what the document id -1 says, not the pad id",
        )
    elif (inner & ~same).any():
        yield Fault(
            "label-crosses-documents",
            f"{int((inner & ~same).sum())} labels of {side} are the first token of another document",
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
    if (markers := known_markers(tokenizer)) is not None and prompt[0] == markers[0]:
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


# --- split: what was held out was not trained on -----------------------------------------------------


def split(subject: Subject) -> Iterator[Fault | str]:
    """How much of the text of one side also stands in another, and refuses too much of it."""
    if subject.config.train.overfit:
        yield "left out: --overfit validates on what it trains on"
        return
    sides = [subject.train, subject.validation]
    sides += [] if subject.test is subject.validation else [subject.test]
    for known, held_out in itertools.combinations(sides, 2):
        found = store_overlap(known, held_out, subject.tokenizer)
        yield f"of {held_out.split} in {known.split} {found.counts}"
        if found.refused:
            largest = "".join(
                f"; {e.held_out!r} and {e.train!r} share {' '.join(e.excerpt.split())[:60]!r}"
                for e in found.examples[:1]
            )
            yield Fault(
                "split-leaks",
                f"of {held_out.split} in {known.split}: {found}{largest}",
                "name what belongs together with --data.group_field, or find it with --data.regroup true",
            )


# --- settings: each does what it says ----------------------------------------------------------------

WIDE = 512
# Two ways that agree by design, sizes that are compared elsewhere, and what acts on longer texts only.
NOT_COMPARED = (
    "attention block_size vocab_size rope_scaling rope_factor rope_context rope_low_freq rope_high_freq "
    "sliding_window window_layers"
)


def settings(subject: Subject) -> Iterator[Fault | str]:
    """Dropout drops, evaluation is repeatable, smoothing smooths, and each key of the model changes it."""
    yield from dropout_faults(subject)
    yield from smoothing_faults(subject)
    for key in ignored_keys(subject.config.model):
        yield Fault(
            "setting-ignored",
            f"model.{key} was set to {getattr(subject.config.model, key)!r} and changes nothing",
            "it is stored and never read: look for where the model should use it",
        )
    yield from group_faults(subject)


def group_faults(subject: Subject) -> Iterator[Fault]:
    """Every setting of the optimizer stands in a parameter group."""
    config = subject.config.optimizer
    groups = [group for optimizer in subject.optimizers for group in optimizer.param_groups]
    adam = [group for group in groups if "betas" in group]
    rates = {config.lr, config.muon_lr, config.embedding_lr or config.lr, config.head_lr or config.lr}
    rates.add(config.lr * subject.config.lora.lr_ratio)
    wrong = {
        "lr": {g["initial_lr"] for g in groups} - rates,
        "weight_decay": {g["weight_decay"] for g in groups} - {0.0, config.weight_decay},
        "weight_decay of matrices": {config.weight_decay} - {g["weight_decay"] for g in groups},
        "beta1, beta2": {tuple(g["betas"]) for g in adam} - {(config.beta1, config.beta2)},
        "eps": {g["eps"] for g in adam} - {config.eps},
    }
    for key, values in wrong.items():
        if values:
            yield Fault(
                "setting-ignored",
                f"optimizer.{key} differs between the settings and the parameter groups: {values}",
                "hand the settings to the groups",
            )


def smoothing_faults(subject: Subject) -> Iterator[Fault]:
    """The loss of one row against the textbook's, for what is minimised and for what is reported."""
    batch = Batch(*(t[:1] for t in affordable(subject, subject.micro_batch(0))))
    smoothing, z_loss = subject.config.optimizer.label_smoothing, subject.config.optimizer.z_loss
    with awake(subject.model), torch.no_grad():
        subject.model.eval()
        with subject.precision.autocast():
            logits = subject.model(batch.tokens, batch.positions, batch.document_ids).flatten(0, 1).float()
        # Of the likeliest words, for which smoothing costs most: on drawn ones it is lost in rounding.
        likely = logits.argmax(-1).view(batch.labels.shape)
        batch = batch._replace(labels=torch.where(batch.labels == IGNORE_INDEX, batch.labels, likely))
        loss = subject.loss(batch)

    def textbook(smoothing: float) -> float:
        return F.cross_entropy(
            logits,
            batch.labels.flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            label_smoothing=smoothing,
        ).item()

    tolerance = tolerance_of(subject.precision)
    reported, minimised, plain = loss.cross_entropy.item(), loss.objective.item(), textbook(0.0)
    if not math.isclose(reported, plain, rel_tol=tolerance):
        yield Fault(
            "score-not-plain-loss",
            f"the loss reported for a row is {reported:.4f} nats, and its plain cross-entropy {plain:.4f}",
            "perplexity and bits per byte come from the loss without label smoothing",
        )
    bears = batch.labels.flatten() != IGNORE_INDEX
    expected = textbook(smoothing) + z_loss * logits[bears].logsumexp(-1).square().sum().item()
    if not math.isclose(minimised, expected, rel_tol=tolerance):
        yield Fault(
            "objective-not-the-loss",
            f"with label_smoothing {smoothing} and z_loss {z_loss} a row's loss is {expected:.4f} nats, and "
            f"what is minimised is {minimised:.4f}",
            "smooth by the setting, over the labels that bear loss only",
        )


def dropout_faults(subject: Subject) -> Iterator[Fault]:
    batch, model = affordable(subject, subject.micro_batch(0)), subject.config.model

    def twice(training: bool) -> bool:
        with awake(subject.model), torch.no_grad():
            subject.model.train(training)
            with subject.precision.autocast():  # not the loss: a head of almost nothing hides all before it
                first, second = (
                    subject.model.hidden(batch.tokens, batch.positions, batch.document_ids) for _ in range(2)
                )
        return torch.equal(first, second)

    for name, p, kept in dropout_sites(subject.model):
        with kept:
            if p and twice(training=True):
                yield Fault(
                    "dropout-ignored",
                    f"dropout of {name} is {p} and two passes with it alone are equal",
                    "two arms of a sweep over dropout would be one: apply it",
                )
                return
    asked = {model.dropout, model.embed_dropout, model.attention_dropout}
    wrong = {m.p for m in subject.model.modules() if isinstance(m, Dropout)} - asked
    if wrong:
        yield Fault(
            "dropout-ignored",
            f"the settings ask for dropout of {asked} and the model was built with {wrong}",
            "hand the setting to every part",
        )
    if not twice(training=False):
        yield Fault(
            "evaluation-not-repeatable",
            "two passes over one batch in evaluation mode differ",
            "switch dropout off in evaluation mode, and use no random number there",
        )


def dropout_sites(model: Decoder) -> Iterator[tuple[str, float, contextlib.AbstractContextManager]]:
    """One dropout of each kind, as the settings have it, with a context in which it is the only one."""
    config = model.config
    modules = dict(model.named_modules())
    sites = {
        "the embedding": (config.embed_dropout, modules["dropout"]),
        "a block": (config.dropout, modules["blocks.0.dropout"]),
        "attention": (config.attention_dropout, modules["blocks.0.attention.dropout"]),
    }

    @contextlib.contextmanager
    def alone(site: torch.nn.Module) -> Iterator[None]:
        rates = {m: m.p for m in model.modules() if isinstance(m, Dropout) and m is not site}
        try:
            for module in rates:
                module.p = 0.0
            yield
        finally:
            for module, rate in rates.items():
                module.p = rate

    for name, (p, site) in sites.items():
        yield name, p or 0.0, alone(site)


def ignored_keys(config: ModelConfig) -> Iterator[str]:
    """Keys that are not the default although a model without them is the same: weights and outputs.

    Compared are small twins, of at most two layers and 64 words, drawn from one seed.
    """
    default = ModelConfig()
    small = replace(config, vocab_size=64, n_layer=min(config.n_layer, 2), block_size=8)
    if (
        config.n_embd > WIDE
    ):  # the same parts in four heads: weights of the true width would take seconds a key
        shared = {1: 1, config.n_head: 4}.get(config.n_kv_head, 2)
        width = 4 * config.head_dim
        small = replace(small, n_head=4, n_kv_head=shared, n_embd=width, n_inner=2 * width)
    for key, value in vars(ModelConfig()).items():
        if key in NOT_COMPARED.split() or getattr(config, key) == value:
            continue
        if key == "rope_theta" and config.rotary_dim <= 2:  # its one frequency is theta^0
            continue
        other = replace(small, **{key: 1 if key == "n_layer" else getattr(default, key)})
        with contextlib.suppress(ValueError):  # the default does not go with the other keys
            if other.resolved() != small.resolved() and twins(small, other.resolved()):
                yield key


def twins(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two small models have the same weights from one seed and give the same logits in training."""
    results = []
    for config in (one, other):
        torch.manual_seed(0)
        model = Decoder(config)
        drawn = {name: p.clone() for name, p in model.named_parameters()}
        for p in model.parameters():  # biases that start at zero and scales that start at one hide much
            torch.nn.init.normal_(p, std=p.size(-1) ** -0.5)
        torch.manual_seed(1)
        with torch.no_grad():
            results.append((drawn, model(torch.arange(16).view(2, 8))))
    (weights, logits), (other_weights, other_logits) = results
    same = weights.keys() == other_weights.keys() and all(
        torch.equal(p, other_weights[name]) for name, p in weights.items()
    )
    return same and torch.equal(logits, other_logits)


# --- one path ----------------------------------------------------------------------------------------

PROMPTS = 4  # documents whose ids are compared
OTHER_PRECISION_TOLERANCE = 2e-2  # relative, where validation has another precision than training


def tolerance_of(precision: Precision) -> float:
    """Relative, of one function computed twice in one precision."""
    return 1e-4 if precision.dtype == torch.float32 else 2e-3


def same_path(subject: Subject) -> Iterator[Fault | str]:
    """Validation scores as training does, and prompts begin as documents do."""
    batch = affordable(subject, subject.micro_batch(0))
    with awake(subject.model), torch.no_grad():
        subject.model.eval()
        trained = subject.loss(batch)
        mean = trained.cross_entropy.item() / max(1, trained.tokens)
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
        begin = held_out.gather(held_out.offsets[:-1][np.diff(held_out.offsets) > 0])
        if n_gaps := int((begin == markers[0]).sum()):
            yield Fault(
                "validation-differs",
                f"{n_gaps} {held_out.split} files are stored with a gap, so that other text would be scored",
                "data.fim_rate is for training files only",
            )
    yield from prompt_faults(subject)


def prompt_faults(subject: Subject) -> Iterator[Fault]:
    """What generation would read is what training read, id for id, in the first documents of the corpus."""
    number = 0
    for side, document in split_documents(subject.config.data):
        if side != "train":
            continue
        if document.fim_parts is not None:
            asked = fim_prompt_ids(subject.tokenizer, *document.fim_parts[:2])
        else:
            text = document.text if document.prompt is None else document.prompt
            asked = prompt_ids(subject.tokenizer, text)
        read = subject.train.document(number)[: len(asked)].tolist()
        if asked != read:
            at = next(i for i in range(len(asked)) if asked[i : i + 1] != read[i : i + 1])
            yield Fault(
                "prompt-differs",
                f"{document.name!r} is stored as {read[at : at + 4]} from token {at} on, and a prompt of its "
                f"text is {asked[at : at + 4]}",
                "build prompts by one function in training, evaluation and generation",
            )
            return
        number += 1
        if number == PROMPTS:
            return


# --- generation --------------------------------------------------------------------------------------

PROMPT_TOKENS, NEW_TOKENS = 16, 4
BEAM_PROMPTS = 8
BEAM_IDS = 16  # of the vocabulary that the exhaustive search may use: 256 texts of two tokens


def generation(subject: Subject) -> Iterator[Fault | str]:
    """A batch continues as its rows do, a seed repeats, beams find the best, no prompt is in a prediction."""
    length = min(PROMPT_TOKENS, subject.config.model.block_size - NEW_TOKENS)
    row = subject.micro_batch(0).tokens[0].tolist()
    if length < 4 or subject.config.model.vocab_size < BEAM_IDS:
        yield "left out: the model's rows are too short to generate from"
        return
    prompts = [row[:length], row[length // 2 : length // 2 + 3]]
    with awake(subject.model):
        subject.model.eval()
        yield from batch_faults(subject.model, prompts)
        yield from seed_faults(subject.model, prompts)
        count = max(1, min(BEAM_PROMPTS, int(PASS_ELEMENTS / n_weights(subject.model) / BEAM_IDS)))
        yield from beam_faults(subject.model, [row[i : i + 3] for i in range(min(count, len(row) - 3))])
        yield from echo_faults(subject, prompts[0])


def batch_faults(model: Decoder, prompts: list[list[int]]) -> Iterator[Fault]:
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS)
    together = [g.ids for g in generate_ids(model, prompts, settings)]
    alone = [generate_ids(model, [prompt], settings)[0].ids for prompt in prompts]
    if together != alone:
        yield Fault(
            "batch-differs-from-single",
            f"two prompts continue with {together} in one batch and with {alone} alone",
            "pad on the left, give padding a document of its own, and count positions from the first token",
        )


def seed_faults(model: Decoder, prompts: list[list[int]]) -> Iterator[Fault]:
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS, temperature=1.0, seed=1)
    first, second = ([g.ids for g in generate_ids(model, prompts, settings)] for _ in range(2))
    if first != second:
        yield Fault(
            "sampling-not-repeatable",
            f"one seed gave {first} and then {second}",
            "draw from a generator of the seed and the row, not from the global one",
        )


def beam_faults(model: Decoder, prompts: list[list[int]]) -> Iterator[Fault]:
    """As many beams as there are ids find the best two tokens of all."""
    settings = GenerationConfig(max_new_tokens=2, num_beams=BEAM_IDS)
    results = generate_ids(model, prompts, settings, vocab_size=BEAM_IDS)
    for prompt, result in zip(prompts, results, strict=True):
        texts = torch.tensor([[*prompt, id] for id in range(BEAM_IDS)], device=model.embed.weight.device)
        with torch.no_grad():
            log_probs = model(texts)[:, -2:, :BEAM_IDS].double().log_softmax(-1)
        totals = (log_probs[0, 0][:, None] + log_probs[:, 1]).cpu()
        first, second = result.ids
        if totals[first, second] < totals.max() - 1e-4:
            yield Fault(
                "beams-not-by-probability",
                f"beam search chose two tokens of log-probability {totals[first, second]:.4f} where the best "
                f"have {totals.max():.4f}",
                "rank beams by sums of log-probabilities, not of logits",
            )
            return


def echo_faults(subject: Subject, prompt: list[int]) -> Iterator[Fault]:
    text = subject.tokenizer.decode(prompt)
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS)
    (completion,) = generate(subject.model, subject.tokenizer, [text], settings)
    if text.strip() and completion.text.startswith(text):
        yield Fault(
            "prompt-in-prediction",
            f"a prediction of {NEW_TOKENS} tokens begins with its own prompt {text[:40]!r}",
            "return what was added only",
        )


GUARDS: dict[str, Guard] = {
    "labels": labels,
    "probe": probe,
    "start": start,
    "split": split,
    "settings": settings,
    "same path": same_path,
    "generation": generation,
}


BY_BLOCKS = ("probe", "settings", "generation")  # guards that need not go through every block
LARGE, SHOWN_BLOCKS = 3e8, 4


@contextlib.contextmanager
def shortened(model: Decoder) -> Iterator[None]:
    """A model of hundreds of millions of weights with four of its blocks only, the first and last among them.

    All blocks run one code; through 24 of them these guards would take a minute.
    """
    blocks = model.blocks
    if n_weights(model) <= LARGE or len(blocks) <= SHOWN_BLOCKS:
        yield
        return
    chosen = np.linspace(0, len(blocks) - 1, SHOWN_BLOCKS).round().astype(int)
    try:
        model.blocks = torch.nn.ModuleList(blocks[i] for i in chosen)
        yield
    finally:
        model.blocks = blocks


def preflight(subject: Subject, allowed: Iterable[str] = ()) -> list[Fault]:
    """Run every guard and print a line for each; returns the faults that `allowed` let pass.

    Raises:
        Fault: The first one that is not allowed.
    """
    passed, allowed = [], set(allowed)
    for name in sorted(allowed - {*FAULTS.split()}):
        near = difflib.get_close_matches(name, FAULTS.split(), 1, 0.0)[0]
        raise ValueError(f"--allow {name} names no fault; did you mean {near}?")
    with torch.random.fork_rng():  # of every device: torch.manual_seed sets them all
        for name in GUARDS:
            passed += run_guard(subject, name, allowed)
    return passed


def run_guard(subject: Subject, name: str, allowed: Collection[str]) -> list[Fault]:
    """One guard by name, as `preflight` runs it."""
    started = time.perf_counter()
    passed, said = [], []
    with shortened(subject.model) if name in BY_BLOCKS else contextlib.nullcontext():
        for finding in GUARDS[name](subject):
            if isinstance(finding, str):
                said.append(finding)
            elif finding.name in allowed:
                passed.append(finding)
                print(f"ALLOWED {finding.name}: {finding.evidence}", file=sys.stderr)
            else:
                raise finding
    seconds = time.perf_counter() - started
    print(f"preflight, {name}: {'; '.join(said) or 'passed'} ({seconds:.1f} s)")
    return passed


def record_overrides(folder: Path, faults: Iterable[Fault]) -> None:
    """Add what `--allow` let pass to RUN/overrides.json; it is printed with every later score."""
    known = overrides(folder) | {fault.name: fault.evidence for fault in faults}
    if known:
        write_atomically(folder / "overrides.json", json.dumps(known, indent=1))


def overrides(folder: Path) -> dict[str, str]:
    """Name and evidence of the faults that a run was allowed to have."""
    path = folder / "overrides.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def main() -> None:
    """`--selftest`; exits with 1 if a planted fault is missed or a healthy run refused."""
    if sys.argv[1:] != ["--selftest"]:
        print("error: python preflight.py --selftest is the one command here", file=sys.stderr)
        sys.exit(2)
    from plants import selftest

    sys.exit(0 if selftest() else 1)


if __name__ == "__main__":
    main()
