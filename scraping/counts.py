"""Counts of the files that were found, stage by stage: in, dropped by reason, out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any


def stages(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for fetching and each stage of cleaning, its counts summed over the records of all parts."""
    left = sum(record["input"]["files"] for record in records)
    unfetched = summed(record["not stored"] for record in records)
    names = dict.fromkeys(name for record in records for name in (*record["stages"], *record["dropped"]))
    found = [{"stage": "fetch", "in": left + sum(unfetched.values()), "out": left, "dropped": unfetched}]
    for name in names:
        reasons = (record["dropped"].get(name, {}) for record in records)
        dropped = summed({reason: n["files"] for reason, n in there.items()} for there in reasons)
        out = left - sum(dropped.values())
        found.append({"stage": name, "in": left, "out": out, "dropped": dropped})
        left = out
    return found


def summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def lines(stages: list[dict[str, Any]], size: str) -> list[str]:
    """Return the counts as lines of a table; `size` describes what came out."""
    table = [f"{stages[0]['in']:>12,}  files were found"]
    for stage in stages:
        for reason, count in stage["dropped"].items():
            table.append(f"{-count:>12,}  {stage['stage']}: {reason}")
    return [*table, f"{stages[-1]['out']:>12,}  {size}"]


def size(corpus: dict[str, Any]) -> str:
    return f"documents, {corpus['bytes']:,} bytes, fingerprint {corpus['fingerprint'][:12]}"
