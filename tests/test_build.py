"""scraping/build.py and what it is made of: selection, benchmarks, word counts, card, fingerprint."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from config import DataConfig
from config.markdown import plain
from data.corpus import read_documents, split_documents
from data.documents import Report
from scraping import frequencies
from scraping.build import BuildSettings, build_part, fingerprint, finish, run
from scraping.card import _size
from scraping.counts import lines
from scraping.decontaminate import Benchmarks
from scraping.dedup import DedupSettings, bucket, cluster, signature
from scraping.documents import Drop, ScrapedDocument, read_shard, shard_path, write_shard
from scraping.frequencies import Frequencies
from scraping.shards import parts_of

TASK = "def has_close_elements(numbers, threshold):\n    for i, a in enumerate(numbers):\n" + "".join(
    f"        if a - numbers[{i}] < threshold * {i}: return True\n" for i in range(4)
)


def code(seed: int, length: int = 40) -> str:
    rng = random.Random(seed)
    return "\n".join(f"v{rng.getrandbits(30)} = f({rng.randrange(99)})" for _ in range(length)) + "\n"


def cleaned(folder: Path, documents: list[ScrapedDocument], parts: int = 1) -> BuildSettings:
    """Clean parts with their records, deduplicated, as the commands before `build` leave them."""
    (folder / "clean").mkdir(parents=True)
    for number in range(parts):
        path = shard_path(folder / "clean", number, parts)
        count = write_shard(path, documents[number::parts])
        record = {
            "settings": {"skip": []},
            "not stored": {"other extension": 4, "too large": number},
            "stages": {"encoding": 1, "syntax": 2},
            "input": {"files": count + 3},
            "dropped": {"encoding": {"binary": {"files": 2}}, "syntax": {"python 2": {"files": 1}}},
        }
        path.with_suffix(".json").write_text(json.dumps(record))
    settings = DedupSettings(folder=str(folder))
    for part in parts_of(folder / "clean"):
        signature(settings, part)
    bucket(settings, (0, 1))
    cluster(settings)
    return BuildSettings(folder=str(folder))


def built(settings: BuildSettings) -> tuple[dict, list[ScrapedDocument]]:
    folder = Path(settings.folder)
    for part in parts_of(folder / "clean"):
        build_part(settings, part)
    corpus = finish(settings)
    return corpus, [d for part in corpus["parts"] for d in read_shard(folder / "corpus" / part["file"])]


def documents() -> list[ScrapedDocument]:
    texts = [code(i) for i in range(20)]
    texts += [texts[3], texts[5] + "one_more = 1\n", texts[5].replace("f(", "f( "), "é = 1\n"]
    return [ScrapedDocument(text, f"o/r{i % 4}", f"{i:02}.py", "c", "MIT") for i, text in enumerate(texts)]


def test_every_document_is_kept_or_dropped_with_a_reason(tmp_path: Path) -> None:
    corpus, kept = built(cleaned(tmp_path, documents(), 3))
    select = corpus["stages"][-1]
    # Of texts 3 and 20 the least name stays; 5, 21 and 22 are a cluster, 22 with another layout only.
    assert select == {
        "stage": "select", "in": 24, "out": 21, "dropped": {"exact duplicate": 1, "near duplicate": 2},
    }  # fmt: skip
    assert [s["in"] - s["out"] - sum(s["dropped"].values()) for s in corpus["stages"]] == [0] * 4
    assert corpus["stages"][0] == {
        "stage": "fetch", "in": 48, "out": 24 + 9, "dropped": {"other extension": 12, "too large": 3},
    }  # fmt: skip
    assert len(kept) == corpus["documents"] == 21
    assert all(document.cluster == document.name for document in kept)
    assert corpus["bytes"] == sum(len(document.text.encode()) for document in kept)
    rows = []
    for path in (tmp_path / "corpus" / "records").glob("*.dropped.jsonl.gz"):
        with gzip.open(path) as file:
            rows += [json.loads(line) for line in file]
    gone = {document.name for document in documents()} - {document.name for document in kept}
    assert {row["name"] for row in rows} == gone
    for row in rows:
        assert row["evidence"].split()[-1] in {document.name for document in kept}
    assert lines(corpus["stages"], "")[0].split() == ["48", "files", "were", "found"]


def test_near_duplicates_may_stay_and_share_a_cluster(tmp_path: Path) -> None:
    settings = cleaned(tmp_path, documents())
    _, kept = built(replace(settings, near="keep"))
    shared = [document.name for document in kept if document.cluster != document.name]
    clusters = Counter(document.cluster for document in kept)
    assert len(kept) == 23 and max(clusters.values()) == 3 and len(shared) == 2


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_the_fingerprint_does_not_depend_on_the_division_and_tells_every_change(
    tmp_path: Path, form: Literal["parquet", "jsonl"]
) -> None:
    def printed(name: str, documents: list[ScrapedDocument], parts: int = 1) -> str:
        settings = replace(cleaned(tmp_path / name, documents, parts), form=form)
        for part in parts_of(tmp_path / name / "clean"):
            build_part(settings, part)
        ending = ".parquet" if form == "parquet" else ".jsonl.gz"
        return fingerprint(parts_of(tmp_path / name / "corpus" / "data", ending=ending))

    prints = {printed("one", documents()), printed("three", documents(), 3)}
    assert len(prints) == 1
    first, *rest = documents()
    for number, other in enumerate(
        (ScrapedDocument("x = 1\n", first.repository, first.path, "c", "MIT"),
         ScrapedDocument(first.text, first.repository, "moved.py", "c", "MIT"),
         ScrapedDocument(first.text, first.repository, first.path, "d", "MIT"),
         ScrapedDocument(first.text, first.repository, first.path, "c", "ISC"))
    ):  # fmt: skip
        prints.add(printed(f"other{number}", [other, *rest]))
    assert len(prints) == 5


def test_a_part_is_made_again_only_if_what_it_is_made_of_changed(tmp_path: Path) -> None:
    settings = cleaned(tmp_path, documents())
    built(settings)
    output = tmp_path / "corpus" / "data" / "part-00000-of-00001.parquet"
    before = output.stat().st_ino
    built(settings)
    assert output.stat().st_ino == before
    output.write_bytes(output.read_bytes()[:-1])  # damaged
    built(settings)
    assert output.stat().st_ino != before
    (bench := tmp_path / "b.jsonl").write_text(json.dumps({"code": documents()[7].text}))
    corpus, _ = built(replace(settings, benchmarks=(str(bench),)))
    assert corpus["stages"][-1]["dropped"]["benchmark"] == 1


def test_clusters_of_another_part_are_refused(tmp_path: Path) -> None:
    settings = cleaned(tmp_path, documents())
    write_shard(shard_path(tmp_path / "clean", 0, 1), documents()[::-1])
    with pytest.raises(ValueError, match=r"part-00000-of-00001\.parquet changed since .* run dedup again"):
        build_part(settings, parts_of(tmp_path / "clean")[0])


def test_parts_of_two_forms_are_not_described_as_one_corpus(tmp_path: Path) -> None:
    settings = cleaned(tmp_path, documents())
    built(settings)
    other = replace(settings, form="jsonl")
    build_part(other, parts_of(tmp_path / "clean")[0])
    with pytest.raises(ValueError, match=r"holds part-00000-of-00001\.parquet of --form parquet too"):
        finish(other)


def test_a_benchmark_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    settings = replace(cleaned(tmp_path, documents()), benchmarks=(str(tmp_path / "none.jsonl"),))
    with pytest.raises(ValueError, match=r"none\.jsonl cannot be read"):
        run(settings)
    assert not (tmp_path / "corpus").exists()


def test_finish_refuses_parts_of_something_else(tmp_path: Path) -> None:
    settings = cleaned(tmp_path, documents())
    built(settings)
    write_shard(shard_path(tmp_path / "clean", 0, 1), documents()[:5])
    with pytest.raises(ValueError, match=r"is not what .* would give: run build again"):
        finish(settings)


@pytest.mark.parametrize(
    "name",
    ["clean/part-00000-of-00001.json", "dedup/clusters.json", "dedup/clusters-part-00000-of-00001.json"],
)
@pytest.mark.parametrize("content", ["{", "[1]", "{}"])
def test_a_damaged_record_is_named(tmp_path: Path, name: str, content: str) -> None:
    settings = cleaned(tmp_path, documents())
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged: remove it, and run again"):
        built(settings)


def test_parts_that_were_cleaned_differently_are_no_corpus(tmp_path: Path) -> None:
    settings = cleaned(tmp_path, documents(), 3)
    path = shard_path(tmp_path / "clean", 2, 3).with_suffix(".json")
    for key, value in (("settings", {"skip": ["syntax"]}), ("stages", {"encoding": 1, "syntax": 3})):
        whole = path.read_text()
        path.write_text(json.dumps(json.loads(whole) | {key: value}))
        with pytest.raises(ValueError, match=r"part-00002.* was cleaned by other settings or versions than"):
            built(settings)
        path.write_text(whole)
    assert built(settings)[0]["versions"] == {"encoding": 1, "syntax": 2, "select": 1}


def test_build_before_dedup_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "clean").mkdir()
    write_shard(shard_path(tmp_path / "clean", 0, 1), documents())
    with pytest.raises(ValueError, match=r"clusters-part-00000-of-00001\.json is not there: run dedup first"):
        run(BuildSettings(folder=str(tmp_path), shard="0/1"))


def test_the_card_shows_the_counts_and_runs_nothing(tmp_path: Path) -> None:
    strange = [ScrapedDocument("x = 1\n", "o/r", "a.py", "c", "<script>|`MIT`\n[x](y)")]
    settings = cleaned(tmp_path, documents() + strange)
    corpus, _ = built(BuildSettings(folder=settings.folder, title="<b>Mine</b>"))
    card = (tmp_path / "corpus" / "README.md").read_text()
    assert card.startswith("---\nconfigs:\n") and corpus["fingerprint"] in card
    assert "<script" not in card and "<b>" not in card and "[x]" not in card
    assert "| select | 25 | 22 | exact duplicate: 1; near duplicate: 2 |" in card
    for name in ("sizes", "licences", "reasons", "words"):
        assert (tmp_path / "corpus" / "pictures" / f"{name}.png").read_bytes()[1:4] == b"PNG"
        assert f"(pictures/{name}.png)" in card


def test_sizes_and_strangers_texts() -> None:
    assert [_size(n.bit_length()) for n in (0, 1, 5, 1024, 3000)] == [
        "0 B", "1 to 2 B", "4 to 8 B", "1 to 2 KiB", "2 to 4 KiB",
    ]  # fmt: skip
    assert plain("a|b<c>`") == "a&#124;b&#60;c&#62;&#96;"


# --- benchmarks --------------------------------------------------------------------------------------


@pytest.fixture
def benchmarks(tmp_path: Path) -> Benchmarks:
    rows = [
        {"task_id": "T/0", "prompt": TASK, "n": 3},
        {"task_id": "T/1", "code": code(1, 10), "test_list": []},
    ]
    path = tmp_path / "bench.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return Benchmarks([str(path)])


@pytest.mark.parametrize(
    "text",
    [
        TASK,
        code(8) + TASK + code(9),
        "class A:\n" + "".join(f"    {line}\n" for line in TASK.splitlines()),
        TASK.replace("\n", "\r\n\r\n"),
        TASK.replace("True", "False", 1),
    ],
)
def test_examples_are_found_whole_inside_indented_and_nearly_equal(benchmarks: Benchmarks, text: str) -> None:
    drop = benchmarks.found_in(ScrapedDocument(text, "r", "p", "c", ""))
    assert isinstance(drop, Drop) and drop.reason == "benchmark"
    assert drop.evidence.endswith("bench.jsonl.gz line 1 prompt")


def test_parts_of_an_example_and_other_code_are_not_it(benchmarks: Benchmarks) -> None:
    half = TASK[: len(TASK) // 2]
    assert benchmarks.pieces == 2 and benchmarks.too_short == 3
    for text in ("", "x", half, code(1, 5), code(77)):
        assert benchmarks.found_in(ScrapedDocument(text, "r", "p", "c", "")) is None


def test_half_of_two_examples_is_none_of_them(tmp_path: Path) -> None:
    """Shares are of one piece's own runs, and a run that two pieces hold counts for both."""
    one, other = code(1), code(2)
    path = tmp_path / "b.jsonl"
    path.write_text(json.dumps({"a": one, "b": one + other}) + "\n")
    found = Benchmarks([str(path)])
    assert found.found_in(ScrapedDocument(one, "r", "p", "c", "")) == Drop(
        "benchmark", "100% of b.jsonl line 1 a"
    )
    assert found.found_in(ScrapedDocument(other, "r", "p", "c", "")) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "{",
            r"b\.jsonl line 1 is not JSON at column 2: Expecting property name [^;]* quotes; write the row",
        ),
        ("\udcff", r"b\.jsonl line 1 is not UTF-8: byte 0 cannot be read"),
        ("[1]", "line 1 is a JSON list, not an object"),
        ('{"a": "x", "a": "y"}', r"b\.jsonl line 1 has two readings: the key 'a' stands twice in it"),
        ('{"a": "short"}', "holds no text of 26 words and marks"),
        (None, "cannot be read"),
    ],
)
def test_a_benchmark_file_that_is_none_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "b.jsonl"
    if content is not None:
        path.write_text(content, "utf-8", "surrogateescape")
    with pytest.raises(ValueError, match=message):
        Benchmarks([str(path)])


