"""python -m scraping status: what was found and what became of it, in counts that add up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scraping.counts import lines, size, stages
from scraping.ledger import Ledger
from scraping.shards import read_record


@dataclass(frozen=True)
class StatusSettings:
    """Where to look.

    Args:
        folder: Of the corpus: its ledger is `folder/ledger.sqlite`, `folder/clean` has the documents.
    """

    folder: str = "corpus"


def status_lines(ledger: Ledger) -> list[str]:
    """One line a state and reason, of searches, repositories and files, each block ending in its sum."""
    lines = []
    for table in ("searches", "repositories", "files"):
        counts = ledger.counts(table)
        if table == "searches":
            counts.pop(("split", ""), None)  # each stands for the searches that it was split into
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
    """What became of the stored files: of the corpus if it was built, else of the parts that were cleaned."""
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
    """Print `status_lines` and `later_lines`; ValueError if there is no ledger."""
    path = Path(settings.folder) / "ledger.sqlite"
    if not path.is_file():
        raise ValueError(f"{settings.folder} holds no ledger.sqlite: name a corpus folder with --folder")
    print("\n".join(status_lines(Ledger(path)) + later_lines(path.parent)))
