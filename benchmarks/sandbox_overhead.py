"""Compare a run in the sandbox with the interpreter's own start: `python benchmarks/sandbox_overhead.py`.

    bare       python -s -S -P -B -c pass
    run        one empty program in the sandbox
    judge      one right solution by one test: two sandboxes, started together

They take turns, so that a busy machine slows all of them. The output has the median, the 95th percentile and
the difference from the bare start, and, after --runs verdicts in a pool of threads, what this process leaked:
open files, threads, memory, child processes. docs/sandbox.md has figures, with their machine.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sandbox

PROGRAM, TEST = "def add(a, b):\n    return a + b\n", "assert add(1, 2) == 3\n"


def bare() -> None:
    words = [os.path.realpath(sys.executable), "-s", "-S", "-P", "-B", "-c", "pass"]
    subprocess.run(words, env=sandbox.ENVIRONMENT, stdin=subprocess.DEVNULL, check=True)


def run() -> None:
    assert sandbox.run("").exit_code == 0


def judge() -> None:
    found = sandbox.judge(PROGRAM, "", TEST)
    assert found.kind == "passed", found


def kept() -> dict[str, float]:
    """Return the resources that a leak would add to; memory is the resident set, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "child processes": len(children),
        "MiB resident": pages * resource.getpagesize() / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    print(f"{sandbox.isolation().name}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    seconds: dict[Callable[[], None], list[float]] = {bare: [], run: [], judge: []}
    for _ in range(options.turns):
        for action, times in seconds.items():
            start = time.perf_counter()
            action()
            times.append(time.perf_counter() - start)
    start_up = median(seconds[bare])
    for action, times in seconds.items():
        middle, high = median(times), quantiles(times, n=20)[-1]
        added = "" if action is bare else f", {1e3 * (middle - start_up):.1f} ms more than bare"
        print(f"{action.__name__:6} median {1e3 * middle:.1f} ms, 95% {1e3 * high:.1f} ms{added}")
    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(lambda _: judge(), range(50)))
        before, start = kept(), time.perf_counter()
        list(pool.map(lambda _: judge(), range(options.runs)))
        took, after = time.perf_counter() - start, kept()
    print(f"{options.runs} verdicts by {options.workers} threads: {1e3 * took / options.runs:.1f} ms each")
    for name in before:
        print(f"  {name}: {before[name]:.4g} before, {after[name]:.4g} after")


if __name__ == "__main__":
    main()
