"""scraping/dedup.py: planted duplicates are found, what is less alike is not, and shards change nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from data.shingles import Batch, Units, Words, bands
from scraping import dedup
from scraping.dedup import SKETCH, DedupSettings, bucket, cluster, n_bands, run, signature, similarities
from scraping.documents import ScrapedDocument, shard_path, write_shard
from scraping.shards import parts_of

SHINGLE = 5


def shingles_of(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


def jaccard(one: str, other: str) -> float:
    a, b = shingles_of(one), shingles_of(other)
    return len(a & b) / len(a | b)


def planted(rng: random.Random, similarity: float, length: int) -> tuple[str, str]:
    """A text, and one whose shingles are about so similar: changed in one stretch, so that few are lost."""
    words = [f"w{rng.getrandbits(40)}" for _ in range(length)]
    changed = round(length * (1 - similarity) / (1 + similarity))
    start = rng.randrange(length - changed)
    other = [*words]
    other[start : start + changed] = [f"w{rng.getrandbits(40)}" for _ in range(changed)]
    return " ".join(words), " ".join(other)


def corpus_of(folder: Path, texts: list[str], parts: int) -> dict[str, str]:
    """Write the texts as clean parts, dealt out in turn; name -> text."""
    (folder / "clean").mkdir(parents=True)
    documents = [ScrapedDocument(text, f"r{i % 7}", f"{i:05}.py", "c", "MIT") for i, text in enumerate(texts)]
    for part in range(parts):
        write_shard(shard_path(folder / "clean", part, parts), documents[part::parts])
    return {document.name: document.text for document in documents}


def deduplicated(folder: Path, **settings) -> None:
    """All steps, in this process."""
    made = DedupSettings(folder=str(folder), **settings)
    for part in parts_of(folder / "clean"):
        signature(made, part)
    bucket(made, (0, 1))
    cluster(made)


def clusters_of(folder: Path) -> dict[str, tuple[str, str]]:
    """Name -> (cluster, twin) of all documents with a duplicate."""
    from scraping.documents import read_shard

    found = {}
    for part in parts_of(folder / "clean"):
        rows = json.loads((folder / "dedup" / f"clusters-{part.stem}.json").read_text())
        documents = list(read_shard(part))
        found |= {documents[int(row)].name: tuple(values) for row, values in rows["rows"].items()}
    return found


def found_pairs(folder: Path, names: list[str]) -> set[tuple[str, str]]:
    clusters = clusters_of(folder)
    pairs = zip(names[::2], names[1::2], strict=True)
    return {(a, b) for a, b in pairs if a in clusters and clusters[a][0] == clusters.get(b, ("",))[0]}


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_planted_pairs_are_found_above_the_threshold_and_not_below(tmp_path: Path, threshold: float) -> None:
    rng = random.Random(3)
    pairs = [planted(rng, rng.uniform(0.5, 0.95), rng.randint(40, 900)) for _ in range(250)]
    names = list(corpus_of(tmp_path, [text for pair in pairs for text in pair], 3))
    deduplicated(tmp_path, threshold=threshold)
    found = found_pairs(tmp_path, names)
    truth = {
        pair: jaccard(*texts)
        for pair, texts in zip(zip(names[::2], names[1::2], strict=True), pairs, strict=True)
    }
    above = {pair for pair, similarity in truth.items() if similarity >= threshold + 0.05}
    below = {pair for pair, similarity in truth.items() if similarity < threshold - 0.05}
    assert len(above) > 30 and len(below) > 30
    assert len(above & found) >= 0.98 * len(above)
    assert len(found - below) >= 0.98 * len(found)


def test_equal_texts_and_their_least_names(tmp_path: Path) -> None:
    texts = ["short"] * 3 + ["other"] + [" ".join(map(str, range(100)))] * 2
    texts += [" ".join(map(str, [*range(99), "x"])), ""]
    names = list(corpus_of(tmp_path, texts, 2))
    deduplicated(tmp_path)
    short, alike = min(names[:3]), min(names[4:7])
    least = min(names[4:6])
    assert clusters_of(tmp_path) == {
        **{name: (short, "" if name == short else short) for name in names[:3]},
        **{name: (alike, "" if name == least else least) for name in names[4:6]},
        names[6]: (alike, ""),
    }


def test_shards_of_documents_and_of_buckets_change_nothing(tmp_path: Path) -> None:
    rng = random.Random(5)
    texts = [text for _ in range(60) for text in planted(rng, 0.9, 80)] + ["same text of five words"] * 5
    whole, divided = tmp_path / "whole", tmp_path / "divided"
    for folder, parts in ((whole, 1), (divided, 4)):
        corpus_of(folder, texts, parts)
    run(DedupSettings(folder=str(whole), workers=1))
    for number in range(4):
        run(DedupSettings(folder=str(divided), step="signature", shard=f"{number}/4"))
    for number in range(3):
        run(DedupSettings(folder=str(divided), step="bucket", shard=f"{number}/3"))
    run(DedupSettings(folder=str(divided), step="cluster"))
    assert len(clusters_of(whole)) > 100
    assert clusters_of(divided) == clusters_of(whole)


def test_many_variants_are_one_cluster_without_comparing_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedup, "BUCKET", 16)
    words = [f"w{i}" for i in range(60)]
    texts = [" ".join([*words, f"x{i}"]) for i in range(600)]
    names = list(corpus_of(tmp_path, texts, 1))
    deduplicated(tmp_path)
    assert {values[0] for values in clusters_of(tmp_path).values()} == {min(names)}
    assert len(clusters_of(tmp_path)) == 600
    pairs = np.load(parts_of(tmp_path / "dedup", "pairs", "")[0] / "near.npy")
    assert len(pairs) < 600 * 599 / 4


def test_similarities_of_whole_sketches_are_exact(tmp_path: Path) -> None:
    rng, words = random.Random(7), Words()
    pairs = [planted(rng, rng.uniform(0.1, 0.95), rng.randint(6, 250)) for _ in range(200)]
    pairs += [("a b c d e f", "a b c d e f"), ("a b c d e f", "g h i j k l")]
    sides = []
    for side in zip(*pairs, strict=True):
        batch = Batch([Units("", "", words.ids(text), 0) for text in side])
        sides.append(dedup._sketches(batch, SHINGLE))
    assert all((sizes < SKETCH).all() for _, sizes in sides)
    np.testing.assert_allclose(similarities(*sides[0], *sides[1]), [jaccard(*pair) for pair in pairs])


def test_similarities_of_cut_sketches_are_within_three_standard_errors() -> None:
    rng, words = random.Random(9), Words()
    pairs = [planted(rng, rng.uniform(0.5, 0.95), 3000) for _ in range(60)]
    sides = []
    for side in zip(*pairs, strict=True):
        sides.append(dedup._sketches(Batch([Units("", "", words.ids(text), 0) for text in side]), SHINGLE))
    errors = similarities(*sides[0], *sides[1]) - [jaccard(*pair) for pair in pairs]
    assert abs(errors).max() < 3.5 * 0.5 / SKETCH**0.5
    assert abs(errors.mean()) < 0.01


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_nearly_all_pairs_just_above_the_threshold(threshold: float) -> None:
    count = n_bands(threshold)
    rows = dedup.PERMUTATIONS // count
    at = min(threshold + 0.05, 1.0)
    assert (1 - at**rows) ** count <= dedup.MISSED
    assert threshold > 0.9 or count > 1


def test_bands_are_equal_where_all_rows_of_one_are() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    one = rng.integers(0, 2**32, (1, 128), np.uint32)
    other = one.copy()
    other[0, 5] += 1  # one row of the first band of 8
    same = bands(one, 16) == bands(other, 16)
    assert same.tolist() == [[False] + [True] * 15]


def test_a_finished_part_is_not_made_again_and_a_changed_one_is(tmp_path: Path) -> None:
    corpus_of(tmp_path, ["a b c d e f g"] * 2, 1)
    settings = DedupSettings(folder=str(tmp_path))
    (part,) = parts_of(tmp_path / "clean")
    signature(settings, part)
    made = tmp_path / "dedup" / part.stem
    before = made.stat().st_ino
    signature(settings, part)
    assert made.stat().st_ino == before
    write_shard(part, [ScrapedDocument("x y z u v w", "r", "p", "c", "MIT")])
    signature(settings, part)
    assert json.loads((made / "done.json").read_text())["documents"] == 1
    assert [path.name for path in (tmp_path / "dedup").iterdir()] == [part.stem]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.5}, r"--threshold is 1\.5; it must be above 0 and at most 1"),
        ({"shingle": 0}, "--shingle is 0; it must be at least 1"),
        ({"step": "signature", "shard": "0/9"}, "--shard 0/9 is of 9, and clean made 1 parts"),
        ({"step": "bucket", "shard": "4/4"}, "--shard is '4/4'; it must be i/n"),
        ({"step": "cluster", "shard": "0/1"}, "--shard 0/1 is for --step signature and bucket"),
        ({"step": "bucket"}, "run dedup --step signature --shard 0/1 first"),
        ({"step": "cluster"}, "holds no pairs: run the step before this one first"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, settings: dict, message: str) -> None:
    corpus_of(tmp_path, ["a b c d e f g"], 1)
    with pytest.raises(ValueError, match=message):
        run(DedupSettings(folder=str(tmp_path), **settings))


def test_a_clean_folder_without_a_document_is_refused(tmp_path: Path) -> None:
    """Dedup is refused where clean kept nothing, as after a clean that said so."""
    corpus_of(tmp_path, [], 2)
    with pytest.raises(ValueError, match="clean holds no document, as clean said"):
        run(DedupSettings(folder=str(tmp_path)))


def test_signatures_of_other_settings_are_refused(tmp_path: Path) -> None:
    corpus_of(tmp_path, ["a b c d e f g"], 1)
    (part,) = parts_of(tmp_path / "clean")
    signature(DedupSettings(folder=str(tmp_path), threshold=0.8), part)
    with pytest.raises(ValueError, match=r"was made with --threshold 0\.8, and this is 0\.7"):
        bucket(DedupSettings(folder=str(tmp_path)), (0, 1))


def test_steps_on_what_changed_meanwhile_are_refused(tmp_path: Path) -> None:
    """Documents are known by their rows: those of another part would be other documents."""
    corpus_of(tmp_path, ["a b c d e f g"] * 3, 1)
    deduplicated(tmp_path)
    settings, (part,) = DedupSettings(folder=str(tmp_path)), parts_of(tmp_path / "clean")
    write_shard(part, [ScrapedDocument("x y z u v w", "r", "p", "c", "MIT")])
    for step in (lambda: bucket(settings, (0, 1)), lambda: cluster(settings)):
        with pytest.raises(ValueError, match=r"parquet changed since .* run --step signature again"):
            step()
    signature(settings, part)
    with pytest.raises(ValueError, match=r"pairs-.* was made of other signatures: run --step bucket again"):
        cluster(settings)
    bucket(settings, (0, 1))
    cluster(settings)
    assert clusters_of(tmp_path) == {}


def test_missing_and_mixed_parts_are_named(tmp_path: Path) -> None:
    corpus_of(tmp_path, ["a", "b", "c"], 3)
    shard_path(tmp_path / "clean", 1, 3).unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 3 parts, part-00001-of-00003\.parquet first"):
        run(DedupSettings(folder=str(tmp_path)))
    write_shard(shard_path(tmp_path / "clean", 0, 2), [])
    with pytest.raises(ValueError, match="holds parts of 2 and of 3"):
        cluster(DedupSettings(folder=str(tmp_path)))


def test_texts_far_apart_in_a_large_bucket_are_compared_with_its_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bucket for all: between two variants stand more strangers than are compared side by side."""
    monkeypatch.setattr(dedup, "BUCKET", 3)
    monkeypatch.setattr(dedup, "bands", lambda signatures, n: np.full((len(signatures), n), 7, np.uint64))
    rng, words = random.Random(1), [f"w{i}" for i in range(60)]
    variants = [" ".join([*words, f"x{i}"]) for i in range(60)]
    strangers = [" ".join(f"s{rng.getrandbits(40)}" for _ in range(60)) for _ in range(25)]
    names = list(corpus_of(tmp_path, variants + strangers, 1))
    deduplicated(tmp_path)
    monkeypatch.undo()
    first = min(names[:60])
    assert {name: values[0] for name, values in clusters_of(tmp_path).items()} == dict.fromkeys(
        names[:60], first
    )


def test_copies_of_one_text_are_not_compared_with_each_other(tmp_path: Path) -> None:
    corpus_of(tmp_path, ["one text that is there many times over"] * 50, 2)
    deduplicated(tmp_path)
    (pairs,) = parts_of(tmp_path / "dedup", "pairs", "")
    assert len(np.load(pairs / "near.npy")) == 0 and len(np.load(pairs / "exact.npy")) == 49
    assert len(clusters_of(tmp_path)) == 50
