"""Guard of what becomes of the source: documents, their splits, their ids and their bytes are derived again."""

from __future__ import annotations

import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from config import DataConfig
from guards.reference.comparison import Comparison, Differs
from guards.subject import GuardSubject
from reference import comments, examples
from reference.stored import Stored
from reference.text import (
    SPLITS,
    SourceDocument,
    decoded,
    documents_of_rows,
    file_names,
    root_of,
    row_files,
    split_of,
    utf8,
)
from reference.tokens import read_tokenizer

SAMPLES = 64  # Documents, sampled anew at each start.
MOST_BYTES = 10**7  # Of the source that are read.
MOST_ROWS = 20_000
MOST_SECONDS = 0.6  # After which no further document is tokenised.
MOST_HEALED = 3  # Prompts whose ends are tried with many continuations.
LONGEST = 300_000  # Characters of a document that is tokenised.

# What may have been done to a text on the way, by the name of the mistake.
CHANGES: dict[str, Callable[[str], str]] = {
    "line ends were converted": lambda text: text.replace("\r\n", "\n").replace("\r", "\n"),
    "white space around the text was cut off": str.strip,
    "white space at the end was cut off": str.rstrip,
    "the byte order mark was dropped": lambda text: text.removeprefix("\ufeff"),
    "the text was put into lower case": str.lower,
    "tabs became spaces": str.expandtabs,
    "the text was normalised (NFC)": lambda text: unicodedata.normalize("NFC", text),
    "the text was normalised (NFKC)": lambda text: unicodedata.normalize("NFKC", text),
    "the last line was lost": lambda text: text.rstrip("\n").rpartition("\n")[0] + "\n",
    "the last character was lost": lambda text: text[:-1],
    "the first character was lost": lambda text: text[1:],
}


class Sample:
    """A stored document and what the source has for it."""

    def __init__(self, stored: Stored, number: int, document: SourceDocument):
        self.stored, self.number, self.document = stored, number, document
        self.stage = f"document {number} of {stored.split} ({document.name})"


def compare(subject: GuardSubject, comparison: Comparison) -> None:
    """Compare the stored documents with the source: which there are, where they are, and their ids."""
    data = subject.config.data.resolved()
    stores = stored_splits(subject)
    draw = np.random.Generator(np.random.PCG64())  # Seeded by the system, anew at each start.
    if not root_of(data).exists():
        comparison.leave_out("text", f"{data.source} is not there")
        return
    if row_files(data):
        samples = _of_rows(data, stores, comparison, draw)
    else:
        samples = _of_files(data, stores, comparison, draw)
    with tempfile.TemporaryDirectory() as folder:
        subject.tokenizer.save(Path(folder))
        tokens = read_tokenizer(Path(folder))
    compared, healed, ends = 0, 0, time.perf_counter() + MOST_SECONDS
    for sample in samples:
        if compared and time.perf_counter() > ends:
            break
        if len(sample.document.text) + len(sample.document.prompt or "") > LONGEST:
            continue
        is_healed = sample.stored.cuts[sample.number] >= 0
        _same_document(sample, data, tokens, subject, comparison)
        if is_healed and healed < MOST_HEALED and sample.document.prompt:
            healed += 1
            _same_cut(sample, tokens, comparison)
        compared += 1
    if samples and not compared:
        comparison.leave_out("ids", f"each sampled document has more than {LONGEST:,} characters")


def stored_splits(subject: GuardSubject) -> dict[str, Stored]:
    """Return the store of each split that has documents."""
    stores = {store.split: store for store in (subject.train, subject.validation, subject.test)}
    return {split: Stored(store.folder, split) for split, store in stores.items()}


# --- a folder of files -----------------------------------------------------------------------------


