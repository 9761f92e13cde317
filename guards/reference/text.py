"""Guard of what becomes of the source: the ids and the bytes of its documents are derived again."""

from __future__ import annotations

import tempfile
import time
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from config import DataConfig
from guards.reference import learning
from guards.reference.comparison import Comparison, Differs
from guards.reference.source import Files, Sample, of_rows
from guards.subject import GuardSubject
from reference import comments, examples
from reference.conversations import Spelled, wrong_with
from reference.library import ByteLevelTokens, LibraryTokens
from reference.stored import Stored
from reference.text import SourceDocument, root_of, row_files, utf8
from reference.tokens import CodeTokens, read_tokenizer

MOST_SECONDS = 0.6  # After which no further document is tokenised.
MOST_HEALED = 3  # Prompts whose ends are tried with many continuations.
MOST_HEALED_PROMPT = 1000  # Characters of such a prompt.
LONGEST = 300_000  # Characters of a document that is tokenised.

# What may have been done to a text on the way, by the name of the mistake.
CHANGES: dict[str, Callable[[str], str]] = {
    "line ends were converted": lambda text: text.replace("\r\n", "\n").replace("\r", "\n"),
    "white space at the end was cut off": str.rstrip,
    "white space around the text was cut off": str.strip,
    "the byte order mark was dropped": lambda text: text.removeprefix("\ufeff"),
    "the text was put into lower case": str.lower,
    "tabs became spaces": str.expandtabs,
    "the text was normalised (NFC)": lambda text: unicodedata.normalize("NFC", text),
    "the text was normalised (NFKC)": lambda text: unicodedata.normalize("NFKC", text),
    "the last line was lost": lambda text: text.rstrip("\n").rpartition("\n")[0] + "\n",
    "the last character was lost": lambda text: text[:-1],
    "the first character was lost": lambda text: text[1:],
}


def compare(subject: GuardSubject, comparison: Comparison) -> None:
    """Compare the stored documents with the source: which there are, where they are, and their ids."""
    data = subject.config.data.resolved()
    stores = stored_splits(subject)
    draw = np.random.Generator(np.random.PCG64())  # Seeded by the system, anew at each start.
    if not root_of(data).exists():
        comparison.leave_out("text", f"{data.source} is not there")
        return
    files = None if row_files(data) else Files(data, stores, comparison)
    samples = of_rows(data, stores, comparison, draw) if files is None else files.samples(draw)
    with tempfile.TemporaryDirectory() as folder:
        subject.tokenizer.save(Path(folder))
        tokens = read_tokenizer(Path(folder))
        spelled = Spelled(Path(folder), tokens) if isinstance(tokens, LibraryTokens) else None
    if samples and samples[0].document.turns and spelled is not None:
        _same_answers(samples, spelled, comparison)
    elif tokens is None:
        reason = f"a tokenizer of the kind {subject.tokenizer.kind} has no file to read"
        comparison.leave_out("ids", reason)
    else:
        learning.compare(subject, comparison, stores["train"], tokens)
        _same_documents(subject, samples, tokens, comparison)
    if files is not None:
        files.compare_bytes()
        files.compare_missing()


def _same_documents(
    subject: GuardSubject, samples: list[Sample], tokens: examples.Tokens, comparison: Comparison
) -> None:
    """Compare sampled documents, as many as there is time for."""
    data = subject.config.data.resolved()
    compared, healed, ends = 0, 0, time.perf_counter() + MOST_SECONDS
    for sample in samples:
        if compared and time.perf_counter() > ends:
            break
        if len(sample.document.text) + len(sample.document.prompt or "") > LONGEST:
            continue
        is_healed = sample.stored.cuts[sample.number] >= 0
        _same_document(sample, data, tokens, subject, comparison)
        if is_healed and healed < MOST_HEALED and sample.document.prompt and tokens.has_words:
            healed += 1
            _same_cut(sample, tokens, comparison)
        compared += 1
    if healed == 0 and any(sample.stored.cuts[sample.number] >= 0 for sample in samples):
        comparison.leave_out("where prompts end", "none is short, or the tokenizer knows no words")
    if samples and not compared:
        comparison.leave_out("ids", f"each sampled document has more than {LONGEST:,} characters")


def _same_answers(samples: list[Sample], spelled: Spelled, comparison: Comparison) -> None:
    """Compare sampled answers of conversations with what their ids spell, as many as there is time for."""
    comparison.leave_out(
        "what stands between messages", "a chat template is a program of the tokenizer's folder"
    )
    ends = time.perf_counter() + MOST_SECONDS
    for place, sample in enumerate(samples):
        if place and time.perf_counter() > ends:
            break
        stored, number = sample.stored, sample.number
        ids, n_prompt = stored.document(number), int(stored.prompts[number])
        wrong = wrong_with(sample.document, ids, n_prompt, spelled)
        if wrong is not None:
            raise Differs(
                f"{sample.stage}: ids", wrong, "look at the chat template, and at tokenization/chat.py"
            )
        comparison.exact(f"{sample.stage}: ids", True, True, "")
        n_bytes, remedy = len(utf8(sample.document.text)), "count the bytes of UTF-8 of the answer"
        comparison.exact(f"{sample.stage}: bytes", int(stored.byte_lengths[number]), n_bytes, remedy)


def stored_splits(subject: GuardSubject) -> dict[str, Stored]:
    """Return the store of each split that has documents."""
    stores = {store.split: store for store in (subject.train, subject.validation, subject.test)}
    return {split: Stored(store.folder, split) for split, store in stores.items()}


