"""python -m scraping dedup: find exact and near duplicates over all shards, in three steps.

    signature --shard i/n   clean part i -> its documents' MinHash bands and sketches
    bucket    --shard j/m   documents that agree in a band whose key belongs to shard j -> verified pairs
    cluster                 all pairs -> for each document with a duplicate, its cluster

Without `--step` all three run. Candidates come from bands of MinHash signatures (Broder 1997; banding as
in Lee et al. 2022, arXiv:2107.06499). Each is then verified by the Jaccard similarity of bottom-k sketches
(Bar-Yossef et al. 2002): exact for texts of fewer than SKETCH distinct shingles, with a standard error of at
most sqrt(0.25 / SKETCH) = 0.022 for longer ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np

from config import write_atomically
from data.shingles import Batch, Units, Words, bands, batches, mixed
from scraping.documents import ScrapedDocument, read_shard
from scraping.pool import each
from scraping.shards import alone, file_sha256, make_once, parse_shard, parts_of, read_record

PERMUTATIONS = 128
SKETCH = 512
BUCKET = 64  # up to this many texts of a bucket are compared pair by pair; further ones with these alone
MISSED = 1e-3  # largest share of the pairs at the threshold + 0.05 that no band finds
ROW_BITS = 32  # A document's id is (part << ROW_BITS) + row.
PAIRS = 2**12  # pairs that are verified at a time


@dataclass(frozen=True)
class DedupSettings:
    """Settings of the command dedup: what counts as a near duplicate.

    Args:
        folder: The corpus's folder: `folder/clean` is read, `folder/dedup` is written.
        threshold: Least Jaccard similarity of the shingles of two near duplicates.
        shingle: Units (words and punctuation marks) of a shingle.
        step: `all`, or one step, for a scheduler.
        shard: `i/n`, i from 0: for `signature` one of the n clean parts, for `bucket` any division.
        workers: Number of processes; 0 means one for each core.
    """

    folder: str = "corpus"
    threshold: float = 0.7
    shingle: int = 5
    step: Literal["all", "signature", "bucket", "cluster"] = "all"
    shard: str = ""
    workers: int = 0


def n_bands(threshold: float) -> int:
    """Return the fewest bands of PERMUTATIONS that miss at most MISSED of the pairs at `threshold` + 0.05."""
    for rows in range(PERMUTATIONS, 1, -1):
        count = PERMUTATIONS // rows
        if (1 - min(threshold + 0.05, 1.0) ** rows) ** count <= MISSED:
            return count
    return PERMUTATIONS


# --- signature ---------------------------------------------------------------------------------------


def signature(settings: DedupSettings, part: Path) -> None:
    """Write a clean part's bands, sketches and digests, one row a document in order, as `.npy` files."""
    folder = Path(settings.folder, "dedup", part.stem)
    inputs = {"clean": file_sha256(part), "threshold": settings.threshold, "shingle": settings.shingle}

    def write(folder: Path) -> dict[str, Any]:
        digests: list[bytes] = []
        keys, sketches, sizes = [], [], []
        for batch in batches(_units(read_shard(part), digests)):
            numbers, rows = batch.signatures(settings.shingle, settings.shingle, PERMUTATIONS)
            there = np.zeros((len(batch.documents), n_bands(settings.threshold)), np.uint64)
            there[numbers] = bands(rows, there.shape[1])
            sketch, size = _sketches(batch, settings.shingle)
            keys.append(there)
            sketches.append(sketch)
            sizes.append(size)
        width = n_bands(settings.threshold)
        np.save(folder / "bands.npy", np.concatenate([np.empty((0, width), np.uint64), *keys]))
        np.save(folder / "sketches.npy", np.concatenate([np.empty((0, SKETCH), np.uint32), *sketches]))
        np.save(folder / "sizes.npy", np.concatenate([np.empty(0, np.int32), *sizes]))
        np.save(folder / "digests.npy", np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32))
        return {"documents": len(digests)}

    make_once(folder, inputs, write)


def _units(documents: Iterable[ScrapedDocument], digests: list[bytes]) -> Iterator[Units]:
    words = Words()
    for document in documents:
        digests.append(sha256(document.text.encode()).digest())
        yield Units("", "", words.ids(document.text), 0)