def _of_files(
    data: DataConfig, stores: dict[str, Stored], comparison: Comparison, draw: np.random.Generator
) -> list[Sample]:
    """Compare the names of all files with those of the stores, and return a sample of the documents."""
    names = file_names(data)
    known = set(names)
    where: dict[str, tuple[Stored, int]] = {}
    for split, stored in stores.items():
        strange = [name for name in stored.names if name not in known]
        comparison.exact(f"names in {split} that no file has", strange, [], "look at what names a document")
        doubled = [name for name in stored.names if name in where]
        comparison.exact(f"files of {split} in two splits", doubled, [], "put each file into one split")
        order = next((n for n, last in zip(stored.names[1:], stored.names, strict=False) if n < last), None)
        comparison.exact(f"file out of order in {split}", order, None, "sort the files by their paths")
        if not data.regroup:
            moved = [name for name in stored.names if split_of(name, data, set()) != split]
            comparison.exact(f"files of {split} that are of another split", moved, [], "look at split_of")
        where |= {name: (stored, number) for number, name in enumerate(stored.names)}
    _same_sizes(data, where, comparison, draw)
    _missing(data, [name for name in names if name not in where], where, comparison)
    samples, room = [], MOST_BYTES
    for place in draw.permutation(len(where))[:SAMPLES]:
        name = list(where)[place]
        path = root_of(data) / name
        room -= path.stat().st_size
        if samples and room < 0:
            break
        text = decoded(path.read_bytes())
        comparison.exact(f"bytes of {name} that are UTF-8", text is not None, True, "decode strictly")
        samples.append(Sample(*where[name], SourceDocument(name, text or "", name)))
    return samples


def _same_sizes(
    data: DataConfig, where: dict[str, tuple[Stored, int]], comparison: Comparison, draw: np.random.Generator
) -> None:
    """Compare the bytes of stored texts with the sizes of the files: bits per byte are divided by them."""
    if data.drop_comments:
        return
    names = list(where)
    for place in draw.permutation(len(names))[:MOST_ROWS]:
        stored, number = where[names[place]]
        size = (root_of(data) / names[place]).stat().st_size
        if int(stored.byte_lengths[number]) != size:
            stage = f"document {number} of {stored.split} ({names[place]}): bytes"
            comparison.exact(stage, int(stored.byte_lengths[number]), size, "count the bytes of UTF-8")
    comparison.exact("bytes of every file", True, True, "")


def _missing(
    data: DataConfig, missing: list[str], where: dict[str, tuple[Stored, int]], comparison: Comparison
) -> None:
    """See that each file that is in no split is not UTF-8, or has the text of an earlier one."""
    if data.drop_comments and missing:
        comparison.leave_out(f"{len(missing)} files in no split", "they may be equal without their comments")
        return
    by_size: dict[int, list[str]] = {}
    for name, (stored, number) in where.items():
        by_size.setdefault(int(stored.byte_lengths[number]), []).append(name)
    room = MOST_BYTES
    for name in missing:
        data_of = (root_of(data) / name).read_bytes()
        room -= len(data_of)
        if room < 0:
            break
        if decoded(data_of) is None and data.skip_undecodable:
            continue
        earlier = (other for other in by_size.get(len(data_of), ()) if other < name)
        has_twin = any((root_of(data) / other).read_bytes() == data_of for other in earlier)
        comparison.exact(
            f"file {name}, which is in no split, is a copy of an earlier one",
            has_twin,
            True,
            "look for documents that are lost between the source and the store",
        )


# --- files of rows ---------------------------------------------------------------------------------


def _of_rows(
    data: DataConfig, stores: dict[str, Stored], comparison: Comparison, draw: np.random.Generator
) -> list[Sample]:
    """Compare the documents of the source's first rows with the stores, in order; return a sample of them.

    Equal documents after the first are left out, and each split has its documents in the source's order.
    """
    given = {split for split, _ in row_files(data)}
    ahead = dict.fromkeys(SPLITS, 0)
    seen: set[bytes] = set()
    samples: list[Sample] = []
    room = MOST_BYTES
    for number, document in enumerate(documents_of_rows(data)):
        room -= len(document.text) + len(document.prompt or "") + len(document.suffix or "")
        if room < 0 or number >= MOST_ROWS:
            comparison.leave_out("documents of later rows", f"the first {number:,} rows were compared")
            break
        if document.name.endswith(".py") and data.drop_comments:
            comparison.leave_out("documents of rows", "they are compared without their comments only")
            return []
        if document.content in seen:
            continue
        seen.add(document.content)
        split = _split_of_row(document, data, given, stores, ahead)
        if split == "":
            comparison.leave_out(f"rows from {number + 1} on", "their names do not tell which split they are in")
            break
        there = stores[split].names[ahead[split]] if split in stores and ahead[split] < len(stores[split]) else None
        stage = f"document {ahead[split]} of {split}"
        comparison.exact(stage, there, document.name, "look for documents that are lost, doubled or moved")
        samples.append(Sample(stores[split], ahead[split], document))
        ahead[split] += 1
    else:
        for split, stored in stores.items():
            comparison.exact(f"documents in {split}", len(stored), ahead[split], "look for documents that are added")
    return [samples[place] for place in draw.permutation(len(samples))[:SAMPLES]]


