"""Compare near-duplicate signatures with datasketch, texts a second, and show how memory and time grow.

    pip install datasketch; python benchmarks/dedup.py speed [--files 1000]
    python benchmarks/dedup.py growth

Both sides sign the same files of the standard library with 128 permutations of 5-unit shingles, from text to
signature, in one process each, in turns. docs/scrape/machines.md has figures, with their machine.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.shingles import UNIT, Units, Words, batches
from scraping.dedup import PERMUTATIONS, DedupSettings, bucket, cluster, signature
from scraping.documents import ScrapedDocument, shard_path, write_shard
from scraping.shards import parts_of

SHINGLE = 5


def library(most: int) -> list[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))[:most]
    return [text for file in files if "\0" not in (text := file.read_text("utf-8", "replace"))]


def ours(texts: list[str]) -> None:
    words = Words()
    for batch in batches(Units("", "", words.ids(text), 0) for text in texts):
        batch.signatures(SHINGLE, SHINGLE, PERMUTATIONS)


def datasketch(texts: list[str]) -> None:
    from datasketch import MinHash  # pyright: ignore[reportMissingImports]

    for text in texts:
        units = UNIT.findall(text)
        shingles = {
            " ".join(units[i : i + SHINGLE]).encode("utf-8", "replace") for i in range(len(units) - 4)
        }
        MinHash(num_perm=PERMUTATIONS).update_batch(list(shingles))


def speed(files: int) -> None:
    texts = library(files)
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    seconds: dict[str, list[float]] = {"ours": [], "datasketch": []}
    for _ in range(3):
        for side, function in (("ours", ours), ("datasketch", datasketch)):
            start = time.perf_counter()
            function(texts)
            seconds[side].append(time.perf_counter() - start)
    for side, times in seconds.items():
        print(f"{side:12}{size / 1e6 / statistics.median(times):8.2f} MB/s of {len(texts)} files")


def one_corpus(copies: int) -> None:
    """Run all three steps over several variants of the library's files, in a process of its own."""
    texts = library(1000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "clean").mkdir()
        for number in range(copies):
            documents = (
                ScrapedDocument(text.replace("self", f"me{number}"), f"r{number}", f"{i}.py", "c", "MIT")
                for i, text in enumerate(texts)
            )
            write_shard(shard_path(folder / "clean", number, copies), documents)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        settings, start = DedupSettings(folder=name), time.perf_counter()
        for part in parts_of(folder / "clean"):
            signature(settings, part)
        signed = time.perf_counter() - start
        for number in range(copies):
            bucket(settings, (number, copies))
        counts, seconds = cluster(settings), time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{copies * len(texts):8,} documents: signatures {signed:6.1f} s, all {seconds:6.1f} s, "
        f"peak {peak / 1024:,.0f} MiB ({before / 1024:,.0f} before); {counts}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["speed", "growth", "one"])
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--copies", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.what == "speed":
        speed(arguments.files)
    elif arguments.what == "one":
        one_corpus(arguments.copies)
    else:
        for copies in (1, 3, 10):
            subprocess.run([sys.executable, __file__, "one", "--copies", str(copies)], check=True)


if __name__ == "__main__":
    main()
