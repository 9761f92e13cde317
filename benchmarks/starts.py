"""Compare the first and the second start of a run with those of an older checkout: processor seconds.

    python benchmarks/starts.py OLDER [--megabytes 200] [--turns 1]

OLDER is the folder of another checkout (`git worktree add OLDER COMMIT`). The corpus is as many megabytes of
Python files of the interpreter's library and of site-packages, in a temporary folder; with too few of them,
copies with a line more follow. Both sides take turns, each start in a process of its own: the first with an
empty cache, the second with the cache that it left. What is measured is reading, the training of the
tokenizer, and the token store, without imports, guards and model; the processor time includes the processes
that tokenise, and what else runs on the machine adds little to it, but much to the seconds. The two sides
must come to the same store. docs/figures.md has figures, with their machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SETTLED = 3.0  # Seconds until the files are no longer ones that had just been changed.
START = """
import json, resource, sys, time
from config import DataConfig, TokenizerConfig
from data.prepare import prepare_data, prepare_tokenizer

def used():
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(r.ru_utime + r.ru_stime for r in map(resource.getrusage, kinds))

documents = DataConfig(sys.argv[1], cache=sys.argv[2])
try:
    from data.run_documents import RunDocuments
    documents = RunDocuments(documents)
except ImportError:
    pass
if __name__ == "__main__":
    clock, processor = time.perf_counter(), used()
    tokenizer = prepare_tokenizer(documents, TokenizerConfig())
    tokenized = used()
    data = prepare_data(documents, tokenizer)
    print(json.dumps({
        "tokenizer": tokenized - processor,
        "data": used() - tokenized,
        "seconds": time.perf_counter() - clock,
        "peak": int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1e6,
        "store": str(data.folder),
    }))
"""


def write_corpus(folder: Path, size: int) -> tuple[int, int]:
    """Write files of about `size` bytes together; return their number and their bytes."""
    texts: dict[bytes, tuple[str, bytes]] = {}
    for place in ("stdlib", "purelib"):
        root = Path(sysconfig.get_path(place))
        for path in sorted(root.rglob("*.py")):
            if place == "stdlib" and "site-packages" in path.parts:
                continue
            data = path.read_bytes()
            if data and data.decode("utf-8", "ignore").encode() == data:
                texts.setdefault(hashlib.sha256(data).digest(), (f"{place}/{path.relative_to(root)}", data))
    written = files = copy = 0
    while written < size:
        for _, (name, data) in sorted(texts.items()):  # By their SHA-256: a fair part of each project.
            if written >= size:
                break
            path = folder / str(copy) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            written += path.write_bytes(b"# copy %d\n" % copy * bool(copy) + data)
            files += 1
        copy += 1
    return files, written


def start(checkout: Path, corpus: Path, cache: Path) -> dict[str, Any]:
    """Return what a start of a checkout took, and the checksum of its store."""
    script = cache.with_name("start.py")  # A file, which the processes that tokenise can import.
    script.write_text(START)
    words = [sys.executable, script, corpus, cache]
    done = subprocess.run(
        words, cwd=cache.parent, env={"PYTHONPATH": str(checkout)}, stdout=subprocess.PIPE, check=True
    )
    *said, last = done.stdout.decode().splitlines()
    took = json.loads(last)
    index = json.loads(Path(took["store"], "index.json").read_text("utf-8"))
    return took | {"index": index["sha256"], "said": [line for line in said if line.startswith("source: ")]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("older", type=Path)
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--turns", type=int, default=1)
    given = parser.parse_args()
    checkouts = {"before": given.older.resolve(), "now": REPOSITORY}
    took: dict[tuple[str, str], list[float]] = {}
    stores = set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, size = write_corpus(folder / "corpus", int(given.megabytes * 1e6))
        print(f"{files:,} files, {size / 1e6:.1f} MB", flush=True)
        time.sleep(SETTLED)
        for turn in range(given.turns):
            for side, checkout in checkouts.items():
                for which in ("first", "second"):
                    found = start(checkout, folder / "corpus", folder / f"cache-{side}-{turn}")
                    stores.add(found["index"])
                    took.setdefault((side, which), []).append(found["tokenizer"] + found["data"])
                    print(
                        f"{side:8}{which:8}{found['tokenizer'] + found['data']:8.2f} s of the processor "
                        f"(tokenizer {found['tokenizer']:.2f}, data {found['data']:.2f}), "
                        f"{found['seconds']:.1f} s, peak {found['peak']:.2f} GB {' '.join(found['said'])}",
                        flush=True,
                    )
    if len(stores) > 1:
        raise SystemExit("error: the stores of the two sides differ")
    for which in ("first", "second"):
        before, now = (median(took[side, which]) for side in checkouts)
        print(f"{which} start: {before:.2f} s before, {now:.2f} s now, {now / before:.2f} times; same store")


if __name__ == "__main__":
    main()