# --- one document ----------------------------------------------------------------------------------


def _same_document(
    sample: Sample, data: DataConfig, tokens: examples.Tokens, subject: GuardSubject, comparison: Comparison
) -> None:
    """Compare the ids of a stored document, and its row in the tables, with those of its source."""
    stored, number, stage = sample.stored, sample.number, sample.stage
    if data.drop_comments and sample.document.name.endswith(".py"):
        sample = _without_comments(sample, subject, comparison)
    found = stored.document(number)

    if sample.document.prompt is not None and sample.document.suffix is None:
        _same_halves(sample, data, tokens, comparison)

    def written(document: SourceDocument) -> examples.Written:
        if document.prompt is None:
            return examples.plain(document, tokens, data, stored.split, stored.gap_lead)
        if document.suffix is not None:
            return examples.gap_example(document, tokens, data, stored.gap_lead)
        if stored.cuts[number] < 0:
            return examples.apart(document, tokens)
        return examples.one_text(document, tokens, int(stored.prompts[number]))

    expected = written(sample.document)
    if found != expected.ids:
        raise _other_ids(
            stage, found, expected, lambda text: written(replace(sample.document, text=text)), sample
        )
    comparison.exact(f"{stage}: ids", True, True, "")
    comparison.exact(
        f"{stage}: tokens of its prompt",
        (int(stored.prompts[number]), int(stored.suffixes[number])),
        (expected.n_prompt, expected.suffix_place),
        "look at where the prompt ends: the rest are targets",
    )
    if expected.n_bytes >= 0:
        remedy = "count the bytes of UTF-8 whose tokens are targets"
        comparison.exact(f"{stage}: bytes", int(stored.byte_lengths[number]), expected.n_bytes, remedy)


def _same_halves(sample: Sample, data: DataConfig, tokens: examples.Tokens, comparison: Comparison) -> None:
    """See whether prompt and completion are tokenised as one text, as `data.heal` says."""
    is_one_text = bool(sample.stored.cuts[sample.number] >= 0)
    if not data.heal or isinstance(tokens, CodeTokens | ByteLevelTokens):
        stage = f"{sample.stage}: prompt and completion as one text"
        comparison.exact(stage, is_one_text, data.heal, "look at data.heal, and at what heals prompts")


def _other_ids(
    stage: str,
    found: list[int],
    expected: examples.Written,
    written: Callable[[str], examples.Written],
    sample: Sample,
) -> Differs:
    """Return the difference of two lists of ids, with the mistake that explains it."""
    remedy = "look at what becomes of the text before the tokenizer, and at the tokenizer"
    ids = expected.ids
    bounds = {"the start": ids[1:], "the end": ids[:-1], "the start and the end": ids[1:-1]}
    doubled = {"the start": ids[:1] + ids, "the end": ids + ids[-1:]}
    text = sample.document.text
    for meaning, other in bounds.items():
        remedy = f"{meaning} of the document is missing?" if found == other else remedy
    for meaning, other in doubled.items():
        remedy = f"{meaning} of the document is there twice?" if found == other else remedy
    for meaning, change in CHANGES.items():
        if change(text) != text and written(change(text)).ids == found:
            remedy = f"{meaning}?"
            break
    place = next(
        (i for i, (a, b) in enumerate(zip(found, ids, strict=False)) if a != b), min(len(found), len(ids))
    )
    ours, theirs = ids[place : place + 4], found[place : place + 4]
    what = f"from token {place} of {len(found):,} on {theirs}, and the reference has {ours} of {len(ids):,}"
    return Differs(f"{stage}: ids", what, remedy)


def _without_comments(sample: Sample, subject: GuardSubject, comparison: Comparison) -> Sample:
    """Return the sample with the text that is stored, which must be the source's program without comments."""
    ids = sample.stored.document(sample.number)
    # A start that the base's folder names nowhere decodes to its own characters.
    text = subject.tokenizer.decode(ids[1:] if ids[:1] == [subject.tokenizer.start_id] else ids)
    tree = comments.parsed(sample.document.text)
    expected = sample.document.text if tree is None else comments.without_comments(sample.document.text, tree)
    place = next((i for i, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), None)
    place = min(len(text), len(expected)) if place is None else place
    stage = f"{sample.stage}: the program without comments, from character {place} on"
    found, right = text[place : place + 60], expected[place : place + 60]
    comparison.exact(stage, found, right, "drop comments and docstrings, and nothing else")
    return Sample(sample.stored, sample.number, replace(sample.document, text=text))


def _same_cut(sample: Sample, tokens: examples.Tokens, comparison: Comparison) -> None:
    """See that a healed prompt ends where the tokens end that no continuation changes."""
    prompt, stage = sample.document.prompt or "", f"{sample.stage}: where its prompt ends"
    kept = int(sample.stored.prompts[sample.number]) - 1
    comparison.exact(
        stage, int(sample.stored.cuts[sample.number]), len(prompt), "count the prompt's characters"
    )
    if len(prompt) > MOST_HEALED_PROMPT:
        return
    pieces = examples.piece_texts(tokens)
    changed = examples.too_late(prompt, tokens, kept, pieces, [sample.document.text, *examples.NEXT])
    comparison.exact(stage, changed, None, "drop tokens that this continuation writes otherwise")
    early = examples.too_early(prompt, tokens, kept, pieces)
    comparison.exact(f"{stage}, too early", early, False, "keep tokens that every continuation has")
