"""Guards that run before every training: each names a silent fault, shows its evidence, and says what to do.

    findings = preflight(subject, allowed)  # raises Fault, or returns what was allowed

Here are their order and the record of what was let pass; each guard is a file beside this one.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Collection, Iterable
from pathlib import Path

import torch

from config import write_atomically
from guards.faults import Fault, refuse_unknown_faults
from guards.generation import generation
from guards.labels import labels
from guards.order import order
from guards.probe import probe
from guards.reference import reference, shared_updates
from guards.same_path import same_path
from guards.settings import settings
from guards.sizes import sizes
from guards.split import split
from guards.start import start
from guards.subject import Guard, GuardSubject, shortened
from training.checkpoint import read_run_file

GUARDS: dict[str, Guard] = {
    "sizes": sizes,
    "labels": labels,
    "order": order,
    "probe": probe,
    "start": start,
    "split": split,
    "settings": settings,
    "same path": same_path,
    "generation": generation,
    "reference": reference,
}
# Of a run that several processes share, after the first has passed all of those above.
TOGETHER: dict[str, Guard] = {"processes": shared_updates}
# Guards that need not go through every block of a large model.
BY_BLOCKS = ("probe", "settings", "same path", "generation")


def preflight(
    subject: GuardSubject, allowed: Iterable[str] = (), guards: Iterable[str] | None = None
) -> list[Fault]:
    """Run every guard and print a line for each; return the faults that `allowed` let pass.

    Args:
        guards: The names of those to run; by default all of GUARDS.

    Raises:
        Fault: The first one that is not allowed.
    """
    passed, allowed = [], set(allowed)
    refuse_unknown_faults(allowed)
    device = subject.precision.device
    # The run's own device only: to read the state of another GPU makes a context of CUDA on it, 0.5 GB.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for name in GUARDS if guards is None else guards:
            passed += run_guard(subject, name, allowed)
    return passed


def run_guard(subject: GuardSubject, name: str, allowed: Collection[str]) -> list[Fault]:
    """Run one guard by name, as `preflight` does."""
    started = time.perf_counter()
    passed, said = [], []
    with shortened(subject.model) if name in BY_BLOCKS else contextlib.nullcontext():
        for finding in (GUARDS | TOGETHER)[name](subject):
            if isinstance(finding, str):
                said.append(finding)
            elif finding.name in allowed:
                passed.append(finding)
                print(f"ALLOWED {finding.name}: {finding.evidence}", file=sys.stderr)
            else:
                raise finding
    seconds = time.perf_counter() - started
    print(f"preflight, {name}: {'; '.join(said) or 'passed'} ({seconds:.1f} s)")
    return passed


def record_overrides(folder: Path, faults: Iterable[Fault]) -> None:
    """Add what `--allow` let pass to RUN/overrides.json; it is printed with every later score."""
    known = overrides(folder) | {fault.name: fault.evidence for fault in faults}
    if known:
        write_atomically(folder / "overrides.json", json.dumps(known, indent=1))


def overrides(folder: Path) -> dict[str, str]:
    """Return name and evidence of the faults that a run was allowed to have."""
    path = folder / "overrides.json"
    return (
        read_run_file(path, lambda path: dict(json.loads(path.read_text("utf-8")))) if path.is_file() else {}
    )
