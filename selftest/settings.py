"""The settings of `python preflight.py`; torch is not needed to read them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SelftestSettings:
    """The flags of `python preflight.py`.

    Args:
        selftest: Plant every fault in a small healthy run, and see it caught by its name.
        explain: Say what a fault means, and what to do about it, instead.
    """

    selftest: bool = False
    explain: str = ""