# --- word counts -------------------------------------------------------------------------------------


def words(seed: int) -> list[str]:
    rng = random.Random(seed)
    return [f"w{int(rng.paretovariate(0.6))}" for _ in range(6000)]


def counted(lists: list[list[str]]) -> Frequencies:
    found = Frequencies()
    for some in lists:
        for start in range(0, len(some), 500):
            found.add(" ".join(some[start : start + 500]))
    return found


def test_counts_below_the_limit_are_exact() -> None:
    true = Counter(words(1))
    curve = counted([words(1)]).curve()
    assert curve["1"] == sum(n == 1 for n in true.values())
    assert curve["3 to 10"] == sum(3 <= n <= 10 for n in true.values())
    assert sum(curve.values()) == len(true)


def test_shards_merge_to_what_one_would_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (10**6, 100):
        monkeypatch.setattr(frequencies, "WORDS", limit)
        whole = counted([words(1), words(2), words(3)])
        merged = Frequencies()
        for seed in (1, 2, 3):
            merged.merge(Frequencies.from_dict(json.loads(json.dumps(counted([words(seed)]).to_dict()))))
        assert merged.curve() == whole.curve()
        assert merged.total == whole.total == 18000


def test_above_the_limit_counts_are_near_and_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    true = Counter(words(1) + words(2))
    monkeypatch.setattr(frequencies, "WORDS", 300)
    found = counted([words(1), words(2)])
    assert len(found._counts) <= 300 < len(true)
    assert sum(found.curve().values()) == pytest.approx(len(true), rel=0.25)


