"""What is chosen for this machine."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from precision import choose_device, choose_precision

FAULTS = """
import resource, sys, torch
from precision import keep_freed_memory
if "keep" in sys.argv and not keep_freed_memory():
    sys.exit(7)
def pages_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24).sum().item()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([pages_of_a_step() for _ in range(3)][-1])
"""


def pages(*flags: str) -> int:
    result = subprocess.run([sys.executable, "-c", FAULTS, *flags], stdout=subprocess.PIPE, text=True)
    if result.returncode == 7:
        pytest.skip("no glibc here")
    return int(result.stdout)


def test_freed_memory_is_kept_for_the_next_step() -> None:
    """64 MB are 16,384 pages; by default each step has the kernel map them anew."""
    assert pages("keep") < 100 < pages()


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device 'gpu' is not known"):
        choose_device("gpu")
    with pytest.raises(ValueError, match="fp16 was asked for on a CPU"):
        choose_precision(torch.device("cpu"), "fp16")
