"""How much of the held-out data also stands in the training data: the measure behind the guard against leaks.

    found = overlap(train_documents, held_out_documents)  # texts
    if found.refused: ...
    groups = regroup(documents)  # a group for each document, such that a split by group leaks no more

A text is compared as a row of units: words and punctuation marks, or the tokens of a store, in both cases
without white space, so that a function moved into a class is the same function. Held-out documents are looked
for in four ways: exact duplicates by SHA-256, near duplicates by MinHash (Broder 1997) over shingles as in
Lee et al. 2022 (arXiv:2107.06499), runs of 50 words by rolling hash (the same length as theirs, who use a
suffix array), and short texts inside longer ones. What has a prompt is judged by its completion, since that
is what is scored.

The held-out side is held in memory; the train side is streamed, in time linear in its size.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from data.documents import Document, utf8
from data.shingles import UNIT, Batch, Units, Words, bands, batches, mixed

# Measured: clean splits by file leak 2% to 19% of their text, chunks of files that overlap, split at
# random, 71% to 99%. Between them lie the FastAPI tutorials by file, 47%, whose files come in near-equal
# pairs: a true leak.
LEAKED_LIMIT = 0.25
WINDOW = 50  # words; the length from which on Lee et al. remove a repetition
SHINGLE = 5
NEAR = 0.7
WINDOW_BYTES = 240  # what 50 words of code take: the window of a store has as many tokens as fill these
# A window in more training documents than this share and this many is a header, and not a leak.
BOILERPLATE_SHARE, BOILERPLATE_DOCUMENTS = 0.05, 20
PERMUTATIONS, BANDS = 128, 32  # finds 99.98% of pairs at Jaccard 0.7: 1 - (1 - 0.7**4)**32
BUCKET = 32  # candidates looked at in a bucket of the index; more of them are near duplicates of each other
REGROUP_WINDOWS = 2**22
LINKED = 0.3  # `regroup` puts two documents together when this share of the shorter one stands in the other
EXAMPLES = 8
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
    """What of the held-out data stands in the training data too.

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
        """The share of scored units that training saw: those of exact, near and contained documents, all of
        them, and of the others the units inside shared windows.

        Of units, not of documents, because the loss is a mean over them: this share of the score is recall.
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

        Of documents too, because repeated rows are short ones: of the lines of one file, split at random, 44%
        were duplicates and made up 16% of the text.
        """
        return max(self.leaked_share, self.duplicate_share) > LEAKED_LIMIT or self.groups > 0

    @property
    def windows_share(self) -> float:
        return self.windows_shared / self.windows if self.windows else 0.0

    @property
    def counts(self) -> str:
        """The same as `str`, in short."""
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

# Names of pieces: FILE.EXT:12, FILE.EXT#3, FILE.EXT@L1-L9, ..._chunk_3, ...-part12. A file that merely ends
# in a number is none of these.
PIECE = re.compile(
    r"(?:(?<=\.\w)|(?<=\.\w\w)|(?<=\.\w{3})|(?<=\.\w{4})|(?<=\.\w{5}))[:#@]L?\d+(?:[-:]L?\d+)?$"
    r"|[ ._:#/-]*(?:chunk|part|piece|window|segment|slice|block)[ ._:#-]*\d+$",
    re.IGNORECASE,
)


def _units(words: Words, document: Document) -> Units:
    asked = "\n".join((document.prompt or "", document.suffix or ""))
    prompt, text = words.ids(asked), words.ids(document.text)
    return Units(document.name, document.group, np.concatenate((prompt, text)), len(prompt))


def _digest(document: Units, least: int) -> bytes:
    """SHA-256 of the scored text; below `least` units the prompt belongs to it, for `return x` is no leak."""
    ids = document.ids[document.start :]
    return hashlib.sha256((ids if len(ids) >= least else document.ids).tobytes()).digest()


def _group(document: Units) -> str:
    """The group without the number of a piece. Only the end is searched: a group may be a whole prompt."""
    return document.group[:-40] + PIECE.sub("", document.group[-40:])


# --- comparing ---------------------------------------------------------------------------------------


