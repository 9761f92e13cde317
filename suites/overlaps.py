"""How much of a suite's examples stands in the training text, so that a model may know it by heart.

    found = training_overlap(record, data.train, tokenizer)
    print(overlap_line(found))

Words and marks are compared, without white space (`shingles`). An example shares a run if one that ends in
its reference stands in a training text; the run may begin in the text before the reference. GPT-3 looked for
runs of 13 words (arXiv:2005.14165, appendix C), and Lee et al. 2022 remove runs of 50 (arXiv:2107.06499).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data import leaks, shingles
from data.cache import read_sealed, write_sealed
from data.documents import Document
from data.leaks import NEAR, overlap
from data.shingles import Batch, Units, Words
from data.tokenstore import TokenStore
from suites.records import examples_of
from suites.scoring import Example
from suites.stored import text_of_example
from tokenizer import Tokenizer

VERSION = 1  # A part of a cached result's key: raise it when the same texts would give another result.
RUNS = 13, 50  # Words of a run.
# Bytes of training text beyond which only evenly spread documents are read: 1.5 MB take a second.
READ_BYTES = 2**26


def training_overlap(record: dict[str, Any], train: TokenStore, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return how much of the examples stands in the training text; plain data, cached beside the store.

    Returns:
        `read` and `of`: how many training documents were read, and how many there are.
        `runs`: for 13 and 50 words the numbers, from 1, of the examples that share such a run.
        `exact`: the numbers of those whose reference is a line of a training file or, where training has
            examples, one of its completions.
        `near`: how many completions of 16 words or more are near duplicates of a training completion, or
            stand inside one; None of plain text.
    """
    examples = examples_of(record)
    key = hashlib.sha256(f"{VERSION} {leaks.VERSION}".encode())
    key.update((train.folder / "index.json").read_bytes())
    key.update(json.dumps([[e.id, e.prompt, e.suffix, e.reference] for e in examples]).encode())
    path = train.folder / f"overlap-{key.hexdigest()[:32]}.json"
    found = read_sealed(path)
    if found is None:
        found = _overlap(examples, train, tokenizer)
        write_sealed(path, found)
    return found


def _overlap(examples: Sequence[Example], train: TokenStore, tokenizer: Tokenizer) -> dict[str, Any]:
    """Look for the examples in the training text, in one pass over it; see `training_overlap`."""
    stride = max(1, -(-train.n_bytes // READ_BYTES))
    numbers = range(0, train.n_documents, stride)
    words = Words()
    ours = Batch([_units(words, e.id, _before(e), e.reference) for e in examples])
    references = {" ".join(e.reference.split()) for e in examples}
    exact: set[str] = set()
    wanted = []  # (words, hashes, example of each hash) of the runs that end in a reference
    for run in RUNS:
        places, hashes = ours.windows(run)
        ending = places + run > ours.scored_from[ours.of[places]]
        wanted.append((run, hashes[ending], ours.of[places[ending]]))
    found = [np.zeros(len(hashes), bool) for _, hashes, _ in wanted]

    def documents() -> Iterator[Document]:
        for number in numbers:
            if train.holds_examples:
                example = text_of_example(train, tokenizer, number)
                text, prompt = example.reference, _before(example)
                exact.update(references & {" ".join(text.split())})
            else:
                text, prompt = tokenizer.decode(train.document(number).tolist()), None
                exact.update(references.intersection(" ".join(line.split()) for line in text.split("\n")))
            yield Document(train.names[number], text, "", prompt)

    def counted(batch: Batch) -> None:
        for (run, hashes, _), shared in zip(wanted, found, strict=True):
            shared |= np.isin(hashes, batch.windows(run)[1])

    def read() -> Iterator[Document]:
        pending: list[Units] = []
        size = 0
        for document in documents():
            pending.append(_units(words, document.name, document.prompt or "", document.text))
            size += len(pending[-1].ids)
            if size >= shingles.BATCH_UNITS:
                counted(Batch(pending))
                pending, size = [], 0
            yield document
        counted(Batch(pending))

    near = None
    if train.holds_examples:
        completions = [Document(e.id, e.reference, "", _before(e)) for e in examples]
        compared = overlap(read(), completions)
        near = compared.near + compared.contained
    else:
        for _ in read():
            pass
    return {
        "read": len(numbers),
        "of": train.n_documents,
        "examples": len(examples),
        "plain": not train.holds_examples,
        "exact": [i for i, e in enumerate(examples, 1) if " ".join(e.reference.split()) in exact],
        "near": near,
        "runs": {
            str(run): (np.unique(of[shared]) + 1).tolist()
            for (run, _, of), shared in zip(wanted, found, strict=True)
        },
    }


def _before(example: Example) -> str:
    """Return the text before the reference; a suffix comes first, so that runs end in the reference."""
    return "\n".join(part for part in (example.suffix, example.prompt) if part)


def _units(words: Words, name: str, before: str, text: str) -> Units:
    context = words.ids(before)
    return Units(name, "", np.concatenate((context, words.ids(text))), len(context))


def overlap_line(found: dict[str, Any]) -> str:
    """Return the overlap in one sentence, to stand below the scores."""
    n = found["examples"]
    what = "lines of training files" if found["plain"] else "completions of training"
    near = "" if found["near"] is None else f", {found['near']} near duplicates (from {NEAR:.0%}) of them"
    (short, some), (long, fewer) = ((run, len(numbers)) for run, numbers in found["runs"].items())
    sample = f" (of {found['read']:,} of {found['of']:,} documents)" if found["read"] < found["of"] else ""
    return (
        f"in training{sample}: {len(found['exact'])} of {n} references are {what}{near}; {some} of {n} "
        f"samples share a run of {short} words that ends in the reference, {fewer} one of {long}"
    )
