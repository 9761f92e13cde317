"""Tables for the terminal: a suite's scores beside those of its baselines, and any rows aligned. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from suites.scoring import SUITES, origin_of

MUCH_CUT = 0.25  # The share of trimmed prompts from which on there is a warning.


def suite_table(record: dict[str, Any]) -> str:
    """Return a table with a row for each metric and a column for each system, and the verdicts below.

    Raises:
        ValueError: The record has no baseline.
    """
    suite, systems = SUITES[record["suite"]], list(record["scores"])
    if len(systems) < 2:
        raise ValueError(f"the suite {suite.name} has no baseline, so its scores are not shown")
    files = len({origin_of(sample["name"]) for sample in record["samples"]})
    head = f"{suite.title}: {suite.counted.format(n=len(record['samples']), files=files)}"
    rows = [["metric", *systems]]
    for name in record["signatures"]:
        intervals = (record["scores"][system][name] for system in systems)
        rows.append([name, *map(_shown, intervals)])
    lines = aligned(rows + shares_told([(record, system) for system in systems]))
    cut = max(record.get("trimmed", {}).values(), default=0)
    if cut >= MUCH_CUT:
        lines.append(
            f"warning: {cut:.1%} of the prompts were cut, so that these scores are of prompts without their "
            "beginning: a row has no room for them; train with a longer --row_length, or ask for less with "
            "--max_new_tokens"
        )
    for name, verdict in record["verdicts"].items():
        against = [verdict["best"], *(["base"] if "base" in verdict["against"] else [])]
        said = dict.fromkeys(verdict["against"][one] for one in against)  # Both verdicts may be the same.
        lines.append(f"{name}: {'; '.join(said)}")
    if "without" in record:
        lines.append(f"beside these: {record['without']}")
    if "sandbox" in record:
        lines.append(f"sandbox: {record['sandbox']}")
    left_out = record.get("left_out", {})
    if left_out:
        lines.append(
            f"{len(left_out)} problems cannot be judged here and are left out: {', '.join(left_out)}"
        )
    draws = record.get("draws", 1)
    each = f", {draws} draws each" if draws > 1 else ""
    over = " over files" if 1 < files < len(record["samples"]) else ""
    return "\n".join([f"{head}{each}, with 95% intervals{over}", *lines])


def shares_told(systems: Sequence[tuple[dict[str, Any], str]]) -> list[list[str]]:
    """Return table rows: the share of texts that ran into the limit or are empty, and of prompts cut.

    Args:
        systems: A record and the name of one of its systems, for each column.
    """
    rows = []
    for key, name in (
        ("ran_long", "ran into the limit"),
        ("empty", "empty answers"),
        ("trimmed", "prompts cut to fit"),
    ):
        shares = [record.get(key, {}).get(system) for record, system in systems]
        if any(share is not None and (share or key != "trimmed") for share in shares):
            rows.append([name, *("" if share is None else f"{share:.1%}" for share in shares)])
    return rows


def _shown(interval: dict[str, Any]) -> str:
    spread = f" ±{interval['spread']:.1f}" if "spread" in interval else ""
    return "{mean:.1f}{spread} [{low:.1f}, {high:.1f}]".format(**interval | {"spread": spread})


def aligned(rows: list[list[str]]) -> list[str]:
    """Return the lines of a table: first column to the left, others to the right, a rule below the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [f"{value:>{width}}" for value, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return lines
