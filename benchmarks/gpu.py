"""Check a GPU: `python benchmarks/gpu.py [--checks 1,2,3]`, the first thing to run on a new one.

    1  the environment: device, driver, torch, and which kernels of attention run
    2  the tests that take a device, `pytest -m gpu`
    3  the guards, which must find nothing in healthy runs: the default model, LoRA, and LoRA on a base in nf4

Each check is a process of its own, which is stopped at its time limit, under five minutes. One line of it is
printed and one JSON record appended to --out; all that it printed stands in a .log beside that file. A check
that has a record of this commit, device and torch is not run again without --again, so that what was cut off
goes on. The exit code is 1 if a check did not pass. Without a GPU there is nothing to check, and it is 0;
--device cpu runs the checks on the CPU, and --small in a size for that.

The checks are in benchmarks/gpu_checks.py; docs/gpu.md says what was run where.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu_checks
from benchmarks.gpu_checks import CHECKS, device_name
from config.console import one_line, one_sentence
from config.files import REPOSITORY, code_fingerprint
from modules.precision import choose_device


def chosen_checks(text: str) -> list[int]:
    """Return the numbers of `1,2,3`; all for an empty text, and ValueError for one that there is not."""
    words = [word.strip() for word in text.split(",") if word.strip()] or [*map(str, CHECKS)]
    for word in words:
        if word not in map(str, CHECKS):
            raise ValueError(f"--checks has {word}, and the checks are {', '.join(map(str, CHECKS))}")
    return [int(word) for word in words]


def commit() -> str:
    """Return the commit, with `-dirty` where files were changed; without git a digest of the code."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return code_fingerprint()
    return done.stdout.strip() if done.returncode == 0 else code_fingerprint()


def recorded(out: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Return the last record with these values; None if there is none, or the code is that of no commit."""
    if not out.is_file() or wanted["commit"].endswith("-dirty"):
        return None
    for line in reversed(out.read_text("utf-8").splitlines()):
        with contextlib.suppress(json.JSONDecodeError):  # A line that was cut off.
            record = json.loads(line)
            if all(record.get(key) == value for key, value in wanted.items()):
                return record
    return None


def child_command(number: int, device: str, folder: Path, result: Path, small: bool) -> list[str]:
    """Return the command of the process that runs a check."""
    words = [str(number), device, str(folder), str(result), *(["small"] if small else [])]
    return [sys.executable, str(gpu_checks.__file__), *words]


def run_check(number: int, device: str, small: bool, log: Path) -> dict[str, Any]:
    """Run a check in a process of its own, which is killed with all its children at the limit.

    Args:
        log: The file that takes what it prints.

    Returns:
        `outcome` (`passed`, `failed`, `crashed` or `stopped`), `line`, `values` and `seconds`.
    """
    limit, began = CHECKS[number].seconds, time.perf_counter()
    with tempfile.TemporaryDirectory() as name, open(log, "wb") as output:
        result = Path(name) / "result.json"
        process = subprocess.Popen(
            child_command(number, device, Path(name), result, small),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        found: dict[str, Any] = {"outcome": "crashed", "line": "", "values": {}}
        try:
            code = process.wait(limit)
            if code == 0 and result.is_file():
                found = json.loads(result.read_text("utf-8"))
                found["outcome"] = "passed" if found.pop("passed") else "failed"
            else:
                found["line"] = f"exit code {code}: {last_line(log)}"
        except subprocess.TimeoutExpired:
            found |= {"outcome": "stopped", "line": f"not done after {limit:g} s: {last_line(log)}"}
        finally:
            with contextlib.suppress(ProcessLookupError):  # Also what a check left running.
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return found | {"seconds": round(time.perf_counter() - began, 1)}


def last_line(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").strip().splitlines()
    return one_line(lines[-1])[:300] if lines else "it printed nothing"


def main(argv: list[str]) -> int:
    """Run the checks; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checks", default="", help="numbers, as 1,3; by default all")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the checks themselves")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "gpu.jsonl", help="file of records")
    parser.add_argument("--again", action="store_true", help="run checks that have a record, too")
    parser.add_argument(
        "--small", action="store_true", help="in a size for a CPU, which says little of a GPU"
    )
    requested = parser.parse_args(argv)
    numbers = chosen_checks(requested.checks)
    if requested.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device here: nothing was checked (--device cpu tries the checks on the CPU)")
        return 0
    name = device_name(choose_device(requested.device))
    requested.out.parent.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for number in numbers:
        key: dict[str, Any] = {
            "check": number,
            "commit": commit(),
            "device": name,
            "torch": str(torch.__version__),
            "small": requested.small,
        }
        record = None if requested.again else recorded(requested.out, key)
        said = f", recorded at {record['at']}" if record else ""
        if record is None:
            log = requested.out.with_name(f"{requested.out.stem}-{number}.log")
            at = datetime.now(UTC).isoformat(timespec="seconds")
            found = run_check(number, requested.device, requested.small, log)
            record = {**key, "at": at, "title": CHECKS[number].title, **found}
            with open(requested.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        outcomes.append(record["outcome"])
        seconds = f"{record['seconds']:.1f} s{said}"
        print(f"{number} {record['title']}: {record['outcome']}; {record['line']} ({seconds})", flush=True)
    return 0 if set(outcomes) <= {"passed"} else 1


if __name__ == "__main__":
    with one_sentence():
        sys.exit(main(sys.argv[1:]))
