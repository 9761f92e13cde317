"""Token scores by document: their intervals, verdicts and table. No torch.

Files are resampled: the tokens of one file are not independent, and neither are documents that are parts of
one. An evaluation stores each document's summed loss, so that two of the same files can be compared in pairs.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from metrics.estimates import perplexity
from metrics.intervals import Comparison, OfSums, compare, interval
from suites.scoring import NAMED, origin_of
from suites.tables import aligned

# With more files, neighbours are summed to one unit: intervals are no narrower, and resampling no slower.
MOST_UNITS = 10_000


def add_intervals(result: dict[str, Any], documents: dict[str, Any], seed: int) -> None:
    """Put each document's sums, 95% intervals of each system, and the model's differences into `result`.

    A difference is the model's score less the other's on the same resamples, so below 0 the model is better.

    Args:
        documents: `names`, `tokens` and `bytes` of the documents, and by system `nats`, `top1` and `top5`:
            each document's summed loss and hits. Older evaluations have no hits.
    """
    result["documents"] = documents
    names: list[str] = list(documents["nats"])
    model, *others = names
    rows = {system: rows_of(documents, system) for system in names}
    if len(rows[model]) < 2:
        return
    verdicts: dict[str, Any] = {}
    for key, of_sums in known_of(documents).items():
        for system in names:
            found = interval(rows[system], of_sums, seed)
            result[system].setdefault("intervals", {})[key] = found._asdict()
        if key not in LOWER_IS_BETTER:
            continue
        verdicts[key] = {}
        for other in others:
            compared = compare(rows[model], rows[other], of_sums, seed)
            verdicts[key][other] = {
                **compared.difference._asdict(),
                "distinguishable": compared.distinguishable,
                "verdict": said(compared, NAMED.get(other, other), documents),
            }
    result["token_verdicts"] = verdicts


def rows_of(documents: dict[str, Any], system: str) -> np.ndarray:
    """Return the summed loss in nats, tokens, bytes and hits of each file, (units, 5).

    Documents may be parts of one file, and their rows are summed.
    """
    columns = [documents["nats"][system], documents["tokens"], documents["bytes"]]
    none = [0] * len(documents["names"])
    columns += [documents[key][system] if key in documents else none for key in HITS]
    rows = np.column_stack([np.asarray(column, np.float64) for column in columns])
    numbers: dict[str, int] = {}
    owner = np.array([numbers.setdefault(name, len(numbers)) for name in _files(documents)])
    files = np.zeros((len(numbers), rows.shape[1]))
    np.add.at(files, owner, rows)
    units = min(len(files), MOST_UNITS)
    edges = np.arange(units) * len(files) // units
    return np.add.reduceat(files, edges, axis=0)


def values_of(documents: dict[str, Any], system: str) -> dict[str, float]:
    """Return the scores of all documents together, by key."""
    sums = rows_of(documents, system).sum(0)
    values = {key: float(of_sums(sums)) for key, of_sums in known_of(documents).items()}
    return values | {"perplexity": perplexity(values["loss"], 1)}


def units_of(documents: dict[str, Any]) -> str:
    """Return the word for the units that are resampled."""
    return "files" if len(set(_files(documents))) < len(documents["names"]) else "documents"


def _files(documents: dict[str, Any]) -> list[str]:
    """Return the file that each document is from; if all are from one, each document stands for itself."""
    names = documents["names"]
    files = [origin_of(name) for name in names]
    return files if len(set(files)) > 1 else [f"{name} {i}" for i, name in enumerate(names)]


def _loss(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def _bits_per_byte(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / math.log(2) / np.maximum(sums[..., 2], 1)


def _share(column: int, sums: np.ndarray) -> np.ndarray:
    return sums[..., column] / np.maximum(sums[..., 1], 1)


HITS = "top1", "top5"
LOWER_IS_BETTER = {"loss": _loss, "bits_per_byte": _bits_per_byte}
OF_SUMS = LOWER_IS_BETTER | {key: partial(_share, column) for column, key in enumerate(HITS, 3)}


def known_of(documents: dict[str, Any]) -> dict[str, OfSums]:
    """Return the functions of the scores that these documents have, by key."""
    return {key: of_sums for key, of_sums in OF_SUMS.items() if key not in HITS or key in documents}


def said(compared: Comparison, other: str, documents: dict[str, Any]) -> str:
    """Return the verdict in words, with the difference's interval, for a score of which lower is better."""
    units = units_of(documents)
    low, high, n = compared.difference.low, compared.difference.high, compared.difference.n
    if not compared.distinguishable:
        return compared.verdict(other, higher_is_better=False).replace("samples", units)
    better, size = compared.difference.mean < 0, abs(compared.difference.mean)
    ends = sorted((abs(low), abs(high)))
    return (
        f"{'better' if better else 'worse'} than {other} by {size:.4f} [{ends[0]:.4f}, {ends[1]:.4f}] "
        f"on {n} {units}"
    )


# --- the table -----------------------------------------------------------------------------------------


def token_table(result: dict[str, Any]) -> list[str]:
    """Return the lines of a table: metric, model, its base if there is one, n-gram model, and over what."""
    names = [name for name in ("model", "base", "n-gram") if name in result]
    over_tokens = f"{result['model']['tokens']:,} tokens of {result['files']:,} {result['side']} files"
    rows = [["metric", *names[:-1], f"{result['n-gram order']}-gram"]]
    overs = ["over"]
    for key, name, form, over in (
        ("loss", "loss, nats a token", "{:.4f}", over_tokens),
        ("perplexity", "perplexity", "{:.2f}", "the same"),
        ("bits_per_byte", "bits per byte", "{:.4f}", f"{result['bytes']:,} bytes of the same"),
        ("top1", "top-1 accuracy", "{:.2%}", over_tokens),
        ("top5", "top-5 accuracy", "{:.2%}", "the same"),
    ):
        rows.append([name, *(form.format(result[system][key]) for system in names)])
        overs.append(over)
        intervals = [result[system].get("intervals", {}).get(key) for system in names]
        if key == "perplexity":  # It is one to one with the loss.
            losses = (result[system].get("intervals", {}).get("loss") for system in names)
            intervals = [one and {end: perplexity(one[end], 1) for end in ("low", "high")} for one in losses]
        if all(intervals):
            ends = ([form.format(i[end]) for end in ("low", "high")] for i in intervals if i)
            rows.append(["  95% interval", *(f"[{', '.join(pair)}]" for pair in ends)])
            overs.append("")
    head, rule, *body = aligned(rows)
    lines = [f"{line}  {over}".rstrip() for line, over in zip([head, *body], overs, strict=True)]
    table = [lines[0], rule[0] * max(map(len, lines)), *lines[1:]]
    for found in result.get("token_verdicts", {}).get("loss", {}).values():
        table.append(f"loss: {found['verdict']}")
    return table