def _sketches(batch: Batch, shingle: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each text's least distinct shingle hashes in order, (n, SKETCH) uint32, and their number, (n,).

    Unused places hold the largest number. A size of SKETCH means that the text may have more shingles.
    """
    places, hashes = batch.windows(shingle)
    of = batch.of[places]
    values = mixed(hashes) >> np.uint64(32)
    order = np.lexsort((values, of))
    of, values = of[order], values[order]
    first = np.ones(len(of), bool)
    first[1:] = (of[1:] != of[:-1]) | (values[1:] != values[:-1])
    of, values = of[first], values[first]
    starts = np.searchsorted(of, np.arange(len(batch.documents)))
    rank = np.arange(len(of)) - starts[of]
    keep = rank < SKETCH
    sketches = np.full((len(batch.documents), SKETCH), 2**32 - 1, np.uint32)
    sketches[of[keep], rank[keep]] = values[keep]
    return sketches, np.bincount(of[keep], minlength=len(batch.documents)).astype(np.int32)


def similarities(one: np.ndarray, sizes: np.ndarray, other: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the Jaccard similarities (n,) of pairs of sketches (n, SKETCH) with their sizes (n,).

    The estimate is the share of the union's SKETCH least hashes that both texts have; where both sketches
    hold all of their texts' shingles, it is the share of the whole union, which is exact.
    """
    both = np.sort(np.concatenate((one, other), 1), 1)
    twice = np.zeros(both.shape, bool)
    twice[:, 1:] = both[:, 1:] == both[:, :-1]
    rank = np.cumsum(~twice, 1)
    filled = np.arange(both.shape[1]) < (sizes + others)[:, None]
    union = (filled & ~twice).sum(1)
    whole = (sizes < SKETCH) & (others < SKETCH)
    limit = np.where(whole, union, np.minimum(union, SKETCH))
    shared = (twice & filled & (rank <= limit[:, None])).sum(1)
    return np.where(limit > 0, shared / np.maximum(limit, 1), 0.0)


# --- bucket ------------------------------------------------------------------------------------------


def bucket(settings: DedupSettings, shard: tuple[int, int]) -> None:
    """Write the verified pairs (a, b) of documents, a below b, whose keys belong to this shard."""
    number, shards = shard
    folder = Path(settings.folder, "dedup")
    parts = parts_of(Path(settings.folder, "clean"))
    inputs = {"parts": [_done(part, settings) for part in parts]}

    def write(folder: Path) -> dict[str, Any]:
        signed = [_Signed(folder.parent / part.stem) for part in parts]
        near = _near(signed, number, shards, settings.threshold)
        exact = _exact(signed, number, shards)
        np.save(folder / "near.npy", near)
        np.save(folder / "exact.npy", exact)
        return {"near": len(near), "exact": len(exact)}

    make_once(folder / f"pairs-{number:05}-of-{shards:05}", inputs, write)


class _Signed:
    """A part's signature files, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.bands = np.load(folder / "bands.npy", mmap_mode="r")
        self.sketches = np.load(folder / "sketches.npy", mmap_mode="r")
        self.sizes = np.load(folder / "sizes.npy", mmap_mode="r")
        self.digests = np.load(folder / "digests.npy", mmap_mode="r")


def _exact(signed: list[_Signed], number: int, shards: int) -> np.ndarray:
    """Return (n, 2) ids: each document whose text an earlier one has, with the first that has it."""
    digests, ids = [], []
    for part, files in enumerate(signed):
        heads = np.ascontiguousarray(files.digests[:, :8]).view("<u8").ravel()
        rows = np.flatnonzero(heads % np.uint64(shards) == number)
        digests.append(np.ascontiguousarray(files.digests[rows]).view("V32").ravel())
        ids.append((part << ROW_BITS) + rows)
    every, numbers = np.concatenate(digests), np.concatenate(ids)
    _, first, which = np.unique(every, return_index=True, return_inverse=True)
    earlier = numbers[first][which]
    again = earlier != numbers
    return np.stack((earlier[again], numbers[again]), 1).astype(np.int64)


def _near(signed: list[_Signed], number: int, shards: int, threshold: float) -> np.ndarray:
    """Return the pairs of documents, by id, whose similarity reaches the threshold, (pairs, 2) int64.

    Only documents that share a bucket are compared: a value of one of their bands.

    Args:
        number: The share of the buckets that is looked at, from 0, of `shards`.
    """
    keys, ids, texts = [], [], []
    for part, files in enumerate(signed):
        rows, columns = np.nonzero((files.bands % np.uint64(shards) == number) & (files.sizes[:, None] > 0))
        keys.append(files.bands[rows, columns])
        ids.append((part << ROW_BITS) + rows)
        # Equal texts share every bucket, so one of them is enough. 64 bits of a SHA-256 tell texts apart.
        texts.append(np.ascontiguousarray(files.digests[:, 8:16]).view("<u8").ravel()[rows])
    every = np.concatenate(keys) if keys else np.empty(0, np.uint64)
    numbers = np.concatenate(ids).astype(np.int64) if ids else np.empty(0, np.int64)
    text = np.concatenate(texts) if texts else np.empty(0, np.uint64)
    order = np.lexsort((numbers, text, every))
    every, numbers, text = every[order], numbers[order], text[order]
    different = np.ones(len(every), bool)
    different[1:] = (every[1:] != every[:-1]) | (text[1:] != text[:-1])
    every, numbers = every[different], numbers[different]
    found = [np.empty((0, 2), np.int64)]
    for step in range(1, BUCKET):
        same = np.flatnonzero(every[step:] == every[:-step])
        if not len(same):
            break
        found.append(np.stack((numbers[same], numbers[same + step]), 1))
    # In a large bucket, every text beyond the first BUCKET is compared with those alone.
    edges = np.flatnonzero(np.concatenate(([True], every[1:] != every[:-1], [True]))) if len(every) else []
    for large in np.flatnonzero(np.diff(edges) > BUCKET):
        rest = numbers[edges[large] + BUCKET : edges[large + 1]]
        for leader in numbers[edges[large] : edges[large] + BUCKET]:
            found.append(np.stack((np.full(len(rest), leader), rest), 1))
    pairs = np.unique(np.sort(np.concatenate(found), 1), axis=0)
    kept = [np.empty((0, 2), np.int64)]
    for start in range(0, len(pairs), PAIRS):
        some = pairs[start : start + PAIRS]
        one, other = (_rows(signed, some[:, side]) for side in (0, 1))
        kept.append(some[similarities(*one, *other) >= threshold])
    return np.concatenate(kept)


def _rows(signed: list[_Signed], ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sketches and sizes of documents by id."""
    sketches = np.empty((len(ids), SKETCH), np.uint32)
    sizes = np.empty(len(ids), np.int32)
    parts, rows = ids >> ROW_BITS, ids & (2**ROW_BITS - 1)
    for part in np.unique(parts):
        here = np.flatnonzero(parts == part)
        sketches[here], sizes[here] = signed[part].sketches[rows[here]], signed[part].sizes[rows[here]]
    return sketches, sizes


# --- cluster -----------------------------------------------------------------------------------------


def cluster(settings: DedupSettings) -> dict[str, int]:
    """Write, for each document with a duplicate, its cluster; return the counts.

    `clusters-PART.json` has the SHA-256 of the clean part and maps its rows to [cluster, twin]. The cluster
    is the least name in it. The twin is the least name of the documents with the same text, or "" where that
    is the document itself.
    """
    folder = Path(settings.folder, "dedup")
    parts = parts_of(Path(settings.folder, "clean"))
    pairs = parts_of(folder, "pairs", "")
    signed = [_done(part, settings) for part in parts]
    for pair in pairs:
        if read_record(pair / "done.json", "inputs")["inputs"]["parts"] != signed:
            raise ValueError(f"{pair} was made of other signatures: run --step bucket again")
    near = np.concatenate([np.load(pair / "near.npy") for pair in pairs])
    exact = np.concatenate([np.load(pair / "exact.npy") for pair in pairs])
    names = _names(parts, {int(i) for i in (*near.ravel(), *exact.ravel())})
    twins = _least(_joined(exact), names)
    clusters = _least(_joined(np.concatenate((near, exact))), names)
    for number, part in enumerate(parts):
        rows = {
            i & (2**ROW_BITS - 1): [least, twins.get(i, "") if twins.get(i) != names[i] else ""]
            for i, least in sorted(clusters.items())
            if i >> ROW_BITS == number
        }
        record = {"clean": signed[number]["clean"], "rows": rows}
        write_atomically(folder / f"clusters-{part.stem}.json", json.dumps(record, ensure_ascii=False))
    counts = {
        "documents in clusters": len(clusters),
        "clusters": len(set(clusters.values())),
        "exact duplicates": sum(twins[i] != names[i] for i in twins),
    }
    record = {
        "settings": {"threshold": settings.threshold, "shingle": settings.shingle},
        "counts": counts,
    }
    write_atomically(folder / "clusters.json", json.dumps(record, indent=1))
    return counts


def _joined(pairs: np.ndarray) -> dict[int, int]:
    """Map each document of a pair to a root, the same one for all that pairs connect."""
    parents: dict[int, int] = {}

    def root(i: int) -> int:
        parents.setdefault(i, i)
        while parents[i] != i:
            parents[i] = i = parents[parents[i]]
        return i

    for one, other in pairs.tolist():
        parents[root(one)] = root(other)
    return {i: root(i) for i in list(parents)}


def _least(roots: dict[int, int], names: dict[int, str]) -> dict[int, str]:
    """Map each document to the least name among those of its root."""
    least: dict[int, str] = {}
    for i, root in roots.items():
        least[root] = min(names[i], least.get(root, names[i]))
    return {i: least[root] for i, root in roots.items()}


def _names(parts: list[Path], wanted: set[int]) -> dict[int, str]:
    import pyarrow.parquet as pq

    names = {}
    for number, part in enumerate(parts):
        row = number << ROW_BITS
        with pq.ParquetFile(part) as file:
            for batch in file.iter_batches(batch_size=4096, columns=["repository", "path"]):
                columns = (column.to_pylist() for column in batch.columns)
                for repository, path in zip(*columns, strict=True):
                    if row in wanted:
                        names[row] = f"{repository}/{path}"
                    row += 1
    return names


# --- the command -------------------------------------------------------------------------------------


def _done(part: Path, settings: DedupSettings) -> dict[str, Any]:
    """Return the record of a part's signatures.

    Raises:
        ValueError: there are no signatures, or they are of other text or settings.
    """
    folder = Path(settings.folder, "dedup", part.stem)
    try:
        record = read_record(folder / "done.json", "inputs")
    except FileNotFoundError:
        number, shards = folder.name.removeprefix("part-").split("-of-")
        raise ValueError(
            f"{folder} is not there: run dedup --step signature --shard {int(number)}/{int(shards)} first"
        ) from None
    for key in ("threshold", "shingle"):
        if record["inputs"][key] != getattr(settings, key):
            raise ValueError(
                f"{folder} was made with --{key} {record['inputs'][key]}, and this is "
                f"{getattr(settings, key)}: run --step signature again, or set it back"
            )
    if record["inputs"]["clean"] != file_sha256(part):
        raise ValueError(f"{part} changed since {folder} was made: run --step signature again")
    return record["inputs"]


def run(settings: DedupSettings) -> None:
    """Run the requested steps; raise a ValueError for settings that mean nothing."""
    if not 0 < settings.threshold <= 1:
        raise ValueError(f"--threshold is {settings.threshold}; it must be above 0 and at most 1")
    if settings.shingle < 1:
        raise ValueError(f"--shingle is {settings.shingle}; it must be at least 1")
    parts = parts_of(Path(settings.folder, "clean"))
    takes_shard = settings.step in ("signature", "bucket")
    if settings.shard and not takes_shard:
        raise ValueError(f"--shard {settings.shard} is for --step signature and bucket; leave it out")
    number, shards = parse_shard(settings.shard or "0/1")
    if settings.step == "signature" and shards != len(parts):
        raise ValueError(f"--shard {settings.shard} is of {shards}, and clean made {len(parts)} parts")
    if not any(True for part in parts for _ in read_shard(part)):
        raise ValueError(f"{parts[0].parent} holds no document, as clean said: run clean again first")
    if settings.step == "signature":
        return signature(settings, parts[number])
    if settings.step == "bucket":
        return bucket(settings, (number, shards))
    if settings.step == "all":
        each(partial(signature, settings), parts, settings.workers)
        bucket(settings, (0, 1))
    with alone(Path(settings.folder, "dedup", "clusters.json")):
        counts = cluster(settings)
    print("; ".join(f"{count:,} {name}" for name, count in counts.items()))
    return None