def _split_of_row(
    document: SourceDocument,
    data: DataConfig,
    given: set[str],
    stores: dict[str, Stored],
    ahead: dict[str, int],
) -> str:
    """Return the split of a row's document: by the rule, or, where texts decide it, as it is stored.

    It is "" where the next document of more than one split has this name.
    """
    if document.given not in ("", "train"):
        return document.given
    if not data.regroup:
        return split_of(document.group, data, given)
    found = [s for s, stored in stores.items() if stored.names[ahead[s] : ahead[s] + 1] == [document.name]]
    return found[0] if len(found) == 1 else "" if found else "train"


# --- one document ----------------------------------------------------------------------------------


def _same_document(
    sample: Sample, data: DataConfig, tokens: examples.Tokens, subject: GuardSubject, comparison: Comparison
) -> None:
    """Compare the ids of a stored document, and its row in the tables, with those of its source."""
    stored, number, stage = sample.stored, sample.number, sample.stage
    if data.drop_comments and sample.document.name.endswith(".py"):
        sample = _without_comments(sample, subject, comparison)
    found = stored.document(number)

    def written(document: SourceDocument) -> examples.Written:
        if document.prompt is None:
            return examples.plain(document, tokens, data, stored.split, stored.gap_lead)
        if document.suffix is not None:
            return examples.gap_example(document, tokens, stored.gap_lead)
        if stored.cuts[number] < 0:
            return examples.apart(document, tokens)
        return examples.one_text(document, tokens, int(stored.prompts[number]))

    expected = written(sample.document)
    if found != expected.ids:
        raise _other_ids(stage, found, expected, lambda text: written(replace(sample.document, text=text)), sample)
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
    place = next((i for i, (a, b) in enumerate(zip(found, ids, strict=False)) if a != b), min(len(found), len(ids)))
    what = f"from token {place} on it is {found[place : place + 4]}, and the reference has {ids[place : place + 4]}"
    return Differs(f"{stage}: ids", f"{what}; {len(found):,} tokens against {len(ids):,}", remedy)


def _without_comments(sample: Sample, subject: GuardSubject, comparison: Comparison) -> Sample:
    """Return the sample with the text that is stored, which must be the source's program without comments."""
    text = subject.tokenizer.decode(sample.stored.document(sample.number))
    tree = comments.parsed(sample.document.text)
    stage = f"{sample.stage}: the program without comments"
    if tree is None:
        comparison.exact(stage, text == sample.document.text, True, "what does not parse stays as it is")
        return sample
    now = comments.parsed(text)
    comparison.exact(
        stage,
        now and comments.without_docstrings(now) == comments.without_docstrings(tree) and comments.comments(text),
        [],
        "drop comments and docstrings, and nothing else",
    )
    return Sample(sample.stored, sample.number, replace(sample.document, text=text))


def _same_cut(sample: Sample, tokens: examples.Tokens, comparison: Comparison) -> None:
    """See that a healed prompt ends where the tokens end that no continuation changes."""
    prompt, stage = sample.document.prompt or "", f"{sample.stage}: where its prompt ends"
    kept = int(sample.stored.prompts[sample.number]) - 1
    comparison.exact(stage, int(sample.stored.cuts[sample.number]), len(prompt), "count the prompt's characters")
    if len(prompt) > MOST_HEALED_PROMPT:
        return
    pieces = examples.piece_texts(tokens)
    changed = examples.too_late(prompt, tokens, kept, pieces, [sample.document.text, *examples.NEXT])
    comparison.exact(stage, changed, None, "drop tokens that this continuation writes otherwise")
    early = examples.too_early(prompt, tokens, kept, pieces)
    comparison.exact(f"{stage}, too early", early, False, "keep tokens that every continuation has")


MOST_HEALED_PROMPT = 1000  # Characters of a prompt that is tried with continuations.


def paths_of(samples: Iterable[Sample]) -> list[str]:
    """Return the names of sampled documents."""
    return [sample.document.name for sample in samples]
