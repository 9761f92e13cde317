"""python -m scraping stdlib: take in the interpreter's own library with its tests, without site-packages."""

from __future__ import annotations

import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from scraping.local import take_folder
from scraping.source import Origin, Selection, open_ledger, report

LEFT_OUT = frozenset({b"site-packages", b"dist-packages"})  # installed packages, each with its own licence


@dataclass(frozen=True)
class StdlibSettings(Selection):
    """Settings of the command stdlib: which files of the library are wanted."""


def run(settings: StdlibSettings) -> None:
    """Enter the interpreter's library into the ledger."""
    wanted = settings.wanted()
    ledger = open_ledger(settings.folder)
    # The revision is the tag of this version in the repository of that name; python.org states the licence.
    origin = Origin("python/cpython", "stdlib", f"v{platform.python_version()}", "PSF-2.0")
    take_folder(ledger, origin, Path(sysconfig.get_path("stdlib")), wanted, LEFT_OUT)
    report(ledger, origin.name)
