"""How much of the held-out data also stands in the training data: the measure behind the guard against leaks.

    found = overlap(train_documents, held_out_documents)  # texts
    if found.refused: ...
    groups = regroup(documents)  # a group for each document, such that a split by group leaks no more

A text is compared as a row of units: words and punctuation marks, or the tokens of a store, in both cases
without white space, so that a function moved into a class is the same function. Held-out documents are found
in four ways: exact duplicates by SHA-256, near duplicates by MinHash (Broder 1997) over shingles as in
Lee et al. 2022 (arXiv:2107.06499), runs of 50 words by rolling hash (the same length as theirs, who use a
suffix array), and short texts inside longer ones. An example with a prompt is judged by its completion, since
only that is scored.

Held-out documents are kept in memory; training documents are streamed, in time linear in their size.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from data.documents import Document, utf8
from data.shingles import UNIT, Batch, Units, Words, bands, batches, mixed

# Measured: clean splits by file leak 2% to 19% of their text, chunks of files that overlap, split at
# random, 71% to 99%. Between them lie the FastAPI tutorials by file, 47%, whose files come in near-equal
# pairs: a true leak.
LEAKED_LIMIT = 0.25
WINDOW = 50  # words; Lee et al. remove repetitions of this length and longer ones
SHINGLE = 5
NEAR = 0.7
WINDOW_BYTES = 240  # The size of 50 words of code: a store's window has as many tokens as fill these.
# A window in more training documents than this share and this number is a header, and no leak.
BOILERPLATE_SHARE, BOILERPLATE_DOCUMENTS = 0.05, 20
PERMUTATIONS, BANDS = 128, 32  # These find 99.98% of pairs at Jaccard 0.7: 1 - (1 - 0.7**4)**32.
BUCKET = 32  # candidates compared in a bucket of the index; where there are more, they resemble each other
REGROUP_WINDOWS = 2**22  # hashes that `regroup` keeps at most
LINKED = 0.3  # `regroup` puts two documents together when this share of the shorter one stands in the other
EXAMPLES = 8  # leaks that are shown
# Part of the key of what is cached: raise it when a change here or in data/shingles.py would give another
# overlap or other groups of the same documents.
VERSION = 1


@dataclass(frozen=True)
class Example:
    """A held-out document and the training document it was found in; `kind` is a count of `Overlap`."""

    kind: str
    held_out: str
    train: str
    similarity: float
    excerpt: str


@dataclass(frozen=True)
class Overlap:
    """The part of the held-out data that stands in the training data too.

    Args:
        documents, of_documents: Held-out documents compared, and all there are; they differ if sampled.
        units, leaked_units: Scored words or tokens of those compared, and how many of them are leaked.
        exact: Documents whose scored text is that of a training document, but for white space.
        near: Others whose Jaccard similarity with one is at least `NEAR`, by estimate.
        contained: Others, shorter than a window, that stand inside training documents.
        windows, windows_shared: Runs of `window` units that end in scored text, and those found anywhere in
            the training data.
        boilerplate: Runs found in so many training documents that they count as headers, and not as leaked.
        groups: Groups, or files that documents are numbered pieces of, that stand in both splits.
        examples: The largest leaks first.
    """

    documents: int
    of_documents: int
    units: int
    leaked_units: int
    exact: int
    near: int
    contained: int
    window: int
    windows: int
    windows_shared: int
    boilerplate: int
    groups: int
    examples: tuple[Example, ...]

    @property
    def leaked_share(self) -> float:
        """The share of scored units that training saw: all units of exact, near and contained documents, and
        of others the units inside shared windows.

        Units count, not documents, because the loss is a mean over units: this share of the score is recall.
        """
        return self.leaked_units / self.units if self.units else 0.0

    @property
    def duplicate_share(self) -> float:
        """The share of documents that are exact or near duplicates, or contained."""
        return (self.exact + self.near + self.contained) / self.documents if self.documents else 0.0

    @property
    def refused(self) -> bool:
        """Whether scores on these held-out data would mean little: more than `LEAKED_LIMIT` of the text or of
        the documents is leaked, or a group stands in both splits.

        Documents count too, because repeated rows are short ones: of the lines of one file, split at random,
        44% were duplicates and made up 16% of the text.
        """
        return max(self.leaked_share, self.duplicate_share) > LEAKED_LIMIT or self.groups > 0

    @property
    def counts(self) -> str:
        """The same counts as in `str`, in fewer words."""
        return (
            f"{self.leaked_share:.1%} of the text, {self.exact} exact, {self.near} near and {self.contained} "
            f"contained of {self.documents} documents, {self.windows_shared} of {self.windows} runs, "
            f"{self.groups} groups"
        )

    def __str__(self) -> str:
        sampled = f" (a sample of {self.of_documents})" if self.documents < self.of_documents else ""
        return (
            f"{self.leaked_share:.1%} of the held-out text stands in the training data: of {self.documents} "
            f"documents{sampled} {self.exact} are exact duplicates, {self.near} near ones and "
            f"{self.contained} stand inside others; of {self.windows} runs of {self.window} units "
            f"{self.windows_shared} are shared; {self.groups} groups stand in both splits"
        )


def overlap(train: Iterable[Document], held_out: Iterable[Document]) -> Overlap:
    """Compare texts, in words and punctuation marks. The order of documents does not matter."""
    documents, words = list(held_out), Words()
    held = [_units(words, document) for document in documents]

    def excerpt(number: int, unit: int) -> str:
        document = documents[number]
        text = "\n".join((document.prompt or "", document.suffix or "", document.text))
        word = next(itertools.islice(UNIT.finditer(text), unit, None))
        return text[word.start() : word.start() + 200]

    return compare(map(partial(_units, words), train), held, len(held), WINDOW, excerpt)


# --- units -------------------------------------------------------------------------------------------

# Names of pieces: FILE.EXT:12, FILE.EXT#3, FILE.EXT@L1-L9, ..._chunk_3, ...-part12. Not a file whose name
# merely ends in a number.
PIECE = re.compile(
    r"(?:(?<=\.\w)|(?<=\.\w\w)|(?<=\.\w{3})|(?<=\.\w{4})|(?<=\.\w{5}))[:#@]L?\d+(?:[-:]L?\d+)?$"
    r"|[ ._:#/-]*(?:chunk|part|piece|window|segment|slice|block)[ ._:#-]*\d+$",
    re.IGNORECASE,
)


def _units(words: Words, document: Document) -> Units:
    given = "\n".join((document.prompt or "", document.suffix or ""))
    prompt, text = words.ids(given), words.ids(document.text)
    return Units(document.name, document.group, np.concatenate((prompt, text)), len(prompt))


def _digest(document: Units, least: int) -> bytes:
    """Hash the scored text; below `least` units the prompt belongs to it, since `return x` is no leak."""
    ids = document.ids[document.start :]
    return hashlib.sha256((ids if len(ids) >= least else document.ids).tobytes()).digest()


def _group(document: Units) -> str:
    """Return the group without a piece's number. Only its end is searched: it may be a whole prompt."""
    return document.group[:-40] + PIECE.sub("", document.group[-40:])


