"""python -m scraping status: what the ledger knows, in counts that add up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scraping.ledger import Ledger


@dataclass(frozen=True)
class Settings:
    """Where to look.

    Args:
        folder: Of the corpus: its ledger is `folder/ledger.sqlite`.
    """

    folder: str = "corpus"


def status_lines(ledger: Ledger) -> list[str]:
    """One line a state and reason, of repositories and of files, each block ending in its sum."""
    lines = []
    for table in ("repositories", "files"):
        counts = ledger.counts(table)
        lines.append(table)
        for (state, reason), count in counts.items():
            lines.append(f"  {count:>12,}  {f'{state}: {reason}' if reason else state}")
        lines.append(f"  {sum(counts.values()):>12,}  found in all")
    return lines


def run(settings: Settings) -> None:
    """Print `status_lines`; ValueError if there is no ledger."""
    path = Path(settings.folder) / "ledger.sqlite"
    if not path.is_file():
        raise ValueError(f"{settings.folder} holds no ledger.sqlite: name a corpus folder with --folder")
    print("\n".join(status_lines(Ledger(path))))
