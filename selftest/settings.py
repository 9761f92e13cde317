"""The settings of `python preflight.py`; torch is not needed to read them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SelftestSettings:
    """The one flag of `python preflight.py`.

    Args:
        selftest: Plant every fault in a small healthy run, and see it caught by its name.
    """

    selftest: bool = False
