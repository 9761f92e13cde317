"""What is chosen for this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from precision import choose_device, choose_precision

HOUSE = Path(__file__).parent.parent
FAULTS = """
import resource, sys, torch
from precision import keep_freed_memory
if "keep" in sys.argv and not keep_freed_memory():
    sys.exit(7)
def pages_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = torch.ones(2**23, requires_grad=True)
    (x * 1.5).sin().sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sum([pages_of_a_step() for _ in range(6)][3:]))
"""


def pages(*flags: str) -> int:
    command = [sys.executable, "-c", FAULTS, *flags]
    result = subprocess.run(command, cwd=HOUSE, stdout=subprocess.PIPE, text=True)
    if result.returncode == 7:
        pytest.skip("no glibc here")
    return int(result.stdout)


@pytest.mark.slow
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """The kernel clears the pages of each large tensor in each step, unless the process keeps them."""
    assert pages("keep") < 0.5 * pages()


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device 'gpu' is not known"):
        choose_device("gpu")
    with pytest.raises(ValueError, match="fp16 was asked for on a CPU"):
        choose_precision(torch.device("cpu"), "fp16")
