"""The device and the number format that are chosen for a machine, and the memory that is kept."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from config.files import REPOSITORY
from modules.precision import choose_device, choose_precision

FAULTS = """
import resource, sys, torch
from modules.precision import keep_freed_memory
if "keep" in sys.argv and not keep_freed_memory():
    sys.exit(7)
def pages_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = torch.ones(2**23, requires_grad=True)
    (x * 1.5).sin().sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sum([pages_of_a_step() for _ in range(6)][3:]))
"""

RESIDENT = """
import sys, torch
from pathlib import Path
from modules.precision import keep_freed_memory, release_freed_memory
if not keep_freed_memory():
    sys.exit(7)
def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) // 1024
before = resident()
parts = [torch.ones(2**20) for _ in range(64)]
last = torch.ones(2**20)  # above them, so that the heap itself cannot shrink
del parts
kept = resident()
release_freed_memory()
print(kept - before, resident() - before)
"""


def pages(*flags: str) -> int:
    command = [sys.executable, "-c", FAULTS, *flags]
    result = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    if result.returncode == 7:
        pytest.skip("no glibc here")
    return int(result.stdout)


@pytest.mark.slow
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """The kernel clears the pages of each large tensor in each step, unless the process keeps them."""
    assert pages("keep") < 0.5 * pages()


def test_kept_memory_is_given_back_when_asked() -> None:
    result = subprocess.run(
        [sys.executable, "-c", RESIDENT], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    if result.returncode == 7:
        pytest.skip("no glibc here")
    kept, left = map(int, result.stdout.split())
    assert kept > 200 and left < 50  # In MB, after 256 MB were freed.


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device 'gpu' is not known"):
        choose_device("gpu")
    with pytest.raises(ValueError, match="fp16 was asked for on a CPU"):
        choose_precision(torch.device("cpu"), "fp16")


def test_a_numbered_gpu_becomes_the_current_one_and_a_missing_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("auto", "cuda", "cpu"):
        choose_device(name)
    assert current == []
    assert choose_device("cuda:1") == torch.device("cuda:1") and current == [torch.device("cuda:1")]
    with pytest.raises(ValueError, match=r"'cuda:2' was asked for, but torch sees 2 GPUs .* is cuda:1; use"):
        choose_device("cuda:2")