# --- what training reads -----------------------------------------------------------------------------


def test_training_reads_what_was_built_by_cluster_or_by_repository(tmp_path: Path) -> None:
    corpus, kept = built(cleaned(tmp_path, documents(), 3))
    config = DataConfig(source=str(tmp_path / "corpus"))
    report = Report()
    read = list(read_documents(config, report))
    assert report.corpus == corpus["fingerprint"]
    assert [(d.name, d.group, d.text) for d in read] == [(d.name, d.cluster, d.text) for d in kept]
    by_repository = read_documents(replace(config, group_field="repository"))
    assert [d.group for d in by_repository] == [d.repository for d in kept]


def test_a_cluster_stands_on_one_side_of_the_split(tmp_path: Path) -> None:
    near = [ScrapedDocument(code(1) + f"n = {i}\n", "o/r", f"n{i}.py", "c", "MIT") for i in range(12)]
    far = [ScrapedDocument(code(100 + i), "o/r", f"f{i}.py", "c", "MIT") for i in range(30)]
    built(replace(cleaned(tmp_path, near + far), near="keep"))
    splits = {}
    for split, document in split_documents(DataConfig(source=str(tmp_path / "corpus"), validation_one_in=3)):
        splits.setdefault(document.name.startswith("o/r/n"), set()).add(split)
    assert len(splits[True]) == 1 and len(splits[False]) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["parts"][0].update(sha256="0" * 64), r"has the SHA-256 .*, and .* says 0000"),
        (
            lambda c: c["parts"][0].update(file="../clean/part-00000-of-00001.parquet"),
            "lies outside of its folder",
        ),
        (lambda c: c["parts"][0].update(file="data/none.parquet"), "cannot be read: No such file"),
        (lambda c: c.pop("parts"), "does not describe a corpus"),
    ],
)
def test_a_corpus_that_is_not_what_it_says_is_refused(tmp_path: Path, change, message: str) -> None:
    built(cleaned(tmp_path, documents()))
    path = tmp_path / "corpus" / "corpus.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        list(read_documents(DataConfig(source=str(tmp_path / "corpus"))))
