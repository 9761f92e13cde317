"""python -m scraping clean: every file accounted for, equal bytes however it ran, bombs cost one file."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scraping.clean import STAGES, CleanSettings, check, clean_shard, reasons_table, run
from scraping.documents import read_shard
from scraping.ledger import Ledger, ListedFile

GOOD = "def add(a, b):\n    return a + b\n\n\nprint(add({i}, 2))\n"
TOKEN = "ghp_" + "aB3xK9mQ2wE7rT5yU1iO4pL8kJ6hG0fD9sZx"
FILES = {
    **{f"src/m{i}.py": GOOD.format(i=i).encode() for i in range(12)},
    "a.kt": b"/* Copyright 2020 A */\npackage a\n\nfun f(x: Int) = x + 1\nval y = f(2)\n",
    "bin.py": b"\x7fELF\0\0",
    "bad.py": f"x = (\n# {TOKEN}\ny = 2\n".encode(),
    "two.py": f'print "hello {TOKEN}"\nx = 1\ny = 2\n'.encode(),
    "short.py": b"x = 1\n",
    "vendor/six.py": GOOD.encode(),
    "gen_pb2.py": GOOD.encode(),
    "gpl.py": b"# Licensed under the GPL\n" + GOOD.encode(),
    "spdx.py": f"# SPDX-License-Identifier: {TOKEN}\n{GOOD}".encode(),
    "long.py": f"x = '{TOKEN}{'a' * 2000}'\ny = 1\nz = 2\n".encode(),
    "secret.py": f'TOKEN = "{TOKEN}"\nMAIL = "anna.smith@gmail.com"\nprint(TOKEN, MAIL)\n'.encode(),
    "crlf.py": GOOD.replace("\n", "\r\n").encode(),
}


def fill(folder: Path, repositories: dict[str, dict[str, bytes]], licence: str = "MIT") -> Path:
    ledger = Ledger(folder / "ledger.sqlite")
    for name, files in repositories.items():
        ledger.found(name, "local", "main", licence)
        ledger.listed(name, "c0", [ListedFile(path, path, len(data)) for path, data in files.items()])
        ledger.stored(name, list(files.items()))
        ledger.done(name)
    ledger.close()
    return folder


def clean(folder: Path, **settings: Any) -> dict[str, Any]:
    values = CleanSettings(**{"folder": str(folder), "workers": 2, **settings})
    shard = check(values)
    ledger = Ledger(folder / "ledger.sqlite")
    try:
        return clean_shard(values, ledger, shard)
    finally:
        ledger.close()


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "clean").iterdir())}


def dropped(folder: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """(repository, path) -> (stage, reason), over all shards."""
    rows = []
    for path in sorted((folder / "clean").glob("*.dropped.jsonl.gz")):
        with gzip.open(path) as lines:
            rows += [json.loads(line) for line in lines]
    return {(row["repository"], row["path"]): (row["stage"], row["reason"]) for row in rows}


def test_every_file_is_a_document_or_has_a_reason_and_no_secret_remains(tmp_path: Path) -> None:
    fill(tmp_path, {"o/one": FILES, "o/two": FILES})
    record = clean(tmp_path)
    documents = list(read_shard(tmp_path / "clean" / "part-00000-of-00001.parquet"))
    gone = dropped(tmp_path)
    kept = [(document.repository, document.path) for document in documents]
    # Two repositories hold files of the same names: none stands for the other.
    assert sorted([*kept, *gone]) == sorted((name, path) for name in ("o/one", "o/two") for path in FILES)
    assert kept == sorted(kept)
    assert {path: why for (name, path), why in gone.items() if name == "o/two"} == {
        "bin.py": ("encoding", "binary"),
        "bad.py": ("syntax", "syntax error"),
        "two.py": ("syntax", "python 2"),
        "short.py": ("shape", "too short"),
        "vendor/six.py": ("origin", "vendored"),
        "gen_pb2.py": ("origin", "generated"),
        "gpl.py": ("licence", "licence of the file differs"),
        "spdx.py": ("licence", "licence unknown"),
        "long.py": ("shape", "absurd line"),
    }
    assert record["input"]["files"] == 2 * len(FILES)
    assert record["input"]["bytes"] == 2 * sum(map(len, FILES.values()))
    counts = [reason["files"] for stage in record["dropped"].values() for reason in stage.values()]
    assert record["output"]["documents"] == len(documents) == record["input"]["files"] - sum(counts)
    assert record["output"]["bytes"] == sum(len(document.text.encode()) for document in documents)
    assert record["changed"] == {
        "encoding": {"line ends made LF": 2},
        "headers": {"header removed": 2},
        "secrets": {"<EMAIL>": 2, "<GITHUB_TOKEN>": 2},
    }
    texts = {document.path: document.text for document in documents}
    assert texts["a.kt"] == "package a\n\nfun f(x: Int) = x + 1\nval y = f(2)\n"
    assert texts["secret.py"].startswith('TOKEN = "<GITHUB_TOKEN>"\nMAIL = "<EMAIL>"\n')
    lines = gzip.decompress((tmp_path / "clean" / "part-00000-of-00001.dropped.jsonl.gz").read_bytes())
    seen = json.dumps([dataclasses.asdict(d) for d in documents]) + lines.decode() + json.dumps(record)
    assert TOKEN not in seen
    assert "\n".join(reasons_table(record)).count("dropped by") == len(counts)


def test_equal_input_gives_equal_bytes_and_is_not_made_again(tmp_path: Path) -> None:
    one, other = fill(tmp_path / "a", {"o/one": FILES}), fill(tmp_path / "b", {"o/one": FILES})
    clean(one, workers=1)
    clean(other, workers=3)
    assert outputs(one) == outputs(other)
    times = {path: path.stat().st_mtime_ns for path in (one / "clean").iterdir()}
    clean(one)
    assert {path: path.stat().st_mtime_ns for path in (one / "clean").iterdir()} == times


def test_a_shard_is_made_again_if_it_would_come_out_otherwise(tmp_path: Path) -> None:
    folder = fill(tmp_path, {"o/one": {"a.py": GOOD.encode()}})
    shard = folder / "clean" / "part-00000-of-00001.parquet"

    def made(**settings: Any) -> bool:
        before = shard.stat().st_mtime_ns
        clean(folder, **settings)
        return shard.stat().st_mtime_ns != before

    clean(folder)
    assert not made()
    assert made(min_lines=2)  # a setting
    assert not made(min_lines=2)
    fill(folder, {"o/two": {"b.py": GOOD.encode()}})  # the input
    assert made(min_lines=2)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])  # damage
    assert made(min_lines=2)
    assert shard.read_bytes() == whole
    shard.with_suffix(".json").write_text("{")  # a record that was cut
    assert made(min_lines=2)
    record = json.loads(shard.with_suffix(".json").read_text())
    record["stages"]["secrets"] += 1  # another version of a stage
    shard.with_suffix(".json").write_text(json.dumps(record))
    assert made(min_lines=2)


def test_shards_part_the_repositories_and_do_not_mix(tmp_path: Path) -> None:
    files = {"a.py": GOOD.encode(), "b.py": b"x"}
    folder = fill(tmp_path, {f"o/r{i}": files for i in range(9)})
    records = [clean(folder, shard=f"{i}/3") for i in range(3)]
    assert sum(record["input"]["files"] for record in records) == 18
    names = [
        d.repository
        for i in range(3)
        for d in read_shard(folder / "clean" / f"part-0000{i}-of-00003.parquet")
    ]
    assert sorted(names) == sorted(f"o/r{i}" for i in range(9))
    with pytest.raises(ValueError, match=r"holds part-00000-of-00003\.json, and --shard 0/1 makes one of 1"):
        clean(folder)


def test_a_ledger_that_is_one_part_is_read_whole(tmp_path: Path) -> None:
    """Machines that each crawl their part into a folder of its own have such ledgers."""
    folder = fill(tmp_path, {f"o/r{i}": {"a.py": GOOD.encode()} for i in range(4)})
    record = clean(folder, shard="2/3", whole=True)
    assert record["input"]["files"] == record["output"]["documents"] == 4
    assert [path.name for path in (folder / "clean").glob("*.parquet")] == ["part-00002-of-00003.parquet"]


BOMBS = {
    "deep.py": "x = " + "-" * 100_000 + "1\ny = 1\nz = 1\n",
    "elif.py": "if x:\n    pass\n" + "elif x:\n    pass\n" * 30_000,
    "calls.py": "x" + "()" * 100_000 + "\ny = 1\nz = 1\n",
    "list.py": "x = [" + "1," * 2_500_000 + "]\ny = 1\nz = 1\n",  # 5 MB on one line
    "deep.kt": "val x = " + "(" * 30_000 + "1" + ")" * 30_000 + "\nval y = 1\nval z = 2\n",
}


def test_a_bomb_costs_its_own_file_and_no_neighbour(tmp_path: Path) -> None:
    good = {f"m{i}.py": GOOD.format(i=i).encode() for i in range(30)}
    folder = fill(tmp_path, {"o/r": {**good, **{path: text.encode() for path, text in BOMBS.items()}}})
    clean(folder, skip=("shape",), seconds=1.0)
    kept = {document.path for document in read_shard(folder / "clean" / "part-00000-of-00001.parquet")}
    gone = {path: why for (_, path), why in dropped(folder).items()}
    assert kept | gone.keys() == good.keys() | BOMBS.keys()
    assert good.keys() <= kept
    reached = (
        "took longer than 1 s",
        "took more than 1024 MB",
    )  # whichever is first
    stage, reason = gone.pop("list.py")
    assert stage == "limits" and reason in reached
    for path in ("deep.py", "elif.py", "calls.py"):
        assert gone.pop(path) == ("syntax", "nested too deeply")
    assert gone.keys() <= {"deep.kt"}
    record = clean(folder)  # the same with its shape looked at first: the long lines are not parsed
    assert record["dropped"]["shape"]["absurd line"]["files"] == 4


def test_a_file_that_takes_too_long_to_format_stays_as_it_is(tmp_path: Path) -> None:
    slow = "x = [\n" + "".join(f"  Row( {i},a = {i} ),\n" for i in range(4000)) + "]\n"
    folder = fill(
        tmp_path, {"o/r": {"slow.py": slow.encode(), "ugly.py": b"x=1\nif x :\n  y=2\nz = [ 1 ]\n"}}
    )
    record = clean(folder, format="autopep8", format_seconds=0.3)
    texts = {d.path: d.text for d in read_shard(folder / "clean" / "part-00000-of-00001.parquet")}
    assert texts == {"slow.py": slow, "ugly.py": "x = 1\nif x:\n    y = 2\nz = [1]\n"}
    assert record["changed"]["formatting"] == {
        "formatted": 1,
        "kept unformatted: too slow, or the tool crashed": 1,
    }


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_anywhere_and_run_again_it_ends_with_equal_bytes(tmp_path: Path, kills: int) -> None:
    many = {f"o/r{i}": {**FILES, "n.py": GOOD.format(i=i).encode()} for i in range(20)}
    straight, killed = fill(tmp_path / "a", many), fill(tmp_path / "b", many)
    started = time.perf_counter()
    clean(straight)
    took = time.perf_counter() - started
    rng = random.Random(0)
    command = [sys.executable, "-m", "scraping", "clean", "--workers", "2", "--folder", str(killed)]
    for _ in range(kills):
        child = subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(0.2, 1 + took))
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()

    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert outputs(killed) == outputs(straight)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"shard": "3/3"}, "--shard is '3/3'; it must be i/n, with i from 0 to n - 1"),
        ({"shard": "a"}, "--shard is 'a'; it must be i/n"),
        ({"skip": ("syntaxx",)}, "--skip names syntaxx; the stages that can be skipped are licence, origin"),
        ({"skip": ("encoding",)}, "--skip names encoding"),
        ({"licences": ("MIT", "nonsense")}, "--licences names nonsense, which is no SPDX identifier"),
        ({"memory_mb": 10}, "--memory_mb is 10; it must be at least 256"),
        ({"folder": "nowhere"}, "nowhere holds no ledger.sqlite"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    fill(tmp_path, {})
    with pytest.raises(ValueError, match=sentence):
        run(CleanSettings(**{"folder": str(tmp_path), **settings}))


def test_each_stage_can_be_left_out(tmp_path: Path) -> None:
    folder = fill(tmp_path, {"o/r": {path: FILES[path] for path in FILES if path != "bin.py"}}, licence="")
    everything = tuple(name for name in STAGES if name != "formatting")
    record = clean(folder, skip=everything)
    assert record["dropped"] == {}
    assert set(record["stages"]) == {"encoding"}


PEAK = """
import resource, sys
from pathlib import Path
from scraping.clean import CleanSettings, clean_shard
from scraping.ledger import Ledger
folder = Path(sys.argv[1])
settings = CleanSettings(folder=str(folder), workers=1, skip=("syntax", "secrets"))
clean_shard(settings, Ledger(folder / "ledger.sqlite"), (0, 1))
(own,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""  # Its own peak is not getrusage's, which counts what the process that started it once held.


@pytest.mark.slow
def test_memory_is_flat_as_the_corpus_grows_tenfold(tmp_path: Path) -> None:
    """80 MB and 800 MB: both above the 32 MB of text that a group of rows holds."""
    peaks = []
    for size in (80, 800):
        folder = tmp_path / str(size)
        body = "".join(f"def function_{i}(a, b):\n    return a * {i} + b\n\n\n" for i in range(800))
        for part in range(size // 8):
            files = {
                f"{i}.py": f"# {size} {part} {i}\n{body}".encode() for i in range(8_000_000 // len(body))
            }
            fill(folder, {f"o/r{part}": files})
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True, check=True
        )
        peaks.append([int(word) for word in done.stdout.split()])
    (small_parent, small_child), (large_parent, large_child) = peaks
    assert large_parent < 1.15 * small_parent, peaks
    assert large_child < 1.15 * small_child, peaks