# --- comparing ---------------------------------------------------------------------------------------


class _Needles:
    """Hashes of held-out text that are looked for, and for each the training documents that hold it."""

    def __init__(self, hashes: np.ndarray):
        self.values = np.unique(hashes)
        bits = min(26, max(10, len(self.values).bit_length() + 4))
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(2**bits, bool)  # rejects most training windows at a 16th of a search's cost
        self._table[self._slots(self.values)] = True
        self.documents = np.zeros(len(self.values), np.int64)
        self.first = np.full(len(self.values), 2**64 - 1, np.uint64)  # the least name key of these

    def _slots(self, hashes: np.ndarray) -> np.ndarray:
        return (hashes * np.uint64(0xD6E8FEB86659FD93)) >> self._shift

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (places of the hashes that are needles, the needle of each)."""
        maybe = np.flatnonzero(self._table[self._slots(hashes)])
        needle = np.searchsorted(self.values, hashes[maybe])
        needle[needle == len(self.values)] = 0
        found = self.values[needle] == hashes[maybe] if len(self.values) else np.zeros(0, bool)
        return maybe[found], needle[found]

    def count(self, batch: Batch, length: int, keys: np.ndarray) -> np.ndarray:
        """Count the needles in a batch of training documents; return the documents that hold one."""
        places, hashes = batch.windows(length)
        found, needle = self.find(hashes)
        documents = batch.of[places[found]]
        pairs = np.unique(needle * len(batch.documents) + documents)
        needle, documents = np.divmod(pairs, len(batch.documents))
        self.documents += np.bincount(needle, minlength=len(self.values))
        np.minimum.at(self.first, needle, keys[documents])
        return np.unique(documents)


def _name_key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(utf8(name), digest_size=8).digest(), "little")


def compare(
    train: Iterable[Units],
    held: list[Units],
    of_documents: int,
    window: int,
    excerpt: Callable[[int, int], str],
) -> Overlap:
    """Compare held-out documents with training documents, which are read once.

    Args:
        train: Training documents.
        held: Held-out documents.
        of_documents: How many held-out documents there are, if `held` is a sample of them.
        window: Units of a run.
        excerpt: From the number of a held-out document and of a unit, its text from that unit on.
    """
    comparison = _Comparison(held, window)
    for batch in batches(train):
        comparison.look_through(batch)
    return comparison.overlap(of_documents, excerpt)


class _Comparison:
    """Held-out documents, by number, and what was found of them in the training documents so far.

    exact: The training document with the same text; of several, here and below, the one of the least name.
    near: (-similarity, training document) of the most similar one.
    groups: By shared group the training document of that group.
    """

    def __init__(self, held: list[Units], window: int):
        self.held, self.window = held, window
        self.least, self.shingle = window // 3, max(SHINGLE, window // 10)
        self.ours = ours = Batch(held)
        self.scored = ours.ends - ours.scored_from  # (documents,) units

        places, hashes = ours.windows(window)
        ending = places + window > ours.scored_from[ours.of[places]]
        self.places, self.hashes = places[ending], hashes[ending]
        self.needles = {window: _Needles(self.hashes)}
        self.short = self._short_texts()

        self.signed, self.signatures = ours.signatures(self.shingle, self.least, PERMUTATIONS)
        self.bands = bands(self.signatures, BANDS)
        self.digests: dict[bytes, list[int]] = defaultdict(list)
        for number, document in enumerate(held):
            if self.scored[number]:
                self.digests[_digest(document, self.least)].append(number)
        self.our_groups = {_group(document) for document in held if document.group}

        self.n_train = 0
        self.names: dict[int, str] = {}  # names of training documents with a needle, by key
        self.exact: dict[int, str] = {}
        self.near: dict[int, tuple[float, str]] = {}
        self.groups: dict[str, str] = {}

    def _short_texts(self) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Add needles for texts shorter than a window: two runs that cover the text together.

        Returns by length of the runs (numbers of the documents, hashes of their first run, of their last).
        """
        ours, short = self.ours, {}
        for length in (self.least, 2 * self.least):
            fits = (self.scored >= length) & (self.scored < min(2 * length, self.window))
            documents = np.flatnonzero(fits)
            at, values = ours.windows(length)
            head = values[np.searchsorted(at, ours.scored_from[documents])]
            tail = values[np.searchsorted(at, ours.ends[documents] - length)]
            if len(documents):
                short[length] = documents, head, tail
                self.needles[length] = _Needles(np.concatenate((head, tail)))
        return short

    def look_through(self, batch: Batch) -> None:
        """Look for all held-out documents in a batch of training documents."""
        self.n_train += len(batch.documents)
        keys = np.array([_name_key(document.name) for document in batch.documents], np.uint64)
        for length, needle in self.needles.items():
            for number in needle.count(batch, length, keys).tolist():
                self.names[int(keys[number])] = batch.documents[number].name
        for document in batch.documents:
            for number in self.digests.get(_digest(document, self.least), ()):
                self.exact[number] = min(document.name, self.exact.get(number, document.name))
            if (group := _group(document)) in self.our_groups:
                self.groups[group] = min(document.name, self.groups.get(group, document.name))
        theirs, others = batch.signatures(self.shingle, self.least, PERMUTATIONS)
        for i, j, similarity in _near(self.bands, self.signatures, others):
            name, number = batch.documents[theirs[j]].name, int(self.signed[i])
            self.near[number] = min((-similarity, name), self.near.get(number, (0.0, "")))

    def overlap(self, of_documents: int, excerpt: Callable[[int, int], str]) -> Overlap:
        """Sum up, after all training documents; `excerpt` and `of_documents` are those of `compare`."""
        ours, window = self.ours, self.window
        limit = max(BOILERPLATE_DOCUMENTS, BOILERPLATE_SHARE * self.n_train)
        needle = np.searchsorted(self.needles[window].values, self.hashes)
        times = self.needles[window].documents[needle]
        shared = (times > 0) & (times <= limit)
        covered = _inside(self.places[shared], window, len(ours.ids))
        # A window from a header into its file is rare, and yet only the text behind the header is leaked.
        covered &= ~_inside(self.places[times > limit], window, len(ours.ids))
        covered &= np.arange(len(ours.ids)) >= ours.scored_from[ours.of]
        leaked = np.bincount(ours.of[covered], minlength=len(self.held))

        contained = self._contained(limit)
        runs: dict[int, _Find] = {}
        for i in np.flatnonzero(shared)[::-1].tolist():  # The last to be set is a document's first run.
            number = int(ours.of[self.places[i]])
            name = self.names[int(self.needles[window].first[needle[i]])]
            share = float(leaked[number] / self.scored[number])
            runs[number] = _Find("windows_shared", name, share, int(self.places[i] - ours.starts[number]))
        finds = self._finds(runs, contained)
        whole = sorted(self.exact.keys() | self.near.keys() | contained.keys())
        leaked[whole] = self.scored[whole]

        count = [find.kind for find in finds.values()].count
        return Overlap(
            documents=len(self.held),
            of_documents=of_documents,
            units=int(self.scored.sum()),
            leaked_units=int(leaked.sum()),
            exact=count("exact"),
            near=count("near"),
            contained=count("contained"),
            window=window,
            windows=len(self.places),
            windows_shared=int(shared.sum()),
            boilerplate=int((times > limit).sum()),
            groups=len(self.groups),
            examples=tuple(self._examples(finds, leaked, excerpt)),
        )

    def _contained(self, limit: float) -> dict[int, str]:
        """Return the training documents that hold both runs of a short text, by its number."""
        contained: dict[int, str] = {}
        for length, (documents, head, tail) in self.short.items():
            needles = self.needles[length]
            first, last = np.searchsorted(needles.values, head), np.searchsorted(needles.values, tail)
            fewest = np.minimum(needles.documents[first], needles.documents[last])
            for i in np.flatnonzero((fewest > 0) & (fewest <= limit)).tolist():
                contained[int(documents[i])] = self.names[int(needles.first[first[i]])]
        return contained

    def _finds(self, runs: dict[int, _Find], contained: dict[int, str]) -> dict[int, _Find]:
        """Return the strongest find of each document: exact, then near, contained, and shared runs."""
        finds = dict(runs)
        for number, name in contained.items():
            finds[number] = _Find("contained", name, 1.0, self.held[number].start)
        for number, (similarity, name) in self.near.items():
            finds[number] = _Find("near", name, -similarity, self.held[number].start)
        for number, name in self.exact.items():
            finds[number] = _Find("exact", name, 1.0, self.held[number].start)
        return finds

    def _examples(
        self, finds: dict[int, _Find], leaked: np.ndarray, excerpt: Callable[[int, int], str]
    ) -> Iterator[Example]:
        largest = sorted(finds, key=lambda number: (-leaked[number], self.held[number].name))[:EXAMPLES]
        for number in largest:
            find = finds[number]
            line = " ".join(excerpt(number, find.unit).split())[:80]
            yield Example(find.kind, self.held[number].name, find.name, round(find.similarity, 3), line)
        for group in sorted(self.groups)[: EXAMPLES // 2]:
            name = min(document.name for document in self.held if _group(document) == group)
            yield Example("groups", name, self.groups[group], 1.0, group[:80])


class _Find(NamedTuple):
    """The strongest find of a held-out document; `kind` is a count of `Overlap`.

    name: The training document it was found in.
    similarity: 1 for a whole text, else the Jaccard estimate or the share of leaked units.
    unit: The unit from which an excerpt shows it.
    """

    kind: str
    name: str
    similarity: float
    unit: int


def _inside(places: np.ndarray, window: int, n_units: int) -> np.ndarray:
    """Return the units inside a window that begins at one of the places, (n_units,) bool."""
    edges = np.bincount(places, minlength=n_units + 1) - np.bincount(places + window, minlength=n_units + 1)
    return np.cumsum(edges)[:n_units] > 0


def _near(wanted: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """Yield (i, j, similarity) of signatures that agree in a band and in at least `NEAR` of all places.

    Only the first `BUCKET` signatures that are equal in one band are compared: time stays linear where
    thousands of documents are variants of one.
    """
    if not len(ours) or not len(theirs):
        return
    keys = bands(theirs, BANDS)
    order = np.argsort(keys, axis=None, kind="stable")
    flat = keys.ravel()[order]
    left = np.searchsorted(flat, wanted.ravel())
    pairs = []
    for step in range(BUCKET):
        at = np.minimum(left + step, len(flat) - 1)
        hit = np.flatnonzero((left + step < len(flat)) & (flat[at] == wanted.ravel()))
        if not len(hit):
            break
        pairs.append(hit // BANDS * len(theirs) + order[at[hit]] // BANDS)
    if not pairs:
        return
    i, j = np.divmod(np.unique(np.concatenate(pairs)), len(theirs))
    similarity = np.empty(len(i))
    for k in range(0, len(i), 2**16):
        part = slice(k, k + 2**16)
        similarity[part] = (ours[i[part]] == theirs[j[part]]).mean(1)
    for k in np.flatnonzero(similarity >= NEAR).tolist():
        yield int(i[k]), int(j[k]), float(similarity[k])


# --- regrouping --------------------------------------------------------------------------------------


def regroup(documents: Iterable[Document]) -> list[str]:
    """Return a group for each document, in order, so that no document leaks into another group.

    Documents of one group (or pieces of one file) go together, exact and near duplicates, and two documents
    of which the shorter has `LINKED` of its runs of `WINDOW // 3` words in the other. The name is the least
    of the groups joined, so that the order of documents does not matter. Above `REGROUP_WINDOWS` runs, only
    those whose hash ends in enough zeros are compared, the same ones in every document.
    """
    words, least = Words(), WINDOW // 3
    parents: list[int] = []

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = i = parents[parents[i]]
        return i

    def join(i: int, j: int) -> None:
        parents[root(i)] = root(j)

    names: list[str] = []
    first: dict[bytes, int] = {}
    signed, signatures = [], []
    windows = np.empty((2, 0), np.uint64)  # hash and document
    zeros = 0
    for batch in batches(map(partial(_units, words), documents)):
        start = len(names)
        for document in batch.documents:
            number = len(names)
            parents.append(number)
            names.append(_group(document))
            keys = [b"group" + utf8(names[-1])]
            if len(document.ids) > document.start:
                keys.append(b"text" + _digest(document, least))
            for key in keys:
                join(number, first.setdefault(key, number))
        theirs, rows = batch.signatures(SHINGLE, least, PERMUTATIONS)
        signed.append(theirs + start)
        signatures.append(rows)
        places, hashes = batch.windows(least)
        scored = places >= batch.scored_from[batch.of[places]]
        numbers = (batch.of[places[scored]] + start).astype(np.uint64)
        windows = np.concatenate((windows, np.stack((mixed(hashes[scored]), numbers))), 1)
        while True:
            windows = windows[:, windows[0] & np.uint64(2**zeros - 1) == 0]
            if windows.shape[1] <= REGROUP_WINDOWS:
                break
            zeros += 1
    if not names:
        return []
    numbers, rows = np.concatenate(signed), np.concatenate(signatures)
    for i, j, _ in _near(bands(rows, BANDS), rows, rows):
        join(int(numbers[i]), int(numbers[j]))
    for i, j in _linked(windows, len(names)):
        join(i, j)
    least_name: dict[int, str] = {}
    for number, name in enumerate(names):
        least_name[root(number)] = min(name, least_name.get(root(number), name))
    return [least_name[root(number)] for number in range(len(names))]


def _linked(windows: np.ndarray, n_documents: int) -> Iterator[tuple[int, int]]:
    """Yield pairs of documents that share `LINKED` of the windows of the one that has fewer."""
    hashes, documents = windows[0], windows[1].astype(np.int64)
    order = np.lexsort((documents, hashes))
    hashes, documents = hashes[order], documents[order]
    once = np.ones(len(hashes), bool)
    once[1:] = (hashes[1:] != hashes[:-1]) | (documents[1:] != documents[:-1])
    hashes, documents = hashes[once], documents[once]
    sizes = np.bincount(documents, minlength=n_documents)
    _, which, times = np.unique(hashes, return_inverse=True, return_counts=True)
    rare = times[which] <= max(BOILERPLATE_DOCUMENTS, BOILERPLATE_SHARE * n_documents)
    hashes, documents = hashes[rare], documents[rare]
    pairs: list[np.ndarray] = []
    for step in range(1, BUCKET):
        same = hashes[step:] == hashes[:-step]
        if not same.any():
            break
        pairs.append(documents[:-step][same] * n_documents + documents[step:][same])
    if not pairs:
        return
    codes, shared = np.unique(np.concatenate(pairs), return_counts=True)
    i, j = np.divmod(codes, n_documents)
    enough = shared >= LINKED * np.minimum(sizes[i], sizes[j])
    yield from zip(i[enough].tolist(), j[enough].tolist(), strict=True)
