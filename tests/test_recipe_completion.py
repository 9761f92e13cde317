"""recipes/completion.py: a corpus by way of the scraper, and lines completed in four ways that differ."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from recipes.__main__ import main
from recipes.completion import CompletionSettings, build, decoders, decoding_table

pytestmark = pytest.mark.usefixtures("unguarded")

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lam",
    "mu",
    "nu",
]


def module(n: int) -> str:
    draw = random.Random(n)
    lines = [
        f"def {draw.choice(WORDS)}_{n}_{i}(x):" + f"\n    return x + {draw.randrange(999)}" for i in range(30)
    ]
    return f'"""About {n}."""\n\n' + "\n\n\n".join(lines) + "\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """40 files, a near copy of the first, and one that does not parse."""
    folder = tmp_path / "code"
    folder.mkdir()
    for n in range(40):
        (folder / f"m{n}.py").write_text(module(n))
    (folder / "near.py").write_text(module(0) + "x  =  1\n")
    (folder / "broken.py").write_text(module(1) + "def f(:\n")
    (folder / "small.py").write_text("x = 1\n")
    return folder


def test_the_corpus_is_the_scrapers_and_every_file_is_accounted_for(source: Path, tmp_path: Path) -> None:
    counts = build(CompletionSettings(source=str(source), format="none"), None, tmp_path / "out" / "dataset")
    assert counts.found == 42 and counts.kept == 40  # small.py is no file of a corpus
    assert sum(counts.dropped.values()) == 2 and any("near" in reason for reason in counts.dropped)
    splits = ("train", "validation", "test")
    made = {
        s: [json.loads(line) for line in (tmp_path / f"out/dataset/{s}.jsonl").read_text().splitlines()]
        for s in splits
    }
    assert sum(map(len, made.values())) == 40 and all(made.values())
    assert all(row["text"].startswith('"""About') and row["path"].endswith(".py") for row in made["test"])
    assert not {row["text"] for row in made["train"]} & {row["text"] for row in made["test"]}
    # A corpus that is built is taken as it is, and gives the same splits.
    again = build(
        CompletionSettings(source=str(tmp_path / "out" / "corpus" / "corpus")), None, tmp_path / "again"
    )
    assert again.examples == counts.examples
    assert (tmp_path / "again" / "test.jsonl").read_bytes() == (
        tmp_path / "out/dataset/test.jsonl"
    ).read_bytes()


def test_a_corpus_holds_nothing_of_a_source_that_was_given_before(source: Path, tmp_path: Path) -> None:
    """A source that was refused leaves nothing: its folder takes another, and that one with more in it."""
    folder, few = tmp_path / "out" / "dataset", tmp_path / "few"
    few.mkdir()
    (few / "other.py").write_text(module(99))
    with pytest.raises(ValueError, match="set would be empty"):
        build(CompletionSettings(source=str(few), format="none"), None, folder)
    assert build(CompletionSettings(source=str(source), format="none"), None, folder).found == 42
    for n in range(40, 45):
        (source / f"m{n}.py").write_text(module(n))
    assert build(CompletionSettings(source=str(source), format="none"), None, folder).found == 47


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"source": "nowhere"}, "nowhere"),
        ({"num_beams": 0}, "num_beams is 0; it must be at least 1"),
        ({"temperature": 0.0}, "top_k is 40 but temperature 0 samples nothing"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be above 0 and at most 1"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, values: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        build(CompletionSettings(**values), None, tmp_path / "dataset")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "dataset").exists()


def test_a_folder_without_python_is_refused(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "main.kt").write_text("fun main() {}\n" * 100)
    with pytest.raises(ValueError, match=r"holds no \.py file"):
        build(CompletionSettings(source=str(tmp_path / "code")), None, tmp_path / "out" / "dataset")


def test_the_four_ways_are_four_and_a_beam_that_is_greedy_is_seen() -> None:
    ways = decoders(CompletionSettings())
    assert [(way.temperature, way.top_k, way.top_p, way.num_beams) for way in ways.values()] == [
        (0.0, 0, 1.0, 1),
        (0.8, 40, 1.0, 1),
        (0.8, 0, 0.95, 1),
        (0.0, 0, 1.0, 4),
    ]
    references = [f"return {n}" for n in range(30)]
    texts = dict.fromkeys(ways, references) | {"top-k 40": ["return x"] * 30}
    table = decoding_table(texts, references, list(map(str, range(30))))
    assert "beam 4: 0 lines differ from greedy" in table and "top-k 40: 30 lines differ from greedy" in table
    assert "worse than greedy" in next(line for line in table.splitlines() if line.startswith("top-k 40: 30"))
    few = decoding_table(texts, references, ["f.py", "g.py"] * 15)  # The samples are of two files.
    assert "on 30 samples of 2 files, where fewer than 6 can show nothing" in few


def test_the_whole_recipe(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for path in source.glob("*.py"):
        path.write_text(path.read_text().replace("(x)", "( x )"))
    flags = (
        "--format autopep8 --eval_samples 6 --decoded 4 --line_tokens 8 --max_steps 3 --batch_size 2 "
        "--samples 0 --model.block_size 64 --model.n_layer 1 --model.n_head 2 --model.n_embd 16 "
        "--tokenizer.vocab_size 400 --data.order easy-first --data.difficulty rarity --validate_every 0 "
        "--data.workers 1"
    )
    assert main(["completion", "--source", str(source), *flags.split()]) == 0
    said = capsys.readouterr().out
    assert "42  files found" in said and "4 test lines, with 95% intervals" in said
    rows = (tmp_path / "runs/completion/dataset/train.jsonl").read_text()
    assert "(x)" in rows and "( x )" not in rows  # laid out anew
    assert "beam 4: " in (tmp_path / "runs/completion/report.txt").read_text()
    config = (tmp_path / "runs/completion/run/config.yaml").read_text()
    assert "min_count: 10" in config and "drop_comments: true" in config and "order: easy-first" in config
    assert (tmp_path / "runs/completion/run/curves/loss.png").is_file()
