"""Measure the speed of `python -m scraping clean`, stage by stage and as a whole, on the standard library.

    python benchmarks/clean_speed.py [--copies 3] [--workers 2]

Stages are timed in this process by its processor time. The whole command is timed by the clock, with ledger,
child processes and Parquet; the library is stored `copies` times, each time as another repository.
docs/scrape/machines.md has figures, with their machine.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config.files import REPOSITORY
from scraping.clean import STAGES, CleanSettings
from scraping.documents import RawFile, ScrapedDocument
from scraping.ledger import Ledger, ListedFile
from scraping.stages import encoding


def library() -> dict[str, bytes]:
    """Return the .py files of the interpreter's library, with its tests, by path."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def stages(files: dict[str, bytes]) -> None:
    """Print the MB/s of each stage on one core, over the documents that the stages before it left."""
    settings = CleanSettings()
    decode = encoding.build(settings.latin1, settings.line_ends, lambda name: None)
    chain = [
        (name, STAGES[name][1](settings, lambda change: None)) for name in STAGES if name != "formatting"
    ]
    seconds: defaultdict[str, float] = defaultdict(float)
    size: Counter[str] = Counter()
    gc.disable()  # The children do so too.
    for path, data in files.items():
        started = time.process_time()
        document = decode(RawFile("o/r", path, "", "PSF-2.0", data))
        seconds["encoding"] += time.process_time() - started
        size["encoding"] += len(data)
        for name, stage in chain:
            if not isinstance(document, ScrapedDocument):
                break
            size[name] += len(data)
            started = time.process_time()
            document = stage(document)
            seconds[name] += time.process_time() - started
    gc.enable()
    print("| stage | MB/s on one core |\n|---|---|")
    for name, took in seconds.items():
        print(f"| {name} | {size[name] / 1e6 / took:.1f} |")
    print(f"| all | {size['encoding'] / 1e6 / sum(seconds.values()):.1f} |", flush=True)


def whole(files: dict[str, bytes], copies: int, workers: int) -> None:
    """Print the command's MB/s by the clock, and by the processor time of all its processes."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite")
        for copy in range(copies):
            name = f"library/{copy}"
            ledger.found(name, "local", "", "PSF-2.0")
            ledger.listed(name, "", [ListedFile(path, path, len(data)) for path, data in files.items()])
            ledger.stored(name, files.items())
            ledger.done(name)
        ledger.close()
        command = [sys.executable, "-m", "scraping", "clean", "--folder", folder, "--workers", str(workers)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
        took = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    size = copies * sum(map(len, files.values())) / 1e6
    print(done.stdout)
    print(f"{size:.0f} MB in {took:.1f} s with {workers} workers: {size / took:.2f} MB/s by the clock")
    rate = f"{size / processor:.2f} MB/s a core, load {os.getloadavg()[0]:.1f}"
    print(f"{processor:.1f} s of processor time: {rate}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    found = library()
    stages(found)
    whole(found, arguments.copies, arguments.workers)