class _Needles:
    """Hashes of the held-out side that are looked for, and for each the training documents that hold it."""

    def __init__(self, hashes: np.ndarray):
        self.values = np.unique(hashes)
        bits = min(26, max(10, len(self.values).bit_length() + 4))
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(2**bits, bool)  # most training windows end here, at a 16th of a search's cost
        self._table[self._slots(self.values)] = True
        self.documents = np.zeros(len(self.values), np.int64)
        self.first = np.full(len(self.values), 2**64 - 1, np.uint64)  # the least key among their names

    def _slots(self, hashes: np.ndarray) -> np.ndarray:
        return (hashes * np.uint64(0xD6E8FEB86659FD93)) >> self._shift

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(which of the hashes are needles, the needle of each)."""
        maybe = np.flatnonzero(self._table[self._slots(hashes)])
        needle = np.searchsorted(self.values, hashes[maybe])
        needle[needle == len(self.values)] = 0
        found = self.values[needle] == hashes[maybe] if len(self.values) else np.zeros(0, bool)
        return maybe[found], needle[found]

    def count(self, batch: Batch, length: int, keys: np.ndarray) -> np.ndarray:
        """Look through a batch of training documents; returns those in which something was found."""
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
    """`excerpt(number, unit)` is the held-out text from that unit on."""
    least, shingle = window // 3, max(SHINGLE, window // 10)
    ours = Batch(held)
    scored = ours.ends - ours.scored_from

    places, hashes = ours.windows(window)
    ending = places + window > ours.scored_from[ours.of[places]]
    places, hashes = places[ending], hashes[ending]
    needles = {window: _Needles(hashes)}
    # Texts shorter than a window: their first and their last run of a length that covers them together.
    short: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for length in (least, 2 * least):
        documents = np.flatnonzero((scored >= length) & (scored < min(2 * length, window)))
        at, values = ours.windows(length)
        head = values[np.searchsorted(at, ours.scored_from[documents])]
        tail = values[np.searchsorted(at, ours.ends[documents] - length)]
        if len(documents):
            short[length] = documents, head, tail
            needles[length] = _Needles(np.concatenate((head, tail)))

    signed, signatures = ours.signatures(shingle, least, PERMUTATIONS)
    ours_in_bands = bands(signatures, BANDS)
    digests: dict[bytes, list[int]] = defaultdict(list)
    for number, document in enumerate(held):
        if scored[number]:
            digests[_digest(document, least)].append(number)
    our_groups = {_group(document) for document in held if document.group}
    groups: dict[str, str] = {}
    exact: dict[int, str] = {}
    near: dict[int, tuple[float, str]] = {}
    names: dict[int, str] = {}
    n_train = 0
    for batch in batches(train):
        n_train += len(batch.documents)
        keys = np.array([_name_key(document.name) for document in batch.documents], np.uint64)
        for length, needle in needles.items():
            for number in needle.count(batch, length, keys).tolist():
                names[int(keys[number])] = batch.documents[number].name
        for document in batch.documents:
            for number in digests.get(_digest(document, least), ()):
                exact[number] = min(document.name, exact.get(number, document.name))
            if (group := _group(document)) in our_groups:
                groups[group] = min(document.name, groups.get(group, document.name))
        theirs, others = batch.signatures(shingle, least, PERMUTATIONS)
        for i, j, similarity in _near(ours_in_bands, signatures, others):
            name, number = batch.documents[theirs[j]].name, int(signed[i])
            # The most similar; among equals the least name.
            near[number] = min((-similarity, name), near.get(number, (0.0, "")))

    limit = max(BOILERPLATE_DOCUMENTS, BOILERPLATE_SHARE * n_train)
    needle = np.searchsorted(needles[window].values, hashes)
    times = needles[window].documents[needle]
    shared = (times > 0) & (times <= limit)
    covered = _inside(places[shared], window, len(ours.ids))
    # A window that reaches from a header into its file is rare, and only what is behind the header is leaked.
    covered &= ~_inside(places[times > limit], window, len(ours.ids))
    covered &= np.arange(len(ours.ids)) >= ours.scored_from[ours.of]
    leaked = np.bincount(ours.of[covered], minlength=len(held))

    contained: dict[int, str] = {}
    for length, (documents, head, tail) in short.items():
        seen = needles[length]
        first, last = np.searchsorted(seen.values, head), np.searchsorted(seen.values, tail)
        fewest = np.minimum(seen.documents[first], seen.documents[last])
        for i in np.flatnonzero((fewest > 0) & (fewest <= limit)).tolist():
            contained[int(documents[i])] = names[int(seen.first[first[i]])]

    kinds: dict[int, tuple[str, str, float, int]] = {}  # kind, training document, similarity, unit to show
    for i in np.flatnonzero(shared)[::-1].tolist():
        number = int(ours.of[places[i]])
        name = names[int(needles[window].first[needle[i]])]
        share = float(leaked[number] / scored[number])
        kinds[number] = "windows_shared", name, share, int(places[i] - ours.starts[number])
    for number, name in contained.items():
        kinds[number] = "contained", name, 1.0, held[number].start
    for number, (similarity, name) in near.items():
        kinds[number] = "near", name, -similarity, held[number].start
    for number, name in exact.items():
        kinds[number] = "exact", name, 1.0, held[number].start
    whole = sorted(exact.keys() | near.keys() | contained.keys())
    leaked[whole] = scored[whole]

    largest = sorted(kinds, key=lambda number: (-leaked[number], held[number].name))[:EXAMPLES]
    examples = []
    for number in largest:
        kind, name, similarity, unit = kinds[number]
        line = " ".join(excerpt(number, unit).split())[:80]
        examples.append(Example(kind, held[number].name, name, round(similarity, 3), line))
    for group in sorted(groups)[: EXAMPLES // 2]:
        name = min(document.name for document in held if _group(document) == group)
        examples.append(Example("groups", name, groups[group], 1.0, group[:80]))
    count = [kind for kind, *_ in kinds.values()].count
    return Overlap(
        documents=len(held),
        of_documents=of_documents,
        units=int(scored.sum()),
        leaked_units=int(leaked.sum()),
        exact=count("exact"),
        near=count("near"),
        contained=count("contained"),
        window=window,
        windows=len(places),
        windows_shared=int(shared.sum()),
        boilerplate=int((times > limit).sum()),
        groups=len(groups),
        examples=tuple(examples),
    )


def _inside(places: np.ndarray, window: int, n_units: int) -> np.ndarray:
    """(n_units,) bool: the units inside a window that begins at one of the places."""
    edges = np.bincount(places, minlength=n_units + 1) - np.bincount(places + window, minlength=n_units + 1)
    return np.cumsum(edges)[:n_units] > 0


def _near(wanted: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """Pairs (i, j, similarity) of signatures that agree in a band and in at least `NEAR` of all places.

    Of a bucket, the signatures equal in one band, the first `BUCKET` are looked at: time stays linear where
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
    """A group for each document, in order, such that what would leak into each other is in one group.

    Together go documents of one group (or pieces of one file), exact and near duplicates, and two of which
    the shorter has `LINKED` of its runs of `WINDOW // 3` words in the other. The name is the least of the
    groups joined, so that the order of documents does not matter. Above `REGROUP_WINDOWS` runs, those whose
    hash ends in enough zeros are compared, the same ones in every document.
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
    """Pairs of documents that share `LINKED` of the windows of the one that has fewer."""
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
