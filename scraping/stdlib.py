"""python -m scraping stdlib: the running interpreter's own library, tests too, without what was installed."""

from __future__ import annotations

import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from scraping.local import take_folder
from scraping.source import Origin, Selection, open_ledger, report

LEFT_OUT = frozenset({b"site-packages", b"dist-packages"})  # of others, each with a licence of its own


@dataclass(frozen=True)
class StdlibSettings(Selection):
    """Which of its files."""


def run(settings: StdlibSettings) -> None:
    """See the module."""
    wanted = settings.wanted()
    ledger = open_ledger(settings.folder)
    # The tag that this version has in the repository of that name; the licence is what python.org states.
    origin = Origin("python/cpython", "stdlib", f"v{platform.python_version()}", "PSF-2.0")
    take_folder(ledger, origin, Path(sysconfig.get_path("stdlib")), wanted, LEFT_OUT)
    report(ledger, origin.name)
