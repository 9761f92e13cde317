"""python -m scraping status: print the counts of what was found, stored and dropped, which add up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scraping.counts import lines, size, stages
from scraping.ledger import Ledger
from scraping.shards import read_record


@dataclass(frozen=True)
class StatusSettings:
    """Settings of the command status.

    Args:
        folder: The corpus's folder: its ledger is `folder/ledger.sqlite`, `folder/clean` has the documents.
    """

    folder: str = "corpus"


def status_lines(ledger: Ledger) -> list[str]:
    """Return a line for each state and reason of searches, repositories and files, with a sum for each."""
    lines = []
    for table in ("searches", "repositories", "files"):
        counts = ledger.counts(table)
        if table == "searches":
            counts.pop(("split", ""), None)  # the searches that it was split into are counted
            if not counts:
                continue
        lines.append(table)
        for (state, reason), count in counts.items():
            lines.append(f"  {count:>12,}  {f'{state}: {reason}' if reason else state}")
        lines.append(f"  {sum(counts.values()):>12,}  found in all")
    others = ledger.rows("SELECT sum(others) FROM hosted")[0][0]
    if others:
        lines.append(f"  {others:>12,}  more of other extensions in the repositories that were crawled")
    return lines


def later_lines(folder: Path) -> list[str]:
    """Return the counts of the later stages: of the corpus if it was built, else of the cleaned parts."""
    corpus = folder / "corpus" / "corpus.json"
    if corpus.is_file():
        found = read_record(corpus, "stages", "bytes", "fingerprint")
        return ["corpus", *lines(found["stages"], size(found))]
    paths = sorted((folder / "clean").glob("part-*.json"))
    records = [read_record(path, "shard", "not stored", "input", "stages", "dropped") for path in paths]
    if not records:
        return []
    return [
        f"clean, {len(records)} of {records[0]['shard'].split('/')[1]} parts",
        *lines(stages(records), "documents"),
    ]


def run(settings: StatusSettings) -> None:
    """Print `status_lines` and `later_lines`; raise a ValueError if there is no ledger."""
    path = Path(settings.folder) / "ledger.sqlite"
    if not path.is_file():
        raise ValueError(f"{settings.folder} holds no ledger.sqlite: name a corpus folder with --folder")
    print("\n".join(status_lines(Ledger(path)) + later_lines(path.parent)))
