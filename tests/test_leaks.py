"""The measure of leaks: real faults planted beside their healthy twins, and exactness against slow counts."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import astuple, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import Bytes as StrictBytes

from config.files import REPOSITORY
from data import leaks, shingles, store_leaks
from data.corpus import split_of
from data.documents import Document
from data.leaks import LEAKED_LIMIT, NEAR, Overlap, overlap, regroup
from data.store_leaks import store_overlap
from data.tokenstore import TokenStore, build_store, open_store

WORDS = [
    a + b for a in ("ba", "ce", "di", "fo", "gu", "ha", "je", "ki") for b in ("nar", "pes", "tik", "vol")
]


class Bytes(StrictBytes):
    """Bytes of which a part can be decoded: an excerpt may end inside a character."""

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", "replace")


def line(rng: random.Random) -> str:
    a, b, c, d = rng.choices(WORDS, k=4)
    return rng.choice((f"{a} = {b}.{c}({d})", f"if {a} > {b}[{c}]:", f"return {a} + {b} * {c} - {d}"))


def source(rng: random.Random, lines: int = 60) -> str:
    """Code that no other call returns, below an import block that every one has."""
    header = "# Copyright the authors. Licensed under the terms of the licence.\nimport os\nimport sys\n\n"
    return header + "".join(line(rng) + "\n" for _ in range(lines))


def files(number: int, seed: int = 0, lines: int = 60) -> list[Document]:
    rng = random.Random(seed)
    return [Document(f"f{i}.py", source(rng, lines), f"f{i}.py") for i in range(number)]


def split(documents: Iterable[Document], by: str) -> tuple[list[Document], list[Document]]:
    splits: tuple[list[Document], list[Document]] = [], []
    for document in documents:
        splits[split_of(getattr(document, by), 5) == "validation"].append(document)
    assert all(splits)
    return splits


def pieces(documents: Iterable[Document], lines: int, stride: int) -> list[Document]:
    """Rows of lines, as a chunker makes them."""
    rows = []
    for document in documents:
        body = document.text.splitlines(True)
        for at in range(0, len(body) - lines + 1, stride):
            rows.append(Document(f"{document.name}:{at}", "".join(body[at : at + lines]), document.name))
    return rows


def degraded(documents: Iterable[Document], seed: int = 1) -> list[Document]:
    """Five examples a document: a function with a fifth of its lines spoiled, and the function."""
    rng = random.Random(seed)
    rows = []
    for document in documents:
        for i in range(5):
            spoiled = "".join(
                line(rng) + "\n" if rng.random() < 0.2 else x for x in document.text.splitlines(True)
            )
            name = f"{document.name} variant {i}"
            rows.append(Document(name, document.text, document.group, "# improve this\n" + spoiled))
    return rows


# --- planted faults and their healthy twins ----------------------------------------------------------


def test_variants_of_one_function_on_both_sides_are_caught():  # D1
    rows = degraded(files(40, lines=12))
    planted, healthy = overlap(*split(rows, "name")), overlap(*split(rows, "group"))
    assert planted.leaked_share == 1 and planted.exact == planted.documents and planted.refused
    assert healthy.leaked_share < 0.02 and not healthy.refused


def test_lines_of_one_page_on_both_sides_are_caught():  # D2
    rng = random.Random(2)
    common = [line(rng) for _ in range(30)]
    rows = [
        Document(str(i), rng.choice(common) if rng.random() < 0.6 else line(rng) + f"  # {i}", str(i))
        for i in range(500)
    ]
    planted = overlap(*split(rows, "name"))
    unique = [*{row.text: row for row in rows}.values()]
    healthy = overlap(*split(unique, "name"))
    assert planted.refused and not planted.groups and planted.leaked_share > LEAKED_LIMIT
    assert 0.4 < planted.exact / planted.documents < 0.8
    assert healthy.leaked_share < 0.05 and not healthy.refused


@pytest.mark.parametrize("lines", (3, 6, 20))
def test_completions_that_are_the_next_prompt_are_caught(lines: int):  # D3
    rows = []
    for document in files(40):
        body = document.text.splitlines(True)[4:]
        cuts = ["".join(body[i : i + lines]) for i in range(0, len(body) - lines + 1, lines)]
        rows += [
            Document(f"{document.name} {i}", after, document.name, before)
            for i, (before, after) in enumerate(pairwise(cuts))
        ]
    planted, healthy = overlap(*split(rows, "name")), overlap(*split(rows, "group"))
    assert planted.leaked_share > 2 * LEAKED_LIMIT and planted.refused
    assert healthy.leaked_share < 0.05 and not healthy.refused


@pytest.mark.parametrize(("lines", "stride"), ((20, 10), (20, 5), (10, 2)))
def test_overlapping_chunks_of_one_file_on_both_sides_are_caught(lines: int, stride: int):  # D4
    rows = pieces(files(40), lines, stride)
    planted, healthy = overlap(*split(rows, "name")), overlap(*split(rows, "group"))
    assert planted.leaked_share > 2 * LEAKED_LIMIT and planted.groups
    assert healthy.leaked_share < 0.05 and not healthy.refused


def test_chunks_that_do_not_overlap_are_caught_by_their_group_or_their_name():  # D4
    rows = pieces(files(40), 10, 10)
    by_name = [replace(row, group=row.name) for row in rows]  # no group field: only the name tells
    for train, held_out in (split(rows, "name"), split(by_name, "name")):
        planted = overlap(train, held_out)
        assert planted.groups > 20 and planted.refused
        assert any(e.kind == "groups" and e.excerpt.endswith(".py") for e in planted.examples)
    assert not overlap(*split(rows, "group")).refused


def test_evaluating_on_training_data_is_caught():  # E3
    documents = files(20)
    planted, healthy = overlap(documents, documents[:5]), overlap(documents[5:], documents[:5])
    assert planted.leaked_share == 1 and planted.exact == planted.groups == 5
    assert healthy.leaked_share == 0 and not healthy.refused
    one_function = [Document(str(i), "x = 1\n" * (i + 1), str(i), f"# {i}\n") for i in range(9)]
    assert overlap(one_function, one_function[:2]).exact == 2


def test_a_limit_is_passed_by_text_by_documents_or_by_a_group():
    healthy = replace(overlap(files(9)[:5], files(9)[5:]), documents=10, units=1000)
    assert not replace(healthy, leaked_units=250, exact=1, near=1).refused
    assert replace(healthy, leaked_units=251).refused
    assert replace(healthy, exact=1, near=1, contained=1).refused
    assert replace(healthy, groups=1).refused


def test_groups_that_only_end_alike_are_two():
    end = " the same words at the end of each prompt, and many of them"
    rows = [replace(d, group=d.name + end) for d in files(10)]
    assert overlap(*split(rows, "name")).groups == 0


def test_reformatted_and_slightly_edited_copies_are_caught():
    documents = files(20)
    moved = replace(documents[0], name="moved", group="moved", text=documents[0].text.replace("\n", "\n    "))
    lines = documents[1].text.splitlines(True)
    lines[10] = lines[40] = "pass\n"
    edited = replace(documents[1], name="edited", group="edited", text="".join(lines))
    found = overlap(documents, [moved, edited])
    assert (found.exact, found.near) == (1, 1)
    assert {(e.kind, e.held_out, e.train) for e in found.examples} == {
        ("exact", "moved", "f0.py"),
        ("near", "edited", "f1.py"),
    }


def test_a_header_that_every_file_has_is_not_a_leak():
    header = source(random.Random(3), lines=20)
    documents = [replace(d, text=header + d.text) for d in files(60)]
    found = overlap(*split(documents, "name"))
    assert found.windows_shared < found.boilerplate and found.leaked_share < 0.01
    assert not found.refused


def test_prompts_that_are_alike_and_short_completions_are_not_leaks():
    template = source(random.Random(6), lines=20)
    bodies = [d.text.partition("sys\n\n")[2] for d in files(20, lines=20)]
    rows = [Document(str(i), text, str(i), template) for i, text in enumerate(bodies)]
    found = overlap(*split(rows, "name"))
    assert found.windows_shared < 0.2 * found.windows and found.leaked_share < 0.1 and not found.refused
    short = [Document(str(i), "return x\n", str(i), f"def f{i}(x):\n") for i in range(30)]
    assert overlap(*split(short, "name")).leaked_share == 0


def test_one_function_in_a_long_file_is_a_small_leak():
    documents = files(20, lines=200)
    shared = source(random.Random(4), lines=20)
    held_out = [replace(d, text=d.text + shared) for d in documents[:5]]
    train = [replace(documents[5], text=documents[5].text + shared), *documents[6:]]
    found = overlap(train, held_out)
    assert 0.05 < found.leaked_share < 0.15 and found.near == found.exact == 0
    assert {e.train for e in found.examples} == {"f5.py"}
    assert " ".join(shared.split())[:20] in " ".join(e.excerpt for e in found.examples)


# --- exactness ---------------------------------------------------------------------------------------

texts = st.lists(st.sampled_from("abc"), max_size=40).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(texts, max_size=6), st.lists(texts, min_size=1, max_size=6), st.integers(3, 12))
def test_windows_and_the_units_inside_equal_counts_by_sets(
    train: list[str], held_out: list[str], window: int
):
    def runs(text: str) -> list[tuple[str, ...]]:
        words = text.split()
        return [tuple(words[i : i + window]) for i in range(len(words) - window + 1)]

    words = shingles.Words()
    sides = [
        [leaks._units(words, Document(str(i), text, str(i))) for i, text in enumerate(side)]
        for side in (train, held_out)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shingles, "BATCH_UNITS", 30)  # several batches
        patch.setattr(leaks, "NEAR", 2)
        found = leaks.compare(sides[0], sides[1], len(held_out), window, lambda document, unit: "")
    there = {run for text in train for run in runs(text)}
    ours = [run for text in held_out for run in runs(text)]
    assert (found.windows, found.windows_shared) == (len(ours), sum(run in there for run in ours))
    assert found.exact == sum(text in train for text in held_out if text)
    inside = 0
    for text in held_out:
        starts = [i for i, run in enumerate(runs(text)) if run in there]
        covered = {i + k for i in starts for k in range(window)}
        inside += len(text.split()) if text in train else len(covered)
    assert found.contained or found.leaked_units == inside


def test_near_duplicates_are_those_of_brute_force():
    """Pairs well above the threshold are found, pairs well below it are not."""
    rng = random.Random(5)
    texts, words = [], shingles.Words()
    for _ in range(80):
        body = [rng.choice(WORDS) for _ in range(rng.randint(60, 300))]
        rate = rng.choice((0.005, 0.02, 0.06))
        changed = [rng.choice(WORDS) if rng.random() < rate else word for word in body]
        texts.append((" ".join(body), " ".join(changed)))

    def shingled(text: str) -> set[tuple[str, ...]]:
        w = text.split()
        return {tuple(w[i : i + leaks.SHINGLE]) for i in range(len(w) - leaks.SHINGLE + 1)}

    ours, theirs = (
        shingles.Batch([leaks._units(words, Document("", text, "")) for text in side])
        for side in zip(*texts, strict=True)
    )
    (_, a), (_, b) = (
        ours.signatures(leaks.SHINGLE, 16, leaks.PERMUTATIONS),
        theirs.signatures(leaks.SHINGLE, 16, leaks.PERMUTATIONS),
    )
    found = {(i, j): similarity for i, j, similarity in leaks._near(shingles.bands(a, leaks.BANDS), a, b)}
    truth = {}
    for i, (left, _) in enumerate(texts):
        for j, (_, right) in enumerate(texts):
            x, y = shingled(left), shingled(right)
            truth[i, j] = len(x & y) / len(x | y)
    margin = 0.12  # three standard deviations of the estimate
    sure = {pair for pair, similarity in truth.items() if similarity > NEAR + margin}
    assert len(sure) > 25 and sure <= found.keys()
    assert all(truth[pair] > NEAR - margin for pair in found)
    errors = [found[pair] - truth[pair] for pair in sure]
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.05


def related() -> list[Document]:
    """Pairs that are near to several others, and long files that share one function."""
    rng, documents = random.Random(9), files(30, seed=8)
    shared = source(rng, lines=20)
    for i in range(15):
        lines = documents[0].text.splitlines(True)
        lines[10 : 10 + i // 3 * 2] = [line(rng) + "\n"] * (i // 3 * 2)
        documents.append(Document(f"near{i}.py", "".join(lines), f"near{i}.py"))
        documents.append(Document(f"long{i}.py", shared + source(rng, 80), f"long{i}.py"))
    return documents


@pytest.mark.parametrize(
    "make", (lambda: degraded(files(10, lines=12)) + pieces(files(12, seed=7), 20, 10), related)
)
def test_the_order_of_documents_does_not_matter(make):
    documents = make()
    train, held_out = split(documents, "name")
    expected = overlap(train, held_out)
    assert expected.leaked_units
    groups = dict(zip(documents, regroup(documents), strict=True))
    for seed in range(6):
        for side in (train, held_out, documents):
            random.Random(seed).shuffle(side)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shingles, "BATCH_UNITS", (2000, 20_000, 10**9)[seed % 3])
            assert overlap(iter(train), iter(held_out)) == expected
            assert dict(zip(documents, regroup(documents), strict=True)) == groups


def test_the_result_does_not_depend_on_the_hash_seed():
    program = (
        "from test_leaks import *\nrows = related()\n"
        "print(astuple(overlap(*split(rows, 'name'))), regroup(rows))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(REPOSITORY / "tests")},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    rows = related()
    assert printed == {f"{astuple(overlap(*split(rows, 'name')))} {regroup(rows)}\n".encode()}


def test_empty_tiny_and_odd_documents():
    odd = ["", " \n\t", "x", "\ud800\udc00 \udfff", "\0", "a" * 10**5, "é́ 中文 🙂"]
    documents = [Document(str(i), text, str(i)) for i, text in enumerate(odd)]
    for train, held_out in ((documents, documents), (documents, []), ([], documents), ([], [])):
        found = overlap(train, held_out)
        assert found.exact == (sum(bool(t.strip()) for t in odd) if train and held_out else 0)
        assert found.leaked_share == (1 if train and held_out else 0)
        assert 0 <= found.windows_shared <= found.windows and 0 <= found.duplicate_share <= 1
    assert len(set(regroup(documents))) == len(documents)
    assert regroup([]) == []


# --- regrouping --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plant",
    (
        lambda: degraded(files(40, lines=12)),
        lambda: pieces(files(40), 20, 10),
        lambda: pieces(files(40), 20, 5),
        lambda: [*files(40), *(replace(d, name="copy/" + d.name, text=d.text + "pass\n") for d in files(40))],
    ),
    ids=("variants", "half overlap", "much overlap", "copies"),
)
def test_a_split_by_the_new_groups_leaks_no_more(plant):
    documents = [replace(d, name=str(i), group=str(i)) for i, d in enumerate(plant())]
    assert overlap(*split(documents, "group")).leaked_share > LEAKED_LIMIT
    groups = regroup(documents)
    assert 20 < len(set(groups)) <= 40 + 40  # one for each file, about: neither all apart nor all together
    again = [replace(d, group=group) for d, group in zip(documents, groups, strict=True)]
    found = overlap(*split(again, "group"))
    assert found.leaked_share < 0.05 and not found.groups


def test_healthy_documents_and_given_groups_stay_as_they_are():
    documents = files(40)
    assert regroup(documents) == [d.name for d in documents]
    paired = [replace(d, group=f"g{i // 2}") for i, d in enumerate(documents)]
    assert regroup(paired) == [d.group for d in paired]
    assert set(regroup(pieces(documents, 10, 10))) == {d.name for d in documents}


def test_regrouping_many_documents_compares_a_sample_of_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leaks, "REGROUP_WINDOWS", 2000)
    monkeypatch.setattr(shingles, "BATCH_UNITS", 3000)
    rows = pieces(files(40), 20, 10)
    single = [replace(row, name=str(i), group=str(i)) for i, row in enumerate(rows)]
    groups = regroup(single)
    again = [replace(d, group=group) for d, group in zip(single, groups, strict=True)]
    assert overlap(*split(again, "group")).leaked_share < LEAKED_LIMIT


# --- stores ------------------------------------------------------------------------------------------


def stores(folder: Path, train: list[Document], held_out: list[Document]) -> tuple[TokenStore, TokenStore]:
    splits = [("train", d) for d in train] + [("validation", d) for d in held_out]
    build_store(folder, splits, Bytes())
    return open_store(folder)[:2]


@pytest.mark.parametrize("by", ("name", "group"))
def test_a_store_tells_what_its_texts_tell(tmp_path: Path, by: str):
    train, held_out = split(pieces(files(40), 20, 10), by)
    found = store_overlap(*stores(tmp_path / "s", train, held_out), Bytes())
    texts = overlap(train, held_out)
    assert abs(found.leaked_share - texts.leaked_share) < 0.05
    assert found.groups == texts.groups and found.documents == texts.documents == found.of_documents


def test_examples_in_a_store_are_judged_by_their_completion(tmp_path: Path):
    rows = degraded(files(40, lines=12))
    for by, low, high in (("name", 1, 1), ("group", 0, 0.05)):
        found = store_overlap(*stores(tmp_path / by, *split(rows, by)), Bytes())
        assert low <= found.leaked_share <= high


def test_equal_names_in_a_store_are_no_group(tmp_path: Path):
    documents = [replace(d, name=f"d{i}/setup.py" if i > 1 else "setup.py") for i, d in enumerate(files(10))]
    found = store_overlap(*stores(tmp_path / "s", documents[1:], documents[:1]), Bytes())
    assert not found.refused


def test_white_space_makes_no_difference_in_a_store(tmp_path: Path):
    documents = files(10)
    moved = [replace(d, text=d.text.replace("\n", "\n    ").replace(" = ", "  =  ")) for d in documents[:2]]
    assert store_overlap(*stores(tmp_path / "s", documents, moved), Bytes()).exact == 2


def test_the_excerpt_of_a_store_is_text(tmp_path: Path):
    documents = files(10)
    found = store_overlap(*stores(tmp_path / "s", documents, documents[:1]), Bytes())
    assert found.examples[0].excerpt.startswith("# Copyright the authors. Licensed")


def test_a_cached_result_is_used_only_for_what_it_was_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    documents = files(10)
    train, held_out = stores(tmp_path / "s", documents[2:], documents[:2])
    first = store_overlap(train, held_out, Bytes())

    def fail(*arguments: object) -> Overlap:
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(store_leaks, "_compare_stores", fail)
        assert store_overlap(train, held_out, Bytes()) == first
        with pytest.raises(AssertionError, match="computed again"):
            store_overlap(held_out, held_out, Bytes())
    assert store_overlap(held_out, held_out, Bytes()).leaked_share == 1
    assert store_overlap(train, held_out, Bytes()) == first
    (tmp_path / "s" / "leaks-train-validation.json").write_text(json.dumps({"key": "x"})[:-4])
    assert store_overlap(train, held_out, Bytes()) == first


def test_a_large_held_out_store_is_sampled_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    documents = files(40)
    monkeypatch.setattr(store_leaks, "HELD_OUT_UNITS", 10_000)
    found = store_overlap(*stores(tmp_path / "s", documents, documents[:20]), Bytes())
    assert 0 < found.documents < found.of_documents == 20
    assert found.leaked_share == 1 and "a sample of 20" in str(found)


def test_another_tokenizer_is_refused(tmp_path: Path):
    documents = files(4)
    other = Bytes()
    other.fingerprint = "other"
    with pytest.raises(ValueError, match="made by the tokenizer bytes, and this one is other"):
        store_overlap(*stores(tmp_path / "s", documents[1:], documents[:1]), other)


def test_a_document_stored_with_a_gap_is_the_same_document(tmp_path: Path, monkeypatch):
    from test_generate_command import STARCODER

    text = source(random.Random(0), 60)
    lines = text.splitlines(keepends=True)
    gap = len("".join(lines[:20])), len("".join(lines[:40]))
    documents = [
        ("train", Document("a.py", text, "a.py", gap=gap)),
        ("validation", Document("b.py", text, "b.py")),
    ]
    build_store(tmp_path / "store", documents, STARCODER)
    train, held_out, _ = open_store(tmp_path / "store")
    assert len(train.document(0)) >= len(held_out.document(0)) + 2
    assert store_overlap(train, held_out, STARCODER).exact == 1
    # Planted: the order of the store.
    monkeypatch.setattr(store_leaks, "in_text_order", lambda tokens, markers: tokens)
    (tmp_path / "store" / "leaks-train-validation.json").unlink()
    assert store_overlap(train, held_out, STARCODER).exact == 0
